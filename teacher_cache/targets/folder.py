"""A user's own folder of class folders, of images or of clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sskt.teacher_cache.errors import MissingData
from sskt.teacher_cache.media.images import EXTENSIONS
from sskt.teacher_cache.targets.base import Files, Names, Target
from sskt.teacher_cache.targets.registry import FOLDER_LAYOUT
from sskt.teacher_cache.targets.scan import (
    images_and_clips,
    is_folder,
    sizes_of_clips,
    sizes_of_files,
    subfolders,
)
from sskt.teacher_cache.targets.spec import DatasetSpec

SPLIT_NAMES = ("test", "train", "training", "val", "valid", "validation")


def open_folder(spec: DatasetSpec) -> Target:
    """Class folders under ``folder/split`` (or, for train, under ``folder`` itself).

    A class's samples are the images below its folder, at any depth; or the clips: video files,
    and folders of extracted frames (image_00001.jpg, ...), whose size is that of all their
    files. Classes and samples are taken in byte order of their names, so the order is the same
    on every machine. Raises ``MissingData`` for a missing folder, a class without samples,
    images beside clips, a broken link, a loop of links, and what cannot be read.
    """
    folder, split = spec.folder, spec.split
    base = _base(folder, split)
    classes = subfolders(base)
    if not classes:
        raise MissingData(f"no class folders in {base}; expected {FOLDER_LAYOUT}")
    counts: list[int] = []
    first: dict[str, str] = {}

    def samples() -> Iterator[str]:
        for name in classes:
            found = dict(zip(("images", "clips"), images_and_clips(base, name), strict=True))
            for kind, ids in found.items():
                if ids:
                    first.setdefault(kind, ids[0])
            counts.append(sum(map(len, found.values())))
            _check_class(base, name, counts[-1], first)
            for ids in found.values():
                yield from ids

    names = Names(samples())
    clips = "clips" in first
    sizes = (sizes_of_clips if clips else sizes_of_files)(base, names)
    return Target(
        folder.resolve().name,
        split,
        tuple(classes),
        np.repeat(np.arange(len(classes), dtype=np.int64), counts),
        names,
        paths=Files(base, names),
        sizes=sizes,
        decoder=spec.decoder if clips else "",
    )


def _base(folder: Path, split: str) -> Path:
    base = folder / split
    if is_folder(base):
        return base
    if not is_folder(folder):
        what = f"{folder} is a file" if folder.exists() else f"no folder {folder}"
        raise MissingData(f"{what}; expected {FOLDER_LAYOUT}")
    if split != "train":
        raise MissingData(f"no folder {base}; expected {FOLDER_LAYOUT}")
    splits = sorted(name for name in SPLIT_NAMES if is_folder(folder / name))
    if splits:
        raise MissingData(
            f"{folder} has a folder {splits[0]} but no folder {split}; expected {FOLDER_LAYOUT}"
        )
    return folder


def _check_class(base: Path, name: str, count: int, first: dict[str, str]) -> None:
    from sskt.teacher_cache.media.video import VIDEO_EXTENSIONS

    if not count:
        raise MissingData(
            f"class folder {base / name} holds no image ({', '.join(sorted(EXTENSIONS))}) and no "
            f"clip ({', '.join(sorted(VIDEO_EXTENSIONS))}); remove it or fill it"
        )
    if len(first) > 1:
        raise MissingData(
            f"{base} holds images ({first['images']}) and clips ({first['clips']}); "
            "expected one kind of them: move the other to a folder of its own"
        )
