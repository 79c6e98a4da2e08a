"""Compute workers for the tests of computing on demand, with faults that a file switches on."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info

from sskt.server.compute.queue import COMPUTING, Queue
from sskt.server.compute.worker import run_compute_worker
from sskt.server.settings import Settings
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.views.views import Views

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["sskt.server.compute.worker"])


@contextlib.contextmanager
def compute_worker(settings: Settings, status: int = -signal.SIGTERM) -> Iterator[BaseProcess]:
    """A compute worker while it is needed; ``status``: how it ends."""
    process = _context.Process(target=_own, args=(settings,), name="compute")
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join(20)
        assert process.exitcode == status
        process.close()


def start_grandchild(settings: Settings, pids: Any) -> None:
    """Starts a compute worker and waits to be killed."""
    process = multiprocessing.get_context("fork").Process(target=_own, args=(settings,))
    process.start()
    pids.send(process.pid)
    process.join()


def grandparent(settings: Settings, pids: Any) -> BaseProcess:
    """A process whose child is a compute worker."""
    process = _context.Process(target=start_grandchild, args=(settings, pids))
    process.start()
    return process


def written(settings: Settings) -> int:
    """Shards that compute workers have come to write."""
    path = Path(settings.run) / "written"
    return len(path.read_text()) if path.exists() else 0


def _own(settings: Settings) -> None:
    _inject(Path(settings.run))
    run_compute_worker(settings)


def _inject(run: Path) -> None:
    """While a file exists in ``run``, a fault: ``die`` kills once between the two files of a shard,
    ``poison`` kills when seed 2 is computed, ``full`` leaves no room on the disk, ``loader`` kills
    the loader processes."""
    forward, write, fsync, replace = Source.forward, WritableLabelSet.write, os.fsync, os.replace
    seen = Views.seen

    def forwarding(self: Source, stills: Any) -> Any:
        if (run / "poison").exists() and _computing(run, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, stills)

    def writing(self: WritableLabelSet, *shard: Any) -> None:
        with (run / "written").open("a") as log:
            log.write("x")
        write(self, *shard)

    def viewing(self: Views, *of: Any) -> Any:
        if (run / "loader").exists() and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return seen(self, *of)

    def syncing(handle: int) -> None:
        if (run / "full").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    def replacing(path: Any, to: Any) -> None:
        if (run / "die").exists() and "/labels/c/" in str(to):
            (run / "die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        replace(path, to)

    patch = pytest.MonkeyPatch()
    patch.setattr(Source, "forward", forwarding)
    patch.setattr(WritableLabelSet, "write", writing)
    patch.setattr(Views, "seen", viewing)
    patch.setattr(os, "fsync", syncing)
    patch.setattr(os, "replace", replacing)


def _computing(run: Path, seed: int) -> bool:
    entries = Queue(run / "queue", 1).state()
    return any(entry.seed == seed and entry.state == COMPUTING for entry in entries)
