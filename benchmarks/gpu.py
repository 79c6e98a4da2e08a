"""Checks and measures in a few minutes what needs a GPU.

    python -m sskt.benchmarks.gpu --out FOLDER
    python -m sskt.benchmarks.gpu --device cpu --small --out FOLDER    (tries all of it on a CPU)

Needs no data and no network: images are generated, and the weights of networks are random, of
which only the time counts. Each part is a process with a time limit of its own. What a part has
measured until then is kept if it fails or takes too long, and the others go on. Writes
``gpu.json`` to the folder and prints a table. Exit status 1 if a part failed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from sskt.benchmarks.bench import number
from sskt.benchmarks.common import machine_details, paired_ratio, write_image
from sskt.benchmarks.label_delivery import InMemory
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.source import (
    Precision,
    Preprocessing,
    Source,
    freeze,
    full_float32,
)
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, open_views
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.gpu_loader import resident_feed
from sskt.trainer.data.loader import Feed, in_memory
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_labels import Labels, LiveLabels, StoredLabels, Window
from sskt.trainer.distributed import batches_of
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer

TEMPERATURE = 3.0
ROUNDS = 3
CLASSES = {"imagenet": 1000, "places365": 365}
Say = Callable[[str, float, str], None]
"""Takes a measurement: its name, value and unit."""


@dataclass(frozen=True)
class Setting:
    """Where and how large the parts run."""

    device: torch.device
    small: bool
    work: Path

    def sized(self, full: int, small: int) -> int:
        """A size of the whole run, or of a trial on a CPU."""
        return small if self.small else full

    def synchronise(self) -> None:
        """Waits until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Duration of a call with what it started on the device."""
        self.synchronise()
        begin = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - begin

    def in_turn(self, ways: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Seconds of each way, in turn, after a round that does not count."""
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(self.sized(ROUNDS, 1) + 1):
            for name, run in ways.items():
                taken = self.seconds(run)
                if turn:
                    found[name].append(taken)
        return found


# --- checks -------------------------------------------------------------------------------------


def checks(setting: Setting, say: Say) -> None:
    """Runs the tests marked gpu."""
    root = Path(__file__).resolve().parents[1]
    tests = [path for path in (root / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    if not tests:
        raise RuntimeError("no tests marked gpu found; run this from a checkout with its tests")
    report = setting.work / "tests.xml"
    code = [
        sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--device", setting.device.type,
        "-p", "no:cacheprovider", "-p", "no:randomly", "--junitxml", str(report),
        *map(str, sorted(tests)),
    ]  # fmt: skip
    if setting.small:
        code += ["-k", "not compiled"]
    done = subprocess.run(code, cwd=root, stdout=sys.stderr)
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors")}
    say("tests", count["tests"], "")
    say("tests failed", count["failures"] + count["errors"], "")
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}")


# --- steps --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A training of the paper: its data, networks and sizes, in whole and small."""

    model: str
    policy: str
    pixels: tuple[int, int]
    batch: tuple[int, int]
    samples: tuple[int, int]
    write: Callable[[Path, int, int], Path]
    source_size: tuple[int, int] = (224, 32)
    in_ram: bool = False


def images_of(side: int) -> Callable[[Path, int, int], Path]:
    """A writer of square JPEGs of ten classes."""

    def write(folder: Path, count: int, small: int) -> Path:
        for i in range(count):
            path = folder / "train" / f"class{i % 10}" / f"{i:05d}.jpg"
            write_image(path, i, side, side)
        return folder

    return write


def photos(folder: Path, count: int, small: int) -> Path:
    """A manifest of photos, each with one to three of 20 classes, as in VOC."""
    height, width = (60, 80) if small else (375, 500)
    rows = []
    for i in range(count):
        write_image(folder / f"{i:05d}.jpg", i % 128, height, width)
        rows.append(
            (f"{i:05d}.jpg", "|".join(f"class{(i + 7 * k) % 20}" for k in range(1 + i % 3)))
        )
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "labels"), *rows])
    return folder / "manifest.csv"


def clips(folder: Path, count: int, small: int) -> Path:
    """Folders of the extracted frames of clips."""
    height, width = (30, 40) if small else (128, 171)
    for i in range(count):
        for frame in range(1, 21):
            path = folder / "train" / f"class{i % 4}" / f"clip {i:04d}" / f"image_{frame:05d}.jpg"
            write_image(path, 20 * i + frame, height, width)
    return folder


