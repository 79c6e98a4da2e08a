"""Several views of an image in a batch: the same pairs, labels and checks, from one decoding."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.independent_reader import open_set

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError, ViewMismatch
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.views import checks_of
from sskt.trainer.config import TrainConfig
from sskt.trainer.data import soft_label_loader
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer

SEEDS, SAMPLES = 3, 60
TIMES = ("seconds", "label_wait_seconds")


@pytest.fixture
def target(images: Path) -> Target:
    return open_target(str(images))


def loader_of(target: Target, cache: Path, **given: Any) -> SoftLabelLoader:
    usual: dict[str, Any] = {"batch_size": 12, "device": "cpu", "workers": 0, "epochs": 6}
    return SoftLabelLoader(target, cache=cache, **(usual | given))


def pairs_of(loader: SoftLabelLoader, epochs: range) -> list[Counter[tuple[int, int]]]:
    found = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        pairs: Counter[tuple[int, int]] = Counter()
        for batch in loader:
            seeds = batch.seeds
            if seeds is None:
                seeds = np.full(len(batch), epoch % SEEDS)
            pairs.update(zip(batch.samples.tolist(), seeds.tolist(), strict=True))
        found.append(pairs)
    return found


@pytest.mark.parametrize("memory", [8.0, 2.5e-6])  # in one window, and in several
def test_a_cycle_visits_the_pairs_of_as_many_epochs(
    target: Target, label_cache: Path, memory: float
) -> None:
    plain = sum(pairs_of(loader_of(target, label_cache), range(6)), Counter())
    for repeats in (2, 3):
        loader = loader_of(target, label_cache, views_per_image=repeats, memory=memory)
        windows = len(loader.order.windows(0))
        assert (windows == 1) == (memory > 1)
        epochs = pairs_of(loader, range(6))
        assert sum(epochs, Counter()) == plain
        for epoch, pairs in enumerate(epochs):
            assert sum(pairs.values()) == loader.order.view_count(epoch)
            assert abs(sum(pairs.values()) - SAMPLES) < windows * repeats
            first = epoch // repeats * repeats
            wanted = {(first + k) % SEEDS for k in range(repeats)}
            by_sample: dict[int, set[int]] = {}
            for sample, seed in pairs:
                by_sample.setdefault(sample, set()).add(seed)
            assert all(seeds == wanted for seeds in by_sample.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_belong_to_the_pair_and_an_image_is_decoded_once(
    target: Target, label_cache: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_label_loader, "held_in_memory", lambda views, *_: views)
    decoded: Counter[int] = Counter()
    read = Target.read

    def counted(self: Target, sample: int) -> Any:
        decoded[sample] += 1
        return read(self, sample)

    monkeypatch.setattr(Target, "read", counted)
    [label_set] = list_label_sets(label_cache)
    reader = open_set(label_cache / label_set.name)
    loader = loader_of(target, label_cache, views_per_image=2, workers=workers)
    visited = 0
    for batch in loader:
        assert batch.seeds is not None and len(batch) == batch.checked == batch.whole == 12
        soft = batch.soft("tiny")
        again = batch[3:9]
        np.testing.assert_array_equal(again.soft("tiny"), soft[3:9])
        for i, (sample, seed) in enumerate(zip(batch.samples, batch.seeds, strict=True)):
            np.testing.assert_array_equal(batch.views[i], loader.views[int(sample), int(seed)])
            expected = np.asarray(reader.label(int(seed), int(sample)))
            np.testing.assert_allclose(soft[i], expected, rtol=1e-5, atol=1e-7)
            assert batch.labels[i] == target.labels[sample]
        visited += len(set(batch.samples.tolist()))
    assert visited == SAMPLES // 2
    if not workers:
        compared = Counter(dict.fromkeys(decoded, 2))  # once for each view of the comparison
        assert decoded - compared == Counter(dict.fromkeys(decoded, 1)) and len(decoded) == visited


def test_a_changed_view_is_named_with_its_seed(target: Target, label_cache: Path) -> None:
    loader = loader_of(target, label_cache, views_per_image=2)
    [window] = loader.order.windows(0)
    labels = loader._labels.enter(window, None)
    samples, seeds = np.array([4, 5, 4, 5]), np.array([0, 0, 1, 1])
    of_seed = {seed: loader.views.batch(np.array([4, 5]), seed) for seed in (0, 1)}
    checks = checks_of(np.concatenate([of_seed[0], of_seed[1]]))
    assert labels.check(samples, checks, seeds) == 4
    checks[3] += 1
    with pytest.raises(ViewMismatch, match="sample 5 under view seed 1 is not the image"):
        labels.check(samples, checks, seeds)


def test_a_loader_continues_within_an_epoch(target: Target, label_cache: Path) -> None:
    def order(loader: SoftLabelLoader) -> list[tuple[list[int], list[int]]]:
        found = []
        for batch in loader:
            assert batch.seeds is not None
            found.append((batch.samples.tolist(), batch.seeds.tolist()))
        return found

    loader = loader_of(target, label_cache, views_per_image=3)
    loader.set_epoch(4)
    whole = order(loader)
    loader.set_epoch(4)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    other = loader_of(target, label_cache, views_per_image=3)
    other.load_state_dict(state)
    assert order(other) == whole[2:]
    with pytest.raises(InputError, match="views_per_image was 3, is 1"):
        loader_of(target, label_cache).load_state_dict(state)
    shares = [
        loader_of(target, label_cache, views_per_image=3, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    for share in shares:
        share.set_epoch(4)
    for (all_samples, _), *parts in zip(whole, *map(order, shares), strict=True):
        assert Counter(s for samples, _ in parts for s in samples) == Counter(all_samples)
        first, second = ({*samples} for samples, _ in parts)
        assert not first & second  # an image is decoded by one process


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"views_per_image": 0}, "views per image must be at least 1, found 0"),
        ({"views_per_image": 4}, "4 views per image need as many view seeds, found 3"),
        ({"views_per_image": 2, "batch_size": 9}, "choose a batch size that is a multiple of 2"),
    ],
)
def test_what_a_batch_cannot_have(
    target: Target, label_cache: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loader_of(target, label_cache, **given)


def test_a_run_is_resumed_with_the_same_numbers(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, views_per_image=2, view_cache=tmp_path / "views")
    whole = Trainer(make_plan(config)).run(tmp_path / "whole")
    assert [r["images"] for r in whole] == [60] * 4 == [r["views_checked"] for r in whole]
    assert [r["skipped"] for r in whole] == [0] * 4
    assert [r["view_seed"] for r in whole] == [0, 0, 2, 2]

    def stop(epoch: int, done: int, steps: int) -> None:
        if (epoch, done) == (3, 2):  # in the second epoch of a cycle
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(make_plan(config), Hooks(step=stop)).run(tmp_path / "cut")
    again = Trainer(make_plan(config), resumed=tmp_path / "cut")
    found = again.run(tmp_path / "cut", resume=True)
    for one, other in zip(whole, found, strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {
            k: v for k, v in other.items() if k not in TIMES
        }
