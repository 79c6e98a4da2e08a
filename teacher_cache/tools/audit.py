"""Figures of the labels of a set, seed by seed, which show whether its source is a bad one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.format.features import LOGITS
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.targets.base import Target

ROWS = 2048
"""Rows decoded at once."""

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class SeedAudit:
    """Figures of one seed of a set. Means are over its labels; None if there are none.

    Attributes:
        seed: The view seed.
        rows: Rows that are stored.
        empty: Rows without a label, of samples that could not be read.
        faulty: Rows that are no probability distribution, or features that are not finite, which
            no writer of sskt makes. They are left out of the other figures.
        entropy: Mean of -sum p log p, in nats; of features without a head and logits None, as the
            following ones.
        confidence: Mean of the largest p.
        checked: Share of the labels that have the checksum of their view.
        matched: Labels whose true class the source knows by name.
        top1: Share of the matched labels whose largest p is that of the true class.
        top5: Share of the matched labels that have the true class among the five largest p.
    """

    seed: int
    rows: int
    empty: int
    faulty: int
    entropy: float | None
    confidence: float | None
    checked: float | None
    matched: int
    top1: float | None
    top5: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def audit(
    label_set: LabelSet,
    target: Target | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SeedAudit]:
    """Reads every stored label, a shard at a time.

    Args:
        label_set: The label set.
        target: Its target, whose true classes are compared; None: nothing is compared.
        progress: Called with shards done and to do.

    Returns:
        The figures of each seed that has stored labels.

    Raises:
        CorruptStore: If a shard cannot be read.
    """
    truth = None if target is None else truth_of(target, label_set.classes)
    shards = [s for s in label_set.shards(range(label_set.seeds)) if label_set.has(s)]
    sums: dict[int, _Sums] = {}
    for done, shard in enumerate(shards, 1):
        total = sums.setdefault(shard.seed, _Sums())
        for start in range(shard.start, shard.stop, ROWS):
            _add(total, label_set, shard, start, min(start + ROWS, shard.stop), truth)
        progress(done, len(shards))
    return [total.result(seed) for seed, total in sorted(sums.items())]


@dataclass
class _Sums:
    rows: int = 0
    empty: int = 0
    faulty: int = 0
    entropy: float = 0.0
    confidence: float = 0.0
    checked: int = 0
    decoded: int = 0
    matched: int = 0
    top1: int = 0
    top5: int = 0

    def result(self, seed: int) -> SeedAudit:
        def mean(total: float, count: int) -> float | None:
            return total / count if count else None

        kept = self.rows - self.empty - self.faulty
        return SeedAudit(
            seed,
            self.rows,
            self.empty,
            self.faulty,
            mean(self.entropy, self.decoded),
            mean(self.confidence, self.decoded),
            mean(self.checked, kept),
            self.matched,
            mean(self.top1, self.matched),
            mean(self.top5, self.matched),
        )


def _add(
    total: _Sums,
    label_set: LabelSet,
    shard: Shard,
    start: int,
    stop: int,
    truth: Truth | None,
) -> None:
    encoded = label_set.read(shard.seed, start, stop)
    encoding = label_set.encoding
    empty, faulty = encoding.skipped(encoded), encoding.faulty(encoded, label_set.width)
    kept = ~(empty | faulty)
    checks = label_set.read_checks(shard.seed, start, stop)
    total.rows += stop - start
    total.empty += int(empty.sum())
    total.faulty += int(faulty.sum())
    total.checked += int((checks[kept] != 0).sum())
    if not kept.any() or label_set.output == LOGITS:
        return
    p = label_set.probabilities({key: values[kept] for key, values in encoded.items()})
    if p is None:
        return
    total.decoded += len(p)
    total.entropy -= float((p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum())
    total.confidence += float(p.max(axis=1).sum())
    if truth is None:
        return
    right = truth.of(np.arange(start, stop)[kept])
    known = right.any(axis=1)
    # of a sparse label, the classes beyond its k are alike: none of them is the fifth
    best = np.argsort(-p[known], axis=1, kind="stable")[:, : min(5, encoding.k or p.shape[1])]
    hits = np.take_along_axis(right[known], best, axis=1)
    total.matched += int(known.sum())
    total.top1 += int(hits[:, 0].sum())
    total.top5 += int(hits.any(axis=1).sum())


@dataclass(frozen=True)
class Truth:
    """Which of a source's classes are true of a sample, by name.

    Names match without regard to case, ``_``, ``-``, ``/`` and spaces; equal lists of classes
    match by position. ``matches``: uint8 ``[target's classes, source's classes]``.
    """

    target: Target
    matches: NDArray[np.uint8]

    def of(self, rows: Int64) -> NDArray[np.bool_]:
        """bool ``[n, C]``; no true class where the source has no name for it."""
        labels = self.target.labels[rows]
        if self.target.multi_label:
            return np.asarray((labels == 1).astype(np.uint8) @ self.matches > 0)
        found = self.matches[np.maximum(labels, 0)] > 0
        found[labels < 0] = False
        return found


def truth_of(target: Target, classes: Sequence[str]) -> Truth | None:
    """Compares a target's classes with a source's by name.

    Args:
        target: The target.
        classes: The source's classes.

    Returns:
        Which of them match; None if no name does.
    """
    matches = _matches(target.classes, classes)
    return Truth(target, matches) if matches.any() else None


def _matches(own: Sequence[str], others: Sequence[str]) -> NDArray[np.uint8]:
    if tuple(own) == tuple(others):
        return np.eye(len(own), dtype=np.uint8)
    names = np.array([_plain(name) for name in others])
    matches = [(names == _plain(name)) & (names != "") for name in own]
    return np.array(matches, np.uint8).reshape(len(own), len(others))


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.lower()).strip()
