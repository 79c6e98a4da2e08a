"""Every damage of every kind of file of a cache: found by ``verify``, and never used.

The files of a run are damaged in tests/trainer/loop/test_run_folder.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.damage import ANOTHER_KIND, FAULTS, in_time
from support.helpers import TINY
from support.random_labels import make_labels

from sskt.teacher_cache.errors import SsktError
from sskt.teacher_cache.label_sets.create import open_label_set

Sskt = Callable[..., tuple[int, str, str]]
SECONDS = 30


FILES = {
    "zarr.json": "group",
    "labels/zarr.json": "array",
    "view_check/zarr.json": "array",
    "labels/c/1/0/0": "shard",
    "view_check/c/1/0": "shard",
    "view_check/c/1/0.json": "record",
    "index/c/1/1/0": "shard",
    "value/c/1/1/0": "shard",
    "index/zarr.json": "array",
    "seed/zarr.json": "alike",
    "seed/c/0": "alike",
    "sample/zarr.json": "array",
    "sample/c/0": "array",
    "class/zarr.json": "alike",
    "class/c/0": "alike",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By encoding: a label set of two blocks and three seeds, and another one like it."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        encoding: (
            make_labels(folder / encoding, encoding, samples=600).path,
            make_labels(folder / f"other {encoding}", encoding, samples=601, salt=1).path,
        )
        for encoding in ("f16", "topk-3")
    }


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with in_time(SECONDS):
        yield


CASES = [
    (name, fault)
    for name, kind in FILES.items()
    for fault in FAULTS
    if kind != "alike" or fault not in ("swapped", "link to a sibling")  # both have that file
]


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_every_damage_of_every_file_is_found(
    name: str, fault: str, sets: dict[str, tuple[Path, Path]], tmp_path: Path, sskt: Sskt
) -> None:
    whole, other = sets["topk-3" if name.startswith(("index", "value")) else "f16"]
    damaged = shutil.copytree(whole, tmp_path / "cache" / whole.name)
    sibling = shutil.copytree(other, tmp_path / "other" / other.name) / name
    if FILES[name] in ("shard", "record"):
        sibling = damaged / name.replace("/c/1/", "/c/0/")
    FAULTS[fault](damaged / name, sibling)
    assert used(damaged) in ("refused", used(whole))
    status, out, err = sskt("verify", "--cache", tmp_path / "cache")
    assert status == 1 and not err, (out, err)
    assert damaged.name in out and "clean" not in out


def used(path: Path) -> object:
    """All labels and view checks as a training reads them; "refused" for a one-line error."""
    try:
        opened = open_label_set(path)
        return [
            [array.tobytes() for array in (*opened.read(seed, 0, 600).values(), checks)]
            for seed in range(2)
            for checks in [opened.read_checks(seed, 0, 600)]
        ]
    except SsktError as error:
        assert "\n" not in str(error)
        return "refused"


LOCK_FAULTS = [name for name in FAULTS if name not in ("longer", "swapped")]


@pytest.mark.parametrize("fault", LOCK_FAULTS)
def test_a_damaged_lock_is_named_or_does_no_harm(
    fault: str, images: Path, label_cache: Path, tmp_path: Path, sskt: Sskt
) -> None:
    cache = shutil.copytree(label_cache, tmp_path / "cache")
    (lock,) = (cache / ".locks").glob("*.lock")
    lock.write_bytes(b"12")
    FAULTS[fault](lock, lock.with_name("other.lock"))
    more = ("--policy", "pad-crop-flip", "--encoding", "f32", "--seeds", 4, "--workers", 0)
    source = ("--source", f"tiny={TINY}:build", "--shard-rows", 16)
    status, out, err = sskt("cache-teachers", "--target", images, "--cache", cache, *source, *more)
    if fault in ANOTHER_KIND:
        assert status == 2 and err.splitlines()[-1].startswith(f"sskt: {lock} is in the place"), err
        lock.rmdir() if fault == "folder" else lock.unlink()
        status, out, err = sskt(
            "cache-teachers", "--target", images, "--cache", cache, *source, *more
        )
    assert status == 0 and "60 labels written" in out, (out, err)
    status, out, err = sskt("verify", "--cache", cache)
    assert status == 0 and ": clean" in out, (out, err)


def test_whole_sets_are_clean(sets: dict[str, tuple[Path, Path]], sskt: Sskt) -> None:
    for whole, other in sets.values():
        for path in (whole, other):
            status, out, err = sskt("verify", "--cache", path.parent)
            assert status == 0 and ": clean" in out, err
