"""Labels a second of the teacher stage against the bare forward of the same network.

Same network, device, batch size and number of images, in turn; the bare way forwards one ready
float batch again and again: once the network as it is given, as an online peer would run it, and
once what the stage runs in its place (BatchNorm folded, or compiled), which is the best that any
stage could reach. Real EfficientNet-Lite0, and in a full run ResNet-50 with random weights; targets
in RAM (shapes) and from JPEG files (real CIFAR-10). ``--bf16``: both in bfloat16. ``--compile``:
with a compiled network.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sskt.benchmarks.common import Row, cifar_folder, interleaved, paired_ratio, report, sized
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Precision, Preprocessing, Source, freeze
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

SIZE, BATCH, IMAGES, ROUNDS = 96, 64, 1280, 4
NETWORKS = ("EfficientNet-Lite0", "ResNet-50")


def main() -> None:
    rows: list[Row] = []
    for network in NETWORKS[: sized(2, 1)]:
        source = opened(network)
        rows += compare(network, source)
    kind = source.faster.kind if source.faster else "as given"
    title = f"teacher stage at {SIZE} px, {source.precision}, {kind}, batch {BATCH}"
    report(title, rows, {"images": IMAGES})


def opened(network: str) -> Source:
    precision: Precision = "bfloat16" if "--bf16" in sys.argv else "float32"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = BATCH if "--compile" in sys.argv else None
    if network == "EfficientNet-Lite0":
        wanted = parse_source(f"imagenet:efficientnet_lite0@{SIZE}")
        return open_source(wanted, device=device, precision=precision, compile_batch=batch)
    from torchvision.models import resnet50

    torch.manual_seed(0)
    classes = tuple(map(str, range(1000)))
    return freeze("random", "resnet50", resnet50(), Preprocessing(SIZE), classes, device=device,
                  precision=precision, compile_batch=batch)  # fmt: skip


def compare(network: str, source: Source) -> list[Row]:
    rows: list[Row] = []
    folder = cifar_folder(IMAGES // 10)
    targets = {
        "in RAM": open_target("shapes", limit=IMAGES),
        "JPEG files": open_target(str(folder)),
    }
    for kind, target in targets.items():
        views = Views(target, parse_policy("pad-crop-flip"))
        ways: dict[str, Callable[[], None]] = {
            "stage": lambda views=views: stage(source, views),  # type: ignore[misc]
            "bare": lambda: bare(source, source.network),
            "bare, as the stage runs it": lambda: bare(source, source.run),
        }
        seconds = interleaved(ways, ROUNDS)
        for way in ways:
            rate = IMAGES / float(np.median(seconds[way]))
            rows.append((f"{network}, {kind}: labels/s, {way}", rate, ""))
        for way in ("bare", "bare, as the stage runs it"):
            ratio = paired_ratio(seconds[way], seconds["stage"])
            rows.append((f"{network}, {kind}: stage / {way}", ratio, ""))
    shutil.rmtree(folder.parent)
    return rows


def stage(source: Source, views: Views) -> None:
    cache = Path(tempfile.mkdtemp(prefix="sskt-bench-"))
    cache_teachers(views, [source], parse_encoding("f16"), 1, cache, StageOptions(BATCH))
    shutil.rmtree(cache)


def bare(source: Source, run: Callable[[Any], Any]) -> None:
    shape = (BATCH, 3, SIZE, SIZE)
    x = torch.zeros(shape, device=source.device).contiguous(memory_format=torch.channels_last)
    x.normal_(generator=torch.Generator(source.device).manual_seed(0))
    with torch.inference_mode(), source.arithmetic():
        for _ in range(IMAGES // BATCH):
            run(x)


if __name__ == "__main__":
    main()
