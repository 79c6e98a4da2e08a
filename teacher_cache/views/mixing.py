"""Mixup and cutmix: the view of a sample with a part of the view of another one.

Mixup (Zhang et al., ICLR 2018) blends both; cutmix (Yun et al., ICCV 2019) puts a box of the other
into the view. The partner and the share come from Philox words of (seed, sample) alone, so that
each view is made wherever the target can be read. ``docs/format.md``, section 6, has the rules for
an independent reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.rng import MIX, PARTNER, below, draw, words_of
from sskt.teacher_cache.views.image_operations import ONE, blended

if TYPE_CHECKING:
    from sskt.teacher_cache.views.policies import Policy

Int64 = NDArray[np.int64]

PARAMETERS = {"mixup": 0.0, "cutmix": 0.0}
"""Parameters of the policies with random crops: alpha of Beta(alpha, alpha); 0: not mixed."""
LOWEST, HIGHEST = 0.05, 2.0
_ROUNDS, _ATTEMPTS = 6, 64


@dataclass(frozen=True)
class Mixed:
    """What the views of a batch were mixed with.

    Attributes:
        partners: The other sample of each: int64 ``[n]``.
        weights: The share of the sample itself: float32 ``[n]``; 1 where the partner cannot be
            decoded.
    """

    partners: Int64
    weights: NDArray[np.float32]


def all_mixed(parts: Sequence[Mixed]) -> Mixed:
    """What the views of several batches were mixed with, one batch after the other."""
    return Mixed(
        np.concatenate([part.partners for part in parts]),
        np.concatenate([part.weights for part in parts]),
    )


def require_range(name: str, parameters: dict[str, int | float]) -> None:
    """Raises ``InputError`` for an alpha out of range."""
    for key in PARAMETERS:
        alpha = parameters.get(key, 0)
        if alpha and not LOWEST <= alpha <= HIGHEST:
            raise InputError(
                f"policy {name}: {key} must be 0 or {LOWEST} to {HIGHEST:g}, found {alpha:g}"
            )


def mixes(policy: Policy) -> bool:
    """Whether a view of the policy has a part of the view of another sample."""
    return policy.own is None and not PARAMETERS.keys().isdisjoint(policy.parameters)


def mixes_by(views: Mapping[str, Any]) -> bool:
    """``mixes`` of the policy that ``views`` of a label set's spec names."""
    own = "code" in views or "pipeline" in views
    return not own and not PARAMETERS.keys().isdisjoint(views["parameters"])


def partners(policy: Policy, samples: Int64, seed: int, count: int) -> Int64:
    """The sample that each sample is mixed with: a permutation of all samples for each seed.

    A Feistel network over the a x b grid that holds ``count`` samples, walked until it is inside.

    Args:
        policy: The policy.
        samples: int64 ``[n]``, each below ``count``.
        seed: View seed.
        count: Samples of the target.

    Returns:
        int64 ``[n]``.
    """
    rows = math.isqrt(count - 1) + 1 if count else 1
    columns = -(-count // rows)
    found = samples.copy()
    walking = np.arange(len(samples))
    while len(walking):
        high, low = found[walking] // columns, found[walking] % columns
        for number in range(_ROUNDS):
            given = high if number % 2 else low
            word = draw(given, seed, policy.key, block=number, stream=PARTNER)[:, 0]
            if number % 2:
                low = (low + below(word, columns)) % columns
            else:
                high = (high + below(word, rows)) % rows
        found[walking] = high * columns + low
        walking = walking[found[walking] >= count]
    return found


def share(alpha: float, sample: int, seed: int, key: int) -> int:
    """Draws the share of the sample itself from Beta(alpha, alpha), in units of 1 / 65536.

    By Jöhnk's algorithm: the first of 64 pairs of powers of uniform numbers whose sum is at most 1.
    """
    for block in range(1, _ATTEMPTS + 1):
        w0, w1, *_ = words_of(sample, seed, key, block=block, stream=MIX)
        x, y = (((word + 0.5) / 2.0**32) ** (1 / alpha) for word in (w0, w1))
        if x + y <= 1:
            return int(ONE * (x / (x + y)) + 0.5)
    return ONE // 2


def mixed(policy: Policy, view: UInt8, other: UInt8, sample: int, seed: int) -> tuple[UInt8, float]:
    """Mixes a view with that of its partner.

    Args:
        policy: The policy.
        view: uint8 ``[..., H, W, 3]``.
        other: The partner's own view, of the same shape.
        sample: Number of the sample.
        seed: View seed.

    Returns:
        The mixed view, and the share of the sample itself: under cutmix the exact part of the area.
    """
    p = policy.parameters
    w0, w1, w2, _ = words_of(sample, seed, policy.key, stream=MIX)
    cut = "cutmix" in p and ("mixup" not in p or w0 * 2 >> 32 == 1)
    q = share(p["cutmix" if cut else "mixup"], sample, seed, policy.key)
    if not cut:
        return blended(view, other.astype(np.int32), q), q / ONE
    height, width = view.shape[-3:-1]
    side = math.sqrt((ONE - q) / ONE)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = w1 * height >> 32, w2 * width >> 32
    top, bottom = max(0, y - half_height), min(height, y + half_height)
    left, right = max(0, x - half_width), min(width, x + half_width)
    made = view.copy()
    made[..., top:bottom, left:right, :] = other[..., top:bottom, left:right, :]
    return made, 1 - (bottom - top) * (right - left) / (height * width)
