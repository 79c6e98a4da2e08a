"""Caches of a label server: ``http://HOST:PORT`` or ``https://HOST/PREFIX``, for reading.

Metadata and listings are requested from the server. Shards come through the disk cache of the
node, which downloads each of them once for all processes of a machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote

from sskt.teacher_cache.errors import CorruptStore, InputError, SsktError, printable
from sskt.teacher_cache.format.names import is_file_key, set_name, set_names
from sskt.teacher_cache.format.shards import RECORD_ENDING, ShardLayout, layout_of
from sskt.teacher_cache.storage.http.answers import DOCUMENT_BYTES, Answer, Computing, Gone
from sskt.teacher_cache.storage.http.client import WAIT_MINUTES, Server
from sskt.teacher_cache.storage.http.disk_cache import disk_cache

_T = TypeVar("_T")


@dataclass(frozen=True)
class Fetching:
    """How labels are downloaded: patience in minutes, a folder that is kept, its size in GiB."""

    wait_minutes: float = WAIT_MINUTES
    folder: Path | None = None
    gibibytes: float | None = None


@dataclass
class HttpStorage:
    """The cache of a label server, or one label set in it. See ``base.Storage``.

    What is stored is listed once, and again after ``refresh``. Everything that writes raises
    ``InputError``.
    """

    server: Server = field(repr=False)
    how: Fetching = field(repr=False)
    set_name: str = ""
    is_local: ClassVar[bool] = False
    _listed: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)
    _layouts: dict[str, ShardLayout] = field(default_factory=dict, repr=False)
    _awaited: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return self.where("").rstrip("/") if self.set_name else self.server.url

    @property
    def name(self) -> str:
        return self.set_name or self.server.host

    def below(self, name: str) -> HttpStorage:
        return HttpStorage(self.server, self.how, set_name(name))

    def where(self, key: str) -> str:
        return f"{self.server}{self._path(key)}"

    def _path(self, key: str) -> str:
        key = f"{self.set_name}/{key}" if self.set_name else key
        return f"{self.server.files}/{quote(key)}"

    def _about(self, rest: str) -> str:
        return f"/v1/label-sets/{quote(self.set_name, safe='')}{rest}"

    def there(self) -> bool:
        return self.set_name in self.folders() if self.set_name else bool(self.folders())

    def folders(self) -> list[str]:
        return set_names(self._list_of(_names), str(self))

    def damaged(self) -> dict[str, str]:
        """Why the server cannot read some of its label sets, by their names."""
        return self._list_of(_reasons)

    def _list_of(self, shape: Callable[[Any], _T]) -> _T:
        path = "/v1/label-sets"
        try:
            return self.server.json(path, shape)
        except Gone as error:
            raise InputError(
                f"{self.server} has no {path} ({error}): it is not a label server, or the URL "
                "lacks its path prefix"
            ) from error

    def _list(self, first: str) -> dict[str, int]:
        try:
            return self.server.json(self._about(f"/files?under={quote(first)}"), _sizes)
        except Gone:
            return {}

    def sizes(self, under: str = "") -> dict[str, int]:
        if not self.set_name:
            name, _, inner = under.partition("/")
            names = [name] if name else self.folders()
            return {f"{n}/{k}": v for n in names for k, v in self.below(n).sizes(inner).items()}
        below = f"{under}/" if under else ""
        found = self._list(under.partition("/")[0])
        return {key: size for key, size in found.items() if key.startswith(below)}

    def size(self, key: str, *, fresh: bool = False) -> int | None:
        first, inner, _ = key.partition("/")
        if fresh or not inner or not self.set_name:
            return self._size(key, method="HEAD")
        if first not in self._listed:
            self._listed[first] = self._list(first)
        known = self._listed[first].get(key)
        if known is None and _seed_of(key) in self._awaited:
            known = self._computed_size(key)
            if known is not None:
                self._listed[first][key] = known
        return known

    def _size(self, key: str, **request: Any) -> int | None:
        def size(answer: Answer) -> int | None:
            if answer.status == 200:
                return answer.length
            total = (answer.header("Content-Range") or "").rpartition("/")[2]
            return int(total) if total.isdecimal() else None

        try:
            return self.server.ask(self._path(key), size, wanted=(200, 206), **request)
        except Gone:
            return None

    def _computed_size(self, key: str) -> int | None:
        """The size of a file that is being computed: the server answers when it is stored.

        It does not wait for a seed that the set has yet to grow to; that is repeated here.
        """

        seed = _seed_of(key)

        def attempt() -> int | None:
            size = self._size(key, headers={"Range": "bytes=0-0"})
            if size is None and seed is not None:
                state = self._compute([seed])
                if state.failed:
                    raise SsktError(f"label server {self.server} failed: {state.message}")
                if state.missing:
                    raise Computing(f"{state.missing} shards of seed {seed}", 1)
                size = self._size(key, headers={"Range": "bytes=0-0"})
            return size

        return self.server.patiently(attempt, key)

    def refresh(self) -> None:
        self._listed.clear()

    def read(self, key: str) -> bytes:
        known = self._listed.get(key.partition("/")[0], {}).get(key)
        most = DOCUMENT_BYTES if known is None else known
        return self.server.ask(self._path(key), lambda answer: answer.read(most))

    def distrust(self, key: str) -> None:
        disk_cache(self.server.url, self.how.folder).forget(self.set_name, key)

    def md5(self, key: str) -> str | None:
        return None

    def read_part(self, key: str, start: int | None, stop: int | None) -> bytes:
        """See ``Storage``. Shards come through the disk cache. Raises ``CorruptStore``."""
        array, is_shard, _ = key.partition("/c/")
        if not is_shard or key.endswith(RECORD_ENDING):
            return self.read(key)[start:stop]
        cache = disk_cache(self.server.url, self.how.folder)
        if array not in self._layouts:
            self._layouts[array] = self._layout(f"{array}/zarr.json")
            cache.limit(self.how.gibibytes)
        layout, part = self._layouts[array], slice(start, stop)
        try:
            return cache.read(self.server, self.set_name, key, layout, part)
        except Gone as error:
            self._listed.get(array, {}).pop(key, None)
            raise FileNotFoundError(f"{key} is gone") from error

    def _layout(self, key: str) -> ShardLayout:
        try:
            return layout_of(json.loads(self.read(key)))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise CorruptStore(f"{self.where(key)} is not as docs/format.md says") from error

    def computes(self) -> bool:
        """Whether this server computes labels that are missing."""
        return self.server.json("/v1/server", lambda found: found["on_demand"] is True)

    def compute(self, seeds: list[int]) -> None:
        """Requests labels that are missing; from then on, reading those seeds waits for them.

        Raises:
            InputError: If the server refuses.
            SsktError: If it cannot compute them.
        """
        self._compute(seeds)
        self._awaited |= frozenset(seeds)
        self.refresh()

    def _compute(self, seeds: list[int]) -> _Progress:
        def progress(answer: Answer) -> _Progress:
            if answer.status == 202:
                return _Progress.of(json.loads(answer.read(DOCUMENT_BYTES)))
            if "missing" not in answer.problem:
                self.server.require(answer, (202,))
            return _Progress.of(answer.problem)  # a full queue: readers request the rest

        body = json.dumps({"seeds": seeds}).encode()
        path, headers = self._about(":compute"), {"Content-Type": "application/json"}
        return self.server.ask(
            path, progress, method="POST", headers=headers, body=body, wanted=(202, 503)
        )

    def close(self) -> None:
        """Ends all waiting for the server; a read that is under way raises ``InputError``."""
        self.server.close()

    def refuse_writing(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ``InputError``."""
        raise InputError(
            f"{self.server} is served read-only; run this on the cache that it serves (its folder "
            "or s3://... URL)"
        )

    locks = put = create = update = delete = refuse_writing


