"""ImageNet, Places365 and PASCAL VOC: their layouts, labels, and what is missing or damaged."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layouts import (
    SCENES,
    VOC_OBJECTS,
    WNIDS,
    annotation,
    write_image,
    write_imagenet,
    write_list,
    write_places365,
    write_voc,
)
from torchvision import datasets

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.sources.registry import imagenet_classes
from sskt.teacher_cache.targets import image_datasets as images
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.registry import TARGETS
from sskt.teacher_cache.targets.voc import VOC_CLASSES, voc_labels

FILES = ("imagenet", "places365", "places365-small", "voc2007", "voc2012")


# --- every target of files --------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root for each name."""
    folder = tmp_path_factory.mktemp("made")
    write_imagenet(folder / "imagenet")
    write_places365(folder / "places365")
    write_places365(folder / "places365-small", "256")
    for name in ("voc2007", "voc2012"):
        write_voc(folder / name / name.upper(), TARGETS[name].splits)
    return folder


def opened(name: str, root: Path, split: str = "train") -> Target:
    return open_target(name, split, root=root, partial=name == "imagenet")


@pytest.mark.parametrize("name", FILES)
def test_the_fingerprint_is_that_of_the_files_and_not_of_the_folder(
    name: str, made: Path, tmp_path: Path
) -> None:
    before = opened(name, made / name)
    root = tmp_path / "elsewhere" / "data"
    shutil.copytree(made / name, root)
    for path in root.rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    after = opened(name, root)
    assert after.identity() == before.identity()
    assert list(after.ids) == list(before.ids)


@pytest.mark.parametrize("name", FILES)
def test_the_fingerprint_changes_with_each_file(name: str, made: Path, tmp_path: Path) -> None:
    """Renamed, longer, gone, new: in the folder and, where there is one, in the list."""
    before = opened(name, made / name)
    assert before.paths is not None
    first = before.paths[0].relative_to(made / name)
    listed = {
        "imagenet": None,
        "voc2007": "VOC2007/ImageSets/Main/train.txt",
        "voc2012": "VOC2012/ImageSets/Main/train.txt",
    }.get(name, "places365_train_standard.txt")
    other = first.with_name("n01443537_9.JPEG" if name == "imagenet" else f"9{first.name}")

    def relist(root: Path, *, drop: bool = False, add: bool = False) -> None:
        if listed is None:
            return
        lines = (root / listed).read_text().splitlines()
        new = lines[0].replace(first.stem, other.stem)
        (root / listed).write_text("\n".join(lines[drop:] + [new] * add) + "\n")
        note = root / first.parents[1] / "Annotations" / f"{first.stem}.xml"
        if add and note.exists():
            shutil.copy(note, note.with_name(f"{other.stem}.xml"))

    def renamed(root: Path) -> None:
        (root / first).rename(root / other)
        relist(root, drop=True, add=True)

    def longer(root: Path) -> None:
        with (root / first).open("ab") as file:
            file.write(b"!")

    def gone(root: Path) -> None:
        (root / first).unlink()
        relist(root, drop=True)

    def new(root: Path) -> None:
        shutil.copy(root / first, root / other)
        relist(root, add=True)

    fingerprints = [before.fingerprint]
    for change in (renamed, longer, gone, new):
        root = tmp_path / change.__name__
        shutil.copytree(made / name, root)
        change(root)
        fingerprints.append(opened(name, root).fingerprint)
    assert len(set(fingerprints)) == 5


