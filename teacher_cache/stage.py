"""The teacher stage: every source labels every missing view, once.

Work is cut into shards. Within a shard the forward batches are fixed by (shard, batch size), so
the stored bytes do not depend on workers, order, other processes or interruptions. A sample is
decoded once for all seeds of a group, and a view is made once for all sources.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sskt.teacher_cache.encodings import Encoded, Encoding, measured_error
from sskt.teacher_cache.errors import BadImage, CorruptStore, InputError, MissingData
from sskt.teacher_cache.images import UInt8
from sskt.teacher_cache.sources import Source
from sskt.teacher_cache.spec import label_set_spec
from sskt.teacher_cache.store import SHARD_ROWS, LabelSet, Shard, create_label_set
from sskt.teacher_cache.views import Views, checks_of

ERROR_ROWS = 512
"""Rows on which a set's encoding error is measured (the first ones of seed 0)."""

GROUP_BYTES = 2 * 2**30
MOST_SEEDS = 4
"""Most memory for the labels of seeds that share one decoding pass, and most of such seeds: what
a kill can lose, and what loader workers hold in shared memory, grows with them."""

POLL_SECONDS = 0.1
"""Pause between looks at shards that another process is labelling."""


@dataclass(frozen=True)
class StageOptions:
    """How to run, as opposed to what to compute. ``batch_size`` counts views a forward."""

    batch_size: int = 64
    workers: int | None = None
    on_error: str = "fail"
    shard_rows: int = SHARD_ROWS
    made: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageReport:
    """What a run did: labels per source written, found already there, samples skipped."""

    label_sets: list[LabelSet]
    written: int
    reused: int
    skipped: list[str]
    seconds: float


Progress = Callable[[int, int], None]
"""Called with (labels of one source done so far in this run, labels to do)."""


@dataclass(frozen=True)
class _Chunk:
    """Decoded and augmented samples: views by seed, and the samples that could not be read."""

    rows: NDArray[np.int64]
    views: dict[int, Tensor]
    checks: dict[int, NDArray[np.uint32]]
    bad: list[tuple[int, str]]
    error: str = ""

    def pin_memory(self) -> _Chunk:
        """Called by the loader for copies to a GPU that do not wait."""
        return replace(self, views={seed: v.pin_memory() for seed, v in self.views.items()})


class _Chunks(Dataset[_Chunk]):
    """Chunk i = samples ``start + i * size`` ... of a block, seen under each seed."""

    def __init__(self, views: Views, shard: Shard, seeds: Sequence[int], size: int) -> None:
        self._views, self._shard, self._seeds, self._size = views, shard, seeds, size

    def __len__(self) -> int:
        return -(-(self._shard.stop - self._shard.start) // self._size)

    def __getitem__(self, index: int) -> _Chunk:
        start = self._shard.start + index * self._size
        rows = np.arange(start, min(start + self._size, self._shard.stop))
        target = self._views.target
        images: list[UInt8] | UInt8
        bad: list[tuple[int, str]] = []
        if target.images is not None:
            images = target.images[rows]
        else:
            try:
                images, rows, bad = target.read_all(rows)
            except MissingData as error:
                return _Chunk(rows, {}, {}, [], str(error))
        views: dict[int, Tensor] = {}
        checks: dict[int, NDArray[np.uint32]] = {}
        for seed in self._seeds if len(rows) else ():
            try:
                seen = self._views.of_images(images, rows, seed)
            except InputError as error:
                return _Chunk(rows, {}, {}, bad, str(error))
            views[seed], checks[seed] = torch.from_numpy(seen), checks_of(seen)
        return _Chunk(rows, views, checks, bad)


class _Writer:
    """Encodes nothing, computes nothing: stores shards in a thread, so the accelerator goes on."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=4)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sskt-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:
                    self._error = error

    def put(self, job: Callable[[], None]) -> None:
        """Queues a job; waits while the queue is full. Raises what an earlier job raised."""
        self.check()
        self._queue.put(job)

    def close(self) -> None:
        """Finishes what is queued. Raises what a job raised."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raises what a job raised."""
        if self._error is not None:
            raise self._error


def open_sets(
    views: Views,
    sources: Sequence[Source],
    encoding: Encoding,
    seeds: int,
    cache: Path,
    options: StageOptions,
) -> list[LabelSet]:
    """The label sets of this run, created where new."""
    if not sources:
        raise InputError("name at least one --source")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"each --source needs a name of its own, found {', '.join(names)}")
    return [
        create_label_set(
            cache,
            label_set_spec(views.target, source, views.policy, encoding),
            source.classes,
            seeds,
            shard_rows=options.shard_rows,
            made=options.made.get(source.name, {}),
        )
        for source in sources
    ]


