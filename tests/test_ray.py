"""The Ray engine on a real cluster of two nodes: the same bytes, through deaths of all kinds."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, tree

from sskt.teacher_cache import ray_engine, stage
from sskt.teacher_cache.errors import BadImage, InputError, UnknownName
from sskt.teacher_cache.jobs import Job, open_job_sources, open_job_views
from sskt.teacher_cache.ray_cluster import RayOptions, slots_of, task_gpus_of
from sskt.teacher_cache.ray_engine import cache_with_ray
from sskt.teacher_cache.ray_tasks import Failure
from sskt.teacher_cache.store import create_label_set, list_label_sets

Sskt = Callable[..., tuple[int, str, str]]

GATED = TINY.with_name("gated.py")
LIMIT = 90.0
"""Seconds after which something that is waited for is missing."""

on_cluster = pytest.mark.slow


def job_over_shapes(cache: Path, **more: Any) -> Job:
    """30 shards of 100 samples."""
    fixed = {"limit": 1000, "seeds": 3, "shard_rows": 100, "policy": "pad-crop-flip"}
    return Job((f"tiny={TINY}:build",), "shapes", str(cache), **(fixed | more))


def arguments_of(job: Job) -> list[str]:
    """The same job as a command line."""
    options = {
        "--source": job.sources[0],
        "--target": job.target,
        "--cache": job.cache,
        "--limit": job.limit,
        "--seeds": job.seeds,
        "--shard-rows": job.shard_rows,
        "--policy": job.policy,
        "--on-error": job.on_error,
    }
    given = [(key, str(value)) for key, value in options.items() if value is not None]
    return ["cache-teachers", *(word for pair in given for word in pair)]


def label_here(job: Job, **more: Any) -> dict[str, str]:
    """The files that the local engine makes of a job."""
    opened = open_job_sources(job)
    options = replace(job.options(opened), **more)
    sources = [one.source for one in opened]
    Path(job.cache).mkdir(exist_ok=True)
    cache = Path(job.cache)
    stage.cache_teachers(open_job_views(job), sources, job.how, job.seeds, cache, options)
    return contents(cache)


def contents(cache: Path) -> dict[str, str]:
    """Every file of a cache but the lock files."""
    return {k: v for k, v in tree(cache).items() if not k.startswith(".locks/")}


def shards(cache: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of writing of every file of a shard."""
    files = [*cache.glob("[!.]*/labels/c/*/*/0"), *cache.glob("[!.]*/view_check/c/*/*")]
    return {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def wait_for(what: str, true: Callable[[], Any]) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


def processes_with(token: str) -> list[str]:
    """The command lines of all other processes that were started with a Ray token."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just ended
            continue
    return [command for command in found if command]


class Gate:
    """Says how many batches may pass through the gated source, all processes together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.source = f"gated={shutil.copy(GATED, folder)}:build"

    def let_pass(self, batches: int) -> None:
        fresh = self._folder / "fresh"
        fresh.write_text(str(batches))
        fresh.replace(self._folder / "limit")

    def open(self) -> None:
        (self._folder / "limit").unlink()

    def waiting(self) -> list[int]:
        """The processes that wait. All that they were at before is stored."""
        found = [int(mark.name.removeprefix("waits-")) for mark in self._folder.glob("waits-*")]
        return [pid for pid in found if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    folder = tmp_path / "gate"
    folder.mkdir()
    return Gate(folder)


class Cluster:
    """Two nodes of one core on this machine; the test process is connected to the first."""

    def __init__(self, folder: Path) -> None:
        import ray
        from ray.cluster_utils import Cluster as Nodes

        self.ray = ray
        before = Path.cwd()
        os.chdir(folder)  # the workers' working folder is not the driver's
        try:
            head = {
                "num_cpus": 1,
                "include_dashboard": False,
                "_system_config": {
                    "health_check_initial_delay_ms": 0,
                    "health_check_period_ms": 500,
                    "health_check_failure_threshold": 4,
                },
            }
            self._nodes = Nodes(initialize_head=True, head_node_args=head)
            self.second = self._nodes.add_node(num_cpus=1)
        finally:
            os.chdir(before)
        self.folder, self.address = folder, str(self._nodes.address)
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")

    def add(self, **resources: Any) -> Any:
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            return self._nodes.add_node(**resources)
        finally:
            os.chdir(before)

    def remove(self, node: Any, *, kill: bool = False) -> None:
        self._nodes.remove_node(node, allow_graceful=not kill)

    def close(self) -> None:
        self.ray.shutdown()
        self._nodes.shutdown()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed (pip install 'sskt[ray]')")
    token = secrets.token_hex(32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", token)
        started = Cluster(tmp_path_factory.mktemp("nodes"))
        yield started
        started.close()
    wait_for("the end of the cluster's processes", lambda: not processes_with(token))


@on_cluster
def test_the_bytes_of_a_local_run(cluster: Cluster, tmp_path: Path) -> None:
    job = job_over_shapes(tmp_path / "ray")
    steps: list[tuple[int, int]] = []
    report = cache_with_ray(job, progress=lambda done, total: steps.append((done, total)))
    assert contents(tmp_path / "ray") == label_here(replace(job, cache=str(tmp_path / "here")))
    assert (report.written, report.reused, report.skipped) == (3000, 0, [])
    assert [s.coverage() for s in report.label_sets] == [[1.0] * 3]
    assert "error" in report.label_sets[0].attributes
    assert steps[-1] == (3000, 3000)


class Running:
    """A run in a thread of this process, so that the test can look on."""

    def __init__(self, job: Job, options: RayOptions | None = None) -> None:
        self.steps: list[tuple[int, int]] = []
        self._error: BaseException | None = None
        self._report: stage.StageReport | None = None
        self._thread = threading.Thread(target=self._run, args=(job, options))
        self._thread.start()

    def _run(self, job: Job, options: RayOptions | None) -> None:
        try:
            self._report = cache_with_ray(job, options, lambda *step: self.steps.append(step))
        except BaseException as error:
            self._error = error

    def result(self) -> stage.StageReport:
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the run does not end"
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report


@on_cluster
def test_progress_while_a_unit_is_under_way(cluster: Cluster, tmp_path: Path, gate: Gate) -> None:
    """One unit of 1,000 labels in batches of 64: the bar moves before it is done."""
    more = {"sources": (gate.source,), "seeds": 1, "shard_rows": 1000}
    gate.let_pass(5)
    run = Running(replace(job_over_shapes(tmp_path / "ray"), **more))
    wait_for("a step", lambda: any(0 < done < total for done, total in run.steps))
    assert not shards(tmp_path / "ray")
    gate.open()
    assert run.result().written == 1000
    assert run.steps[-1] == (1000, 1000)


@on_cluster
def test_a_worker_and_a_node_die(cluster: Cluster, tmp_path: Path, gate: Gate) -> None:
    """Two batches a shard; each death hits a worker in the middle of one."""
    job = replace(job_over_shapes(tmp_path / "ray"), sources=(gate.source,))
    gate.let_pass(9)
    run = Running(job)
    wait_for("both workers", lambda: len(gate.waiting()) == 2)
    before = shards(tmp_path / "ray")
    os.kill(gate.waiting()[0], signal.SIGKILL)
    wait_for("the worker's end", lambda: len(gate.waiting()) == 1)
    gate.let_pass(19)
    wait_for("both workers again", lambda: len(gate.waiting()) == 2)
    later = shards(tmp_path / "ray")
    assert 6 <= len(before) < len(later) < 60
    cluster.remove(cluster.second, kill=True)
    try:
        gate.open()
        report = run.result()
    finally:
        cluster.second = cluster.add(num_cpus=1)
    after = shards(tmp_path / "ray")
    assert len(after) == 60 and before.items() <= later.items() <= after.items()
    assert report.written == 3000 and report.reused == 0
    assert contents(tmp_path / "ray") == label_here(replace(job, cache=str(tmp_path / "here")))
    assert not list(tmp_path.rglob("*.partial"))


@on_cluster
def test_a_shard_that_another_process_is_at(cluster: Cluster, tmp_path: Path) -> None:
    """The run waits for it, and takes it over when the other one gives up."""
    job = job_over_shapes(tmp_path / "ray")
    whole = label_here(replace(job, cache=str(tmp_path / "here")))
    (there,) = [Path(s.path) for s in list_label_sets(tmp_path / "here")]
    shutil.copytree(there, tmp_path / "ray" / there.name)
    shutil.rmtree(tmp_path / "ray" / there.name / "labels" / "c" / "1")
    (mine,) = list_label_sets(tmp_path / "ray")
    other = create_label_set(tmp_path / "ray", mine.spec, mine.classes, 3)
    assert other.claim(other.shard(1, 4))
    try:
        run = Running(job)
        wait_for("the other shards", lambda: len(other.missing(range(3))) == 1)
        wait_for("the bar", lambda: (900, 1000) in run.steps)
        other.release(other.shard(1, 4))
        report = run.result()
    finally:
        other.close()
    assert (report.written, report.reused) == (1000, 2000)
    assert contents(tmp_path / "ray") == whole


# --- the command line -------------------------------------------------------------------------


def command(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    code = "from sskt.cli.main import main; main()"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


@on_cluster
def test_a_command_joins_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    job = job_over_shapes(tmp_path / "ray", limit=300)
    joins = [*arguments_of(job), "--engine", "ray", "--address", cluster.address, "--json"]
    run, refused = command(joins), command(joins, RAY_AUTH_TOKEN=secrets.token_hex(32))
    out, err = run.communicate(timeout=LIMIT)
    assert (run.returncode, err) == (0, "")
    report = json.loads(out)
    assert (report["written"], report["reused"]) == (900, 0)
    assert contents(tmp_path / "ray") == label_here(replace(job, cache=str(tmp_path / "here")))
    out, err = refused.communicate(timeout=LIMIT)
    assert (refused.returncode, out) == (2, "")
    assert "does not take this token" in one_line(err) and "RAY_AUTH_TOKEN" in err


def one_line(err: str) -> str:
    """The only line of standard error, which must be sskt's own."""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sskt: "), err
    assert "unexpected" not in err and "Traceback" not in err, err
    return lines[0]


@on_cluster
def test_ctrl_c_in_a_cluster_of_its_own(tmp_path: Path, gate: Gate, sskt: Sskt) -> None:
    """As a terminal sends it: to all processes of the group. The local engine does the rest."""
    token = secrets.token_hex(32)
    job = replace(job_over_shapes(tmp_path / "ray"), sources=(gate.source,))
    gate.let_pass(9)
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": ""}
    run = command([*arguments_of(job), "--engine", "ray"], **ours)
    wait_for("a worker", lambda: gate.waiting() or run.poll() is not None)
    wait_for("shards", lambda: len(shards(tmp_path / "ray")) >= 6 or run.poll() is not None)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 130
    assert "run the same command again" in one_line(err)
    stored = shards(tmp_path / "ray")
    assert 6 <= len(stored) < 60
    wait_for("the end of its cluster", lambda: not processes_with(token))
    gate.open()
    status, _, err = sskt(*arguments_of(job))
    assert status == 0, err
    assert stored.items() <= shards(tmp_path / "ray").items()
    assert contents(tmp_path / "ray") == label_here(replace(job, cache=str(tmp_path / "here")))
