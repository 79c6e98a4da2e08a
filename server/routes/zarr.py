"""The files of label sets as they are stored, read-only, for any Zarr client.

A shard never changes, so reading in order costs the server one read and one write of its bytes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sskt.server.http.openapi import problems
from sskt.server.http.problems import DAMAGED, UNREACHABLE, Problem
from sskt.server.routes.compute import may_compute, no_such_seed, wait_for
from sskt.server.state import State, label_set_of, state_of
from sskt.teacher_cache.format.metadata import GROUP
from sskt.teacher_cache.format.shards import RECORD_ENDING
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.storage.base import Storage
from sskt.teacher_cache.storage.local import LocalStorage

if TYPE_CHECKING:
    from sskt.teacher_cache.storage.object_store import BucketStorage

PIECE = 2**20
"""Bytes of a file in memory for each answer: a slow client holds no more."""
IMMUTABLE = "private, max-age=31536000, immutable"
MUTABLE = "no-cache"
RETRY = {"Retry-After": "5"}

_KEY = re.compile(r"(?:[a-z_]+/)?(?:zarr\.json|c/[0-9/]{1,32}(?:\.json)?)")
_SHARD = re.compile(r"([a-z_]+)/c/(\d{1,10})/(\d{1,10})(/0)?")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_NO_FILE = (errno.ELOOP, errno.ENXIO)

router = APIRouter(tags=["zarr"])


class File(Protocol):
    """One stored file, open."""

    size: int
    tag: str

    async def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop - 1``. Raises ``OSError`` if the file has become shorter."""

    def close(self) -> None:
        """Ends reading."""


@dataclass
class LocalFile:
    """A file of a cache folder. The strong tag names inode, size and time of writing."""

    handle: int
    size: int
    tag: str

    async def read(self, start: int, stop: int) -> bytes:
        """Reads from the page cache at once, else in a thread: other requests need not wait."""
        try:
            data = _pread(self.handle, stop - start, start, os.RWF_NOWAIT)
            if len(data) == stop - start:
                return data
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):  # NFS, FUSE: not supported
                raise
        return await asyncio.to_thread(_pread, self.handle, stop - start, start)

    def close(self) -> None:
        os.close(self.handle)


def _pread(handle: int, count: int, start: int, flags: int = 0) -> bytes:
    data = bytearray(count)
    done = os.preadv(handle, [data], start, flags)
    while not flags and done < count:
        more = os.preadv(handle, [memoryview(data)[done:]], start + done)
        if not more:
            raise OSError(errno.EIO, "the file became shorter")
        done += more
    return data if done == count else data[:done]  # type: ignore[return-value]


def open_local(root: Path, key: str) -> LocalFile | None:
    """Opens a file below a folder.

    Returns:
        The file; None if there is none.

    Raises:
        Problem: 503 if the file cannot be read, 500 if it is no regular file or lies elsewhere by
            a link. Neither is 404, which Zarr clients read as fill values.
    """
    path = root / key
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        if error.errno in _NO_FILE:
            raise _no_file(key) from error
        what = os.strerror(error.errno or errno.EIO)
        raise Problem(503, UNREACHABLE, f"cannot read {key}: {what}", RETRY) from error
    try:
        found = os.fstat(handle)
        real = Path(f"/proc/self/fd/{handle}").readlink()
        if not stat.S_ISREG(found.st_mode) or not real.is_relative_to(os.path.realpath(root)):
            raise _no_file(key)
    except BaseException:
        os.close(handle)
        raise
    tag = f'"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"'
    return LocalFile(handle, found.st_size, tag)


def _no_file(key: str) -> Problem:
    return Problem(500, DAMAGED, f"{key} is not a regular file of the cache; run sskt verify")


