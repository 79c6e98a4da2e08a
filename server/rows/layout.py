"""Rows of a label set in any order: in which shards they are, and how a decoded shard lies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import IncompleteLabels, InputError
from sskt.teacher_cache.format.encodings import Encoded
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard

Int64 = NDArray[np.int64]

ALIGNED = 64
"""Each array of a decoded shard begins at a multiple of this, bytes."""


@dataclass(frozen=True)
class Layout:
    """The arrays of rows: name, dtype and shape of one row."""

    arrays: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all arrays."""
        return sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self.arrays)

    def size(self, rows: int) -> int:
        """Bytes of a decoded shard."""
        return sum(
            -(-rows * dtype.itemsize * math.prod(shape) // ALIGNED) * ALIGNED
            for _, dtype, shape in self.arrays
        )

    def views(self, data: Any, rows: int) -> Encoded:
        """The arrays of a decoded shard in a buffer of that size."""
        views, offset = {}, 0
        for name, dtype, shape in self.arrays:
            views[name] = np.ndarray((rows, *shape), dtype, data, offset)
            offset += -(-views[name].nbytes // ALIGNED) * ALIGNED
        return views

    def parts(self, arrays: Encoded) -> Iterator[tuple[int, memoryview]]:
        """Offset and bytes of each array in such a buffer."""
        offset = 0
        for name, dtype, _ in self.arrays:
            data = np.ascontiguousarray(arrays[name], dtype).reshape(-1).view(np.uint8)
            yield offset, data.data
            offset += -(-data.nbytes // ALIGNED) * ALIGNED

    def empty(self, rows: int) -> Encoded:
        """Room for that many rows."""
        return {name: np.empty((rows, *shape), dtype) for name, dtype, shape in self.arrays}


def layout_of(label_set: LabelSet) -> Layout:
    """``view_check`` and the encoding's arrays, in the order of ``LabelSet.arrays``."""
    arrays = label_set.encoding.arrays(len(label_set.classes))
    own = [(name, dtype, (width,)) for name, (dtype, width, _) in arrays.items()]
    return Layout((("view_check", np.dtype("<u4"), ()), *own))


@dataclass(frozen=True)
class Part:
    """The rows wanted of one shard: where they go, and where they are in it."""

    shard: Shard
    to: Int64 | slice
    rows: Int64


def parts_of(label_set: LabelSet, seed: int | Int64, ids: Int64) -> list[Part]:
    """The rows ``ids`` (int64 ``[n]``) of one seed, or of one for each, by shards.

    Raises ``InputError`` for rows that the set has not, ``IncompleteLabels`` for such seeds.
    """
    if not len(ids):
        return []
    seeds = np.asarray(seed, np.int64)
    if ids.min() < 0 or ids.max() >= label_set.samples or seeds.min() < 0:
        raise InputError(
            f"label set {label_set.name} has rows 0 to {label_set.samples - 1} of seeds from 0 on; "
            "some of those asked for are outside"
        )
    if seeds.max() >= label_set.seeds:
        raise IncompleteLabels(
            f"label set {label_set.name} has seeds 0 to {label_set.seeds - 1}, not {seeds.max()}"
        )
    blocks, rows = np.divmod(ids, label_set.shard_rows)
    numbers = seeds * label_set.blocks + blocks
    if (numbers == numbers[0]).all():
        return [Part(_shard(label_set, numbers[0]), slice(None), rows)]
    order = np.argsort(numbers, kind="stable")
    in_order = numbers[order]
    starts = [0, *(np.flatnonzero(np.diff(in_order)) + 1).tolist(), len(ids)]
    return [
        Part(_shard(label_set, in_order[start]), order[start:stop], rows[order[start:stop]])
        for start, stop in pairwise(starts)
    ]


def _shard(label_set: LabelSet, number: np.int64) -> Shard:
    return label_set.shard(*divmod(int(number), label_set.blocks))
