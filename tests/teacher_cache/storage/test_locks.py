"""Who is at a folder: locks of other processes, and file systems that have none."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.helpers import TINY

from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.storage import locks as durable
from sskt.trainer.config import TrainConfig
from sskt.trainer.loop.runs import run_training

Call = Callable[..., tuple[int, str, str]]

HOLDER = """
import sys
from pathlib import Path
from sskt.trainer.results.records import held_folder
with held_folder(Path(sys.argv[1]), resume=False):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every lock is answered as by a file system without locks."""

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    durable._warn_of_no_locks.cache_clear()
    monkeypatch.setattr("fcntl.lockf", refuse)
    yield


def test_two_trainings_do_not_share_a_folder(sskt: Call, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ask = ["train", "--target", images, "--policy", "pad-crop-flip", "--epochs", 1, "--out", out]
    ask += ["--device", "cpu", "--workers", 0, "--test-split", "none"]
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        status, _, err = sskt(*ask)
        assert status == 2
        assert f"sskt: another process is training into {out}; let it end" in err
        other.kill()
    assert [p.name for p in out.iterdir()] == [".lock"]
    assert sskt(*ask)[0] == 0, "the lock dies with its process"


def test_training_without_locks_warns(
    no_locks: None, config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    assert run_training(dataclasses.replace(config, epochs=1, out=out))
    said = [r.getMessage() for r in caplog.records if "no locks" in r.getMessage()]
    assert said == [
        f"the file system of {out} has no locks: start no second training into this folder"
    ]


@pytest.mark.parametrize("locks", [True, False])
def test_temporary_files_of_other_machines_stay(
    request: pytest.FixtureRequest,
    sskt: Call,
    images: Path,
    label_cache: Path,
    tmp_path: Path,
    locks: bool,
) -> None:
    """Without locks no one knows whether their writers live; after a day they count as dead.

    So do those from a time that is a day ahead: the clock was set back since.
    """
    cache = shutil.copytree(label_cache, tmp_path / "cache")
    (label_set,) = list_label_sets(cache)
    digits = "0" * 32
    leftovers = [
        label_set.path / f"labels/c/0/0.{digits}.partial",
        label_set.path / f"view_check/zarr.json.{digits}.partial",
        cache / f".images-train.a-b.{'0' * 12}.{digits}.partial",
        cache / f".images-train.a-b.{'1' * 12}.{digits}.partial",
    ]
    for leftover in leftovers[:2]:
        leftover.write_bytes(b"half")
    for leftover in leftovers[2:]:
        leftover.mkdir()
    for leftover, when in zip(leftovers[::2], (0.0, time.time() + 25 * 3600), strict=True):
        os.utime(leftover, (when, when))
    if not locks:
        request.getfixturevalue("no_locks")
    ask = ["cache-teachers", "--source", f"tiny={TINY}:build", "--target", images]
    ask += ["--policy", "pad-crop-flip", "--encoding", "f32", "--cache", cache, "--workers", 0]
    assert sskt(*ask, "--seeds", 3)[0] == 0
    assert [p for p in leftovers if p.exists()] == ([] if locks else leftovers[1::2])
    shutil.rmtree(label_set.path)
    building = cache / f".{label_set.name}.{'1' * 32}.partial"
    building.mkdir()
    assert sskt(*ask, "--seeds", 1)[0] == 0
    assert building.exists() == (not locks)


WITHOUT = """
import importlib, pkgutil, sys
sys.modules["fcntl"] = None  # as on a system without it
import sskt
for package in ("teacher_cache", "trainer", "server", "cli"):
    root = importlib.import_module(f"sskt.{package}")
    for found in pkgutil.walk_packages(root.__path__, f"sskt.{package}."):
        importlib.import_module(found.name)
cache, out = sys.argv[1:]
(labels,) = sskt.list_label_sets(cache)
assert labels.rows(0, [3, 1]).shape == (2, len(labels.classes))
from sskt.cli.main import main
try:
    main(["copy", cache, out])
except SystemExit as stop:
    assert stop.code == 2, stop.code
"""


@pytest.mark.slow
def test_all_but_writing_works_on_a_system_without_locks(label_cache: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(label_cache), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "sskt: this system has no POSIX file locks" in done.stderr


def test_one_module_takes_locks() -> None:
    root = Path(durable.__file__).parents[2]
    folders = ("teacher_cache", "trainer", "server", "cli")
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    users = [path for path in files if "import fcntl" in path.read_text()]
    assert len(files) > 150 and users == [Path(durable.__file__)]


def test_a_file_lock_excludes_other_handles(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    other = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with durable.file_lock(path):
            assert not durable.lock_file(other, wait=False)
            assert not durable.lock_file(other, shared=True, wait=False)
        assert durable.lock_file(other, shared=True, wait=False)
        third = os.open(path, os.O_RDWR)
        try:
            assert durable.lock_file(third, shared=True, wait=False)
            assert not durable.lock_file(third, wait=False)
        finally:
            os.close(third)
        durable.unlock_file(other)
    finally:
        os.close(other)


FORKED = """
import os, sys
from pathlib import Path
from sskt.teacher_cache.storage.locks import file_lock, lock_file
path, (end, begin) = Path(sys.argv[1]), os.pipe()
with file_lock(path):
    child = os.fork()
    if child == 0:
        os.close(begin)
        os.read(end, 1)
        os._exit(0)
other = os.open(path, os.O_RDWR)
assert lock_file(other, wait=False), "the child's duplicate of the handle keeps the lock"
os.write(begin, b"x")
os.waitpid(child, 0)
"""


def test_a_file_lock_ends_although_a_forked_process_has_its_handle(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(tmp_path / "lock")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
