"""Comparing stored labels with those that the live source gives now."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels
from sskt.teacher_cache.format.coordinates import stored_names
from sskt.teacher_cache.format.features import relative_error
from sskt.teacher_cache.format.spec import tolerance_of
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.tools.reopen import Reopen, reopen
from sskt.teacher_cache.tools.verify import Report, probe_pairs
from sskt.teacher_cache.views.views import Views, check_of


@dataclass(frozen=True)
class Comparison:
    """One stored row beside its live recomputation: float32 ``[width]`` each.

    Soft labels are probabilities, and ``distance`` is the total variation distance, half the sum
    of absolute differences, between the stored label and the live one sent through the same
    encoding. Of features and logits it is the relative error. ``same_view`` tells whether the
    view's checksum is the stored one. A skipped row has distance 0.
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
    """Recomputes one label from its image.

    Args:
        label_set: The label set.
        views: Its views, as ``reopen`` returned them.
        source: Its source, as ``reopen`` returned it.
        sample: Number of the sample.
        seed: View seed.

    Returns:
        The stored label beside the live one.

    Raises:
        CorruptStore: If the stored label cannot be read.
        BadImage: If the sample cannot be read now.
    """
    encoded = label_set.read(seed, sample, sample + 1)
    stored = label_set.decoded(encoded)[0]
    if label_set.encoding.skipped(encoded)[0]:
        return Comparison(sample, seed, stored, stored, 0.0, True, True)
    view, rows = _recomputed(label_set, views, source, sample, seed)
    again = label_set.decoded(label_set.encoding.encode(rows))[0]
    check = int(label_set.read_checks(seed, sample, sample + 1)[0])
    if label_set.encoding.of_features:
        live, distance = rows[0], float(relative_error(again[None], stored[None])[0])
    else:
        live, distance = np.exp(rows[0]), float(np.abs(stored.astype(float) - again).sum() / 2)
    return Comparison(sample, seed, stored, live, distance, check == check_of(view), False)


def _recomputed(
    label_set: LabelSet, views: Views, source: Source, sample: int, seed: int
) -> tuple[UInt8, NDArray[np.float32]]:
    """The view, and what ``forward`` gives: BatchNorm's whole batch where needed."""
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
    rows = source.log_probabilities(stills)[row : row + 1]
    return seen[row], rows.cpu().numpy()


def recompute(
    label_set: LabelSet,
    count: int,
    report: Report,
    *,
    instead: Reopen | None = None,
    tolerance: float | None = None,
    key: int | None = None,
    progress: Callable[[int, int], None] = lambda done, n: None,
) -> Report:
    """Compares stored labels with those of the live source.

    Args:
        label_set: The label set.
        count: How many labels to compare.
        report: What was found before.
        instead: How its target and source are opened.
        tolerance: Largest ``Comparison.distance`` that is no difference; default: that of the
            source's precision.
        key: Chooses the labels; default: other ones each time, which a forger cannot know.
        progress: Called with labels done and to do.

    Returns:
        The report, with the problems that were found added.

    Raises:
        SpecMismatch: If what is opened now is not what the labels were made from.
        InputError: If a file is needed that was not named.
        BadImage: If a sample cannot be read now.
    """
    views, source = reopen(label_set, instead or Reopen())
    allowed = tolerance if tolerance is not None else tolerance_of(label_set.spec)
    worst, problems = report.worst_distance, list(report.problems)
    names = label_set.sample_names()
    if names is not None and names != stored_names(views.target.ids):
        problems.append("the names of its samples are not those of the target")
    done = 0
    key = secrets.randbits(32) if key is None else key
    for sample, seed in probe_pairs(label_set, count, key):
        place = f"sample {sample} ({views.target.ids[sample]}), seed {seed}"
        try:
            found = compare(label_set, views, source, sample, seed)
        except (CorruptStore, IncompleteLabels) as error:
            if not any(problem.endswith(str(error)) for problem in problems):
                problems.append(f"{place}: {error}")
            continue
        done += 1
        worst = max(worst, found.distance)
        if not found.same_view:
            problems.append(f"{place}: the view is not the one the source saw")
        elif not found.distance <= allowed:
            problems.append(
                f"{place}: stored and recomputed labels differ by {found.distance:.4f} "
                f"(allowed {allowed:g})"
            )
        progress(done, count)
    return replace(report, recomputed=done, worst_distance=worst, problems=problems)
