"""Opens a user's folder of class folders, with images or clips in them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sskt.teacher_cache.errors import MissingData
from sskt.teacher_cache.media.images import EXTENSIONS
from sskt.teacher_cache.targets.base import Files, Names, Target
from sskt.teacher_cache.targets.files.scan import (
    entries,
    images_and_clips,
    is_folder,
    sizes_of_clips,
    sizes_of_files,
    sort,
    subfolders,
)
from sskt.teacher_cache.targets.registry import FOLDER_LAYOUT
from sskt.teacher_cache.targets.spec import SPLIT_NAMES, DatasetSpec, named_like

_SPLIT_LIKE = frozenset(name for names in SPLIT_NAMES.values() for name in names)
_log = logging.getLogger("sskt")


def open_folder(spec: DatasetSpec) -> Target:
    """Opens the class folders of a split, ``DIR/SPLIT/CLASS`` or, for train, ``DIR/CLASS``.

    A class's samples are the images below its folder, at any depth; or the clips: video files,
    and folders of extracted frames (image_00001.jpg, ...), whose size is that of all their
    files. Classes and samples are taken in byte order of their names, so the order is the same
    on every machine. Images or clips without class folders are samples without labels. What is
    left out is counted and logged.

    Args:
        spec: The dataset; ``target`` is the folder.

    Returns:
        The target, named after the folder.

    Raises:
        MissingData: If a folder is missing or not of the layout: a class without samples, one
            class alone, splits in place of classes, images beside clips, a broken link or a loop
            of links.
    """
    base = _base(spec.folder, spec.split)
    left: Counter[str] = Counter()
    loose: tuple[list[str], list[str], Counter[str]] = ([], [], left)
    for entry in entries(base, left):
        if not entry.is_dir():
            sort(entry.name, entry.name, loose)
    beside = len(loose[0]) + len(loose[1])
    classes = _classes(spec.folder, base, beside)
    if classes and beside:
        left["beside the class folders"] += beside
    counts: list[int] = []
    first: dict[str, str] = {}

    def samples() -> Iterator[str]:
        for name in classes or [""]:
            kinds = images_and_clips(base, name, left) if name else map(sorted, loose[:2])
            found = dict(zip(("images", "clips"), kinds, strict=True))
            for kind, ids in found.items():
                if ids:
                    first.setdefault(kind, ids[0])
            counts.append(sum(map(len, found.values())))
            _check_class(base, name, counts[-1], first, left)
            for ids in found.values():
                yield from ids

    names = Names(samples())
    clips = "clips" in first
    sizes = (sizes_of_clips if clips else sizes_of_files)(base, names)
    labels = np.arange(len(classes)) if classes else np.array([-1])
    if left:
        parts = ", ".join(f"{count:,} {what}" for what, count in left.most_common())
        _log.warning(
            "left out of %s: %s; images and clips are known by their endings, a manifest can "
            "name others",
            base,
            parts,
        )
    return Target(
        spec.folder.resolve().name,
        spec.split,
        tuple(classes),
        np.repeat(labels.astype(np.int64), counts),
        names,
        paths=Files(base, names),
        sizes=sizes,
        decoder=spec.decoder if clips else "",
    )


def find_split(folder: Path, split: str) -> Path | None:
    """The folder of a split: of that name, or in another case or of another name for it.

    Raises:
        MissingData: If several folders may be meant.
    """
    if is_folder(folder / split):
        return folder / split
    if not is_folder(folder):
        return None
    folders = subfolders(folder)
    found = named_like(split, folders)
    # A folder of images beside other class folders is the class that it is called.
    if not all(name.casefold() in _SPLIT_LIKE for name in folders):
        found = [name for name in found if subfolders(folder / name)]
    if len(found) > 1:
        raise MissingData(
            f"{folder} has the folders {', '.join(found)}, each of which may be {split}; rename "
            f"the one that is meant to {split}"
        )
    return folder / found[0] if found else None


def _base(folder: Path, split: str) -> Path:
    base = find_split(folder, split)
    if base is None:
        if not is_folder(folder):
            what = f"{folder} is a file" if folder.exists() else f"no folder {folder}"
            raise MissingData(f"{what}; expected {FOLDER_LAYOUT}")
        if split != "train":
            raise MissingData(f"no folder {folder / split}; expected {FOLDER_LAYOUT}")
        return folder
    inner = subfolders(base)
    # Archives that hold seg_train/ are unpacked to seg_train/seg_train/.
    if len(inner) == 1 and inner[0].casefold() == base.name.casefold():
        return base / inner[0]
    return base


def _classes(folder: Path, base: Path, beside: int) -> list[str]:
    """The class folders. Raises ``MissingData`` for what is no set of classes."""
    classes = subfolders(base)
    splits = [name for name in classes if name.casefold() in _SPLIT_LIKE]
    if splits and (len(splits) > 1 or len(classes) < 3 or subfolders(base / splits[0])):
        where = f"{folder} has a folder {splits[0]} but no folder train"
        if base != folder:
            where = f"{base} has a folder {splits[0]}, which is the name of a split"
        raise MissingData(
            f"{where}; expected {FOLDER_LAYOUT}: take another --split or --target, or rename the "
            "folder if it is a class"
        )
    if len(classes) == 1:
        (name,) = classes
        advice = (
            f"If {name} is the folder of the classes, or of images without labels, give it itself: "
            f"--target {base / name}"
        )
        if beside:
            advice = f"If the {beside:,} images or clips beside it are meant, move {name} away"
        raise MissingData(
            f"{base} holds one class folder, {name}; expected {FOLDER_LAYOUT} with two classes or "
            f"more. {advice}"
        )
    others = [name for name in subfolders(folder) if name.casefold() not in _SPLIT_LIKE]
    if not classes and base != folder and others:
        raise MissingData(
            f"no class folders in {base}; expected {FOLDER_LAYOUT}. If {base.name} is a class like "
            f"{others[0]} beside it, put all of them into {folder / 'train' / 'CLASS'}"
        )
    return classes


def _check_class(
    base: Path, name: str, count: int, first: dict[str, str], left: Counter[str]
) -> None:
    from sskt.teacher_cache.media.video import VIDEO_EXTENSIONS

    if not count:
        what = f"class folder {base / name} holds" if name else f"no class folders in {base}, and"
        there = f"; left out: {', '.join(left)}" if left else ""
        raise MissingData(
            f"{what} no image ({', '.join(sorted(EXTENSIONS))}) and no clip "
            f"({', '.join(sorted(VIDEO_EXTENSIONS))}){there}; expected {FOLDER_LAYOUT}: remove "
            "the folder or fill it"
        )
    if len(first) > 1:
        raise MissingData(
            f"{base} holds images ({first['images']}) and clips ({first['clips']}); "
            "expected one kind of them: move the other to a folder of its own"
        )
