"""Training on mixed views: stored labels equal live ones, and hard labels are mixed alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.losses import binary_cross_entropy, cross_entropy, focal
from sskt.trainer.results.records import read_metrics

POLICY = "pad-crop-flip:mixup=0.8,cutmix=1.0,randaugment=1,erase=0.25"


@pytest.fixture
def mixed(config: TrainConfig, tiny: Source, tmp_path: Path) -> TrainConfig:
    """The small training from labels of mixed views, one of the images unreadable."""
    views = Views(open_target(config.target), parse_policy(POLICY))
    options = StageOptions(batch_size=8, workers=0, shard_rows=16)
    cache_teachers(views, [tiny], parse_encoding("f32"), 2, tmp_path / "cache", options)
    return dataclasses.replace(
        config, policy=POLICY, cache=tmp_path / "cache", temperature=2.0, alpha=1.0, epochs=2
    )


def first_batches(config: TrainConfig, sources: list[Source]) -> tuple[Trainer, SoftLabelBatch]:
    trainer = Trainer(make_plan(config, sources))
    return trainer, next(iter(trainer.loader))


@pytest.mark.parametrize("loss", ["ce+ce", "focal+kd"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stored_labels_of_mixed_views_equal_live_ones(
    mixed: TrainConfig, tiny: Source, loss: str, workers: int
) -> None:
    found = []
    for live in (False, True):
        config = dataclasses.replace(mixed, loss=loss, live=live, workers=workers, memory=1e-4)
        trainer, batch = first_batches(config, [tiny])
        total, _ = trainer.losses(batch)
        torch.autograd.backward(total)
        named = trainer.network.named_parameters()
        gradients = {n: p.grad for n, p in named if p.grad is not None}
        found.append((batch, float(total.detach()), batch.soft("tiny", 2.0), gradients))
        trainer.loader.close()
    (stored, loss_stored, p_stored, g_stored), (live_, loss_live, p_live, g_live) = found
    assert stored.samples.tolist() == live_.samples.tolist()
    assert torch.equal(stored.views, live_.views) and torch.equal(stored.labels, live_.labels)
    assert (p_stored - p_live).abs().max() < 1e-5
    assert loss_stored == pytest.approx(loss_live, rel=1e-5)
    for name, gradient in g_stored.items():
        scale = max(1.0, float(g_live[name].abs().max()))
        assert (gradient - g_live[name]).abs().max() < 1e-5 * scale, name


def test_hard_labels_are_mixed_by_the_weights_of_the_views(
    mixed: TrainConfig, tiny: Source
) -> None:
    trainer, batch = first_batches(mixed, [tiny])
    assert batch.partners is not None and batch.weights is not None
    truth = trainer.views.target.labels
    assert 0 < batch.weights.min() < 0.6 and batch.labels.shape == (len(batch), 3)
    for i, (row, other, w) in enumerate(
        zip(batch.samples, batch.partners, batch.weights.tolist(), strict=True)
    ):
        expected = np.zeros(3)
        expected[truth[row]] += w
        expected[truth[other]] += 1 - w
        np.testing.assert_allclose(batch.labels[i].numpy(), expected, atol=1e-6)
    seen = trainer.views.seen(batch.samples, [0])
    assert np.array_equal(seen.views[0], batch.views.numpy())
    assert np.array_equal(seen.mixed[0].weights, batch.weights)
    part = batch[3:7].to("cpu")
    assert part.partners is not None and part.weights is not None
    assert part.partners.tolist() == batch.partners[3:7].tolist()
    assert torch.equal(part.labels, batch.labels[3:7])


@pytest.mark.parametrize("view_cache", [False, True])
def test_several_mixed_views_of_an_image_have_their_own_partners(
    mixed: TrainConfig, tiny: Source, tmp_path: Path, view_cache: bool
) -> None:
    kept = tmp_path / "kept" if view_cache else None
    config = dataclasses.replace(mixed, views_per_image=2, view_cache=kept, memory=1e-4)
    trainer, batch = first_batches(config, [tiny])
    assert batch.seeds is not None and batch.partners is not None and batch.weights is not None
    assert set(batch.seeds.tolist()) == {0, 1}
    for seed in (0, 1):
        rows = np.flatnonzero(batch.seeds == seed)
        seen = trainer.views.seen(batch.samples[rows], [seed])
        np.testing.assert_array_equal(batch.views[rows].numpy(), seen.views[seed])
        np.testing.assert_array_equal(batch.partners[rows], seen.mixed[seed].partners)
        np.testing.assert_array_equal(batch.weights[rows], seen.mixed[seed].weights)
    assert torch.isfinite(batch.soft("tiny")).all()  # after the view checks of all of them
    trainer.loader.close()


def test_losses_of_mixed_labels_are_the_mixed_losses() -> None:
    torch.manual_seed(0)
    z, y, other = torch.randn(32, 5), torch.arange(32) % 5, torch.arange(32) * 3 % 5
    w = torch.rand(32)
    one = [F.one_hot(t, 5).float() for t in (y, other)]
    truth = w[:, None] * one[0] + (1 - w)[:, None] * one[1]
    for loss in (cross_entropy, focal):
        each = [
            torch.stack([loss(z[i : i + 1], t[i : i + 1], gamma=2.0) for i in range(32)])
            for t in (y, other)
        ]
        expected = w * each[0] + (1 - w) * each[1]
        assert loss(z, truth, gamma=2.0) == pytest.approx(float(expected.mean()), rel=1e-5)
        total = loss(z, truth, gamma=2.0, reduction="sum")
        assert total == pytest.approx(float(expected.sum()), rel=1e-5)
    present = (torch.rand(2, 32, 5) > 0.6).long()
    both = w[:, None] * present[0] + (1 - w)[:, None] * present[1]
    each = [
        torch.stack([binary_cross_entropy(z[i : i + 1], t[i : i + 1]) for i in range(32)])
        for t in present
    ]
    expected = w * each[0] + (1 - w) * each[1]
    assert binary_cross_entropy(z, both) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_a_mixed_sample_counts_by_the_weight_of_the_predicted_class(
    mixed: TrainConfig, tiny: Source
) -> None:
    trainer, batch = first_batches(mixed, [tiny])
    trainer.network.eval()
    with torch.no_grad():
        _, parts = trainer.losses(batch)
        predicted = trainer.network(batch.images)[0].argmax(1)
    expected = sum(float(batch.labels[i, k]) for i, k in enumerate(predicted.tolist()))
    assert float(parts["right"]) == pytest.approx(expected, abs=1e-5)


def test_a_run_on_mixed_views_checks_each_view_and_resumes(
    mixed: TrainConfig, tmp_path: Path
) -> None:
    whole = Trainer(make_plan(mixed)).run(tmp_path / "whole")
    assert [r["views_checked"] for r in whole] == [60, 60]
    assert all(0 < r["train_top1"] < 100 for r in whole)
    accumulated = dataclasses.replace(mixed, accumulate=2, workers=2)
    assert Trainer(make_plan(accumulated)).run(tmp_path / "other")[0]["views_checked"] == 60


def test_the_loader_gives_own_loops_the_mixed_labels(mixed: TrainConfig) -> None:
    """``cross_entropy`` of the batch's labels is right without a change of the loop."""
    target = open_target(mixed.target)
    loader = SoftLabelLoader(target, cache=mixed.cache, batch_size=20, device="cpu", workers=0)
    assert str(loader.views.policy) == str(parse_policy(POLICY))
    for batch in loader:
        loss = F.cross_entropy(torch.randn(len(batch), 3), batch.labels)
        assert torch.isfinite(loss)
        np.testing.assert_allclose(batch.labels.sum(1).numpy(), 1, atol=1e-6)
    loader.close()
    unlabelled = dataclasses.replace(target, labels=np.full(60, -1))
    loader = SoftLabelLoader(unlabelled, cache=mixed.cache, batch_size=20, device="cpu", workers=0)
    assert all(not batch.labels.any() for batch in loader)
    loader.close()


