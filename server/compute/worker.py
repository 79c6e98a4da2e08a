"""The compute worker: the one process of a server that computes and writes shards.

It takes what waits in the queue and labels it as ``sskt cache-teachers`` does, to the same bytes.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import signal
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from sskt.server.compute.queue import Entry, Queue
from sskt.server.compute.supervisor import end_with_parent, parent_is_alive
from sskt.server.http.logs import set_up
from sskt.server.metrics.metrics import Metrics
from sskt.server.settings import Settings
from sskt.teacher_cache.errors import BadImage, DiskFull, MissingData, SsktError
from sskt.teacher_cache.label_sets.create import Documents, open_for_writing, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.labeling.run import SourceLabels, StageOptions, label_units
from sskt.teacher_cache.labeling.units import MEMORY, Unit, seeds_together
from sskt.teacher_cache.sources.source import Source, usable_device
from sskt.teacher_cache.storage.locks import Locks
from sskt.teacher_cache.storage.open import open_cache
from sskt.teacher_cache.tools.reopen import Reopen, reopen
from sskt.teacher_cache.views.views import Views

POLL_SECONDS = 0.1
"""Pause between looks at an empty queue, or at a shard that another process is labelling."""

SEEDS_TOGETHER = 8
"""Seeds of a block in one pass at most: their files are decoded once, but the first shard is
stored only with the last."""

OPEN_SETS = 2
"""Label sets whose target and source are kept open."""

IDLE_SECONDS = 600.0
"""After so long without work they are closed, and the accelerator's memory is given back."""

MESSAGE_LENGTH = 1000

_log = logging.getLogger("sskt.server")


def run_compute_worker(settings: Settings) -> None:
    """Computes the shards of the queue until it is ended; the main function of a process.

    It ends with its parent. SIGTERM ends it at once: the store holds whole shards only, and what
    was being computed goes back into the queue when the next compute worker starts. The exit
    status is 1 if the device or the cache cannot be used.
    """
    end_with_parent()
    set_up(settings.log)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends us
    if sys.platform == "linux":  # a spawned process would spawn its loader's: seconds a shard
        multiprocessing.set_start_method("fork", force=True)
    try:
        worker = ComputeWorker(settings)
    except SsktError as error:
        _log.error("nothing can be computed: %s", error)
        sys.exit(1)
    with closing(Locks(worker.queue.folder / "worker")) as only:
        only.acquire(0, wait=True)  # a former one may still be dying
        worker.recover()
        while parent_is_alive():
            if not worker.step():
                time.sleep(POLL_SECONDS)


@dataclass
class _Opened:
    views: Views
    source: Source
    used: float


