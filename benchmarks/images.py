"""Images to views, against torchvision, in turn.

First one JPEG file to its view on one core: torchvision's reference way over PIL, its faster way
(``decode_image`` and transforms v2 on uint8 tensors), ours, ours with four view seeds from one
decoding, and ours from the region of the crop where nvimgcodec is installed. Then images a second
that reach the network.

The reference: PIL images, torchvision's transforms one sample at a time, a DataLoader with as
many workers as ours. Images in RAM (real CIFAR-10, crop and flip) and JPEG files (real ImageNet
images, random resized crop to 224).
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from sskt.benchmarks.common import (
    cifar_folder,
    data_folder,
    interleaved,
    paired_ratio,
    report,
    sized,
)
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.media.regions import decoder_of_this_thread
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.data.gpu_loader import resident_feed
from sskt.trainer.data.loader import Feed, in_memory
from sskt.trainer.distributed import batches_of
from sskt.trainer.models.normalization import NORMALISATIONS

WORKERS, BATCH, ROUNDS = 2, 128, 5
PART = 25
"""Files of a batch of the ways in one thread."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Images = Dataset[tuple[Tensor, int]]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    cifar = cifar_folder(500)
    imagenet = imagenet_folder()
    crop = transforms.Compose(
        [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
         transforms.Normalize(MEAN, STD)]
    )  # fmt: skip
    resized = transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
         transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )  # fmt: skip
    for name, folder, policy, transform, held, size in (
        ("CIFAR-10 in RAM", cifar, "pad-crop-flip", crop, True, BATCH),
        ("ImageNet JPEGs", imagenet, "random-resized-crop-flip", resized, False, 25),
    ):
        views = Views(open_target(str(folder)), parse_policy(policy))
        if held:
            views = Views(in_memory(views.target, 2**31), views.policy)
        count = len(views.target)
        ours = by_us(views, device, size)
        theirs = by_torchvision(ImageFolder(str(folder / "train"), transform), held, device, size)
        seconds = interleaved({"ours": ours, "torchvision": theirs}, ROUNDS)
        for way, taken in seconds.items():
            rows.append((f"{name}: {way}", count / float(np.median(taken)), "images/s"))
        ratio = paired_ratio(seconds["torchvision"], seconds["ours"])
        rows.append((f"{name}: ours / torchvision", ratio, "x"))
    rows += file_to_view(imagenet)
    report(f"views for the network, {WORKERS} workers", rows, {"batch": BATCH})
    shutil.rmtree(cifar.parent)
    shutil.rmtree(imagenet)


def imagenet_folder() -> Path:
    """The real ImageNet images, each a few times, as class folders."""
    folder = Path(tempfile.mkdtemp(prefix="sskt-bench-"))
    for i, path in enumerate(sorted((data_folder() / "imagenet").rglob("*.JPEG"))):
        (folder / "train" / f"class{i % 10}").mkdir(parents=True, exist_ok=True)
        for copy in range(3):
            (folder / "train" / f"class{i % 10}" / f"{copy}-{path.name}").symlink_to(path)
    return folder


def file_to_view(folder: Path) -> list[tuple[str, float, str]]:
    """CPU time from an ImageNet file to its 224-pixel view, one thread.

    The ways make batches in turn, as a loader process does.
    """
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    views = Views(open_target(str(folder)), parse_policy("random-resized-crop-flip"))
    of_regions = dataclasses.replace(views, regions=True)
    paths = [str(path) for path in views.target.paths or ()]
    files = np.arange(0, len(paths), 3)  # the folder has each image three times
    by_pil = transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
         transforms.PILToTensor()]
    )  # fmt: skip
    by_tensor = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()])

    def pil(path: str) -> Tensor:
        view: Tensor = by_pil(Image.open(path).convert("RGB"))
        return view

    def tensor(path: str) -> Tensor:
        view: Tensor = by_tensor(decode_image(path, ImageReadMode.RGB))
        return view

    ways: dict[str, Callable[[NDArray[np.int64], int], object]] = {
        "torchvision over PIL": lambda rows, _: torch.stack([pil(paths[i]) for i in rows]),
        "torchvision on tensors": lambda rows, _: torch.stack([tensor(paths[i]) for i in rows]),
        "ours": lambda rows, seed: views.seen(rows, [seed]),
        "ours, four seeds": lambda rows, seed: views.seen(rows, range(seed, seed + 4)),
        "ours, regions": lambda rows, seed: of_regions.seen(rows, [seed]),
    }
    if decoder_of_this_thread() is None:
        del ways["ours, regions"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(sized(2 * ROUNDS, 2) + 1):
        for rows in np.split(files, range(PART, len(files), PART)):
            for name, way in ways.items():
                begin = time.thread_time()
                way(rows, turn)
                if turn:
                    seconds[name].append((time.thread_time() - begin) / len(rows))
    torch.set_num_threads(threads)
    seconds["ours, four seeds"] = [taken / 4 for taken in seconds["ours, four seeds"]]
    found = [
        (f"one file to a view: {name}", 1000 * float(np.median(taken)), "ms")
        for name, taken in seconds.items()
    ]
    for name in [name for name in ways if name.startswith("ours")]:
        ratio = paired_ratio(seconds["torchvision on tensors"], seconds[name])
        found.append((f"one file to a view: {name} / torchvision on tensors", ratio, "x"))
    return found


def by_us(views: Views, device: torch.device, size: int) -> Callable[[], None]:
    there = resident_feed(views, device) if device.type == "cuda" else None
    feed = there or Feed(views, WORKERS, pin=device.type == "cuda")
    order = np.random.default_rng(0).permutation(len(views.target))

    def run() -> None:
        for batch in feed(batches_of(order, size), 0):
            touch(NORMALISATIONS["imagenet"](batch.views.to(device, non_blocking=True)))

    return run


def by_torchvision(
    images: ImageFolder, held: bool, device: torch.device, size: int
) -> Callable[[], None]:
    dataset: Images = InRam(images) if held else images
    pin = device.type == "cuda"
    loader: Iterable[tuple[Tensor, Tensor]] = DataLoader(
        dataset, size, shuffle=True, num_workers=WORKERS, pin_memory=pin
    )

    def run() -> None:
        for x, _ in loader:
            touch(x.to(device, non_blocking=True))

    return run


class InRam(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: decoded arrays, made PIL images for the transforms."""

    def __init__(self, images: ImageFolder) -> None:
        self._transform = images.transform
        self._held = [(np.asarray(images.loader(path)), label) for path, label in images.samples]

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._held[index]
        return self._transform(Image.fromarray(image)), label


def touch(x: Tensor) -> None:
    """The batch is there, as the first layer would need it."""
    x[0, 0, 0, 0].item()


if __name__ == "__main__":
    main()
