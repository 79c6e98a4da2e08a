"""Kills, several processes, a full disk, damage, bad input: nothing is lost, nothing is silent."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.helpers import TINY, tree, write_images
from support.processes import Launcher, launched

from sskt.teacher_cache.errors import CorruptStore, SsktError
from sskt.teacher_cache.label_sets.create import list_label_sets, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling import run as stage
from sskt.teacher_cache.labeling import units as shares
from sskt.teacher_cache.labeling.units import VIEW_BYTES, Unit

Sskt = Callable[..., tuple[int, str, str]]
Arguments = list[str]

KILLS, COLD_KILLS = 20, 3
SOURCE = f"tiny={TINY}:build"


def stage_arguments(target: Path, cache: Path, *more: object) -> Arguments:
    """A command line that labels ``target`` with the tiny source, without loader processes."""
    fixed = ("cache-teachers", "--source", SOURCE, "--policy", "pad-crop-flip", "--workers", 0)
    return [str(a) for a in (*fixed, "--target", target, "--cache", cache, *more)]


def contents(cache: Path) -> dict[str, str]:
    """Every file of a cache but the lock files."""
    return {k: v for k, v in tree(cache).items() if not k.startswith(".locks/")}


def stored_shards(cache: Path) -> int:
    return sum(1 for _ in cache.glob("[!.]*/labels/c/*/*/0"))


def one_line(err: str) -> str:
    """The only line of standard error, which must be sskt's own."""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sskt: "), err
    assert "unexpected" not in err and "Traceback" not in err, err
    return lines[0]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with launched(tmp_path_factory.mktemp("launcher"), ("fsync", "rename", "replace")) as started:
        yield started


def wait_for_shards(cache: Path, count: int, alive: Callable[[], bool] = lambda: True) -> None:
    limit = time.monotonic() + 60
    while stored_shards(cache) < count:
        assert time.monotonic() < limit and alive(), "no shard appeared"
        time.sleep(0.002)


# --- kills ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_kills_lose_nothing(images: Path, tmp_path: Path, launcher: Launcher) -> None:
    """SIGKILL at random moments, from the start of the interpreter to the last shards."""
    many = ("--seeds", 30, "--shard-rows", 5)
    arguments = stage_arguments(images, tmp_path / "killed", *many)
    rng, killed, seen = random.Random(20), 0, set()
    code = "from sskt.cli.main import main; main()"
    for _ in range(COLD_KILLS):
        before = stored_shards(tmp_path / "killed")
        quiet = subprocess.DEVNULL
        cold = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=quiet)
        if killed < COLD_KILLS - 1:
            time.sleep(rng.uniform(0.2, 3))
        else:
            wait_for_shards(tmp_path / "killed", before + 1, lambda: cold.poll() is None)  # noqa: B023
        cold.kill()
        assert cold.wait() == -signal.SIGKILL
        killed += 1
    while killed < KILLS:
        before = stored_shards(tmp_path / "killed")
        run = launcher.start(*arguments)
        if killed < KILLS // 3:
            time.sleep(rng.uniform(0, 0.3))
        else:
            wait_for_shards(tmp_path / "killed", before + rng.randrange(1, 12))
            time.sleep(rng.uniform(0, 0.01))
        run.kill()
        assert run.wait()[0] == -signal.SIGKILL
        killed += 1
        seen.add(stored_shards(tmp_path / "killed"))
    assert killed == KILLS and len(seen) >= KILLS // 2, sorted(seen)
    assert stored_shards(tmp_path / "killed") < 30 * 12
    status, _, err = launcher.start(*arguments).wait()
    assert status == 0, err
    status, _, err = launcher.start(*stage_arguments(images, tmp_path / "whole", *many)).wait()
    assert status == 0, err
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.partial"))


