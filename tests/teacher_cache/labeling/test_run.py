"""The stage: the same bytes whatever the workers, groups and shares; nothing read twice or lost."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.clips import SMALL
from support.helpers import TINY, one_line, tree, write_images
from support.small_targets import APART, SOURCE, TOGETHER, clips, in_memory, jpegs
from torch import Tensor, nn

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import DiskFull, InputError
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.format.spec import digest_of
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling import loader as reading
from sskt.teacher_cache.labeling.loader import ReadRequest, ViewBatch, ViewReader
from sskt.teacher_cache.labeling.run import (
    StageOptions,
    StageReport,
    cache_teachers,
    open_sets,
)
from sskt.teacher_cache.labeling.units import Share, parse_share, seeds_together, units
from sskt.teacher_cache.labeling.writer import QUEUED, Writer
from sskt.teacher_cache.media import images, video
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.tools.verify import verify
from sskt.teacher_cache.views import loader_processes
from sskt.teacher_cache.views.frame_sampling import parse_frame_sampling
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, open_views

__all__ = ["clips", "jpegs"]  # fixtures

Sskt = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
F32 = parse_encoding("f32")
# --- three kinds of targets ---------------------------------------------------------------------


KINDS = ("memory", "jpegs", "clips")


@pytest.fixture
def views(request: pytest.FixtureRequest) -> Views:
    """Views of one of ``KINDS``, by indirect parameter."""
    if request.param == "memory":
        return open_views(in_memory(22), parse_policy("pad-crop-flip"))
    target = open_target(str(request.getfixturevalue(request.param)))
    if request.param == "jpegs":
        return open_views(target, parse_policy("random-resized-crop-flip:size=20"))
    return open_views(target, parse_policy(SMALL), parse_frame_sampling("random"))


every_kind = pytest.mark.parametrize("views", KINDS, indirect=True)
from_files = pytest.mark.parametrize("views", KINDS[1:], indirect=True)


@pytest.fixture(scope="module")
def pair(tiny: Source) -> list[Source]:
    """Two sources of different weights."""
    other = open_source(parse_source(f"other={TINY}:build"), preprocessing="size=12")
    return [tiny, other]


SEEDS = 5
OPTIONS = StageOptions(batch_size=3, workers=0, shard_rows=6)


def run(views: Views, sources: Sequence[Source], cache: Path, **options: Any) -> StageReport:
    seeds = options.pop("seeds", SEEDS)
    how = replace(OPTIONS, **options)
    return cache_teachers(views, sources, parse_encoding("f16"), seeds, cache, how)


def stored(cache: Path) -> dict[str, str]:
    """Every file of the label sets."""
    return {name: sha for name, sha in tree(cache).items() if not name.startswith(".")}


def shards(cache: Path) -> int:
    return sum(1 for _ in cache.glob("[!.]*/labels/c/*/*/0"))


# --- the same bytes -----------------------------------------------------------------------------


@every_kind
def test_workers_memory_and_parts_do_not_change_a_byte(
    views: Views, pair: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(views, pair, tmp_path / "plain", memory=TOGETHER)
    assert report.written == 2 * SEEDS * len(views.target) and report.reused == 0
    expected = stored(tmp_path / "plain")
    assert len([name for name in expected if "/labels/c/" in name]) == (
        2 * SEEDS * -(-len(views.target) // 6)
    )
    for workers, memory, part in ((0, APART, None), (1, TOGETHER, 1), (4, APART, None)):
        name = f"{workers} {memory}"
        if part is not None:
            monkeypatch.setattr(reading, "PART_BYTES", part)
        run(views, pair, tmp_path / name, workers=workers, memory=memory)
        assert stored(tmp_path / name) == expected, name


@every_kind
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_three_shares_in_any_order_are_one_run(
    views: Views, pair: list[Source], tmp_path: Path, order: tuple[int, ...]
) -> None:
    run(views, pair, tmp_path / "whole")
    written = []
    for rank in order:
        report = run(views, pair, tmp_path / "shares", share=Share(rank, 3))
        written.append(report.written)
        assert report.reused == 0, "each has its own part"
    assert sum(written) == 2 * SEEDS * len(views.target) and min(written) > 0
    assert stored(tmp_path / "shares") == stored(tmp_path / "whole")
    assert run(views, pair, tmp_path / "shares").written == 0


@from_files
def test_a_run_in_pieces_is_one_run(views: Views, pair: list[Source], tmp_path: Path) -> None:
    """Seeds added later, a source added later, and shards that get lost in between."""
    run(views, pair, tmp_path / "whole")
    cache = tmp_path / "pieces"
    assert run(views, pair[:1], cache, seeds=2).written == 2 * len(views.target)
    report = run(views, pair, cache, seeds=3)
    assert (report.written, report.reused) == (4 * len(views.target), 2 * len(views.target))
    (lost,) = cache.glob("*other*/labels/c/1/0/0")
    lost.unlink()
    for seeds in (3, SEEDS):
        run(views, pair, cache, seeds=seeds)
    assert stored(cache) == stored(tmp_path / "whole")


def test_sets_of_different_shard_sizes_run_together(
    jpegs: Path, pair: list[Source], tmp_path: Path
) -> None:
    views = open_views(open_target(str(jpegs)), parse_policy("random-resized-crop-flip:size=20"))
    for source, rows in zip(pair, (6, 9), strict=True):
        run(views, [source], tmp_path / "alone", shard_rows=rows)
    run(views, pair[:1], tmp_path / "both", seeds=1, shard_rows=6)
    run(views, pair, tmp_path / "both", shard_rows=9)
    assert stored(tmp_path / "both") == stored(tmp_path / "alone")


def test_an_unreadable_image_is_skipped_the_same_by_all(
    jpegs: Path, pair: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(jpegs, tmp_path / "jpegs")
    for name in ("one/004.jpg", "two/001.jpg", "two/003.jpg", "two/005.jpg"):
        (folder / "train" / name).write_bytes(b"\xff\xd8\xff no image")
    views = open_views(open_target(str(folder)), parse_policy("random-resized-crop-flip:size=20"))
    found = []
    for workers, memory, share in (
        (0, TOGETHER, None),
        (0, APART, Share(1, 2)),
        (1, APART, Share(0, 2)),
    ):
        cache = tmp_path / ("whole" if share is None else "shares")
        monkeypatch.setattr(reading, "PART_BYTES", 1)
        report = run(
            views, pair, cache, workers=workers, memory=memory, share=share, on_error="skip"
        )
        found.append(report)
    assert found[0].skipped == ["one/004.jpg", "two/001.jpg", "two/003.jpg", "two/005.jpg"]
    assert found[0].written == 2 * SEEDS * 18
    assert found[1].written + found[2].written == found[0].written
    assert stored(tmp_path / "shares") == stored(tmp_path / "whole")


def test_a_damaged_frame_is_skipped_the_same_by_all(
    clips: Path, pair: list[Source], tmp_path: Path
) -> None:
    # Some seeds do not look at this frame: whether they are labelled must not depend on others.
    folder = shutil.copytree(clips, tmp_path / "clips")
    (folder / "train/swim/video 7/image_00006.jpg").write_bytes(b"\xff\xd8\xff no image")
    views = open_views(open_target(str(folder)), parse_policy(SMALL))
    for name, memory in (("together", TOGETHER), ("apart", APART)):
        report = run(views, pair, tmp_path / name, memory=memory, on_error="skip")
        assert report.skipped == ["swim/video 7"]
    assert stored(tmp_path / "together") == stored(tmp_path / "apart")


# --- shares on the command line -----------------------------------------------------------------

VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the variables of a launcher; those not given are absent."""

    def put(**given: object) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))

    put()
    yield put


