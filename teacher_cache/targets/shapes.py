"""The embedded target ``shapes``: ten kinds of textured objects over clutter, from a seed.

RGB, 48x48, rendered here so that a first run needs no download. Every number comes from
Philox words, so the images are the same everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.rng import SHAPES, draw, unit

Float = NDArray[np.float64]
Int64 = NDArray[np.int64]

SIZE = 48
CHUNK = 50
SPLITS = {"train": 2000, "test": 500}
"""Images in each split (the splits use different seeds), and how many are drawn at a time."""


def _polygon(sides: int) -> Callable[[Float, Float], Float]:
    def distance(x: Float, y: Float) -> Float:
        angles = 2 * np.pi * np.arange(sides) / sides
        planes = [x * np.sin(a) - y * np.cos(a) for a in angles]
        nearest: Float = np.max(planes, axis=0)
        return nearest - 0.8

    return distance


def _disc(x: Float, y: Float) -> Float:
    return np.hypot(x, y) - 0.9


def _ring(x: Float, y: Float) -> Float:
    ring: Float = np.abs(np.hypot(x, y) - 0.7) - 0.22
    return ring


def _star(x: Float, y: Float) -> Float:
    star: Float = np.hypot(x, y) - (0.68 + 0.32 * np.cos(5 * np.arctan2(y, x)))
    return star


def _cross(x: Float, y: Float) -> Float:
    upright = np.maximum(np.abs(x) - 0.3, np.abs(y) - 0.95)
    cross: Float = np.minimum(upright, np.maximum(np.abs(y) - 0.3, np.abs(x) - 0.95))
    return cross


def _crescent(x: Float, y: Float) -> Float:
    return np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.42, y))


def _heart(x: Float, y: Float) -> Float:
    x, y = np.abs(x) * 1.2, y * 1.2 + 0.15
    lobe = np.hypot(x - 0.5, y - 0.35) - 0.55
    wedge = np.maximum(x + np.abs(y) * 0.95 - 1.0, y - 0.4)
    return np.minimum(lobe, wedge)


def _arrow(x: Float, y: Float) -> Float:
    head = np.maximum(np.abs(y) + x - 0.95, -x + 0.05)
    return np.minimum(head, np.maximum(np.abs(y) - 0.24, np.abs(x + 0.4) - 0.55))


KINDS: dict[str, Callable[[Float, Float], Float]] = {
    "arrow": _arrow,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "heart": _heart,
    "hexagon": _polygon(6),
    "ring": _ring,
    "square": _polygon(4),
    "star": _star,
    "triangle": _polygon(3),
}
CLASSES = tuple(KINDS)


class _Dice:
    """Uniform draws for each image, one Philox word after another."""

    def __init__(self, samples: Int64, seed: int) -> None:
        self._samples, self._seed, self._used = samples, seed, 0
        self._words = np.empty((len(samples), 0), np.uint32)

    def roll(self, low: float = 0.0, high: float = 1.0) -> Float:
        """float64 ``[n, 1, 1]`` in ``[low, high)``."""
        if self._used == self._words.shape[1]:
            block = self._used // 4
            fresh = draw(self._samples, self._seed, block=block, stream=SHAPES)
            self._words = np.concatenate([self._words, fresh], axis=1)
        self._used += 1
        return (low + unit(self._words[:, self._used - 1]) * (high - low))[:, None, None]

    def colour(self) -> Float:
        """A colour that leans to grey: float64 ``[n, 1, 1, 3]`` in 0..255."""
        grey = self.roll(60, 195)
        return np.stack([grey + self.roll(-45, 45) for _ in range(3)], axis=-1)


def labels_of(split: str) -> Int64:
    """Class index of each image: int64 ``[n]``, all classes equally often."""
    return np.arange(SPLITS[split], dtype=np.int64) % len(CLASSES)


@functools.lru_cache(maxsize=len(SPLITS))
def render(split: str, size: int = SIZE) -> UInt8:
    """All images of a split, read-only: uint8 ``[n, size, size, 3]``; drawn once a process."""
    labels = labels_of(split)
    seed = list(SPLITS).index(split)
    chunks = np.array_split(np.arange(len(labels)), len(labels) // CHUNK)
    images = np.concatenate([_render(rows, labels[rows], seed, size) for rows in chunks])
    images.flags.writeable = False
    return images


def _render(samples: Int64, labels: Int64, seed: int, size: int) -> UInt8:
    dice = _Dice(samples, seed)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    x, y = x[None], y[None]

    anything = (dice.roll(0, 3), dice.roll(2.5, 11), dice.colour(), dice.colour())
    canvas = _texture(dice, x, y, anything, dice.roll(0.02, 0.22))
    for _ in range(3):
        canvas = _clutter(dice, canvas, x, y)

    turn, scale = dice.roll(0, 2 * np.pi), dice.roll(0.5, 0.8)
    u, v = _placed(x, y, dice.roll(-0.35, 0.35), dice.roll(-0.35, 0.35), turn, scale)
    v = v * dice.roll(0.8, 1.25)
    distance = np.empty(u.shape)
    for kind, shape in enumerate(KINDS.values()):
        rows = labels == kind
        distance[rows] = shape(u[rows], v[rows])
    ink = _texture(dice, u, v, _habit(dice, labels), dice.roll(0.1, 0.35))
    canvas = _paint(canvas, ink, distance * scale, size, dice.roll(0.8, 1.0))

    canvas = _clutter(dice, canvas, x, y)
    shade = 1 + dice.roll(-0.35, 0.35) * x + dice.roll(-0.35, 0.35) * y
    grain = dice.roll(2, 14) * _grain(samples, seed, size)
    return np.clip(np.rint(canvas * shade[..., None] + grain[..., None]), 0, 255).astype(np.uint8)


def _placed(
    x: Float, y: Float, dx: Float, dy: Float, turn: Float, scale: Float
) -> tuple[Float, Float]:
    x, y = (x - dx) / scale, (y - dy) / scale
    return x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)


Material = tuple[Float, Float, Float, Float]
"""Kind of texture in 0..3, pitch, and the two colours it mixes."""


def _habit(dice: _Dice, labels: Int64) -> Material:
    """The material of an object: each class leans to a texture and a hue, with much overlap."""
    lean = labels[:, None, None] / len(CLASSES)
    usual = dice.roll() < 0.6
    kind = np.where(usual, 3 * ((3 * lean) % 1), dice.roll(0, 3))
    pitch = 3 + 6 * ((7 * lean) % 1) + dice.roll(0, 3)
    hue = lean + dice.roll(-0.16, 0.16)
    bright, pale = dice.roll(120, 240), dice.roll(0.1, 0.7)
    wheel = [0.5 + 0.5 * np.cos(2 * np.pi * (hue - third / 3)) for third in range(3)]
    colour = bright[..., None] * (pale[..., None] + (1 - pale[..., None]) * np.stack(wheel, -1))
    return kind, pitch, colour, colour * dice.roll(0.3, 0.9)[..., None]


def _waves(u: Float, v: Float, phase: Float, other: Float) -> Float:
    wave: Float = np.sin(u + phase)
    return wave


def _checks(u: Float, v: Float, phase: Float, other: Float) -> Float:
    checks: Float = np.sign(np.sin(u) * np.sin(v))
    return checks


def _blobs(u: Float, v: Float, phase: Float, other: Float) -> Float:
    blobs: Float = np.sin(u + 2 * np.sin(1.7 * v + other))
    return blobs


def _texture(dice: _Dice, x: Float, y: Float, material: Material, contrast: Float) -> Float:
    """Two colours mixed by waves, checks or blobs: float64 ``[n, H, W, 3]``."""
    kind, pitch, first, second = material
    turn = dice.roll(0, np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    phases = dice.roll(0, 6.3), dice.roll(0, 6.3)
    wave = np.empty(np.broadcast_shapes(u.shape, pitch.shape))
    for number, pattern in enumerate((_waves, _checks, _blobs)):
        rows = (kind >= number) & (kind < number + 1)
        rows = rows[:, 0, 0]
        wave[rows] = pattern(
            pitch[rows] * u[rows], pitch[rows] * v[rows], *(p[rows] for p in phases)
        )
    mix = (wave * contrast + 0.5)[..., None]
    return first * mix + second * (1 - mix)


def _paint(canvas: Float, ink: Float, distance: Float, size: int, opacity: Float) -> Float:
    cover = np.clip(0.5 - distance * size / 2, 0, 1) * opacity
    return canvas + cover[..., None] * (ink - canvas)


def _clutter(dice: _Dice, canvas: Float, x: Float, y: Float) -> Float:
    """A bar, a blob or an arc, of any colour, anywhere."""
    turn = dice.roll(0, 2 * np.pi)
    u, v = _placed(x, y, dice.roll(-1, 1), dice.roll(-1, 1), turn, dice.roll(0.12, 0.5))
    bar = np.maximum(np.abs(u) - 1.6, np.abs(v) - 0.18)
    blob = np.hypot(u, 2 * v) - 0.7
    arc = np.maximum(np.abs(np.hypot(u, v) - 0.9) - 0.14, u)
    kind = dice.roll(0, 3)
    distance = np.where(kind < 1, bar, np.where(kind < 2, blob, arc)) * 0.3
    ink = np.broadcast_to(dice.colour(), canvas.shape)
    return _paint(canvas, ink, distance, canvas.shape[1], dice.roll(0.5, 1.0))


def _grain(samples: Int64, seed: int, size: int) -> Float:
    """Uniform noise of unit variance, one value a pixel: float64 ``[n, size, size]``."""
    pixels = size * size
    ids = (samples[:, None] * pixels + np.arange(0, pixels, 4)[None]).reshape(-1)
    words = draw(ids, seed, key=1, stream=SHAPES).reshape(len(samples), size, size)
    return (unit(words) - 0.5) * float(np.sqrt(12))
