"""Parquet files with the bytes of images: columns image {bytes, path} or binary, and label."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData, first_line
from sskt.teacher_cache.targets.base import Int64
from sskt.teacher_cache.targets.files.file_index import measure
from sskt.teacher_cache.targets.packed.samples import Packed, chosen_columns, one_column
from sskt.teacher_cache.targets.packed.shards import names_of, read_shards, shards_of
from sskt.teacher_cache.targets.spec import DatasetSpec

ENDINGS = (".parquet",)
MOST_GROUP_BYTES = 64 << 20
"""A row group is read whole for one of its images. Larger ones are refused."""
KEPT_GROUPS = 4
_FORMAT = 1  # to be raised where a file is scanned otherwise

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ParquetImages:
    """The images of Parquet files, by file, row group and row in it."""

    paths: tuple[Path, ...]
    column: str
    file: Int64
    group: Int64
    place: Int64
    _kept: dict[tuple[int, int, int], Any] = field(default_factory=dict, compare=False)

    def read(self, row: int) -> bytes:
        # Not across a fork: the threads of Arrow do not survive it.
        key = os.getpid(), int(self.file[row]), int(self.group[row])
        images = self._kept.get(key)
        if images is None:
            path = self.paths[key[1]]
            try:
                images = _images(path, self.column, [key[2]])
            except OSError as error:
                raise MissingData(f"cannot read {path}: {first_line(error)}") from error
            while len(self._kept) >= KEPT_GROUPS:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[key] = images
        data: bytes = images[int(self.place[row])].as_py()
        return data

    def stamp(self, row: int) -> tuple[int, int]:
        return measure(self.paths[int(self.file[row])])

    def where(self, row: int) -> str:
        row_of = f"row group {self.group[row]}, row {self.place[row]}"
        return f"{self.paths[int(self.file[row])]}, {row_of}"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": {}}


def splits(spec: DatasetSpec) -> list[str]:
    """The splits of a ``parquet:`` target."""
    return list(shards_of(spec, ENDINGS))


def load(spec: DatasetSpec, progress: Progress) -> Packed:
    """The samples of a split in the order of the files and of their rows.

    Raises ``MissingData`` and ``InputError`` for files that cannot be used.
    """
    shards = shards_of(spec, ENDINGS)
    columns = chosen_columns(spec.columns)
    first = next(iter(shards.values()))[0]
    image, label, class_names = _columns(first, columns)
    scan = partial(_scan, image=image, label=label)
    kind = f"parquet{_FORMAT}-{image}-{label}".replace("/", "_")
    paths, texts, others = read_shards(spec, shards, kind, scan, progress)
    found = [json.loads(text) for text in texts]

    def joined(key: str) -> list[Any]:
        return [value for each in found for value in each[key]]

    groups = [
        (file, group, rows)
        for file, each in enumerate(found)
        for group, rows in enumerate(each["groups"])
    ]
    counts = [rows for _, _, rows in groups]
    store = ParquetImages(
        tuple(path.absolute() for path in paths),
        image,
        np.repeat([file for file, _, _ in groups], counts),
        np.repeat([group for _, group, _ in groups], counts),
        np.concatenate([np.arange(rows) for rows in counts] or [np.zeros(0, np.int64)]),
    )
    labels = joined("labels")
    rest = (value for text in others for value in json.loads(text)["labels"])
    return Packed(
        store,
        joined("names"),
        names_of(paths, [len(each["names"]) for each in found]),
        np.array(joined("sizes"), np.int64),
        labels,
        [*labels, *rest],
        class_names,
    )


def _opened(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, memory_map=True)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


def holds_images(kind: Any) -> bool:
    """Whether a type of Arrow may hold files of images: bytes, or {bytes, path}."""
    from pyarrow import types

    if types.is_struct(kind):
        inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return "bytes" in inner and holds_images(inner["bytes"])
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _columns(path: Path, named: dict[str, str]) -> tuple[str, str, Sequence[str] | None]:
    """The columns of image and label (may be empty), and names of classes."""
    with _opened(path) as file:
        schema = file.schema_arrow
    where, names = str(path), schema.names
    likely = [name for name in names if holds_images(schema.field(name).type)]
    image = one_column("image", where, names, likely, named)
    if image not in likely:
        found = f"its column {image} is {schema.field(image).type}" if image else "it has none"
        raise InputError(
            f"{where}: expected a column of the bytes of images, and {found}; it has "
            f"{', '.join(names)}; name it with --columns image=COLUMN (for a column of file names "
            "give the file itself as a manifest)"
        )
    usual = [name for name in ("label", "labels") if name in names]
    label = one_column("label", where, names, usual, named)
    return image, label, _class_names(schema, label)


def _class_names(schema: Any, label: str) -> Sequence[str] | None:
    """The names that Hugging Face's ``datasets`` writes beside the columns."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[label]
        names = (feature.get("feature") or feature)["names"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else None


def _images(path: Path, column: str, groups: list[int]) -> Any:
    """The bytes of the images of row groups, as an array of Arrow."""
    import pyarrow
    from pyarrow import compute, types

    try:
        with _opened(path) as file:
            table = file.read_row_groups(groups, columns=[column], use_threads=False)
    except (pyarrow.ArrowException, IndexError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}; get it again") from error
    images = table.column(column).combine_chunks()
    return compute.struct_field(images, "bytes") if types.is_struct(images.type) else images


def _scan(path: Path, image: str, label: str) -> str:
    """The rows of a file as JSON: names, sizes, labels, and the rows of each row group."""
    import pyarrow
    from pyarrow import compute, types

    names: list[str] = []
    sizes: list[int] = []
    labels: list[Any] = []
    groups: list[int] = []
    with _opened(path) as file:
        have = file.schema_arrow.names
        for wanted in filter(None, (image, label)):
            if wanted not in have:
                raise InputError(f"{path} has no column {wanted}, as others have; it has {have}")
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_groups(
                    [group], columns=[c for c in (image, label) if c], use_threads=False
                )
            except pyarrow.ArrowException as error:
                raise InputError(f"{path} is damaged: {first_line(error)}; get it again") from error
            column = table.column(image).combine_chunks()
            struct = types.is_struct(column.type)
            data = compute.struct_field(column, "bytes") if struct else column
            _check_group(path, group, data, column.nbytes)
            inner = [column.type.field(i).name for i in range(column.type.num_fields)]
            named = struct and "path" in inner
            paths = compute.struct_field(column, "path").to_pylist() if named else [""] * len(data)
            names += [path or "" for path in paths]
            sizes += compute.binary_length(data).to_pylist()
            labels += table.column(label).to_pylist() if label else [None] * len(data)
            groups.append(len(data))
    try:
        return json.dumps({"names": names, "sizes": sizes, "labels": labels, "groups": groups})
    except TypeError as error:
        raise InputError(
            f"{path}: the column {label} holds no names or numbers of classes; name another with "
            "--columns label=COLUMN"
        ) from error


def _check_group(path: Path, group: int, data: Any, nbytes: int) -> None:
    if data.null_count:
        row = data.is_null().to_pylist().index(True)
        raise InputError(
            f"{path}: row {row} of row group {group} has no bytes; a file that only its path names "
            "is not opened: embed the images, or take a manifest"
        )
    if nbytes > MOST_GROUP_BYTES:
        raise InputError(
            f"{path}: row group {group} has {nbytes >> 20:,} MiB, which would be read for each of "
            f"its images; write the file with fewer rows in a group (at most "
            f"{MOST_GROUP_BYTES >> 20} MiB), or open the folder as hf:FOLDER, which unpacks it once"
        )
