"""Loader processes: how views reach the process that uses them, and how a dead one is reported.

Views travel through shared memory, which Docker limits to 64 MB, and each shared tensor takes a
file descriptor in both processes. What does not fit is sent through a pipe instead, and received
views are copied at once, so that neither grows with the number of seeds.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sskt.teacher_cache.errors import SsktError
from sskt.teacher_cache.media.images import UInt8

SHARED_MEMORY = "/dev/shm"
"""Where shared memory lies on Linux."""

AHEAD = 2
"""Items that are read ahead for each loader process."""

PART_BYTES = 16 * 2**20
"""Bytes that a loader process sends at once, at most."""

LEAST_BYTES = 256 * 2**10
"""Shared memory that must be free for loader processes to be started."""

SILENT_SECONDS = 1800.0
"""A loader process that sends nothing for this long while labels are made has failed."""

OPEN_FILES = 65536
"""Wanted limit of open files."""

_log = logging.getLogger("sskt")
_Item = TypeVar("_Item")


def usable_workers(wanted: int | None) -> int:
    """How many loader processes to start.

    Args:
        wanted: The number; None: the number of cores, up to 8.

    Returns:
        The number; 0, with a warning, if shared memory has no room for their semaphores.
    """
    workers = min(8, os.cpu_count() or 1) if wanted is None else wanted
    free = _free_shared_memory()
    if workers and free is not None and free < LEAST_BYTES:
        _log.warning(
            "%s has only %d bytes free: files are read without loader processes, which is slow; "
            "make it larger (docker run --shm-size=1g)",
            SHARED_MEMORY,
            free,
        )
        return 0
    return workers


def _free_shared_memory() -> int | None:
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def raise_open_files() -> int:
    """Raises the soft limit of open files as far as the hard one allows.

    Returns:
        The soft limit now; 0 on a system without such limits.
    """
    try:
        import resource
    except ImportError:
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    wanted = OPEN_FILES if hard == infinite else min(OPEN_FILES, hard)
    if soft != infinite and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return soft


def shared_bytes(workers: int) -> int:
    """How much a loader process may put into shared memory at once.

    Args:
        workers: Number of loader processes.

    Returns:
        Bytes of one item: at most ``PART_BYTES``, and so little that the items of all processes
        take half of what is free; 0 if there is no shared memory.
    """
    under_way = max(1, workers) * (AHEAD + 1)
    return min(PART_BYTES, (_free_shared_memory() or 0) // 2 // under_way)


def send(views: UInt8, limit: int) -> Tensor | UInt8:
    """Prepares views for their way out of a loader process; called in that process.

    Args:
        views: uint8, of any shape.
        limit: Bytes that may lie in shared memory (``shared_bytes``).

    Returns:
        A tensor in shared memory; if it does not fit there, the views themselves, which go
        through the pipe between the processes.
    """
    if not 0 < views.nbytes <= limit:
        return views
    try:
        shared: Tensor = torch.from_numpy(np.ascontiguousarray(views))
        shared.share_memory_()  # type: ignore[no-untyped-call]
        return shared
    except (RuntimeError, OSError):  # another process has filled it, or no file can be opened
        return views


def receive(sent: Tensor | UInt8, out: Tensor | None = None) -> Tensor:
    """Takes views that a loader process sent; called in the process that uses them.

    Args:
        sent: What ``send`` returned there.
        out: Where to put them; default: a new tensor.

    Returns:
        The views in memory of this process: their shared memory and its file descriptor are free.
    """
    views = sent if isinstance(sent, Tensor) else torch.from_numpy(sent)
    if out is None:
        return views.clone() if isinstance(sent, Tensor) else views
    return out.copy_(views)


def loader_of(dataset: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """A ``DataLoader`` without batching whose processes cannot exhaust the limits of the machine.

    Args:
        dataset: Its items are sent as they are: views by ``send``.
        workers: Number of processes; 0: this one reads.
        options: Further arguments of ``DataLoader``.

    Returns:
        The loader. Iterate over it by a ``LoaderWatch``, within ``reporting_dead_workers``.
    """
    if workers:
        raise_open_files()
        options["prefetch_factor"] = AHEAD
    with any_number_of_workers():
        return DataLoader(dataset, batch_size=None, num_workers=workers, **options)


@contextlib.contextmanager
def any_number_of_workers() -> Iterator[None]:
    """Without torch's warning of more workers than cores, which are the user's choice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


class LoaderFailure(RuntimeError):
    """A loader process was killed, or sent nothing for too long; the message says which.

    Attributes:
        silent: Whether it sent nothing.
    """

    def __init__(self, silent: bool, seconds: float) -> None:
        super().__init__(_SILENT.format(seconds) if silent else _KILLED)
        self.silent = silent


_KILLED = "a loader process was killed (was there memory left?)"
_SILENT = "a loader process has sent nothing for {:g} s"


class LoaderWatch(threading.Thread):
    """Kills loader processes that send nothing for too long, which ends the wait for them.

    Such a process may be stopped, or wait for a file system that is away. torch's own time limit
    does not end the wait for a tensor that such a process has begun to send, but its death does.

    Args:
        start: Starts the processes and returns what yields their items.
        seconds: How long they may send nothing.
    """

    def __init__(self, start: Callable[[], Iterator[Any]], seconds: float) -> None:
        super().__init__(name="sskt-loader-watch", daemon=True)
        others = set(multiprocessing.active_children())
        self._items: Iterator[Any] = start()
        self._workers = set(multiprocessing.active_children()) - others
        self._seconds, self._silent = seconds, False
        self._waiting_since: float | None = None
        self._over = threading.Event()
        if self._workers:
            self.start()

    def restart(self, start: Callable[[], Iterator[Any]]) -> None:
        """Continues with other items of the same processes."""
        self._items = start()

    def next(self) -> Any:
        """Returns the next item; None after the last one.

        Raises:
            LoaderFailure: If a loader process was killed, or is silent.
        """
        self._waiting_since = time.monotonic()
        try:
            return next(self._items, None)
        except (RuntimeError, EOFError, OSError) as error:
            if self._failed():
                raise LoaderFailure(self._silent, self._seconds) from error
            raise
        finally:
            self._waiting_since = None

    def _failed(self) -> bool:
        with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD raises here, once
            wait([worker.sentinel for worker in self._workers], timeout=1)
            for worker in self._workers:
                worker.join(1)
        return self._silent or any(worker.exitcode for worker in self._workers)

    def run(self) -> None:
        """Looks at the clock; the main function of the thread."""
        while not self._over.wait(self._seconds / 10):
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self._seconds:
                self._silent = True
                for worker in self._workers:
                    worker.kill()
                return

    def end(self) -> None:
        """Ends the watch; the processes go on."""
        self._over.set()


@contextlib.contextmanager
def reporting_dead_workers(next_step: str) -> Iterator[None]:
    """Reports a loader process that was killed or is silent in one sentence.

    Args:
        next_step: What the user can do then; the end of the sentence.

    Raises:
        SsktError: If a loader process died or is silent.
    """
    try:
        yield
    except LoaderFailure as error:
        raise SsktError(f"{error}; {next_step}") from error
    except RuntimeError as error:  # torch raises it wherever this process happens to be
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise SsktError(f"{_KILLED}; {next_step}") from error
