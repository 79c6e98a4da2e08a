"""Figure 2: its points are rows, the paper's curves are drawn beside the measured ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.helpers import TINY

from sskt.teacher_cache.errors import InputError
from sskt.trainer.paper.figures import panel_graphs
from sskt.trainer.paper.select import select_rows
from sskt.trainer.paper.tables import PaperTable, parse_table, read_table
from sskt.trainer.results.plots import draw_sweep

Call = Callable[..., tuple[int, str, str]]
PAGE = Path(__file__).parents[3] / "docs/paper-settings.md"

HEAD = """target = "shapes"
seeds = 2
sources = { A = "tiny" }
figure = { temperatures = [1, 3], runs = 2 }
"""
PANELS = """
[[panel]]
name = "first (R20, A, CE)"
sources = ["A"]
curve = [
    { alpha = 1.0, reported = [60, 61.5] },
    { alpha = 0.1, tm = true, reported = [50, 51] },
]

[[panel]]
name = "second (R20, A, KD)"
sources = ["A"]
loss = "ce+kd"
curve = [{ alpha = 1.0, reported = [40, 41] }]
"""


def small() -> PaperTable:
    return parse_table("small", HEAD + PANELS)


def test_points_of_a_figure_are_rows() -> None:
    figure = small()
    points = [(r.panel[:6], r.fields["alpha"], r.fields["temperature"]) for r in figure.rows]
    assert points == [
        ("first ", 1.0, 1.0),
        ("first ", 1.0, 3.0),
        ("first ", 0.1, 1.0),
        ("first ", 0.1, 3.0),
        ("second", 1.0, 1.0),
        ("second", 1.0, 3.0),
    ]
    assert [r.reported for r in figure.rows] == [60, 61.5, 50, 51, 40, 41]
    assert [r.name for r in figure.rows][2:5] == [
        "r20-a-tm-ce+ce-a0.1-t1",
        "r20-a-tm-ce+ce-a0.1-t3",
        "r20-a-ce+kd-a1-t1",
    ]
    assert [figure.runs_of(r) for r in figure.rows] == [2] * 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("runs = 2", "run = 2", "small: figure must be a table of temperatures and runs"),
        ("runs = 2", "runs = 0", "figure.runs must be an integer above 0"),
        ("[1, 3]", "[]", "figure.temperatures must be a list of numbers"),
        ("[1, 3]", "[1, '3']", "figure.temperatures must be a list of numbers"),
        (PANELS, "", r"expected \[\[panel\]\], one for each graph"),
        ("second (R20, A, KD)", "first (R20, A, CE)", "each panel needs a name of its own"),
        ("curve = [{", "curves = [{", r"panel second .*: expected curve = \[...\], one"),
        ("[40, 41]", "[40]", "a curve needs alpha and reported = .* each of the 2 temperatures"),
        ("{ alpha = 1.0, reported = [40", "{ reported = [40", "a curve needs alpha and reported"),
        ('loss = "ce+kd"', "lr = true", "lr must be float"),
        ("seeds = 2", "notes = 2", "notes must be a list of texts, found 2"),
    ],
)
def test_a_bad_figure_is_named(old: str, new: str, message: str) -> None:
    text = HEAD + PANELS
    assert old in text
    with pytest.raises(InputError, match=message):
        parse_table("small", text.replace(old, new))


def test_panels_are_chosen_by_number_and_name() -> None:
    figure = read_table("figure2")

    def panels(*selectors: str, rows: tuple[str, ...] = ()) -> list[str]:
        return list(dict.fromkeys(r.panel for r in select_rows(figure, rows, selectors)))

    assert len(panels()) == 12 and len(select_rows(figure, [])) == 216
    assert panels("2") == ["STL10 (R20, I, CE)"]
    assert panels("11-12") == ["PASCAL VOC (R18, I, KD)", "PASCAL VOC (R18, P+I, KD)"]
    assert panels("pascal*p, ?d)", "PASCAL VOC (R18, P, CE)") == [
        "PASCAL VOC (R18, P, CE)",
        "PASCAL VOC (R18, P, KD)",
    ]
    assert [r.name for r in select_rows(figure, ["*-t1"], ["3"])] == [
        f"s10-r20-p+i-{tm}ce+ce-a{a}-t1" for tm in ("", "tm-") for a in ("1", "0.5", "0.1")
    ]


def test_the_papers_curves_stand_beside_the_measured_ones() -> None:
    rows = small().rows
    measured = {rows[0].name: {0: 62.0, 1: 64.0}, rows[2].name: {0: 52.0}}
    graphs = panel_graphs(rows, measured)
    assert [g.title.split("\n")[1] for g in graphs] == ["paper", "measured"] * 2
    paper, ours, _, none = graphs
    assert [(x.x, x.mean, x.colour, x.dashed) for x in paper.lines] == [
        ([1.0, 3.0], [60, 61.5], 0, False),
        ([1.0, 3.0], [50, 51], 1, True),
    ]
    assert [(x.x, x.mean, x.std) for x in ours.lines] == [
        ([1.0], [63.0], [2**0.5]),
        ([1.0], [52.0], [0.0]),
    ]
    assert [x.label for x in ours.lines] == [x.label for x in paper.lines]
    assert none.lines == []
    assert paper.limits is not None and paper.limits == ours.limits
    assert paper.limits[0] < 50 and paper.limits[1] > 63 + 2**0.5
    far = panel_graphs(rows, {rows[0].name: {0: 12.0}, rows[1].name: {0: 13.0}})
    assert far[0].limits != far[1].limits, "a common axis would flatten both"


def test_every_curve_of_the_paper_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    figure = read_table("figure2")
    rows = select_rows(figure, [], ["1", "10"])
    draw_sweep(panel_graphs(rows, {}), file, columns=4)
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    pixels = pixels[: int(0.85 * len(pixels))]  # the legend is below
    quarters = np.array_split(pixels, 4, axis=1)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        drawn = [int((abs(part - colour).sum(2) < 12).sum()) for part in quarters]
        assert min(drawn[0], drawn[2]) > 300 and drawn[1] == drawn[3] == 0


@pytest.mark.slow
def test_a_figure_is_trained_drawn_and_kept(sskt: Call, images: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "small.toml", tmp_path / "out"
    head = HEAD.replace('"shapes"', f'"{images}"').replace('"tiny"', f'"tiny={TINY}:build"')
    text = head.replace("seeds = 2", 'seeds = 2\npolicy = "pad-crop-flip"\nbatch-size = 60')
    recipe.write_text(text + PANELS)
    options = ["--epochs", 1, "--device", "cpu", "--set", "workers=0", "--out", out]
    command = ["reproduce", recipe, *options, "--cache", tmp_path / "cache"]
    status, _, err = sskt(*command, "--panel", 1)
    assert status == 0, err
    results: dict[str, Any] = json.loads((out / "small/results.json").read_text())
    assert [sorted(r["runs"]) for r in results["rows"]] == [["0", "1"]] * 4 + [[]] * 2
    shown = [(r["panel"], r["alpha"], r["T"], r["reported"]) for r in results["rows"]]
    assert shown[3] == ("first (R20, A, CE)", "0.1", "3", 51.0)
    for row in results["rows"][:4]:
        for seed in ("0", "1"):
            folder = out / "small" / row["name"] / f"seed-{seed}"
            config = json.loads((folder / "config.json").read_text())
            swept = config["alpha"], config["temperature"], config["tm"], config["seed"]
            assert swept == (float(row["alpha"]), float(row["T"]), row["TM"] == "o", int(seed))
    with Image.open(out / "small/figure.png") as image:
        one = image.size
    stamp = (out / "small/r20-a-ce+ce-a1-t1/seed-0/last.pt").stat().st_mtime_ns
    status, said, err = sskt(*command)
    assert status == 0, err
    assert (out / "small/r20-a-ce+ce-a1-t1/seed-0/last.pt").stat().st_mtime_ns == stamp
    assert "figure.png" in said and "alpha" in said
    with Image.open(out / "small/figure.png") as image:
        assert image.size[0] > one[0], "the second panel stands beside the first"


def test_the_evidence_for_temperature_and_alpha_is_as_the_page_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, said = re.findall(r"```(?:python)?\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[:2]
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == said
    assert "T = 1, alpha = 1.0: 23 of 24 within 0.02, rms 0.10" in said


def test_what_the_page_says_of_temperature_and_alpha_is_in_the_figure() -> None:
    points = {
        (r.fields["target"], r.cells()[4], r.loss[-2:], r.sources, r.fields["alpha"],
         r.fields["temperature"]): r.reported
        for r in read_table("figure2").rows
    }  # fmt: skip
    sources = (("P",), ("I",), ("P", "I"))
    page = PAGE.read_text("utf-8")
    for target, name in (("stl10", "STL10, ResNet-20"), ("voc2012", "PASCAL VOC, ResNet-18")):
        for tm, words in (("x", "without"), ("o", "with")):
            gains, hotter = {}, {}
            for loss in ("CE", "KD"):
                at = {(s, a, t): points[target, tm, loss, s, a, t]
                      for s in sources for a in (1.0, 0.1) for t in (1, 2, 3)}  # fmt: skip
                gains[loss] = [at[s, 1.0, t] - at[s, 0.1, t] for s in sources for t in (1, 2, 3)]
                hotter[loss] = [at[s, 1.0, 3] - at[s, 1.0, 1] for s in sources]
            line = (
                f"| {name} | {words} | {min(gains['CE']):.2f} to {max(gains['CE']):.2f} better | "
                f"{min(hotter['CE']):+.2f} to {max(hotter['CE']):+.2f} |"
            )
            assert line in page
            assert max(map(abs, gains["KD"] + hotter["KD"])) < 1
