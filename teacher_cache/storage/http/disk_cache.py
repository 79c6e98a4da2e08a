"""Shard files of label servers on this machine's disk, each downloaded once for all its processes.

Layout, below a folder that the user names (it is kept) or a temporary one of this user (the last
process that uses it removes it):

    sskt-labels-HOST-HASH/                      one label server
        locks/NN                                flock: one process at a time looks after a shard
        SET/labels.c.0.3.0@ETAG.shard           whole, and checked by the shard's own checksums
        SET/labels.c.0.3.0@ETAG.partial         begun; goes on where it stopped

The entity tag in the name says which file of the server it is. A set that was removed and made
again has the same digest, but its files have other tags: each process asks once for each shard
(``If-None-Match``) whether what is here is still what the server has, and checks the file's
checksums. So nothing stale and nothing that the disk has changed is used, and the server is needed
even where all shards are here.

flock and not ``locks.Locks``: it also keeps this process's threads apart, and it too ends with
its process. Locks are given back explicitly, as forked loader workers inherit the handles.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import threading
import time
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar
from urllib.parse import quote, unquote

from sskt.teacher_cache.errors import CorruptStore, DiskFull, InputError
from sskt.teacher_cache.format.shards import shard_damage
from sskt.teacher_cache.storage.http.answers import Answer, Gone, Unavailable
from sskt.teacher_cache.storage.http.client import Server
from sskt.teacher_cache.storage.http.disk_cache_users import (
    PREFIX,
    enter,
    leave,
    private_folder,
)
from sskt.teacher_cache.storage.locks import lock_file, unlock_file

GIB = 2**30
KEPT_GIB = 50.0
"""Default budget of a folder that is kept."""
TEMPORARY_GIB = 20.0
"""Of a temporary one, which takes at most half of the free space."""
PIECE = 2**20
LONGEST_TAG = 120
TOLD_SECONDS = 30.0
"""After so long it is told that another process is waited for; it may be stopped."""
_LOCKS = 64
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_POLLS = (0.002, 0.1)
_log = logging.getLogger("sskt")
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class NodeCache:
    """The shard files of one server. Threads may share it.

    Raises ``InputError`` if the folder cannot be used.
    """

    _known: ClassVar[dict[tuple[str, Path | None], NodeCache]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def of(cls, url: str, folder: Path | None, gibibytes: float | None) -> NodeCache:
        """One for each server and folder in this process: several trainings share it."""
        with cls._guard:
            if (url, folder) not in cls._known:
                cls._known[url, folder] = cls(url, folder)
            found = cls._known[url, folder]
            found.set_budget(gibibytes)
            return found

    def __init__(self, url: str, folder: Path | None = None) -> None:
        host = re.sub(r"[^A-Za-z0-9.-]", "-", url.partition("://")[2])[:60]
        name = f"{PREFIX}{host}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
        self._kept = folder is not None
        self._base = folder.absolute() if folder is not None else private_folder()
        self._home = self._base / name
        self._good: dict[str, Path] = {}
        self._room = 0
        self._told = False
        try:
            if not self._kept:
                users = enter(self._base, name)
                weakref.finalize(self, leave, self._base, name, users, os.getpid())
            (self._home / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot keep labels in {self._base}: {error.strerror}; name another folder with "
                "--label-cache"
            ) from error
        self.set_budget(None)

    def set_budget(self, gibibytes: float | None) -> None:
        """How much may lie here; None for the default."""
        if gibibytes is None:
            gibibytes = KEPT_GIB
            if not self._kept:
                here = sum(size for _, size, _ in _files(self._base))
                room = shutil.disk_usage(self._base).free + here
                gibibytes = min(TEMPORARY_GIB, room / 2 / GIB)
        self._budget = int(gibibytes * GIB)
        self._room = 0

    def open(self, server: Server, name: str, key: str, chunks: int) -> BinaryIO:
        """A shard's file, as the server has it, to be read even if it is evicted meanwhile.

        chunks: its inner chunks. Raises ``FileNotFoundError`` if the server has no such file,
        ``CorruptStore`` if it arrives damaged twice, ``DiskFull``, ``InputError`` if the server
        cannot be reached or refuses.
        """
        stem = f"{quote(name, safe='')}/{key.replace('/', '.')}@"
        with self._plainly():
            file = self._open_known(stem)
            if file is not None:
                return file
            with self._alone(server, stem):
                file = self._open_known(stem)  # another thread of this process
                if file is None:
                    file = self._fetched(server, name, key, chunks, stem)
                    self._good[stem] = Path(file.name)
                return file

    def _open_known(self, stem: str) -> BinaryIO | None:
        path = self._good.get(stem)
        with contextlib.suppress(FileNotFoundError):
            return _opened(path) if path else None
        return None

    @contextlib.contextmanager
    def _alone(self, server: Server, stem: str) -> Iterator[None]:
        """Holds the lock of a shard; waits for whoever is downloading it."""
        path = self._home / "locks" / str(zlib.crc32(stem.encode()) % _LOCKS)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            pause, longest = _POLLS
            began = time.monotonic()
            while not lock_file(handle, wait=False):
                server.pause(pause)
                pause = min(2 * pause, longest)
                if time.monotonic() - began > TOLD_SECONDS and not self._told:
                    self._told = True
                    _log.warning(
                        "another process of this machine is fetching labels of %s; waiting for it",
                        server,
                    )
            try:
                yield
            finally:
                unlock_file(handle)
        finally:
            os.close(handle)

    def _fetched(self, server: Server, name: str, key: str, chunks: int, stem: str) -> BinaryIO:
        """What the server has now, downloaded if it is not here, checked."""
        url_path, bad = f"/zarr/{quote(name)}/{key}", 0
        while True:
            transfer = _Transfer(server, url_path, self._home / stem)
            try:
                path = server.patiently(transfer.attempt)
            except OSError as error:
                if error.errno not in FULL or not self._evict(self._budget // 2):
                    raise
                continue
            with contextlib.suppress(FileNotFoundError):  # evicted by another process: once more
                damage = shard_damage(path.read_bytes(), chunks)
                if not damage:
                    return self._taken_in(path)
                path.unlink()
                bad += path.suffix == ".partial"
            if bad == 2:
                raise CorruptStore(
                    f"label set {name}: {key}, as {server} sends it, is damaged ({damage}); run "
                    "sskt verify on the server's own cache, delete the shard it names and cache "
                    "it again"
                )

    def _taken_in(self, path: Path) -> BinaryIO:
        """A whole file under its name, open."""
        whole = path.with_suffix(".shard")
        path.replace(whole)
        file = _opened(whole)
        if path != whole:
            with self._guard:
                self._room -= os.fstat(file.fileno()).st_size
            if self._room < 0:
                self._evict(self._budget)
        return file

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        """Turns what the disk does into errors for people."""
        try:
            yield
        except Gone:
            raise
        except OSError as error:
            if error.errno in FULL:
                raise DiskFull(
                    f"no room for labels in {self._base} ({error.strerror}); free some space, "
                    "choose another folder with --label-cache, or less with --label-cache-size"
                ) from error
            raise InputError(
                f"cannot keep labels in {self._base} ({error.strerror}); choose another folder "
                "with --label-cache"
            ) from error

    def _evict(self, most: int) -> bool:
        """Removes what was not used for longest until no more than ``most`` bytes are left.

        Whether anything was removed. Files that somebody has open can be read to their end.
        """
        removed = False
        with self._guard:
            files = sorted(_files(self._base))
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= most:
                    break
                with contextlib.suppress(OSError):
                    path.unlink()
                    removed = True
                total -= size
            # Others add too: look again before the room that is left now could be gone.
            self._room = max(0, self._budget - total) // 8
        return removed


def _files(base: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of last use, bytes and path of everything that may be evicted."""
    for home in base.glob(f"{PREFIX}*"):
        for path in home.glob("*/*"):
            if path.suffix in (".shard", ".partial"):
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    yield found.st_mtime, found.st_size, path