@pytest.mark.parametrize("name", FILES)
def test_nothing_there_names_the_layout(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for root in (tmp_path / "nowhere", tmp_path, file):
        for partial in (False, True):
            with pytest.raises(MissingData) as caught:
                open_target(name, root=root, partial=partial)
            message = str(caught.value)
            assert message.startswith(f"{name} train not found under {root} (")
            assert message.endswith(f"; expected {TARGETS[name].layout}; {TARGETS[name].get}")
            assert "\n" not in message
    with pytest.raises(MissingData, match=f"no data of {name} in data"):
        open_target(name)


# --- ImageNet ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 1,000 classes with one and the same image."""
    root = tmp_path_factory.mktemp("imagenet")
    write_image(root / "image.jpg", 1)
    for split in ("train", "val"):
        for wnid in WNIDS:
            (root / split / wnid).mkdir(parents=True)
            os.link(root / "image.jpg", root / split / wnid / f"{wnid}_1.JPEG")
    return root


@pytest.fixture
def small_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if one image a class was all that was published."""
    monkeypatch.setattr(images, "IMAGENET_FILES", {"train": 1000, "val": 1000})


def test_wnids_are_torchvisions_categories(data: Path) -> None:
    assert len(WNIDS) == len(set(WNIDS)) == 1000
    assert list(WNIDS) == sorted(WNIDS)
    names = imagenet_classes()
    found = 0
    for path in (data / "imagenet").glob("n*.JPEG"):
        wnid, _, name = path.stem.partition("_")
        # "maillot" and "crane" are two classes each; torchvision tells them apart in words
        found += names[WNIDS.index(wnid)].split(",")[0].startswith(name.replace("_", " "))
    assert found == 100


def test_real_imagenet_images_in_class_folders(data: Path, tmp_path: Path) -> None:
    files = sorted((data / "imagenet").glob("n*.JPEG"))
    for path in files:
        folder = tmp_path / "val" / path.name.partition("_")[0]
        folder.mkdir(parents=True)
        (folder / path.name).symlink_to(path)
    target = open_target("imagenet", "val", root=tmp_path, partial=True)
    assert len(target) == 100
    assert target.classes == imagenet_classes()
    assert list(target.ids) == [f"{p.name.partition('_')[0]}/{p.name}" for p in files]
    assert [WNIDS[label] for label in target.labels] == [p.name[:9] for p in files]
    assert target.label_text(0) == "goldfish"
    assert target.sizes is not None
    assert target.sizes.tolist() == [path.stat().st_size for path in files]
    for sample in (0, 50, 99):
        assert target.read(sample).shape[2] == 3
    with pytest.raises(MissingData, match=r"900 of the 1,000 class folders of .*val are missing"):
        open_target("imagenet", "val", root=tmp_path)


@pytest.mark.usefixtures("small_imagenet")
def test_all_classes_in_label_order(whole: Path) -> None:
    for split in ("train", "val"):
        target = open_target("imagenet", split, root=whole)
        assert target.labels.tolist() == list(range(1000))
        assert list(target.ids) == [f"{wnid}/{wnid}_1.JPEG" for wnid in WNIDS]


@pytest.mark.usefixtures("small_imagenet")
def test_kaggles_folders_give_the_same_target(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "ILSVRC" / "Data").mkdir(parents=True)
    (tmp_path / "ILSVRC" / "Data" / "CLS-LOC").symlink_to(whole)
    found = open_target("imagenet", root=tmp_path).identity()
    assert found == open_target("imagenet", root=whole).identity()


def test_an_incomplete_imagenet_is_refused_unless_partial(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingData, match=r"holds 1,000 images, expected 1,281,167; .*--partial"):
        open_target("imagenet", root=whole)
    with pytest.raises(MissingData, match="holds 1,000 images, expected 50,000"):
        open_target("imagenet", "val", root=whole)
    monkeypatch.setattr(images, "IMAGENET_FILES", {"train": 1000})
    shutil.copytree(whole / "train", tmp_path / "train", copy_function=os.link)
    for wnid in WNIDS[7::10]:
        (tmp_path / "train" / wnid / f"{wnid}_1.JPEG").unlink()
    shutil.rmtree(tmp_path / "train" / WNIDS[5])
    expected = f"101 of the 1,000 class folders of .* missing or empty, first {WNIDS[5]}; .*partial"
    with pytest.raises(MissingData, match=expected):
        open_target("imagenet", root=tmp_path)
    target = open_target("imagenet", root=tmp_path, partial=True)
    assert len(target) == 899
    assert target.labels.tolist() == [i for i in range(1000) if i != 5 and i % 10 != 7]


def test_what_is_not_imagenet_is_refused(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (tmp_path / "train" / "goldfish").mkdir()
    with pytest.raises(InputError, match=r"train/goldfish is no class of ImageNet-1k .*n01440764"):
        open_target("imagenet", root=tmp_path, partial=True)
    write_image(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    with pytest.raises(InputError, match=r"class folders and a loose image \(ILSVRC2012_val"):
        open_target("imagenet", "val", root=tmp_path, partial=True)


# Image n of the flat folder is of this class, and of this number in the devkit.
FLAT = [3, 999, 3, 0, 512, 77]
DEVKIT_ID = np.random.default_rng(0).permutation(1000) + 1


def write_devkit(folder: Path) -> None:
    """meta.mat as published: leaves with shuffled ids 1 ... 1000, then synsets above them."""
    scipy = pytest.importorskip("scipy.io", reason="needs sskt[imagenet]")
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    rows = [(float(DEVKIT_ID[i]), wnid, "a, b", "gloss", 0.0) for i, wnid in enumerate(WNIDS)]
    rows = [rows[i] for i in np.argsort(DEVKIT_ID)]
    rows += [(1000.0 + i, f"n{i:08d}", "above", "gloss", 5.0) for i in range(1, 8)]
    synsets = np.array(rows, dtype=[(name, object) for name in fields])
    folder.mkdir(parents=True)
    scipy.savemat(folder / "meta.mat", {"synsets": synsets[:, None]})
    truth = [str(DEVKIT_ID[label]) for label in FLAT]
    write_list(folder / "ILSVRC2012_validation_ground_truth.txt", truth)


def write_flat(folder: Path, rows: Sequence[int] = range(len(FLAT))) -> None:
    for i in rows:
        write_image(folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG", i)


def test_flat_val_with_the_devkit(tmp_path: Path) -> None:
    write_flat(tmp_path / "val")
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    write_devkit(devkit)
    target = open_target("imagenet", "val", root=tmp_path)
    assert target.labels.tolist() == FLAT
    assert list(target.ids) == [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)]

    (tmp_path / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    expected = r"1 of 6 files of .*data are missing, first ILSVRC2012_val_00000002; .*--partial"
    with pytest.raises(MissingData, match=expected):
        open_target("imagenet", "val", root=tmp_path)
    partial = open_target("imagenet", "val", root=tmp_path, partial=True)
    assert partial.labels.tolist() == [FLAT[0], *FLAT[2:]]

    write_image(tmp_path / "val" / "ILSVRC2012_val_00000007.JPEG", 0)
    with pytest.raises(InputError, match=r"00000007.JPEG is not one of the 6 of .*data"):
        open_target("imagenet", "val", root=tmp_path, partial=True)


def test_the_devkit_is_read_as_torchvision_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import imagenet

    write_devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    with tarfile.open(tmp_path / "devkit.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", ("devkit.tar.gz", None))
    imagenet.parse_devkit_archive(tmp_path)
    _, theirs = imagenet.load_meta_file(tmp_path)
    write_flat(tmp_path / "val")
    ours = open_target("imagenet", "val", root=tmp_path)
    assert [WNIDS[label] for label in ours.labels] == theirs


def test_a_damaged_devkit_is_named(tmp_path: Path) -> None:
    write_flat(tmp_path / "val")
    with pytest.raises(MissingData, match=r"has no class folders; the labels would be in"):
        open_target("imagenet", "val", root=tmp_path)
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    write_devkit(devkit)
    truth, meta = devkit / "ILSVRC2012_validation_ground_truth.txt", devkit / "meta.mat"
    for line in ("0", "1001", "n01440764", "3 4"):
        write_list(truth, ["1", line])
        with pytest.raises(
            InputError, match=f"truth.txt, line 2: expected 1 to 1000, found '{line}'"
        ):
            open_target("imagenet", "val", root=tmp_path)
    content = meta.read_bytes()
    for damaged in (content[:5000], b"", b"no matrix", content[:200] + b"\0" * 500):
        meta.write_bytes(damaged)
        with pytest.raises(InputError, match=r"cannot read .*meta\.mat \(.*\); unpack") as caught:
            open_target("imagenet", "val", root=tmp_path)
        assert "\n" not in str(caught.value)
    meta.unlink()
    with pytest.raises(MissingData, match=r"no file .*meta\.mat; unpack the whole"):
        open_target("imagenet", "val", root=tmp_path)


def test_without_scipy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flat(tmp_path / "val")
    write_devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingData, match=r"needs: pip install 'sskt\[imagenet\]'"):
        open_target("imagenet", "val", root=tmp_path)


def test_another_devkit_is_refused(tmp_path: Path) -> None:
    scipy = pytest.importorskip("scipy.io", reason="needs sskt[imagenet]")
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    write_flat(tmp_path / "val")
    write_devkit(devkit)
    synsets = scipy.loadmat(str(devkit / "meta.mat"), squeeze_me=True)["synsets"]
    synsets[0]["WNID"] = "n99999999"
    scipy.savemat(devkit / "meta.mat", {"synsets": synsets[:, None]})
    with pytest.raises(InputError, match="expected the 1,000 classes of ILSVRC2012"):
        open_target("imagenet", "val", root=tmp_path)


def test_flat_val_with_kaggles_solution(tmp_path: Path) -> None:
    base = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    write_flat(base / "val")
    rows = [f"ILSVRC2012_val_{i + 1:08d},{WNIDS[label]} 1 2 3 4 " for i, label in enumerate(FLAT)]
    solution = tmp_path / "LOC_val_solution.csv"
    write_list(solution, ["ImageId,PredictionString", *rows[::-1]])
    target = open_target("imagenet", "val", root=tmp_path)
    assert target.labels.tolist() == FLAT
    assert list(target.ids) == sorted(path.name for path in (base / "val").iterdir())
    write_list(solution, ["ImageId,PredictionString", rows[0], "ILSVRC2012_val_00000002,goldfish"])
    with pytest.raises(InputError, match=r"LOC_val_solution.csv, line 3: expected IMAGE,WNID"):
        open_target("imagenet", "val", root=tmp_path)


# --- Places365 --------------------------------------------------------------------------------


def test_the_real_categories_are_ours(data: Path, tmp_path: Path) -> None:
    lines = (data / "places365" / "categories_places365.txt").read_text().splitlines()
    assert [line.rsplit(" ", 1)[0][3:] for line in lines] == list(SCENES)
    write_places365(tmp_path)
    shutil.copy(data / "places365" / "categories_places365.txt", tmp_path)
    assert open_target("places365", "val", root=tmp_path).classes == SCENES
    assert {"airfield", "apartment_building/outdoor"} <= set(SCENES)


def test_real_images_by_a_list(data: Path, tmp_path: Path) -> None:
    """MiniPlaces has Places365's folders: a list makes the small version of it."""
    source = data / "miniplaces" / "images" / "train"
    files = [p.relative_to(source) for p in sorted(source.glob("[ab]/*/*.jpg"))]
    known = [file for file in files if "/".join(file.parts[1:-1]) in SCENES]
    lines = [f"/{file} {SCENES.index('/'.join(file.parts[1:-1]))}" for file in known[::-1]]
    assert len(lines) > 100
    write_list(tmp_path / "places365_train_standard.txt", lines)
    (tmp_path / "data_256_standard").symlink_to(source)
    target = open_target("places365-small", root=tmp_path)
    assert list(target.ids) == [str(file) for file in known[::-1]]
    assert target.label_text(0) == known[-1].parts[1]
    assert target.read(0).shape == (128, 128, 3)
    assert target.paths is not None
    assert target.sizes is not None
    assert target.sizes.tolist() == [path.stat().st_size for path in target.paths]


def test_order_and_labels_are_the_lists(tmp_path: Path) -> None:
    write_places365(tmp_path)
    train = open_target("places365", root=tmp_path)
    assert [train.classes[i] for i in train.labels[::3]] == [
        "airfield",
        "apartment_building/outdoor",
        "zen_garden",
    ]
    assert list(train.ids)[3] == "a/apartment_building/outdoor/00000001.jpg"
    val = open_target("places365", "val", root=tmp_path)
    assert val.labels.tolist() == [364 - 7 * i for i in range(1, 8)]
    lines = (tmp_path / "places365_val.txt").read_text().splitlines()
    (tmp_path / "places365_val.txt").write_bytes(
        b"\xef\xbb\xbf" + "".join(f"{x}  \r\n\r\n" for x in reversed(lines)).encode()
    )
    turned = open_target("places365", "val", root=tmp_path)
    assert list(turned.ids) == list(val.ids)[::-1]
    assert turned.fingerprint != val.fingerprint


def test_the_archives_own_folder_name_will_do(tmp_path: Path) -> None:
    write_places365(tmp_path, "256")
    before = open_target("places365-small", root=tmp_path).identity()
    (tmp_path / "data_256_standard").rename(tmp_path / "data_256")
    assert open_target("places365-small", root=tmp_path).identity() == before
    with pytest.raises(MissingData, match=r"found .*_standard\.txt, no folder data_large"):
        open_target("places365", root=tmp_path)


def test_missing_images_and_lists_of_places365(tmp_path: Path) -> None:
    write_places365(tmp_path)
    image = tmp_path / "data_large_standard" / "a" / "airfield" / "00000002.jpg"
    image.unlink()
    image.mkdir()
    shutil.rmtree(tmp_path / "val_large")
    (tmp_path / "val_large").mkdir()
    expected = r"1 of 9 files of .*standard.txt are missing, first a/airfield/00000002.jpg; get"
    with pytest.raises(MissingData, match=expected):
        open_target("places365", root=tmp_path)
    target = open_target("places365", root=tmp_path, partial=True)
    assert len(target) == 8
    assert list(target.ids)[:2] == ["a/airfield/00000001.jpg", "a/airfield/00000003.jpg"]
    assert [path.is_file() for path in target.paths or ()] == [True] * 8
    with pytest.raises(MissingData, match=r"none of the 7 files of .*val.txt exists; expected"):
        open_target("places365", "val", root=tmp_path, partial=True)
    (tmp_path / "places365_train_standard.txt").unlink()
    expected = r"no places365_train_standard.txt, found data_large_standard\); expected data_"
    with pytest.raises(MissingData, match=expected):
        open_target("places365", root=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_1.jpg 365", "line 2: expected an image and a class from 0 to 364, found 'val_1.jpg"),
        ("val_1.jpg -1", "line 2: expected an image and a class"),
        ("val_1.jpg", "line 2: expected an image and a class"),
        ("val_1.jpg airfield", "line 2: expected an image and a class"),
        ("Places365_val_00000001.jpg 3", "has 'Places365_val_00000001.jpg' twice"),
    ],
)
def test_a_malformed_list_is_named(line: str, message: str, tmp_path: Path) -> None:
    write_places365(tmp_path)
    write_list(tmp_path / "places365_val.txt", ["Places365_val_00000001.jpg 7", line])
    with pytest.raises(InputError, match=rf"places365_val\.txt,? {re.escape(message)}"):
        open_target("places365", "val", root=tmp_path, partial=True)


