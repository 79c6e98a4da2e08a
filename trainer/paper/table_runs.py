"""What the rows of a table need: label sets in few passes, trainings, and their results on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sskt.teacher_cache.errors import IncompleteLabels, InputError, MissingData
from sskt.teacher_cache.locations import label_location
from sskt.teacher_cache.sources.names import SOURCES, source_name
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.label_passes import LabelPass
from sskt.trainer.paper.tables import PaperTable, Row, header, markdown, result_cells

if TYPE_CHECKING:
    from sskt.teacher_cache.label_sets.label_set import LabelSet
    from sskt.teacher_cache.labeling.job import Job
    from sskt.teacher_cache.views.views import Views

Bar = Callable[[str], Callable[[int, int], None]]
RESULTS, RESULTS_TEXT = "results.json", "results.md"


def label_bytes(text: str, samples: int | None, seeds: int, encoding: str) -> int | None:
    """Bytes of a source's labels before compression; None where samples or classes are unknown."""
    from sskt.teacher_cache.format.encodings import parse_encoding

    how = parse_encoding(encoding)
    name = source_name(text)
    if "=" in text or name not in SOURCES or samples is None:
        return None
    return samples * seeds * how.bytes_per_label(SOURCES[name][0])


def limited(config: TrainConfig, fraction: float, bar: Bar) -> TrainConfig:
    """The configuration on a fraction of its training split. Raises what ``open_target`` does."""
    from sskt.trainer.data.splits import open_split

    if config.limit is not None:
        raise InputError(
            f"--fraction and limit = {config.limit} (--set, or the recipe's) both say how many "
            "samples to train on; leave one out"
        )
    read = bar("reading files")
    target = open_split(config, config.split, download=config.download, progress=read)
    return replace(config, limit=max(1, round(fraction * len(target))))


def cache_labels(
    wanted: LabelPass,
    cache: str,
    encoding: str,
    weights: Mapping[str, str],
    preprocessing: Mapping[str, str],
    bar: Bar,
) -> dict[str, str]:
    """Labels what a pass lacks; the digest of the label set of each source.

    weights: file by source; preprocessing: ``key=value,...`` by source. Sources whose labels are
    all there are not opened, unless one of these is given: it then decides which label set is
    theirs. Raises what ``sskt cache-teachers`` raises.
    """
    from sskt.teacher_cache.labeling import run as stage
    from sskt.teacher_cache.labeling.job import open_job_sources, open_job_views
    from sskt.teacher_cache.locations import is_zip
    from sskt.teacher_cache.storage.open import is_served, open_cache

    job = replace(_job(wanted, cache), encoding=encoding)
    open_cache(cache, make=not (is_served(cache) or is_zip(cache)))
    views = open_job_views(job, bar("reading files"))
    given = {*weights, *preprocessing}
    there = {t: _found(t, cache, views) for t in wanted.sources if t not in given}
    found = {t: s.digest for t, s in there.items() if s and _has_seeds(s, wanted.seeds)}
    todo = tuple(text for text in wanted.sources if text not in found)
    if todo:
        open_cache(cache, make=True)  # before sources are opened: a server's is not written to
        files, how = by_name(todo, weights, "="), by_name(todo, preprocessing, ":")
        job = replace(job, sources=todo, weights=tuple(files), preprocessing=tuple(how))
        opened = open_job_sources(job)
        sources, options = [one.source for one in opened], job.options(opened)
        report = stage.cache_teachers(
            views, sources, job.how, job.seeds, cache, options, bar("labels")
        )
        found |= {t: s.digest for t, s in zip(todo, report.label_sets, strict=True)}
    return found


def by_name(sources: Iterable[str], given: Mapping[str, str], mark: str) -> list[str]:
    """``NAME=FILE`` or ``NAME:key=value,...`` of those of the sources for which it is given."""
    return [f"{source_name(text)}{mark}{given[text]}" for text in sources if text in given]


def _job(wanted: LabelPass, cache: str) -> Job:
    from sskt.teacher_cache.labeling.job import Job
    from sskt.trainer.data.splits import dataset_of

    config = wanted.config
    return Job(
        wanted.sources,
        dataset_of(config, config.split, limit=config.limit, download=config.download),
        cache,
        seeds=wanted.seeds,
        policy=config.policy,
        device=config.device,
        workers=config.workers,
        on_error=config.on_error,
    )


def _found(text: str, cache: str, views: Views) -> LabelSet | None:
    from sskt.teacher_cache.label_sets.find import find_label_set
    from sskt.teacher_cache.sources.names import parse_source

    try:
        return find_label_set(cache, parse_source(text, stored=True), views)
    except MissingData:
        return None


def _has_seeds(label_set: LabelSet, seeds: int) -> bool:
    from sskt.teacher_cache.label_sets.find import require_seeds

    try:
        require_seeds(label_set, seeds)
    except IncompleteLabels:
        return False
    return True