def cache_teachers(
    views: Views,
    sources: Sequence[Source],
    encoding: Encoding,
    seeds: int,
    cache: Path,
    options: StageOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> StageReport:
    """Labels what is missing of seeds ``0 .. seeds - 1`` and returns when all is stored.

    Safe to stop anywhere and to run in several processes at once. Raises ``BadImage`` for an
    unreadable sample (or skips it with ``on_error="skip"``: its rows stay empty and are passed
    over in training), ``DiskFull``, ``TeacherMoved``.
    """
    options = options or StageOptions()
    begin = time.monotonic()
    sets = open_sets(views, sources, encoding, seeds, cache, options)
    count = _Counter(progress, sum(_rows(s.missing(range(seeds))) for s in sets))
    found = sum(s.samples * seeds for s in sets) - count.total
    skipped: dict[int, str] = {}
    writer = _Writer()
    try:
        while True:
            worked = False
            for shards in _groups(views, sets, seeds):
                claimed = {
                    shard: [i for i, s in enumerate(sets) if _mine(s, shard)] for shard in shards
                }
                claimed = {shard: who for shard, who in claimed.items() if who}
                if claimed:
                    worked = True
                    _label(views, sources, sets, claimed, options, writer, count, skipped)
            if not any(s.missing(range(seeds)) for s in sets):
                break
            if not worked:
                writer.check()
                time.sleep(POLL_SECONDS)
    finally:
        try:
            writer.close()
        finally:
            for label_set in sets:
                label_set.close()
    seconds = time.monotonic() - begin
    names = [views.target.ids[row] for row in sorted(skipped)]
    return StageReport(sets, count.done, found, names, seconds)


def _rows(shards: list[Shard]) -> int:
    return sum(shard.stop - shard.start for shard in shards)


class _Counter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self.total, self.done = progress, total, 0

    def add(self, labels: int) -> None:
        self.done += labels
        self._progress(self.done, max(self.total, self.done))


def _mine(label_set: LabelSet, shard: Shard) -> bool:
    inside = shard.stop <= label_set.samples and label_set.shard(shard.seed, shard.block) == shard
    return inside and label_set.claim(shard)


def _groups(views: Views, sets: Sequence[LabelSet], seeds: int) -> Iterator[list[Shard]]:
    """Missing shards: one at a time from RAM; from files, those of a block share a decoding."""
    for rows in sorted({s.rows for s in sets}):
        alike = [s for s in sets if s.rows == rows]
        row_bytes = sum(s.encoding.bytes_per_label(len(s.classes)) for s in alike)
        together = 1
        if views.target.images is None:
            together = max(1, min(GROUP_BYTES // (rows * row_bytes), MOST_SEEDS))
        for block in range(alike[0].blocks):
            shards = [alike[0].shard(seed, block) for seed in range(seeds)]
            wanted = [shard for shard in shards if not all(s.has(shard) for s in alike)]
            for i in range(0, len(wanted), together):
                yield wanted[i : i + together]


@dataclass
class _Pending:
    """A shard being filled."""

    label_set: LabelSet
    shard: Shard
    encoded: Encoded
    checks: NDArray[np.uint32]
    sample: list[NDArray[np.float32]] = field(default_factory=list)

    def put(
        self, rows: NDArray[np.int64], log_p: NDArray[np.float32], checks: NDArray[np.uint32]
    ) -> None:
        local = rows - self.shard.start
        for key, values in self.label_set.encoding.encode(log_p).items():
            self.encoded[key][local] = values
        self.checks[local] = checks
        if self.shard.seed == self.shard.block == 0 and sum(map(len, self.sample)) < ERROR_ROWS:
            self.sample.append(log_p)

    def store(self) -> None:
        if self.sample:
            rows = np.concatenate(self.sample)[:ERROR_ROWS]
            self.label_set.record("error", measured_error(self.label_set.encoding, rows))
        self.label_set.write(self.shard, self.encoded, self.checks)
        if not self.label_set.has(self.shard):
            raise CorruptStore(f"label set {self.label_set.name}: a shard vanished on writing")
        self.label_set.release(self.shard)


def _label(
    views: Views,
    sources: Sequence[Source],
    sets: Sequence[LabelSet],
    claimed: dict[Shard, list[int]],
    options: StageOptions,
    writer: _Writer,
    count: _Counter,
    skipped: dict[int, str],
) -> None:
    pending: dict[tuple[int, int], _Pending] = {}
    for shard, who in claimed.items():
        for i in who:
            rows = shard.stop - shard.start
            empty = sets[i].encoding.empty(rows, len(sets[i].classes))
            checks = np.zeros(rows, np.uint32)
            pending[shard.seed, i] = _Pending(sets[i], shard, empty, checks)
    first = next(iter(claimed))
    chunks = _Chunks(views, first, [shard.seed for shard in claimed], options.batch_size)
    for chunk in _load(chunks, views, options, sources[0].device):
        if chunk.error:
            raise InputError(chunk.error)
        for row, message in chunk.bad:
            if options.on_error != "skip":
                raise BadImage(message)
            skipped[row] = message
        for seed, pictures in chunk.views.items():
            for i, source in enumerate(sources):
                if (seed, i) in pending:
                    log_p = source.log_probabilities(pictures).cpu().numpy()
                    pending[seed, i].put(chunk.rows, log_p, chunk.checks[seed])
                    count.add(len(chunk.rows))
    for source in sources:
        source.check_frozen()
    for work in pending.values():
        writer.put(work.store)


def _load(
    chunks: _Chunks, views: Views, options: StageOptions, device: torch.device
) -> Iterator[_Chunk]:
    workers = options.workers
    if workers is None:
        workers = 0 if views.target.images is not None else min(8, os.cpu_count() or 1)
    pin = device.type == "cuda"
    workers = min(workers, len(chunks))
    with warnings.catch_warnings():  # more workers than cores are the user's choice
        warnings.filterwarnings("ignore", "This DataLoader will create")
        return iter(DataLoader(chunks, batch_size=None, num_workers=workers, pin_memory=pin))