def test_other_categories_are_refused(tmp_path: Path) -> None:
    write_places365(tmp_path)
    lines = (tmp_path / "categories_places365.txt").read_text().splitlines()
    write_list(tmp_path / "categories_places365.txt", ["/a/abbey 0", *lines[1:]])
    expected = "line 1: expected '/a/airfield 0', found '/a/abbey 0'"
    with pytest.raises(InputError, match=expected):
        open_target("places365", root=tmp_path)


# --- PASCAL VOC -------------------------------------------------------------------------------

REAL = {
    "000001": "dog, person",
    "000002": "train",
    "000003": "chair, sofa",
    "000004": "car",
    "000005": "chair",
    "2007_000032": "aeroplane, person",
    "2007_000033": "aeroplane",
    "2007_000039": "tvmonitor",
    "2007_000042": "train",
}


@pytest.mark.parametrize(("name", "split"), [("voc2007", "test"), ("voc2012", "trainval")])
def test_real_voc(name: str, split: str, data: Path) -> None:
    target = open_target(name, split, root=data / "voc", partial=True)
    expected = [sample for sample in REAL if ("_" in sample) == (name == "voc2012")]
    assert list(target.ids) == expected
    assert [target.label_text(i) for i in range(len(target))] == [REAL[x] for x in expected]
    assert target.classes == VOC_CLASSES
    assert {target.read(i).shape[2] for i in range(len(target))} == {3}
    assert open_target(name, split, root=data / "voc" / name.upper(), partial=True).identity() == (
        target.identity()
    )
    if name == "voc2012":
        expected_error = r"1 of 5 files of .*trainval.txt are missing, first JPEGImages/2007_000027"
        with pytest.raises(MissingData, match=expected_error):
            open_target(name, split, root=data / "voc")


