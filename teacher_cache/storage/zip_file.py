"""A label set in one zip file, as archives take it: a cache of this one set, for reading.

The files of the set lie at the root of the zip file and are not compressed, which zarr's
``ZipStore`` reads too. Parts of them are read in place; nothing is unpacked.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

from sskt.teacher_cache.errors import CorruptStore, InputError, MissingData, first_line
from sskt.teacher_cache.format.metadata import GROUP
from sskt.teacher_cache.format.names import is_file_key, set_name
from sskt.teacher_cache.format.spec import name_of

_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1


class Member(NamedTuple):
    """Where a file is in the zip file: its header's offset, its size and CRC-32."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class ZipStorage:
    """The label set in a zip file, or a cache that holds this one alone. See ``base.Storage``.

    Everything that writes raises ``InputError``.
    """

    path: Path
    members: Mapping[str, Member] = field(repr=False)
    version: tuple[int, ...] = field(repr=False)
    set_name: str = ""
    is_local: ClassVar[bool] = True

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.set_name or self.path.name

    def below(self, name: str) -> ZipStorage:
        return replace(self, set_name=set_name(name))

    def where(self, key: str) -> str:
        return f"{self.path}/{key}"

    def there(self) -> bool:
        return self.path.exists()

    def folders(self) -> list[str]:
        """See ``Storage``. Raises ``CorruptStore`` if the file holds no label set."""
        try:
            return [set_name(name_of(json.loads(self.read(GROUP))["attributes"]["sskt"]["spec"]))]
        except FileNotFoundError as error:
            raise CorruptStore(
                f"{self.path} has no {GROUP} at its root, so it is no label set; make it with "
                f"sskt copy CACHE FILE.zip SET"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptStore(
                f"{self.where(GROUP)} is not a label set's metadata ({error})"
            ) from error

    def sizes(self, under: str = "") -> dict[str, int]:
        below = f"{under}/" if under else ""
        return {key: m.size for key, m in self.members.items() if key.startswith(below)}

    def size(self, key: str, *, fresh: bool = False) -> int | None:
        found = self.members.get(key)
        return None if found is None else found.size

    def refresh(self) -> None:
        """Does nothing: the list of a zip file is read once."""

    def read(self, key: str) -> bytes:
        """See ``Storage``. Raises ``OSError`` if the checksum of the zip file fails."""
        data = self.read_part(key, None, None)
        if zlib.crc32(data) != self.members[key].crc:
            raise OSError(errno.EINVAL, "its checksum in the zip file fails", self.where(key))
        return data

    def read_part(self, key: str, start: int | None, stop: int | None) -> bytes:
        """See ``Storage``. Raises ``OSError`` if the zip file is damaged or another one now."""
        member = self.members.get(key)
        if member is None:
            raise FileNotFoundError(key)
        handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _version(os.fstat(handle)) != self.version:
                raise OSError(errno.EINVAL, "the zip file was changed while it was read", key)
            head = os.pread(handle, _HEADER.size, member.offset).ljust(_HEADER.size, b"\0")
            mark, name_size, extra_size = _HEADER.unpack(head)
            at = member.offset + _HEADER.size
            if mark != b"PK\3\4" or os.pread(handle, name_size, at) != key.encode():
                raise OSError(errno.EINVAL, "its place in the zip file is damaged", self.where(key))
            begin, end, _ = slice(start, stop).indices(member.size)
            at += name_size + extra_size
            parts = []
            while begin < end:
                parts.append(os.pread(handle, end - begin, at + begin))
                if not parts[-1]:
                    raise OSError(errno.EINVAL, "the zip file is cut", self.where(key))
                begin += len(parts[-1])
            return b"".join(parts)
        finally:
            os.close(handle)

    def distrust(self, key: str) -> None:
        """Does nothing: there are no copies."""

    def md5(self, key: str) -> str | None:
        return hashlib.md5(self.read(key), usedforsecurity=False).hexdigest()

    def close(self) -> None:
        """Does nothing: no method waits."""

    def refuse_writing(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ``InputError``."""
        raise InputError(f"{self.path} is read-only; sskt copy it to a folder, and change the copy")

    locks = put = create = update = delete = refuse_writing


def open_zip(path: Path) -> ZipStorage:
    """Opens the zip file of a label set as a cache of one.

    Args:
        path: The file.

    Raises:
        MissingData: If there is no such file.
        CorruptStore: If it is damaged, or holds what no label set holds.
    """
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            with zipfile.ZipFile(file) as opened:
                listed = opened.infolist()
    except FileNotFoundError:
        raise MissingData(f"no label sets: the zip file {path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error})") from error
    except Exception as error:  # zipfile passes on what its parsing meets
        raise CorruptStore(
            f"{path} is not a whole zip file ({first_line(error)}); download it again, or make it "
            "again with sskt copy CACHE FILE.zip SET"
        ) from error
    members: dict[str, Member] = {}
    end = 0
    for info in sorted(listed, key=lambda info: info.header_offset):
        name = info.orig_filename
        if info.is_dir() and not info.file_size:
            continue
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _unusable(
                path,
                f"{name} is compressed, so that no part of it could be read in place; labels are "
                "compressed already: make the zip file without compression",
            )
        if not is_file_key(name):
            raise _unusable(path, f"{name!r} cannot be a file of a label set")
        if name in members:
            raise _unusable(path, f"it holds {name} twice")
        if info.flag_bits & _ENCRYPTED:
            raise _unusable(path, f"{name} is encrypted")
        if info.header_offset < end:
            raise _unusable(path, f"{name} lies within another file")
        end = info.header_offset + _HEADER.size + len(name) + info.file_size
        if end > about.st_size:
            raise _unusable(path, f"{name} is cut")
        members[name] = Member(info.header_offset, info.file_size, info.CRC)
    return ZipStorage(path, members, _version(about))


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes the zip file of a label set. The same files give the same bytes.

    Args:
        path: The file, which is replaced if it exists.
        files: Keys and contents.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as made:
        for key, data in files:
            about = zipfile.ZipInfo(key)  # of 1980
            about.external_attr = 0o644 << 16
            made.writestr(about, data)


def _version(about: os.stat_result) -> tuple[int, ...]:
    return about.st_ino, about.st_size, about.st_mtime_ns


def _unusable(path: Path, why: str) -> CorruptStore:
    return CorruptStore(
        f"{path} cannot be read as a label set: {why} (sskt copy CACHE FILE.zip SET makes one)"
    )
