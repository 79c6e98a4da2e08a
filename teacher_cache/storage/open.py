"""Opening a cache by its name: a folder, an object store or a label server."""

from __future__ import annotations

from pathlib import Path

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.storage.base import CacheName, Storage
from sskt.teacher_cache.storage.http.storage import open_server
from sskt.teacher_cache.storage.local import LocalStorage

SCHEMES = ("s3", "gs", "az")

SERVED = ("http", "https")


def is_served(cache: CacheName) -> bool:
    """True for the cache of a label server, which cannot be written to."""
    return str(cache).partition("://")[0] in SERVED and "://" in str(cache)


def open_cache(cache: CacheName, *, make: bool = False) -> Storage:
    """Opens the storage of a cache.

    Args:
        cache: A folder, the URL of a bucket (``object_store.py``) or of a label server
            (``http/storage.py``), or opened storage.
        make: Whether it will be written to; a folder is created then.

    Raises:
        InputError: If the URL is of another kind, or with ``make`` if the cache cannot be used.
        MissingData: If the package for object stores is not installed.
    """
    if not isinstance(cache, str | Path):
        return cache
    scheme, mark, rest = str(cache).partition("://")
    if isinstance(cache, str) and mark:
        if is_served(cache):
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
    return LocalStorage(path)
