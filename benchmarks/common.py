"""What the benchmarks share: data, timing in turn, the machine's description, and results."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.format.shards import ShardRecord
from sskt.teacher_cache.format.spec import classes_identity
from sskt.teacher_cache.label_sets.create import create_label_set
from sskt.teacher_cache.label_sets.writable import WritableLabelSet

SAFELY: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""How archives are unpacked; Python has the filter since 3.11.4."""
PLACES = "models/squeezenet_places365.py"
QUICK_ROUNDS = 2
CIFAR = "cifar10-jpeg.tar.gz"

Row = tuple[str, float, str]


@dataclass
class Run:
    """A run of several comparisons in one process.

    Attributes:
        quick: Whether each comparison takes seconds instead of minutes.
        work: Folder for what the comparisons need in common.
        reports: Results: title, rows and further values of each table.
        absent: Peers that are not installed, and the command that installs each.
    """

    quick: bool
    work: Path
    reports: list[tuple[str, list[Row], dict[str, Any]]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


_run: ContextVar[Run | None] = ContextVar("run", default=None)


@contextlib.contextmanager
def running(run: Run) -> Iterator[None]:
    """Makes the comparisons add their results to a run, instead of printing them."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def sized(full: int, quick: int) -> int:
    """A number of samples, rounds or steps: ``full``, or ``quick`` in a quick run."""
    run = _run.get()
    return quick if run is not None and run.quick else full


def in_a_run() -> bool:
    """Whether ``sskt bench`` runs this comparison, and takes its results by ``report``."""
    return _run.get() is not None


def note_absent(peer: str, command: str) -> None:
    """Says that a peer is left out, and how it is installed."""
    run = _run.get()
    if run is not None:
        run.absent[peer] = command
    else:
        print(f"{peer} is not installed and left out; run: {command}", file=sys.stderr)


# --- data --------------------------------------------------------------------------------------


def real_data() -> Path | None:
    """The real images and networks, if there are any.

    They are looked for in ``$SSKT_TEST_DATA``, in ``$SSKT_DATA``, and beside the checkout.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    given = (os.environ.get(name) for name in ("SSKT_TEST_DATA", "SSKT_DATA"))
    folders = (*(Path(folder) for folder in given if folder), beside)
    return next((folder for folder in folders if (folder / CIFAR).exists()), None)


def data_folder() -> Path:
    """The real data; in a run without any, generated images in the same layout."""
    found, run = real_data(), _run.get()
    if found is not None:
        return found
    if run is None:
        sys.exit("real data not found: set SSKT_TEST_DATA to its folder, or run sskt bench")
    folder = run.work / "generated"
    if not folder.exists():
        for i in range(100):
            write_image(folder / "imagenet" / f"n{i:08d}" / f"n{i:08d}_1.JPEG", i, 375, 500)
    return folder


def write_image(path: Path, seed: int, height: int, width: int) -> None:
    """A generated JPEG: smooth colours with noise, so that it takes as many bytes as a photo."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    pixels = (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=85)


def cifar_folder(each: int) -> Path:
    """``each`` training images of every class of CIFAR-10, or as many generated ones, as JPEGs."""
    folder = Path(tempfile.mkdtemp(prefix="sskt-bench-")) / "cifar10"
    found = real_data()
    if found is None and _run.get() is not None:
        for i in range(10 * each):
            write_image(folder / "train" / f"class{i % 10}" / f"{i:05d}.jpg", i, 32, 32)
        return folder
    counts: dict[str, int] = {}
    with tarfile.open(data_folder() / CIFAR) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and parts[0] == "train":
                counts[parts[1]] = counts.get(parts[1], 0) + 1
                if counts[parts[1]] <= each:
                    archive.extract(member, folder, **SAFELY)
    return folder


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities of logits ``[n, C]``."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    found = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.asarray(found, np.float32)


def generated_labels(rows: int, classes: int, seed: int = 0) -> NDArray[np.float32]:
    """Log-probabilities of ``[rows, classes]`` logits of 64 hidden features, as a network's are."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((rows, 64), np.float32)
    head = rng.standard_normal((64, classes), np.float32)
    return log_softmax(np.asarray(0.4 * features @ head, np.float32))


def new_label_set(
    cache: Path,
    samples: int,
    classes: int,
    seeds: int,
    *,
    encoding: str = "f16",
    shard_rows: int = 8192,
    source: str = "made",
) -> WritableLabelSet:
    """A label set of no target, open for writing and without shards."""
    names = tuple(f"class {i}" for i in range(classes))
    spec = {
        "format": 1,
        "target": {"name": "made", "split": "train", "size": samples, "fingerprint": "made"},
        "source": {
            "name": source,
            "arch": "none",
            "precision": "float32",
            "preprocessing": {"size": 224},
            "batchnorm": "eval",
            "weights": "none",
            "classes": classes_identity(names),
        },
        "views": {"policy": "none", "version": 1, "parameters": {}, "f_s": "identity"},
        "encoding": parse_encoding(encoding).identity(),
    }
    return create_label_set(cache, spec, names, seeds, shard_rows=shard_rows)


def write_labels(label_set: WritableLabelSet, log_p: Sequence[NDArray[np.float32]]) -> None:
    """Writes all shards by the writer of the teacher stage.

    Args:
        label_set: The label set.
        log_p: Log-probabilities ``[n, C]`` for each seed in turn, repeated as needed.
    """
    for shard in label_set.missing(range(label_set.seeds)):
        of_seed = log_p[shard.seed % len(log_p)]
        rows = np.arange(shard.start, shard.stop) % len(of_seed)
        checks = np.arange(shard.start, shard.stop, dtype=np.uint32)
        label_set.write(shard, label_set.encoding.encode(of_seed[rows]), checks)


def link_shards(label_set: WritableLabelSet) -> int:
    """Fills a label set with links to its first shard, each with a record of its own.

    The set is as large as another one for all that lists and reads it, and takes the disk of one
    shard.

    Returns:
        The number of shards.
    """
    first, *others = label_set.shards(range(label_set.seeds))
    record = label_set.shard_record(first)
    assert record is not None
    for shard in others:
        for array in label_set.arrays:
            path = label_set.shard_path(array, shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(label_set.shard_path(array, first), path)
        own = ShardRecord(label_set.digest, shard.seed, shard.block, record.checksums)
        (label_set.path / label_set.record_key(shard)).write_bytes(own.to_json())
    return 1 + len(others)


# --- timing ------------------------------------------------------------------------------------


def interleaved(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turn within each round, after one round that does not count."""
    rounds = sized(rounds, min(rounds, QUICK_ROUNDS))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        order = list(ways.items())
        for name, run in order if turn % 2 else reversed(order):
            synchronise()
            begin = time.perf_counter()
            run()
            synchronise()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
        print(f"\rround {turn}/{rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return seconds


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired_ratio(these: list[float], those: list[float]) -> float:
    """Median over rounds of these/those: both of a round saw the same load."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


# --- results -----------------------------------------------------------------------------------


def machine() -> str:
    """For the caption of a result."""
    about = machine_details()
    return (
        f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, {about['device']}, "
        f"torch {about['torch']}"
    )


def machine_details() -> dict[str, Any]:
    """Cores, model of the CPU, memory, device and versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": cores,
        "cpu": _cpu_model(),
        "memory_gib": round(memory / 2**30),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text().splitlines() if listed.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return f"{value.strip()}, {platform.machine()}"
    return platform.processor() or platform.machine()


def report(title: str, rows: list[Row], extra: dict[str, Any]) -> None:
    """Adds a table to the run; elsewhere it is printed, with --json as one JSON document."""
    run = _run.get()
    if run is not None:
        run.reports.append((title, rows, extra))
    elif "--json" in sys.argv:
        values = {name: value for name, value, _ in rows}
        print(json.dumps({"title": title, "machine": machine(), **values, **extra}, indent=2))
    else:
        print(f"{title}\n{machine()}")
        for name, value, unit in rows:
            print(f"  {name:<58} {value:10.3f} {unit}")
