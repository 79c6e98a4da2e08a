"""What the routes of one worker share: label sets, tokens, decoded rows, metrics, the queue."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import HTTPConnection

from sskt.server.compute.queue import Queue
from sskt.server.http.problems import DAMAGED, Problem
from sskt.server.http.tokens import Tokens
from sskt.server.metrics.clients import Clients
from sskt.server.metrics.metrics import Metrics
from sskt.server.rows import RowCache
from sskt.server.settings import Settings
from sskt.teacher_cache.errors import CorruptStore, InputError, MissingData, SsktError
from sskt.teacher_cache.format.metadata import GROUP
from sskt.teacher_cache.format.names import is_set_name
from sskt.teacher_cache.label_sets.create import open_label_set, without_copies
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.base import Storage
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.open import open_cache

OUT_OF_REACH = "cache out of reach"
LOST_MOUNT = (
    "the cache's folder is empty and on another device than when the server started; mount its "
    "file system again"
)
FRESH_SECONDS = 1.0
"""Lifetime of a listing of the cache, and of what is known of a label set in a bucket, at least."""
REST = 3
"""That lifetime, as a multiple of the time that listing or reading took."""
RETRY = {"Retry-After": "5"}

_METADATA = (GROUP, f"view_check/{GROUP}")
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)

_log = logging.getLogger("sskt.state")

Version = tuple[object, ...]


@dataclass(frozen=True)
class _Known:
    """A label set that was opened. version: of its metadata. until: when a bucket is read again."""

    version: Version
    label_set: LabelSet
    until: float


class Sets:
    """The label sets of a cache, each opened when it is asked for, and again when it changes.

    A request for one label set touches no other, so one that cannot be read hides no other.

    Args:
        home: The cache.
        device: Number of the device that the cache's folder is on, if it held label sets when the
            server started.

    Attributes:
        damaged: By name, why a label set cannot be read, as of the last listing.
    """

    def __init__(self, home: Storage, device: int | None = None) -> None:
        self.home = home
        self._held_sets = device is not None
        self.damaged: dict[str, str] = {}
        self._known: dict[str, _Known] = {}
        self._listed: list[LabelSet] = []
        self._until = 0.0
        self._device = self._folder_device() if device is None else device
        self._guard = threading.Lock()

    def all(self) -> list[LabelSet]:
        """Lists the readable label sets by name.

        Raises:
            Problem: 503 if the cache cannot be listed.
        """
        with self._guard:
            if time.monotonic() >= self._until:
                begun = time.monotonic()
                with self._reaching():
                    self._list()
                self._until = _lifetime(begun)
            return self._listed

    def get(self, name: str, *, fresh: bool = False) -> LabelSet:
        """Returns the label set of that name, or the only one whose digest begins so.

        Args:
            name: Name, or the first six or more digits of the digest.
            fresh: Whether a bucket is read even if its label set was read lately.

        Raises:
            Problem: 404 if there is none, 500 if it cannot be read, 503 if the cache is out of
                reach.
        """
        try:
            found = self._opened(name, fresh=fresh) if is_set_name(name) else None
        except _Unreadable as error:
            raise Problem(500, DAMAGED, str(error)) from error
        if found is not None:
            return found
        if self.home.is_local:  # a lost mount is not a missing label set
            with self._reaching():
                self._folders()
        fitting = [s for s in self.all() if len(name) >= 6 and s.digest.startswith(name)]
        if len(fitting) == 1:
            return fitting[0]
        detail = f"no label set {name!r:.300}; /v1/label-sets lists them"
        if fitting:
            names = ", ".join(s.name for s in fitting)
            detail = f"the digests of several label sets begin with {name}: {names}; give a name"
        raise Problem(404, "no such label set", detail)

    def recent(self, name: str) -> LabelSet | None:
        """The label set of that name if it is known and has not changed; never transfers."""
        known = self._known.get(name)
        if known is None:
            return None
        if isinstance(self.home, LocalStorage):
            with contextlib.suppress(OSError):
                return known.label_set if self._version(name) == known.version else None
            return None
        return known.label_set if time.monotonic() < known.until else None

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Raises ``Problem`` 503 for a cache that cannot be listed."""
        try:
            yield
        except (SsktError, OSError) as error:
            _log.warning("the cache cannot be listed: %s", error)
            detail = "the cache cannot be listed; the server's log says why"
            raise Problem(503, OUT_OF_REACH, detail, RETRY) from error

    def _folders(self) -> list[str]:
        names = self.home.folders()
        held_sets = self._listed or self._held_sets
        if not names and held_sets and self._folder_device() != self._device:
            raise Problem(503, OUT_OF_REACH, LOST_MOUNT, RETRY)
        return names

    def _list(self) -> None:
        names = self._folders()
        listed: list[LabelSet] = []
        damaged: dict[str, str] = {}
        for name in names:
            try:
                label_set = self._opened(name)
            except _Unreadable as error:
                damaged[name] = str(error)
                if damaged[name] != self.damaged.get(name):
                    _log.warning("label set %s cannot be read: %s", name, error.__cause__ or error)
                continue
            if label_set is not None:
                listed.append(label_set)
        self._listed, copies = without_copies(listed)
        self.damaged = damaged | {name: str(error) for name, error in copies.items()}
        self._known = {n: known for n, known in self._known.items() if n in set(names)}

    def _opened(self, name: str, *, fresh: bool = False) -> LabelSet | None:
        """Opens one label set; None if there is none.

        Raises:
            _Unreadable: If it is damaged, or this process may not read it.
            InputError: If the cache cannot be reached.
        """
        begun = time.monotonic()
        found = None if fresh else self.recent(name)
        if found is not None:
            return found
        storage = self.home.below(name)
        try:
            _require_inside(self.home, storage)
            with contextlib.suppress(FileNotFoundError):
                version, last = self._version(name), self._known.get(name)
                same = last is not None and last.version == version
                label_set = last.label_set if last and same else open_label_set(storage)
                self._known[name] = _Known(version, label_set, _lifetime(begun))
                return label_set
            open_label_set(storage)  # says whether it has lost a file
        except (FileNotFoundError, MissingData):
            pass
        except Exception as error:
            if type(error) is InputError:
                raise
            if not isinstance(error, OSError) or error.errno not in _ABSENT:
                raise _Unreadable(self._reason(name, error)) from error
        self._known.pop(name, None)
        return None

    def _reason(self, name: str, error: Exception) -> str:
        """Why a label set cannot be read, without its folder on this machine, which the log has."""
        if isinstance(error, SsktError):
            return str(error).replace(self.home.where(name), name)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"label set {name} cannot be read ({reason or type(error).__name__})"

    def _version(self, name: str) -> Version:
        """What changes with the metadata of a label set. Raises ``OSError``, ``InputError``."""
        if isinstance(self.home, LocalStorage):
            found = [os.stat(self.home.path / name / key) for key in _METADATA]  # noqa: PTH116
            if not all(stat.S_ISREG(about.st_mode) for about in found):
                raise OSError(errno.EINVAL, f"{' or '.join(_METADATA)} is not a regular file")
            return tuple((about.st_ino, about.st_size, about.st_mtime_ns) for about in found)
        storage = self.home.below(name)
        return tuple(storage.read(key) for key in _METADATA)

    def _folder_device(self) -> int | None:
        with contextlib.suppress(OSError):
            return self.home.path.stat().st_dev if isinstance(self.home, LocalStorage) else None
        return None


