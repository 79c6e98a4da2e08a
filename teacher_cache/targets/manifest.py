"""A user's own list of files, with their labels: CSV or Parquet.

Columns: ``path``; ``label`` (a class's name or number) or ``labels`` (several: ``a|b``, or a
list), if labels are known; if wanted ``split``, and ``class_name`` for a ``label`` that is a
number. Other columns are ignored: a manifest often carries more. Classes are those of the whole
manifest, so that they are the same in each split.
"""

from __future__ import annotations

import ast
import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName, first_line
from sskt.teacher_cache.media.images import EXTENSIONS, is_image
from sskt.teacher_cache.targets.base import Files, Int64, Names, Target
from sskt.teacher_cache.targets.files.scan import FOLDER, MISSING, entries, sizes_of, sizes_of_clips
from sskt.teacher_cache.targets.spec import DatasetSpec, named_like

COLUMNS = ("path", "label", "labels", "split", "class_name")
MANIFEST_LAYOUT = (
    "a column path, if labels are known label or labels, and if wanted split and class_name"
)

MOST_CLASSES = 1_000_000
"""A larger class number is a mistake: it would make as many names."""

ONE_NAME = "none"
"""The label separator that says that a label is one name, whatever is in it."""

_log = logging.getLogger("sskt")
_NUMBER = re.compile(r"(-?\d+)(\.0*)?", re.ASCII)
_LIST = re.compile(r"\[.*\]|\(.*\)", re.DOTALL)
_DIGITS = re.compile(r"\d+( +\d+)+", re.ASCII)

Labels = tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class _Table:
    """The known columns of a manifest as text, and where each row is written."""

    file: Path
    unit: str
    numbers: list[int]
    paths: list[str]
    labels: list[Labels]
    splits: list[str] | None
    class_names: list[str] | None
    several: bool

    def at(self, row: int) -> str:
        return f"{self.file}, {self.unit} {self.numbers[row]}"


def open_manifest(spec: DatasetSpec) -> Target:
    """Opens the rows of a split, in the manifest's order.

    Without a column ``split`` all rows are train. A relative path is taken from ``root``, or else
    from the manifest's folder; ids are the paths as written. Files are images, or clips (video
    files, folders of extracted frames). If all labels are whole numbers, they count from class 0,
    and the classes are named by ``class_name`` or else by their numbers; if not, classes are
    sorted by the bytes of their names.

    Args:
        spec: The dataset; ``target`` is the manifest.

    Returns:
        The target, named after the file. Labels are int64 ``[N]``, -1 where none is given; or,
        if samples may have several, int64 ``[N, C]``, all 0 where none is given.

    Raises:
        MissingData: If files are missing; names the first line.
        InputError: If a row is wrong, or may be meant in two ways; names the line and the option.
        UnknownName: If no row is of the split.
    """
    path, folder = Path(spec.target), spec.folder
    table = _read(spec)
    known = _splits(table)
    split = spec.split if spec.split in known else "".join(named_like(spec.split, known))
    if split not in known:
        raise UnknownName(f"split of {path}", spec.split, known)
    chosen = range(len(table.paths))
    rows = [row for row in chosen if table.splits is None or table.splits[row] == split]
    names, sizes, clips = _files(table, rows, folder, anywhere=spec.allow_outside_root)
    classes, index = _classes(table)
    return Target(
        path.stem,
        spec.split,
        classes,
        _labels(table, rows, index, len(classes)),
        names,
        paths=Files(folder, names),
        sizes=sizes,
        decoder=spec.decoder if clips else "",
    )


def manifest_splits(spec: DatasetSpec) -> list[str]:
    """The splits that a manifest names, in its order; ``train`` if it has no such column."""
    return _splits(_read(spec))


def _splits(table: _Table) -> list[str]:
    if table.splits is None:
        return ["train"]
    found = list(dict.fromkeys(table.splits))
    if "" in found:
        raise InputError(f"{table.at(table.splits.index(''))}: no split; name one in every row")
    for name in found:
        if alike := [other for other in named_like(name, found) if other != name]:
            first, second = sorted((name, alike[0]), key=found.index)
            raise InputError(
                f"{table.at(table.splits.index(second))}: split {second!r}, but {first!r} in "
                f"{table.unit} {table.numbers[table.splits.index(first)]}; write one name for one "
                "split"
            )
    return found


# --- files ------------------------------------------------------------------------------------


