"""Manifests: CSV and Parquet lists of a user's own files."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.layouts import SCENES, write_frames, write_image

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.targets.manifest import open_manifest
from sskt.teacher_cache.targets.open import evaluation_split
from sskt.teacher_cache.targets.registry import default_policy
from sskt.teacher_cache.targets.spec import DatasetSpec

KINDS = ("csv", "parquet")


def write_images(folder: Path, count: int = 6) -> None:
    for i in range(count):
        write_image(folder / f"{i}.jpg", i)


def write_manifest(file: Path, /, **columns: Sequence[Any]) -> Path:
    """The same rows as CSV (lists as ``a|b``, None as nothing) or as Parquet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs sskt[parquet]")
        pyarrow = pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.table({k: list(v) for k, v in columns.items()}), file)
        return file
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            cells = ("|".join(map(str, x)) if isinstance(x, list) else x for x in row)
            writer.writerow(["" if x is None else x for x in cells])
    return file


def names(count: int) -> list[str]:
    return [f"{i}.jpg" for i in range(count)]


# --- real images ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_miniplaces_with_its_nested_folders(kind: str, data: Path, tmp_path: Path) -> None:
    """``a/abbey``, ``b/bakery/shop``: as a folder the letters would be the classes."""
    images = data / "miniplaces" / "images"
    categories = (data / "miniplaces" / "devkit" / "categories.txt").read_text()
    folders = [line.split() for line in categories.splitlines()]
    rows = [
        (str(file.relative_to(images)), folder[3:], "train")
        for folder, _ in folders
        for file in sorted((images / "train" / folder[1:]).glob("*.jpg"))
    ]
    for line in (data / "miniplaces" / "val_subset.txt").read_text().splitlines():
        name, label = line.split()
        rows.append((name, folders[int(label)][0][3:], "val"))
    paths, labels, splits = zip(*rows, strict=True)
    manifest = write_manifest(
        tmp_path / f"miniplaces.{kind}", path=paths, label=labels, split=splits
    )
    train = open_target(str(manifest), root=images)
    val = open_target(str(manifest), evaluation_split(DatasetSpec(str(manifest))), root=images)
    assert (len(train), len(val)) == (2000, 500)
    assert train.name == "miniplaces"
    assert train.classes == val.classes == tuple(sorted(set(labels), key=str.encode))
    assert len(train.classes) == 100
    assert len(set(train.classes) & set(SCENES)) == 96
    assert np.bincount(train.labels).tolist() == [20] * 100
    assert list(train.ids) == list(paths[:2000])
    row = paths.index("train/b/bakery/shop/00000001.jpg")
    assert train.label_text(row) == "bakery/shop"
    assert train.read(row).shape == (128, 128, 3)
    assert train.sizes is not None
    assert train.sizes[row] == (images / paths[row]).stat().st_size
    assert default_policy(str(manifest)) == "random-resized-crop-flip"


def test_real_clips_by_a_manifest(data: Path, tmp_path: Path) -> None:
    files = sorted((data / "hmdb51" / "videos").rglob("*.avi"))
    manifest = write_manifest(
        tmp_path / "clips.csv", path=files[:2], label=[file.parent.name for file in files[:2]]
    )
    target = open_target(str(manifest), decoder="pyav", root=data)
    assert target.clips
    assert list(target.ids) == [str(file) for file in files[:2]]
    assert target.frames is not None
    assert target.frames.min() > 10
    assert target.read_frames(1, [0])[0].ndim == 3


