"""UCF101 and HMDB51: clips in class folders, with the official lists of their splits.

Clips are files or folders of extracted frames (``CLASS/VIDEO/image_00001.jpg``, ``n_frames``);
if a video exists as both, the file is taken. A sample's id is ``CLASS/VIDEO.EXTENSION`` of a
file and ``CLASS/VIDEO`` of a folder, so that labels of the one are never taken for the other.
Without a list, the JSON annotation of 3D-ResNets-PyTorch is read: ``training`` is train,
``testing``, or ``validation`` if it has no such videos, is test.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.media.video import VIDEO_EXTENSIONS, is_frame_folder
from sskt.teacher_cache.targets.base import Files, Names, Target
from sskt.teacher_cache.targets.files.scan import entries, read_list, rows_there, sizes_of_clips
from sskt.teacher_cache.targets.spec import DatasetSpec

UCF101_LISTS = ("ucfTrainTestlist", ".", "../ucfTrainTestlist")
UCF101_CLIPS = ("UCF-101", "jpg", ".")
HMDB51_LISTS = ("splits", "testTrainMulti_7030_splits", ".", "../splits")
HMDB51_CLIPS = ("videos", "hmdb51_org", "jpg", ".")
HMDB51_CLASSES = 51
# AVI is what both hosts offer; the rest are conversions by users
EXTENSIONS = (".avi", *sorted(VIDEO_EXTENSIONS - {".avi"}))

_ByName = dict[str, os.DirEntry[str]]


@dataclass(frozen=True)
class _List:
    """An official list: (class, name without extension) of its videos, in its order."""

    file: Path
    classes: tuple[str, ...]
    videos: Sequence[tuple[int, str]]


def ucf101(spec: DatasetSpec) -> Target:
    """UCF101, in the order of its lists; classes in the order of ``classInd.txt``.

    Lists are looked for in ``ucfTrainTestlist``, under root and beside it; clips in ``UCF-101``,
    in ``jpg`` (3D-ResNets-PyTorch) and under root: the first place with a class folder counts.
    Classes and videos are found whatever their case (``HandStandPushups``).

    Raises ``MissingData`` (with the layout) for an absent list or clips, unless ``spec.partial``;
    ``InputError`` for a malformed list, naming file and line.
    """
    root = _root(spec)
    side, fold = _fold(spec.split)
    listed = _first(root, UCF101_LISTS, f"{side}list0{fold}.txt")
    if listed:
        found = _ucf101_list(listed, _ucf101_classes(spec, listed.parent))
    else:
        found = _annotated(
            spec, root, UCF101_LISTS, f"{side}list0{fold}.txt", f"ucf101_0{fold}.json"
        )
    return _target(spec, root, UCF101_CLIPS, found)


def hmdb51(spec: DatasetSpec) -> Target:
    """HMDB51: classes in byte order, videos of a class in the order of its list.

    Lists are looked for in ``splits``, ``testTrainMulti_7030_splits``, under root and beside it;
    clips in ``videos``, ``hmdb51_org``, ``jpg`` and under root. Raises like ``ucf101``.
    """
    root = _root(spec)
    side, fold = _fold(spec.split)
    pattern = f"*_test_split{fold}.txt"
    listed = _first(root, HMDB51_LISTS, pattern)
    if listed:
        found = _hmdb51_lists(listed.parent, pattern, "1" if side == "train" else "2")
    else:
        found = _annotated(spec, root, HMDB51_LISTS, pattern, f"hmdb51_{fold}.json")
    return _target(spec, root, HMDB51_CLIPS, found)


def _root(spec: DatasetSpec) -> Path:
    if spec.download:
        raise InputError(
            f"sskt cannot download {spec.target}: its host offers .rar archives only; leave out "
            f"--download; expected {spec.layout}"
        )
    return spec.folder


def _fold(split: str) -> tuple[str, int]:
    side = split.rstrip("23")
    return side, int(split.removeprefix(side) or 1)


def _first(root: Path, places: Sequence[str], pattern: str) -> Path | None:
    for place in places:
        visible = (file for file in (root / place).glob(pattern) if not file.name.startswith("."))
        if file := min(visible, default=None):
            return file
    return None


# --- lists -------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """(place for messages, line) of the lines that are not blank."""
    return ((f"{file}, line {number}", line) for number, line in read_list(file))


def _malformed(place: str, line: str, expected: str) -> InputError:
    return InputError(f"{place}: expected {expected}, found '{line[:80]}'; get the list anew")


def _video(name: str) -> str | None:
    """A listed file's name without its extension; None if it is no video's."""
    path = Path(name)
    return path.stem if path.suffix.lower() in VIDEO_EXTENSIONS and path.name == name else None


def _ucf101_classes(spec: DatasetSpec, folder: Path) -> tuple[str, ...]:
    file = folder / "classInd.txt"
    if not file.is_file():
        raise spec.not_found(f"no {file}")
    classes: list[str] = []
    for place, line in _lines(file):
        parts = re.fullmatch(r"(\d+)\s+(\S+)", line)
        if not parts or int(parts[1]) != len(classes) + 1:
            raise _malformed(place, line, f"'{len(classes) + 1} CLASS'")
        classes.append(parts[2])
    return tuple(classes)


def _ucf101_list(file: Path, classes: tuple[str, ...]) -> _List:
    labels = {name.casefold(): label for label, name in enumerate(classes)}
    videos: dict[tuple[int, str], None] = {}
    for place, line in _lines(file):
        parts = re.fullmatch(r"([^/]+)/(.+?)(?:\s+(\d+))?", line)
        stem = _video(parts[2]) if parts else None
        if not parts or not stem:
            raise _malformed(place, line, "'CLASS/VIDEO.avi', for training with the class's number")
        label = labels.get(parts[1].casefold())
        if label is None:
            raise InputError(f"{place}: class '{parts[1]}' is not in classInd.txt beside it")
        if parts[3] and int(parts[3]) != label + 1:
            raise InputError(
                f"{place}: class number {parts[3]}, but classInd.txt beside it gives "
                f"{classes[label]} number {label + 1} of {len(classes)}"
            )
        if (label, stem) in videos:
            raise InputError(f"{place}: '{parts[1]}/{parts[2]}' a second time; get the list anew")
        videos[label, stem] = None
    return _List(file, classes, tuple(videos))


def _hmdb51_lists(folder: Path, pattern: str, wanted: str) -> _List:
    ending = pattern.removeprefix("*")
    names = [file.name.removesuffix(ending) for file in folder.glob(pattern)]
    classes = tuple(sorted((n for n in names if not n.startswith(".")), key=os.fsencode))
    if len(classes) != HMDB51_CLASSES:
        raise MissingData(
            f"expected {HMDB51_CLASSES} lists {folder / pattern}, one a class, found "
            f"{len(classes)}; get them all: the labels depend on it"
        )
    sides: dict[tuple[int, str], str] = {}
    for label, name in enumerate(classes):
        for place, line in _lines(folder / f"{name}{ending}"):
            parts = re.fullmatch(r"(.+?)\s+([012])", line)
            stem = _video(parts[1]) if parts else None
            if not parts or not stem:
                raise _malformed(place, line, "'VIDEO.avi 1' (train), 2 (test) or 0 (unused)")
            if (label, stem) in sides:
                raise InputError(f"{place}: '{parts[1]}' a second time; get the list anew")
            sides[label, stem] = parts[2]
    videos = tuple(video for video, side in sides.items() if side == wanted)
    return _List(folder / pattern, classes, videos)


def _annotated(
    spec: DatasetSpec, root: Path, places: Sequence[str], lists: str, annotation: str
) -> _List:
    """The JSON annotation of 3D-ResNets-PyTorch, in its order of classes and videos."""
    file = _first(root, places, annotation)
    if not file:
        raise spec.not_found(f"no {lists} and no {annotation} under {root}")
    try:
        content = json.loads(file.read_bytes())
        classes = tuple(content["labels"])
        if not all(isinstance(name, str) for name in classes):
            raise TypeError("a label that is no text")
        labels = {name: label for label, name in enumerate(classes)}
        sides: dict[str, list[tuple[int, str]]] = {"training": [], "validation": [], "testing": []}
        for name, video in content["database"].items():
            label = labels[video["annotations"]["label"]]
            sides[video["subset"]].append((label, name))
    except OSError as error:
        raise MissingData(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: expected JSON with 'labels' and 'database': {{VIDEO: {{'subset': "
            "'training' | 'validation' | 'testing', 'annotations': {'label': one of the labels}}}; "
            f"found otherwise ({type(error).__name__}: {error})"
        ) from error
    train = spec.split.startswith("train")
    return _List(
        file, classes, sides["training"] if train else sides["testing"] or sides["validation"]
    )


# --- clips -------------------------------------------------------------------------------------


def _target(spec: DatasetSpec, root: Path, places: Sequence[str], listed: _List) -> Target:
    if not listed.videos:
        raise InputError(f"{listed.file} lists no video of {spec.split}; get the list anew")
    base = _clip_folder(root, places, listed.classes)
    if not base:
        tried = ", ".join(str(root / place) for place in places)
        raise spec.not_found(f"no class folder in any of {tried}")
    ids, files = _clips(base, listed)
    rows = rows_there(
        np.array([bool(file) for file in files]),
        ids,
        f"{listed.file} under {base}",
        spec.layout,
        spec.partial,
    ).tolist()
    names = Names(files[row] for row in rows)
    return Target(
        spec.target,
        spec.split,
        listed.classes,
        np.array([listed.videos[row][0] for row in rows], np.int64),
        Names(ids[row] for row in rows),
        paths=Files(base, names),
        sizes=sizes_of_clips(base, names),
        decoder=spec.decoder,
    )


def _clips(base: Path, listed: _List) -> tuple[list[str], list[str]]:
    """Of each listed video its id, and the name of its file or folder under base ('': none)."""
    folders = _by_name(base)
    inside: dict[str, _ByName] = {}
    ids: list[str] = []
    files: list[str] = []
    for label, video in listed.videos:
        name = listed.classes[label]
        folder = _get(folders, name)
        if name not in inside:
            inside[name] = _by_name(folder.path) if folder and folder.is_dir() else {}
        entry, extension = _clip(inside[name], video)
        ids.append(f"{name}/{video}{extension}")
        files.append(f"{folder.name}/{entry.name}" if folder and entry else "")
    return ids, files


def _clip_folder(root: Path, places: Sequence[str], classes: tuple[str, ...]) -> Path | None:
    wanted = {name.casefold() for name in classes}
    for place in places:
        base = root / place
        if base.is_dir() and any(e.name.casefold() in wanted and e.is_dir() for e in entries(base)):
            return base
    return None


def _clip(inside: _ByName, video: str) -> tuple[os.DirEntry[str] | None, str]:
    """The file or folder of a video, if there is one, and the extension in its id."""
    for extension in EXTENSIONS:
        entry = _get(inside, video + extension)
        if entry and entry.is_file():
            return entry, extension
    entry = _get(inside, video)
    return entry if entry and is_frame_folder(Path(entry.path)) else None, ""


def _get(found: _ByName, name: str) -> os.DirEntry[str] | None:
    return found.get(name) or found.get(name.casefold())


def _by_name(folder: Path | str) -> _ByName:
    """What lies in a folder, by name, and by case-folded name where nothing else has it."""
    found = {e.name: e for e in sorted(entries(folder), key=lambda e: os.fsencode(e.name))}
    return {name.casefold(): entry for name, entry in found.items()} | found