def _files(
    table: _Table, rows: Sequence[int], folder: Path, *, anywhere: bool
) -> tuple[Names, Int64, bool]:
    names = [table.paths[row] for row in rows]
    first: dict[str, int] = {}
    if len(set(names)) < len(names):
        for row, name in zip(rows, names, strict=True):
            if first.setdefault(name, row) != row:
                where = f"{table.unit} {table.numbers[first[name]]}"
                raise InputError(f"{table.at(row)}: {name} came in {where}; a sample may come once")
    sizes = sizes_of(folder, names)
    missing = np.flatnonzero(sizes == MISSING)
    if len(missing):
        row = int(missing[0])
        raise MissingData(
            f"{len(missing):,} of {len(names):,} files of {table.file} are missing, first "
            f"{table.unit} {table.numbers[rows[row]]}: {folder / names[row]}; relative paths are "
            "taken from --root, or else from the manifest's folder"
        )
    if not anywhere:
        _require_inside(table, rows, names, sizes, folder)
    kinds = _kinds(table, rows, names, sizes, folder)
    if len(kinds) > 1:
        raise InputError(
            f"{table.at(kinds['image'])} is an image and {table.at(kinds['clip'])} a clip; "
            "expected one kind in a split"
        )
    return (
        Names(names),
        sizes_of_clips(folder, names) if "clip" in kinds else sizes,
        "clip" in kinds,
    )


def _require_inside(
    table: _Table, rows: Sequence[int], names: Sequence[str], sizes: Int64, folder: Path
) -> None:
    """Raises ``InputError`` for a file outside the folder of the data, also through a link."""
    root = os.path.realpath(folder)

    def inside(name: str) -> bool:
        found = os.path.realpath(folder / name)
        return found == root or found.startswith(f"{root.rstrip('/')}/")

    parents: dict[str, bool] = {}
    for row, name, size in zip(rows, names, sizes.tolist(), strict=True):
        parent = name[: name.rfind("/") + 1]
        if parent not in parents:
            parents[parent] = inside(parent)
        good = parents[parent]
        if size == FOLDER:
            links = (entry.path for entry in entries(folder / name) if entry.is_symlink())
            good = inside(name) and all(map(inside, map(os.path.abspath, links)))
        elif good and os.path.islink(folder / name):  # noqa: PTH114 (a Path costs more)
            good = inside(name)
        if not good:
            raise InputError(
                f"{table.at(row)}: {name} lies outside of {folder}, or is a link to such a file; "
                "give the folder of all files with --root, or add --allow-outside-root"
            )


def _kinds(
    table: _Table, rows: Sequence[int], names: Sequence[str], sizes: Int64, folder: Path
) -> dict[str, int]:
    """Which kinds of files there are, each with the first row of it."""
    from sskt.teacher_cache.media.video import VIDEO_EXTENSIONS, is_frame_folder

    kinds: dict[str, int] = {}
    kind_of = dict.fromkeys(EXTENSIONS, "image") | dict.fromkeys(VIDEO_EXTENSIONS, "clip")
    for row, name, is_folder in zip(rows, names, sizes == FOLDER, strict=True):
        kind = kind_of.get("." + name.rpartition(".")[2].lower())
        if is_folder:
            kind = "clip" if is_frame_folder(folder / name) else None
        elif kind is None and is_image(folder / name):
            kind = "image"
        if kind is None:
            raise InputError(
                f"{table.at(row)}: {name} is no image ({', '.join(sorted(EXTENSIONS))}), no clip "
                f"({', '.join(sorted(VIDEO_EXTENSIONS))}) and no folder of image_00001.jpg, ..."
            )
        kinds.setdefault(kind, row)
    return kinds


# --- labels -----------------------------------------------------------------------------------


