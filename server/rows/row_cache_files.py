"""Files of decoded rows shared by all workers: made once, least recently used ones removed.

A file that is being made has its final size from the start and is locked by its maker, so the
budget holds at every moment, and what a killed maker leaves is seen as such.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sskt.teacher_cache.storage.locks import file_lock, lock_file, unlock_file

SLAB, PARTIAL = ".slab", ".partial"
HASTY_SECONDS = 10.0
"""A file that is removed so soon after its last use says that the budget is too small."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(Exception):
    """A file cannot be kept now; the message says why."""


@dataclass(frozen=True)
class _Kept:
    used: float
    size: int
    path: Path


@dataclass(frozen=True)
class Making:
    """A file whose room is reserved."""

    handle: int
    partial: Path
    path: Path
    size: int

    def finish(self, parts: Iterable[tuple[int, memoryview]]) -> mmap.mmap:
        """Writes (offset, bytes) and puts the file in its place. Raises ``NoRoom``."""
        with keeping():
            for offset, data in parts:
                while data:
                    done = os.pwrite(self.handle, data, offset)
                    offset, data = offset + done, data[done:]
            mapped = _mapped(self.handle, self.size)
            if mapped is None:
                raise NoRoom(f"{self.path} has not got its size")
            with alone(self.path.parent):  # who counts the files sees each of them once
                self.partial.rename(self.path)
            return mapped


@dataclass
class SlabFolder:
    """The files of one server. ``budget``: bytes of all of them together. Safe from any thread."""

    folder: Path
    budget: int

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def open(self, name: str, size: int) -> mmap.mmap | None:
        """A file's content, mapped; None if it is not kept. Stays valid when it is removed."""
        try:
            handle = os.open(self.folder / f"{name}{SLAB}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return _mapped(handle, size)
        finally:
            os.close(handle)

    def touch(self, name: str) -> None:
        """Notes that a file is used."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / f"{name}{SLAB}")

    def names(self) -> set[str]:
        """All files that are kept."""
        try:
            found = os.listdir(self.folder)  # noqa: PTH208  (names, not paths)
        except OSError:
            return set()
        return {name.removesuffix(SLAB) for name in found if name.endswith(SLAB)}

    @contextlib.contextmanager
    def making(self, name: str, size: int) -> Iterator[Making | None]:
        """Reserves the room for a file, which is kept if ``Making.finish`` is called.

        Waits while another process or thread makes it; None if it is there then.
        Raises ``NoRoom`` if it fits into the budget or onto the disk in no way.
        """
        if size > self.budget:
            raise NoRoom(f"it has {size / 2**20:.1f} MiB, --memory gives {self.budget / 2**20:.1f}")
        partial, path = (self.folder / f"{name}{ending}" for ending in (PARTIAL, SLAB))
        with keeping():
            handle = _locked(partial, path)
        if handle is None:
            yield None
            return
        try:
            with keeping():
                self._reserve(handle, size)
            yield Making(handle, partial, path, size)
        finally:
            with contextlib.suppress(OSError):
                if _is(partial, handle):
                    partial.unlink()
            # A mapping holds a duplicate of the handle, and the lock with it.
            unlock_file(handle)
            os.close(handle)

    def _reserve(self, handle: int, size: int) -> None:
        with alone(self.folder):
            kept, others = self._look()
            if others + size > self.budget:
                raise NoRoom("others are being made that fill --memory")
            over = others + sum(k.size for k in kept) + size - self.budget
            kept, before = _without_oldest(kept, over), kept
            _tell_of_haste(self.folder, before[: len(before) - len(kept)])
            try:
                _allocate(handle, size)
            except OSError as error:
                if error.errno not in _FULL or not kept:
                    raise
                _without_oldest(kept, size)
                _allocate(handle, size)

    def _look(self) -> tuple[list[_Kept], int]:
        """The files by their last use, and the bytes of those being made; dead ones are swept."""
        kept, making = [], 0
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                if entry.name.endswith(SLAB):
                    kept.append(_Kept(found.st_mtime, found.st_size, Path(entry.path)))
                elif entry.name.endswith(PARTIAL) and not _swept(Path(entry.path)):
                    making += found.st_size
        return sorted(kept, key=lambda k: k.used), making


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No two at once change which files a folder has."""
    with file_lock(folder / ".lock"):
        yield


def _without_oldest(kept: list[_Kept], size: int) -> list[_Kept]:
    """Removes files until ``size`` bytes are gained; gives those that stay."""
    gone = 0
    while gone < len(kept) and size > 0:
        oldest = kept[gone]
        oldest.path.unlink(missing_ok=True)
        gone, size = gone + 1, size - oldest.size
    return kept[gone:]


_told: set[Path] = set()


def _tell_of_haste(folder: Path, removed: list[_Kept]) -> None:
    if folder not in _told and any(time.time() - k.used < HASTY_SECONDS for k in removed):
        _told.add(folder)
        logging.getLogger("sskt").warning(
            "decoded labels are dropped within seconds of their use; batches are slow: give more "
            "--memory, best a whole seed's labels of each set in use"
        )


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Turns every failure to write files into ``NoRoom``."""
    try:
        yield
    except OSError as error:
        raise NoRoom(error.strerror or str(error)) from error


def _locked(partial: Path, path: Path) -> int | None:
    """The file to be made, locked; None if it is there meanwhile."""
    while True:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock_file(handle)
            ours = _is(partial, handle)  # not one that was swept, or finished, while we waited
            if not path.exists():
                if ours:
                    mine, handle = handle, -1
                    return mine
            else:
                if ours:
                    partial.unlink(missing_ok=True)
                return None
        finally:
            if handle >= 0:
                os.close(handle)


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _swept(partial: Path) -> bool:
    """Removes a file whose maker is dead."""
    handle = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not lock_file(handle, wait=False):
            return False
        if _is(partial, handle):
            partial.unlink(missing_ok=True)
        return True
    finally:
        os.close(handle)


def _allocate(handle: int, size: int) -> None:
    """Takes the room on the disk now, not in the middle of writing."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(handle, size)


def _mapped(handle: int, size: int) -> mmap.mmap | None:
    if os.fstat(handle).st_size != size:
        return None
    return mmap.mmap(handle, size, mmap.MAP_SHARED, mmap.PROT_READ)
