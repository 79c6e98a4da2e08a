"""Operations of strong augmentation on uint8 images, in integers.

``docs/format.md``, section 6, defines each for an independent reader. Factors q are in units of
1 / 65536.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.media.images import UInt8

ONE = 65536
ALL_LEVELS = np.arange(256, dtype=np.uint8)


def scaled(numerator: int, denominator: int) -> int:
    """A fraction in units of 1 / 65536, rounded half up."""
    return (2 * ONE * numerator + denominator) // (2 * denominator)


def blended(image: UInt8, other: Any, q: int) -> UInt8:
    """q of ``image`` and 1 - q of ``other``: 0 to 255, whatever the shape."""
    mixed = (q * image.astype(np.int32) + (ONE - q) * other + ONE // 2) >> 16
    levels: UInt8 = np.clip(mixed, 0, 255).astype(np.uint8)
    return levels


def grey(image: UInt8) -> NDArray[np.int32]:
    """Luma of RGB, ITU-R 601: int32 ``[H, W]``."""
    red, green, blue = (image[..., i].astype(np.int32) for i in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def brightness(image: UInt8, q: int) -> UInt8:
    """Blends with black."""
    return _by_table(image, blended(ALL_LEVELS, 0, q))


def contrast(image: UInt8, q: int) -> UInt8:
    """Blends with the mean grey of the image."""
    levels = grey(image)
    mean = (2 * int(levels.sum(dtype=np.int64)) + levels.size) // (2 * levels.size)
    return _by_table(image, blended(ALL_LEVELS, mean, q))


def saturation(image: UInt8, q: int) -> UInt8:
    """Blends with the grey image."""
    return blended(image, grey(image)[..., None], q)


def sharpness(image: UInt8, q: int) -> UInt8:
    """Blends with the smoothed image; its border is not smoothed."""
    smooth = image.astype(np.int16)
    if min(image.shape[:2]) > 2:
        rows = smooth[:-2] + smooth[1:-1] + smooth[2:]
        total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * smooth[1:-1, 1:-1]
        smooth[1:-1, 1:-1] = (total + 6) // 13
    return blended(image, smooth.astype(np.int32), q)


def hue(image: UInt8, q: int) -> UInt8:
    """Turns the hue by q sixths of the circle; the largest and the smallest channel stay."""
    red, green, blue = image.transpose(2, 0, 1).astype(np.int32, order="C")
    top = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    chroma = top - low
    at = np.where(
        top == red,
        green - blue,
        np.where(top == green, 2 * chroma + blue - red, 4 * chroma + red - green),
    )
    at = (ONE * at + q * chroma) % np.maximum(6 * ONE * chroma, 1)
    side = ONE * np.maximum(chroma, 1)
    sector, part = at // side, at % side
    part = np.where(sector % 2 == 0, part, ONE * chroma - part)
    middle = low + ((part + ONE // 2) >> 16)
    of_sector = (
        (top, middle, low, low, middle, top),
        (middle, top, top, middle, low, low),
        (low, low, middle, top, top, middle),
    )
    made = np.empty_like(image)
    for i, levels in enumerate(of_sector):
        made[..., i] = np.choose(sector, levels)
    return made


def posterize(image: UInt8, bits: int) -> UInt8:
    """Keeps the highest bits of each level."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: UInt8, threshold: int) -> UInt8:
    """Inverts the levels from ``threshold`` on."""
    return np.where(image >= threshold, 255 - image, image)


def autocontrast(image: UInt8) -> UInt8:
    """Stretches each channel to 0 ... 255."""
    made = image.copy()
    for i in range(3):
        low, high = int(image[..., i].min()), int(image[..., i].max())
        if low < high:
            levels = ALL_LEVELS.astype(np.int64)
            table = np.clip(255 * (levels - low) // (high - low), 0, 255).astype(np.uint8)
            made[..., i] = _by_table(image[..., i], table)
    return made


def equalize(image: UInt8) -> UInt8:
    """Equalises the histogram of each channel."""
    made = image.copy()
    for i in range(3):
        counts = np.bincount(image[..., i].reshape(-1), minlength=256)
        step = int(counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        if step:
            before = np.cumsum(counts) - counts
            table = np.minimum((before + step // 2) // step, 255).astype(np.uint8)
            made[..., i] = _by_table(image[..., i], table)
    return made


def translate(image: UInt8, right: int, down: int) -> UInt8:
    """Moves the image by whole pixels."""
    made = np.zeros_like(image)
    height, width = image.shape[:2]
    (to_y, from_y), (to_x, from_x) = _overlap(height, down), _overlap(width, right)
    made[to_y, to_x] = image[from_y, from_x]
    return made


def _overlap(size: int, shift: int) -> tuple[slice, slice]:
    return slice(max(shift, 0), max(size + min(shift, 0), 0)), slice(
        max(-shift, 0), max(size - max(shift, 0), 0)
    )


def shear(image: UInt8, x: int, y: int) -> UInt8:
    """Pixel (x, y) shows (x + x·q, y + y·q), counted from the top left corner."""
    return _moved(image, (ONE, x, 0), (y, ONE, 0))


def rotate(image: UInt8, half_degrees: int) -> UInt8:
    """Turns the image counterclockwise about its centre."""
    height, width = image.shape[:2]
    angle = math.radians(half_degrees / 2)
    c, s = (math.floor(ONE * part + 0.5) for part in (math.cos(angle), math.sin(angle)))
    return _moved(
        image,
        (c, -s, ONE * width - c * width + s * height),
        (s, c, ONE * height - s * width - c * height),
    )


def _moved(image: UInt8, across: tuple[int, int, int], down: tuple[int, int, int]) -> UInt8:
    """Each pixel from the nearest of the place that it shows; black outside the image."""
    height, width = image.shape[:2]
    x = 2 * np.arange(width, dtype=np.int64) + 1
    y = 2 * np.arange(height, dtype=np.int64)[:, None] + 1
    column = (across[0] * x + across[1] * y + across[2]) >> 17
    row = (down[0] * x + down[1] * y + down[2]) >> 17
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixels = np.zeros((height * width + 1, 4), np.uint8)  # the last one is black
    pixels[:-1, :3] = image.reshape(-1, 3)
    found = pixels.view(np.uint32)[:, 0].take(np.where(inside, row * width + column, -1))
    made: UInt8 = found.view(np.uint8).reshape(height, width, 4)[..., :3]
    return np.ascontiguousarray(made)


def _by_table(values: UInt8, table: UInt8) -> UInt8:
    mapped = values.tobytes().translate(table.tobytes())
    return np.frombuffer(mapped, np.uint8).reshape(values.shape)
