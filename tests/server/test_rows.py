"""Rows in any order are those of the store, whatever happens to memory and files."""

from __future__ import annotations

import logging
import threading
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
    writer_of,
)

from sskt.server import rows as server_rows
from sskt.server.metrics.metrics import Metrics
from sskt.server.rows import RowCache
from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels, InputError
from sskt.teacher_cache.format.encodings import Encoded
from sskt.teacher_cache.label_sets.create import open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet

ENCODINGS = ("f32", "f16", "root4", "u8", "topk-3")
CHUNK = 512 * 4 + 512 * CLASSES * 2
"""Bytes of a whole chunk, f16; here also of a whole shard."""

Seed = int | np.ndarray[Any, np.dtype[np.int64]]


def new_cache(folder: Path, budget: int = 2**24) -> RowCache:
    """That of one worker."""
    folder.mkdir(exist_ok=True)
    return RowCache(budget, Metrics(folder, CollectorRegistry()))


def stored(label_set: LabelSet, seed: int) -> Encoded:
    """All rows of a seed by the store's own way."""
    checks = {"view_check": label_set.read_checks(seed, 0, SAMPLES)}
    return checks | label_set.read(seed, 0, SAMPLES)


def same(found: Encoded, wanted: Encoded) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def check(served: RowCache, label_set: LabelSet, seed: int, *ids: int) -> None:
    rows = np.array(ids)
    wanted = {name: array[rows] for name, array in stored(label_set, seed).items()}
    same(served.rows(label_set, seed, rows), wanted)


def kept(served: RowCache) -> list[tuple[int, int]]:
    """Seed and block of each shard of which chunks are kept, the one unused for longest first."""
    return [(key[2].seed, key[2].block) for key in served._kept]


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
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowCache:
    budget = {"roomy": 2**24, "narrow": 3 * CHUNK, "none": 0}[request.param]
    return new_cache(tmp_path_factory.mktemp("run"), budget)


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
    served: RowCache,
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
    if served._budget == 2**24:
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
    served = new_cache(tmp_path / "run")
    for call in (served.rows, served.hot_rows):
        with pytest.raises(error, match=r"has rows 0 to 1299|has seeds 0 to 2, not 3"):
            call(label_set, seed, np.array([0, row]))


# --- kept under the budget ---------------------------------------------------------------------


