"""Shards that wait to be computed: a folder shared by all processes of a server.

Each entry is one file, named after its shard and replaced whole, so whoever reads needs no lock.
Changes are made under one lock, which the kernel drops when its holder dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.storage.locks import file_lock

QUEUED, COMPUTING, FAILED = "queued", "computing", "failed"

FAILED_SECONDS = 30.0
"""How long a failure is told again before its shard is tried anew."""

DEATHS = 3
"""A shard over which the owner died this often is given up, for ``GIVEN_UP_SECONDS``."""

GIVEN_UP_SECONDS = 900.0

PACE_SHARDS = 16
"""Computed shards over which their seconds are averaged."""

UNKNOWN_PACE = 5.0
"""Seconds a shard, before one was computed."""

LONGEST_WAIT = 60
"""Seconds after which a client is told to come back, at most."""


class QueueFull(Exception):
    """As many shards wait as may; ``waiting`` of them."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} shards are waiting to be computed, as many as may")
        self.waiting = waiting


@dataclass(frozen=True)
class Entry:
    """A shard that was asked for. ``since``: seconds of the epoch at which ``state`` began.

    ``asked``: nanoseconds of the epoch; the queue's order. ``message``, ``kind`` (an error's
    class) of a failure. ``deaths``: of owners that were computing it.
    """

    set: str
    seed: int
    block: int
    state: str
    since: float
    message: str = ""
    kind: str = ""
    asked: int = 0
    deaths: int = 0


class Queue:
    """``limit``: entries that may wait. ``failed_seconds``: see ``FAILED_SECONDS``."""

    def __init__(self, folder: Path, limit: int, failed_seconds: float = FAILED_SECONDS) -> None:
        self.folder, self.limit, self.failed_seconds = folder, limit, failed_seconds
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def ask(self, name: str, seed: int, block: int) -> Entry:
        """The shard's entry, new only if there is none; a recent failure is told again.

        Raises ``QueueFull``, ``DiskFull``.
        """
        known = self.get(name, seed, block)
        if known and not self._over(known):
            return known
        with self._changing():
            known = self.get(name, seed, block)
            if known and not self._over(known):
                return known
            waiting = self._forget()
            if waiting >= self.limit:
                raise QueueFull(waiting)
            now = time.time_ns()
            entry = Entry(name, seed, block, QUEUED, now / 1e9, asked=now)
            self._put(entry)
            return entry

    def get(self, name: str, seed: int, block: int) -> Entry | None:
        """The shard's entry, None if nobody asked for it or it is done with."""
        return _read(self._path(name, seed, block))

    def state(self) -> list[Entry]:
        """All entries: those being computed, those waiting (first come first), failures."""
        found = [entry for path in self.folder.glob("*.json") if (entry := _read(path))]
        order = [COMPUTING, QUEUED, FAILED]
        return sorted(found, key=lambda e: (order.index(e.state), e.asked))

    def ahead(self, entry: Entry) -> int:
        """Shards that come before it, those being computed included."""
        return sum(e.state != FAILED and e.asked < entry.asked for e in self.state())

    def waiting(self) -> int:
        """Entries that wait."""
        return sum(entry.state == QUEUED for entry in self.state())

    def seconds(self, shards: int) -> int:
        """About how long so many shards take, from the last ones computed: 1 to 60."""
        try:
            pace: list[float] = json.loads((self.folder / "pace").read_bytes())
        except FileNotFoundError:
            pace = [UNKNOWN_PACE]
        seconds = math.ceil(shards * sum(pace) / len(pace))
        return min(LONGEST_WAIT, max(1, seconds))

    def retry_seconds(self, failed: Entry) -> int:
        """When a failed shard will be tried anew."""
        return max(1, math.ceil(failed.since + self._told_for(failed) - time.time()))

    # --- the owner's part: there is one owner at a time ---------------------------------------

    def recover(self) -> list[Entry]:
        """Puts back what an owner was computing when it died. Returns what is given up."""
        given_up = []
        with self._changing():
            for leftover in self.folder.glob("*.partial"):
                leftover.unlink(missing_ok=True)
            for entry in self.state():
                if entry.state == COMPUTING:
                    dead = replace(_now(entry, QUEUED), deaths=entry.deaths + 1)
                    self._put(dead)
                    if dead.deaths >= DEATHS:
                        given_up.append(dead)
        for entry in given_up:
            message = (
                f"the computing process died {entry.deaths} times over this shard (was there "
                "memory left? its log may say); compute it with sskt cache-teachers"
            )
            self.fail(entry, "SsktError", message)
        return given_up

    def take(
        self, fits: Callable[[Entry], bool] = lambda entry: True, most: int = 1
    ) -> list[Entry]:
        """The first ``most`` waiting entries that fit: they are being computed from now on."""
        taken: list[Entry] = []
        with self._changing():
            for entry in self.state():
                if len(taken) < most and entry.state == QUEUED and fits(entry):
                    taken.append(_now(entry, COMPUTING))
                    self._put(taken[-1])
        return taken

    def put_back(self, entry: Entry, message: str) -> None:
        """To the end of the queue."""
        with self._changing():
            self._put(replace(_now(entry, QUEUED), asked=time.time_ns(), message=message))

    def done(self, entry: Entry) -> None:
        """The shard is stored."""
        with self._changing():
            self._path(entry.set, entry.seed, entry.block).unlink(missing_ok=True)

    def fail(self, entry: Entry, kind: str, message: str) -> None:
        """The shard cannot be computed now."""
        with self._changing():
            try:
                self._put(replace(_now(entry, FAILED), kind=kind, message=message))
            except BaseException:  # a full disk must not leave it in the making for ever
                self._path(entry.set, entry.seed, entry.block).unlink(missing_ok=True)
                raise

    def timed(self, seconds: float) -> None:
        """Notes what a shard took."""
        with self._changing():
            path = self.folder / "pace"
            try:
                pace = json.loads(path.read_bytes())
            except FileNotFoundError:
                pace = []
            _write(path, json.dumps([*pace, seconds][-PACE_SHARDS:]))

    # --- files --------------------------------------------------------------------------------

    def _path(self, name: str, seed: int, block: int) -> Path:
        text = json.dumps([name, seed, block])
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"

    def _put(self, entry: Entry) -> None:
        _write(self._path(entry.set, entry.seed, entry.block), json.dumps(asdict(entry)))

    def _over(self, entry: Entry) -> bool:
        return entry.state == FAILED and time.time() - entry.since >= self._told_for(entry)

    def _told_for(self, failed: Entry) -> float:
        return GIVEN_UP_SECONDS if failed.deaths >= DEATHS else self.failed_seconds

    def _forget(self) -> int:
        """Removes failures that are over. Returns how many entries wait."""
        waiting = 0
        for entry in self.state():
            waiting += entry.state == QUEUED
            if self._over(entry):
                self._path(entry.set, entry.seed, entry.block).unlink(missing_ok=True)
        return waiting

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with file_lock(self.folder / "lock"):
            yield


def _now(entry: Entry, state: str) -> Entry:
    return replace(entry, state=state, since=time.time(), message="", kind="")


def _read(path: Path) -> Entry | None:
    try:
        return Entry(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    durable_write(path, text.encode(), synced=False)
