"""PASCAL VOC: images with an XML annotation each, several classes an image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.targets.base import Files, Int64, Names, Target
from sskt.teacher_cache.targets.files.scan import check_unique, read_list, rows_there, sizes_of
from sskt.teacher_cache.targets.spec import DatasetSpec, or_downloaded

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


def voc(spec: DatasetSpec) -> Target:
    """VOC2007 or VOC2012 classification by the official lists and the XML annotations.

    labels: int64 ``[N, 20]``: 1 where the image shows such an object, -1 where all of them are
    marked difficult, 0 where there is none. Order and ids are those of
    ``ImageSets/Main/SPLIT.txt``. Raises ``MissingData`` for a listed image or annotation that
    is not there (with ``spec.partial``: for an image without annotation), ``InputError`` for
    a damaged list or annotation.
    """
    return or_downloaded(spec, _voc, _download_voc)


def _voc(spec: DatasetSpec) -> Target:
    root, year = spec.folder, spec.target.upper()
    places = [root / year, root / "VOCdevkit" / year]
    # The folder itself may have any name, but not that of another year.
    if not re.fullmatch(r"VOC\d{4}", root.resolve().name) or root.resolve().name == year:
        places.append(root)
    lists = [place / "ImageSets" / "Main" / f"{spec.split}.txt" for place in places]
    path = next((path for path in lists if path.exists()), None)
    if path is None:
        raise spec.not_found(f"no {', no '.join(map(str, lists))}")
    base = path.parents[2]
    ids = Names(_voc_ids(path))
    check_unique(ids, path)
    images = [f"JPEGImages/{name}.jpg" for name in ids]
    notes = [f"Annotations/{name}.xml" for name in ids]
    sizes = sizes_of(base, images)
    there, noted = sizes >= 0, sizes_of(base, notes) >= 0
    needed = there if spec.partial else there & noted
    absent = [notes[row] if there[row] else images[row] for row in range(len(ids))]
    rows = rows_there(needed, absent, path, spec.layout, spec.partial)
    labels = np.zeros((len(ids), len(VOC_CLASSES)), np.int64)
    for row in rows.tolist():
        if not noted[row]:
            raise MissingData(f"{base / images[row]} has no annotation {base / notes[row]}")
        labels[row] = voc_labels(base / notes[row])
    files = Files(base, Names(images))
    target = Target(spec.target, spec.split, VOC_CLASSES, labels, ids, paths=files, sizes=sizes)
    return target if len(rows) == len(target) else target.chosen(rows)


def _voc_ids(path: Path) -> Iterator[str]:
    for number, line in read_list(path):
        if not re.fullmatch(r"[\w.-]+", line):
            raise InputError(f"{path}, line {number}: expected one id, found {line!r}")
        yield line


def _download_voc(spec: DatasetSpec) -> None:
    from torchvision import datasets

    year = spec.target.removeprefix("voc")
    datasets.VOCDetection(str(spec.folder), year=year, image_set=spec.split, download=True)


def voc_labels(path: Path) -> Int64:
    """The 20 labels that an annotation gives: int64 ``[20]`` of 1, -1 and 0, as ``voc`` says.

    Raises ``InputError`` naming a file that is no well-formed annotation; entities are refused.
    """
    labels = np.zeros(len(VOC_CLASSES), np.int64)
    for item in _objects(path):
        name, difficult = item.get("name", "").strip(), item.get("difficult", "0").strip()
        if name not in VOC_CLASSES or difficult not in ("0", "1"):
            found = f"an object '{name}', difficult '{difficult}'"
            raise InputError(f"{path}: expected VOC's classes, difficult 0 or 1; found {found}")
        if difficult == "0":
            labels[VOC_CLASSES.index(name)] = 1
        elif not labels[VOC_CLASSES.index(name)]:
            labels[VOC_CLASSES.index(name)] = -1
    return labels


def _content(data: bytes) -> str | bytes:
    """An annotation as text, since expat knows no encodings such as GBK.

    A file in another encoding than it declares is read byte by byte: the elements in use are ASCII.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data
    declared = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)", data)
    try:
        return data.decode(declared[1].decode() if declared else "utf-8-sig")
    except (LookupError, ValueError):
        return data.decode("latin-1")


def _objects(path: Path) -> list[dict[str, str]]:
    """The texts right below each ``annotation/object``, by tag."""
    objects: list[dict[str, str]] = []
    open_tags: list[str] = []

    def start(tag: str, _: dict[str, str]) -> None:
        open_tags.append(tag)
        if open_tags[0] != "annotation":
            raise InputError(f"{path}: expected <annotation>, found <{tag}>")
        if open_tags[1:] == ["object"]:
            objects.append({})

    def text(data: str) -> None:
        if len(open_tags) == 3 and open_tags[1] == "object":
            objects[-1][open_tags[2]] = objects[-1].get(open_tags[2], "") + data

    def doctype(*_: object) -> None:
        raise InputError(f"{path}: a document type has no place in an annotation")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: open_tags.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(_content(path.read_bytes()), True)
    except expat.ExpatError as error:
        raise InputError(f"{path} is damaged ({error}); get the annotation again") from error
    except OSError as error:
        raise MissingData(f"cannot read {path}: {error.strerror}") from error
    return objects
