"""Rows of label sets in any order, from decoded shards in memory that all workers share.

Reading random rows through Zarr would decode a chunk for each. A slab is one shard decoded, in a
file of the run folder that every worker maps.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sskt.server.metrics.metrics import Metrics
from sskt.server.rows.layout import Int64, Layout, Part, layout_of, parts_of
from sskt.server.rows.row_cache_files import NoRoom, SlabFolder
from sskt.server.rows.shard_files import ShardFiles, Version
from sskt.teacher_cache.errors import SsktError
from sskt.teacher_cache.format.encodings import Encoded
from sskt.teacher_cache.format.metadata import CHUNK_ROWS
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard

MAPPED = 1024
"""Slabs that a worker keeps mapped."""
PIECE = 16 * 2**20
"""Bytes decoded at once of a shard that cannot be kept."""
FRESH_SECONDS = 1.0
"""How often a slab in use is touched, and how soon the memory of a removed one is free."""

_ATTEMPTS = 5

_Key = tuple[str, str, int, int]


@dataclass
class _Slab:
    """A decoded shard; ``version``: the files that it was decoded from."""

    name: str
    keys: tuple[str, ...]
    version: Version
    arrays: Encoded
    touched: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Source:
    """A shard as its files are now."""

    label_set: LabelSet
    layout: Layout
    shard: Shard
    keys: tuple[str, ...]
    version: Version

    @property
    def count(self) -> int:
        return self.shard.stop - self.shard.start

    @property
    def name(self) -> str:
        """A name for its slab that no other content has."""
        about = (str(self.label_set.place), self.label_set.shard_rows, self.shard, self.version)
        unique = hashlib.sha256(repr((*about, self.layout)).encode()).hexdigest()[:24]
        return f"{self.label_set.digest[:12]}-{self.shard.seed}-{self.shard.block}-{unique}"


class Slabs:
    """The slabs of a server. ``budget``: bytes of all workers' slabs. Safe from any thread."""

    def __init__(self, folder: Path, budget: int, metrics: Metrics) -> None:
        self._folder = SlabFolder(folder, budget)
        self._metrics = metrics
        self._files = ShardFiles()
        self._mapped: OrderedDict[_Key, _Slab] = OrderedDict()
        self._layouts: dict[str, Layout] = {}
        self._looked = 0.0
        self._told: set[tuple[str, str]] = set()
        self._guard = threading.Lock()

    def layout(self, label_set: LabelSet) -> Layout:
        """What ``rows`` gives."""
        layout = self._layouts.get(label_set.digest)
        if layout is None:
            layout = self._layouts[label_set.digest] = layout_of(label_set)
        return layout

    def rows(self, label_set: LabelSet, seed: int | Int64, ids: Int64) -> Encoded:
        """Rows in the order of ``ids`` (int64 ``[n]``), of one seed or of one for each id.

        ``view_check`` and the encoding's arrays, ``[n]`` or ``[n, ...]`` each. Raises
        ``IncompleteLabels``, ``CorruptStore``, ``InputError`` as ``LabelSet.read``.
        """
        decoded: list[Shard] = []

        def slab_of(shard: Shard) -> _Slab | None:
            return self._lookup(label_set, shard) or self._obtain(label_set, shard, decoded)

        parts = parts_of(label_set, seed, ids)
        rows = self._gathered(label_set, parts, len(ids), slab_of)
        self._metrics.slab(not decoded)
        return rows

    def hot_rows(self, label_set: LabelSet, seed: int | Int64, ids: Int64) -> Encoded | None:
        """As ``rows`` if that takes no decoding, no waiting and no network, else None."""
        if not label_set.place.is_local:
            return None
        parts = parts_of(label_set, seed, ids)
        found = {}
        for part in parts:
            slab = self._lookup(label_set, part.shard)
            if slab is None:
                return None
            found[part.shard] = slab
        rows = self._gathered(label_set, parts, len(ids), found.__getitem__)
        self._metrics.slab(True)
        return rows

    def lacking(self, label_set: LabelSet, seed: int | Int64, ids: Int64) -> list[Shard]:
        """Those of the rows' shards that are not stored. Raises as ``parts_of``."""
        self._files.forget()
        shards = [part.shard for part in parts_of(label_set, seed, ids)]
        keys = [(label_set.commit_key(shard),) for shard in shards]
        versions = [self._files.version(label_set.place, key) for key in keys]
        return [s for s, version in zip(shards, versions, strict=True) if version == (None,)]

    def _gathered(
        self,
        label_set: LabelSet,
        parts: list[Part],
        count: int,
        slab_of: Callable[[Shard], _Slab | None],
    ) -> Encoded:
        gathered = self.layout(label_set).empty(count)
        for part in parts:
            slab = slab_of(part.shard)
            rows = None if slab else self._unkept(label_set, part)
            for name, to in gathered.items():
                if rows is not None:
                    to[part.to] = rows[name]
                elif slab is not None and isinstance(part.to, slice):
                    # No row is out of range: "clip" only spares numpy a buffer.
                    np.take(slab.arrays[name], part.rows, axis=0, out=to, mode="clip")
                elif slab is not None:
                    to[part.to] = slab.arrays[name][part.rows]
        return gathered

    def _lookup(self, label_set: LabelSet, shard: Shard) -> _Slab | None:
        """A slab that is mapped here, if it was decoded from the files that are there now."""
        now = time.monotonic()
        if now - self._looked >= FRESH_SECONDS:
            self._looked = now
            self._let_go()
        key = _key(label_set, shard)
        slab = self._mapped.get(key)
        if slab is None or self._files.version(label_set.place, slab.keys) != slab.version:
            return None
        if now - slab.touched >= FRESH_SECONDS:
            slab.touched = now
            self._folder.touch(slab.name)
            with self._guard:
                if key in self._mapped:
                    self._mapped.move_to_end(key)
        return slab

    def _let_go(self) -> None:
        """Unmaps what some worker has removed: the memory is not free before."""
        kept = self._folder.names()
        with self._guard:
            for key in [k for k, slab in self._mapped.items() if slab.name not in kept]:
                del self._mapped[key]

    def _obtain(self, label_set: LabelSet, shard: Shard, decoded: list[Shard]) -> _Slab | None:
        """Maps the shard's slab, made if need be; None if it cannot be kept.

        Adds the shard to ``decoded`` unless its slab was there.
        """
        for _ in range(_ATTEMPTS):
            source = self._source(label_set, shard)
            try:
                data = self._folder.open(source.name, source.layout.size(source.count))
                if data is None:
                    data = self._made(source, decoded)
                else:
                    self._folder.touch(source.name)
            except NoRoom as reason:
                self._tell(label_set, str(reason))
                decoded.append(shard)
                return None
            if data is not None:
                arrays = source.layout.views(data, source.count)
                return self._keep(source, arrays)
        raise _changing(label_set, shard)

    def _source(self, label_set: LabelSet, shard: Shard) -> _Source:
        """Raises ``IncompleteLabels``, ``CorruptStore`` if a file of the shard is missing."""
        layout = self.layout(label_set)
        arrays = (label_set.shard_key(name, shard) for name, _, _ in layout.arrays)
        keys = (*arrays, label_set.commit_key(shard))
        version = self._files.version(label_set.place, keys)
        if None in version:
            self._files.forget()
            label_set.place.refresh()
            _read(label_set, shard.seed, shard.start, shard.start + 1)
            version = self._files.version(label_set.place, keys)
        return _Source(label_set, layout, shard, keys, version)

    def _made(self, source: _Source, decoded: list[Shard]) -> mmap.mmap | None:
        """Decodes a shard; None if somebody else did, or if its files changed meanwhile."""
        shard, layout = source.shard, source.layout
        with self._folder.making(source.name, layout.size(source.count)) as making:
            if making is None:
                return None
            decoded.append(shard)
            rows = _read(source.label_set, shard.seed, shard.start, shard.stop)
            if self._files.version(source.label_set.place, source.keys) != source.version:
                return None
            return making.finish(layout.parts(rows))

    def _keep(self, source: _Source, arrays: Encoded) -> _Slab:
        slab = _Slab(source.name, source.keys, source.version, arrays)
        with self._guard:
            self._mapped[_key(source.label_set, source.shard)] = slab
            while len(self._mapped) > MAPPED:
                self._mapped.popitem(last=False)
        return slab

    def _unkept(self, label_set: LabelSet, part: Part) -> Encoded:
        """Rows of a shard that cannot be kept, decoded piece by piece."""
        shard, layout = part.shard, self.layout(label_set)
        step = max(1, PIECE // (layout.row_bytes * CHUNK_ROWS)) * CHUNK_ROWS
        for _ in range(_ATTEMPTS):
            source = self._source(label_set, shard)
            gathered = layout.empty(len(part.rows))
            for piece in np.unique(part.rows // step).tolist():
                to = np.flatnonzero(part.rows // step == piece)
                start = shard.start + piece * step
                rows = _read(label_set, shard.seed, start, min(start + step, shard.stop))
                for name, values in gathered.items():
                    values[to] = rows[name][part.rows[to] - piece * step]
            if self._files.version(label_set.place, source.keys) == source.version:
                return gathered
        raise _changing(label_set, shard)

    def _tell(self, label_set: LabelSet, reason: str) -> None:
        """Says once for each set and reason why its batches are slow."""
        if (label_set.digest, reason) not in self._told and len(self._told) < MAPPED:
            self._told.add((label_set.digest, reason))
            logging.getLogger("sskt").warning(
                "label set %s: a decoded shard is not kept in memory, batches are slow: %s",
                label_set.name,
                reason,
            )


def _key(label_set: LabelSet, shard: Shard) -> _Key:
    return label_set.name, label_set.digest, shard.seed, shard.block


def _read(label_set: LabelSet, seed: int, start: int, stop: int) -> Encoded:
    """Rows with their view checks. Raises as ``LabelSet.read``."""
    if not label_set.has(label_set.shard(seed, start // label_set.shard_rows)):
        label_set.place.refresh()  # a bucket's listing may be older than the shard
    labels = label_set.read(seed, start, stop)
    return {"view_check": label_set.read_checks(seed, start, stop)} | labels


def _changing(label_set: LabelSet, shard: Shard) -> SsktError:
    return SsktError(f"{label_set.place_of(shard)} changes while it is read; ask again")
