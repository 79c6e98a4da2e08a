"""Targets: the datasets trained on. ``TARGETS`` is the one table that a new target joins.

Each row names its loader, which is imported when it is used. A conformance test
(``tests/teacher_cache/targets/test_registry.py``) runs over every row.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.locations import data_location
from sskt.teacher_cache.targets.base import Asked, Target
from sskt.teacher_cache.targets.folder import FOLDER_LAYOUT, open_folder

Progress = Callable[[int, int], None]

MANIFESTS = (".csv", ".parquet")
IMAGE_POLICY = "random-resized-crop-flip"
CLIP_POLICY = "clip-corner-crop-flip"


@dataclass(frozen=True)
class TargetInfo:
    """A row of the table: how a target is opened, and what it is seen through by default.

    ``loader`` is ``module:function``, a function of ``Asked``. ``markers``: files
    or folders under root, one of which is there if the data is. ``get`` tells how to get the
    files.
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

    def load(self, asked: Asked) -> Target:
        """The split asked for."""
        module, _, function = self.loader.partition(":")
        found = getattr(importlib.import_module(module), function)
        target: Target = found(replace(asked, layout=self.layout, get=self.get))
        return target


_FOLDS = tuple(f"{split}{fold}" for fold in ("", 2, 3) for split in ("train", "test"))

TARGETS: dict[str, TargetInfo] = {
    "cifar10": TargetInfo(
        "32x32, 50,000 / 10,000",
        ("train", "test"),
        "test",
        "pad-crop-flip",
        "cifar-10-batches-py/ (the Python version, unpacked)",
        "sskt.teacher_cache.targets.in_memory:torchvision_arrays",
        ("cifar-10-batches-py",),
    ),
    "cifar100": TargetInfo(
        "32x32, 50,000 / 10,000",
        ("train", "test"),
        "test",
        "pad-crop-flip",
        "cifar-100-python/ (the Python version, unpacked)",
        "sskt.teacher_cache.targets.in_memory:torchvision_arrays",
        ("cifar-100-python",),
    ),
    "stl10": TargetInfo(
        "96x96, 5,000 / 8,000 (unlabeled: 100,000)",
        ("train", "test", "unlabeled"),
        "test",
        "pad-crop-flip",
        "stl10_binary/ (train_X.bin, train_y.bin, ...)",
        "sskt.teacher_cache.targets.in_memory:torchvision_arrays",
        ("stl10_binary",),
    ),
    "imagenet": TargetInfo(
        "1,000 classes, 1,281,167 / 50,000",
        ("train", "val"),
        "val",
        IMAGE_POLICY,
        "train/WNID/*.JPEG and val/WNID/*.JPEG, or val/*.JPEG with ILSVRC2012_devkit_t12/",
        "sskt.teacher_cache.targets.image_datasets:imagenet",
        ("train", "val", "ILSVRC"),
        "get it from image-net.org (it needs an account)",
    ),
    "places365": TargetInfo(
        "365 scenes, full size, 1,803,460 / 36,500",
        ("train", "val"),
        "val",
        IMAGE_POLICY,
        "data_large_standard/, val_large/, places365_train_standard.txt, places365_val.txt, "
        "categories_places365.txt",
        "sskt.teacher_cache.targets.image_datasets:places365",
        ("data_large_standard", "val_large", "places365_train_standard.txt"),
    ),
    "places365-small": TargetInfo(
        "365 scenes, 256x256, 1,803,460 / 36,500",
        ("train", "val"),
        "val",
        IMAGE_POLICY,
        "data_256_standard/, val_256/, places365_train_standard.txt, places365_val.txt, "
        "categories_places365.txt",
        "sskt.teacher_cache.targets.image_datasets:places365",
        ("data_256_standard", "val_256", "places365_train_standard.txt"),
    ),
    "voc2007": TargetInfo(
        "20 classes, several a picture, 5,011 / 4,952",
        ("train", "val", "trainval", "test"),
        "test",
        IMAGE_POLICY,
        "[VOCdevkit/]VOC2007/{JPEGImages,Annotations,ImageSets/Main}/",
        "sskt.teacher_cache.targets.image_datasets:voc",
        ("VOC2007", "VOCdevkit"),
    ),
    "voc2012": TargetInfo(
        "20 classes, several a picture, 5,717 / 5,823",
        ("train", "val", "trainval"),
        "val",
        IMAGE_POLICY,
        "[VOCdevkit/]VOC2012/{JPEGImages,Annotations,ImageSets/Main}/",
        "sskt.teacher_cache.targets.image_datasets:voc",
        ("VOC2012", "VOCdevkit"),
    ),
    "ucf101": TargetInfo(
        "clips, 101 actions, 9,537 / 3,783 (split 1 of 3)",
        _FOLDS,
        "test",
        CLIP_POLICY,
        "UCF-101/CLASS/*.avi (or frames in CLASS/VIDEO/image_00001.jpg) and ucfTrainTestlist/",
        "sskt.teacher_cache.targets.ucf101_hmdb51:ucf101",
        ("*",),
        "get UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip from "
        "crcv.ucf.edu/data/UCF101.php and unpack them",
    ),
    "hmdb51": TargetInfo(
        "clips, 51 actions, 3,570 / 1,530 (split 1 of 3)",
        _FOLDS,
        "test",
        CLIP_POLICY,
        "videos/CLASS/*.avi (or frames in CLASS/VIDEO/image_00001.jpg) and "
        "splits/CLASS_test_splitN.txt",
        "sskt.teacher_cache.targets.ucf101_hmdb51:hmdb51",
        ("*",),
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
        "sskt.teacher_cache.targets.in_memory:rendered_shapes",
        (),
        "",
    ),
}


