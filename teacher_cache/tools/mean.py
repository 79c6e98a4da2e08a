"""Label sets that are the mean of others: of several sources, or of all view seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import (
    InputError,
    MissingData,
    SpecMismatch,
    SsktError,
    ViewMismatch,
)
from sskt.teacher_cache.format.encodings import (
    ERROR_ROWS,
    Encoded,
    Encoding,
    Float32,
    decoded,
    measured_error,
)
from sskt.teacher_cache.format.spec import FORMAT, Spec, first_difference, parents_of, tolerance_of
from sskt.teacher_cache.label_sets.create import create_label_set
from sskt.teacher_cache.label_sets.find import choose_all
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.storage.open import open_cache
from sskt.teacher_cache.tools.export import Exported, Progress, lacks, require_sound, write_missing
from sskt.teacher_cache.tools.verify import Report, compare_labels

ARCH = "mean"
"""What stands in the place of a network's architecture."""

NAME = "mean"
"""Name of the new set's source, if none is given."""

ROWS = 2048
"""Rows that are averaged at once, which bounds the memory of their float64 copies."""

NOT_OF_THE_TARGET = (
    "source", "weights", "preprocessing", "logits_are", "batch_size", "device", "forward",
    "versions", "exported_from", "from_encoding", "mean_of",
)  # fmt: skip
"""What the provenance of a set says of its source and not of its target."""


@dataclass(frozen=True)
class Mean:
    """A weighted mean of the labels of label sets over the same views.

    ``mean_of`` makes one of label sets that fit each other.

    Attributes:
        parents: The label sets, in the order of their digests.
        weights: Their weights, whose sum is 1.
        seeds: S if each label is the mean over the S views of its sample; 0 if each view has a
            label of its own.
    """

    parents: tuple[LabelSet, ...]
    weights: tuple[float, ...]
    seeds: int = 0

    def rows(
        self, seed: int, start: int, stop: int
    ) -> tuple[NDArray[np.float64], NDArray[np.uint32]]:
        """Averages labels.

        Args:
            seed: View seed.
            start: First sample.
            stop: The sample after the last one.

        Returns:
            The probabilities, float64 ``[n, C]``, NaN where a parent has no label; and the
            checks of the views of ``seed``, uint32 ``[n]``.

        Raises:
            IncompleteLabels: If a parent's labels are not stored.
            CorruptStore: If they cannot be read.
            ViewMismatch: If two parents saw different images.
        """
        total = np.zeros((stop - start, len(self.parents[0].classes)))
        own = np.zeros(stop - start, np.uint32)
        views = range(self.seeds) if self.seeds else (seed,)
        for one in views:
            kept = np.ones(stop - start, bool)
            checks = []
            for parent, weight in zip(self.parents, self.weights, strict=True):
                stored = parent.read(one, start, stop)
                found = parent.read_checks(one, start, stop)
                skipped = parent.encoding.skipped(stored)
                require_sound(parent, one, start, stored, skipped & (found != 0))
                total += weight * decoded(parent.encoding, stored, len(parent.classes))
                kept &= ~skipped
                checks.append(found)
            self._require_same_views(np.stack(checks), kept, one, start)
            if one == seed:
                own = checks[0]
        total /= len(views)
        return total, np.where(np.isnan(total[:, 0]), 0, own).astype(np.uint32)

    def _require_same_views(
        self, checks: NDArray[np.uint32], kept: NDArray[np.bool_], seed: int, start: int
    ) -> None:
        differ = (checks != checks[0]) & kept
        if differ.any():
            other = self.parents[int(np.flatnonzero(differ.any(axis=1))[0])]
            sample = start + int(np.flatnonzero(differ.any(axis=0))[0])
            raise ViewMismatch(
                f"label sets {self.parents[0].name} and {other.name} saw different images of "
                f"sample {sample} under view seed {seed}; cache one of them again"
            )

    def encoded(
        self, encoding: Encoding, seed: int, start: int, stop: int
    ) -> tuple[Encoded, NDArray[np.uint32], Float32]:
        """The rows as an encoding stores them, their view checks, and the first rows' log p."""
        rows = encoding.empty(stop - start, len(self.parents[0].classes))
        checks = np.zeros(stop - start, np.uint32)
        first = []
        for begin in range(start, stop, ROWS):
            end = min(begin + ROWS, stop)
            p, found = self.rows(seed, begin, end)
            place = np.arange(begin - start, end - start)
            checks[place] = found
            kept = ~np.isnan(p[:, 0])
            with np.errstate(divide="ignore"):
                log_p = np.log(p[kept]).astype(np.float32)
            if len(log_p):
                for key, values in encoding.encode(log_p).items():
                    rows[key][place[kept]] = values
            if begin == start:
                first.append(log_p[:ERROR_ROWS])
        return rows, checks, first[0]


