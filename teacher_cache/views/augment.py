"""Strong augmentation: what is done to the view of a cropping policy, drawn from Philox words.

RandAugment (Cubuk et al., NeurIPS 2020) or TrivialAugment (Müller and Hutter, ICCV 2021), then
colour jitter, then random erasing (Zhong et al., AAAI 2020). All frames of a clip get the same.
``docs/format.md``, section 6, has the rules for an independent reader.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.rng import AUGMENT, words_of
from sskt.teacher_cache.views import image_operations as ops

if TYPE_CHECKING:
    from sskt.teacher_cache.views.policies import Policy

Int64 = NDArray[np.int64]

PARAMETERS: dict[str, int | float] = {
    "randaugment": 0,
    "magnitude": 9,
    "trivial": 0,
    "jitter": 0.0,
    "hue": 0.0,
    "erase": 0.0,
}
"""Parameters of the policies with random crops, and their defaults: nothing is done."""
_HIGHEST: dict[str, int | float] = {
    "randaugment": 16,
    "magnitude": 30,
    "trivial": 1,
    "jitter": 1.0,
    "hue": 0.5,
    "erase": 1.0,
}
_DRAWN = frozenset(PARAMETERS) - {"magnitude"}
_MAGNITUDES = 31
_JITTER, _ERASE = 64, 66
"""First blocks of their random words; RandAugment has those from 0 on."""
ERASED = (124, 116, 104)
"""The mean colour of ImageNet, which the normalisation of most networks makes 0."""
_AREA, _ASPECT, _TRIES = (0.02, 0.33), (0.3, 3.3), 10

Operation = Callable[[UInt8], UInt8]


OPERATIONS = (
    "identity",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
    "rotate",
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""Of RandAugment and TrivialAugment, by their numbers."""


@dataclass(frozen=True)
class Ranges:
    """How strong the operations are per step of the magnitude; fractions as two numbers.

    ``translate`` is in pixels, or for RandAugment a part of the side.
    """

    shear: tuple[int, int]
    translate: tuple[int, int]
    half_degrees: int
    colour: tuple[int, int]
    posterize: tuple[int, int]
    of_side: bool = False


RANDAUGMENT = Ranges((1, 100), (5, 331), 2, (3, 100), (4, 30), of_side=True)
TRIVIAL = Ranges((33, 1000), (16, 15), 9, (33, 1000), (2, 10))


def resolve(name: str, given: Mapping[str, int | float]) -> dict[str, int | float]:
    """Checks the parameters of strong augmentation.

    Args:
        name: The policy, for messages.
        given: Those that were given.

    Returns:
        Those that change a view, which are part of the policy's identity.

    Raises:
        InputError: If one is out of its range, or two exclude each other.
    """
    for key, value in given.items():
        if not 0 <= value <= _HIGHEST[key]:
            raise InputError(
                f"policy {name}: {key} must be 0 to {_HIGHEST[key]:g}, found {value:g}"
            )
    on = {key: value for key, value in given.items() if value and key in _DRAWN}
    if "randaugment" in on and "trivial" in on:
        raise InputError(f"policy {name}: give randaugment or trivial, not both")
    if "randaugment" in on:
        return on | {"magnitude": given.get("magnitude", PARAMETERS["magnitude"])}
    if "magnitude" in given:
        raise InputError(f"policy {name}: magnitude is that of randaugment; add randaugment=2")
    return on


def is_strong(policy: Policy) -> bool:
    """Whether something is done to the views of a policy."""
    return policy.own is None and not _DRAWN.isdisjoint(policy.parameters)


def augmented(policy: Policy, view: UInt8, sample: int, seed: int) -> UInt8:
    """Does to a view what the parameters of its policy say.

    Args:
        policy: The policy.
        view: uint8 ``[H, W, 3]``, or ``[D, H, W, 3]`` for clips.
        sample: Number of the sample.
        seed: View seed.

    Returns:
        A view of the same shape; ``view`` itself if there is nothing to do.
    """
    if not is_strong(policy):
        return view
    height, width = view.shape[-3:-1]
    words = functools.partial(words_of, sample, seed, policy.key, stream=AUGMENT)
    steps = [*_randaugment(policy, words), *_trivial(policy, words), *_jitter(policy, words)]
    frames = [
        functools.reduce(lambda image, step: step(image), steps, frame)
        for frame in view.reshape(-1, height, width, 3)
    ]
    made = np.stack(frames).reshape(view.shape)
    _erase(policy, words, made)
    return made


def augmented_batch(policy: Policy, views: UInt8, samples: Int64, seed: int) -> UInt8:
    """``augmented`` for several views, uint8 ``[n, H, W, 3]``, of ``samples``, int64 ``[n]``."""
    if not is_strong(policy):
        return views
    pairs = zip(views, samples.tolist(), strict=True)
    return np.stack([augmented(policy, view, sample, seed) for view, sample in pairs])


