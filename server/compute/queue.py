"""The shards that wait to be computed: a small database that all processes of a server share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection

from sskt.server.run_folder import database

QUEUED, COMPUTING, FAILED = "queued", "computing", "failed"

FAILED_SECONDS = 30.0
"""Seconds during which a failure is reported again before its shard is tried anew."""

DEATHS = 3
"""A shard over which the compute worker died this often is given up for ``GIVEN_UP_SECONDS``."""

GIVEN_UP_SECONDS = 900.0

PACE_SHARDS = 16
"""Computed shards over which the seconds for each are averaged."""

UNKNOWN_PACE = 5.0
"""Seconds for a shard, before one was computed."""

LONGEST_WAIT = 60
"""Seconds after which a client is asked to come back, at most."""

_SCHEMA = """
create table if not exists shards (
    name text, seed integer, block integer, state text, since real, message text default '',
    kind text default '', asked integer, deaths integer default 0, until real default 0,
    primary key (name, seed, block)
);
create table if not exists pace (seconds real);
"""
_clock = time.monotonic


class QueueFull(Exception):
    """As many shards wait as are allowed to; ``waiting`` of them."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} shards are waiting to be computed, which is the limit")
        self.waiting = waiting


@dataclass(frozen=True)
class Entry:
    """A shard that was asked for.

    Attributes:
        set: Name of the label set.
        seed: View seed.
        block: Block of samples.
        state: ``QUEUED``, ``COMPUTING`` or ``FAILED``.
        since: When the state began, in seconds since 1970.
        message: Why it failed, or why it was put back.
        kind: Class of the error of a failure.
        asked: Its place in the order of the queue.
        deaths: How many compute workers died while they computed it.
        until: When a failure may be tried anew, on the machine's monotonic clock: it does not last
            longer when the time of day is set back.
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
    until: float = 0.0


class Queue:
    """The queue in a folder; at most ``limit`` shards wait, see also ``FAILED_SECONDS``."""

    def __init__(self, folder: Path, limit: int, failed_seconds: float = FAILED_SECONDS) -> None:
        self.folder, self.limit, self.failed_seconds = folder, limit, failed_seconds

    def _open(self, change: bool = True) -> AbstractContextManager[Connection]:
        return database(self.folder / "queue.sqlite3", _SCHEMA, change=change)

    def ask(self, name: str, seed: int, block: int) -> Entry:
        """Returns the shard's entry, which is new if there was none or its failure is over.

        Raises:
            QueueFull: If it would be new and the limit is reached.
            DiskFull: If there is no room for it.
        """
        with self._open() as db:
            db.execute("delete from shards where state = 'failed' and until <= ?", [_clock()])
            if known := _find(db, name, seed, block):
                return known
            waiting = len(_entries(db, "state = 'queued'"))
            if waiting >= self.limit:
                raise QueueFull(waiting)
            db.execute(
                "insert into shards (name, seed, block, state, since, asked) "
                f"select ?, ?, ?, 'queued', ?, {_LAST} + 1",
                [name, seed, block, time.time()],
            )
            return _entries(db, f"asked = {_LAST}")[0]

    def get(self, name: str, seed: int, block: int) -> Entry | None:
        """The shard's entry; None if it was not asked for or is stored."""
        with self._open(change=False) as db:
            return _find(db, name, seed, block)

    def state(self) -> list[Entry]:
        """All entries: those being computed, those waiting (first come first), failures."""
        with self._open(change=False) as db:
            return _entries(db)

    def ahead(self, entry: Entry) -> int:
        """How many shards come before it, those being computed included."""
        return sum(e.state != FAILED and e.asked < entry.asked for e in self.state())

    def waiting(self) -> int:
        """How many entries wait."""
        return sum(entry.state == QUEUED for entry in self.state())

    def seconds(self, shards: int) -> int:
        """About how long so many shards take, judged by the last ones computed: 1 to 60."""
        with self._open(change=False) as db:
            (pace,) = db.execute("select avg(seconds) from pace").fetchone()
        seconds = math.ceil(shards * (UNKNOWN_PACE if pace is None else pace))
        return min(LONGEST_WAIT, max(1, seconds))

    def retry_seconds(self, failed: Entry) -> int:
        """Seconds until a failed shard will be tried anew."""
        return max(1, math.ceil(failed.until - _clock()))

    # --- for the compute worker, of which there is one at a time --------------------------------

    def recover(self) -> list[Entry]:
        """Puts back what a compute worker was computing when it died.

        Returns:
            The shards that are given up, as too many workers died over them.
        """
        with self._open() as db:
            for entry in _entries(db, "state = 'computing'"):
                _set(db, entry, QUEUED, deaths=entry.deaths + 1)
            given_up = _entries(db, f"state = 'queued' and deaths >= {DEATHS}")
        for entry in given_up:
            message = (
                f"the compute worker died {entry.deaths} times over this shard, perhaps for lack "
                "of memory (its log may say why); compute it with sskt cache-teachers"
            )
            self.fail(entry, "SsktError", message)
        return given_up

    def take(
        self, fits: Callable[[Entry], bool] = lambda entry: True, most: int = 1
    ) -> list[Entry]:
        """The first ``most`` waiting entries that fit: they are being computed from now on."""
        with self._open() as db:
            taken = [entry for entry in _entries(db, "state = 'queued'") if fits(entry)][:most]
            for entry in taken:
                _set(db, entry, COMPUTING)
        return taken

    def put_back(self, entry: Entry, message: str) -> None:
        """Puts a shard at the end of the queue."""
        with self._open() as db:
            (last,) = db.execute(f"select {_LAST}").fetchone()
            _set(db, entry, QUEUED, message=message, asked=last + 1)

    def done(self, entry: Entry) -> None:
        """The shard is stored."""
        with self._open() as db:
            db.execute(f"delete from shards where {_KEY}", [entry.set, entry.seed, entry.block])

    def fail(self, entry: Entry, kind: str, message: str) -> None:
        """The shard cannot be computed now."""
        seconds = GIVEN_UP_SECONDS if entry.deaths >= DEATHS else self.failed_seconds
        with self._open() as db:
            _set(db, entry, FAILED, message=message, kind=kind, until=_clock() + seconds)

    def timed(self, seconds: float) -> None:
        """Records how long a shard took."""
        with self._open() as db:
            db.execute("insert into pace values (?)", [seconds])
            db.execute(f"delete from pace where rowid <= last_insert_rowid() - {PACE_SHARDS}")


_KEY = "name = ? and seed = ? and block = ?"
_LAST = "(select ifnull(max(asked), 0) from shards)"


def _entries(db: Connection, where: str = "true", *values: str | int) -> list[Entry]:
    order = "state = 'failed', state = 'queued', asked"
    rows = db.execute(f"select * from shards where {where} order by {order}", values)
    return [Entry(*row) for row in rows]


def _find(db: Connection, name: str, seed: int, block: int) -> Entry | None:
    found = _entries(db, _KEY, name, seed, block)
    return found[0] if found else None


def _set(db: Connection, entry: Entry, state: str, **more: str | float) -> None:
    values = {"state": state, "since": time.time(), "message": "", "kind": ""} | more
    columns = ", ".join(f"{column} = ?" for column in values)
    key = [entry.set, entry.seed, entry.block]
    db.execute(f"update shards set {columns} where {_KEY}", [*values.values(), *key])
