"""What differs on a GPU, compared with the CPU.

``pytest -m gpu`` runs these on a GPU, ``pytest -m gpu --device cpu`` without one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import TINY, batch_of
from support.small_targets import in_memory

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.gpu_loader import ResidentFeed, resident_feed
from sskt.trainer.data.loader import Feed
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer

pytestmark = pytest.mark.gpu

IN_RAM, FROM_FILES = 8.0, 3e5 / 2**30
"""GiB with which the images of the fixture are decoded once, and with which they are not."""


@pytest.mark.parametrize("policy", ["none", "pad-crop-flip", "pad-crop-flip:padding=1"])
def test_views_made_on_the_device_have_the_same_bytes(policy: str, device: torch.device) -> None:
    views = Views(in_memory(50, 18, 25), parse_policy(policy))
    feed = resident_feed(views, device)
    assert feed is not None
    rng = np.random.default_rng(0)
    for seed in (0, 1, 299):
        samples = rng.permutation(50)[:33]
        found = feed.seen(samples, seed)
        assert found.device.type == device.type
        assert np.array_equal(found.cpu().numpy(), views.batch(samples, seed))


def batches(device: torch.device | str, images: Path, cache: Path, **given: Any) -> list[Any]:
    """Samples, views, true classes and soft labels of two epochs, on the CPU."""
    settings: dict[str, Any] = {"batch_size": 16, "workers": 0, "memory": IN_RAM} | given
    loader = SoftLabelLoader(open_target(str(images)), cache=cache, device=device, **settings)
    assert settings["memory"] < 1 or isinstance(loader.feed, ResidentFeed) == (
        loader.device.type == "cuda"
    )
    kept = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch.checked == len(batch)
            kept.append((batch.samples, batch.views, batch.labels, batch.soft("tiny", 3.0)))
    loader.close()
    if loader.device.type == "cuda":
        torch.cuda.synchronize()
    return [(samples, *(held.cpu() for held in more)) for samples, *more in kept]


def require_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) == 8
    for (samples, views, labels, soft), (its_samples, its_views, its_labels, its_soft) in zip(
        found, expected, strict=True
    ):
        assert np.array_equal(samples, its_samples)
        assert torch.equal(views, its_views) and torch.equal(labels, its_labels)
        torch.testing.assert_close(soft, its_soft, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("memory", [IN_RAM, FROM_FILES], ids=["resident", "files"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_delivers_the_batches_of_the_cpu(
    images: Path, label_cache: Path, device: torch.device, memory: float, workers: int
) -> None:
    given = {"memory": memory, "workers": workers}
    found = batches(device, images, label_cache, **given)
    require_same(found, batches("cpu", images, label_cache, **given))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_files_are_pinned_for_the_copy(
    images: Path, device: torch.device, workers: int
) -> None:
    views, pin = (
        Views(open_target(str(images)), parse_policy("pad-crop-flip")),
        device.type != "cpu",
    )
    order = np.array_split(np.random.default_rng(1).permutation(60), 4)
    for found, samples in zip(Feed(views, workers, pin=pin)(order, 5), order, strict=True):
        assert found.views.is_pinned() == pin
        there = found.views.to(device, non_blocking=True)
        assert np.array_equal(there.cpu().numpy(), views.batch(samples, 5))


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Another stream, which has so much to do that it lags behind; the CPU has none."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        x = torch.randn(2048, 2048, device=device)
        for _ in range(100):
            x = x @ x / 2048
        yield
    stream.synchronize()


def test_a_loader_in_another_stream_delivers_the_same_batches(
    images: Path, label_cache: Path, device: torch.device
) -> None:
    """Labels are read in the default stream, whose memory is freed while the other one lags."""
    expected = batches("cpu", images, label_cache)
    torch.ones(1, device=device)
    with side_stream(device):
        found = batches(device, images, label_cache)
    require_same(found, expected)


def losses(trainer: Trainer, steps: int = 4) -> list[float]:
    samples = np.arange(16)
    found = []
    for i in range(steps):
        batch = batch_of(trainer, samples + 8 * i).to(trainer.plan.device)
        found.append(float(trainer.step(batch)["loss"]))
    return found


def on(config: TrainConfig, device: torch.device, **fields: Any) -> Trainer:
    return Trainer(make_plan(dataclasses.replace(config, device=str(device), **fields)))


def test_steps_are_those_of_the_cpu(config: TrainConfig, device: torch.device) -> None:
    config = dataclasses.replace(config, lr=0.01)
    expected = losses(on(config, torch.device("cpu")))
    assert losses(on(config, device)) == pytest.approx(expected, rel=5e-3)


def test_steps_in_bfloat16_are_near_those_in_float32(
    config: TrainConfig, device: torch.device
) -> None:
    config = dataclasses.replace(config, lr=0.01)
    exact = losses(on(config, device))
    rounded = losses(on(config, device, precision="bfloat16"))
    assert rounded == pytest.approx(exact, rel=0.05) and rounded != exact


NETWORK = """
from torch import nn


def build(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, classes),
    )
"""


@pytest.mark.slow
def test_a_compiled_network_steps_as_the_plain_one(
    config: TrainConfig, device: torch.device, tmp_path: Path
) -> None:
    (tmp_path / "small.py").write_text(NETWORK)
    model = f"{tmp_path / 'small.py'}:build"
    config = dataclasses.replace(config, lr=0.01, model=model, taps=["2"])
    plain = losses(on(config, device))
    assert losses(on(config, device, compile=True)) == pytest.approx(plain, rel=5e-3)


class Stopped(Exception):
    pass


def test_a_resumed_run_continues_from_the_very_state(
    config: TrainConfig, device: torch.device, tmp_path: Path
) -> None:
    """A GPU adds up in no fixed order, so that the numbers of two runs need not be the same."""
    config = dataclasses.replace(config, device=str(device), lr=0.01, ema=0.9, test_split="none")
    whole = Trainer(make_plan(config)).run(tmp_path / "whole")

    def stop(epoch: int, done: int, total: int) -> None:
        if (epoch, done) == (2, 2):
            raise Stopped

    cut = Trainer(make_plan(config), Hooks(step=stop))
    with pytest.raises(Stopped):
        cut.run(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    again = Trainer(make_plan(config))
    resumed = again.run(tmp_path / "run", resume=True)
    assert all(value.device.type == device.type for value in again.network.state_dict().values())
    assert len(resumed) == 4 and saved["model"]
    for name in ("loss", "loss_primary", "loss_tiny"):
        assert [r[name] for r in resumed] == pytest.approx([r[name] for r in whole], rel=0.02)
    for name in ("images", "views_checked", "view_seed", "lr"):
        assert [r[name] for r in resumed] == [r[name] for r in whole]


def stored(label_set: LabelSet) -> Any:
    return torch.stack([label_set.rows(seed, range(60)).log() for seed in range(2)]).numpy()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("workers", [0, 2])
def test_labels_are_those_of_the_cpu(
    images: Path, device: torch.device, tmp_path: Path, precision: Any, workers: int
) -> None:
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    found = []
    for where in (device, "cpu"):
        source = open_source(parse_source(f"tiny={TINY}:build"), device=where, precision=precision)
        report = cache_teachers(
            views, [source], parse_encoding("f32"), 2, tmp_path / str(where) / "cache",
            StageOptions(batch_size=16, workers=workers, shard_rows=32),
        )  # fmt: skip
        found.append(stored(report.label_sets[0]))
    tolerance = 1e-4 if precision == "float32" else 0.1
    np.testing.assert_allclose(found[0], found[1], atol=tolerance)