Words = Callable[..., tuple[int, int, int, int]]


def _randaugment(policy: Policy, words: Words) -> list[Operation]:
    p, found = policy.parameters, []
    for k in range(int(p.get("randaugment", 0))):
        w0, w1, *_ = words(block=k)
        found.append(_drawn(w0, w1, int(p["magnitude"]), RANDAUGMENT))
    return found


def _trivial(policy: Policy, words: Words) -> list[Operation]:
    if not policy.parameters.get("trivial"):
        return []
    w0, w1, w2, _ = words()
    return [_drawn(w0, w1, w2 * _MAGNITUDES >> 32, TRIVIAL)]


def _drawn(w0: int, w1: int, magnitude: int, ranges: Ranges) -> Operation:
    name, sign = OPERATIONS[w0 * len(OPERATIONS) >> 32], -1 if w1 * 2 >> 32 else 1
    return functools.partial(
        operated, name=name, magnitude=magnitude, negative=sign < 0, ranges=ranges
    )


def operated(
    image: UInt8, name: str, magnitude: int, negative: bool, ranges: Ranges = RANDAUGMENT
) -> UInt8:
    """Applies an operation of RandAugment or TrivialAugment.

    Args:
        image: uint8 ``[H, W, 3]``.
        name: One of ``OPERATIONS``.
        magnitude: 0 to 30.
        negative: Whether the strength is taken with a minus, if the operation has two directions.
        ranges: ``RANDAUGMENT`` or ``TRIVIAL``.

    Returns:
        uint8 ``[H, W, 3]``.
    """
    sign = -1 if negative else 1

    def part(of: tuple[int, int]) -> int:
        return sign * ops.scaled(of[0] * magnitude, of[1])

    def pixels(side: int) -> int:
        times, over = ranges.translate
        return sign * (times * magnitude * (side if ranges.of_side else 1) // over)

    factor = ops.ONE + part(ranges.colour)
    match name:
        case "shear-x":
            return ops.shear(image, part(ranges.shear), 0)
        case "shear-y":
            return ops.shear(image, 0, part(ranges.shear))
        case "translate-x":
            return ops.translate(image, pixels(image.shape[1]), 0)
        case "translate-y":
            return ops.translate(image, 0, pixels(image.shape[0]))
        case "rotate":
            return ops.rotate(image, sign * ranges.half_degrees * magnitude)
        case "brightness":
            return ops.brightness(image, factor)
        case "saturation":
            return ops.saturation(image, factor)
        case "contrast":
            return ops.contrast(image, factor)
        case "sharpness":
            return ops.sharpness(image, factor)
        case "posterize":
            times, over = ranges.posterize
            return ops.posterize(image, 8 - (times * magnitude + over // 2) // over)
        case "solarize":
            return ops.solarize(image, 255 - 17 * magnitude // 2)
        case "autocontrast":
            return ops.autocontrast(image)
        case "equalize":
            return ops.equalize(image)
    return image


def _jitter(policy: Policy, words: Words) -> list[Operation]:
    strength = _units(policy.parameters.get("jitter", 0))
    turn = _units(6 * policy.parameters.get("hue", 0))
    order, factors = words(block=_JITTER), words(block=_JITTER + 1)
    q = [ops.ONE - strength + (word * (2 * strength + 1) >> 32) for word in factors[:3]]
    waiting = [
        functools.partial(ops.brightness, q=q[0]) if strength else None,
        functools.partial(ops.contrast, q=q[1]) if strength else None,
        functools.partial(ops.saturation, q=q[2]) if strength else None,
        functools.partial(ops.hue, q=(factors[3] * (2 * turn + 1) >> 32) - turn) if turn else None,
    ]
    drawn = [waiting.pop(word * (4 - i) >> 32) for i, word in enumerate(order)]
    return [operation for operation in drawn if operation]


def _units(value: float) -> int:
    return math.floor(ops.ONE * value + 0.5)


def _erase(policy: Policy, words: Words, view: UInt8) -> None:
    height, width = view.shape[-3:-1]
    if words(block=_ERASE)[0] / 2.0**32 >= policy.parameters.get("erase", 0):
        return
    log_low, log_high = np.log(_ASPECT[0]), np.log(_ASPECT[1])
    for attempt in range(1, _TRIES + 1):
        w0, w1, w2, w3 = words(block=_ERASE + attempt)
        area = height * width * (_AREA[0] + w0 / 2.0**32 * (_AREA[1] - _AREA[0]))
        ratio = float(np.exp(log_low + w1 / 2.0**32 * (log_high - log_low)))
        h, w = (int(math.sqrt(side) + 0.5) for side in (area * ratio, area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = w2 * (height - h + 1) >> 32, w3 * (width - w + 1) >> 32
            view[..., top : top + h, left : left + w, :] = ERASED
            return
