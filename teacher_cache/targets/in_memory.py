"""Targets that live in RAM: CIFAR, STL10 (torchvision's files) and the rendered ``shapes``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sskt.teacher_cache.targets import shapes
from sskt.teacher_cache.targets.base import Names, Target
from sskt.teacher_cache.targets.spec import DatasetSpec


def torchvision_arrays(spec: DatasetSpec) -> Target:
    """cifar10, cifar100 or stl10 as torchvision reads (and downloads) them."""
    from torchvision import datasets

    name, split, folder = spec.target, spec.split, spec.folder
    kind = {"stl10": datasets.STL10, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[
        name
    ]
    try:
        if kind is datasets.STL10:
            stl = kind(str(folder), split=split, download=spec.download)
            data, labels = stl.data.transpose(0, 2, 3, 1), np.asarray(stl.labels, np.int64)
            classes = tuple(stl.classes)
        else:
            cifar = kind(str(folder), train=split == "train", download=spec.download)
            data, labels = cifar.data, np.asarray(cifar.targets, np.int64)
            classes = tuple(cifar.classes)
    except (RuntimeError, OSError) as error:
        what = _unfit(kind, folder) or str(error).partition("\n")[0] or type(error).__name__
        raise spec.not_found(what) from error
    images = np.ascontiguousarray(data)
    return Target(name, split, classes, labels, _numbers(len(labels)), images=images)


def _unfit(kind: Any, folder: Path) -> str:
    """The first file of a torchvision dataset that is missing or not as published; may be empty."""
    from torchvision.datasets.utils import check_integrity

    for name, md5 in [*kind.train_list, *kind.test_list]:
        path = folder / kind.base_folder / name
        if not path.is_file():
            return f"{path} is missing"
        if not check_integrity(str(path), md5):
            return f"{path} does not have the MD5 checksum that was published; get it again"
    return ""


def rendered_shapes(spec: DatasetSpec) -> Target:
    """The embedded target ``shapes``."""
    labels = shapes.labels_of(spec.split)
    ids = _numbers(len(labels))
    return Target(
        "shapes", spec.split, shapes.CLASSES, labels, ids, images=shapes.render(spec.split)
    )


def _numbers(count: int) -> Names:
    return Names(str(i) for i in range(count))
