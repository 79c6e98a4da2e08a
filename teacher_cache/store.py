"""The label store: one Zarr v3 group per label set, written by whole shards.

A shard is one seed x one block of consecutive samples. It is written to a temporary file,
synced and renamed, so a shard that exists is complete and resuming is listing files.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from sskt.teacher_cache.durable import DurableStore, Locks, durable_rename, durable_write
from sskt.teacher_cache.encodings import Encoded, Encoding, encoding_of
from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels, MissingData
from sskt.teacher_cache.sources import classes_identity
from sskt.teacher_cache.spec import FORMAT, Spec, digest_of, name_of

SHARD_ROWS = 8192
"""Samples in a shard: 16 MB of float16 for 1000 classes."""

CHUNK_ROWS = 512
LOCKS = ".locks"
_SWEEP, _METADATA, _SHARDS = range(3)
_KEYS = {"name": "default", "configuration": {"separator": "/"}}


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
    """

    path: Path
    attributes: dict[str, Any]
    seeds: int
    samples: int
    rows: int
    writable: bool = False
    _arrays: dict[str, Any] = field(default_factory=dict, repr=False)
    _locks: Locks | None = field(default=None, repr=False)
    _claimed: set[Shard] = field(default_factory=set, repr=False)

    @property
    def name(self) -> str:
        """Folder name."""
        return self.path.name

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
    def blocks(self) -> int:
        """Shards of one seed."""
        return -(-self.samples // self.rows)

    def shard(self, seed: int, block: int) -> Shard:
        """The shard's place."""
        return Shard(seed, block, block * self.rows, min((block + 1) * self.rows, self.samples))

    def shards(self, seeds: Iterable[int]) -> Iterator[Shard]:
        """All shards of the seeds, seed by seed."""
        for seed in seeds:
            for block in range(self.blocks):
                yield self.shard(seed, block)

    def shard_path(self, array: str, shard: Shard) -> Path:
        """The file of one of the shard's arrays."""
        place = self.path / array / "c" / str(shard.seed) / str(shard.block)
        return place if array == "view_check" else place / "0"

    def commit_path(self, shard: Shard) -> Path:
        """The file whose existence says that the shard is whole."""
        return self.shard_path(list(self.encoding.arrays(len(self.classes)))[-1], shard)

    def has(self, shard: Shard) -> bool:
        """Whether the shard is stored (and so complete)."""
        return self.commit_path(shard).exists()

    def missing(self, seeds: Iterable[int]) -> list[Shard]:
        """The shards of ``seeds`` that are not stored."""
        return [shard for shard in self.shards(seeds) if not self.has(shard)]

    def coverage(self) -> list[float]:
        """Share of each seed's samples that is stored."""
        found = [0] * self.seeds
        for shard in self.shards(range(self.seeds)):
            found[shard.seed] += (shard.stop - shard.start) * self.has(shard)
        return [n / self.samples for n in found]

    def stored_bytes(self) -> int:
        """Bytes of all files of the set."""
        return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            store = DurableStore(self.path, read_only=not self.writable)
            array = zarr.open_array(store, path=name, mode="r+" if self.writable else "r")
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def write(self, shard: Shard, encoded: Encoded, checks: NDArray[np.uint32]) -> None:
        """Stores a whole shard: view checks first, then labels, which commit it."""
        seed, rows = shard.seed, slice(shard.start, shard.stop)
        self._array("view_check")[seed : seed + 1, rows] = checks[None]
        for key in self.encoding.arrays(len(self.classes)):
            self._array(key)[seed : seed + 1, rows] = encoded[key][None]

    def read(self, seed: int, start: int, stop: int) -> Encoded:
        """Encoded rows ``start:stop`` of a seed, in order.

        Raises ``IncompleteLabels`` if a shard is missing (Zarr itself would give fill values),
        ``CorruptStore`` if a checksum fails.
        """
        for block in range(start // self.rows, -(-stop // self.rows)):
            if not self.has(self.shard(seed, block)):
                raise IncompleteLabels(
                    f"label set {self.name}: seed {seed} lacks samples "
                    f"{block * self.rows} to {min((block + 1) * self.rows, self.samples) - 1}"
                )
        keys = list(self.encoding.arrays(len(self.classes)))
        return {key: self._rows(key, seed, start, stop) for key in keys}

    def read_checks(self, seed: int, start: int, stop: int) -> NDArray[np.uint32]:
        """View checks of rows ``start:stop`` of a seed: uint32 ``[n]``."""
        return self._rows("view_check", seed, start, stop)

    def _rows(self, key: str, seed: int, start: int, stop: int) -> NDArray[Any]:
        for block in range(start // self.rows, -(-stop // self.rows)):
            path = self.shard_path(key, self.shard(seed, block))
            if not path.exists() or not path.stat().st_size:  # Zarr gives fill values for both
                raise CorruptStore(
                    f"label set {self.name}: {path.relative_to(self.path)} is gone or empty "
                    f"(seed {seed}, samples {start} to {stop - 1}); run sskt verify, delete the "
                    "other files of that shard and cache it again"
                )
        try:
            rows = np.asarray(self._array(key)[seed : seed + 1, start:stop][0])
            if len(rows) != stop - start:
                raise ValueError(f"{len(rows)} rows instead of {stop - start}")
            return rows
        except Exception as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CorruptStore(
                f"label set {self.name}: {key}, seed {seed}, samples {start} to {stop - 1} "
                f"cannot be read ({what}); run sskt verify, delete the shard it names and "
                "cache it again"
            ) from error

    def claim(self, shard: Shard) -> bool:
        """Reserves a shard; False if it is stored, or this or another process is at it."""
        assert self._locks is not None
        byte = _SHARDS + shard.seed * self.blocks + shard.block
        if shard in self._claimed or not self._locks.claim(byte):
            return False
        if self.has(shard):
            self._locks.release(byte)
            return False
        self._claimed.add(shard)
        return True

    def release(self, shard: Shard) -> None:
        """Ends a claim."""
        assert self._locks is not None
        self._claimed.discard(shard)
        self._locks.release(_SHARDS + shard.seed * self.blocks + shard.block)

    def close(self) -> None:
        """Ends writing: gives back all claims. The set stays readable."""
        if self._locks is not None:
            self._locks.close()
        self._locks, self.writable = None, False
        self._arrays.clear()

    def record(self, key: str, value: Any) -> None:
        """Adds an attribute (once; the same value from every process that would add it)."""
        assert self._locks is not None
        with self._locks.held(_METADATA):
            attributes = read_attributes(self.path)
            if key not in attributes:
                attributes[key] = value
                document = json.loads((self.path / "zarr.json").read_text())
                document["attributes"] = {"sskt": attributes}
                durable_write(self.path / "zarr.json", _json(document))
            self.attributes = attributes

    def grow(self, seeds: int) -> None:
        """Makes room for more seeds; stored shards stay as they are."""
        assert self._locks is not None
        with self._locks.held(_METADATA):
            for key in [*self.encoding.arrays(len(self.classes)), "view_check"]:
                path = self.path / key / "zarr.json"
                document = json.loads(path.read_text())
                if document["shape"][0] < seeds:
                    document["shape"][0] = seeds
                    durable_write(path, _json(document))
                self.seeds = document["shape"][0]
        self._arrays.clear()


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()


def read_attributes(path: Path) -> dict[str, Any]:
    """The ``sskt`` attributes of a label set's group. Raises ``MissingData``, ``CorruptStore``."""
    try:
        document = json.loads((path / "zarr.json").read_text())
        attributes: dict[str, Any] = document["attributes"]["sskt"]
    except FileNotFoundError as error:
        if (path / "view_check").is_dir():
            raise CorruptStore(f"label set {path.name} has lost its zarr.json") from error
        raise MissingData(f"no label set at {path}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStore(f"{path / 'zarr.json'} is not a label set's metadata") from error
    try:
        if attributes["format"] > FORMAT:
            raise CorruptStore(
                f"label set {path.name} has format {attributes['format']}, this version of sskt "
                f"reads up to {FORMAT}; update sskt"
            )
        if digest_of(attributes["spec"]) != attributes["digest"]:
            raise CorruptStore(f"label set {path.name}: its spec does not match its digest")
        if classes_identity(attributes["classes"]) != attributes["spec"]["source"]["classes"]:
            raise CorruptStore(f"label set {path.name}: its classes do not match its spec")
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptStore(f"{path / 'zarr.json'} is not a label set's metadata") from error
    return attributes


def open_label_set(path: Path) -> LabelSet:
    """Opens a label set for reading. Raises ``MissingData``, ``CorruptStore``."""
    attributes = read_attributes(path)
    spec, classes = attributes["spec"], attributes["classes"]
    arrays = encoding_of(spec["encoding"]).arrays(len(classes))
    try:
        document = _array_metadata(path, "view_check")
        seeds, samples = document["shape"]
        rows = document["chunk_grid"]["configuration"]["chunk_shape"][1]
        if samples != spec["target"]["size"] or document["data_type"] != "uint32" or rows < 1:
            raise ValueError(f"view_check is {document['data_type']} {document['shape']}")
        for key, (dtype, width, _) in arrays.items():
            found = _array_metadata(path, key)
            shard = found["chunk_grid"]["configuration"]["chunk_shape"]
            have = (found["shape"][1:], shard, found["data_type"])
            if have != ([samples, width], [1, rows, width], dtype.name):
                raise ValueError(f"{key} is {found['data_type']} {found['shape']}")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptStore(f"label set {path.name}: unreadable metadata ({error})") from error
    return LabelSet(path, attributes, seeds, samples, rows)


def _array_metadata(path: Path, array: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((path / array / "zarr.json").read_text())
    if document["chunk_key_encoding"] != _KEYS:
        raise ValueError(f"{array} has other chunk keys")
    return document


def create_label_set(
    cache: Path,
    spec: Spec,
    classes: tuple[str, ...],
    seeds: int,
    *,
    shard_rows: int = SHARD_ROWS,
    made: dict[str, Any] | None = None,
) -> LabelSet:
    """Opens the label set of ``spec`` for writing, created (in one rename) if it is new.

    An existing one keeps its shard size and grows to ``seeds``. ``made`` is recorded on
    creation: versions and arguments, no part of the identity.
    """
    path = cache / name_of(spec)
    if path.exists() and not (path / "zarr.json").exists():
        raise CorruptStore(f"{path} exists but is no label set; remove or rename it")
    locks = Locks(cache / LOCKS / f"{path.name}.lock")
    with locks.held(_METADATA):
        if not (path / "zarr.json").exists():
            _create(path, spec, classes, seeds, shard_rows, made or {})
    label_set = open_label_set(path)
    label_set.writable, label_set._locks = True, locks
    if locks.claim(_SWEEP):
        for leftover in path.rglob("*.partial"):
            leftover.unlink(missing_ok=True)
        locks.release(_SWEEP)
    locks.claim(_SWEEP, shared=True, wait=True)
    if label_set.seeds < seeds:
        label_set.grow(seeds)
    return label_set


def _create(
    path: Path, spec: Spec, classes: tuple[str, ...], seeds: int, rows: int, made: dict[str, Any]
) -> None:
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(leftover)
    building = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    samples, encoding = int(spec["target"]["size"]), encoding_of(spec["encoding"])
    rows = min(rows, -(-samples // CHUNK_ROWS) * CHUNK_ROWS)
    chunk = CHUNK_ROWS if rows % CHUNK_ROWS == 0 else rows
    attributes = {
        "format": FORMAT,
        "digest": digest_of(spec),
        "spec": spec,
        "classes": list(classes),
        "made": made,
    }
    try:
        store = DurableStore(building)
        group = zarr.create_group(store, attributes={"sskt": attributes})
        for key, (dtype, width, fill) in encoding.arrays(len(classes)).items():
            group.create_array(
                key,
                shape=(seeds, samples, width),
                dtype=dtype,
                chunks=(1, chunk, width),
                shards=(1, rows, width),
                compressors=_codecs(dtype),
                fill_value=dtype.type(fill),
            )
        check = np.dtype("<u4")
        group.create_array(
            "view_check",
            shape=(seeds, samples),
            dtype=check,
            chunks=(1, chunk),
            shards=(1, rows),
            compressors=_codecs(check),
            fill_value=check.type(0),
        )
        durable_rename(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _codecs(dtype: np.dtype[Any]) -> list[Any]:
    shuffle: Literal["shuffle", "noshuffle"] = "shuffle" if dtype.itemsize > 1 else "noshuffle"
    return [
        BloscCodec(cname="zstd", clevel=5, shuffle=shuffle, typesize=dtype.itemsize),
        Crc32cCodec(),
    ]


def list_label_sets(cache: Path) -> list[LabelSet]:
    """All label sets of a cache folder, by name. Raises ``MissingData`` if it is no folder."""
    if not cache.is_dir():
        raise MissingData(
            f"no cache folder {cache}; make one with sskt cache-teachers --cache {cache}"
        )
    names = sorted(p for p in cache.iterdir() if p.is_dir() and not p.name.startswith("."))
    sets = [p for p in names if (p / "zarr.json").exists() or (p / "view_check").is_dir()]
    return [open_label_set(p) for p in sets]
