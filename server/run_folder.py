"""The folder that the processes of one server share, and the small databases in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from sskt.teacher_cache.errors import DiskFull
from sskt.teacher_cache.storage.locks import lock_file

PREFIX = "sskt-server-"
TOUCH_SECONDS = 3600.0
"""Seconds after which every file is marked as used: cleaners of temporary folders go by age."""


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A temporary folder that only this user can read, removed at the end.

    Folders that killed servers of this user left behind are removed, too. The folder is locked,
    which systemd-tmpfiles heeds, and its files are touched for cleaners that go by age.

    Yields:
        The folder.
    """
    folder, lock = _new_locked_folder()
    stopped = threading.Event()
    try:
        for other in folder.parent.glob(f"{PREFIX}*"):
            if other != folder and other.lstat().st_uid == os.getuid():
                _remove_unlocked(other)
        for name in ("prometheus", "queue"):
            (folder / name).mkdir()
        threading.Thread(target=_touch, args=(folder, stopped), daemon=True).start()
        yield folder
    finally:
        stopped.set()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new_locked_folder() -> tuple[Path, int]:
    while True:  # another server may take a folder that is not locked yet for an abandoned one
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            lock_file(handle)
            if folder.exists():
                return folder, handle
            os.close(handle)


def _remove_unlocked(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is gone, or no folder
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if lock_file(handle, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def make_private(folder: Path) -> None:
    """Makes a folder that only this user can read, and its parents, if they do not exist."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def touch_all(folder: Path) -> None:
    """Sets the times of a folder and of everything below it to now."""
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)


def _touch(folder: Path, stopped: threading.Event) -> None:
    while not stopped.wait(TOUCH_SECONDS):
        touch_all(folder)


@contextlib.contextmanager
def database(
    path: Path, schema: str, *, change: bool = False, timeout: float = 30.0
) -> Iterator[sqlite3.Connection]:
    """One transaction on a database that all processes of a server share.

    A process that is killed leaves the state before its transaction. The file is not synchronised
    with the disk, as it does not outlive the server.

    Args:
        path: The file; it and its folder are made if they do not exist.
        schema: SQL that creates the tables if they do not exist.
        change: Whether to exclude other writers from the beginning.
        timeout: Seconds to wait for other writers.

    Yields:
        The connection.

    Raises:
        DiskFull: If there is no room for the change.
    """
    make_private(path.parent)
    connection = sqlite3.connect(path, timeout=timeout, isolation_level=None)
    try:
        # A journal that stays is there when the disk is full.
        connection.executescript(f"pragma journal_mode=persist; pragma synchronous=off; {schema}")
        connection.execute("begin immediate" if change else "begin")
        yield connection
        connection.execute("commit")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise DiskFull(f"no room to write {path}; free some space on its disk") from error
        raise
    finally:
        connection.close()
