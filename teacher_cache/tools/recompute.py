"""Comparing stored labels with those that the live source gives now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sskt.teacher_cache.format.coordinates import stored_names
from sskt.teacher_cache.format.features import relative_error
from sskt.teacher_cache.format.spec import tolerance_of
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.tools.reopen import Reopen, reopen
from sskt.teacher_cache.tools.verify import Report, compare_labels
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
    names = label_set.sample_names()
    if names is not None and names != stored_names(views.target.ids):
        problem = "the names of its samples are not those of the target"
        report = replace(report, problems=[*report.problems, problem])

    def again(sample: int, seed: int) -> tuple[float, bool]:
        found = compare(label_set, views, source, sample, seed)
        return found.distance, found.same_view

    return compare_labels(
        label_set,
        count,
        report,
        again,
        allowed=tolerance if tolerance is not None else tolerance_of(label_set.spec),
        named=lambda sample: f"sample {sample} ({views.target.ids[sample]})",
        key=key,
        progress=progress,
    )
