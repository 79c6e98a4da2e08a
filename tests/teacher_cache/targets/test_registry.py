"""Targets: every row of the table passes one conformance test; folders are read in one order."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.helpers import TINY, write_images
from support.layouts import (
    VOC_OBJECTS,
    write_frames,
    write_hmdb51,
    write_image,
    write_imagenet,
    write_list,
    write_places365,
    write_ucf101,
    write_voc,
)
from torchvision import datasets

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.media.images import UInt8, read_image
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.files import scan as listing
from sskt.teacher_cache.targets.folder import open_folder
from sskt.teacher_cache.targets.open import evaluation_split
from sskt.teacher_cache.targets.registry import TARGETS, default_policy
from sskt.teacher_cache.targets.spec import DatasetSpec
from sskt.teacher_cache.views.policies import parse_policy

CIFAR_EACH, STL_EACH = 8, 12


def noise(seed: int, *shape: int) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_cifar(
    folder: Path, files: list[str], label_key: str, classes: list[str], meta: tuple[str, str]
) -> None:
    """Pickled batches: ``data`` is [n, 3072], all red, then all green, then all blue."""
    folder.mkdir(parents=True)
    for number, name in enumerate(files):
        images = noise(number, CIFAR_EACH, 32, 32, 3)
        batch = {
            "batch_label": name,
            label_key: [(number + i) % len(classes) for i in range(CIFAR_EACH)],
            "data": images.transpose(0, 3, 1, 2).reshape(CIFAR_EACH, -1),
            "filenames": [f"{i}.png" for i in range(CIFAR_EACH)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: classes}, protocol=2))


def write_stl10(folder: Path) -> None:
    """uint8 images [n, 3, 96, 96] stored column by column, labels from 1, no unlabeled y."""
    folder.mkdir(parents=True)
    for number, split in enumerate(("train", "test", "unlabeled")):
        images = noise(100 + number, STL_EACH, 96, 96, 3)
        images.transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            labels = np.arange(STL_EACH, dtype=np.uint8) % 10 + 1
            labels.tofile(folder / f"{split}_y.bin")
    names = "airplane bird car cat deer dog horse monkey ship truck"
    (folder / "class_names.txt").write_text(names.replace(" ", "\n") + "\n")
    (folder / "fold_indices.txt").write_text("0 1 2\n" * 10)


def write_manifest(folder: Path) -> None:
    """scenes.csv: 6 train and 4 test images of three classes, one of them unknown."""
    lines = ["path,label,split"]
    for i in range(10):
        write_image(folder / f"{i}.jpg", i)
        label = "" if i == 4 else f"scene {i % 3}"
        lines.append(f"{i}.jpg,{label},{'train' if i % 5 < 3 else 'test'}")
    write_list(folder / "scenes.csv", lines)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Small files of the real layouts; torchvision is told not to compare their MD5."""
    root = tmp_path_factory.mktemp("roots")
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    ten = [f"kind {i}" for i in range(10)]
    write_cifar(
        root / "cifar-10-batches-py",
        [*batches, "test_batch"],
        "labels",
        ten,
        ("batches.meta", "label_names"),
    )
    write_cifar(
        root / "cifar-100-python",
        ["train", "test"],
        "fine_labels",
        [f"fine {i}" for i in range(100)],
        ("meta", "fine_label_names"),
    )
    write_stl10(root / "stl10_binary")
    write_imagenet(root / "imagenet")
    write_places365(root / "places365")
    write_places365(root / "places365-small", "256")
    write_voc(root / "voc2007" / "VOCdevkit" / "VOC2007", TARGETS["voc2007"].splits)
    write_voc(root / "voc2012" / "VOC2012", TARGETS["voc2012"].splits)
    write_ucf101(root / "ucf101")
    write_hmdb51(root / "hmdb51")
    for split, each in (("train", 3), ("test", 2)):
        for label, name in enumerate(("jump", "run")):
            for i in range(each):
                write_frames(root / "clips" / split / name / f"v{i}", 10 * label + i)
    write_manifest(root / "listed")
    with pytest.MonkeyPatch.context() as patch:
        for dataset in (datasets.CIFAR10, datasets.CIFAR100, datasets.STL10):
            for files in ("train_list", "test_list"):
                unchecked = [(name, None) for name, _ in getattr(dataset, files)]
                patch.setattr(dataset, files, unchecked)
            if dataset is not datasets.STL10:
                patch.setattr(dataset, "meta", dataset.meta | {"md5": None})
        yield root


