"""A user's own list of files with their labels: CSV or Parquet.

Columns: ``path``; ``label`` (a class's name or number) or ``labels`` (several: ``a|b``, in
Parquet also a list); if wanted ``split``, and ``class_name`` for a ``label`` that is a number.
Other columns are ignored: a manifest often carries more. Classes are those of the whole
manifest, so that they are the same in each split.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName, first_line
from sskt.teacher_cache.media.images import EXTENSIONS
from sskt.teacher_cache.targets.base import Files, Int64, Names, Target
from sskt.teacher_cache.targets.scan import FOLDER, MISSING, sizes_of, sizes_of_clips
from sskt.teacher_cache.targets.spec import DatasetSpec

COLUMNS = ("path", "label", "labels", "split", "class_name")
MANIFEST_LAYOUT = "the columns path and label (or labels), and if wanted split and class_name"

MOST_CLASSES = 1_000_000
"""A larger class number is a mistake: it would make as many names."""

_NUMBER = re.compile(r"(-?\d+)(\.0*)?", re.ASCII)

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
    """The rows of ``split``, in the manifest's order; without a column ``split`` all are train.

    A relative path is taken from ``root``, or else from the manifest's folder; ids are the paths
    as written. Files are images, or clips (video files, folders of extracted frames).
    ``label`` gives int64 ``[N]``, -1 where it is empty or -1; ``labels`` int64 ``[N, C]``, all 0
    where it is empty. If all labels are whole numbers, they count from class 0, and the classes
    are named by ``class_name`` or else by their numbers; if not, classes are sorted by the bytes
    of their names. The target is named after the file. Raises ``MissingData`` for files that
    are not there, ``InputError`` naming the line of what is wrong, ``UnknownName`` (split).
    """
    path, split, folder = Path(spec.target), spec.split, spec.folder
    table = _read(path)
    known = _splits(table)
    if split not in known:
        raise UnknownName(f"split of {path}", split, known)
    chosen = range(len(table.paths))
    rows = [row for row in chosen if table.splits is None or table.splits[row] == split]
    names, sizes, clips = _files(table, rows, folder)
    classes, index = _classes(table)
    return Target(
        path.stem,
        split,
        classes,
        _labels(table, rows, index, len(classes)),
        names,
        paths=Files(folder, names),
        sizes=sizes,
        decoder=spec.decoder if clips else "",
    )


def manifest_splits(path: Path) -> list[str]:
    """The splits that a manifest names, in its order; ``train`` if it has no such column."""
    return _splits(_read(path))


def _splits(table: _Table) -> list[str]:
    if table.splits is None:
        return ["train"]
    found = list(dict.fromkeys(table.splits))
    if "" in found:
        raise InputError(f"{table.at(table.splits.index(''))}: no split; name one in every row")
    return found


# --- files ------------------------------------------------------------------------------------


def _files(table: _Table, rows: Sequence[int], folder: Path) -> tuple[Names, Int64, bool]:
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


def _read(path: Path) -> _Table:
    read = _read_parquet if path.suffix.lower() == ".parquet" else _read_csv
    try:
        unit, numbers, columns = read(path)
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

    several = "labels" in columns
    return _Table(
        path,
        unit,
        numbers,
        cleaned("path", _path),
        cleaned("labels", _many) if several else cleaned("label", _one),
        cleaned("split", _text) if "split" in columns else None,
        cleaned("class_name", _text) if "class_name" in columns else None,
        several,
    )


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


def _many(value: object) -> Labels:
    parts = value if isinstance(value, tuple) else _text(value).split("|")
    texts = tuple(_text(part) for part in parts)
    if texts == ("",):
        return ()
    if "" in texts:
        raise ValueError(f"an empty name in {value!r}")
    return texts


def _check_columns(path: Path, found: list[str]) -> None:
    twice = len(set(found)) < len(found)
    if "path" not in found or ("label" in found) == ("labels" in found) or twice:
        raise InputError(f"{path} has the columns {found}; expected {MANIFEST_LAYOUT}")


def _read_csv(path: Path) -> tuple[str, list[int], Columns]:
    with path.open("rb") as start:
        if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{path} is UTF-16; save it as UTF-8")
    numbers: list[int] = []
    # Bytes that are no UTF-8 may belong to a file's name; elsewhere _text refuses them.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_columns(path, header)
            columns: Columns = {name: [] for name in header if name in COLUMNS}
            places = [(values, header.index(name)) for name, values in columns.items()]
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


def _read_parquet(path: Path) -> tuple[str, list[int], Columns]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingData("a Parquet manifest needs: pip install 'sskt[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(path, names)
            table = file.read(columns=[name for name in names if name in COLUMNS])
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} cannot be read as Parquet: {first_line(error)}") from error
    columns: Columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return "row", list(range(1, table.num_rows + 1)), columns
