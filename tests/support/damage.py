"""What may happen to a file on a disk, and a limit of time for what then reads it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Fault = Callable[[Path, Path], object]
"""Called with a file and a sibling of the same kind."""


def flip(at: float) -> Fault:
    """Flips a bit of the byte at this share of the file."""

    def change(file: Path, sibling: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return change


def rewrite(change: Callable[[bytes], bytes]) -> Fault:
    return lambda file, sibling: file.write_bytes(change(file.read_bytes()))


def swap(file: Path, sibling: Path) -> None:
    one, other = file.read_bytes(), sibling.read_bytes()
    file.write_bytes(other)
    sibling.write_bytes(one)


def replace(make: Callable[[Path, Path], object]) -> Fault:
    """Something else in the place of the file."""

    def change(file: Path, sibling: Path) -> None:
        file.unlink()
        make(file, sibling)

    return change


FAULTS: dict[str, Fault] = {
    "truncated": rewrite(lambda data: data[: len(data) // 2]),
    "empty": rewrite(lambda data: b""),
    "zeroed": rewrite(lambda data: bytes(len(data))),
    "longer": rewrite(lambda data: data + b"\0"),
    "first bit": flip(0),
    "middle bit": flip(0.5),
    "last bit": flip(1),
    "deleted": replace(lambda file, sibling: None),
    "swapped": swap,
    "folder": replace(lambda file, sibling: file.mkdir()),
    "FIFO": replace(lambda file, sibling: os.mkfifo(file)),
    "link to a sibling": replace(lambda file, sibling: file.symlink_to(sibling)),
    "link to nothing": replace(lambda file, sibling: file.symlink_to("/nothing/there")),
    "link to itself": replace(lambda file, sibling: file.symlink_to(file.name)),
}
"""Every fault by name."""
ANOTHER_KIND = ("folder", "FIFO", "link to nothing", "link to itself")
"""The faults after which there is no file at all, but something else."""


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Raises ``TimeoutError`` in what hangs, as one that waits for a FIFO."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it has not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
