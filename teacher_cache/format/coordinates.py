"""The names by which other tools address a label set: its view seeds, samples and classes.

Each is a small Zarr array beside the labels, which xarray takes as the index of a dimension. No
reader of sskt needs them, and they are no part of the identity.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from google_crc32c import value as crc32c

from sskt.teacher_cache.format.shards import without_checksum

if TYPE_CHECKING:
    from zarr import Group

SEED, SAMPLE, CLASS = COORDINATES = ("seed", "sample", "class")
"""The arrays, each named as the dimension that it describes."""

RANK = "rank"
"""The dimension of the arrays of a sparse label, which has no coordinate."""

FEATURE = "feature"
"""The dimension of features, which has no coordinate."""

ENTRY = "entry"
"""The dimension of the minimum and the step of a row, which has no coordinate."""

LISTED = "coordinates"
"""Attribute of a label set: which coordinate arrays it has. Sets of version 0.1 have none."""

CONSOLIDATED = "consolidated_metadata"

SEED_CHUNK = 2**16
"""Seeds in a chunk. Chunks are stored whole, so that a set grows by its metadata alone."""

_LONGEST_TEXT = 2**16
_CODECS = {SEED: ["bytes", "blosc", "crc32c"]}
_TEXT_CODECS = ["vlen-utf8", "blosc", "crc32c"]

Document = dict[str, Any]
Read = Callable[[str], bytes]


def coordinate_keys(name: str, seeds: int) -> list[str]:
    """The keys of an array's files within a label set, its metadata first.

    Args:
        name: Name of the coordinate.
        seeds: Number of view seeds of the set.
    """
    chunks = -(-seeds // SEED_CHUNK) if name == SEED else 1
    return [f"{name}/zarr.json", *(f"{name}/c/{chunk}" for chunk in range(chunks))]


def seed_chunk(key: str) -> bytes:
    """Makes a chunk of the array of seeds, which holds the numbers of its places.

    Args:
        key: Its key, ``seed/c/0`` for the first ``SEED_CHUNK`` seeds.
    """
    from numcodecs import Blosc

    start = int(key.rpartition("/")[2]) * SEED_CHUNK
    numbers = np.arange(start, start + SEED_CHUNK, dtype="<u4")
    data: bytes = Blosc(cname="zstd", clevel=5, shuffle=Blosc.SHUFFLE).encode(numbers)
    return data + struct.pack("<I", crc32c(data))


def add_coordinates(
    group: Group,
    seeds: int,
    classes: Sequence[str] | None,
    samples: Sequence[str] | None,
    compressors: Callable[[np.dtype[Any]], list[Any]],
) -> list[str]:
    """Creates the coordinate arrays of a new label set, without the chunks of the seeds.

    Args:
        group: The Zarr group of the set.
        seeds: S, the number of view seeds.
        classes: Names of the source's classes; None if a row is not of classes.
        samples: Names of the samples; None if they are not known.
        compressors: Makes the compressors of an array from its dtype.

    Returns:
        The names of the arrays.
    """
    group.create_array(
        SEED,
        shape=(seeds,),
        dtype=np.dtype("<u4"),
        chunks=(SEED_CHUNK,),
        compressors=compressors(np.dtype("<u4")),
        fill_value=0,
        dimension_names=[SEED],
        attributes={"long_name": "view seed"},
    )
    found = [SEED]
    for name, about, texts in (
        (SAMPLE, "sample of the target", samples),
        (CLASS, "class of the source", classes),
    ):
        if texts is None:
            continue
        array = group.create_array(
            name,
            shape=(len(texts),),
            dtype="string",
            chunks=(max(1, len(texts)),),
            compressors=compressors(np.dtype("u1")),
            fill_value="",
            dimension_names=[name],
            attributes={"long_name": about},
        )
        array.with_config({"write_empty_chunks": True})[:] = np.array(
            stored_names(texts), dtype=object
        )
        found.append(name)
    return found


def stored_names(names: Iterable[str]) -> list[str]:
    """Names as a coordinate array holds them.

    Bytes of a file's name that are no UTF-8 are written as ``\\xNN``.
    """
    return [
        name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        for name in names
    ]


def resized(document: Document, seeds: int) -> Document:
    """The metadata of an array with another number of view seeds."""
    return document | {"shape": [seeds, *document["shape"][1:]]}


def consolidated(arrays: Mapping[str, Document]) -> Document:
    """The value of ``consolidated_metadata`` in the group's metadata.

    With it a tool opens a set over HTTP, where nothing can be listed.

    Args:
        arrays: The metadata of each array.
    """
    return {"kind": "inline", "must_understand": False, "metadata": dict(arrays)}


def read_coordinate(read: Read, name: str, length: int) -> list[str] | list[int]:
    """Reads a coordinate array.

    Args:
        read: Reads a file of the label set by its key.
        name: Name of the coordinate.
        length: Number of its values.

    Returns:
        Its values.

    Raises:
        ValueError, KeyError, TypeError: If it is damaged, or is not as docs/format.md says.
        OSError: If a file cannot be read.
    """
    document = json.loads(read(f"{name}/zarr.json"))
    codecs = [codec["name"] for codec in document["codecs"]]
    (chunk,) = document["chunk_grid"]["configuration"]["chunk_shape"]
    if document["shape"] != [length]:
        raise ValueError(f"{document['shape']} names, expected {length}")
    expected = (_CODECS.get(name, _TEXT_CODECS), "uint32" if name == SEED else "string", [name])
    if (codecs, document["data_type"], document["dimension_names"]) != expected:
        raise ValueError(f"it is {document['data_type']} of {', '.join(map(str, codecs))}")
    if chunk != (SEED_CHUNK if name == SEED else max(1, length)):
        raise ValueError(f"chunks of {chunk}")
    if name == SEED:
        numbers: list[int] = []
        for key in coordinate_keys(SEED, length)[1:]:
            numbers += np.frombuffer(chunk_payload(read(key), 4 * chunk), "<u4").tolist()
        return numbers[:length]
    return _texts(chunk_payload(read(f"{name}/c/0"), 4 + (4 + _LONGEST_TEXT) * chunk), length)


def chunk_payload(data: bytes, most: int) -> bytes:
    """The decompressed content of a chunk, of ``most`` bytes at most. Raises ``ValueError``."""
    from numcodecs import Blosc

    payload = without_checksum(data, "its chunk")
    if len(payload) < 16:
        raise ValueError("it is shorter than a header")
    if struct.unpack("<I", payload[4:8])[0] > most:  # Blosc's header
        raise ValueError("it is larger than it can be")
    try:
        return bytes(Blosc().decode(payload))
    except RuntimeError as error:
        raise ValueError(f"it cannot be decompressed ({error})") from error


def _texts(payload: bytes, length: int) -> list[str]:
    """The strings of a ``vlen-utf8`` chunk: their number, then length and bytes of each."""
    if struct.unpack("<I", payload[:4].ljust(4, b"\0"))[0] != length:
        raise ValueError(f"it does not hold {length} names")
    found, at = [], 4
    for _ in range(length):
        size = struct.unpack("<I", payload[at : at + 4].ljust(4, b"\xff"))[0]
        text = payload[at + 4 : at + 4 + size]
        if len(text) < size:
            raise ValueError("it is cut")
        found.append(text.decode("utf-8"))
        at += 4 + size
    return found
