"""The disk cache of a node: shard files of label servers, downloaded once for all its processes.

Layout, below a folder that the user names and that is kept, or a temporary one of this user:

    sskt-labels-HOST-HASH/                one label server
        locks/NN                          flock: one process at a time downloads a shard
        SET/labels.c.0.3.0@ETAG.shard     whole, and checked by the shard's own checksums

A label set that was removed and made again has the same digest, and its files have other entity
tags. Each process therefore asks once for each shard whether its tag is still the server's
(``If-None-Match``), and checks the file's checksums, so that neither an old file nor one that the
disk has changed is used. The server is needed even where all shards are in the cache.
"""

from __future__ import annotations

import contextlib
import functools
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
from urllib.parse import quote, unquote

from sskt.teacher_cache.errors import CorruptStore, DiskFull, InputError
from sskt.teacher_cache.format.shards import ShardLayout, shard_damage
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.storage.http.answers import Answer, Gone, Oversized
from sskt.teacher_cache.storage.http.client import Server
from sskt.teacher_cache.storage.http.temporary_folder import PREFIX, enter, leave, private_folder
from sskt.teacher_cache.storage.locks import file_lock
from sskt.teacher_cache.storage.regular_files import open_regular, read_regular

GIB = 2**30
KEPT_GIB = 50.0
"""Default size of a folder that is kept."""
TEMPORARY_GIB = 20.0
"""Default size of a temporary folder, which takes at most half of the free space."""
LONGEST_TAG = 120
"""Characters of an entity tag in a file's name; a longer one never matches, so that its file is
downloaded by each process."""
REPORT_SECONDS = 30.0
"""Waiting for another process's download is logged after this time; that process may hang."""
AHEAD_SECONDS = 60.0
"""Files used so much later than now were used before the clock was set back."""
LOCKS = 64
_log = logging.getLogger("sskt")


