"""A lab: one ``sskt serve`` and several trainings at once, all of them processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.helpers import TINY, tree
from support.ports import free_port
from support.processes import Launcher, launched
from support.servers import without_times

from sskt.cli.main import run
from sskt.teacher_cache.label_sets.create import list_label_sets

pytestmark = pytest.mark.slow

SEEDS = 3


@contextlib.contextmanager
def server(*arguments: object, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """``sskt serve``; ready when this begins, gone with its workers when it ends."""
    command = [sys.executable, "-c", "from sskt.cli.main import main; main()", "serve"]
    command += [*map(str, arguments), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port))
        yield process
    finally:
        process.kill()
        process.wait()
        wait_until(lambda: not answers(port))


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_until(holds: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with launched(tmp_path_factory.mktemp("lab"), seconds=300) as one:
        yield one


@pytest.fixture(scope="module")
def real(cifar: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real labels: the Places365 network over 200 real CIFAR-10 images, in shards of 64."""
    cache = tmp_path_factory.mktemp("real-labels")
    source = f"places365={data / 'models/squeezenet_places365.py'}:build@74"
    arguments = ["cache-teachers", "--source", source, "--target", cifar, "--limit", 200]
    arguments += ["--policy", "pad-crop-flip", "--seeds", SEEDS, "--shard-rows", 64]
    assert run([str(a) for a in [*arguments, "--cache", cache, "--workers", 0]]) == 0
    return cache


TRAININGS = {
    "plain": ["--seed", 1],
    "tm": ["--seed", 2, "--tm"],
    "hot": ["--seed", 3, "--temperature", 3, "--alpha", 0.1],
    "small windows": ["--seed", 4, "--tm", "--memory", 0.0001],
}


def training(target: Path, out: Path, *options: object) -> list[object]:
    fixed = ["--epochs", 3, "--batch-size", 32, "--workers", 0, "--test-split", "none"]
    fixed += ["--limit", 200, "--policy", "pad-crop-flip", "--source", "places365"]
    return ["train", "--target", target, "--out", out, *fixed, *options]


def test_four_trainings_through_one_server_that_is_killed_meanwhile(
    cifar: Path,
    real: Path,
    launcher: Launcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = {
        name: launcher.start(*training(cifar, tmp_path / "local" / name, *options, "--cache", real))
        for name, options in TRAININGS.items()
    }
    for name, one in local.items():
        assert one.wait()[0] == 0, name

    tokens, port = tmp_path / "tokens.json", free_port()
    made = [sys.executable, "-c", "from sskt.cli.main import main; main()", "token", "new", "lab"]
    secret = subprocess.run(
        [*made, "--token-file", tokens], check=True, capture_output=True, text=True
    ).stdout.strip()
    monkeypatch.setenv("SSKT_TOKEN", secret)
    how = ("--cache", real, "--token-file", tokens, "--workers", 2)
    url = f"http://127.0.0.1:{port}"
    kept = tmp_path / "node"
    with server(*how, port=port) as first:
        served = {
            name: launcher.start(
                *training(cifar, tmp_path / "served" / name, *options, "--labels", url),
                "--label-cache",
                kept,
            )
            for name, options in TRAININGS.items()
        }
        metrics = [tmp_path / "served" / name / "metrics.jsonl" for name in TRAININGS]
        wait_until(lambda: any(m.exists() and m.read_bytes() for m in metrics))
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        wait_until(lambda: not answers(port))
    with server(*how, port=port):
        ends = {name: one.wait() for name, one in served.items()}
    for name, (status, _, err) in ends.items():
        assert status == 0, (name, err)
        assert without_times(tmp_path / "served" / name) == without_times(
            tmp_path / "local" / name
        ), name
    (label_set,) = list_label_sets(real)
    shards = [p.name.partition("@")[0] for p in kept.rglob("*.shard")]
    assert len(shards) == SEEDS * label_set.blocks * 2  # once for the node, not for each training
    assert len(set(shards)) == len(shards)


def test_a_server_that_ends_leaves_nobody_behind(real: Path, tmp_path: Path) -> None:
    """Stopped gently or killed: no worker keeps the port, and gently no folder stays."""
    port = free_port()
    before = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("sskt-server-*"))
    with server("--cache", real, "--workers", 2, port=port) as one:
        one.send_signal(signal.SIGTERM)
        assert one.wait(30) == 0
        assert not answers(port)
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("sskt-server-*")) <= before
    with server("--cache", real, "--workers", 2, port=port) as one:
        one.kill()
        one.wait()
        wait_until(lambda: not answers(port))
    left = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("sskt-server-*")) - before
    assert len(left) == 1
    with server("--cache", real, port=port) as one:
        assert not any(folder.exists() for folder in left)
        one.send_signal(signal.SIGINT)
        assert one.wait(30) == 130


def test_labels_computed_on_demand_are_those_of_cache_teachers(
    launcher: Launcher, tmp_path: Path
) -> None:
    """One of three seeds is stored; the real compute worker makes the others while one trains."""
    what = ["--source", f"tiny={TINY}:build", "--target", "shapes", "--limit", 64]
    making = ["cache-teachers", *what, "--shard-rows", 32, "--workers", 0, "--device", "cpu"]
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    for cache, seeds in ((whole, SEEDS), (begun, 1)):
        assert run([str(a) for a in [*making, "--seeds", seeds, "--cache", cache]]) == 0
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    how = ["--seeds", SEEDS, "--epochs", SEEDS, "--batch-size", 32, "--workers", 0]
    how += ["--test-split", "none", "--device", "cpu"]
    named = ("--source", f"tiny={TINY}:build")
    with server("--cache", begun, "--on-demand", "--device", "cpu", *named, port=port):
        looked = launcher.start("train", *what, *how, "--labels", url, "--dry-run")
        assert looked.wait()[0] == 0
        with urllib.request.urlopen(f"{url}/v1/compute") as answer:
            assert json.load(answer)["entries"] == []  # to look asks for nothing
        assert list_label_sets(begun)[0].seeds == 1
        asked = launcher.start("train", *what, *how, "--labels", url, "--out", tmp_path / "asked")
        status, _, err = asked.wait()
        assert status == 0, err
    (one,), (other,) = list_label_sets(begun), list_label_sets(whole)
    assert one.name == other.name and one.coverage() == [1.0] * SEEDS
    for array in one.arrays:
        assert tree(one.path / array) == tree(other.path / array)
    stored = launcher.start("train", *what, *how, "--cache", whole, "--out", tmp_path / "stored")
    assert stored.wait()[0] == 0
    assert without_times(tmp_path / "asked") == without_times(tmp_path / "stored")
