"""Training views from regions of JPEG files: the same batches, and damage as with whole images."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import BadImage, ViewMismatch
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.media import regions
from sskt.teacher_cache.media.images import read_image
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import Policy, crop_box, parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.data.soft_label_loader import SoftLabelLoader

installed = pytest.mark.skipif(
    regions.decoder_of_this_thread() is None, reason="nvidia-nvimgcodec is not installed"
)
POLICY = parse_policy("random-resized-crop-flip:size=32")
COUNT = 12


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of several sizes, so that they are not kept in RAM, and a PNG file."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    for i in range(COUNT):
        height, width = 300 + 3 * i, 420 - 5 * i
        coarse = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
        path = folder / "train" / f"class{i % 2}" / f"{i:02}{'.png' if i == 7 else '.jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def labels(photos: Path, tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labels_of(photos, tiny, tmp_path_factory.mktemp("labels"), POLICY)


def labels_of(photos: Path, tiny: Source, folder: Path, policy: Policy) -> Path:
    views = Views(open_target(str(photos)), policy)
    options = StageOptions(batch_size=4, workers=0, on_error="skip")
    cache_teachers(views, [tiny], parse_encoding("f16"), 2, folder, options)
    return folder


def loader_of(photos: Path, cache: Path, **given: Any) -> SoftLabelLoader:
    settings: dict[str, Any] = {"batch_size": COUNT, "device": "cpu", "workers": 0} | given
    return SoftLabelLoader(open_target(str(photos)), cache=cache, **settings)


def seen(loader: SoftLabelLoader) -> dict[int, bytes]:
    """The views of an epoch by sample."""
    return {
        int(sample): view.numpy().tobytes()
        for batch in loader
        for sample, view in zip(batch.samples, batch.views, strict=True)
    }


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the regions that were decoded in this process."""
    found: list[int] = []
    decode = regions.decoder_of_this_thread

    def counted() -> Callable[..., Any] | None:
        found.append(1)
        return decode()

    monkeypatch.setattr(regions, "decoder_of_this_thread", counted)
    yield found


@pytest.mark.parametrize("policy", ["", "version=1", "trivial=1,erase=0.5"])
def test_views_are_those_of_whole_images(photos: Path, policy: str, taken: list[int]) -> None:
    target = open_target(str(photos))
    chosen = parse_policy(f"random-resized-crop-flip:size=32,{policy}")
    whole, region = Views(target, chosen), Views(target, chosen, regions=True)
    assert whole.identity() == region.identity()
    rows = np.arange(COUNT)
    for seed in range(6):
        np.testing.assert_array_equal(
            region.batch(rows, seed), whole.batch(rows, seed), f"seed {seed}"
        )
    assert len(taken) > COUNT
    before = len(taken)
    region.seen(rows, [0, 1])  # one decoding for both
    whole.seen(rows, [0])
    Views(target, parse_policy("resize-center-crop:resize=40,size=32"), regions=True).batch(rows, 0)
    assert len(taken) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_with_stored_checks_decodes_regions(
    photos: Path, labels: Path, workers: int, taken: list[int]
) -> None:
    loader = loader_of(photos, labels, workers=workers)
    views = Views(open_target(str(photos)), POLICY)
    for seed in range(2):
        assert seen(loader) == {i: views[i, seed].tobytes() for i in range(COUNT)}
    assert taken or workers


@pytest.mark.parametrize("given", [{"sources": []}, {"view_cache": "views"}])
def test_a_training_without_checks_or_with_kept_views_decodes_whole_images(
    photos: Path, labels: Path, given: dict[str, Any], taken: list[int], tmp_path: Path
) -> None:
    if "view_cache" in given:
        given = {"view_cache": tmp_path / "views"}
    loader = loader_of(photos, labels, policy=str(POLICY), **given)
    assert len(seen(loader)) == COUNT
    assert not taken


def test_mixed_views_and_those_without_labels_are_of_whole_images(
    photos: Path, labels: Path, tiny: Source, tmp_path: Path, taken: list[int]
) -> None:
    assert len(list(loader_of(photos, labels).without_labels(0))) == 1
    mixed = parse_policy("random-resized-crop-flip:size=32,mixup=0.5")
    loader = loader_of(photos, labels_of(photos, tiny, tmp_path, mixed))
    assert len(seen(loader)) == COUNT
    assert not taken


def damaged(photos: Path, copy: Path, inside: bool) -> tuple[int, Path]:
    """A copy of the images in which one file of the same size is damaged below its crop, or in it.

    Returns its sample and its path.
    """
    shutil.copytree(photos, copy)
    target: Target = open_target(str(copy))
    assert target.paths is not None
    for sample, path in enumerate(target.paths):
        if path.suffix != ".jpg":
            continue
        height, width = read_image(path).shape[:2]
        (top, _, h, w), _ = crop_box(POLICY, sample, 0, height, width)
        spared = height * width - h * w >= regions.SPARED_PIXELS
        if spared and top + h < 0.8 * height and h > 60:
            data = path.read_bytes()
            at = int(len(data) * ((top + h / 2) / height if inside else 0.95))
            path.write_bytes(data[:at] + b"\xff\xd9" + data[at + 2 :])  # end of the image
            with pytest.raises(BadImage):
                read_image(path)
            return sample, path
    raise AssertionError("no crop ends early")


@installed
def test_damage_since_the_labels_is_reported_if_it_is_in_the_crop(
    photos: Path, labels: Path, tmp_path: Path
) -> None:
    sample, path = damaged(photos, tmp_path / photos.name, inside=True)
    whole = seen(loader_of(photos, labels))
    with pytest.raises(BadImage, match=f"cannot decode image .*{path.name}"):
        seen(loader_of(path.parents[2], labels))
    found = seen(loader_of(path.parents[2], labels, on_error="skip"))
    assert found == {i: view for i, view in whole.items() if i != sample}


@installed
def test_damage_since_the_labels_outside_the_crop_leaves_the_view_as_it_was(
    photos: Path, labels: Path, tmp_path: Path
) -> None:
    _, path = damaged(photos, tmp_path / photos.name, inside=False)
    assert seen(loader_of(path.parents[2], labels)) == seen(loader_of(photos, labels))


def test_a_damaged_file_is_skipped_by_the_teacher_stage_and_the_training(
    photos: Path, tiny: Source, tmp_path: Path
) -> None:
    """It is decoded whole for its label, so its row is skipped under every seed."""
    sample, path = damaged(photos, tmp_path / photos.name, inside=False)
    cache = labels_of(path.parents[2], tiny, tmp_path / "cache", POLICY)
    assert set(seen(loader_of(path.parents[2], cache))) == set(range(COUNT)) - {sample}
    with pytest.raises(BadImage):  # from scratch, as before
        seen(loader_of(path.parents[2], cache, sources=[], policy=str(POLICY)))


@installed
def test_another_image_of_the_same_size_is_named(
    photos: Path, labels: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / photos.name)
    path = tmp_path / photos.name / "train" / "class0" / "00.jpg"
    size = path.stat().st_size
    Image.fromarray(255 - read_image(path)).save(path, quality=60)
    path.write_bytes(path.read_bytes() + bytes(size - path.stat().st_size))
    with pytest.raises(ViewMismatch, match=f"1 of {COUNT} views of the batch differ"):
        seen(loader_of(tmp_path / photos.name, labels))
