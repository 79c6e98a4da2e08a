"""A label set that is open for writing: locks, shards and their records, attributes, seeds."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import CorruptStore, InputError
from sskt.teacher_cache.format.coordinates import (
    SEED,
    coordinate_keys,
    resized,
    seed_chunk,
)
from sskt.teacher_cache.format.encodings import Encoded, distance_of
from sskt.teacher_cache.format.metadata import GROUP, shard_file, to_json
from sskt.teacher_cache.format.shards import ShardRecord, file_checksums
from sskt.teacher_cache.format.spec import tolerance_of
from sskt.teacher_cache.label_sets.documents import consolidate, parse_attributes
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.storage.base import METADATA, SHARDS, StorageLocks
from sskt.teacher_cache.storage.local import LocalStorage

ALIKE_INDICES = 0.9
"""Part of the classes of top-k labels that two machines agree on, at least."""


@dataclass(kw_only=True)
class WritableLabelSet(LabelSet):
    """A label set that this process may add shards to; close it.

    ``create_label_set`` opens one. Locks hold between the processes that share a folder.

    Attributes:
        locks: Locks on the set.
    """

    locks: StorageLocks = field(repr=False)
    _locked: set[Shard] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, label_set: LabelSet, locks: StorageLocks) -> WritableLabelSet:
        """The same label set, open for writing."""
        found = {f.name: getattr(label_set, f.name) for f in fields(LabelSet)}
        return cls(**found, locks=locks)

    def write(self, shard: Shard, encoded: Encoded, checks: NDArray[np.uint32]) -> None:
        """Stores a whole shard: view checks, labels, and the record, which commits it.

        In a bucket, what another writer has stored meanwhile stays.

        Args:
            shard: The shard, which this process has locked.
            encoded: Its rows as the encoding stores them: ``[n, width]`` each.
            checks: View checks of its samples: uint32 ``[n]``.
        """
        if not self.storage.is_local and self.has(shard, fresh=True):
            return  # another writer was faster
        rows = {"view_check": checks} | encoded
        checksums = {}
        for array in self.arrays:
            data = shard_file(self.documents[array], rows[array])
            stored = self._stored(array, shard, data)
            checksums[array] = file_checksums(stored, self.layout(array).chunks)
        self._put_record(shard, checksums)

    def _stored(self, array: str, shard: Shard, data: bytes) -> bytes:
        """Stores the file of an array and returns the bytes that are stored now."""
        key = self.shard_key(array, shard)
        if not self.storage.is_local:
            if self.storage.create(key, data):
                return data
            found = self.storage.read(key)
            if found == data or self._as_good(array, found, data):
                return found
        self.storage.put(key, data)
        return data

    def _as_good(self, array: str, found: bytes, data: bytes) -> bool:
        """Whether stored labels differ from ours as those of two machines may.

        Two machines that label the same shard must end with the same files; their labels differ in
        the last bits.
        """
        layout = self.layout(array)
        if array == "view_check":
            return False
        try:
            theirs, ours = (
                layout.read(functools.partial(_part_of, file), 0, layout.rows)
                for file in (found, data)
            )
        except ValueError:
            return False
        if array == "index":
            return float(np.mean(theirs == ours)) > ALIKE_INDICES
        return distance_of(self.encoding, theirs, ours) <= tolerance_of(self.spec)

    def bind(self, shard: Shard) -> None:
        """Adds the record of a stored shard that has none, from the files as they are.

        Check the shard before: whatever lies in its place counts as its own from then on.
        """
        data = {array: self.storage.read(self.shard_key(array, shard)) for array in self.arrays}
        self._put_record(
            shard, {a: file_checksums(d, self.layout(a).chunks) for a, d in data.items()}
        )

    def _put_record(self, shard: Shard, checksums: Mapping[str, str]) -> None:
        record = ShardRecord(self.digest, shard.seed, shard.block, checksums)
        key, data = self.record_key(shard), record.to_json()
        if not self.storage.create(key, data) and self.storage.read(key) != data:
            self.storage.put(key, data)
        self._records.pop(shard, None)

    def acquire(self, shard: Shard) -> bool:
        """Reserves a shard for this process.

        In a bucket no process sees the locks of another one: two may label the same shard.

        Args:
            shard: The shard.

        Returns:
            False if it is stored, or if this or another process has locked it.
        """
        byte = SHARDS + shard.seed * self.blocks + shard.block
        if shard in self._locked or not self.locks.acquire(byte):
            return False
        if self.has(shard, fresh=True):
            self.locks.release(byte)
            return False
        self._locked.add(shard)
        return True

    def release(self, shard: Shard) -> None:
        """Releases a shard."""
        self._locked.discard(shard)
        self.locks.release(SHARDS + shard.seed * self.blocks + shard.block)

    def discard_unsound(self, shards: Iterable[Shard]) -> list[str]:
        """Makes stored shards missing whose record or files cannot be theirs.

        Of a folder each record is read. Of a bucket, which takes a request for each, only the
        names and sizes of the files are looked at.

        Args:
            shards: Shards of the set.

        Returns:
            What was wrong with each shard that was discarded.

        Raises:
            InputError: If a folder is in the place of a file.
        """
        return [what for shard in shards if (what := self._discarded(shard))]

    def _discarded(self, shard: Shard) -> str:
        if not self._unsound(shard):
            return ""
        byte = SHARDS + shard.seed * self.blocks + shard.block
        if not self.locks.acquire(byte):  # another process is labelling it
            return ""
        try:
            what = self._unsound(shard)
            if what:
                self.storage.delete([self.record_key(shard), self.commit_key(shard)])
                self._records.pop(shard, None)
            return what
        finally:
            self.locks.release(byte)

    def _unsound(self, shard: Shard) -> str:
        """Why a stored shard cannot be right, without reading its labels; "" if it may be."""
        if not self.has(shard):
            return ""
        empty = [key for key in self.shard_keys(shard) if not self.storage.size(key)]
        if isinstance(self.storage, LocalStorage):
            for key in empty:
                if (self.storage.path / key).is_dir():
                    raise InputError(
                        f"{self.storage.where(key)} is a folder in the place of a shard's file; "
                        "move it away and run the same command again"
                    )
        record = self.record_key(shard)
        if gone := [key for key in empty if key != record]:
            return str(self._damage(shard, f"{gone[0]} is gone or empty"))
        try:
            if self.storage.is_local:
                self.shard_record(shard, fresh=True)
        except CorruptStore as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Ends writing and gives back all locks; the set stays readable."""
        self.locks.close()
        self._locked.clear()

    def add_attribute(self, key: str, value: Any, *, replace: bool = False) -> None:
        """Adds an attribute to the group. One that exists stays as it is, without ``replace``."""

        def add(data: bytes) -> bytes | None:
            self.attributes = attributes = parse_attributes(self.storage, data)
            if key in attributes and not replace:
                return None
            attributes[key] = value
            return to_json(json.loads(data) | {"attributes": {"sskt": attributes}})

        with self.locks.held(METADATA):
            self.storage.update(GROUP, add)

    def grow(self, seeds: int) -> None:
        """Makes room for more seeds; stored shards stay as they are."""

        def widen(data: bytes) -> bytes | None:
            document = json.loads(data)
            self.seeds = max(document["shape"][0], seeds)
            if document["shape"][0] == self.seeds:
                return None
            return to_json(resized(document, self.seeds))

        with self.locks.held(METADATA):
            if SEED in self.coordinates:
                for key in coordinate_keys(SEED, seeds)[1:]:
                    self.storage.create(key, seed_chunk(key))
                self.storage.update(f"{SEED}/{GROUP}", widen)
            for array in [*self.arrays[1:], "view_check"]:
                self.storage.update(f"{array}/{GROUP}", widen)
            consolidate(self)


def _part_of(data: bytes, start: int | None, stop: int | None) -> bytes:
    return data[start:stop]
