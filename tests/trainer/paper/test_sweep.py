"""Sweeps over temperature and alpha: what is planned, trained, kept, recorded and drawn."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.helpers import TINY, tree

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.config import TrainConfig, config_json
from sskt.trainer.paper.sweep import Figure, plan_sweep, read_figure
from sskt.trainer.results.groups import load_run, mean_std, result_of
from sskt.trainer.results.plots import Graph, Line, draw_sweep

Call = Callable[..., tuple[int, str, str]]
OVERFLOWS = "1e39"  # in float32 alpha times any loss is infinite

RECIPE = """
title = "ours"
epochs = 1
source = ["tiny=net.py:build"]
cache = "labels"

[sweep]
temperature = [1, 3]
alpha = [0.1, 0.5]

[[panel]]
name = "first"
target = "stl10"

[[panel]]
target = "a/voc"
model = "resnet18"
tm = true
batch-size = 8
loss = "bce+kd"
"""


@pytest.fixture
def base(images: Path, label_cache: Path) -> list[object]:
    """Options of a training that takes a second."""
    source = f"tiny={TINY}:build"
    given: dict[str, object] = {"target": images, "policy": "pad-crop-flip", "source": source}
    given |= {"epochs": 1, "limit": 60, "batch-size": 60, "workers": 0, "device": "cpu"}
    given["cache"] = label_cache
    return [part for key, value in given.items() for part in (f"--{key}", value)]


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_a_recipe_gives_panels_over_a_base(tmp_path: Path) -> None:
    figure = read_figure(write_recipe(tmp_path, RECIPE))
    planned = plan_sweep(figure, {"epochs": 7, "seed": 4}, tmp_path, runs=2, scratch=True)
    assert [p.title for p in planned.panels] == ["first", "voc (resnet18 + TM, tiny, KD)"]
    assert len(planned.trainings) == 2 * 2 * (2 * 2 + 1)
    assert len({t.config.out for t in planned.trainings}) == len(planned.trainings)
    assert {t.config.epochs for t in planned.trainings} == {7}
    assert {t.config.seed for t in planned.trainings} == {4, 5}
    second = [t for t in planned.trainings if t.panel == 1]
    assert {(t.temperature, t.alpha) for t in second} == {
        (None, None),
        *((t, a) for t in (1.0, 3.0) for a in (0.1, 0.5)),
    }
    for training in second:
        config = training.config
        assert (config.model, config.batch_size) == ("resnet18", 8)
        if training.temperature is None:
            assert (config.source, config.tm) == ([], False)
        else:
            swept = (config.temperature, config.alpha)
            assert swept == (training.temperature, training.alpha)
            assert config.tm
    only = plan_sweep(figure, {}, tmp_path, only=[2])
    assert [p.title for p in only.panels] == ["voc (resnet18 + TM, tiny, KD)"]


def test_a_panel_s_folder_does_not_depend_on_which_are_trained(tmp_path: Path) -> None:
    base = {"target": "shapes", "source": ["tiny"], "cache": "labels"}
    figure = Figure(base, panels=(("a", {"lr": 0.1}), ("b", {"lr": 0.2})))
    both = [p.folder for p in plan_sweep(figure, {}, tmp_path).panels]
    assert [p.folder for p in plan_sweep(figure, {}, tmp_path, only=[2]).panels] == both[1:]


@pytest.mark.parametrize(
    ("old", "new", "error", "said"),
    [
        ("temperature = [1, 3]", "temperature = 3", InputError, "list of numbers"),
        ("temperature = [1, 3]", 'temperature = ["1"]', InputError, "list of numbers"),
        ("alpha = [0.1, 0.5]", "alfa = [0.1]", UnknownName, "alfa"),
        ("epochs = 1", "epoch = 1", UnknownName, "epoch"),
        ("epochs = 1", "alpha = 1", UnknownName, "alpha"),
        ("batch-size = 8", 'batch-size = "8"', InputError, "batch_size must be int"),
        ("epochs = 1", "row = []", InputError, "sskt reproduce"),
        ("epochs = 1", "epochs = ", InputError, "not TOML"),
    ],
)
def test_a_wrong_recipe_is_refused(
    tmp_path: Path, old: str, new: str, error: type[Exception], said: str
) -> None:
    assert old in RECIPE
    with pytest.raises(error, match=said):
        read_figure(write_recipe(tmp_path, RECIPE.replace(old, new)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "shapes"], "needs --source"),
        (["--target", "shapes", "--source", "a", "--cache", "x", "--alphas", "-1"], "at least 0"),
        (["--alphas", "1;2"], "no list of numbers"),
        (["--alpha", "1"], "--alphas"),
        (["--target", "shapes", "--source", "a", "--cache", "x", "--panel", "2"], "panels 1 to 1"),
        (["--target", "x", "--source", "a", "--cache", "x", "--test-split", "none"], "test-split"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_trained(
    sskt: Call, tmp_path: Path, options: list[str], said: str
) -> None:
    status, _, err = sskt("sweep", *options, "--out", tmp_path / "out")
    assert status == 2
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts(sskt: Call, tmp_path: Path, base: list[object]) -> None:
    lists = ["--temperatures", "1,3", "--alphas", "0.1,0.5,1", "--runs", 2, "--with-scratch"]
    command = ["sweep", *base, *lists, "--out", tmp_path / "out", "--dry-run"]
    status, out, _ = sskt(*command)
    assert status == 0
    assert "14 trainings, 0 finished; 14 epochs" in out
    found = json.loads(sskt(*command, "--json")[1])
    assert (found["trainings"], found["finished"], len(found["points"])) == (14, 0, 14)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_trains_every_point_keeps_it_and_draws(
    sskt: Call, tmp_path: Path, base: list[object]
) -> None:
    out = tmp_path / "out"
    lists = ["--temperatures", "1,3", "--alphas", f"0.1,{OVERFLOWS}", "--with-scratch"]
    command = ["sweep", *base, *lists, "--out", out, "--json"]
    status, said, err = sskt(*command)
    assert status == 1
    assert "2 of 5 trainings failed (T 1, alpha 1e+39, seed 0: Diverged" in err
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(said)
    panel = results["panels"][0]
    points = {(p["temperature"], p["alpha"]): p for p in panel["points"]}
    assert set(points) == {(t, a) for t in (1.0, 3.0) for a in (0.1, 1e39)}
    for (_, alpha), point in points.items():
        assert bool(point["failed"]) == (alpha > 1)
        assert (point["mean"] is None) == (alpha > 1)
    config, records = load_run(Path(panel["folder"]) / "T3-alpha0.1" / "seed-0")
    assert (config["temperature"], config["alpha"]) == (3.0, 0.1)
    assert points[3.0, 0.1]["results"] == {"0": result_of(records)}
    assert load_run(Path(panel["folder"]) / "scratch" / "seed-0")[0]["source"] == []
    with Image.open(out / "figure.png") as image:
        assert image.size[0] > 500

    before = tree(Path(panel["folder"]) / "T1-alpha0.1")
    more = ["--temperatures", "1,3", "--alphas", "0.1", "--runs", 2, "--over", "temperature"]
    status, said, err = sskt("sweep", *base, *more, "--out", out)
    assert status == 0
    again = tree(Path(panel["folder"]) / "T1-alpha0.1")
    assert before.items() <= again.items() and len(again) > len(before)  # a second seed
    wider = json.loads((out / "results.json").read_text())["panels"][0]["points"]
    assert [p["results"]["0"] for p in wider] == [
        points[t, 0.1]["results"]["0"] for t in (1.0, 3.0)
    ]
    mean, std = mean_std(list(wider[0]["results"].values()))
    assert (wider[0]["mean"], wider[0]["std"]) == (mean, std)
    assert f"{mean:.2f} ± {std:.2f}" in said

    status, said, _ = sskt("compare", out, "--json")
    assert status == 0
    assert [len(g["runs"]) for g in json.loads(said)["groups"]] == [1, 2, 2]


def test_missing_labels_are_named_before_anything_is_trained(
    sskt: Call, tmp_path: Path, base: list[object]
) -> None:
    empty, out = tmp_path / "an empty cache", tmp_path / "out"
    empty.mkdir()
    other = ["--source", f"other={TINY}:build@8", "--temperatures", "1", "--alphas", "1"]
    command: list[Any] = ["sweep", *base, *other, "--cache", empty, "--out", out]
    status, _, err = sskt(*command)
    assert status == 2
    assert "(auto, tiny+other, CE): " in err and err.count("\n") == 1
    assert not out.exists() and not list(empty.iterdir())
    told = shlex.split(err.partition("commands for all missing labels: ")[2])
    assert told[:2] == ["sskt", "cache-teachers"] and told.count("--source") == 2
    assert sskt(*told[1:], "--workers", 0)[0] == 0
    (record,) = empty.glob("*.other-*/view_check/c/0/0.json")
    record.unlink()
    status, _, err = sskt(*command)
    assert status == 2
    again = shlex.split(err.partition("commands for all missing labels: ")[2])
    assert again == [*told[:2], *told[4:]], "the other source's labels are all there"
    assert sskt(*again[1:], "--workers", 0)[0] == 0
    assert sskt(*command)[0] == 0


def test_a_folder_of_another_run_stops_the_sweep_and_is_named(
    sskt: Call, tmp_path: Path, base: list[object], config: TrainConfig
) -> None:
    options = [*base, "--temperatures", "1", "--out", tmp_path]
    listed = json.loads(sskt("sweep", *options, "--dry-run", "--json")[1])
    folder = Path(listed["points"][0]["out"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(config_json(config))
    status, _, err = sskt("sweep", *options)
    assert status == 2
    assert "T 1, alpha 0.1, seed 0: " in err and "the same command continues" in err
    assert str(folder) in err


def test_the_image_shows_every_line_and_the_level(tmp_path: Path) -> None:
    lines = [Line(f"T = {t}", [0.1, 0.5], [50.0 + t, 52.0 - t], [0.5, 0.2]) for t in (1, 2, 3)]
    graphs = [Graph("stl10 (resnet20, imagenet, CE)", "a", "top-1, %", lines, (49.0, 0.3))] * 3
    empty = Graph("nothing yet", "a", "top-1, %", [], None)
    draw_sweep([graphs[0], empty, *graphs[1:]], tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    corners = [pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :]]
    corners += [pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :]]
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (89, 89, 89)):
        drawn = [int((abs(corner - colour).sum(2) < 12).sum()) for corner in corners]
        assert min(drawn[:1] + drawn[2:]) > 50 + 3 * drawn[1]  # some greys are edges of letters
