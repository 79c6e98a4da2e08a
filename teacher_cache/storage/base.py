"""Where caches live: the few operations that the label store needs, over a local folder.

``cloud.py`` has the same operations over an object store, ``remote.py`` those that read over a
label server. Keys are relative to a place, their parts joined by ``/``. Nobody ever sees half a
file or object.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.locations import require_folder
from sskt.teacher_cache.storage.atomic import DurableStore, Locks, durable_write, sync_folder

LOCKS = ".locks"
SCHEMES = ("s3", "gs", "az")
SERVED = ("http", "https")
SWEEP, METADATA, SHARDS = range(3)
"""Bytes of a set's lock file: sweeping, metadata, and from ``SHARDS`` on one for each shard."""

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.partial")


class Claims(Protocol):
    """Who is at what: see ``durable.Locks``."""

    def claim(self, byte: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Takes a byte; False if another process has it."""

    def release(self, byte: int) -> None:
        """Gives a byte back."""

    def close(self) -> None:
        """Gives everything back."""

    def held(self, byte: int) -> contextlib.AbstractContextManager[None]:
        """Waits for a byte and holds it."""


class Place(Protocol):
    """A cache, or one label set in it. ``str(place)`` is the path or URL to name in messages.

    Raises ``InputError`` if it cannot be reached or used, ``DiskFull``.
    """

    @property
    def name(self) -> str:
        """The last part of its path."""

    @property
    def is_local(self) -> bool:
        """Whether it is a folder: renames are atomic, locks hold between processes."""

    def below(self, name: str) -> Place:
        """A place in this one."""

    def where(self, key: str) -> str:
        """A key's path or URL, for messages."""

    def there(self) -> bool:
        """Whether anything is there."""

    def folders(self) -> list[str]:
        """Names of the places in this one, sorted, without hidden ones."""

    def sizes(self, under: str = "") -> dict[str, int]:
        """Bytes of everything below a key."""

    def size(self, key: str, *, fresh: bool = False) -> int | None:
        """Bytes, None if there is no such key; ``fresh``: not from an earlier listing."""

    def refresh(self) -> None:
        """Forgets earlier listings."""

    def read(self, key: str) -> bytes:
        """The content. Raises ``FileNotFoundError``."""

    def md5(self, key: str) -> str | None:
        """MD5 of the content in hexadecimal digits, if it can be had without a transfer."""

    def put(self, key: str, data: bytes) -> None:
        """Stores the content, whole or not at all, whatever was there."""

    def create(self, key: str, data: bytes) -> bool:
        """As ``put``, but False and nothing done if the key is there."""

    def update(self, key: str, change: Callable[[bytes], bytes | None]) -> None:
        """Replaces the content by what ``change`` makes of it (None: nothing to do).

        Somebody else's update in between is not lost; ``change`` may be called again.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Removes what is there of ``keys``, for good when it returns."""

    def array(self, name: str, *, writable: bool) -> Any:
        """The Zarr array of that name."""

    def claims(self, name: str) -> Claims:
        """The claims on the label set ``name`` of this cache; close them."""

    def close(self) -> None:
        """Ends all waiting for it, in every thread."""


CacheName = str | Path | Place
"""A cache as its user names it: a folder, ``s3://BUCKET/PREFIX`` (``gs``, ``az``), a label server's
``http://HOST:PORT`` (``https``), or opened."""


@dataclass(frozen=True)
class LocalPlace:
    """A folder."""

    path: Path
    is_local: ClassVar[bool] = True

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def below(self, name: str) -> LocalPlace:
        return LocalPlace(self.path / name)

    def where(self, key: str) -> str:
        return str(self.path / key)

    def there(self) -> bool:
        return self.path.exists()

    def folders(self) -> list[str]:
        """See ``Place``. Raises ``MissingData`` if there is no such folder."""
        require_folder(self.path)
        return sorted(
            p.name for p in self.path.iterdir() if not p.name.startswith(".") and p.is_dir()
        )

    def sizes(self, under: str = "") -> dict[str, int]:
        found = {}
        for path in (self.path / under).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a partial file that is whole by now
                about = path.stat()
                if stat.S_ISREG(about.st_mode):
                    found[path.relative_to(self.path).as_posix()] = about.st_size
        return found

    def size(self, key: str, *, fresh: bool = False) -> int | None:
        try:
            return (self.path / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def refresh(self) -> None:
        """Nothing is remembered."""

    def read(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    def md5(self, key: str) -> str | None:
        with (self.path / key).open("rb") as file:
            return hashlib.file_digest(file, _md5).hexdigest()

    def put(self, key: str, data: bytes) -> None:
        durable_write(self.path / key, data)

    def create(self, key: str, data: bytes) -> bool:
        """See ``Place``; between two processes only under a claim."""
        if (self.path / key).exists():
            return False
        durable_write(self.path / key, data)
        return True

    def update(self, key: str, change: Callable[[bytes], bytes | None]) -> None:
        """See ``Place``; between two processes only under a claim."""
        data = change((self.path / key).read_bytes())
        if data is not None:
            durable_write(self.path / key, data)

    def delete(self, keys: Iterable[str]) -> None:
        paths = [self.path / key for key in keys]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            with contextlib.suppress(FileNotFoundError):
                sync_folder(folder)

    def array(self, name: str, *, writable: bool) -> Any:
        import zarr

        store = DurableStore(self.path, read_only=not writable)
        return zarr.open_array(store, path=name, mode="r+" if writable else "r")

    def claims(self, name: str) -> Locks:
        return Locks(self.path / LOCKS / f"{name}.lock")

    def close(self) -> None:
        """Nothing is waited for."""

    def sweep(self) -> None:
        """Removes creations and removals that a killed process left half-way.

        Only where nobody holds the set's lock: what another process is making stays.
        """
        for leftover in self.path.glob(".*.partial"):
            found = _PARTIAL.fullmatch(leftover.name)
            if not found or not leftover.is_dir():
                continue
            lock = self.path / LOCKS / f"{found[1]}.lock"
            if not Locks.open_here(lock):
                with contextlib.closing(Locks(lock)) as locks:
                    if locks.claim(METADATA) and locks.abandoned(leftover):
                        shutil.rmtree(leftover, ignore_errors=True)


def is_served(cache: CacheName) -> bool:
    """Whether a cache is behind a label server, and so cannot be written to."""
    return str(cache).partition("://")[0] in SERVED and "://" in str(cache)


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


def open_cache(cache: CacheName, *, make: bool = False) -> Place:
    """A cache by its name; with ``make``, ready to be written to.

    See ``cloud.py`` and ``remote.py`` for URLs. Raises ``InputError`` if the name means nothing,
    or with ``make`` if it cannot be used; ``MissingData`` if object stores are not installed.
    """
    if not isinstance(cache, str | Path):
        return cache
    scheme, mark, rest = str(cache).partition("://")
    if isinstance(cache, str) and mark:
        if is_served(cache):
            from sskt.teacher_cache.storage.http.place import open_server

            served = open_server(cache)
            if make:
                served.refuse_writing()
            return served
        if scheme not in SCHEMES:
            known = ", ".join([*(f"{s}://BUCKET/PREFIX" for s in SCHEMES), "http://HOST:PORT"])
            raise InputError(f"unknown kind of cache {cache}; expected a folder, {known}")
        from sskt.teacher_cache.storage.object_store import open_bucket

        bucket = open_bucket(scheme, rest)
        if make:
            bucket.there()
        return bucket
    path = Path(cache)
    if make:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot use {path} as cache folder: {error.strerror}") from error
    return LocalPlace(path)
