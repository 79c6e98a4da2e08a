"""Shards computed on demand: the queue, the compute worker, waiting over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.attacks import tuned
from support.compute_workers import compute_worker, grandparent, written
from support.helpers import TINY, tree

from sskt.cli.main import run
from sskt.server.compute import queue as shard_queue
from sskt.server.compute.queue import COMPUTING, FAILED, QUEUED, Entry, Queue, QueueFull
from sskt.server.http.problems import Problem
from sskt.server.routes.compute import wait_for
from sskt.server.settings import Settings
from sskt.server.state import State, make_state
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets, open_for_writing
from sskt.teacher_cache.label_sets.label_set import LabelSet

BLOCKS = 4  # of 16 samples, 8 a batch


def cache_teachers(
    images: Path,
    source: Path,
    cache: Path,
    seeds: int,
    name: str = "tiny",
    output: str = "soft-labels",
    policy: str = "pad-crop-flip",
) -> None:
    """The real command."""
    options = {
        "--source": f"{name}={source}:build",
        "--target": images,
        "--policy": policy,
        "--encoding": "f16",
        "--output": output,
        "--seeds": seeds,
        "--shard-rows": 16,
        "--batch-size": 8,
        "--workers": 0,
        "--device": "cpu",
        "--cache": cache,
    }
    words = itertools.chain.from_iterable(options.items())
    assert run(["cache-teachers", *map(str, words)]) == 0


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Caches of the tiny source over the made images with 1 and with 3 seeds."""
    folder = tmp_path_factory.mktemp("made")
    for seeds in (1, 3):
        cache_teachers(images, TINY, folder / str(seeds), seeds)
    return {seeds: folder / str(seeds) for seeds in (1, 3)}


@pytest.fixture
def settings(made: dict[int, Path], tmp_path: Path) -> Settings:
    """A server over a cache with the labels of the first of three seeds."""
    cache, run_folder = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(made[1], cache)
    grow(*list_label_sets(cache))
    run_folder.mkdir()
    named = (f"tiny={TINY}:build",)
    return Settings(
        str(cache), str(run_folder), on_demand=True, device="cpu", wait_seconds=30, sources=named
    )


@pytest.fixture
def state(settings: Settings) -> State:
    return make_state(settings)


def only(state: State) -> LabelSet:
    [label_set] = list_label_sets(state.home)
    return label_set


def grow(label_set: LabelSet) -> None:
    """Gives a label set three seeds, as ``POST :compute`` does."""
    create_label_set(label_set.path.parent, label_set.spec, label_set.classes, 3).close()


def queue_of(state: State) -> Queue:
    assert state.on_demand is not None
    return state.on_demand


def wait(state: State, seed: int, block: int) -> None:
    asyncio.run(wait_for(state, only(state), seed, block))


def refused(state: State, seed: int, block: int) -> Problem:
    with pytest.raises(Problem) as caught:
        wait(state, seed, block)
    return caught.value