class _Progress(NamedTuple):
    """What a server answers about missing shards: how many, how many failed, and why."""

    missing: int
    failed: int
    message: str

    @classmethod
    def of(cls, document: Any) -> _Progress:
        """Raises ``ValueError``, ``KeyError``, ``TypeError`` for another document."""
        return cls(_count(document["missing"]), _count(document["failed"]), document["message"])


def _names(document: Any) -> set[str]:
    """Names of label sets. Raises as ``Server.json`` expects."""
    names = {entry["name"] for entry in document["label_sets"]} | set(document.get("damaged", ()))
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name is no text")
    return names


def _reasons(document: Any) -> dict[str, str]:
    """Why label sets are damaged. Raises as ``_names``."""
    return {str(name): printable(str(why)) for name, why in document.get("damaged", {}).items()}


def _sizes(document: Any) -> dict[str, int]:
    """Sizes of files, without those that are none of a label set. Raises as ``_names``."""
    files = document["files"].items()
    return {key: _count(size) for key, size in files if is_file_key(key)}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _seed_of(key: str) -> int | None:
    parts = key.split("/")
    return int(parts[2]) if len(parts) > 3 and parts[1] == "c" and parts[2].isdecimal() else None


def open_server(url: str, how: Fetching | None = None) -> HttpStorage:
    """Opens the cache of a label server, which is not contacted yet.

    Args:
        url: URL of the server.
        how: How labels are downloaded. If it is given, as a training does, a server that is away
            is waited for from the beginning; without it only after it has answered once.

    Raises:
        InputError: If the URL is not one of a label server.
    """
    patient, how = how is not None, how or Fetching()
    return HttpStorage(Server(url, how.wait_minutes, patient=patient), how)
