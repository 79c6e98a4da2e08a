"""Finds the files of a dataset that is written in parts: its shards, by split."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.targets.base import Files, Names
from sskt.teacher_cache.targets.files.file_index import known_of_files
from sskt.teacher_cache.targets.files.scan import entries, is_folder
from sskt.teacher_cache.targets.packed.samples import find_split
from sskt.teacher_cache.targets.spec import SPLIT_NAMES, DatasetSpec

_SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")

Progress = Callable[[int, int], None]


def shards_of(spec: DatasetSpec, endings: tuple[str, ...]) -> dict[str, list[Path]]:
    """The shards of each split, in byte order of their names.

    Those of a folder are of the split whose name is a word of theirs (``train-00001.tar``), or in
    a subfolder called like the split. Without such names all are train; so are one file, and the
    files of a pattern (``DIR/part-{000..146}.tar``, ``DIR/a*.tar``), in the pattern's order.

    Raises:
        MissingData: If no file is found, or one that a pattern with braces names.
        InputError: If the files of a folder are named in several ways.
    """
    text = spec.target.partition(":")[2]
    path = Path(text)
    if is_folder(path):
        return _of_folder(path, endings, spec.target)
    if path.is_file():
        return {"train": [path]}
    found = _matching(text)
    if not found:
        raise MissingData(
            f"--target {spec.target}: no such file or folder; give a folder of {endings[0]} files, "
            f"one of them, or a pattern in quotes such as 'DIR/part-{{000..146}}{endings[0]}'"
        )
    return {"train": found}


def _matching(text: str) -> list[Path]:
    braces = _BRACES.search(text)
    if braces is None:
        return [Path(name) for name in sorted(glob.glob(text), key=os.fsencode)]  # noqa: PTH207
    first, last = braces.groups()
    found = []
    for number in range(int(first), int(last) + 1):
        part = f"{text[: braces.start()]}{number:0{len(first)}d}{text[braces.end() :]}"
        names = _matching(part)
        if not names:
            raise MissingData(f"shard {part} of the pattern {text} is missing; get it")
        found += names
    return found


def _of_folder(folder: Path, endings: tuple[str, ...], target: str) -> dict[str, list[Path]]:
    loose: list[Path] = []
    below: dict[str, list[Path]] = {}
    for entry in entries(folder):
        if entry.is_dir():
            if inside := _sorted(Path(each.path) for each in entries(entry.path)):
                inside = [path for path in inside if path.name.lower().endswith(endings)]
                if inside:
                    below[entry.name] = inside
        elif entry.name.lower().endswith(endings):
            loose.append(Path(entry.path))
    if loose and below:
        raise InputError(
            f"--target {target}: {endings[0]} files in the folder itself ({loose[0].name}) and in "
            f"its folder {min(below)}; give one of the two"
        )
    if below:
        return dict(sorted(below.items()))
    if not loose:
        raise MissingData(f"--target {target}: no {endings[0]} file in {folder}")
    splits: dict[str, list[Path]] = {}
    for path in _sorted(loose):
        words = re.split(r"[^a-z]+", path.name.lower())
        names = {_SPLIT_OF[word] for word in words if word in _SPLIT_OF}
        splits.setdefault(names.pop() if len(names) == 1 else "", []).append(path)
    if list(splits) == [""]:
        return {"train": splits[""]}
    if "" in splits:
        raise InputError(
            f"--target {target}: {splits[''][0].name} has not the name of one split in its name, "
            "but other files have; put the files of each split into a folder of its name"
        )
    return splits


def _sorted(paths: object) -> list[Path]:
    return sorted(paths, key=os.fsencode)  # type: ignore[call-overload, no-any-return]


def read_shards(
    spec: DatasetSpec,
    shards: dict[str, list[Path]],
    kind: str,
    scan: Callable[[Path], str],
    progress: Progress,
) -> tuple[list[Path], list[str], list[str]]:
    """Scans all shards once; what was found is remembered with the indices of clips.

    Returns:
        The shards of the split, what ``scan`` says of each, and what it says of those of the
        other splits.
    """
    split = find_split(f"--target {spec.target}", spec.split, shards)
    paths = [path for each in shards.values() for path in each]
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    files = Files(folder, Names(str(path.absolute().relative_to(folder)) for path in paths))
    found = dict(zip(paths, known_of_files(files, kind, scan, progress), strict=True))
    others = [found[path] for name, each in shards.items() if name != split for path in each]
    return shards[split], [found[path] for path in shards[split]], others


def names_of(paths: Sequence[Path], counts: Sequence[int]) -> list[str]:
    """The name of the shard of each sample, without its ending."""
    return [path.stem for path, count in zip(paths, counts, strict=True) for _ in range(count)]