class _Unreadable(Exception):
    """A label set that cannot be opened; the message is for clients."""


def inside(home: Storage, key: str) -> bool:
    """False for a file or folder of a local cache that lies elsewhere by a link."""
    if not isinstance(home, LocalStorage):
        return True
    return Path(os.path.realpath(home.path / key)).is_relative_to(os.path.realpath(home.path))


def _require_inside(home: Storage, storage: Storage) -> None:
    """Raises ``CorruptStore`` for a link that leaves the cache."""
    if not inside(home, storage.name):
        raise CorruptStore(
            f"{storage.name} is a link that leaves the cache; mount or copy what it names instead"
        )


def _lifetime(begun: float) -> float:
    now = time.monotonic()
    return now + max(FRESH_SECONDS, REST * (now - begun))


@dataclass
class State:
    """Everything that outlives a request."""

    settings: Settings
    home: Storage
    sets: Sets
    metrics: Metrics
    clients: Clients
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
        Sets(home, settings.cache_device),
        metrics,
        Clients(run),
        Tokens(Path(settings.token_file)) if settings.token_file else None,
        RowCache(int(settings.memory * 2**30 / settings.workers), metrics),
        Queue(run / "queue", settings.queue) if settings.on_demand else None,
    )


async def label_set_of(state: State, name: str) -> LabelSet:
    """As ``Sets.get``, in a thread if a disk or a bucket may have to be waited for."""
    known = state.sets.recent(name)
    return known if known is not None else await asyncio.to_thread(state.sets.get, name)


def state_of(request: HTTPConnection) -> State:
    """The state of the application that a request came to."""
    state: State = request.app.state.sskt
    return state