# --- conformance ------------------------------------------------------------------------------

SIZES = {
    "cifar10 train": 5 * CIFAR_EACH,
    "cifar10 test": CIFAR_EACH,
    "cifar100 train": CIFAR_EACH,
    "cifar100 test": CIFAR_EACH,
    "stl10 train": STL_EACH,
    "stl10 test": STL_EACH,
    "stl10 unlabeled": STL_EACH,
    "imagenet train": 12,
    "imagenet val": 12,
    **{f"places365{kind} train": 9 for kind in ("", "-small")},
    **{f"places365{kind} val": 7 for kind in ("", "-small")},
    **{f"voc2007 {split}": len(VOC_OBJECTS) - 1 for split in TARGETS["voc2007"].splits},
    **{f"voc2012 {split}": len(VOC_OBJECTS) - 1 for split in TARGETS["voc2012"].splits},
    **{f"ucf101 train{fold}": 9 for fold in ("", 2, 3)},
    **{f"ucf101 test{fold}": 3 for fold in ("", 2, 3)},
    **{f"hmdb51 train{fold}": 8 for fold in ("", 2, 3)},
    **{f"hmdb51 test{fold}": 4 for fold in ("", 2, 3)},
    "shapes train": 2000,
    "shapes test": 500,
    "folder train": 60,
    "folder test": 24,
    "clips train": 6,
    "clips test": 4,
    "manifest train": 6,
    "manifest test": 4,
}
CASES = [f"{name} {split}" for name, info in TARGETS.items() for split in info.splits] + [
    f"{own} {split}" for own in ("folder", "clips", "manifest") for split in ("train", "test")
]


def opened(case: str, roots: Path, images: Path) -> Target:
    name, split = case.split()
    own = {"folder": images, "clips": roots / "clips", "manifest": roots / "listed" / "scenes.csv"}
    if name in own:
        return open_target(str(own[name]), split)
    root = roots / name if (roots / name).is_dir() else roots
    return open_target(name, split, root=root, partial=name == "imagenet")


def look(target: Target, sample: int) -> UInt8:
    """The sample's image, or its first frame."""
    return target.read_frames(sample, [0])[0] if target.clips else target.read(sample)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def target(case: str, roots: Path, images: Path) -> Target:
    """The target of the case, opened once."""
    return opened(case, roots, images)


