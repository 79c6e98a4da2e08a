"""Losses, optimizers, schedules, callbacks and targets of the user, named as FILE.py:function."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import TINY
from support.transcripts import ROOT

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.trainer.config import TrainConfig, code_of, make_config, read_config, require_named_code
from sskt.trainer.loop.runs import run_training
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trained import open_run
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.losses import auxiliary_loss, primary_loss, soft_cross_entropy

Call = Callable[..., tuple[int, str, str]]

OWN = """
import sys
import torch
import torch.nn.functional as F
import sskt

def ce(logits, truth, gamma, reduction="mean"):
    return F.cross_entropy(logits.float(), truth, reduction=reduction)

def soft(z_t, p_s, temperature, gamma):
    return sskt.soft_cross_entropy(z_t, p_s, temperature)

def each(z_t, p_s, temperature, gamma):
    return z_t.mean(1)

def sgd(parameters, lr, weight_decay):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)

def halves(done, epochs):
    return 0.5 ** int(done)

def negative(done, epochs):
    return -1

def fails(*arguments, **named):
    raise ZeroDivisionError("of one's own")

def nothing(*arguments, **named):
    return None

class Watch:
    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []
    def on_step(self, epoch, step, steps):
        self.steps.append((epoch, step, steps))
    def on_epoch(self, record):
        return record["epoch"] == 1
    def on_end(self, records):
        print("watched", len(records), self.steps, self.trainer.schedule.lr, file=sys.stderr)

class FailsLater:
    def __init__(self, trainer):
        pass
    def on_epoch(self, record):
        raise KeyError("gone")

def images(split):
    import numpy as np
    draw = np.random.default_rng({"train": 0, "test": 1}[split])
    labels = np.arange(40) % 2
    pixels = draw.integers(0, 128, (40, 8, 8, 3)) + 100 * labels[:, None, None, None]
    data = [(p.astype(np.uint8), int(t)) for p, t in zip(pixels, labels)]
    return sskt.open_target(data, name="halves", split=split, classes=["dark", "bright"])

