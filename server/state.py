"""What the routes of one worker share: label sets, tokens, decoded rows, metrics, the queue."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import HTTPConnection

from sskt.server.compute.queue import Queue
from sskt.server.http.problems import DAMAGED, Problem
from sskt.server.http.tokens import Tokens
from sskt.server.metrics.metrics import Metrics
from sskt.server.rows import RowCache
from sskt.server.settings import Settings
from sskt.teacher_cache.errors import InputError, MissingData, SsktError
from sskt.teacher_cache.format.metadata import GROUP
from sskt.teacher_cache.label_sets.create import open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.base import Place
from sskt.teacher_cache.storage.open import open_cache

FRESH_SECONDS = 1.0
"""How long a look at the cache's folders holds, at least."""
REST = 3
"""One that takes long, as in a bucket, holds so many times as long."""

_log = logging.getLogger("sskt.state")


@dataclass
class Sets:
    """The label sets of a cache, opened once and again when their metadata changes.

    A damaged set hides no other: it is named in ``damaged`` with the reason.
    """

    home: Place
    damaged: dict[str, str] = field(default_factory=dict)
    _open: dict[str, tuple[tuple[bytes, bytes], LabelSet]] = field(default_factory=dict)
    _until: float = 0.0
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def all(self) -> list[LabelSet]:
        """All readable sets by name. Raises ``Problem`` 503 if the cache cannot be listed."""
        with self._guard:
            if time.monotonic() >= self._until:
                self._look()
            return [label_set for _, label_set in self._open.values()]

    def get(self, name: str) -> LabelSet:
        """The set of that name, or the only one whose digest starts so. Raises ``Problem`` 404."""
        sets = self.all()
        for label_set in sets:
            if label_set.name == name:
                return label_set
        fitting = [s for s in sets if len(name) >= 6 and s.digest.startswith(name)]
        if len(fitting) == 1:
            return fitting[0]
        if name in self.damaged:
            raise Problem(500, DAMAGED, self.damaged[name])
        raise Problem(404, "no such label set", f"no label set {name!r}; /v1/label-sets lists them")

    def recent(self, name: str) -> LabelSet | None:
        """The set of that name if the last look still holds; never waits."""
        known = self._open.get(name) if time.monotonic() < self._until else None
        return known[1] if known else None

    def peek(self, name: str) -> LabelSet | None:
        """The set of that name as last seen: never waits, looks again in the background."""
        if time.monotonic() >= self._until and not self._guard.locked():
            threading.Thread(target=self._look_again, name="sskt-look", daemon=True).start()
        known = self._open.get(name)
        return known[1] if known else None

    def _look_again(self) -> None:
        with contextlib.suppress(Problem):  # who asks for a listing is told
            self.all()

    def _look(self) -> None:
        begun = time.monotonic()
        try:
            self._look_over()
        except (SsktError, OSError) as error:
            _log.warning("the cache cannot be listed: %s", error)
            detail = "the cache cannot be listed; the server's log says why"
            raise Problem(503, "cache out of reach", detail, {"Retry-After": "5"}) from error
        now = time.monotonic()
        self._until = now + max(FRESH_SECONDS, REST * (now - begun))

    def _look_over(self) -> None:
        opened: dict[str, tuple[tuple[bytes, bytes], LabelSet]] = {}
        damaged: dict[str, str] = {}
        for name in self.home.folders():
            place = self.home.below(name)
            try:
                metadata = (place.read(GROUP), place.read(f"view_check/{GROUP}"))
                known = self._open.get(name)
                same = known is not None and known[0] == metadata
                opened[name] = known if known and same else (metadata, open_label_set(place))
            except (FileNotFoundError, MissingData):  # no set, or one being made or removed
                continue
            except (SsktError, OSError) as error:
                if type(error) is InputError:  # out of reach, which is no damage
                    raise
                # Where the cache lies on this machine is for the log only.
                damaged[name] = str(error).replace(self.home.where(name), name)
                if damaged[name] != self.damaged.get(name):
                    _log.warning("label set %s cannot be read: %s", name, error)
        self._open, self.damaged = opened, damaged


@dataclass
class State:
    """Everything that outlives a request."""

    settings: Settings
    home: Place
    sets: Sets
    metrics: Metrics
    tokens: Tokens | None
    rows: RowCache
    on_demand: Queue | None


def make_state(settings: Settings) -> State:
    """Opens what the settings name. Raises ``InputError``, ``MissingData``."""
    run = Path(settings.run)
    metrics = Metrics(run)
    home = open_cache(settings.cache)
    return State(
        settings,
        home,
        Sets(home),
        metrics,
        Tokens(Path(settings.token_file)) if settings.token_file else None,
        RowCache(int(settings.memory * 2**30 / settings.workers), metrics),
        Queue(run / "queue", settings.queue) if settings.on_demand else None,
    )


def state_of(request: HTTPConnection) -> State:
    """The state of the application that a request came to."""
    state: State = request.app.state.sskt
    return state
