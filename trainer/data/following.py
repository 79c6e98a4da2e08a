"""Waiting for labels that are still being written."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sskt.teacher_cache.errors import IncompleteLabels, InputError
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.storage.base import SWEEP
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.locks import Locks

POLL_SECONDS, REMOTE_POLL_SECONDS = 0.5, 5.0
"""Seconds between two looks at the missing shards: of a folder, and of a server or bucket."""

_WRITER = {
    True: "a process is writing it",
    False: "no process is writing it now",
    None: "its writer cannot be seen from here",
}

Ranges = Sequence[tuple[int, int]]


@dataclass
class Follow:
    """Waits for the labels of a part of an epoch.

    Attributes:
        minutes: How long labels may stay missing without progress while no process is known to
            write the label set.
        note: Called with a sentence when a training begins to wait.
    """

    minutes: float
    note: Callable[[str], None] = lambda sentence: None
    _closed: threading.Event = field(default_factory=threading.Event, repr=False)

    def announce(self, sets: Mapping[str, LabelSet], seed: int, ranges: Ranges) -> None:
        """Says what the training waits for, if anything is missing.

        Args:
            sets: The label sets, by source.
            seed: View seed.
            ranges: Samples that are needed.
        """
        for name, label_set in sets.items():
            needed = _needed(label_set, seed, ranges)
            missing = _missing(label_set, needed)
            if missing:
                stored = sum(label_set.coverage()) / label_set.seeds
                state = _WRITER[_is_written(label_set)]
                self.note(
                    f"waiting for labels of {name} under view seed {seed}: "
                    f"{len(needed) - len(missing)} of {len(needed)} shards are stored, "
                    f"{100 * stored:.0f} % of the label set; {state}"
                )

    def wait(self, sets: Mapping[str, LabelSet], seed: int, ranges: Ranges) -> None:
        """Returns when all labels are stored.

        Args:
            sets: The label sets, by source.
            seed: View seed.
            ranges: Samples that are needed.

        Raises:
            IncompleteLabels: If labels stay missing and no process is known to write them.
            InputError: If the loader was closed meanwhile.
            MissingData: If the folder of a label set is gone.
        """
        for label_set in sets.values():
            needed = _needed(label_set, seed, ranges)
            last, stored = time.monotonic(), -1
            while missing := _missing(label_set, needed):
                done = _stored(label_set)
                if done != stored or _is_written(label_set):
                    last, stored = time.monotonic(), done
                elif time.monotonic() - last > 60 * self.minutes:
                    raise self._gave_up(label_set, missing[0])
                local = label_set.storage.is_local
                if self._closed.wait(POLL_SECONDS if local else REMOTE_POLL_SECONDS):
                    raise InputError("the loader was closed while it waited for labels")

    def close(self) -> None:
        """Ends all waiting."""
        self._closed.set()

    def _gave_up(self, label_set: LabelSet, shard: Shard) -> IncompleteLabels:
        return IncompleteLabels(
            f"label set {label_set.name}: seed {shard.seed} lacks samples {shard.start} to "
            f"{shard.stop - 1}, and nothing was written for {self.minutes:g} minutes (--follow); "
            "run the same sskt cache-teachers again, then this training with --resume"
        )


def _needed(label_set: LabelSet, seed: int, ranges: Ranges) -> list[Shard]:
    rows = label_set.shard_rows
    blocks = {block for a, b in ranges for block in range(a // rows, -(-b // rows))}
    return [label_set.shard(seed, block) for block in sorted(blocks)]


def _missing(label_set: LabelSet, needed: Sequence[Shard]) -> list[Shard]:
    missing = [shard for shard in needed if not label_set.has(shard)]
    if missing:
        label_set.refresh()
        missing = [shard for shard in missing if not label_set.has(shard)]
    return missing


def _stored(label_set: LabelSet) -> int:
    """How many shards are stored: a writer may be at another seed."""
    return sum(label_set.has(shard) for shard in label_set.shards(range(label_set.seeds)))


def _is_written(label_set: LabelSet) -> bool | None:
    """Whether a process has the label set open for writing; None if that cannot be found out."""
    storage = label_set.storage
    if not isinstance(storage, LocalStorage):
        return None
    home = LocalStorage(storage.path.parent)
    lock = home.lock_path(storage.name)
    if Locks.open_here(lock):
        return True
    if not lock.exists():
        return False
    try:
        with contextlib.closing(home.locks(storage.name)) as locks:
            free = locks.acquire(SWEEP)
            return None if not locks.working else not free
    except InputError:  # a cache that this user may only read
        return None
