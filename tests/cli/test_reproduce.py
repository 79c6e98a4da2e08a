"""``sskt reproduce``: what it would do, what it does, and that a cut run goes on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.helpers import TINY

from sskt.teacher_cache.label_sets.create import list_label_sets

Call = Callable[..., tuple[int, str, str]]


def test_a_dry_run_needs_no_data(sskt: Call, tmp_path: Path) -> None:
    status, out, err = sskt("reproduce", "table3", "--dry-run", "--fraction", 0.1)
    assert (status, err) == (0, "labels: labels (default)\n")
    assert re.search(r"imagenet:resnet50 +stl10 +500 +10 +9\.5 MiB", out)
    assert "trainings: 78" in out and "r32-p+i-tm-ce+kd" in out
    assert "epochs = 200 is the released STL10 script's: the paper gives none" in out
    arguments = ["--row", "14-15", "--epochs", 10, "--out", tmp_path, "--dry-run", "--json"]
    status, out, err = sskt("reproduce", "table8", *arguments)
    assert status == 0, err
    shown: dict[str, Any] = json.loads(out)
    labelled = [(s["target"], s["split"]) for s in shown["label_sets"]]
    assert labelled == [("ucf101", "train"), ("ucf101", "test")]
    configs = [t["config"] for t in shown["trainings"]]
    assert [c["out"].split("/")[-2:] for c in configs] == [
        ["u101-3dr18-ft-ce", "seed-0"],
        ["u101-3dr18-p-ce+ce", "seed-0"],
    ]
    assert [c["epochs"] for c in configs] == [10, 10]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table3"], "no data of stl10 in data (default)"),
        (["table10"], "cannot read recipe table10: No such file or directory; shipped recipes: "),
        (["table8", "--row", 14], "starts from K: get Kinetics-400 weights"),
        (["table8", "--weights", "K=nothing.pth"], "--weights K=nothing.pth: no such file"),
        (["table3", "--weights", f"K={TINY}"], "table3 has P, I"),
        (["table3", "--source", "P"], "--source P: expected LETTER=..."),
        (["table3", "--source", "P=a", "--source", "P=b"], "--source gives P twice: a and b"),
        (["table3", "--preprocessing", "P"], "--preprocessing P: expected LETTER:..."),
        (["table3", "--preprocessing", "K:size=8"], "K:size=8: table3 has P, I"),
        (["table3", "--root", "stl1=x"], "unknown target in --root 'stl1'; known: "),
        (["table3", "--fraction", 0.5, "--set", "limit=3"], "both say how many samples"),
        (["table3", "--row", 2, "--source", "P=nope:x", "--dry-run"], "unknown source 'nope'"),
        (["table3", "--panel", 2], "--panel 2: table3 has rows, no panels; use --row"),
        (["figure2", "--panel", 13], "unknown panel of figure2 '13'; known: 1 STL10 (R20, P, CE)"),
        (["figure2", "--panel", 2, "--row", 1], "no row chosen by --row 1 lies in panel 2"),
        (
            ["table3", "--focal-schedule", "cosine"],
            "table3 has no rows with a focal loss; use --set",
        ),
        (
            ["table9", "--focal-schedule", "cosine", "--set", "schedule=cosine"],
            "--focal-schedule and --set schedule both choose one",
        ),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    sskt: Call, tmp_path: Path, arguments: list[object], message: str
) -> None:
    status, out, err = sskt("reproduce", *arguments, "--out", tmp_path)
    assert (status, out) == (2, "")
    assert message in err and err.splitlines()[-1].startswith("sskt: ")


@pytest.fixture
def small(images: Path, tmp_path: Path) -> list[object]:
    """A command line: a table of two rows over the made images, two epochs each."""
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        f'target = "{images}"\npolicy = "pad-crop-flip"\nbatch-size = 16\nlr = 0.05\nseeds = 2\n'
        f'sources = {{ A = "tiny={TINY}:build", B = "other={TINY}:build" }}\n'
        "row = [{ reported = 50, reported-std = 1 },\n"
        '{ sources = ["A", "B"], tm = true, reported = 60, reported-std = 2 }]\n'
    )
    arguments = ["--epochs", 2, "--fraction", 0.5, "--runs", 1, "--device", "cpu"]
    return ["reproduce", recipe, *arguments, "--set", "workers=0", "--json"]


def stamps(folder: Path) -> dict[str, int]:
    """When each file of runs and labels was written."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("results"))
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files}


