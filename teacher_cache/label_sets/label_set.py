"""A label set for reading: its metadata, its shards and its rows, on any storage.

A shard holds one block of consecutive samples under one view seed. Each of its files or objects
exists whole or not at all, and one of them commits it: a shard that is stored is complete, and
resuming is listing names.
"""

from __future__ import annotations

import errno
import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels, InputError, MissingData
from sskt.teacher_cache.format.coordinates import (
    COORDINATES,
    LISTED,
    SAMPLE,
    coordinate_keys,
    read_coordinate,
)
from sskt.teacher_cache.format.encodings import (
    Encoded,
    Encoding,
    as_tensors,
    decoded,
    encoding_of,
    soft_labels,
)
from sskt.teacher_cache.format.features import (
    FEATURES,
    LOGITS,
    SOFT_LABELS,
    Float32,
    Head,
    features,
    sigmoid,
    values,
)
from sskt.teacher_cache.format.head import HEAD_ARRAYS, head_keys, read_head
from sskt.teacher_cache.format.metadata import BOUND, GROUP, Document
from sskt.teacher_cache.format.shards import (
    RECORD_ENDING,
    NotAsRecorded,
    ShardLayout,
    ShardRecord,
    layout_of,
    parse_record,
)
from sskt.teacher_cache.format.spec import Spec, width_of
from sskt.teacher_cache.label_sets.random_access import RowReader
from sskt.teacher_cache.storage.base import Storage
from sskt.teacher_cache.storage.http.published import INDEX
from sskt.teacher_cache.storage.local import LocalStorage, lost

if TYPE_CHECKING:  # the label server's workers do without torch
    from numpy.typing import ArrayLike
    from torch import Tensor

    from sskt.teacher_cache.media.images import UInt8

AT_ONCE = 4
"""Shards that a process reads at once: of a bucket or server, it waits for each."""

