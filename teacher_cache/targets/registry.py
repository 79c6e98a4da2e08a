"""The table of known targets, ``TARGETS``, which a new target joins.

A row names its loader, which is imported when it is used. A conformance test
(``tests/teacher_cache/targets/test_registry.py``) runs over every row.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER_LAYOUT = "DIR[/SPLIT]/CLASS/FILE"
MANIFESTS = (".csv", ".parquet")
IMAGE_POLICY = "random-resized-crop-flip"
CLIP_POLICY = "clip-corner-crop-flip"


@dataclass(frozen=True)
class TargetInfo:
    """A known target.

    Attributes:
        about: Size and number of the samples, for ``sskt datasets``.
        splits: Names of the splits.
        evaluation: The split that accuracy is measured on.
        policy: Default view policy, that of the paper's code.
        layout: Files that are expected under the folder of the data.
        loader: ``module:function``; the function takes a ``DatasetSpec`` and returns a ``Target``.
        markers: Patterns of files or folders, one of which exists if the data does; empty if the
            target needs no files.
        get: How to get the files.
    """

    about: str
    splits: tuple[str, ...]
    evaluation: str
    policy: str
    layout: str
    loader: str
    markers: tuple[str, ...]
    get: str = "add --download to get it"

    @property
    def downloads(self) -> bool:
        """Whether ``--download`` gets the files."""
        return "--download" in self.get


_FOLDS = tuple(f"{split}{fold}" for fold in ("", 2, 3) for split in ("train", "test"))
_LOADERS = "sskt.teacher_cache.targets"


def _in_memory(about: str, splits: tuple[str, ...], layout: str) -> TargetInfo:
    loader = f"{_LOADERS}.in_memory:torchvision_arrays"
    folder = layout.partition("/")[0]
    return TargetInfo(about, splits, "test", "pad-crop-flip", layout, loader, (folder,))


def _places365(about: str, train: str, val: str) -> TargetInfo:
    files = "places365_train_standard.txt", "places365_val.txt", "categories_places365.txt"
    layout = ", ".join((f"{train}/", f"{val}/", *files))
    loader = f"{_LOADERS}.image_datasets:places365"
    markers = train, val, files[0]
    return TargetInfo(about, ("train", "val"), "val", IMAGE_POLICY, layout, loader, markers)


def _voc(about: str, year: int, evaluation: str, *splits: str) -> TargetInfo:
    layout = f"[VOCdevkit/]VOC{year}/{{JPEGImages,Annotations,ImageSets/Main}}/"
    loader, markers = f"{_LOADERS}.voc:voc", (f"VOC{year}", "VOCdevkit")
    return TargetInfo(about, splits, evaluation, IMAGE_POLICY, layout, loader, markers)


def _clips(name: str, about: str, layout: str, get: str) -> TargetInfo:
    loader = f"{_LOADERS}.ucf101_hmdb51:{name}"
    return TargetInfo(about, _FOLDS, "test", CLIP_POLICY, layout, loader, ("*",), get)


TARGETS: dict[str, TargetInfo] = {
    "cifar10": _in_memory(
        "32x32, 50,000 / 10,000",
        ("train", "test"),
        "cifar-10-batches-py/ (the Python version, unpacked)",
    ),
    "cifar100": _in_memory(
        "32x32, 50,000 / 10,000",
        ("train", "test"),
        "cifar-100-python/ (the Python version, unpacked)",
    ),
    "stl10": _in_memory(
        "96x96, 5,000 / 8,000 (unlabeled: 100,000)",
        ("train", "test", "unlabeled"),
        "stl10_binary/ (train_X.bin, train_y.bin, ...)",
    ),
    "imagenet": TargetInfo(
        "1,000 classes, 1,281,167 / 50,000",
        ("train", "val"),
        "val",
        IMAGE_POLICY,
        "train/WNID/*.JPEG and val/WNID/*.JPEG, or val/*.JPEG with ILSVRC2012_devkit_t12/",
        f"{_LOADERS}.image_datasets:imagenet",
        ("train", "val", "ILSVRC"),
        "get it from image-net.org (it needs an account)",
    ),
    "places365": _places365(
        "365 scenes, full size, 1,803,460 / 36,500", "data_large_standard", "val_large"
    ),
    "places365-small": _places365(
        "365 scenes, 256x256, 1,803,460 / 36,500", "data_256_standard", "val_256"
    ),
    "voc2007": _voc(
        "20 classes, several an image, 5,011 / 4,952",
        2007,
        "test",
        *("train", "val", "trainval", "test"),
    ),
    "voc2012": _voc(
        "20 classes, several an image, 5,717 / 5,823", 2012, "val", "train", "val", "trainval"
    ),
    "ucf101": _clips(
        "ucf101",
        "clips, 101 actions, 9,537 / 3,783 (split 1 of 3)",
        "UCF-101/CLASS/*.avi (or frames in CLASS/VIDEO/image_00001.jpg) and ucfTrainTestlist/",
        "get UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip from "
        "crcv.ucf.edu/data/UCF101.php and unpack them",
    ),
    "hmdb51": _clips(
        "hmdb51",
        "clips, 51 actions, 3,570 / 1,530 (split 1 of 3)",
        "videos/CLASS/*.avi (or frames in CLASS/VIDEO/image_00001.jpg) and "
        "splits/CLASS_test_splitN.txt",
        "get hmdb51_org.rar and test_train_splits.rar from "
        "serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database and unpack them "
        "(hmdb51_org.rar holds one more .rar a class)",
    ),
    "shapes": TargetInfo(
        "48x48, 2,000 / 500, rendered here from a seed: no files",
        ("train", "test"),
        "test",
        "pad-crop-flip",
        "nothing: it is rendered",
        f"{_LOADERS}.in_memory:rendered_shapes",
        (),
        "",
    ),
}


PACKED = ("hf:", "wds:", "parquet:")
"""How ``--target`` begins where the images lie in files of many samples."""

_FUNCTION = re.compile(r".+\.py:[^\W\d]\w*")


def is_manifest(name: str) -> bool:
    """Whether ``--target`` names a manifest, by its ending."""
    return Path(name).suffix.lower() in MANIFESTS


def is_function(name: str) -> bool:
    """Whether ``--target`` names a user's function that opens the target: ``FILE.py:function``."""
    return _FUNCTION.fullmatch(name) is not None


