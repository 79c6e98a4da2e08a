"""Caches behind a label server: ``http://HOST:PORT`` or ``https://HOST/PREFIX``, for reading.

Metadata and listings are asked of the server; shards come through the node cache, so that each is
downloaded once for all processes of a machine, and are then read as those of a local folder.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn
from urllib.parse import quote

from sskt.teacher_cache.errors import CorruptStore, InputError, SsktError
from sskt.teacher_cache.format.shards import RECORD_ENDING, layout_of
from sskt.teacher_cache.storage.http.answers import Computing, Gone
from sskt.teacher_cache.storage.http.client import WAIT_MINUTES, Server
from sskt.teacher_cache.storage.http.disk_cache import NodeCache


@dataclass(frozen=True)
class Fetching:
    """How labels come here: patience in minutes, a folder that is kept, its budget in GiB."""

    wait_minutes: float = WAIT_MINUTES
    folder: Path | None = None
    gibibytes: float | None = None


@dataclass
class Session:
    """What the places of one server share: connections and the node cache."""

    server: Server
    how: Fetching
    _node: NodeCache | None = None
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def node(self) -> NodeCache:
        """Made when the first shard is read: looking needs no disk."""
        with self._guard:
            if self._node is None:
                self._node = NodeCache.of(self.server.url, self.how.folder, self.how.gibibytes)
            return self._node


@dataclass
class HttpPlace:
    """A cache behind a label server, or one label set in it. See ``base.Place``.

    What is stored is listed once, and again after ``refresh``. Everything that writes raises
    ``InputError``.
    """

    session: Session = field(repr=False)
    set_name: str = ""
    is_local: ClassVar[bool] = False
    _listed: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)
    _chunks: dict[str, int] = field(default_factory=dict, repr=False)
    _awaited: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return self.where("").rstrip("/") if self.set_name else self.session.server.url

    @property
    def name(self) -> str:
        return self.set_name or self.session.server.host

    def below(self, name: str) -> HttpPlace:
        return HttpPlace(self.session, name)

    def where(self, key: str) -> str:
        return f"{self.session.server}{self._path(key)}"

    def _path(self, key: str) -> str:
        parts = [self.set_name, key] if self.set_name else [key]
        return f"/zarr/{quote('/'.join(parts))}"

    def there(self) -> bool:
        return self.set_name in self.folders() if self.set_name else bool(self.folders())

    def folders(self) -> list[str]:
        found = self._listing("/v1/label-sets")
        names = {entry["name"] for entry in found["label_sets"]} | set(found.get("damaged", ()))
        return sorted(name for name in names if not name.startswith("."))

    def _listing(self, path: str) -> dict[str, Any]:
        server = self.session.server
        try:
            found = server.json(path)
        except Gone as error:
            raise InputError(
                f"{server} answers, but has no {path}: it is no label server, or its address "
                f"goes on ({error})"
            ) from error
        if not isinstance(found, dict):
            raise InputError(f"{server} is no label server of this version of sskt")
        return found

    def _list(self, first: str) -> dict[str, int]:
        path = f"/v1/label-sets/{quote(self.set_name, safe='')}/files?under={quote(first)}"
        try:
            found: dict[str, int] = self.session.server.json(path)["files"]
        except Gone:
            return {}
        return found

    def sizes(self, under: str = "") -> dict[str, int]:
        if not self.set_name:
            name, _, inner = under.partition("/")
            names = [name] if name else self.folders()
            return {f"{n}/{k}": v for n in names for k, v in self.below(n).sizes(inner).items()}
        found = self._list(under.partition("/")[0])
        below = f"{under}/" if under else ""
        return {key: size for key, size in found.items() if key.startswith(below)}

    def size(self, key: str, *, fresh: bool = False) -> int | None:
        first, inner, _ = key.partition("/")
        if fresh or not inner or not self.set_name:
            return self._head(key)
        if first not in self._listed:
            self._listed[first] = self._list(first)
        known = self._listed[first].get(key)
        if known is None and _seed_of(key) in self._awaited:
            known = self._wait_for(key)
            if known is not None:
                self._listed[first][key] = known
        return known

    def _head(self, key: str) -> int | None:
        server = self.session.server

        def attempt() -> int | None:
            with server.exchange("HEAD", self._path(key)) as answer:
                server.require(answer, (200,))
                return answer.length

        try:
            return server.patiently(attempt)
        except Gone:
            return None

    def _wait_for(self, key: str) -> int | None:
        """The size of what is being computed: the server answers when it is stored."""
        server, seed = self.session.server, _seed_of(key)

        def attempt() -> int | None:
            try:
                return size()
            except Gone:  # a seed that the set has yet to grow to is not waited for by the server
                told = self._ask([seed] if seed is not None else [])
                if told.get("failed"):
                    raise SsktError(f"label server {server} failed: {told['message']}") from None
                if not told.get("missing"):
                    return size()
                raise Computing(f"{told['missing']} shards of seed {seed}", 1) from None

        def size() -> int | None:
            with server.exchange("GET", self._path(key), {"Range": "bytes=0-0"}) as answer:
                server.require(answer, (200, 206))
                if answer.status == 200:
                    return answer.length
                total = (answer.header("Content-Range") or "").rpartition("/")[2]
                return int(total) if total.isdecimal() else None

        try:
            return server.patiently(attempt)
        except Gone:
            return None

    def refresh(self) -> None:
        self._listed.clear()

    def forget(self, key: str) -> None:
        """Takes a file that turned out to be gone out of the listing."""
        self._listed.get(key.partition("/")[0], {}).pop(key, None)

    def read(self, key: str) -> bytes:
        server = self.session.server

        def attempt() -> bytes:
            with server.exchange("GET", self._path(key)) as answer:
                server.require(answer, (200,))
                return answer.read()

        return server.patiently(attempt)

    def md5(self, key: str) -> str | None:
        return None

    def read_part(self, key: str, start: int | None, stop: int | None) -> bytes:
        """See ``Place``. Shards come through the node cache. Raises ``CorruptStore``."""
        array, shard, _ = key.partition("/c/")
        if not shard or key.endswith(RECORD_ENDING):
            return self.read(key)[start:stop]
        try:
            file = self.session.node().open(
                self.session.server, self.set_name, key, self._chunks_of(array)
            )
        except Gone as error:
            self.forget(key)
            raise FileNotFoundError(f"{key} is gone") from error
        with file:
            begin, end, _ = slice(start, stop).indices(os.fstat(file.fileno()).st_size)
            file.seek(begin)
            return file.read(max(0, end - begin))

    def _chunks_of(self, array: str) -> int:
        """Chunks of an array's shards. Raises ``CorruptStore`` for another format."""
        if array not in self._chunks:
            key = f"{array}/zarr.json"
            try:
                self._chunks[array] = layout_of(json.loads(self.read(key))).chunks
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise CorruptStore(
                    f"{self.where(key)} is not as docs/format.md says ({error})"
                ) from error
        return self._chunks[array]

    def computes(self) -> bool:
        """Whether this server computes labels that are missing."""
        return bool(self.session.server.json("/v1/server").get("on_demand"))

    def compute(self, seeds: list[int]) -> None:
        """Asks for labels that are missing; from then on, reading those seeds waits for them.

        Raises ``InputError`` if the server refuses, ``SsktError`` if it cannot.
        """
        self.session.server.patiently(lambda: self._ask(seeds))
        self._awaited |= frozenset(seeds)
        self.refresh()

    def _ask(self, seeds: list[int]) -> dict[str, Any]:
        """What the server says of the missing shards of some seeds, now to be computed."""
        server, path = self.session.server, f"/v1/label-sets/{quote(self.set_name, safe='')}"
        body = json.dumps({"seeds": seeds}).encode()
        headers = {"Content-Type": "application/json"}
        with server.exchange("POST", f"{path}:compute", headers, body) as answer:
            if answer.status == 503 and "missing" in answer.problem:
                return answer.problem  # a full queue: who reads asks again
            server.require(answer, (202,))
            told: dict[str, Any] = json.loads(answer.read())
            return told

    def close(self) -> None:
        """Ends all waiting for the server; what is being read raises ``InputError``."""
        self.session.server.close()

    def claims(self, name: str) -> NoReturn:
        self.refuse_writing()

    def put(self, key: str, data: bytes) -> NoReturn:
        self.refuse_writing()

    def create(self, key: str, data: bytes) -> NoReturn:
        self.refuse_writing()

    def update(self, key: str, change: Callable[[bytes], bytes | None]) -> NoReturn:
        self.refuse_writing()

    def delete(self, keys: Iterable[str]) -> NoReturn:
        self.refuse_writing()

    def refuse_writing(self) -> NoReturn:
        """Raises ``InputError``."""
        raise InputError(
            f"{self.session.server} is served read-only; run this on the cache that it serves "
            "(its folder or s3://... URL)"
        )


def _seed_of(key: str) -> int | None:
    parts = key.split("/")
    return int(parts[2]) if len(parts) > 3 and parts[1] == "c" and parts[2].isdecimal() else None


def open_server(url: str, how: Fetching | None = None) -> HttpPlace:
    """The cache behind a label server; nothing is asked of it yet.

    Raises ``InputError`` for what is no address of one.
    """
    how = how or Fetching()
    return HttpPlace(Session(Server(url, how.wait_minutes), how))
