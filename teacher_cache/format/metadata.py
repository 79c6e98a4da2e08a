"""The files of a label set as bytes, made through Zarr: its JSON documents and its shards."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.format.encodings import encoding_of
from sskt.teacher_cache.format.spec import FORMAT, Spec, digest_of

CHUNK_ROWS = 512
GROUP = "zarr.json"
MOST_SHARDS, MOST_SHARD_BYTES = 2**22, 2**32
"""Limits of a label set: shards, and bytes of the rows of one array in a shard. Without them, a few
bytes of metadata could ask for any amount of time and memory."""
BOUND = "bound"
"""Attribute of a label set in which a shard is stored only with its record."""

Document = dict[str, Any]


def to_json(document: Document) -> bytes:
    """As Zarr writes it."""
    return json.dumps(document, indent=2).encode()


def new_documents(
    spec: Spec, classes: tuple[str, ...], seeds: int, rows: int, provenance: Document
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
        "made": provenance,
        BOUND: True,
    }
    require_size(seeds, samples, rows)
    for dtype, width, _ in encoding.arrays(len(classes)).values():
        require_size(seeds, samples, rows, width * dtype.itemsize)
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


def require_size(seeds: int, samples: int, rows: int, row_bytes: int = 4) -> None:
    """Checks the size of a label set.

    Args:
        seeds: Number of view seeds.
        samples: Number of samples.
        rows: Samples in a shard.
        row_bytes: Bytes of a row of an array.

    Raises:
        InputError: If a number is none or not positive, or a limit is exceeded.
    """
    if not all(type(number) is int and number > 0 for number in (seeds, samples, rows)):
        raise InputError(
            f"a label set has at least one seed, sample and row in a shard, found {seeds} seeds, "
            f"{samples} samples and {rows} rows"
        )
    shards = seeds * -(-samples // rows)
    if shards > MOST_SHARDS:
        raise InputError(
            f"a label set has at most {MOST_SHARDS:,} shards, found {shards:,}: {seeds} seeds of "
            f"{samples} samples, {rows} in a shard; use fewer seeds or larger --shard-rows"
        )
    if min(rows, samples) * row_bytes > MOST_SHARD_BYTES:
        raise InputError(
            f"the rows of a shard have at most {MOST_SHARD_BYTES:,} bytes, found {rows} rows of "
            f"{row_bytes}; use smaller --shard-rows"
        )


def _codecs(dtype: np.dtype[Any]) -> list[Any]:
    shuffle: Literal["shuffle", "noshuffle"] = "shuffle" if dtype.itemsize > 1 else "noshuffle"
    return [
        BloscCodec(cname="zstd", clevel=5, shuffle=shuffle, typesize=dtype.itemsize),
        Crc32cCodec(),
    ]


def shard_rows_of(document: Document) -> int:
    """Samples in a shard of an array."""
    return int(document["chunk_grid"]["configuration"]["chunk_shape"][1])


def shard_file(document: Document, rows: NDArray[Any]) -> bytes:
    """Makes a shard file of an array.

    Args:
        document: The array's metadata.
        rows: The rows of the shard, of the array's dtype: ``[n, *row]``. The rest of the shard is
            filled up.

    Returns:
        The bytes of the file. They depend on the arguments only.
    """
    import zarr
    from zarr.core.buffer import Buffer, default_buffer_prototype
    from zarr.storage import MemoryStore

    alone = document | {"shape": [1, *rows.shape]}
    metadata = default_buffer_prototype().buffer.from_bytes(to_json(alone))
    files: dict[str, Buffer] = {GROUP: metadata}
    array = zarr.open_array(MemoryStore(files), mode="r+", zarr_format=3)
    array.with_config({"write_empty_chunks": True})[0:1] = rows[None]
    (key,) = files.keys() - {GROUP}
    return files[key].to_bytes()
