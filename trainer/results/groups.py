"""Runs as numbers: what a folder holds, several seeds as mean and spread, groups by name."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.sources.names import source_name
from sskt.trainer.config import FIELDS, INDIFFERENT, LABEL_SETS, TrainConfig, read_stored

Record = dict[str, Any]

METRICS = {
    "test_video_top1": "top-1 by video",
    "test_ap": "AP by image",
    "test_map": "mAP by class",
    "test_top1": "top-1",
    "test_top5": "top-5",
}
"""Test metrics in %, and what they are called."""
MAIN = ("test_video_top1", "test_ap", "test_top1")
"""What a run is judged by: the first of these that it has."""
FLOAT32_MAX = 3.4028235e38
"""No larger number comes out of a training; sums and squares of such cannot overflow a float64."""
SEED_ONLY = INDIFFERENT | {"seed"}
AUXILIARY_ONLY = frozenset(
    [
        "tm",
        "alpha",
        "temperature",
        "force_topk",
        "live",
        "weights",
        "preprocessing",
        "frame_sampling",
        "seeds",
        "source_weight",
        "psi",
        "plateau_on",
    ]
)
"""Fields that change nothing in a run from scratch."""


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); 0.0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main_metric(records: Sequence[Record]) -> str | None:
    """The key of a run's main test metric; None for a run without evaluation."""
    return next((key for key in MAIN if any(key in record for record in records)), None)


def result_of(records: Sequence[Record]) -> float:
    """A run's number (%) as the paper reports it: the main test metric, evaluated last.

    Raises ``InputError`` if the run was not evaluated.
    """
    key = main_metric(records)
    if key is None:
        raise InputError("the run has no test metric; train it with a --test-split")
    return values_of(records, key)[-1]


def values_of(records: Sequence[Record], key: str) -> list[float]:
    """The values of ``key`` in the epochs that have it (with --eval-every not all have)."""
    return [float(record[key]) for record in records if key in record]