@dataclass
class RemoteFile:
    """An object of a cache in a bucket, which is transferred piece by piece."""

    storage: BucketStorage
    key: str
    size: int
    tag: str

    async def read(self, start: int, stop: int) -> bytes:
        """See ``File``.

        Raises:
            Problem: 404 if the object is gone, 503 if it has another version now.
            InputError: If the bucket cannot be reached.
        """
        return await asyncio.to_thread(self._read, start, stop)

    def _read(self, start: int, stop: int) -> bytes:
        import obstore
        from obstore.exceptions import PreconditionError

        from sskt.teacher_cache.storage.object_store import plainly

        storage = self.storage
        options: Any = {"range": (start, stop)}
        if self.tag.startswith('"') and self.tag != f'"{self.size:x}"':  # the bucket's own
            options["if_match"] = self.tag
        try:
            with plainly(storage.where(self.key)):
                found = obstore.get(storage.bucket, storage.key(self.key), options=options)
                return bytes(found.bytes())
        except FileNotFoundError:
            raise _nothing(self.key) from None
        except PreconditionError:
            again = {"Retry-After": "1"}
            detail = f"{self.key} changed while it was read; ask again"
            raise Problem(503, "changed", detail, again) from None

    def close(self) -> None:
        """Does nothing: no connection is held."""


async def open_file(home: Storage, key: str) -> File | None:
    """Opens the file or object of a key of the cache.

    Returns:
        The file; None if there is none.

    Raises:
        Problem: As ``open_local``; 503 if the folder of the cache is gone.
        InputError: If a bucket cannot be reached.
    """
    if isinstance(home, LocalStorage):
        local = open_local(home.path, key)
        if local is None and not home.path.is_dir():  # a lost mount is no missing shard
            raise Problem(503, "cache out of reach", "the cache's folder is gone", RETRY)
        return local
    from sskt.teacher_cache.storage.object_store import BucketStorage

    assert isinstance(home, BucketStorage)
    found = await asyncio.to_thread(home.entity, key)
    return RemoteFile(home, key, *found) if found else None


def shard_of(label_set: LabelSet, inner: str) -> Shard | None:
    """The shard that a key within a label set belongs to, of any seed; None for other keys."""
    match = _SHARD.fullmatch(inner.removesuffix(RECORD_ENDING))
    if not match or match[1] not in label_set.arrays:
        return None
    seed, block = int(match[2]), int(match[3])
    if block >= label_set.blocks or seed >= 2**31:
        return None
    shard = label_set.shard(seed, block)
    return shard if inner in label_set.shard_keys(shard) else None


