"""Which clients read from the server in the last hour, of all its worker processes.

A client is a token from an address. Each worker adds up what it sends and writes it into a
database in the run folder every few seconds, in a thread of its own.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sskt.server.run_folder import database
from sskt.teacher_cache.errors import SsktError

HOUR = 3600.0
SLOT_SECONDS = 300
"""Bytes are added up in slots of this length, so that they can be forgotten after an hour."""
FLUSH_SECONDS = 2.0
"""How much later another worker may learn of a request."""
MOST = 200
"""Clients kept; all further ones are counted as one with the address ``other``."""
OTHER = ("", "other")

_SCHEMA = (
    "create table if not exists clients (token text, address text, slot integer, "
    "requests integer, bytes integer, seen real, primary key (token, address, slot))"
)
_ADD = (
    "insert into clients values (?, ?, ?, ?, ?, ?) on conflict do update set "
    "requests = requests + excluded.requests, bytes = bytes + excluded.bytes, "
    "seen = max(seen, excluded.seen)"
)
_SUMS = (
    "select token, address, sum(requests), sum(bytes), max(seen) from clients where seen > ? "
    "group by token, address order by sum(bytes) desc, token, address"
)

Key = tuple[str, str]


@dataclass(frozen=True)
class Client:
    """What one client read in the last hour.

    Attributes:
        token: Name of its token; empty without one.
        address: Its address, as the server sees it.
        requests: Number of its requests.
        bytes: Bytes of the bodies that were sent to it.
        seen: When it last asked, in seconds since 1970.
    """

    token: str
    address: str
    requests: int
    bytes: int
    seen: float


class Clients:
    """The clients of the last hour. Safe from any thread.

    Args:
        run: The server's run folder.
        clock: Seconds since 1970.
    """

    def __init__(self, run: Path, clock: Callable[[], float] = time.time) -> None:
        self._run, self._clock = run, clock
        self._guard = threading.Lock()
        self._pending: dict[tuple[Key, int], tuple[int, int, float]] = {}
        self._timer: threading.Timer | None = None

    def answered(self, token: str, address: str, sent: int) -> None:
        """Counts an answer; writes nothing.

        Args:
            token: Name of the token of the request; empty without one.
            address: Of the client.
            sent: Bytes of the answer's body.
        """
        now = self._clock()
        key, slot = (token, address), int(now // SLOT_SECONDS)
        with self._guard:
            if (key, slot) not in self._pending and len(self._pending) >= MOST:
                key = OTHER
            requests, size, _ = self._pending.get((key, slot), (0, 0, now))
            self._pending[key, slot] = (requests + 1, size + sent, now)
            if self._timer is None:
                self._timer = threading.Timer(FLUSH_SECONDS, self._flush_later)
                self._timer.daemon = True
                self._timer.start()

    def recent(self) -> list[Client]:
        """The clients of the last hour, those that were sent most first."""
        self._flush()
        with contextlib.suppress(sqlite3.Error, OSError, SsktError), self._open() as db:
            return [Client(*row) for row in db.execute(_SUMS, [self._clock() - HOUR])]
        return []

    def _flush_later(self) -> None:
        with self._guard:
            self._timer = None
        # A server that has stopped has removed the folder, which must not come again.
        with contextlib.suppress(OSError):
            if self._run.is_dir():
                self._flush()

    def _flush(self) -> None:
        with self._guard:
            pending, self._pending = self._pending, {}
        if not pending:
            return
        try:
            with self._open(change=True) as db:
                self._write(db, pending)
        except (sqlite3.Error, OSError, SsktError):
            return  # the counts are shown only, and a full disk may lose them

    def _write(
        self, db: sqlite3.Connection, pending: dict[tuple[Key, int], tuple[int, int, float]]
    ) -> None:
        db.execute("delete from clients where slot < ?", [(self._clock() - HOUR) // SLOT_SECONDS])
        known = set(db.execute("select distinct token, address from clients"))
        for (key, slot), counts in pending.items():
            if key not in known and len(known) >= MOST:
                key = OTHER
            known.add(key)
            db.execute(_ADD, (*key, slot, *counts))

    def _open(self, change: bool = False) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return database(self._run / "clients.sqlite3", _SCHEMA, change=change, timeout=1.0)
