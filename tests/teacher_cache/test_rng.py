"""Philox words: the published vectors, and draws that depend on (sample, seed) alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sskt.teacher_cache.rng import VIEWS, below, draw, permutation, philox4x32, unit

WORD = 2**32

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN = [
    ([0, 0, 0, 0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([WORD - 1] * 4, (WORD - 1, WORD - 1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]

samples = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20)
words = st.integers(0, WORD - 1)


def plain_philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """The paper's ten rounds in Python integers, written for this test."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * a, WORD)
        high1, low1 = divmod(0xCD9E8D57 * c, WORD)
        a, b, c, d = high1 ^ b ^ k, low1, high0 ^ d ^ m, low0
        k, m = (k + 0x9E3779B9) % WORD, (m + 0xBB67AE85) % WORD
    return [a, b, c, d]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_published_vectors_come_out(
    counter: list[int], key: tuple[int, int], expected: str
) -> None:
    found = philox4x32(counter, key)
    assert found.dtype == np.uint32
    assert " ".join(f"{word:08x}" for word in found) == expected
    assert " ".join(f"{word:08x}" for word in plain_philox(counter, key)) == expected


@given(st.lists(st.tuples(words, words, words, words), min_size=1, max_size=5), words, words)
@settings(deadline=None)
def test_arrays_give_what_python_integers_give(
    counters: list[tuple[int, int, int, int]], k0: int, k1: int
) -> None:
    found = philox4x32(counters, (k0, k1))
    assert found.tolist() == [plain_philox(list(c), (k0, k1)) for c in counters]


@given(samples, words, words, st.integers(0, 20), st.integers(0, 4))
@settings(deadline=None)
def test_a_draw_does_not_depend_on_the_batch_around_it(
    ids: list[int], seed: int, key: int, block: int, stream: int
) -> None:
    together = draw(ids, seed, key, block=block, stream=stream)
    assert together.shape == (len(ids), 4)
    backwards = draw(ids[::-1], seed, key, block=block, stream=stream)
    np.testing.assert_array_equal(backwards[::-1], together)
    for sample, row in zip(ids, together, strict=True):
        expected = plain_philox([sample % WORD, sample // WORD, block, stream], (seed, key))
        assert row.tolist() == expected


def test_every_argument_changes_the_words() -> None:
    variants = [
        draw([5], 1, 2),
        draw([6], 1, 2),
        draw([5 + WORD], 1, 2),
        draw([5 + 2 * WORD], 1, 2),
        draw([5], 2, 2),
        draw([5], 1, 3),
        draw([5], 1, 2, block=1),
        draw([5], 1, 2, stream=VIEWS + 1),
    ]
    assert len({tuple(v[0].tolist()) for v in variants}) == len(variants)


@given(st.lists(words, min_size=1, max_size=50), st.integers(1, WORD))
def test_below_is_multiply_shift_and_in_range(drawn: list[int], bound: int) -> None:
    found = below(np.array(drawn, np.uint32), bound)
    assert found.dtype == np.int64
    assert found.tolist() == [word * bound // WORD for word in drawn]
    assert found.min() >= 0
    assert found.max() < bound


@pytest.mark.parametrize("bound", [2, 9, 10, 17])
def test_below_is_about_uniform_in_every_word(bound: int) -> None:
    drawn = draw(np.arange(20_000), seed=3, key=7)
    for column in range(4):
        counts = np.bincount(below(drawn[:, column], bound), minlength=bound)
        expected = len(drawn) / bound
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 3 * bound + 10  # the mean of chi-square is bound - 1


def test_unit_is_exact_and_below_one() -> None:
    found = unit(np.array([0, 1, 2**31, WORD - 1], np.uint32))
    assert found.tolist() == [0.0, 2.0**-32, 0.5, 1 - 2.0**-32]


@given(st.integers(0, 300), st.integers(0, 1000), st.integers(0, 1000))
@settings(deadline=None)
def test_permutation_keeps_every_id_once_and_has_no_state(n: int, seed: int, epoch: int) -> None:
    ids = np.arange(n, dtype=np.int64) * 3 + 5 * WORD
    order = permutation(ids, seed, epoch)
    assert sorted(order.tolist()) == ids.tolist()
    permutation(ids, seed + 1, epoch)
    np.testing.assert_array_equal(permutation(ids, seed, epoch), order)


def test_permutation_depends_on_seed_and_epoch() -> None:
    ids = np.arange(1000, dtype=np.int64)
    orders = [permutation(ids, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, order in enumerate(orders):
        assert (order != ids).mean() > 0.9
        for other in orders[:i]:
            assert (order == other).mean() < 0.02


def test_permutation_of_a_subset_keeps_the_order_of_the_whole() -> None:
    ids = np.arange(500, dtype=np.int64)
    whole = permutation(ids, 4, 2)
    half = permutation(ids[::2].copy(), 4, 2)
    np.testing.assert_array_equal(half, whole[whole % 2 == 0])


def test_permutation_is_pinned() -> None:
    ids = np.arange(10, dtype=np.int64)
    assert permutation(ids, 0, 0).tolist() == [2, 4, 0, 8, 7, 5, 6, 3, 1, 9]
    assert (permutation(ids + WORD, 1, 2) - WORD).tolist() == [8, 9, 0, 4, 1, 6, 7, 2, 5, 3]
