"""How the server ends, and the folder that its processes share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.attacks import COMMAND, Attacked, make_wide, serving
from support.served import request

from sskt.server import run_folder as module
from sskt.server.compute.queue import QUEUED, Queue
from sskt.server.run import GRACE_SECONDS
from sskt.server.run_folder import run_folder, touch_all


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "cache"
    make_wide(folder, 8192)
    return folder


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGHUP), (2, signal.SIGTERM)])
def test_a_slow_download_does_not_hold_up_the_end(
    cache: Path, tmp_path: Path, workers: int, number: signal.Signals
) -> None:
    with serving(tmp_path, cache, "--workers", workers) as server:
        (name,) = (path.name for path in cache.iterdir() if path.name.startswith("wide"))
        with server.connect(receive_buffer=4096) as client:
            client.sendall(request(f"/zarr/{name}/labels/c/0/0/0"))
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            assert list(tmp_path.glob("sskt-server-*"))
            began = time.monotonic()
            server.process.send_signal(number)
            while server.process.poll() is None:
                client.recv(100)  # slow, but it takes something
                assert time.monotonic() - began < GRACE_SECONDS + 10
                time.sleep(0.05)
        assert server.process.returncode == 0
        assert not list(tmp_path.glob("sskt-server-*"))
        assert not [line for line in server.lines() if "traceback" in line]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_under_nohup_the_server_outlives_its_terminal(
    cache: Path, tmp_path: Path, workers: str
) -> None:
    nohup = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {COMMAND}"
    log = tmp_path / "log"
    options = ["serve", "--cache", str(cache), "--port", "0", "--workers", workers]
    with log.open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-c", nohup, *options], stderr=errors)
    try:
        until_logged(log, "Started server process")
        process.send_signal(signal.SIGHUP)
        time.sleep(1.2)
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(30) == 0


def until_logged(log: Path, text: str) -> None:
    end = time.monotonic() + 60
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path


def test_folders_of_killed_servers_are_removed_and_those_in_use_are_not(folders: Path) -> None:
    killed = folders / f"{module.PREFIX}killed"
    (killed / "prometheus").mkdir(parents=True)
    (folders / f"{module.PREFIX}a-file").write_text("")
    with run_folder() as first:
        assert not killed.exists()
        with run_folder() as second:
            assert first.exists() and second.exists() and first != second
            assert first.stat().st_mode & 0o777 == 0o700
        assert first.exists() and not second.exists()
    assert not first.exists()


def test_cleaners_of_temporary_folders_find_nothing_old(folders: Path) -> None:
    with run_folder() as folder:
        queue = Queue(folder / "queue", 5)
        queue.ask("a", 0, 0)
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (0, 0))
        touch_all(folder)
        ages = [time.time() - path.stat().st_mtime for path in (folder, *folder.rglob("*"))]
        assert len(ages) >= 3 and max(ages) < 60


def test_a_server_whose_run_folder_was_removed_goes_on(cache: Path, tmp_path: Path) -> None:
    with serving(tmp_path, cache, "--on-demand", "--device", "cpu") as server:
        (name,) = (path.name for path in cache.iterdir() if path.name.startswith("wide"))
        (folder,) = tmp_path.glob("sskt-server-*")
        shutil.rmtree(folder)
        for path in ("/", "/readyz", "/v1/compute", f"/zarr/{name}/zarr.json", "/v1/label-sets"):
            assert server.get(path).status == 200, path
        assert server.get("/metrics").status == 200  # what was counted before is lost
        body = json.dumps({"set": name, "seed": 0, "ids": [0, 1]}).encode()
        kind = "Content-Type: application/json"
        assert server.get("/v1/labels:batch", kind, method="POST", body=body).status == 200
        queue = Queue(folder / "queue", 5)
        assert queue.ask(name, 0, 0).state == QUEUED
        entries: list[object] = [None]
        end = time.monotonic() + 60
        while entries:  # the compute worker finds that the shard is stored
            entries = json.loads(server.get("/v1/compute").body)["entries"]
            assert time.monotonic() < end
            time.sleep(0.1)
        check_log(server)


def check_log(server: Attacked) -> None:
    assert not [line for line in server.lines() if "traceback" in line]
