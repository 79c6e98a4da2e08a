"""Finding the label set that a training needs, and refusing all others by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sskt.teacher_cache.errors import (
    CorruptStore,
    IncompleteLabels,
    InputError,
    MissingData,
    SpecMismatch,
)
from sskt.teacher_cache.format.spec import Spec, digest_of, first_difference, name_of
from sskt.teacher_cache.label_sets.create import Damaged, look_over
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard, seed_ranges
from sskt.teacher_cache.sources.names import SourceName
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.storage.http.storage import HttpStorage
from sskt.teacher_cache.storage.open import is_served, open_cache

if TYPE_CHECKING:
    from sskt.teacher_cache.views.views import Views

_DIGEST = re.compile(r".+\.[0-9a-f]{12}")
"""Names that end in the digest of a label set. A folder that was renamed need not have one."""


def choose_sets(cache: CacheName, wanted: Sequence[str]) -> list[LabelSet]:
    """Label sets whose name contains, or whose digest starts with, one of ``wanted`` (all if none).

    Raises ``MissingData`` if nothing fits, ``CorruptStore`` if what fits is damaged.
    """
    fitting, damaged = choose_all(cache, wanted)
    for error in damaged.values():
        raise CorruptStore(f"{error}; name other label sets to go on without it") from error
    return fitting


def choose_all(cache: CacheName, wanted: Sequence[str]) -> tuple[list[LabelSet], Damaged]:
    """As ``choose_sets``, but returns why damaged label sets cannot be read beside the others."""

    def named(name: str) -> bool:
        return not wanted or any(w in name or name[-12:].startswith(w[:12]) for w in wanted)

    sets, damaged = look_over(cache, lambda name: named(name) or not _DIGEST.fullmatch(name))
    fitting = [
        s for s in sets if not wanted or any(w in s.name or s.digest.startswith(w) for w in wanted)
    ]
    broken = {name: error for name, error in damaged.items() if named(name)}
    if not fitting and not broken:
        home = open_cache(cache)
        names = home.folders()
        hint = f"; there are: {', '.join(names)}" if names else ""
        if not names and home.is_local:
            hint = "; if labels were stored there, check that its file system is mounted"
        if any("/" in text for text in wanted):
            hint = "; a folder or URL is given with --cache"
        what = f"matches {' or '.join(wanted)}" if wanted else "is there"
        raise MissingData(f"no label set in {cache} {what}{hint}")
    return fitting, broken


def readable_sets(
    cache: CacheName, target: Mapping[str, Any], wanted: Sequence[SourceName] | None
) -> list[LabelSet]:
    """The label sets of a target.

    Args:
        cache: Where the label sets are.
        target: Fields of the target's identity; sets that differ in one are left out.
        wanted: Sources that matter; None for all.

    Raises:
        MissingData: If the cache is a folder that does not exist.
        CorruptStore: If a set that cannot be read may be one of those wanted.
    """
    sources: Sequence[SourceName | None] = wanted or [None]

    def could_be(name: str) -> list[SourceName | None]:
        return [source for source in sources if _could_be(name, source, target)]

    # A label set that was renamed is found by what it holds, and passed over if it is damaged.
    sets, damaged = look_over(cache, lambda n: bool(could_be(n)) or not _DIGEST.fullmatch(n))
    for name, error in damaged.items():
        for source in could_be(name):
            raise CorruptStore(
                f"{error}; it may be the label set that is wanted: remove it (sskt rm) and "
                f"cache it again, or name another one with --source "
                f"{source.name if source else 'NAME'}#DIGEST"
            ) from error
    return [s for s in sets if first_difference(target, s.spec["target"]) is None]


def find_label_set(cache: CacheName, source: SourceName, views: Views) -> LabelSet | None:
    """The label set of a source over exactly these samples and views (any f_s).

    Returns:
        The set; None if there is none.

    Raises:
        InputError: If several sets fit.
        CorruptStore: If a set that cannot be read may be the one wanted.
    """
    expected: Spec = {"target": views.target.identity(), "views": replayed(views.identity())}
    fitting = [
        s
        for s in readable_sets(cache, expected["target"], [source])
        if is_of(s, source) and first_difference(expected, s.spec) is None
    ]
    return only(source.name, fitting) if fitting else None


def only(name: str, sets: Sequence[LabelSet]) -> LabelSet:
    """The one label set of a source. Raises ``InputError`` if there are several."""
    if len(sets) > 1:
        found = ", ".join(
            f"{s.digest[:12]} ({s.encoding}, {s.spec['source']['arch']})" for s in sets
        )
        raise InputError(
            f"several label sets of source {name} fit: {found}; choose one with "
            f"--source {name}#DIGEST"
        )
    return sets[0]


def find_alike(cache: CacheName, label_set: LabelSet, views: Views) -> LabelSet | None:
    """Finds labels of other views that are made as those of a label set are.

    Args:
        cache: Where to look.
        label_set: A label set.
        views: A target under a policy.

    Returns:
        The label set over ``views`` with the same source, encoding and f_s; None if there is none.

    Raises:
        CorruptStore: If there is one, and it is damaged.
    """
    spec = label_set.spec
    seen = views.identity() | {"f_s": spec["views"]["f_s"]}
    wanted = spec | {"target": views.target.identity(), "views": seen}
    name = name_of(wanted)
    sets, damaged = look_over(cache, lambda n: n == name or not _DIGEST.fullmatch(n))
    if error := damaged.get(name):
        raise CorruptStore(f"{error}; remove it (sskt rm) and cache it again") from error
    digest = digest_of(wanted)
    return next((s for s in sets if s.digest == digest), None)


def replayed(views: Spec) -> Spec:
    """The part of a views' identity that the trainer replays: all but f_s."""
    return {key: value for key, value in views.items() if key != "f_s"}


