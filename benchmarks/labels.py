"""Storing labels and reading them in random order: sskt beside other ways of storing.

    python benchmarks/labels.py [--json]

Every way stores the same log-probabilities of a source with 1,000 classes and gives back the same
thing: float32 probabilities of a batch of samples under one view seed. Reported for each: bytes of
a label on disk, labels written and read a second (one thread, files in the page cache), and the
relative error of the gradient of the soft-label loss at T = 1 and T = 3 (as ``measured_error``).

The others:

- ``np.memmap`` and ``.npy`` files of float16 and float32 log-probabilities;
- LMDB with one entry of float16 a label;
- TinyViT's way (Wu et al., ECCV 2022, section 3.1): of each label the K largest probabilities as
  float16 and their classes as int16, with the seed of the augmentation, in one file of equal
  records an epoch; the other classes share what is left;
- FKD's way (Shen and Xing, ECCV 2022, section 3.2): a file for each image, which holds the
  coordinates and the flip of all its crops with the 5 largest probabilities of each;
- zarr-python reading the same f16 label set, from a folder and through obstore.

Writers other than ours and LMDB do not synchronise their files. Ours reads in two ways: as a
training does (a view seed in order, then indexed in memory), and single batches at random.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sskt.benchmarks.common import (
    Row,
    generated_labels,
    interleaved,
    new_label_set,
    note_absent,
    real_data,
    report,
    sized,
    write_labels,
)
from sskt.teacher_cache.extras import install_command
from sskt.teacher_cache.format.encodings import (
    EncodedTensors,
    Encoding,
    as_tensors,
    decoded,
    soft_labels,
)
from sskt.teacher_cache.label_sets.create import open_label_set

CLASSES, SEEDS, BATCH, ROUNDS = 1000, 2, 256, 5
SHARD_ROWS = 2048
TINY_VIT_K, FKD_K = 100, 5
SLOW = 8
"""zarr decodes a chunk for every label: it reads one of so many batches."""
Float32 = NDArray[np.float32]


class Way(Protocol):
    """A way of storing labels, with everything stored in a folder of its own."""

    def write(self, folder: Path, log_p: list[Float32]) -> None:
        """Stores log-probabilities ``[n, C]`` for each seed."""

    def open(self) -> None:
        """Opens what is stored for reading."""

    def read(self, seed: int, samples: NDArray[np.int64]) -> Tensor:
        """Probabilities ``[len(samples), C]``."""


@dataclass
class Sskt:
    """A label set; ``random`` reads single batches, otherwise a seed is read in order before."""

    encoding: str
    random: bool = False

    def write(self, folder: Path, log_p: list[Float32]) -> None:
        new = new_label_set(
            folder, len(log_p[0]), CLASSES, len(log_p), encoding=self.encoding,
            shard_rows=SHARD_ROWS,
        )  # fmt: skip
        write_labels(new, log_p)
        new.close()
        self.path = new.path

    def open(self) -> None:
        self._set, self._seed = open_label_set(self.path), -1
        self._held: EncodedTensors = {}

    def read(self, seed: int, samples: NDArray[np.int64]) -> Tensor:
        if self.random:
            return self._set.rows(seed, samples)
        if seed != self._seed:
            self._seed, self._held = seed, as_tensors(self._set.read(seed, 0, self._set.samples))
        rows = torch.from_numpy(samples)
        found = {key: values[rows] for key, values in self._held.items()}
        return soft_labels(self._set.encoding, found, CLASSES)


@dataclass
class Memmap:
    """One array on disk, which the system maps into memory."""

    def write(self, folder: Path, log_p: list[Float32]) -> None:
        self._path, self._shape = folder / "labels.bin", (len(log_p), *log_p[0].shape)
        found = np.memmap(self._path, np.float16, "w+", shape=self._shape)
        for seed, rows in enumerate(log_p):
            found[seed] = rows
        found.flush()

    def open(self) -> None:
        self._array = np.memmap(self._path, np.float16, "r", shape=self._shape)

    def read(self, seed: int, samples: NDArray[np.int64]) -> Tensor:
        return torch.softmax(torch.from_numpy(self._array[seed][samples]).float(), 1)


@dataclass
class Npy:
    """A file of float32 for each seed, which is read whole."""

    def write(self, folder: Path, log_p: list[Float32]) -> None:
        self._folder = folder
        for seed, rows in enumerate(log_p):
            np.save(folder / f"{seed}.npy", rows)

    def open(self) -> None:
        self._seed = -1

    def read(self, seed: int, samples: NDArray[np.int64]) -> Tensor:
        if seed != self._seed:
            self._seed, self._held = seed, torch.from_numpy(np.load(self._folder / f"{seed}.npy"))
        return torch.softmax(self._held[torch.from_numpy(samples)], 1)


@dataclass
class Lmdb:
    """LMDB: an entry for each seed and sample."""

    _found: Any = None

    def write(self, folder: Path, log_p: list[Float32]) -> None:
        import lmdb

        self._path = str(folder / "lmdb")
        size = 4 * sum(rows.size for rows in log_p) + 2**24
        with lmdb.open(self._path, map_size=size) as found, found.begin(write=True) as all_of_it:
            for seed, rows in enumerate(log_p):
                for sample, row in enumerate(rows.astype("<f2")):
                    all_of_it.put(b"%08d%08d" % (seed, sample), row.tobytes(), append=True)

    def open(self) -> None:
        import lmdb

        if self._found is not None:
            self._found.close()
        self._found = lmdb.open(self._path, readonly=True, lock=False, readahead=False)

    def read(self, seed: int, samples: NDArray[np.int64]) -> Tensor:
        rows = np.empty((len(samples), CLASSES), "<f2")
        with self._found.begin(buffers=True) as reading:
            for i, sample in enumerate(samples.tolist()):
                rows[i] = np.frombuffer(reading.get(b"%08d%08d" % (seed, sample)), "<f2")
        return torch.softmax(torch.from_numpy(rows).float(), 1)


def _largest(log_p: Float32, k: int) -> tuple[NDArray[np.int64], Float32]:
    classes = np.argpartition(-log_p, k, axis=1)[:, :k]
    return classes, np.exp(np.take_along_axis(log_p, classes, axis=1))


def _filled(classes: NDArray[Any], values: NDArray[Any]) -> Tensor:
    """The classes that are not stored share what is left of each label."""
    top = torch.from_numpy(values.astype(np.float32))
    rest = (1 - top.sum(1, keepdim=True)).clamp_min(0) / (CLASSES - top.shape[1])
    index = torch.from_numpy(classes.astype(np.int64))
    return rest.expand(-1, CLASSES).scatter(1, index, top)


@dataclass
class TinyViT:
    """Equal records in one file an epoch: seed of the augmentation, classes, probabilities."""

    def __post_init__(self) -> None:
        self._record = np.dtype(
            [("seed", "<i4"), ("index", "<i2", (TINY_VIT_K,)), ("value", "<f2", (TINY_VIT_K,))]
        )

    def write(self, folder: Path, log_p: list[Float32]) -> None:
        self._folder = folder
        for seed, rows in enumerate(log_p):
            records = np.zeros(len(rows), self._record)
            records["seed"] = np.arange(len(rows))
            records["index"], records["value"] = _largest(rows, TINY_VIT_K)
            records.tofile(folder / f"{seed}.bin")

    def open(self) -> None:
        paths = sorted(self._folder.glob("*.bin"))
        self._records = [np.memmap(path, self._record, "r") for path in paths]

    def read(self, seed: int, samples: NDArray[np.int64]) -> Tensor:
        records = self._records[seed][samples]
        return _filled(records["index"], records["value"])


@dataclass
class Fkd:
    """A file for each image with all its crops: where they are, classes, probabilities."""

    def __post_init__(self) -> None:
        self._record = np.dtype(
            [("crop", "<f4", (4,)), ("flip", "?"), ("index", "<i2", (FKD_K,)),
             ("value", "<f2", (FKD_K,))]
        )  # fmt: skip

    def write(self, folder: Path, log_p: list[Float32]) -> None:
        self._folder = folder
        records = np.zeros((len(log_p[0]), len(log_p)), self._record)
        for seed, rows in enumerate(log_p):
            records["index"][:, seed], records["value"][:, seed] = _largest(rows, FKD_K)
        for sample, crops in enumerate(records):
            crops.tofile(folder / f"{sample}.bin")

    def open(self) -> None:
        """Each file is opened when it is read."""

    def read(self, seed: int, samples: NDArray[np.int64]) -> Tensor:
        crops = [np.fromfile(self._folder / f"{s}.bin", self._record) for s in samples.tolist()]
        records = np.stack(crops)[:, seed]
        return _filled(records["index"], records["value"])


@dataclass
class Zarr:
    """zarr-python on a label set: no view seed is read ahead, no checksum is compared."""

    through: str

    def write(self, folder: Path, log_p: list[Float32]) -> None:
        stored = Sskt("f16")
        stored.write(folder, log_p)
        self._path = stored.path

    def open(self) -> None:
        import zarr
        from zarr.storage import LocalStore, ObjectStore

        path = self._path
        store: Any = LocalStore(path, read_only=True)
        if self.through == "obstore":
            import obstore.store

            store = ObjectStore(obstore.store.LocalStore(str(path)), read_only=True)
        self._array: Any = zarr.open_group(store, mode="r", use_consolidated=False)["labels"]

    def read(self, seed: int, samples: NDArray[np.int64]) -> Tensor:
        rows = self._array.oindex[seed, samples]
        return torch.softmax(torch.from_numpy(np.ascontiguousarray(rows)).float(), 1)


def ways() -> dict[str, Way]:
    """Every way whose package is installed."""
    found: dict[str, Way] = {
        "sskt root4, as a training": Sskt("root4"),
        "sskt f16, as a training": Sskt("f16"),
        "sskt u8, as a training": Sskt("u8"),
        "sskt root4-coarse, as a training": Sskt("root4-coarse"),
        "sskt f16, random batches": Sskt("f16", random=True),
        "np.memmap, float16": Memmap(),
        ".npy of a seed, float32": Npy(),
        f"TinyViT's way, top {TINY_VIT_K}": TinyViT(),
        f"FKD's way, top {FKD_K}": Fkd(),
        "zarr, f16, random batches": Zarr("folder"),
    }
    for package, name, way in (
        ("obstore", "zarr over obstore, f16, random batches", Zarr("obstore")),
        ("lmdb", "LMDB, float16", Lmdb()),
    ):
        try:
            __import__(package)
            found[name] = way
        except ImportError:
            note_absent(package, install_command("bench"))
    return found


def gradient_error(found: Float32, log_p: Float32, temperature: float) -> float:
    """||stored - p|| / ||q - p||, as ``measured_error`` has it, for any way of storing."""
    p = decoded(Encoding("f32"), {"labels": log_p}, CLASSES, temperature)
    with np.errstate(divide="ignore"):
        stored = decoded(Encoding("f32"), {"labels": np.log(found)}, CLASSES, temperature)
    student = np.random.default_rng(0).uniform(-1, 1, log_p.shape).astype(np.float32)
    q = decoded(Encoding("f32"), {"labels": student}, CLASSES, temperature)
    return float(np.linalg.norm(stored - p) / np.linalg.norm(q - p))


def source_labels(rows: int) -> tuple[Float32, str]:
    """Log-probabilities of a real ImageNet network on real images if both are at hand."""
    if real_data() is not None and rows > 2048:
        from sskt.benchmarks.label_encodings import log_probabilities

        with contextlib.suppress(ImportError):
            real = log_probabilities("imagenet:efficientnet_lite0", 2000)
            return np.tile(real, (-(-rows // len(real)), 1))[:rows], "EfficientNet-Lite0"
    return generated_labels(rows, CLASSES), "generated logits"


def main() -> None:
    samples = sized(16384, 2048)
    batches = samples // BATCH
    log_p, origin = source_labels(samples)
    both = [log_p, log_p[::-1].copy()]
    work = Path(tempfile.mkdtemp(prefix="sskt-bench-"))
    rng = np.random.default_rng(0)
    order = [rng.permutation(samples)[: BATCH * batches].reshape(batches, BATCH) for _ in both]
    found, rows = ways(), list[Row]()
    readers: dict[str, Callable[[], None]] = {}
    batches_of: dict[str, int] = {}
    written: dict[str, float] = {}
    for number, (name, way) in enumerate(found.items()):
        folder = work / str(number)
        folder.mkdir()
        begin = time.perf_counter()
        way.write(folder, both)
        written[name] = time.perf_counter() - begin
        way.open()

        batches_of[name] = batches // SLOW if name.startswith("zarr") else batches

        def epochs(way: Way = way, count: int = batches_of[name]) -> None:
            way.open()
            for seed, batches_of_seed in enumerate(order):
                for batch in batches_of_seed[:count]:
                    way.read(seed, batch)

        readers[name] = epochs
    seconds = interleaved(readers, ROUNDS)
    labels = len(both) * samples
    for number, (name, way) in enumerate(found.items()):
        size = sum(p.stat().st_size for p in (work / str(number)).rglob("*") if p.is_file())
        rows.append((f"{name}: stored", size / labels, "bytes/label"))
        rows.append((f"{name}: written", labels / written[name], "labels/s"))
        read = len(both) * batches_of[name] * BATCH / float(np.median(seconds[name]))
        rows.append((f"{name}: read", read, "labels/s"))
        way.open()
        probabilities = way.read(0, np.arange(BATCH)).numpy()
        for temperature in (1.0, 3.0):
            error = gradient_error(probabilities, log_p[:BATCH], temperature)
            rows.append((f"{name}: gradient error T={temperature:g}", 100 * error, "%"))
    report(
        f"labels of {CLASSES:,} classes, batches of {BATCH} in random order",
        rows,
        {"samples": samples, "seeds": SEEDS, "labels of": origin},
    )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
