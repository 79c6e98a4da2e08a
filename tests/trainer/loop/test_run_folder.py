"""Damage to the files of a run: a one-line error or the right continuation, never other numbers."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import FAULTS, in_time

from sskt.teacher_cache.errors import BadCheckpoint, BadImage, InputError, SsktError
from sskt.teacher_cache.views.policies import parse_policy
from sskt.trainer.config import TrainConfig, read_config, require_same, run_digest
from sskt.trainer.loop import checkpoint as checkpoints
from sskt.trainer.loop import evaluate
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.runs import run_training
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.models.pretrained import load_initial
from sskt.trainer.results import records
from sskt.trainer.results.groups import load_run

NETWORK = """
from torch import nn

def build(classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, classes),
    )
"""
TIMES = ("seconds", "label_wait_seconds")
FILES = ("config.json", "metrics.jsonl", "last.pt", "best.pt")


class Stopped(Exception):
    pass


def stop_in_third(epoch: int, done: int, total: int) -> None:
    if epoch == 2:
        raise Stopped


def numbers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig]:
    """Folders ``whole``, ``cut`` after two of three epochs, and ``sibling`` of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "net.py").write_text(NETWORK)
    config = TrainConfig(
        target=str(images),
        model=f"{folder / 'net.py'}:build",
        policy="pad-crop-flip",
        epochs=3,
        batch_size=30,
        ema=0.5,
        early_stop=9,
        device="cpu",
        workers=0,
    )
    run_training(dataclasses.replace(config, out=folder / "whole"))
    for name, seed in (("cut", 0), ("sibling", 1)):
        out = dataclasses.replace(config, out=folder / name, seed=seed)
        with pytest.raises(Stopped):
            run_training(out, Hooks(step=stop_in_third))
    return folder, config


