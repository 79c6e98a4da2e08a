"""Batches of views: from pictures in RAM, or from files through loader workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sskt.teacher_cache.errors import BadImage, InputError, MissingData
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.views import Views

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """uint8 views ``[n, H, W, 3]`` (clips: ``[n, D, H, W, 3]``) of ``samples``.

    ``bad`` names files that could not be read.
    """

    samples: Int64
    views: Tensor
    bad: list[str]
    error: str = ""

    def pin_memory(self) -> Batch:
        """Called by the loader for copies to a GPU that do not wait."""
        return replace(self, views=self.views.pin_memory())


class _Batches(Dataset[Batch]):
    def __init__(self, views: Views, batches: Sequence[Int64], seed: int) -> None:
        self._views, self._batches, self._seed = views, batches, seed

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        samples = self._batches[index]
        try:
            seen = self._views.seen(samples, [self._seed])
        except InputError as error:
            return Batch(samples, torch.empty(0), [], str(error))
        bad = [message for _, message in seen.bad]
        if not len(seen.rows):
            return Batch(seen.rows, torch.empty(0, dtype=torch.uint8), bad)
        return Batch(seen.rows, torch.from_numpy(seen.views[self._seed]), bad)


@dataclass(frozen=True)
class Feed:
    """Turns sample ids into batches of views, always in the order given."""

    views: Views
    workers: int | None = None
    on_error: str = "fail"
    pin: bool = False

    def __call__(self, batches: Sequence[Int64], seed: int) -> Iterator[Batch]:
        """``batches`` under view seed ``seed``; empty ones only name what was skipped.

        Raises ``BadImage`` (unless it is to be skipped), ``InputError``.
        """
        loader = DataLoader(
            _Batches(self.views, batches, seed),
            batch_size=None,
            num_workers=min(self._processes(), len(batches)),
            pin_memory=self.pin,
        )
        for batch in loader:
            if batch.error:
                raise InputError(batch.error)
            if batch.bad and self.on_error != "skip":
                raise BadImage(batch.bad[0])
            yield batch

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
        picture = target.read(sample)
        if picture.shape == first.shape:
            images[sample] = picture
        return picture.shape == first.shape

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