def lacking_labels(config: TrainConfig) -> TrainConfig | None:
    """The configuration with those of its sources only whose labels are not all in its cache.

    Its ``seeds`` are those to cache. None if nothing is missing, or if labels come from a server.
    Raises what ``open_target`` raises.
    """
    from sskt.teacher_cache.labeling.job import Job, open_job_views
    from sskt.teacher_cache.storage.open import is_served

    cache = label_location(config.labels or config.cache).value
    if is_served(cache):
        return None
    views = open_job_views(_job(LabelPass(config, tuple(config.source), 1), cache))
    lacking: dict[str, int] = {}
    for text in config.source:
        label_set = _found(text, cache, views)
        seeds = min(config.seeds or (label_set or Job).seeds, config.epochs)
        if label_set is None or not _has_seeds(label_set, seeds):
            lacking[text] = seeds
    if not lacking:
        return None
    return replace(config, source=list(lacking), seeds=max(lacking.values()))


def pinned(config: TrainConfig, digests: Mapping[str, str]) -> TrainConfig:
    """The configuration with each source's label set named by digest."""
    source = [t if "#" in t else f"{t}#{digests[t][:12]}" for t in config.source]
    return replace(config, source=source)


def require_test_split(config: TrainConfig, bar: Bar) -> None:
    """Raises ``MissingData`` before hours of labelling if the test split is not there."""
    from sskt.trainer.data.splits import open_split, split_to_test

    split = split_to_test(config)
    if split == "none":
        raise InputError("a table needs a test split: leave --set test_split=none out")
    open_split(config, split, download=config.download, progress=bar("reading files"))


def require_networks(configs: Sequence[TrainConfig]) -> None:
    """Raises before hours of labelling what building the networks would: weights, taps, stages."""
    from sskt.trainer.loop.setup import make_plan
    from sskt.trainer.paper.sweep import without_sources

    fields = ("target", "root", "model", "stem", "shortcut", "taps", "init", "finetune_from")
    for config in {str([getattr(c, f) for f in fields]): c for c in configs}.values():
        if config.init or config.taps or config.finetune_from is not None:
            make_plan(without_sources(config)).build()


class Results:
    """What was measured of a table, in a folder: ``results.json`` and ``results.md``.

    Rows measured earlier with the same settings are kept; other settings are refused.
    """

    def __init__(self, folder: Path, table: PaperTable, settings: Mapping[str, Any]) -> None:
        self.folder, self.table = folder, table
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.measured: dict[str, dict[int, float]] = {}
        path = folder / RESULTS
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text("utf-8"))
            self._require_same(stored["settings"])
            for row in stored["rows"]:
                self.measured[row["name"]] = {int(k): float(v) for k, v in row["runs"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{path} is damaged; delete it (the runs stay): {error}") from error

    def _require_same(self, stored: Mapping[str, Any]) -> None:
        for key in sorted({*stored, *self.settings}):
            before, now = (x.get(key, "the recipe's") for x in (stored, self.settings))
            if before != now:
                raise InputError(
                    f"{self.folder} holds results with {key} = {before}, not {now}; "
                    "choose another --out"
                )

    def add(self, row: Row, seed: int, value: float) -> None:
        """A training's number in %; written at once, so that a cut run keeps it."""
        self.measured.setdefault(row.name, {})[seed] = value
        self.write()

    def changes(self) -> list[str]:
        """What was trained otherwise than the recipe says, a line each."""
        lines = []
        for key, value in self.settings.items():
            pairs = value.items() if isinstance(value, dict) else [(key, value)]
            lines += [f"not as in the recipe: {name} = {v}" for name, v in pairs]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """``results.json``: the settings, and every row of the table with what was measured."""
        lines = result_cells(self.table.rows, self.measured)
        rows = []
        for row, line in zip(self.table.rows, lines, strict=True):
            cells = dict(zip(header(self.table), line, strict=True))
            cells |= {"panel": row.panel} if row.panel else {}
            runs = {str(k): v for k, v in sorted(self.measured.get(row.name, {}).items())}
            more = {"reported": row.reported, "reported_std": row.reported_std, "runs": runs}
            rows.append(
                {"name": row.name} | cells | {"number": row.number} | more | _mean(row, runs)
            )
        return {"table": self.table.name, "settings": self.settings, "rows": rows}

    def write(self) -> None:
        """Both files, each whole or not at all."""
        from sskt.teacher_cache.storage.atomic import durable_write

        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        durable_write(self.folder / RESULTS, text.encode())
        lines = result_cells(self.table.rows, self.measured)
        notes = ["accuracies in %, mean ± standard deviation over training seeds"]
        notes += [*self.table.notes, *self.changes()]
        title = f"{self.table.name}: {self.table.title}"
        durable_write(
            self.folder / RESULTS_TEXT, markdown(title, header(self.table), lines, notes).encode()
        )


def _mean(row: Row, runs: Mapping[str, float]) -> dict[str, float | None]:
    if not runs:
        return {"mean": None, "std": None, "difference": None}
    from sskt.trainer.results.groups import mean_std

    mean, std = mean_std(list(runs.values()))
    spread = std if len(runs) > 1 else None
    return {"mean": mean, "std": spread, "difference": mean - row.reported}
