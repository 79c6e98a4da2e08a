"""The JSON documents of a label set: made through Zarr, read and checked without it."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
from zarr.codecs import BloscCodec, Crc32cCodec

from sskt.teacher_cache.errors import CorruptStore, MissingData
from sskt.teacher_cache.format.encodings import encoding_of
from sskt.teacher_cache.format.spec import FORMAT, Spec, classes_identity, digest_of
from sskt.teacher_cache.storage.base import Place

CHUNK_ROWS = 512
GROUP = "zarr.json"
_KEYS = {"name": "default", "configuration": {"separator": "/"}}

Document = dict[str, Any]


def to_json(document: Document) -> bytes:
    """As Zarr writes it."""
    return json.dumps(document, indent=2).encode()


def new_documents(
    spec: Spec, classes: tuple[str, ...], seeds: int, rows: int, made: Document
) -> dict[str, bytes]:
    """The files of a label set without shards, by key: the group's, then each array's."""
    import zarr
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    samples, encoding = int(spec["target"]["size"]), encoding_of(spec["encoding"])
    rows = min(rows, -(-samples // CHUNK_ROWS) * CHUNK_ROWS)
    chunk = CHUNK_ROWS if rows % CHUNK_ROWS == 0 else rows
    attributes = {
        "format": FORMAT,
        "digest": digest_of(spec),
        "spec": spec,
        "classes": list(classes),
        "made": made,
    }
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files), attributes={"sskt": attributes})
    for key, (dtype, width, fill) in encoding.arrays(len(classes)).items():
        group.create_array(
            key,
            shape=(seeds, samples, width),
            dtype=dtype,
            chunks=(1, chunk, width),
            shards=(1, rows, width),
            compressors=_codecs(dtype),
            fill_value=dtype.type(fill),
        )
    check = np.dtype("<u4")
    group.create_array(
        "view_check",
        shape=(seeds, samples),
        dtype=check,
        chunks=(1, chunk),
        shards=(1, rows),
        compressors=_codecs(check),
        fill_value=check.type(0),
    )
    return {key: value.to_bytes() for key, value in files.items()}


def _codecs(dtype: np.dtype[Any]) -> list[Any]:
    shuffle: Literal["shuffle", "noshuffle"] = "shuffle" if dtype.itemsize > 1 else "noshuffle"
    return [
        BloscCodec(cname="zstd", clevel=5, shuffle=shuffle, typesize=dtype.itemsize),
        Crc32cCodec(),
    ]


def array_document(place: Place, array: str) -> Document:
    """An array's metadata. Raises ``OSError``, ``ValueError``, ``KeyError``, ``TypeError``."""
    document: Document = json.loads(place.read(f"{array}/{GROUP}"))
    if document["chunk_key_encoding"] != _KEYS:
        raise ValueError(f"{array} has other chunk keys")
    return document


def shard_rows_of(document: Document) -> int:
    """Samples in a shard of an array."""
    return int(document["chunk_grid"]["configuration"]["chunk_shape"][1])


def read_attributes(place: Place) -> Document:
    """The ``sskt`` attributes of a label set's group. Raises ``MissingData``, ``CorruptStore``."""
    try:
        return parse_attributes(place, place.read(GROUP))
    except FileNotFoundError as error:
        if bereft(place):
            raise CorruptStore(f"label set {place.name} has lost its zarr.json") from error
        raise MissingData(f"no label set at {place}") from error


def bereft(place: Place) -> bool:
    """Whether what is there can only be a label set that has lost its ``zarr.json``.

    In an object store, metadata without shards is a creation that somebody has not finished.
    """
    return bool(place.sizes("view_check" if place.is_local else "view_check/c"))


def parse_attributes(place: Place, data: bytes) -> Document:
    """The ``sskt`` attributes in the group's metadata, checked. Raises ``CorruptStore``."""
    try:
        attributes: Document = json.loads(data)["attributes"]["sskt"]
        if attributes["format"] > FORMAT:
            raise CorruptStore(
                f"label set {place.name} has format {attributes['format']}, this version of sskt "
                f"reads up to {FORMAT}; update sskt"
            )
        if digest_of(attributes["spec"]) != attributes["digest"]:
            raise CorruptStore(f"label set {place.name}: its spec does not match its digest")
        if classes_identity(attributes["classes"]) != attributes["spec"]["source"]["classes"]:
            raise CorruptStore(f"label set {place.name}: its classes do not match its spec")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStore(f"{place.where(GROUP)} is not a label set's metadata") from error
    return attributes