CASES = {
    "CIFAR-10, ResNet-20": Case(
        "resnet20", "pad-crop-flip", (32, 32), (128, 8), (4096, 32), images_of(32), (74, 32), True
    ),
    "STL10, ResNet-20": Case(
        "resnet20", "pad-crop-flip", (96, 32), (128, 8), (1024, 32), images_of(96), in_ram=True
    ),
    "VOC, ResNet-18": Case(
        "resnet18", "random-resized-crop-flip:size={}", (224, 32), (64, 4), (512, 8), photos
    ),
    "clips, 3-D ResNet-18": Case(
        "resnet3d18", "clip-corner-crop-flip:frames=16,size={}", (112, 24), (32, 2), (256, 4), clips
    ),
}


def teachers(setting: Setting, size: int, **given: Any) -> list[Source]:
    """Two ResNet-50, the sources of the paper, with random weights."""
    found = []
    for name, count in CLASSES.items():
        torch.manual_seed(0)
        classes = tuple(f"{name} {i}" for i in range(count))
        network = resnet50(num_classes=count)
        preprocessing = Preprocessing(size)
        found.append(
            freeze(
                name, "resnet50", network, preprocessing, classes, device=setting.device, **given
            )
        )
    return found


def steps(case: Case) -> Callable[[Setting, Say], None]:
    """Steps with labels from the cache, from memory, and with both sources in the step."""

    def part(setting: Setting, say: Say) -> None:
        pick = 1 if setting.small else 0
        batch, size = case.batch[pick], case.source_size[pick]
        folder = case.write(setting.work / "data", case.samples[pick], pick)
        policy = case.policy.format(case.pixels[pick])
        views = open_views(open_target(str(folder)), parse_policy(policy))
        precision: Precision = "bfloat16"
        sources = teachers(setting, size, precision=precision)
        cache = setting.work / "cache"
        taken = setting.seconds(
            lambda: cache_teachers(
                views, sources, parse_encoding("f16"), 2, cache, StageOptions(batch)
            )
        )
        say("labelled, both sources, bfloat16", 2 * len(views.target) / taken, "views/s")
        config = TrainConfig(
            target=str(folder), policy=str(views.policy), model=case.model, test_split="none",
            source=list(CLASSES), tm=True, temperature=TEMPERATURE, batch_size=batch, lr=0.01,
            cache=cache, epochs=1000, device=str(setting.device),
            workers=min(8, os.cpu_count() or 1) if not case.in_ram else 0,
        )  # fmt: skip
        trainer = Trainer(make_plan(config))
        _epochs(setting, trainer, say)
        batches = _prepared(trainer, setting.sized(8, 1))
        _compared(setting, trainer, batches, sources, say)
        say("waits for the device in a step", _waits(setting, trainer, batches), "")
        if setting.device.type == "cuda":
            say("device busy in a step", _busy(trainer, batches), "%")
        if case.in_ram or not setting.small:
            half = Trainer(make_plan(replace(config, precision="bfloat16")))
            _trained(setting, half, batches, "step, cached labels, bfloat16", say)
        if not setting.small:
            compiled = Trainer(make_plan(replace(config, compile=True)))
            _trained(setting, compiled, batches, "step, cached labels, compiled", say)

    return part


Batches = list[tuple[Any, Tensor, Tensor]]
"""Samples, views and true classes of each batch, on the device."""


def _epochs(setting: Setting, trainer: Trainer, say: Say) -> None:
    """Epochs as they are trained: loading, checking and decoding included."""
    trainer.train_epoch(1)
    count, waited = len(trainer.views.target), 0.0
    begin = time.perf_counter()
    for _ in range(setting.sized(2, 1)):
        trainer.epoch += 1
        waited += float(trainer.train_epoch()["label_wait_seconds"])
    taken = time.perf_counter() - begin
    say("trained in whole epochs", setting.sized(2, 1) * count / taken, "views/s")
    say("waiting for labels in them", 100 * waited / taken, "%")


def _prepared(trainer: Trainer, count: int) -> Batches:
    order = np.random.default_rng(0).permutation(len(trainer.views.target))
    wanted = batches_of(order, trainer.plan.config.batch_size)[:count]
    device, found = trainer.plan.device, []
    for batch in trainer.loader.feed(wanted, 0):
        truth = trainer.loader.truth[torch.from_numpy(batch.samples).to(device)]
        found.append((batch.samples, batch.views.to(device), truth))
    return found