def test_difficult_objects_are_flagged(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007", ["", "test"])
    target = open_target("voc2007", "test", root=tmp_path)
    rows = dict(zip(target.ids, target.labels.tolist(), strict=True))
    by_name = {
        sample: {VOC_CLASSES[i]: mark for i, mark in enumerate(row) if mark}
        for sample, row in rows.items()
    }
    assert by_name == {
        "000005": {"chair": 1, "person": -1},
        "000012": {"tvmonitor": 1},
        "000016": {},
        "000021": {"aeroplane": 1, "dog": -1},
        "000023": {"cat": 1, "sofa": 1},
    }
    assert target.label_text(0) == "chair, (person)"
    assert target.label_text(2) is None


@given(st.lists(st.tuples(st.sampled_from(VOC_CLASSES), st.sampled_from([0, 1, None])), max_size=9))
def test_labels_are_those_of_a_plain_reading(objects: list[tuple[str, int | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "1.xml")
        path.write_text(annotation(objects))
        found = voc_labels(path)
    for label, name in enumerate(VOC_CLASSES):
        marks = {difficult for other, difficult in objects if other == name}
        assert found[label] == (0 if not marks else -1 if marks == {1} else 1)


def test_real_annotations_are_read_as_elementtree_reads_them(data: Path) -> None:
    notes = sorted(data.glob("voc/VOC20*/Annotations/*.xml"))
    assert len(notes) == 9
    for note in notes:
        easy: set[str | None] = set()
        hard: set[str | None] = set()
        for item in ElementTree.parse(note).getroot().iter("object"):
            (hard if item.findtext("difficult") == "1" else easy).add(item.findtext("name"))
        expected = [1 if x in easy else -1 if x in hard else 0 for x in VOC_CLASSES]
        assert voc_labels(note).tolist() == expected


def test_voc_is_found_in_three_places(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", ["train"])
    roots = tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2007"
    found = [open_target("voc2007", root=root).identity() for root in roots]
    assert found[0] == found[1] == found[2]
    (tmp_path / "mine").symlink_to(roots[2])
    assert open_target("voc2007", root=tmp_path / "mine").identity() == found[0]
    renamed = roots[2].rename(tmp_path / "pascal")
    assert open_target("voc2007", root=renamed).identity() == found[0]
    with pytest.raises(MissingData) as caught:
        open_target("voc2007", root=tmp_path)
    for place in (tmp_path / "VOC2007", tmp_path / "VOCdevkit" / "VOC2007", tmp_path):
        assert f"no {place}/ImageSets/Main/train.txt" in str(caught.value)


def test_another_years_folder_is_not_taken(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2012", ["train"])
    with pytest.raises(MissingData, match="voc2007 train not found"):
        open_target("voc2007", root=tmp_path / "VOC2012")


def test_missing_images_and_annotations_of_voc(tmp_path: Path) -> None:
    base = tmp_path / "VOC2007"
    write_voc(base, ["train"])
    (base / "Annotations" / "000012.xml").unlink()
    (base / "JPEGImages" / "000021.jpg").unlink()
    expected = r"2 of 5 files of .*train.txt are missing, first Annotations/000012.xml; get them"
    with pytest.raises(MissingData, match=expected):
        open_target("voc2007", root=tmp_path)
    expected = r"JPEGImages/000012.jpg has no annotation .*Annotations/000012.xml"
    with pytest.raises(MissingData, match=expected):
        open_target("voc2007", root=tmp_path, partial=True)
    (base / "JPEGImages" / "000012.jpg").unlink()
    target = open_target("voc2007", root=tmp_path, partial=True)
    assert list(target.ids) == ["000007", "000016", "000023"]
    assert [target.label_text(i) for i in range(3)] == ["car", None, "cat, sofa"]
    shutil.rmtree(base / "JPEGImages")
    with pytest.raises(MissingData, match=r"none of the 5 files of .*train.txt exists; expected"):
        open_target("voc2007", root=tmp_path, partial=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000007 1", "line 2: expected one id, found '000007 1'"),
        ("../000007", "line 2: expected one id"),
        ("000005", "has '000005' twice"),
    ],
)
def test_a_malformed_voc_list_is_named(line: str, message: str, tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007", ["train"])
    write_list(tmp_path / "VOC2007" / "ImageSets" / "Main" / "train.txt", ["000005", line])
    with pytest.raises(InputError, match=rf"train\.txt,? {re.escape(message)}"):
        open_target("voc2007", root=tmp_path)


GOOD = annotation([("dog", 0), ("cat", 1)])
BOMB = """<?xml version="1.0"?>
<!DOCTYPE annotation [<!ENTITY a "dog"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><object><name>&b;</name></object></annotation>"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-20], r"is damaged \(unclosed token: line \d+, column \d+\); get"),
        (GOOD[:-15], r"is damaged \(no element found: line \d+, column \d+\); get"),
        (GOOD.replace("</name>", "</nme>", 1), r"is damaged \(mismatched tag: line 4"),
        (GOOD.replace("dog", "d&g"), r"is damaged \(not well-formed"),
        (GOOD.replace("dog", "&dog;"), r"is damaged \(undefined entity"),
        ("", "is damaged"),
        ("\0" * 100, "is damaged"),
        ("<html><body>404</body></html>", "expected <annotation>, found <html>"),
        (BOMB, "a document type has no place in an annotation"),
        (BOMB.encode("utf-16").decode("latin-1"), "a document type has no place"),
        (GOOD.replace("dog", "dragon"), "found an object 'dragon', difficult '0'"),
        (GOOD.replace("<name>dog</name>", ""), "found an object '', difficult '0'"),
        (GOOD.replace("<difficult>1", "<difficult>maybe"), "object 'cat', difficult 'maybe'"),
    ],
)
def test_a_damaged_annotation_is_named(content: str, message: str, tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007", ["train"])
    note = tmp_path / "VOC2007" / "Annotations" / "000016.xml"
    note.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=rf"Annotations/000016\.xml:? .*{message}") as caught:
        open_target("voc2007", root=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("declared", ["gbk", "GB2312", "gb18030", "utf-8", "none", "no-such"])
@pytest.mark.parametrize("encoding", ["gbk", "utf-8", "utf-16"])
def test_an_annotation_in_another_encoding_is_read(
    declared: str, encoding: str, tmp_path: Path
) -> None:
    """Tools for labelling images write the folder's name in the encoding of their system."""
    expected = voc_labels_of(tmp_path, GOOD.encode())
    text = GOOD.replace("<annotation>", "<annotation><folder>\u56fe\u7247 \u4e00</folder>", 1)
    if declared != "none":
        text = f'<?xml version="1.0" encoding="{declared}"?>\n{text}'
    if encoding == "utf-16":
        text = text.replace(declared, "utf-16")
    np.testing.assert_array_equal(voc_labels_of(tmp_path, text.encode(encoding)), expected)


def voc_labels_of(folder: Path, content: bytes) -> Any:
    (folder / "a.xml").write_bytes(content)
    return voc_labels(folder / "a.xml")


def test_voc_objects_are_all_shown() -> None:
    """The made annotations have each case that the labels tell apart."""
    marks = {difficult for objects in VOC_OBJECTS.values() for _, difficult in objects}
    assert marks == {0, 1, None}
    assert [] in VOC_OBJECTS.values()


# --- download ---------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """A web server on loopback: its folder, its address, and the paths it was asked for."""
    folder = tmp_path / "host"
    folder.mkdir()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            asked.append(f"{self.command} {self.path}")

        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()
        thread.join()


def pack(archive: Path, folder: Path, **names: str) -> None:
    """A tar of ``folder``'s entries, some under another name."""
    with tarfile.open(archive, "w") as file:
        for path in sorted(folder.iterdir()):
            file.add(path, names.get(path.name, path.name))


def test_places365_is_downloaded_once(
    host: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url, asked = host
    kind = datasets.Places365
    monkeypatch.setattr(kind, "_BASE_URL", url)
    for table in ("_DEVKIT_META", "_FILE_LIST_META", "_IMAGES_META"):
        unchecked = {key: (file, None) for key, (file, _) in getattr(kind, table).items()}
        monkeypatch.setattr(kind, table, unchecked)
    monkeypatch.setattr(kind, "_CATEGORIES_META", (kind._CATEGORIES_META[0], None))
    write_places365(tmp_path / "made", "256")
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "made" / "data_256_standard").rename(images / "data_256_standard")
    pack(folder / "train_256_places365standard.tar", images, data_256_standard="data_256")
    shutil.rmtree(tmp_path / "made" / "val_256")
    pack(folder / "filelist_places365-standard.tar", tmp_path / "made")

    root = tmp_path / "root"
    with pytest.raises(MissingData, match="add --download to get it"):
        open_target("places365-small", root=root)
    assert not asked
    target = open_target("places365-small", root=root, download=True)
    assert len(target) == 9
    assert target.read(0).shape[2] == 3
    assert any("train_256" in line for line in asked)
    asked.clear()
    again = open_target("places365-small", root=root, download=True)
    assert again.identity() == target.identity()
    (root / "data_256_standard" / target.ids[4]).unlink()
    with pytest.raises(MissingData, match="1 of 9 files"):
        open_target("places365-small", root=root, download=True)
    assert not asked
    with pytest.raises(MissingData, match=r"places365 val not found .*cannot download it: HTTP"):
        open_target("places365", "val", root=root, download=True)


def test_voc_is_downloaded_once(
    host: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url, asked = host
    write_voc(tmp_path / "made" / "VOCdevkit" / "VOC2007", ["", "test"])
    pack(folder / "voc.tar", tmp_path / "made")
    entry = datasets.voc.DATASET_YEAR_DICT["2007-test"]
    changed = entry | {"url": f"{url}voc.tar", "filename": "voc.tar", "md5": None}
    monkeypatch.setitem(datasets.voc.DATASET_YEAR_DICT, "2007-test", changed)
    root = tmp_path / "root"
    target = open_target("voc2007", "test", root=root, download=True)
    assert len(target) == 5
    asked.clear()
    again = open_target("voc2007", "test", root=root, download=True)
    assert again.identity() == target.identity()
    assert not asked
    (folder / "voc.tar").write_bytes(b"no archive")
    with pytest.raises(MissingData, match=r"voc2007 test not found under .*cannot download it: "):
        open_target("voc2007", "test", root=tmp_path / "other", download=True)
