"""The teacher stage: every source labels every missing view, once.

Work is cut into units of whole shards (``units.py``). Within a shard the forward batches are
fixed by (shard, batch size), so the stored bytes do not depend on workers, memory, order, other
processes or interruptions. A sample is decoded once for all seeds of a unit, and a view is made
once for all sources.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.errors import BadImage, CorruptStore, InputError
from sskt.teacher_cache.format.encodings import ERROR_ROWS, Encoded, Encoding, measured_error
from sskt.teacher_cache.format.spec import label_set_spec
from sskt.teacher_cache.label_sets.create import SHARD_ROWS, create_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.labeling.loader import ReadRequest, ViewBatch, ViewReader
from sskt.teacher_cache.labeling.units import MEMORY, Share, Unit, units
from sskt.teacher_cache.labeling.writer import Writer
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.views.loader_processes import reporting_dead_workers
from sskt.teacher_cache.views.views import Views

POLL_SECONDS = 0.1
"""Pause between looks at shards that another process is labelling."""

_log = logging.getLogger("sskt")


@dataclass(frozen=True)
class StageOptions:
    """How the stage runs, as opposed to what it computes.

    Attributes:
        batch_size: Samples of a forward pass.
        workers: Loader processes; None: by the number of cores.
        on_error: ``fail`` at a sample that cannot be read, or ``skip`` it.
        shard_rows: Samples in a shard of a new label set.
        memory: GiB for labels and views that are not stored yet.
        share: The part of the run that this process does; without one, processes on the same
            folder divide the work by locks.
        provenance: Provenance of new label sets by the name of the source.
    """

    batch_size: int = 64
    workers: int | None = None
    on_error: str = "fail"
    shard_rows: int = SHARD_ROWS
    memory: float = MEMORY
    share: Share | None = None
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageReport:
    """What a labelling run did.

    Attributes:
        label_sets: The label sets of the run, one for each source, opened for reading.
        written: Labels that were written, of all sources and seeds.
        reused: Labels that were stored before.
        skipped: Ids of the samples that could not be read, in the order of the target.
        seconds: Duration of the run.
    """

    label_sets: list[LabelSet]
    written: int
    reused: int
    skipped: list[str]
    seconds: float


@dataclass(frozen=True)
class SourceLabels:
    """A source and the label set that its labels go to, open for writing."""

    source: Source
    label_set: WritableLabelSet


Progress = Callable[[int, int], None]
"""Called with (labels of all sources done so far in this run, labels to do)."""


@contextlib.contextmanager
def open_sets(
    views: Views,
    sources: Sequence[Source],
    encoding: Encoding,
    seeds: int,
    cache: CacheName,
    options: StageOptions,
) -> Iterator[list[SourceLabels]]:
    """Opens the label sets of a run for writing, created where they are new; closes them.

    Args:
        views: The target under its policy.
        sources: Frozen sources with different names.
        encoding: Encoding of new labels.
        seeds: Number of view seeds.
        cache: Where the label sets are.
        options: How the stage runs.

    Yields:
        Each source with its label set.

    Raises:
        InputError: If the sources cannot be labelled together.
    """
    if not sources:
        raise InputError("name at least one --source")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"each --source needs a name of its own, found {', '.join(names)}")
    for source in sources:
        _require_fixed_batches(source, options)
    with contextlib.ExitStack() as opened:
        pairs = []
        for source in sources:
            provenance = options.provenance.get(source.name, {})
            spec, rows = label_set_spec(views, source, encoding), options.shard_rows
            label_set = create_label_set(
                cache,
                spec,
                source.classes,
                seeds,
                shard_rows=rows,
                provenance=provenance,
                samples=views.target.ids,
                head=source.head,
            )
            opened.callback(label_set.close)
            pairs.append(SourceLabels(source, label_set))
        yield pairs


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

    It may be stopped anywhere and run in several processes at once. Without a share it waits
    until the whole run is stored.

    Args:
        views: The target under its policy.
        sources: Frozen sources with different names.
        encoding: Encoding of new labels.
        seeds: Number of view seeds.
        cache: Where the label sets are.
        options: How the stage runs.
        progress: Called with labels done and to do.

    Returns:
        What was done.

    Raises:
        BadImage: If a sample cannot be read, unless it is to be skipped: its rows then hold no
            label and are left out of trainings.
        DiskFull: If there is no room.
        TeacherMoved: If a source changes while it labels.
        InputError: If the sources cannot be labelled together.
    """
    options = options or StageOptions()
    begin = time.monotonic()
    with open_sets(views, sources, encoding, seeds, cache, options) as pairs:
        share, sets = options.share or Share(), [pair.label_set for pair in pairs]
        todo = units(views, sets, seeds, options.batch_size, options.memory, share.world)
        todo = todo[share.rank :: share.world]
        wait = options.share is None
        return label_units(views, pairs, todo, options, progress, begin=begin, wait=wait)


