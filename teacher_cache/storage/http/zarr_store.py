"""Shards of a label server as Zarr reads them: from the node cache, downloaded when missing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from sskt.teacher_cache.errors import CorruptStore
from sskt.teacher_cache.storage.http.answers import Gone

if TYPE_CHECKING:
    from sskt.teacher_cache.storage.http.place import HttpPlace

AT_ONCE = 4
"""Shards that a process downloads at once."""


class Workers:
    """Daemon threads for calls that may wait for long.

    Those of a ``ThreadPoolExecutor`` are waited for when the interpreter ends, so that Ctrl-C
    would hang for as long as a server is away.
    """

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._work, name="sskt-fetch", daemon=True).start()

    async def run(self, call: Callable[[], Any]) -> Any:
        """What ``call`` gives, from one of the threads."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._calls.put((loop, future, call))
        return await future

    def _work(self) -> None:
        while True:
            loop, future, call = self._calls.get()
            result, failed = None, None
            try:
                result = call()
            except Exception as error:
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(_settle, future, result, failed)
            del loop, future, call, result, failed


@functools.cache
def workers(process: int) -> Workers:
    """The threads of this process that download."""
    return Workers(AT_ONCE)


_Call = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _chunks_of(data: bytes, where: str) -> int:
    """Inner chunks of an array's shards. Raises ``CorruptStore`` for another format."""
    from sskt.teacher_cache.format.metadata import shard_rows_of

    try:
        document = json.loads(data)
        (codec,) = document["codecs"]
        inner = codec["configuration"]
        ends = [inner["codecs"][-1]["name"], inner["index_codecs"][-1]["name"]]
        if codec["name"] != "sharding_indexed" or inner.get("index_location", "end") != "end":
            raise ValueError(f"codec {codec['name']}")
        if ends != ["crc32c", "crc32c"]:
            raise ValueError("no checksums")
        return -(-shard_rows_of(document) // int(inner["chunk_shape"][1]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptStore(f"{where} is not as docs/format.md says ({error})") from error


class NodeStore(Store):
    """One array's files, for Zarr: its metadata, and shards from the node cache.

    A shard that is gone is an error: Zarr would give fill values.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, place: HttpPlace, array: str, document: bytes) -> None:
        super().__init__(read_only=True)
        self._place, self._documents = place, {f"{array}/zarr.json": document}
        self._chunks = _chunks_of(document, place.where(f"{array}/zarr.json"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NodeStore) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        return str(self._place)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        data = await workers(os.getpid()).run(lambda: self._read(key, byte_range))
        return None if data is None else prototype.buffer.from_bytes(data)

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        place = self._place
        if "/c/" not in key:
            return self._documents.get(key)
        session = place.session
        try:
            file = session.node().open(session.server, place.set_name, key, self._chunks)
        except Gone as error:
            place.forget(key)
            raise FileNotFoundError(f"{key} is gone") from error
        with file:
            size = file.seek(0, 2)
            start, stop = 0, size
            if isinstance(byte_range, RangeByteRequest):
                start, stop = byte_range.start, byte_range.end
            elif isinstance(byte_range, OffsetByteRequest):
                start = byte_range.offset
            elif isinstance(byte_range, SuffixByteRequest):
                start = max(0, size - byte_range.suffix)
            file.seek(start)
            return file.read(stop - start)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(k, prototype, r) for k, r in key_ranges)))

    async def exists(self, key: str) -> bool:
        size = await workers(os.getpid()).run(lambda: self._place.size(key))
        return size is not None

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError
