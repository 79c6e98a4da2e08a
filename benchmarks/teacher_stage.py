"""Labels a second of the teacher stage against the bare forward of the same network.

Same network, device, batch size and number of images, in turn; the bare way forwards one ready
float batch again and again. Real EfficientNet-Lite0; targets in RAM (shapes) and from JPEG files
(real CIFAR-10).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from sskt.benchmarks.common import cifar_folder, interleaved, paired_ratio, report
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

SIZE, BATCH, IMAGES, ROUNDS = 96, 64, 1280, 4


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = open_source(parse_source(f"imagenet:efficientnet_lite0@{SIZE}"), device=device)
    folder = cifar_folder(IMAGES // 10)
    targets = {
        "in RAM": open_target("shapes", limit=IMAGES),
        "JPEG files": open_target(str(folder)),
    }
    rows = []
    for name, target in targets.items():
        views = Views(target, parse_policy("pad-crop-flip"))
        seconds = interleaved(
            {
                "stage": lambda views=views: stage(source, views),  # type: ignore[misc]
                "bare": lambda target=target: bare(source, target),  # type: ignore[misc]
            },
            ROUNDS,
        )
        rows.append(
            (f"{name}: labels/s, teacher stage", IMAGES / float(np.median(seconds["stage"])), "")
        )
        rows.append(
            (f"{name}: labels/s, bare forward", IMAGES / float(np.median(seconds["bare"])), "")
        )
        rows.append((f"{name}: stage / bare", paired_ratio(seconds["bare"], seconds["stage"]), ""))
    report(
        f"teacher stage: EfficientNet-Lite0 at {SIZE} px, batch {BATCH}", rows, {"images": IMAGES}
    )
    shutil.rmtree(folder.parent)


def stage(source: Source, views: Views) -> None:
    cache = Path(tempfile.mkdtemp(prefix="sskt-bench-"))
    cache_teachers(views, [source], parse_encoding("f16"), 1, cache, StageOptions(BATCH))
    shutil.rmtree(cache)


def bare(source: Source, target: Target) -> None:
    shape = (BATCH, 3, SIZE, SIZE)
    x = torch.zeros(shape, device=source.device).contiguous(memory_format=torch.channels_last)
    x.normal_(generator=torch.Generator(source.device).manual_seed(0))
    with torch.inference_mode():
        for _ in range(len(target) // BATCH):
            source.network(x)


if __name__ == "__main__":
    main()