def mean_of(
    parents: Sequence[LabelSet],
    weights: Sequence[float | str | Fraction] | None = None,
    *,
    over_seeds: bool = False,
) -> Mean:
    """Checks that label sets can be averaged.

    Args:
        parents: The label sets, in any order.
        weights: A positive number for each; default: all alike. They are divided by their sum.
        over_seeds: Whether a label is also the mean over the views of its sample.

    Returns:
        The mean. It does not depend on the order.

    Raises:
        InputError: If there are too few label sets, two are the same, one holds no soft labels or
            only the largest probabilities, or a weight is not positive.
        SpecMismatch: If two differ in target, views or classes; names the first difference.
    """
    if len(parents) < 2 and not (over_seeds and parents):
        raise InputError(
            f"a mean is of at least two label sets, found {len(parents)}; name more, or average "
            "the views of one set with --over-seeds"
        )
    given = [_weight(text) for text in weights or [1] * len(parents)]
    if len(given) != len(parents):
        raise InputError(
            f"{len(given)} weights for {len(parents)} label sets; give one for each, in their order"
        )
    first = parents[0]
    for parent in parents:
        if parent.encoding.of_features:
            raise InputError(
                f"label set {parent.name} holds {parent.contents}, and a mean is of soft labels; "
                "cache it with --output soft-labels"
            )
        if parent.encoding.name == "topk":
            raise InputError(
                f"label set {parent.name} is stored as {parent.encoding}: a mean of it would pass "
                "for whole labels; cache it with another --encoding"
            )
        _require_alike(first, parent)
    by_digest = {p.digest: (p, w) for p, w in zip(parents, given, strict=True)}
    if len(by_digest) < len(parents):
        raise InputError(
            "a label set is named twice; name each once, and give it more weight with --weights"
        )
    total = sum(given)
    ordered = [by_digest[digest] for digest in sorted(by_digest)]
    return Mean(
        tuple(parent for parent, _ in ordered),
        tuple(float(weight / total) for _, weight in ordered),
        min(p.seeds for p in parents) if over_seeds else 0,
    )


def _weight(value: float | str | Fraction) -> Fraction:
    """A weight as an exact number, so that 0.1 of three label sets is a third."""
    try:
        weight = Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0 or not 0 < float(weight) < math.inf:
        raise InputError(f"weight {value} is no positive number; give numbers such as 1 or 0.25")
    return weight


def _require_alike(first: LabelSet, other: LabelSet) -> None:
    for part in ("target", "views"):
        one, two = ({part: label_set.spec[part]} for label_set in (first, other))
        found = first_difference(one, two)
        if found is None and (back := first_difference(two, one)):
            found = back[0], back[2], back[1]
        if found:
            raise SpecMismatch(
                f"label sets {first.name} and {other.name} differ in {found[0]} ({found[1]!r}, "
                f"{found[2]!r}); a mean needs labels of the same views of the same samples"
            )
    if first.classes != other.classes:
        counts = f"{len(first.classes):,} and {len(other.classes):,} classes"
        if len(first.classes) == len(other.classes):
            pairs = zip(first.classes, other.classes, strict=True)
            i, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            counts = f"class {i} is {a!r} and {b!r}"
        raise SpecMismatch(
            f"label sets {first.name} and {other.name} have different classes: {counts}; a mean "
            "needs sources of the same classes in the same order"
        )


