"""Atomic and durable writes of files."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from sskt.teacher_cache.errors import DiskFull

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def durable_write(
    path: Path,
    data: bytes | memoryview,
    *,
    synced: bool = True,
    prepare: Callable[[int], None] | None = None,
) -> None:
    """Writes a file so that readers see the old content or the new one, and no part of it.

    A temporary file beside it is written and renamed.

    Args:
        path: The file. Folders above it are created.
        data: Its content.
        synced: Whether the file must survive a power cut; then it and its folder are synchronised.
        prepare: Called with the handle of the temporary file before anything is written to it,
            for its owner and permissions; the file is then private until ``prepare`` changes that.

    Raises:
        DiskFull: If there is no room; the temporary file is removed.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with naming_full_disk(path):
        try:
            _make_folders(path.parent)
            handle = os.open(partial, _NEW_FILE, 0o666 if prepare is None else 0o600)
            with os.fdopen(handle, "wb") as file:
                if prepare is not None:
                    prepare(handle)
                file.write(data)
                file.flush()
                if synced:
                    os.fsync(handle)
            partial.replace(path)
            if synced:
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
    """Renames within a folder, durably. Raises ``DiskFull``."""
    with naming_full_disk(to):
        path.rename(to)
        sync_folder(to.parent)


def _make_folders(folder: Path) -> None:
    if not folder.is_dir():
        _make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Synchronises a folder, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
