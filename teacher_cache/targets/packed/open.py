"""Opens packed files as a target."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.media.images import begins_like_an_image
from sskt.teacher_cache.targets.base import Names, Target
from sskt.teacher_cache.targets.packed.samples import PackedImages, ids_of, truth_of
from sskt.teacher_cache.targets.registry import own_name
from sskt.teacher_cache.targets.spec import DatasetSpec

_FOLDER = "sskt.teacher_cache.targets.packed"
_MODULES = {
    "hf": f"{_FOLDER}.hugging_face",
    "wds": f"{_FOLDER}.web_dataset",
    "parquet": f"{_FOLDER}.parquet",
}
_log = logging.getLogger("sskt")

Progress = Callable[[int, int], None]


def packed_splits(spec: DatasetSpec) -> list[str]:
    """The names of the splits of packed files."""
    found: list[str] = _module(spec).splits(spec)
    return found


def open_packed(spec: DatasetSpec, progress: Progress = lambda done, total: None) -> Target:
    """Opens a split of packed files, in their order.

    Args:
        spec: The dataset; ``target`` is ``hf:NAME_OR_PATH[:CONFIGURATION]``, ``wds:PATH`` or
            ``parquet:PATH``.
        progress: Called with the number of files scanned, and of all.

    Returns:
        The target. Its images are read and decoded when they are needed.

    Raises:
        MissingData: If there are no such files.
        InputError: If they cannot be used.
        UnknownName: If they have no such split.
    """
    packed = _module(spec).load(spec, progress)
    where = f"--target {spec.target}"
    if not len(packed.sizes):
        raise InputError(f"{where}: split {spec.split} has no samples; choose another split")
    if not begins_like_an_image(packed.store.read(0)[:12]):
        raise InputError(
            f"{where}: {packed.store.where(0)} is no image of a known format; name the column, or "
            "the extension of the members, with --columns image=NAME"
        )
    classes, labels = truth_of(packed, where)
    if not classes:
        _log.warning(
            "%s has no labels, so its samples can be labelled by sources and not trained on; name "
            "them with --columns label=NAME",
            spec.target,
        )
    return Target(
        own_name(spec.target),
        spec.split,
        classes,
        labels,
        Names(ids_of(packed)),
        sizes=packed.sizes,
        reader=PackedImages(packed.store, np.arange(len(packed.sizes))),
    )


def hash_packed(target: Target, progress: Progress = lambda done, total: None) -> str:
    """``sha256:...`` over the ordered ids and the SHA-256 of the bytes of each image."""
    reader = target.reader
    assert isinstance(reader, PackedImages)
    digest = hashlib.sha256()
    for sample, name in enumerate(target.ids):
        line = f"{name}\0{hashlib.sha256(reader.data(sample)).hexdigest()}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
        progress(sample + 1, len(target))
    return f"sha256:{digest.hexdigest()}"


def _module(spec: DatasetSpec) -> Any:
    return importlib.import_module(_MODULES[spec.target.partition(":")[0]])
