"""The paper's tables: recipes with a row for every row, and reported beside measured.

A recipe ``tableN.toml`` has fields of ``TrainConfig`` that all rows share, ``on.TARGET`` with
fields for the rows of one target, ``sources`` (the paper's letters to source names), ``needs``
(files that only the user can give), ``notes`` (what the paper leaves open, printed with the
results) and ``row``: ``sources`` by letter, ``reported`` and ``reported-std`` in %, and any fields
that are the row's own. A figure's recipe (``figures.py``) is read as a table too. No torch here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.sources.names import source_name
from sskt.trainer.config import FIELDS, TrainConfig, checked, make_config, read_fields
from sskt.trainer.paper.figures import figure_rows
from sskt.trainer.paper.table_form import require_form
from sskt.trainer.recipes import Recipe, load_recipe, parse_recipe

TARGET_LETTERS = {
    "cifar10": "C10",
    "cifar100": "C100",
    "stl10": "S10",
    "voc2007": "VOC",
    "voc2012": "VOC",
    "imagenet": "I",
    "places365": "P",
    "places365-small": "P",
    "ucf101": "U101",
    "hmdb51": "H51",
}
MODEL_LETTERS = {"resnet3d": "3DR", "resnet": "R", "densenet": "D", "vgg": "V"}

_ROW_KEYS = ("sources", "reported", "reported_std", "name", "panel")
_TABLE_KEYS = ("title", "notes", "sources", "needs", "on", "row", "figure", "panel")
_OWN = {
    "source": "--source LETTER=NAME",
    "seed": "--runs N",
    "out": "--out",
    "cache": "--cache",
    "labels": "--cache URL",
    "root": "--root",
    "weights": "--weights LETTER=FILE",
    "device": "--device",
}


@dataclass(frozen=True)
class Row:
    """A row: letters of its sources, what the paper reports (%), and its own fields.

    ``panel`` is the graph to which a row of a figure belongs; of a table it is empty.
    """

    number: int
    sources: tuple[str, ...]
    reported: float
    reported_std: float | None
    fields: Mapping[str, Any]
    name: str = ""
    panel: str = ""

    @property
    def focal(self) -> bool:
        """Whether SSKT is trained with a focal loss, as in the rows (F) of table 9."""
        return "focal" in self.fields.get("loss", "") and self.fields.get("method") != "maxl"

    @property
    def method(self) -> str:
        """As the paper calls it."""
        if self.fields.get("method") == "maxl":
            return f"MAXL ({self.fields['psi']})"
        if self.sources:
            return "SSKT"
        return "ft" if self.fields.get("init") else "scratch"

    @property
    def loss(self) -> str:
        """In the paper's letters; without sources the auxiliary loss plays no part."""
        letters = (
            self.fields.get("loss", "ce+ce").upper().replace("-RELEASED", "").replace("FOCAL", "F")
        )
        return letters if self.sources else str(letters).split("+")[0]

    def cells(self) -> list[str]:
        """T_s, T_t, model, method, TM and loss, as in the paper; of a figure also alpha and T."""
        target = str(self.fields["target"])
        tm = ("o" if self.fields.get("tm") else "x") if self.sources else "-"
        swept = [f"{self.fields[k]:g}" for k in ("alpha", "temperature")] if self.panel else []
        return [
            "+".join(self.sources) or "-",
            TARGET_LETTERS.get(target, target.rstrip("/").rsplit("/", 1)[-1]),
            model_letters(self.fields.get("model", "resnet20")),
            self.method,
            tm,
            self.loss,
            *swept,
        ]


@dataclass(frozen=True)
class PaperTable:
    """A recipe that was read.

    ``needs`` tells what to get for each letter that needs a file, ``notes`` what is not the
    paper's; ``runs`` is the number of trainings of each row, None where the rows decide.
    """

    name: str
    title: str
    sources: Mapping[str, Mapping[str, str]]
    needs: Mapping[str, str]
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    runs: int | None = None

    def runs_of(self, row: Row) -> int:
        """Trainings of a row: as many as the figure has, or 3 if a deviation is reported, or 1."""
        return self.runs or (1 if row.reported_std is None else 3)

    def source(self, row: Row, letter: str) -> str:
        """The ``--source`` argument behind a letter of a row."""
        return self.sources[str(row.fields["target"])][letter]

    def letters(self) -> list[str]:
        """All letters that have a source, in order."""
        return list(dict.fromkeys(x for names in self.sources.values() for x in names))

    def with_sources(self, given: Mapping[str, str]) -> PaperTable:
        """Other sources: by letter, or by the name of the source for all letters that have it.

        Raises ``UnknownName``.
        """
        known = {k: v for names in self.sources.values() for k, v in names.items()}
        for key in given:
            if key not in known and key not in map(source_name, known.values()):
                raise UnknownName(f"source of {self.name}", key, known)
        changed = {
            target: {k: given.get(k, given.get(source_name(v), v)) for k, v in names.items()}
            for target, names in self.sources.items()
        }
        return replace(self, sources=changed)


