"""Datasets of Hugging Face's ``datasets``: of the hub, saved to disk, or a folder of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData, first_line
from sskt.teacher_cache.targets.files.file_index import measure
from sskt.teacher_cache.targets.packed.parquet import holds_images
from sskt.teacher_cache.targets.packed.samples import (
    Packed,
    chosen_columns,
    find_split,
    one_column,
)
from sskt.teacher_cache.targets.registry import hub_name
from sskt.teacher_cache.targets.spec import DatasetSpec

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ArrowImages:
    """The image column of a dataset, which stays on disk and is mapped into memory."""

    column: Any
    name: str
    changed: tuple[int, int]

    def read(self, row: int) -> bytes:
        image = self.column[row : row + 1].column(0)[0].as_py()
        data: bytes = image["bytes"] if isinstance(image, dict) else image
        return data

    def stamp(self, row: int) -> tuple[int, int]:
        return self.changed

    def where(self, row: int) -> str:
        return f"row {row} of {self.name}"


def splits(spec: DatasetSpec) -> list[str]:
    """The splits of a ``hf:`` target."""
    return list(_open(spec))


def load(spec: DatasetSpec, progress: Progress) -> Packed:
    """The rows of a split in their order.

    Raises ``MissingData`` and ``InputError`` for a dataset that cannot be used.
    """
    found = _open(spec)
    where = f"--target {spec.target}"
    split = find_split(where, spec.split, found)
    dataset = found[split]
    named = chosen_columns(spec.columns)
    kinds = {field.name: field.type for field in dataset.features.arrow_schema}
    likely = [name for name, kind in kinds.items() if holds_images(kind)]
    image = one_column("image", where, list(kinds), likely, named)
    if image not in likely:
        seen = f"its column {image} is {kinds[image]}" if image else "it has none"
        raise InputError(
            f"{where}: expected a column of images, and {seen}; it has {', '.join(kinds)}; name "
            "it with --columns image=COLUMN"
        )
    class_names = {name: _class_names(dataset.features[name]) for name in kinds}
    usual = [name for name in ("label", "labels") if name in kinds]
    usual = usual or [name for name, names in class_names.items() if names]
    label = one_column("label", where, list(kinds), usual, named)
    images = dataset.select_columns([image]).with_format("arrow")
    names, sizes = _names_and_sizes(images, where, progress)
    labels = _values(dataset, label) if label else [None] * len(names)
    rest: Iterable[Any] = []
    if label and not class_names[label]:
        others = [each for name, each in found.items() if name != split]
        rest = [v for each in others if label in each.column_names for v in _values(each, label)]
    return Packed(
        ArrowImages(images, spec.target, _stamp(dataset)),
        names,
        (),
        sizes,
        labels,
        [*labels, *rest],
        class_names.get(label),
    )


def _open(spec: DatasetSpec) -> dict[str, Any]:
    import datasets

    name, configuration = hub_name(spec.target)
    folder = Path(name)
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        if saved:
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # a dozen kinds, of several libraries
        hint = "; a split is named with --split" if configuration else ""
        raise MissingData(
            f"--target {spec.target} cannot be opened: {first_line(error)}{hint}"
        ) from error
    if isinstance(found, datasets.Dataset):
        return {str(found.split or "train"): found}
    return dict(found)


def _stamp(dataset: Any) -> tuple[int, int]:
    """Bytes of all files of a dataset, and the time of the last change (ns)."""
    found = [measure(each["filename"]) for each in dataset.cache_files]
    return sum(size for size, _ in found), max((changed for _, changed in found), default=0)


def _class_names(feature: Any) -> list[str] | None:
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return list(names) if names else None


def _values(dataset: Any, column: str) -> list[Any]:
    table = dataset.select_columns([column]).with_format("arrow")
    return [value for part in table.iter(10_000) for value in part.column(0).to_pylist()]


def _names_and_sizes(images: Any, where: str, progress: Progress) -> tuple[list[str], Any]:
    from pyarrow import compute, types

    names: list[str] = []
    sizes: list[int] = []
    for part in images.iter(1_000):
        column = part.column(0).combine_chunks()
        data = column
        if types.is_struct(column.type):
            data = compute.struct_field(column, "bytes")
            names += [path or "" for path in compute.struct_field(column, "path").to_pylist()]
        else:
            names += [""] * len(column)
        if data.null_count:
            row = len(sizes) + data.is_null().to_pylist().index(True)
            raise InputError(
                f"{where}: row {row} has no bytes, only the path of a file, which is not opened; "
                "give the folder of the files itself, or embed them with save_to_disk"
            )
        sizes += compute.binary_length(data).to_pylist()
        progress(len(sizes), len(images))
    return names, np.array(sizes, np.int64)
