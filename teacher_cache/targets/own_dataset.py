"""A user's ``torch.utils.data.Dataset`` as a target."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sskt.teacher_cache.errors import BadImage, InputError
from sskt.teacher_cache.media.images import UInt8, cut
from sskt.teacher_cache.media.regions import BoxOf
from sskt.teacher_cache.targets.base import Names, Target
from sskt.teacher_cache.targets.files.scan import check_unique
from sskt.teacher_cache.targets.registry import IMAGE_POLICY

Int64 = NDArray[np.int64]
READ_TWICE = 3
"""Images that are read twice when a dataset is opened, to notice random transforms."""


@dataclass(frozen=True)
class DatasetImages:
    """Reads the images ``rows`` of a map-style dataset. See ``samples.SampleReader``."""

    dataset: Any
    name: str
    rows: Int64

    def __call__(self, sample: int, box_of: BoxOf | None = None) -> UInt8:
        return cut(self.item(sample)[0], box_of)

    def chosen(self, rows: Int64) -> DatasetImages:
        return replace(self, rows=self.rows[rows])

    def item(self, sample: int) -> tuple[UInt8, Any]:
        """Reads an image, uint8 ``[H, W, 3]``, and its label.

        Raises:
            BadImage: If the dataset raises ``OSError``, as Pillow does for a damaged file.
            InputError: If the item is not a pair of an image and a label.
        """
        index = int(self.rows[sample])
        where = f"item {index} of dataset {self.name}"
        try:
            item = self.dataset[index]
        except OSError as error:
            raise BadImage(f"{where} cannot be read: {error}") from error
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise InputError(
                f"{where} is {type(item).__name__}; a dataset must give pairs (image, label)"
            )
        image = item[0]
        if isinstance(image, Image.Image):
            try:
                image = np.asarray(image.convert("RGB"))
            except OSError as error:  # Pillow decodes late
                raise BadImage(f"{where} cannot be read: {error}") from error
        usable = isinstance(image, np.ndarray) and image.dtype == np.uint8
        if not usable or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            found = f"{getattr(image, 'dtype', '')} {tuple(getattr(image, 'shape', ()))}".strip()
            raise InputError(
                f"{where}: the image is {type(image).__name__} {found}; expected a PIL image or a "
                "uint8 array [H, W, 3]; open the dataset without ToTensor and other transforms, "
                "which the view policy replaces"
            )
        return image, item[1]


def open_dataset(
    dataset: Any,
    *,
    name: str,
    split: str = "train",
    classes: Sequence[str] | None = None,
    labels: Any = None,
    ids: Sequence[str] | None = None,
    fingerprint: str = "",
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Target:
    """Opens a map-style dataset as a target: sample i is item i.

    Every image is read once, so that the identity of the target covers the pixels; with
    ``fingerprint`` nothing is read but labels that are not known. In both cases the identity
    covers the ids in their order.

    Args:
        dataset: Has a length and items (image, label): PIL images or uint8 arrays ``[H, W, 3]``,
            without random transforms.
        name: Name of the target in the cache.
        split: Name of the split in the cache.
        classes: Names of the classes; default: ``dataset.classes``, else the numbers.
        labels: True classes, int ``[N]``, or 0 and 1 ``[N, C]`` if a sample may have several;
            default: ``dataset.targets``, else those of the items.
        ids: A name for each item, such as its file; default: ``0``, ``1``, ...
        fingerprint: What identifies the data instead of the pixels, such as a version; change it
            whenever an image changes, and without ``ids`` also whenever their order does.
        limit: Use only this many samples, all classes alike.
        progress: Called with the number of images read, and of all.

    Returns:
        The target.

    Raises:
        InputError: If the dataset cannot be used; the message says why.
        BadImage: If an image cannot be read.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise InputError(
            f"{type(dataset).__name__} has no length and no items; give a map-style dataset"
        )
    count = len(dataset)
    if not count:
        raise InputError(f"dataset {name} is empty; give one with at least one item")
    images = DatasetImages(dataset, name, np.arange(count))
    _require_same_again(images)
    given = labels if labels is not None else getattr(dataset, "targets", None)
    digests: dict[int, bytes] = {}
    if given is None:
        found = []
        for i in range(count):
            image, label = images.item(i)
            found.append(label)
            digests[i] = _digest(image)
            progress(i + 1, count)
        given = found
    truth = _truth(given, count, name)
    sample_ids = [str(i) for i in range(count)] if ids is None else _ids(ids, count, name)
    names = classes if classes is not None else getattr(dataset, "classes", None)
    target = Target(
        name,
        split,
        _class_names(names, truth, name),
        truth,
        Names(sample_ids),
        reader=images,
        policy=IMAGE_POLICY,
    ).limited(limit)
    if fingerprint:
        return replace(target, contents=f"given:{fingerprint}")
    whole = hashlib.sha256()
    reader = target.reader
    assert isinstance(reader, DatasetImages)
    for i, row in enumerate(reader.rows.tolist()):
        whole.update(digests.get(row) or _digest(reader(i)))
        progress(i + 1, len(target))
    return replace(target, contents=f"sha256:{whole.hexdigest()}")


def _digest(image: UInt8) -> bytes:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def _require_same_again(images: DatasetImages) -> None:
    for sample in range(min(READ_TWICE, len(images.rows))):
        if not np.array_equal(images(sample), images(sample)):
            raise InputError(
                f"item {sample} of dataset {images.name} has other pixels when it is read again; "
                "open the dataset without random transforms, which the view policy replaces"
            )


def _ids(given: Sequence[str], count: int, name: str) -> list[str]:
    ids = [str(each) for each in given]
    if len(ids) != count or not all(ids) or any("\0" in each or "\n" in each for each in ids):
        raise InputError(
            f"dataset {name}: expected {count} ids, one line of text each; found {len(ids)}; give "
            "a name for each item"
        )
    check_unique(ids, f"ids= of dataset {name}")
    return ids


def _truth(given: Any, count: int, name: str) -> Int64:
    try:
        truth = np.asarray([np.asarray(label) for label in given])
    except ValueError:  # labels of several shapes
        truth = np.zeros(0)
    if len(truth) != count or truth.ndim not in (1, 2) or truth.dtype.kind not in "iub":
        raise InputError(
            f"dataset {name}: expected {count} labels, each a class number, or all 0 and 1 [C]; "
            f"found {truth.dtype} {truth.shape}; give labels="
        )
    return truth.astype(np.int64)


def _class_names(names: Sequence[str] | None, truth: Int64, name: str) -> tuple[str, ...]:
    needed = truth.shape[1] if truth.ndim == 2 else int(truth.max()) + 1
    if names is None:
        return tuple(str(i) for i in range(needed))
    if len(names) < needed or (truth.ndim == 2 and len(names) != needed):
        raise InputError(
            f"dataset {name} has {len(names)} names of classes for {needed} classes; give classes="
        )
    return tuple(str(each) for each in names)
