"""The label sets of a cache: opening, creating, listing them.

A label set is one Zarr v3 group (docs/format.md). It appears in one step: a folder is renamed
into place, in a bucket the group's metadata is written last.
"""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sskt.teacher_cache.errors import CorruptStore, InputError, MissingData
from sskt.teacher_cache.format.encodings import encoding_of
from sskt.teacher_cache.format.features import Head, output_text
from sskt.teacher_cache.format.metadata import (
    CHUNK_ROWS,
    GROUP,
    new_documents,
    require_size,
    shard_rows_of,
)
from sskt.teacher_cache.format.shards import layout_of
from sskt.teacher_cache.format.spec import Spec, name_of, width_of
from sskt.teacher_cache.label_sets.documents import (
    array_document,
    consolidate,
    lacks_group,
    read_attributes,
)
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard, in_threads
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.storage.atomic import durable_rename, durable_write
from sskt.teacher_cache.storage.base import METADATA, SWEEP, CacheName, Storage
from sskt.teacher_cache.storage.http.storage import HttpStorage
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.locks import Locks
from sskt.teacher_cache.storage.open import open_cache, open_set

__all__ = [
    "CHUNK_ROWS",
    "SHARD_ROWS",
    "Damaged",
    "LabelSet",
    "Shard",
    "create_label_set",
    "list_label_sets",
    "look_over",
    "open_for_writing",
    "open_label_set",
    "summaries",
    "summary",
]

SHARD_ROWS = 8192
"""Samples in a shard: 16 MB of float16 for 1000 classes."""


def open_label_set(storage: CacheName) -> LabelSet:
    """Opens a label set for reading.

    Args:
        storage: The set: its folder or URL.

    Returns:
        The label set.

    Raises:
        MissingData: If none exists.
        CorruptStore: If its metadata cannot be read or is not as docs/format.md says.
    """
    storage = open_set(storage)
    attributes = read_attributes(storage)
    spec = attributes["spec"]
    arrays = encoding_of(spec["encoding"]).arrays(width_of(spec))
    try:
        document = array_document(storage, "view_check")
        seeds, samples = document["shape"]
        rows = shard_rows_of(document)
        if samples != spec["target"]["size"] or document["data_type"] != "uint32" or rows < 1:
            raise ValueError(f"view_check is {document['data_type']} {document['shape']}")
        documents = {"view_check": document}
        for key, (dtype, width, _) in arrays.items():
            found = documents[key] = array_document(storage, key)
            shard = found["chunk_grid"]["configuration"]["chunk_shape"]
            have = (found["shape"][1:], shard, found["data_type"])
            if have != ([samples, width], [1, rows, width], dtype.name):
                raise ValueError(f"{key} is {found['data_type']} {found['shape']}")
        require_size(seeds, samples, rows)
        for found in documents.values():
            layout = layout_of(found)
            row_bytes = math.prod(layout.shape) * layout.dtype.itemsize
            require_size(seeds, samples, layout.rows, row_bytes)
            if not 0 < layout.chunk_rows <= layout.rows:
                raise ValueError(f"chunks of {layout.chunk_rows} rows")
    except InputError as error:
        raise CorruptStore(f"label set {storage.name}: unusable metadata ({error})") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptStore(f"label set {storage.name}: unreadable metadata ({error})") from error
    return LabelSet(storage, attributes, seeds, samples, rows, documents)


Documents = Callable[[int | None, int | None], dict[str, bytes]]
"""Makes a new set's files for (shard rows, seeds), which another process may have fixed already."""