class DiskCache:
    """The shard files of one server. Threads may share it; see ``disk_cache``.

    Args:
        url: URL of the label server.
        folder: Folder of the cache; None for a temporary one.

    Raises:
        InputError: If the folder cannot be used.
    """

    def __init__(self, url: str, folder: Path | None = None) -> None:
        host = re.sub(r"[^A-Za-z0-9.-]", "-", url.partition("://")[2])[:60]
        name = f"{PREFIX}{host}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
        self._kept = folder is not None
        self._base = folder.absolute() if folder is not None else private_folder()
        self._home = self._base / name
        self._checked: dict[str, Path] = {}
        self._guard = threading.Lock()
        self._reported = False
        with self._disk_errors():
            if not self._kept:
                lock = enter(self._base, name)
                weakref.finalize(self, leave, self._base, name, lock, os.getpid())
            (self._home / "locks").mkdir(parents=True, exist_ok=True)
        self.limit(None)

    def limit(self, gibibytes: float | None) -> None:
        """Sets the size above which the files used least recently are removed.

        Args:
            gibibytes: Size of all files of all servers; None for the default.
        """
        if gibibytes is None:
            gibibytes = KEPT_GIB
            if not self._kept:
                used = sum(size for _, size, _ in _files(self._base))
                room = shutil.disk_usage(self._base).free + used
                gibibytes = min(TEMPORARY_GIB, room / 2 / GIB)
        self._budget = int(gibibytes * GIB)
        self._room = 0

    def read(
        self, server: Server, name: str, key: str, layout: ShardLayout, part: slice = slice(None)
    ) -> bytes:
        """Reads a shard's file as the server has it now; downloads it if necessary.

        Args:
            server: The label server.
            name: Name of the label set.
            key: The file's key within the set.
            layout: Chunks and largest size of the array's shards.
            part: The bytes to read.

        Raises:
            Gone: If the server has no such file.
            CorruptStore: If it arrives damaged twice.
            DiskFull: If there is no room.
            InputError: If the server cannot be reached or refuses.
        """
        stem = _stem(name, key)
        with self._disk_errors():
            data = self._read_checked(stem, part)
            if data is None:
                with self._locked(server, stem):
                    data = self._read_checked(stem, part)  # another thread has downloaded it
                    if data is None:
                        data = self._fetch(server, f"{name}/{key}", layout, stem)[part]
            return data

    def forget(self, name: str, key: str) -> None:
        """Removes the file of a shard, whose content was found wrong, so that it comes again.

        Args:
            name: Name of the label set.
            key: The file's key within the set.
        """
        stem = _stem(name, key)
        self._checked.pop(stem, None)
        with self._disk_errors():
            for path in (self._home / stem).parent.glob(f"{Path(stem).name}*.shard"):
                _remove(path)

    def _read_checked(self, stem: str, part: slice) -> bytes | None:
        path = self._checked.get(stem)
        if path is None:
            return None
        with contextlib.suppress(OSError), open_regular(path) as file:  # or it is downloaded anew
            with contextlib.suppress(OSError):
                os.utime(file.fileno())
            start, stop, _ = part.indices(os.fstat(file.fileno()).st_size)
            file.seek(start)
            return b"".join(iter(lambda: file.read(max(0, stop - file.tell())), b""))
        return None

    @contextlib.contextmanager
    def _locked(self, server: Server, stem: str) -> Iterator[None]:
        began = time.monotonic()

        def pause(seconds: float) -> None:
            server.pause(seconds)
            if time.monotonic() - began > REPORT_SECONDS and not self._reported:
                self._reported = True
                _log.warning(
                    "another process of this machine is downloading labels of %s; waiting for it",
                    server,
                )

        path = self._home / "locks" / str(zlib.crc32(stem.encode()) % LOCKS)
        with file_lock(path, pause, mode=0o666):
            yield

    def _fetch(self, server: Server, key: str, layout: ShardLayout, stem: str) -> bytes:
        """The content of a file as the server has it now, stored and checked."""

        def receive(answer: Answer) -> tuple[str, bytes | None]:
            data = None if answer.status == 304 else answer.read(layout.largest)
            return answer.header("ETag") or "", data

        kept, damaged = self._newest(stem), 0
        while True:
            headers = {"If-None-Match": _tag(kept)} if kept else {}
            url, damage = f"{server.files}/{quote(key)}", ""
            try:
                tag, data = server.ask(url, receive, headers=headers, wanted=(200, 304))
            except Oversized as error:
                tag, data, damage = "", b"", str(error)
            path = self._home / f"{stem}{quote(tag, safe='')[:LONGEST_TAG]}.shard"
            if data is None and kept:
                path = kept
                with contextlib.suppress(OSError):
                    data = read_regular(kept)
            if data is not None and not damage:
                damage = shard_damage(data, layout.chunks)
            if data is not None and not damage:
                break
            damaged += not kept
            if damaged == 2:
                raise CorruptStore(
                    f"label set {key.replace('/', ': ', 1)}, as {server} sends it, is damaged "
                    f"({damage}); run sskt verify on the server's own cache, delete the shard it "
                    "names and cache it again"
                )
            kept = None
        if path != kept:
            self._store(path, data)
        if kept and path != kept:
            _remove(kept)
        self._checked[stem] = path
        return data

    def _newest(self, stem: str) -> Path | None:
        """The newest file of a shard; older ones are removed."""
        times: dict[Path, int] = {}
        for path in (self._home / stem).parent.glob(f"{Path(stem).name}*.shard"):
            if not path.is_file():
                _remove(path)
                continue
            with contextlib.suppress(FileNotFoundError):  # another process has evicted it
                times[path] = path.stat().st_mtime_ns
        newest = max(times, key=lambda path: times[path], default=None)
        for old in times.keys() - {newest}:
            old.unlink(missing_ok=True)
        return newest

    def _store(self, path: Path, data: bytes) -> None:
        """Writes a file, after removing others if there is no room. Raises ``DiskFull``."""
        while True:
            try:
                durable_write(path, data, synced=False)
                break
            except DiskFull:
                if not self._evict(self._budget // 2):
                    raise
        with self._guard:
            self._room -= len(data)
        if self._room < 0:
            self._evict(self._budget)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except Gone:
            raise
        except DiskFull as error:
            if not isinstance(error.__cause__, OSError):  # it is the server's disk that is full
                raise
            raise DiskFull(
                f"no room for labels in {self._base} ({error.__cause__.strerror}); free some "
                "space, choose another folder with --label-cache, or less with --label-cache-size"
            ) from error
        except OSError as error:
            raise InputError(
                f"cannot keep labels in {self._base} ({error.strerror}); choose another folder "
                "with --label-cache"
            ) from error

    def _evict(self, most: int) -> bool:
        """Removes the files used least recently until ``most`` bytes are left; False if none."""
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
            # Other processes store files too: count again before the room could be used up.
            self._room = max(0, self._budget - total) // 8
        return removed


@functools.cache
def disk_cache(url: str, folder: Path | None) -> DiskCache:
    """The disk cache of a server and folder in this process; several trainings share it."""
    return DiskCache(url, folder)


def _files(base: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of last use, bytes and path of every file that may be removed.

    The time of a file that was used when the clock was ahead is 0: it would outlive all others.
    """
    latest = time.time() + AHEAD_SECONDS
    for home in base.glob(f"{PREFIX}*"):
        for path in home.glob("*/*"):
            if path.suffix in (".shard", ".partial"):
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    used = found.st_mtime if found.st_mtime <= latest else 0.0
                    yield used, found.st_size, path


def _stem(name: str, key: str) -> str:
    return f"{quote(name, safe='')}/{key.replace('/', '.')}@"


def _remove(path: Path) -> None:
    """Removes a file of the cache, or the folder that is in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _tag(path: Path) -> str:
    """The entity tag in a file's name."""
    return unquote(path.name.partition("@")[2].removesuffix(".shard")) or '"none"'