def die_at_every_step(
    launcher: Launcher,
    sskt: Sskt,
    begin: Callable[[Path], None],
    arguments: Callable[[Path], Arguments],
) -> int:
    """Kills a run before each of its syncs and renames in turn; resumes; compares. Steps tried."""
    folder = launcher.folder / f"steps-{time.monotonic_ns()}"
    begin(folder / "whole")
    assert sskt(*arguments(folder / "whole"))[0] == 0
    expected = contents(folder / "whole")
    for step in range(1, 200):
        cache = folder / str(step)
        begin(cache)
        status, _, err = launcher.start(*arguments(cache), die_at=step).wait()
        if status == 0:
            return step - 1
        assert status == -signal.SIGKILL, err
        if cache.is_dir():
            for label_set in list_label_sets(cache):
                label_set.coverage()
        status, _, err = launcher.start(*arguments(cache)).wait()
        assert status == 0, f"step {step}: {status} {err}"
        assert contents(cache) == expected, f"step {step}"
        assert not list(cache.rglob("*.partial")), f"step {step}"
    raise AssertionError("it never finished")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["f16", "topk-3"])
def test_a_kill_at_every_step_of_a_new_set(
    images: Path, launcher: Launcher, sskt: Sskt, encoding: str
) -> None:
    def arguments(cache: Path) -> Arguments:
        more = ("--limit", 6, "--shard-rows", 3, "--seeds", 1, "--encoding", encoding)
        return stage_arguments(images, cache, *more)

    assert die_at_every_step(launcher, sskt, lambda cache: None, arguments) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["f16", "topk-3"])