def flip(path: Path, seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1 << random.Random(~seed).randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_run_is_refused_in_a_line_or_ends_with_the_right_numbers(
    runs: tuple[Path, TrainConfig], tmp_path: Path, name: str, fault: str
) -> None:
    folder, config = runs
    out = shutil.copytree(folder / "cut", tmp_path / "cut")
    sibling = shutil.copytree(folder / "sibling", tmp_path / "sibling")
    FAULTS[fault](out / name, sibling / name)
    with in_time(60):
        try:
            config_found, found = load_run(out)  # what sskt compare reads
        except SsktError as error:
            assert "\n" not in str(error)
        else:
            assert numbers(found) == numbers(records.read_metrics(folder / "cut"))
            assert config_found["seed"] == 0
        try:
            done = run_training(dataclasses.replace(config, out=out))
        except SsktError as error:
            assert "\n" not in str(error) and str(out) in str(error)
            return
    assert numbers(done) == numbers(records.read_metrics(folder / "whole"))
    assert numbers(records.read_metrics(out)) == numbers(done)
    if name != "best.pt":
        best = [torch.load(f / "best.pt", weights_only=True) for f in (out, folder / "whole")]
        assert best[0]["epoch"] == best[1]["epoch"]
        assert all(torch.equal(v, best[1]["model"][k]) for k, v in best[0]["model"].items())


def test_no_flipped_bit_of_a_checkpoint_is_resumed_from(
    runs: tuple[Path, TrainConfig], tmp_path: Path
) -> None:
    folder, config = runs
    plan = make_plan(config)
    wanted = torch.load(folder / "cut" / "best.pt", weights_only=True)["model"]
    for seed in range(40):
        for name in ("last.pt", "best.pt"):
            path = Path(shutil.copy(folder / "cut" / name, tmp_path / name))
            flip(path, seed)
            with pytest.raises(BadCheckpoint, match=f"cannot use checkpoint {path}: .*; restore"):
                records.load_checkpoint(tmp_path, name)
        target = plan.build_target(3)
        try:  # what does not change a byte of what is read may pass
            load_initial(target, str(tmp_path / "best.pt"), config.model)
        except BadCheckpoint as error:
            assert "\n" not in str(error)
        else:
            own = target.state_dict()
            assert all(torch.equal(v, wanted[f"target.{k}"]) for k, v in own.items())


WRONG: tuple[Any, ...] = (None, [1], "x", 3.5, -1, 999, {}, {"a": 1}, float("nan"))


def test_a_checkpoint_with_an_entry_of_another_type_or_range_is_refused(
    runs: tuple[Path, TrainConfig], tmp_path: Path
) -> None:
    folder, config = runs
    trainer = Trainer(make_plan(dataclasses.replace(config, out=folder / "cut")))
    state = records.load_checkpoint(folder / "cut")
    assert state is not None

    def restored() -> bool:
        try:
            checkpoints.restore(trainer, tmp_path)
        except (BadCheckpoint, InputError) as error:
            assert "\n" not in str(error)
            return False
        return True

    records.save_checkpoint(tmp_path, state)
    assert restored()
    places: list[tuple[str, ...]] = [(key,) for key in state]
    places += [(key, inner) for key in ("schedule", "early", "progress") for inner in state[key]]
    right = {("config", "None"), ("early.best", "None"), ("digests", "{}"), ("processes", "999")}
    right |= {(f"schedule.{part}", "999") for part in ("best", "bad", "reductions")}
    right |= {("schedule.best", "-1"), ("schedule.best", "3.5"), ("progress.counts", "{}")}
    right |= {("early.best", str(v)) for v in (3.5, -1, 999)} | {("early.bad", "999")}
    right |= {(f"progress.{part}", str(v)) for part in ("seconds", "waited") for v in (3.5, 999)}
    right |= {("progress.batch", "999"), ("progress.totals", "{}"), ("trained_on", "None")}
    for place in places:
        for value in WRONG:
            changed = copy.deepcopy(state)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            records.save_checkpoint(tmp_path, changed)
            name = ".".join(place)
            assert restored() <= ((name, str(value)) in right), (name, value)


def test_a_checkpoint_of_another_configuration_is_not_resumed(
    runs: tuple[Path, TrainConfig], tmp_path: Path
) -> None:
    """The configuration beside it and the options agree; the weights are of a run with seed 1."""
    folder, config = runs
    out = shutil.copytree(folder / "cut", tmp_path / "cut")
    shutil.copy(folder / "sibling" / "last.pt", out / "last.pt")
    with pytest.raises(InputError, match=r"last\.pt holds a run with seed = 1, not 0"):
        run_training(dataclasses.replace(config, out=out))


def test_a_run_of_an_older_version_is_resumed(
    runs: tuple[Path, TrainConfig], tmp_path: Path
) -> None:
    """Without digests, checksums, and the configuration in its checkpoint."""
    folder, config = runs
    out = shutil.copytree(folder / "cut", tmp_path / "cut")
    state = torch.load(out / "last.pt", weights_only=True)
    for key in ("config", "digest", records.SEALED):
        del state[key]
    torch.save(state, out / "last.pt")
    torch.save({k: v for k, v in state.items() if k in ("epoch", "model")}, out / "best.pt")
    fields = json.loads((out / "config.json").read_text())
    del fields["digest"]
    (out / "config.json").write_text(json.dumps(fields))
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    (out / "metrics.jsonl").write_text(
        "".join(json.dumps(r | {"check": None}) + "\n" for r in lines)
    )
    assert read_config(out / "config.json")["seed"] == 0
    done = run_training(dataclasses.replace(config, out=out))
    assert numbers(done) == numbers(records.read_metrics(folder / "whole"))


def test_a_run_of_an_older_version_keeps_its_views(tmp_path: Path) -> None:
    """Its configuration names no version of the policy, which had one only."""
    recorded = "random-resized-crop-flip:size=32,scale_min=0.08,scale_max=1.0"
    fields = TrainConfig(policy=recorded).as_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    read = read_config(tmp_path / "config.json")
    policy = parse_policy(read["policy"])
    assert policy.version == 1 and parse_policy(recorded).version == 2
    now = TrainConfig(**read | {"policy": str(policy)})
    require_same(fields, now, tmp_path)
    older = run_digest(fields | {"policy": str(policy).replace("version=1,", "")})
    assert run_digest(now.as_dict()) == older
    with pytest.raises(InputError, match="holds a run with policy"):
        require_same(read, dataclasses.replace(now, policy=recorded), tmp_path)


def test_what_a_killed_training_was_writing_is_removed(
    runs: tuple[Path, TrainConfig], tmp_path: Path
) -> None:
    """When the run goes on; files of the user that end alike stay."""
    folder, config = runs
    out = shutil.copytree(folder / "cut", tmp_path / "cut")
    rest = [out / f"{name}.{'0' * 32}.partial" for name in ("last.pt", "best.pt", "config.json")]
    own = [out / "mine.partial", out / f"notes.txt.{'0' * 32}.partial"]
    for path in rest + own:
        path.touch()
    run_training(dataclasses.replace(config, out=out))
    assert [path for path in rest + own if path.exists()] == own


def test_an_unreadable_test_image_is_found_before_the_first_epoch(
    runs: tuple[Path, TrainConfig], images: Path, tmp_path: Path
) -> None:
    _, config = runs
    folder = shutil.copytree(images, tmp_path / "images")
    path = folder / "test" / "bear" / "0003.png"
    path.write_bytes(bytes(path.stat().st_size))
    steps: list[int] = []
    follow = Hooks(step=lambda epoch, done, total: steps.append(done))
    config = dataclasses.replace(config, target=str(folder), epochs=1, out=tmp_path / "run")
    with pytest.raises(BadImage, match=r"bear/0003\.png"):
        run_training(config, follow)
    assert not steps
    (record,) = run_training(dataclasses.replace(config, on_error="skip"), follow)
    assert len(steps) == 2 and "test_top1" in record


def test_a_test_image_that_becomes_unreadable_does_not_cost_the_epoch(
    runs: tuple[Path, TrainConfig], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation alone is made again, and --on-error may be another one then."""
    _, config = runs
    monkeypatch.setattr(evaluate, "held_in_memory", lambda views, *_: views)
    folder = shutil.copytree(images, tmp_path / "images")
    path = folder / "test" / "bear" / "0003.png"
    steps: list[tuple[int, int]] = []

    def step(epoch: int, done: int, total: int) -> None:
        steps.append((epoch, done))
        path.write_bytes(bytes(path.stat().st_size))

    follow = Hooks(step=step)
    config = dataclasses.replace(config, target=str(folder), epochs=1, out=tmp_path / "run")
    with pytest.raises(BadImage, match=r"bear/0003\.png"):
        run_training(config, follow)
    assert len(steps) == 2
    (record,) = run_training(dataclasses.replace(config, on_error="skip"), follow)
    assert len(steps) == 2 and record["images"] == 60 and "test_top1" in record
