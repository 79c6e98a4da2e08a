"""Counts of the last minute, shared by a server's processes: no thread, no lock between them.

Each process maps one small file, ``PID.ring``: 64 slots of a second each, with what it counted in
that second. Whoever wants the minute adds up the files of all.
"""

from __future__ import annotations

import bisect
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SECONDS = 60
SLOTS = 64
COUNTS = ("requests", "labels", "bytes", "hits", "misses")


@dataclass(frozen=True)
class LastMinute:
    """What all processes counted. buckets: requests by latency, one more than there are bounds.

    seconds: how long was counted: 60, or since the start. uptime: seconds since the first start.
    """

    seconds: float
    uptime: float
    requests: int
    labels: int
    bytes: int
    hits: int
    misses: int
    buckets: tuple[int, ...]


class Minute:
    """``bounds``: upper bounds of the latency buckets in seconds, rising.

    ``clock``: seconds that all processes of this machine agree on.
    """

    def __init__(
        self, folder: Path, bounds: Sequence[float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._bounds, self._clock = folder, tuple(bounds), clock
        self._width = 1 + len(COUNTS) + len(bounds) + 1
        size = 8 * self._width * (SLOTS + 1)
        with (folder / f"{os.getpid()}.ring").open("a+b") as file:
            file.truncate(size)
            self._cells = memoryview(mmap.mmap(file.fileno(), size)).cast("Q")
        self._cells[0] = self._cells[0] or int(clock() * 1000)
        self._guard = threading.Lock()

    def request(self, seconds: float, sent: int) -> None:
        """Counts an answer: seconds it took, bytes sent."""
        bucket = bisect.bisect_left(self._bounds, seconds)
        with self._guard:
            at = self._slot()
            self._cells[at + 1] += 1
            self._cells[at + 3] += sent
            self._cells[at + 1 + len(COUNTS) + bucket] += 1

    def add(self, count: str, much: int) -> None:
        """Adds to one of ``COUNTS``."""
        with self._guard:
            self._cells[self._slot() + 1 + COUNTS.index(count)] += much

    def _slot(self) -> int:
        """Where this second's counts are, emptied if they were another second's."""
        second = int(self._clock())
        at = (1 + second % SLOTS) * self._width
        if self._cells[at] != second:
            for cell in range(at, at + self._width):
                self._cells[cell] = 0
            self._cells[at] = second
        return at

    def last(self) -> LastMinute:
        """The last minute of all processes, this second included."""
        now = self._clock()
        total = np.zeros(self._width - 1, np.uint64)
        first = now
        for path in self._folder.glob("*.ring"):
            cells = np.frombuffer(path.read_bytes(), np.uint64)
            if cells.size != self._width * (SLOTS + 1):
                continue  # being made
            rows = cells.reshape(SLOTS + 1, self._width)
            first = min(first, float(rows[0, 0]) / 1000)
            ages = int(now) - rows[1:, 0].astype(np.int64)
            total += rows[1:][(ages >= 0) & (ages < SECONDS), 1:].sum(0, dtype=np.uint64)
        requests, labels, size, hits, misses, *buckets = (int(n) for n in total)
        uptime = max(0.0, now - first)
        seconds = min(float(SECONDS), max(1.0, uptime))
        return LastMinute(seconds, uptime, requests, labels, size, hits, misses, tuple(buckets))
