"""Targets: the datasets trained on, as ordered samples with stable ids.

``TARGETS`` is the one table that a new target joins; ``tests/test_targets.py`` runs its
conformance test over every row.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache import shapes
from sskt.teacher_cache.errors import BadImage, InputError, MissingData, UnknownName
from sskt.teacher_cache.images import EXTENSIONS, UInt8, read_image

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Target:
    """One split of a dataset, in a fixed order. Sample i is row i of every label set over it.

    labels: int64 ``[N]``, index into ``classes``. Exactly one of ``images`` (uint8
    ``[N, H, W, 3]``) and ``paths`` (one file a sample) is given; ``sizes`` are the files' bytes.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    labels: Int64
    ids: Sequence[str]
    images: UInt8 | None = None
    paths: tuple[Path, ...] | None = None
    sizes: Int64 | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, sample: int) -> UInt8:
        """Sample's picture: uint8 ``[H, W, 3]``. Raises ``BadImage`` for a damaged file."""
        if self.images is not None:
            picture: UInt8 = self.images[sample]
            return picture
        assert self.paths is not None
        return read_image(self.paths[sample])

    def read_all(self, samples: Int64) -> tuple[list[UInt8], Int64, list[tuple[int, str]]]:
        """Pictures of the readable ones of ``samples``, those samples, and (sample, why) of others.

        Raises ``MissingData`` for a file that cannot be opened: that is no property of the sample.
        """
        images: list[UInt8] = []
        kept: list[int] = []
        bad: list[tuple[int, str]] = []
        for sample in samples.tolist():
            try:
                images.append(self.read(sample))
                kept.append(sample)
            except BadImage as error:
                bad.append((sample, str(error)))
        return images, np.array(kept, np.int64), bad

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ordered ids and, for files, their sizes; for arrays, the pixels."""
        digest = hashlib.sha256()
        for i, sample in enumerate(self.ids):
            size = 0 if self.sizes is None else int(self.sizes[i])
            digest.update(f"{sample}\0{size}\n".encode("utf-8", "surrogateescape"))
        if self.paths is None and self.images is not None:
            digest.update(repr(self.images.shape).encode())
            digest.update(np.ascontiguousarray(self.images).data)
        return f"sha256:{digest.hexdigest()}"

    def identity(self) -> dict[str, str | int]:
        """The part of a label set's spec that names this split."""
        return {
            "name": self.name,
            "split": self.split,
            "size": len(self),
            "fingerprint": self.fingerprint,
        }

    def limited(self, limit: int | None) -> Target:
        """At most ``limit`` samples, evenly spread over the order (so over sorted classes too)."""
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise InputError(f"--limit must be at least 1, found {limit}")
        return self.chosen(np.arange(limit, dtype=np.int64) * len(self) // limit)

    def chosen(self, rows: Int64) -> Target:
        """The samples ``rows`` in that order, as a target of its own."""
        return replace(
            self,
            labels=self.labels[rows],
            ids=[self.ids[i] for i in rows],
            images=None if self.images is None else self.images[rows],
            paths=None if self.paths is None else tuple(self.paths[i] for i in rows),
            sizes=None if self.sizes is None else self.sizes[rows],
        )


@dataclass(frozen=True)
class TargetInfo:
    """A row of the table: how a target is opened, and what it is seen through by default."""

    about: str
    splits: tuple[str, ...]
    evaluation: str
    policy: str
    layout: str
    load: Callable[[str, Path | None, bool], Target]


def _root(name: str, root: Path | None) -> Path:
    if root is None:
        own = f"; for your own folder of that name write ./{name}" if Path(name).is_dir() else ""
        raise MissingData(f"target {name} needs --root with {TARGETS[name].layout}{own}")
    return root


def _torchvision(name: str, split: str, root: Path | None, download: bool) -> Target:
    from torchvision import datasets

    folder = _root(name, root)
    try:
        if name == "stl10":
            stl = datasets.STL10(str(folder), split=split, download=download)
            data, labels = stl.data.transpose(0, 2, 3, 1), np.asarray(stl.labels, np.int64)
            classes = tuple(stl.classes)
        else:
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            cifar = kind(str(folder), train=split == "train", download=download)
            data, labels = cifar.data, np.asarray(cifar.targets, np.int64)
            classes = tuple(cifar.classes)
    except (RuntimeError, OSError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingData(
            f"{name} {split} not found under {folder} ({what}); expected {TARGETS[name].layout}, "
            "or pass --download"
        ) from error
    images = np.ascontiguousarray(data)
    return Target(name, split, classes, labels, _numbers(len(labels)), images=images)


def _shapes(split: str, root: Path | None, download: bool) -> Target:
    labels = shapes.labels_of(split)
    ids = _numbers(len(labels))
    return Target("shapes", split, shapes.CLASSES, labels, ids, images=shapes.render(split))


def _numbers(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def _cifar(name: str, layout: str) -> TargetInfo:
    load = functools.partial(_torchvision, name)
    return TargetInfo(
        "32x32, 50,000 / 10,000", ("train", "test"), "test", "pad-crop-flip", layout, load
    )


TARGETS: dict[str, TargetInfo] = {
    "cifar10": _cifar("cifar10", "cifar-10-batches-py/ (the Python version, unpacked)"),
    "cifar100": _cifar("cifar100", "cifar-100-python/ (the Python version, unpacked)"),
    "stl10": TargetInfo(
        "96x96, 5,000 / 8,000 (unlabeled: 100,000)",
        ("train", "test", "unlabeled"),
        "test",
        "pad-crop-flip",
        "stl10_binary/ (train_X.bin, train_y.bin, ...)",
        functools.partial(_torchvision, "stl10"),
    ),
    "shapes": TargetInfo(
        "48x48, 2,000 / 500, rendered here from a seed: no files",
        ("train", "test"),
        "test",
        "pad-crop-flip",
        "nothing: it is rendered",
        _shapes,
    ),
}
FOLDER_LAYOUT = "DIR[/SPLIT]/CLASS/IMAGE"
SPLIT_NAMES = ("test", "train", "training", "val", "valid", "validation")
FOLDER_POLICY = "random-resized-crop-flip"


def is_folder(name: str) -> bool:
    """Whether ``--target`` names a folder of class folders rather than a row of the table."""
    return name not in TARGETS and (os.sep in name or name in (".", "..") or Path(name).is_dir())


def open_target(
    name: str,
    split: str = "train",
    *,
    root: Path | None = None,
    limit: int | None = None,
    download: bool = False,
) -> Target:
    """A split of a known target, or of a folder of class folders.

    Raises ``UnknownName`` (target or split), ``MissingData`` (with the expected layout).
    """
    if is_folder(name):
        return open_folder(Path(name), split).limited(limit)
    if name not in TARGETS:
        hint = f"or the path of a folder laid out as {FOLDER_LAYOUT}"
        raise UnknownName("target", name, TARGETS, hint)
    info = TARGETS[name]
    if split not in info.splits:
        raise UnknownName(f"split of {name}", split, info.splits)
    return info.load(split, root, download).limited(limit)


def default_policy(name: str) -> str:
    """The policy of the paper's code for a target; a folder is treated like ImageNet."""
    return TARGETS[name].policy if name in TARGETS else FOLDER_POLICY


def evaluation_split(name: str) -> str:
    """The split that accuracy is measured on: the table's, or the folder's test/val folder."""
    if name in TARGETS:
        return TARGETS[name].evaluation
    for split in ("test", "val", "validation"):
        if (Path(name) / split).is_dir():
            return split
    raise MissingData(
        f"no test or val folder in {name}; add one, or train without evaluation: --test-split none"
    )


def open_folder(folder: Path, split: str) -> Target:
    """Class folders under ``folder/split`` (or, for train, under ``folder`` itself).

    Classes and files are taken in byte order of their names, so the order is the same on
    every machine. Raises ``MissingData`` for a missing folder or a class without images.
    """
    base = folder / split
    if not base.is_dir():
        if split != "train" or not folder.is_dir():
            raise MissingData(
                f"no folder {base if folder.is_dir() else folder}; expected {FOLDER_LAYOUT}"
            )
        base = folder
        splits = sorted(s for s in SPLIT_NAMES if (folder / s).is_dir())
        if splits:
            raise MissingData(
                f"{folder} has a folder {splits[0]} but no folder {split}; expected {FOLDER_LAYOUT}"
            )
    classes = sorted(
        (d.name for d in os.scandir(base) if _visible(d) and d.is_dir()), key=os.fsencode
    )
    if not classes:
        raise MissingData(f"no class folders in {base}; expected {FOLDER_LAYOUT}")
    ids: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_image_files(base / name, name), key=lambda item: os.fsencode(item[0]))
        if not found:
            raise MissingData(
                f"class folder {base / name} holds no image "
                f"({', '.join(sorted(EXTENSIONS))}); remove it or fill it"
            )
        ids += [sample for sample, _ in found]
        sizes += [size for _, size in found]
        labels += [label] * len(found)
    return Target(
        folder.resolve().name,
        split,
        tuple(classes),
        np.array(labels, np.int64),
        ids,
        paths=tuple(base / sample for sample in ids),
        sizes=np.array(sizes, np.int64),
    )


def _visible(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")


def _image_files(folder: Path, prefix: str) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for entry in os.scandir(folder):
        if not _visible(entry):
            continue
        sample = f"{prefix}/{entry.name}"
        if entry.is_dir():
            found += _image_files(Path(entry.path), sample)
        elif Path(entry.name).suffix.lower() in EXTENSIONS:
            found.append((sample, entry.stat().st_size))
    return found
