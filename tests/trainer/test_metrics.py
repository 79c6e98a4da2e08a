"""Metrics against written-out definitions and torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sskt.teacher_cache.errors import Diverged, InputError
from sskt.trainer.metrics import (
    accuracy_counts,
    average_precision,
    multi_label,
    single_label,
    video_level,
)


def naive_ap(scores: Sequence[float], truth: Sequence[int], *, interpolate: bool) -> float:
    """By its definition: a precision-recall point for each distinct score."""
    kept = [(s, t) for s, t in zip(scores, truth, strict=True) if t >= 0]
    positives = sum(t for _, t in kept)
    if not positives:
        return math.nan
    curve = []
    for threshold in sorted({s for s, _ in kept}, reverse=True):
        found = [t for s, t in kept if s >= threshold]
        curve.append((sum(found) / positives, sum(found) / len(found)))
    area = before = 0.0
    for i, (recall, precision) in enumerate(curve):
        best = max(p for _, p in curve[i:])
        area += (recall - before) * (best if interpolate else precision)
        before = recall
    return area


rows = st.integers(1, 12).flatmap(
    lambda m: st.lists(
        st.lists(
            st.tuples(st.integers(-3, 3), st.sampled_from([1, 0, 0, -1])), min_size=m, max_size=m
        ),
        min_size=1,
        max_size=4,
    )
)


@settings(max_examples=150, deadline=None)
@given(rows=rows, interpolate=st.booleans())
def test_average_precision_by_definition_with_ties_and_ignored(
    rows: list[list[tuple[int, int]]], interpolate: bool
) -> None:
    pairs = torch.tensor(rows)
    scores, truth = pairs[..., 0].float(), pairs[..., 1]
    found = average_precision(scores, truth, interpolate=interpolate)
    expected = [
        naive_ap(s, t, interpolate=interpolate)
        for s, t in zip(scores.tolist(), truth.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0, equal_nan=True
    )


def test_average_precision_equals_torchmetrics() -> None:
    """For probabilities of two decimals, so with ties; classes as labels, difficult ignored."""
    from torchmetrics.functional.classification import multilabel_average_precision

    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, 20, generator=generator).mul(100).round() / 100
    truth = torch.randint(-1, 2, (60, 20), generator=generator)
    truth[0] = 1
    expected = multilabel_average_precision(scores, truth, 20, average="none", ignore_index=-1)
    found = average_precision(scores.T, truth.T)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=0)


def test_golden_average_precision() -> None:
    """Ranked +, -, +, -: precision 1 and 2/3 at the two positives; 1 and 2/3 interpolated too.

    Ranked -, +, +: 1/2 and 2/3, so 7/12; interpolated 2/3 at both.
    """
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [3.0, 2.0, 1.0, 9.0]])
    truth = torch.tensor([[1, 0, 1, 0], [0, 1, 1, -1]])
    assert average_precision(scores, truth).tolist() == pytest.approx([5 / 6, 7 / 12])
    interpolated = average_precision(scores, truth, interpolate=True).tolist()
    assert interpolated == pytest.approx([5 / 6, 2 / 3])


def test_large_logits_are_ranked_not_squashed() -> None:
    """A float32 sigmoid is 1 for 20 and for 30: their order must count all the same."""
    assert average_precision(torch.tensor([[20.0, 30.0]]), torch.tensor([[0, 1]])).tolist() == [1.0]


def test_multi_label_both_ways() -> None:
    """3 images, 3 classes.

    ap: image 0 ranks + - d(-): 1; image 1 ranks d(-) +: 1/2; image 2 has no positive. Mean 75 %.
    map: class 0 ranks + then -, image 1 ignored: 1; class 1 ranks - + -: 1/2; class 2 has none.
    """
    logits = torch.tensor([[3.0, 2.0, 1.0], [9.0, 1.0, 0.0], [1.0, 0.0, 5.0]])
    truth = torch.tensor([[1, 0, -1], [-1, 1, 0], [0, 0, -1]])
    assert multi_label(logits, truth) == pytest.approx({"ap": 75.0, "map": 75.0})


def test_map_is_interpolated_and_ap_is_not() -> None:
    """Ranked -, +, +: 2/3 for a class, (1/2 + 2/3) / 2 for an image."""
    found = multi_label(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[0], [1], [1]]))
    assert found == pytest.approx({"ap": 100.0, "map": 200 / 3})
    found = multi_label(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0, 1, 1]]))
    assert found == pytest.approx({"ap": 100 * 7 / 12, "map": 100.0})


def test_perfect_and_chance_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(500, 20, generator=generator) < 0.2).long()
    perfect = multi_label(truth.float(), truth)
    assert perfect == pytest.approx({"ap": 100.0, "map": 100.0})
    same = multi_label(torch.zeros(500, 20), truth)
    assert same["map"] == pytest.approx(100 * float(truth.double().mean()))


def test_multi_label_refuses_what_has_no_answer() -> None:
    with pytest.raises(Diverged, match="are NaN; lower --lr"):
        multi_label(torch.tensor([[math.nan, 1.0]]), torch.tensor([[1, 0]]))
    with pytest.raises(InputError, match="no sample of the test split has a positive class"):
        multi_label(torch.zeros(2, 3), torch.tensor([[0, -1, 0], [0, 0, 0]]))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), c=st.integers(2, 8), cut=st.integers(0, 12), seed=st.integers(0, 99))
def test_accuracy_by_ranks_and_over_batches(n: int, c: int, cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=generator)
    truth = torch.randint(0, c, (n,), generator=generator)
    ranks = [
        sum(z > row[y] for z in row) for row, y in zip(logits.tolist(), truth.tolist(), strict=True)
    ]
    expected = {"top1": sum(r < 1 for r in ranks), "top5": sum(r < 5 for r in ranks)}
    counts = [accuracy_counts(logits[h], truth[h]) for h in (slice(0, cut), slice(cut, n))]
    assert {k: int(counts[0][k] + counts[1][k]) for k in expected} == expected
    assert single_label(logits, truth) == {k: 100 * v / n for k, v in expected.items()}


def test_a_network_of_equal_logits_is_at_chance() -> None:
    found = accuracy_counts(torch.zeros(1000, 1000), torch.arange(1000))
    assert int(found["top1"]) == 1
    assert 5 <= int(found["top5"]) <= 6


def test_what_is_right_in_top1_is_right_in_top5() -> None:
    """Of ten equal logits argmax takes the first, and topk on a CPU others."""
    logits = torch.zeros(1, 10)
    assert single_label(logits, logits.argmax(1)) == {"top1": 100.0, "top5": 100.0}


def clips_of(*videos: tuple[str, int, list[list[float]]]) -> tuple[Tensor, Tensor, list[str]]:
    logits = [z for _, _, clips in videos for z in clips]
    truth = [y for _, y, clips in videos for _ in clips]
    return torch.tensor(logits), torch.tensor(truth), [v for v, _, clips in videos for _ in clips]


def test_video_level_is_the_mean_softmax_not_the_mean_logit() -> None:
    """One very sure clip for class 0 and two that favour class 1: 1 + 2 * 0.12 < 2 * 0.88."""
    clips = clips_of(("v", 1, [[50.0, 0.0], [0.0, 2.0], [0.0, 2.0]]))
    assert video_level(*clips) == {"video_top1": 100.0, "videos": 1.0}
    assert float(clips[0].mean(0).argmax()) == 0


def test_every_video_counts_and_clips_may_be_interleaved() -> None:
    logits, truth, videos = clips_of(
        ("a", 0, [[2.0, 0.0], [0.0, 1.0]]), ("b", 1, [[3.0, 0.0]]), ("c", 1, [[0.0, 1.0]])
    )
    order = [3, 0, 2, 1]
    shuffled = video_level(logits[order], truth[order], [videos[i] for i in order])
    assert shuffled == pytest.approx({"video_top1": 200 / 3, "videos": 3.0})
    wrong = clips_of(("a", 0, [[2.0, 0.0]]), ("last", 1, [[3.0, 0.0]]))
    assert video_level(*wrong) == {"video_top1": 50.0, "videos": 2.0}


def test_video_level_refuses_what_cannot_be() -> None:
    with pytest.raises(InputError, match="clips of video v are in more than one class"):
        video_level(torch.zeros(2, 2), torch.tensor([0, 1]), ["v", "v"])
    with pytest.raises(InputError, match="2 clips were scored, but 2 have a class and 1 a video"):
        video_level(torch.zeros(2, 2), torch.tensor([0, 1]), ["v"])
    with pytest.raises(Diverged, match="not finite"):
        video_level(torch.tensor([[math.inf, 0.0]]), torch.tensor([0]), ["v"])
