"""Training a finished run for longer: in place where the longer run would have begun alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sskt.teacher_cache.errors import BadCheckpoint, InputError
from sskt.trainer.config import TrainConfig, read_config, run_digest
from sskt.trainer.loop.runs import run_training

TIMES = ("seconds", "label_wait_seconds")


def numbers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize(
    "schedule",
    [
        {"schedule": "constant"},
        {"schedule": "plateau", "patience": 1},
        {"milestones": [1, 3], "warmup": 1.0},
    ],
    ids=lambda fields: fields.get("schedule", "multistep"),
)
def test_an_extended_run_is_the_longer_run(
    config: TrainConfig, tmp_path: Path, schedule: dict[str, Any], source: bool
) -> None:
    """With more epochs than view seeds, and from scratch with a view seed of each epoch."""
    config = dataclasses.replace(config, **schedule, source=config.source if source else [])
    config = dataclasses.replace(config, tm=source)
    whole = run_training(dataclasses.replace(config, epochs=5, out=tmp_path / "whole"))
    short = dataclasses.replace(config, epochs=2, out=tmp_path / "run")
    assert len(run_training(short)) == 2
    longer = dataclasses.replace(short, epochs=5)
    assert numbers(run_training(longer)) == numbers(whole)
    one, other = (torch.load(tmp_path / d / "last.pt") for d in ("whole", "run"))
    assert one["digest"] == other["digest"]
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    configs = [read_config(tmp_path / d / "config.json") for d in ("whole", "run")]
    assert {k for k in configs[0] if configs[0][k] != configs[1][k]} == {"out"}
    assert run_training(longer) == run_training(longer)


@pytest.mark.parametrize("schedule", [{"schedule": "cosine"}, {"schedule": "multistep"}])
def test_a_run_whose_rates_followed_the_epochs_is_not_extended(
    config: TrainConfig, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    config = dataclasses.replace(config, **schedule, epochs=1, out=tmp_path / "run")
    run_training(config)
    with pytest.raises(InputError, match=r"--epochs 1\), whose learning rate followed .* --init"):
        run_training(dataclasses.replace(config, epochs=3))


def test_a_run_is_not_shortened(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, schedule="constant", epochs=2, out=tmp_path / "run")
    run_training(config)
    with pytest.raises(InputError, match="a run with epochs = 2, not 1"):
        run_training(dataclasses.replace(config, epochs=1))


def test_the_checkpoint_of_a_run_of_other_length_is_no_checkpoint_of_this_one(
    config: TrainConfig, tmp_path: Path
) -> None:
    """Where the number of epochs decides the numbers, a checkpoint of another number is refused."""
    for epochs in (2, 3):
        here = dataclasses.replace(
            config, schedule="cosine", epochs=epochs, out=tmp_path / str(epochs)
        )
        run_training(here)
    (tmp_path / "3/metrics.jsonl").unlink()
    (tmp_path / "2/last.pt").replace(tmp_path / "3/last.pt")
    with pytest.raises((InputError, BadCheckpoint)):
        run_training(here)


def test_the_digest_has_the_epochs_where_they_matter(config: TrainConfig) -> None:
    def digest(**fields: Any) -> str:
        return run_digest(dataclasses.replace(config, **fields).as_dict())

    constant = {"schedule": "constant"}
    assert digest(epochs=2, **constant) == digest(epochs=3, **constant)
    assert digest(epochs=2) != digest(epochs=3)
    assert digest(epochs=2, method="maxl", **constant) != digest(
        epochs=3, method="maxl", **constant
    )
    assert digest(seeds=2, **constant) != digest(seeds=3, **constant)
    assert digest(seeds=2, epochs=2, source=[], **constant) == digest(
        seeds=3, epochs=3, source=[], **constant
    )
