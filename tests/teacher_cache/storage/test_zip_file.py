"""A label set in one zip file: there and back byte for byte, read in place, damage refused."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.helpers import tree
from support.random_labels import make_labels

import sskt as public
from sskt.teacher_cache.errors import CorruptStore
from sskt.teacher_cache.label_sets.create import list_label_sets, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.zip_file import open_zip

Sskt = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("made"), without=[(1, 2)])


@pytest.fixture(scope="module")
def packed(made: LabelSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same label set in a zip file."""
    from sskt.cli.main import run

    path = tmp_path_factory.mktemp("packed") / "set.zip"
    assert run(["copy", str(made.path.parent), str(path)]) == 0
    return path


def contents(cache: Path) -> dict[str, str]:
    return {k: v for k, v in tree(cache).items() if not k.startswith(".locks/")}


def test_there_and_back(made: LabelSet, packed: Path, tmp_path: Path, sskt: Sskt) -> None:
    status, out, err = sskt("copy", packed, tmp_path / "back")
    assert status == 0 and "8 shards copied" in out, err
    assert contents(tmp_path / "back") == contents(made.path.parent)
    assert sskt("copy", tmp_path / "back", tmp_path / "again.zip")[0] == 0
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_commands_read_it_in_place(made: LabelSet, packed: Path, sskt: Sskt) -> None:
    status, out, err = sskt("ls", "--cache", packed)
    assert status == 0 and made.digest[:12] in out and "2/3" in out, err
    status, out, _ = sskt("verify", "--cache", packed)
    assert status == 1 and "1 of 9 shards are missing (seed 1)" in out and ": 1 problem\n" in out
    (label_set,) = list_label_sets(packed)
    assert label_set.name == made.name and label_set.coverage() == made.coverage()
    again = pickle.loads(pickle.dumps(open_label_set(packed)))
    for opened in (label_set, public.open_label_set(packed), again):
        rows = opened.read(2, 500, 1100)["labels"]
        assert np.array_equal(rows, made.read(2, 500, 1100)["labels"])
    for command in (
        ("rm", "--cache", packed, "--yes", made.name),
        ("copy", made.path.parent, packed),
    ):
        status, _, err = sskt(*command)
        assert status == 2 and ("is read-only" in err or "is there; remove it" in err)


def test_zarr_and_xarray_read_it(made: LabelSet, packed: Path) -> None:
    import zarr
    from zarr.storage import ZipStore

    with ZipStore(packed, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        found = np.asarray(group["labels"][2])  # type: ignore[index]
        assert np.array_equal(found, made.read(2, 0, made.samples)["labels"])
    xarray = pytest.importorskip("xarray")
    with ZipStore(packed, mode="r") as store:
        row = xarray.open_zarr(store, chunks=None).labels.sel(seed=2, sample="4/18.jpg").values
    assert np.array_equal(row, made.read(2, 18, 19)["labels"][0])


def test_several_sets_do_not_fit(tmp_path: Path, sskt: Sskt) -> None:
    for encoding in ("f16", "u8"):
        make_labels(tmp_path / "cache", encoding, samples=20)
    status, _, err = sskt("copy", tmp_path / "cache", tmp_path / "x.zip")
    assert status == 2 and "holds one label set" in err and not (tmp_path / "x.zip").exists()
    status, _, err = sskt("ls", "--cache", tmp_path / "x.zip")
    assert status == 2 and "does not exist" in err


def rezipped(packed: Path, to: Path, **changes: object) -> Path:
    """The same members, written as ``zipfile`` is told to."""
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(to, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), **changes)  # type: ignore[arg-type]
    return to


@pytest.mark.parametrize(
    "name", ["../out", "/etc/passwd", "labels/../../x", ".hidden", "a\\b", "x" * 300, "labels/c/ü"]
)
def test_names_that_lead_elsewhere_are_refused(packed: Path, tmp_path: Path, name: str) -> None:
    path = rezipped(packed, tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as opened:
        opened.writestr(name, b"x")
    with pytest.raises(CorruptStore, match="cannot be a file of a label set"):
        open_zip(path)


def test_what_a_zip_file_may_not_be(packed: Path, tmp_path: Path, sskt: Sskt) -> None:
    small = rezipped(packed, tmp_path / "a.zip", compress_type=zipfile.ZIP_DEFLATED)
    status, _, err = sskt("ls", "--cache", small)
    assert status == 1 and "is compressed" in err and "make the zip file without compression" in err
    twice = rezipped(packed, tmp_path / "b.zip")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "a") as opened:
        opened.writestr("zarr.json", b"{}")
    with pytest.raises(CorruptStore, match=r"it holds zarr\.json twice"):
        open_zip(twice)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as opened:
        opened.writestr("README.md", b"nothing")
    status, _, err = sskt("ls", "--cache", tmp_path / "c.zip")
    assert status == 1 and "has no zarr.json at its root" in err
    (tmp_path / "d.zip").write_bytes(b"no zip")
    status, _, err = sskt("verify", "--cache", tmp_path / "d.zip")
    assert status == 1 and "is not a whole zip file" in err and err.count("\n") == 1


def test_members_that_overlap_are_refused(packed: Path, tmp_path: Path) -> None:
    """Two names for one place would make a small file large."""
    data = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as opened:
        first, second = opened.infolist()[:2]
    entry = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    struct.pack_into("<I", data, entry + 42, first.header_offset + 10)
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    assert second.header_offset > first.header_offset
    with pytest.raises(CorruptStore, match="lies within another file"):
        open_zip(path)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_damage_is_found(packed: Path, tmp_path: Path, sskt: Sskt, where: float, kind: str) -> None:
    data = bytearray(packed.read_bytes())
    at = int(where * (len(data) - 1))
    data[at] ^= 1
    path = tmp_path / "x.zip"
    path.write_bytes(data if kind == "flip" else data[:at])
    status, out, err = sskt("verify", "--cache", path)
    assert status == 1 and "unexpected" not in err, (out, err)
    assert err or "2 problems" in out, out  # one shard is missing anyway


def test_another_file_in_its_place_is_noticed(packed: Path, made: LabelSet, tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(packed.read_bytes())
    (label_set,) = list_label_sets(path)
    path.write_bytes(packed.read_bytes() + b"\0")
    with pytest.raises(CorruptStore, match="was changed while it was read"):
        label_set.read(0, 0, 5)
