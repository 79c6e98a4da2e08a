"""Comparing stored labels with those that the live source gives now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sskt.teacher_cache.format.spec import tolerance_of
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.rng import PROBE, below, draw
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.tools.reopen import Reopen, reopen
from sskt.teacher_cache.tools.verify import Report, decoded
from sskt.teacher_cache.views.views import Views, check_of


@dataclass(frozen=True)
class Comparison:
    """One stored label beside its live recomputation: float32 probabilities ``[C]`` each.

    ``distance`` is the total variation distance, half the sum of absolute differences, between
    the stored label and the live one sent through the same encoding. ``same_view`` tells
    whether the view's checksum is the stored one. A skipped row has distance 0.
    """

    sample: int
    seed: int
    stored: NDArray[np.float32]
    live: NDArray[np.float32]
    distance: float
    same_view: bool
    skipped: bool


def compare(
    label_set: LabelSet, views: Views, source: Source, sample: int, seed: int
) -> Comparison:
    """Recomputes one label from its image."""
    encoded = label_set.read(seed, sample, sample + 1)
    stored = decoded(label_set, encoded)
    if label_set.encoding.skipped(encoded)[0]:
        return Comparison(sample, seed, stored, stored, 0.0, True, True)
    view, log_p = _recomputed(label_set, views, source, sample, seed)
    again = decoded(label_set, label_set.encoding.encode(log_p))
    check = int(label_set.read_checks(seed, sample, sample + 1)[0])
    distance = float(np.abs(stored.astype(np.float64) - again).sum() / 2)
    return Comparison(
        sample, seed, stored, np.exp(log_p[0]), distance, check == check_of(view), False
    )


def _recomputed(
    label_set: LabelSet, views: Views, source: Source, sample: int, seed: int
) -> tuple[UInt8, NDArray[np.float32]]:
    """The view, and its label (log, float32 ``[1, C]``): BatchNorm's whole batch where needed."""
    first, stop = sample, sample + 1
    if source.batch is not None:
        shard = label_set.shard(seed, sample // label_set.shard_rows)
        start = sample - (sample - shard.start) % source.batch
        stop = min(start + source.batch, shard.stop)
        first = max(0, min(start, stop - source.batch))
    samples = np.arange(first, stop)
    seen = views.batch(samples, seed)
    stills = torch.from_numpy(views.stills(seen, samples, seed))
    row = sample - first
    log_p = source.log_probabilities(stills)[row : row + 1]
    return seen[row], log_p.cpu().numpy()


def probe_pairs(label_set: LabelSet, count: int) -> Iterator[tuple[int, int]]:
    """``count`` (sample, seed) pairs, spread at random but the same each time, all stored."""
    words = draw(np.arange(count), 0, stream=PROBE)
    samples, seeds = below(words[:, 0], label_set.samples), below(words[:, 1], label_set.seeds)
    for sample, seed in zip(samples.tolist(), seeds.tolist(), strict=True):
        if label_set.has(label_set.shard(seed, sample // label_set.shard_rows)):
            yield sample, seed


def recompute(
    label_set: LabelSet,
    count: int,
    report: Report,
    *,
    instead: Reopen | None = None,
    tolerance: float | None = None,
    progress: Callable[[int, int], None] = lambda done, n: None,
) -> Report:
    """Compares ``count`` labels with the live source and adds what differs to the report."""
    views, source = reopen(label_set, instead or Reopen())
    allowed = tolerance if tolerance is not None else tolerance_of(label_set.spec)
    worst, problems = report.worst_distance, list(report.problems)
    done = 0
    for sample, seed in probe_pairs(label_set, count):
        found = compare(label_set, views, source, sample, seed)
        done += 1
        worst = max(worst, found.distance)
        place = f"sample {sample} ({views.target.ids[sample]}), seed {seed}"
        if not found.same_view:
            problems.append(f"{place}: the view is not the one the source saw")
        elif found.distance > allowed:
            problems.append(
                f"{place}: stored and recomputed labels differ by {found.distance:.4f} "
                f"(allowed {allowed:g})"
            )
        progress(done, count)
    return replace(report, recomputed=done, worst_distance=worst, problems=problems)