def lacking_data(name: str, root: str | Path | None = None, *, download: bool = False) -> str:
    """Why a known target cannot be opened, judged by a few names of files.

    Args:
        name: As in ``open_target``; folders and manifests of the user are not looked at.
        root: The folder of the target, if one was given.
        download: Whether what is missing may be downloaded.

    Returns:
        The problem, its cause and the next step; empty if no problem was found.

    Raises:
        UnknownName: If the target is not known.
    """
    if is_own(name):
        return ""
    if name not in TARGETS:
        raise _unknown(name)
    info, found = TARGETS[name], data_location(name, root)
    if not info.markers or (download and info.downloads):
        return ""
    if any(next(Path(found.value).glob(marker), None) for marker in info.markers):
        return ""
    own = f"; for your own folder of that name write ./{name}" if Path(name).is_dir() else ""
    return (
        f"no data of {name} in {found}: expected {info.layout}; {info.get}, or give its folder "
        f"with --root{own}"
    )


def _unknown(name: str) -> UnknownName:
    hint = f"or the path of a folder laid out as {FOLDER_LAYOUT}, or of a .csv or .parquet"
    return UnknownName("target", name, TARGETS, hint)


def is_own(name: str) -> bool:
    """Whether ``--target`` names a user's folder or manifest rather than a row of the table."""
    return name not in TARGETS and (
        os.sep in name or name in (".", "..") or Path(name).is_dir() or _is_manifest(name)
    )


def _is_manifest(name: str) -> bool:
    return Path(name).suffix.lower() in MANIFESTS


def open_target(
    name: str,
    split: str = "train",
    *,
    root: Path | None = None,
    limit: int | None = None,
    download: bool = False,
    partial: bool = False,
    decoder: str = "pyav",
    strict: bool = False,
    progress: Progress = lambda done, total: None,
) -> Target:
    """A split of a known target, of a folder of class folders, or of a CSV or Parquet manifest.

    partial: an official list may name files that are not there. decoder: of clips, ``pyav`` or
    ``decord``; the frames of every clip are counted, once (``file_index.py``). strict: the contents
    of all files join the identity. Raises ``UnknownName`` (target or split), ``MissingData``
    (with the expected layout).
    """
    if is_own(name):
        if _is_manifest(name):
            from sskt.teacher_cache.targets.manifest import open_manifest

            target = open_manifest(Path(name), split, root, decoder)
        else:
            target = open_folder(Path(name), split, decoder)
    else:
        if name not in TARGETS:
            raise _unknown(name)
        info = TARGETS[name]
        lacking = lacking_data(name, download=download) if root is None else ""
        if lacking:
            raise MissingData(lacking)
        if split not in info.splits:
            raise UnknownName(f"split of {name}", split, info.splits)
        where = Path(data_location(name, root).value)
        target = info.load(Asked(name, split, where, download, partial, decoder))
    target = target.limited(limit)
    made: dict[str, Any] = {"target": name, "root": None, "limit": limit}
    if is_own(name):
        made["target"] = str(Path(name).resolve())
    elif TARGETS[name].markers:
        made["root"] = str(Path(data_location(name).value).resolve())
    if root is not None:
        made["root"] = str(root.resolve())
    made |= {key: True for key, on in (("partial", partial), ("strict", strict)) if on}
    target = replace(target, made=made, policy=default_policy(name, clips=target.clips))
    if target.clips:
        from sskt.teacher_cache.targets.file_index import count_clips

        target = count_clips(target, progress)
    if strict and target.paths is not None:
        from sskt.teacher_cache.targets.file_index import hash_contents

        target = replace(target, contents=hash_contents(target, progress))
    return target


def default_policy(name: str, *, clips: bool = False) -> str:
    """The policy of the paper's code for a target; own pictures are treated like ImageNet."""
    if name in TARGETS:
        return TARGETS[name].policy
    return CLIP_POLICY if clips else IMAGE_POLICY


def policy_of(target: Target) -> str:
    """The default view policy of an opened target."""
    return target.policy or default_policy(target.name, clips=target.clips)


def evaluation_split(name: str, split: str = "train") -> str:
    """The split that accuracy is measured on: the table's, or the folder's test/val folder."""
    if name in TARGETS:
        evaluation = TARGETS[name].evaluation
        if split == f"train{evaluation}":
            raise InputError(
                f"{name} {split} holds {evaluation}, the split that accuracy is measured on; take "
                "--split train, or train without evaluation: --test-split none"
            )
        fold = split.removeprefix("train")
        return evaluation + fold if evaluation + fold in TARGETS[name].splits else evaluation
    if _is_manifest(name):
        from sskt.teacher_cache.targets.manifest import manifest_splits

        splits = manifest_splits(Path(name))
        found = [s for s in ("test", "val", "validation") if s in splits]
    else:
        found = [s for s in ("test", "val", "validation") if (Path(name) / s).is_dir()]
    if found:
        return found[0]
    raise MissingData(
        f"no test or val folder in {name}; add one, or train without evaluation: --test-split none"
    )