_NO_FILE = (None, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""Errors that mean that something else is in the place of a file."""

KEPT_RECORDS = 4096
"""Records of shards that a label set keeps in memory."""


@dataclass(frozen=True)
class Shard:
    """The labels of one block of consecutive samples under one view seed.

    Attributes:
        seed: View seed.
        block: Number of the block.
        start: First sample.
        stop: The sample after the last one.
    """

    seed: int
    block: int
    start: int
    stop: int


@dataclass
class LabelSet:
    """The soft labels of one source over one target split under one view policy.

    ``open_label_set`` opens one for reading. What is stored in a bucket or behind a label server
    is listed once, and again by ``missing``.

    Attributes:
        storage: Where the set is.
        attributes: The attributes ``sskt`` of the group (docs/format.md, section 3).
        seeds: S, the number of view seeds.
        samples: N, the number of samples.
        shard_rows: Samples in a shard.
        documents: Metadata of each array: those of the encoding ``[S, N, width]``, and
            ``view_check``, uint32 ``[S, N]``.
    """

    storage: Storage
    attributes: dict[str, Any]
    seeds: int
    samples: int
    shard_rows: int
    documents: Mapping[str, Document] = field(default_factory=dict, repr=False)
    _records: dict[Shard, ShardRecord] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Folder name."""
        return self.storage.name

    @property
    def path(self) -> Path:
        """Folder of a set in a local cache. Raises ``InputError`` for any other."""
        if not isinstance(self.storage, LocalStorage):
            raise InputError(f"{self.storage} is no folder")
        return self.storage.path

    @property
    def spec(self) -> Spec:
        """Identity of the set, see ``spec.py``."""
        spec: Spec = self.attributes["spec"]
        return spec

    @property
    def digest(self) -> str:
        """SHA-256 of the spec: 64 hexadecimal digits."""
        return str(self.attributes["digest"])

    @functools.cached_property
    def encoding(self) -> Encoding:
        """How its labels are stored."""
        return encoding_of(self.spec["encoding"])

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The source's class names; none for features without a head."""
        return tuple(self.attributes["classes"])

    @property
    def output(self) -> str:
        """What its rows are: ``soft-labels``, ``features`` or ``logits``."""
        return str(self.spec.get("output", {}).get("kind", SOFT_LABELS))

    @property
    def width(self) -> int:
        """Entries of a decoded row: C, or D of features."""
        return width_of(self.spec)

    @property
    def contents(self) -> str:
        """What a row holds, in words: ``1,000 classes``, ``1,280 features``."""
        classes = f"{len(self.classes):,} classes"
        if self.output == FEATURES:
            head = f" with a head of {classes}" if self.head_arrays else ""
            return f"{self.width:,} features{head}"
        return f"logits of {classes}" if self.output == LOGITS else classes

    @property
    def head_arrays(self) -> tuple[str, ...]:
        """Names of the arrays of its head, if it has one."""
        return HEAD_ARRAYS if "head" in self.spec.get("output", {}) else ()

    @functools.cached_property
    def head(self) -> Head | None:
        """The last layer of the source, of features that are its input; else None.

        Raises:
            CorruptStore: If it is missing or damaged.
        """
        if not self.head_arrays:
            return None
        sha256 = self.spec["output"]["head"]
        try:
            return read_head(self.storage.read, len(self.classes), self.width, sha256)
        except CorruptStore as error:
            raise CorruptStore(
                f"label set {self.name}: {error}; restore head_weight and head_bias from a copy, "
                "or delete the set and cache it again"
            ) from error

    @functools.cached_property
    def arrays(self) -> list[str]:
        """Names of its arrays, in the order in which a shard is written."""
        return ["view_check", *self.encoding.arrays(self.width)]

    @property
    def coordinates(self) -> list[str]:
        """Names of its coordinate arrays (docs/format.md, section 2); sets of 0.1 have none."""
        listed = self.attributes.get(LISTED, ())
        return [name for name in COORDINATES if name in listed]

    def constant_keys(self) -> list[str]:
        """The names of all files of the arrays without shards: coordinates and head."""
        found = [key for name in self.coordinates for key in coordinate_keys(name, self.seeds)]
        return found + (head_keys() if self.head_arrays else [])

    def sample_names(self) -> list[str] | None:
        """Reads the names of the samples.

        Returns:
            The ids of the target's samples; None if the set does not hold them.

        Raises:
            CorruptStore: If they cannot be read.
        """
        if SAMPLE not in self.coordinates:
            return None
        try:
            found = read_coordinate(self.storage.read, SAMPLE, self.samples)
            return [str(name) for name in found]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptStore(
                f"label set {self.name}: the names of its samples cannot be read ({error}); run "
                "sskt verify"
            ) from error

    @property
    def blocks(self) -> int:
        """Shards of one seed."""
        return -(-self.samples // self.shard_rows)

    def shard(self, seed: int, block: int) -> Shard:
        """The shard of a block under a seed."""
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
        return self.storage.where(self.commit_key(shard))

    def has(self, shard: Shard, *, fresh: bool = False) -> bool:
        """Whether the shard is stored (and so complete); ``fresh``: not from an earlier listing."""
        return self.storage.size(self.commit_key(shard), fresh=fresh) is not None

    def refresh(self) -> None:
        """Forgets what was listed of a bucket or a label server.

        Raises:
            MissingData: As ``missing``.
        """
        self._require_folder()
        self.storage.refresh()

    def missing(self, seeds: Iterable[int]) -> list[Shard]:
        """The shards of ``seeds`` that are not stored now.

        Raises:
            MissingData: If the folder of the set is gone, as on a file system that is not mounted
                any more. It would be labelled anew otherwise.
        """
        self.refresh()
        return [shard for shard in self.shards(seeds) if not self.has(shard)]

    def stored(self) -> tuple[list[float], int]:
        """``coverage``, and the bytes of the files that are stored now.

        A bucket or server is listed once. In a folder only the view checks are listed, which have a
        folder for each seed. The labels have one for each shard, and are asked for by name.
        """
        sizes = self._sizes_in_folder() if self.storage.is_local else self.storage.sizes()
        found = [0] * self.seeds
        for shard in self.shards(range(self.seeds)):
            found[shard.seed] += (shard.stop - shard.start) * (self.commit_key(shard) in sizes)
        return [n / self.samples for n in found], sum(sizes.values())

    def _sizes_in_folder(self) -> dict[str, int]:
        first, *others = self.arrays
        found = self.storage.sizes(first)
        keys = [GROUP, INDEX, *(f"{name}/{GROUP}" for name in others), *self.constant_keys()]
        for shard in self.shards(range(self.seeds)):
            if self.shard_key(first, shard) in found:
                keys += [self.shard_key(name, shard) for name in others]
        sizes = ((key, self.storage.size(key)) for key in keys)
        return found | {key: size for key, size in sizes if size is not None}

    def coverage(self) -> list[float]:
        """Share of each seed's samples that is stored."""
        found = [0] * self.seeds
        for shard in self.shards(range(self.seeds)):
            found[shard.seed] += (shard.stop - shard.start) * self.has(shard)
        return [n / self.samples for n in found]

    def stored_bytes(self) -> int:
        """Bytes of all files of the set."""
        return sum(self.storage.sizes().values())

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
        if not self.bound and self.storage.size(key) is None:
            return None
        try:
            record = parse_record(self.storage.read(key))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._require_readable(shard, key, error)
            raise self._damage(shard, f"its record {key} cannot be read ({error})") from error
        other = record.difference(self.digest, shard.seed, shard.block)
        if other or set(record.checksums) != set(self.arrays):
            raise self._damage(shard, f"its record {key} is that of {other or 'other arrays'}")
        return record

    def _require_readable(self, shard: Shard, key: str, error: Exception) -> None:
        """Raises ``InputError`` for an error of the system that says nothing about the file."""
        in_folder = isinstance(self.storage, LocalStorage)
        if in_folder and isinstance(error, OSError) and error.errno not in _NO_FILE:
            raise InputError(
                f"label set {self.name}: seed {shard.seed}, samples {shard.start} to "
                f"{shard.stop - 1}: {key} cannot be read ({error.strerror}); give this user the "
                "right to read it, or look after its disk, and run the same command again"
            ) from error

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
            InputError: If an id is not a row of the set, the temperature is not above 0, or the
                rows are features without head, or logits (``features`` reads these).
            IncompleteLabels: If a label is not stored.
            CorruptStore: If a checksum fails.
        """
        if not temperature > 0:
            raise InputError(f"the temperature must be above 0, found {temperature}")
        encoded = as_tensors(self.encoded_rows(seed, ids))
        return soft_labels(self.encoding, encoded, len(self.classes), temperature, self.head)

    def features(self, seed: int, ids: ArrayLike) -> Tensor:
        """Reads the features or logits of some samples, in any order.

        Args:
            seed: View seed.
            ids: Row numbers of the samples: one integer, or ``[n]``.

        Returns:
            float32 ``[n, D]`` on the CPU. The row of a sample that could not be read is NaN.

        Raises:
            InputError: If an id is not a row of the set, or its rows are soft labels.
            IncompleteLabels: If a row is not stored.
            CorruptStore: If a checksum fails.
        """
        if self.output == SOFT_LABELS:
            raise InputError(
                f"label set {self.name} holds soft labels and no features; read it with rows, or "
                "cache features with --output features"
            )
        return features(as_tensors(self.encoded_rows(seed, ids)))

    def probabilities(self, encoded: Encoded) -> NDArray[np.float64] | None:
        """Decodes stored rows at T = 1 without torch.

        Args:
            encoded: The stored arrays, ``[n, width]`` each.

        Returns:
            float64 ``[n, C]``: softmax(z_s); of logits their sigmoids, as their classes are
            independent. NaN where a row holds nothing. None for features without a head.
        """
        if self.output == LOGITS:
            return sigmoid(values(encoded))
        if self.encoding.of_features and self.head is None:
            return None
        return decoded(self.encoding, encoded, len(self.classes), head=self.head)

    def decoded(self, encoded: Encoded) -> Float32:
        """Decodes stored rows without torch, as what they are.

        Args:
            encoded: The stored arrays, ``[n, width]`` each.

        Returns:
            float32 ``[n, width]``: soft labels at T = 1, features or logits.
        """
        if self.encoding.of_features:
            return values(encoded)
        return decoded(self.encoding, encoded, len(self.classes)).astype(np.float32)

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
        """Leaves out what is read again, so that a loader process can be started with the set."""
        return {key: v for key, v in vars(self).items() if key not in ("_row_reader", "head")}

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
        part = functools.partial(self.storage.read_part, key)
        damage: Exception
        # The set may have been made again since the record was read, or an answer been cut.
        for fresh in (False, True):
            record = self.shard_record(shard, fresh=fresh)
            if record is None and self.bound:
                raise self._lacks(shard)
            try:
                if not self.storage.size(key):
                    raise FileNotFoundError(key)
                return layout.read(part, first, stop, record.checksums[array] if record else "")
            except FileNotFoundError as error:
                self._require_folder()
                raise self._damage(shard, f"{key} is gone or empty") from error
            except (OSError, ValueError) as error:
                self._require_readable(shard, key, error)
                damage = error
                if self.storage.is_local and not isinstance(error, NotAsRecorded):
                    break
                if not fresh:
                    self.storage.distrust(key)
        raise self._damage(shard, f"{key} cannot be read ({damage})") from damage

    def _require_folder(self) -> None:
        if isinstance(self.storage, LocalStorage) and not self.storage.there():
            raise MissingData(f"label set {self.name}: {lost(self.storage.path)}")

    def _lacks(self, shard: Shard) -> IncompleteLabels:
        self._require_folder()
        return IncompleteLabels(
            f"label set {self.name}: seed {shard.seed} lacks samples {shard.start} to "
            f"{shard.stop - 1}"
        )


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


def in_threads(call: Callable[[int], None], numbers: Iterable[int], at_once: int = AT_ONCE) -> None:
    """Calls a function for each number, up to ``at_once`` at once. Raises what a call raised.

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
        for _ in range(min(at_once, left.qsize()) if left.qsize() > 1 else 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work()
    if errors:
        raise errors[0]
