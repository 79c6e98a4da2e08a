"""The Ray engine on a real cluster of two nodes: the same bytes, through deaths of all kinds."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
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
from support.helpers import TINY, tree

from sskt.teacher_cache.errors import BadImage, InputError, UnknownName
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets
from sskt.teacher_cache.labeling import run as stage
from sskt.teacher_cache.labeling.job import Job, open_job_sources, open_job_views
from sskt.teacher_cache.labeling.ray import driver as ray_engine
from sskt.teacher_cache.labeling.ray.cluster import RayOptions, slots_of, task_gpus_of
from sskt.teacher_cache.labeling.ray.driver import cache_with_ray
from sskt.teacher_cache.labeling.ray.tasks import Failure, gpu_number
from sskt.teacher_cache.targets.spec import DatasetSpec

Sskt = Callable[..., tuple[int, str, str]]

GATED = TINY.with_name("gated.py")
LIMIT = 90.0
"""Seconds after which something that is waited for is missing."""

on_cluster = pytest.mark.slow


def job_over_shapes(cache: Path, limit: int = 1000, **more: Any) -> Job:
    """30 shards of 100 samples."""
    fixed: dict[str, Any] = {
        "seeds": 3,
        "shard_rows": 100,
        "policy": "pad-crop-flip",
    }
    dataset = DatasetSpec("shapes", limit=limit)
    return Job((f"tiny={TINY}:build",), dataset, str(cache), **(fixed | more))


def arguments_of(job: Job) -> list[str]:
    """The same job as a command line."""
    options = {
        "--source": job.sources[0],
        "--target": job.dataset.target,
        "--cache": job.cache,
        "--limit": job.dataset.limit,
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
    files = [*cache.glob("[!.]*/labels/c/*/*/0"), *cache.glob("[!.]*/view_check/c/*/[0-9]")]
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

    def passed(self) -> int:
        return sum(1 for _ in self._folder.glob("passed-*"))

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
        self.ray: Any = importlib.import_module("ray")  # typed or not, as Ray is there or not
        nodes: Any = importlib.import_module("ray.cluster_utils").Cluster
        self.folder = folder
        head = {
            "num_cpus": 1,
            "include_dashboard": False,
            "_system_config": {
                "health_check_initial_delay_ms": 0,
                "health_check_period_ms": 500,
                "health_check_timeout_ms": 500,
                "health_check_failure_threshold": 4,
            },
        }
        self._nodes = nodes()
        self.add(**head)
        self.address = str(self._nodes.address)
        self.ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
        self.second = self.add(num_cpus=1)

    def add(self, **resources: Any) -> Any:
        before = Path.cwd()
        os.chdir(self.folder)  # the workers' working folder is not the driver's
        try:
            return self._nodes.add_node(**resources)
        finally:
            os.chdir(before)

    def remove(self, node: Any, *, kill: bool = False) -> None:
        self._nodes.remove_node(node, allow_graceful=not kill)

    def freeze_second(self, workers: list[int]) -> list[int]:
        """Stops the second node's raylet and which of ``workers`` are its children."""
        raylet = self.second.all_processes["raylet"][0].process.pid
        children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        stopped = [raylet, *(pid for pid in workers if str(pid) in children)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        return stopped

    def is_idle(self) -> bool:
        """Whether no task runs: those of a run that failed or was interrupted end after it."""
        free, all_ = self.ray.available_resources(), self.ray.cluster_resources()
        return bool(free.get("CPU") == all_.get("CPU"))

    def nodes_alive(self) -> int:
        return sum(bool(node["Alive"]) for node in self.ray.nodes())

    def close(self) -> None:
        self.ray.shutdown()
        self._nodes.shutdown()


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[str]:
    """The token of the cluster. Ray reads these variables once, when it is imported."""
    secret = secrets.token_hex(32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secret)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield secret


@pytest.fixture(scope="module")
def nodes(token: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed (pip install 'sskt[ray]')")
    started = Cluster(tmp_path_factory.mktemp("nodes"))
    yield started
    started.close()
    wait_for("the end of the cluster's processes", lambda: not processes_with(token))


@pytest.fixture
def cluster(nodes: Cluster) -> Iterator[Cluster]:
    """The cluster without a task of the test before."""
    yield nodes
    wait_for("the end of all tasks", nodes.is_idle)


@on_cluster
@pytest.mark.parametrize("output", ["soft-labels", "features"])
def test_the_bytes_of_a_local_run(cluster: Cluster, tmp_path: Path, output: str) -> None:
    job = job_over_shapes(tmp_path / "ray", output=output)
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
        self._thread = threading.Thread(target=self._run, args=(job, options), daemon=True)
        self._thread.start()

    def _run(self, job: Job, options: RayOptions | None) -> None:
        try:
            self._report = cache_with_ray(job, options, lambda *step: self.steps.append(step))
        except BaseException as error:
            self._error = error

    def wait_for(self, what: str, true: Callable[[], Any]) -> None:
        """Waits while the run goes on; what ends it with an error is raised."""
        wait_for(what, lambda: self._error is not None or true())
        if self._error is not None:
            raise self._error

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
    job = job_over_shapes(tmp_path / "ray", seeds=1, shard_rows=1000)
    gate.let_pass(5)
    run = Running(replace(job, sources=(gate.source,)))
    run.wait_for("a step", lambda: any(0 < done < total for done, total in run.steps))
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
    run.wait_for("both workers", lambda: len(gate.waiting()) == 2)
    before = shards(tmp_path / "ray")
    victim = gate.waiting()[0]
    os.kill(victim, signal.SIGKILL)
    wait_for("the worker's end", lambda: victim not in gate.waiting())
    gate.let_pass(19)
    run.wait_for("both workers again", lambda: gate.passed() == 19 and len(gate.waiting()) == 2)
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
def test_a_node_that_is_only_presumed_dead(cluster: Cluster, tmp_path: Path, gate: Gate) -> None:
    """It freezes within a shard, is given up, and comes back when all else is stored."""
    job = replace(job_over_shapes(tmp_path / "ray"), sources=(gate.source,))
    gate.let_pass(9)
    run = Running(job)
    run.wait_for("both workers", lambda: len(gate.waiting()) == 2)
    before = shards(tmp_path / "ray")
    frozen = cluster.freeze_second(gate.waiting())
    try:
        wait_for("the node's death", lambda: cluster.nodes_alive() == 1)
        gate.open()
        run.wait_for("all other shards", lambda: len(shards(tmp_path / "ray")) == 58)
        run.wait_for("the bar", lambda: (2900, 3000) in run.steps)
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        report = run.result()
    finally:
        cluster.remove(cluster.second, kill=True)
        cluster.second = cluster.add(num_cpus=1)
    after = shards(tmp_path / "ray")
    assert len(after) == 60 and before.items() <= after.items()
    assert report.written == 3000
    assert contents(tmp_path / "ray") == label_here(replace(job, cache=str(tmp_path / "here")))


@on_cluster
def test_a_shard_that_another_process_is_at(cluster: Cluster, tmp_path: Path) -> None:
    """The run waits for it, and takes it over when the other one gives up."""
    job = job_over_shapes(tmp_path / "ray")
    whole = label_here(replace(job, cache=str(tmp_path / "here")))
    (there,) = [Path(s.path) for s in list_label_sets(tmp_path / "here")]
    shutil.copytree(there, tmp_path / "ray" / there.name)
    for array in ("labels", "view_check"):
        shutil.rmtree(tmp_path / "ray" / there.name / array / "c" / "1")
    (mine,) = list_label_sets(tmp_path / "ray")
    other = create_label_set(tmp_path / "ray", mine.spec, mine.classes, 3)
    assert other.acquire(other.shard(1, 4))
    try:
        run = Running(job)
        run.wait_for("the other shards", lambda: len(other.missing(range(3))) == 1)
        run.wait_for("the bar", lambda: (900, 1000) in run.steps)
        other.release(other.shard(1, 4))
        report = run.result()
    finally:
        other.close()
    assert (report.written, report.reused) == (1000, 2000)
    assert contents(tmp_path / "ray") == whole


# --- errors -----------------------------------------------------------------------------------


def one_line(err: str) -> str:
    """The only line of standard error, which must be sskt's own."""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sskt: "), err
    assert "unexpected" not in err and "Traceback" not in err, err
    return lines[0]


@pytest.fixture
def spoilt(images: Path, tmp_path: Path) -> Path:
    """60 images, two of which cannot be read."""
    folder = tmp_path / "spoilt"
    shutil.copytree(images, folder)
    for name in ("apple/0003.png", "cup/0019.png"):
        (folder / "train" / name).write_bytes(b"no image")
    return folder


@on_cluster
def test_images_that_cannot_be_read(
    cluster: Cluster, spoilt: Path, tmp_path: Path, sskt: Sskt
) -> None:
    """The same line and status as without Ray; with skip the same names, once each."""
    dataset = DatasetSpec(str(spoilt))
    more: dict[str, Any] = {"dataset": dataset, "shard_rows": 10, "seeds": 2}
    said = {}
    for engine in ("local", "ray"):
        job = replace(job_over_shapes(tmp_path / engine), **more)
        for on_error in ("fail", "skip"):
            job = replace(job, on_error=on_error)
            status, out, err = sskt(*arguments_of(job), "--engine", engine, "--json")
            said[engine, on_error] = status, json.loads(out)["skipped"] if out else one_line(err)
    assert said["ray", "fail"][0] == 2 and "cannot decode" in said["ray", "fail"][1]
    assert said["ray", "skip"] == (0, ["apple/0003.png", "cup/0019.png"])
    assert said["ray", "skip"] == said["local", "skip"]
    assert said["local", "fail"][0] == 2
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@on_cluster
def test_errors_that_a_task_finds(cluster: Cluster, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    body = TINY.read_text()
    job = replace(job_over_shapes(tmp_path / "ray"), sources=(f"broken={broken}:build",))
    broken.write_text(body.replace("nn.Flatten(),", "nn.Flatten(), nn.Identity(1, 2, x=oops),"))
    with pytest.raises(InputError, match=r"source broken: .* NameError"):
        cache_with_ray(job)
    forward = "import os\nclass Bad(nn.Module):\n    def forward(self, x):\n        "
    bad = forward + "return x if len(x) < 4 else x[os.getpid() * 10**6]\n"
    broken.write_text(
        body.replace("def build", f"{bad}\n\ndef build").replace(
            "nn.Flatten(),", "nn.Flatten(), Bad(),"
        )
    )
    with pytest.raises(IndexError):
        cache_with_ray(job)
    with pytest.raises(InputError, match="no node of the Ray cluster holds a task of 99 CPU"):
        cache_with_ray(job, RayOptions(task_cpus=99))


@on_cluster
@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs /proc/self/cwd")
def test_a_folder_that_the_nodes_do_not_share(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc/self/cwd is another folder for the workers than for the driver."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_engine, "SEEN_SECONDS", 1.0)
    job = job_over_shapes(Path("/proc/self/cwd/labels"))
    with pytest.raises(InputError, match=r"has no folder .*a folder that all nodes share"):
        cache_with_ray(job)
    (cluster.folder / "labels").mkdir()
    with pytest.raises(InputError, match=r"does not see label set .*a folder that all nodes share"):
        cache_with_ray(job)
    (made,) = list_label_sets(cluster.folder / "labels")
    assert not shards(cluster.folder / "labels")
    shutil.copytree(made.path, tmp_path / "labels" / made.name)
    with pytest.raises(InputError, match=r"stored samples .* a folder that all nodes share"):
        cache_with_ray(job)
    wait_for("the end of its tasks", cluster.is_idle)
    shutil.rmtree(cluster.folder / "labels")


@on_cluster
def test_shares_of_a_gpu(
    cluster: Cluster, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU on paper: two tasks hold half of it each, though there are cores for more.

    When it is gone for good, so is the run.
    """
    node = cluster.add(num_cpus=4, num_gpus=1)
    job = replace(job_over_shapes(tmp_path / "ray"), sources=(gate.source,))
    with pytest.raises(InputError, match="Ray gave this node's task a GPU, but its torch"):
        cache_with_ray(job)
    job = replace(job, device="cpu")
    gate.let_pass(9)
    run = Running(job, RayOptions(task_gpus=0.5))
    run.wait_for("two tasks", lambda: len(gate.waiting()) == 2)
    free = cluster.ray.available_resources
    run.wait_for("the last of the GPU", lambda: free().get("GPU", 0.0) == 0.0)
    assert free()["CPU"] == 4.0, "six cores, two tasks"
    assert len(gate.waiting()) == 2
    monkeypatch.setattr(ray_engine, "NODES_SECONDS", 0.5)
    monkeypatch.setattr(ray_engine, "GONE_SECONDS", 1.0)
    before = shards(tmp_path / "ray")
    cluster.remove(node, kill=True)
    with pytest.raises(InputError, match=r"holds a task of 1 CPU \+ 0.5 GPU .* are stored"):
        run.result()
    gate.open()
    report = cache_with_ray(job)
    assert len(before) == 2 * report.reused // 100 >= 6
    assert before.items() <= shards(tmp_path / "ray").items()
    assert contents(tmp_path / "ray") == label_here(replace(job, cache=str(tmp_path / "here")))


def test_options_that_cannot_be(tmp_path: Path, sskt: Sskt) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'sskt[ray]')")
    base = [*arguments_of(job_over_shapes(tmp_path / "ray")), "--engine", "ray"]
    for more, expected in (
        (["--address", "127.0.0.1:9"], "nothing answers there (Connection refused)"),
        (["--address", "ray://127.0.0.1:9"], "a Ray Client server (port 10001)"),
        (["--address", "somewhere"], "expected auto, HOST:PORT or ray://HOST:PORT"),
        (["--task-gpus", "2"], "a task uses one GPU or a fraction of it"),
        (["--device", "cuda:1"], "Ray chooses the GPU of a task; use --device cuda"),
    ):
        status, _, err = sskt(*base, *more)
        assert status == 2 and expected in one_line(err)


def test_what_a_task_holds() -> None:
    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources}

    nodes = [node(CPU=8.0, GPU=2.0), node(CPU=3.0), node(False, CPU=64.0, GPU=8.0), node()]
    assert task_gpus_of(nodes, "auto", RayOptions()) == 1
    assert task_gpus_of(nodes, "cpu", RayOptions()) == 0
    assert task_gpus_of(nodes, "auto", RayOptions(task_gpus=0.25)) == 0.25
    assert task_gpus_of(nodes[1:], "auto", RayOptions()) == 0
    with pytest.raises(InputError, match="no node of the Ray cluster has a GPU"):
        task_gpus_of(nodes[1:], "cuda", RayOptions())
    assert [slots_of(nodes, 1, gpus) for gpus in (0, 1, 0.5, 0.1)] == [11, 2, 4, 8]
    assert [slots_of(nodes, cpus, 0) for cpus in (0.1, 2, 3, 8)] == [110, 5, 3, 1]
    with pytest.raises(InputError, match=r"nodes: 0 CPU .* 3 CPU \+ 0 GPU, 8 CPU \+ 2 GPU"):
        slots_of(nodes, 9, 0)


def test_the_gpu_of_a_task() -> None:
    """Ray names GPUs as CUDA_VISIBLE_DEVICES of the node does."""
    assert [gpu_number("1", visible) for visible in ("", "0,1", "1", "3,2,1")] == [1, 1, 0, 2]
    assert gpu_number("GPU-8f", "GPU-3a,GPU-8f") == 1


def test_an_error_comes_back_as_it_was() -> None:
    here = os.uname().nodename
    error = Failure("BadImage", "cannot decode a.png", here).error()
    assert type(error) is BadImage and str(error) == "cannot decode a.png"
    unknown = Failure("UnknownName", "unknown source 'x'", "node7").error()
    assert type(unknown) is UnknownName and unknown.exit_code == 2
    assert str(unknown) == "unknown source 'x' (on node node7)"


def test_a_job_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(Path.cwd())
    job = Job(
        ("a=./n.py/n.py:build@74", "imagenet:resnet50", "b=m/b.pt2@64", "c=package.module:f"),
        DatasetSpec("./images", root="data"),
        "labels",
        weights=("imagenet=w.pt", "c=x=y.pt"),
        frame_sampling="f.py:pick",
    )
    found = ray_engine._everywhere(job)
    assert found.sources == (
        f"a={here}/n.py/n.py:build@74",
        "imagenet:resnet50",
        f"b={here}/m/b.pt2@64",
        "c=package.module:f",
    )
    assert found.weights == (f"imagenet={here}/w.pt", f"c={here}/x=y.pt")
    assert found.dataset == DatasetSpec(f"{here}/images", root=f"{here}/data")
    assert (found.cache, found.frame_sampling) == (f"{here}/labels", f"{here}/f.py:pick")
    assert ray_engine._everywhere(found) == found
    dataset = DatasetSpec("cifar10")
    known = replace(job, dataset=dataset, cache="s3://bucket/x", frame_sampling="center")
    found = ray_engine._everywhere(known)
    assert found.dataset == DatasetSpec("cifar10", root=f"{here}/data")
    assert found.cache == "s3://bucket/x"
    assert found.frame_sampling == "center"


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
def test_a_command_joins_the_cluster(cluster: Cluster, tmp_path: Path, gate: Gate) -> None:
    """One of its workers dies; standard output is the report and nothing else."""
    job = replace(job_over_shapes(tmp_path / "ray", limit=300), sources=(gate.source,))
    gate.let_pass(1)
    joins = [*arguments_of(job), "--engine", "ray", "--address", cluster.address, "--json"]
    run = command(joins)
    wait_for("a worker", lambda: gate.waiting() or run.poll() is not None)
    os.kill(gate.waiting()[0], signal.SIGKILL)
    gate.open()
    out, err = run.communicate(timeout=LIMIT)
    assert (run.returncode, err) == (0, "")
    report = json.loads(out)
    assert (report["written"], report["reused"]) == (900, 0)
    assert contents(tmp_path / "ray") == label_here(replace(job, cache=str(tmp_path / "here")))


@on_cluster
def test_a_wrong_token(cluster: Cluster) -> None:
    code = """
import sys
import ray
from sskt.teacher_cache.labeling.ray.cluster import connected
try:
    with connected(ray, sys.argv[1]):
        pass
except Exception as error:
    print(type(error).__name__, error)
"""
    wrong = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}, {"RAY_AUTH_MODE": "disabled"}
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, cluster.address],
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=os.environ | environment,
        )
        for environment in wrong
    ]
    for run in runs:
        out, err = run.communicate(timeout=LIMIT)
        assert out.startswith("InputError the Ray cluster at ") and not err
        assert "does not take this token" in out and "RAY_AUTH_TOKEN" in out


@on_cluster
def test_ctrl_c_in_a_cluster_of_its_own(tmp_path: Path, gate: Gate, sskt: Sskt) -> None:
    """As a terminal sends it: to all processes of the group. The local engine does the rest."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'sskt[ray]')")
    token, cores = secrets.token_hex(32), os.cpu_count() or 1
    job = job_over_shapes(tmp_path / "ray", seeds=3 + cores // 8)
    job = replace(job, sources=(gate.source,))
    gate.let_pass(cores + 7)  # two batches a shard, and each worker may be in the middle of one
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": ""}
    run = command([*arguments_of(job), "--engine", "ray"], **ours)
    wait_for("a worker", lambda: gate.waiting() or run.poll() is not None)
    wait_for("shards", lambda: len(shards(tmp_path / "ray")) >= 6 or run.poll() is not None)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 130
    assert "run the same command again" in one_line(err.lstrip("\n"))
    stored = shards(tmp_path / "ray")
    assert 6 <= len(stored) < 20 * job.seeds
    wait_for("the end of its cluster", lambda: not processes_with(token))
    gate.open()
    status, _, err = sskt(*arguments_of(job))
    assert status == 0, err
    assert stored.items() <= shards(tmp_path / "ray").items()
    assert contents(tmp_path / "ray") == label_here(replace(job, cache=str(tmp_path / "here")))