def until(condition: Callable[[], object]) -> None:
    """Waits for another process; a test that hangs fails."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def paces(queue: Queue) -> list[float]:
    with queue._open() as db:
        return [seconds for (seconds,) in db.execute("select seconds from pace")]


def stored(cache: Path) -> dict[str, str]:
    files = tree(cache)
    return {name: sha for name, sha in files.items() if not name.startswith(".locks")}


# --- the queue -----------------------------------------------------------------------------------


class Model(RuleBasedStateMachine):
    """The queue against plain lists, through two handles on one folder, with deaths in between."""

    limit = 3

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        self.web, self.worker = (Queue(folder, self.limit, math.inf) for _ in range(2))
        self.queued: list[int] = []
        self.computing: list[int] = []
        self.failed: dict[int, str] = {}
        self.deaths: dict[int, int] = {}

    @rule(seed=st.integers(0, 6))
    def ask(self, seed: int) -> None:
        known = seed in [*self.queued, *self.computing, *self.failed]
        if not known and len(self.queued) >= self.limit:
            with pytest.raises(QueueFull, match="shards are waiting"):
                self.web.ask("a", seed, 0)
            return
        if not known:
            self.queued.append(seed)
        assert self.web.ask("a", seed, 0).message == self.failed.get(seed, "")

    @rule(most=st.integers(1, 3), odd=st.booleans())
    def take(self, most: int, odd: bool) -> None:
        wanted = [s for s in self.queued if s % 2 or not odd][:most]
        taken = self.worker.take(lambda e: bool(e.seed % 2) or not odd, most)
        assert [e.seed for e in taken] == wanted
        self.queued = [s for s in self.queued if s not in wanted]
        self.computing += wanted

    def _entry(self) -> Entry:
        found = self.worker.get("a", self.computing.pop(0), 0)
        assert found is not None
        return found

    @precondition(lambda self: self.computing)
    @rule(stored=st.booleans())
    def finish(self, stored: bool) -> None:
        entry = self._entry()
        self.deaths.pop(entry.seed, None)
        if stored:
            self.worker.done(entry)
        else:
            self.worker.fail(entry, "DiskFull", f"why {entry.seed}")
            self.failed[entry.seed] = f"why {entry.seed}"

    @precondition(lambda self: self.computing)
    @rule()
    def put_back(self) -> None:
        entry = self._entry()
        self.worker.put_back(entry, "")
        self.queued.append(entry.seed)

    @rule()
    def worker_dies(self) -> None:
        order = {entry.seed: entry.asked for entry in self.web.state()}
        for seed in self.computing:
            self.deaths[seed] = self.deaths.get(seed, 0) + 1
            if self.deaths[seed] < shard_queue.DEATHS:
                self.queued.append(seed)
            else:
                self.failed[seed] = ""
        self.queued.sort(key=order.__getitem__)  # back to where they were
        given_up = [entry.seed for entry in self.worker.recover()]
        assert sorted(given_up) == sorted(s for s in self.computing if s in self.failed)
        for seed in given_up:
            entry = self.web.get("a", seed, 0)
            assert entry is not None and "died 3 times" in entry.message
            self.failed[seed] = entry.message
            del self.deaths[seed]
        self.computing = []

    @invariant()
    def same(self) -> None:
        found = self.web.state()
        assert [e.seed for e in found if e.state == QUEUED] == self.queued
        assert {e.seed for e in found if e.state == COMPUTING} == set(self.computing)
        assert {e.seed: e.message for e in found if e.state == FAILED} == self.failed
        ahead = [self.web.ahead(e) for e in found if e.state == QUEUED]
        assert ahead == sorted(ahead) and self.web.waiting() == len(self.queued)

    def teardown(self) -> None:
        self.folder.cleanup()


TestQueue = Model.TestCase
TestQueue.settings = hypothesis_settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_many_processes_and_threads_ask_at_once(tmp_path: Path) -> None:
    """One entry a shard, and never one more than the limit."""
    barrier = threading.Barrier(20)

    def ask(number: int) -> int | None:
        queue = Queue(tmp_path / "queue", 5)
        barrier.wait()
        with contextlib.suppress(QueueFull):
            return queue.ask("a", number % 10, 0).asked
        return None

    with ThreadPoolExecutor(20) as pool:
        got = list(pool.map(ask, range(20)))
    entries = Queue(tmp_path / "queue", 5).state()
    assert len(entries) == 5
    for seed in range(10):
        assert {got[seed], got[seed + 10]} <= {None, *(e.asked for e in entries if e.seed == seed)}
    assert sum(asked is not None for asked in got) == 10  # both who asked for a taken one


def test_a_failure_is_reported_again_and_then_tried_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the time of day is set meanwhile."""
    clock, day = time.monotonic(), time.time()
    monkeypatch.setattr(shard_queue, "_clock", lambda: clock)
    queue = Queue(tmp_path / "queue", 5)
    queue.ask("a", 0, 0)
    queue.fail(queue.take()[0], "MissingData", "gone")
    monkeypatch.setattr(time, "time", lambda: day - 86400)
    again = queue.ask("a", 0, 0)
    assert (again.state, again.kind, again.message) == (FAILED, "MissingData", "gone")
    assert queue.retry_seconds(again) == shard_queue.FAILED_SECONDS
    clock += shard_queue.FAILED_SECONDS
    assert queue.ask("a", 0, 0).state == QUEUED
    assert queue.ask("b", 0, 0).asked == 2  # behind, though by the clock it came before
    queue.fail(queue.take()[0], "MissingData", "gone")
    clock += shard_queue.FAILED_SECONDS
    queue.ask("c", 0, 0)
    assert [entry.set for entry in queue.state()] == ["b", "c"]  # what is over is not kept