def _classes(table: _Table) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes' names, and each label's text to its class (-1: none)."""
    texts = {text for labels in set(table.labels) for text in labels}
    numbers = {text: found for text in texts if (found := _NUMBER.fullmatch(text))}
    if not texts or len(numbers) < len(texts):
        names = sorted(texts, key=str.encode)
        return tuple(names), {name: i for i, name in enumerate(names)}
    index = {text: int(found[1]) for text, found in numbers.items()}
    lowest = 0 if table.several else -1
    for text, number in index.items():
        if not lowest <= number < MOST_CLASSES:
            row = next(row for row, labels in enumerate(table.labels) if text in labels)
            raise InputError(
                f"{table.at(row)}: expected classes from 0 to {MOST_CLASSES - 1}, found {text}"
            )
    names = [str(i) for i in range(max(index.values()) + 1)]
    if table.class_names is not None and not table.several:
        _name_classes(table, table.class_names, index, names)
    return tuple(names), index


def _name_classes(
    table: _Table, class_names: list[str], index: dict[str, int], names: list[str]
) -> None:
    first: dict[int, tuple[str, int]] = {}
    for row, (labels, name) in enumerate(zip(table.labels, class_names, strict=True)):
        number = index[labels[0]] if labels else -1
        if number < 0 or not name:
            continue
        known, where = first.setdefault(number, (name, row))
        if known != name:
            before = f"{known!r} in {table.unit} {table.numbers[where]}"
            raise InputError(f"{table.at(row)}: class {number} is {name!r} here, but {before}")
        names[number] = name


def _require_one_name(table: _Table) -> None:
    """Raises ``InputError`` for a label that may be several, such as ``cat,dog`` or ``[0, 1]``."""
    texts = list(dict.fromkeys(text for labels in table.labels for text in labels))
    cut: dict[str, tuple[str, list[str]]] = {}
    for text in texts:
        mark = next((mark for mark in ",;|" if mark in text), None)
        if mark:
            cut[text] = mark, [part.strip() for part in text.split(mark)]
    parts = Counter(part for _, found in cut.values() for part in set(found))
    for text in texts:
        mark, found = cut.get(text, ("", []))
        advice = f"--label-separator {mark!r} if it is several"
        if _LIST.fullmatch(text) or _DIGITS.fullmatch(text):
            advice = "--columns labels=COLUMN if it is a list of several"
        # "great white shark, white shark" is one name, unless its parts are names as well.
        elif not mark or (
            mark != "|"
            and f"{mark} " in text
            and not any(parts[part] > 1 or part in texts for part in found)
        ):
            continue
        row = next(row for row, labels in enumerate(table.labels) if text in labels)
        raise InputError(
            f"{table.at(row)}: the label {text!r} looks like several; give {advice}, or "
            f"--label-separator {ONE_NAME} if it is the name of one class"
        )


def _require_no_multi_hot(table: _Table) -> None:
    """Raises ``InputError`` for labels that are 0 and 1 of each class instead of its name."""
    rows = [row for row, labels in enumerate(table.labels) if len(labels) > 1]
    if not rows or not {text for labels in table.labels for text in labels} <= {"0", "1"}:
        return
    one_length = len({len(labels) for labels in table.labels}) == 1
    for row in rows:
        if one_length or len(set(table.labels[row])) < len(table.labels[row]):
            raise InputError(
                f"{table.at(row)}: labels {list(table.labels[row])} look like a 0 or 1 for each "
                "class; write the names or numbers of the classes that are present instead"
            )


def _labels(table: _Table, rows: Sequence[int], index: dict[str, int], classes: int) -> Int64:
    if not table.several:
        single = (index[labels[0]] if (labels := table.labels[row]) else -1 for row in rows)
        return np.fromiter(single, np.int64, len(rows))
    several = np.zeros((len(rows), classes), np.int64)
    for i, row in enumerate(rows):
        several[i, [index[text] for text in table.labels[row]]] = 1
    return several


# --- reading ----------------------------------------------------------------------------------

Columns = dict[str, list[Any]]


def _read(spec: DatasetSpec) -> _Table:
    path, separator = Path(spec.target), spec.label_separator
    read = _read_parquet if path.suffix.lower() == ".parquet" else _read_csv
    try:
        unit, numbers, columns = read(path, _named(spec.columns))
    except OSError as error:
        what = error.strerror or first_line(error)
        raise MissingData(f"cannot read manifest {path}: {what}") from error
    if not numbers:
        raise MissingData(f"manifest {path} has no rows")

    def cleaned(name: str, clean: Callable[[Any], T]) -> list[T]:
        known: dict[Any, T] = {}
        values = []
        for number, value in zip(numbers, columns[name], strict=True):
            key = tuple(value) if isinstance(value, list) else value
            try:
                if key not in known:
                    known[key] = clean(key)
            except (TypeError, ValueError) as error:
                raise InputError(f"{path}, {unit} {number}: {name}: {error}") from error
            values.append(known[key])
        return values

    several = "labels" in columns or separator not in ("", ONE_NAME)
    labels: list[Labels] = [()] * len(numbers)
    if "label" in columns or "labels" in columns:
        name = "labels" if "labels" in columns else "label"
        labels = cleaned(name, partial(_many, separator or "|") if several else _one)
    table = _Table(
        path,
        unit,
        numbers,
        cleaned("path", _path),
        labels,
        cleaned("split", _text) if "split" in columns else None,
        cleaned("class_name", _text) if "class_name" in columns else None,
        several,
    )
    if several:
        _require_no_multi_hot(table)
    elif not separator:
        _require_one_name(table)
    return table


def _named(columns: str) -> dict[str, str]:
    """``path=file,label=tag`` to the manifest's name of each of our columns."""
    found: dict[str, str] = {}
    for item in filter(None, columns.split(",")):
        name, _, theirs = (part.strip() for part in item.partition("="))
        if name not in COLUMNS:
            raise UnknownName("column in --columns", name, COLUMNS)
        if not theirs or name in found or theirs in found.values():
            raise InputError(f"--columns {columns}: expected NAME=COLUMN, each once, found {item}")
        found[name] = theirs
    return found


