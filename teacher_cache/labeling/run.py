"""The teacher stage: every source labels every missing view, once.

Work is cut into units of whole shards (``units.py``). Within a shard the forward batches are
fixed by (shard, batch size), so the stored bytes do not depend on workers, memory, order, other
processes or interruptions. A sample is decoded once for all seeds of a unit, and a view is made
once for all sources.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.errors import BadImage, CorruptStore, InputError
from sskt.teacher_cache.format.encodings import Encoded, Encoding, measured_error
from sskt.teacher_cache.format.spec import label_set_spec
from sskt.teacher_cache.label_sets.create import SHARD_ROWS, create_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.labeling.loader import Batch, Order, batches, naming_killed_workers
from sskt.teacher_cache.labeling.units import MEMORY, Share, Unit, units
from sskt.teacher_cache.labeling.writer import Writer
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.views.views import Views

ERROR_ROWS = 512
"""Rows on which a set's encoding error is measured (the first ones of seed 0)."""

POLL_SECONDS = 0.1
"""Pause between looks at shards that another process is labelling."""


@dataclass(frozen=True)
class StageOptions:
    """How to run, as opposed to what to compute. ``batch_size`` counts samples a forward.

    memory: GiB for labels and views not yet stored. share: only this part of the run; without
    one, processes on the same folder divide the work by locks.
    """

    batch_size: int = 64
    workers: int | None = None
    on_error: str = "fail"
    shard_rows: int = SHARD_ROWS
    memory: float = MEMORY
    share: Share | None = None
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


def open_sets(
    views: Views,
    sources: Sequence[Source],
    encoding: Encoding,
    seeds: int,
    cache: CacheName,
    options: StageOptions,
) -> list[LabelSet]:
    """The label sets of this run, created where new.

    Raises ``InputError`` for sources that cannot be labelled together.
    """
    if not sources:
        raise InputError("name at least one --source")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"each --source needs a name of its own, found {', '.join(names)}")
    for source in sources:
        _require_fixed_batches(source, options)
    sets: list[LabelSet] = []
    try:
        for source in sources:
            made = options.made.get(source.name, {})
            spec = label_set_spec(views, source, encoding)
            rows = options.shard_rows
            sets.append(
                create_label_set(cache, spec, source.classes, seeds, shard_rows=rows, made=made)
            )
    except BaseException:
        close_sets(sets)
        raise
    return sets


def close_sets(sets: Sequence[LabelSet]) -> None:
    """Gives back all claims."""
    for label_set in sets:
        label_set.close()


def _require_fixed_batches(source: Source, options: StageOptions) -> None:
    if source.batch is None:
        return
    if options.batch_size != source.batch or options.shard_rows % source.batch:
        raise InputError(
            f"source {source.name} uses BatchNorm over batches of {source.batch}: --batch-size "
            f"must be {source.batch} (found {options.batch_size}) and --shard-rows a multiple of "
            f"it (found {options.shard_rows})"
        )
    if options.on_error == "skip":
        raise InputError("--batchnorm batch needs whole batches: it cannot go with --on-error skip")


