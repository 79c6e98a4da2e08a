"""Arrays of a label server for Zarr: shards come from the disk cache of the node."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

_T = TypeVar("_T")


class ServedStore(Store):
    """One array of a label set, read-only.

    A shard that is gone is an error, where Zarr would give fill values. The base class is Zarr's
    abstract one and no store that could answer for a shard by itself.

    Args:
        array: Name of the array.
        metadata: Its ``zarr.json``.
        read_part: Reads a part of a file by its key within the label set; may wait for long.
    """

    supports_writes = supports_deletes = supports_listing = False

    def __init__(
        self, array: str, metadata: bytes, read_part: Callable[[str, int | None, int | None], bytes]
    ) -> None:
        super().__init__(read_only=True)
        self._metadata = {f"{array}/zarr.json": metadata}
        self._read_part = read_part

    def __eq__(self, other: object) -> bool:
        return self is other

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if "/c/" in key:
            data = await _in_thread(lambda: self._read(key, byte_range))
            return prototype.buffer.from_bytes(data)
        known = self._metadata.get(key)
        return None if known is None else prototype.buffer.from_bytes(known)

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes:
        if isinstance(byte_range, RangeByteRequest):
            return self._read_part(key, byte_range.start, byte_range.end)
        if isinstance(byte_range, OffsetByteRequest):
            return self._read_part(key, byte_range.offset, None)
        if isinstance(byte_range, SuffixByteRequest):
            return self._read_part(key, -byte_range.suffix, None)
        return self._read_part(key, None, None)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(k, prototype, r) for k, r in key_ranges)))

    async def exists(self, key: str) -> bool:
        return key in self._metadata

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


async def _in_thread(call: Callable[[], _T]) -> _T:
    """Calls a function that may wait for long in a daemon thread.

    The interpreter waits for the threads of ``asyncio.to_thread`` when it ends, so that Ctrl-C
    would hang for as long as a server is away.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | Exception) -> None:
        if future.cancelled():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def work() -> None:
        result: _T | Exception
        try:
            result = call()
        except Exception as error:
            result = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=work, name="sskt-fetch", daemon=True).start()
    return await future