def _compared(
    setting: Setting, trainer: Trainer, batches: Batches, sources: list[Source], say: Say
) -> None:
    plan, views = trainer.plan, trainer.views
    stored = StoredLabels(plan.label_sets, plan.device)
    window = Window(0, ((0, len(views.target)),))
    labels = stored.enter(window, None).of(np.arange(len(views.target)), torch.empty(0))
    soft = {name: labels.soft(name, TEMPERATURE) for name in CLASSES}
    full = [replace(s, precision="float32") for s in sources]
    ways: dict[str, Labels] = {
        "cached labels": stored,
        "labels in memory": InMemory([soft]),
        "both sources in the step, float32": LiveLabels(full, views),
        "both sources in the step, bfloat16": LiveLabels(sources, views),
    }

    def run(labels: Labels) -> Callable[[], None]:
        entered = labels.enter(window, None)

        def steps() -> None:
            for samples, seen, truth in batches:
                trainer.step(SoftLabelBatch(samples, seen, truth, entered, plan.normalise))

        return steps

    seconds = setting.in_turn({name: run(labels) for name, labels in ways.items()})
    for name, taken in seconds.items():
        say(f"step, {name}", 1000 * float(np.median(taken)) / len(batches), "ms")
    cached = seconds["cached labels"]
    say("cached / in memory", paired_ratio(cached, seconds["labels in memory"]), "x")
    for name in list(ways)[2:]:
        say(f"{name} / cached", paired_ratio(seconds[name], cached), "x")


def _stepper(trainer: Trainer, batches: Batches) -> Callable[[], None]:
    plan = trainer.plan
    stored = StoredLabels(plan.label_sets, plan.device)
    entered = stored.enter(Window(0, ((0, len(trainer.views.target)),)), None)

    def run() -> None:
        for samples, seen, truth in batches:
            trainer.step(SoftLabelBatch(samples, seen, truth, entered, plan.normalise))

    return run


def _trained(setting: Setting, trainer: Trainer, batches: Batches, name: str, say: Say) -> None:
    run = _stepper(trainer, batches)
    run()
    taken = [setting.seconds(run) for _ in range(setting.sized(ROUNDS, 1))]
    say(name, 1000 * float(np.median(taken)) / len(batches), "ms")


def _waits(setting: Setting, trainer: Trainer, batches: Batches) -> float:
    """How often a step waits for the device; 0 on a CPU, which does not say."""
    run = _stepper(trainer, batches)
    run()
    if setting.device.type != "cuda":
        return 0.0
    setting.synchronise()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchron" in str(w.message) for w in found) / len(batches)


def _busy(trainer: Trainer, batches: Batches) -> float:
    """The share of a step in which the device computes, of the profiler; the rest are launches."""
    run = _stepper(trainer, batches)
    run()
    torch.cuda.synchronize()
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    taken = time.perf_counter() - begin
    with torch.profiler.profile(activities=both) as profile:
        run()
        torch.cuda.synchronize()
    kernels = float(sum(event.self_device_time_total for event in profile.key_averages()))
    return 100 * kernels / 1e6 / taken


# --- teacher stage ------------------------------------------------------------------------------


