"""A label set: reading and writing by whole shards, wherever it is.

A shard is one seed x one block of consecutive samples. Each of its files or objects is there
whole or not at all, and the last one commits it: a shard that is there is complete, and
resuming is listing names.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import (
    CorruptStore,
    IncompleteLabels,
    InputError,
    SsktError,
    first_line,
)
from sskt.teacher_cache.format.encodings import (
    Encoded,
    Encoding,
    as_tensors,
    encoding_of,
    soft_labels,
)
from sskt.teacher_cache.format.metadata import GROUP, to_json
from sskt.teacher_cache.format.spec import Spec
from sskt.teacher_cache.label_sets.documents import parse_attributes
from sskt.teacher_cache.label_sets.random_access import RowReader
from sskt.teacher_cache.storage.base import METADATA, SHARDS, Claims, Place
from sskt.teacher_cache.storage.local import LocalPlace

if TYPE_CHECKING:  # the label server's workers do without torch
    from numpy.typing import ArrayLike
    from torch import Tensor

    from sskt.teacher_cache.media.images import UInt8


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
    writable: bool = False
    _arrays: dict[str, Any] = field(default_factory=dict, repr=False)
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

    def commit_key(self, shard: Shard) -> str:
        """The name whose existence says that the shard is whole."""
        return self.shard_key(self.arrays[-1], shard)

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
        """The shards of ``seeds`` that are not stored now."""
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

    def _array(self, name: str, seed: int = 0) -> Any:
        known = self._arrays.get(name)
        if known is None or known.shape[0] <= seed:  # the set may have grown
            array = self.place.array(name, writable=self.writable)
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def write(self, shard: Shard, encoded: Encoded, checks: NDArray[np.uint32]) -> None:
        """Stores a whole shard: view checks first, then labels, which commit it.

        In a bucket, what somebody else has stored of it meanwhile stays.
        """
        seed, rows = shard.seed, slice(shard.start, shard.stop)
        self._array("view_check")[seed : seed + 1, rows] = checks[None]
        for key in self.arrays[1:]:
            self._array(key)[seed : seed + 1, rows] = encoded[key][None]

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
        return RowReader(self, int(self._array(self.arrays[-1]).chunks[1]))

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
                lacking = self.shard(seed, block)
                raise IncompleteLabels(
                    f"label set {self.name}: seed {seed} lacks samples {lacking.start} to "
                    f"{lacking.stop - 1}"
                )

    def _require_files(self, array: str, seed: int, start: int, stop: int) -> None:
        for block in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            key = self.shard_key(array, self.shard(seed, block))
            if not self.place.size(key):  # Zarr gives fill values for gone and for empty
                raise CorruptStore(
                    f"label set {self.name}: {key} is gone or empty "
                    f"(seed {seed}, samples {start} to {stop - 1}); run sskt verify, delete the "
                    "other files of that shard and cache it again"
                )

    def _rows(self, array: str, seed: int, start: int, stop: int) -> NDArray[Any]:
        self._require_files(array, seed, start, stop)
        try:
            rows = np.asarray(self._array(array, seed)[seed : seed + 1, start:stop][0])
            if len(rows) != stop - start:
                raise ValueError(f"{len(rows)} rows instead of {stop - start}")
            return rows
        except SsktError:  # a store that cannot be reached is no damage
            raise
        except Exception as error:
            self._require_files(array, seed, start, stop)  # one may have gone meanwhile
            raise CorruptStore(
                f"label set {self.name}: {array}, seed {seed}, samples {start} to {stop - 1} "
                f"cannot be read ({first_line(error)}); run sskt verify, delete the shard it names "
                "and cache it again"
            ) from error

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

    def close(self) -> None:
        """Ends writing: gives back all claims. The set stays readable."""
        if self._claims is not None:
            self._claims.close()
        self._claims, self.writable = None, False
        self._claimed.clear()
        self._arrays.clear()

    def record(self, key: str, value: Any) -> None:
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
        self._arrays.clear()


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
