"""``sskt ls -v``: its numbers against numpy over the stored arrays; a real source's accuracy."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.helpers import TINY
from support.independent_reader import open_set
from support.small_targets import SOURCE, in_memory

from sskt.teacher_cache.errors import CorruptStore
from sskt.teacher_cache.format.encodings import Encoding, parse_encoding
from sskt.teacher_cache.format.spec import label_set_spec
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling.run import StageOptions, open_sets
from sskt.teacher_cache.sources.source import Preprocessing, Source, freeze
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.tools.audit import SeedAudit, audit, truth_of
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import open_views

Sskt = Callable[..., tuple[int, str, str]]
Float64 = NDArray[np.float64]

NAMES = tuple(f"thing {i}" for i in range(12))


def source_of(classes: Sequence[str]) -> Source:
    """A source that has only its classes: the tests write the labels themselves."""
    from torch import nn

    class Net(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.new_zeros(len(x), len(classes))

    return freeze("made", "made", Net(), Preprocessing(8), tuple(classes))


def log_probabilities(rows: int, classes: int, seed: int) -> NDArray[np.float32]:
    logits = np.random.default_rng(seed).normal(0, 3, (rows, classes))
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits.astype(np.float32)


def written(
    cache: Path,
    rows: int,
    *,
    encoding: str = "f16",
    classes: Sequence[str] = NAMES,
    seeds: int = 2,
    shard_rows: int = 10,
    empty: Sequence[int] = (),
    unchecked: Sequence[int] = (),
    damaged: Sequence[int] = (),
    left_out: Sequence[tuple[int, int]] = (),
) -> LabelSet:
    """A label set over ``rows`` images in which the named rows are special under each seed.

    left_out: (seed, block) of shards that are not stored.
    """
    how = parse_encoding(encoding)
    views = open_views(in_memory(rows, 1, 1), parse_policy("pad-crop-flip"))
    source = source_of(classes)
    spec = label_set_spec(views, source, how)
    label_set = create_label_set(cache, spec, source.classes, seeds, shard_rows=shard_rows)
    for shard in label_set.shards(range(seeds)):
        if (shard.seed, shard.block) in left_out:
            continue
        log_p = log_probabilities(rows, len(classes), shard.seed)[shard.start : shard.stop]
        encoded, checks = how.encode(log_p), np.arange(shard.start + 1, shard.stop + 1)
        gone = how.empty(1, len(classes))
        for row in range(shard.start, shard.stop):
            at = row - shard.start
            if row in empty:
                for key, values in encoded.items():
                    values[at] = gone[key][0]
            if row in damaged:
                encoded["value" if how.k else "labels"][at, 1] = np.nan
            if row in empty or row in unchecked:
                checks[at] = 0
        label_set.write(shard, encoded, checks.astype(np.uint32))
    label_set.close()
    (found,) = list_label_sets(cache)
    return found


def by_hand(label_set: LabelSet, seed: int, truth: list[set[int]] | None = None) -> dict[str, Any]:
    """The numbers of a seed, from the arrays as a reader that shares no code with us finds them."""
    reader = open_set(label_set.path)
    entropy, confidence, hits = list[float](), list[float](), list[tuple[bool, bool]]()
    checked = empty = 0
    for row in range(label_set.samples):
        p = reader.label(seed, row)
        if p is None:
            empty += 1
            continue
        checked += reader.check(seed, row) != 0
        entropy.append(float(-(p[p > 0] * np.log(p[p > 0])).sum()))
        confidence.append(float(p.max()))
        if truth and truth[row]:
            order = np.argsort(-p, kind="stable")[: label_set.encoding.k or None]
            hits.append((order[0] in truth[row], bool(truth[row] & set(order[:5].tolist()))))
    kept = label_set.samples - empty
    return {
        "seed": seed,
        "rows": label_set.samples,
        "empty": empty,
        "entropy": np.mean(entropy) if kept else None,
        "confidence": np.mean(confidence) if kept else None,
        "checked": checked / kept if kept else None,
        "matched": len(hits),
        "top1": np.mean([one for one, _ in hits]) if hits else None,
        "top5": np.mean([five for _, five in hits]) if hits else None,
    }


def equal(found: SeedAudit, expected: dict[str, Any]) -> None:
    close({key: found.as_dict()[key] for key in expected}, expected)


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (None if value is None else pytest.approx(value, rel=1e-5)), key


def target_of(classes: Sequence[str], labels: Any) -> Target:
    labels = np.asarray(labels, np.int64)
    return replace(in_memory(len(labels), 1, 1), classes=tuple(classes), labels=labels)


# --- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["f32", "f16", "root4", "u8", "topk-3", "topk-12"])
def test_numbers_are_those_of_the_stored_arrays(tmp_path: Path, encoding: str) -> None:
    label_set = written(
        tmp_path, 37, encoding=encoding, empty=(0, 9, 10, 36), unchecked=(5, 20, 21)
    )
    labels = np.arange(37) * 5 % 12
    target = target_of(NAMES, labels)
    found = audit(label_set, target)
    assert [one.seed for one in found] == [0, 1]
    for seed, one in enumerate(found):
        equal(one, by_hand(label_set, seed, [{label} for label in labels.tolist()]))
        assert (one.empty, one.matched) == (4, 33)
        assert one.checked == pytest.approx(30 / 33)
    assert found[0].entropy != found[1].entropy


def test_numbers_of_labels_that_are_known(tmp_path: Path) -> None:
    views = open_views(in_memory(4, 1, 1), parse_policy("none"))
    p = np.array([[1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]])
    log_p = np.log(p, where=p > 0, out=np.full(p.shape, -200.0)).astype(np.float32)
    how, sources = Encoding("f32"), [source_of("abcd")]
    with open_sets(views, sources, how, 1, tmp_path, StageOptions()) as (pair,):
        label_set = pair.label_set
        label_set.write(label_set.shard(0, 0), {"labels": log_p}, np.ones(4, np.uint32))
    (one,) = audit(list_label_sets(tmp_path)[0], target_of("abcd", [0, 1, 2, 3]))
    entropies = [0, np.log(4), np.log(2), -sum(x * np.log(x) for x in (0.1, 0.2, 0.3, 0.4))]
    assert one.entropy == pytest.approx(np.mean(entropies))
    assert one.confidence == pytest.approx((1 + 0.25 + 0.5 + 0.4) / 4)
    assert (one.matched, one.top5, one.checked, one.empty) == (4, 1.0, 1.0, 0)
    # Rows 0 and 3 are right and row 2 is wrong; row 1 has no first.
    assert one.top1 in (0.5, 0.75)


def test_a_seed_without_any_label(tmp_path: Path) -> None:
    label_set = written(tmp_path, 5, empty=range(5), seeds=1)
    (one,) = audit(label_set, target_of(NAMES, np.zeros(5)))
    assert one.as_dict() == {
        **one.as_dict(),
        "rows": 5,
        "empty": 5,
        "entropy": None,
        "confidence": None,
        "checked": None,
        "matched": 0,
        "top1": None,
        "top5": None,
    }


def test_shards_that_are_not_stored_are_no_labels(tmp_path: Path) -> None:
    label_set = written(tmp_path, 25, seeds=3, left_out=[(1, 0), (2, 0), (2, 1), (2, 2)])
    said: list[tuple[int, int]] = []
    found = audit(label_set, None, lambda *step: said.append(step))
    assert [(one.seed, one.rows, one.empty) for one in found] == [(0, 25, 0), (1, 15, 0)]
    assert said == [(i, 5) for i in range(1, 6)]
    equal(found[0], by_hand(label_set, 0))


@pytest.mark.parametrize("encoding", ["f32", "f16", "topk-3"])
def test_a_damaged_row_is_counted_and_spoils_no_mean(tmp_path: Path, encoding: str) -> None:
    """Partly NaN: no writer of ours makes it, and it must be seen."""
    label_set = written(tmp_path / "damaged", 12, encoding=encoding, damaged=(3, 11))
    good = written(tmp_path / "good", 12, encoding=encoding, empty=(3, 11))
    target = target_of(NAMES, np.arange(12))
    for one, other in zip(audit(label_set, target), audit(good, target), strict=True):
        for key in ("entropy", "confidence", "matched", "top1", "top5"):
            assert getattr(one, key) == getattr(other, key), key
        assert one.as_dict()["faulty"] == 2 and other.as_dict()["faulty"] == 0
        assert json.loads(json.dumps(one.as_dict(), allow_nan=False))


def test_damage_on_disk_is_named(tmp_path: Path) -> None:
    label_set = written(tmp_path, 25)
    file = label_set.path / "labels/c/1/1/0"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(CorruptStore, match="seed 1, samples 10 to 19"):
        audit(list_label_sets(tmp_path)[0], None)


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    peaks = {}
    for rows in (4_000, 24_000):
        classes = [str(i) for i in range(64)]
        label_set = written(
            tmp_path / str(rows), rows, classes=classes, seeds=1, shard_rows=4096, encoding="f32"
        )
        target = target_of(classes, np.arange(rows) % 64)
        audit(label_set, target)  # what is imported and opened once
        tracemalloc.start()
        audit(label_set, target)
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[24_000] < 1.3 * peaks[4_000], peaks


# --- who is right -------------------------------------------------------------------------------


def matched(own: Sequence[str], others: Sequence[str]) -> list[list[int]]:
    """For each class of the target those of the source."""
    truth = truth_of(target_of(own, [0]), others)
    if truth is None:
        return [[] for _ in own]
    return [np.flatnonzero(row).tolist() for row in truth.matches]


def test_names_match_without_regard_to_case_and_marks() -> None:
    own = ["Forest_Path", "art-gallery", "bus station/indoor", "Kitchen", "  sky ", "Ünïted"]
    others = ["art gallery", "forest path", "KITCHEN", "bus_station-indoor", "sky", "x", "ünïted"]
    assert matched(own, others) == [[1], [0], [3], [2], [4], [6]]
    assert matched(["/a/airfield"], ["airfield"]) == [[]]
    assert matched(["cat", "dog"], ["cats", "do"]) == [[], []]


def test_a_name_that_comes_twice_is_either() -> None:
    assert matched(["crane", "crow"], ["crane", "robin", "Crane"]) == [[0, 2], []]
    assert matched(["a_b", "a b"], ["a-b"]) == [[0], [0]]


def test_equal_lists_match_by_position() -> None:
    # ImageNet names two of its classes crane, and two maillot.
    names = ["crane", "maillot", "crane"]
    assert matched(names, names) == [[0], [1], [2]]
    assert matched(names, [*names, "dog"]) == [[0, 2], [1], [0, 2]]
    assert matched(["1", "2"], ["1", "2"]) == [[0], [1]]


def test_names_of_nothing_but_marks_are_no_names() -> None:
    assert matched(["--", "a"], ["_", "a"]) == [[], [1]]


def test_none_of_the_classes_is_known() -> None:
    assert truth_of(target_of(["walk", "run"], [0, 1]), ["kitchen", "sky"]) is None


@given(labels=st.lists(st.integers(-1, 3), min_size=1, max_size=40), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_truth_of_single_labels(labels: list[int], seed: int) -> None:
    own, others = ["a", "B", "c", "d"], ["b", "x", "c", "A", "c"]
    truth = truth_of(target_of(own, labels), others)
    assert truth is not None
    known = {-1: set[int](), 0: {3}, 1: {0}, 2: {2, 4}, 3: set[int]()}
    rows = np.random.default_rng(seed).permutation(len(labels))
    found = truth.of(rows)
    assert found.shape == (len(labels), 5) and found.dtype == bool
    assert [set(np.flatnonzero(r).tolist()) for r in found] == [known[labels[i]] for i in rows]


def test_truth_of_several_labels() -> None:
    labels = [[1, 0, 0], [1, 1, 0], [0, -1, 0], [0, 0, 1], [1, -1, 1]]
    truth = truth_of(target_of(["cat", "dog", "car"], labels), ["dog", "tree", "cat"])
    assert truth is not None
    found = [set(np.flatnonzero(row).tolist()) for row in truth.of(np.arange(5))]
    assert found == [{2}, {0, 2}, set(), set(), {2}], "difficult ones and unknown ones are not true"


@pytest.mark.parametrize("several", [False, True])
def test_shares_of_labels_that_are_right(tmp_path: Path, several: bool) -> None:
    label_set = written(tmp_path, 37, empty=(4, 30), seeds=1)
    own = ["Thing_3", "thing-7", "unknown", "THING/11"]
    to = {0: 3, 1: 7, 3: 11}
    if several:
        labels: Any = np.random.default_rng(2).integers(-1, 2, (37, 4))
        truth = [{to[c] for c in np.flatnonzero(row == 1).tolist() if c in to} for row in labels]
    else:
        labels = np.arange(37) % 5 - 1
        truth = [{to[c]} if c in to else set() for c in labels.tolist()]
    (one,) = audit(label_set, target_of(own, labels))
    equal(one, by_hand(label_set, 0, truth))
    assert 0 < one.matched < 35
    assert one.top1 is not None and one.top5 is not None and 0 < one.top1 < one.top5 < 1


def test_the_rest_of_a_sparse_label_is_in_no_order(tmp_path: Path) -> None:
    """All classes beyond the stored ones are alike: which of them come first is chance."""
    label_set = written(tmp_path, 200, encoding="topk-2", seeds=1, shard_rows=200)
    labels = np.arange(200) % 12
    (one,) = audit(label_set, target_of(NAMES, labels))
    best = label_set.read(0, 0, 200)["index"]
    assert one.top5 == pytest.approx((best == labels[:, None]).any(axis=1).mean())


def test_a_source_of_few_classes_has_no_five(tmp_path: Path) -> None:
    label_set = written(tmp_path, 9, classes=("a", "b", "c"), seeds=1)
    (one,) = audit(label_set, target_of(["A", "C"], np.arange(9) % 2))
    assert one.matched == 9 and one.top5 == 1.0


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def things(images: Path, tmp_path: Path) -> Path:
    """Real files in classes two of which the tiny source knows."""
    for old, new in (("apple", "Thing_1"), ("bear", "thing-2"), ("cup", "other")):
        shutil.copytree(images / "train" / old, tmp_path / "things/train" / new)
    (tmp_path / "things/train/other/0003.png").write_bytes(b"no image")
    return tmp_path / "things"


def labelled(sskt: Sskt, target: Path, cache: Path, *more: object) -> None:
    ask = ("--source", SOURCE, "--target", target, "--cache", cache, "--workers", 0)
    status, _, err = sskt("cache-teachers", *ask, "--on-error", "skip", "--seeds", 2, *more)
    assert status == 0, err


def test_ls_shows_the_numbers(sskt: Sskt, things: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    labelled(sskt, things, cache, "--policy", "pad-crop-flip")
    (label_set,) = list_label_sets(cache)
    (shown,) = json.loads(sskt("ls", "--cache", cache, "-v", "--json")[1])
    assert shown["no_truth"] == "" and len(shown["audit"]) == 2
    truth = [{1}] * 20 + [set[int]()] * 20 + [{2}] * 20  # Thing_1, other, thing-2
    for seed, found in enumerate(shown["audit"]):
        expected = by_hand(label_set, seed, truth)
        close({key: found[key] for key in expected}, expected)
        assert (found["empty"], found["matched"], found["checked"]) == (1, 40, 1.0)
    status, out, _ = sskt("ls", "--cache", cache, "-v")
    row = shown["audit"][0]
    assert status == 0
    for text in (f"{row['entropy']:.3f}", f"{row['top1']:.1%}", "100.0%", "59", "40"):
        assert text in out
    assert "audit" not in json.loads(sskt("ls", "--cache", cache, "--json")[1])[0]


def test_ls_without_the_target_says_why_it_compares_nothing(
    sskt: Sskt, things: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    labelled(sskt, things, cache, "--policy", "pad-crop-flip")
    things.rename(tmp_path / "moved")
    (shown,) = json.loads(sskt("ls", "--cache", cache, "-v", "--json")[1])
    assert "no folder" in shown["no_truth"]
    assert [one["matched"] for one in shown["audit"]] == [0, 0]
    assert shown["audit"][0]["entropy"] > 0 and shown["audit"][0]["top1"] is None
    status, out, _ = sskt("ls", "--cache", cache, "-v")
    assert status == 0 and "no true classes to compare with: no folder" in out
    (tmp_path / "moved/train/other/0004.png").unlink()
    ask = ("ls", "--cache", cache, "-v", "--json", "--target", tmp_path / "moved")
    (shown,) = json.loads(sskt(*ask)[1])
    assert "target.name" in shown["no_truth"] and shown["audit"][0]["matched"] == 0


def test_ls_needs_no_frame_sampling_to_compare(sskt: Sskt, data: Path, tmp_path: Path) -> None:
    """A user's f_s that is gone does not keep the true classes from being known."""
    (tmp_path / "mine.py").write_text("def last(depth, sample, seed):\n    return [depth - 1]\n")
    own = tmp_path / "own.py"
    own.write_text(TINY.read_text().replace('f"thing {i}"', 'f"Kind {i}"'))
    clips = sorted((data / "hmdb51/videos").glob("*/*.avi"))[:2]
    for clip, name in zip(clips, ("Kind_1", "Kind_2"), strict=True):
        (tmp_path / "clips" / name).mkdir(parents=True)
        shutil.copy(clip, tmp_path / "clips" / name)
    ask = ("--source", f"own={own}:build", "--target", tmp_path / "clips", "--workers", 0)
    more = ("--f-s", f"{tmp_path}/mine.py:last", "--seeds", 1, "--cache", tmp_path / "cache")
    status, _, err = sskt("cache-teachers", *ask, *more)
    assert status == 0, err
    (tmp_path / "mine.py").unlink()
    (shown,) = json.loads(sskt("ls", "--cache", tmp_path / "cache", "-v", "--json")[1])
    assert shown["no_truth"] == "" and shown["audit"][0]["matched"] == 2


