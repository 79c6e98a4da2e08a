"""The JSON documents of a stored label set, read and checked without Zarr."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sskt.teacher_cache.errors import CorruptStore, MissingData
from sskt.teacher_cache.format.coordinates import CONSOLIDATED, consolidated
from sskt.teacher_cache.format.features import require_sound_output
from sskt.teacher_cache.format.metadata import GROUP, Document, to_json
from sskt.teacher_cache.format.spec import FORMAT, classes_identity, digest_of
from sskt.teacher_cache.storage.base import Storage

if TYPE_CHECKING:
    from sskt.teacher_cache.label_sets.label_set import LabelSet

_KEYS = {"name": "default", "configuration": {"separator": "/"}}


def array_document(storage: Storage, array: str) -> Document:
    """An array's metadata. Raises ``OSError``, ``ValueError``, ``KeyError``, ``TypeError``."""
    try:
        document: Document = json.loads(storage.read(f"{array}/{GROUP}"))
    except RecursionError as error:
        raise ValueError(f"{array}/{GROUP} is nested too deeply") from error
    if document["chunk_key_encoding"] != _KEYS:
        raise ValueError(f"{array} has other chunk keys")
    return document


def read_attributes(storage: Storage) -> Document:
    """The ``sskt`` attributes of a label set's group. Raises ``MissingData``, ``CorruptStore``."""
    try:
        return parse_attributes(storage, storage.read(GROUP))
    except FileNotFoundError as error:
        if lacks_group(storage):
            raise CorruptStore(f"label set {storage.name} has lost its zarr.json") from error
        raise MissingData(f"no label set at {storage}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise CorruptStore(f"{storage.where(GROUP)} cannot be read ({reason})") from error


def lacks_group(storage: Storage) -> bool:
    """Whether shards exist but the metadata of their group, ``zarr.json``, is missing.

    In an object store, metadata without shards is a creation that was not finished.
    """
    return bool(storage.sizes("view_check" if storage.is_local else "view_check/c"))


def parse_attributes(storage: Storage, data: bytes) -> Document:
    """The ``sskt`` attributes in the group's metadata, checked. Raises ``CorruptStore``."""
    try:
        attributes: Document = json.loads(data)["attributes"]["sskt"]
        if attributes["format"] > FORMAT:
            raise CorruptStore(
                f"label set {storage.name} has format {attributes['format']}, this version of sskt "
                f"reads up to {FORMAT}; update sskt"
            )
        if digest_of(attributes["spec"]) != attributes["digest"]:
            raise CorruptStore(f"label set {storage.name}: its spec does not match its digest")
        if classes_identity(attributes["classes"]) != attributes["spec"]["source"]["classes"]:
            raise CorruptStore(f"label set {storage.name}: its classes do not match its spec")
        require_sound_output(attributes["spec"], storage.name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptStore(f"{storage.where(GROUP)} is not a label set's metadata") from error
    return attributes


def consolidate(label_set: LabelSet) -> None:
    """Repeats the metadata of the arrays in that of the group, for tools that list nothing.

    It does nothing to a set without coordinates. In a folder, hold the lock of the metadata.

    Args:
        label_set: The label set, in a storage that can be written to.
    """
    storage = label_set.storage

    def repeat(data: bytes) -> bytes | None:
        document = json.loads(data)
        own = document.get(CONSOLIDATED) or {"metadata": {}}
        found = consolidated(own["metadata"] | described(label_set))
        return None if found == own else to_json(document | {CONSOLIDATED: found})

    if label_set.coordinates:
        storage.update(GROUP, repeat)


def described(label_set: LabelSet) -> dict[str, Document]:
    """Reads the metadata of each array of a set, those of the coordinates and the head included.

    Raises:
        OSError, ValueError, KeyError, TypeError: As ``array_document``.
    """
    names = [*label_set.arrays, *label_set.coordinates, *label_set.head_arrays]
    return {name: array_document(label_set.storage, name) for name in names}
