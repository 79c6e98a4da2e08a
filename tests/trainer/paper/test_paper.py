"""The paper as it was run: ``sskt reproduce`` trains what the paper trained, number by number.

``paper/expectations.toml`` and ``paper/figure2.json`` hold what the paper says; they were not made
from the recipes.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sskt.trainer.config import TrainConfig, read_recipe
from sskt.trainer.recipes import shipped

Call = Callable[..., tuple[int, str, str]]
Record = dict[str, Any]

ROOT = Path(__file__).parents[3]
PAPER = Path(__file__).parents[2] / "paper"
EXPECTED: Record = tomllib.loads((PAPER / "expectations.toml").read_text("utf-8"))
FIGURE: dict[str, dict[str, list[float]]] = json.loads((PAPER / "figure2.json").read_text())
TABLES = [f"table{n}" for n in range(1, 10)]
COMBINATIONS = [
    (sources, tm, auxiliary)
    for sources in (["P"], ["I"], ["P", "I"])
    for tm in (False, True)
    for auxiliary in ("ce", "kd-released")
]
ELSEWHERE = frozenset(("seed", "out", "cache", "root"))
"""Fields that a dry run sets from its own options."""
DEFAULTS = {k: v for k, v in TrainConfig().as_dict().items() if k not in ELSEWHERE}


def training(name: str, model: str, loss: str, sources: list[str], **more: Any) -> Record:
    """The whole expected configuration of a training."""
    its = EXPECTED["training"][name]
    fields = EXPECTED["all"] | (EXPECTED["videos"] if its.get("videos") else {}) | its["fields"]
    loss = loss if "+" in loss else f"{its['primary']}+{loss}"
    fields |= {"model": model, "loss": loss, "tm": False}
    fields |= {"source": [its["sources"][letter] for letter in sources]}
    whole: Record = DEFAULTS | fields | more
    return whole


def runs_of(reported: list[float], config: Record, runs: int = 0) -> list[Record]:
    """The trainings of a row: three where a deviation is reported, else one."""
    std = reported[1] if len(reported) > 1 else None
    line = {"reported": reported[0], "reported_std": std, "config": config}
    return [line | {"seed": seed} for seed in range(runs or (1 if std is None else 3))]


def expected(name: str) -> list[Record]:
    """All trainings of a table or figure, in the order of its rows."""
    if name == "figure2":
        return list(_of_figure())
    lines: list[Record] = []
    for block in EXPECTED[name]:
        where = block["training"], block["model"]
        if "rows" in block:
            lines += [line for row in block["rows"] for line in _of_table9(row, *where)]
            continue
        scratch, *taught = block["reported"]
        lines += runs_of(scratch, training(*where, "ce", []))
        for (sources, tm, loss), reported in zip(COMBINATIONS, taught, strict=True):
            lines += runs_of(reported, training(*where, loss, sources, tm=tm))
    return lines


def _of_table9(row: Record, name: str, model: str) -> list[Record]:
    if "psi" in row:
        more = EXPECTED["maxl"] | {"psi": row["psi"]}
        return runs_of(row["reported"], training(name, model, "focal+focal", []) | more)
    loss = {"F": "focal+focal", "C": "ce+ce"}[row["loss"]]
    found = training(name, model, loss, row["sources"], tm=row["tm"])
    return runs_of(row["reported"], found)


def _of_figure() -> Iterator[Record]:
    its = EXPECTED["figure2"]
    for where in ("STL10 (R20", "PASCAL VOC (R18"):
        name, model = its[where]["training"], its[where]["model"]
        for loss, letters in (("ce", "CE"), ("kd-released", "KD")):
            for sources in (["P"], ["I"], ["P", "I"]):
                panel = f"{where}, {'+'.join(sources)}, {letters})"
                for tm in (False, True):
                    for alpha in its["alphas"]:
                        curve = FIGURE[panel][f"{'TM ' if tm else ''}a{alpha}"]
                        for t, value in zip(its["temperatures"], curve, strict=True):
                            more = {"tm": tm, "alpha": alpha, "temperature": t}
                            found = training(name, model, loss, sources, **more)
                            for line in runs_of([value], found, its["runs"]):
                                yield line | {"panel": panel}


def listed(shown: Record) -> list[Record]:
    """The trainings of a dry run as the expectations have them, in the order of the rows."""
    lines = []
    for line in sorted(shown["trainings"], key=lambda one: (one["row"], one["seed"])):
        config = {k: v for k, v in line["config"].items() if k not in ELSEWHERE}
        if str(config["init"]).startswith("(K: Kinetics-400 weights"):
            config["init"] = "K"
        kept = {k: line[k] for k in ("reported", "reported_std", "seed", "panel") if k in line}
        lines.append(kept | {"config": config})
    return lines


def dry_run(sskt: Call, table: object, *more: object) -> Record:
    status, out, err = sskt("reproduce", table, "--dry-run", "--json", *more)
    assert status == 0, err
    found: Record = json.loads(out)
    return found


def test_every_recipe_of_the_paper_is_compared() -> None:
    assert shipped("table") == ["figure2", *TABLES]
    assert [len(expected(name)) for name in TABLES[3:6]] == [26, 117, 26]
    assert len(expected("figure2")) == 12 * 6 * 3 * 3


@pytest.mark.parametrize("name", [*TABLES, "figure2"])
def test_every_setting_and_number_is_the_papers(sskt: Call, name: str) -> None:
    found, wanted = listed(dry_run(sskt, name)), expected(name)
    for i, (have, want) in enumerate(zip(found, wanted, strict=False)):
        odd = {k: (v, want["config"].get(k)) for k, v in have["config"].items()
               if v != want["config"].get(k)}  # fmt: skip
        assert not odd, f"{name}, training {i}: (found, expected) {odd}"
        assert have == want, f"{name}, training {i}"
    assert len(found) == len(wanted)


def test_the_recipe_of_the_best_row_and_the_defaults_are_the_papers(sskt: Call) -> None:
    best = max(
        (one for one in expected("table3") if one["config"]["model"] == "resnet20"),
        key=lambda one: float(one["reported"]),
    )
    given = read_recipe(Path("stl10-resnet20"))
    assert given.pop("seed") == 0
    wanted = {name: best["config"][name] for name in given}
    assert sorted(given.pop("source")) == sorted(wanted.pop("source"))
    assert given == wanted and {"alpha", "temperature", "lr", "milestones", "tm"} < given.keys()
    shared = ("alpha", "temperature", "optimizer", "momentum", "batch_size", "gamma", "schedule")
    assert {name: DEFAULTS[name] for name in shared} == {n: EXPECTED["all"][n] for n in shared}


def numbers_of(text: str) -> list[tuple[int, int]]:
    """Where a recipe has numbers that a training or a report depends on."""
    found, offset, notes = [], 0, False
    for line in text.splitlines(keepends=True):
        notes = line.startswith("notes =") or (notes and not line.startswith("]"))
        if not notes and not line.startswith(("#", "title", "needs", "name =", "    #")):
            found += [
                (offset + m.start(), offset + m.end())
                for m in re.finditer(r"(?<![\d.])\d+(?:\.\d+)?(?:e-\d+)?", line)
            ]
        offset += len(line)
    return found


def changed(number: str) -> str:
    """Another number of the same type."""
    return str(int(number) + 1) if number.isdigit() else str(float(number) * 1.5 + 0.01)


def seen(sskt: Call, file: Path, text: str, wanted: list[Record]) -> bool:
    """Whether the comparison tells a changed recipe from the paper."""
    file.write_text(text)
    status, out, _ = sskt("reproduce", file, "--dry-run", "--json")
    return status != 0 or listed(json.loads(out)) != wanted


@pytest.mark.parametrize("name", [*TABLES, pytest.param("figure2", marks=pytest.mark.slow)])
def test_any_other_number_in_a_recipe_is_seen(sskt: Call, name: str, tmp_path: Path) -> None:
    text, wanted = (ROOT / f"recipes/{name}.toml").read_text("utf-8"), expected(name)
    file = tmp_path / f"{name}.toml"
    assert not seen(sskt, file, text, wanted)
    settings = text.find("    # ") if name != "figure2" else text.find("curve =")
    places = numbers_of(text)
    # All numbers of the settings that rows share, and a sample of the rows' own.
    places = [p for p in places if p[0] < settings] + [p for p in places if p[0] > settings][::7]
    assert len(places) > 15
    for start, end in places:
        other = text[:start] + changed(text[start:end]) + text[end:]
        assert seen(sskt, file, other, wanted), f"{name}: {other[start - 40 : end + 20]!r}"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("table3", "lr = 0.1\n", "lr = 0.05\n"),
        ("table3", "momentum = 0.9\n", 'optimizer = "adamw"\n'),
        ("table3", "weight-decay = 5e-4", "weight-decay = 1e-4"),
        ("table3", "milestones = [60, 120, 160, 200]", "milestones = [60, 120, 160]"),
        ("table3", "seeds = 10", "seeds = 200"),
        ("table3", "temperature = 1\n", "temperature = 3\n"),
        ("table3", "tm = true, ", ""),
        ("table3", ', reported-std = 0.05 }', " }"),
        ("table3", '{ sources = ["P", "I"]', '{ sources = ["I", "P"]'),
        ("table1", "@74", ""),
        ("table4", '"ce+kd-released"', '"ce+kd"'),
        ("table6", 'schedule = "plateau"', 'schedule = "cosine"'),
        ("table8", "finetune-from = 4", "finetune-from = 3"),
        ("table9", 'model = "vgg16"', 'model = "vgg13"'),
        ("figure2", "runs = 3", "runs = 1"),
    ],
)  # fmt: skip
def test_another_setting_in_a_recipe_is_seen(
    sskt: Call, tmp_path: Path, name: str, old: str, new: str
) -> None:
    text = (ROOT / f"recipes/{name}.toml").read_text("utf-8")
    assert old in text
    assert seen(sskt, tmp_path / f"{name}.toml", text.replace(old, new, 1), expected(name))
