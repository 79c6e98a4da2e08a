"""The paper's tables: every number is in a recipe, and a recipe can be made into measurements."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.sources.known_networks import CSAIL_SHA256, imagenet_archs
from sskt.teacher_cache.sources.names import SOURCES, parse_source
from sskt.trainer.data.label_passes import label_passes
from sskt.trainer.losses import parse_loss
from sskt.trainer.models.registry import NETWORKS
from sskt.trainer.paper.select import select_rows
from sskt.trainer.paper.table_runs import Results, label_bytes
from sskt.trainer.paper.tables import (
    Choices,
    PaperTable,
    Row,
    parse_settings,
    parse_table,
    read_table,
    result_cells,
)
from sskt.trainer.recipes import shipped

Reported = tuple[float, float | None]
TABLES = [f"table{n}" for n in range(1, 10)]
ALIGNED = [t for t in TABLES if t not in ("table4", "table9")]
MODELS = ("R18", "R20", "R32", "R34", "R50", "MV2", "D121", "3DR18")


@pytest.fixture(scope="module")
def paper(data: Path) -> str:
    path = data.parent / "paper.txt"
    if not path.exists():
        pytest.skip(f"the paper's text is not there: {path}")
    return path.read_text("utf-8")


def printed(paper: str, table: str) -> list[list[str]]:
    """The lines of a table below its header, as cells."""
    caption = paper.index(f"\nTable {table.removeprefix('table')}. ")
    header = re.compile(r"\nT_[st]\t.*\n").search(paper, caption)
    assert header
    lines = paper[header.end() :].split("\n")
    end = next((i for i, line in enumerate(lines) if "\t" not in line), len(lines))
    return [line.replace("\\pm", "±").split("\t") for line in lines[:end]]


def numbers(cell: str) -> Reported:
    mean, _, std = cell.partition("±")
    return float(mean), float(re.sub(r"\(.*", "", std)) if std else None


def value(cells: list[str]) -> str:
    return next(c for c in reversed(cells) if re.match(r"\d+\.\d", c))


def reported(rows: list[Row]) -> list[Reported]:
    return [(r.reported, r.reported_std) for r in rows]


def test_there_is_a_recipe_for_every_table() -> None:
    assert shipped("table") == ["figure2", *TABLES]


@pytest.mark.parametrize("table", ALIGNED)
def test_every_number_of_the_paper_is_in_the_recipe_in_order(paper: str, table: str) -> None:
    lines = printed(paper, table)
    assert len(lines) == {"table5": 39, "table8": 39}.get(table, 26)
    assert reported(list(read_table(table).rows)) == [numbers(value(cells)) for cells in lines]


def test_every_number_of_table_9_is_in_the_recipe_in_order(paper: str) -> None:
    lines, rows = printed(paper, "table9"), read_table("table9").rows
    maxl = [c for c in lines if c[2] != "-"]
    ours = [r for r in rows if r.method.startswith("MAXL")]
    assert len(maxl) == 8 and reported(ours) == [numbers(c[2]) for c in maxl]
    assert [f"({r.fields['psi']})" for r in ours] == [c[2].split(" ")[1] for c in maxl]
    assert [f"{r.cells()[2]} ({r.loss})" for r in ours] == [c[1] for c in maxl]
    sskt = [r for r in rows if r.sources]
    assert len(lines) == 36 and len(rows) == 44
    assert reported(sskt) == [numbers(c[3]) for c in lines]
    for row, cells in zip(sskt, lines, strict=True):
        letters = "+".join(row.sources).replace("V16", "I")
        tm = "o" if row.fields.get("tm") else "x"
        assert f"({letters}, {tm})" in cells[3]
        models = ["V16" if letter == "V16" else "R50" for letter in row.sources]
        assert ", ".join(models) == cells[4].strip()
        assert {"F": "F+F", "C": "CE+CE"}[cells[1][-2]] == row.loss
        assert row.cells()[2] == cells[1][:3]


@pytest.mark.parametrize("table", ALIGNED)
def test_every_row_says_what_the_paper_prints_beside_its_number(paper: str, table: str) -> None:
    source = target = ""
    for row, cells in zip(read_table(table).rows, printed(paper, table), strict=True):
        model = next(i for i, c in enumerate(cells) if c in MODELS)
        source = cells[0] or source
        target = cells[1] if model == 2 and cells[1] else target
        method, tm, loss = cells[model + 1 : model + 4]
        method = "ft" if "ft" in method else method
        loss = loss.replace("CE", "BCE", 1) if (table, target) == ("table8", "VOC") else loss
        target = target.replace("STL10", "S10")
        assert row.cells() == [source, target, cells[model], method, tm, loss], row.name


def test_table_4_has_for_each_target_the_rows_of_the_other_tables(paper: str) -> None:
    """The paper's text lost a number of each target: I, o, CE+KD and P+I, o, CE+CE."""
    rows = read_table("table4").rows
    expected = [r.cells() for r in read_table("table1").rows[:13]]
    for target, part in (("P", rows[:13]), ("I", rows[13:])):
        assert [r.cells()[1:3] for r in part] == [[target, "R18"]] * 13
        assert [[c[0], *c[3:]] for c in (r.cells() for r in part)] == [
            [c[0], *c[3:]] for c in expected
        ]
    kept = [number for number, _ in reported(list(rows))]
    lost = 53.44, 67.64
    lines = [numbers(value(cells))[0] for cells in printed(paper, "table4")]
    assert lines == [number for number in kept if number not in lost] and len(kept) == 26


