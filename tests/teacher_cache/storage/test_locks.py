"""Who is at a folder: locks of other processes, and file systems that have none."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
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
    """Without locks nobody knows whether their writers live; after a day they count as dead."""
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
    for leftover in leftovers[::2]:
        os.utime(leftover, (0, 0))
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
