"""How time and memory grow with samples, view seeds, sources and clients; large caches.

    python benchmarks/scale.py [--json]

Time should be linear and memory flat. Labels are written by the writer of the teacher stage where
the network does not matter, and each measurement of memory is a process of its own, whose peak is
read from the kernel when it ends. Large caches are made of links: a label set of 10,000 shards
takes the disk of one shard and is as large for all that lists or reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sskt.benchmarks.common import (
    Row,
    cifar_folder,
    generated_labels,
    link_shards,
    new_label_set,
    note_absent,
    report,
    sized,
    write_labels,
)
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.extras import install_command
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.format.metadata import GROUP, to_json
from sskt.teacher_cache.format.spec import digest_of, label_set_spec, name_of
from sskt.teacher_cache.label_sets.create import create_label_set, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.source import Preprocessing, Source, freeze
from sskt.teacher_cache.targets.base import Names, Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, checks_of

CLASSES = 16
BLOCK = 65536
"""Rows that are read at once."""
IMAGENET = 1_281_167


def main() -> None:
    work = Path(tempfile.mkdtemp(prefix="sskt-bench-"))
    rows: list[Row] = []
    for part in (samples, seeds, sources, caching, clients, listing, resuming, small_memory, files):
        begin = time.perf_counter()
        folder = work / part.__name__
        folder.mkdir()
        rows += part(folder)
        shutil.rmtree(folder)
        print(f"{part.__name__}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    report("scale", rows, {"classes": CLASSES})
    shutil.rmtree(work)


# --- linear time, flat memory -------------------------------------------------------------------


def samples(work: Path) -> list[Row]:
    """10^3 to 10^6 samples under one seed."""
    counts = (1_000, 10_000, 100_000, 1_000_000)[: sized(4, 3)]
    return _grown(work, [(n, 1) for n in counts], "samples", counts)


def seeds(work: Path) -> list[Row]:
    """1 to 300 view seeds of the same samples."""
    counts = (1, 10, 100, 300)[: sized(4, 2)]
    return _grown(work, [(4096, s) for s in counts], "seeds", counts)


def _grown(
    work: Path, sizes: Sequence[tuple[int, int]], what: str, counts: Sequence[int]
) -> list[Row]:
    rows: list[Row] = []
    for (n, s), count in zip(sizes, counts, strict=True):
        found = child("write_and_read", str(work / f"{count}"), n, s)
        name = f"{count:,} {what}"
        rows.append((f"{name}: written in", found["write"], "s"))
        rows.append((f"{name}: read in", found["read"], "s"))
        rows.append((f"{name}: peak memory", found["peak"], "MiB"))
    return rows


def write_and_read(cache: str, n: int, s: int) -> dict[str, float]:
    """Writes a label set and reads all of it."""
    log_p = generated_labels(2048, CLASSES)
    begin = time.perf_counter()
    label_set = new_label_set(Path(cache), n, CLASSES, s)
    write_labels(label_set, [log_p])
    label_set.close()
    written = time.perf_counter()
    found = open_label_set(label_set.storage)
    for seed in range(s):
        for start in range(0, n, BLOCK):
            found.read(seed, start, min(n, start + BLOCK))
    return {"write": written - begin, "read": time.perf_counter() - written}


def sources(work: Path) -> list[Row]:
    """1 to 4 sources that label the same views in one pass."""
    folder = cifar_folder(sized(500, 100))
    views = Views(open_target(str(folder)), parse_policy("pad-crop-flip"))
    rows: list[Row] = []
    for count in (1, 2, 4):
        networks = [small_source(f"source{i}", 32) for i in range(count)]
        begin = time.perf_counter()
        cache_teachers(
            views, networks, parse_encoding("f16"), 2, work / str(count), StageOptions(workers=0)
        )
        seconds = time.perf_counter() - begin
        rows.append((f"{count} sources: labelled in", seconds, "s"))
    shutil.rmtree(folder.parent)
    return rows


def small_source(name: str, size: int, classes: int = CLASSES) -> Source:
    """A network of one layer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, classes))
    names = tuple(f"class {i}" for i in range(classes))
    return freeze(name, "linear", network, Preprocessing(size), names)


