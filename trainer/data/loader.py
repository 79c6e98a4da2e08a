"""Batches of views: from images in RAM, or from files through loader workers."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sskt.teacher_cache.errors import BadImage, InputError, MissingData, SsktError
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.loader_processes import (
    LoaderFailure,
    LoaderWatch,
    raise_open_files,
)
from sskt.teacher_cache.views.mixing import Mixed, all_mixed
from sskt.teacher_cache.views.view_cache import ViewCache
from sskt.teacher_cache.views.views import Views, checks_of

Int64 = NDArray[np.int64]

SHARED_MEMORY = Path("/dev/shm")
SILENT_SECONDS = 600
"""How long one batch may take before its loader process is taken for stuck."""
LEAD = 2
"""Batches that a worker prepares ahead."""


@dataclass(frozen=True)
class Batch:
    """Views of the readable samples of a batch.

    Attributes:
        samples: Their row numbers: int64 ``[n]``; each K times if it has K views.
        views: uint8 ``[n, H, W, 3]``, or ``[n, D, H, W, 3]`` for clips. An array on its way from
            a worker where shared memory is scarce, else a tensor.
        checks: View checks, uint32 ``[n]``; None if they are not computed here.
        bad: A message for each sample that could not be read.
        seeds: The view seed of each view, int64 ``[n]``; None: the one that was asked for.
        error: Why there is no batch; empty if there is one.
        mixed: What the views were mixed with; None under a policy that mixes none.
        not_stored: Why a view could not be stored; empty if none was refused.
    """

    samples: Int64
    views: Any
    checks: NDArray[np.uint32] | None
    bad: list[str]
    seeds: Int64 | None = None
    error: str = ""
    mixed: Mixed | None = None
    not_stored: str = ""

    def pin_memory(self) -> Batch:
        """Called by the loader for copies to a GPU that do not wait."""
        return replace(self, views=torch.as_tensor(self.views).pin_memory())


class _Batches(Dataset[Batch]):
    def __init__(
        self, feed: Feed, batches: Sequence[Int64], seeds: Sequence[int], workers: int
    ) -> None:
        self._feed, self._batches, self._seeds = feed, batches, tuple(seeds)
        self._in_flight = workers * (LEAD + 1)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        batch = self._read(self._batches[index])
        size = batch.views.nbytes
        if self._in_flight and size and not has_shared_memory(self._in_flight * size):
            return batch
        return replace(batch, views=torch.from_numpy(batch.views))

    def _read(self, samples: Int64) -> Batch:
        feed, seeds, nothing = self._feed, self._seeds, np.zeros(0, np.uint8)
        if feed.cache is not None:
            cached = feed.cache.seen(samples, seeds)
            if cached is not None:
                return self._joined(
                    cached.rows,
                    list(cached.views.values()),
                    list(cached.checks.values()) if feed.checked else [],
                    cached.bad,
                    list(cached.mixed.values()),
                    cached.failure,
                )
        try:
            seen = feed.views.seen(samples, seeds)
        except InputError as error:
            return Batch(samples, nothing, None, [], error=str(error))
        views = [seen.views.get(seed, nothing) for seed in seeds]
        checks = [checks_of(some) for some in views] if feed.checked else []
        return self._joined(seen.rows, views, checks, seen.bad, list(seen.mixed.values()))

    def _joined(
        self,
        rows: Int64,
        views: list[UInt8],
        checks: list[NDArray[np.uint32]],
        bad: list[tuple[int, str]],
        mixed: list[Mixed],
        not_stored: str = "",
    ) -> Batch:
        """One batch of the views under all seeds, one seed after the other."""
        messages = [message for _, message in bad]
        if len(self._seeds) == 1:
            made = checks[0] if checks else None
            what = mixed[0] if mixed else None
            return Batch(rows, views[0], made, messages, not_stored=not_stored, mixed=what)
        return Batch(
            np.tile(rows, len(self._seeds)),
            np.concatenate(views),
            np.concatenate(checks) if checks else None,
            messages,
            np.repeat(self._seeds, len(rows)),
            not_stored=not_stored,
            mixed=all_mixed(mixed) if mixed else None,
        )


def has_shared_memory(size: int) -> bool:
    """Returns whether tensors of ``size`` bytes fit what is free of the shared memory.

    torch sends tensors between processes through it. Docker gives a container 64 MiB by default,
    and a process that writes beyond is killed. Arrays are sent through a pipe instead.
    """
    try:
        return shutil.disk_usage(SHARED_MEMORY).free >= size
    except OSError:
        return True  # no such file system: torch uses something else


RESUME = "finished epochs are kept: run again with --resume"
KILLED = (
    f"a loader process was killed (was there memory left?); {RESUME}, with fewer --workers or less "
    "--memory"
)


@contextlib.contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Says that a loader process was killed, wherever this process happens to be.

    Raises:
        SsktError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker (pid"):
            raise SsktError(KILLED) from error
        raise


@dataclass(frozen=True)
class Feed:
    """Turns sample ids into batches of views, always in the order given.

    Attributes:
        views: The samples under their policy.
        workers: Loader processes; None: by cores. Images in RAM need none, and views that are
            stored are read by as many threads.
        on_error: ``fail`` or ``skip``.
        pin: Whether batches are copied to a GPU.
        checked: Whether to compute the view checks, in the loader processes.
        cache: Where views are kept; None: they are made in each epoch.
    """

    views: Views
    workers: int | None = None
    on_error: str = "fail"
    pin: bool = False
    checked: bool = False
    cache: ViewCache | None = None

    def __call__(
        self, batches: Sequence[Int64], seed: int, others: Sequence[int] = ()
    ) -> Iterator[Batch]:
        """Reads batches.

        Args:
            batches: Row numbers of the samples of each batch.
            seed: View seed.
            others: Further view seeds: each sample is decoded once, and has a view under each.

        Yields:
            A batch for each; an empty one if none of its samples can be read.

        Raises:
            BadImage: If a sample cannot be read (unless ``on_error`` is ``skip``).
            InputError: If the views of a batch differ in size.
            SsktError: If a loader process was killed, or sends nothing.
        """
        workers = min(self._processes(), len(batches))
        seeds = (seed, *others)
        read = self._by_threads if self._stored(seeds) and workers else self._by_processes
        for batch in read(batches, seeds, workers):
            if batch.error:
                raise InputError(batch.error)
            if batch.not_stored and self.cache is not None:
                self.cache.stop(batch.not_stored)
            if batch.bad and self.on_error != "skip":
                raise BadImage(batch.bad[0])
            yield replace(batch, views=torch.as_tensor(batch.views))
        if self.cache is not None:
            self.cache.filled()

    def _stored(self, seeds: Sequence[int]) -> bool:
        return self.cache is not None and all(map(self.cache.holds, seeds))

    def _by_threads(
        self, batches: Sequence[Int64], seeds: Sequence[int], threads: int
    ) -> Iterator[Batch]:
        """Batches of stored views. Threads start at once and hold no copies for each other."""
        if self.views.target.reader:  # an own dataset need not bear several threads
            threads = 1
        made = _Batches(self, batches, seeds, 0)
        with ThreadPoolExecutor(threads, thread_name_prefix="sskt-views") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for index in range(len(batches)):
                    ahead.append(pool.submit(made.__getitem__, index))
                    if len(ahead) > threads * LEAD:
                        yield self._pinned(ahead.popleft().result())
                while ahead:
                    yield self._pinned(ahead.popleft().result())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _pinned(self, batch: Batch) -> Batch:
        return batch.pin_memory() if self.pin else batch

    def _by_processes(
        self, batches: Sequence[Int64], seeds: Sequence[int], workers: int
    ) -> Iterator[Batch]:
        if workers:
            raise_open_files()
        loader = DataLoader(
            _Batches(self, batches, seeds, workers),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=LEAD if workers else None,
            pin_memory=self.pin,
        )
        watch = LoaderWatch(lambda: iter(loader), SILENT_SECONDS)
        try:
            while True:
                try:
                    batch: Batch | None = watch.next()
                except LoaderFailure as error:
                    minutes = (
                        f"{SILENT_SECONDS / 60:g} minutes (is the file system of the data away?)"
                    )
                    silent = f"no loader process sent a batch for {minutes}; {RESUME}"
                    raise SsktError(silent if error.silent else KILLED) from error
                if batch is None:
                    return
                yield batch
        finally:
            watch.end()

    def _processes(self) -> int:
        if self.views.target.images is not None:
            return 0
        return min(8, os.cpu_count() or 1) if self.workers is None else self.workers


def in_memory(
    target: Target, limit_bytes: float, progress: Callable[[int, int], None] = lambda done, n: None
) -> Target:
    """The target with its files decoded once, if all have one size and fit; else as it is.

    The samples, their ids and the fingerprint stay the same, and so does every view. Unreadable
    files leave the target as it is, so that they are reported where they are used.
    """
    if target.images is not None or target.clips or not len(target):
        return target
    try:
        first = target.read(0)
    except (BadImage, MissingData):
        return target
    if first.nbytes * len(target) > limit_bytes:
        return target
    images = np.empty((len(target), *first.shape), np.uint8)

    def read(sample: int) -> bool:
        image = target.read(sample)
        if image.shape == first.shape:
            images[sample] = image
        return image.shape == first.shape

    # An own dataset need not bear several threads.
    with ThreadPoolExecutor(1 if target.reader else os.cpu_count()) as pool:
        try:
            for done, same in enumerate(pool.map(read, range(len(target)), chunksize=64), 1):
                if not same:
                    pool.shutdown(cancel_futures=True)
                    return target
                progress(done, len(target))
        except (BadImage, MissingData):
            pool.shutdown(cancel_futures=True)
            return target
    identity = replace(target, images=images)
    assert identity.fingerprint == target.fingerprint
    return identity
