"""Reading regular files only, and never waiting for something else in the place of one."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path | str) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading, without a buffer.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        OSError: If it cannot be opened, or is a folder, a FIFO, a socket or a device.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        require_regular(handle, path)
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def require_regular(handle: int, path: Path | str) -> None:
    """Raises ``OSError`` if an open file is not a regular one."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_regular(path: Path | str) -> bytes:
    """Reads a whole regular file. Raises as ``open_regular``."""
    with open_regular(path) as file:
        return b"".join(iter(lambda: file.read(2**24), b""))
