"""Operations of commands on large caches: how many files are opened, how many requests are sent.

Seconds depend on the machine. These counts must not grow faster than what is asked for.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.helpers import TINY
from support.random_labels import SEEDS, make_labels
from support.small_targets import write_jpegs

from sskt.teacher_cache.label_sets.create import look_over, summaries
from sskt.teacher_cache.storage.object_store import BucketStorage

Sskt = Callable[..., tuple[int, str, str]]
ENCODINGS = ("f16", "u8", "root4", *(f"topk-{k}" for k in range(1, 5)))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of the system that name a path below the folder of the test."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def counting(path: Any, *arguments: Any, **options: Any) -> Any:
            counts[name] += not isinstance(path, int) and str(tmp_path) in os.fspath(path)
            return call(path, *arguments, **options)

        return counting

    for name in ("open", "stat", "scandir", "listdir"):
        monkeypatch.setattr(os, name, counted(name))
    return counts


def many_sets(cache: Path) -> None:
    for encoding in ENCODINGS:
        make_labels(cache, encoding, samples=20)


def test_ls_reads_the_metadata_of_each_set_and_lists_one_folder_of_each_seed(
    tmp_path: Path, calls: Counter[str]
) -> None:
    many_sets(tmp_path / "cache")
    inside = [path for path in (tmp_path / "cache").rglob("*") if ".locks" not in path.parts]
    folders = sum(path.is_dir() for path in inside)
    calls.clear()
    sets, damaged = look_over(tmp_path / "cache")
    assert len(sets) == len(ENCODINGS) and not damaged
    documents = sum(1 + len(label_set.arrays) for label_set in sets)
    assert calls["open"] == documents
    calls.clear()
    assert all(found["coverage"] == [1.0] * SEEDS for found in summaries(sets))
    assert calls["scandir"] == len(sets) * (2 + SEEDS) and calls["open"] == 0
    published_index = len(sets)
    assert calls["stat"] == len(inside) - folders + published_index


def test_resuming_reads_the_record_of_each_shard_and_looks_at_its_files(
    tmp_path: Path, calls: Counter[str], sskt: Sskt
) -> None:
    samples, few, many = 6, 2, 12
    images = write_jpegs(tmp_path / "images", samples)
    run: tuple[object, ...] = (
        "cache-teachers",
        "--source",
        f"tiny={TINY}:build",
        "--target",
        images,
    )
    run += ("--cache", tmp_path / "cache", "--policy", "pad-crop-flip", "--shard-rows", 1)
    run += ("--workers", 0)
    counted = []
    for seeds in (few, many):
        assert sskt(*run, "--seeds", seeds)[0] == 0
        calls.clear()
        status, out, _ = sskt(*run, "--seeds", seeds)
        assert status == 0 and f"0 labels written (0/s), {samples * seeds} reused" in out
        counted.append(Counter(calls))
    shards = (many - few) * samples
    grown = {name: (counted[1][name] - counted[0][name]) / shards for name in calls}
    # Of each shard the record is read. Sizes are looked at before that (the record's and those of
    # the three files), when missing shards are counted, and for the bytes that the command prints.
    assert grown["open"] == 1.0
    assert grown["stat"] == 8.0
    # Each folder is read twice: for what killed writers have left, and for the bytes.
    assert grown["scandir"] == 2 * (samples + 2) / samples


def test_a_bucket_is_asked_four_times_for_a_label_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstore = pytest.importorskip("obstore")
    from obstore.store import LocalStore

    many_sets(tmp_path / "cache")
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(obstore, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return call(*arguments, **options)

        return counting

    for name in ("head", "get", "get_range", "list", "list_with_delimiter"):
        monkeypatch.setattr(obstore, name, counted(name))
    home = BucketStorage(LocalStore(str(tmp_path / "cache")), "s3://made", "")
    sets, damaged = look_over(home)
    assert len(sets) == len(ENCODINGS) and not damaged
    found = summaries(sets)
    assert [one["name"] for one in found] == [label_set.name for label_set in sets]
    assert all(one["coverage"] == [1.0] * SEEDS for one in found)
    assert counts == {
        "list_with_delimiter": 1,
        "get": sum(1 + len(label_set.arrays) for label_set in sets),
        "list": len(sets),
    }
