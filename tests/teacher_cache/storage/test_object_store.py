"""Caches in an object store: a real S3 server on loopback, real processes, real failures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.helpers import TINY
from support.object_stores import NEEDED, Server, objects, raw
from support.processes import Launcher, launched
from support.random_labels import make_labels
from support.servers import Proxy, without_times

from sskt.teacher_cache.errors import CorruptStore, InputError, MissingData, SsktError
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.open import open_cache

Sskt = Callable[..., tuple[int, str, str]]

SOURCE = f"tiny={TINY}:build"
absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(absent), reason=f"needs {', '.join(absent)}: pip install 'sskt[cloud]' 'moto[server]'"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


_numbers = itertools.count()


@pytest.fixture
def cache(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty cache in a bucket of its own."""
    server.use(monkeypatch)
    name = f"bucket-{next(_numbers)}"
    server.new_bucket(name)
    return f"s3://{name}/lab/labels"


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with launched(tmp_path_factory.mktemp("launcher")) as started:
        yield started


def files(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but the lock files."""
    found = {p.relative_to(cache).as_posix(): p for p in cache.rglob("*") if p.is_file()}
    return {k: p.read_bytes() for k, p in found.items() if not k.startswith(".locks/")}


def one_line(err: str) -> str:
    """The only line of standard error, which must be sskt's own."""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sskt: "), err
    assert "unexpected" not in err and "Traceback" not in err, err
    return lines[0]


def labelling(target: object, cache: object, *more: object) -> tuple[object, ...]:
    fixed = ("cache-teachers", "--source", SOURCE, "--policy", "pad-crop-flip", "--workers", 0)
    return (*fixed, "--target", target, "--cache", cache, *more)


@pytest.fixture(scope="module")
def local(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cache in a folder: 60 samples, 2 seeds, 4 blocks; f16 and topk-5."""
    from sskt.cli.main import run

    folder = tmp_path_factory.mktemp("local") / "cache"
    for encoding in ("f16", "topk-5"):
        more = ("--seeds", 2, "--shard-rows", 16, "--encoding", encoding)
        command = labelling(images, folder, *more)
        assert run([str(a) for a in command]) == 0
    return folder


def of(cache: object, encoding: str) -> LabelSet:
    """The set of an encoding, freshly opened."""
    where = cache if isinstance(cache, Path) else str(cache)
    (found,) = [s for s in list_label_sets(where) if str(s.encoding) == encoding]
    return found


@pytest.fixture
def filled(cache: str, local: Path, sskt: Sskt) -> str:
    """The local cache, copied there."""
    status, _, err = sskt("copy", local, cache)
    assert status == 0, err
    return cache


# --- answers that are cut ------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 10**9])
@pytest.mark.parametrize("how", ["connection", "length"])
def test_an_answer_that_is_cut(
    cache: str,
    server: Server,
    tmp_path: Path,
    sskt: Sskt,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    times: int,
) -> None:
    """It is requested again; if it is cut always, the error names the shard."""
    made = make_labels(cache, "f32", samples=4096, rows=4096)
    stored = objects(cache)
    proxy = Proxy(int(server.url.rpartition(":")[2]))
    cut: list[int] = []

    def treat(sent: int, data: bytes) -> bytes | None:
        if how == "connection" and sent > 4096 and len(cut) < times:
            cut.append(sent)
            return None
        length = re.search(rb"Content-Length: (\d{6})\r", data, re.IGNORECASE)
        if how == "length" and length and len(cut) < times:
            cut.append(sent)
            return data.replace(length[1], b"%d" % (int(length[1]) - 9), 1)
        return data

    proxy.treat = treat
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    try:
        (remote,) = list_label_sets(cache)
        if times == 1:
            assert np.array_equal(
                remote.read(0, 0, 4096)["labels"], made.read(0, 0, 4096)["labels"]
            )
            assert len(cut) == 1
            cut.clear()
        else:
            with pytest.raises(SsktError, match="labels/c/0/0/0"):
                remote.read(0, 0, 4096)
        status, _, err = sskt("copy", cache, tmp_path / "to")
        assert cut
    finally:
        proxy.close()
    if times == 1:
        assert status == 0 and files(tmp_path / "to") == stored, err
    else:
        assert status in (1, 2) and "labels/c/0/0/0" in one_line(err)
        assert not list((tmp_path / "to").glob("*/labels/c/0/0/0"))


# --- the same as a folder ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored", [("--encoding", "f16"), ("--encoding", "topk-5"), ("--output", "features")]
)
def test_labelling_into_a_bucket(
    cache: str, tmp_path: Path, sskt: Sskt, stored: tuple[str, str]
) -> None:
    reports = []
    for to in (cache, tmp_path / "cache"):
        for seeds in (1, 2):
            more = ("--limit", 60, "--shard-rows", 16, "--seeds", seeds, *stored)
            status, out, err = sskt(*labelling("shapes", to, *more), "--json")
            assert status == 0, err
            reports.append(json.loads(out))
    assert [(r["written"], r["reused"]) for r in reports] == [(60, 0), (60, 60)] * 2
    assert reports[1]["label_sets"] == reports[3]["label_sets"]
    assert objects(cache) == files(tmp_path / "cache")
    (there,), (here,) = list_label_sets(cache), list_label_sets(tmp_path / "cache")
    p, q = (one.probabilities(one.read(1, 0, 60)) for one in (there, here))
    assert p is not None and q is not None and np.array_equal(p, q)


def test_labelling_with_loader_processes(
    cache: str, images: Path, tmp_path: Path, sskt: Sskt
) -> None:
    """They are forked when the bucket is open already."""
    for to in (cache, tmp_path / "cache"):
        command = list(labelling(images, to, "--seeds", 2, "--shard-rows", 25))
        command[command.index("--workers") + 1] = 2
        status, _, err = sskt(*command)
        assert status == 0, err
    assert objects(cache) == files(tmp_path / "cache")


def test_looking(filled: str, local: Path, sskt: Sskt, tmp_path: Path) -> None:
    for command in (("ls",), ("verify", "--recompute", 6, "--source", SOURCE)):
        there = sskt(*command, "--cache", filled, "--json")
        here = sskt(*command, "--cache", local, "--json")
        assert there[0] == here[0] == 0, there[2]
        found = [json.loads(out) for _, out, _ in (there, here)]
        for report in (*found[0], *found[1]):
            report.pop("worst_distance", None)  # other labels are recomputed each time
        assert found[0] == found[1] != []
    for cache in (filled, local):
        png = tmp_path / f"{len(str(cache))}.png"
        more = ("--sample", 17, "--seed", 1, "--png", png, "--json", "--source", SOURCE)
        status, out, err = sskt("inspect", "--cache", cache, *more)
        assert status == 0, err
        assert json.loads(out)["view_matches"] and png.stat().st_size


def test_training(filled: str, local: Path, images: Path, tmp_path: Path, sskt: Sskt) -> None:
    """The same numbers as from a folder."""
    saved = []
    for name, cache in (("there", filled), ("here", local)):
        digest = of(local, "f16").digest[:12]
        options = ("--source", f"tiny#{digest}", "--policy", "pad-crop-flip")
        more = ("--model", "resnet20", "--epochs", 2, "--device", "cpu", "--workers", 0)
        command = ("train", "--target", images, "--cache", cache, "--out", tmp_path / name)
        status, _, err = sskt(*command, *options, *more)
        assert status == 0, err
        saved.append(without_times(tmp_path / name))
    assert len(saved[0]) == 2 and saved[0] == saved[1] and saved[0][0]["views_checked"]


def test_a_reader_without_anything_of_ours(filled: str, local: Path) -> None:
    """Plain zarr over plain obstore."""
    import zarr
    from zarr.storage import ObjectStore

    store: Any = ObjectStore(raw(filled), read_only=True)
    for encoding in ("f16", "topk-5"):
        label_set = of(local, encoding)
        for seed in range(2):
            mine = label_set.read(seed, 0, 60) | {"view_check": label_set.read_checks(seed, 0, 60)}
            for array, rows in mine.items():
                found = zarr.open_array(store, path=f"{label_set.name}/{array}", mode="r")
                assert np.array_equal(np.asarray(found[seed]), rows)
        group = zarr.open_group(store, path=label_set.name, mode="r")
        attributes: Any = group.attrs["sskt"]
        assert attributes["digest"] == label_set.digest


def test_copies_there_and_back(
    filled: str, local: Path, tmp_path: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert objects(filled) == files(local)
    other = f"{filled}-2"
    ways: list[tuple[object, object]] = [(filled, tmp_path / "back"), (filled, other)]
    for source, to in (*ways, (other, tmp_path / "again")):
        status, out, err = sskt("copy", source, to, "--json")
        assert status == 0, err
        assert [(c["written"], c["reused"]) for c in json.loads(out)] == [(8, 0), (8, 0)]
    assert files(tmp_path / "back") == files(tmp_path / "again") == files(local)
    assert objects(other) == objects(filled)
    import obstore

    def refused(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("nothing is written the second time")

    monkeypatch.setattr(obstore, "put", refused)
    for source, to in ((local, filled), *ways):
        status, out, err = sskt("copy", source, to, "--json")
        assert [(c["written"], c["reused"]) for c in json.loads(out)] == [(0, 8), (0, 8)]


def test_copy_over_something_else(filled: str, local: Path, sskt: Sskt) -> None:
    import obstore

    label_set = of(local, "topk-5")
    key = f"{label_set.name}/index/c/1/2/0"
    data = bytearray(objects(filled)[key])
    data[5] ^= 1
    obstore.put(raw(filled), key, bytes(data))
    before = objects(filled)
    status, _, err = sskt("copy", local, filled)
    assert status == 2 and f"{filled}/{key} is there with other bytes than {local}" in one_line(err)
    assert objects(filled) == before


def test_export(filled: str, cache: str, local: Path, sskt: Sskt, tmp_path: Path) -> None:
    """From a bucket into a bucket, as from a folder into a folder."""
    name = of(local, "f16").name
    ways: list[tuple[object, object]] = [(filled, f"{cache}/small"), (local, tmp_path / "small")]
    for source, to in ways:
        command = ("export", "--cache", source, name, "--encoding", "u8", "--out", to)
        status, _, err = sskt(*command)
        assert status == 0, err
    assert objects(f"{cache}/small") == files(tmp_path / "small")


def test_rm(filled: str, local: Path, sskt: Sskt) -> None:
    keep, gone = of(local, "f16"), of(local, "topk-5")
    status, _, err = sskt("rm", "--cache", filled, gone.name, "--seeds", "1", "--yes")
    assert status == 0, err
    assert of(filled, "topk-5").coverage() == [1.0]
    assert not [k for k in objects(filled) if k.startswith(gone.name) and "/c/1/" in k]
    assert sskt("verify", "--cache", filled, keep.name)[0] == 0
    status, _, err = sskt("rm", "--cache", filled, "tiny")
    assert status == 2 and "pass --yes" in one_line(err)
    assert sskt("rm", "--cache", filled, gone.name, "--yes")[0] == 0
    assert objects(filled) == {k: v for k, v in files(local).items() if k.startswith(keep.name)}
    status, _, err = sskt("rm", "--cache", filled, gone.name, "--yes")
    assert status == 2 and f"no label set in {filled} matches {gone.name}" in one_line(err)


def test_listings_instead_of_a_request_for_each_shard(
    cache: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    model = of(local, "f16")
    label_set = create_label_set(cache, model.spec, model.classes, 40, shard_rows=1)
    rows = {"labels": np.zeros((1, len(model.classes)), np.float16)}
    for shard in label_set.shards([0]):
        label_set.write(shard, rows, np.zeros(1, np.uint32))
    label_set.close()
    counts = dict.fromkeys(("head", "list", "get"), 0)

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(obstore, name)

        def counting(*arguments: Any) -> Any:
            counts[name] += 1
            return call(*arguments)

        return counting

    for name in counts:
        monkeypatch.setattr(obstore, name, counted(name))
    opened = open_label_set(f"{cache}/{model.name}")
    assert opened.coverage() == [1.0] + [0.0] * 39 and opened.coverage()[0] == 1.0
    assert opened.has(opened.shard(0, 59)) and not opened.has(opened.shard(1, 0))
    assert counts == {"head": 0, "list": 1, "get": 3}
    assert len(opened.missing(range(40))) == 39 * 60
    assert counts["list"] == 2
    assert opened.stored_bytes() > 0
    assert counts == {"head": 0, "list": 3, "get": 3}


# --- several writers --------------------------------------------------------------------------


def test_one_of_many_creations_wins(cache: str) -> None:
    def attempt(writer: int) -> bool:
        return open_cache(cache).create("labels/c/0/0/0", bytes([writer]) * 100)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(attempt, range(16)))
    assert sum(won) == 1
    assert objects(cache) == {"labels/c/0/0/0": bytes([won.index(True)]) * 100}


def test_the_second_writer_of_a_shard_finds_the_first(cache: str, local: Path) -> None:
    """Both lock it (no locks between machines), both write; what was there first stays."""
    model = of(local, "topk-5")
    writers = [
        create_label_set(cache, model.spec, model.classes, 2, shard_rows=16) for _ in range(2)
    ]
    shard = model.shard(1, 2)
    assert all(w.acquire(shard) for w in writers)
    rows, checks = model.read(1, 32, 48), model.read_checks(1, 32, 48)
    other = {"index": rows["index"], "value": rows["value"] - np.float16(1)}
    writers[0].write(shard, rows, checks)
    writers[1].write(shard, other, checks)
    for writer in writers:
        assert writer.has(shard) and not writer.acquire(shard)
        writer.release(shard)
        writer.close()
    found = of(cache, "topk-5")
    assert np.array_equal(found.read(1, 32, 48)["value"], rows["value"])
    stored = {k: v for k, v in objects(cache).items() if "/c/1/2" in k}
    assert stored == {k: v for k, v in files(local).items() if k in stored} and len(stored) == 4


def test_processes_share_a_bucket(
    cache: str, images: Path, local: Path, launcher: Launcher
) -> None:
    """Some shards are labelled twice; every byte is that of one process alone."""
    runs = [
        launcher.start(*labelling(images, cache, "--shard-rows", 16, "--seeds", seeds))
        for seeds in (1, 2, 2)
    ]
    ended = [run.wait() for run in runs]
    assert [status for status, _, _ in ended] == [0, 0, 0], [err for _, _, err in ended]
    name = of(local, "f16").name
    assert objects(cache) == {k: v for k, v in files(local).items() if k.startswith(name)}


def test_updates_at_once_are_all_kept(cache: str, local: Path) -> None:
    """Attributes and seeds: read, changed, put on condition, and again after a conflict."""
    model = of(local, "f16")
    create_label_set(cache, model.spec, model.classes, 1, shard_rows=16).close()
    start = threading.Barrier(6)

    def update(number: int) -> None:
        writer = create_label_set(cache, model.spec, model.classes, 1)
        start.wait()
        writer.add_attribute(f"key {number}", number)
        writer.grow(number + 2)
        writer.add_attribute("first", number)
        writer.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(update, range(6)))
    found = of(cache, "f16")
    assert found.seeds == 7
    assert {found.attributes[f"key {n}"] for n in range(6)} == set(range(6))
    assert found.attributes["first"] in range(6)


def test_without_conditional_requests(
    cache: str, images: Path, local: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that has none, as obstore is told so."""
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    for seeds in (1, 2):
        status, _, err = sskt(*labelling(images, cache, "--shard-rows", 16, "--seeds", seeds))
        assert status == 0, err
    name = of(local, "f16").name
    assert objects(cache) == {k: v for k, v in files(local).items() if k.startswith(name)}


# --- killed -----------------------------------------------------------------------------------


def sound(cache: str) -> None:
    """What is there reads: nothing looks stored that is not."""
    for label_set in list_label_sets(cache):
        for shard in label_set.shards(range(label_set.seeds)):
            if label_set.has(shard):
                label_set.read(shard.seed, shard.start, shard.stop)
                label_set.read_checks(shard.seed, shard.start, shard.stop)


def test_a_killed_writer(
    cache: str, images: Path, local: Path, launcher: Launcher, sskt: Sskt
) -> None:
    """In the middle of the shards, then resumed."""
    more = ("--shard-rows", 16, "--seeds", 2, "--encoding", "topk-5")
    command = labelling(images, cache, *more)
    status, _, err = launcher.start(*command, die_at=20).wait()
    assert status == -9, err
    sound(cache)
    name = of(local, "topk-5").name
    expected = {k: v for k, v in files(local).items() if k.startswith(name)}
    assert 0 < len(objects(cache)) < len(expected)
    status, out, err = sskt(*command, "--json")
    assert status == 0, err
    assert json.loads(out)["reused"] > 0
    assert objects(cache) == expected


SMALL = ("--limit", 6, "--shard-rows", 3, "--seeds", 1, "--encoding", "topk-3")
KILLED: dict[str, Callable[[Path, Path, str], tuple[object, ...]]] = {
    "cache-teachers": lambda images, local, to: labelling(images, to, *SMALL),
    "copy": lambda images, local, to: ("copy", local, to),
    "export": lambda images, local, to: (
        *("export", "--cache", local, "tiny", "--encoding", "topk-2", "--out", to),
    ),
}


@pytest.fixture(scope="module")
def small(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 samples in 2 blocks, 1 seed, topk-3."""
    from sskt.cli.main import run

    folder = tmp_path_factory.mktemp("small") / "cache"
    assert run([str(a) for a in labelling(images, folder, *SMALL)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", KILLED)
def test_a_kill_before_every_put(
    cache: str, images: Path, small: Path, launcher: Launcher, sskt: Sskt, what: str
) -> None:
    command = KILLED[what]
    assert sskt(*command(images, small, f"{cache}/whole"))[0] == 0
    expected = objects(f"{cache}/whole")
    for step in range(1, 40):
        to = f"{cache}/{step}"
        status, _, err = launcher.start(*command(images, small, to), die_at=step).wait()
        if status == 0:
            break
        assert status == -9, err
        sound(to)
        status, _, err = sskt(*command(images, small, to))
        assert status == 0, f"step {step}: {err}"
        assert objects(to) == expected, f"step {step}"
    # The group, two arrays, three coordinates of two files each; two shards of four; the error.
    assert step == 1 + 4 + 6 + 8 + (what != "copy"), step


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(), ("--seeds", "0")])
def test_a_kill_before_every_step_of_rm(
    cache: str, small: Path, launcher: Launcher, sskt: Sskt, seeds: tuple[str, ...]
) -> None:
    whole = files(small)
    for step in range(1, 20):
        to = f"{cache}/{step}"
        assert sskt("copy", small, to)[0] == 0
        command = ("rm", "--cache", to, "tiny", "--yes", *seeds)
        status, _, err = launcher.start(*command, die_at=step).wait()
        sound(to)
        for label_set in list_label_sets(to):
            assert label_set.coverage() != [1.0] or objects(to) == whole
        if status == 0:
            break
        assert status == -9, err
        status, _, err = sskt(*command)
        assert status == 0, f"step {step}: {err}"
        left = objects(to)
        stay = re.compile(r"zarr\.json$|/(seed|sample|class)/")
        assert left == ({k: v for k, v in whole.items() if stay.search(k)} if seeds else {})
    assert step == 5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_creation_that_nobody_finished(cache: str, local: Path, sskt: Sskt, count: int) -> None:
    """Arrays without a group are no label set; whoever creates it next goes on with them."""
    import obstore

    model = of(local, "topk-5")
    begun = create_label_set(f"{cache}/model", model.spec, model.classes, 3, shard_rows=20)
    begun.close()
    keys = [f"{model.name}/{array}/zarr.json" for array in ("index", "value", "view_check")]
    names = [f"{model.name}/{key}" for key in begun.constant_keys()]
    for key in keys[:count]:
        obstore.put(raw(cache), key, objects(f"{cache}/model")[key])
    status, _, err = sskt("verify", "--cache", cache, model.name)
    assert status == 2 and "no label set in" in one_line(err)
    with pytest.raises(MissingData, match="no label set at"):
        open_label_set(f"{cache}/{model.name}")
    finished = create_label_set(cache, model.spec, model.classes, 2, shard_rows=16)
    finished.close()
    assert (finished.shard_rows, finished.seeds) == (20, 3)
    (left,) = [s for s in list_label_sets(cache) if s.name == model.name]
    assert (left.shard_rows, left.seeds, left.coverage()) == (20, 3, [0.0] * 3)
    assert sskt("rm", "--cache", cache, model.name, "--yes")[0] == 0
    assert set(objects(cache)) == {f"model/{k}" for k in (*keys, *names, f"{model.name}/zarr.json")}


def test_a_leftover_creation_can_be_removed(cache: str, local: Path, sskt: Sskt) -> None:
    import obstore

    name = of(local, "topk-5").name
    obstore.put(raw(cache), f"{name}/index/zarr.json", b"{}")
    with pytest.raises(CorruptStore, match=r"index/zarr.json is no array's metadata"):
        model = of(local, "topk-5")
        create_label_set(cache, model.spec, model.classes, 2)
    assert sskt("rm", "--cache", cache, name, "--yes")[0] == 0
    assert not objects(cache)


# --- damage -----------------------------------------------------------------------------------


def delete(cache: str, key: str) -> None:
    import obstore

    obstore.delete(raw(cache), key)


def put(cache: str, key: str, data: bytes) -> None:
    import obstore

    obstore.put(raw(cache), key, data)


DAMAGE: dict[str, Callable[[str, str], None]] = {
    "deleted": delete,
    "empty": lambda cache, key: put(cache, key, b""),
    "cut": lambda cache, key: put(cache, key, objects(cache)[key][:-7]),
    "zeros": lambda cache, key: put(cache, key, bytes(len(objects(cache)[key]))),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("array", ["value", "index", "view_check"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_damaged_shard_is_named(
    filled: str, local: Path, sskt: Sskt, array: str, damage: str, listed: bool
) -> None:
    """Also one that was there when its reader last looked: never fill values."""
    label_set = of(filled, "topk-5")
    key = label_set.shard_key(array, label_set.shard(1, 1))
    if listed:
        label_set.read(1, 16, 32)
        label_set.read_checks(1, 16, 32)
    DAMAGE[damage](filled, f"{label_set.name}/{key}")
    read = label_set.read_checks if array == "view_check" else label_set.read
    for start, stop in ((16, 32), (20, 21), (0, 60)):
        with pytest.raises(CorruptStore, match=r"seed 1.* (16|20|0)"):
            read(1, start, stop)
    assert label_set.read(1, 32, 60) and len(label_set.read_checks(0, 0, 60)) == 60
    status, out, err = sskt("verify", "--cache", filled, label_set.name)
    assert status == 1 and ": 1 problem\n" in out, err
    assert "seed 1, samples 16 to 31" in out


def test_a_set_without_its_metadata(filled: str, local: Path, sskt: Sskt) -> None:
    """Shards without a group are no unfinished creation: they are named, not passed over."""
    name = of(local, "f16").name
    delete(filled, f"{name}/zarr.json")
    status, out, _ = sskt("verify", "--cache", filled)
    assert status == 1 and f"{name} has lost its zarr.json" in out
    model = of(local, "f16")
    with pytest.raises(CorruptStore, match="exists but is no label set"):
        create_label_set(filled, model.spec, model.classes, 2)
    assert sskt("rm", "--cache", filled, name, "--yes")[0] == 0
    assert len(list_label_sets(filled)) == 1


# --- servers that fail ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_is_gone(
    images: Path, local: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the URL; and never taken for damage, whose advice would be to delete."""
    server = Server()
    try:
        server.use(monkeypatch)
        server.new_bucket("there")
        cache = "s3://there/labels"
        assert sskt("copy", local, cache)[0] == 0
        label_set = of(cache, "f16")
        label_set.read(0, 0, 16)
        writer = create_label_set(cache, label_set.spec, label_set.classes, 2)
    finally:
        server.stop()
    for call in (
        lambda: label_set.read(0, 0, 16),
        lambda: writer.acquire(label_set.shard(0, 0)),
        lambda: label_set.missing([0]),
    ):
        with pytest.raises(InputError, match=r"cannot reach s3://there/labels"):
            call()
    for command in (
        ("ls", "--cache", cache),
        labelling(images, cache, "--seeds", 2),
        ("copy", local, cache),
    ):
        status, _, err = sskt(*command)
        said = one_line(err)
        assert status == 2 and "cannot reach s3://there/labels" in said and len(said) < 500
        assert "retries" in said and "<?xml" not in said


def everywhere(cache: str, images: Path, local: Path) -> list[tuple[object, ...]]:
    return [
        ("ls", "--cache", cache),
        ("verify", "--cache", cache),
        ("rm", "--cache", cache, "x", "--yes"),
        ("copy", cache, local),
        ("copy", local, cache),
        ("export", "--cache", local, "f16", "--encoding", "u8", "--out", cache),
        labelling(images, cache, "--seeds", 1),
    ]


def test_no_such_bucket(cache: str, images: Path, local: Path, sskt: Sskt) -> None:
    before = files(local)
    name = of(local, "f16").name
    for command in everywhere("s3://no-such-bucket/labels", images, local):
        status, _, err = sskt(*(name if a == "f16" else a for a in command))
        assert status == 2 and "no such bucket s3://no-such-bucket" in one_line(err), command
    model = of(local, "f16")
    with pytest.raises(InputError, match="no such bucket s3://no-such-bucket"):
        create_label_set("s3://no-such-bucket", model.spec, model.classes, 1)
    assert files(local) == before


def test_access_denied(
    images: Path, local: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(INITIAL_NO_AUTH_ACTION_COUNT="1")
    try:
        server.use(monkeypatch)
        server.new_bucket("theirs")
        name = of(local, "f16").name
        for command in everywhere("s3://theirs/labels", images, local):
            status, _, err = sskt(*(name if a == "f16" else a for a in command))
            said = one_line(err)
            assert status == 2 and "access to s3://theirs" in said and "denied" in said, command
        model = of(local, "f16")
        with pytest.raises(InputError, match=r"access to s3://theirs.* denied"):
            create_label_set("s3://theirs/labels", model.spec, model.classes, 1)
    finally:
        server.stop()


def test_plain_http_must_be_allowed(
    cache: str, sskt: Sskt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    status, _, err = sskt("ls", "--cache", cache)
    assert status == 2 and "needs AWS_ALLOW_HTTP=true" in one_line(err)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "expected s3://BUCKET/PREFIX"),
        ("s3:///labels", "expected s3://BUCKET/PREFIX"),
        ("gs://bucket/../else", "expected gs://BUCKET/PREFIX"),
        ("ftp://host/labels", "unknown kind of cache ftp://host/labels; expected a folder, s3://"),
        ("file:///labels", "unknown kind of cache"),
        ("az://container/labels", "Account must be specified"),
    ],
)
def test_bad_urls(
    url: str, said: str, sskt: Sskt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    status, _, err = sskt("ls", "--cache", url)
    assert status == 2 and said in one_line(err)
    assert not list(tmp_path.iterdir())


def test_names_of_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Buckets of all kinds open without a request; folders are folders."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "lab")
    for url in ("s3://bucket", "gs://bucket/a/b", "az://container/labels"):
        place = open_cache(f"{url}/")
        assert str(place) == url and not place.is_local
        below = place.below("set")
        assert (str(below), below.name) == (f"{url}/set", "set")
        assert below.where("x/zarr.json") == f"{url}/set/x/zarr.json"
    assert str(open_cache("s3://bucket/a//b/")) == "s3://bucket/a/b"
    for folder in (tmp_path, str(tmp_path)):
        assert open_cache(folder) == LocalStorage(tmp_path)
    assert open_cache(LocalStorage(tmp_path)) == LocalStorage(tmp_path)


def test_a_cache_at_the_top_of_a_bucket(cache: str, local: Path, sskt: Sskt) -> None:
    top = "/".join(cache.split("/")[:3])
    assert sskt("copy", local, top)[0] == 0
    assert objects(top) == files(local)
    assert sskt("verify", "--cache", f"{top}/")[0] == 0
    assert of(top, "f16").read(0, 0, 60)["labels"].shape == (60, 12)


def test_without_obstore(sskt: Sskt, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "obstore" or n.startswith("obstore.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)
    status, _, err = sskt("ls", "--cache", "s3://bucket/labels")
    assert status == 2 and "s3:// caches need: pip install 'sskt[cloud]'" in one_line(err)


def test_nothing_there(cache: str, sskt: Sskt) -> None:
    status, _, err = sskt("ls", "--cache", cache)
    assert status == 2 and f"no label set in {cache} is there" in one_line(err)


def test_a_folder_of_something_else(filled: str, sskt: Sskt) -> None:
    """Objects of others beside the sets are passed over, and stay."""
    put(filled, "notes/today.txt", b"dear diary")
    put(filled, "readme", b"labels")
    assert len(list_label_sets(filled)) == 2
    status, _, err = sskt("rm", "--cache", filled, "notes", "--yes")
    assert status == 2 and "matches notes" in one_line(err)
    assert objects(filled)["notes/today.txt"] == b"dear diary"


def test_a_slow_neighbour(cache: str, local: Path) -> None:
    """What another process stored since the last look is found when asked anew, or locked."""
    model = of(local, "f16")
    one, other = (
        create_label_set(cache, model.spec, model.classes, 2, shard_rows=16) for _ in range(2)
    )
    shard = model.shard(0, 3)
    assert len(one.missing(range(2))) == 8
    other.write(shard, model.read(0, 48, 60), model.read_checks(0, 48, 60))
    assert not one.has(shard)
    assert not one.acquire(shard)
    assert len(one.missing(range(2))) == 7 and one.has(shard)
    for writer in (one, other):
        writer.close()


def test_paths_are_for_folders(filled: str) -> None:
    label_set = of(filled, "f16")
    shard = label_set.shard(0, 0)
    assert label_set.place_of(shard) == f"{filled}/{label_set.name}/view_check/c/0/0.json"
    with pytest.raises(InputError, match="is no folder"):
        _ = label_set.path
    with pytest.raises(InputError, match="is no folder"):
        label_set.commit_path(shard)