def one_split():
    return images("train")
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("seconds", "label_wait_seconds")
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def test_functions_of_the_user_do_what_the_known_ones_do(
    config: TrainConfig, own: Path, tmp_path: Path
) -> None:
    """The same functions by both ways: the same numbers, also where the run is cut and resumed."""
    known = replace(config, epochs=3, gamma=0.5, milestones=[1, 2], loss="ce+ce")
    mine = replace(
        known,
        loss=f"{own}:ce+{own}:soft",
        optimizer=f"{own}:sgd",
        schedule=f"{own}:halves",
        out=tmp_path / "mine",
    )
    wanted = numbers(run_training(replace(known, out=tmp_path / "known")))
    trainer = Trainer(make_plan(mine))

    class Cut(Exception):
        pass

    def cut(record: dict[str, Any]) -> None:
        raise Cut

    trainer.hooks = replace(trainer.hooks, epoch=cut)
    with pytest.raises(Cut):
        trainer.run(tmp_path / "mine")
    assert numbers(run_training(mine)) == wanted
    one, other = (torch.load(tmp_path / d / "last.pt")["model"] for d in ("known", "mine"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("optimizer", ["torch.optim:RMSprop", "torch.optim:Adagrad"])
def test_an_optimizer_of_torch_resumes(config: TrainConfig, tmp_path: Path, optimizer: str) -> None:
    config = replace(config, optimizer=optimizer, lr=0.01, schedule="constant")
    whole = numbers(run_training(replace(config, epochs=3, out=tmp_path / "whole")))
    run_training(replace(config, epochs=1, out=tmp_path / "run"))
    assert numbers(run_training(replace(config, epochs=3, out=tmp_path / "run"))) == whole


def test_a_changed_file_is_not_resumed_with(config: TrainConfig, own: Path, tmp_path: Path) -> None:
    config = replace(config, schedule="constant", loss=f"ce+{own}:soft", out=tmp_path / "run")
    run_training(replace(config, epochs=1))
    own.write_text(OWN + "\n# changed\n")
    with pytest.raises(InputError, match=r"was trained with code .* resume it with the same files"):
        run_training(replace(config, epochs=2))
    own.write_text(OWN)
    assert len(run_training(replace(config, epochs=2))) == 2


def test_a_callback_sees_every_step_and_may_stop(
    config: TrainConfig, own: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        config, epochs=4, callback=[f"{own}:Watch", f"{own}:nothing"], out=tmp_path / "r"
    )
    records = run_training(config)
    assert len(records) == 2 and records[-1]["stopped_early"] is True
    steps = [(epoch, step, 4) for epoch in (0, 1) for step in (1, 2, 3, 4)]
    printed = capfd.readouterr().err
    assert f"watched 2 {steps}" in printed, printed
    assert run_training(config) == records


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"callback": ["OWN:FailsLater"]},
            r"--callback .*own\.py:FailsLater: on_epoch failed: Key",
        ),
        ({"callback": ["OWN:fails"]}, r"--callback: .*own\.py:fails failed: ZeroDivisionError"),
        ({"loss": "ce+OWN:fails"}, r"auxiliary loss .*:fails failed: ZeroDivisionError: of one's"),
        ({"loss": "ce+OWN:each"}, r"auxiliary loss .*each returned \[16\]; a loss is a tensor of"),
        ({"loss": "OWN:nothing+ce"}, r"primary loss .*nothing returned NoneType; a loss is"),
        ({"optimizer": "OWN:nothing"}, r"--optimizer .*nothing returned NoneType; return a torch"),
        ({"optimizer": "OWN:absent"}, r"--optimizer: .*own\.py has no function 'absent'"),
        ({"schedule": "OWN:negative"}, r"--schedule .*negative returned -1 at epoch 0; return"),
        ({"schedule": "nowhere.py:f"}, r"--schedule: no file nowhere\.py"),
        ({"optimizer": "no.such.module:f"}, r"--optimizer: no module no\.such\.module; install"),
    ],
)
def test_what_cannot_be_used_is_named(
    config: TrainConfig, own: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    text = json.loads(json.dumps(fields).replace("OWN", str(own)))
    with pytest.raises((InputError, MissingData), match=message):
        run_training(replace(config, epochs=1, out=tmp_path / "run", **text))


def test_unknown_names_are_suggested() -> None:
    with pytest.raises(UnknownName, match=r"unknown optimizer 'sdg'; known: sgd, adamw, FILE.py:f"):
        TrainConfig(target="shapes", optimizer="sdg")
    with pytest.raises(UnknownName, match="unknown auxiliary loss 'kdd'"):
        make_plan(TrainConfig(target="shapes", limit=20, loss="ce+kdd"))
    assert auxiliary_loss("ce") is soft_cross_entropy
    assert primary_loss("ce")(torch.zeros(2, 3), torch.tensor([0, 1]), 0.0).ndim == 0


def test_a_run_chooses_none_of_them(
    sskt: Call, config: TrainConfig, own: Path, tmp_path: Path
) -> None:
    """Each field that names code has to be named again, and none of it runs when a run is read."""
    fields: dict[str, Any] = {
        "loss": f"ce+{own}:soft",
        "optimizer": f"{own}:sgd",
        "schedule": f"{own}:halves",
        "callback": [f"{own}:nothing"],
    }
    out = tmp_path / "run"
    run_training(replace(config, epochs=1, out=out, **fields))
    own.write_text("raise SystemExit('this file was run')\n")
    stored = read_config(out / "config.json")
    assert set(code_of(stored)) == set(fields)
    for name in fields:
        with pytest.raises(InputError, match=f"the {name} of .* is code, .* --{name} "):
            require_named_code(stored, set(fields) - {name}, out)
    require_named_code(stored, set(fields), out)
    for arguments in (["train", "--resume", "--out", out], ["train", "--recipe", out]):
        status, _, err = sskt(*arguments)
        assert status == 2 and "is code" in err and "this file was run" not in err
    network = open_run(out, device="cpu")
    assert network.evaluate()["samples"] > 0
    target = make_config({"target": "f.py:images", "out": str(out)})
    with pytest.raises(
        InputError, match=r"the target of x is code, f\.py:images; .*--target f\.py"
    ):
        require_named_code(target.as_dict(), (), "x")


def test_a_target_of_the_user(sskt: Call, own: Path, tmp_path: Path) -> None:
    """Labelled, verified, trained and judged; the label set does not choose the file."""
    cache, out = tmp_path / "labels", tmp_path / "run"
    target = ("--target", f"{own}:images")
    made = sskt("cache-teachers", "--source", f"tiny={TINY}:build", *target, "--policy",
                "pad-crop-flip", "--seeds", 1, "--limit", 30, "--cache", cache)  # fmt: skip
    assert made[0] == 0, made[2]
    assert "halves train: 30 samples of 2 classes" in made[1] + made[2]
    again = ("verify", "--cache", cache, "--recompute", 8, "--source", f"tiny={TINY}:build")
    status, _, err = sskt(*again)
    assert status == 2 and "give --target, for an own dataset as FILE.py:function" in err
    assert sskt(*again, *target)[0] == 0
    training = ("--cache", cache, "--epochs", 1, "--batch-size", 10, "--out", out)
    status, printed, err = sskt("train", *target, "--tm", *training)
    assert status == 0 and "test top-1" in printed, err
    status, _, err = sskt("evaluate", out)
    assert status == 2 and "the target of this run is code" in err
    assert sskt("evaluate", out, *target)[0] == 0
    status, _, err = sskt(
        "train", "--target", f"{own}:one_split", "--epochs", 1, "--out", tmp_path / "b"
    )
    assert status == 2 and "takes no argument, so it opens one split only" in err
    status, _, err = sskt(
        "train", "--target", f"{own}:nothing", "--epochs", 1, "--out", tmp_path / "b"
    )
    assert status == 2 and "returned NoneType; return what sskt.open_target returns" in err
    status, _, err = sskt("train", "--target", "gone.py:f", "--epochs", 1)
    assert status == 2 and "no file gone.py, which --target names" in err


def test_a_label_set_does_not_choose_the_code_of_its_target(
    sskt: Call, own: Path, tmp_path: Path, label_cache: Path
) -> None:
    """Metadata that names FILE.py:function as the target: the file is not run."""
    cache = shutil.copytree(label_cache, tmp_path / "labels")
    group = next(cache.glob("[!.]*")) / "zarr.json"
    document = json.loads(group.read_text())
    document["attributes"]["sskt"]["made"]["target"] = f"{own}:fails"
    group.write_text(json.dumps(document))
    own.write_text("raise SystemExit('this file was run')\n")
    status, out, err = sskt("inspect", "--cache", cache, "--sample", 0, "--seed", 0)
    assert status == 2 and "this file was run" not in out + err
    assert "does not record how its target" in err, err


def test_the_example_of_the_guide_trains(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = (ROOT / "docs/guides/training.md").read_text("utf-8")
    code = text.partition("## Functions of your own")[2].partition("```python\n")[2]
    (tmp_path / "own.py").write_text(code.partition("```")[0])
    monkeypatch.chdir(tmp_path)
    fields: dict[str, Any] = {
        "loss": "own.py:smoothed+own.py:squared_error",
        "optimizer": "own.py:adam",
        "schedule": "own.py:one_cycle",
        "callback": ["own.py:Patience"],
    }
    records = run_training(replace(config, epochs=2, lr=0.01, out=Path("run"), **fields))
    assert len(records) == 2 and capsys.readouterr().out.startswith("2 epochs, learning rate ")
