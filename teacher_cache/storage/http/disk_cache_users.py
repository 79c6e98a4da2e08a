"""This user's folder for temporary shard files, and which processes use what in it.

Each server's folder has a file ``.users`` beside it, which its users hold shared: who can hold it
alone is the last one, or comes after users that were killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.storage.locks import file_lock, lock_file, unlock_file

PREFIX = "sskt-labels-"


def private_folder() -> Path:
    """This user's folder for temporary shard files. Raises ``InputError`` if it is not theirs."""
    path = Path(tempfile.gettempdir()) / f"{PREFIX}{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise InputError(f"cannot use {path}: {error.strerror}; give --label-cache") from error
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not ours or found.st_mode & 0o077:
        raise InputError(
            f"{path} is not this user's alone; remove it, or give a folder with --label-cache"
        )
    return path


@contextlib.contextmanager
def _folder_locked(base: Path) -> Iterator[None]:
    """Coming and going, one process at a time."""
    with file_lock(base / "lock"):
        yield


def enter(base: Path, name: str) -> int:
    """Joins the users of a server's folder; removes those that killed users have left."""
    with _folder_locked(base):
        for lock in base.glob(f"{PREFIX}*.users"):
            if lock.stem != name:
                _remove_unused(base, lock.stem, os.open(lock, os.O_RDWR | os.O_CLOEXEC))
        handle = os.open(base / f"{name}.users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        lock_file(handle, shared=True)
        return handle


def leave(base: Path, name: str, handle: int, process: int) -> None:
    """Parts from them; the last one removes the folder."""
    if os.getpid() == process:
        with contextlib.suppress(OSError), _folder_locked(base):
            _remove_unused(base, name, handle)


def _remove_unused(base: Path, name: str, users: int) -> None:
    """Removes a server's folder unless somebody else uses it; closes the handle."""
    try:
        if lock_file(users, wait=False):
            shutil.rmtree(base / name, ignore_errors=True)
            (base / f"{name}.users").unlink(missing_ok=True)
            unlock_file(users)
    finally:
        os.close(users)