def test_the_estimate_follows_the_last_shards(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue", 5)
    assert queue.seconds(2) == 2 * shard_queue.UNKNOWN_PACE
    for _ in range(shard_queue.PACE_SHARDS):
        queue.timed(100)
    assert queue.seconds(2) == shard_queue.LONGEST_WAIT
    for _ in range(shard_queue.PACE_SHARDS):
        queue.timed(0.3)
    assert (queue.seconds(0), queue.seconds(1), queue.seconds(10)) == (1, 1, 3)


# --- waiting, without a compute worker -----------------------------------------------------


def test_who_waits_too_long_comes_back(state: State) -> None:
    state.settings = replace(state.settings, wait_seconds=0)
    first, second = refused(state, 1, 0), refused(state, 1, 1)
    assert first.status == second.status == 503
    assert (first.more, second.more["position"]) == ({"state": QUEUED, "position": 0}, 1)
    waits = [int(problem.headers["Retry-After"]) for problem in (first, second)]
    assert 1 <= waits[0] < waits[1] <= 60
    assert "waits behind 1 others" in second.detail
    assert len(queue_of(state).state()) == 2  # the work stays


def test_a_client_that_goes_away_stops_waiting_only(state: State) -> None:
    async def impatient() -> None:
        await asyncio.wait_for(wait_for(state, only(state), 1, 2), 0.2)

    with pytest.raises(TimeoutError):
        asyncio.run(impatient())
    assert [entry.block for entry in queue_of(state).state()] == [2]


def test_a_full_queue(state: State) -> None:
    state.on_demand = Queue(queue_of(state).folder, 2)
    state.settings = replace(state.settings, wait_seconds=0)
    for block in (0, 1):
        refused(state, 1, block)
    problem = refused(state, 1, 2)
    assert (problem.status, problem.more) == (503, {"state": "full", "position": 2})
    assert "2 shards are waiting" in problem.detail and int(problem.headers["Retry-After"]) >= 1
    assert refused(state, 1, 1).more["state"] == QUEUED  # who is in stays in
    wait(state, 0, 0)  # what is stored needs no place


def test_what_cannot_be_asked_for(state: State, label_cache: Path) -> None:
    for seed, block in ((0, BLOCKS), (3, 0), (-1, 0), (0, -1)):
        assert refused(state, seed, block).status == 404
    [nameless] = list_label_sets(label_cache)  # made without a record of the source
    with pytest.raises(Problem, match="does not record the source") as caught:
        asyncio.run(wait_for(state, nameless, 7, 0))
    assert caught.value.status == 409
    state.on_demand = None
    problem = refused(state, 1, 0)
    assert problem.status == 501 and "--on-demand" in problem.detail


# --- the compute worker -----------------------------------------------------


def test_bytes_are_those_of_cache_teachers(
    state: State, settings: Settings, made: dict[int, Path]
) -> None:
    """A set that grows on demand ends as the set of one long run, file by file."""
    for block, seed in itertools.product(range(BLOCKS), (2, 1)):
        queue_of(state).ask(only(state).name, seed, block)
    with compute_worker(settings):
        for block, seed in itertools.product(range(BLOCKS), (1, 2)):
            wait(state, seed, block)
        until(lambda: len(paces(queue_of(state))) == BLOCKS)
    assert stored(Path(settings.cache)) == stored(made[3])
    assert written(settings) == 2 * BLOCKS  # in four passes: both seeds of a block in one
    assert queue_of(state).state() == []


OWN_POLICY = """
import numpy as np

def darker():
    return lambda image, words: image // 2 + np.uint8(words()[0] % 8)
"""


@pytest.mark.parametrize("made", ["features", "features:3", "logits", "a policy of the user"])
def test_other_labels_are_those_of_cache_teachers(images: Path, tmp_path: Path, made: str) -> None:
    cache, whole, run_folder = (tmp_path / name for name in ("cache", "whole", "run"))
    (tmp_path / "own.py").write_text(OWN_POLICY)
    own = f"{tmp_path / 'own.py'}:darker" if made.startswith("a policy") else None
    how = {"policy": own} if own else {"output": made}
    for to, seeds in ((cache, 1), (whole, 2)):
        cache_teachers(images, TINY, to, seeds, **how)
    (label_set,) = list_label_sets(cache)
    create_label_set(cache, label_set.spec, label_set.classes, 2).close()
    run_folder.mkdir()
    named = (f"tiny={TINY}:build",)
    settings = Settings(
        str(cache), str(run_folder), on_demand=True, device="cpu", wait_seconds=30, sources=named,
        policy=own,
    )  # fmt: skip
    state = make_state(settings)
    for block in range(BLOCKS):
        queue_of(state).ask(label_set.name, 1, block)
    with compute_worker(settings):
        for block in range(BLOCKS):
            wait(state, 1, block)
    assert stored(cache) == stored(whole)


def test_twenty_clients_cost_one_computation(
    state: State, settings: Settings, made: dict[int, Path]
) -> None:
    barrier = threading.Barrier(20)
    others = [make_state(settings) for _ in range(2)]  # as other workers have it

    def ask(number: int) -> None:
        barrier.wait()
        wait([state, *others][number % 3], 1, 1)

    with compute_worker(settings), ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, range(20)))
    assert written(settings) == 1
    for key, sha in stored(Path(settings.cache)).items():
        if "/c/1/" in key:
            assert sha == stored(made[3])[key] and "/c/1/1" in key


