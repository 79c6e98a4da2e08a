"""Targets: every row of the table passes one conformance test; folders are read in one order."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import write_images
from torchvision import datasets

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.images import UInt8
from sskt.teacher_cache.targets import (
    TARGETS,
    Target,
    default_policy,
    evaluation_split,
    open_target,
)
from sskt.teacher_cache.views import parse_policy

CIFAR_EACH, STL_EACH = 8, 12


def noise(seed: int, *shape: int) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_cifar(
    folder: Path, files: list[str], label_key: str, classes: list[str], meta: tuple[str, str]
) -> None:
    """Pickled batches: ``data`` is [n, 3072], all red, then all green, then all blue."""
    folder.mkdir(parents=True)
    for number, name in enumerate(files):
        pictures = noise(number, CIFAR_EACH, 32, 32, 3)
        batch = {
            "batch_label": name,
            label_key: [(number + i) % len(classes) for i in range(CIFAR_EACH)],
            "data": pictures.transpose(0, 3, 1, 2).reshape(CIFAR_EACH, -1),
            "filenames": [f"{i}.png" for i in range(CIFAR_EACH)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: classes}, protocol=2))


def write_stl10(folder: Path) -> None:
    """uint8 pictures [n, 3, 96, 96] stored column by column, labels from 1, no unlabeled y."""
    folder.mkdir(parents=True)
    for number, split in enumerate(("train", "test", "unlabeled")):
        pictures = noise(100 + number, STL_EACH, 96, 96, 3)
        pictures.transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            labels = np.arange(STL_EACH, dtype=np.uint8) % 10 + 1
            labels.tofile(folder / f"{split}_y.bin")
    names = "airplane bird car cat deer dog horse monkey ship truck"
    (folder / "class_names.txt").write_text(names.replace(" ", "\n") + "\n")
    (folder / "fold_indices.txt").write_text("0 1 2\n" * 10)


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
    "shapes train": 2000,
    "shapes test": 500,
    "folder train": 60,
    "folder test": 24,
}
CASES = [f"{name} {split}" for name, info in TARGETS.items() for split in info.splits] + [
    "folder train",
    "folder test",
]


def opened(case: str, roots: Path, images: Path) -> Target:
    name, split = case.split()
    if name == "folder":
        return open_target(str(images), split)
    return open_target(name, split, root=roots)


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

    assert target.labels.dtype == np.int64
    assert target.labels.shape == (n,)
    assert len(set(target.classes)) == len(target.classes) > 1
    if target.split == "unlabeled":
        assert (target.labels == -1).all()
    else:
        assert target.labels.min() >= 0
        assert target.labels.max() < len(target.classes)

    assert (target.images is None) != (target.paths is None)
    for sample in (0, n // 2, n - 1):
        picture = target.read(sample)
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        assert picture.flags.c_contiguous
        np.testing.assert_array_equal(picture, target.read(sample))
    assert not np.array_equal(target.read(0), target.read(n - 1))

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
        others.append(replace(target, sizes=target.sizes + (everything == 3)))
    else:
        assert target.images is not None
        pixels = target.images.copy()
        pixels[n - 1, -1, -1, -1] ^= 1
        others.append(replace(target, images=pixels))
    fingerprints = [target.fingerprint, *(other.fingerprint for other in others)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert target.chosen(everything).fingerprint == target.fingerprint


def test_a_limit_is_spread_evenly_over_the_order(target: Target) -> None:
    n = len(target)
    assert target.limited(None) is target
    assert target.limited(n) is target
    assert target.limited(10 * n) is target
    for limit in (1, 5, n - 1):
        some = target.limited(limit)
        rows = [list(target.ids).index(sample) for sample in some.ids]
        assert len(some) == limit
        steps = np.diff([*rows, n])
        assert rows[0] == 0
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1
        np.testing.assert_array_equal(some.labels, target.labels[rows])
        np.testing.assert_array_equal(some.read(limit - 1), target.read(rows[-1]))
        assert some.fingerprint != target.fingerprint
    with pytest.raises(InputError, match="--limit must be at least 1, found 0"):
        target.limited(0)


def test_every_row_names_a_real_split_and_policy() -> None:
    for name, info in TARGETS.items():
        assert info.evaluation in info.splits
        assert evaluation_split(name) == info.evaluation
        assert default_policy(name) == parse_policy(info.policy).name
        assert info.splits[0] == "train"


# --- what the loaders read --------------------------------------------------------------------


def test_cifar_pictures_and_labels_are_the_files(roots: Path) -> None:
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


def test_stl10_pictures_are_upright_and_labels_start_at_zero(roots: Path) -> None:
    target = open_target("stl10", "test", root=roots)
    assert target.images is not None
    np.testing.assert_array_equal(target.images, noise(101, STL_EACH, 96, 96, 3))
    assert target.labels.tolist() == [i % 10 for i in range(STL_EACH)]
    assert target.classes[0] == "airplane"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_splits_of_one_target_differ(name: str, roots: Path) -> None:
    splits = TARGETS[name].splits
    prints = {open_target(name, split, root=roots).fingerprint for split in splits}
    assert len(prints) == len(splits)


# --- what is missing --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_missing_data_names_the_expected_layout(name: str, tmp_path: Path) -> None:
    layout = re.escape(TARGETS[name].layout)
    with pytest.raises(MissingData, match=f"target {name} needs --root.*{layout}"):
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
    """A tiny picture under each name."""
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
    write_files(tmp_path / "train", "a/x.png")
    folder = tmp_path / "train" / "a"
    shutil.copy(folder / "x.png", folder / os.fsdecode(b"\xff.png"))
    target = open_target(str(tmp_path))
    assert os.fsencode(target.ids[1]) == b"a/\xff.png"
    assert target.read(1).shape == (4, 5, 3)
    assert target.fingerprint != target.limited(1).fingerprint


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    write_files(tmp_path / "train", "a/x.PNG", "a/.hidden.png", "a/.dir/y.png", ".c/x.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "README").write_text("no folder")
    target = open_target(str(tmp_path))
    assert target.classes == ("a",)
    assert list(target.ids) == ["a/x.PNG"]


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
    write_files(tmp_path / "train", "x.png")
    layout = re.escape("expected DIR[/SPLIT]/CLASS/IMAGE")
    with pytest.raises(MissingData, match=f"no class folders in .*train; {layout}"):
        open_target(str(tmp_path))
    with pytest.raises(MissingData, match=f"no folder .*nowhere; {layout}"):
        open_target(str(tmp_path / "nowhere"))
    with pytest.raises(MissingData, match=f"no folder .*nowhere; {layout}"):
        open_target(str(tmp_path / "nowhere"), "test")


def test_the_evaluation_split_of_a_folder_is_the_one_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"no test or val folder in .*--test-split none"):
        evaluation_split(str(tmp_path))
    (tmp_path / "val").mkdir()
    assert evaluation_split(str(tmp_path)) == "val"
    (tmp_path / "test").mkdir()
    assert evaluation_split(str(tmp_path)) == "test"
    assert default_policy(str(tmp_path)) == "random-resized-crop-flip"


def test_real_cifar_jpegs_as_a_folder(cifar: Path) -> None:
    train, test = open_target(str(cifar)), open_target(str(cifar), "test")
    assert (len(train), len(test)) == (2000, 500)
    assert train.classes == test.classes
    assert np.bincount(train.labels).tolist() == [200] * 10
    assert {train.read(i).shape for i in range(0, 2000, 100)} == {(32, 32, 3)}
