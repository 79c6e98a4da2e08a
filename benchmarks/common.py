"""What the benchmarks share: real data, interleaved timing, one table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SAFELY: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""How archives are unpacked; Python has the filter since 3.11.4."""
PLACES = "models/squeezenet_places365.py"


def data_folder() -> Path:
    """The real data beside the checkout, or SSKT_TEST_DATA."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SSKT_TEST_DATA", beside))
    if not (folder / "README.md").exists():
        sys.exit(f"real data not found: {folder} (set SSKT_TEST_DATA)")
    return folder


def cifar_folder(each: int) -> Path:
    """``each`` training images of every class of the real CIFAR-10 JPEGs."""
    folder = Path(tempfile.mkdtemp(prefix="sskt-bench-")) / "cifar10"
    counts: dict[str, int] = {}
    with tarfile.open(data_folder() / "cifar10-jpeg.tar.gz") as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and parts[0] == "train":
                counts[parts[1]] = counts.get(parts[1], 0) + 1
                if counts[parts[1]] <= each:
                    archive.extract(member, folder, **SAFELY)
    return folder


def interleaved(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turn within each round, after one round that does not count."""
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


def machine() -> str:
    """For the caption of a result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores ({platform.machine()}), {gpu}, torch {torch.__version__}"


def report(title: str, rows: list[tuple[str, float, str]], extra: dict[str, Any]) -> None:
    """Prints a table; with --json one JSON document instead."""
    if "--json" in sys.argv:
        values = {name: value for name, value, _ in rows}
        print(json.dumps({"title": title, "machine": machine(), **values, **extra}, indent=2))
        return
    print(f"{title}\n{machine()}")
    for name, value, unit in rows:
        print(f"  {name:<58} {value:10.3f} {unit}")
