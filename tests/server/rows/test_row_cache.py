"""Rows in any order are the store's rows, whatever happens to slabs, disk, files and workers."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from support.random_labels import (
    CLASSES,
    ROWS,
    SAMPLES,
    SEEDS,
    make_labels,
    replace_shard,
    write_shard,
)

from sskt.server.metrics.metrics import Metrics
from sskt.server.rows import row_cache as slabs
from sskt.server.rows import row_cache_files as slab_files
from sskt.server.rows import shard_files
from sskt.server.rows.row_cache import Slabs
from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels, InputError
from sskt.teacher_cache.format.encodings import Encoded
from sskt.teacher_cache.label_sets.create import open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet

ENCODINGS = ("f32", "f16", "u8", "topk-3")
SLAB = 512 * 4 + 512 * CLASSES * 2
"""Bytes of a whole shard's slab, f16."""

Seed = int | np.ndarray[Any, np.dtype[np.int64]]


def new_slabs(folder: Path, budget: int = 2**24) -> Slabs:
    """One worker's."""
    folder.mkdir(exist_ok=True)
    return Slabs(folder / "slabs", budget, Metrics(folder, CollectorRegistry()))


def stored(label_set: LabelSet, seed: int) -> Encoded:
    """All rows of a seed by the store's own way."""
    checks = {"view_check": label_set.read_checks(seed, 0, SAMPLES)}
    return checks | label_set.read(seed, 0, SAMPLES)


def same(found: Encoded, wanted: Encoded) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def check(served: Slabs, label_set: LabelSet, seed: int, *ids: int) -> None:
    rows = np.array(ids)
    wanted = {name: array[rows] for name, array in stored(label_set, seed).items()}
    same(served.rows(label_set, seed, rows), wanted)


