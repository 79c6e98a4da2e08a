"""The files of a label set as bytes, made through Zarr: its JSON documents and its shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.format.coordinates import (
    CLASS,
    CONSOLIDATED,
    ENTRY,
    FEATURE,
    LISTED,
    RANK,
    SAMPLE,
    SEED,
    add_coordinates,
    consolidated,
    coordinate_keys,
    seed_chunk,
)
from sskt.teacher_cache.format.encodings import Shuffle, encoding_of
from sskt.teacher_cache.format.features import FEATURES, Head
from sskt.teacher_cache.format.head import add_head
from sskt.teacher_cache.format.spec import FORMAT, Spec, digest_of, width_of

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
    spec: Spec,
    classes: tuple[str, ...],
    seeds: int,
    rows: int,
    provenance: Document,
    samples: Sequence[str] | None = None,
    head: Head | None = None,
) -> dict[str, bytes]:
    """Makes the files of a label set without shards.

    Args:
        spec: Its identity.
        classes: Names of the source's classes.
        seeds: S, the number of view seeds.
        rows: Samples in a shard.
        provenance: How it was made.
        samples: Names of the samples; None if they are not known.
        head: Of features, the head that the spec names.

    Returns:
        The files by key: the group's metadata, that of the arrays of a shard, the coordinates and
        the head.
    """
    import zarr
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    size, encoding = int(spec["target"]["size"]), encoding_of(spec["encoding"])
    rows = min(rows, -(-size // CHUNK_ROWS) * CHUNK_ROWS)
    chunk = CHUNK_ROWS if rows % CHUNK_ROWS == 0 else rows
    attributes = {
        "format": FORMAT,
        "digest": digest_of(spec),
        "spec": spec,
        "classes": list(classes),
        "made": provenance,
        BOUND: True,
    }
    require_size(seeds, size, rows)
    arrays = encoding.arrays(width_of(spec))
    for dtype, width, _ in arrays.values():
        require_size(seeds, size, rows, width * dtype.itemsize)
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files), attributes={"sskt": attributes})
    last = {"labels": CLASS, FEATURES: CLASS if classes and head is None else FEATURE}
    for key, (dtype, width, fill) in arrays.items():
        group.create_array(
            key,
            shape=(seeds, size, width),
            dtype=dtype,
            chunks=(1, chunk, width),
            shards=(1, rows, width),
            compressors=_codecs(dtype, *encoding.codec(dtype)),
            fill_value=dtype.type(fill),
            dimension_names=[SEED, SAMPLE, last.get(key, RANK if encoding.k else ENTRY)],
            attributes=dict(encoding.described(key)),
        )
    check = np.dtype("<u4")
    group.create_array(
        "view_check",
        shape=(seeds, size),
        dtype=check,
        chunks=(1, chunk),
        shards=(1, rows),
        compressors=_codecs(check),
        fill_value=check.type(0),
        dimension_names=[SEED, SAMPLE],
        attributes={"long_name": "CRC-32 of the view"},
    )
    listed = add_coordinates(group, seeds, classes or None, samples, _codecs)
    if head is not None:
        add_head(group, head, _codecs)
    found = {key: value.to_bytes() for key, value in files.items()}
    found |= {key: seed_chunk(key) for key in coordinate_keys(SEED, seeds)[1:]}
    documents = {
        key.removesuffix(f"/{GROUP}"): json.loads(data)
        for key, data in found.items()
        if key.endswith(f"/{GROUP}")
    }
    document = json.loads(found[GROUP])
    document["attributes"]["sskt"][LISTED] = listed
    found[GROUP] = to_json(document | {CONSOLIDATED: consolidated(documents)})
    return found


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


def _codecs(dtype: np.dtype[Any], level: int = 5, shuffle: Shuffle = "shuffle") -> list[Any]:
    from zarr.codecs import BloscCodec, Crc32cCodec

    return [
        BloscCodec(cname="zstd", clevel=level, shuffle=shuffle, typesize=dtype.itemsize),
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
