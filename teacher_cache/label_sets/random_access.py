"""Labels of single samples in any order, from chunks that stay decoded."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.format.encodings import Encoded

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from sskt.teacher_cache.label_sets.label_set import LabelSet

CACHED_BYTES = 128 * 2**20
"""Memory for the decoded chunks of one label set, in each process that reads it in any order."""


class RowReader:
    """Reads rows of a label set; a chunk that was decoded is kept, up to ``CACHED_BYTES``.

    Args:
        label_set: An opened label set.
        chunk_rows: How many labels are compressed together.
    """

    def __init__(self, label_set: LabelSet, chunk_rows: int) -> None:
        self._set, self._rows = label_set, chunk_rows
        self._arrays = label_set.encoding.arrays(label_set.width)
        row = label_set.encoding.bytes_per_label(label_set.width)
        # An lru_cache has no lock that a forked loader process could find held.
        self._chunk = functools.lru_cache(max(1, CACHED_BYTES // (chunk_rows * row)))(self._read)

    def _read(self, seed: int, chunk: int) -> Encoded:
        start = chunk * self._rows
        return self._set.read(seed, start, min(start + self._rows, self._set.samples))

    def encoded(self, seed: int, ids: ArrayLike) -> Encoded:
        """See ``LabelSet.encoded_rows``."""
        rows = self._row_numbers(ids)
        chunks, offsets = np.divmod(rows, self._rows)
        if len(rows) == 1:
            return {key: a[offsets] for key, a in self._chunk(seed, int(chunks[0])).items()}
        found = {
            key: np.empty((len(rows), width), dtype)
            for key, (dtype, width, _) in self._arrays.items()
        }
        for chunk in np.unique(chunks).tolist():
            here = np.flatnonzero(chunks == chunk)
            for key, decoded in self._chunk(seed, chunk).items():
                found[key][here] = decoded[offsets[here]]
        return found

    def _row_numbers(self, ids: ArrayLike) -> NDArray[np.int64]:
        given = np.atleast_1d(np.asarray(ids))
        if not given.size:
            return np.zeros(0, np.int64)
        last = self._set.samples - 1
        if given.ndim != 1 or given.dtype.kind not in "iu" or given.min() < 0 or given.max() > last:
            raise InputError(
                f"label set {self._set.name} has rows 0 to {last}, found ids {ids!r:.60}; give "
                "whole numbers in that range, one for each sample"
            )
        return given.astype(np.int64)