# --- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_names(kind: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    labels = ["b", "ä", "B", None, "b", "10"]
    target = open_target(
        str(write_manifest(tmp_path / f"m.{kind}", path=names(6), label=labels, note=[0] * 6))
    )
    assert target.classes == ("10", "B", "b", "ä")
    assert target.labels.tolist() == [2, 3, 1, -1, 2, 0]
    assert not target.multi_label
    assert not target.clips
    assert list(target.ids) == names(6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", [None, -1])
def test_numbers(kind: str, empty: int | None, tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    manifest = write_manifest(tmp_path / f"m.{kind}", path=names(4), label=[3, 0, empty, 10])
    target = open_target(str(manifest))
    assert target.classes == tuple(str(i) for i in range(11))
    assert target.labels.tolist() == [3, 0, -1, 10]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_with_names(kind: str, tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    labels, words = [2, 0, 2, 0], ["cat", "dog", "", "dog"]
    file = tmp_path / f"m.{kind}"
    target = open_target(str(write_manifest(file, path=names(4), label=labels, class_name=words)))
    assert target.classes == ("dog", "1", "cat")
    assert target.labels.tolist() == labels
    words[3] = "cow"
    write_manifest(file, path=names(4), label=labels, class_name=words)
    where = ("line 5", "line 3") if kind == "csv" else ("row 4", "row 2")
    expected = f"{where[0]}: class 0 is 'cow' here, but 'dog' in {where[1]}"
    with pytest.raises(InputError, match=expected):
        open_target(str(file))


def test_numbers_as_pandas_writes_them_beside_empty_cells(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    as_text = write_manifest(tmp_path / "a.csv", path=names(3), label=["1.0", None, "0.0"])
    as_floats = write_manifest(
        tmp_path / "b.parquet", path=names(3), label=[1.0, float("nan"), 0.0]
    )
    for manifest in (as_text, as_floats):
        target = open_target(str(manifest))
        assert target.classes == ("0", "1")
        assert target.labels.tolist() == [1, -1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_several_labels(kind: str, tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    rows = [["sky", "sea"], ["sea"], [], ["tree", "sky"]]
    target = open_target(str(write_manifest(tmp_path / f"m.{kind}", path=names(4), labels=rows)))
    assert target.multi_label
    assert target.classes == ("sea", "sky", "tree")
    assert target.labels.dtype == np.int64
    assert target.labels.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert target.label_text(3) == "sky, tree"
    numbers = write_manifest(tmp_path / f"n.{kind}", path=names(2), labels=[[2, 0], [2]])
    target = open_target(str(numbers))
    assert target.classes == ("0", "1", "2")
    assert target.labels.tolist() == [[1, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_those_of_all_splits(kind: str, tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    manifest = write_manifest(
        tmp_path / f"m.{kind}",
        path=names(4),
        label=["a", "c", "b", "c"],
        split=["train", "test", "test", "train"],
    )
    train, test = open_target(str(manifest)), open_target(str(manifest), "test")
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0, 2]
    assert test.labels.tolist() == [2, 1]
    assert list(test.ids) == ["1.jpg", "2.jpg"]
    assert evaluation_split(DatasetSpec(str(manifest))) == "test"
    with pytest.raises(UnknownName, match=r"split of .* 'val'; known: train, test"):
        open_target(str(manifest), "val")


def test_without_a_split_column_all_is_train(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    manifest = write_manifest(tmp_path / "m.csv", path=names(2), label=["a", "b"])
    assert len(open_target(str(manifest))) == 2
    with pytest.raises(UnknownName, match=r"split of .* 'test'; known: train"):
        open_target(str(manifest), "test")
    with pytest.raises(MissingData, match="--test-split none"):
        evaluation_split(DatasetSpec(str(manifest)))


@pytest.mark.parametrize("split", ["Train", "TRAINING"])
def test_a_split_is_found_in_any_case(split: str, tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    manifest = write_manifest(
        tmp_path / "m.csv", path=names(3), label=["a", "b", "a"], split=[split, "Validation", split]
    )
    target = open_target(str(manifest))
    assert (target.split, list(target.ids)) == ("train", ["0.jpg", "2.jpg"])
    assert evaluation_split(DatasetSpec(str(manifest))) == "val"
    assert list(open_target(str(manifest), "val").ids) == ["1.jpg"]


@pytest.mark.parametrize("other", ["Train", "training"])
def test_two_names_of_one_split_are_refused(other: str, tmp_path: Path) -> None:
    """Otherwise the rows of one of them would be left out in silence."""
    write_images(tmp_path, 3)
    manifest = write_manifest(
        tmp_path / "m.csv", path=names(3), label=["a", "b", "a"], split=["train", "test", other]
    )
    with pytest.raises(InputError, match=rf"line 4: split '{other}', but 'train' in line 2; write"):
        open_target(str(manifest))


# --- labels that may be meant in two ways -----------------------------------------------------

SEVERAL = [
    (["a,b", "a", "c"], "line 2: the label 'a,b' looks like several; give --label-separator ','"),
    (["a", "c;b", "x"], "line 3: the label 'c;b' looks like several; give --label-separator ';'"),
    (["a", "c", "a|b"], r"line 4: the label 'a\|b' looks like several; .*--label-separator '\|'"),
    (["sea, sky", "sky", "c"], "line 2: the label 'sea, sky' looks like several"),
    (["sea, sky", "sea, sun", "c"], "line 2: the label 'sea, sky' looks like several"),
    (["['a', 'b']", "a", "b"], r"line 2: .* looks like several; give --columns labels=COLUMN"),
    (["[0, 1, 1]", "[1, 0, 0]", "[0, 0, 1]"], r"line 2: .*--columns labels=COLUMN"),
    (["0 1 1", "1 0 0", "0 0 1"], r"line 2: the label '0 1 1' looks like several"),
]


@pytest.mark.parametrize(("labels", "what"), SEVERAL)
def test_labels_that_look_like_several_are_refused_with_both_ways(
    labels: list[str], what: str, tmp_path: Path
) -> None:
    write_images(tmp_path, 3)
    manifest = str(write_manifest(tmp_path / "m.csv", path=names(3), label=labels))
    with pytest.raises(InputError, match=f"{what}.*, or --label-separator none if it is the name"):
        open_target(manifest)
    target = open_target(manifest, label_separator="none")
    assert [target.label_text(row) for row in range(3)] == labels


def test_a_name_may_hold_a_comma(tmp_path: Path) -> None:
    """As many of ImageNet's do."""
    write_images(tmp_path, 2)
    labels = ["great white shark, white shark", "tiger shark, Galeocerdo cuvieri"]
    target = open_target(str(write_manifest(tmp_path / "m.csv", path=names(2), label=labels)))
    assert target.classes == tuple(labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_separator_says_that_there_are_several(column: str, kind: str, tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    rows = ["cat; dog", "dog", "", "bird;cat"]
    manifest = write_manifest(tmp_path / f"m.{kind}", path=names(4), **{column: rows})
    target = open_target(str(manifest), label_separator=";")
    assert target.classes == ("bird", "cat", "dog")
    assert target.labels.tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]]


def test_lists_in_words_are_read(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    rows = ["['cat', 'dog']", "[]", '["a, b"]']
    target = open_target(str(write_manifest(tmp_path / "m.csv", path=names(3), labels=rows)))
    assert target.classes == ("a, b", "cat", "dog")
    assert target.labels.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    broken = write_manifest(tmp_path / "m.csv", path=names(3), labels=["[cat, dog]", "a", "b"])
    with pytest.raises(InputError, match=r"line 2: labels: expected a list such as \['a', 'b'\]"):
        open_target(str(broken))


@pytest.mark.parametrize("rows", [[[0, 1, 1], [1, 0, 0]], [[1, 0], [0, 1]], [[0, 1, 0, 0], [1]]])
@pytest.mark.parametrize("kind", ["parquet", "csv of lists", "csv"])
def test_multi_hot_labels_are_refused(kind: str, rows: list[list[int]], tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    labels: list[Any] = rows
    if kind != "parquet":
        labels = [str(row) if kind != "csv" else "|".join(map(str, row)) for row in rows]
    manifest = write_manifest(
        tmp_path / f"m.{kind.partition(' ')[0]}", path=names(2), labels=labels
    )
    with pytest.raises(InputError, match=r"(line 2|row 1): labels .* a 0 or 1 for each class"):
        open_target(str(manifest))


# --- columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_other_names(kind: str, tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    manifest = str(
        write_manifest(
            tmp_path / f"m.{kind}",
            file=names(3),
            tag=["a", "b", "b"],
            label=["x", "y", "z"],
            part=["train", "test", "train"],
        )
    )
    target = open_target(manifest, columns="path=file, label=tag, split=part")
    assert (list(target.ids), target.classes) == (["0.jpg", "2.jpg"], ("a", "b"))
    several = open_target(manifest, columns="path=file,labels=tag")
    assert several.labels.tolist() == [[1, 0], [0, 1], [0, 1]]
    for columns, what in {
        "path=image": "has no column 'image', which --columns names as path; it has .*'file'",
        "file=path": "unknown column in --columns 'file'",
        "path": "expected NAME=COLUMN, each once, found path",
        "path=file,label=file": "expected NAME=COLUMN, each once, found label=file",
    }.items():
        with pytest.raises(InputError, match=what):
            open_target(manifest, columns=columns)
    with pytest.raises(InputError, match=r"expected a column path.*--columns path=COLUMN"):
        open_target(manifest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_without_labels(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, 2)
    target = open_target(str(write_manifest(tmp_path / f"m.{kind}", path=names(2), tag=["a", "b"])))
    assert (target.classes, target.labels.tolist()) == ((), [-1, -1])
    assert target.label_text(0) is None
    (record,) = caplog.records
    assert "no labels; it has path, tag: name one with --columns label=COLUMN" in record.message


# --- files ------------------------------------------------------------------------------------


def test_files_outside_of_the_root_need_an_option(tmp_path: Path) -> None:
    inside = tmp_path / "data"
    write_images(inside / "deep", 2)
    write_images(tmp_path / "other", 3)
    write_frames(tmp_path / "other" / "clip", 2)
    (inside / "link.jpg").symlink_to(tmp_path / "other" / "0.jpg")
    (inside / "folder").symlink_to(tmp_path / "other")
    (inside / "deep" / "near.jpg").symlink_to(inside / "deep" / "0.jpg")
    write_frames(inside / "clip", 2)
    (inside / "clip" / "image_00002.jpg").unlink()
    (inside / "clip" / "image_00002.jpg").symlink_to(tmp_path / "other" / "1.jpg")
    outside = [
        *("../other/0.jpg", "deep/../../other/0.jpg", str(tmp_path / "other" / "1.jpg")),
        *("link.jpg", "folder/2.jpg", "clip", "folder/clip"),
    ]
    for name in outside:
        clips = name.endswith("clip")
        listed = [name] if clips else ["deep/0.jpg", name]
        rows = ["a", "b"][: len(listed)]
        manifest = str(write_manifest(inside / "m.csv", path=listed, label=rows))
        line = f"line {len(listed) + 1}: {re.escape(name)} lies outside of {re.escape(str(inside))}"
        with pytest.raises(InputError, match=rf"{line}, or is a link .*--allow-outside-root"):
            open_target(manifest)
        target = open_target(manifest, allow_outside_root=True)
        assert list(target.ids) == listed
        assert target.provenance["allow_outside_root"] is True
    listed = ["deep/0.jpg", "deep/../deep/1.jpg", str(inside / "deep" / "near.jpg")]
    manifest = str(write_manifest(inside / "m.csv", path=listed, label=["a", "b", "b"]))
    assert list(open_target(manifest).ids) == listed
    manifest = str(write_manifest(tmp_path / "m.csv", path=["data/link.jpg"], label=["a"]))
    assert len(open_target(manifest)) == 1


def test_files_of_any_ending_that_begin_like_images(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    for number, name in enumerate(("bare", "x.jfif", "x.data")):
        (tmp_path / f"{number}.jpg").rename(tmp_path / name)
    listed = ["bare", "x.jfif", "x.data"]
    target = open_target(str(write_manifest(tmp_path / "m.csv", path=listed, label=["a"] * 3)))
    assert [target.read(row).ndim for row in range(3)] == [3, 3, 3]


def test_paths_are_relative_to_root_or_to_the_manifest(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 3)
    columns: dict[str, list[str]] = {"path": names(3), "label": ["a", "b", "a"]}
    beside = write_manifest(tmp_path / "data" / "m.csv", **columns)
    apart = write_manifest(tmp_path / "lists" / "m.csv", **columns)
    target = open_target(str(beside))
    assert open_target(str(apart), root=tmp_path / "data").identity() == target.identity()
    with pytest.raises(MissingData, match=r"3 of 3 files of .*m\.csv are missing"):
        open_target(str(apart))
    full = [str(tmp_path / "data" / name) for name in names(3)]
    listed = write_manifest(tmp_path / "lists" / "m.csv", path=full, label=["a", "b", "a"])
    absolute = open_target(str(listed), root=tmp_path)
    assert list(absolute.ids) == full
    assert absolute.paths is not None
    assert list(absolute.paths) == [Path(path) for path in full]
    np.testing.assert_array_equal(absolute.read(2), target.read(2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_changes_with_order_membership_and_size(kind: str, tmp_path: Path) -> None:
    def fingerprint(folder: Path, listed: list[str]) -> str:
        manifest = write_manifest(folder / f"m.{kind}", path=listed, label=["a"] * len(listed))
        return open_target(str(manifest)).fingerprint

    write_images(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    before = fingerprint(tmp_path / "one", names(4))
    for path in (tmp_path / "other").iterdir():
        os.utime(path, (1e9, 1e9))
    assert fingerprint(tmp_path / "other", names(4)) == before
    others = [names(3), names(5), [*names(3), "4.jpg"], [*names(2), "3.jpg", "2.jpg"]]
    found = [fingerprint(tmp_path / "other", listed) for listed in others]
    with (tmp_path / "other" / "1.jpg").open("ab") as file:
        file.write(b"!")
    found.append(fingerprint(tmp_path / "other", names(4)))
    assert len({before, *found}) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_clips_and_folders_of_frames(kind: str, tmp_path: Path) -> None:
    write_frames(tmp_path / "jump" / "v 1.5", 3)
    (tmp_path / "run.MP4").write_bytes(b"not decoded here")
    manifest = write_manifest(
        tmp_path / f"m.{kind}", path=["jump/v 1.5", "run.MP4"], label=["jump", "run"]
    )
    target = open_manifest(DatasetSpec(str(manifest), decoder="decord"))
    assert target.decoder == "decord"
    assert target.sizes is not None
    frames = (tmp_path / "jump" / "v 1.5").iterdir()
    assert target.sizes.tolist() == [sum(frame.stat().st_size for frame in frames), 16]


def test_missing_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    manifest = write_manifest(
        tmp_path / "m.csv", path=["0.jpg", "gone.jpg", "1.jpg", "a\0b.jpg"], label=["a"] * 4
    )
    expected = rf"2 of 4 files of .*m.csv are missing, first line 3: {tmp_path}/gone.jpg; relative"
    with pytest.raises(MissingData, match=expected):
        open_target(str(manifest))
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(MissingData, match="2 of 4 files"):
        open_target(str(manifest))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["0.jpg", "x/y.avi"], "line 2 is an image and .*line 3 a clip; expected one kind"),
        (["0.jpg", "notes.txt"], r"line 3: notes.txt is no image \(.*no clip \(.*and no folder"),
        (["0.jpg", "x"], "line 3: x is no image"),
        (["0.jpg", "folder.jpg"], "line 3: folder.jpg is no image"),
        (["0.jpg", "1.jpg", "0.jpg"], "line 4: 0.jpg came in line 2; a sample may come once"),
        (["0.jpg", ""], "line 3: path: expected a file's path, found ''"),
    ],
)
def test_files_of_the_wrong_kind(paths: list[str], message: str, tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    (tmp_path / "x").mkdir()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "x" / "y.avi").touch()
    (tmp_path / "notes.txt").touch()
    manifest = write_manifest(tmp_path / "m.csv", path=paths, label=["a"] * len(paths))
    with pytest.raises(InputError, match=message):
        open_target(str(manifest))


def test_one_file_may_be_in_two_splits(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    columns = {
        "path": ["0.jpg", "1.jpg", "0.jpg"],
        "label": "aba",
        "split": ["train", "train", "val"],
    }
    manifest = write_manifest(tmp_path / "m.csv", **columns)
    assert len(open_target(str(manifest))) == 2
    assert list(open_target(str(manifest), "val").ids) == ["0.jpg"]


# --- CSV as people write it -------------------------------------------------------------------


def test_a_byte_order_mark_windows_line_ends_blanks_and_quotes(tmp_path: Path) -> None:
    write_image(tmp_path / 'a, "b".jpg', 1)
    write_image(tmp_path / "ü.jpg", 2)
    text = 'path , label,more\r\n"a, ""b"".jpg", cat ,1\r\n\r\nü.jpg,dog,"two\r\nlines"\r\n\r\n'
    (tmp_path / "m.CSV").write_bytes(b"\xef\xbb\xbf" + text.encode())
    target = open_target(str(tmp_path / "m.CSV"))
    assert list(target.ids) == ['a, "b".jpg', "ü.jpg"]
    assert target.classes == ("cat", "dog")


def test_a_name_that_is_no_utf8_is_kept_in_csv(tmp_path: Path) -> None:
    write_image(tmp_path / os.fsdecode(b"\xff.jpg"), 1)
    (tmp_path / "m.csv").write_bytes(b"path,label\n\xff.jpg,a\n")
    target = open_target(str(tmp_path / "m.csv"))
    assert os.fsencode(target.ids[0]) == b"\xff.jpg"
    assert target.read(0).ndim == 3
    (tmp_path / "m.csv").write_bytes(b"path,label\n\xff.jpg,\xe4\n")
    with pytest.raises(InputError, match=r"m\.csv, line 2: label: not UTF-8"):
        open_target(str(tmp_path / "m.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the columns \[\]; expected a column path, if labels"),
        ("path;label\n0.jpg;a\n", r"has the columns \['path;label'\]; .* separated by ';'"),
        ("label\n0.jpg\n", r"has the columns \['label'\]; expected .*--columns path=COLUMN"),
        ("path,label,labels\n0.jpg,a,a\n", r"has the columns \['path', 'label', 'labels'\]"),
        ("path,label,label\n0.jpg,a,b\n", r"has the columns \['path', 'label', 'label'\]"),
        ("0.jpg,a\n1.jpg,b\n", r"has the columns \['0.jpg', 'a'\]"),
        ("path,label\n0.jpg,a\n1.jpg\n", "line 3: expected 2 cells, found 1"),
        ("path,label\n0.jpg,a,b\n", "line 2: expected 2 cells, found 3"),
        ('path,label\n0.jpg,"a\n1.jpg,b\n', "line 3: unexpected end of data"),
        ('path,label\n0.jpg,"a"b\n', "line 2: ',' expected after '\"'"),
        ("path,label\n" + "x" * 200_000 + ",a\n", "line 2: field larger than field limit"),
        ("path,label,split\n0.jpg,a,train\n1.jpg,b,\n", "line 3: no split; name one in every row"),
        ("path,labels\n0.jpg,a||b\n", r"line 2: labels: an empty name in 'a\|\|b'"),
        ("path,labels\n0.jpg,3|-1\n", "line 2: expected classes from 0 to 999999, found -1"),
        ("path,label\n0.jpg,3\n1.jpg,-2\n", "line 3: expected classes from 0 to 999999, found -2"),
        ("path,label\n0.jpg,3\n1.jpg,1000000\n", "line 3: expected classes from 0 to 999999"),
    ],
)
def test_a_malformed_csv_is_named(text: str, message: str, tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(InputError, match=rf"m\.csv,? {message}") as caught:
        open_target(str(tmp_path / "m.csv"))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("path,label\n")
    with pytest.raises(MissingData, match=r"empty\.csv has no rows"):
        open_target(str(tmp_path / "empty.csv"))
    (tmp_path / "wide.csv").write_text("path,label\n0.jpg,a\n", encoding="utf-16")
    with pytest.raises(InputError, match=r"wide\.csv is UTF-16; save it as UTF-8"):
        open_target(str(tmp_path / "wide.csv"))
    (tmp_path / "folder.csv").mkdir()
    for name, why in (("folder.csv", "Is a directory"), ("nowhere.csv", "No such file")):
        with pytest.raises(MissingData, match=rf"cannot read manifest .*{name}: {why}"):
            open_target(str(tmp_path / name))


# --- Parquet ----------------------------------------------------------------------------------


def test_parquet_types(tmp_path: Path) -> None:
    """Dictionaries, large strings, ``a|b`` in one string, lists of numbers."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs sskt[parquet]")
    pyarrow = pytest.importorskip("pyarrow")
    write_images(tmp_path, 3)
    path = pyarrow.array(names(3), pyarrow.large_string())
    for labels in (
        pyarrow.array(["a|b", "b", None]),
        pyarrow.array(["a|b", "b", ""]).dictionary_encode(),
        pyarrow.array([["a", "b"], ["b"], None]),
        pyarrow.array([["b", "a"], ["b"], []], pyarrow.large_list(pyarrow.large_string())),
    ):
        parquet.write_table(pyarrow.table({"labels": labels, "path": path}), tmp_path / "m.parquet")
        target = open_target(str(tmp_path / "m.parquet"))
        assert target.classes == ("a", "b")
        assert target.labels.tolist() == [[1, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["0.jpg", None], "label": ["a", "b"]}, "row 2: path: expected a file's path"),
        ({"path": [3, 4], "label": ["a", "b"]}, "row 1: path: expected a file's path, found 3"),
        ({"path": ["0.jpg"], "label": [["a"]]}, "row 1: label: expected one value, found a list"),
        ({"path": ["0.jpg"], "labels": [["a", ""]]}, "row 1: labels: an empty name in"),
        ({"path": ["0.jpg"], "label": [{"a": 1}]}, "row 1: label: unhashable type"),
        ({"label": ["0.jpg"]}, r"has the columns \['label'\]; expected a column path, "),
        ({"path": ["0.jpg", "gone.jpg"], "label": ["a", "b"]}, "first row 2: .*gone.jpg"),
    ],
)
def test_a_malformed_parquet_is_named(
    columns: dict[str, list[Any]], message: str, tmp_path: Path
) -> None:
    write_images(tmp_path, 2)
    manifest = write_manifest(tmp_path / "m.parquet", **columns)
    with pytest.raises(InputError, match=rf"m\.parquet.*{message}"):
        open_target(str(manifest))


def test_a_damaged_parquet_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    manifest = write_manifest(tmp_path / "m.parquet", path=names(2), label=["a", "b"])
    content = manifest.read_bytes()
    for damaged in (b"", b"path,label\n", content[:-10], content[:40], b"PAR1" * 20):
        manifest.write_bytes(damaged)
        with pytest.raises(InputError, match=r"m\.parquet") as caught:
            open_target(str(manifest))
        assert "\n" not in str(caught.value)


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingData, match=r"needs: pip install 'sskt\[parquet\]'"):
        open_target(str(tmp_path / "m.parquet"))


# --- both -------------------------------------------------------------------------------------

LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="|")
TEXT = st.text(LETTERS, min_size=1, max_size=5)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.lists(TEXT, max_size=3, unique=True), min_size=1, max_size=8))
def test_csv_and_parquet_give_the_same_target(rows: list[list[str]], tmp_path: Path) -> None:
    if not (tmp_path / "0.jpg").exists():
        write_images(tmp_path, 8)
    listed = names(len(rows))
    several = [
        open_target(str(write_manifest(tmp_path / f"m.{kind}", path=listed, labels=rows)))
        for kind in KINDS
    ]
    assert several[0].identity() == several[1].identity()
    assert several[0].classes == several[1].classes
    np.testing.assert_array_equal(several[0].labels, several[1].labels)
    for found, labels in zip(several[0].labels, rows, strict=True):
        if set(several[0].classes) == {x for row in rows for x in row}:
            assert {several[0].classes[i] for i in np.flatnonzero(found)} == set(labels)
