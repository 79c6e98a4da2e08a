"""Caches in a local folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.format.metadata import GROUP
from sskt.teacher_cache.format.names import is_set_name, set_name, set_names
from sskt.teacher_cache.locations import require_folder
from sskt.teacher_cache.storage.atomic import durable_write, sync_folder
from sskt.teacher_cache.storage.base import METADATA
from sskt.teacher_cache.storage.locks import Locks
from sskt.teacher_cache.storage.regular_files import open_regular, read_regular

LOCKS = ".locks"

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.partial")


@dataclass(frozen=True)
class LocalStorage:
    """A folder."""

    path: Path
    is_local: ClassVar[bool] = True

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def below(self, name: str) -> LocalStorage:
        return LocalStorage(self.path / set_name(name))

    def where(self, key: str) -> str:
        return str(self.path / key)

    def there(self) -> bool:
        return self.path.exists()

    def folders(self) -> list[str]:
        """See ``Storage``. Raises ``MissingData`` if there is no such folder."""
        require_folder(self.path)
        names = []
        for path in self.path.iterdir():
            with contextlib.suppress(OSError):  # a foreign folder that this user cannot read
                if path.is_dir() if is_set_name(path.name) else (path / GROUP).is_file():
                    names.append(path.name)
        return [*set_names(names, str(self))]

    def sizes(self, under: str = "") -> dict[str, int]:
        found = {}
        for key in self.files(under):
            with contextlib.suppress(FileNotFoundError):  # a partial file that was renamed
                about = _status(f"{self.path}/{key}")
                if about is not None and stat.S_ISREG(about.st_mode):
                    found[key] = about.st_size
        return found

    def files(self, under: str = "") -> Iterator[str]:
        """The names of everything below a key that is no folder; each folder is read once."""
        folders = [f"{under}/" if under else ""]
        while folders:
            folder = folders.pop()
            # A folder may have been removed meanwhile, or belong to another user.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                for entry in os.scandir(f"{self.path}/{folder}"):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    else:
                        yield f"{folder}{entry.name}"

    def size(self, key: str, *, fresh: bool = False) -> int | None:
        """See ``Storage``; 0 for what is no file."""
        try:
            found = _status(f"{self.path}/{key}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise InputError(
                f"cannot look at {self.path / key}: {error.strerror}; give this user the right to "
                "read the cache"
            ) from error
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else 0

    def refresh(self) -> None:
        """Does nothing: there are no listings."""

    def read(self, key: str) -> bytes:
        """See ``Storage``. Raises ``OSError`` for what is no file."""
        return read_regular(f"{self.path}/{key}")

    def read_part(self, key: str, start: int | None, stop: int | None) -> bytes:
        """See ``Storage``. Raises ``OSError`` for what is no file."""
        with open_regular(f"{self.path}/{key}") as file:
            begin, end, _ = slice(start, stop).indices(os.fstat(file.fileno()).st_size)
            file.seek(begin)
            return b"".join(iter(lambda: file.read(end - file.tell()), b""))

    def distrust(self, key: str) -> None:
        """Does nothing: there are no copies."""

    def md5(self, key: str) -> str | None:
        with open_regular(self.path / key) as file:
            digest = _md5()
            while part := file.read(2**20):
                digest.update(part)
            return str(digest.hexdigest())

    def put(self, key: str, data: bytes) -> None:
        """See ``Storage``. Raises ``MissingData`` if the folder itself is gone.

        Written anew below a mount point, it would look like a label set on another disk.
        """
        if not self.there():
            raise MissingData(f"cannot write {self.path / key}: {lost(self.path)}")
        durable_write(self.path / key, data)

    def create(self, key: str, data: bytes) -> bool:
        """See ``Storage``; for two processes only under a lock."""
        if (self.path / key).exists():
            return False
        self.put(key, data)
        return True

    def update(self, key: str, change: Callable[[bytes], bytes | None]) -> None:
        """See ``Storage``; for two processes only under a lock."""
        data = change(self.read(key))
        if data is not None:
            self.put(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        paths = [self.path / key for key in keys]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            with contextlib.suppress(FileNotFoundError):
                sync_folder(folder)

    def locks(self, name: str) -> Locks:
        return Locks(self.lock_path(name))

    def lock_path(self, name: str) -> Path:
        """The file whose bytes are the locks of a label set of this cache."""
        return self.path / LOCKS / f"{name}.lock"

    def close(self) -> None:
        """Does nothing: no method waits."""

    def sweep(self) -> None:
        """Removes unfinished label sets and removals of killed processes.

        Those of running processes stay: they hold the lock of their label set.
        """
        for leftover in self.path.glob(".*.partial"):
            found = _PARTIAL.fullmatch(leftover.name)
            if not found or not leftover.is_dir():
                continue
            lock = self.lock_path(found[1])
            if not Locks.open_here(lock):
                with contextlib.closing(Locks(lock)) as locks:
                    if locks.acquire(METADATA) and locks.abandoned(leftover):
                        shutil.rmtree(leftover, ignore_errors=True)


def _status(path: str) -> os.stat_result | None:
    """What a path leads to; None for a loop of links."""
    try:
        return os.stat(path)  # noqa: PTH116 (a Path takes three times as long)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None


def lost(folder: Path) -> str:
    """Why a folder that was there is missing, for messages."""
    return f"{folder} is gone: it was removed, or its file system is not mounted any more"


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)