class ComputeWorker:
    """What the compute worker has open. Raises ``InputError`` if device or cache cannot be used."""

    def __init__(self, settings: Settings) -> None:
        self.home = open_cache(settings.cache)
        self.queue = Queue(Path(settings.run) / "queue", settings.queue)
        self.metrics = Metrics(Path(settings.run))
        self._device = usable_device(settings.device)
        self._reopen = Reopen(
            root=Path(settings.root) if settings.root else None,
            sources=settings.sources,
            weights=Path(settings.weights) if settings.weights else None,
            allow_outside_root=settings.allow_outside_root,
            frame_sampling=settings.frame_sampling,
            policy=settings.policy,
            device=str(self._device),
        )
        self._opened: dict[str, _Opened] = {}
        self._waiting = -1

    def recover(self) -> None:
        """Takes over from a compute worker that died."""
        for entry in self.queue.recover():
            _log.error("%s, seed %d, block %d: given up", entry.set, entry.seed, entry.block)

    def step(self) -> bool:
        """Computes the first waiting shard, and those that share its pass over the samples.

        False if there was nothing to do, or another process is computing it. Every error becomes
        the failure of the entries.
        """
        group = self.queue.take()
        self._tell_waiting()
        if not group:
            self._close_idle()
            return False
        begin = time.monotonic()
        try:
            worked = self._compute(group)
        except Exception as error:  # the user's network may raise anything; the worker goes on
            self._fail(group, error, time.monotonic() - begin)
            return True
        if worked:
            seconds = (time.monotonic() - begin) / worked
            self.queue.timed(seconds)
            for _ in range(worked):
                self.metrics.computed(seconds, True)
        self._tell_waiting()
        return self.queue.get(group[0].set, group[0].seed, group[0].block) is None

    def _compute(self, group: list[Entry]) -> int:
        """Returns how many shards were computed; adds to ``group`` the entries that it took."""
        first = group[0]
        label_set = open_label_set(self.home.below(first.set))
        if first.block >= label_set.blocks:
            raise MissingData(f"label set {first.set} was made anew, with other shards")
        if label_set.has(label_set.shard(first.seed, first.block), fresh=True):
            self.queue.done(first)
            return 0
        try:
            opened = self._open(label_set)
        except Exception:  # raised again: whatever it is, it concerns all shards of the set
            group += self.queue.take(lambda e: e.set == first.set, self.queue.limit)
            raise
        made = label_set.attributes["made"].get("batch_size")
        batch = opened.source.batch or made or StageOptions().batch_size
        if not first.deaths:  # what may kill the process is computed alone
            group += self.queue.take(
                lambda e: (e.set, e.block, e.deaths) == (first.set, first.block, 0),
                self._most(label_set, opened.views, batch) - 1,
            )
        return self._label(group, opened, batch)

    def _most(self, label_set: LabelSet, views: Views, batch: int) -> int:
        """How many seeds are labelled in one pass."""
        label = label_set.encoding.bytes_per_label(label_set.width)
        return seeds_together(views, label_set.shard_rows, label, SEEDS_TOGETHER, batch, MEMORY)

    def _label(self, group: list[Entry], opened: _Opened, batch: int) -> int:
        name, seeds = group[0].set, 1 + max(entry.seed for entry in group)
        with closing(open_for_writing(self.home, name, _removed(name), seeds)) as label_set:
            shards = [label_set.shard(entry.seed, entry.block) for entry in group]
            written = 0
            if _any_free(label_set, shards):
                unit = Unit(label_set.shard_rows, tuple(shards))
                options = StageOptions(batch_size=batch)
                pairs = [SourceLabels(opened.source, label_set)]
                report = label_units(opened.views, pairs, [unit], options, wait=False)
                written = report.written
            for entry, shard in zip(group, shards, strict=True):
                if label_set.has(shard, fresh=True):
                    self.queue.done(entry)
                else:
                    self.queue.put_back(entry, "another process is labelling it")
        opened.used = time.monotonic()
        return -(-written // (shards[0].stop - shards[0].start))

    def _open(self, label_set: LabelSet) -> _Opened:
        """The target and the source of a set; the ones used longest ago are closed."""
        opened = self._opened.pop(label_set.digest, None)
        if opened is None:
            while len(self._opened) >= OPEN_SETS:
                self._close(next(iter(self._opened)))
            opened = _Opened(*reopen(label_set, self._reopen), time.monotonic())
        self._opened[label_set.digest] = opened
        return opened

    def _close(self, digest: str) -> None:
        del self._opened[digest]
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _close_idle(self) -> None:
        now = time.monotonic()
        for digest in [d for d, o in self._opened.items() if now - o.used > IDLE_SECONDS]:
            self._close(digest)

    def _fail(self, group: list[Entry], error: Exception, seconds: float) -> None:
        kind, message = type(error).__name__, _one_line(error)
        first = group[0]
        what = f"{first.set}, seed {first.seed}, block {first.block}"
        known = isinstance(error, SsktError)
        _log.error("computing %s: %s", what, message, exc_info=None if known else error)
        for entry in group:
            self.queue.fail(entry, kind, message)
            self.metrics.computed(seconds / len(group), False)
        self.metrics.error("on demand", f"{what}: {message}", "")
        self._tell_waiting()
        if not isinstance(error, BadImage | DiskFull):  # what is open may be what is wrong
            for digest in list(self._opened):
                self._close(digest)
        if not known:
            self._require_sound_device()

    def _require_sound_device(self) -> None:
        """Ends the process if the device fails: some faults last as long as the process."""
        try:
            torch.ones(1, device=self._device).sum().item()
        except RuntimeError as error:
            _log.error("the device no longer works; the compute worker ends: %s", _one_line(error))
            sys.exit(1)

    def _tell_waiting(self) -> None:
        waiting = self.queue.waiting()
        if waiting != self._waiting:
            self.metrics.waiting(waiting)
            self._waiting = waiting


def _any_free(label_set: WritableLabelSet, shards: list[Shard]) -> bool:
    """Whether a shard is neither stored nor locked by another process."""
    for shard in shards:
        if label_set.acquire(shard):
            label_set.release(shard)
            return True
    return False


def _removed(name: str) -> Documents:
    def documents(rows: int | None, seeds: int | None) -> NoReturn:
        raise MissingData(f"label set {name} was removed")

    return documents


def _one_line(error: BaseException) -> str:
    """An error as one line, for clients who do not see the log."""
    text = " ".join(str(error).split())
    if not isinstance(error, SsktError):
        text = f"unexpected {type(error).__name__}: {text}".removesuffix(": ")
    if isinstance(error, BadImage):
        text += "; to leave such samples out, run sskt cache-teachers with --on-error skip"
    return text[:MESSAGE_LENGTH]