def _path(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a file's path, found {value!r}")
    return value


def _text(value: object) -> str:
    if value is None or value != value:  # NaN, which pandas writes for an empty cell
        return ""
    if isinstance(value, tuple):
        raise ValueError("expected one value, found a list (several labels go into labels)")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("not UTF-8") from None
    return text


def _one(value: object) -> Labels:
    text = _text(value)
    return (text,) if text else ()


def _many(separator: str, value: object) -> Labels:
    parts: Sequence[object]
    if isinstance(value, tuple):
        parts = value
    elif _LIST.fullmatch(text := _text(value)):
        parts = _listed(text)
    else:
        parts = [text] if separator == ONE_NAME else text.split(separator)
    texts = tuple(_text(part) for part in parts)
    if texts in ((), ("",)):
        return ()
    if "" in texts:
        raise ValueError(f"an empty name in {value!r}")
    return texts


def _listed(text: str) -> Sequence[object]:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"expected a list such as ['a', 'b'], found {text!r}") from None
    if not isinstance(found, list | tuple):
        raise ValueError(f"expected a list such as ['a', 'b'], found {text!r}")
    return found


def _ours(path: Path, header: list[str], named: Mapping[str, str]) -> list[str]:
    """Our names of a manifest's columns, empty for those that are not read."""
    for name, theirs in named.items():
        if theirs not in header:
            raise InputError(
                f"{path} has no column {theirs!r}, which --columns names as {name}; it has {header}"
            )
    renamed = {theirs: name for name, theirs in named.items()}
    hidden = {*named, *(("label", "labels") if {"label", "labels"} & {*named} else ())}
    found = [renamed.get(name, "" if name in hidden else name) for name in header]
    twice = len(set(header)) < len(header)
    if "path" not in found or ("label" in found and "labels" in found) or twice:
        step = "say which is which with --columns path=COLUMN,label=COLUMN"
        if len(header) == 1 and (mark := next((m for m in ";\t|" if m in header[0]), "")):
            step = f"its columns seem to be separated by {mark!r}; a manifest has commas"
        raise InputError(f"{path} has the columns {header}; expected {MANIFEST_LAYOUT}; {step}")
    if "label" not in found and "labels" not in found:
        _log.warning(
            "%s has no column label or labels, so its samples have no labels; it has %s: name one "
            "with --columns label=COLUMN",
            path,
            ", ".join(header),
        )
    return [name if name in COLUMNS else "" for name in found]


def _read_csv(path: Path, named: Mapping[str, str]) -> tuple[str, list[int], Columns]:
    with path.open("rb") as start:
        if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{path} is UTF-16; save it as UTF-8")
    numbers: list[int] = []
    # Bytes that are no UTF-8 may belong to a file's name; elsewhere _text refuses them.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            ours = _ours(path, header, named)
            columns: Columns = {name: [] for name in ours if name}
            places = [(values, ours.index(name)) for name, values in columns.items()]
            for cells in reader:
                if len(cells) not in (0, len(header)):
                    what = f"expected {len(header)} cells, found {len(cells)}"
                    raise InputError(f"{path}, line {reader.line_num}: {what}")
                if cells:
                    numbers.append(reader.line_num)
                    for values, place in places:
                        values.append(cells[place])
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: {error}") from error
    return "line", numbers, columns


def _read_parquet(path: Path, named: Mapping[str, str]) -> tuple[str, list[int], Columns]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingData("a Parquet manifest needs: pip install 'sskt[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            ours = dict(zip(names, _ours(path, names, named), strict=True))
            table = file.read(columns=[name for name in names if ours[name]])
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} cannot be read as Parquet: {first_line(error)}") from error
    columns = {ours[name]: table.column(name).to_pylist() for name in table.column_names}
    return "row", list(range(1, table.num_rows + 1)), columns
