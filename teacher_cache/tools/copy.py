"""Copying label sets between caches.

A copy may be stopped at any time. The shards copied so far are whole, and the same call copies the
rest.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sskt.teacher_cache.errors import CorruptStore, InputError
from sskt.teacher_cache.format.metadata import BOUND, GROUP
from sskt.teacher_cache.format.shards import ShardRecord, file_checksums, shard_damage
from sskt.teacher_cache.label_sets.create import open_for_writing
from sskt.teacher_cache.label_sets.documents import consolidate
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.locations import is_zip
from sskt.teacher_cache.storage.atomic import durable_rename, naming_full_disk
from sskt.teacher_cache.storage.base import METADATA, CacheName, Storage
from sskt.teacher_cache.storage.http.published import INDEX
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.open import open_cache
from sskt.teacher_cache.storage.zip_file import write_zip
from sskt.teacher_cache.tools.card import LICENSE
from sskt.teacher_cache.tools.coordinates import coordinate_problems
from sskt.teacher_cache.tools.publish import write_index

AT_ONCE = 4
"""Shards that are copied at the same time."""

POLL_SECONDS = 0.1
"""Seconds between two checks of shards that another process is writing."""


Progress = Callable[[int, int], None]
"""Called with (shards done, shards to do)."""


@dataclass(frozen=True)
class Copied:
    """The result of a copy.

    Attributes:
        name: Name of the label set.
        written: Number of shards written.
        reused: Number of shards that existed and are the same.
        bytes: Bytes written.
        coverage: Share of each seed's samples that the source has stored.
    """

    name: str
    written: int
    reused: int
    bytes: int
    coverage: list[float]


def copy_label_set(
    source: LabelSet, to: CacheName, progress: Progress = lambda done, total: None
) -> Copied:
    """Copies the stored shards of a label set with their records, byte for byte.

    Each file is checked before it is written and after.

    Args:
        source: The label set.
        to: The cache to copy to; a name that ends in ``.zip``: a new zip file.
        progress: Called with shards done and to do.

    Returns:
        What was copied.

    Raises:
        InputError: If the other cache has another label set or other bytes under the same name;
            the message names the first file that differs.
        CorruptStore: If a shard of the source is damaged, or if a written file reads back
            otherwise.
        DiskFull: If there is no room.
    """
    if is_zip(to):
        return _pack(source, Path(str(to)), progress)
    home = open_cache(to, make=True)
    if _real(home.below(source.name)) == _real(source.storage):
        raise InputError(f"cannot copy {source.storage} onto itself; name another cache")

    def documents(rows: int | None, seeds: int | None) -> dict[str, bytes]:
        if rows not in (None, source.shard_rows):
            raise _other_rows(source, home, rows)
        return metadata_of(source)

    with closing(open_for_writing(home, source.name, documents, source.seeds)) as target:
        if target.digest != source.digest:
            raise InputError(f"{target.storage} is another label set than {source.storage}")
        if target.shard_rows != source.shard_rows:
            raise _other_rows(source, home, target.shard_rows)
        return _copy_shards(source, target, progress)


def metadata_of(source: LabelSet) -> dict[str, bytes]:
    """Reads the files of a label set that belong to no shard.

    Args:
        source: The label set.

    Returns:
        The files by key: the group's metadata, that of each array, and the coordinates.

    Raises:
        CorruptStore: If the coordinates are damaged.
    """
    problems = coordinate_problems(source)
    if problems:
        raise CorruptStore(f"label set {source.name}: {problems[0]}; run sskt verify")
    arrays = [*source.arrays[1:], source.arrays[0]]
    keys = [GROUP, *(f"{array}/{GROUP}" for array in arrays), *source.constant_keys()]
    return {key: source.storage.read(key) for key in keys}


def _copy_shards(source: LabelSet, target: WritableLabelSet, progress: Progress) -> Copied:
    missing = set(source.missing(range(source.seeds)))
    wanted = [s for s in source.shards(range(source.seeds)) if s not in missing]
    target.storage.refresh()
    written, sizes, left = 0, 0, wanted
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="sskt-copy")
    try:
        while left:
            busy = []
            progress(len(wanted) - len(left), len(wanted))
            stored = pool.map(lambda shard: _copy_shard(source, target, shard), left)
            for done, (shard, size) in enumerate(zip(left, stored, strict=True), 1):
                if size is None:
                    busy.append(shard)
                    continue
                written, sizes = written + bool(size), sizes + size
                progress(len(wanted) - len(left) + done - len(busy), len(wanted))
            left = busy
            if left:
                time.sleep(POLL_SECONDS)
    finally:
        pool.shutdown(cancel_futures=True)
    for key in ("error", LICENSE, BOUND):
        if key in source.attributes:
            target.add_attribute(key, source.attributes[key])
    with target.locks.held(METADATA):
        consolidate(target)
    if target.storage.size(INDEX) is not None:
        write_index(target)
    return Copied(source.name, written, len(wanted) - written, sizes, source.coverage())


def _pack(source: LabelSet, path: Path, progress: Progress) -> Copied:
    """Writes the stored shards of a label set into a new zip file, each of them checked."""
    if path.exists():
        raise InputError(f"{path} is there; remove it, or name another file")
    missing = set(source.missing(range(source.seeds)))
    wanted = [s for s in source.shards(range(source.seeds)) if s not in missing]
    first = metadata_of(source)

    def files() -> Iterator[tuple[str, bytes]]:
        yield from first.items()
        for done, shard in enumerate(wanted):
            progress(done, len(wanted))
            record = source.shard_record(shard)
            for array in source.arrays:
                yield source.shard_key(array, shard), _checked(source, array, shard, record)
            if record is not None:
                yield source.record_key(shard), record.to_json()
        progress(len(wanted), len(wanted))

    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with naming_full_disk(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_zip(partial, files())
            size = partial.stat().st_size
            durable_rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return Copied(source.name, len(wanted), 0, size, source.coverage())


def _copy_shard(source: LabelSet, target: WritableLabelSet, shard: Shard) -> int | None:
    """Copies a shard: bytes written, 0 if it exists, None if another process is writing it."""
    if not target.has(shard):
        if target.acquire(shard):
            try:
                return _write_shard(source, target, shard)
            finally:
                target.release(shard)
        if target.storage.size(target.commit_key(shard), fresh=True) is None:
            return None
        target.storage.refresh()
    record = source.shard_record(shard)
    for array in source.arrays:
        key = source.shard_key(array, shard)
        if not _same(source.storage, target.storage, key):
            raise _differs(source, target, key)
    if record is not None and target.shard_record(shard) is None:
        target.storage.create(target.record_key(shard), record.to_json())
    return 0


def _write_shard(source: LabelSet, target: WritableLabelSet, shard: Shard) -> int:
    record, written = source.shard_record(shard), 0
    for array in source.arrays:
        key = source.shard_key(array, shard)
        data = _checked(source, array, shard, record)
        last = array == source.arrays[-1]
        if not last or (target.bound and target.storage.is_local):
            target.storage.put(key, data)
        elif not target.storage.create(key, data) and target.storage.read(key) != data:
            raise _differs(source, target, key)
        if not _holds(target.storage, key, data):
            raise CorruptStore(
                f"{target.storage.where(key)} reads back otherwise than it was written; check the "
                "disk or the store, delete it and copy again"
            )
        written += len(data)
    if record is not None:
        target.storage.put(target.record_key(shard), record.to_json())
    return written


def _checked(source: LabelSet, array: str, shard: Shard, record: ShardRecord | None) -> bytes:
    """The file of an array of a shard, whole and in its place. Raises ``CorruptStore``."""
    key, chunks = source.shard_key(array, shard), source.layout(array).chunks
    for _ in range(1 if source.storage.is_local else 2):  # it may have been damaged on the way
        try:
            data = source.storage.read(key)
            damage = shard_damage(data, chunks)
        except FileNotFoundError:
            damage = "it is gone"
        except OSError as error:
            damage = error.strerror or str(error)
        except CorruptStore as error:
            damage = str(error)
        if not damage and record and file_checksums(data, chunks) != record.checksums[array]:
            damage = "it is not the file that the shard's record names"
        if not damage:
            return data
    raise CorruptStore(
        f"label set {source.name}: {source.storage.where(key)} is damaged ({damage}); run sskt "
        "verify, delete the shard it names and cache it again"
    )


def _real(storage: Storage) -> str:
    return str(storage.path.resolve() if isinstance(storage, LocalStorage) else storage)


def _other_rows(source: LabelSet, home: Storage, rows: int | None) -> InputError:
    return InputError(
        f"label set {source.name} is in {home} with {rows} samples a shard, at the source with "
        f"{source.shard_rows}: they cannot be joined; copy into another cache"
    )


def _differs(source: LabelSet, target: WritableLabelSet, key: str) -> InputError:
    return InputError(
        f"{target.storage.where(key)} is there with other bytes than {source.storage.where(key)}; "
        "check both with sskt verify --recompute, then remove one (sskt rm) or copy elsewhere"
    )


def _same(one: Storage, other: Storage, key: str) -> bool:
    """Whether both hold the same bytes; without a transfer where the store knows their MD5."""
    if one.size(key) is None or one.size(key) != other.size(key):
        return False
    if not (one.is_local and other.is_local):
        sums = one.md5(key), other.md5(key)
        if sums[0] and sums[0] == sums[1]:
            return True
    return one.read(key) == other.read(key)


def _holds(storage: Storage, key: str, data: bytes) -> bool:
    known = None if storage.is_local else storage.md5(key)
    if known and known == hashlib.md5(data, usedforsecurity=False).hexdigest():
        return True
    return storage.read(key) == data