def command(target: Path, cache: Path, *more: object) -> list[str]:
    fixed = ("cache-teachers", "--source", SOURCE, "--policy", "random-resized-crop-flip:size=20")
    sizes = ("--workers", 0, "--batch-size", 3, "--shard-rows", 6, "--seeds", SEEDS, "--json")
    return [str(a) for a in (*fixed, *sizes, "--target", target, "--cache", cache, *more)]


@pytest.mark.parametrize("how", ["option", "torchrun", "srun"])
def test_shares_of_a_command_line(
    jpegs: Path, sskt: Sskt, tmp_path: Path, environment: Callable[..., None], how: str
) -> None:
    status, out, err = sskt(*command(jpegs, tmp_path / "whole"))
    assert status == 0, err
    total = json.loads(out)["written"]
    written = []
    for rank in (1, 2, 0):
        if how == "torchrun":
            environment(RANK=rank, WORLD_SIZE=3)
        elif how == "srun":
            environment(SLURM_PROCID=rank, SLURM_NTASKS=3, SLURM_STEP_NUM_TASKS=3)
        more = ("--share", f"{rank}/3") if how == "option" else ()
        status, out, err = sskt(*command(jpegs, tmp_path / "shares", *more))
        assert status == 0, err
        written.append(json.loads(out)["written"])
    assert sum(written) == total and min(written) > 0 and max(written) < total
    assert stored(tmp_path / "shares") == stored(tmp_path / "whole")


def test_a_share_says_that_it_is_one(
    jpegs: Path, sskt: Sskt, tmp_path: Path, environment: Callable[..., None]
) -> None:
    environment(RANK=1, WORLD_SIZE=3)
    ask = [a for a in command(jpegs, tmp_path / "cache") if a != "--json"]
    status, out, err = sskt(*ask)
    assert status == 0 and "share 1/3" in out + err, out + err
    status, out, err = sskt(*ask, "--share", "none")
    assert status == 0 and "share" not in out + err


def test_options_of_another_engine_are_refused(
    jpegs: Path, sskt: Sskt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "sskt.teacher_cache.labeling.ray.driver", None
    )  # it must not come to it
    for more in (
        ("--engine", "ray", "--share", "0/3"),
        ("--address", "10.0.0.1:6379"),
        ("--task-gpus", 0.5),
    ):
        status, _, err = sskt(*command(jpegs, tmp_path / "cache", *more))
        assert status == 2 and more[-2] in one_line(err), err


