"""The samples of packed files: what each kind of file says of them, and how one is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.media.images import UInt8, decode_image
from sskt.teacher_cache.media.regions import BoxOf
from sskt.teacher_cache.targets.base import Int64
from sskt.teacher_cache.targets.spec import named_like

COLUMNS = ("image", "label")
MOST_CLASSES = 1_000_000
"""A larger class number is a mistake: it would make as many names."""

_NUMBER = re.compile(r"-?\d+", re.ASCII)


class ImageStore(Protocol):
    """Gives the stored bytes of images. Loader processes get a copy of it, forked or pickled."""

    def read(self, row: int) -> bytes:
        """The bytes of an image. Raises ``MissingData`` if they cannot be read."""

    def where(self, row: int) -> str:
        """Where the image is, for a message."""

    def stamp(self, row: int) -> tuple[int, int]:
        """Bytes and time of change (ns) of the file that holds an image."""


@dataclass(frozen=True)
class PackedImages:
    """Reads and decodes the images ``rows`` of a store. See ``base.SampleReader``."""

    store: ImageStore
    rows: Int64

    def __call__(self, sample: int, box_of: BoxOf | None = None) -> UInt8:
        row = int(self.rows[sample])
        return decode_image(self.store.read(row), self.store.where(row), box_of)

    def data(self, sample: int) -> bytes:
        """The stored bytes of an image."""
        return self.store.read(int(self.rows[sample]))

    def stamp(self, sample: int) -> tuple[int, int]:
        """Bytes and time of change (ns) of the file that holds an image."""
        return self.store.stamp(int(self.rows[sample]))

    def chosen(self, rows: Int64) -> PackedImages:
        return replace(self, rows=self.rows[rows])


@dataclass(frozen=True)
class Packed:
    """The samples of one split, in order.

    Attributes:
        store: Reads their bytes.
        names: Names of the samples, which may come twice or be absent (empty).
        groups: The file or folder of each sample, for names that come twice; empty without.
        sizes: Bytes of each image, int64 ``[N]``.
        labels: Label of each sample as stored: a number, a name, a list of them, or None.
        all_labels: The labels of all splits, which the classes are taken from.
        class_names: Names of the classes, if the files have them.
    """

    store: ImageStore
    names: Sequence[str]
    groups: Sequence[str]
    sizes: Int64
    labels: Sequence[Any]
    all_labels: Iterable[Any]
    class_names: Sequence[str] | None = None


def ids_of(packed: Packed) -> list[str]:
    """An id for each sample: its name, ``GROUP/NAME`` if names come twice, else its number."""
    names = list(packed.names)
    if all(names) and len(set(names)) == len(names):
        return names
    if packed.groups and all(names):
        names = [f"{group}/{name}" for group, name in zip(packed.groups, names, strict=True)]
        if len(set(names)) == len(names):
            return names
    return [str(row) for row in range(len(names))]


def chosen_columns(columns: str) -> dict[str, str]:
    """Reads ``image=img,label=fine_label``.

    Raises:
        UnknownName: For anything but image and label.
        InputError: If it is not of that form.
    """
    found: dict[str, str] = {}
    for item in filter(None, columns.split(",")):
        name, _, theirs = (part.strip() for part in item.partition("="))
        if name not in COLUMNS:
            raise UnknownName("column in --columns", name, COLUMNS)
        if not theirs or name in found:
            raise InputError(f"--columns {columns}: expected NAME=COLUMN, each once, found {item}")
        found[name] = theirs
    return found


def one_column(
    what: str, where: str, columns: Sequence[str], likely: Sequence[str], named: Mapping[str, str]
) -> str:
    """The column of the images or of the labels.

    Args:
        what: ``image`` or ``label``.
        where: The dataset, for a message.
        columns: All columns.
        likely: Those that may be meant, the first of which is taken if it has the usual name.
        named: What ``--columns`` names.

    Returns:
        Its name; empty if there is none.

    Raises:
        InputError: If several may be meant, or the one that is named does not exist.
    """
    if theirs := named.get(what):
        if theirs not in columns:
            raise InputError(
                f"{where} has no column {theirs!r}, which --columns names as {what}; it has "
                f"{', '.join(columns)}"
            )
        return theirs
    usual = [name for name in likely if name in (what, f"{what}s")]
    found = usual or list(likely)
    if len(found) > 1:
        raise InputError(
            f"{where} has several columns that may be the {what}: {', '.join(found)}; name one "
            f"with --columns {what}=COLUMN"
        )
    return found[0] if found else ""


def find_split(where: str, split: str, known: Iterable[str]) -> str:
    """The name of a split as the files have it. Raises ``UnknownName``."""
    names = list(known)
    alike = [split] if split in names else named_like(split, names)
    if len(alike) != 1:
        raise UnknownName(f"split of {where}", split, names)
    return alike[0]


def truth_of(packed: Packed, where: str) -> tuple[tuple[str, ...], Int64]:
    """The classes and the labels.

    Numbers count from class 0. Names are sorted by their bytes.

    Returns:
        Names of the classes; labels, int64 ``[N]`` with -1 where none is known, or int64
        ``[N, C]`` if they are lists.

    Raises:
        InputError: If a label is of another kind, or no class.
    """
    several = any(isinstance(label, list | tuple) for label in packed.labels)
    known = {label for labels in packed.all_labels for label in _parts(labels, where)}
    index: dict[Any, int]
    if all(isinstance(label, int) or _NUMBER.fullmatch(label) for label in known):
        index = {label: int(label) for label in known}
        if index and not -1 <= min(index.values()) <= max(index.values()) < MOST_CLASSES:
            wrong = next(n for n in index.values() if not -1 <= n < MOST_CLASSES)
            raise InputError(
                f"{where}: expected classes from 0 to {MOST_CLASSES - 1}, found {wrong}"
            )
        count = max(index.values(), default=-1) + 1
        names = packed.class_names or [str(i) for i in range(count)]
        if len(names) < count:
            raise InputError(
                f"{where}: class {count - 1}, but the files name {len(names)} classes only"
            )
    else:
        names = sorted({str(label) for label in known}, key=str.encode)
        place = {name: i for i, name in enumerate(names)}
        index = {label: place[str(label)] for label in known}
    if not several:
        single = [_parts(label, where) for label in packed.labels]
        labels = np.array([index[label[0]] if label else -1 for label in single], np.int64)
        return tuple(names), labels
    labels = np.zeros((len(packed.labels), len(names)), np.int64)
    for row, label in enumerate(packed.labels):
        labels[row, [index[part] for part in _parts(label, where)]] = 1
    return tuple(names), labels


def _parts(label: Any, where: str) -> list[int | str]:
    parts = label if isinstance(label, list | tuple) else [label]
    found: list[int | str] = []
    for part in parts:
        if part is None or part == "":
            continue
        if isinstance(part, float) and part.is_integer():
            part = int(part)
        if not isinstance(part, int | str):
            raise InputError(
                f"{where}: a label is {type(part).__name__}; expected the number or the name of a "
                "class, or a list of them; name the column with --columns label=COLUMN"
            )
        found.append(int(part) if isinstance(part, bool) else part)
    return found
