"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from sskt.teacher_cache.errors import DiskFull


def durable_write(path: Path, data: bytes | memoryview) -> None:
    """Writes a file that is there whole or not at all: temporary, fsync, rename, fsync of folder.

    Raises ``DiskFull`` (the temporary file is removed) when there is no room.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with naming_full_disk(path):
        try:
            _make_folders(path.parent)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turns the errors of a full disk into ``DiskFull``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            f"no room to write {path} ({error.strerror}); all shards "
            "stored so far are valid: free some space and run the same command again "
            "(sskt train: with --resume)"
        ) from error


def durable_rename(path: Path, to: Path) -> None:
    """Renames within a folder, for good. Raises ``DiskFull``."""
    with naming_full_disk(to):
        path.rename(to)
        sync_folder(to.parent)


def _make_folders(folder: Path) -> None:
    if not folder.is_dir():
        _make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
