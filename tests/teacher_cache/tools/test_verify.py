"""``verify`` finds every damage of every kind of file of a label set, and never waits for one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.random_labels import make_labels

Sskt = Callable[..., tuple[int, str, str]]
SECONDS = 30


def flip(at: float) -> Callable[[Path, Path], None]:
    """Flips a bit of the byte at this share of the file."""

    def change(file: Path, sibling: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return change


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def written(file: Path, sibling: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return written


def swap(file: Path, sibling: Path) -> None:
    one, other = file.read_bytes(), sibling.read_bytes()
    file.write_bytes(other)
    sibling.write_bytes(one)


def replace(make: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    """Something else in the place of the file."""

    def change(file: Path, sibling: Path) -> None:
        file.unlink()
        make(file, sibling)

    return change


FAULTS: dict[str, Callable[[Path, Path], None]] = {
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
FILES = {
    "zarr.json": "group",
    "labels/zarr.json": "array",
    "view_check/zarr.json": "array",
    "labels/c/1/0/0": "shard",
    "view_check/c/1/0": "shard",
    "view_check/c/1/0.json": "record",
    "index/c/1/1/0": "shard",
    "value/c/1/1/0": "shard",
    "index/zarr.json": "array",
    "seed/zarr.json": "alike",
    "seed/c/0": "alike",
    "sample/zarr.json": "array",
    "sample/c/0": "array",
    "class/zarr.json": "alike",
    "class/c/0": "alike",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By encoding: a label set of two blocks and three seeds, and another one like it."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        encoding: (
            make_labels(folder / encoding, encoding, samples=600).path,
            make_labels(folder / f"other {encoding}", encoding, samples=601, salt=1).path,
        )
        for encoding in ("f16", "topk-3")
    }


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Ends a test that waits for a FIFO."""

    def late(*_: object) -> None:
        raise TimeoutError(f"verify has not ended after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


CASES = [
    (name, fault)
    for name, kind in FILES.items()
    for fault in FAULTS
    if kind != "alike" or fault not in ("swapped", "link to a sibling")  # both have that file
]


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_every_damage_of_every_file_is_found(
    name: str, fault: str, sets: dict[str, tuple[Path, Path]], tmp_path: Path, sskt: Sskt
) -> None:
    whole, other = sets["topk-3" if name.startswith(("index", "value")) else "f16"]
    damaged = shutil.copytree(whole, tmp_path / "cache" / whole.name)
    sibling = shutil.copytree(other, tmp_path / "other" / other.name) / name
    if FILES[name] in ("shard", "record"):
        sibling = damaged / name.replace("/c/1/", "/c/0/")
    FAULTS[fault](damaged / name, sibling)
    status, out, err = sskt("verify", "--cache", tmp_path / "cache")
    assert status == 1 and not err, (out, err)
    assert damaged.name in out and "clean" not in out


def test_whole_sets_are_clean(sets: dict[str, tuple[Path, Path]], sskt: Sskt) -> None:
    for whole, other in sets.values():
        for path in (whole, other):
            status, out, err = sskt("verify", "--cache", path.parent)
            assert status == 0 and ": clean" in out, err
