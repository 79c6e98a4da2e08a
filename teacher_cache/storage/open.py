"""Opening a cache by its name: a folder, a zip file, an object store or an HTTP server."""

from __future__ import annotations

from pathlib import Path

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.locations import is_zip
from sskt.teacher_cache.storage.base import CacheName, Storage
from sskt.teacher_cache.storage.http.published import PublishedStorage, is_published, open_published
from sskt.teacher_cache.storage.http.storage import Fetching, HttpStorage, open_server
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.zip_file import ZipStorage, open_zip

SCHEMES = ("s3", "gs", "az")

SERVED = ("http", "https")


def is_served(cache: CacheName) -> bool:
    """True for the cache of a label server or web host, which cannot be written to."""
    return str(cache).partition("://")[0] in SERVED and "://" in str(cache)


def open_served(url: str, how: Fetching | None = None) -> HttpStorage:
    """Opens a cache that is read over HTTP, which is not contacted yet.

    Args:
        url: URL of a label server, or of a published label set, which ends in its name.
        how: As ``open_server``.

    Raises:
        InputError: If the URL cannot be used.
    """
    return open_published(url, how) if is_published(url) else open_server(url, how)


def open_set(name: CacheName) -> Storage:
    """Opens the storage of a label set: of the only one of a zip file or a published URL.

    Raises:
        As ``open_cache``.
    """
    storage = open_cache(name)
    one = isinstance(storage, ZipStorage | PublishedStorage) and not storage.set_name
    return storage.below(storage.folders()[0]) if one else storage


def open_cache(cache: CacheName, *, make: bool = False) -> Storage:
    """Opens the storage of a cache.

    Args:
        cache: A folder, a zip file of one label set (``zip_file.py``), the URL of a bucket
            (``object_store.py``), of a label server (``http/storage.py``) or of a published label
            set (``http/published.py``), or opened storage.
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
            served = open_served(str(cache))
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
    if is_zip(cache):
        found = open_zip(path)
        if make:
            found.refuse_writing()
        return found
    if make:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot use {path} as cache folder: {error.strerror}") from error
    return LocalStorage(path)
