"""Removing label sets, or the labels of some of their seeds."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from sskt.teacher_cache.errors import CorruptStore, InputError, MissingData
from sskt.teacher_cache.format.coordinates import SEED, resized
from sskt.teacher_cache.format.metadata import GROUP, to_json
from sskt.teacher_cache.format.shards import RECORD_ENDING
from sskt.teacher_cache.label_sets.create import open_label_set
from sskt.teacher_cache.label_sets.documents import consolidate, lacks_group
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.atomic import durable_rename
from sskt.teacher_cache.storage.base import METADATA, SWEEP, CacheName, Storage
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.open import open_cache

_NAME = re.compile(r".+\..+\.[0-9a-f]{12}")


@dataclass(frozen=True)
class Removable:
    """A label set that could be removed; ``coverage`` is None if it is damaged."""

    cache: Storage
    name: str
    coverage: list[float] | None
    bytes: int
    fault: str = ""

    def about(self) -> dict[str, Any]:
        """For people and programs."""
        return {"name": self.name, "coverage": self.coverage, "bytes": self.bytes}


def removable(cache: CacheName, wanted: Sequence[str]) -> list[Removable]:
    """Sets whose name contains, or whose digest starts with, one of ``wanted``; damaged ones too.

    Raises ``MissingData`` naming what fits nothing.
    """
    home = open_cache(cache)
    names = home.folders()
    chosen = [n for n in names if any(w in n or w.startswith(n[-12:]) for w in wanted)]
    found = [r for r in (_look(home, name) for name in chosen) if r is not None]
    for w in wanted:
        if not any(w in r.name or w.startswith(r.name[-12:]) for r in found):
            raise MissingData(f"no label set in {home} matches {w}; sskt ls lists the label sets")
    return found


def _look(home: Storage, name: str) -> Removable | None:
    storage = home.below(name)
    try:
        label_set = open_label_set(storage)
    except (CorruptStore, MissingData) as error:
        # A killed creation in a bucket has arrays only; a folder of another kind is none of ours.
        ours = storage.size(GROUP) is not None or lacks_group(storage) or not storage.is_local
        if not ours or not _NAME.fullmatch(name):
            return None
        return Removable(home, name, None, sum(storage.sizes().values()), str(error))
    return Removable(home, name, label_set.coverage(), label_set.stored_bytes())


def remove_label_set(cache: CacheName, name: str, seeds: Sequence[int] | None = None) -> None:
    """Removes a set, or the stored shards of some of its seeds.

    The other seeds keep their numbers. If the last seeds are removed, the set has fewer seeds.

    A killed removal never leaves what looks whole: a folder is renamed away first; in a bucket,
    and for seeds, what commits the shards goes first. Raises ``InputError`` if another process
    is writing to the set (in a bucket that cannot be seen).
    """
    home = open_cache(cache)
    storage = home.below(name)
    with closing(home.locks(name)) as locks:
        if not (locks.acquire(METADATA) and locks.acquire(SWEEP)):
            raise InputError(
                f"label set {name} is in use by another process (sskt cache-teachers, copy or "
                "export); let it end or stop it first"
            )
        if seeds is not None:
            label_set = open_label_set(storage)
            shards = list(label_set.shards(seeds))
            last_first = (reversed(label_set.shard_keys(shard)) for shard in shards)
            for together in zip(*last_first, strict=True):
                storage.delete(together)
            _shorten(label_set, set(seeds))
        elif isinstance(storage, LocalStorage):
            if storage.path.is_symlink():
                raise InputError(f"{storage} is a link; remove it, or what it names, yourself")
            gone = storage.path.with_name(f".{name}.{uuid.uuid4().hex}.partial")
            try:
                durable_rename(storage.path, gone)
                shutil.rmtree(gone)
            except OSError as error:
                raise InputError(f"cannot remove {storage}: {error.strerror}") from error
        else:
            steps: list[list[str]] = [[], [], [], []]
            for key in storage.sizes():
                steps[_order(key)].append(key)
            for keys in steps:
                storage.delete(keys)
        if isinstance(home, LocalStorage):
            home.sweep()


def _shorten(label_set: LabelSet, removed: set[int]) -> None:
    """Lowers the length of the arrays by the removed seeds at their end, to one seed at least."""
    last = label_set.seeds
    while last > 1 and last - 1 in removed:
        last -= 1

    def cut(data: bytes) -> bytes | None:
        document = json.loads(data)
        if document["shape"][0] <= last:
            return None
        return to_json(resized(document, last))

    if last < label_set.seeds:
        seeds = [SEED] if SEED in label_set.coordinates else []
        # view_check first, which says how many seeds there are
        for array in [*label_set.arrays, *seeds]:
            label_set.storage.update(f"{array}/{GROUP}", cut)
        consolidate(label_set)


def _order(key: str) -> int:
    """What goes first: what commits shards, other shards, the group's metadata, the rest."""
    if "/c/" in key:
        return 0 if key.startswith(("labels/", "value/")) or key.endswith(RECORD_ENDING) else 1
    return 2 if key == GROUP else 3