@pytest.mark.slow
def test_a_real_source_is_right_on_real_images(sskt: Sskt, data: Path, tmp_path: Path) -> None:
    """EfficientNet-Lite0 over 100 images of ImageNet, one a class, through the stored labels."""
    pytest.importorskip("efficientnet_lite_pytorch")
    for file in sorted((data / "imagenet").glob("n*.JPEG")):
        folder = tmp_path / "imagenet/val" / file.name.partition("_")[0]
        folder.mkdir(parents=True)
        (folder / file.name).symlink_to(file)
    ask = ["--source", "imagenet:efficientnet_lite0", "--target", "imagenet", "--split", "val"]
    ask += ["--root", str(tmp_path / "imagenet"), "--partial", "--policy", "resize-center-crop"]
    cache = tmp_path / "cache"
    status, _, err = sskt("cache-teachers", *ask, "--seeds", 1, "--workers", 1, "--cache", cache)
    assert status == 0, err
    (shown,) = json.loads(sskt("ls", "--cache", cache, "-v", "--json")[1])
    (found,) = shown["audit"]
    assert (found["rows"], found["empty"], found["matched"], found["checked"]) == (100, 0, 100, 1.0)
    assert found["top1"] >= 0.8 and found["top5"] >= 0.95, found
    assert 0.3 < found["entropy"] < 3 and found["confidence"] > 0.5
    print(found)
