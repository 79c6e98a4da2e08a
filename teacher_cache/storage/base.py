"""Storage of caches: the operations that label sets need.

``local.py`` implements them for a folder and ``object_store.py`` for a bucket; ``http`` and
``zip_file.py`` implement those that read, for an HTTP server and a zip file. A key names a file or
object relative to its storage; its parts are joined by ``/``. Files and objects appear whole: no
reader sees a part of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

SWEEP, METADATA, SHARDS = range(3)
"""Bytes of a set's lock file: sweeping, metadata, and from ``SHARDS`` on one for each shard."""


class StorageLocks(Protocol):
    """The locks of a label set, each of which has a number. See ``locks.Locks``."""

    def acquire(self, byte: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Takes a lock; returns False if another process holds it."""

    def release(self, byte: int) -> None:
        """Releases a lock."""

    def close(self) -> None:
        """Releases all locks."""

    def held(self, byte: int) -> contextlib.AbstractContextManager[None]:
        """Waits for a lock and holds it until the context ends."""


class Storage(Protocol):
    """The storage of a cache, or of one label set in it.

    ``str(place)`` is its path or URL, for messages. All methods raise ``InputError`` if it cannot
    be reached or used; those that write raise ``DiskFull`` if there is no room.
    """

    @property
    def name(self) -> str:
        """The last part of its path."""

    @property
    def is_local(self) -> bool:
        """True for a folder: renames are atomic, and locks hold between processes."""

    def below(self, name: str) -> Storage:
        """The storage of a label set of this cache.

        Raises:
            InvalidName: If the name cannot be that of a label set.
        """

    def where(self, key: str) -> str:
        """The path or URL of a key, for messages."""

    def there(self) -> bool:
        """Whether it exists: the folder, or an object in the bucket."""

    def folders(self) -> list[str]:
        """The names below this cache that can be those of label sets, sorted."""

    def sizes(self, under: str = "") -> dict[str, int]:
        """The sizes in bytes of everything below a key, by key."""

    def size(self, key: str, *, fresh: bool = False) -> int | None:
        """The size in bytes; None if there is no such key.

        Args:
            key: Name of the file or object.
            fresh: Whether to ask the storage, where an earlier listing would do.
        """

    def refresh(self) -> None:
        """Discards earlier listings."""

    def read(self, key: str) -> bytes:
        """Reads the content. Raises ``FileNotFoundError`` if there is no such key."""

    def read_part(self, key: str, start: int | None, stop: int | None) -> bytes:
        """Reads a part of the content.

        Args:
            key: Name of the file or object.
            start: First byte; negative: counted from the end; None: the beginning.
            stop: The byte after the last one; None: the end.

        Returns:
            The bytes, fewer where the content ends before ``stop``.

        Raises:
            FileNotFoundError: If there is no such key.
        """

    def distrust(self, key: str) -> None:
        """Discards a copy of the content that was found damaged, so that it is fetched again."""

    def md5(self, key: str) -> str | None:
        """The MD5 of the content in hexadecimal digits; None if that would take a transfer."""

    def put(self, key: str, data: bytes) -> None:
        """Stores the content in one step and replaces an earlier one."""

    def create(self, key: str, data: bytes) -> bool:
        """As ``put``, but does nothing and returns False if the key exists."""

    def update(self, key: str, change: Callable[[bytes], bytes | None]) -> None:
        """Replaces the content by what a function returns for it.

        An update by another process in between is not lost: ``change`` is called again.

        Args:
            key: Name of the file or object.
            change: Takes the content and returns the new one, or None to leave it.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Removes those of the keys that exist, durably."""

    def locks(self, name: str) -> StorageLocks:
        """The locks of the label set ``name`` of this cache. The caller closes them."""

    def close(self) -> None:
        """Ends all waiting for this storage, in every thread."""


CacheName = str | Path | Storage
"""A cache as a user names it: a folder, ``s3://BUCKET/PREFIX`` (``gs``, ``az``), the URL of a label
server (``http://HOST:PORT``, ``https``) or of a published label set (``https://HOST/PATH/SET``),
a zip file of one label set (``FILE.zip``), or opened storage."""