def label_units(
    views: Views,
    pairs: Sequence[SourceLabels],
    todo: Sequence[Unit],
    options: StageOptions,
    progress: Progress = lambda done, total: None,
    *,
    begin: float | None = None,
    wait: bool = True,
) -> StageReport:
    """Labels what is missing of some units of work.

    Args:
        views: The target under its policy.
        pairs: The sources with their label sets, open for writing.
        todo: The units.
        options: How the stage runs.
        progress: Called with labels done and to do.
        begin: Time of ``time.monotonic`` at which the run began; default: now.
        wait: Whether to wait for shards that other processes are labelling.

    Returns:
        What was done.

    Raises:
        As ``cache_teachers``.
    """
    begin = time.monotonic() if begin is None else begin
    sets: list[LabelSet] = []
    for label_set in (pair.label_set for pair in pairs):
        sets.append(label_set)
        label_set.refresh()
        shards = [shard for unit in todo if unit.holds(label_set) for shard in unit.shards]
        for what in label_set.discard_unsound(shards):
            _log.warning("%s; the shard is labelled again", what)
    wanted, missing = count_labels(sets, todo)
    run = _Run(views, pairs, todo, options, _Counter(progress, missing))
    if missing:
        run.finish(wait)
    names = [views.target.ids[row] for row in sorted(run.skipped)]
    seconds = time.monotonic() - begin
    return StageReport(sets, run.count.done, wanted - missing, names, seconds)


def count_labels(
    sets: Sequence[LabelSet], todo: Sequence[Unit], *, fresh: bool = False
) -> tuple[int, int]:
    """Counts the labels of some units.

    Args:
        sets: The label sets of the run.
        todo: The units.
        fresh: Whether to ask the storage for each shard, instead of using an earlier listing.

    Returns:
        All labels of the units, and those that are missing.
    """
    wanted = missing = 0
    for unit in todo:
        for label_set in filter(unit.holds, sets):
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


class _Pending:
    """A locked shard of one source that is being filled, by the writer thread only."""

    def __init__(self, pair: SourceLabels, shard: Shard) -> None:
        self.source, self.label_set, self.shard = pair.source, pair.label_set, shard
        rows = shard.stop - shard.start
        self.encoded: Encoded = self.label_set.encoding.empty(rows, self.label_set.width)
        self.checks = np.zeros(rows, np.uint32)
        self.sample: list[NDArray[np.float32]] = []

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
            error = measured_error(self.label_set.encoding, rows, self.source.head)
            self.label_set.add_attribute("error", error)
        self.label_set.write(self.shard, self.encoded, self.checks)
        if not self.label_set.has(self.shard, fresh=True):  # another writer may have stored it
            raise CorruptStore(f"label set {self.label_set.name}: a shard vanished on writing")
        self.label_set.release(self.shard)


@dataclass
class _Run:
    """One run over units: locks shards, reads, runs the sources, hands over to the writer."""

    views: Views
    pairs: Sequence[SourceLabels]
    todo: Sequence[Unit]
    options: StageOptions
    count: _Counter
    skipped: dict[int, str] = field(default_factory=dict)
    pending: dict[int, list[_Pending]] = field(default_factory=dict)

    def finish(self, wait: bool) -> None:
        """Labels until nothing is missing, or (without ``wait``) until nothing is free."""
        reader = ViewReader(self.views, self.options.workers, self.pairs[0].source.device)
        stream = reader.read(self._requests())  # forks its processes before there is a thread
        writer = Writer()
        failed = (
            "all shards stored so far are valid: run the same command again, with fewer --workers "
            "or less --memory"
        )
        closing = contextlib.closing
        with closing(reader), closing(writer), reporting_dead_workers(failed):
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
                stream = reader.read(self._requests())

    def _missing(self) -> bool:
        sets = [pair.label_set for pair in self.pairs]
        for label_set in sets:
            label_set.refresh()
        return count_labels(sets, self.todo)[1] > 0

    def _requests(self) -> Iterator[ReadRequest]:
        """The forward batches of the units, whose missing shards are locked when it is their turn.

        The reader draws them, in this process, when it has nothing else to read.
        """
        for number, unit in enumerate(self.todo):
            locked = [
                _Pending(pair, shard)
                for shard in unit.shards
                for pair in self.pairs
                if unit.holds(pair.label_set) and pair.label_set.acquire(shard)
            ]
            if not locked:
                continue
            self.pending[number] = locked
            seeds = tuple(sorted({work.shard.seed for work in locked}))
            first, size = unit.shards[0], self.options.batch_size
            for start in range(first.start, first.stop, size):
                stop = min(start + size, first.stop)
                yield ReadRequest(number, start, stop, self._context(start, stop), seeds)

    def _context(self, start: int, stop: int) -> int:
        """First sample to read: before ``start`` where BatchNorm needs a whole batch."""
        whole = max((pair.source.batch or 0 for pair in self.pairs), default=0)
        return max(0, min(start, stop - whole))

    def _label(self, batch: ViewBatch, writer: Writer) -> None:
        request, pending = batch.request, self.pending[batch.request.unit]
        if batch.error:
            raise InputError(batch.error)
        for row, message in batch.bad:
            if self.options.on_error != "skip":
                raise BadImage(message)
            self.skipped[row] = message
        own = batch.rows >= request.start
        for work in pending if own.any() else ():
            seed, source = work.shard.seed, work.source
            stills = batch.stills[seed]
            seen = stills if source.batch is not None or own.all() else stills[own]
            log_p = source.forward(seen)
            log_p = log_p[own] if len(log_p) > own.sum() else log_p
            rows, checks = batch.rows[own], batch.checks[seed][own]
            writer.put(functools.partial(work.put, rows, log_p, checks))
            self.count.add(len(rows))
        if request.stop == pending[0].shard.stop:
            for pair in self.pairs:
                writer.put(pair.source.check_frozen)
            for work in self.pending.pop(request.unit):
                writer.put(work.store)