def ranges(header: str | None, size: int) -> tuple[int, int] | None:
    """Reads a Range header.

    Args:
        header: Its value, if the request has one.
        size: Bytes of the file.

    Returns:
        First byte, and the byte after the last one; None for the whole file, which RFC 9110 allows
        for several ranges and for other units.

    Raises:
        Problem: 416 if the file has no such bytes.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if not match or not (match[1] or match[2]):
        return None
    if any(len(digits) > 18 for digits in match.groups()):
        raise _unsatisfiable(size)
    if not match[1]:
        start, stop = max(0, size - int(match[2])), size
    else:
        start = int(match[1])
        stop = min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= stop:
        raise _unsatisfiable(size)
    return start, stop


def _unsatisfiable(size: int) -> Problem:
    return Problem(
        416,
        "range not satisfiable",
        f"the file has {size} bytes",
        {"Content-Range": f"bytes */{size}"},
    )


class FileAnswer(Response):
    """A part of a file, sent in pieces: the next is read when the client has taken the last."""

    def __init__(
        self, file: File, start: int, stop: int, status: int, headers: dict[str, str]
    ) -> None:
        super().__init__(None, status, headers, "application/octet-stream")
        self.file, self.start, self.stop = file, start, stop
        self.headers["Content-Length"] = str(stop - start)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        head = {"type": "http.response.start", "status": self.status_code}
        try:
            first = b""
            if scope["method"] != "HEAD" and self.stop > self.start:
                first = await self.file.read(self.start, min(self.start + PIECE, self.stop))
            await send(head | {"headers": self.raw_headers})
            await send(_piece(first, more=0 < len(first) < self.stop - self.start))
            if first:
                for begin, end in _pieces(self.start + len(first), self.stop):
                    data = await self.file.read(begin, end)
                    await send(_piece(data, more=end < self.stop))
        finally:
            self.file.close()


def _piece(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for begin in range(start, stop, PIECE):
        yield begin, min(begin + PIECE, stop)


@router.api_route(
    "/zarr/{path:path}",
    methods=["GET"],
    operation_id="read_file",
    summary="A file of a label set, as it is stored",
    responses={
        200: {"description": "The file.", "content": {"application/octet-stream": {}}},
        206: {"description": "The part that Range asks for."},
        304: {"description": "The file is the one that If-None-Match names."},
        **problems(404, 409, 416, 507),
    },
    response_class=Response,
)
async def read_file(path: str, request: Request) -> Response:
    """Zarr v3 groups, one for each label set: `/zarr/NAME/zarr.json`, `/zarr/NAME/labels/c/0/0/0`.

    `docs/format.md` describes the layout; other files of the cache are not served. A missing shard
    is a 404, which Zarr clients read as fill values: read `/v1/label-sets/NAME/coverage` first.
    """
    state = state_of(request)
    label_set, inner = await _served(state, path)
    file = await open_file(state.home, path) or await _computed(request, state, label_set, inner)
    return answer(request, state, label_set, inner, file)


@router.head("/zarr/{path:path}", include_in_schema=False)
async def look_at_file(path: str, request: Request) -> Response:
    """Size and tag; never computes anything."""
    state = state_of(request)
    label_set, inner = await _served(state, path)
    file = await open_file(state.home, path)
    if file is None:
        raise _nothing(path)
    return answer(request, state, label_set, inner, file)


async def _served(state: State, path: str) -> tuple[LabelSet, str]:
    """The label set and the key within it that a path names.

    Raises:
        Problem: 404 if no label set has such a file, and as ``Sets.get``.
    """
    name, _, inner = path.partition("/")
    if not _KEY.fullmatch(inner):
        raise _nothing(path)
    label_set = await label_set_of(state, name)
    shard = shard_of(label_set, inner)
    if shard and shard.seed >= label_set.seeds and not label_set.storage.is_local:
        label_set = await asyncio.to_thread(state.sets.get, name, fresh=True)
    if label_set.name != name or not (shard or inner in metadata_keys(label_set)):
        raise _nothing(path)
    if shard and shard.seed >= label_set.seeds:
        raise no_such_seed(state, label_set, shard.seed)
    return label_set, inner


def metadata_keys(label_set: LabelSet) -> list[str]:
    """The files of a label set that belong to no shard: JSON documents and coordinates."""
    arrays = [f"{array}/{GROUP}" for array in label_set.arrays]
    return [GROUP, *arrays, *label_set.constant_keys()]


def answer(request: Request, state: State, label_set: LabelSet, inner: str, file: File) -> Response:
    """304, a part, or the whole of an open file."""
    try:
        shard = shard_of(label_set, inner)
        if shard and file.size == 0:  # Zarr clients would read fill values
            raise Problem(500, DAMAGED, f"{label_set.name}/{inner} is empty; run sskt verify")
        headers = {
            "ETag": file.tag,
            "Accept-Ranges": "bytes",
            "Cache-Control": IMMUTABLE if "/c/" in inner else MUTABLE,
        }
        if _names(request.headers.get("if-none-match"), file.tag):
            file.close()
            return Response(None, 304, headers)
        wanted = request.headers.get("range")
        if request.headers.get("if-range", file.tag) != file.tag or request.method == "HEAD":
            wanted = None
        part = ranges(wanted, file.size)
        start, stop = part or (0, file.size)
        if part:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        whole = stop == file.size and request.method == "GET"
        if shard and whole and inner == label_set.shard_key(label_set.arrays[-1], shard):
            state.metrics.labels(label_set.name, shard.stop - shard.start)
        return FileAnswer(file, start, stop, 206 if part else 200, headers)
    except BaseException:
        file.close()
        raise


def _names(header: str | None, tag: str) -> bool:
    if header is None:
        return False
    found = [t.strip().removeprefix("W/") for t in header.split(",")]
    return tag in found or "*" in found


async def _computed(request: Request, state: State, label_set: LabelSet, inner: str) -> File:
    """Opens the file of a shard that is missing, once the shard is computed.

    Raises:
        Problem: 404 if it is not computed on demand, and as ``wait_for``.
    """
    shard = shard_of(label_set, inner)
    key = f"{label_set.name}/{inner}"
    if state.on_demand and shard and may_compute(request):
        await wait_for(state, label_set, shard.seed, shard.block)
        file = await open_file(state.home, key)
        if file:
            return file
    raise _nothing(key)


def _nothing(path: str) -> Problem:
    return Problem(404, "not found", f"the cache has no {path}")
