"""Image files to uint8 arrays, by one path, so that teacher and trainer see equal pixels."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sskt.teacher_cache.errors import BadImage, MissingData
from sskt.teacher_cache.media.regions import Box, BoxOf, decode_region

UInt8 = NDArray[np.uint8]

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")
) | {".jfif", ".jpe", ".avif"}

MOST_PIXELS = 2 * 89_478_485
"""Pixels of the largest image that is decoded, as in Pillow: a file of 600 bytes may claim more."""

# Pillow goes by the content, whatever a file is called, and some of its other formats run programs.
_FORMATS = ("PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF", "AVIF")
_BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM|II\*\0|MM\0\*|P[1-6]\s|RIFF....WEBP|....ftypavi[fs]", re.DOTALL
)
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


class _Refused(Exception):
    """Why the content of a file is not taken."""


def read_image(path: Path | str, box_of: BoxOf | None = None) -> UInt8:
    """Decodes an image file.

    JPEG files are decoded by simplejpeg (10 times Pillow's speed at 32 pixels, 1.5 times at
    ImageNet's size), all others by Pillow. EXIF orientation is not applied, and alpha is dropped.

    Args:
        path: The file. Its content counts, not its ending.
        box_of: Chooses a box of the image; default: all of it. Damage of a JPEG file outside the
            box may pass unnoticed.

    Returns:
        RGB, uint8 ``[H, W, 3]``, C-contiguous unless a box was chosen. Of 16-bit values the high
        byte.

    Raises:
        BadImage: If the file is damaged, no image, has more than ``MOST_PIXELS`` pixels, or has
            32-bit or floating-point values. JPEG, PNG and GIF files show damage anywhere, those
            of the other formats if they were cut.
        MissingData: If the file cannot be read.
    """
    try:
        with io.FileIO(path) as file:
            data = file.readall()
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        raise MissingData(f"cannot read image {path}: {what}") from error
    return decode_image(data, path, box_of)


def decode_image(data: bytes, where: object, box_of: BoxOf | None = None) -> UInt8:
    """Decodes the content of an image file, as ``read_image`` does.

    Args:
        data: The content.
        where: Where it was read, for the message.
        box_of: Chooses a box of the image, as for ``read_image``.

    Returns:
        RGB, uint8 ``[H, W, 3]``, as ``read_image`` gives it.

    Raises:
        BadImage: If it is damaged, no image, or of a kind that is not decoded.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _decode_jpeg(data, box_of)
        return cut(_decode_other(data), box_of)
    except Exception as error:  # damaged files make Pillow raise a dozen kinds
        what = _what(error, data)
        raise BadImage(
            f"cannot decode image {where}: {what} ({len(data)} bytes); "
            "replace the file, or leave it out with --on-error skip"
        ) from error


def cut(image: UInt8, box_of: BoxOf | None) -> UInt8:
    """The box of an image that ``box_of`` chooses, a view of its memory; without one, all of it."""
    return image if box_of is None else _cut_to(image, box_of(*image.shape[:2]))


def _cut_to(image: UInt8, box: Box) -> UInt8:
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def is_image(path: Path) -> bool:
    """Whether a file begins like an image of a known format. Raises ``MissingData``."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise MissingData(f"cannot read {path}: {error.strerror}") from error
    return begins_like_an_image(head)


def begins_like_an_image(head: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of an image of a known format."""
    return bool(_BEGINNINGS.match(head))


def _decode_jpeg(data: bytes, box_of: BoxOf | None) -> UInt8:
    """All JPEGs: Pillow would fill the missing part of a damaged one with grey, without error."""
    if data[6:11] == b"JFIF\0" and data[11] != 1:
        # libjpeg warns about another version of JFIF, which says nothing about the pixels.
        data = data[:11] + b"\1" + data[12:]
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    require_pixels(height, width)
    box = None if box_of is None else box_of(height, width)
    if box is not None and colours in ("YCbCr", "Gray"):  # others are converted differently
        region = decode_region(data, box, height * width)
        if region is not None:
            return region
    decoded: UInt8 = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    return decoded if box is None else _cut_to(decoded, box)


def _decode_other(data: bytes) -> UInt8:
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(data)
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        require_pixels(image.height, image.width)
        # Pillow opens a 16-bit PGM as 32-bit integers.
        wide = image.mode == "I" and image.format == "PPM"
        if wide or image.mode in _SIXTEEN_BITS:
            if image.format == "TIFF" and image.tag_v2.get(258) not in (16, (16,)):  # type: ignore[attr-defined]
                raise _Refused("12-bit values; expected 8 or 16 bits a channel")
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.mode in ("I", "F"):
            kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
            raise _Refused(f"its values are {kind}; expected 8 or 16 bits a channel")
        clear = image.mode == "P" and "transparency" in image.info
        opaque = image.convert("RGBA") if clear else image
        return np.array(opaque.convert("RGB"), dtype=np.uint8)


def _check_png(data: bytes) -> None:
    """Compares the checksums of the chunks with pixels, which Pillow does not."""
    content, at = memoryview(data), 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        stored = int.from_bytes(content[end : end + 4], "big")
        if kind[:1].isupper() and zlib.crc32(content[at + 4 : end]) != stored:
            raise _Refused(f"damaged: its chunk {kind.decode('latin-1')!r} has another checksum")
        at = end + 4


def require_pixels(height: int, width: int) -> None:
    """Raises ``BadImage`` for an image that is too large to be decoded or resized to."""
    if height * width > MOST_PIXELS:
        raise BadImage(f"{width}x{height} pixels, more than {MOST_PIXELS:,}")


def _what(error: Exception, data: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        if data[4:12] in (b"ftypavif", b"ftypavis"):
            return "damaged, or AVIF, which needs Pillow 11.3 or newer with AVIF support"
        return "no image of a known format, or cut"
    return str(error).splitlines()[0].strip() if str(error).strip() else type(error).__name__