@pytest.mark.parametrize("name", [*TABLES, "figure2"])
def test_every_row_can_be_trained(name: str) -> None:
    table = read_table(name)
    choices = Choices(files=dict.fromkeys(table.needs, "given.pth"))
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names)
    for row in table.rows:
        config = choices.config(table, row, cache="cache")
        assert config.model in NETWORKS
        parse_loss(config.loss)
        assert (config.loss.split("+")[0] == "bce") == config.target.startswith("voc")
        assert len(config.source) == len(row.sources)
        for text in config.source:
            source = parse_source(text)
            known = imagenet_archs() if source.name == "imagenet" else CSAIL_SHA256
            assert source.name in SOURCES and source.arch in known
            small = {"cifar10": 74, "cifar100": 74, "ucf101": 112, "hmdb51": 112}
            assert source.size == small.get(config.target)


def test_rows_with_focal_loss_may_be_annealed() -> None:
    table = read_table("table9")
    focal = {r.number for r in table.rows if r.loss == "F+F" and r.sources}
    assert len(focal) == 20
    for schedule, number in (("cosine", 20), ("multistep", 0)):
        choices = Choices(focal_schedule=schedule)
        schedules = {r.number: choices.config(table, r, cache="c").schedule for r in table.rows}
        assert {n for n, s in schedules.items() if s == "cosine"} == (focal if number else set())


def test_the_loss_as_released_or_as_meant() -> None:
    table = read_table("table3")
    row = select_rows(table, ["r20-p-ce+kd"])[0]
    assert Choices().config(table, row, cache="c").loss == "ce+kd-released"
    assert Choices(kd="meant").config(table, row, cache="c").loss == "ce+kd"


def test_rows_are_chosen_by_number_range_and_name() -> None:
    table = read_table("table1")

    def chosen(*selectors: str) -> list[int]:
        return [r.number for r in select_rows(table, selectors)]

    assert chosen() == list(range(1, 27))
    assert chosen("14", "2-4", "3") == [2, 3, 4, 14]
    assert chosen("*scratch*") == [1, 14]
    assert chosen("R20-P+I-TM-CE+CE") == [12]
    with pytest.raises(UnknownName, match=r"unknown row of table1 'r99'; known: 1 r20-scratch-ce"):
        chosen("1", "r99")
    with pytest.raises(UnknownName, match="unknown row of table1 '27'"):
        chosen("27")


def test_sources_are_replaced_by_letter_or_by_name() -> None:
    table = read_table("table9")
    row = select_rows(table, ["v16-p+v16-f+f"])[0]
    by_letter = table.with_sources({"V16": "imagenet:squeezenet1_0@74"})
    assert [by_letter.source(row, x) for x in ("P", "I", "V16")] == [
        "places365:resnet50@74",
        "imagenet:resnet50@74",
        "imagenet:squeezenet1_0@74",
    ]
    by_name = table.with_sources({"imagenet": "imagenet:efficientnet_lite0@74"})
    assert by_name.source(row, "I") == by_name.source(row, "V16")
    with pytest.raises(UnknownName, match="unknown source of table9 'Q'; known: P, I, V16"):
        table.with_sources({"Q": "x"})


