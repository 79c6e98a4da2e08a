"""Publishing label sets on a plain web host, which lists nothing: the list of their files."""

from __future__ import annotations

from sskt.teacher_cache.format.metadata import GROUP, to_json
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.http.published import INDEX, PublishedStorage, parse_index


def write_index(label_set: LabelSet) -> None:
    """Writes the list of a label set's files beside them (docs/format.md, section 1).

    Args:
        label_set: The label set, in a storage that can be written to.
    """
    label_set.storage.put(INDEX, to_json({"files": _files(label_set)}))


def index_problems(label_set: LabelSet) -> list[str]:
    """Compares the list of a label set's files, if it has one, with the files.

    Args:
        label_set: The label set.

    Returns:
        What is wrong, in words.
    """
    storage = label_set.storage
    if isinstance(storage, PublishedStorage) or storage.size(INDEX) is None:
        return []
    try:
        if parse_index(storage.read(INDEX)) == _files(label_set):
            return []
        why = "does not list the files as they are"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"cannot be read ({error})"
    return [f"{INDEX} {why}; sskt copy --publish writes it anew"]


def _files(label_set: LabelSet) -> dict[str, int]:
    """The sizes of the files of a label set by key: its metadata and its stored shards."""
    sizes = label_set.storage.sizes()
    keys = [GROUP, *(f"{array}/{GROUP}" for array in label_set.arrays)]
    keys += label_set.constant_keys()
    label_set.refresh()
    for shard in label_set.shards(range(label_set.seeds)):
        if label_set.has(shard):
            keys += label_set.shard_keys(shard)
    return {key: sizes[key] for key in keys if key in sizes}
