"""The files of a label set as bytes: its JSON documents, made through Zarr; checksums of shards."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from zarr.codecs import BloscCodec, Crc32cCodec

from sskt.teacher_cache.format.encodings import encoding_of
from sskt.teacher_cache.format.spec import FORMAT, Spec, digest_of

CHUNK_ROWS = 512
GROUP = "zarr.json"

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


def shard_rows_of(document: Document) -> int:
    """Samples in a shard of an array."""
    return int(document["chunk_grid"]["configuration"]["chunk_shape"][1])


@dataclass(frozen=True)
class ShardLayout:
    """What an array's metadata says about the files of its shards.

    Attributes:
        chunks: Number of chunks in a shard.
        largest: Largest size of a shard in bytes. Chunks that do not compress are stored as they
            are, with a header and a checksum.
    """

    chunks: int
    largest: int

    @classmethod
    def of(cls, document: Document) -> ShardLayout:
        """Reads an array's metadata.

        Raises:
            ValueError, KeyError, TypeError, IndexError: If it is not as ``docs/format.md`` says.
        """
        (codec,) = document["codecs"]
        inner = codec["configuration"]
        ends = [inner["codecs"][-1]["name"], inner["index_codecs"][-1]["name"]]
        if codec["name"] != "sharding_indexed" or inner.get("index_location", "end") != "end":
            raise ValueError(f"codec {codec['name']}")
        if ends != ["crc32c", "crc32c"]:
            raise ValueError("no checksums")
        chunks = -(-shard_rows_of(document) // int(inner["chunk_shape"][1]))
        shape = document["chunk_grid"]["configuration"]["chunk_shape"]
        size = math.prod(shape) * np.dtype(document["data_type"]).itemsize
        if chunks < 1 or size < 1:
            raise ValueError(f"chunks of shape {shape}")
        return cls(chunks, size + 64 * chunks + 4)


_ABSENT = 2**64 - 1


def shard_damage(data: bytes, chunks: int) -> str:
    """What is wrong with a shard's bytes, by its own checksums (docs/format.md); "" if nothing."""
    from google_crc32c import value as crc32c

    if not data:
        return "it is empty"
    if not chunks:
        return ""
    index, size = data[-(16 * chunks + 4) :], 16 * chunks + 4
    if len(index) < size or struct.unpack("<I", index[-4:])[0] != crc32c(index[:-4]):
        return "the checksum of its index fails"
    numbers = struct.unpack(f"<{2 * chunks}Q", index[:-4])
    for chunk, (start, length) in enumerate(zip(numbers[::2], numbers[1::2], strict=True)):
        if start == length == _ABSENT:
            continue
        inner = data[start : start + length]
        if length < 4 or len(inner) < length:
            return f"chunk {chunk} is cut"
        if struct.unpack("<I", inner[-4:])[0] != crc32c(inner[:-4]):
            return f"the checksum of chunk {chunk} fails"
    return ""
