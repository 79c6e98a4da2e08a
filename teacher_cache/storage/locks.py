"""Locks that the kernel releases when their process dies; the only module that uses ``fcntl``."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.storage.atomic import naming_full_disk
from sskt.teacher_cache.storage.regular_files import require_regular

SHARDS_TWICE = (
    "several processes may label the same shards (give each its part with --share); the labels "
    "are right nevertheless"
)

FIRST_POLL, LONGEST_POLL = 0.002, 0.1
"""Seconds between two tries of a lock."""

ABANDONED_SECONDS = 24 * 3600.0
"""Age of a temporary file whose writer counts as dead on a file system without locks."""


@functools.lru_cache(maxsize=64)
def _warn_of_no_locks(folder: Path, so: str) -> None:
    logging.getLogger("sskt").warning("the file system of %s has no locks: %s", folder, so)


def _fcntl() -> Any:
    """The module, imported where a lock is taken, so that all else works without it.

    Raises:
        InputError: On a system that has none.
    """
    try:
        import fcntl
    except ImportError as error:
        raise InputError(
            "this system has no POSIX file locks, which writing label sets and serving them need; "
            "use Linux, macOS or WSL"
        ) from error
    return fcntl


def lock_file(handle: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Locks a whole file (``flock``); every handle of it has a lock of its own.

    Args:
        handle: File descriptor. Closing it, or the end of the process, ends the lock.
        shared: Whether others may have shared locks beside this one.
        wait: Whether to wait for the lock.

    Returns:
        False if another handle has the lock and ``wait`` is not set.
    """
    fcntl = _fcntl()
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, mode if wait else mode | fcntl.LOCK_NB)
    except OSError as error:
        if wait or error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def unlock_file(handle: int) -> None:
    """Ends a lock of ``lock_file``, also where a duplicate of the handle stays open."""
    _fcntl().flock(handle, _fcntl().LOCK_UN)


@contextlib.contextmanager
def file_lock(
    path: Path, pause: Callable[[float], None] | None = None, *, mode: int = 0o600
) -> Iterator[None]:
    """Holds the lock of a file; waits for it.

    Each holder opens the file anew, so that threads exclude each other too.

    Args:
        path: The file, which is created if it does not exist.
        pause: Called with seconds to sleep while the lock is not free, so that waiting can be
            reported and ended by an exception; without it the kernel waits.
        mode: Permissions of a new file, less the umask.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        seconds = FIRST_POLL
        while not lock_file(handle, wait=pause is None):
            assert pause is not None
            pause(seconds)
            seconds = min(2 * seconds, LONGEST_POLL)
        try:
            yield
        finally:
            unlock_file(handle)  # a process forked meanwhile has a duplicate of the handle
    finally:
        os.close(handle)


def _open_lock(path: Path) -> int:
    """Opens a lock file. Raises ``InputError`` if something else is in its place."""
    handle = -1
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        require_regular(handle, path)
    except OSError as error:
        if handle >= 0:
            os.close(handle)
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENOENT, errno.ENXIO, errno.EINVAL):
            raise
        raise InputError(
            f"{path} is in the place of a lock file ({error.strerror}); remove it and run the "
            "same command again"
        ) from error
    return handle


class Locks:
    """Locks on the bytes of a file, which the kernel releases when a process dies.

    On a file system without locks every lock is granted, ``working`` becomes False, and a warning
    is logged once.

    The kernel also releases all locks of a process on a file as soon as that process closes any
    handle of it: call ``open_here`` before opening a second one.

    Args:
        path: The lock file, which is created if it does not exist.
        without: What the lack of locks means, for the warning.

    Raises:
        InputError: If the file cannot be written.
        DiskFull: If there is no room for it.
    """

    _open: ClassVar[Counter[Path]] = Counter()
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path, without: str = SHARDS_TWICE) -> None:
        self.working, self._without = True, without
        with naming_full_disk(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = _open_lock(path)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                raise InputError(f"cannot write to {path.parent}: {error.strerror}") from error
        self._path = path.resolve()
        with self._guard:
            self._open[self._path] += 1

    @classmethod
    def open_here(cls, path: Path) -> bool:
        """Whether this process has the file open."""
        with cls._guard:
            return cls._open[path.resolve()] > 0

    def acquire(self, byte: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Locks a byte.

        Args:
            byte: Number of the byte.
            shared: Whether others may have shared locks beside this one.
            wait: Whether to wait for the lock.

        Returns:
            False if another process has the lock and ``wait`` is not set.
        """
        fcntl = _fcntl()
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._handle, mode | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            self.working = False
            _warn_of_no_locks(self._path.parent, self._without)
        return True

    def abandoned(self, leftover: Path) -> bool:
        """Whether the writer of a temporary file is dead.

        The caller holds the lock that its writers hold. Ages are differences of two times of the
        same file system, which may be another machine's, and one in the future counts as long ago.
        """
        if self.working:
            return leftover.exists()
        try:
            os.utime(self._handle)
            age = os.fstat(self._handle).st_mtime - leftover.stat().st_mtime
        except OSError:
            return False
        return abs(age) > ABANDONED_SECONDS

    def release(self, byte: int) -> None:
        """Releases a byte."""
        with contextlib.suppress(OSError):  # the file system has no locks
            _fcntl().lockf(self._handle, _fcntl().LOCK_UN, 1, byte)

    def close(self) -> None:
        """Releases all locks. A second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            with self._guard:
                self._open[self._path] -= 1

    @contextlib.contextmanager
    def held(self, byte: int) -> Iterator[None]:
        """Waits for the lock of a byte and holds it until the context ends."""
        self.acquire(byte, wait=True)
        try:
            yield
        finally:
            self.release(byte)
