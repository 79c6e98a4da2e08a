"""Runs side by side: found, summarised over their seeds, and judged against the first."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.trainer.results.groups import (
    MAIN,
    METRICS,
    Group,
    Record,
    Run,
    group_runs,
    is_scratch,
    load_run,
    mean_std,
    values_of,
)

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
T_975 |= {9: 2.262, 10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.0}
"""Student's t at 97.5 % by degrees of freedom; between two of them the larger value is taken."""


@dataclass(frozen=True)
class Spread:
    """A number over the runs of a group: mean, sample standard deviation, how many runs."""

    mean: float
    std: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}" if self.n > 1 else f"{self.mean:.2f}"


@dataclass(frozen=True)
class Row:
    """A group in numbers: accuracies in %, of the last epoch and of the best one."""

    name: str
    runs: int
    unfinished: int
    epochs: str
    last: dict[str, Spread]
    best: dict[str, Spread]
    train: Spread | None
    images_per_second: Spread | None
    label_wait: Spread | None


@dataclass(frozen=True)
class Difference:
    """A group's last result minus that of the first group, in points, and what to think of it.

    ``error`` is the standard error (Welch's), ``needed`` the smallest difference that stands out
    at 95 %; both are None where a group is a single run.
    """

    name: str
    points: float
    error: float | None
    needed: float | None
    verdict: str


@dataclass(frozen=True)
class Curve:
    """A number over the epochs (from 1) that have it: mean and standard deviation of ``n`` runs."""

    epochs: list[int]
    mean: list[float]
    std: list[float]
    n: int


@dataclass(frozen=True)
class Comparison:
    """Groups, their numbers, their differences to the first; ``metric`` is what they share."""

    groups: list[Group]
    rows: list[Row]
    metric: str | None
    differences: list[Difference]
    warnings: list[str]


