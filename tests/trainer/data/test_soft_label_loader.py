"""``SoftLabelLoader``: every batch has the views, true classes and soft labels of its samples."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.independent_reader import open_set
from support.servers import serving

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import (
    BadImage,
    IncompleteLabels,
    InputError,
    MissingData,
    SpecMismatch,
    UnknownName,
    ViewMismatch,
)
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, open_views
from sskt.trainer.config import TrainConfig
from sskt.trainer.data import soft_label_loader as module
from sskt.trainer.data.gpu_loader import ResidentFeed, resident_feed
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer

SEEDS = 3
GPU = ("GPU", "GPU, workers")
"""Images on the device, whose views are compared late; and views that come through workers."""
FEW = 2 * 20 * 12 * 4 / 2**30
"""GiB that hold 20 labels and as many read ahead: four windows an epoch."""


@pytest.fixture
def target(images: Path) -> Target:
    return open_target(str(images))


def loader_of(target: Target, cache: object, **given: Any) -> SoftLabelLoader:
    settings: dict[str, Any] = {"batch_size": 16, "device": "cpu", "workers": 0} | given
    return SoftLabelLoader(target, cache=str(cache), **settings)


def require_right(batch: SoftLabelBatch, seed: int, target: Target, cache: Path) -> None:
    """Views, classes and soft labels, each found in another way."""
    (label_set,) = list_label_sets(cache)
    reader = open_set(label_set.path)
    views = Views(target, parse_policy("pad-crop-flip"))
    samples = batch.samples
    assert np.array_equal(batch.views.numpy(), np.stack([views[int(s), seed] for s in samples]))
    assert batch.labels.tolist() == [int(s) // 20 for s in samples]
    for temperature in (1.0, 3.0):
        found = batch.soft("tiny", temperature)
        assert found.dtype == torch.float32 and found.shape == (len(batch), 12)
        expected = [np.asarray(reader.label(seed, int(s), temperature)) for s in samples]
        np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=2e-6)
    pixels = batch.views.double().numpy() / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected_images = ((pixels - mean) / std).transpose(0, 3, 1, 2)
    assert batch.images.dtype == torch.float32
    np.testing.assert_allclose(batch.images.numpy(), expected_images, atol=1e-5)


@pytest.mark.parametrize("memory", [8.0, FEW])
def test_the_labels_of_a_batch_are_those_of_its_samples_and_stay_so(
    target: Target, label_cache: Path, memory: float
) -> None:
    loader = loader_of(target, label_cache, memory=memory)
    kept: list[tuple[int, list[SoftLabelBatch]]] = []
    for epoch in range(SEEDS + 1):
        loader.set_epoch(epoch)
        kept.append((epoch % SEEDS, list(loader)))
        assert len(kept[-1][1]) == len(loader)
    loader.close()
    for seed, batches in kept:  # long after the loader went on
        assert sorted(s for b in batches for s in b.samples.tolist()) == list(range(60))
        for batch in batches:
            assert batch.checked == len(batch)
            require_right(batch, seed, target, label_cache)


def orders(loader: SoftLabelLoader, epochs: int) -> list[list[list[int]]]:
    return [[b.samples.tolist() for b in loader] for _ in range(epochs)]


def test_a_pass_advances_to_the_next_epoch_unless_one_is_chosen(
    target: Target, label_cache: Path
) -> None:
    loader = loader_of(target, label_cache)
    first, second = orders(loader, 2)
    assert first != second and loader.epoch == 2
    loader.set_epoch(0)
    assert orders(loader, 2) == [first, second]
    assert orders(loader_of(target, label_cache, seed=1), 1) != [first]
    for batch in loader:
        broken = batch.samples.tolist()
        break
    again = [b.samples.tolist() for b in loader]
    assert again[0] == broken and len(again) == len(loader), "a broken pass begins anew"


def test_the_trainer_trains_on_the_batches_of_the_loader(
    config: TrainConfig, target: Target
) -> None:
    config = dataclasses.replace(config, seed=7)
    trainer = Trainer(make_plan(config))
    found: list[list[int]] = []
    step = trainer.step

    def recorded(batch: SoftLabelBatch) -> Any:
        found.append(batch.samples.tolist())
        return step(batch)

    trainer.step = recorded  # type: ignore[assignment]
    for trainer.epoch in range(2):
        trainer.train_epoch()
    loader = loader_of(target, config.cache, seed=7)
    assert found == [samples for epoch in orders(loader, 2) for samples in epoch]


@pytest.mark.parametrize(("memory", "workers"), [(8.0, 0), (FEW, 0), (8.0, 2)])
def test_a_loader_continues_within_an_epoch(
    target: Target, label_cache: Path, memory: float, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workers:  # images that are held in RAM need no processes
        monkeypatch.setattr(module, "held_in_memory", lambda views, *_: views)
    given = {"memory": memory, "batch_size": 6, "workers": workers}
    whole = loader_of(target, label_cache, **given)
    expected = [(b.samples.tolist(), b.soft("tiny", 2.0)) for _ in range(2) for b in whole]
    for cut in (0, 1, 5, 10, 13):
        loader = loader_of(target, label_cache, **given)
        found: list[tuple[list[int], torch.Tensor]] = []
        state = loader.state_dict()
        while len(found) < cut:
            loader.set_epoch(loader.epoch)
            for batch in loader:
                found.append((batch.samples.tolist(), batch.soft("tiny", 2.0)))
                state = loader.state_dict()
                if len(found) == cut:
                    break
        other = loader_of(target, label_cache, **given)
        other.load_state_dict(json.loads(json.dumps(state)))
        while other.epoch < 2:
            other.set_epoch(other.epoch)
            found += [(b.samples.tolist(), b.soft("tiny", 2.0)) for b in other]
        assert [samples for samples, _ in found] == [samples for samples, _ in expected]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_another_epoch_than_that_of_the_state_begins_at_its_first_batch(
    target: Target, label_cache: Path
) -> None:
    loader = loader_of(target, label_cache)
    next(iter(loader))
    state = loader.state_dict()
    other = loader_of(target, label_cache)
    other.load_state_dict(state)
    other.set_epoch(1)
    loader.set_epoch(1)
    assert orders(other, 1) == orders(loader, 1)


def test_the_state_of_another_loader_is_refused(target: Target, label_cache: Path) -> None:
    state = loader_of(target, label_cache).state_dict()
    for given, name in (
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 8}, "batch_size was 16, is 8"),
        ({"seeds": 2}, "seeds was 3, is 2"),
        ({"rank": 0, "world_size": 2}, "world_size was 1, is 2"),
        ({"memory": FEW}, "rows of labels at a time was 60"),
        ({"sources": [], "policy": "pad-crop-flip"}, "digests was"),
    ):
        with pytest.raises(InputError, match=f"belongs to another loader: {name}"):
            loader_of(target, label_cache, **given).load_state_dict(state)


def test_processes_share_every_batch(target: Target, label_cache: Path) -> None:
    whole = loader_of(target, label_cache, batch_size=25)
    parts = [
        loader_of(target, label_cache, batch_size=25, rank=rank, world_size=2) for rank in (0, 1)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert np.concatenate([s.samples for s in shares]).tolist() == batch.samples.tolist()
        assert abs(len(shares[0]) - len(shares[1])) <= 1
        assert {s.whole for s in shares} == {len(batch)}
        for share in shares:
            require_right(share, 0, target, label_cache)
    with pytest.raises(InputError, match=r"rank of the loader must be in 0 \.\. 1"):
        loader_of(target, label_cache, rank=2, world_size=2)


def test_a_changed_image_is_named(target: Target, label_cache: Path) -> None:
    loader = loader_of(target, label_cache)
    images = loader.views.target.images
    assert images is not None, "held in memory"
    images[:, 12, 12] ^= 1
    with pytest.raises(ViewMismatch, match=r"sample \d+ under view seed 0 is not the image"):
        next(iter(loader))


@pytest.mark.parametrize(
    "where",
    [
        "memory",
        "files",
        "workers",
        "device",
        *(pytest.param(w, marks=pytest.mark.gpu) for w in GPU),
    ],
)
def test_one_changed_image_of_a_batch_is_named(
    images: Path,
    tiny: Source,
    tmp_path: Path,
    where: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of 60 in a single batch, whose file keeps its size (PNGs without compression)."""
    folder = shutil.copytree(images, tmp_path / "images")
    for path in (folder / "train").glob("*/*.png"):
        Image.open(path).save(path, compress_level=0)
    views = Views(open_target(str(folder)), parse_policy("pad-crop-flip:padding=0"))
    how = StageOptions(batch_size=8, workers=0)
    cache_teachers(views, [tiny], parse_encoding("f16"), 1, tmp_path / "cache", how)
    if where == "device":  # the way of a GPU, without one
        monkeypatch.setattr(module, "feed_of", lambda views, *rest, **more: resident(views))
    memory = 8.0 if where in ("memory", "device", "GPU") else 3e5 / 2**30

    def loader() -> SoftLabelLoader:
        given: dict[str, Any] = {"memory": memory, "batch_size": 60}
        given["workers"] = 2 if "workers" in where else 0
        given |= {"device": str(device)} if where in GPU else {}
        return loader_of(open_target(str(folder)), tmp_path / "cache", **given)

    (batch,) = loader()
    assert batch.checked == len(batch) == 60
    path = folder / "train" / "bear" / "0017.png"
    changed, size = np.array(Image.open(path)), path.stat().st_size
    changed[12, 12, 1] ^= 1
    Image.fromarray(changed).save(path, compress_level=0)
    assert path.stat().st_size == size
    with pytest.raises(ViewMismatch, match=r"sample 37 under view seed 0 .* 1 of 60 views"):
        list(loader())


