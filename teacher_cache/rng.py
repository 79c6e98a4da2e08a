"""Philox4x32-10: random words as a pure function of (sample, seed), written out over numpy.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. No state, so worker
count, order, rank and start epoch cannot change a draw.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt32 = NDArray[np.uint32]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_LOW, _SHIFT = np.uint64(_MASK), np.uint64(32)

VIEWS, SHUFFLE, PROBE, STUDENT, SHAPES, FRAMES, AUGMENT, MIX, PARTNER = range(9)
"""Streams (last counter word), so that no two purposes ever share a draw."""


def philox4x32(counter: ArrayLike, key: tuple[int, int]) -> UInt32:
    """Ten rounds of Philox4x32 over ``counter`` (uint32 ``[..., 4]``) under ``key``.

    Returns uint32 ``[..., 4]``.
    """
    words = np.asarray(counter, dtype=np.uint64)
    c0, c1, c2, c3 = (words[..., i] for i in range(4))
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(10):
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words_of(
    sample: int, seed: int, key: int = 0, *, block: int = 0, stream: int = VIEWS
) -> tuple[int, int, int, int]:
    """The four random words of one sample, as ``draw`` gives them.

    In plain integers this takes a tenth of the time that numpy takes for an array of one.
    """
    m0, m1 = int(_M0), int(_M1)
    c0, c1, c2, c3 = sample & _MASK, sample >> 32 & _MASK, block, stream
    k0, k1 = seed & _MASK, key & _MASK
    for _ in range(10):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & _MASK, p0 >> 32 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _W0 & _MASK, k1 + _W1 & _MASK
    return c0, c1, c2, c3


def draw(
    samples: ArrayLike, seed: int, key: int = 0, *, block: int = 0, stream: int = VIEWS
) -> UInt32:
    """Four random words for each sample: uint32 ``[n, 4]``.

    Counter = (sample low, sample high, block, stream); key = (seed, key).
    """
    ids = np.atleast_1d(np.asarray(samples)).astype(np.uint64)
    counter = np.empty((len(ids), 4), dtype=np.uint64)
    counter[:, 0], counter[:, 1] = ids & _LOW, ids >> _SHIFT
    counter[:, 2], counter[:, 3] = block, stream
    return philox4x32(counter, (seed, key))


def below(words: UInt32, bound: ArrayLike) -> NDArray[np.int64]:
    """Integers in ``[0, bound)`` by multiply-shift: ``floor(word * bound / 2**32)``."""
    return ((words.astype(np.uint64) * np.asarray(bound, np.uint64)) >> _SHIFT).astype(np.int64)


def unit(words: UInt32) -> NDArray[np.float64]:
    """Floats in ``[0, 1)``: ``word / 2**32``, exact in float64."""
    return words.astype(np.float64) / 2.0**32


def permutation(ids: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """``ids`` in an order that depends on (seed, epoch) only."""
    words = draw(ids, seed, epoch, stream=SHUFFLE).astype(np.uint64)
    return ids[np.argsort((words[:, 0] << _SHIFT) | words[:, 1], kind="stable")]
