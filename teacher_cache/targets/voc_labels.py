"""PASCAL VOC's annotations (one XML file a picture) to labels."""

from __future__ import annotations

from pathlib import Path
from xml.parsers import expat

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.targets.base import Int64

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


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
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise InputError(f"{path} is damaged ({error}); get the annotation again") from error
    except OSError as error:
        raise MissingData(f"cannot read {path}: {error.strerror}") from error
    return objects
