"""Which shards of each label set are stored, read in the background and kept for some seconds.

A large set has hundreds of thousands of files, and an object store answers slowly: a page shows
what was found last, and waits only a moment for a set that was not read before.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import SsktError
from sskt.teacher_cache.format.metadata import GROUP
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.local import LocalStorage

FRESH_SECONDS = 2.0
"""How long a coverage is kept, at least; one that takes long is kept ``REST`` times as long."""
REST = 20
PATIENCE_SECONDS = 1.0
"""How long a page waits for coverages that were not read before."""

_log = logging.getLogger("sskt.server")


@dataclass(frozen=True)
class Coverage:
    """stored: bool ``[S, B]``, by seed and block. shares: of each seed's samples, ``[S]``.

    bytes: of the metadata and of whole shards.
    """

    stored: NDArray[np.bool_]
    shares: NDArray[np.float64]
    bytes: int

    @property
    def whole(self) -> list[int]:
        """The seeds of which every shard is stored."""
        return np.flatnonzero(self.stored.all(1)).tolist()

    @property
    def share(self) -> float:
        """Of all samples under all seeds."""
        return float(self.shares.mean()) if len(self.shares) else 0.0


def coverage_of(label_set: LabelSet) -> Coverage:
    """Looks at every file of a set. Raises ``SsktError`` if its storage cannot be reached."""
    size = _sizes(label_set)
    stored = np.zeros((label_set.seeds, label_set.blocks), bool)
    documents = [GROUP, *(f"{a}/{GROUP}" for a in label_set.arrays), *label_set.constant_keys()]
    total = sum(size(key) or 0 for key in documents)
    for shard in label_set.shards(range(label_set.seeds)):
        if size(label_set.commit_key(shard)) is None:
            continue
        stored[shard.seed, shard.block] = True
        total += sum(size(key) or 0 for key in label_set.shard_keys(shard))
    counts = np.full(label_set.blocks, label_set.shard_rows)
    counts[-1:] = label_set.samples - (label_set.blocks - 1) * label_set.shard_rows
    return Coverage(stored, stored @ counts / max(1, label_set.samples), total)


def _sizes(label_set: LabelSet) -> Callable[[str], int | None]:
    storage = label_set.storage
    if not isinstance(storage, LocalStorage):
        storage.refresh()
        return storage.sizes().get
    folder = str(storage.path)

    def size(key: str) -> int | None:
        # A set may have 100,000 shards: Path takes three times as long.
        try:
            return os.stat(f"{folder}/{key}").st_size  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return 0  # links that form a loop are damage, not a missing file

    return size


@dataclass
class _Kept:
    found: Coverage | str | None = None
    until: float = 0.0
    running: Future[None] | None = None


@dataclass
class CoverageCache:
    """The coverages of one worker process. ``clock``: seconds."""

    clock: Callable[[], float] = time.monotonic
    patience: float = PATIENCE_SECONDS
    _kept: dict[tuple[str, int], _Kept] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "sskt-coverage")
    )

    def of(self, sets: Iterable[LabelSet]) -> list[Coverage | str | None]:
        """By label set: its coverage, the reason why it has none, or None until it is read."""
        kept = [self._asked(label_set) for label_set in sets]
        first = [k.running for k in kept if k.found is None and k.running]
        wait(first, self.patience)
        return [k.found for k in kept]

    def settle(self) -> None:
        """Waits until nothing is being read."""
        with self._guard:
            running = [kept.running for kept in self._kept.values() if kept.running]
        wait(running)

    def _asked(self, label_set: LabelSet) -> _Kept:
        key = (label_set.name, label_set.seeds)
        with self._guard:
            kept = self._kept.setdefault(key, _Kept())
            if self.clock() >= kept.until and kept.running is None:
                kept.running = self._pool.submit(self._look, label_set, kept)
            return kept

    def _look(self, label_set: LabelSet, kept: _Kept) -> None:
        begun = self.clock()
        found: Coverage | str = "cannot be read; the server's log has the cause"
        try:
            found = coverage_of(label_set)
        except (SsktError, OSError) as error:
            found = str(error)
        except Exception:  # nothing takes it from the thread: it is logged, and the page shows it
            _log.exception("coverage of %s", label_set.name)
        with self._guard:
            kept.found, kept.running = found, None
            kept.until = self.clock() + max(FRESH_SECONDS, REST * (self.clock() - begun))
