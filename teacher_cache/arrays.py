"""Targets that live in RAM: CIFAR, STL10 (torchvision's files) and the rendered ``shapes``."""

from __future__ import annotations

import numpy as np

from sskt.teacher_cache import shapes
from sskt.teacher_cache.errors import MissingData
from sskt.teacher_cache.samples import Asked, Names, Target
from sskt.teacher_cache.targets import TARGETS


def torchvision_arrays(asked: Asked) -> Target:
    """cifar10, cifar100 or stl10 as torchvision reads (and downloads) them."""
    from torchvision import datasets

    name, split, folder = asked.name, asked.split, asked.root
    try:
        if name == "stl10":
            stl = datasets.STL10(str(folder), split=split, download=asked.download)
            data, labels = stl.data.transpose(0, 2, 3, 1), np.asarray(stl.labels, np.int64)
            classes = tuple(stl.classes)
        else:
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            cifar = kind(str(folder), train=split == "train", download=asked.download)
            data, labels = cifar.data, np.asarray(cifar.targets, np.int64)
            classes = tuple(cifar.classes)
    except (RuntimeError, OSError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingData(
            f"{name} {split} not found under {folder} ({what}); expected "
            f"{TARGETS[name].layout}; {TARGETS[name].get}"
        ) from error
    images = np.ascontiguousarray(data)
    return Target(name, split, classes, labels, _numbers(len(labels)), images=images)


def rendered_shapes(asked: Asked) -> Target:
    """The embedded target ``shapes``."""
    labels = shapes.labels_of(asked.split)
    ids = _numbers(len(labels))
    return Target(
        "shapes", asked.split, shapes.CLASSES, labels, ids, images=shapes.render(asked.split)
    )


def _numbers(count: int) -> Names:
    return Names(str(i) for i in range(count))
