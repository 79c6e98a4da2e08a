"""A label set: reading and writing by whole shards, wherever it is.

A shard is one seed x one block of consecutive samples. Each of its files or objects is there
whole or not at all, and the last one commits it: a shard that is there is complete, and
resuming is listing names.
"""

from __future__ import annotations

import functools
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels, InputError, MissingData
from sskt.teacher_cache.format.encodings import (
    Encoded,
    Encoding,
    as_tensors,
    distance_of,
    encoding_of,
    soft_labels,
)
from sskt.teacher_cache.format.metadata import BOUND, GROUP, Document, shard_file, to_json
from sskt.teacher_cache.format.shards import (
    RECORD_ENDING,
    NotAsRecorded,
    ShardLayout,
    ShardRecord,
    file_checksums,
    layout_of,
    parse_record,
)
from sskt.teacher_cache.format.spec import Spec, tolerance_of
from sskt.teacher_cache.label_sets.documents import parse_attributes
from sskt.teacher_cache.label_sets.random_access import RowReader
from sskt.teacher_cache.storage.base import METADATA, SHARDS, Claims, Place
from sskt.teacher_cache.storage.local import LocalPlace, lost

if TYPE_CHECKING:  # the label server's workers do without torch
    from numpy.typing import ArrayLike
    from torch import Tensor

    from sskt.teacher_cache.media.images import UInt8

AT_ONCE = 4
"""Shards that a process reads at once: of a bucket or server, it waits for each."""

ALIKE_INDICES = 0.9
"""Part of the classes of top-k labels that two machines agree on, at least."""

KEPT_RECORDS = 4096
"""Records of shards that a label set keeps in memory."""


@dataclass(frozen=True)
class Shard:
    """One seed x the samples ``start`` to ``stop``."""

    seed: int
    block: int
    start: int
    stop: int


