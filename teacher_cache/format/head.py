"""The head of a source beside its features: two Zarr arrays that hold its last linear layer.

They are stored once in a label set, as its coordinates are, and its spec names their SHA-256.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sskt.teacher_cache.errors import CorruptStore, InputError
from sskt.teacher_cache.format.coordinates import CLASS, FEATURE, Read, chunk_payload
from sskt.teacher_cache.format.features import Float32, Head

if TYPE_CHECKING:
    from zarr import Group

HEAD_WEIGHT, HEAD_BIAS = HEAD_ARRAYS = ("head_weight", "head_bias")
"""The arrays of a head."""

MOST_HEAD_BYTES = 2**31 - 2**16
"""Largest array of a head: it is one chunk, and Blosc compresses no more at once."""


def add_head(group: Group, head: Head, compressors: Callable[[np.dtype[Any]], list[Any]]) -> None:
    """Creates the arrays of a head in the Zarr group of a new label set.

    Raises:
        InputError: If the head is too large.
    """
    for name, dimensions, about in (
        (HEAD_WEIGHT, [CLASS, FEATURE], "weight of the source's last layer"),
        (HEAD_BIAS, [CLASS], "bias of the source's last layer"),
    ):
        values = np.ascontiguousarray(head.weight if name == HEAD_WEIGHT else head.bias, "<f4")
        if values.nbytes > MOST_HEAD_BYTES:
            raise InputError(
                f"the last layer of the source has {values.shape[0]:,} x {values.shape[1]:,} "
                "weights, more than a label set stores; name the module before it with --output "
                "features:MODULE, which stores no head"
            )
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape,
            compressors=compressors(values.dtype),
            fill_value=0,
            dimension_names=dimensions,
            attributes={"long_name": about},
        )
        array.with_config({"write_empty_chunks": True})[...] = values


def head_keys() -> list[str]:
    """The keys of the files of a head within a label set."""
    return [key for name, chunk in zip(HEAD_ARRAYS, ("0/0", "0"), strict=True)
            for key in (f"{name}/zarr.json", f"{name}/c/{chunk}")]  # fmt: skip


def read_head(read: Read, classes: int, width: int, sha256: str) -> Head:
    """Reads the head of a label set.

    Args:
        read: Reads a file of the label set by its key.
        classes: C.
        width: D.
        sha256: What ``Head.sha256`` must be.

    Returns:
        The head.

    Raises:
        CorruptStore: If a file is missing or damaged, or it is another head.
    """
    try:
        weight = _read_array(read, HEAD_WEIGHT, "0/0", (classes, width))
        head = Head(weight, _read_array(read, HEAD_BIAS, "0", (classes,)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptStore(f"its head cannot be read ({error})") from error
    if head.sha256 != sha256:
        raise CorruptStore("its head is not the one that its spec names")
    return head


def _read_array(read: Read, name: str, chunk: str, shape: tuple[int, ...]) -> Float32:
    document = json.loads(read(f"{name}/zarr.json"))
    codecs = [codec["name"] for codec in document["codecs"]]
    grid = document["chunk_grid"]["configuration"]["chunk_shape"]
    found = (document["shape"], grid, document["data_type"], codecs)
    if found != (list(shape), list(shape), "float32", ["bytes", "blosc", "crc32c"]):
        raise ValueError(f"{name} is {found[2]} {found[0]} of {', '.join(map(str, codecs))}")
    size = 4 * math.prod(shape)
    payload = chunk_payload(read(f"{name}/c/{chunk}"), size)
    if len(payload) != size:
        raise ValueError(f"{name} has {len(payload)} bytes, expected {size}")
    return np.frombuffer(payload, "<f4").reshape(shape)
