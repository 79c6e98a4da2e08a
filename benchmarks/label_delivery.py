"""Does label delivery cost anything? A step of ResNet-20 with two TMs, three ways, in turn:

- labels from the cache (read, indexed, decoded a batch at a time),
- labels already in memory (float32 soft labels at T, only indexed),
- the paper's way: both sources run in every step.

Real CIFAR-10 JPEGs, real ImageNet and Places365 sources. Prints ratios of medians over rounds.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PLACES, cifar_folder, data_folder, interleaved, paired_ratio, report
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.encodings import parse_encoding
from sskt.teacher_cache.stage import cache_teachers
from sskt.teacher_cache.targets import open_target
from sskt.teacher_cache.views import Views, parse_policy
from sskt.teacher_cache.zoo import open_source, parse_source
from sskt.trainer.config import TrainConfig
from sskt.trainer.labels import NoLabels, StoredLabels, Window
from sskt.trainer.loop import Trainer, make_plan

EACH, BATCH, ROUNDS, LIVE_ROUNDS = 64, 128, 20, 3
SIZE = 74
"""Input of the sources: the released code upsamples CIFAR by 7/3, 32 to 74 pixels."""


class InMemory(NoLabels):
    """Soft labels decoded beforehand: the least that any way of delivery has to do."""

    def __init__(self, soft: dict[str, Tensor]) -> None:
        self._soft = soft

    def soft(self, samples: NDArray[Any], views: Tensor, temperature: float) -> dict[str, Tensor]:
        rows = torch.from_numpy(samples)
        return {name: p[rows].to(views.device, non_blocking=True) for name, p in self._soft.items()}


def main() -> None:
    folder = cifar_folder(EACH)
    cache = folder.parent / "cache"
    names = [
        f"imagenet:efficientnet_lite0@{SIZE}",
        f"places365={data_folder() / PLACES}:build@{SIZE}",
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = [open_source(parse_source(name), device=device) for name in names]
    views = Views(open_target(str(folder)), parse_policy("pad-crop-flip"))
    began = time.perf_counter()
    cache_teachers(views, sources, parse_encoding("f16"), 1, cache)
    print(f"cached in {time.perf_counter() - began:.0f} s")
    config = TrainConfig(
        target=str(folder),
        policy="pad-crop-flip",
        test_split="none",
        source=names,
        tm=True,
        batch_size=BATCH,
        cache=cache,
        epochs=1000,
        workers=0,
    )
    cached = Trainer(make_plan(config))
    memory = Trainer(make_plan(config))
    live = Trainer(make_plan(dataclasses.replace(config, live=True), sources))
    memory.labels = InMemory(decoded(cached, config.temperature))

    def steps(trainer: Trainer) -> None:
        """One epoch, slab reading included (a new seed would be read ahead during the last)."""
        if isinstance(trainer.labels, StoredLabels):
            trainer.labels.forget()
        trainer.train_epoch()

    seconds = interleaved({"cache": lambda: steps(cached), "memory": lambda: steps(memory)}, ROUNDS)
    slow = interleaved({"cache": lambda: steps(cached), "live": lambda: steps(live)}, LIVE_ROUNDS)
    count = cached.plan.steps_per_epoch
    rows = [
        (
            "step, labels from the cache, slab read each epoch",
            median(seconds["cache"]) / count,
            "s",
        ),
        ("step, labels already in memory", median(seconds["memory"]) / count, "s"),
        ("cache / memory", paired_ratio(seconds["cache"], seconds["memory"]), "(want <= 1.03)"),
        ("step, both sources in every step", median(slow["live"]) / count, "s"),
        (
            "speed-up of the cache over sources in every step",
            paired_ratio(slow["live"], slow["cache"]),
            "x",
        ),
    ]
    title = f"label delivery: ResNet-20 + 2 TM, batch {BATCH}, sources at {SIZE} px"
    report(title, rows, {"rounds": ROUNDS})
    shutil.rmtree(Path(folder).parent)


def decoded(trainer: Trainer, temperature: float) -> dict[str, Tensor]:
    """Soft labels of the whole slab of seed 0 at T."""
    count = len(trainer.views.target)
    trainer.labels.enter(Window(0, ((0, count),)), None)
    return trainer.labels.soft(np.arange(count), torch.empty(0), temperature)


def median(values: list[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