def is_packed(name: str) -> bool:
    """Whether ``--target`` names files of many samples each: ``hf:``, ``wds:``, ``parquet:``."""
    return name.startswith(PACKED)


def is_own(name: str) -> bool:
    """Whether ``--target`` names a user's folder, manifest or packed files, not a known target."""
    if is_packed(name):
        return True
    return (
        name not in TARGETS
        and not is_function(name)
        and (os.sep in name or name in (".", "..") or Path(name).is_dir() or is_manifest(name))
    )


def hub_name(name: str) -> tuple[str, str]:
    """The path or name of a ``hf:`` target, and its configuration or the empty string."""
    rest = name.removeprefix("hf:")
    if Path(rest).exists() or ":" not in rest:
        return rest, ""
    path, _, configuration = rest.rpartition(":")
    return path, configuration


def is_of_hub(name: str) -> bool:
    """Whether ``--target`` names a dataset that would be looked for on the Hugging Face hub."""
    return name.startswith("hf:") and not Path(hub_name(name)[0]).exists()


def own_name(name: str) -> str:
    """The name in the cache of a user's folder, manifest or packed files.

    That of the folder; of a file without its ending; of a pattern that of its folder; of a
    dataset of the Hugging Face hub without its owner, followed by its configuration.
    """
    if name.startswith("hf:"):
        found, configuration = hub_name(name)
        last = Path(found).resolve().name if Path(found).exists() else found.rpartition("/")[2]
        return f"{last}-{configuration}" if configuration else last
    packed = is_packed(name)
    path = Path(name.partition(":")[2] if packed else name)
    if packed and not path.exists():
        return path.parent.resolve().name
    if is_manifest(str(path)) or (packed and path.is_file()):
        return path.stem
    return path.resolve().name


def default_policy(name: str, *, clips: bool = False) -> str:
    """The policy of the paper's code for a target; own images are treated like ImageNet."""
    if name in TARGETS:
        return TARGETS[name].policy
    return CLIP_POLICY if clips else IMAGE_POLICY
