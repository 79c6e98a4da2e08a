"""Real JPEGs in datasets of Hugging Face, WebDataset shards and Parquet: equal to their folder."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from support.helpers import TINY

from sskt.teacher_cache.api import cache_teachers, open_label_set, open_target
from sskt.teacher_cache.errors import BadImage, InputError, MissingData, UnknownName
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.open import evaluation_split
from sskt.teacher_cache.targets.packed import parquet as parquet_files
from sskt.teacher_cache.targets.packed.samples import PackedImages
from sskt.teacher_cache.targets.registry import own_name
from sskt.teacher_cache.targets.spec import DatasetSpec

datasets = pytest.importorskip("datasets")
Run = Callable[..., tuple[int, str, str]]
KINDS = ("hf", "wds", "parquet")
EACH = {"train": 60, "test": 20}


def few(cifar: Path, split: str) -> Target:
    """Some of the real images, of all classes, in an order that no sorting gives."""
    target = open_target(str(cifar), split, limit=EACH[split])
    return target.chosen(np.random.default_rng(0).permutation(len(target)))


def rows_of(target: Target) -> list[tuple[str, bytes, int]]:
    assert target.paths is not None
    labels = target.labels.tolist()
    return [(f"{i:04d}.jpg", path.read_bytes(), labels[i]) for i, path in enumerate(target.paths)]


Row = tuple[str, bytes, int]


def write_tar(path: Path, rows: list[Row], label: str = "cls") -> None:
    with tarfile.open(path, "w") as tar:
        for name, data, number in rows:
            stem = name.removesuffix(".jpg")
            text = json.dumps({"label": number}) if label == "json" else str(number)
            for member, content in ((name, data), (f"{stem}.{label}", text.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_parquet(path: Path, rows: list[Row], group: int = 7, **columns: list[Any]) -> None:
    images = [{"bytes": data, "path": name} for name, data, _ in rows]
    table = {"image": images, "label": [number for *_, number in rows]} | columns
    parquet.write_table(pyarrow.table(table), path, row_group_size=group)


@pytest.fixture(scope="module")
def plain(cifar: Path) -> dict[str, Target]:
    return {split: few(cifar, split) for split in EACH}


@pytest.fixture(scope="module")
def folder(plain: dict[str, Target], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images three times: hf/, wds/ and parquet/, in two shards a split."""
    root = tmp_path_factory.mktemp("packed")
    for kind in KINDS:
        (root / kind).mkdir()
    saved = {}
    for split, target in plain.items():
        rows = rows_of(target)
        half = len(rows) // 2
        for number, part in enumerate((rows[:half], rows[half:])):
            write_tar(root / "wds" / f"{split}-{number:06d}.tar", part, ("cls", "json")[number])
            write_parquet(root / "parquet" / f"{split}-{number:05d}-of-00002.parquet", part)
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=list(target.classes))
        )
        columns = {
            "image": [{"bytes": data, "path": name} for name, data, _ in rows],
            "label": [number for *_, number in rows],
        }
        saved[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(saved).save_to_disk(str(root / "hf"))
    return root


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def read_all(target: Target, rows: list[int]) -> list[bytes]:
    return [target.read(row).tobytes() for row in rows]


def test_it_is_the_folder_in_another_form(
    kind: str, folder: Path, plain: dict[str, Target]
) -> None:
    for split, wanted in plain.items():
        found = open_target(f"{kind}:{folder / kind}", split)
        assert (found.name, found.split, len(found)) == (kind, split, len(wanted))
        np.testing.assert_array_equal(found.labels, wanted.labels)
        assert found.classes == (wanted.classes if kind == "hf" else tuple("0123456789"))
        assert wanted.sizes is not None and found.sizes is not None
        np.testing.assert_array_equal(found.sizes, wanted.sizes)
        names = [f"{i:04d}" for i in range(len(wanted))]
        assert [name.removesuffix(".jpg") for name in found.ids] == names
        for row in range(len(wanted)):
            np.testing.assert_array_equal(found.read(row), wanted.read(row))
    assert evaluation_split(DatasetSpec(f"{kind}:{folder / kind}")) == "test"


def test_order_and_membership_are_in_the_fingerprint(kind: str, folder: Path) -> None:
    target = open_target(f"{kind}:{folder / kind}")
    again = open_target(f"{kind}:{folder / kind}")
    assert again.identity() == target.identity()
    order = np.arange(len(target))
    turned = target.chosen(np.r_[1, 0, order[2:]])
    np.testing.assert_array_equal(turned.read(0), target.read(1))
    others = [turned, target.chosen(order[1:]), target.limited(30)]
    assert len({target.fingerprint, *(each.fingerprint for each in others)}) == 4
    strict = open_target(f"{kind}:{folder / kind}", strict=True)
    assert strict.fingerprint == target.fingerprint
    assert strict.contents.startswith("sha256:") and not target.contents


def test_a_kept_view_is_known_by_the_file_that_holds_it(kind: str, folder: Path) -> None:
    """So that a view cache notices a shard that was written anew with images of equal sizes."""
    target = open_target(f"{kind}:{folder / kind}")
    assert isinstance(target.reader, PackedImages)
    before = target.reader.stamp(0), target.reader.stamp(59)
    for path in (folder / kind).rglob("*"):
        if path.is_file():
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    again = open_target(f"{kind}:{folder / kind}")
    assert isinstance(again.reader, PackedImages)
    after = again.reader.stamp(0), again.reader.stamp(59)
    assert all(new[0] == old[0] and new[1] > old[1] for new, old in zip(after, before, strict=True))


def test_contents_are_those_of_the_same_files(folder: Path, plain: dict[str, Target]) -> None:
    """Equal ids and bytes give equal contents, whatever file they are in."""
    found = {
        open_target(f"{kind}:{folder / kind}", strict=True).contents for kind in ("hf", "parquet")
    }
    assert len(found) == 1


def test_samples_travel_to_new_processes(kind: str, folder: Path) -> None:
    """As to loader processes, by fork and by spawn, after the parent has read."""
    target = open_target(f"{kind}:{folder / kind}")
    rows = [59, 0, 31, 30, 29]
    wanted = read_all(target, rows)
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.apply(read_all, (target, rows)) == wanted
    assert len(pickle.dumps(target)) < 200_000


def test_labels_are_made_checked_and_trained_on(
    kind: str, folder: Path, tmp_path: Path, sskt: Run
) -> None:
    target, cache = f"{kind}:{folder / kind}", tmp_path / "labels"
    common = ["--target", target, "--cache", cache, "--policy", "pad-crop-flip"]
    made = sskt("cache-teachers", *common, "--source", f"t={TINY}:build", "--seeds", 1)
    assert made[0] == 0, made
    source = ["--source", f"t={TINY}:build"]
    checked = sskt("verify", "--cache", cache, "--recompute", 5, *source)
    assert checked[0] == 0, checked
    run = ["--epochs", 1, "--batch-size", 20, "--device", "cpu", "--out", tmp_path / "run"]
    status, out, err = sskt(
        "train", *common, "--source", "t", "--model", "resnet20", "--workers", 2, *run
    )
    assert status == 0, err
    assert "60" in out + err


def test_labels_of_another_order_are_refused(
    kind: str, folder: Path, plain: dict[str, Target], tmp_path: Path, sskt: Run
) -> None:
    """Another machine has the same samples in another order, under the same name."""
    cache = tmp_path / "labels"
    target = open_target(f"{kind}:{folder / kind}")
    cache_teachers(target, f"t={TINY}:build", cache=cache, seeds=1, policy="pad-crop-flip")
    here = tmp_path / kind
    here.mkdir()
    rows = rows_of(plain["train"])[::-1]
    if kind == "wds":
        write_tar(here / "train-0.tar", rows)
    elif kind == "parquet":
        write_parquet(here / "train-0.parquet", rows)
    else:
        dataset = datasets.load_from_disk(str(folder / "hf"))["train"]
        dataset.select(range(59, -1, -1)).save_to_disk(str(here))
    status, _, err = sskt(
        "train", "--target", f"{kind}:{here}", "--cache", cache, "--source", "t",
        "--test-split", "none", "--epochs", 1, "--device", "cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    assert status == 2
    assert "was not made from this data: the names, order or sizes of the files" in err


def test_a_label_set_never_chooses_a_dataset_of_the_hub(
    folder: Path, tmp_path: Path, sskt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "labels"
    target = open_target(f"hf:{folder / 'hf'}")
    done = cache_teachers(target, f"t={TINY}:build", cache=cache, seeds=1, policy="pad-crop-flip")
    name = done.label_sets[0].name
    metadata = cache / name / "zarr.json"
    recorded = f"hf:{folder / 'hf'}"
    assert open_label_set(cache / name).attributes["made"]["target"] == recorded
    metadata.write_text(metadata.read_text().replace(recorded, "hf:someone/else"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the hub was asked"))
    status, _, err = sskt("verify", "--cache", cache, "--recompute", 1)
    assert status == 2
    assert "give --target" in err


# --- names, splits, columns, labels -------------------------------------------------------------


def test_names_in_the_cache(folder: Path) -> None:
    assert own_name("hf:owner/food") == "food"
    assert own_name("hf:owner/food:large") == "food-large"
    assert own_name(f"hf:{folder / 'hf'}") == "hf"
    assert own_name(f"wds:{folder}/wds/train-{{000000..000001}}.tar") == "wds"
    assert own_name(f"wds:{folder}/wds/train-000000.tar") == "train-000000"
    assert own_name(f"parquet:{folder / 'parquet'}") == "parquet"


def test_patterns_and_single_files(folder: Path, plain: dict[str, Target]) -> None:
    whole = open_target(f"wds:{folder / 'wds'}")
    for pattern in ("train-{000000..000001}.tar", "train-*.tar"):
        found = open_target(f"wds:{folder / 'wds'}/{pattern}")
        assert found.fingerprint == whole.fingerprint
    one = open_target(f"parquet:{folder}/parquet/test-00001-of-00002.parquet")
    np.testing.assert_array_equal(one.labels, plain["test"].labels[10:])
    with pytest.raises(MissingData, match=r"shard .*train-000002.tar of the pattern .* is missing"):
        open_target(f"wds:{folder}/wds/train-{{000000..000002}}.tar")
    with pytest.raises(MissingData, match=r"no such file or folder; give a folder of \.tar "):
        open_target(f"wds:{folder}/nowhere")
    with pytest.raises(MissingData, match="only train; name one with --test-split"):
        evaluation_split(DatasetSpec(f"wds:{folder}/wds/train-*.tar"))


def test_splits_in_folders_and_words(tmp_path: Path, plain: dict[str, Target]) -> None:
    rows = rows_of(plain["test"])
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", rows[:3])
    assert len(open_target(f"wds:{tmp_path}", "validation")) == 3
    with pytest.raises(UnknownName, match=r"unknown split of --target wds:.* 'test'; known: train"):
        open_target(f"wds:{tmp_path}", "test")
    write_tar(tmp_path / "1.tar", rows[:3])
    with pytest.raises(InputError, match=r"in the folder itself \(1.tar\) and in its folder train"):
        open_target(f"wds:{tmp_path}")
    other = tmp_path / "words"
    other.mkdir()
    write_tar(other / "net1k-Validation-00.tar", rows[:2])
    write_tar(other / "net1k-train-00.tar", rows[:3])
    assert [len(open_target(f"wds:{other}", split)) for split in ("train", "val")] == [3, 2]
    write_tar(other / "more-00.tar", rows[:3])
    with pytest.raises(InputError, match=r"more-00.tar has not the name of one split"):
        open_target(f"wds:{other}")


def test_keys_that_come_in_two_shards(tmp_path: Path, plain: dict[str, Target]) -> None:
    rows = rows_of(plain["test"])
    for number in (0, 1):
        write_tar(tmp_path / f"{number}.tar", rows[:2])
    assert list(open_target(f"wds:{tmp_path}").ids) == ["0/0000", "0/0001", "1/0000", "1/0001"]
    write_parquet(tmp_path / "0.parquet", [("", *rows[0][1:]), ("", *rows[1][1:])])
    assert list(open_target(f"parquet:{tmp_path}").ids) == ["0", "1"]


def test_classes_by_name_are_those_of_all_splits(
    kind: str, tmp_path: Path, plain: dict[str, Target]
) -> None:
    """A split that lacks a class numbers the others as the whole dataset does."""
    words = {"train": ["b", "a", "c", ""], "test": ["c", "a"]}
    saved = {}
    for split, names in words.items():
        rows = rows_of(plain["test"])[: len(names)]
        if kind == "wds":
            named: Any = [(*row[:2], name) for row, name in zip(rows, names, strict=True)]
            write_tar(tmp_path / f"{split}-0.tar", named)
        columns: dict[str, Any] = {"image": [row[1] for row in rows], "label": names}
        if kind == "parquet":
            parquet.write_table(pyarrow.table(columns), tmp_path / f"{split}.parquet")
        saved[split] = datasets.Dataset.from_dict(columns)
    if kind == "hf":
        datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "set"))
    place = tmp_path / "set" if kind == "hf" else tmp_path
    train, test = (open_target(f"{kind}:{place}", split) for split in words)
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.labels.tolist() == [1, 0, 2, -1] and test.labels.tolist() == [2, 0]


def test_several_labels_and_class_names_of_parquet(
    tmp_path: Path, plain: dict[str, Target]
) -> None:
    rows = rows_of(plain["test"])[:3]
    features = datasets.Features(
        picture=datasets.Image(),
        labels=datasets.List(datasets.ClassLabel(names=["cat", "dog", "emu"])),
    )
    columns = {
        "picture": [{"bytes": data, "path": None} for _, data, _ in rows],
        "labels": [[0, 2], [], [1]],
    }
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.to_parquet(str(tmp_path / "train.parquet"))
    dataset.save_to_disk(str(tmp_path / "hf"))
    for target in (f"parquet:{tmp_path}/train.parquet", f"hf:{tmp_path / 'hf'}"):
        found = open_target(target)
        assert found.classes == ("cat", "dog", "emu")
        assert found.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_a_folder_of_parquet_as_a_dataset_of_hugging_face(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is unpacked once, into the cache of ``datasets``."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = open_target(f"hf:{folder / 'parquet'}", "test")
    wanted = open_target(f"parquet:{folder / 'parquet'}", "test")
    assert found.fingerprint == wanted.fingerprint


def test_columns_by_name(tmp_path: Path, plain: dict[str, Target]) -> None:
    rows = rows_of(plain["test"])[:4]
    images = [data for _, data, _ in rows]
    table = {"img": images, "mask": images, "fine": [0, 1, 2, 3], "coarse": [0, 0, 1, 1]}
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table(table), path)
    with pytest.raises(InputError, match=r"may be the image: img, mask; name one with --columns"):
        open_target(f"parquet:{path}")
    found = open_target(f"parquet:{path}", columns="image=img,label=coarse")
    assert found.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"no column 'none', which --columns names as label"):
        open_target(f"parquet:{path}", columns="image=img,label=none")
    with pytest.raises(UnknownName, match="unknown column in --columns 'path'"):
        open_target(f"parquet:{path}", columns="path=img")
    with pytest.raises(InputError, match="expected NAME=COLUMN, each once, found image"):
        open_target(f"parquet:{path}", columns="image")


def test_without_labels(
    kind: str, tmp_path: Path, plain: dict[str, Target], caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(plain["test"])[:2]
    images = {"image": [data for _, data, _ in rows]}
    if kind == "wds":
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for name, data, _ in rows:
                info = tarfile.TarInfo(f"./deep/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    elif kind == "parquet":
        parquet.write_table(pyarrow.table(images), tmp_path / "0.parquet")
    else:
        datasets.Dataset.from_dict(images).save_to_disk(str(tmp_path / "set"))
    found = open_target(f"{kind}:{tmp_path / 'set' if kind == 'hf' else tmp_path}")
    assert found.classes == () and found.labels.tolist() == [-1, -1]
    assert "has no labels" in caplog.text
    assert list(found.ids) == (["deep/0000", "deep/0001"] if kind == "wds" else ["0", "1"])


# --- what is refused ----------------------------------------------------------------------------


def tar_of(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return f"wds:{path}"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["0.cls"], r"sample 0 has no image, only cls; name the extension of the images"),
        (["0.jpg", "0.png"], r"sample 0 has several images \(jpg, png\); name the extension"),
        (["0.jpg", "0.pyd"], r"member .pyd may hold a pickled object, which can run code and"),
        (["0.jpg", "0.cls", "1.jpg", "0.txt"], r"sample 0 has no image, only txt"),
        (["0.jpg", "0.JPG"], r"0.JPG comes twice; a key may be of one sample only"),
        (["0.jpg", "0.json"], r"member 0.json cannot be read"),
        (["README"], r"shard .*0.tar has no samples"),
    ],
)
def test_samples_that_are_none(
    members: list[str], message: str, tmp_path: Path, plain: dict[str, Target]
) -> None:
    image = rows_of(plain["test"])[0][1]
    content = {name: image if name.lower().endswith(("jpg", "png")) else b"{1" for name in members}
    with pytest.raises(InputError, match=message):
        open_target(tar_of(tmp_path / "0.tar", content))


def test_pickles_are_never_read(tmp_path: Path, plain: dict[str, Target]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    image = rows_of(plain["test"])[0][1]
    evil = {"0.jpg": image, "0.cls": b"3", "0.pyd": pickle.dumps(Evil()), "0.pth": b"x"}
    target = tar_of(tmp_path / "0.tar", evil)
    assert open_target(target).labels.tolist() == [3]
    with pytest.raises(InputError, match=r"members .pyd may hold pickled objects, which can run"):
        open_target(target, columns="label=pyd")
    assert not (tmp_path / "ran").exists()


def test_fields_and_members_by_name(tmp_path: Path, plain: dict[str, Target]) -> None:
    image = rows_of(plain["test"])[0][1]
    members = {"0.jpg": b"no image", "0.png": image, "0.txt": b" emu\n", "0.json": b'{"kind": 4}'}
    target = tar_of(tmp_path / "0.tar", members)
    assert open_target(target, columns="image=png,label=kind").labels.tolist() == [4]
    assert open_target(target, columns="image=png,label=txt").classes == ("emu",)
    with pytest.raises(InputError, match=r"0.tar, byte 512 is no image of a known format"):
        open_target(target, columns="image=jpg")


def test_damaged_shards_are_named(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "wds" / "test-000000.tar").read_bytes()
    path = tmp_path / "0.tar"
    for size in (1_000, 20 * 512, len(whole) // 2, len(whole) - 10240):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"0.tar (is cut|is no tar file|has no samples)"):
            open_target(f"wds:{path}")
    for at in (0, 156, 1536):  # in headers
        path.write_bytes(whole[:at] + b"\xff\xff" + whole[at + 2 :])
        with pytest.raises(InputError, match=r"0.tar is (cut or damaged|no tar file)"):
            open_target(f"wds:{path}")
    path.write_bytes(whole)
    target = open_target(f"wds:{path}")
    path.write_bytes(whole[:2_000])
    with pytest.raises(MissingData, match="became shorter since it was opened"):
        target.read(9)


def test_an_image_that_is_damaged_is_named(tmp_path: Path, plain: dict[str, Target]) -> None:
    rows = rows_of(plain["test"])[:3]
    rows[1] = (rows[1][0], rows[1][1][:200], 0)
    write_parquet(tmp_path / "0.parquet", rows)
    target = open_target(f"parquet:{tmp_path}")
    assert target.read(2).shape == (32, 32, 3)
    with pytest.raises(BadImage, match=r"0.parquet, row group 0, row 1: .*--on-error skip"):
        target.read(1)


def test_compressed_shards_are_refused(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz") as tar:
        tar.add(folder / "wds" / "test-000000.tar", "0.jpg")
    expected = r"train.tar.gz is compressed \(gzip\), so its samples cannot be read in any order; d"
    with pytest.raises(InputError, match=expected):
        open_target(f"wds:{tmp_path}")


def test_large_row_groups_are_refused(
    folder: Path, tmp_path: Path, plain: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_files, "MOST_GROUP_BYTES", 10_000)
    write_parquet(tmp_path / "0.parquet", rows_of(plain["test"]), group=20)
    with pytest.raises(InputError, match=r"row group 0 has 0 MiB, which would be read for each"):
        open_target(f"parquet:{tmp_path}")


def test_parquet_that_has_no_images(tmp_path: Path, plain: dict[str, Target]) -> None:
    path = tmp_path / "0.parquet"
    parquet.write_table(pyarrow.table({"path": ["a.jpg"], "label": [1]}), path)
    with pytest.raises(InputError, match=r"a column of the bytes of images, and it has none; it h"):
        open_target(f"parquet:{path}")
    images: list[Any] = [{"bytes": None, "path": "/etc/passwd"}]
    parquet.write_table(pyarrow.table({"image": images, "label": [1]}), path)
    schema = pyarrow.schema(
        {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})}
    )
    parquet.write_table(pyarrow.table({"image": images}, schema), path)
    with pytest.raises(InputError, match=r"row 0 of row group 0 has no bytes; a file that only"):
        open_target(f"parquet:{path}")
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        open_target(f"parquet:{path}")
    write_parquet(path, rows_of(plain["test"])[:3], label=[{"a": 1}] * 3)
    with pytest.raises(InputError, match="a label is dict; expected the number or the name"):
        open_target(f"parquet:{path}")


def test_datasets_of_hugging_face_that_cannot_be_used(
    folder: Path, tmp_path: Path, plain: dict[str, Target]
) -> None:
    with pytest.raises(UnknownName, match="'val'; known: train, test"):
        open_target(f"hf:{folder / 'hf'}", "val")
    with pytest.raises(MissingData, match=r"nowhere cannot be opened: .*nowhere"):
        open_target(f"hf:{tmp_path}/nowhere")
    words = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
    words.save_to_disk(str(tmp_path / "words"))
    with pytest.raises(InputError, match=r"expected a column of images, and it has none; it has"):
        open_target(f"hf:{tmp_path / 'words'}")
    blobs = datasets.Dataset.from_dict({"image": [b"a word and no more"], "label": [1]})
    blobs.save_to_disk(str(tmp_path / "blobs"))
    with pytest.raises(InputError, match=r"row 0 of hf:.* is no image of a known format"):
        open_target(f"hf:{tmp_path / 'blobs'}")
    path = str(plain["test"].paths[0])  # type: ignore[index]
    features = datasets.Features(image=datasets.Image())
    linked = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": path}]}, features)
    linked.save_to_disk(str(tmp_path / "linked"))  # which embeds the file
    assert len(open_target(f"hf:{tmp_path / 'linked'}")) == 1
    two = {"image": [b"x"], "fine": [0], "coarse": [0]}
    kinds = datasets.Features(
        image=datasets.Image(),
        fine=datasets.ClassLabel(names=["a"]),
        coarse=datasets.ClassLabel(names=["b"]),
    )
    datasets.Dataset.from_dict(two, features=kinds).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(InputError, match=r"may be the label: fine, coarse; name one"):
        open_target(f"hf:{tmp_path / 'two'}")


def test_classes_beyond_the_names(tmp_path: Path, plain: dict[str, Target]) -> None:
    image = rows_of(plain["test"])[0][1]
    target = tar_of(tmp_path / "0.tar", {"0.jpg": image, "0.cls": b"-2"})
    with pytest.raises(InputError, match="expected classes from 0 to 999999, found -2"):
        open_target(target)


def test_shards_of_the_webdataset_library(tmp_path: Path, plain: dict[str, Target]) -> None:
    webdataset = pytest.importorskip("webdataset")
    rows = rows_of(plain["test"])
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for name, data, number in rows:
            writer.write({"__key__": f"deep/{name[:-4]}", "jpg": data, "cls": number, "txt": "x"})
    found = open_target(f"wds:{tmp_path}")
    assert list(found.ids) == [f"deep/{name[:-4]}" for name, *_ in rows]
    np.testing.assert_array_equal(found.labels, plain["test"].labels)
    np.testing.assert_array_equal(found.read(19), plain["test"].read(19))
