"""Rows of label sets in any order, from chunks that stay decoded.

Labels are compressed in chunks of 512 rows, so reading single rows would decode a chunk for each.
``LabelSet.rows`` keeps decoded chunks too, but a server has to notice that a shard was replaced,
returns the labels as they are stored, with their view checks, and has one budget for all sets.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sskt.server.metrics.metrics import Metrics
from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels, InputError, SsktError
from sskt.teacher_cache.format.encodings import Encoded
from sskt.teacher_cache.format.metadata import CHUNK_ROWS
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.storage.base import Storage
from sskt.teacher_cache.storage.local import LocalStorage

Int64 = NDArray[np.int64]
Version = tuple[tuple[object, ...] | None, ...]
"""For each file of a shard something that changes with its content; None if it is missing."""

PIECE = 4 * 2**20
"""Bytes of rows that are decoded at once."""
LISTED_SECONDS = 10.0
"""Lifetime of a listing of a bucket; a tenth of it if a file is missing from the listing."""
LOCKS = 64
"""Locks of shards, so that two threads do not decode the same one."""

_ATTEMPTS = 5
_LISTINGS = 1024

_Key = tuple[str, str, Shard, Version]


@dataclass(frozen=True)
class Part:
    """The rows of one shard: their numbers in it, ascending, and their positions in the answer."""

    shard: Shard
    rows: Int64
    to: Int64

    def chunks(self, size: int) -> Iterator[tuple[int, Int64, Int64]]:
        """The rows by chunks of ``size`` rows: number of the chunk, rows in it, positions."""
        numbers, rows = np.divmod(self.rows, size)
        cuts = (np.flatnonzero(np.diff(numbers)) + 1).tolist()
        for start, stop in pairwise([0, *cuts, len(rows)]):
            yield int(numbers[start]), rows[start:stop], self.to[start:stop]


class RowCache:
    """Reads rows for one worker process. Safe from any thread.

    Args:
        budget: Bytes of decoded chunks that are kept. The shards unused for longest are dropped.
        metrics: Counts the batches that had to be decoded, and those that had not.
    """

    def __init__(self, budget: int, metrics: Metrics) -> None:
        self._budget, self._metrics = budget, metrics
        self._versions = _Versions()
        self._kept: OrderedDict[_Key, dict[int, Encoded]] = OrderedDict()
        self._bytes = 0
        self._templates: dict[str, Encoded] = {}
        self._warned: set[str] = set()
        self._guard = threading.Lock()
        self._decoding = [threading.Lock() for _ in range(LOCKS)]

    def row_bytes(self, label_set: LabelSet) -> int:
        """Bytes of one row with its view check."""
        return _size(self._room(label_set, 1))

    def rows(self, label_set: LabelSet, seeds: int | Int64, ids: Int64) -> Encoded:
        """Reads rows in the order of their ids.

        Args:
            label_set: An opened label set.
            seeds: View seed, or one for each id (int64 ``[n]``).
            ids: Row numbers, int64 ``[n]``.

        Returns:
            ``view_check`` uint32 ``[n]`` and the arrays of the encoding, each ``[n, width]``.

        Raises:
            InputError: If an id is not a row of the set, or the cache cannot be reached.
            IncompleteLabels: If a label is not stored.
            CorruptStore: If a checksum fails.
        """
        rows, hit = self._room(label_set, len(ids)), True
        for part in parts_of(label_set, seeds, ids):
            if self._copy(label_set, part, rows):
                hit = False
                with self._decoding[hash(part.shard) % LOCKS]:
                    if lacking := self._copy(label_set, part, rows):
                        self._decode(label_set, part, lacking, rows)
        self._metrics.decoded(hit)
        return rows

    def hot_rows(self, label_set: LabelSet, seeds: int | Int64, ids: Int64) -> Encoded | None:
        """Reads rows as ``rows`` does if nothing has to be decoded or transferred, else None."""
        if not label_set.storage.is_local:
            return None
        rows = self._room(label_set, len(ids))
        if any(self._copy(label_set, p, rows) for p in parts_of(label_set, seeds, ids)):
            return None
        self._metrics.decoded(True)
        return rows

    def missing(self, label_set: LabelSet, seeds: int | Int64, ids: Int64) -> list[Shard]:
        """The shards of these rows that are not stored. Raises as ``parts_of``."""
        self._versions.forget()
        storage = label_set.storage
        shards = [part.shard for part in parts_of(label_set, seeds, ids)]
        keys = [(label_set.commit_key(shard),) for shard in shards]
        found = [self._versions.of(storage, key) for key in keys]
        return [s for s, version in zip(shards, found, strict=True) if version == (None,)]

    def _room(self, label_set: LabelSet, rows: int) -> Encoded:
        """Arrays for that many rows: view checks, then those of the encoding."""
        arrays = self._templates.get(label_set.digest)
        if arrays is None:
            own = label_set.encoding.arrays(label_set.width).items()
            arrays = {"view_check": np.empty(0, "<u4")}
            arrays |= {name: np.empty((0, width), dtype) for name, (dtype, width, _) in own}
            self._templates[label_set.digest] = arrays
        return {name: np.empty((rows, *a.shape[1:]), a.dtype) for name, a in arrays.items()}

    def _key(self, label_set: LabelSet, shard: Shard) -> _Key:
        """The shard as its files are now, the record that binds it to its place included."""
        keys = tuple(label_set.shard_keys(shard))
        version = self._versions.of(label_set.storage, keys)
        return label_set.name, label_set.digest, shard, version

    def _copy(self, label_set: LabelSet, part: Part, out: Encoded) -> list[int]:
        """Copies the rows whose chunks are decoded; returns the numbers of the other chunks."""
        key = self._key(label_set, part.shard)
        with self._guard:
            kept = self._kept.get(key, {})
            if kept:
                self._kept.move_to_end(key)
        lacking = []
        for chunk, rows, to in part.chunks(chunk_rows(label_set)):
            decoded = kept.get(chunk)
            if decoded is None:
                lacking.append(chunk)
                continue
            for name, array in out.items():
                array[to] = decoded[name].take(rows, axis=0)
        return lacking

    def _decode(self, label_set: LabelSet, part: Part, lacking: list[int], out: Encoded) -> None:
        """Decodes chunks of a shard, copies their rows, and keeps the chunks."""
        size, shard = chunk_rows(label_set), part.shard
        most = max(1, PIECE // (size * self.row_bytes(label_set)))
        wanted = {chunk: (rows, to) for chunk, rows, to in part.chunks(size)}
        for _ in range(_ATTEMPTS):
            key = self._stored(label_set, shard)
            label_set.shard_record(shard, fresh=True)
            for first, last in _runs(lacking, most):
                start = shard.start + first * size
                piece = _read(
                    label_set, shard.seed, start, min(shard.start + last * size, shard.stop)
                )
                chunks = {}
                for chunk in range(first, last):
                    at = slice((chunk - first) * size, (chunk - first + 1) * size)
                    chunks[chunk] = {name: array[at] for name, array in piece.items()}
                    rows, to = wanted[chunk]
                    for name, array in out.items():
                        array[to] = chunks[chunk][name][rows]
                if self._key(label_set, shard) != key:
                    break
                self._keep(key, chunks, label_set)
            else:
                return
        raise SsktError(f"{label_set.place_of(shard)} changes while it is read; ask again")

    def _stored(self, label_set: LabelSet, shard: Shard) -> _Key:
        """Raises ``IncompleteLabels``, ``CorruptStore`` if a file of the shard is missing."""
        key = self._key(label_set, shard)
        if None in key[3][: None if label_set.bound else -1]:  # old sets may lack the record
            self._versions.forget()
            label_set.storage.refresh()
            _read(label_set, shard.seed, shard.start, shard.start + 1)
            key = self._key(label_set, shard)
        return key

    def _keep(self, key: _Key, chunks: dict[int, Encoded], label_set: LabelSet) -> None:
        with self._guard:
            kept = self._kept.setdefault(key, {})
            new = {number: chunk for number, chunk in chunks.items() if number not in kept}
            kept |= new
            self._bytes += sum(map(_size, new.values()))
            self._kept.move_to_end(key)
            while self._bytes > self._budget:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= sum(map(_size, dropped.values()))
            if key not in self._kept and label_set.digest not in self._warned:
                self._warned.add(label_set.digest)
                logging.getLogger("sskt").warning(
                    "label set %s: the decoded labels of one shard do not fit into the memory of a "
                    "worker, so batches are slow; give more --memory",
                    label_set.name,
                )


class _Versions:
    """What the shards consist of now. Safe from any thread.

    Files are looked at every time. The listing of a bucket, which costs a round trip, is kept.
    """

    def __init__(self) -> None:
        self._listed: dict[tuple[str, str], tuple[float, dict[str, tuple[object, ...]]]] = {}

    def of(self, storage: Storage, keys: tuple[str, ...]) -> Version:
        """The version of some files of a shard. Raises ``InputError`` if one cannot be reached."""
        if isinstance(storage, LocalStorage):
            return tuple([_stat(f"{storage.path}/{key}") for key in keys])
        return tuple([self._object(storage, key) for key in keys])

    def _object(self, storage: Storage, key: str) -> tuple[object, ...] | None:
        seed = "/".join(key.split("/")[:3])
        listed_at, listed = self._listed.get((str(storage), seed), (-LISTED_SECONDS, {}))
        age = time.monotonic() - listed_at
        if age >= LISTED_SECONDS or (key not in listed and age >= LISTED_SECONDS / 10):
            listed = self._list(storage, seed)
        return listed.get(key)

    def _list(self, storage: Storage, seed: str) -> dict[str, tuple[object, ...]]:
        from sskt.teacher_cache.storage.object_store import BucketStorage

        now = time.monotonic()
        listed: dict[str, tuple[object, ...]]
        if isinstance(storage, BucketStorage):
            listed = {key: (found.size, found.e_tag) for key, found in storage._list(seed).items()}
        else:
            listed = {key: (size,) for key, size in storage.sizes(seed).items()}
        if len(self._listed) >= _LISTINGS:
            self._listed.clear()
        self._listed[str(storage), seed] = (now, listed)
        return listed

    def forget(self) -> None:
        """Lists buckets anew, because something may have been stored."""
        self._listed.clear()


def parts_of(label_set: LabelSet, seeds: int | Int64, ids: Int64) -> list[Part]:
    """Sorts rows by shards.

    Args:
        label_set: An opened label set.
        seeds: View seed, or one for each id (int64 ``[n]``).
        ids: Row numbers, int64 ``[n]``.

    Raises:
        InputError: If an id is not a row of the set.
        IncompleteLabels: If the set does not have one of the seeds.
    """
    if not len(ids):
        return []
    each = np.asarray(seeds, np.int64)
    if ids.min() < 0 or ids.max() >= label_set.samples or each.min() < 0:
        raise InputError(
            f"label set {label_set.name} has rows 0 to {label_set.samples - 1} of seeds from 0 on; "
            "some of the requested ones are outside"
        )
    if each.max() >= label_set.seeds:
        raise IncompleteLabels(
            f"label set {label_set.name} has seeds 0 to {label_set.seeds - 1}, not {each.max()}"
        )
    numbers = _numbers(label_set, each, ids)
    order = np.argsort(numbers, kind="stable")
    shards, rows = np.divmod(numbers[order], label_set.shard_rows)
    cuts = (np.flatnonzero(np.diff(shards)) + 1).tolist()
    return [
        Part(
            label_set.shard(*divmod(int(shards[start]), label_set.blocks)),
            rows[start:stop],
            order[start:stop],
        )
        for start, stop in pairwise([0, *cuts, len(ids)])
    ]


def chunk_rows(label_set: LabelSet) -> int:
    """Rows that are compressed together."""
    rows = label_set.shard_rows
    return CHUNK_ROWS if rows % CHUNK_ROWS == 0 else rows


def chunk_numbers(label_set: LabelSet, seeds: int | Int64, ids: Int64) -> Int64:
    """The chunk that each row is in, by a number that is unique in the label set."""
    return _numbers(label_set, np.asarray(seeds, np.int64), ids) // chunk_rows(label_set)


def _numbers(label_set: LabelSet, seeds: Int64, ids: Int64) -> Int64:
    """Numbers of rows, of which each shard has ``shard_rows``, the last one of a seed too."""
    return seeds * label_set.blocks * label_set.shard_rows + ids


def _runs(chunks: list[int], most: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of consecutive chunks, at most ``most`` at once."""
    begin = 0
    for i in range(1, len(chunks) + 1):
        if i == len(chunks) or chunks[i] != chunks[i - 1] + 1 or i - begin == most:
            yield chunks[begin], chunks[i - 1] + 1
            begin = i


def _size(arrays: Encoded) -> int:
    return sum(array.nbytes for array in arrays.values())


def _read(label_set: LabelSet, seed: int, start: int, stop: int) -> Encoded:
    """Rows with their view checks.

    Raises:
        IncompleteLabels: If they are not stored.
        CorruptStore: If a checksum fails, if a file is not the one that the shard's record names,
            or if a row cannot be a probability distribution.
    """
    if not label_set.has(label_set.shard(seed, start // label_set.shard_rows)):
        label_set.storage.refresh()  # a bucket's listing may be older than the shard
    labels = label_set.read(seed, start, stop)
    faulty = np.flatnonzero(label_set.encoding.faulty(labels, label_set.width))
    if len(faulty):
        raise CorruptStore(
            f"label set {label_set.name}: the row of sample {start + faulty[0]} in seed {seed} is "
            "no label; run sskt verify, remove the shard that it names and "
            "cache it again"
        )
    return {"view_check": label_set.read_checks(seed, start, stop)} | labels


def _stat(path: str) -> tuple[object, ...] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  (a Path costs more than the call)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return ()  # which is damage: reading it says so
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns, found.st_ino
