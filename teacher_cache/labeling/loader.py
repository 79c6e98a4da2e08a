"""Batches of what the sources see, read ahead by loader workers that live as long as the run.

A forward batch may hold many seeds of large pictures; workers send it in parts of a bounded
size, so that the shared memory they need does not grow with the number of seeds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sskt.teacher_cache.errors import InputError, SsktError
from sskt.teacher_cache.labeling.units import view_bytes
from sskt.teacher_cache.views.views import Views, checks_of

Int64 = NDArray[np.int64]

PART_BYTES = 16 * 2**20
"""What a worker sends at once, of all seeds together."""


@dataclass(frozen=True)
class Order:
    """One forward batch to read: the samples ``start`` to ``stop`` under ``seeds``.

    ``first`` is before ``start`` where BatchNorm needs more samples to make a whole batch.
    """

    unit: int
    start: int
    stop: int
    first: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """The readable samples ``rows`` of an order: stills and view checks by seed.

    stills: uint8 ``[n, H, W, 3]``, of clips ``[n, K, H, W, 3]``. ``bad``: (sample, why).
    """

    order: Order
    rows: Int64
    stills: dict[int, Tensor]
    checks: dict[int, NDArray[np.uint32]]
    bad: list[tuple[int, str]]
    error: str = ""

    def pin_memory(self) -> Batch:
        """Called by the loader for copies to a GPU that do not wait."""
        return replace(self, stills={seed: v.pin_memory() for seed, v in self.stills.items()})


_Part = tuple[Order, int, int]
"""An order, and the samples of it to read."""


class _Reader(Dataset[Batch]):
    def __init__(self, views: Views) -> None:
        self._views = views

    def __getitem__(self, part: _Part) -> Batch:
        order, start, stop = part
        samples = np.arange(start, stop)
        try:
            seen = self._views.seen(samples, order.seeds)
            stills = {
                seed: torch.from_numpy(self._views.stills(views, seen.rows, seed))
                for seed, views in seen.views.items()
            }
        except InputError as error:
            return Batch(order, samples, {}, {}, [], str(error))
        checks = {seed: checks_of(views) for seed, views in seen.views.items()}
        return Batch(order, seen.rows, stills, checks, seen.bad)


class _Parts(Sampler[_Part]):
    """Asks for orders only as the loader comes to them."""

    def __init__(self, orders: Callable[[], Iterable[Order]], bytes_a_view: int) -> None:
        self._orders, self._bytes = orders, bytes_a_view

    def __iter__(self) -> Iterator[_Part]:
        for order in self._orders():
            step = order.stop - order.first
            if self._bytes:
                step = max(1, PART_BYTES // (self._bytes * len(order.seeds)))
            for start in range(order.first, order.stop, step):
                yield order, start, min(start + step, order.stop)


def batches(
    views: Views,
    orders: Callable[[], Iterable[Order]],
    workers: int | None,
    device: torch.device,
) -> Callable[[], Iterator[Batch]]:
    """A function that reads, each time it is called, what ``orders()`` yields, in that order.

    ``workers`` processes are started by its first call and kept. Default: by cores; none for
    pictures in RAM.
    """
    if workers is None:
        workers = 0 if views.target.images is not None else min(8, os.cpu_count() or 1)
    with _any_number_of_workers():
        loader = DataLoader(
            _Reader(views),
            batch_size=None,
            sampler=_Parts(orders, view_bytes(views) if workers else 0),
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def read() -> Iterator[Batch]:
        with _any_number_of_workers():
            return _gathered(iter(loader))

    return read


@contextmanager
def _any_number_of_workers() -> Iterator[None]:
    with warnings.catch_warnings():  # more workers than cores are the user's choice
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


@contextmanager
def naming_killed_workers() -> Iterator[None]:
    """Says what became of a loader process that was killed. Raises ``SsktError`` then."""
    try:
        yield
    except RuntimeError as error:  # torch raises it wherever this process happens to be
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise SsktError(
            "a loader process was killed (was there memory left?); all shards stored so far are "
            "valid: run the same command again, with fewer --workers or less --memory"
        ) from error


def _gathered(parts: Iterator[Batch]) -> Iterator[Batch]:
    gathered: list[Batch] = []
    for part in parts:
        gathered.append(part)
        if part.error or _is_last(part, gathered):
            yield _joined(gathered)
            gathered = []


def _several(order: Order, shapes: list[tuple[int, ...]]) -> str:
    first, second = shapes[:2]
    if first[:-2] != second[:-2]:
        return (
            f"frame sampling gave {first[0]} and {second[0]} stills for two samples; expected as "
            "many for each"
        )
    return (
        f"views of samples {order.first} to {order.stop - 1} differ in size ({first[-2:]} and "
        f"{second[-2:]}); choose --policy random-resized-crop-flip or resize-center-crop"
    )


def _is_last(part: Batch, gathered: list[Batch]) -> bool:
    read = sum(len(p.rows) + len(p.bad) for p in gathered)
    return read == part.order.stop - part.order.first


def _joined(parts: list[Batch]) -> Batch:
    last = parts[-1]
    if len(parts) == 1 or last.error:
        return last
    full = [p for p in parts if p.stills]
    seeds = last.order.seeds if full else ()
    for seed in seeds:
        shapes = sorted({tuple(p.stills[seed].shape[1:-1]) for p in full})
        if len(shapes) > 1:
            return replace(last, error=_several(last.order, shapes))
    return Batch(
        last.order,
        np.concatenate([p.rows for p in parts]),
        {seed: torch.cat([p.stills[seed] for p in full]) for seed in seeds},
        {seed: np.concatenate([p.checks[seed] for p in full]) for seed in seeds},
        [bad for p in parts for bad in p.bad],
    )