def test_what_somebody_else_stored_is_dropped(state: State, settings: Settings) -> None:
    queue = queue_of(state)
    for block in range(BLOCKS):
        queue.ask(only(state).name, 0, block)
    with compute_worker(settings):
        until(lambda: not queue.state())
    assert written(settings) == 0


def test_a_source_that_is_gone(
    state: State, settings: Settings, images: Path, tmp_path: Path
) -> None:
    """All that waits for it fails at once, with the reason; other sets go on."""
    healthy = only(state).name
    copy = Path(shutil.copy(TINY, tmp_path / "mine.py"))
    cache_teachers(images, copy, Path(settings.cache), 1, "mine")
    settings = replace(settings, sources=(*settings.sources, f"mine={copy}:build"))
    copy.unlink()
    grow(*[s for s in list_label_sets(state.home) if s.name != healthy])
    [broken] = [s for s in list_label_sets(state.home) if s.name != healthy]
    queue = queue_of(state)
    for block in range(BLOCKS):
        queue.ask(broken.name, 1, block)
    with compute_worker(settings):
        with pytest.raises(Problem, match=r"mine\.py") as caught:
            asyncio.run(wait_for(state, broken, 1, 0))
        assert caught.value.status == 500 and caught.value.more["state"] == FAILED
        assert int(caught.value.headers["Retry-After"]) <= shard_queue.FAILED_SECONDS
        until(lambda: [e.state for e in queue.state()] == [FAILED] * BLOCKS)
        since = [entry.since for entry in queue.state()]
        with pytest.raises(Problem, match=r"mine\.py"):
            asyncio.run(wait_for(state, broken, 1, 0))
        assert [entry.since for entry in queue.state()] == since  # told again, not tried again
        asyncio.run(wait_for(state, state.sets.get(healthy), 1, 0))
    assert broken.coverage() == [1.0, 0.0, 0.0]
    errors = state.metrics.recent_errors(5)
    assert len(errors) == 1 and "mine.py" in errors[0]["detail"]


