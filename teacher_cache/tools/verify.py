"""Checking what is stored: checksums, rows and view checks. No torch here."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import (
    CorruptStore,
    IncompleteLabels,
    InputError,
    MissingData,
    ViewMismatch,
)
from sskt.teacher_cache.format.encodings import Encoded
from sskt.teacher_cache.format.metadata import BOUND
from sskt.teacher_cache.label_sets.create import open_for_writing
from sskt.teacher_cache.label_sets.documents import consolidate
from sskt.teacher_cache.label_sets.find import shard_name
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard, seed_ranges
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.rng import PROBE, below, draw
from sskt.teacher_cache.storage.base import METADATA, CacheName
from sskt.teacher_cache.tools.coordinates import coordinate_problems, repetition_problems
from sskt.teacher_cache.tools.publish import index_problems


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
    """Reads every shard: checksums, record, row sums, NaN, view checks, coverage; the coordinates.

    Args:
        label_set: An opened label set.
        progress: Called with shards done and to do.
        binder: The same set, open for writing, if sound shards without a record get one.

    Returns:
        What was found.
    """
    problems = [*coordinate_problems(label_set), *repetition_problems(label_set)]
    problems += index_problems(label_set)
    report = Report(label_set.name, problems=problems)
    shards = list(label_set.shards(range(label_set.seeds)))
    missing = [shard for shard in shards if not label_set.has(shard)]
    if missing:
        lacking = seed_ranges(sorted({shard.seed for shard in missing}))
        last = label_set.arrays[-1]
        half = [s for s in missing if label_set.storage.size(label_set.shard_key(last, s))]
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
        with target.locks.held(METADATA):
            consolidate(target)
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
    elif binder is not None and (not binder.bound or binder.acquire(shard)):
        binder.bind(shard)
        return
    report.unbound += not label_set.storage.size(label_set.record_key(shard))


def _shard_problem(label_set: LabelSet, shard: Shard, report: Report) -> str:
    """Counts a shard; what is wrong with it, "" if nothing is."""
    try:
        encoded = label_set.read(shard.seed, shard.start, shard.stop)
        checks = label_set.read_checks(shard.seed, shard.start, shard.stop)
    except (CorruptStore, IncompleteLabels) as error:  # it may have gone since it was listed
        return str(error)
    except InputError as error:
        if not label_set.storage.is_local:
            raise
        return str(error)
    report.shards += 1
    report.rows += shard.stop - shard.start
    encoding = label_set.encoding
    skipped = encoding.skipped(encoded)
    report.skipped += int(skipped.sum())
    faulty = encoding.faulty(encoded, label_set.width)
    if faulty.any():
        first = shard.start + int(np.flatnonzero(faulty)[0])
        what = "not finite" if encoding.of_features else "no probability distribution"
        return f"{int(faulty.sum())} rows are {what}, first sample {first}"
    odd = skipped & (checks != 0)
    if odd.any():
        first = shard.start + int(np.flatnonzero(odd)[0])
        return (
            f"{int(odd.sum())} rows are empty though their views were seen, first sample "
            f"{first}; delete {label_set.place_of(shard)} and cache it again"
        )
    return ""


def stored_row(label_set: LabelSet, sample: int, seed: int) -> Encoded | None:
    """Reads one stored row.

    Args:
        label_set: The label set.
        sample: Number of the sample.
        seed: View seed.

    Returns:
        The stored arrays, ``[1, width]`` each; None if the sample was skipped.

    Raises:
        IncompleteLabels: If the label is not stored.
        CorruptStore: If it cannot be read.
    """
    encoded = label_set.read(seed, sample, sample + 1)
    return None if label_set.encoding.skipped(encoded)[0] else encoded


def stored_probabilities(label_set: LabelSet, sample: int, seed: int) -> NDArray[np.float32] | None:
    """Decodes one stored label at T = 1.

    Args:
        label_set: The label set.
        sample: Number of the sample.
        seed: View seed.

    Returns:
        Probabilities: float32 ``[C]``, of logits their sigmoids; None if the sample was skipped.

    Raises:
        InputError: If the rows are features without a head.
        IncompleteLabels: If the label is not stored.
        CorruptStore: If it cannot be read.
    """
    encoded = stored_row(label_set, sample, seed)
    if encoded is None:
        return None
    p = label_set.probabilities(encoded)
    if p is None:
        raise InputError(f"it holds {label_set.contents} and no probabilities of classes")
    return np.asarray(p[0].astype(np.float32))


def probe_pairs(label_set: LabelSet, count: int, key: int) -> Iterator[tuple[int, int]]:
    """Draws stored labels at random.

    Args:
        label_set: The label set.
        count: How many to draw.
        key: Chooses them: a number below 2^32.

    Yields:
        Sample and seed of each one that is stored.
    """
    words = draw(np.arange(count), key, stream=PROBE)
    samples, seeds = below(words[:, 0], label_set.samples), below(words[:, 1], label_set.seeds)
    for sample, seed in zip(samples.tolist(), seeds.tolist(), strict=True):
        if label_set.has(label_set.shard(seed, sample // label_set.shard_rows)):
            yield sample, seed


def compare_labels(
    label_set: LabelSet,
    count: int,
    report: Report,
    compare: Callable[[int, int], tuple[float, bool]],
    *,
    allowed: float,
    named: Callable[[int], str] = lambda sample: f"sample {sample}",
    key: int | None = None,
    progress: Callable[[int, int], None] = lambda done, n: None,
) -> Report:
    """Compares stored labels, drawn at random, with what they are when they are computed again.

    Args:
        label_set: The label set.
        count: How many labels to compare.
        report: What was found before.
        compare: Takes sample and seed; returns the distance of the stored label from the new one,
            and whether the view check is that of the view. Raises ``CorruptStore``,
            ``IncompleteLabels`` or ``ViewMismatch``, which become problems of the report.
        allowed: Largest distance that is no difference.
        named: A sample in words.
        key: Chooses the labels; default: other ones each time, which a forger cannot know.
        progress: Called with labels done and to do.

    Returns:
        The report, with the problems that were found added.
    """
    worst, problems, done = report.worst_distance, list(report.problems), 0
    for sample, seed in probe_pairs(label_set, count, secrets.randbits(32) if key is None else key):
        place = f"{named(sample)}, seed {seed}"
        try:
            distance, same_view = compare(sample, seed)
        except (CorruptStore, IncompleteLabels, ViewMismatch) as error:
            if not any(problem.endswith(str(error)) for problem in problems):
                problems.append(f"{place}: {error}")
            continue
        done += 1
        worst = max(worst, distance)
        if not same_view:
            problems.append(f"{place}: the view is not the one the source saw")
        elif not distance <= allowed:
            problems.append(
                f"{place}: stored and recomputed labels differ by {distance:.4f} "
                f"(allowed {allowed:g})"
            )
        progress(done, count)
    return replace(report, recomputed=done, worst_distance=worst, problems=problems)
