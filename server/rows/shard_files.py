"""Which files or objects a shard consists of now: what was decoded of others is not served."""

from __future__ import annotations

import os
import time

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.storage.base import Place
from sskt.teacher_cache.storage.local import LocalPlace

Version = tuple[tuple[object, ...] | None, ...]
"""For each of a shard's files what changes with its content; None: there is no such file."""

LISTED_SECONDS = 10.0
"""How long a listing of a bucket holds; one in which something is missing holds a tenth of it."""
_MOST = 1024


class ShardFiles:
    """Looks at files every time, at a bucket once in a while: a listing costs a round trip.

    Safe from any thread.
    """

    def __init__(self) -> None:
        self._listed: dict[tuple[str, str], tuple[float, dict[str, tuple[object, ...]]]] = {}

    def version(self, place: Place, keys: tuple[str, ...]) -> Version:
        """Of the keys of one shard. Raises ``InputError`` if the place cannot be reached."""
        if isinstance(place, LocalPlace):
            return tuple([_stat(f"{place.path}/{key}") for key in keys])
        return tuple([self._object(place, key) for key in keys])

    def _object(self, place: Place, key: str) -> tuple[object, ...] | None:
        seed = "/".join(key.split("/")[:3])
        looked, listed = self._listed.get((str(place), seed), (-LISTED_SECONDS, {}))
        age = time.monotonic() - looked
        if age >= LISTED_SECONDS or (key not in listed and age >= LISTED_SECONDS / 10):
            listed = self._list(place, seed)
        return listed.get(key)

    def _list(self, place: Place, seed: str) -> dict[str, tuple[object, ...]]:
        from sskt.teacher_cache.storage.object_store import BucketPlace

        now = time.monotonic()
        listed: dict[str, tuple[object, ...]]
        if isinstance(place, BucketPlace):
            listed = {key: (found.size, found.e_tag) for key, found in place._list(seed).items()}
        else:
            listed = {key: (size,) for key, size in place.sizes(seed).items()}
        if len(self._listed) >= _MOST:
            self._listed.clear()
        self._listed[str(place), seed] = (now, listed)
        return listed

    def forget(self) -> None:
        """Lists buckets anew: something has been stored."""
        self._listed.clear()


def _stat(path: str) -> tuple[object, ...] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  (a Path costs more than the call)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns, found.st_ino