CODE = {
    "a file": ("source", "tiny={evil}:build"),
    "a module": ("source", "tiny=os:abort"),
    "an exported network": ("source", "tiny={evil.parent}/evil.pt2"),
    "the file that made it": ("source", "tiny={TINY}:build"),
    "a target": ("target", "{evil}:build"),
}


@pytest.mark.parametrize("kind", CODE)
def test_what_a_label_set_records_never_chooses_code(
    state: State, settings: Settings, tmp_path: Path, kind: str
) -> None:
    """Only the person who starts the server does, with --source."""
    evil, ran = tmp_path / "evil.py", tmp_path / "ran"
    evil.write_text(f"open({str(ran)!r}, 'w')\ndef build(): raise SystemExit\n")
    key, text = CODE[kind]
    metadata = only(state).path / "zarr.json"
    document = json.loads(metadata.read_text())
    document["attributes"]["sskt"]["made"][key] = text.format(evil=evil, TINY=TINY)
    metadata.write_text(json.dumps(document))
    named = settings if key == "target" else replace(settings, sources=())
    with compute_worker(named) as process:
        problem = refused(state, 1, 0)
        assert problem.status == 500 and process.is_alive()
        assert key == "target" or "--source tiny=" in problem.detail, problem.detail
    assert not ran.exists()


def test_a_damaged_image(state: State, settings: Settings, images: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(images, tmp_path / "mine"))
    healthy = only(state).name
    cache_teachers(mine, TINY, Path(settings.cache), 1)
    grow(*[s for s in list_label_sets(state.home) if s.name != healthy])
    [label_set] = [s for s in list_label_sets(state.home) if s.name != healthy]
    image = mine / "train" / "apple" / "0003.png"
    image.write_bytes(bytes(image.stat().st_size))
    with compute_worker(settings):
        with pytest.raises(Problem, match=r"0003\.png.*--on-error skip") as caught:
            asyncio.run(wait_for(state, label_set, 1, 0))
        assert caught.value.status == 500
        asyncio.run(wait_for(state, label_set, 1, 1))


@pytest.mark.slow
def test_a_full_disk(state: State, settings: Settings, made: dict[int, Path]) -> None:
    full = Path(settings.run) / "full"
    full.touch()
    queue_of(state).failed_seconds = 0.5
    with compute_worker(settings):
        problem = refused(state, 1, 0)
        assert (problem.status, problem.title) == (507, "insufficient storage")
        assert "no room to write" in problem.detail
        full.unlink()
        until(lambda: not isinstance(_outcome(state, 1, 0), Problem))
    files, wanted = stored(Path(settings.cache)), stored(made[3])
    shard = {key for key in files if "/c/1/" in key}
    assert len(shard) == 3 and all(files[key] == wanted[key] for key in shard)


def _outcome(state: State, seed: int, block: int) -> Problem | None:
    try:
        wait(state, seed, block)
    except Problem as problem:
        assert problem.status == 507
        return problem
    return None


def test_a_compute_worker_killed_in_mid_shard(
    state: State, settings: Settings, made: dict[int, Path]
) -> None:
    (Path(settings.run) / "die").touch()
    name, queue = only(state).name, queue_of(state)
    queue.ask(name, 1, 3)
    with compute_worker(settings, status=-9) as process:
        process.join(30)
    assert [entry.state for entry in queue.state()] == [COMPUTING]
    with compute_worker(settings):
        wait(state, 1, 3)
        wait(state, 1, 2)
    files, wanted = stored(Path(settings.cache)), stored(made[3])
    shards = {key for key in files if "/c/1/" in key}
    assert len(shards) == 6 and all(files[key] == wanted[key] for key in shards)
    assert not list(Path(settings.cache).rglob("*.partial"))


def test_killed_loader_processes_end_the_request_with_a_sentence(
    state: State, settings: Settings
) -> None:
    """As the kernel kills them where memory is short."""
    (Path(settings.run) / "loader").touch()
    with compute_worker(settings):
        problem = refused(state, 1, 0)
        assert problem.status == 500 and "a loader process was killed" in problem.detail
        (Path(settings.run) / "loader").unlink()
        wait(state, 1, 1)  # the compute worker goes on