@dataclass(frozen=True)
class Run:
    """A run's folder, the fields of its configuration (defaults filled in) and its records."""

    folder: Path
    config: dict[str, Any]
    records: list[Record]

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the run stopped early as it was told to."""
        from sskt.trainer.results.records import is_finished

        return is_finished(self.records, self.config["epochs"])


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only; ``name`` says what sets them apart from the others."""

    name: str
    runs: list[Run]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the first run."""
        return self.runs[0].config

    @property
    def counted(self) -> list[Run]:
        """The runs that are summarised: the finished ones, if there are any; one for each seed.

        A seed that was run twice gives the same numbers twice, which would pass for a small spread.
        """
        seeds: dict[int, Run] = {}
        for run in [r for r in self.runs if r.finished] or self.runs:
            seeds.setdefault(run.config["seed"], run)
        return list(seeds.values())


def load_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """(configuration, records) of a run; fields that an older version lacked have their defaults.

    The configuration also says under ``label_sets`` which ones were trained from, if it is known.

    Raises ``MissingData`` or ``InputError`` naming the file that is absent, empty or damaged.
    """
    from sskt.trainer.results import records as files

    path = folder / files.METRICS
    try:
        records = files.read_metrics(folder)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not records:
        raise InputError(f"{path} is empty: the run has not finished an epoch")
    for i, record in enumerate(records):
        if not _is_record(record, i):
            said = json.dumps(record)[:60]
            raise InputError(f"{path} is damaged: line {i + 1} is no record of epoch {i}: {said}")
    if not (folder / files.CONFIG).is_file():
        raise MissingData(f"{folder} is no whole run: {files.CONFIG} is missing beside {path.name}")
    config, sets = read_stored(folder / files.CONFIG)
    labels = {name: f"{one['encoding']} {one['digest'][:8]}" for name, one in sets.items()}
    return _defaults() | config | ({LABEL_SETS: labels} if labels else {}), records


def _is_record(record: Any, epoch: int) -> bool:
    if not isinstance(record, dict) or record.get("epoch") != epoch:
        return False
    return all(
        type(value) in (int, float) and abs(value) <= FLOAT32_MAX
        for key, value in record.items()
        if key.startswith(("loss", "train_", "test_")) or key in ("images", "seconds")
    )


def _defaults() -> dict[str, Any]:
    return dict(vars(TrainConfig()))


def is_scratch(config: Mapping[str, Any]) -> bool:
    """Whether a run has no auxiliary task."""
    return not config["source"] and config["method"] == "sskt"


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that make runs different, as plain values; seed and machine are left out."""
    kept = {k: v for k, v in config.items() if k not in SEED_ONLY}
    if is_scratch(config):
        kept = {k: v for k, v in kept.items() if k not in AUXILIARY_ONLY}
        kept["loss"] = str(config["loss"]).split("+")[0]
        # Without label sets every epoch has a view seed of its own, unless told otherwise.
        if config["seeds"] not in (None, config["epochs"]):
            kept["seeds"] = config["seeds"]
    if config["method"] != "maxl":
        kept.pop("psi", None)
    return {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in seed and machine only make a group; in order of first appearance."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(deciding(run.config), sort_keys=True, default=str)
        found.setdefault(key, []).append(run)
    groups = list(found.values())
    names = short_names([members[0].config for members in groups])
    return [Group(name, members) for name, members in zip(names, groups, strict=True)]


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Fields in which configurations differ: field -> a value for each (None: of no effect)."""
    plain = [deciding(config) for config in configs]
    if len({str(c["loss"]).split("+")[0] for c in configs} - {"auto"}) <= 1:
        for config, kept in zip(configs, plain, strict=True):
            if is_scratch(config):
                del kept["loss"]  # "ce" is no difference to "ce+kd": there is no second term
    fields = [k for k in (*FIELDS, LABEL_SETS) if any(k in p for p in plain)]
    found = {}
    for name in fields:
        values = [p[name] for p in plain if name in p]
        if any(v != values[0] for v in values[1:]):
            found[name] = [p.get(name) for p in plain]
    return found


def short_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each configuration: its method, and the fields in which they differ.

    ``imagenet, TM, alpha 0.5`` or ``scratch``. Equal names are told apart by the label sets, else
    they are numbered.
    """
    differing = differences(configs)
    whole = _ambiguous_sources(configs)
    names = []
    for i, config in enumerate(configs):
        where = [_shown("target", differing["target"][i])] if "target" in differing else []
        where += [Path(config["model"]).name] if "model" in differing else []
        parts = [" ".join(where)] if where else []
        parts.append(method_name(config, whole=whole))
        parts += ["TM"] if config["tm"] and config["source"] else []
        shown = {"target", "model", "source", "method", "tm", LABEL_SETS}
        parts += [
            _shown(name, values[i]) for name, values in differing.items() if name not in shown
        ]
        names.append(", ".join(p for p in parts if p))
    labels = ["/".join(config.get(LABEL_SETS, {}).values()) for config in configs]
    names = [
        f"{name}, labels {found}" if found and names.count(name) > 1 else name
        for name, found in zip(names, labels, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})"
        for i, name in enumerate(names)
    ]


def method_name(config: Mapping[str, Any], *, whole: bool = False) -> str:
    """``imagenet+places365``, ``scratch`` or ``MAXL``; ``whole`` keeps networks and sizes."""
    if config["method"] == "maxl":
        return "MAXL"
    sources = config["source"]
    return "+".join(s if whole else source_name(s) for s in sources) or "scratch"


def _ambiguous_sources(configs: Sequence[Mapping[str, Any]]) -> bool:
    whole: dict[str, set[str]] = {}
    for config in configs:
        for source in config["source"]:
            whole.setdefault(source_name(source), set()).add(source)
    return any(len(found) > 1 for found in whole.values())


def _shown(field: str, value: Any) -> str:
    label = {"temperature": "T"}.get(field, field.replace("_", " "))
    if field == "target":
        return Path(value).name
    if value is True:
        return label
    if value is False:
        return "" if FIELDS[field].default is False else f"no {label}"
    if value in (None, "", []):
        return ""
    if isinstance(value, float):
        value = f"{value:g}"
    if isinstance(value, list):
        value = "/".join(Path(str(v)).name if "/" in str(v) else str(v) for v in value)
    return f"{label} {Path(value).name if '/' in str(value) else value}"