def model_letters(model: str) -> str:
    """``R20`` for ``resnet20``, ``MV2``, ``3DR18``; other names without their folder."""
    if model == "mobilenet_v2":
        return "MV2"
    match = re.fullmatch(r"([a-z]+(?:3d)?)(\d+)", model)
    if match and match[1] in MODEL_LETTERS:
        return f"{MODEL_LETTERS[match[1]]}{match[2]}"
    return model.rsplit("/", 1)[-1]


def read_table(name: str) -> PaperTable:
    """A table that ships, or a TOML file of the same form.

    Raises ``UnknownName``, ``MissingData``, ``InputError`` (no TOML, wrong type, no rows).
    """
    return _table(Path(name).stem, load_recipe(name, "table"))


def parse_table(name: str, text: str) -> PaperTable:
    """The table that a recipe's text describes. Raises ``InputError``, ``UnknownName``."""
    return _table(name, parse_recipe(text, name, "table"))


def _table(name: str, recipe: Recipe) -> PaperTable:
    read = {k.replace("-", "_"): v for k, v in recipe.items()}
    if "figure" in read:
        read["row"] = figure_rows(read, f"figure {name}")
    require_form(read, f"table {name}")
    base = read_fields({k: v for k, v in read.items() if k not in _TABLE_KEYS}, f"table {name}")
    on = {target: dict(fields) for target, fields in read.get("on", {}).items()}
    own_sources = {t: fields.pop("sources") for t, fields in on.items() if "sources" in fields}
    shared = {t: read_fields(f, f"table {name}, on.{t}") for t, f in on.items()}
    rows = [
        _row(i + 1, given, base, shared, f"table {name}, row {i + 1}")
        for i, given in enumerate(read["row"])
    ]
    targets = dict.fromkeys(str(row.fields["target"]) for row in rows)
    for target in on:
        if target not in targets:
            raise UnknownName(f"target in table {name}, on", target, targets)
    sources = {t: own_sources.get(t, read.get("sources", {})) for t in targets}
    for row in rows:
        for letter in row.sources:
            if letter not in sources[str(row.fields["target"])]:
                known = sources[str(row.fields["target"])]
                raise UnknownName(f"source in table {name}, row {row.number}", letter, known)
    several = len(targets) > 1
    named = tuple(replace(row, name=row.name or _name(row, several)) for row in rows)
    twice = sorted(r.name for r in named if sum(o.name == r.name for o in named) > 1)
    if twice:
        raise InputError(f"table {name}: two rows are called {twice[0]}; give them a name = ...")
    title, needs, notes = str(read.get("title", name)), read.get("needs", {}), read.get("notes", ())
    runs = read.get("figure", {}).get("runs")
    return PaperTable(name, title, sources, needs, named, tuple(notes), runs)


def _row(
    number: int,
    given: Mapping[str, Any],
    base: Mapping[str, Any],
    shared: Mapping[str, Mapping[str, Any]],
    where: str,
) -> Row:
    own = {k.replace("-", "_"): v for k, v in given.items()}
    fields = read_fields({k: v for k, v in own.items() if k not in _ROW_KEYS}, where)
    target = fields.get("target", base.get("target"))
    if target is None:
        raise InputError(f"{where}: expected a target and reported = a number in %")
    fields = {**base, **shared.get(target, {}), **fields}
    std, sources = own.get("reported_std"), tuple(own.get("sources", ()))
    names = own.get("name", ""), own.get("panel", "")
    return Row(number, sources, float(own["reported"]), std, fields, *names)


def _name(row: Row, several: bool) -> str:
    sources, target, model, method, tm, loss, *swept = row.cells()
    how = sources if row.sources else method.replace(" (", "-").rstrip(")")
    parts = [target if several else "", model, how, "tm" if tm == "o" else "", loss]
    parts += [f"{letter}{value}" for letter, value in zip("at", swept, strict=False)]
    return "-".join(filter(None, parts)).lower()