def test_a_deadly_shard_is_given_up_and_those_beside_it_are_not(
    state: State, settings: Settings
) -> None:
    (Path(settings.run) / "poison").touch()
    name, queue = only(state).name, queue_of(state)
    for seed in (1, 2, 3):
        queue.ask(name, seed, 0)
    for _ in range(shard_queue.DEATHS):
        with compute_worker(settings, status=-9) as process:
            process.join(30)
    with compute_worker(settings):
        problem = refused(state, 2, 0)
        assert problem.status == 500 and "died 3 times" in problem.detail
        for seed in (1, 3):
            wait(state, seed, 0)
    assert int(problem.headers["Retry-After"]) > shard_queue.FAILED_SECONDS


def test_another_process_at_the_same_shard(
    state: State, settings: Settings, made: dict[int, Path]
) -> None:
    """It is waited for while it lives, in other shards' stead if need be."""
    name, queue = only(state).name, queue_of(state)
    [reference] = list_label_sets(made[3])
    with (
        compute_worker(settings),
        contextlib.closing(
            open_for_writing(settings.cache, name, lambda rows, seeds: {}, 2)
        ) as writing,
    ):
        theirs, given_up = writing.shard(1, 0), writing.shard(1, 1)
        assert writing.acquire(theirs) and writing.acquire(given_up)
        hasty = replace(state, settings=replace(settings, wait_seconds=0))
        until(lambda: "another process is labelling it" in refused(hasty, 1, 0).detail)
        wait(state, 1, 2)  # goes before
        assert written(settings) == 1
        encoded = reference.read(1, theirs.start, theirs.stop)
        writing.write(theirs, encoded, reference.read_checks(1, theirs.start, theirs.stop))
        writing.release(theirs)
        wait(state, 1, 0)
        assert written(settings) == 1
        queue.ask(name, 1, 1)
        writing.release(given_up)
        wait(state, 1, 1)
        assert written(settings) == 2
        until(lambda: not queue.state())


def test_a_device_that_is_not_there(settings: Settings) -> None:
    with compute_worker(replace(settings, device="nonsense"), status=1) as process:
        process.join(30)


def test_a_compute_worker_ends_with_its_parent(settings: Settings) -> None:
    ours, theirs = Pipe()
    parent = grandparent(settings, theirs)
    child = ours.recv()
    until(lambda: (Path(settings.run) / "queue" / "worker").exists())
    parent.kill()
    parent.join()
    until(lambda: not _runs(child))


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- over HTTP -----------------------------------------------------------------------------------


