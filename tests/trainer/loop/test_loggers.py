"""Loggers of a run: what they get, what their failures cost, and that no run chooses one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.trainer.loop import loggers
from sskt.trainer.loop.loggers import find_logger, numbers, open_logger

Call = Callable[..., tuple[int, str, str]]

OWN = """
import json
from pathlib import Path

class Lines:
    def __init__(self, config, out):
        self.file = open(Path(out).with_suffix(".log"), "a")
        print(config["target"], config["epochs"], file=self.file)

    def __call__(self, record):
        print(record["epoch"], record["test_top1"], file=self.file)

    def close(self):
        print("closed", file=self.file)
        self.file.close()

def failing(config, out):
    def log(record):
        raise ConnectionError("the tracking server is gone")
    return log

def none(config, out):
    pass
"""
TRAINING = ("train", "--target", "shapes", "--limit", 40, "--batch-size", 20)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_logger_of_ones_own_gets_every_epoch_and_is_never_stored(
    sskt: Call, own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ask = [*TRAINING, "--epochs", 2, "--schedule", "constant", "--out", out]
    status, _, err = sskt(*ask, "--logger", f"{own}:Lines")
    assert status == 0, err
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [f"{r['epoch']} {r['test_top1']}" for r in records]
    logged = (tmp_path / "run.log").read_text().splitlines()
    assert logged == ["shapes 2", *epochs, "closed"]
    assert "logger" not in json.loads((out / "config.json").read_text())
    # A resumed run has a logger only if it is named again, and is then logged from the beginning.
    assert sskt("train", "--resume", "--out", out)[0] == 0
    assert (tmp_path / "run.log").read_text().splitlines() == logged
    assert sskt("train", "--resume", "--out", out, "--logger", f"{own}:Lines")[0] == 0
    assert (tmp_path / "run.log").read_text().splitlines() == logged * 2


def test_a_failing_logger_costs_no_training(sskt: Call, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, said, err = sskt(*TRAINING, "--epochs", 2, "--out", out, "--logger", f"{own}:failing")
    assert status == 0 and "after 2 epochs" in said
    assert err.count("the tracking server is gone); the training goes on without it") == 1


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("wanbd", UnknownName, "did you mean 'wandb'"),
        ("nothing.py:f", MissingData, "no file nothing.py"),
        ("no_such_module:f", MissingData, "no module no_such_module"),
        ("json:nothing", InputError, "json has no function 'nothing'"),
        ("OWN:nothing", InputError, "has no function 'nothing'"),
    ],
)
def test_what_is_no_logger_is_refused_before_the_training(
    text: str, error: type[Exception], words: str, own: Path
) -> None:
    with pytest.raises(error, match=words):
        find_logger(text.replace("OWN", str(own)))


def test_a_logger_must_be_a_function(own: Path) -> None:
    opener = find_logger(f"{own}:none")
    with pytest.raises(InputError, match="returned NoneType, expected a function"):
        open_logger(opener, "none", {}, own.parent, print)
    with pytest.raises(InputError, match=r"cannot be opened: ZeroDivisionError"):
        open_logger(lambda config, out: 1 / 0, "own", {}, own.parent, print)  # type: ignore[arg-type, return-value]


def test_only_finite_numbers_are_logged() -> None:
    record = {"epoch": 3, "loss": 0.5, "images": 7, "check": "ab", "test_top1": float("nan")}
    assert numbers(record) == {"loss": 0.5, "images": 7.0}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_are_called_by_their_common_functions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    package = SimpleNamespace(
        __name__=name,
        init=lambda **given: calls.append(("init", given)),
        log=lambda values, step: calls.append(("log", values, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    log = open_logger(find_logger(name), name, {"lr": 0.1}, tmp_path / "run", print)
    log({"epoch": 0, "loss": 1.5})
    log.close()
    init = {"project": "mine", "name": "run", "config": {"lr": 0.1}}
    assert calls == [("init", init), ("log", {"loss": 1.5}, 1), ("finish",)]


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    log = open_logger(find_logger("wandb"), "wandb", {"lr": 0.1}, tmp_path / "run", pytest.fail)
    log({"epoch": 0, "loss": 1.5})
    log.close()
    (stored,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert stored.stat().st_size > 0


@pytest.mark.slow
def test_mlflow_keeps_parameters_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    log = open_logger(
        find_logger("mlflow"), "mlflow", {"lr": 0.1, "taps": ["a"]}, tmp_path / "run", pytest.fail
    )
    log({"epoch": 0, "loss": 1.5})
    log({"epoch": 1, "loss": 0.5})
    log.close()
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "taps": "['a']"}
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 0.5)]


def test_every_known_logger_has_an_extra() -> None:
    from sskt.teacher_cache.extras import EXTRAS

    assert set(loggers.KNOWN) <= set(EXTRAS)