def is_of(label_set: LabelSet, source: SourceName) -> bool:
    """Whether a label set is of this source, as far as the source was described."""
    spec = label_set.spec["source"]
    size = spec.get("preprocessing", {}).get("size")  # a mean of label sets has none
    return (
        spec["name"] == source.name
        and source.recorded_arch in (None, spec["arch"])
        and source.size in (None, size)
        and label_set.digest.startswith(source.digest)
    )


def _could_be(name: str, source: SourceName | None, target: Mapping[str, Any]) -> bool:
    """Whether a label set, judged by its folder's name, may be a wanted one."""
    readable, _, digest = name.rpartition(".")
    if not _DIGEST.fullmatch(name):
        return False
    arch = source.recorded_arch if source else None
    parts = {
        "target": target,
        "source": {"name": source.name if source else "", "arch": arch or ""},
    }
    wanted = name_of(parts).rpartition(".")[0]
    if source is None:
        return readable.startswith(wanted.removesuffix("-"))
    same = readable == wanted if arch else readable.startswith(wanted)
    return same and digest.startswith(source.digest[:12])


def require_seeds(label_set: LabelSet, seeds: int, *, ask: bool = True) -> None:
    """Raises ``IncompleteLabels`` naming the seeds of ``0 .. seeds - 1`` that are not whole.

    A label server that computes on demand is asked for them (unless ``ask`` is False); reading
    waits until they are there.
    """
    beyond = range(label_set.seeds, seeds)
    lacking = sorted(
        {s.seed for s in label_set.missing(range(min(seeds, label_set.seeds)))} | set(beyond)
    )
    if lacking and is_served(label_set.storage):
        from sskt.teacher_cache.label_sets.find import compute_on_demand

        if compute_on_demand(label_set, lacking, ask=ask):
            return
    if lacking:
        raise IncompleteLabels(
            f"label set {label_set.name} lacks {seed_ranges(lacking)} of {seeds}; run sskt "
            f"cache-teachers again with --seeds {seeds}, or train with fewer: --seeds N"
        )


def same_views(sets: Sequence[LabelSet]) -> None:
    """Raises ``SpecMismatch`` unless all sets are over the same target and views."""
    for other in sets[1:]:
        first = sets[0].spec
        expected = {"target": first["target"], "views": replayed(first["views"])}
        difference = first_difference(expected, other.spec)
        if difference:
            raise SpecMismatch(
                f"label sets {sets[0].name} and {other.name} differ in {difference[0]} "
                f"({difference[1]!r}, {difference[2]!r}); name one of them"
            )


def shard_name(shard: Shard) -> str:
    """For messages."""
    return f"seed {shard.seed}, samples {shard.start} to {shard.stop - 1}"


def compute_on_demand(label_set: LabelSet, seeds: list[int], *, ask: bool = True) -> bool:
    """Has a label server compute ``seeds``, of which something is missing; False if none would.

    The set then has as many seeds as were asked for. Without ``ask``, only whether one would.
    Raises ``InputError``, ``SsktError``.
    """
    storage = label_set.storage
    if not isinstance(storage, HttpStorage) or not storage.computes():
        return False
    if ask:
        storage.compute(seeds)
        label_set.seeds = max(label_set.seeds, *(seed + 1 for seed in seeds))
    return True