def test_a_chunk_is_decoded_once(
    label_set: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    read = server_rows._read

    def counted(*arguments: Any) -> Encoded:
        decoded.append(arguments[1:])
        return read(*arguments)

    monkeypatch.setattr(server_rows, "_read", counted)
    served = new_cache(tmp_path / "run")
    assert served.hot_rows(label_set, 0, np.array([0])) is None
    for ids in ([0, 600, 1200, 5], [1, 2], [700, 1299]):
        check(served, label_set, 0, *ids)
    assert decoded == [(0, 0, ROWS), (0, ROWS, 2 * ROWS), (0, 2 * ROWS, SAMPLES)]
    threads = [
        threading.Thread(target=served.rows, args=(label_set, 1, np.array([number])))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert decoded[3:] == [(1, 0, ROWS)]


@pytest.mark.parametrize("budget", [2 * CHUNK + CHUNK // 2, 0])
def test_the_budget_holds_with_many_threads(
    label_set: LabelSet, tmp_path: Path, budget: int
) -> None:
    served = new_cache(tmp_path / "run", budget)
    most: list[int] = []
    failed: list[BaseException] = []

    def worker(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            for _ in range(12):
                seed = int(rng.integers(SEEDS))
                ids = rng.integers(0, SAMPLES, 5)
                wanted = {name: array[ids] for name, array in every[seed].items()}
                same(served.rows(label_set, seed, ids), wanted)
                with served._guard:
                    chunks = [c for shard in served._kept.values() for c in shard.values()]
                    held = sum(array.nbytes for c in chunks for array in c.values())
                    most.append(held)
                    assert held == served._bytes
        except BaseException as error:
            failed.append(error)

    every = [stored(label_set, seed) for seed in range(SEEDS)]
    threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert max(most) <= budget
    assert not budget or max(most) > CHUNK


def test_the_shard_unused_for_longest_is_dropped(label_set: LabelSet, tmp_path: Path) -> None:
    served = new_cache(tmp_path / "run", 2 * CHUNK)
    check(served, label_set, 0, 0)
    check(served, label_set, 0, ROWS)
    check(served, label_set, 0, 1)  # block 0
    check(served, label_set, 1, 0)
    assert kept(served) == [(0, 0), (1, 0)]


def test_a_budget_that_is_too_small_is_told_once(
    label_set: LabelSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = new_cache(tmp_path / "run", CHUNK - 1)
    for row in (0, 3, ROWS, SAMPLES - 1):  # the last block is smaller and fits
        check(served, label_set, 0, row)
    assert kept(served) == [(0, 2)]
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert label_set.name in message and "--memory" in message


# --- shards that change -----------------------------------------------------------------------


@pytest.mark.parametrize("budget", [2**24, 0])
def test_a_shard_that_was_computed_again(label_set: LabelSet, tmp_path: Path, budget: int) -> None:
    served = new_cache(tmp_path / "run", budget)
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
    served, read, times = new_cache(tmp_path / "run", budget), server_rows._read, [1, 2]

    def overtaken(*arguments: Any) -> Encoded:
        rows = read(*arguments)
        if times:
            replace_shard(label_set, 0, 0, times.pop())
        return rows

    monkeypatch.setattr(server_rows, "_read", overtaken)
    rows = served.rows(label_set, 0, np.array([3, 4]))
    assert not times
    same(rows, {name: array[[3, 4]] for name, array in stored(label_set, 0).items()})


def test_a_shard_that_is_removed(label_set: LabelSet, tmp_path: Path) -> None:
    served = new_cache(tmp_path / "run")
    check(served, label_set, 0, 0)
    label_set.commit_path(label_set.shard(0, 0)).unlink()
    assert served.hot_rows(label_set, 0, np.array([0])) is None
    with pytest.raises(IncompleteLabels, match="seed 0 lacks samples 0 to 511"):
        served.rows(label_set, 0, np.array([600, 0]))
    found = served.missing(label_set, np.array([0, 1, 0]), np.array([0, 0, 600]))
    assert found == [label_set.shard(0, 0)]


@pytest.mark.parametrize("array", ["view_check", "labels"])
@pytest.mark.parametrize("fault", ["flipped", "empty", "gone"])
@pytest.mark.parametrize("budget", [2**24, 0])
def test_a_damaged_shard(
    label_set: LabelSet, tmp_path: Path, array: str, fault: str, budget: int
) -> None:
    served = new_cache(tmp_path / "run", budget)
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
        with pytest.raises(CorruptStore, match="sskt verify"):
            served.rows(label_set, 0, np.array([0]))
    assert kept(served) == [], "nothing of it is kept"
    wanted = {name: rows[[ROWS]] for name, rows in stored(label_set, 1).items()}
    same(served.rows(label_set, 1, np.array([ROWS])), wanted)


def test_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pytest.importorskip("obstore.store")
    from sskt.teacher_cache.storage.object_store import BucketStorage

    place = BucketStorage(store.MemoryStore(), "s3://bucket", "lab")
    label_set = make_labels(place, without=[(0, 1)])
    served = new_cache(tmp_path / "run")
    check_rows = np.array([0, SAMPLES - 1])
    before = served.rows(label_set, 0, check_rows)
    assert served.hot_rows(label_set, 0, check_rows) is None, "a network is not for the event loop"
    with pytest.raises(IncompleteLabels, match="lacks samples 512 to 1023"):
        served.rows(label_set, 0, np.array([ROWS]))
    place = BucketStorage(place.bucket, place.root, "lab").below(label_set.name)
    writer = writer_of(open_label_set(place))
    write_shard(writer, writer.shard(0, 1))
    assert served.missing(label_set, 0, np.array([ROWS])) == []
    wanted = {name: rows[[ROWS]] for name, rows in stored(writer, 0).items()}
    same(served.rows(label_set, 0, np.array([ROWS])), wanted)
    monkeypatch.setattr(server_rows, "LISTED_SECONDS", 0.0)
    replace_shard(writer, 0, 0, salt=1)
    after = served.rows(label_set, 0, check_rows)
    assert after["view_check"][0] != before["view_check"][0]
    assert after["view_check"][1] == before["view_check"][1]