def find_runs(places: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Runs in ``places`` (a run's folder, or any folder above runs), and notes on those skipped.

    In a folder of runs those from scratch come first, and one that cannot be read is skipped
    with a note. Raises ``MissingData`` or ``InputError`` for a run that was named itself, and for
    a folder in which there is none.
    """
    from sskt.trainer.results.records import METRICS as FILE

    runs: list[Run] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for place in places:
        inside = [place] if (place / FILE).exists() else _search(place, FILE)
        found = []
        for folder in inside:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                found.append(Run(folder, *load_run(folder)))
            except InputError as error:
                if folder == place:
                    raise
                notes.append(f"skipped {folder}: {error}")
        runs += sorted(found, key=lambda run: not is_scratch(run.config))
    if not runs:
        raise MissingData("no readable run found: " + "; ".join(notes))
    return runs, notes


def _search(place: Path, file: str) -> list[Path]:
    if not place.is_dir():
        why = "it is no folder" if place.exists() else "there is no such folder"
        raise MissingData(f"no run at {place}: {why}")
    found = sorted(path.parent for path in place.rglob(file))
    if not found:
        raise MissingData(f"no run in {place}: no {file} there or in a folder below")
    return found


def compare(runs: Sequence[Run]) -> Comparison:
    """Groups runs by configuration and sets their numbers side by side. ``runs`` is not empty."""
    groups = group_runs(runs)
    metric = next((key for key in MAIN if all(_has(g, key) for g in groups)), None)
    rows = [summarise(group) for group in groups]
    judged = []
    if metric is not None:
        first = rows[0].last[metric]
        judged = [judge(row.name, row.last[metric], first) for row in rows[1:]]
        judged = [
            dataclasses.replace(one, verdict="cannot tell: unfinished")
            if rows[0].unfinished == rows[0].runs or row.unfinished == row.runs
            else one
            for one, row in zip(judged, rows[1:], strict=True)
        ]
    return Comparison(groups, rows, metric, judged, _warnings(groups, rows, metric))


def summarise(group: Group) -> Row:
    """The numbers of a group, over its finished runs if it has any, else over all."""
    counted = group.counted
    done, planned = [len(run.records) for run in counted], int(group.config["epochs"])
    low, high = min(done), max(done)
    epochs = f"{low}" if low == high else f"{low}-{high}"
    keys = [key for key in METRICS if _has(group, key)]
    unfinished = sum(not run.finished for run in group.runs)
    return Row(
        group.name,
        len(group.runs),
        unfinished,
        epochs if low == high == planned else f"{epochs}/{planned}",
        {key: _spread([values_of(run.records, key)[-1] for run in counted]) for key in keys},
        {key: _spread([max(values_of(run.records, key)) for run in counted]) for key in keys},
        _over(counted, "train_top1", lambda records: float(records[-1]["train_top1"])),
        _over(counted, "seconds", _images_per_second),
        _over(counted, "label_wait_seconds", _label_wait),
    )


def curve(group: Group, key: str) -> Curve | None:
    """``key`` over the epochs in which all counted runs have it; None if there are none."""
    runs = [run.records for run in group.counted]
    shared = range(min(len(records) for records in runs))
    epochs = [e for e in shared if all(key in records[e] for records in runs)]
    if not epochs:
        return None
    points = [mean_std([records[e][key] for records in runs]) for e in epochs]
    return Curve(
        [e + 1 for e in epochs], [mean for mean, _ in points], [s for _, s in points], len(runs)
    )


def judge(name: str, one: Spread, first: Spread) -> Difference:
    """The difference ``one - first`` with Welch's standard error, and whether it stands out."""
    points = one.mean - first.mean
    if min(one.n, first.n) < 2:
        alone = "each is a single run" if one.n == first.n else "one side is a single run"
        return Difference(name, points, None, None, f"cannot tell: {alone}, its spread is unknown")
    largest = max(one.std, first.std)
    error = needed = 0.0
    if largest > 0:
        # Relative to the larger deviation: squares of the deviations leave the range of a float.
        a, b = (one.std / largest) ** 2 / one.n, (first.std / largest) ** 2 / first.n
        error = largest * math.sqrt(a + b)
        freedom = (a + b) ** 2 / (a**2 / (one.n - 1) + b**2 / (first.n - 1))
        needed = error * T_975[max(d for d in T_975 if d <= freedom + 1e-9)]
    if abs(points) > needed:
        verdict = "larger than the spread"
    else:
        verdict = f"within the spread (under {needed:.2f})" if largest > 0 else "equal"
    return Difference(name, points, error, needed, verdict)


def _has(group: Group, key: str) -> bool:
    return all(any(key in record for record in run.records) for run in group.counted)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(*mean_std(values), len(values))


def _over(runs: Sequence[Run], key: str, value: Callable[[list[Record]], float]) -> Spread | None:
    if not all(key in record for run in runs for record in run.records):
        return None
    return _spread([value(run.records) for run in runs])


def _images_per_second(records: list[Record]) -> float:
    return float(statistics.median(r["images"] / max(r["seconds"], 1e-9) for r in records))


def _label_wait(records: list[Record]) -> float:
    waited = sum(float(r["label_wait_seconds"]) for r in records)
    return 100 * waited / max(sum(float(r["seconds"]) for r in records), 1e-9)


def _warnings(groups: Sequence[Group], rows: Sequence[Row], metric: str | None) -> list[str]:
    found = []
    targets = _distinct(groups, "target")
    if len(targets) > 1:
        found.append(f"different targets ({', '.join(targets)}): not measured on the same data")
    elif len(splits := _distinct(groups, "test_split")) > 1:
        found.append(f"different test splits ({', '.join(splits)}): not the same test data")
    if metric is None:
        found.append("the runs share no test metric: no differences are judged")
    for group in groups:
        given = [run.config["seed"] for run in group.runs]
        twice = sorted({seed for seed in given if given.count(seed) > 1})
        if twice:
            said = ", ".join(map(str, twice))
            found.append(f"{group.name}: seed {said} in more than one run; one run a seed counts")
    for row in rows:
        if row.unfinished == row.runs:
            found.append(f"{row.name}: unfinished, {row.epochs} epochs; compare it with care")
        elif row.unfinished:
            found.append(f"{row.name}: {row.unfinished} of {row.runs} runs unfinished, left out")
    return found


def _distinct(groups: Sequence[Group], field: str) -> list[str]:
    return list(dict.fromkeys(str(g.config[field]) for g in groups))


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain values of everything that the table shows, for ``--json``."""

    def plain(spread: Spread | None) -> dict[str, float] | None:
        return None if spread is None else vars(spread)

    return {
        "metric": comparison.metric,
        "groups": [
            {
                "name": row.name,
                "runs": [str(run.folder) for run in group.runs],
                "seeds": [run.config["seed"] for run in group.runs],
                "unfinished": row.unfinished,
                "epochs": row.epochs,
                "last": {k: plain(v) for k, v in row.last.items()},
                "best": {k: plain(v) for k, v in row.best.items()},
                "train_top1": plain(row.train),
                "images_per_second": plain(row.images_per_second),
                "label_wait_percent": plain(row.label_wait),
            }
            for group, row in zip(comparison.groups, comparison.rows, strict=True)
        ],
        "differences": [vars(d) for d in comparison.differences],
        "warnings": comparison.warnings,
    }
