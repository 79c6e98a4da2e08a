"""Forward batches of what the sources see, read ahead by processes that live as long as the run.

A forward batch may hold many seeds of large images. Loader processes send it in parts of a bounded
size, each of which is one tensor whatever the number of seeds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.labeling.units import view_bytes
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.views import loader_processes
from sskt.teacher_cache.views.loader_processes import (
    AHEAD,
    PART_BYTES,
    LoaderWatch,
    any_number_of_workers,
    loader_of,
    receive,
    send,
    shared_bytes,
    usable_workers,
)
from sskt.teacher_cache.views.views import Views, checks_of

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class ReadRequest:
    """A forward batch to read.

    Attributes:
        unit: Number of the unit of work.
        start: First sample that gets labels.
        stop: The sample after the last one.
        first: First sample to read; before ``start`` where BatchNorm needs a whole batch.
        seeds: View seeds.
    """

    unit: int
    start: int
    stop: int
    first: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class ViewBatch:
    """What was read for a request.

    Attributes:
        request: The request.
        rows: The samples that could be read: int64 ``[n]``.
        stills: What the sources see, by seed: uint8 ``[n, H, W, 3]``, of clips
            ``[n, K, H, W, 3]``.
        checks: View checks by seed: uint32 ``[n]``.
        bad: The samples that could not be read, each with the reason.
        error: What ends the run; empty if nothing does.
    """

    request: ReadRequest
    rows: Int64
    stills: dict[int, Tensor]
    checks: dict[int, NDArray[np.uint32]]
    bad: list[tuple[int, str]]
    error: str = ""


_PartRequest = tuple[ReadRequest, int, int]
"""A request, and the samples of it to read."""


@dataclass(frozen=True)
class _Part:
    """What a loader process sends: the stills of all seeds one after another in one array."""

    request: ReadRequest
    rows: Int64
    data: Tensor | UInt8
    shapes: tuple[tuple[int, ...], ...]
    checks: list[NDArray[np.uint32]]
    bad: list[tuple[int, str]]
    error: str = ""


class _PartReader(Dataset[_Part]):
    def __init__(self, views: Views, limit: int) -> None:
        self._views, self._limit = views, limit

    def __getitem__(self, part: _PartRequest) -> _Part:
        request, start, stop = part
        samples, nothing = np.arange(start, stop), np.zeros(0, np.uint8)
        try:
            seen = self._views.seen(samples, request.seeds)
            stills = [
                self._views.stills(views, seen.rows, seed) for seed, views in seen.views.items()
            ]
        except InputError as error:
            return _Part(request, samples, nothing, (), [], [], str(error))
        checks = [checks_of(views) for views in seen.views.values()]
        shapes = tuple(some.shape for some in stills)
        flat = [np.ascontiguousarray(some).reshape(-1) for some in stills] or [nothing]
        data = np.concatenate(flat) if len(flat) > 1 else flat[0]
        return _Part(request, seen.rows, send(data, self._limit), shapes, checks, seen.bad)


class _Queue(Sampler[_PartRequest]):
    """Takes what is queued when the loader asks for the next request."""

    def __init__(self, queued: deque[_PartRequest]) -> None:
        self._queued = queued

    def __iter__(self) -> Iterator[_PartRequest]:
        while self._queued:
            yield self._queued.popleft()


class ViewReader:
    """Reads forward batches ahead.

    Args:
        views: The target under its policy.
        workers: Number of loader processes; None: by the number of cores, and none for images in
            RAM.
        device: Where the sources run.
    """

    def __init__(self, views: Views, workers: int | None, device: torch.device) -> None:
        if workers is None and views.target.images is not None:
            workers = 0
        workers = usable_workers(workers)
        limit = shared_bytes(workers) if workers else 0
        self._ahead = workers * AHEAD + 1
        self._part_bytes = min(PART_BYTES, limit or PART_BYTES)
        self._view_bytes = view_bytes(views) if workers else 0
        self._pin = device.type == "cuda"
        self._queued: deque[_PartRequest] = deque()
        self._loader = loader_of(
            _PartReader(views, limit),
            workers,
            sampler=_Queue(self._queued),
            persistent_workers=workers > 0,
        )
        self._watch: LoaderWatch | None = None

    def read(self, requests: Iterable[ReadRequest]) -> Iterator[ViewBatch]:
        """Reads forward batches in the order of the requests.

        A request is drawn when the loader processes have nothing else to do, by the thread that
        draws the batches. The first call starts the processes before it returns.

        Args:
            requests: What to read.

        Returns:
            One batch for each request; after a batch with an error there is none.
        """
        remaining = iter(requests)
        self._fill(remaining, self._ahead)

        def start() -> Iterator[_Part]:
            with any_number_of_workers():
                return iter(self._loader)

        if self._watch is None:
            self._watch = LoaderWatch(start, loader_processes.SILENT_SECONDS)
        else:
            self._watch.restart(start)
        return self._gathered(self._watch, remaining)

    def close(self) -> None:
        """Ends the watch over the loader processes."""
        if self._watch is not None:
            self._watch.end()

    def _fill(self, remaining: Iterator[ReadRequest], count: int) -> None:
        """Queues parts of further requests until ``count`` are queued, or no request is left."""
        while len(self._queued) < count:
            request = next(remaining, None)
            if request is None:
                return
            step = request.stop - request.first
            if self._view_bytes:
                step = max(1, self._part_bytes // (self._view_bytes * len(request.seeds)))
            for start in range(request.first, request.stop, step):
                self._queued.append((request, start, min(start + step, request.stop)))

    def _gathered(
        self, parts: LoaderWatch, remaining: Iterator[ReadRequest]
    ) -> Iterator[ViewBatch]:
        while True:
            self._fill(remaining, 1)
            part = parts.next()
            if part is None:
                return
            batch = _Gathering(part.request, self._pin)
            batch.add(part)
            del part  # its shared memory is free
            while not batch.complete:
                self._fill(remaining, 1)
                batch.add(parts.next())
            yield batch.result()


@dataclass
class _Gathering:
    """A forward batch that is put together as its parts arrive."""

    request: ReadRequest
    pin: bool
    rows: list[Int64] = field(default_factory=list)
    stills: dict[int, Tensor] = field(default_factory=dict)
    checks: list[list[NDArray[np.uint32]]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    filled: int = 0
    error: str = ""

    @property
    def complete(self) -> bool:
        wanted = self.request.stop - self.request.first
        return bool(self.error) or self.filled + len(self.bad) == wanted

    def add(self, part: _Part) -> None:
        """Copies a part, so that its shared memory is free."""
        self.error, count = part.error, len(part.rows)
        self.bad += part.bad
        if self.error or not count:
            return
        self.rows.append(part.rows)
        self.checks.append(part.checks)
        begin = 0
        for seed, shape in zip(self.request.seeds, part.shapes, strict=True):
            size = int(np.prod(shape))
            out = self._room(seed, shape)
            if out is None:
                return
            receive(part.data[begin : begin + size].reshape(shape), out)
            begin += size
        self.filled += count

    def _room(self, seed: int, shape: Sequence[int]) -> Tensor | None:
        """Where the next stills of a seed belong; None if they do not fit to the others."""
        if seed not in self.stills:
            whole = (self.request.stop - self.request.first, *shape[1:])
            self.stills[seed] = torch.empty(whole, dtype=torch.uint8, pin_memory=self.pin)
        found = self.stills[seed]
        if tuple(found.shape[1:]) != tuple(shape[1:]):
            self.error = _several(self.request, tuple(found.shape[1:-1]), tuple(shape[1:-1]))
            return None
        return found[self.filled : self.filled + shape[0]]

    def result(self) -> ViewBatch:
        seeds = self.request.seeds if self.filled and not self.error else ()
        return ViewBatch(
            self.request,
            np.concatenate([np.zeros(0, np.int64), *self.rows]),
            {seed: self.stills[seed][: self.filled] for seed in seeds},
            {s: np.concatenate([checks[i] for checks in self.checks]) for i, s in enumerate(seeds)},
            self.bad,
            self.error,
        )


def _several(request: ReadRequest, one: tuple[int, ...], other: tuple[int, ...]) -> str:
    first, second = sorted((one, other))
    if first[:-2] != second[:-2]:
        return (
            f"frame sampling gave {first[0]} and {second[0]} stills for two samples; expected as "
            "many for each"
        )
    return (
        f"views of samples {request.first} to {request.stop - 1} differ in size ({first[-2:]} and "
        f"{second[-2:]}); choose --policy random-resized-crop-flip or resize-center-crop"
    )
