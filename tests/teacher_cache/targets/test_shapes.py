"""The rendered target: the same images on every machine, forever."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import pytest

from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.targets import shapes
from sskt.teacher_cache.targets.shapes import CLASSES, KINDS, SIZE, SPLITS, labels_of, render

PINNED = {
    "train": "07fb5786d5f872c127aa32278a44a5527b11b250b52c2fb04446b1380a70f046",
    "test": "4098ea18ad2323d0ae1e3b7c4b14c004788f4b076e38bec491c46170ec6ba5e5",
}


@functools.cache
def images(split: str) -> UInt8:
    return render(split)


@pytest.mark.parametrize("split", SPLITS)
def test_the_images_are_pinned(split: str) -> None:
    found = images(split)
    assert found.shape == (SPLITS[split], SIZE, SIZE, 3)
    assert found.dtype == np.uint8
    assert hashlib.sha256(found.tobytes()).hexdigest() == PINNED[split]


@pytest.mark.parametrize("split", SPLITS)
def test_classes_are_equally_many(split: str) -> None:
    labels = labels_of(split)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [SPLITS[split] // len(CLASSES)] * len(CLASSES)


@pytest.mark.parametrize("chunk", [37, 500])
def test_images_do_not_depend_on_how_many_are_drawn_at_a_time(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images("test")
    monkeypatch.setattr(shapes, "CHUNK", chunk)
    np.testing.assert_array_equal(render("test"), expected)


def test_no_image_occurs_twice_in_or_across_the_splits() -> None:
    both = np.concatenate([images("train"), images("test")])
    assert len({image.tobytes() for image in both}) == len(both)


def test_images_are_neither_flat_nor_clipped() -> None:
    found = images("test").reshape(SPLITS["test"], -1).astype(np.float64)
    assert found.std(axis=1).min() > 5
    assert 80 < found.mean() < 170
    assert ((found == 0) | (found == 255)).mean() < 0.1


def test_the_ten_kinds_are_ten_outlines() -> None:
    axis = np.linspace(-1.2, 1.2, 121)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    inside = {name: kind(x, y) < 0 for name, kind in KINDS.items()}
    assert len(inside) == 10
    for name, mask in inside.items():
        assert 0.03 < mask.mean() < 0.6, name
        for other, its in inside.items():
            if name != other:
                overlap = (mask & its).sum() / (mask | its).sum()
                assert overlap < 0.93, f"{name} looks like {other}"


def test_another_size_shows_the_same_scene() -> None:
    small, large = images("test")[:50].astype(float), render("test", 96)[:50].astype(float)
    thumbnails = [
        some.reshape(50, 12, side, 12, side, 3).mean(axis=(2, 4)).ravel()
        for some, side in ((small, 4), (large, 8))
    ]
    assert np.corrcoef(thumbnails)[0, 1] > 0.95