def cache_teachers(
    views: Views,
    sources: Sequence[Source],
    encoding: Encoding,
    seeds: int,
    cache: CacheName,
    options: StageOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> StageReport:
    """Labels what is missing of seeds ``0 .. seeds - 1`` and returns when it is stored.

    Safe to stop anywhere and to run in several processes at once. Without a share it waits until
    the whole run is stored. Raises ``BadImage`` for an unreadable sample (or skips it with
    ``on_error="skip"``: its rows stay empty and are passed over in training), ``DiskFull``,
    ``TeacherMoved``.
    """
    options = options or StageOptions()
    begin = time.monotonic()
    sets = open_sets(views, sources, encoding, seeds, cache, options)
    try:
        share = options.share or Share()
        todo = units(views, sets, seeds, options.batch_size, options.memory, share.world)
        todo = todo[share.rank :: share.world]
        wait = options.share is None
        return label_units(views, sources, sets, todo, options, progress, begin=begin, wait=wait)
    finally:
        close_sets(sets)


def label_units(
    views: Views,
    sources: Sequence[Source],
    sets: Sequence[LabelSet],
    todo: Sequence[Unit],
    options: StageOptions,
    progress: Progress = lambda done, total: None,
    *,
    begin: float | None = None,
    wait: bool = True,
) -> StageReport:
    """Labels what is missing of some units; ``wait``: also for what others have claimed."""
    begin = time.monotonic() if begin is None else begin
    for label_set in sets:
        label_set.missing(())
    wanted, missing = count_labels(sets, todo)
    run = _Run(views, sources, sets, todo, options, _Counter(progress, missing))
    if missing:
        run.finish(wait)
    names = [views.target.ids[row] for row in sorted(run.skipped)]
    seconds = time.monotonic() - begin
    return StageReport(list(sets), run.count.done, wanted - missing, names, seconds)


def count_labels(
    sets: Sequence[LabelSet], todo: Sequence[Unit], *, fresh: bool = False
) -> tuple[int, int]:
    """Labels of some units, and how many of them are missing (``fresh``: not from a listing)."""
    wanted = missing = 0
    for unit in todo:
        for label_set in (s for s in sets if s.shard_rows == unit.rows):
            for shard in unit.shards:
                rows = shard.stop - shard.start
                wanted += rows
                missing += 0 if label_set.has(shard, fresh=fresh) else rows
    return wanted, missing


class _Counter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self.total, self.done = progress, total, 0

    def add(self, labels: int) -> None:
        self.done += labels
        self._progress(self.done, max(self.total, self.done))


@dataclass
class _Pending:
    """A shard being filled, by the writer thread only."""

    label_set: LabelSet
    source: Source
    shard: Shard
    encoded: Encoded
    checks: NDArray[np.uint32]
    sample: list[NDArray[np.float32]] = field(default_factory=list)

    def put(self, rows: NDArray[np.int64], log_p: Tensor, checks: NDArray[np.uint32]) -> None:
        values = log_p.cpu().numpy()
        self.source.require_finite(values)
        local = rows - self.shard.start
        for key, encoded in self.label_set.encoding.encode(values).items():
            self.encoded[key][local] = encoded
        self.checks[local] = checks
        if self.shard.seed == self.shard.block == 0 and sum(map(len, self.sample)) < ERROR_ROWS:
            self.sample.append(values)

    def store(self) -> None:
        if self.sample:
            rows = np.concatenate(self.sample)[:ERROR_ROWS]
            self.label_set.record("error", measured_error(self.label_set.encoding, rows))
        self.label_set.write(self.shard, self.encoded, self.checks)
        if not self.label_set.has(self.shard):
            raise CorruptStore(f"label set {self.label_set.name}: a shard vanished on writing")
        self.label_set.release(self.shard)


@dataclass
class _Run:
    """One run over units: claims, reads, runs the sources, hands over to the writer thread."""

    views: Views
    sources: Sequence[Source]
    sets: Sequence[LabelSet]
    todo: Sequence[Unit]
    options: StageOptions
    count: _Counter
    skipped: dict[int, str] = field(default_factory=dict)
    pending: dict[int, dict[tuple[int, int], _Pending]] = field(default_factory=dict)

    def finish(self, wait: bool) -> None:
        """Labels until nothing is missing, or (without ``wait``) until nothing is free."""
        device = self.sources[0].device
        feed = batches(self.views, self.claimed, self.options.workers, device)
        stream = feed()  # starts the workers: processes are forked before there is a thread
        writer = Writer()
        with contextlib.closing(writer), naming_killed_workers():
            while True:
                worked = False
                for batch in stream:
                    worked = True
                    self._label(batch, writer)
                if not wait or not self._missing():
                    break
                if not worked:
                    writer.check()
                    time.sleep(POLL_SECONDS)
                stream = feed()

    def _missing(self) -> bool:
        for label_set in self.sets:
            label_set.missing(())
        return count_labels(self.sets, self.todo)[1] > 0

    def claimed(self) -> Any:
        """Orders of the units that nobody is at, claimed when the loader comes to them."""
        for number, unit in enumerate(self.todo):
            claims = {
                (shard.seed, i): shard
                for shard in unit.shards
                for i, label_set in enumerate(self.sets)
                if label_set.shard_rows == unit.rows and label_set.claim(shard)
            }
            if not claims:
                continue
            self.pending[number] = {
                key: self._empty(key[1], shard) for key, shard in claims.items()
            }
            seeds = sorted({seed for seed, _ in claims})
            first, size = unit.shards[0], self.options.batch_size
            for start in range(first.start, first.stop, size):
                stop = min(start + size, first.stop)
                yield Order(number, start, stop, self._context(start, stop), tuple(seeds))

    def _context(self, start: int, stop: int) -> int:
        """First sample to read: before ``start`` where BatchNorm needs a whole batch."""
        whole = max((source.batch or 0 for source in self.sources), default=0)
        return max(0, min(start, stop - whole))

    def _empty(self, i: int, shard: Shard) -> _Pending:
        label_set, rows = self.sets[i], shard.stop - shard.start
        empty = label_set.encoding.empty(rows, len(label_set.classes))
        return _Pending(label_set, self.sources[i], shard, empty, np.zeros(rows, np.uint32))

    def _label(self, batch: Batch, writer: Writer) -> None:
        order, pending = batch.order, self.pending[batch.order.unit]
        if batch.error:
            raise InputError(batch.error)
        for row, message in batch.bad:
            if self.options.on_error != "skip":
                raise BadImage(message)
            self.skipped[row] = message
        own = batch.rows >= order.start
        for seed, stills in batch.stills.items():
            for i, source in enumerate(self.sources):
                work = pending.get((seed, i))
                if work is None or not own.any():
                    continue
                seen = stills if source.batch is not None or own.all() else stills[own]
                log_p = source.forward(seen)
                log_p = log_p[own] if len(log_p) > own.sum() else log_p
                rows, checks = batch.rows[own], batch.checks[seed][own]
                writer.put(functools.partial(work.put, rows, log_p, checks))
                self.count.add(len(rows))
        if order.stop == next(iter(pending.values())).shard.stop:
            for source in self.sources:
                source.check_frozen()
            for work in self.pending.pop(order.unit).values():
                writer.put(work.store)
