"""Tells from the header of a video container whether its file was cut off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def cut_off(path: Path) -> bool:
    """Whether a Matroska or WebM file, which counts no frames, is shorter than it says."""
    with path.open("rb") as file:
        if file.read(4) != b"\x1a\x45\xdf\xa3":
            return False
        file.seek(_ebml_size(file), os.SEEK_CUR)
        segment = file.read(4) == b"\x18\x53\x80\x67"
        return segment and _ebml_size(file) + file.tell() > path.stat().st_size


def is_whole_avi(path: Path) -> bool:
    """Whether a file is an AVI file of one part (RIFF chunk) that is as long as it says."""
    with path.open("rb") as file:
        head = file.read(4096)
    size = int.from_bytes(head[4:8], "little") + 8
    # A list "odml" announces parts of 1 GiB each, of which the last may be missing.
    one_part = head[:4] == b"RIFF" and head[8:12] == b"AVI " and b"odmldmlh" not in head
    return one_part and size <= path.stat().st_size


def _ebml_size(file: BinaryIO) -> int:
    """The next size in an EBML file (RFC 8794, section 4); 0 if it says that it is unknown."""
    first = file.read(1)
    length = 8 - first[0].bit_length() if first else 0
    bits = 7 * (length + 1)
    value = int.from_bytes(first + file.read(length), "big") & ((1 << bits) - 1)
    return 0 if value == (1 << bits) - 1 else value
