"""Means of label sets: their numbers, their identity, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import independent_reader
from support.helpers import TINY, one_line, tree
from support.servers import serving

from sskt.teacher_cache.errors import (
    CorruptStore,
    InputError,
    MissingData,
    SpecMismatch,
    ViewMismatch,
)
from sskt.teacher_cache.format.encodings import decoded, parse_encoding
from sskt.teacher_cache.format.spec import classes_identity, parents_of
from sskt.teacher_cache.label_sets.create import create_label_set, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.tools.mean import export_mean, mean_of, mean_spec, recompute_mean
from sskt.teacher_cache.tools.verify import Report, verify
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.label_choice import choose_label_sets

Sskt = Callable[..., tuple[int, str, str]]

SAMPLES, ROWS, CLASSES, SEEDS = 700, 512, 6, 2
SKIPPED = {"one": (3, 600), "two": (5,), "three": ()}


def made(
    cache: Path,
    name: str,
    encoding: str = "f32",
    *,
    seeds: int = SEEDS,
    rows: int = ROWS,
    without: Sequence[tuple[int, int]] = (),
    views: int = 0,
    classes: int = CLASSES,
    **other: Any,
) -> LabelSet:
    """A label set of a source. ``views``: which images it saw; ``other``: other fields of views."""
    names = tuple(f"class {i}" for i in range(classes))
    spec = {
        "format": 1,
        "target": {"name": "made", "split": "train", "size": SAMPLES, "fingerprint": "made"},
        "source": {"name": name, "arch": "none", "classes": classes_identity(names)},
        "views": {"policy": "none", "version": 1, "parameters": {}, "f_s": "identity"} | other,
        "encoding": parse_encoding(encoding).identity(),
    }
    ids = [str(i) for i in range(SAMPLES)]
    about = {"source": name, "target": "made", "device": "cpu", "limit": None}
    label_set = create_label_set(
        cache, spec, names, seeds, shard_rows=rows, samples=ids, provenance=about
    )
    for shard in label_set.missing(range(seeds)):
        if (shard.seed, shard.block) in without:
            continue
        rng = np.random.default_rng([*name.encode(), shard.seed, shard.block])
        count = shard.stop - shard.start
        logits = 3 * rng.normal(size=(count, classes))
        log_p = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
        rows_ = label_set.encoding.encode(log_p)
        samples = np.arange(shard.start, shard.stop)
        checks = (samples * 7 + shard.seed + 1 + views).astype(np.uint32)
        empty = label_set.encoding.empty(count, classes)
        for sample in set(SKIPPED.get(name, ())) & set(samples.tolist()):
            checks[sample - shard.start] = 0
            for key, values in empty.items():
                rows_[key][sample - shard.start] = values[0]
        label_set.write(shard, rows_, checks)
    label_set.close()
    return open_label_set(label_set.storage)


def probabilities(label_set: LabelSet, seed: int) -> NDArray[np.float64]:
    return decoded(label_set.encoding, label_set.read(seed, 0, SAMPLES), CLASSES)


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "allowed"),
    [("f32", 1e-6), ("f16", 3e-3), ("root4", 0.02), ("u8", 0.02), ("root4-coarse", 0.12)],
)
def test_a_mean_is_that_of_numpy_within_the_codec(
    encoding: str, allowed: float, tmp_path: Path
) -> None:
    """Different encodings and shards of the parents, and samples that one of them skipped."""
    parents = [
        made(tmp_path, "one", "f32"),
        made(tmp_path, "two", "f16", rows=1024),
        made(tmp_path, "three", "u8"),
    ]
    weights = (0.5, 0.2, 0.3)
    done = export_mean(mean_of(parents, weights), parse_encoding(encoding), tmp_path)
    found = open_label_set(tmp_path / done.name)
    assert (done.written, done.reused, done.coverage) == (4, 0, [1.0, 1.0])
    for seed in range(SEEDS):
        each = [probabilities(parent, seed) for parent in parents]
        expected = np.average(each, axis=0, weights=weights)
        assert np.flatnonzero(np.isnan(expected[:, 0])).tolist() == [3, 5, 600]
        stored = probabilities(found, seed)
        assert np.allclose(stored, expected, atol=allowed, equal_nan=True)
        checks = found.read_checks(seed, 0, SAMPLES)
        seen = parents[2].read_checks(seed, 0, SAMPLES)
        assert np.array_equal(checks, np.where(np.isnan(expected[:, 0]), 0, seen))
    assert not verify(found).problems
    assert done.error is not None
    assert done.error["rows"] == 510  # the first 512 rows but two that were skipped


@pytest.mark.parametrize("both", [False, True])
def test_a_mean_over_the_seeds_has_the_same_label_for_each_view(both: bool, tmp_path: Path) -> None:
    """The view check stays that of the view."""
    parents = [made(tmp_path, "one", seeds=3)] + ([made(tmp_path, "two", seeds=4)] if both else [])
    mean = mean_of(parents, over_seeds=True)
    found = open_label_set(tmp_path / export_mean(mean, parse_encoding("f32"), tmp_path).name)
    assert found.seeds == found.spec["source"]["seeds"] == 3
    expected = np.mean([probabilities(p, s) for p in parents for s in range(3)], axis=0)
    for seed in range(3):
        assert np.allclose(probabilities(found, seed), expected, atol=1e-6, equal_nan=True)
        kept = ~np.isnan(expected[:, 0])
        own = parents[0].read_checks(seed, 0, SAMPLES)
        assert np.array_equal(found.read_checks(seed, 0, SAMPLES), np.where(kept, own, 0))
    assert not recompute_mean(found, tmp_path, 30, Report("")).problems


def test_the_independent_reader_reads_a_mean(tmp_path: Path) -> None:
    parents = [made(tmp_path, name) for name in ("one", "two")]
    done = export_mean(mean_of(parents), parse_encoding("f16"), tmp_path)
    reader = independent_reader.open_set(tmp_path / done.name)
    readers = [independent_reader.open_set(parent.path) for parent in parents]
    assert not reader.missing() and reader.label(0, 3) is None
    assert {one["digest"] for one in reader.spec["source"]["parents"]} == {
        parent.digest for parent in parents
    }
    for sample in (0, 699):
        each = np.array([r.label(1, sample) for r in (reader, *readers)], np.float64)
        assert np.allclose(each[0], each[1:].mean(axis=0), atol=1e-3)
        assert reader.check(1, sample) == readers[0].check(1, sample)


# --- identity ---------------------------------------------------------------------------------


def test_the_order_does_not_matter(tmp_path: Path) -> None:
    """Neither for the identity nor for the bytes; the weights go with their sets."""
    parents = [made(tmp_path, name) for name in ("one", "two", "three")]
    trees = []
    for i, order in enumerate(permutations(zip(parents, ("0.1", "0.2", "0.3"), strict=True))):
        mean = mean_of([p for p, _ in order], [w for _, w in order])
        export_mean(mean, parse_encoding("f16"), tmp_path / str(i))
        found = tree(tmp_path / str(i))
        trees.append({k: v for k, v in found.items() if not k.startswith(".locks")})
    assert all(one == trees[0] for one in trees)
    other = mean_of(parents, ("0.2", "0.1", "0.3"))
    assert mean_spec(other, parse_encoding("f16"), "mean") != mean_spec(
        mean_of(parents, ("0.1", "0.2", "0.3")), parse_encoding("f16"), "mean"
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[LabelSet]:
    folder = tmp_path_factory.mktemp("pair")
    return [made(folder, name) for name in ("one", "two")]


@given(
    weights=st.lists(st.fractions(Fraction(1, 1000), 1000), min_size=2, max_size=2),
    factor=st.fractions(Fraction(1, 1000), 1000),
)
def test_a_common_factor_of_the_weights_does_not_matter(
    weights: list[Fraction], factor: Fraction, pair: list[LabelSet]
) -> None:
    found = mean_of(pair, weights)
    assert found.weights == mean_of(pair, [factor * weight for weight in weights]).weights
    assert abs(sum(found.weights) - 1) < 1e-12


def test_alike_weights_are_the_default(tmp_path: Path) -> None:
    parents = [made(tmp_path, name) for name in ("one", "two", "three")]
    assert mean_of(parents).weights == mean_of(parents, ["0.1"] * 3).weights == (1 / 3,) * 3


# --- refused ----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    one, two = made(tmp_path, "one"), made(tmp_path, "two")
    with pytest.raises(SpecMismatch, match=r"views.policy \('none', 'flip'\)"):
        mean_of([one, made(tmp_path, "three", policy="flip")])
    with pytest.raises(SpecMismatch, match=r"views\.decoder"):
        mean_of([one, made(tmp_path, "three", decoder="pyav")])
    with pytest.raises(SpecMismatch, match="different classes: 6 and 7 classes"):
        mean_of([one, made(tmp_path, "three", classes=7)])
    with pytest.raises(InputError, match="stored as topk-3"):
        mean_of([one, made(tmp_path, "three", "topk-3")])
    with pytest.raises(InputError, match="at least two label sets, found 1"):
        mean_of([one])
    with pytest.raises(InputError, match="named twice"):
        mean_of([one, two, one])
    with pytest.raises(InputError, match="3 weights for 2 label sets"):
        mean_of([one, two], [1, 2, 3])
    for weight in ("0", "-1", "nan", "inf", "x", "1/0"):
        with pytest.raises(InputError, match="no positive number"):
            mean_of([one, two], [1, weight])
    with pytest.raises(InputError, match="source name 'a b'"):
        export_mean(mean_of([one, two]), parse_encoding("f16"), tmp_path, name="a b")


def test_parents_that_saw_other_images_are_refused(tmp_path: Path) -> None:
    parents = [made(tmp_path, "one"), made(tmp_path, "two", views=1)]
    with pytest.raises(ViewMismatch, match="saw different images of sample 0 under view seed 0"):
        export_mean(mean_of(parents), parse_encoding("f16"), tmp_path / "to")
    (label_set,) = (p for p in (tmp_path / "to").iterdir() if not p.name.startswith("."))
    assert open_label_set(label_set).coverage() == [0, 0]


def test_labels_of_a_parent_that_are_none(tmp_path: Path) -> None:
    parents = [made(tmp_path, "one"), made(tmp_path, "two", without=[(1, 1)])]
    writer = create_label_set(tmp_path, parents[1].spec, parents[1].classes, SEEDS)
    rows = np.zeros((SAMPLES - ROWS, CLASSES), np.float32)
    writer.write(writer.shard(1, 1), {"labels": rows}, np.ones(SAMPLES - ROWS, np.uint32))
    writer.close()
    with pytest.raises(CorruptStore, match="seed 1, samples 512 to 699: 188 rows are no labels"):
        export_mean(mean_of(parents), parse_encoding("f16"), tmp_path / "to")


# --- parts, resuming, other tools -------------------------------------------------------------


def test_shards_follow_when_all_parents_have_them(tmp_path: Path) -> None:
    """The same call goes on, also with more seeds, to the bytes of one call."""
    whole = [made(tmp_path / "from", name, seeds=3) for name in ("one", "two")]
    export_mean(mean_of(whole), parse_encoding("f16"), tmp_path / "at once")
    parents = [
        made(tmp_path / "parts", "one", without=[(0, 1)]),
        made(tmp_path / "parts", "two", seeds=3, without=[(1, 0)]),
    ]
    done = export_mean(mean_of(parents), parse_encoding("f16"), tmp_path / "to")
    assert (done.written, done.reused) == (2, 0) and max(done.coverage) < 1
    whole = [made(tmp_path / "parts", name, seeds=3) for name in ("one", "two")]
    done = export_mean(mean_of(whole), parse_encoding("f16"), tmp_path / "to")
    assert (done.written, done.reused, done.coverage) == (4, 2, [1, 1, 1])
    once = {k: v for k, v in tree(tmp_path / "at once").items() if "/c/" in k}
    assert once == {k: v for k, v in tree(tmp_path / "to").items() if "/c/" in k}


def test_an_interrupted_export_goes_on(tmp_path: Path) -> None:
    """A shard exists whole or not at all."""
    mean = mean_of([made(tmp_path / "from", name) for name in ("one", "two")])
    export_mean(mean, parse_encoding("f16"), tmp_path / "at once")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_mean(mean, parse_encoding("f16"), tmp_path / "to", progress=stop)
    done = export_mean(mean, parse_encoding("f16"), tmp_path / "to")
    assert (done.written, done.reused) == (2, 2)
    files = tree(tmp_path / "to"), tree(tmp_path / "at once")
    one, two = ({k: v for k, v in f.items() if not k.startswith(".locks")} for f in files)
    assert one == two


def test_verify_finds_a_label_that_is_not_the_mean(tmp_path: Path) -> None:
    parents = [made(tmp_path, name) for name in ("one", "two")]
    mean = mean_of(parents)
    name = export_mean(mean, parse_encoding("f16"), tmp_path).name
    found = open_label_set(tmp_path / name)
    report = recompute_mean(found, tmp_path, 40, verify(found))
    assert not report.problems and report.recomputed == 40 and report.worst_distance < 1e-6
    for shard in found.shards(range(SEEDS)):
        for key in found.shard_keys(shard):
            (found.path / key).unlink()
    export_mean(mean_of(parents, [1, 9]), parse_encoding("f16"), tmp_path / "other")
    (other,) = (p for p in (tmp_path / "other").iterdir() if not p.name.startswith("."))
    writer = create_label_set(tmp_path, found.spec, found.classes, SEEDS)
    for shard in writer.shards(range(SEEDS)):
        rows = open_label_set(other).read(shard.seed, shard.start, shard.stop)
        writer.write(
            shard, rows, open_label_set(other).read_checks(shard.seed, shard.start, shard.stop)
        )
    writer.close()
    report = recompute_mean(open_label_set(found.path), tmp_path, 40, Report(""))
    assert len(report.problems) > 30
    assert "stored and recomputed labels differ by" in report.problems[0]


def test_verify_without_the_parents_says_what_to_copy(tmp_path: Path) -> None:
    parents = [made(tmp_path, name) for name in ("one", "two")]
    name = export_mean(mean_of(parents), parse_encoding("f16"), tmp_path / "to").name
    found = open_label_set(tmp_path / "to" / name)
    (problem,) = recompute_mean(found, tmp_path / "to", 4, Report("")).problems
    assert "cannot be read" in problem and "sskt copy" in problem
    assert all(parent.digest[:12] in problem for parent in parents)
    shutil.copytree(parents[0].path, tmp_path / "to" / parents[0].name)
    (problem,) = recompute_mean(found, tmp_path / "to", 4, Report("")).problems
    assert parents[1].digest[:12] in problem and parents[0].digest[:12] not in problem


@pytest.mark.parametrize(
    "parents", [[{"digest": "../x", "weight": 0.5}], [{"digest": "a" * 64}], {"digest": 1}, [1]]
)
def test_a_spec_that_names_no_label_sets(parents: object) -> None:
    with pytest.raises(CorruptStore, match="does not say of which"):
        parents_of({"source": {"parents": parents}})


def test_auto_takes_a_mean_only_without_its_parents(tmp_path: Path) -> None:
    parents = [made(tmp_path, name) for name in ("one", "two")]
    name = export_mean(mean_of(parents), parse_encoding("f16"), tmp_path).name
    config = TrainConfig(target="made", source=["auto"], policy="none")
    _, chosen = choose_label_sets(config, tmp_path)
    assert sorted(chosen) == ["one", "two"]
    _, chosen = choose_label_sets(TrainConfig(target="made", source=["mean"]), tmp_path)
    assert [s.name for s in chosen.values()] == [name]
    shutil.rmtree(parents[0].path)
    shutil.rmtree(parents[1].path)
    _, chosen = choose_label_sets(config, tmp_path)
    assert sorted(chosen) == ["mean"]


# --- as a user --------------------------------------------------------------------------------


def test_train_inspect_copy_and_serve_a_mean(images: Path, tmp_path: Path, sskt: Sskt) -> None:
    """All commands that read label sets, over labels of two networks."""
    cache = tmp_path / "labels"
    other = tmp_path / "other.py"
    other.write_text(TINY.read_text().replace("manual_seed(1)", "manual_seed(2)"))
    sources = ("--source", f"a={TINY}:build", "--source", f"b={other}:build")
    target = ("--target", images, "--policy", "pad-crop-flip", "--workers", 0)
    assert sskt("cache-teachers", *sources, *target, "--seeds", 2, "--cache", cache)[0] == 0
    command = ("export", "--cache", cache, "--mean", "a-tiny", "b-other", "--weights", "3,1")
    more = ("--encoding", "root4", "--out", cache, "--name", "ensemble")
    status, out, err = sskt(*command, *more)
    assert status == 0 and "(0.75)" in out and "(0.25)" in out, err
    status, out, err = sskt(*command, *more, "--json")
    name = json.loads(out)["name"]
    assert json.loads(out)["reused"] == 2 and "ensemble-mean" in name
    status, out, err = sskt("verify", "--cache", cache, "ensemble", "--recompute", 16)
    assert status == 0 and "16 recomputed" in out and "clean" in out, out
    status, out, err = sskt("inspect", "--cache", cache, "ensemble", "--sample", 4)
    assert status == 0 and "mean of label sets" in out and "stored to recomputed" in out, out + err
    status, out, err = sskt("ls", "--cache", cache)
    assert status == 0 and "ensemble (mean)" in out
    status, out, err = sskt("copy", cache, tmp_path / "copy", "ensemble")
    assert status == 0 and tree(tmp_path / "copy" / name) == tree(cache / name)
    status, out, err = sskt("card", "--cache", cache, "ensemble")
    assert status == 0 and "mean of label sets" in out and "weights of the source" not in out
    training = ("train", *target, "--model", "resnet20", "--epochs", 2, "--device", "cpu")
    log = tmp_path / "run" / "metrics.jsonl"
    status, out, err = sskt(
        *training, "--source", "ensemble", "--cache", cache, "--out", log.parent
    )
    assert status == 0, err
    with serving(cache) as url:
        remote = ("--labels", url, "--out", tmp_path / "remote")
        status, out, err = sskt(*training, "--source", "ensemble", *remote)
        assert status == 0, err
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines() if '"loss"' in line]
        for path in (log, tmp_path / "remote" / "metrics.jsonl")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    plateau = ("--schedule", "plateau", "--plateau-on", "total", "--out", tmp_path / "no")
    status, out, err = sskt(*training, "--source", "ensemble", "--cache", cache, *plateau)
    assert status == 2 and "is a mean of label sets" in one_line(err)


def test_options_of_a_mean_need_it(tmp_path: Path, sskt: Sskt) -> None:
    parents = [made(tmp_path, name) for name in ("one", "two")]
    to = ("--encoding", "f16", "--out", tmp_path / "to", "--cache", tmp_path)
    status, _, err = sskt("export", parents[0].name, "--name", "x", *to)
    assert status == 2 and "add --mean" in one_line(err)
    status, _, err = sskt("export", *(p.name for p in parents), *to)
    assert status == 2 and "2 label sets" in one_line(err)
    status, _, err = sskt("export", "--mean", "none", *to)
    assert status == 2 and "fits several" in one_line(err)
    status, out, err = sskt("export", "--over-seeds", parents[0].name, *to)
    assert status == 0 and "over 2 view seeds" in out, err


def test_no_network_stands_behind_a_mean(tmp_path: Path) -> None:
    from sskt.teacher_cache.tools.reopen import Reopen, reopen_source

    parents = [made(tmp_path, name) for name in ("one", "two")]
    found = open_label_set(
        tmp_path / export_mean(mean_of(parents), parse_encoding("f16"), tmp_path).name
    )
    with pytest.raises(InputError, match="has no network of its own"):
        reopen_source(found, Reopen())
    with pytest.raises(MissingData):
        from sskt.teacher_cache.tools.mean import stored_mean

        stored_mean(parents[0], tmp_path)