@pytest.mark.slow
def test_a_killed_share_is_run_again(
    jpegs: Path, sskt: Sskt, tmp_path: Path, environment: Callable[..., None]
) -> None:
    more = ("--seeds", 60, "--shard-rows", 3)
    assert sskt(*command(jpegs, tmp_path / "whole", *more))[0] == 0
    share = command(jpegs, tmp_path / "shares", *more, "--share", "1/3", "--memory", APART)
    code = "from sskt.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *share], stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while shards(tmp_path / "shares") < 3:
        assert time.monotonic() < limit and process.poll() is None, "no shard appeared"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed = shards(tmp_path / "shares")
    assert 3 <= killed < 60 * 8 // 3
    reused = 0
    for rank in (0, 1, 2):
        status, out, err = sskt(*command(jpegs, tmp_path / "shares", *more, "--share", f"{rank}/3"))
        assert status == 0, err
        reused += json.loads(out)["reused"]
    assert reused > 0, "nothing is made twice"
    assert stored(tmp_path / "shares") == stored(tmp_path / "whole")


def test_shares_are_read_from_options_and_launchers() -> None:
    assert parse_share("0/3", {}) == Share(0, 3)
    assert parse_share("2/3", {"RANK": "0", "WORLD_SIZE": "9"}) == Share(2, 3)
    assert parse_share("0/1", {}) == Share(0, 1)
    assert parse_share("none", {"RANK": "1", "WORLD_SIZE": "2"}) is None
    assert parse_share("auto", {}) is None
    assert parse_share("auto", {"RANK": "1", "WORLD_SIZE": "4"}) == Share(1, 4)
    assert parse_share("auto", {"RANK": "0", "WORLD_SIZE": "1"}) is None
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5"}
    assert parse_share("auto", srun) == Share(3, 5)
    assert parse_share("auto", {"RANK": "1", "WORLD_SIZE": "2", **srun}) == Share(1, 2)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        {"SLURM_NTASKS": "4"},
    ],
    ids=["sbatch", "sbatch -n 4", "salloc -n 4"],
)
def test_a_batch_script_without_srun_is_the_whole_run(variables: dict[str, str]) -> None:
    # There is one process then, and nobody who would do the other three quarters.
    assert parse_share("auto", variables) is None