def test_a_kill_at_every_step_of_adding_seeds(
    images: Path, tmp_path: Path, launcher: Launcher, sskt: Sskt, encoding: str
) -> None:
    def arguments(cache: Path, seeds: int = 3) -> Arguments:
        more = ("--limit", 6, "--shard-rows", 6, "--seeds", seeds, "--encoding", encoding)
        return stage_arguments(images, cache, *more)

    status, _, err = sskt(*arguments(tmp_path / "start", 2))
    assert status == 0, err

    def begin(cache: Path) -> None:
        shutil.copytree(tmp_path / "start", cache)

    assert die_at_every_step(launcher, sskt, begin, arguments) >= 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_ctrl_c(images: Path, tmp_path: Path, launcher: Launcher, sskt: Sskt, workers: int) -> None:
    """As a terminal sends it: to the process and its loader processes."""
    arguments = stage_arguments(images, tmp_path / "a", "--seeds", 12, "--shard-rows", 5)
    arguments[arguments.index("--workers") + 1] = str(workers)
    run = launcher.start(*arguments)
    wait_for_shards(tmp_path / "a", 3)
    os.killpg(run.child, signal.SIGINT)
    status, _, err = run.wait()
    assert status == 130
    assert 3 <= stored_shards(tmp_path / "a") < 12 * 12
    said = [line for line in err.splitlines() if line]
    assert len(said) == 1 and said[0].startswith("sskt: interrupted; "), err
    assert "run the same command again" in said[0]
    status, _, err = sskt(*arguments)
    assert status == 0, err
    assert sskt(*stage_arguments(images, tmp_path / "b", "--seeds", 12, "--shard-rows", 5))[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- several processes ------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.slow
def test_processes_share_the_work(
    images: Path, tmp_path: Path, launcher: Launcher, sskt: Sskt, processes: int
) -> None:
    more = ("--seeds", 12, "--shard-rows", 2, "--json")
    runs = [
        launcher.start(*stage_arguments(images, tmp_path / "shared", *more))
        for _ in range(processes)
    ]
    written = []
    for run in runs:
        status, out, err = run.wait()
        assert status == 0, err
        written.append(json.loads(out)["written"])
    assert sum(written) == 60 * 12, written
    assert min(written) > 0, written
    assert sskt(*stage_arguments(images, tmp_path / "alone", *more))[0] == 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_processes_that_ask_for_different_seeds(
    images: Path, tmp_path: Path, launcher: Launcher, sskt: Sskt
) -> None:
    """Each grows the set that the other one made or is writing to."""

    def arguments(cache: Path, seeds: int) -> Arguments:
        return stage_arguments(images, cache, "--seeds", seeds, "--shard-rows", 5, "--json")

    runs = [launcher.start(*arguments(tmp_path / "shared", seeds)) for seeds in (2, 9, 5)]
    ended = [run.wait() for run in runs]
    assert [status for status, _, _ in ended] == [0, 0, 0], [err for _, _, err in ended]
    assert sum(json.loads(out)["written"] for _, out, _ in ended) == 60 * 9
    assert sskt(*arguments(tmp_path / "alone", 9))[0] == 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_bytes(
    images: Path, tmp_path: Path, sskt: Sskt, workers: int
) -> None:
    more = ("--seeds", 2, "--shard-rows", 25, "--batch-size", 8)
    for name, count in (("none", 0), ("some", workers)):
        arguments = stage_arguments(images, tmp_path / name, *more)
        arguments[arguments.index("--workers") + 1] = str(count)
        assert sskt(*arguments)[0] == 0
    assert contents(tmp_path / "none") == contents(tmp_path / "some")


def test_grouping_of_seeds_does_not_change_bytes(
    images: Path, tmp_path: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    units = shares.units

    def counted(*arguments: Any) -> list[Unit]:
        found = units(*arguments)
        sizes.extend(len(unit.shards) for unit in found)
        return found

    monkeypatch.setattr(stage, "units", counted)
    held = 25 * 12 * 2 + 3 * 64 * VIEW_BYTES
    for name, seeds, expected in (
        ("each", 0.5, [1] * 15),
        ("two", 2.1, [2] * 6 + [1] * 3),
        ("all", 9, [5] * 3),
    ):
        sizes.clear()
        more = ("--seeds", 5, "--shard-rows", 25, "--memory", 2 * seeds * held / 2**30)
        assert sskt(*stage_arguments(images, tmp_path / name, *more))[0] == 0
        assert sizes == expected
    assert contents(tmp_path / "each") == contents(tmp_path / "two") == contents(tmp_path / "all")


# --- a full disk ------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a tmpfs of a size, or changes the size of the mounted one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def sized(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            refusal = done.stderr.strip() if done.returncode else ""
        except OSError as error:
            refusal = str(error)
        if refusal:
            pytest.skip(f"no small tmpfs can be mounted here: {refusal}")
        mounted = True
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("size", ["4k", "12k", "28k", "300k"])
def test_a_full_disk(
    images: Path, tmp_path: Path, small_disk: Callable[[str], Path], sskt: Sskt, size: str
) -> None:
    more = ("--seeds", 8, "--shard-rows", 10)
    disk = small_disk(size)
    status, _, err = sskt(*stage_arguments(images, disk / "cache", *more))
    assert status == 2
    assert "No space left" in one_line(err) and "run the same command again" in err
    stored = stored_shards(disk / "cache")
    assert 5 < stored < 8 * 6 if size == "300k" else stored < 5
    for label_set in list_label_sets(disk / "cache"):
        _, out, err = sskt("verify", "--cache", disk / "cache", "--json")
        (report,) = json.loads(out)
        assert report["shards"] == stored and report["rows"] == 10 * stored
        assert len(report["problems"]) == 1 and "shards are missing" in report["problems"][0]
        assert sum(label_set.coverage()) == pytest.approx(stored / 6)
    small_disk("64m")
    status, _, err = sskt(*stage_arguments(images, disk / "cache", *more))
    assert status == 0, err
    assert sskt(*stage_arguments(images, tmp_path / "whole", *more))[0] == 0
    assert contents(disk / "cache") == contents(tmp_path / "whole")
    assert not list(disk.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_at_every_step(
    images: Path, tmp_path: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The disk fills up at the n-th sync, for every n."""

    def arguments(cache: Path) -> Arguments:
        more = ("--limit", 6, "--shard-rows", 3, "--seeds", 1)
        return stage_arguments(images, cache, *more)

    assert sskt(*arguments(tmp_path / "whole"))[0] == 0
    expected = contents(tmp_path / "whole")
    fsync, left, tried = os.fsync, 0, 0

    def failing(handle: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(code, os.strerror(code))
        fsync(handle)

    for step in range(1, 100):
        cache, left = tmp_path / str(step), step
        monkeypatch.setattr(os, "fsync", failing)
        status, _, err = sskt(*arguments(cache))
        monkeypatch.setattr(os, "fsync", fsync)
        if left > 0:
            assert status == 0
            break
        tried += 1
        assert status == 2, f"step {step}: {err}"
        assert os.strerror(code) in one_line(err), f"step {step}"
        for label_set in list_label_sets(cache):
            for shard in label_set.shards([0]):
                if label_set.has(shard):
                    label_set.read(0, shard.start, shard.stop)
        status, _, err = sskt(*arguments(cache))
        assert status == 0, f"step {step}: {err}"
        assert contents(cache) == expected, f"step {step}"
        assert not list(cache.rglob("*.partial"))
    assert tried >= 15


# --- damage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of one f16 set and one topk-5 set: 2 seeds, blocks of 16, 16, 16 and 12 samples."""
    from sskt.cli.main import run

    cache = tmp_path_factory.mktemp("damage") / "cache"
    for encoding in ("f16", "topk-5"):
        more = ("--seeds", 2, "--shard-rows", 16, "--encoding", encoding)
        assert run(stage_arguments(images, cache, *more)) == 0
    return cache


def copied(whole: Path, to: Path, encoding: str) -> LabelSet:
    """A copy of the whole cache with only the set of an encoding."""
    for label_set in list_label_sets(whole):
        if str(label_set.encoding) == encoding:
            return open_label_set(shutil.copytree(label_set.path, to / "cache" / label_set.name))
    raise AssertionError(encoding)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut in half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "last byte lost": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "empty": lambda p: p.write_bytes(b""),
    "first byte flipped": lambda p: flip(p, 0),
    "middle byte flipped": lambda p: flip(p, p.stat().st_size // 2),
    "last byte flipped": lambda p: flip(p, -1),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "deleted": Path.unlink,
}
PLACES = {
    "f16": ("labels/c/1/1/0", "view_check/c/1/1"),
    "topk-5": ("value/c/1/1/0", "index/c/1/1/0", "view_check/c/1/1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("encoding", "place"), [(e, p) for e, ps in PLACES.items() for p in ps])
def test_a_damaged_shard_is_named(
    whole: Path, tmp_path: Path, sskt: Sskt, encoding: str, place: str, damage: str
) -> None:
    label_set = copied(whole, tmp_path, encoding)
    DAMAGE[damage](label_set.path / place)
    reads: list[Callable[[], Any]] = [
        lambda: label_set.read(1, 16, 32),
        lambda: label_set.read(1, 20, 21),
    ]
    if place.startswith("view_check"):
        reads = [lambda: label_set.read_checks(1, 16, 32), lambda: label_set.read_checks(1, 20, 21)]
    for read in reads:
        with pytest.raises(CorruptStore, match=r"seed 1.* 16|seed 1.* 20"):
            read()
    label_set.read(1, 0, 16)
    label_set.read_checks(1, 32, 60)
    status, out, err = sskt("verify", "--cache", tmp_path / "cache")
    assert status == 1
    assert ": 1 problem\n" in out and "Traceback" not in out + err and "unexpected" not in err
    assert "seed 1, samples 16 to 31" in out


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "place"), [(e, p) for e, ps in PLACES.items() for p in ps])
def test_no_flip_and_no_cut_gives_other_rows(
    whole: Path, tmp_path: Path, encoding: str, place: str
) -> None:
    """Every byte of a shard flipped, every length cut: an error, or the very same rows."""
    label_set = copied(whole, tmp_path, encoding)
    path = label_set.path / place
    data = path.read_bytes()

    def rows() -> dict[str, Any]:
        return {**label_set.read(1, 16, 32), "checks": label_set.read_checks(1, 16, 32)}

    expected, refused = rows(), 0
    broken = [data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in range(len(data))]
    broken += [data[:i] for i in range(len(data))]
    for i, changed in enumerate(broken):
        path.write_bytes(changed)
        try:
            found = rows()
        except CorruptStore:
            refused += 1
            continue
        for key, value in expected.items():
            assert np.array_equal(found[key], value), f"{i}: {key}"
    assert refused > len(broken) * 0.9


def changed_json(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def spoil_spec(document: Any) -> None:
    document["attributes"]["sskt"]["spec"]["views"]["parameters"]["padding"] = 2


def spoil_classes(document: Any) -> None:
    document["attributes"]["sskt"]["classes"].pop()


def spoil_names(document: Any) -> None:
    document["attributes"]["sskt"]["classes"].reverse()


def spoil_digest(document: Any) -> None:
    document["attributes"]["sskt"]["digest"] = "0" * 64


METADATA: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "group empty": ("zarr.json", lambda p: p.write_bytes(b"")),
    "group cut": ("zarr.json", DAMAGE["cut in half"]),
    "group is no object": ("zarr.json", lambda p: p.write_text("[]")),
    "group without attributes": ("zarr.json", lambda p: p.write_text("{}")),
    "group without a spec": (
        "zarr.json",
        lambda p: p.write_text('{"attributes": {"sskt": {"format": 1}}}'),
    ),
    "group is no text": ("zarr.json", lambda p: p.write_bytes(b"\xff\xfe\x00")),
    "spec edited": ("zarr.json", lambda p: changed_json(p, spoil_spec)),
    "digest edited": ("zarr.json", lambda p: changed_json(p, spoil_digest)),
    "a class lost": ("zarr.json", lambda p: changed_json(p, spoil_classes)),
    "classes reversed": ("zarr.json", lambda p: changed_json(p, spoil_names)),
    "view_check's gone": ("view_check/zarr.json", Path.unlink),
    "view_check's cut": ("view_check/zarr.json", DAMAGE["cut in half"]),
    "view_check's an empty object": ("view_check/zarr.json", lambda p: p.write_text("{}")),
    "view_check's other size": (
        "view_check/zarr.json",
        lambda p: changed_json(p, lambda d: d.update(shape=[2, 48])),
    ),
    "labels' gone": ("labels/zarr.json", Path.unlink),
    "labels' cut": ("labels/zarr.json", DAMAGE["cut in half"]),
    "labels' an empty object": ("labels/zarr.json", lambda p: p.write_text("{}")),
    "labels' other type": (
        "labels/zarr.json",
        lambda p: changed_json(p, lambda d: d.update(data_type="int16", fill_value=0)),
    ),
    "labels' fewer samples": (
        "labels/zarr.json",
        lambda p: changed_json(p, lambda d: d.update(shape=[2, 48, 12])),
    ),
    "labels' unknown codec": (
        "labels/zarr.json",
        lambda p: changed_json(p, lambda d: d["codecs"][0].update(name="zip")),
    ),
}


@pytest.mark.parametrize("what", METADATA)
def test_damaged_metadata(whole: Path, tmp_path: Path, sskt: Sskt, what: str) -> None:
    label_set = copied(whole, tmp_path, "f16")
    file, spoil = METADATA[what]
    spoil(label_set.path / file)

    def read_all() -> None:
        opened = open_label_set(label_set.path)
        opened.read(1, 0, 60)
        opened.read_checks(1, 0, 60)

    with pytest.raises(CorruptStore):
        read_all()
    status, out, err = sskt("verify", "--cache", tmp_path / "cache")
    assert status == 1, out + err
    assert label_set.name in out + err
    assert "Traceback" not in out + err and "unexpected" not in err


def test_a_set_without_its_metadata_is_not_passed_over(
    whole: Path, tmp_path: Path, sskt: Sskt
) -> None:
    """Beside a good set, the bad one must not vanish from what verify looks at."""
    copied(whole, tmp_path, "topk-5")
    label_set = copied(whole, tmp_path, "f16")
    (label_set.path / "zarr.json").unlink()
    status, out, err = sskt("verify", "--cache", tmp_path / "cache")
    assert status == 1 and label_set.name in out + err


@pytest.mark.slow
@pytest.mark.parametrize("file", ["zarr.json", "labels/zarr.json", "view_check/zarr.json"])
def test_no_flip_in_metadata_gives_other_rows(whole: Path, tmp_path: Path, file: str) -> None:
    """Every third byte of the metadata changed: an error of ours, or the very same rows."""
    label_set = copied(whole, tmp_path, "f16")
    path = label_set.path / file
    data = path.read_bytes()

    def rows() -> tuple[Any, ...]:
        opened = open_label_set(label_set.path)
        return opened.read(1, 0, 60)["labels"], opened.read_checks(1, 0, 60)

    expected = rows()
    for i in range(0, len(data), 3):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        try:
            found = rows()
        except SsktError:
            continue
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one, other), (i, data[i - 20 : i + 20])


# --- bad input --------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, str], str]] = {
    "unknown source": ({"--source": "imagewoof"}, "unknown source 'imagewoof'; known: imagenet, "),
    "unknown architecture": ({"--source": "imagenet:resnet51"}, "unknown ImageNet architecture"),
    "no such network file": ({"--source": "mine=no.py:build"}, "no file no.py"),
    "no such factory": ({"--source": f"mine={TINY}:construct"}, "has no 'construct'"),
    "unknown target": ({"--target": "cifar11"}, "unknown target 'cifar11'; known: cifar10, "),
    "missing folder": ({"--target": "/no/such/folder"}, "no folder /no/such/folder; expected DIR"),
    "target without its files": ({"--target": "cifar10", "--root": "/no/such"}, "/no/such"),
    "target without --root": ({"--target": "cifar10"}, "no data of cifar10 in data (default)"),
    "unknown split": ({"--target": "shapes", "--split": "val"}, "unknown split of shapes 'val'"),
    "unknown policy": ({"--policy": "mixup"}, "unknown policy 'mixup'; known: none, pad-crop-flip"),
    "unknown parameter": ({"--policy": "pad-crop-flip:pad=2"}, "'pad'; known: padding"),
    "bad parameter": ({"--policy": "pad-crop-flip:padding=-1"}, "padding must be positive"),
    "unknown encoding": (
        {"--encoding": "f8"},
        "unknown encoding 'f8'; known: f16, root4, root4-coarse, u8, topk-K, f32",
    ),
    "too many entries": ({"--encoding": "topk-13"}, "topk-13: the source has only 12 classes"),
    "unknown option": ({"--colour": "red"}, "--colour"),
    "no number": ({"--seeds": "many"}, "'many'"),
    "no seeds": ({"--seeds": "0"}, "0"),
    "unknown device": ({"--device": "tpu"}, "tpu"),
    "unknown preprocessing": ({"--preprocessing": "colour=red"}, "unknown preprocessing field"),
    "weights for an own network": ({"--weights": "x.pth"}, "--weights goes with a known"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(images: Path, tmp_path: Path, sskt: Sskt, what: str) -> None:
    changes, expected = BAD[what]
    options = {
        "--source": SOURCE,
        "--target": str(images),
        "--cache": str(tmp_path / "cache"),
        "--policy": "pad-crop-flip",
    } | changes
    status, out, err = sskt("cache-teachers", *(x for item in options.items() for x in item))
    assert status == 2 and (out == "" or out.endswith("view seeds\n"))
    assert expected in one_line(err)
    assert stored_shards(tmp_path / "cache") == 0


def test_two_sources_of_one_name(images: Path, tmp_path: Path, sskt: Sskt) -> None:
    status, _, err = sskt(*stage_arguments(images, tmp_path, "--source", SOURCE))
    assert status == 2 and "needs a name of its own, found tiny, tiny" in one_line(err)


def test_empty_class_folder(tmp_path: Path, sskt: Sskt) -> None:
    write_images(tmp_path / "images" / "train" / "a", np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "images" / "train" / "b").mkdir()
    (tmp_path / "images" / "train" / "b" / "notes.txt").write_text("no image")
    status, _, err = sskt(*stage_arguments(tmp_path / "images", tmp_path / "cache"))
    assert status == 2
    assert f"class folder {tmp_path}/images/train/b holds no image" in one_line(err)


def test_cache_that_is_a_file(images: Path, tmp_path: Path, sskt: Sskt) -> None:
    path = tmp_path / "cache"
    path.write_text("mine")
    for cache in (path, path / "below"):
        status, _, err = sskt(*stage_arguments(images, cache))
        assert status == 2 and f"cannot use {cache} as cache folder" in one_line(err)
    status, _, err = sskt("verify", "--cache", path)
    assert status == 2 and f"the cache folder {path} does not exist" in one_line(err)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("kind", ["other network", "other classes", "garbage", "pickle", "missing"])
def test_wrong_checkpoint(images: Path, data: Path, tmp_path: Path, sskt: Sskt, kind: str) -> None:
    file, arch = tmp_path / "weights.pth", "imagenet:squeezenet1_0"
    if kind == "other network":
        file = data / "models" / "squeezenet_places365.safetensors"
    elif kind == "other classes":
        file, arch = (
            data / "models" / "squeezenet1_0_imagenet.safetensors",
            "places365:squeezenet1_0",
        )
    elif kind == "garbage":
        file.write_bytes(b"not weights at all")
    elif kind == "pickle":
        file.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    arguments = stage_arguments(images, tmp_path / "cache", "--weights", file)
    arguments[arguments.index(SOURCE)] = arch
    status, _, err = sskt(*arguments)
    assert status == 2
    said = "no weights file" if kind == "missing" else "wrong checkpoint"
    assert f"{said} {file}" in one_line(err)
    assert not (tmp_path / "ran").exists() and stored_shards(tmp_path / "cache") == 0


@pytest.fixture
def with_truncated(images: Path, data: Path, tmp_path: Path) -> Path:
    """The images with a really truncated JPEG among them, last of class bear."""
    folder = shutil.copytree(images, tmp_path / "images")
    broken = data / "voc" / "corrupt" / "2007_000027_truncated.jpg"
    (folder / "train" / "bear" / "truncated.jpg").write_bytes(broken.read_bytes())
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_fails(
    with_truncated: Path, tmp_path: Path, sskt: Sskt, workers: int
) -> None:
    more = ("--seeds", 2, "--shard-rows", 10, "--workers", workers)
    status, _, err = sskt(*stage_arguments(with_truncated, tmp_path / "cache", *more))
    assert status == 2
    said = one_line(err)
    assert f"cannot decode image {with_truncated}/train/bear/truncated.jpg" in said
    assert "--on-error skip" in said
    (label_set,) = list_label_sets(tmp_path / "cache")
    # Samples 0-39 are apple and bear, 40 is the truncated one: block 4 and later are not there.
    assert {s.block for s in label_set.missing(range(2))} == {4, 5, 6}
    assert not list((tmp_path / "cache").rglob("*.partial"))
    for block in (4, 5, 6):
        assert not list(label_set.path.glob(f"view_check/c/*/{block}"))


@pytest.mark.parametrize("encoding", ["f16", "root4", "u8", "topk-3"])
def test_a_truncated_image_is_skipped(
    with_truncated: Path, tmp_path: Path, sskt: Sskt, encoding: str
) -> None:
    more = ("--seeds", 2, "--shard-rows", 10, "--on-error", "skip", "--encoding", encoding)
    arguments = stage_arguments(with_truncated, tmp_path / "cache", *more, "--json")
    status, out, err = sskt(*arguments)
    assert status == 0, err
    report = json.loads(out)
    assert report["skipped"] == ["bear/truncated.jpg"]
    assert (report["written"], report["reused"]) == (60 * 2, 0)
    status, out, err = sskt("verify", "--cache", tmp_path / "cache")
    assert status == 0 and "122 rows, 2 skipped: clean" in out
    status, out, err = sskt("inspect", "--cache", tmp_path / "cache", "--sample", 40, "--no-live")
    assert status == 0 and "no label: the sample could not be read" in out
    again = json.loads(sskt(*arguments)[1])
    assert again["written"] == 0


def test_views_of_different_sizes(images: Path, tmp_path: Path, sskt: Sskt) -> None:
    """Found in a loader process: named in one short line all the same."""
    folder = shutil.copytree(images, tmp_path / "images")
    write_images(folder / "train" / "apple", np.zeros((1, 30, 20, 3), np.uint8))
    for workers in (0, 1):
        more = ("--workers", workers, "--seeds", 1)
        status, _, err = sskt(*stage_arguments(folder, tmp_path / "cache", *more))
        assert status == 2
        said = one_line(err)
        assert "differ in size" in said and "apple/0000.png gives (30, 20)" in said
        assert "worker process" not in said


# --- labels for something else ----------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sskt.cli.main import run

    cache = tmp_path_factory.mktemp("cached") / "cache"
    assert run(stage_arguments(images, cache, "--seeds", 2)) == 0
    return cache


MISMATCHES: dict[str, tuple[list[str], str]] = {
    "parameter": (
        ["--policy", "pad-crop-flip:padding=3"],
        "made with --policy pad-crop-flip:padding=4, but --policy pad-crop-flip:padding=3 was",
    ),
    "policy": (["--policy", "none"], "padding=4, but --policy none was given"),
    "seeds": (["--seeds", "4"], "lacks seeds 2-3 of 4"),
    "fewer samples": (
        ["--limit", "30"],
        "--limit 60 (all 60 samples; leave --limit out), but --limit 30",
    ),
    "source": (["--source", f"other={TINY}:build"], "no labels of source other"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_training_with_labels_of_something_else(
    images: Path, cached: Path, tmp_path: Path, sskt: Sskt, what: str
) -> None:
    more, expected = MISMATCHES[what]
    options = [
        "--source",
        SOURCE,
        "--policy",
        "pad-crop-flip",
        "--epochs",
        "4",
        "--model",
        "resnet20",
    ]
    if "--source" in more:
        options = options[2:]
    command = ["train", "--target", images, "--cache", cached, "--out", tmp_path / "run"]
    status, out, err = sskt(*command, *options, *more, "--workers", 0, "--device", "cpu")
    assert status == 2 and out == ""
    assert expected in one_line(err)
    assert not (tmp_path / "run").exists()


def test_training_on_changed_files(images: Path, cached: Path, tmp_path: Path, sskt: Sskt) -> None:
    """The same folder name and size, one file of another length: another fingerprint."""
    folder = shutil.copytree(images, tmp_path / "images")
    write_images(folder / "train" / "apple", np.zeros((1, 24, 24, 3), np.uint8))
    command = ["train", "--target", folder, "--cache", cached, "--out", tmp_path / "run"]
    more = ["--source", SOURCE, "--policy", "pad-crop-flip", "--epochs", "1", "--device", "cpu"]
    status, _, err = sskt(*command, *more)
    assert status == 2 and "sizes of the files (or the pixels) have changed" in one_line(err)