def stage(setting: Setting, say: Say) -> None:
    """The teacher stage beside the bare forward, from RAM and from JPEG files."""
    batch, size = setting.sized(128, 8), setting.sized(224, 32)
    count = setting.sized(2048, 16)
    ram = in_memory(open_target(str(images_of(96)(setting.work / "ram", count, 0))), 2**32)
    files = images_of(setting.sized(432, 64))(setting.work / "files", count, 0)
    crop = f"random-resized-crop-flip:size={size}"
    every = {
        "RAM": Views(ram, parse_policy("pad-crop-flip")),
        "JPEG": Views(open_target(str(files)), parse_policy(crop)),
    }
    x = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=setting.device)
    workers = os.cpu_count() if setting.device.type == "cuda" else 0
    options = StageOptions(batch, workers=workers)
    tiny = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, CLASSES["imagenet"]))

    def labelled(source: Source, views: Views) -> Callable[[], None]:
        def run() -> None:
            cache = Path(tempfile.mkdtemp(dir=setting.work))
            cache_teachers(views, [source], parse_encoding("f16"), 1, cache, options)
            shutil.rmtree(cache)

        return run

    def bare(source: Source, network: Callable[[Tensor], Any]) -> Callable[[], None]:
        def run() -> None:
            ready = source.preprocessing(x)
            with torch.inference_mode(), full_float32(), source.arithmetic():
                for _ in range(count // batch):
                    network(ready)

        return run

    names = tuple(f"class {i}" for i in range(CLASSES["imagenet"]))
    trivial = freeze("tiny", "tiny", tiny, Preprocessing(32), names, device=setting.device)
    precisions: tuple[Precision, ...] = ("bfloat16", "float32")
    for precision in precisions:
        source = teachers(setting, size, precision=precision)[0]
        ways: dict[str, Callable[[], None]] = {
            "bare network": bare(source, source.network),
            "bare network, folded": bare(source, source.run),
        }
        ways |= {f"stage from {k}": labelled(source, views) for k, views in every.items()}
        if precision == precisions[0]:
            more = {f"a network of one layer from {k}": labelled(trivial, v)
                    for k, v in every.items()}  # fmt: skip
            ways |= more
        seconds = setting.in_turn(ways)
        for name, taken in seconds.items():
            say(f"{precision}: {name}", count / float(np.median(taken)), "labels/s")
        for kind in every:
            own = seconds[f"stage from {kind}"]
            ratio = paired_ratio(seconds["bare network"], own)
            say(f"{precision}: stage from {kind} / bare network", ratio, "x")
            if precision == precisions[0]:
                rest = float(np.median(seconds[f"a network of one layer from {kind}"]))
                network = float(np.median(seconds["bare network, folded"]))
                limit = "the network" if network > rest else "loading, encoding and writing"
                say(f"{kind}: limited by {limit}; the other's share of its time",
                    100 * min(rest, network) / max(rest, network), "%")  # fmt: skip
    if not setting.small:
        source = teachers(setting, size, precision="bfloat16", compile_batch=batch)[0]
        run = labelled(source, every["RAM"])
        run()
        say("bfloat16, compiled: stage from RAM", count / setting.seconds(run), "labels/s")


# --- loader -------------------------------------------------------------------------------------


def loader(setting: Setting, say: Say) -> None:
    """Views that reach the device, by the number of loader processes."""
    cores = int(machine_details()["cores"])
    batch, count = setting.sized(128, 8), setting.sized(4096, 32)
    height, width = (60, 80) if setting.small else (375, 500)
    folder = setting.work / "files" / "train"
    for i in range(count):
        path, first = (folder / f"class{n % 2}" / f"{n:05d}.jpg" for n in (i, i % 256))
        if path == first:
            write_image(path, i, height, width)
        else:
            os.link(first, path)
    size = setting.sized(224, 32)
    target = open_target(str(setting.work / "files"))
    views = Views(target, parse_policy(f"random-resized-crop-flip:size={size}"))
    for workers in sorted({0, 1, cores // 2, cores} if not setting.small else {0, 1}):
        n = batch * 4 if workers < 2 and not setting.small else count
        feed = Feed(views, workers, pin=setting.device.type == "cuda", checked=True)
        rate = _rate(setting, feed, np.arange(min(n, count)), batch)
        say(f"JPEG files to {size} pixels, {workers} loader processes", rate, "views/s")
    small = images_of(32)(setting.work / "ram", setting.sized(4096, 32), 0)
    held: Target = in_memory(open_target(str(small)), 2**32)
    cropped = Views(held, parse_policy("pad-crop-flip"))
    resident = resident_feed(cropped, setting.device)
    assert resident is not None
    order = np.tile(np.arange(len(held)), setting.sized(8, 1))
    say("32 pixels, made on the device", _rate(setting, resident, order, batch), "views/s")
    feed = Feed(cropped, 0, pin=setting.device.type == "cuda")
    say("32 pixels, made on the CPU", _rate(setting, feed, order, batch), "views/s")


def _rate(setting: Setting, feed: Any, order: Any, batch: int) -> float:
    wanted = batches_of(order, batch)

    def run(batches: Sequence[Any]) -> None:
        for found in feed(batches, 0):
            found.views.to(setting.device, non_blocking=True)

    run(wanted[:1])
    return len(order) / setting.seconds(lambda: run(wanted))


# --- processes ----------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[Setting, Say], None], float]] = {
    "checks": (checks, 110),
    "CIFAR-10, ResNet-20": (steps(CASES["CIFAR-10, ResNet-20"]), 60),
    "STL10, ResNet-20": (steps(CASES["STL10, ResNet-20"]), 60),
    "teacher stage": (stage, 75),
    "loader": (loader, 40),
    "VOC, ResNet-18": (steps(CASES["VOC, ResNet-18"]), 55),
    "clips, 3-D ResNet-18": (steps(CASES["clips, 3-D ResNet-18"]), 60),
}
"""Each part and its seconds at most; all together may take no more than --minutes."""


def run_part(name: str, setting: Setting) -> None:
    """Runs a part in this process; each measurement is a line of JSON on standard output."""

    def say(measure: str, value: float, unit: str) -> None:
        row = {"name": measure, "value": float(value), "unit": unit}
        print(json.dumps(row), file=lines, flush=True)

    # What the part itself prints goes to standard error.
    with os.fdopen(os.dup(1), "w") as lines:
        os.dup2(2, 1)
        PARTS[name][0](setting, say)


def run_parts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all parts, each in a process; their measurements, and how each one ended."""
    begin, found = time.monotonic(), []
    out = Path(arguments.out)
    names = arguments.parts or list(PARTS)
    for name in names:
        started = time.monotonic()
        limit = min(PARTS[name][1] * (10 if arguments.device == "cpu" else 1),
                    60 * arguments.minutes - (started - begin))  # fmt: skip
        print(f"{name} ...", file=sys.stderr, flush=True)
        work = Path(tempfile.mkdtemp(prefix="sskt-gpu-"))
        code = [
            sys.executable, "-m", "sskt.benchmarks.gpu", "--part", name, "--work", str(work),
            "--device", arguments.device, *(["--small"] if arguments.small else []),
        ]  # fmt: skip
        log = out / f"{name.split(',')[0].replace(' ', '-').lower()}.log"
        entry: dict[str, Any] = {"name": name}
        with log.open("w") as errors, (work / "rows").open("w") as rows:
            try:
                done = subprocess.run(code, stdout=rows, stderr=errors, timeout=max(1.0, limit))
                if done.returncode:
                    entry["failed"] = f"exit status {done.returncode}; see {log.name}"
            except subprocess.TimeoutExpired:
                entry["failed"] = f"took more than {limit:.0f} s; see {log.name}"
        written = (work / "rows").read_text().splitlines()
        entry["results"] = [json.loads(line) for line in written if line.endswith("}")]
        entry["seconds"] = round(time.monotonic() - started, 1)
        found.append(entry)
        shutil.rmtree(work, ignore_errors=True)
        document = {"machine": machine_details(), "small": arguments.small, "parts": found}
        (out / "gpu.json").write_text(json.dumps(document, indent=2) + "\n")
    return document


def table(document: dict[str, Any]) -> Iterator[str]:
    """The measurements of ``run_parts``, a line each."""
    machine = document["machine"]
    cores = f"{machine['cores']} cores ({machine['cpu']})"
    yield f"{machine['device']}, {cores}, torch {machine['torch']}"
    for entry in document["parts"]:
        yield f"{entry['name']} ({entry['seconds']} s)"
        for row in entry["results"]:
            yield f"  {row['name']:<62} {number(row['value']):>10} {row['unit']}"
        if "failed" in entry:
            yield f"  FAILED: {entry['failed']}"


def main(given: Sequence[str] | None = None) -> int:
    """Reads the command line; the exit status."""
    parser = argparse.ArgumentParser("python -m sskt.benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="Tiny sizes, to try all of it.")
    parser.add_argument("--minutes", type=float, default=6.0, help="Of all parts together.")
    parser.add_argument(
        "--out", default="gpu", help="Folder of gpu.json and the logs of the parts."
    )
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), help="Default: all.")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "torch finds no GPU; give --device cpu --small to try it without one", file=sys.stderr
        )
        return 2
    if arguments.part:
        device = torch.device(arguments.device)
        run_part(arguments.part, Setting(device, arguments.small, Path(arguments.work)))
        return 0
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    document = run_parts(arguments)
    print("\n".join(table(document)))
    return int(any("failed" in entry for entry in document["parts"]))


if __name__ == "__main__":
    sys.exit(main())
