"""Checking what is stored: checksums, rows, view checks, and labels against the live source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.errors import CorruptStore, MissingData
from sskt.teacher_cache.format.encodings import Encoded, as_tensors, soft_labels
from sskt.teacher_cache.format.metadata import BOUND
from sskt.teacher_cache.format.spec import tolerance_of
from sskt.teacher_cache.label_sets.create import open_for_writing
from sskt.teacher_cache.label_sets.find import shard_name
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard, seed_ranges
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.rng import PROBE, below, draw
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.tools.reopen import Reopen, reopen
from sskt.teacher_cache.views.views import Views, check_of


@dataclass
class Report:
    """What ``verify`` found in one label set; the set is clean if ``problems`` is empty.

    Attributes:
        name: Name of the label set.
        shards: Number of shards that could be read.
        rows: Rows in them.
        skipped: Rows without a label.
        unbound: Stored shards without a record: a shard in the place of another one would not be
            noticed.
        recomputed: Labels that were compared with the live source.
        worst_distance: Largest total variation distance of these.
        problems: Everything that is wrong, in words.
    """

    name: str
    shards: int = 0
    rows: int = 0
    skipped: int = 0
    unbound: int = 0
    recomputed: int = 0
    worst_distance: float = 0.0
    problems: list[str] = field(default_factory=list)


def verify(
    label_set: LabelSet,
    progress: Callable[[int, int], None] = lambda done, n: None,
    *,
    binder: WritableLabelSet | None = None,
) -> Report:
    """Reads every shard: checksums, record, row sums, NaN, view checks, coverage.

    Args:
        label_set: An opened label set.
        progress: Called with shards done and to do.
        binder: The same set, open for writing, if sound shards without a record get one.

    Returns:
        What was found.
    """
    report = Report(label_set.name)
    shards = list(label_set.shards(range(label_set.seeds)))
    missing = [shard for shard in shards if not label_set.has(shard)]
    if missing:
        lacking = seed_ranges(sorted({shard.seed for shard in missing}))
        last = label_set.arrays[-1]
        half = [s for s in missing if label_set.place.size(label_set.shard_key(last, s))]
        more = f"; {len(half)} have labels but no record: add it with --bind" if half else ""
        report.problems.append(
            f"{len(missing)} of {len(shards)} shards are missing ({lacking}){more}"
        )
    for done, shard in enumerate(shards, 1):
        if label_set.has(shard):
            _verify_shard(label_set, shard, report, binder)
        progress(done, len(shards))
    return report


def bind(
    cache: CacheName,
    label_set: LabelSet,
    progress: Callable[[int, int], None] = lambda done, n: None,
) -> Report:
    """Verifies a label set and adds the records of sound shards that have none.

    A shard is bound to the place where it is found: what was exchanged before stays unnoticed,
    except by ``recompute``.

    Args:
        cache: The cache of the label set.
        label_set: The set.
        progress: Called with shards done and to do.

    Returns:
        What was found. If every stored shard has a record now, the set is bound: from then on, a
        shard without a record counts as missing.

    Raises:
        InputError: If the cache cannot be written to.
    """

    def documents(rows: int | None, seeds: int | None) -> NoReturn:
        raise MissingData(f"label set {label_set.name} is gone from {cache}")

    target = open_for_writing(cache, label_set.name, documents, label_set.seeds)
    with closing(target):
        unbound = {key: value for key, value in target.attributes.items() if key != BOUND}
        report = verify(replace(target, attributes=unbound), progress, binder=target)
        if not report.unbound:
            target.add_attribute(BOUND, True)
    return report


def _verify_shard(
    label_set: LabelSet, shard: Shard, report: Report, binder: WritableLabelSet | None
) -> None:
    problem = _shard_problem(label_set, shard, report)
    if problem:
        report.problems.append(f"{shard_name(shard)}: {problem}")
    elif label_set.shard_record(shard) is not None:
        return
    elif binder is not None and (not binder.bound or binder.claim(shard)):
        binder.bind(shard)
        return
    report.unbound += not label_set.place.size(label_set.record_key(shard))


def _shard_problem(label_set: LabelSet, shard: Shard, report: Report) -> str:
    """Counts a shard; what is wrong with it, "" if nothing is."""
    try:
        encoded = label_set.read(shard.seed, shard.start, shard.stop)
        checks = label_set.read_checks(shard.seed, shard.start, shard.stop)
    except CorruptStore as error:
        return str(error)
    report.shards += 1
    report.rows += shard.stop - shard.start
    encoding = label_set.encoding
    skipped = encoding.skipped(encoded)
    report.skipped += int(skipped.sum())
    faulty = encoding.faulty(encoded, len(label_set.classes))
    if faulty.any():
        first = shard.start + int(np.flatnonzero(faulty)[0])
        return f"{int(faulty.sum())} rows are no probability distribution, first sample {first}"
    odd = skipped & (checks != 0)
    if odd.any():
        first = shard.start + int(np.flatnonzero(odd)[0])
        return (
            f"{int(odd.sum())} rows are empty though their views were seen, first sample "
            f"{first}; delete {label_set.place_of(shard)} and cache it again"
        )
    return ""


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
    stored = _decode(label_set, encoded)
    if label_set.encoding.skipped(encoded)[0]:
        return Comparison(sample, seed, stored, stored, 0.0, True, True)
    view, log_p = _recomputed(label_set, views, source, sample, seed)
    again = _decode(label_set, label_set.encoding.encode(log_p))
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


def stored_probabilities(label_set: LabelSet, sample: int, seed: int) -> NDArray[np.float32] | None:
    """One stored label decoded at T = 1: float32 ``[C]``; None if the sample was skipped."""
    encoded = label_set.read(seed, sample, sample + 1)
    return None if label_set.encoding.skipped(encoded)[0] else _decode(label_set, encoded)


def _decode(label_set: LabelSet, encoded: Encoded) -> NDArray[np.float32]:
    p: Tensor = soft_labels(label_set.encoding, as_tensors(encoded), len(label_set.classes))
    return np.asarray(p[0].numpy())


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