def create_label_set(
    cache: CacheName,
    spec: Spec,
    classes: tuple[str, ...],
    seeds: int,
    *,
    shard_rows: int = SHARD_ROWS,
    provenance: dict[str, Any] | None = None,
    samples: Sequence[str] | None = None,
    head: Head | None = None,
) -> WritableLabelSet:
    """Opens a label set for writing, created in one step if it is new.

    Args:
        cache: Where the label sets are.
        spec: Identity of the set.
        classes: Names of the source's classes.
        seeds: Number of view seeds; an existing set grows to it.
        shard_rows: Samples in a shard of a new set.
        provenance: Provenance of a new set: arguments and versions, no part of the identity.
        samples: Names of the samples of a new set, by which other tools find them.
        head: Of features, the head that the spec names.

    Returns:
        The label set. Close it.

    Raises:
        CorruptStore: If another thing lies in its place.
        InputError: If the cache cannot be written to.
        DiskFull: If there is no room.
    """

    def documents(rows: int | None, found_seeds: int | None) -> dict[str, bytes]:
        found_seeds, rows = found_seeds or seeds, rows or shard_rows
        return new_documents(spec, classes, found_seeds, rows, provenance or {}, samples, head)

    return open_for_writing(cache, name_of(spec), documents, seeds)


def open_for_writing(
    cache: CacheName, name: str, documents: Documents, seeds: int
) -> WritableLabelSet:
    """Opens a label set for writing, made of ``documents`` if it is new: ``create_label_set``."""
    home = open_cache(cache)
    storage = home.below(name)
    lost = storage.size(GROUP) is None and (
        storage.there() if storage.is_local else lacks_group(storage)
    )
    if lost and storage.size(GROUP) is None:
        raise CorruptStore(f"{storage} exists but is no label set; remove or rename it")
    locks = home.locks(name)
    try:
        with locks.held(METADATA):
            if isinstance(storage, LocalStorage) and isinstance(locks, Locks):
                if storage.size(GROUP) is None:
                    _create_folder(storage.path, documents, locks)
                _sweep(storage.path, locks)
            elif storage.size(GROUP) is None:
                _create_objects(storage, documents)
        if isinstance(home, LocalStorage):
            home.sweep()
        label_set = WritableLabelSet.of(open_label_set(storage), locks)
        if label_set.seeds < seeds:
            require_size(seeds, label_set.samples, label_set.shard_rows)
            label_set.grow(seeds)
        elif label_set.coordinates:
            with locks.held(METADATA):  # a process may have been killed while it added seeds
                consolidate(label_set)
    except BaseException:
        locks.close()
        raise
    return label_set


def _sweep(path: Path, locks: Locks) -> None:
    """Removes files of killed writers, and takes the lock that keeps the set from being removed."""
    if locks.acquire(SWEEP):
        partial = (path / key for key in LocalStorage(path).files() if key.endswith(".partial"))
        for leftover in filter(locks.abandoned, partial):
            leftover.unlink(missing_ok=True)
        locks.release(SWEEP)
    locks.acquire(SWEEP, shared=True, wait=True)