def _opened(path: Path) -> BinaryIO:
    file = path.open("rb")
    with contextlib.suppress(OSError):
        os.utime(file.fileno())
    return file


class _Transfer:
    """One file's way here, over as many connections as it takes."""

    def __init__(self, server: Server, url_path: str, stem: Path) -> None:
        self._server, self._path, self._stem = server, url_path, stem
        self._furthest = -1

    def attempt(self) -> Path:
        """The file, whole: ``.shard`` if it was here, else ``.partial``. Raises ``Unavailable``."""
        try:
            return self._attempt()
        except Gone:
            raise
        except FileNotFoundError as error:
            raise Unavailable("what was here is evicted by another process") from error

    def _attempt(self) -> Path:
        have, begun = self._here(".shard"), self._here(".partial")
        headers = {}
        if have is not None:
            headers = {"If-None-Match": _tag(have)}
        elif begun is not None and begun.stat().st_size and not _tag(begun).startswith("W/"):
            headers = {"Range": f"bytes={begun.stat().st_size}-", "If-Range": _tag(begun)}
        with self._server.exchange("GET", self._path, headers) as answer:
            if answer.status == 416 and begun is not None:
                begun.unlink(missing_ok=True)
                raise Unavailable("what was begun does not fit any more")
            self._server.require(answer, (200, 206, 304))
            if answer.status == 304 and have is not None:
                return have
            return self._receive(answer, begun)

    def _here(self, suffix: str) -> Path | None:
        """The newest of this shard's files; older ones are removed."""
        found = sorted(
            (p for p in self._stem.parent.glob(f"{self._stem.name}*") if p.suffix == suffix),
            key=lambda path: path.stat().st_mtime,
        )
        for stale in found[:-1]:
            stale.unlink(missing_ok=True)
        return found[-1] if found else None

    def _receive(self, answer: Answer, begun: Path | None) -> Path:
        there = 0
        if answer.status == 206:
            match = _RANGE.fullmatch(answer.header("Content-Range") or "")
            fits = match and begun is not None and int(match[1]) == begun.stat().st_size
            if begun is None or not fits or answer.header("ETag") not in (None, _tag(begun)):
                if begun is not None:
                    begun.unlink(missing_ok=True)
                raise Unavailable("the answer is another part than was asked for")
            path, there = begun, begun.stat().st_size
        else:
            path = self._fresh(answer.header("ETag") or "")
        expected = answer.length
        buffer = memoryview(bytearray(PIECE))
        got = 0
        try:
            with path.open("ab", buffering=0) as file:
                while count := answer.readinto(buffer):
                    _write(file, buffer[:count])
                    got += count
            if expected is not None and got < expected:
                raise Unavailable("the answer broke off")
        except Unavailable as error:
            further = there + got > max(self._furthest, 0)
            self._furthest = max(self._furthest, there + got)
            raise Unavailable(str(error), alive=further) from error
        return path

    def _fresh(self, tag: str) -> Path:
        """An empty file for the one that the server has now; files with other tags go."""
        for stale in self._stem.parent.glob(f"{self._stem.name}*"):
            stale.unlink(missing_ok=True)
        name = quote(tag, safe="") if len(tag) <= LONGEST_TAG else ""
        path = self._stem.with_name(f"{self._stem.name}{name}.partial")
        path.parent.mkdir(exist_ok=True)
        return path


def _write(file: BinaryIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


def _tag(path: Path) -> str:
    """The entity tag in a file's name."""
    return unquote(path.name.partition("@")[2].rpartition(".")[0]) or '"none"'