def test_several_classes_a_sample(tiny: Source, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (24, 24, 24, 3), np.uint8)
    labels = np.random.default_rng(1).integers(-1, 2, (24, 4))
    target = Target("t", "train", tuple("abcd"), labels, [str(i) for i in range(24)], images=images)
    cache_teachers(
        Views(target, parse_policy("pad-crop-flip:mixup=1")),
        [tiny], parse_encoding("f32"), 1, tmp_path, StageOptions(workers=0),
    )  # fmt: skip
    loader = SoftLabelLoader(target, cache=tmp_path, batch_size=24, device="cpu", workers=0)
    (batch,) = loader
    assert batch.weights is not None
    w = batch.weights[:, None]
    expected = w * (labels[batch.samples] > 0) + (1 - w) * (labels[batch.partners] > 0)
    np.testing.assert_allclose(batch.labels.numpy(), expected, atol=1e-6)
    loader.close()


def test_what_cannot_take_mixed_samples_is_refused(mixed: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--method maxl .* mixes samples; leave mixup and cutm"):
        make_plan(
            dataclasses.replace(mixed, method="maxl", source=[], tm=False, loss="focal+focal")
        )


@pytest.mark.parametrize("policy", [POLICY, "random-resized-crop-flip:size=64,cutmix=1.0"])
def test_commands_train_on_mixed_real_images(
    data: Path, cifar: Path, sskt: Callable[..., tuple[int, str, str]], tmp_path: Path, policy: str
) -> None:
    network = f"places365={data}/models/squeezenet_places365.py:build@64"
    common = ("--target", cifar, "--cache", tmp_path / "c", "--limit", 48, "--workers", 0)
    made = sskt(
        *("cache-teachers", "--source", network, *common, "--policy", policy),
        *("--seeds", 2, "--device", "cpu"),
    )
    assert made[0] == 0, made[2]
    status, _, err = sskt(
        *("train", "--source", "places365", "--tm", *common, "--epochs", 2),
        *("--batch-size", 16, "--device", "cpu", "--out", tmp_path / "run", "--test-split", "none"),
    )
    assert status == 0, err
    records = read_metrics(tmp_path / "run")
    assert [r["views_checked"] for r in records] == [48, 48]
    inspected = sskt(
        *("inspect", "--cache", tmp_path / "c", "--sample", 3, "--seed", 1, "--json"),
        *("--png", tmp_path / "x.png"),
    )
    assert inspected[0] == 0, inspected[2]
    shown = json.loads(inspected[1])
    assert shown["view_matches"] and "sample " in shown["label"] and "%" in shown["label"]
    with Image.open(tmp_path / "x.png") as image:
        assert image.size[0] in (32, 64)
    verified = sskt("verify", "--cache", tmp_path / "c", "--recompute", 20, "--source", network)
    assert verified[0] == 0, verified[2]
    audited = sskt("ls", "--cache", tmp_path / "c", "--audit")
    assert audited[0] == 0 and "mixed with those of other samples" in audited[1], audited