def test_a_table_is_made_and_continued_after_a_cut(
    sskt: Call, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    status, out, err = sskt(*small, "--out", whole, "--cache", whole / "cache")
    assert status == 0, err
    assert [r["runs"].keys() for r in json.loads(out)["rows"]] == [{"0"}, {"0"}]
    config = json.loads((whole / "small/r20-a+b-tm-ce+ce/seed-0/config.json").read_text())
    assert config["limit"] == 30 and config["seeds"] == 2
    labels = sorted(p.name for p in (whole / "cache").glob("images-*"))
    assert len(labels) == 2
    assert [s.partition("#")[2] for s in config["source"]] == [
        next(n for n in labels if f".{name}-" in n).rpartition(".")[2] for name in ("tiny", "other")
    ]

    before = stamps(whole)
    status, again, err = sskt(*small, "--out", whole, "--cache", whole / "cache")
    assert (status, again) == (0, out), err
    assert stamps(whole) == before

    epochs = []

    def stop(lines: object, record: dict[str, Any]) -> None:
        epochs.append(record["epoch"])
        if len(epochs) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sskt.cli.training.training_output.EpochLines.__call__", stop)
        status, _, err = sskt(*small, "--out", cut, "--cache", cut / "cache")
    assert status == 130 and "the same command continues" in err
    assert epochs == [0, 1, 0]
    first = json.loads((cut / "small/results.json").read_text())["rows"]
    assert [len(r["runs"]) for r in first] == [1, 0]
    kept = {k: v for k, v in stamps(cut).items() if "scratch" in k or k.startswith("cache")}
    status, resumed, err = sskt(*small, "--out", cut, "--cache", cut / "cache")
    assert (status, resumed) == (0, out), err
    assert "epoch 2/2" in err and "epoch 1/2" not in err
    assert kept.items() <= stamps(cut).items()

    status, _, err = sskt(*small, "--out", cut, "--cache", cut / "cache", "--seeds", 1)
    assert status == 2 and "holds results with seeds = the recipe's, not 1" in err


def test_preprocessing_reaches_labels_and_live_sources(
    sskt: Call, images: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "small.toml", tmp_path / "out"
    recipe.write_text(
        f'target = "{images}"\npolicy = "pad-crop-flip"\nbatch-size = 60\nepochs = 1\n'
        f'sources = {{ A = "tiny={TINY}:build" }}\n'
        'row = [{ name = "stored", sources = ["A"], reported = 50 },\n'
        '{ name = "live", sources = ["A"], live = true, reported = 60 }]\n'
    )
    command = ["reproduce", recipe, "--device", "cpu", "--set", "workers=0", "--out", out]
    command += ["--cache", out / "cache"]
    assert sskt(*command, "--row", "stored")[0] == 0
    # With the labels of other images there, and with its own.
    status, _, err = sskt(*command, "--preprocessing", "A:size=8")
    assert status == 2 and "results with preprocessing = the recipe's, not {'A': 'size=8'}" in err
    (out / "small/results.json").unlink()
    shutil.rmtree(out / "small/stored")
    for _ in range(2):
        assert sskt(*command, "--preprocessing", "A:size=8")[0] == 0
    configs = {
        name: json.loads((out / f"small/{name}/seed-0/config.json").read_text())
        for name in ("stored", "live")
    }
    assert configs["live"]["preprocessing"] == ["tiny:size=8"]
    sizes = {
        s.digest[:12]: s.spec["source"]["preprocessing"]["size"]
        for s in list_label_sets(out / "cache")
    }
    assert sorted(sizes.values()) == [8, 16]
    assert sizes[configs["stored"]["source"][0].partition("#")[2]] == 8


def test_a_missing_split_is_named_before_anything_is_labelled(
    sskt: Call, small: list[object], tmp_path: Path
) -> None:
    arguments = ["--out", tmp_path / "out", "--set", "test_split=val"]
    arguments += ["--cache", tmp_path / "cache"]
    status, _, err = sskt(*small, *arguments)
    assert status == 2 and "val" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