def call(app: Any, method: str, path: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
    """One request: (status, JSON, headers)."""
    sent: list[dict[str, Any]] = []
    content = json.dumps(body).encode() if body is not None else b""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    incoming = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in incoming:
            return message
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    headers = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(answer) if answer else None, headers


FAULTY = """
import os
import signal
import time
from pathlib import Path

from torch.utils.data import get_worker_info

from sskt.teacher_cache.views import loader_processes
from sskt.teacher_cache.views.views import Views

HERE = Path(__file__).parent
loader_processes.SILENT_SECONDS = 6.0
seen = Views.seen


def faulty(self, *given):
    if get_worker_info() is not None:
        if (HERE / "dead").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (HERE / "silent").exists():
            os.kill(os.getpid(), signal.SIGSTOP)
    return seen(self, *given)


Views.seen = faulty
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("dead", "a loader process was killed"),
        ("silent", "a loader process has sent nothing for 6 s"),
    ],
)
def test_a_server_with_a_dead_or_silent_loader_process_answers_and_recovers(
    images: Path, tmp_path: Path, fault: str, said: str
) -> None:
    """A real server in processes of its own; the file of its source makes the loaders fail."""
    source = tmp_path / "faulty.py"
    source.write_text(TINY.read_text() + FAULTY)
    cache = tmp_path / "cache"
    code = "from sskt.cli.main import main; main()"
    labelling = ["cache-teachers", "--source", f"tiny={source}:build", "--target", str(images)]
    labelling += ["--policy", "pad-crop-flip", "--shard-rows", "16", "--seeds", "1"]
    labelling += ["--workers", "0", "--device", "cpu", "--cache", str(cache)]
    subprocess.run([sys.executable, "-c", code, *labelling], check=True, capture_output=True)
    [label_set] = list_label_sets(cache)
    grow(label_set)
    (tmp_path / fault).touch()
    named = (f"tiny={source}:build",)
    with tuned(
        tmp_path, cache, on_demand=True, device="cpu", wait_seconds=1.0, sources=named
    ) as server:

        def ask(block: int) -> tuple[int, dict[str, Any]]:
            answer = server.get(f"/zarr/{label_set.name}/labels/c/1/{block}/0")
            if answer.status == 200:
                return 200, {}
            assert int(answer.headers["retry-after"]) >= 1
            return answer.status, json.loads(answer.body)

        deadline, statuses = time.monotonic() + 90, []
        while (answer := ask(0))[0] == 503:
            statuses.append(503)
            assert time.monotonic() < deadline
        assert answer[0] == 500 and said in answer[1]["detail"], answer
        assert statuses, "it is being computed: ask again"
        (tmp_path / fault).unlink()
        while (status := ask(1)[0]) == 503:
            assert time.monotonic() < deadline
        assert status == 200
        assert server.get("/readyz").status == 200


def test_asking_for_seeds_over_http(settings: Settings, made: dict[int, Path]) -> None:
    from sskt.server.app import create_app

    app, state = create_app(settings), make_state(settings)
    name = only(state).name
    path = f"/v1/label-sets/{name}:compute"
    status, told, _ = call(app, "POST", path, {"seeds": [0, 2, 1, 2]})
    assert status == 202 and (told["missing"], told["queued"], told["failed"]) == (8, 8, 0)
    status, shown, _ = call(app, "GET", "/v1/compute")
    assert status == 200 and shown["waiting"] == 8
    order = [(entry["block"], entry["seed"]) for entry in shown["entries"]]
    assert order == sorted(order)
    with compute_worker(settings):
        until(lambda: call(app, "POST", path, {"seeds": [0, 1, 2]})[1]["missing"] == 0)
    assert stored(Path(settings.cache)) == stored(made[3])


def test_what_is_refused_over_http(settings: Settings, label_cache: Path) -> None:
    from sskt.server.app import create_app

    app = create_app(replace(settings, queue=5))
    name = only(make_state(settings)).name
    path = f"/v1/label-sets/{name}:compute"
    bodies: list[Any] = [
        {"seeds": []},
        {"seeds": [-1]},
        {"seeds": [2**31]},
        {"seeds": ["1"]},
        {},
        [],
        {"seeds": list(range(4097))},
        {"seeds": [5000]},
    ]
    for body in bodies:
        status, told, _ = call(app, "POST", path, body)
        assert status == 422 and told["title"] == "invalid request", body
    assert call(app, "POST", "/v1/label-sets/nothing:compute", {"seeds": [1]})[0] == 404
    assert call(app, "GET", "/v1/compute")[1]["entries"] == []
    status, told, headers = call(app, "POST", path, {"seeds": [1, 2]})
    assert (status, told["missing"], told["queued"]) == (503, 8, 5)
    assert "taken 5 of 8" in told["detail"] and 1 <= int(headers["retry-after"]) <= 60
    nameless = create_app(replace(settings, cache=str(label_cache)))
    [other] = list_label_sets(label_cache)
    status, told, _ = call(nameless, "POST", f"/v1/label-sets/{other.name}:compute", {"seeds": [5]})
    assert status == 409 and "cache-teachers" in told["detail"]
    off = create_app(replace(settings, on_demand=False))
    assert call(off, "POST", path, {"seeds": [1]})[0] == 501
    assert call(off, "GET", "/v1/compute")[1]["on_demand"] is False
