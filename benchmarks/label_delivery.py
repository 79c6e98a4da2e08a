"""Does label delivery cost anything? A step of ResNet-20 with two TMs, three ways, in turn:

- labels from the cache (read ahead, indexed, decoded a batch at a time),
- labels already in memory (float32 soft labels at T, only indexed),
- the paper's way: both sources run in every step.

Real CIFAR-10 JPEGs, real ImageNet and Places365 sources; without them generated images and two
ResNet-18 with random weights, of which only the time counts. Prints medians, and the median of
ratios over pairs of steps on the same batch.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sskt.benchmarks.common import (
    PLACES,
    cifar_folder,
    paired_ratio,
    real_data,
    report,
    sized,
    synchronise,
)
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import cache_teachers
from sskt.teacher_cache.rng import permutation
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Preprocessing, Source, freeze
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, checks_of
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_labels import (
    BatchLabels,
    Labels,
    LiveLabels,
    StoredLabels,
    Window,
    WindowLabels,
)
from sskt.trainer.distributed import batches_of
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer

EACH, BATCH, SEEDS, EPOCHS, LIVE_EPOCHS = 128, 128, 2, 10, 2
TEMPERATURE = 3.0
SIZE = 74
"""Input of the sources: the released code upsamples CIFAR by 7/3, 32 to 74 pixels."""


class InMemory:
    """Soft labels decoded beforehand: the least that any way of delivery has to do."""

    def __init__(self, soft: list[dict[str, Tensor]]) -> None:
        self._by_seed = soft

    def enter(self, window: Window, following: Window | None) -> WindowLabels:
        return Decoded(window, self._by_seed[window.seed])

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Decoded:
    """The labels of a window."""

    window: Window
    stored: dict[str, Tensor]

    @property
    def skipped(self) -> NDArray[np.bool_]:
        return np.zeros(len(self.window.samples), bool)

    @property
    def checked(self) -> bool:
        return False

    def check(
        self, samples: NDArray[Any], checks: NDArray[Any], seeds: NDArray[Any] | None = None
    ) -> int:
        return 0

    def of(
        self, samples: NDArray[Any], views: Tensor, seeds: NDArray[Any] | None = None
    ) -> BatchLabels:
        # Only soft labels are asked for.
        return cast(BatchLabels, DecodedBatch(self.stored, torch.from_numpy(samples), views.device))


@dataclass(frozen=True)
class DecodedBatch:
    """The labels of a batch, which are only indexed."""

    stored: dict[str, Tensor]
    rows: Tensor
    device: torch.device

    def soft(self, source: str, temperature: float) -> Tensor:
        return self.stored[source][self.rows].to(self.device, non_blocking=True)


def main() -> None:
    folder = cifar_folder(sized(EACH, 26))
    cache = folder.parent / "cache"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = teachers(device)
    views = Views(open_target(str(folder)), parse_policy("pad-crop-flip"))
    cache_teachers(views, sources, parse_encoding("f16"), SEEDS, cache)
    config = TrainConfig(
        target=str(folder),
        policy="pad-crop-flip",
        test_split="none",
        source=[source.name for source in sources],
        tm=True,
        batch_size=BATCH,
        cache=cache,
        epochs=1000,
        workers=0,
    )
    # One trainer whose labels are exchanged: two would differ in where their weights lie.
    trainer = Trainer(make_plan(config))
    epochs, live_epochs = sized(EPOCHS, 3), LIVE_EPOCHS
    stored = StoredLabels(trainer.plan.label_sets, trainer.plan.device)
    taught = trainer.loader.sources
    ways: dict[str, Labels] = {
        "cache": stored,
        "memory": InMemory([decoded(stored, views, taught, seed) for seed in range(SEEDS)]),
        "live": LiveLabels(sources, trainer.views),
    }

    fast = alternating(trainer, {w: ways[w] for w in ("cache", "memory")}, epochs)
    slow = alternating(trainer, {w: ways[w] for w in ("cache", "live")}, live_epochs)
    ratio = paired_ratio(fast["cache"].steps, fast["memory"].steps)
    wait = sum(fast["cache"].waits) / sum(fast["memory"].steps)
    rows = [
        ("step, labels from the cache", median(fast["cache"].steps), "s"),
        ("step, labels already in memory", median(fast["memory"].steps), "s"),
        ("cache / memory, step by step", ratio, ""),
        ("waiting for labels (read ahead), share of an epoch", wait, ""),
        ("cache / memory, waiting included", ratio + wait, "(want <= 1.03)"),
        ("step, both sources in every step", median(slow["live"].steps), "s"),
        ("speed-up", paired_ratio(slow["live"].steps, slow["cache"].steps), "x"),
    ]
    title = f"label delivery: ResNet-20 + 2 TM, batch {BATCH}, sources at {SIZE} px"
    report(title, rows, {"pairs of steps": len(fast["cache"].steps)})
    shutil.rmtree(folder.parent)


def teachers(device: str) -> list[Source]:
    """The two sources."""
    data = real_data()
    if data is not None and importlib.util.find_spec("efficientnet_lite_pytorch"):
        names = f"imagenet:efficientnet_lite0@{SIZE}", f"places365={data / PLACES}:build@{SIZE}"
        return [open_source(parse_source(name), device=device) for name in names]
    from torchvision.models import resnet18

    found = []
    for name, count in (("imagenet", 1000), ("places365", 365)):
        torch.manual_seed(0)
        classes = tuple(f"{name} {i}" for i in range(count))
        network = resnet18(num_classes=count)
        found.append(freeze(name, "resnet18", network, Preprocessing(SIZE), classes, device=device))
    return found


@dataclass
class Seconds:
    """Of every step, and of entering every epoch."""

    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


def alternating(trainer: Trainer, ways: dict[str, Labels], epochs: int) -> dict[str, Seconds]:
    """Each batch is trained on in every way, in turn; another view seed each epoch.

    Entering an epoch is timed too: the labels of the next seed are read while this epoch trains.
    """
    seconds = {name: Seconds() for name in ways}
    for epoch in range(epochs):
        (window,), (following,) = trainer.plan.windows(epoch), trainer.plan.windows(epoch + 1)
        entered: dict[str, WindowLabels] = {}
        for name, labels in ways.items():
            begin = time.perf_counter()
            entered[name] = labels.enter(window, following)
            seconds[name].waits.append(time.perf_counter() - begin)
        order = permutation(window.samples, 0, epoch)
        batches = batches_of(order, trainer.plan.config.batch_size)
        for i, batch in enumerate(trainer.loader.feed(batches, window.seed)):
            turn = list(ways) if (i + epoch) % 2 else list(reversed(ways))
            for name in turn:
                synchronise()
                begin = time.perf_counter()
                if entered[name].checked:
                    entered[name].check(batch.samples, checks_of(batch.views.numpy()))
                views = batch.views.to(trainer.plan.device)
                truth = trainer.loader.truth[torch.from_numpy(batch.samples).to(views.device)]
                trainer.step(
                    SoftLabelBatch(
                        batch.samples, views, truth, entered[name], trainer.plan.normalise
                    )
                )
                synchronise()
                seconds[name].steps.append(time.perf_counter() - begin)
        print(f"\repoch {epoch + 1}/{epochs}", end="", file=sys.stderr)
    return {name: Seconds(s.steps[2:], s.waits) for name, s in seconds.items()}


def decoded(
    stored: StoredLabels, views: Views, names: Sequence[str], seed: int
) -> dict[str, Tensor]:
    """Soft labels of a whole view seed at T."""
    count = len(views.target)
    labels = stored.enter(Window(seed, ((0, count),)), None).of(np.arange(count), torch.empty(0))
    return {name: labels.soft(name, TEMPERATURE) for name in names}


if __name__ == "__main__":
    main()