def parse_settings(items: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as fields of ``TrainConfig``. Raises ``UnknownName``, ``InputError``."""
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        name = key.strip().replace("-", "_")
        if not equals:
            raise InputError(f"--set {item}: expected KEY=VALUE")
        if name in _OWN:
            raise InputError(f"--set {item}: {name} is set with {_OWN[name]}")
        if name not in FIELDS:
            raise UnknownName("field in --set", key, FIELDS)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        try:
            values |= checked({name: value}, "--set")
        except InputError:
            values |= checked({name: text}, "--set")
    return values


@dataclass(frozen=True)
class Choices:
    """What a user changes of a table, for all of its rows alike."""

    epochs: int | None = None
    seeds: int | None = None
    kd: str = "released"
    settings: Mapping[str, Any] = field(default_factory=dict)
    roots: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    focal_schedule: str = "multistep"

    def config(self, table: PaperTable, row: Row, **more: Any) -> TrainConfig:
        """A row's configuration. Raises ``InputError``, ``MissingData`` for a file it needs."""
        fields = dict(row.fields) | dict(self.settings)
        if row.focal and self.focal_schedule != "multistep":
            fields["schedule"] = self.focal_schedule
        for name in ("epochs", "seeds"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        if self.kd == "meant" and "loss" in fields:
            fields["loss"] = fields["loss"].replace("kd-released", "kd")
        fields["source"] = [table.source(row, letter) for letter in row.sources]
        if not row.sources:
            fields |= {"live": False, "tm": False, "preprocessing": [], "frame_sampling": ""}
        fields["source_weight"] = _own_weights(table, row, fields)
        if "milestones" in row.fields and "milestones" not in self.settings:
            whole = row.fields.get("epochs", FIELDS["epochs"].default)
            part = fields.get("epochs", whole) / whole
            scaled = {max(1, round(m * part)) for m in row.fields["milestones"]}
            fields["milestones"] = sorted(scaled)
        letter = fields.get("init", "")
        if letter in table.needs:
            if letter not in self.files:
                raise MissingData(
                    f"row {row.number} ({row.name}) of {table.name} starts from {letter}: get "
                    f"{table.needs[letter]} and give it with --weights {letter}=FILE"
                )
            fields["init"] = self.files[letter]
        target = str(fields["target"])
        fields["root"] = self.roots.get(target, self.roots.get(""))
        return make_config(fields, more)


def _own_weights(table: PaperTable, row: Row, fields: Mapping[str, Any]) -> list[str]:
    """The source weights of the sources that the row has; those of the table's others go."""
    known = {source_name(s) for s in table.sources[str(row.fields["target"])].values()}
    kept = []
    for text in fields.get("source_weight", []):
        name = text.rpartition("=")[0]
        if name not in known:
            raise UnknownName(f"source in source_weight = {text}", name, sorted(known))
        if name in map(source_name, fields["source"]):
            kept.append(text)
    return kept


def difference(measured: float, reported: float) -> str:
    """Percentage points with sign."""
    return f"{measured - reported:+.2f}"


def header(table: PaperTable) -> list[str]:
    """The columns of the printed table."""
    swept = ["alpha", "T"] if any(row.panel for row in table.rows) else []
    columns = ["row", "T_s", "T_t", "model", "method", "TM", "loss", *swept]
    return [*columns, "reported", "measured", "diff."]


def result_cells(rows: Sequence[Row], measured: Mapping[str, Mapping[int, float]]) -> list[Any]:
    """The lines of the printed table; ``measured``: % by row name and training seed."""
    return [_result_line(row, measured.get(row.name, {})) for row in rows]


def _result_line(row: Row, runs: Mapping[int, float]) -> list[str]:
    reported = percent(row.reported, row.reported_std)
    line = [str(row.number), *row.cells(), reported]
    if not runs:
        return [*line, "-", "-"]
    from sskt.trainer.results.groups import mean_std

    mean, std = mean_std(list(runs.values()))
    return [*line, percent(mean, std if len(runs) > 1 else None), difference(mean, row.reported)]


def percent(mean: float, std: float | None) -> str:
    """``92.19 ± 0.09``; without a deviation, where there is one run, the mean alone."""
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def markdown(
    title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]
) -> str:
    """``results.md``."""
    table = [columns, ["---"] * len(columns), *lines]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    return f"# {title}\n\n{text}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
