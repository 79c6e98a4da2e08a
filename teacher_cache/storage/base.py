"""Where caches live: the few operations that the label store needs.

``local.py`` has them over a folder, ``object_store.py`` over a bucket, ``http`` those that read
over a label server. Keys are relative to a place, their parts joined by ``/``. Nobody ever sees
half a file or object.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

SWEEP, METADATA, SHARDS = range(3)
"""Bytes of a set's lock file: sweeping, metadata, and from ``SHARDS`` on one for each shard."""


class Claims(Protocol):
    """Who is at what: see ``locks.Locks``."""

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

    def claims(self, name: str) -> Claims:
        """The claims on the label set ``name`` of this cache; close them."""

    def close(self) -> None:
        """Ends all waiting for it, in every thread."""


CacheName = str | Path | Place
"""A cache as its user names it: a folder, ``s3://BUCKET/PREFIX`` (``gs``, ``az``), a label server's
``http://HOST:PORT`` (``https``), or opened."""