def resident(views: Views) -> ResidentFeed:
    feed = resident_feed(views, torch.device("cpu"))
    assert feed is not None
    return feed


@pytest.fixture
def damaged(images: Path, tiny: Source, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with an image that is read no more, and labels made when it still was."""
    folder = shutil.copytree(images, tmp_path / "images")
    views = Views(open_target(str(folder)), parse_policy("pad-crop-flip"))
    options = StageOptions(batch_size=8, workers=0)
    cache_teachers(views, [tiny], parse_encoding("f16"), 1, tmp_path / "cache", options)
    path = folder / "train" / "bear" / "0003.png"
    path.write_bytes(bytes(len(path.read_bytes())))
    return folder, tmp_path / "cache"


def test_an_unreadable_sample_ends_the_pass_or_is_left_out(damaged: tuple[Path, Path]) -> None:
    folder, cache = damaged
    target = open_target(str(folder))
    with pytest.raises(BadImage, match=r"0003\.png"):
        list(loader_of(target, cache))
    for size in (16, 1):  # of the size 1, a whole batch is left out
        batches = list(loader_of(target, cache, batch_size=size, on_error="skip"))
        assert sorted(s for b in batches for s in b.samples.tolist()) == sorted({*range(60)} - {23})
        assert all(len(batch) for batch in batches)
        assert sum(batch.unreadable for batch in batches) == 1
    parts = [
        list(loader_of(target, cache, batch_size=2, on_error="skip", rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    counts = [(len(a), len(b)) for a, b in zip(*parts, strict=True)]
    assert sorted(counts)[0] in ((0, 1), (1, 0)) and sum(map(sum, counts)) == 59
    empty = next(batch for part in parts for batch in part if not len(batch))
    assert empty.labels.shape == (0,) and empty.whole == 2


def test_a_sample_without_a_label_is_left_out(images: Path, tiny: Source, tmp_path: Path) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "train" / "cup" / "0001.png").write_bytes(b"no image")
    target = open_target(str(folder))
    views = Views(target, parse_policy("pad-crop-flip"))
    options = StageOptions(batch_size=8, workers=0, on_error="skip")
    cache_teachers(views, [tiny], parse_encoding("u8"), 1, tmp_path / "cache", options)
    batches = list(loader_of(target, tmp_path / "cache"))
    assert sorted(s for b in batches for s in b.samples.tolist()) == sorted({*range(60)} - {41})


def test_sources_and_their_classes(target: Target, label_cache: Path) -> None:
    for sources in (None, ["tiny"]):
        loader = loader_of(target, label_cache, sources=sources)
        assert loader.sources == ("tiny",)
        assert loader.source_classes == {"tiny": 12}
        assert loader.classes("tiny") == tuple(f"thing {i}" for i in range(12))
    with pytest.raises(UnknownName, match="unknown source of the loader 'huge'; known: tiny"):
        loader.classes("huge")
    with pytest.raises(UnknownName, match="unknown source of the loader 'huge'; known: tiny"):
        next(iter(loader)).soft("huge")


def test_without_sources_there_are_views_alone(target: Target, tmp_path: Path) -> None:
    loader = loader_of(target, tmp_path / "none", sources=[], policy="pad-crop-flip", seed=3)
    assert loader.sources == () and loader.source_classes == {}
    loader.set_epoch(500)
    batch = next(iter(loader))
    views = Views(target, parse_policy("pad-crop-flip")).batch(batch.samples, 500)
    assert np.array_equal(batch.views.numpy(), views)
    with pytest.raises(UnknownName):
        batch.soft("tiny")


def test_labels_that_are_missing_or_of_something_else(
    target: Target, label_cache: Path, images: Path, tmp_path: Path
) -> None:
    make = r"make them with sskt\.cache_teachers\(target, sources, cache=\.\.\.\)"
    for cache, sources in ((label_cache, ["places365"]), (tmp_path / "none", None)):
        with pytest.raises(MissingData, match=f"no labels of .* over images train in .*; {make}"):
            loader_of(target, cache, sources=sources)
    with pytest.raises(MissingData, match=make):
        loader_of(open_target(str(images), "test"), label_cache)
    with pytest.raises(
        SpecMismatch, match=r"was made with limit=60 \(all .*, but limit=30 was given"
    ):
        loader_of(open_target(str(images), limit=30), label_cache)
    with pytest.raises(SpecMismatch, match=r"but policy='none' was given; .* sskt\.cache_t"):
        loader_of(target, label_cache, policy="none")
    with pytest.raises(IncompleteLabels, match="lacks seed 3 of 4"):
        loader_of(target, label_cache, seeds=4)
    assert loader_of(target, label_cache, seeds=4, epochs=3).order.seeds == 4
    changed = shutil.copytree(images, tmp_path / "images")
    (changed / "train" / "cup" / "0001.png").write_bytes(b"of another size")
    with pytest.raises(SpecMismatch, match="names, order or sizes of the files"):
        loader_of(open_target(str(changed)), label_cache)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size of the loader must be at least 1"),
        ({"batch_size": 1, "rank": 0, "world_size": 2}, "batch_size .* at least 2"),
        ({"seeds": 0}, "seeds of the loader must be at least 1"),
        ({"epochs": 0}, "epochs of the loader must be at least 1"),
        ({"seed": -1}, "seed of the loader must be in"),
        ({"memory": 0.0}, "memory of the loader must be above 0"),
        ({"on_error": "ignore"}, "on_error of the loader must be 'fail' or 'skip'"),
        ({"normalise": "cifar"}, "unknown normalisation 'cifar'; known: imagenet, kinetics"),
        (
            {"device": "toaster"},
            "device toaster cannot be used: there is no such kind of device; give cpu, cuda,",
        ),
        ({"workers": -1}, "workers of the loader must be at least 0"),
    ],
)
def test_arguments_that_cannot_be_used(
    target: Target, label_cache: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loader_of(target, label_cache, **given)


def test_top_k_labels_at_another_temperature_are_refused(
    target: Target, tiny: Source, tmp_path: Path
) -> None:
    views = Views(target, parse_policy("pad-crop-flip"))
    options = StageOptions(batch_size=8, workers=0)
    cache_teachers(views, [tiny], parse_encoding("topk-3"), 1, tmp_path, options)
    batch = next(iter(loader_of(target, tmp_path)))
    assert batch.soft("tiny").shape == (16, 12)
    with pytest.raises(InputError, match="labels stored as topk-3 are wrong at temperature 3"):
        batch.soft("tiny", 3.0)
    forced = next(iter(loader_of(target, tmp_path, force_topk=True)))
    assert torch.allclose(forced.soft("tiny", 3.0).sum(1), torch.ones(16))


def test_an_own_normalisation_and_the_input_scale(target: Target, label_cache: Path) -> None:
    def half(views: torch.Tensor) -> torch.Tensor:
        return views.permute(0, 3, 1, 2) / 255 - 0.5

    batch = next(iter(loader_of(target, label_cache, normalise=half)))
    assert torch.equal(batch.images, half(batch.views))
    kinetics = next(iter(loader_of(target, label_cache, normalise="kinetics")))
    mean = torch.tensor([114.7748, 107.7354, 99.4750])
    assert torch.allclose(kinetics.images, (kinetics.views - mean).permute(0, 3, 1, 2), atol=1e-4)


def test_parts_and_copies_of_a_batch(target: Target, label_cache: Path) -> None:
    batch = next(iter(loader_of(target, label_cache)))
    soft, pixels = batch.soft("tiny", 2.0), batch.images
    part = batch[4:9]
    assert len(part) == 5 and part.samples.tolist() == batch.samples[4:9].tolist()
    assert part.labels.tolist() == batch.labels[4:9].tolist()
    assert torch.equal(part.soft("tiny", 2.0), soft[4:9])
    assert torch.equal(part.images, pixels[4:9])
    assert batch.to("cpu") is batch
    elsewhere = batch.to("meta")
    assert elsewhere.views.device.type == elsewhere.labels.device.type == "meta"
    assert elsewhere.soft("tiny").device.type == "meta"
    assert batch.views.device.type == "cpu"


def test_labels_are_read_ahead_but_not_after_the_last_epoch(
    target: Target, label_cache: Path
) -> None:
    for epochs, expected in ((None, {0: 1, 1: 1, 2: 1}), (2, {0: 1, 1: 1})):
        loader = loader_of(target, label_cache, epochs=epochs)
        seen: Counter[int] = Counter()
        read = loader._labels._read  # type: ignore[attr-defined]

        def counted(window: Any, seen: Counter[int] = seen, read: Any = read) -> Any:
            seen[window.seed] += 1
            return read(window)

        loader._labels._read = counted  # type: ignore[attr-defined]
        orders(loader, 2)
        if loader._labels._ahead:  # type: ignore[attr-defined]
            loader._labels._ahead[1].result()  # type: ignore[attr-defined]
        loader.close()
        assert seen == expected
        assert loader.label_wait_seconds > 0


def test_batches_of_labels_behind_a_server(target: Target, label_cache: Path) -> None:
    local = loader_of(target, label_cache)
    with serving(label_cache) as url:
        served = loader_of(target, url)
        for here, there in zip(local, served, strict=True):
            assert here.samples.tolist() == there.samples.tolist()
            assert torch.equal(here.soft("tiny", 2.0), there.soft("tiny", 2.0))
        served.close()


def test_the_usual_policy_is_taken_of_label_sets_over_several_views(
    images: Path, tiny: Source, tmp_path: Path
) -> None:
    target = open_target(str(images), limit=12)
    options = StageOptions(batch_size=8, workers=0)
    for policy in ("none", "random-resized-crop-flip"):
        cache_teachers(
            Views(target, parse_policy(policy)), [tiny], parse_encoding("u8"), 1, tmp_path, options
        )
    assert loader_of(target, tmp_path).views.policy.name == "random-resized-crop-flip"
    assert loader_of(target, tmp_path, policy="none").views.policy.name == "none"


def test_clips_have_batches_too(tiny: Source, tmp_path: Path) -> None:
    from support.helpers import write_frames

    rng = np.random.default_rng(0)
    for name in ("jump", "run"):
        for i in range(3):
            frames = rng.integers(0, 256, (20, 40, 48, 3), np.uint8)
            write_frames(tmp_path / "clips" / "train" / name / f"v{i}", frames)
    target = open_target(str(tmp_path / "clips"))
    views = open_views(target, parse_policy("clip-corner-crop-flip:size=32"))
    options = StageOptions(batch_size=4, workers=0)
    cache_teachers(views, [tiny], parse_encoding("f16"), 1, tmp_path / "cache", options)
    (batch,) = loader_of(target, tmp_path / "cache")
    assert batch.views.shape == (6, 16, 32, 32, 3) and batch.images.shape == (6, 3, 16, 32, 32)
    (label_set,) = list_label_sets(tmp_path / "cache")
    assert torch.equal(batch.soft("tiny"), label_set.rows(0, batch.samples))
