"""This user's temporary folder for shard files, which its last process removes.

Beside each server's folder is a file ``NAME.users`` that every process using it has locked as
shared. A process that can lock it alone is the last one, or comes after processes that were killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.storage.locks import file_lock, lock_file, unlock_file

PREFIX = "sskt-labels-"


def private_folder() -> Path:
    """The folder, which no other user can read. Raises ``InputError`` if another one can."""
    path = Path(tempfile.gettempdir()) / f"{PREFIX}{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise InputError(
            f"cannot use {path}: {error.strerror}; name a folder with --label-cache"
        ) from error
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not ours or found.st_mode & 0o077:
        raise InputError(
            f"other users can use {path}; remove it, or name a folder with --label-cache"
        )
    return path


def enter(base: Path, name: str) -> int:
    """Joins the processes that use a server's folder; removes the folders of killed ones."""
    with file_lock(base / "lock"):
        for lock in base.glob(f"{PREFIX}*.users"):
            if lock.stem != name:
                _remove_unused(base, lock.stem, os.open(lock, os.O_RDWR | os.O_CLOEXEC))
        handle = os.open(base / f"{name}.users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        lock_file(handle, shared=True)
        return handle


def leave(base: Path, name: str, handle: int, process: int) -> None:
    """Leaves them; the last process removes the folder."""
    if os.getpid() == process:
        with contextlib.suppress(OSError), file_lock(base / "lock"):
            _remove_unused(base, name, handle)


def _remove_unused(base: Path, name: str, users: int) -> None:
    try:
        if lock_file(users, wait=False):
            shutil.rmtree(base / name, ignore_errors=True)
            (base / f"{name}.users").unlink(missing_ok=True)
            unlock_file(users)
    finally:
        os.close(users)