def mean_spec(mean: Mean, encoding: Encoding, name: str) -> Spec:
    """The identity of the label set of a mean: it names the parents' digests and weights."""
    first = mean.parents[0].spec
    source: dict[str, Any] = {
        "name": name,
        "arch": ARCH,
        "classes": first["source"]["classes"],
        "parents": [
            {"digest": parent.digest, "weight": weight}
            for parent, weight in zip(mean.parents, mean.weights, strict=True)
        ],
    }
    if mean.seeds:
        source["seeds"] = mean.seeds
    return {
        "format": FORMAT,
        "target": first["target"],
        "source": source,
        "views": first["views"],
        "encoding": encoding.identity(),
    }


def export_mean(
    mean: Mean,
    encoding: Encoding,
    to: CacheName,
    *,
    name: str = NAME,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Stores the mean of label sets as a label set.

    A shard is stored when all parents have its samples. Safe to stop anywhere and to run again.

    Args:
        mean: What ``mean_of`` returned.
        encoding: Encoding of the new set.
        to: Cache of the new set.
        name: Name of its source.
        progress: Called with shards done and to do.

    Returns:
        What was written. The error of the encoding is relative to the exact mean.

    Raises:
        InputError: If the name cannot be that of a source, or the set exists and was made in
            another way.
        ViewMismatch: If two parents saw different images.
        CorruptStore: If labels of a parent cannot be read.
        DiskFull: If there is no room.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "primary":
        raise InputError(
            f"source name {name!r} cannot be used; give one of letters, digits, - and _ (not "
            "'primary')"
        )
    first = mean.parents[0]
    made = first.attributes.get("made", {})
    kept = {key: value for key, value in made.items() if key not in NOT_OF_THE_TARGET}
    target = create_label_set(
        open_cache(to, make=True),
        mean_spec(mean, encoding, name),
        first.classes,
        min(parent.seeds for parent in mean.parents),
        shard_rows=first.shard_rows,
        provenance=kept | {"mean_of": [parent.name for parent in mean.parents]},
        samples=first.sample_names(),
    )
    with closing(target):
        if "exported_from" in target.attributes["made"]:
            raise InputError(
                f"label set {target.name} is in {to} already and was exported from another "
                "encoding; export into another cache"
            )
        wanted = sorted(_available(mean, target), key=lambda s: (s.block, s.seed))
        return write_missing(target, wanted, _Writer(mean, target), progress)


def _available(mean: Mean, target: LabelSet) -> Iterator[Shard]:
    """The shards whose samples all parents have, of a mean over the seeds under every seed."""
    missing = {p.digest: set(p.missing(range(p.seeds))) for p in mean.parents}
    for shard in target.shards(range(min(p.seeds for p in mean.parents))):
        seeds = range(mean.seeds) if mean.seeds else (shard.seed,)
        needed = [replace(shard, seed=seed) for seed in seeds]
        if not any(lacks(p, missing[p.digest], one) for p in mean.parents for one in needed):
            yield shard


class _Writer:
    """Writes shards. Those of a block follow each other: over the seeds, their labels are equal."""

    def __init__(self, mean: Mean, target: WritableLabelSet) -> None:
        self._mean, self._target = mean, target
        self._block, self._encoded = -1, dict[str, NDArray[Any]]()

    def __call__(self, shard: Shard) -> None:
        mean, target = self._mean, self._target
        if mean.seeds and shard.block == self._block:
            encoded = self._encoded
            parent = mean.parents[0]
            checks = parent.read_checks(shard.seed, shard.start, shard.stop)
            checks = np.where(target.encoding.skipped(encoded), 0, checks).astype(np.uint32)
        else:
            encoded, checks, log_p = mean.encoded(
                target.encoding, shard.seed, shard.start, shard.stop
            )
            if shard.seed == shard.block == 0 and len(log_p):
                target.add_attribute("error", measured_error(target.encoding, log_p))
        self._block, self._encoded = shard.block, encoded
        target.write(shard, encoded, checks)


def stored_mean(label_set: LabelSet, cache: CacheName) -> Mean:
    """Opens the label sets of which a label set is the mean.

    Args:
        label_set: The mean.
        cache: Where its parents are.

    Returns:
        The mean, to be computed again.

    Raises:
        MissingData: If a parent is not in the cache.
        CorruptStore: If a parent is damaged, or the label set is no mean.
        SpecMismatch: If the parents do not fit each other or the label set.
    """
    wanted = parents_of(label_set.spec)
    try:
        found = {p.digest: p for p in choose_all(cache, list(wanted))[0]} if wanted else {}
    except MissingData:
        found = {}
    lacking = [digest[:12] for digest in wanted if digest not in found]
    if lacking or not wanted:
        raise MissingData(
            f"label set {label_set.name} is the mean of others, of which {', '.join(lacking)} "
            f"cannot be read in {cache}; copy them there with sskt copy"
        )
    parents = [found[digest] for digest in wanted]
    over_seeds = "seeds" in label_set.spec["source"]
    mean = replace(
        mean_of(parents, over_seeds=over_seeds), weights=tuple(wanted[d] for d in sorted(wanted))
    )
    if over_seeds:
        mean = replace(mean, seeds=label_set.spec["source"]["seeds"])
    expected = mean_spec(mean, label_set.encoding, label_set.spec["source"]["name"])
    difference = first_difference(expected, label_set.spec)
    if difference:
        raise SpecMismatch(
            f"label set {label_set.name} is not the mean of {', '.join(p.name for p in parents)}: "
            f"{difference[0]} is {difference[2]!r}, that of the mean is {difference[1]!r}"
        )
    return mean


@dataclass(frozen=True)
class MeanComparison:
    """A stored label beside the mean of its parents' labels: float32 probabilities ``[C]``.

    Attributes:
        mean: The mean, before it is encoded.
        distance: Total variation distance between the stored label and the encoded mean.
        same_view: Whether the view check is that of the parents.
    """

    mean: Float32
    distance: float
    same_view: bool


def compare_mean(label_set: LabelSet, mean: Mean, sample: int, seed: int) -> MeanComparison:
    """Computes one label of a mean again.

    Args:
        label_set: The mean as it is stored.
        mean: What ``stored_mean`` returned.
        sample: Number of the sample.
        seed: View seed.

    Returns:
        The comparison. If only one of the two has a label, the distance is 1.

    Raises:
        IncompleteLabels: If a label is not stored.
        CorruptStore: If it cannot be read.
        ViewMismatch: If two parents saw different images.
    """
    stored = label_set.read(seed, sample, sample + 1)
    again, checks, log_p = mean.encoded(label_set.encoding, seed, sample, sample + 1)
    empty = [bool(label_set.encoding.skipped(rows)[0]) for rows in (stored, again)]
    same_view = bool(label_set.read_checks(seed, sample, sample + 1)[0] == checks[0])
    p = np.exp(log_p[0]) if len(log_p) else np.full(len(label_set.classes), np.nan, np.float32)
    if any(empty):
        return MeanComparison(p, float(empty[0] != empty[1]), same_view)
    rows = [label_set.decoded(found)[0].astype(np.float64) for found in (stored, again)]
    return MeanComparison(p, float(np.abs(rows[0] - rows[1]).sum() / 2), same_view)


def recompute_mean(
    label_set: LabelSet,
    cache: CacheName,
    count: int,
    report: Report,
    *,
    tolerance: float | None = None,
    progress: Callable[[int, int], None] = lambda done, n: None,
) -> Report:
    """Compares stored labels of a mean with those of its parents.

    Args:
        label_set: The mean.
        cache: Where its parents are.
        count: How many labels to compare.
        report: What was found before.
        tolerance: Largest total variation distance that is no difference; default: 0.005.
        progress: Called with labels done and to do.

    Returns:
        The report, with the problems that were found added.
    """
    try:
        mean = stored_mean(label_set, cache)
    except SsktError as error:
        return replace(report, problems=[*report.problems, str(error)])

    def again(sample: int, seed: int) -> tuple[float, bool]:
        found = compare_mean(label_set, mean, sample, seed)
        return found.distance, found.same_view

    allowed = tolerance if tolerance is not None else tolerance_of(label_set.spec)
    return compare_labels(label_set, count, report, again, allowed=allowed, progress=progress)