def caching(work: Path) -> list[Row]:
    """Peak memory of labelling and verifying folders of links to the same JPEGs."""
    images = cifar_folder(100)
    network = work / "tiny.py"
    network.write_text(NETWORK)
    rows: list[Row] = []
    for count in (1_000, 20_000, 200_000)[: sized(3, 1)]:
        target, cache = links(images, work / f"target-{count}", count), work / f"cache-{count}"
        labelled = command(
            "cache-teachers", "--source", f"tiny={network}:build", "--target", target, "--cache",
            cache, "--policy", "pad-crop-flip", "--seeds", 2, "--workers", 2,
        )  # fmt: skip
        verified = command("verify", "--cache", cache)
        name = f"{count:,} files"
        rows.append((f"{name}: labelled in", labelled["seconds"], "s"))
        rows.append((f"{name}: peak memory of cache-teachers", labelled["peak"], "MiB"))
        rows.append((f"{name}: peak memory of verify", verified["peak"], "MiB"))
        shutil.rmtree(cache)
    shutil.rmtree(images.parent)
    return rows


NETWORK = """
import torch
from torch import nn

CLASSES = [f"class {i}" for i in range(12)]
MEAN, STD, SIZE = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 12)).eval()
"""


def links(folder: Path, to: Path, count: int) -> Path:
    """``count`` samples of ten classes, as hard links to the images of ``folder``."""
    images = {c.name: sorted(c.iterdir()) for c in sorted((folder / "train").iterdir())}
    for name, own in images.items():
        (to / "train" / name).mkdir(parents=True)
        for i in range(count // len(images)):
            os.link(own[i % len(own)], to / "train" / name / f"{i:06d}.jpg")
    return to


def clients(work: Path) -> list[Row]:
    """1 to 64 clients of a label server with one worker, which reads the same epoch each."""
    try:
        import psutil
    except ImportError:
        note_absent("psutil", install_command("bench"))
        return []
    from sskt.benchmarks.server import epoch_of, measure, sskt_serve

    label_set = new_label_set(work / "cache", 8192 * 4, 250, 1)
    write_labels(label_set, [generated_labels(8192, 250)])
    label_set.close()
    epoch, rows = epoch_of(label_set), list[Row]()
    with sskt_serve(work / "cache") as (port, pid):
        for count in (1, 4, 16, 64):
            load = measure(port, (pid,), epoch, count, sized(10, 2))
            process = psutil.Process(pid)
            held = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
            name = f"{count} clients"
            rows.append((f"{name}: read", load.labels / load.seconds, "labels/s"))
            rows.append((f"{name}: CPU of the server", 1e6 * load.cpu / load.labels, "us/label"))
            rows.append((f"{name}: memory of the server", held / 2**20, "MiB"))
            rows.append((f"{name}: errors", load.errors, ""))
    return rows


# --- large caches -------------------------------------------------------------------------------


def listing(work: Path) -> list[Row]:
    """``sskt ls`` of many label sets."""
    count = sized(1000, 100)
    first = new_label_set(work / "cache", 1000, 1000, 3)
    write_labels(first, [generated_labels(1000, 1000)])
    first.close()
    copies(first, count)
    command("ls", "--cache", work / "cache")
    taken = [command("ls", "--cache", work / "cache")["cpu"] for _ in range(3)]
    return [(f"{count:,} label sets: sskt ls, CPU time", min(taken), "s (wanted: < 1 for 1,000)")]


def copies(label_set: LabelSet, count: int) -> None:
    """Label sets of other sources with the same shards, as links."""
    document = json.loads(label_set.storage.read(GROUP))
    attributes = document["attributes"]["sskt"]
    for i in range(1, count):
        attributes["spec"]["source"]["name"] = f"made{i}"
        attributes["digest"] = digest_of(attributes["spec"])
        folder = label_set.path.with_name(name_of(attributes["spec"]))
        for key in label_set.storage.sizes():
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            if key == GROUP:
                path.write_bytes(to_json(document))
            else:
                os.link(label_set.path / key, path)


def resuming(work: Path) -> list[Row]:
    """``cache_teachers`` where nothing is missing."""
    shard_rows, blocks, count = 512, 100, sized(100, 10)
    views, source = black_views(shard_rows * blocks), small_source("made", 8)
    linked(views, source, work / "cache", count, shard_rows)
    options = StageOptions(batch_size=64, shard_rows=shard_rows, workers=0)
    taken = []
    for _ in range(3):
        begin = time.process_time()
        done = cache_teachers(
            views, [source], parse_encoding("f16"), count, work / "cache", options
        )
        taken.append(time.process_time() - begin)
        assert done.written == 0
    name = f"{blocks * count:,} shards"
    return [(f"{name}: resumed, CPU time", min(taken), "s (wanted: < 2 for 10,000)")]


def black_views(count: int, size: int = 8) -> Views:
    """Views that are all alike, whatever their sample and seed: their checks are, too."""
    images = np.zeros((count, size, size, 3), np.uint8)
    ids = Names(str(i) for i in range(count))
    target = Target("black", "train", ("a", "b"), np.arange(count) % 2, ids, images=images)
    return Views(target, parse_policy("pad-crop-flip:padding=1"))


def linked(
    views: Views, source: Source, cache: Path, count: int, shard_rows: int
) -> WritableLabelSet:
    """A whole label set of such views, made of links to its first shard."""
    spec = label_set_spec(views, source, parse_encoding("f16"))
    found = create_label_set(cache, spec, source.classes, count, shard_rows=shard_rows)
    first = found.shard(0, 0)
    log_p = generated_labels(first.stop, len(source.classes))
    checks = checks_of(views.batch(np.arange(first.stop), 0))
    found.write(first, found.encoding.encode(log_p), checks)
    link_shards(found)
    found.close()
    return found


def small_memory(work: Path) -> list[Row]:
    """An epoch of ``SoftLabelLoader`` over labels that are larger than its ``memory``."""
    count, classes, gibibytes = sized(131072, 65536), 1000, 0.06
    found = {}
    for name, width in (("few", 8), ("many", classes)):
        cache = work / name
        linked(black_views(count), small_source("made", 8, width), cache, 2, 8192)
        found[name] = child("one_epoch", str(cache), count, gibibytes)
    size = 2 * count * classes / 2**20
    title = f"labels of {size:,.0f} MiB a seed, memory={gibibytes}"
    more = found["many"]["peak"] - found["few"]["peak"]
    return [
        (f"{title}: an epoch", found["many"]["seconds"], "s"),
        (f"{title}: peak above that of labels of 8 classes", more, "MiB"),
    ]


def one_epoch(cache: str, count: int, gibibytes: float) -> dict[str, float]:
    """All batches of an epoch with their labels."""
    from sskt.trainer.data.soft_label_loader import SoftLabelLoader

    loader = SoftLabelLoader(
        black_views(count).target, cache=cache, batch_size=256, device="cpu", memory=gibibytes,
        workers=0, epochs=1,
    )  # fmt: skip
    begin = time.perf_counter()
    for batch in loader:
        batch.soft(loader.sources[0], 1.0)
    return {"seconds": time.perf_counter() - begin}


def files(work: Path) -> list[Row]:
    """Opening a folder of as many files as ImageNet-1k, for the second time."""
    count = sized(IMAGENET, 10_000)
    for name in range(1000):
        folder = work / "imagenet" / "train" / f"n{name:08d}"
        folder.mkdir(parents=True)
        for i in range(count // 1000 + (name < count % 1000)):
            (folder / f"n{name:08d}_{i}.JPEG").touch()
    found = [child("open_files", str(work / "imagenet")) for _ in range(2)][1]
    title = f"{count:,} files in 1,000 classes"
    return [
        (f"{title}: opened again", found["seconds"], "s (wanted: < 30 for ImageNet-1k)"),
        (f"{title}: peak memory", found["peak"], "MiB"),
    ]


def open_files(folder: str) -> dict[str, float]:
    """Opens a folder, and computes what identifies it."""
    begin = time.perf_counter()
    open_target(folder).identity()
    return {"seconds": time.perf_counter() - begin}


# --- processes ----------------------------------------------------------------------------------


PEAK = """
import json, pathlib, resource, sys, time
begin, cpu = time.perf_counter(), time.process_time()
{work}
status = pathlib.Path("/proc/self/status")
# Not getrusage: its peak begins with the one of the process that started this one.
peak = (
    int(status.read_text().split("VmHWM:")[1].split()[0])
    if status.exists()
    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
)
taken = {{"seconds": time.perf_counter() - begin, "cpu": time.process_time(), "peak": peak / 1024}}
print("\\n" + json.dumps(taken | found))
"""


def child(function: str, *arguments: Any) -> dict[str, float]:
    """Calls a function of this module in a process; its results, and its peak memory in MiB."""
    return _ended(
        f"from sskt.benchmarks.scale import {function}\nfound = {function}(*{arguments!r})"
    )


def command(*arguments: object) -> dict[str, float]:
    """Runs an ``sskt`` command in a process."""
    given = list(map(str, arguments))
    return _ended(
        f"from sskt.cli.main import run\nassert run({given!r}) == 0, 'sskt failed'\nfound = {{}}"
    )


def _ended(work: str) -> dict[str, float]:
    code = [sys.executable, "-c", PEAK.format(work=work)]
    done = subprocess.run(code, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
