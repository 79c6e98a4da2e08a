"""An epoch with views in a folder (``--view-cache``), in memory, and decoded anew, in turn.

Video clips with the 3-D ResNet-18 of the paper, and JPEG files with ResNet-20. The views in memory
are those of the epoch, so their epoch is limited by the network alone.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sskt.benchmarks.common import data_folder, interleaved, paired_ratio, report, sized
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.loader import Batch
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer

ROUNDS = 5
CLIPS, QUICK_CLIPS = 12, 4
IMAGES, QUICK_IMAGES = 100, 20
WAYS = ("decoded", "kept", "in memory")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="sskt-bench-"))
    rows = []
    images = images_folder(folder / "images")
    cases = {"JPEG, ResNet-20": images_config(images)}
    if (data_folder() / "ucf101" / "UCF-101").is_dir():  # generated data has no clips
        cases["clips, 3D-ResNet-18"] = clips_config()
    for case, config in cases.items():
        seconds = measured(config, folder / case)
        for way, taken in seconds.items():
            rows.append((f"{case}: epoch, views {way}", float(np.median(taken)), "s"))
        for way in WAYS[:2]:
            ratio = paired_ratio(seconds["in memory"], seconds[way])
            rows.append((f"{case}: {way} / in memory", ratio, "x"))
    report("epochs of training by where views come from", rows, {"workers": 2})
    shutil.rmtree(folder)


def clips_config() -> TrainConfig:
    """A few UCF101 clips, 16 frames of 112 pixels."""
    return TrainConfig(
        target="ucf101",
        root=data_folder() / "ucf101",
        partial=True,
        limit=sized(CLIPS, QUICK_CLIPS),
        model="resnet3d18",
        batch_size=4,
    )


def images_config(folder: Path) -> TrainConfig:
    """ImageNet files to 96 pixels."""
    return TrainConfig(
        target=str(folder),
        policy="random-resized-crop-flip:size=96",
        model="resnet20",
        batch_size=20,
        memory=0.01,  # files of several sizes are not kept decoded in any case
    )


def images_folder(folder: Path) -> Path:
    """ImageNet images as class folders."""
    files = sorted((data_folder() / "imagenet").rglob("*.JPEG"))
    for i, path in enumerate(files[: sized(IMAGES, QUICK_IMAGES)]):
        (folder / "train" / f"class{i % 10}").mkdir(parents=True, exist_ok=True)
        (folder / "train" / f"class{i % 10}" / path.name).symlink_to(path)
    return folder


def measured(config: TrainConfig, folder: Path) -> dict[str, list[float]]:
    """Seconds of the epochs of each way, in turn; the first epoch of each does not count."""
    common: dict[str, Any] = {"test_split": "none", "seeds": 1, "workers": 2, "device": "cpu"}
    config = dataclasses.replace(config, **common)
    kept = dataclasses.replace(config, view_cache=folder)
    trainers = {way: Trainer(make_plan(kept if way == "kept" else config)) for way in WAYS}
    held = trainers["in memory"].loader
    held.feed = InMemory(held.views.batch(np.arange(len(held.views.target)), 0))  # type: ignore[assignment]

    def epoch_of(trainer: Trainer) -> Callable[[], None]:
        return lambda: (trainer.train_epoch(), None)[1]

    seconds = interleaved({way: epoch_of(trainer) for way, trainer in trainers.items()}, ROUNDS)
    for trainer in trainers.values():
        trainer.loader.close()
    return seconds


class InMemory:
    """Batches of views that are in memory."""

    def __init__(self, views: np.ndarray[Any, Any]) -> None:
        self._views = torch.from_numpy(views)

    def __call__(
        self, batches: Sequence[np.ndarray[Any, Any]], seed: int, others: Sequence[int] = ()
    ) -> Iterator[Batch]:
        for samples in batches:
            yield Batch(samples, self._views[torch.from_numpy(samples)], None, [])


if __name__ == "__main__":
    main()
