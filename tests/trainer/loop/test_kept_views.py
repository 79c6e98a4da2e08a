"""Training with ``--view-cache``: the same numbers, and no file is decoded twice."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.helpers import TINY, write_frames

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.targets.base import Target
from sskt.trainer.config import TrainConfig
from sskt.trainer.data import soft_label_loader
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.loop import evaluate
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.results import records

TIMES = ("seconds", "label_wait_seconds")


@pytest.fixture(autouse=True)
def nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (soft_label_loader, evaluate):
        monkeypatch.setattr(module, "held_in_memory", lambda views, *_: views)


@pytest.fixture
def decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a byte for each sample that any process decoded."""
    log = tmp_path / "decoded"
    log.touch()
    for name in ("read", "read_frames"):
        original = getattr(Target, name)

        def read(self: Target, *given: Any, original: Any = original) -> Any:
            handle = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.write(handle, b".")
            os.close(handle)
            return original(self, *given)

        monkeypatch.setattr(Target, name, read)
    return log


def numbers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_and_metrics_are_the_same_and_nothing_is_decoded_twice(
    config: TrainConfig, tmp_path: Path, decoded: Path, workers: int
) -> None:
    config = replace(config, workers=workers)
    expected = numbers(Trainer(make_plan(config)).run(tmp_path / "without"))
    without = decoded.stat().st_size
    kept = replace(config, view_cache=tmp_path / "views")
    trainer = Trainer(make_plan(kept))
    before = decoded.stat().st_size
    assert numbers(trainer.run(tmp_path / "with")) == expected
    with_cache = decoded.stat().st_size - before
    samples, tested = len(trainer.views.target), 24
    # Epochs of the training split, and of the test split before the first epoch and after each.
    assert without >= config.epochs * samples + (config.epochs + 1) * tested
    for_checkpoints = config.epochs  # each has the size of an image of the target
    assert with_cache == samples + tested + for_checkpoints
    again = Trainer(make_plan(kept))
    before = decoded.stat().st_size
    assert numbers(again.run(tmp_path / "again")) == expected
    assert decoded.stat().st_size - before == for_checkpoints


def test_a_loader_with_kept_views(
    images: Path, label_cache: Path, tmp_path: Path, decoded: Path
) -> None:
    target = open_target(str(images))
    given: dict[str, Any] = {"batch_size": 16, "device": "cpu", "workers": 0, "epochs": 3}
    plain = SoftLabelLoader(target, cache=label_cache, **given)
    keeping = SoftLabelLoader(target, cache=label_cache, view_cache=str(tmp_path / "v"), **given)
    for epoch in range(3):
        before = decoded.stat().st_size
        found = [(batch.samples, batch.views.numpy(), batch.checked) for batch in keeping]
        assert decoded.stat().st_size - before == (0 if epoch else len(target))
        for (samples, views, checked), batch in zip(found, plain, strict=True):
            np.testing.assert_array_equal(samples, batch.samples)
            np.testing.assert_array_equal(views, batch.views.numpy())
            assert checked == batch.checked == len(samples)


@pytest.mark.slow
def test_clips_are_decoded_in_the_first_epoch_only(
    tmp_path: Path, sskt: Any, decoded: Path
) -> None:
    rng = np.random.default_rng(0)
    for split, each in (("train", 3), ("test", 2)):
        for name in ("jump", "run"):
            for i in range(each):
                folder = tmp_path / "clips" / split / name / f"v{i}"
                write_frames(folder, rng.integers(0, 256, (10 + 4 * i, 24, 30, 3), np.uint8))
    shared = ["--target", tmp_path / "clips", "--cache", tmp_path / "cache"]
    shared += ["--policy", "clip-corner-crop-flip:frames=8,size=16"]
    status, _, err = sskt("cache-teachers", "--source", f"tiny={TINY}:build", "--seeds", 2, *shared)
    assert status == 0, err
    shared += ["--source", "tiny", "--tm", "--model", "resnet3d10", "--batch-size", 3]
    shared += ["--epochs", 3, "--workers", 1]
    found = {}
    for name, more in (("plain", []), ("kept", ["--view-cache", tmp_path / "views"])):
        before = decoded.stat().st_size
        status, _, err = sskt("train", *shared, *more, "--out", tmp_path / name)
        assert status == 0, err
        found[name] = numbers(records.read_metrics(tmp_path / name))
    windows = 2 * (-(-10 // 8) + -(-14 // 8))
    assert decoded.stat().st_size - before == 6 + windows
    assert found["kept"] == found["plain"]