@pytest.mark.parametrize(
    ("text", "variables", "message"),
    [
        ("3/3", {}, "share 3/3: expected a rank from 0 to 2"),
        ("-1/3", {}, "share -1/3: expected a rank from 0 to 2"),
        ("0/0", {}, "0/0"),
        ("1", {}, "--share 1: expected a rank and a number of processes, as in --share 0/4"),
        ("a/b", {}, "--share a/b: expected a rank and a number of processes"),
        ("1/2/3", {}, "--share 1/2/3: expected a rank and a number of processes"),
        ("", {}, "--share : expected a rank and a number of processes"),
        ("auto", {"RANK": "1"}, "RANK=1 WORLD_SIZE=: expected a rank and a number of processes"),
        ("auto", {"WORLD_SIZE": "2"}, "RANK= WORLD_SIZE=2: expected a rank"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "share 2/2: expected a rank from 0 to 1"),
        ("auto", {"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one WORLD_SIZE=2: expected"),
    ],
)
def test_what_is_no_share_is_refused(text: str, variables: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_share(text, variables)
    assert message in str(caught.value) and "to -1" not in str(caught.value)


def test_a_share_that_is_none_exits_with_2(jpegs: Path, sskt: Sskt, tmp_path: Path) -> None:
    status, _, err = sskt(*command(jpegs, tmp_path / "cache", "--share", "3/3"))
    assert status == 2 and one_line(err) == "share 3/3: expected a rank from 0 to 2"


# --- units --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sheets(
    jpegs: Path, pair: list[Source], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[tuple[Views, list[LabelSet]]]]:
    """Label sets over 22 images and 1, from files and memory, by the rows of their shards."""
    crop, pad = parse_policy("random-resized-crop-flip:size=20"), parse_policy("pad-crop-flip")
    folder = open_target(str(jpegs))
    opened, stack = [], contextlib.ExitStack()
    for views in (
        open_views(folder, crop),
        open_views(folder.limited(1), crop),
        open_views(in_memory(22), pad),
    ):
        for rows in ((6, 6), (7, 100), (1, 9), (22, 22)):
            sets: list[LabelSet] = []
            for source, count in zip(pair, rows, strict=True):
                cache = tmp_path_factory.mktemp("sheet")
                options = StageOptions(shard_rows=count)
                (opened_pair,) = stack.enter_context(
                    open_sets(views, [source], F32, 1, cache, options)
                )
                sets.append(opened_pair.label_set)
            opened.append((views, sets))
    with stack:
        yield opened


memories = st.sampled_from([1e-12, 1e-6, 1e-4, 1e-3, 0.1, 4.0])


@given(
    case=st.integers(0, 11),
    seeds=st.integers(1, 40),
    batch=st.integers(1, 64),
    memory=memories,
    world=st.integers(1, 9),
)
@settings(deadline=None, max_examples=200)
def test_units_hold_every_shard_once(
    sheets: list[tuple[Views, list[LabelSet]]],
    case: int,
    seeds: int,
    batch: int,
    memory: float,
    world: int,
) -> None:
    views, sets = sheets[case]
    found = units(views, sets, seeds, batch, memory, world)
    assert found == units(views, sets, seeds, batch, memory, world)
    shared = [unit for rank in range(world) for unit in found[rank::world]]
    assert Counter(shared) == Counter(found)
    for label_set in sets:
        mine = [s for unit in found if unit.rows == label_set.shard_rows for s in unit.shards]
        assert len(mine) == len(set(mine)) and set(mine) == set(label_set.shards(range(seeds)))
    for unit in found:
        assert len({s.block for s in unit.shards}) == 1
        assert unit.seeds == tuple(range(unit.seeds[0], unit.seeds[-1] + 1))
        if views.target.images is not None:
            assert len(unit.shards) == 1
    for rows in {s.shard_rows for s in sets}:
        alike = [unit for unit in found if unit.rows == rows]
        blocks = next(s.blocks for s in sets if s.shard_rows == rows)
        assert len(alike) >= min(world, seeds * blocks), "work for every process"


def test_two_open_units_fit_the_memory(jpegs: Path) -> None:
    views = open_views(open_target(str(jpegs)), parse_policy("random-resized-crop-flip:size=20"))
    gib = 2**30
    for label, batch, memory in itertools.product((2000, 8000), (4, 64), (0.0001, 0.001, 0.01)):
        together = seeds_together(views, 8192, label, 1000, batch, memory)
        one = 22 * label + 3 * batch * 3 * 20 * 20
        assert together == 1 or 2 * together * one <= memory * gib
        assert together == 1000 or 2 * (together + 1) * one > memory * gib
    assert seeds_together(views, 8192, 2000, 7, 4, 100.0) == 7
    ram = open_views(in_memory(3), parse_policy("pad-crop-flip"))
    assert seeds_together(ram, 8192, 2000, 7, 4, 100.0) == 1, "nothing to decode"


# --- nothing is read twice ----------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is decoded in this process."""
    count = Counter[str]()

    def counting(read: Callable[..., Any]) -> Callable[..., Any]:
        def instead(path: Path, *more: Any) -> Any:
            count[str(path)] += 1
            return read(path, *more)

        return instead

    monkeypatch.setattr("sskt.teacher_cache.targets.base.read_image", counting(images.read_image))
    monkeypatch.setattr(video, "read_frames", counting(video.read_frames))
    return count


@from_files
@pytest.mark.parametrize(("memory", "times"), [(TOGETHER, 1), (APART, SEEDS)])
def test_a_file_is_decoded_once_a_unit(
    views: Views,
    pair: list[Source],
    tmp_path: Path,
    opened: Counter[str],
    memory: float,
    times: int,
) -> None:
    run(views, pair, tmp_path, memory=memory)
    assert views.target.paths is not None
    assert opened == {str(path): times for path in views.target.paths}


@from_files
def test_only_what_is_missing_is_decoded_and_labelled(
    views: Views, pair: list[Source], tmp_path: Path, opened: Counter[str]
) -> None:
    run(views, pair, tmp_path)
    before = stored(tmp_path)
    opened.clear()
    assert run(views, pair, tmp_path).written == 0 and not opened
    (lost,) = tmp_path.glob("*other*/labels/c/3/1/0")
    lost.unlink()
    report = run(views, pair, tmp_path)
    assert views.target.paths is not None
    rows = list(views.target.paths)[6:12]
    assert report.written == len(rows) and opened == {str(path): 1 for path in rows}
    assert stored(tmp_path) == before


# --- reading ------------------------------------------------------------------------------------


def orders(total: int, size: int, seeds: tuple[int, ...]) -> list[ReadRequest]:
    starts = range(0, total, size)
    return [ReadRequest(0, start, min(start + size, total), start, seeds) for start in starts]


def same(one: ViewBatch, other: ViewBatch) -> None:
    assert one.request == other.request and one.error == other.error
    assert one.rows.tolist() == other.rows.tolist() and one.bad == other.bad
    assert one.stills.keys() == other.stills.keys() == one.checks.keys() == other.checks.keys()
    for seed, stills in one.stills.items():
        assert torch.equal(stills, other.stills[seed])
        assert one.checks[seed].tolist() == other.checks[seed].tolist()


@every_kind
@pytest.mark.parametrize("part", [1, 3 * 20 * 20 * 4 * 3 * 3, 2**24])
def test_parts_make_the_same_batches(
    views: Views, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", part)
    ask = orders(len(views.target), 5, (4, 0, 2))
    here = list(ViewReader(views, 0, CPU).read(ask))
    there = list(ViewReader(views, 1, CPU).read(ask))
    assert [b.request for b in here] == ask
    for one, other in zip(here, there, strict=True):
        same(one, other)
        assert one.rows.tolist() == list(range(one.request.start, one.request.stop))


@pytest.mark.parametrize("part", [1, 2**24])
@pytest.mark.parametrize("bad", [(0,), (4,), (3, 4), (5, 6, 7, 8, 9), tuple(range(22))])
def test_unreadable_images_in_parts(
    jpegs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, bad: tuple[int, ...]
) -> None:
    folder = shutil.copytree(jpegs, tmp_path / "jpegs")
    target = open_target(str(folder))
    assert target.paths is not None
    for row in bad:
        target.paths[row].write_bytes(b"\xff\xd8\xff no image")
    views = open_views(target, parse_policy("random-resized-crop-flip:size=20"))
    monkeypatch.setattr(reading, "PART_BYTES", part)
    ask = orders(22, 5, (0, 1))
    here = list(ViewReader(views, 0, CPU).read(ask))
    there = list(ViewReader(views, 1, CPU).read(ask))
    for one, other in zip(here, there, strict=True):
        same(one, other)
        within = range(one.request.start, one.request.stop)
        assert [row for row, _ in one.bad] == [row for row in within if row in bad]
        assert all(str(target.paths[row]) in why for row, why in one.bad)
        assert one.rows.tolist() == [row for row in within if row not in bad]


def test_a_reader_may_be_asked_again(jpegs: Path) -> None:
    views = open_views(open_target(str(jpegs)), parse_policy("random-resized-crop-flip:size=20"))
    ask = orders(22, 8, (1,))
    reader = ViewReader(views, 1, CPU)
    for _ in range(2):
        found = list(reader.read(ask))
        assert [b.request for b in found] == ask
    ask.clear()
    assert list(reader.read(ask)) == []


def test_orders_are_asked_for_as_the_loader_comes_to_them(jpegs: Path) -> None:
    """A lock is taken when a block is read, not when the run starts."""
    views = open_views(open_target(str(jpegs)), parse_policy("random-resized-crop-flip:size=20"))
    asked: list[ReadRequest] = []

    def one_by_one() -> Iterator[ReadRequest]:
        for order in orders(22, 1, (0,)):
            asked.append(order)
            yield order

    stream = ViewReader(views, 1, CPU).read(one_by_one())
    next(stream)
    assert len(asked) < 8


SIZES = ((24, 24), (24, 30))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four images of one size and one of another."""
    rng = np.random.default_rng(0)
    for name, size, n in (("a", SIZES[0], 4), ("b", SIZES[1], 1)):
        images = rng.integers(0, 256, (n, *size, 3), np.uint8)
        write_images(tmp_path / "mixed/train" / name, images)
    return tmp_path / "mixed"


@pytest.mark.parametrize(("workers", "part"), [(0, 1), (1, 1), (1, 2**24)])
def test_mixed_sizes_are_named(
    mixed: Path,
    sskt: Sskt,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    part: int,
) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", part)
    more = ("--policy", "pad-crop-flip", "--workers", workers, "--batch-size", 8)
    status, _, err = sskt(*command(mixed, tmp_path / "cache", *more))
    line = one_line(err)
    assert status == 2 and "differ in size" in line
    assert "(24, 24)" in line and "(24, 30)" in line and "random-resized-crop-flip" in line


@pytest.mark.parametrize(("workers", "part"), [(0, 1), (1, 1), (1, 2**24)])
@pytest.mark.parametrize("views", KINDS[1:], indirect=True)
def test_a_file_that_went_away_fails_the_run_even_with_skip(
    views: Views,
    tiny: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    part: int,
) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", part)
    assert views.target.paths is not None
    paths = list(views.target.paths)
    away = tmp_path / "gone" / paths[4].name
    paths[4] = away  # as if it had been there when the target was opened
    gone = replace(views, target=replace(views.target, paths=tuple(paths)))
    with pytest.raises(InputError, match=r"cannot (read image|open clip) .*/gone/") as caught:
        run(gone, [tiny], tmp_path / "cache", workers=workers, on_error="skip")
    assert "No such file" in str(caught.value)


KILLER = """
import os, signal
def center(depth, sample, seed):
    if sample == 5 and os.path.exists(os.path.join(os.path.dirname(__file__), "armed")):
        os.kill(os.getpid(), signal.SIGKILL)
    return [depth // 2]
"""


@pytest.mark.slow
def test_a_killed_loader_process_ends_the_run_with_a_clear_word(
    clips: Path, sskt: Sskt, tmp_path: Path
) -> None:
    """As the kernel does when memory runs out."""
    (tmp_path / "killer.py").write_text(KILLER)
    (tmp_path / "armed").touch()
    more = ("--policy", SMALL, "--f-s", f"{tmp_path}/killer.py:center", "--workers", 2)
    ask = command(clips, tmp_path / "cache", *more, "--batch-size", 1, "--shard-rows", 1)
    code = "from sskt.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *ask], capture_output=True, text=True, timeout=120
    )
    line = one_line(done.stderr)
    assert done.returncode == 1 and "loader process" in line and "run the same command" in line
    (tmp_path / "armed").unlink()
    kept = shards(tmp_path / "cache")
    (label_set,) = list_label_sets(tmp_path / "cache")
    assert verify(label_set).shards == kept < SEEDS * 8
    for cache in ("cache", "whole"):
        status, _, err = sskt(
            *command(clips, tmp_path / cache, *more, "--batch-size", 1, "--shard-rows", 1)
        )
        assert status == 0, err
    assert stored(tmp_path / "cache") == stored(tmp_path / "whole")


# --- the writer ---------------------------------------------------------------------------------


def test_a_writer_runs_jobs_in_order_and_waits_for_them() -> None:
    writer, ran = Writer(), list[int]()
    for i in range(3 * QUEUED):
        writer.put(lambda i=i: ran.append(i))  # type: ignore[misc]
    writer.close()
    assert ran == list(range(3 * QUEUED))
    writer.close()


@pytest.mark.parametrize("error", [DiskFull("full"), SystemExit(3), KeyboardInterrupt()])
def test_after_an_error_a_writer_runs_nothing_and_nobody_waits(error: BaseException) -> None:
    writer, ran = Writer(), list[int]()
    gate = threading.Event()

    def failing() -> None:
        assert gate.wait(60)
        raise error

    writer.put(failing)
    for i in range(QUEUED):
        writer.put(lambda i=i: ran.append(i))  # type: ignore[misc]
    gate.set()
    with pytest.raises(type(error)) as caught:
        for _ in range(10_000_000):
            writer.put(lambda: ran.append(-1))
    assert caught.value is error
    for _ in range(2):
        with pytest.raises(type(error)):
            writer.close()
    assert ran == []


@from_files
@pytest.mark.parametrize("at", [3, 9, 20])
def test_a_full_disk_in_the_middle_of_a_unit(
    views: Views,
    pair: list[Source],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """It shows in the writer's thread; what was stored is whole; the same command goes on."""
    run(views, pair, tmp_path / "whole")
    run(views, pair, tmp_path / "cache", seeds=1)  # the sets are there before the disk is full
    before, fsync, left = shards(tmp_path / "cache"), os.fsync, at

    def failing(handle: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0 and threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    run(views, pair, tmp_path / "cache", seeds=SEEDS, share=Share(10**6 - 1, 10**6))  # room only
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DiskFull, match=r"No space left on device.*run the same command again"):
        run(views, pair, tmp_path / "cache")
    monkeypatch.setattr(os, "fsync", fsync)
    now = shards(tmp_path / "cache")
    assert before <= now < len(pair) * SEEDS * -(-len(views.target) // 6)
    for label_set in list_label_sets(tmp_path / "cache"):
        report = verify(label_set)
        assert [p for p in report.problems if "missing" not in p] == []
    run(views, pair, tmp_path / "cache")
    assert stored(tmp_path / "cache") == stored(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.partial"))


BROKEN = """
import torch
from torch import nn
SIZE, MEAN, STD = 16, (0, 0, 0), (1, 1, 1)
class Net(nn.Module):
    def forward(self, x):
        mean = x.mean((2, 3))
        return torch.where(mean > 0.99, torch.nan, mean)
build = Net
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_that_are_no_numbers_end_the_run(
    images: Path, sskt: Sskt, tmp_path: Path, workers: int
) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    Image.new("RGB", (24, 24), "white").save(folder / "train/cup/0003.png")  # sample 43
    (tmp_path / "broken.py").write_text(BROKEN)
    ask = command(folder, tmp_path / "cache", "--source", f"broken={tmp_path}/broken.py:build")
    status, _, err = sskt(*ask, "--workers", workers, "--shard-rows", 10)
    assert status == 2 and one_line(err) == (
        "source broken: the network's outputs are not finite; check its weights and preprocessing"
    )
    for label_set in list_label_sets(tmp_path / "cache"):
        report = verify(label_set)
        assert [p for p in report.problems if "missing" not in p] == []
        assert not any(label_set.has(label_set.shard(seed, 4)) for seed in range(SEEDS))


# --- BatchNorm over fixed batches ---------------------------------------------------------------


def bare_log_p(views: Tensor, source: Source) -> Tensor:
    """A bare network whose BatchNorm layers alone are in training mode, over exactly ``views``."""
    from support.independent_reader import load_factory

    network = load_factory(f"{TINY}:build").eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
    how = source.preprocessing
    x = views.permute(0, 3, 1, 2).float()
    shape = (how.size, how.size)
    if x.shape[2:] != shape:
        x = F.interpolate(x, shape, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (how.mean, how.std))
    with torch.no_grad():
        log_p: Tensor = network((x / 255 - mean) / std).log_softmax(1)
    return log_p


@pytest.fixture(scope="module")
def batch6() -> Source:
    return open_source(parse_source(f"normal={TINY}:build"), batchnorm="batch-6")


@pytest.mark.parametrize(
    ("n", "whole"),
    [
        (20, {0: (0, 6), 6: (6, 12), 12: (12, 18), 18: (14, 20)}),
        (12, {0: (0, 6), 6: (6, 12)}),
        (13, {0: (0, 6), 6: (6, 12), 12: (7, 13)}),
        (4, {0: (0, 4)}),
    ],
)
def test_labels_are_those_of_the_batch(
    batch6: Source, tmp_path: Path, n: int, whole: dict[int, tuple[int, int]]
) -> None:
    views = open_views(in_memory(n), parse_policy("pad-crop-flip"))
    options = StageOptions(batch_size=6, workers=0, shard_rows=12)
    cache_teachers(views, [batch6], F32, 2, tmp_path, options)
    (label_set,) = list_label_sets(tmp_path)
    for seed in range(2):
        found = torch.from_numpy(label_set.read(seed, 0, n)["labels"].copy())
        seen = torch.from_numpy(views.batch(np.arange(n), seed))
        for own, (first, stop) in whole.items():
            expected = bare_log_p(seen[first:stop], batch6)[own - first :]
            torch.testing.assert_close(found[own:stop], expected, rtol=1e-4, atol=1e-5)
        alone = bare_log_p(seen, batch6)
        if len(whole) > 1:
            assert not torch.allclose(found, alone, atol=1e-3), "the batch must matter"


@from_files
def test_a_batch_may_be_read_in_parts_by_workers_and_by_shares(
    views: Views, batch6: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"batch_size": 6, "shard_rows": 12}
    run(views, [batch6], tmp_path / "plain", **how)
    monkeypatch.setattr(reading, "PART_BYTES", 1)
    run(views, [batch6], tmp_path / "parts", workers=1, memory=APART, **how)
    for rank in (1, 0):
        run(views, [batch6], tmp_path / "shares", share=Share(rank, 2), **how)
    assert stored(tmp_path / "plain") == stored(tmp_path / "parts") == stored(tmp_path / "shares")


@every_kind
def test_sources_in_evaluation_mode_do_not_notice(
    views: Views, tiny: Source, batch6: Source, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"batch_size": 6, "shard_rows": 12}
    for source in (tiny, batch6):
        run(views, [source], tmp_path / "alone", **how)
    run(views, [tiny, batch6], tmp_path / "both", **how)
    assert stored(tmp_path / "both") == stored(tmp_path / "alone")


def test_batches_that_would_not_be_fixed_are_refused(batch6: Source, tmp_path: Path) -> None:
    views = open_views(in_memory(20), parse_policy("pad-crop-flip"))
    for options, message in (
        ({"batch_size": 5, "shard_rows": 12}, r"--batch-size must be 6 \(found 5\)"),
        ({"batch_size": 6, "shard_rows": 13}, r"--shard-rows a multiple of it \(found 13\)"),
        ({"batch_size": 6, "shard_rows": 12, "on_error": "skip"}, "--on-error skip"),
    ):
        with pytest.raises(InputError, match=message):
            run(views, [batch6], tmp_path, **options)
    assert list_label_sets(tmp_path) == []


def test_an_unreadable_image_ends_a_run_in_batches(
    jpegs: Path, batch6: Source, tmp_path: Path
) -> None:
    folder = shutil.copytree(jpegs, tmp_path / "jpegs")
    target = open_target(str(folder))
    assert target.paths is not None
    target.paths[15].write_bytes(b"no image")
    views = open_views(target, parse_policy("random-resized-crop-flip:size=20"))
    with pytest.raises(InputError, match=target.paths[15].name):
        run(views, [batch6], tmp_path / "cache", batch_size=6, shard_rows=12)


def test_batch_mode_on_the_command_line(jpegs: Path, sskt: Sskt, tmp_path: Path) -> None:
    ask = command(jpegs, tmp_path, "--batchnorm", "batch", "--shard-rows", 12, "--batch-size", 6)
    status, _, err = sskt(*ask)
    assert status == 0, err
    (label_set,) = list_label_sets(tmp_path)
    assert label_set.spec["source"]["batchnorm"] == "batch-6"
    status, out, err = sskt(
        "verify", "--cache", tmp_path, "--recompute", 30, "--json", "--source", SOURCE
    )
    (report,) = json.loads(out)
    assert status == 0 and report["problems"] == [] and report["recomputed"] == 30, err
    assert report["worst_distance"] < 1e-3
    for more, message in (
        (("--shard-rows", 13), "--shard-rows a multiple of it (found 13)"),
        (("--on-error", "skip"), "it cannot go with --on-error skip"),
        (("--batch-size", 1), "give --batch-size 2 or more"),
    ):
        status, _, err = sskt(*ask, *more)
        assert status == 2 and message in one_line(err)


# --- what a run refuses -------------------------------------------------------------------------


def test_sources_need_names_of_their_own(tiny: Source, tmp_path: Path) -> None:
    views = open_views(in_memory(3), parse_policy("pad-crop-flip"))
    with pytest.raises(InputError, match="each --source needs a name of its own, found tiny, tiny"):
        run(views, [tiny, tiny], tmp_path)
    with pytest.raises(InputError, match="name at least one --source"):
        run(views, [], tmp_path)


def test_progress_counts_labels_of_all_sources(pair: list[Source], tmp_path: Path) -> None:
    views = open_views(in_memory(7), parse_policy("pad-crop-flip"))
    said: list[tuple[int, int]] = []
    how = replace(OPTIONS, batch_size=4)
    cache_teachers(views, pair, F32, 2, tmp_path, how, lambda *step: said.append(step))
    assert said[-1] == (28, 28) and {total for _, total in said} == {28}
    assert [done for done, _ in said] == sorted({done for done, _ in said})


def test_a_source_that_moves_is_caught(jpegs: Path, sskt: Sskt, tmp_path: Path) -> None:
    (tmp_path / "moving.py").write_text(
        TINY.read_text()
        + "\n\nclass Moving(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.net, self.count = build(), 0\n"
        "    def forward(self, x):\n        self.count += len(x) == 3\n"
        "        if self.count > 3:\n            self.net[0].weight.data += 1\n"
        "        return self.net(x)\n"
    )
    ask = command(jpegs, tmp_path / "cache", "--source", f"moving={tmp_path}/moving.py:Moving")
    status, _, err = sskt(*ask)
    assert status == 1 and "source moving changed while labelling" in one_line(err)
    (found,) = [s for s in list_label_sets(tmp_path / "cache") if "moving" in s.name]
    assert shards(tmp_path / "cache") == 0 and found.coverage() == [0.0] * SEEDS


@pytest.mark.parametrize("change", [{"version": 99}, {"policy": "random-crop"}])
def test_views_that_this_version_does_not_know_are_not_replayed(
    jpegs: Path, sskt: Sskt, tmp_path: Path, change: dict[str, Any]
) -> None:
    """As docs/format.md asks of a reader: a later sskt may have made the set."""
    assert sskt(*command(jpegs, tmp_path))[0] == 0
    (label_set,) = list_label_sets(tmp_path)
    file = tmp_path / label_set.name / "zarr.json"
    document = json.loads(file.read_text())
    attributes = document["attributes"]["sskt"]
    attributes["spec"]["views"] |= change
    attributes["digest"] = digest_of(attributes["spec"])
    del attributes["bound"]
    file.write_text(json.dumps(document))
    for record in file.parent.glob("view_check/c/*/*.json"):  # of the set as it was
        record.unlink()
    for ask in (("verify", "--recompute", 1), ("inspect",)):
        status, _, err = sskt(*ask, "--cache", tmp_path)
        assert status == 1 and "does not know; update sskt" in one_line(err), err


# --- limits of the machine ------------------------------------------------------------------------


LIMITED = """
import os, resource, subprocess, sys
files, shm = int(sys.argv[1]), sys.argv[2]
if shm:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={shm}", "tmpfs", "/dev/shm"], check=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
from sskt.cli.main import main
sys.argv = ["sskt", *sys.argv[3:]]
main()
"""


def limited(files: int, shm: str, *arguments: object) -> tuple[int, str]:
    """Exit status and standard error of sskt within limits of open files and shared memory."""
    own = ["unshare", "-rm"] if shm else []
    if shm and subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system gives users no mount namespaces")
    command = [*own, sys.executable, "-c", LIMITED, files, shm, *arguments]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "shm", "seeds"),
    [(100, "", 60), (1024, "1m", 12), (100, "64k", 12)],
    ids=["open files", "shared memory", "both"],
)
def test_small_limits_of_the_machine_change_nothing(
    jpegs: Path, sskt: Sskt, tmp_path: Path, files: int, shm: str, seeds: int
) -> None:
    """Docker gives 64 MB of shared memory, most systems 1,024 open files."""
    size, policy = ("--seeds", seeds), ("--policy", "random-resized-crop-flip:size=224")
    few = ("--limit", 8, *policy)
    assert sskt(*command(jpegs, tmp_path / "here", *few, *size))[0] == 0
    ask = command(jpegs, tmp_path / "there", *few, *size, "--workers", 4)
    status, err = limited(files, shm, *ask)
    assert status == 0, err
    assert stored(tmp_path / "here") == stored(tmp_path / "there")


def test_shared_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free, for all that may be under way; the rest goes through pipes."""
    free = 0

    def statvfs(path: str) -> Any:
        return types.SimpleNamespace(f_bavail=free, f_frsize=1)

    monkeypatch.setattr(os, "statvfs", statvfs)
    for free, workers, expected in (  # noqa: B007
        (2**40, 8, loader_processes.PART_BYTES),
        (64 * 2**20, 8, 64 * 2**20 // 2 // 24),
        (0, 8, 0),
    ):
        limit = loader_processes.shared_bytes(workers)
        assert limit == expected
    views = np.arange(3000, dtype=np.uint8)
    assert loader_processes.send(views, 2999) is views
    shared = loader_processes.send(views, 3000)
    assert isinstance(shared, torch.Tensor)
    for sent in (views, shared):
        received = loader_processes.receive(sent)
        assert np.array_equal(received.numpy(), views)


SILENT = """
import time
import types
def center(depth, sample, seed):
    time.sleep(600)
    return [depth // 2]
"""


@pytest.mark.slow
def test_a_silent_loader_process_ends_the_run(
    clips: Path, sskt: Sskt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent.py").write_text(SILENT)
    monkeypatch.setattr(loader_processes, "SILENT_SECONDS", 2)
    more = ("--f-s", f"{tmp_path}/silent.py:center", "--workers", 1)
    ask = command(clips, tmp_path / "cache", *more, "--policy", SMALL)
    status, _, err = sskt(*ask)
    line = one_line(err)
    assert status == 1 and "a loader process has sent nothing for 2 s; all shards" in line