def _create_folder(path: Path, documents: Documents, locks: Locks) -> None:
    """Beside its place, then renamed."""
    for leftover in filter(locks.abandoned, path.parent.glob(f".{path.name}.*.partial")):
        shutil.rmtree(leftover)
    building = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        for key, data in documents(None, None).items():
            durable_write(building / key, data)
        durable_rename(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _create_objects(storage: Storage, documents: Documents) -> None:
    """The arrays' metadata first; the group's commits the set.

    The first array fixes shard rows and seeds for all who create the same set at once, or
    after a process that was killed while it did.
    """
    files = documents(None, None)
    first, *others = [key for key in files if key != GROUP]
    if not storage.create(first, files[first]):
        try:
            found = array_document(storage, first.removesuffix(f"/{GROUP}"))
            files = documents(shard_rows_of(found), found["shape"][0])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CorruptStore(
                f"{storage.where(first)} is no array's metadata ({error})"
            ) from error
    for key in [*others, GROUP]:
        storage.create(key, files[key])


_T = TypeVar("_T")

REQUESTS_AT_ONCE = 16
"""Label sets of a bucket or a label server that are opened or listed at once."""

Damaged = dict[str, CorruptStore]
"""Why each label set that cannot be opened cannot, by its name."""


def look_over(
    cache: CacheName, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[list[LabelSet], Damaged]:
    """Opens the label sets of a cache. One that cannot be read hides no other.

    Args:
        cache: Where the label sets are.
        wanted: Whether a label set of that name is opened; the others are not touched.

    Returns:
        The label sets that open, by name, and why the others do not. Of several folders with the
        same label set only one is opened; the others are copies of it.

    Raises:
        MissingData: If the cache is a folder that does not exist.
        InputError: If the cache cannot be reached, or is itself a label set.
    """
    home = open_cache(cache)
    found: list[LabelSet] = []
    damaged: Damaged = {}
    known = home.damaged() if isinstance(home, HttpStorage) else {}

    def open_one(name: str) -> None:
        try:
            if name in known:  # asking for it would wait until the server can read it
                raise CorruptStore(
                    f"label set {name}: the label server cannot read it: {known[name]}"
                )
            label_set = _opened_if_any(home.below(name))
        except CorruptStore as error:
            damaged[name] = error
            return
        if label_set is not None:
            found.append(label_set)

    _each(open_one, list(filter(wanted, home.folders())), at_once=not home.is_local)
    if not found and home.is_local and home.size(GROUP) is not None:
        inside = open_label_set(home).name
        raise InputError(
            f"{cache} is a label set, not a cache: give the folder that holds it, and its name "
            f"({inside}) where the command takes one"
        )
    sets, copies = without_copies(found)
    return sets, dict(sorted((damaged | copies).items()))


def _each(call: Callable[[_T], None], values: Sequence[_T], *, at_once: bool) -> None:
    """Calls a function for each value: in threads where each call waits for answers."""
    if at_once:
        in_threads(lambda i: call(values[i]), range(len(values)), REQUESTS_AT_ONCE)
    else:
        for value in values:
            call(value)


def without_copies(found: Iterable[LabelSet]) -> tuple[list[LabelSet], Damaged]:
    """Sorts out the copies of label sets in other folders of the same cache.

    Args:
        found: The label sets of a cache.

    Returns:
        One label set of each digest, by name, and what the others are.
    """
    by_digest: dict[str, list[LabelSet]] = {}
    for label_set in found:
        by_digest.setdefault(label_set.digest, []).append(label_set)
    sets, damaged = [], {}
    for alike in by_digest.values():
        alike.sort(key=lambda s: (s.name != name_of(s.spec), s.name))
        sets.append(alike[0])
        for copy in alike[1:]:
            damaged[copy.name] = CorruptStore(
                f"label set {copy.name} is a copy of {alike[0].name}; remove one of the two"
            )
    return sorted(sets, key=lambda s: s.name), damaged


def _opened_if_any(storage: Storage) -> LabelSet | None:
    """Opens a label set; None for a folder that is none. Raises ``CorruptStore``."""
    try:
        return open_label_set(storage)
    except MissingData:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
        raise CorruptStore(f"label set {storage.name} cannot be read ({reason})") from error


def list_label_sets(cache: CacheName) -> list[LabelSet]:
    """All label sets of a cache, by name. Raises as ``look_over``, ``CorruptStore`` for any."""
    sets, damaged = look_over(cache)
    for error in damaged.values():
        raise error
    return sets


def summaries(label_sets: Sequence[LabelSet]) -> list[dict[str, Any]]:
    """What ``sskt ls`` shows of the label sets of one cache, in their order."""
    found: dict[str, dict[str, Any]] = {}

    def add(label_set: LabelSet) -> None:
        found[label_set.name] = summary(label_set)

    _each(add, label_sets, at_once=any(not s.storage.is_local for s in label_sets))
    return [found[label_set.name] for label_set in label_sets]


def summary(label_set: LabelSet, stored: tuple[list[float], int] | None = None) -> dict[str, Any]:
    """What ``sskt ls`` shows of a set. ``stored``: coverage and bytes, where they are known."""
    spec = label_set.spec
    coverage, size = stored or label_set.stored()
    return {
        "name": label_set.name,
        "digest": label_set.digest,
        "target": spec["target"],
        "source": {k: spec["source"].get(k) for k in ("name", "arch", "precision")},
        "views": spec["views"],
        "encoding": str(label_set.encoding),
        "output": output_text(spec),
        "classes": len(label_set.classes),
        "seeds": label_set.seeds,
        "coverage": coverage,
        "bytes": size,
        "error": label_set.attributes.get("error"),
    }
