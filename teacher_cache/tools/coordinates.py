"""Checking the arrays of a label set that have no shards: its coordinates and its head."""

from __future__ import annotations

import json

from sskt.teacher_cache.errors import CorruptStore
from sskt.teacher_cache.format.coordinates import (
    CLASS,
    CONSOLIDATED,
    LISTED,
    SAMPLE,
    SEED,
    consolidated,
    read_coordinate,
    stored_names,
)
from sskt.teacher_cache.format.metadata import GROUP
from sskt.teacher_cache.label_sets.documents import described
from sskt.teacher_cache.label_sets.label_set import LabelSet


def coordinate_problems(label_set: LabelSet) -> list[str]:
    """Compares the coordinates and the head of a label set with its metadata.

    Args:
        label_set: The label set.

    Returns:
        What is damaged or contradicts the set, in words.
    """
    found = []
    for name in label_set.coordinates:
        try:
            found += [f"{name}: {why}" for why in _problems(label_set, name)]
        except (OSError, ValueError, KeyError, TypeError, RecursionError, CorruptStore) as error:
            found.append(f"{name}: the names cannot be read ({error})")
    try:
        _ = label_set.head
    except CorruptStore as error:
        found.append(str(error))
    return found


def repetition_problems(label_set: LabelSet) -> list[str]:
    """Compares what a label set's group repeats with the metadata of the arrays.

    Args:
        label_set: The label set.

    Returns:
        What is wrong, in words.
    """
    try:
        repeated = json.loads(label_set.storage.read(GROUP)).get(CONSOLIDATED)
        if repeated is None and LISTED not in label_set.attributes:
            return []
        if label_set.coordinates and repeated is not None:
            expected = repeated["metadata"] | described(label_set)
            if repeated == consolidated(expected):
                return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError, CorruptStore) as error:
        return [f"the metadata of its arrays cannot be read ({error})"]
    return [
        f"{GROUP} does not repeat the metadata of the arrays, so that other tools read another "
        "set; sskt verify --bind repeats it"
    ]


def _problems(label_set: LabelSet, name: str) -> list[str]:
    """What is wrong with one coordinate. Raises as ``read_coordinate``."""
    length = {SEED: label_set.seeds, SAMPLE: label_set.samples, CLASS: len(label_set.classes)}
    found = read_coordinate(label_set.storage.read, name, length[name])
    if name == SAMPLE:
        return ["two samples have the same name"] * (len(set(found)) < len(found))
    expected = {SEED: [*range(label_set.seeds)], CLASS: stored_names(label_set.classes)}
    return ["the names are not those of the set"] * (found != expected[name])