def test_every_target_conforms(case: str, target: Target) -> None:
    n = SIZES[case]
    assert len(target) == len(target.labels) == len(target.ids) == n
    assert len(set(target.ids)) == n
    assert target.split == case.split()[1]

    classes = len(target.classes)
    assert len(set(target.classes)) == classes > 1
    assert target.labels.dtype == np.int64
    if target.multi_label:
        assert target.labels.shape == (n, classes)
        assert set(np.unique(target.labels)) <= {-1, 0, 1}
        assert (target.labels == 1).any()
    else:
        assert target.labels.shape == (n,)
        known = target.labels[target.labels != -1]
        assert (len(known) == 0) == (target.split == "unlabeled")
        assert ((known >= 0) & (known < classes)).all()
    for sample in (0, n - 1):
        text = target.label_text(sample)
        assert text is None or text.strip("()").split(", ")[0].strip("()") in target.classes

    assert (target.images is None) != (target.paths is None)
    assert (target.sizes is None) == (target.paths is None)
    if target.clips:
        assert target.frames is not None
        assert target.frames.dtype == np.int64
        assert target.frames.min() >= 1
        assert not target.damaged
    for sample in (0, n // 2, n - 1):
        image = look(target, sample)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.flags.c_contiguous
        np.testing.assert_array_equal(image, look(target, sample))
    assert not np.array_equal(look(target, 0), look(target, n - 1))

    identity = target.identity()
    assert list(identity) == ["name", "split", "size", "fingerprint"]
    assert identity["size"] == n
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", str(identity["fingerprint"]))


def test_opened_again_it_is_the_same(case: str, target: Target, roots: Path, images: Path) -> None:
    again = opened(case, roots, images)
    assert again.identity() == target.identity()
    assert list(again.ids) == list(target.ids)
    np.testing.assert_array_equal(again.labels, target.labels)


def test_the_fingerprint_sees_order_membership_and_size(target: Target) -> None:
    n = len(target)
    everything = np.arange(n)
    swapped = everything.copy()
    swapped[[0, 1]] = 1, 0
    others = [
        target.chosen(swapped),
        target.chosen(everything[:-1]),
        target.chosen(everything[1:]),
        target.chosen(np.append(everything, 0)),
    ]
    if target.sizes is not None:
        others.append(replace(target, sizes=target.sizes + (everything == 2)))
    else:
        assert target.images is not None
        pixels = target.images.copy()
        pixels[n - 1, -1, -1, -1] ^= 1
        others.append(replace(target, images=pixels))
    fingerprints = [target.fingerprint, *(other.fingerprint for other in others)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert target.chosen(everything).fingerprint == target.fingerprint


def test_a_limit_keeps_the_order_and_takes_all_classes_alike(target: Target) -> None:
    n = len(target)
    place = {sample: row for row, sample in enumerate(target.ids)}
    assert target.limited(None) is target
    assert target.limited(n) is target
    assert target.limited(10 * n) is target
    for limit in {1, min(5, n - 1), n - 1}:
        some = target.limited(limit)
        rows = [place[sample] for sample in some.ids]
        assert len(some) == limit
        assert rows == sorted(set(rows))
        if not target.multi_label:
            for label in set(target.labels.tolist()):
                share = limit * (target.labels == label).sum() / n
                assert abs((some.labels == label).sum() - share) < 1
        np.testing.assert_array_equal(some.labels, target.labels[rows])
        np.testing.assert_array_equal(look(some, limit - 1), look(target, rows[-1]))
        assert some.fingerprint != target.fingerprint
    with pytest.raises(InputError, match="--limit must be at least 1, found 0"):
        target.limited(0)


def test_every_row_names_a_real_split_and_policy() -> None:
    for name, info in TARGETS.items():
        assert info.evaluation in info.splits
        assert evaluation_split(DatasetSpec(name)) == info.evaluation
        assert default_policy(name) == parse_policy(info.policy).name
        assert info.splits[0] == "train"


# --- what the loaders read --------------------------------------------------------------------


def test_cifar_images_and_labels_are_the_files(roots: Path) -> None:
    for name, key in (("cifar10", "kind"), ("cifar100", "fine")):
        target = open_target(name, "train", root=roots)
        assert target.images is not None
        np.testing.assert_array_equal(target.images[:CIFAR_EACH], noise(0, CIFAR_EACH, 32, 32, 3))
        assert target.labels[:3].tolist() == [0, 1, 2]
        assert target.classes[0] == f"{key} 0"
    last = open_target("cifar10", "train", root=roots)
    np.testing.assert_array_equal(last.read(4 * CIFAR_EACH), noise(4, CIFAR_EACH, 32, 32, 3)[0])
    assert len(last.classes) == 10
    assert len(open_target("cifar100", "test", root=roots).classes) == 100


def test_stl10_images_are_upright_and_labels_start_at_zero(roots: Path) -> None:
    target = open_target("stl10", "test", root=roots)
    assert target.images is not None
    np.testing.assert_array_equal(target.images, noise(101, STL_EACH, 96, 96, 3))
    assert target.labels.tolist() == [i % 10 for i in range(STL_EACH)]
    assert target.classes[0] == "airplane"


def test_real_stl10_images_through_its_binary_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((data / "stl10" / "labeled_examples").glob("original_*_*.png"))
    images = np.stack([read_image(file) for file in files])
    write_stl10(tmp_path / "stl10_binary")
    images.transpose(0, 3, 2, 1).tofile(tmp_path / "stl10_binary" / "train_X.bin")
    np.arange(1, 11, dtype=np.uint8).tofile(tmp_path / "stl10_binary" / "train_y.bin")
    unchecked = [(name, None) for name, _ in datasets.STL10.train_list]
    monkeypatch.setattr(datasets.STL10, "train_list", unchecked)
    target = open_target("stl10", root=tmp_path)
    assert [target.label_text(i) for i in range(10)] == [f.name.split("_")[1] for f in files]
    assert target.images is not None
    np.testing.assert_array_equal(target.images, images)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_splits_of_one_target_differ(name: str, roots: Path) -> None:
    splits = TARGETS[name].splits
    prints = {open_target(name, split, root=roots).fingerprint for split in splits}
    assert len(prints) == len(splits)


# --- what is missing --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_missing_data_names_the_expected_layout(name: str, tmp_path: Path) -> None:
    layout = re.escape(TARGETS[name].layout)
    with pytest.raises(MissingData, match=rf"no data of {name} in data \(default\): .*{layout}"):
        open_target(name)
    with pytest.raises(MissingData, match=layout) as caught:
        open_target(name, "test", root=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name} test not found under {tmp_path}")
    assert "--download" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("cifar10", "cifar-10-batches-py/batches.meta"),
        ("cifar100", "cifar-100-python/train"),
        ("stl10", "stl10_binary/train_X.bin"),
    ],
)
def test_one_missing_file_is_missing_data(
    name: str, file: str, roots: Path, tmp_path: Path
) -> None:
    shutil.copytree(roots, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink()
    with pytest.raises(MissingData, match=re.escape(TARGETS[name].layout)):
        open_target(name, "train", root=tmp_path)


def test_other_files_than_the_published_ones_are_refused(
    roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = [["train", "16019d7e3df5f24257cddd939b257f8d"]]
    open_target("cifar100", "train", root=roots)
    monkeypatch.setattr(datasets.CIFAR100, "train_list", published)
    with pytest.raises(MissingData, match="cifar100 train not found"):
        open_target("cifar100", "train", root=roots)


def test_unknown_names_list_the_known_ones(roots: Path) -> None:
    with pytest.raises(
        UnknownName, match=r"unknown target 'cifar11'; known: cifar10, .*DIR.*CLASS"
    ):
        open_target("cifar11", root=roots)
    with pytest.raises(UnknownName, match="unknown split of stl10 'val'; known: train, test, unl"):
        open_target("stl10", "val", root=roots)


# --- folders ----------------------------------------------------------------------------------


def write_files(folder: Path, *names: str) -> None:
    """A tiny image under each name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_images(path.parent, noise(len(name), 1, 4, 5, 3))
        (path.parent / "0000.png").rename(path)


def test_names_are_sorted_by_their_bytes(tmp_path: Path) -> None:
    names = ["B/2.png", "B/10.png", "a/Z.png", "a/a.png", "a/é.png", "é/x.png", "C d/x.png"]
    write_files(tmp_path / "train", *names)
    target = open_target(str(tmp_path))
    assert target.classes == ("B", "C d", "a", "é")
    assert list(target.ids) == sorted(names, key=str.encode)
    assert list(target.ids)[:3] == ["B/10.png", "B/2.png", "C d/x.png"]
    assert target.labels.tolist() == [0, 0, 1, 2, 2, 2, 3]


def test_bytes_and_not_characters_are_compared(tmp_path: Path) -> None:
    """A byte that is no UTF-8 becomes a character below the emoji, but as a byte it is above."""
    odd = os.fsdecode(b"\xff")
    write_files(tmp_path, f"{odd}/x.png", "😀/x.png", f"😀/{odd}.png", "😀/😀.png")
    target = open_target(str(tmp_path))
    assert target.classes == ("😀", odd)
    assert list(target.ids) == ["😀/x.png", "😀/😀.png", f"😀/{odd}.png", f"{odd}/x.png"]


def test_a_name_that_is_no_utf8_is_kept(tmp_path: Path) -> None:
    write_files(tmp_path / "train", "a/x.png", "b/x.png")
    folder = tmp_path / "train" / "a"
    shutil.copy(folder / "x.png", folder / os.fsdecode(b"\xff.png"))
    target = open_target(str(tmp_path))
    assert os.fsencode(target.ids[1]) == b"a/\xff.png"
    assert target.read(1).shape == (4, 5, 3)
    assert target.fingerprint != target.limited(1).fingerprint


def test_what_is_left_out_is_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = tmp_path / "train"
    write_files(train, "a/x.PNG", "a/.hidden.png", "a/.dir/y.png", ".c/x.png", "b/x.png")
    target = open_target(str(tmp_path))
    assert (target.classes, list(target.ids)) == (("a", "b"), ["a/x.PNG", "b/x.png"])
    assert not caplog.records
    write_files(train, "@eaDir/x/y.png", "a/@eaDir/x.PNG/SYNOPHOTO_THUMB.png", "loose.png")
    write_files(train, "a/one", "b/deep/two", "b/three.svg", "b/Thumbs.db")
    (train / "a" / "notes.txt").write_text("no image")
    (train / "README").write_text("no folder")
    assert open_target(str(tmp_path)).identity() == target.identity()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"left out of {train}: 3 without an ending, 2 @eaDir folders, 1 beside the class "
        "folders, 1 .txt, 1 .svg; images and clips are known by their endings, a manifest "
        "can name others"
    )


@pytest.mark.parametrize("ending", ["jfif", "jpe", "avif"])
def test_uncommon_endings_are_samples(ending: str, tmp_path: Path) -> None:
    write_files(tmp_path, "a/x.png", "b/x.png")
    (tmp_path / "b" / "x.png").rename(tmp_path / "b" / f"x.{ending}")
    assert list(open_target(str(tmp_path)).ids) == ["a/x.png", f"b/x.{ending}"]


SPLITS_IN_WORDS = [
    ("Train", "Test"),
    ("TRAIN", "VAL"),
    ("Training", "Testing"),
    ("training", "validation"),
    ("seg_train", "seg_test"),
    ("seg_train/seg_train", "seg_test/seg_test"),
    ("train", "valid"),
]


@pytest.mark.parametrize(("train", "test"), SPLITS_IN_WORDS)
def test_splits_are_found_in_any_case_and_by_their_usual_names(
    train: str, test: str, tmp_path: Path
) -> None:
    write_files(tmp_path / train, "a/x.png", "b/y.png", "b/z.png")
    write_files(tmp_path / test, "a/x.png", "b/y.png")
    target = open_target(str(tmp_path))
    assert (target.split, target.classes, len(target)) == ("train", ("a", "b"), 3)
    split = evaluation_split(DatasetSpec(str(tmp_path)))
    assert split in ("test", "val", "validation")
    assert len(open_target(str(tmp_path), split)) == 2
    with pytest.raises(MissingData, match="no folder"):
        open_target(str(tmp_path), "val" if split == "test" else "test")


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["images/a/x.png", "images/b/x.png"], r"one class folder, images; .*--target .*/images$"),
        (["photos/x.png"], r"one class folder, photos; .*of images without labels.*--target"),
        (["x.png", "masks/x.png"], r"one class folder, masks; .*1 images .* move masks away"),
        (["Training/a/x.png", "train_2/x.png", "Train/b/x.png"], "folders Train, Training, each"),
        (["test/a/x.png", "a/x.png"], "has a folder test but no folder train; .*--split"),
        (["Val/x.png", "a/x.png"], "has a folder Val but no folder train; .*rename"),
        (["train/train/x.png", "train/test/x.png"], "a folder test, which is the name of a split"),
        (["train/x.png", "car/x.png"], r"If train is a class like car .*/train/CLASS"),
    ],
)
def test_what_is_no_set_of_classes_is_refused_with_the_likely_cause(
    files: list[str], what: str, tmp_path: Path
) -> None:
    write_files(tmp_path, *files)
    with pytest.raises(MissingData, match=what) as caught:
        open_target(str(tmp_path))
    assert "expected DIR[/SPLIT]/CLASS/FILE" in str(caught.value) or "rename" in str(caught.value)


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    write_files(tmp_path / "one", "train/car/x.png", "train/plane/x.png", "train/train/x.png")
    assert open_target(str(tmp_path / "one")).classes == ("car", "plane", "train")
    write_files(tmp_path / "two", "car/x.png", "plane/x.png", "Train/x.png")
    assert open_target(str(tmp_path / "two")).classes == ("Train", "car", "plane")


@pytest.mark.parametrize("split", ["", "train", "Test"])
def test_a_folder_without_class_folders_has_no_labels(split: str, tmp_path: Path) -> None:
    write_files(tmp_path / split, "b.png", "a.jpg")
    target = open_target(str(tmp_path), split.casefold() or "train")
    assert list(target.ids) == ["a.jpg", "b.png"]
    assert (target.classes, target.labels.tolist()) == ((), [-1, -1])
    assert target.label_text(0) is None
    assert target.read(1).shape == (4, 5, 3)


def test_nested_files_belong_to_the_outer_class(tmp_path: Path) -> None:
    write_files(tmp_path / "train", "a/one/x.png", "a/two/deep/x.png", "a/b.png", "b/x.png")
    target = open_target(str(tmp_path))
    assert list(target.ids) == ["a/b.png", "a/one/x.png", "a/two/deep/x.png", "b/x.png"]
    assert target.labels.tolist() == [0, 0, 0, 1]
    assert target.read(2).shape == (4, 5, 3)


def test_train_may_be_the_folder_itself(tmp_path: Path) -> None:
    write_files(tmp_path, "a/x.png", "b/x.png")
    target = open_target(str(tmp_path))
    assert target.classes == ("a", "b")
    assert target.name == tmp_path.name
    with pytest.raises(MissingData, match=re.escape(f"no folder {tmp_path / 'test'}; expected ")):
        open_target(str(tmp_path), "test")


def test_where_the_folder_lies_does_not_matter(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "elsewhere" / images.name)
    moved = open_target(str(tmp_path / "elsewhere" / images.name))
    assert moved.identity() == open_target(str(images)).identity()
    assert open_target(f"{images}/").identity() == open_target(str(images)).identity()


def test_a_file_of_another_size_changes_the_fingerprint(tmp_path: Path) -> None:
    write_files(tmp_path, "a/x.png", "b/x.png")
    before = open_target(str(tmp_path)).fingerprint
    with (tmp_path / "a" / "x.png").open("ab") as file:
        file.write(b"!")
    assert open_target(str(tmp_path)).fingerprint != before


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    write_files(tmp_path / "train", "a/x.png")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "empty" / "notes.txt").touch()
    folder = re.escape(str(tmp_path / "train" / "empty"))
    with pytest.raises(MissingData, match=rf"class folder {folder} holds no image \(.*\.png"):
        open_target(str(tmp_path))


def test_folders_without_classes_or_at_all_name_the_layout(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.txt").touch()
    layout = re.escape("expected DIR[/SPLIT]/CLASS/FILE")
    expected = rf"no class folders in .*train.*left out: \.txt; {layout}"
    with pytest.raises(MissingData, match=expected):
        open_target(str(tmp_path))
    with pytest.raises(MissingData, match=f"no folder .*nowhere; {layout}"):
        open_target(str(tmp_path / "nowhere"))
    with pytest.raises(MissingData, match=f"no folder .*nowhere; {layout}"):
        open_target(str(tmp_path / "nowhere"), "test")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "images.zip"
    file.touch()
    with pytest.raises(MissingData, match=re.escape(f"{file} is a file; expected DIR")):
        open_target(str(file))


def test_a_broken_link_is_named_and_not_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, "a/x.png", "b/x.png")
    for link in (tmp_path / "a" / "y.png", tmp_path / "c", tmp_path / "b" / "folder"):
        link.symlink_to(tmp_path / "nowhere")
        expected = re.escape(f"broken link {link} (No such file or directory); remove it, or put")
        with pytest.raises(MissingData, match=expected):
            open_target(str(tmp_path))
        link.unlink()
    itself = tmp_path / "a" / "itself"
    itself.symlink_to(itself)
    with pytest.raises(MissingData, match=r"broken link .*itself.*symbolic links"):
        open_target(str(tmp_path))


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", "x.png", "deep/y.png")
    data = tmp_path / "data"
    write_files(data, "a/x.png")
    (data / "b").symlink_to(tmp_path / "elsewhere")
    (data / "a" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (data / "a" / "z.png").symlink_to(data / "a" / "x.png")
    target = open_target(str(data))
    assert list(target.ids) == ["a/again/y.png", "a/x.png", "a/z.png", "b/deep/y.png", "b/x.png"]
    assert target.sizes is not None
    assert target.sizes[1] == target.sizes[2] > 0

    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MissingData, match=r"up/deep lies in itself, through a link; remove"):
        open_target(str(data))
    (tmp_path / "elsewhere" / "deep" / "up").unlink()
    (data / "a" / "to_b").symlink_to(data / "b")
    (tmp_path / "elsewhere" / "to_a").symlink_to(data / "a")
    with pytest.raises(MissingData, match="lies in itself"):
        open_target(str(data))


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    """A pipe that is named like an image would hang its reader for ever."""
    write_files(tmp_path, "a/x.png", "b/x.png")
    os.mkfifo(tmp_path / "a" / "y.png")
    with pytest.raises(MissingData, match=r"a/y\.png is no file that can be read"):
        open_target(str(tmp_path))


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of somebody who is not root, for whom permissions do not count."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield folder
        finally:
            for path in [folder, *folder.rglob("*")]:
                if path.is_dir():
                    path.chmod(0o755)
            os.seteuid(os.getuid())


@pytest.mark.parametrize("mode", [0o000, 0o444])
@pytest.mark.parametrize("closed", ["data", "data/train", "data/train/a", "data/train/a/deep"])
def test_what_may_not_be_read_is_named(closed: str, mode: int, unprivileged: Path) -> None:
    write_files(unprivileged / "data" / "train", "a/x.png", "a/deep/y.png", "b/x.png")
    (unprivileged / closed).chmod(mode)
    with pytest.raises(
        MissingData, match=r"cannot (read|open) .*data.*: Permission denied"
    ) as caught:
        open_target(str(unprivileged / "data"))
    assert "\n" not in str(caught.value)


def test_a_folder_of_clips(tmp_path: Path) -> None:
    """Files and folders of frames are clips; a folder of frames is one sample."""
    for name in ("run/b.AVI", "run/deep/c.mp4", "jump/x.webm"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100 + len(name)))
    write_frames(tmp_path / "train" / "run" / "a (1)", 5, 4)
    (tmp_path / "train" / "run" / "a (1)" / "n_frames").write_text("4")
    (tmp_path / "train" / "run" / "notes.txt").write_text("no clip")
    target = open_folder(DatasetSpec(str(tmp_path), decoder="decord"))
    assert target.clips
    assert target.decoder == "decord"
    assert target.classes == ("jump", "run")
    assert list(target.ids) == ["jump/x.webm", "run/a (1)", "run/b.AVI", "run/deep/c.mp4"]
    assert target.labels.tolist() == [0, 1, 1, 1]
    frames = tmp_path / "train" / "run" / "a (1)"
    assert target.sizes is not None
    assert target.sizes.tolist() == [111, sum(p.stat().st_size for p in frames.iterdir()), 109, 114]
    assert target.paths is not None
    assert target.paths[1] == frames
    before = target.fingerprint
    with (frames / "image_00002.jpg").open("ab") as file:
        file.write(b"!")
    assert open_folder(DatasetSpec(str(tmp_path))).fingerprint != before


def test_images_beside_clips_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "a/x.png", "b/x.png")
    (tmp_path / "b" / "y.avi").write_bytes(b"clip")
    expected = r"holds images \(a/x.png\) and clips \(b/y.avi\); expected one kind"
    with pytest.raises(MissingData, match=expected):
        open_target(str(tmp_path))
    (tmp_path / "b" / "y.avi").unlink()
    write_frames(tmp_path / "b" / "frames", 1)
    with pytest.raises(MissingData, match=r"images \(a/x.png\) and clips \(b/frames\)"):
        open_target(str(tmp_path))


def test_a_slow_file_system_gives_the_same_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the work is spread over threads, from the first chunk on that took too long."""
    names = [f"{i:03d}.jpg" for i in range(3 * listing.CHUNK + 5)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(i))
    threads = set()
    look_at = os.stat

    def noted(path: str, **options: bool) -> os.stat_result:
        threads.add(threading.get_ident())
        return look_at(path, **options)

    monkeypatch.setattr(os, "stat", noted)
    asked = [*names, "nowhere.jpg", str(tmp_path / names[7]), ".", "a\0b", "x" * 300]
    expected = [*range(len(names)), listing.MISSING, 7, listing.FOLDER, *[listing.MISSING] * 2]
    assert listing.sizes_of(tmp_path, asked).tolist() == expected
    assert len(threads) == 1
    monkeypatch.setattr(listing, "SLOW_SECONDS", 0)
    assert listing.sizes_of(tmp_path, asked).tolist() == expected
    assert len(threads) > 1


def test_the_evaluation_split_of_a_folder_is_the_one_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"no test or val folder in .*--test-split none"):
        evaluation_split(DatasetSpec(str(tmp_path)))
    (tmp_path / "rows.csv").write_text("path,label,split\n0.jpg,a,train\n")
    with pytest.raises(MissingData, match=r"no rows of a split test or val in .*rows.csv; add"):
        evaluation_split(DatasetSpec(str(tmp_path / "rows.csv")))
    (tmp_path / "val").mkdir()
    assert evaluation_split(DatasetSpec(str(tmp_path))) == "val"
    (tmp_path / "test").mkdir()
    assert evaluation_split(DatasetSpec(str(tmp_path))) == "test"
    assert default_policy(str(tmp_path)) == "random-resized-crop-flip"


def test_real_cifar_jpegs_as_a_folder(cifar: Path) -> None:
    train, test = open_target(str(cifar)), open_target(str(cifar), "test")
    assert (len(train), len(test)) == (2000, 500)
    assert train.classes == test.classes
    assert np.bincount(train.labels).tolist() == [200] * 10
    assert {train.read(i).shape for i in range(0, 2000, 100)} == {(32, 32, 3)}


@pytest.mark.parametrize("kind", ["folder", "manifest"])
def test_samples_without_labels_are_cached_and_not_trained_on(
    kind: str, tmp_path: Path, sskt: Callable[..., tuple[int, str, str]]
) -> None:
    """In a folder of an odd name, too."""
    folder = tmp_path / "photos #1 (\u00fc)+%20"
    write_files(folder, *(f"x #{i} ?.png" for i in range(4)))
    target = folder
    if kind == "manifest":
        target = folder / "a#b.csv"
        target.write_text("path\n" + "".join(f"x #{i} ?.png\n" for i in range(4)))
    cache = tmp_path / "labels #2"
    common = ["--target", target, "--cache", cache, "--policy", "pad-crop-flip", "--workers", 0]
    made = sskt("cache-teachers", "--source", f"t={TINY}:build", "--seeds", 1, *common)
    assert made[0] == 0, made
    assert sskt("verify", "--cache", cache)[0] == 0
    status, _, err = sskt("train", "--source", "t", "--test-split", "none", *common)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{target} train has no labels to train the target task on" in err