def test_sources_of_one_name_are_labelled_in_passes_of_their_own() -> None:
    table = read_table("table9")
    configs = [Choices().config(table, r, cache="c") for r in table.rows]
    passes = label_passes(configs)
    assert [set(p.sources) for p in passes] == [
        {"imagenet:vgg16@74", "places365:resnet50@74"},
        {"imagenet:resnet50@74"},
    ]
    assert [(p.samples, p.seeds) for p in passes] == [(50_000, 10)] * 2
    short = [Choices(epochs=4).config(table, r, cache="c") for r in table.rows]
    assert label_passes(short)[0].seeds == 4
    assert label_bytes("imagenet:resnet50@74", 50_000, 10, "f16") == 10**9
    assert label_bytes("own=net.py:build", 50_000, 10, "f16") is None


def test_settings_are_fields_of_a_training() -> None:
    given = ["batch-size=64", "policy=pad-crop-flip:padding=2", "lr=1", "download=true"]
    assert parse_settings(given) == {
        "batch_size": 64,
        "policy": "pad-crop-flip:padding=2",
        "lr": 1.0,
        "download": True,
    }
    for text, message in {
        "alpha": "expected KEY=VALUE",
        "alfa=1": "unknown field in --set 'alfa'",
        "alpha=x": "alpha must be float, found 'x'",
        "seed=3": "seed is set with --runs N",
        "source=imagenet": "source is set with --source LETTER=NAME",
        "device=cpu": "device is set with --device",
    }.items():
        with pytest.raises(InputError, match=message):
            parse_settings([text])


def table_of(*rows: str, more: str = "") -> str:
    return f'target = "shapes"\nsources = {{ T = "tiny" }}\n{more}\nrow = [{", ".join(rows)}]'


GOOD = '{ sources = ["T"], reported = 1 }'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row =", "recipe mini is not TOML"),
        ('target = "shapes"', r"expected row = \[...\]"),
        (table_of(GOOD, more="alfa = 1"), "unknown key in table mini 'alfa'"),
        (table_of('{ sources = ["T"] }'), "row 1: expected a target and reported"),
        (table_of('{ reported = 1, lr = "x" }'), "table mini, row 1: lr must be float"),
        (table_of(GOOD, '{ sources = ["Q"], reported = 1 }'), "in table mini, row 2 'Q'; known: T"),
        (table_of(GOOD, GOOD), "two rows are called r20-t-ce"),
        (table_of(GOOD, more="on.shape.lr = 1"), "unknown target in table mini, on 'shape'"),
        (table_of(GOOD, more="on.shapes.lr = true"), "table mini, on.shapes: lr must be float"),
        (table_of("1"), r"expected row = \[...\], one"),
        (table_of(GOOD, more="on = 3"), "on must be a table, found 3"),
        (table_of(GOOD, more="on.shapes = 3"), "on.shapes must be a table, found 3"),
        (table_of(GOOD, more="on.shapes.sources.T = 1"), "on.shapes.sources must be a table of te"),
        (table_of(GOOD, more='needs = "K"'), "needs must be a table, found 'K'"),
        (table_of('{ reported = 1, sources = "T" }'), "row 1: sources must be a list of letters"),
        (table_of('{ reported = 1, reported-std = "2" }'), "row 1: reported-std must be a number"),
        (table_of("{ reported = 1, name = 5 }"), "row 1: name must be .* found 5"),
        (table_of('{ reported = 1, name = "a/b" }'), "row 1: name must be .* found 'a/b'"),
        ("panel = []", "recipe mini is a sweep: sskt sweep mini"),
    ],
)
def test_bad_tables_are_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_table("mini", text)


def test_a_row_wins_over_its_target_and_that_over_the_table() -> None:
    more = "alpha = 0.5\nlr = 0.5\ngamma = 0.5\non.shapes = { lr = 0.25, gamma = 0.25 }"
    row = parse_table("mini", table_of("{ reported = 1, gamma = 0.125 }", more=more)).rows[0]
    assert [row.fields[k] for k in ("alpha", "lr", "gamma")] == [0.5, 0.25, 0.125]