def total(folder: Path) -> int:
    """Bytes of all files of the slabs' folder."""
    sizes = []
    for entry in os.scandir(folder / "slabs"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(entry.stat().st_size)
    return sum(sizes)


def kept(folder: Path) -> list[tuple[int, int]]:
    """Seed and block of each slab."""
    names = (p.name.split("-") for p in (folder / "slabs").glob("*.slab"))
    return sorted((int(seed), int(block)) for _, seed, block, _ in names)


@pytest.fixture
def label_set(tmp_path: Path) -> LabelSet:
    return make_labels(tmp_path / "cache")


# --- any rows ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LabelSet, list[Encoded]]]:
    cache = tmp_path_factory.mktemp("cache")
    sets = {encoding: make_labels(cache, encoding) for encoding in ENCODINGS}
    return {e: (s, [stored(s, seed) for seed in range(SEEDS)]) for e, s in sets.items()}


@pytest.fixture(scope="module", params=["roomy", "narrow", "none"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Slabs:
    budget = {"roomy": 2**24, "narrow": 3 * SLAB, "none": 0}[request.param]
    return new_slabs(tmp_path_factory.mktemp("run"), budget)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    encoding=st.sampled_from(ENCODINGS),
    ids=st.lists(st.integers(0, SAMPLES - 1), max_size=40),
    several=st.booleans(),
    choice=st.data(),
)
def test_any_rows_are_the_stored_rows(
    made: dict[str, tuple[LabelSet, list[Encoded]]],
    served: Slabs,
    encoding: str,
    ids: list[int],
    several: bool,
    choice: st.DataObject,
) -> None:
    label_set, every = made[encoding]
    count = len(ids) if several else 1
    seeds = choice.draw(st.lists(st.integers(0, SEEDS - 1), min_size=count, max_size=count))
    rows = np.array(ids, np.int64)
    each = np.array(seeds, np.int64) if several else np.full(len(ids), seeds[0])
    wanted = {
        name: np.stack([every[s][name][i] for s, i in zip(each, ids, strict=True)])
        if ids
        else array[:0]
        for name, array in every[0].items()
    }
    asked: Seed = np.array(seeds, np.int64) if several else seeds[0]
    hot = served.hot_rows(label_set, asked, rows)
    if hot is not None:
        same(hot, wanted)
    same(served.rows(label_set, asked, rows), wanted)
    if served._folder.budget == 2**24:
        hot = served.hot_rows(label_set, asked, rows)
        assert hot is not None
        same(hot, wanted)


@pytest.mark.parametrize(
    ("seed", "row", "error"),
    [
        (0, -1, InputError),
        (0, SAMPLES, InputError),
        (0, SAMPLES + ROWS, InputError),
        (-1, 0, InputError),
        (SEEDS, 0, IncompleteLabels),
    ],
)
def test_rows_that_are_none(
    label_set: LabelSet, tmp_path: Path, seed: int, row: int, error: type[Exception]
) -> None:
    served = new_slabs(tmp_path / "run")
    for call in (served.rows, served.hot_rows):
        with pytest.raises(error, match=r"has rows 0 to 1299|has seeds 0 to 2, not 3"):
            call(label_set, seed, np.array([0, row]))


# --- made once, kept under the budget ---------------------------------------------------------

WORKERS = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
from prometheus_client import CollectorRegistry
from sskt.server.rows import row_cache as slabs
from sskt.server.metrics.metrics import Metrics
from sskt.teacher_cache.label_sets.create import list_label_sets

cache, run = sys.argv[1:]
(label_set,) = list_label_sets(cache)
read, decoded = slabs._read, []

def worker(ids):
    metrics = Metrics(Path(run), CollectorRegistry())
    rows = slabs.Slabs(Path(run) / "slabs", 2**24, metrics).rows(label_set, 0, np.array(ids))
    return [len(decoded), int(rows["view_check"].astype(np.int64).sum())]

def counted(*arguments):
    decoded.append(arguments)
    return read(*arguments)

def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

go, ready = os.pipe()
told, tell = os.pipe()
children = []
for number in range(4):
    child = os.fork()
    if not child:
        slabs._read = counted
        os.close(ready)
        os.read(go, 1)
        os.write(tell, (json.dumps(worker([0, 600, 1200, 5])) + "\\n").encode())
        os._exit(0)
    children.append(child)
os.close(ready)
statuses = [os.waitpid(child, 0)[1] for child in children]
print(os.read(told, 10000).decode().replace("\\n", " "))

for path in Path(run, "slabs").glob("*.slab"):
    path.unlink()
child = os.fork()
if not child:
    slabs._read = killed
    worker([0])
print(os.waitpid(child, 0)[1], *[p.suffix for p in Path(run, "slabs").glob("*-*")])
slabs._read = counted
print(worker([0, 0])[0], *[p.suffix for p in Path(run, "slabs").glob("*-*")])
"""


def test_processes_at_one_slab(label_set: LabelSet, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", WORKERS, str(label_set.path.parent), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    racing, dying, after = done.stdout.splitlines()
    told = [json.loads(text) for text in racing.replace("] [", "]|[").split("|")]
    checks = stored(label_set, 0)["view_check"].astype(np.int64)
    assert [found for _, found in told] == [int(checks[[0, 600, 1200, 5]].sum())] * 4
    assert sum(count for count, _ in told) == 3, "each of three shards decoded once"
    assert dying == "9 .partial", "killed while making it"
    assert after == "1 .slab", "made by the next one, nothing left over"


def test_the_budget_holds_at_every_moment(
    label_set: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 2 * SLAB + SLAB // 2
    workers = [new_slabs(tmp_path / "run", budget) for _ in range(2)]
    most: list[int] = []
    failed: list[BaseException] = []
    allocate = slab_files._allocate

    def measured(handle: int, size: int) -> None:
        allocate(handle, size)
        most.append(total(tmp_path / "run"))

    def worker(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            for _ in range(12):
                seed = int(rng.integers(SEEDS))
                ids = rng.integers(0, SAMPLES, 5)
                same(
                    workers[number % 2].rows(label_set, seed, ids),
                    {name: array[ids] for name, array in every[seed].items()},
                )
        except BaseException as error:
            failed.append(error)

    every = [stored(label_set, seed) for seed in range(SEEDS)]
    monkeypatch.setattr(slab_files, "_allocate", measured)
    threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(most) > 9, "slabs were made again and again"
    assert max(most) <= budget
    assert not list((tmp_path / "run/slabs").glob("*.partial"))


def all_old(run: Path) -> None:
    """Block 0 of seed 0 the most."""
    for path in (run / "slabs").glob("*.slab"):
        age = 1 if "-0-0-" in path.name else 2
        os.utime(path, (age, age))


def test_the_least_recently_used_goes(
    label_set: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    served = new_slabs(run, 2 * SLAB)
    monkeypatch.setattr(slabs, "FRESH_SECONDS", 0.0)
    for row in (0, ROWS):
        check(served, label_set, 0, row)
    all_old(run)
    check(served, label_set, 0, 1)  # block 0
    check(served, label_set, 1, 0)
    assert kept(run) == [(0, 0), (1, 0)]
    all_old(run)
    other = new_slabs(run, 2 * SLAB)
    check(other, label_set, 0, 2)  # used by any worker
    check(other, label_set, 0, ROWS)
    assert kept(run) == [(0, 0), (0, 1)]


def mapped_but_removed() -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum(".slab (deleted)" in line for line in maps)


def test_a_removed_slab_is_served_and_then_let_go(
    label_set: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = new_slabs(tmp_path / "run")
    check(served, label_set, 0, 1, 2)
    before = mapped_but_removed()
    for path in (tmp_path / "run/slabs").glob("*.slab"):
        path.unlink()
    monkeypatch.setattr(slabs, "FRESH_SECONDS", 1e9)
    check(served, label_set, 0, 3, 4)
    assert mapped_but_removed() == before + 1
    monkeypatch.setattr(slabs, "FRESH_SECONDS", 0.0)
    check(served, label_set, 0, 5, ROWS)
    assert mapped_but_removed() == before
    assert kept(tmp_path / "run") == [(0, 0), (0, 1)]


def test_a_budget_that_is_too_small_is_told_once(
    label_set: LabelSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = new_slabs(tmp_path / "run", SLAB - 1)
    for row in (0, 3, ROWS, SAMPLES - 1):  # the last block is smaller and fits
        check(served, label_set, 0, row)
    assert kept(tmp_path / "run") == [(0, 2)]
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert label_set.name in message and "--memory" in message


# --- a full disk ------------------------------------------------------------------------------


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel lets this process write no larger file (errno EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_slab(
    label_set: LabelSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = new_slabs(tmp_path / "run")
    with files_up_to(2 * SLAB // 3):
        check(served, label_set, 0, 0, SAMPLES - 1, 7)
        check(served, label_set, 0, 1)
    assert kept(tmp_path / "run") == [(0, 2)]
    assert not list((tmp_path / "run/slabs").glob("*.partial"))
    (message,) = [r.getMessage() for r in caplog.records]
    assert "File too large" in message and label_set.name in message
    check(served, label_set, 0, 0)
    assert kept(tmp_path / "run") == [(0, 0), (0, 2)], "kept as soon as there is room"


def test_the_disk_fills_while_a_slab_is_written(
    label_set: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system cannot reserve room."""
    served, pwrite, calls = new_slabs(tmp_path / "run"), os.pwrite, []

    def full(handle: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", full)
    check(served, label_set, 0, 0, 7)
    assert len(calls) == 2
    assert not list((tmp_path / "run/slabs").glob("*-*"))
    check(served, label_set, 0, 0, 7)
    assert kept(tmp_path / "run") == [(0, 0)]


def test_a_full_disk_gives_room_by_removing_slabs(
    label_set: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    served = new_slabs(run)
    fallocate = os.posix_fallocate

    def full(handle: int, offset: int, size: int) -> None:
        if total(run) + size > 2 * SLAB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(handle, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    for seed in range(SEEDS):
        check(served, label_set, seed, 0, ROWS)
        assert len(kept(run)) == 2
    assert {seed for seed, _ in kept(run)} == {SEEDS - 1}


def test_the_folder_is_gone(label_set: LabelSet, tmp_path: Path) -> None:
    served = new_slabs(tmp_path / "run")
    (tmp_path / "run/slabs").rmdir()
    check(served, label_set, 0, 0, SAMPLES - 1)


# --- shards that change -----------------------------------------------------------------------


@pytest.mark.parametrize("budget", [2**24, 0])
def test_a_shard_that_was_computed_again(label_set: LabelSet, tmp_path: Path, budget: int) -> None:
    served = new_slabs(tmp_path / "run", budget)
    before = served.rows(label_set, 1, np.arange(3))
    for salt in (1, 2):
        replace_shard(label_set, 1, 0, salt)
        assert served.hot_rows(label_set, 1, np.arange(3)) is None
        check(served, label_set, 1, 0, 1, 2)
        after = served.rows(label_set, 1, np.arange(3))
        assert (after["view_check"] != before["view_check"]).any()
        before = after


@pytest.mark.parametrize("budget", [2**24, 0])
def test_a_shard_that_changes_while_it_is_decoded(
    label_set: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    served, read, times = new_slabs(tmp_path / "run", budget), slabs._read, [1, 2]

    def overtaken(*arguments: Any) -> Encoded:
        rows = read(*arguments)
        if times:
            replace_shard(label_set, 0, 0, times.pop())
        return rows

    monkeypatch.setattr(slabs, "_read", overtaken)
    rows = served.rows(label_set, 0, np.array([3, 4]))
    assert not times
    same(rows, {name: array[[3, 4]] for name, array in stored(label_set, 0).items()})


def test_a_shard_that_is_removed(label_set: LabelSet, tmp_path: Path) -> None:
    served = new_slabs(tmp_path / "run")
    check(served, label_set, 0, 0)
    label_set.commit_path(label_set.shard(0, 0)).unlink()
    assert served.hot_rows(label_set, 0, np.array([0])) is None
    with pytest.raises(IncompleteLabels, match="seed 0 lacks samples 0 to 511"):
        served.rows(label_set, 0, np.array([600, 0]))
    found = served.lacking(label_set, np.array([0, 1, 0]), np.array([0, 0, 600]))
    assert found == [label_set.shard(0, 0)]


@pytest.mark.parametrize("array", ["view_check", "labels"])
@pytest.mark.parametrize("fault", ["flipped", "empty", "gone"])
@pytest.mark.parametrize("budget", [2**24, 0])
def test_a_damaged_shard(
    label_set: LabelSet, tmp_path: Path, array: str, fault: str, budget: int
) -> None:
    served = new_slabs(tmp_path / "run", budget)
    path = label_set.shard_path(array, label_set.shard(0, 0))
    if fault == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    elif fault == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    for _ in range(2):
        with pytest.raises(CorruptStore, match="verify"):
            served.rows(label_set, 0, np.array([0]))
    assert not list((tmp_path / "run/slabs").glob("*-*")), "nothing of it is kept"
    wanted = {name: rows[[ROWS]] for name, rows in stored(label_set, 1).items()}
    same(served.rows(label_set, 1, np.array([ROWS])), wanted)


def test_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pytest.importorskip("obstore.store")
    from sskt.teacher_cache.storage.object_store import BucketPlace

    place = BucketPlace(store.MemoryStore(), "s3://bucket", "lab")
    label_set = make_labels(place, without=[(0, 1)])
    served = new_slabs(tmp_path / "run")
    check_rows = np.array([0, SAMPLES - 1])
    before = served.rows(label_set, 0, check_rows)
    assert served.hot_rows(label_set, 0, check_rows) is None, "a network is not for the event loop"
    with pytest.raises(IncompleteLabels, match="lacks samples 512 to 1023"):
        served.rows(label_set, 0, np.array([ROWS]))
    writer = open_label_set(BucketPlace(place.bucket, place.root, "lab").below(label_set.name))
    writer.writable = True
    write_shard(writer, writer.shard(0, 1))
    assert served.lacking(label_set, 0, np.array([ROWS])) == []
    wanted = {name: rows[[ROWS]] for name, rows in stored(writer, 0).items()}
    same(served.rows(label_set, 0, np.array([ROWS])), wanted)
    monkeypatch.setattr(shard_files, "LISTED_SECONDS", 0.0)
    replace_shard(writer, 0, 0, salt=1)
    after = served.rows(label_set, 0, check_rows)
    assert after["view_check"][0] != before["view_check"][0]
    assert after["view_check"][1] == before["view_check"][1]