@dataclass
class LabelSet:
    """The soft labels of one source over one target split under one view policy.

    Use ``open_label_set`` or ``create_label_set``. Arrays (docs/format.md): the encoding's own
    ``[S, N, ...]`` and ``view_check`` uint32 ``[S, N]``.

    All but ``claim`` and ``release`` is the same wherever the set is. In a bucket, what is
    stored is listed once and again by ``missing``.
    """

    place: Place
    attributes: dict[str, Any]
    seeds: int
    samples: int
    shard_rows: int
    documents: Mapping[str, Document] = field(default_factory=dict, repr=False)
    writable: bool = False
    _records: dict[Shard, ShardRecord] = field(default_factory=dict, repr=False)
    _claims: Claims | None = field(default=None, repr=False)
    _claimed: set[Shard] = field(default_factory=set, repr=False)

    @property
    def name(self) -> str:
        """Folder name."""
        return self.place.name

    @property
    def path(self) -> Path:
        """Folder of a set in a local cache. Raises ``InputError`` for any other."""
        if not isinstance(self.place, LocalPlace):
            raise InputError(f"{self.place} is no folder")
        return self.place.path

    @property
    def spec(self) -> Spec:
        """Identity of the set, see ``spec.py``."""
        spec: Spec = self.attributes["spec"]
        return spec

    @property
    def digest(self) -> str:
        """SHA-256 of the spec."""
        return str(self.attributes["digest"])

    @property
    def encoding(self) -> Encoding:
        """How its labels are stored."""
        return encoding_of(self.spec["encoding"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The source's class names."""
        return tuple(self.attributes["classes"])

    @property
    def arrays(self) -> list[str]:
        """Its arrays in the order in which a shard is written; the last one commits it."""
        return ["view_check", *self.encoding.arrays(len(self.classes))]

    @property
    def blocks(self) -> int:
        """Shards of one seed."""
        return -(-self.samples // self.shard_rows)

    def shard(self, seed: int, block: int) -> Shard:
        """The shard's place."""
        start = block * self.shard_rows
        return Shard(seed, block, start, min(start + self.shard_rows, self.samples))

    def shards(self, seeds: Iterable[int]) -> Iterator[Shard]:
        """All shards of the seeds, seed by seed."""
        for seed in seeds:
            for block in range(self.blocks):
                yield self.shard(seed, block)

    def shard_key(self, array: str, shard: Shard) -> str:
        """The name of one of the shard's files or objects within the set."""
        key = f"{array}/c/{shard.seed}/{shard.block}"
        return key if array == "view_check" else f"{key}/0"

    def shard_path(self, array: str, shard: Shard) -> Path:
        """The file of one of the shard's arrays, of a local set."""
        return self.path / self.shard_key(array, shard)

    def record_key(self, shard: Shard) -> str:
        """The name of the shard's record within the set."""
        return self.shard_key("view_check", shard) + RECORD_ENDING

    def shard_keys(self, shard: Shard) -> list[str]:
        """The names of all files or objects of the shard in the order in which they are written."""
        return [*(self.shard_key(array, shard) for array in self.arrays), self.record_key(shard)]

    @property
    def bound(self) -> bool:
        """Whether a shard counts as stored only with its record (sets made since 0.2)."""
        return self.attributes.get(BOUND) is True

    def commit_key(self, shard: Shard) -> str:
        """The name whose existence says that the shard is whole."""
        return self.record_key(shard) if self.bound else self.shard_key(self.arrays[-1], shard)

    def commit_path(self, shard: Shard) -> Path:
        """The file whose existence says that the shard is whole, of a local set."""
        return self.path / self.commit_key(shard)

    def place_of(self, shard: Shard) -> str:
        """Path or URL of what commits the shard, for messages."""
        return self.place.where(self.commit_key(shard))

    def has(self, shard: Shard, *, fresh: bool = False) -> bool:
        """Whether the shard is stored (and so complete); ``fresh``: not from an earlier listing."""
        return self.place.size(self.commit_key(shard), fresh=fresh) is not None

    def missing(self, seeds: Iterable[int]) -> list[Shard]:
        """The shards of ``seeds`` that are not stored now.

        Raises:
            MissingData: If the folder of the set is gone, as on a file system that is not mounted
                any more. It would be labelled anew otherwise.
        """
        self._require_folder()
        self.place.refresh()
        return [shard for shard in self.shards(seeds) if not self.has(shard)]

    def coverage(self) -> list[float]:
        """Share of each seed's samples that is stored."""
        found = [0] * self.seeds
        for shard in self.shards(range(self.seeds)):
            found[shard.seed] += (shard.stop - shard.start) * self.has(shard)
        return [n / self.samples for n in found]

    def stored_bytes(self) -> int:
        """Bytes of all files of the set."""
        return sum(self.place.sizes().values())

    def write(self, shard: Shard, encoded: Encoded, checks: NDArray[np.uint32]) -> None:
        """Stores a whole shard: view checks, labels, and the record, which commits it.

        In a bucket, what another writer has stored meanwhile stays.

        Args:
            shard: The shard, which this process has claimed.
            encoded: Its rows as the encoding stores them: ``[n, width]`` each.
            checks: View checks of its samples: uint32 ``[n]``.
        """
        if not self.place.is_local and self.place.size(self.record_key(shard), fresh=True):
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
        if not self.place.is_local:
            if self.place.create(key, data):
                return data
            found = self.place.read(key)
            if found == data or self._as_good(array, found, data):
                return found
        self.place.put(key, data)
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
        data = {array: self.place.read(self.shard_key(array, shard)) for array in self.arrays}
        self._put_record(
            shard, {a: file_checksums(d, self.layout(a).chunks) for a, d in data.items()}
        )

    def _put_record(self, shard: Shard, checksums: Mapping[str, str]) -> None:
        record = ShardRecord(self.digest, shard.seed, shard.block, checksums)
        key, data = self.record_key(shard), record.to_json()
        if not self.place.create(key, data) and self.place.read(key) != data:
            self.place.put(key, data)
        self._records.pop(shard, None)

    def shard_record(self, shard: Shard, *, fresh: bool = False) -> ShardRecord | None:
        """Reads what binds a shard to its place.

        Args:
            shard: The shard.
            fresh: Whether to read it again if it was read before.

        Returns:
            The record; None if the shard has none.

        Raises:
            CorruptStore: If the file is no record, or that of another shard or label set.
        """
        record = None if fresh else self._records.get(shard)
        if record is None:
            record = self._read_record(shard)
            if len(self._records) >= KEPT_RECORDS:
                self._records.clear()
            if record is not None:
                self._records[shard] = record
        return record

    def _read_record(self, shard: Shard) -> ShardRecord | None:
        key = self.record_key(shard)
        if not self.bound and self.place.size(key) is None:
            return None
        try:
            record = parse_record(self.place.read(key))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damage(shard, f"its record {key} cannot be read ({error})") from error
        other = record.difference(self.digest, shard.seed, shard.block)
        if other or set(record.checksums) != set(self.arrays):
            raise self._damage(shard, f"its record {key} is that of {other or 'other arrays'}")
        return record

    def _damage(self, shard: Shard, what: str) -> CorruptStore:
        return CorruptStore(
            f"label set {self.name}: seed {shard.seed}, samples {shard.start} to "
            f"{shard.stop - 1}: {what}; run sskt verify, delete {self.commit_key(shard)} of the "
            "set and cache the labels again"
        )

    def layout(self, array: str) -> ShardLayout:
        """How the rows of an array lie in its shard files."""
        return layout_of(self.documents[array])

    def read(self, seed: int, start: int, stop: int) -> Encoded:
        """Encoded rows ``start:stop`` of a seed, in order.

        Raises ``IncompleteLabels`` if a shard is missing (Zarr itself would give fill values),
        ``CorruptStore`` if a checksum fails, ``InputError`` if the store cannot be reached.
        """
        self._require_shards(seed, start, stop)
        try:
            return {key: self._rows(key, seed, start, stop) for key in self.arrays[1:]}
        except CorruptStore:
            self._require_shards(seed, start, stop)  # one may have gone after it was listed
            raise

    def read_checks(self, seed: int, start: int, stop: int) -> NDArray[np.uint32]:
        """View checks of rows ``start:stop`` of a seed: uint32 ``[n]``."""
        return self._rows("view_check", seed, start, stop)

    def rows(self, seed: int, ids: ArrayLike, *, temperature: float = 1.0) -> Tensor:
        """Reads the soft labels of some samples, in any order.

        Chunks of labels stay decoded, up to 128 MiB a label set and process. A training that
        visits a larger set in random order should use ``SoftLabelLoader``, which reads whole
        shards ahead.

        Args:
            seed: View seed.
            ids: Row numbers of the samples: one integer, or ``[n]``.
            temperature: T of the paper's equation 1.

        Returns:
            softmax(z_s / T): float32 ``[n, C]`` on the CPU. The row of a sample that could not be
            read when it was labelled is NaN.

        Raises:
            InputError: If an id is not a row of the set, or the temperature is not above 0.
            IncompleteLabels: If a label is not stored.
            CorruptStore: If a checksum fails.
        """
        if not temperature > 0:
            raise InputError(f"the temperature must be above 0, found {temperature}")
        encoded = as_tensors(self.encoded_rows(seed, ids))
        return soft_labels(self.encoding, encoded, len(self.classes), temperature)

    def encoded_rows(self, seed: int, ids: ArrayLike) -> Encoded:
        """Reads labels of some samples as they are stored, in any order.

        Args:
            seed: View seed.
            ids: Row numbers of the samples: one integer, or ``[n]``.

        Returns:
            The arrays of the encoding by name, each ``[n, width]`` (docs/format.md).

        Raises:
            InputError: If an id is not a row of the set.
            IncompleteLabels: If a label is not stored.
            CorruptStore: If a checksum fails.
        """
        return self._row_reader.encoded(seed, ids)

    @functools.cached_property
    def _row_reader(self) -> RowReader:
        return RowReader(self, self.layout(self.arrays[-1]).chunk_rows)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out decoded labels, so that a loader process can be started with the set."""
        return {key: value for key, value in vars(self).items() if key != "_row_reader"}

    def check(self, view: UInt8, row: int, seed: int) -> None:
        """Compares a view with the one that the source saw.

        Args:
            view: uint8 ``[H, W, 3]``, or ``[D, H, W, 3]`` for clips.
            row: Row number of its sample.
            seed: View seed.

        Raises:
            ViewMismatch: If it is another view.
        """
        from sskt.teacher_cache.views.views import require_same_view

        require_same_view(view, int(self.read_checks(seed, row, row + 1)[0]), row, seed)

    def _require_shards(self, seed: int, start: int, stop: int) -> None:
        for block in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            if not self.has(self.shard(seed, block)):
                raise self._lacks(self.shard(seed, block))

    def _rows(self, array: str, seed: int, start: int, stop: int) -> NDArray[Any]:
        layout = self.layout(array)
        found = np.empty((stop - start, *layout.shape), layout.dtype)

        def read(block: int) -> None:
            shard = self.shard(seed, block)
            first, last = max(start, shard.start), min(stop, shard.stop)
            rows = self._shard_rows(array, shard, first - shard.start, last - shard.start)
            found[first - start : last - start] = rows

        in_threads(read, range(start // self.shard_rows, -(-stop // self.shard_rows)))
        return found

    def _shard_rows(self, array: str, shard: Shard, first: int, stop: int) -> NDArray[Any]:
        """Opens the file of an array of a shard and reads some of its rows.

        Every reader comes through here: the file must be the one that the shard's record names.
        """
        key, layout = self.shard_key(array, shard), self.layout(array)
        part = functools.partial(self.place.read_part, key)
        damage: Exception
        # The set may have been made again since the record was read, or an answer been cut.
        for fresh in (False, True):
            record = self.shard_record(shard, fresh=fresh)
            if record is None and self.bound:
                raise self._lacks(shard)
            try:
                if not self.place.size(key):
                    raise FileNotFoundError(key)
                return layout.read(part, first, stop, record.checksums[array] if record else "")
            except FileNotFoundError as error:
                self._require_folder()
                raise self._damage(shard, f"{key} is gone or empty") from error
            except (OSError, ValueError) as error:
                damage = error
                if self.place.is_local and not isinstance(error, NotAsRecorded):
                    break
        raise self._damage(shard, f"{key} cannot be read ({damage})") from damage

    def _require_folder(self) -> None:
        if isinstance(self.place, LocalPlace) and not self.place.there():
            raise MissingData(f"label set {self.name}: {lost(self.place.path)}")

    def _lacks(self, shard: Shard) -> IncompleteLabels:
        self._require_folder()
        return IncompleteLabels(
            f"label set {self.name}: seed {shard.seed} lacks samples {shard.start} to "
            f"{shard.stop - 1}"
        )

    def claim(self, shard: Shard) -> bool:
        """Reserves a shard; False if it is stored, or this or another process is at it.

        In a bucket nobody sees another process's claims: two may label the same shard.
        """
        assert self._claims is not None
        byte = SHARDS + shard.seed * self.blocks + shard.block
        if shard in self._claimed or not self._claims.claim(byte):
            return False
        if self.has(shard, fresh=True):
            self._claims.release(byte)
            return False
        self._claimed.add(shard)
        return True

    def release(self, shard: Shard) -> None:
        """Ends a claim."""
        assert self._claims is not None
        self._claimed.discard(shard)
        self._claims.release(SHARDS + shard.seed * self.blocks + shard.block)

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
        assert self._claims is not None
        if not self._unsound(shard):
            return ""
        byte = SHARDS + shard.seed * self.blocks + shard.block
        if not self._claims.claim(byte):  # another process is labelling it
            return ""
        try:
            what = self._unsound(shard)
            if what:
                self.place.delete([self.record_key(shard), self.commit_key(shard)])
                self._records.pop(shard, None)
            return what
        finally:
            self._claims.release(byte)

    def _unsound(self, shard: Shard) -> str:
        """Why a stored shard cannot be right, without reading its labels; "" if it may be."""
        if not self.has(shard):
            return ""
        gone = [key for key in self.shard_keys(shard)[:-1] if not self.place.size(key)]
        if isinstance(self.place, LocalPlace):
            for key in self.shard_keys(shard):
                if (self.place.path / key).is_dir():
                    raise InputError(
                        f"{self.place.where(key)} is a folder in the place of a shard's file; "
                        "move it away and run the same command again"
                    )
        if gone:
            return str(self._damage(shard, f"{gone[0]} is gone or empty"))
        try:
            if self.place.is_local:
                self.shard_record(shard, fresh=True)
        except CorruptStore as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Ends writing: gives back all claims. The set stays readable."""
        if self._claims is not None:
            self._claims.close()
        self._claims, self.writable = None, False
        self._claimed.clear()

    def add_attribute(self, key: str, value: Any) -> None:
        """Adds an attribute (once; the same value from every process that would add it)."""
        assert self._claims is not None

        def add(data: bytes) -> bytes | None:
            self.attributes = attributes = parse_attributes(self.place, data)
            if key in attributes:
                return None
            attributes[key] = value
            return to_json(json.loads(data) | {"attributes": {"sskt": attributes}})

        with self._claims.held(METADATA):
            self.place.update(GROUP, add)

    def grow(self, seeds: int) -> None:
        """Makes room for more seeds; stored shards stay as they are."""
        assert self._claims is not None

        def widen(data: bytes) -> bytes | None:
            document = json.loads(data)
            self.seeds = max(document["shape"][0], seeds)
            if document["shape"][0] == self.seeds:
                return None
            document["shape"][0] = self.seeds
            return to_json(document)

        with self._claims.held(METADATA):
            for array in [*self.arrays[1:], "view_check"]:
                self.place.update(f"{array}/{GROUP}", widen)


def seed_ranges(seeds: Iterable[int]) -> str:
    """``seeds 0, 3-5``."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    names = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    many = len(runs) > 1 or len(runs[0]) > 1
    return f"seed{'s' if many else ''} {', '.join(names)}"


def _part_of(data: bytes, start: int | None, stop: int | None) -> bytes:
    return data[start:stop]


def in_threads(call: Callable[[int], None], numbers: Iterable[int]) -> None:
    """Calls a function for each number, up to ``AT_ONCE`` at once. Raises what a call raised.

    The threads are daemons: those of a ``ThreadPoolExecutor`` are waited for when the interpreter
    ends, so that Ctrl-C would hang for as long as a label server is away.
    """
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        left.put(number)
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                number = left.get_nowait()
            except queue.Empty:
                return
            try:
                call(number)
            except BaseException as error:
                errors.append(error)

    threads = [
        threading.Thread(target=work, name="sskt-read", daemon=True)
        for _ in range(min(AT_ONCE, left.qsize()) if left.qsize() > 1 else 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work()
    if errors:
        raise errors[0]