def test_a_model_of_one_s_own_names_its_rows_without_its_folder() -> None:
    text = table_of('{ reported = 1, model = "/nets/own.py:net" }')
    assert parse_table("mini", text).rows[0].name == "own.py:net-scratch-ce"


def test_maxl_is_trained_as_its_authors_did() -> None:
    table = read_table("table9")
    rows = [r for r in table.rows if r.fields.get("method") == "maxl"]
    assert [r.fields["psi"] for r in rows] == [2, 3, 5, 10] * 2
    for row in rows:
        config = Choices().config(table, row)
        assert (config.optimizer, config.lr, config.alpha) == ("sgd", 0.01, 1.0)
        assert (config.momentum, config.weight_decay, config.batch_size) == (0.0, 0.0, 100)
        assert (config.schedule, config.gamma, config.epochs) == ("multistep", 0.5, 200)
        assert config.resolved_milestones() == [50, 100, 150]
        short = Choices(epochs=20).config(table, row)
        assert short.resolved_milestones() == [5, 10, 15]
        own = Choices(epochs=20, settings={"milestones": [7]}).config(table, row)
        assert own.resolved_milestones() == [7]


def test_settings_of_sources_pass_over_rows_without_them() -> None:
    table = read_table("table1")
    scratch, places, both = (table.rows[i] for i in (0, 1, 9))
    settings = {"source_weight": ["imagenet=0.5"], "live": True, "preprocessing": ["size=64"]}
    choices = Choices(settings=settings)
    found = [choices.config(table, row) for row in (scratch, places, both)]
    assert [c.source_weight for c in found] == [[], [], ["imagenet=0.5"]]
    assert [c.preprocessing for c in found] == [[], ["size=64"], ["size=64"]]
    with pytest.raises(UnknownName, match="source in source_weight = imagnet=1 'imagnet'; known"):
        Choices(settings={"source_weight": ["imagnet=1"]}).config(table, both, cache="c")


def mini() -> PaperTable:
    scratch = "{ reported = 50, reported-std = 0.125 }"
    return parse_table("mini", table_of(scratch, '{ sources = ["T"], tm = true, reported = 51.5 }'))


def test_measured_stands_beside_reported() -> None:
    rows = mini().rows
    lines = result_cells(rows, {"r20-scratch-ce": {0: 50.0, 1: 51.0, 2: 52.5}})
    head = ["1", "-", "shapes", "R20", "scratch", "-", "CE"]
    assert lines[0] == [*head, "50.00 ± 0.12", "51.17 ± 1.26", "+1.17"]
    assert lines[1] == ["2", "T", "shapes", "R20", "SSKT", "o", "CE+CE", "51.50", "-", "-"]
    one = result_cells(rows, {"r20-t-tm-ce+ce": {0: 51.25}})
    assert one[1][-2:] == ["51.25", "-0.25"]


def test_results_are_kept_and_those_of_other_settings_refused(tmp_path: Path) -> None:
    first, second = mini().rows
    Results(tmp_path, mini(), {"epochs": 2}).add(first, 0, 50.5)
    Results(tmp_path, mini(), {"epochs": 2}).add(first, 1, 51.5)
    again = Results(tmp_path, mini(), {"epochs": 2})
    again.add(second, 0, 50.0)
    shown = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(r["name"], r["mean"], r["runs"]) for r in shown] == [
        ("r20-scratch-ce", 51.0, {"0": 50.5, "1": 51.5}),
        ("r20-t-tm-ce+ce", 50.0, {"0": 50.0}),
    ]
    assert shown[0]["std"] == pytest.approx(0.5**0.5) and shown[1]["std"] is None
    assert "| 51.00 ± 0.71 | +1.00 |" in (tmp_path / "results.md").read_text()
    assert "not as in the recipe: epochs = 2" in (tmp_path / "results.md").read_text()
    with pytest.raises(InputError, match=r"with epochs = 2, not the recipe's; choose another"):
        Results(tmp_path, mini(), {})
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json is damaged; delete it"):
        Results(tmp_path, mini(), {"epochs": 2})


def test_weights_that_a_row_starts_from_are_asked_for() -> None:
    table = read_table("table8")
    row = select_rows(table, ["h51-3dr18-ft-ce"])[0]
    with pytest.raises(MissingData, match=r"--weights K=FILE"):
        Choices().config(table, row)
    assert Choices(files={"K": "k.pth"}).config(table, row).init == "k.pth"
