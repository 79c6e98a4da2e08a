"""Identity of a label set: its spec, the canonical JSON of it, and the digest that names it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sskt.teacher_cache.errors import CorruptStore, SpecMismatch
from sskt.teacher_cache.format.encodings import Encoding
from sskt.teacher_cache.format.names import LONGEST_NAME

if TYPE_CHECKING:
    from sskt.teacher_cache.sources.source import Source
    from sskt.teacher_cache.views.views import Views

FORMAT = 1
"""Version of the on-disk format (docs/format.md)."""

Spec = dict[str, Any]


TOLERANCE = {"float32": 0.005, "bfloat16": 0.05}
"""Largest distance between labels of two machines, by the source's precision: total variation, or
the relative error of features and logits."""


def tolerance_of(spec: Mapping[str, Any]) -> float:
    """How far labels that another machine recomputes may differ."""
    return TOLERANCE[spec["source"].get("precision", "float32")]


def label_set_spec(views: Views, source: Source, encoding: Encoding) -> Spec:
    """Everything that a label depends on; two runs with equal specs make the same labels."""
    return {
        "format": FORMAT,
        "target": views.target.identity(),
        "source": source.identity(),
        "views": views.identity(),
        "encoding": encoding.identity(),
        **({"output": source.output.identity()} if source.output else {}),
    }


def width_of(spec: Mapping[str, Any]) -> int:
    """Entries of a decoded row: C, or D of features."""
    return int(spec.get("output", {}).get("width", spec["source"]["classes"]["count"]))


def classes_identity(classes: Sequence[str]) -> dict[str, Any]:
    """The part of a label set's spec that names the source's classes."""
    names = "\n".join(classes).encode()
    return {"count": len(classes), "sha256": f"sha256:{hashlib.sha256(names).hexdigest()}"}


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def canonical_json(spec: Mapping[str, Any]) -> str:
    """Keys sorted, no white space, ASCII only."""
    return _CANONICAL.encode(spec)


def digest_of(spec: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(spec).encode()).hexdigest()


def name_of(spec: Mapping[str, Any]) -> str:
    """Folder name of a label set: readable parts, then 12 digits of the digest."""
    target, source = spec["target"], spec["source"]
    parts = (f"{target['name']}-{target['split']}", f"{source['name']}-{source['arch']}")
    safe = [re.sub(r"[^A-Za-z0-9_-]+", "-", part) for part in parts]
    name = ".".join([*safe, digest_of(spec)[:12]])
    if len(name) <= LONGEST_NAME:
        return name
    cut = (LONGEST_NAME - 14) // 2
    return ".".join([*(part[:cut] for part in safe), digest_of(spec)[:12]])


def parents_of(spec: Mapping[str, Any]) -> dict[str, float]:
    """The label sets whose weighted mean a label set is.

    Args:
        spec: Its identity.

    Returns:
        The weight of each, by digest; empty for the labels of a network.

    Raises:
        CorruptStore: If the spec's are none.
    """
    try:
        listed = spec["source"].get("parents", [])
        found = {one["digest"]: one["weight"] for one in listed}
        sound = len(found) == len(listed) and all(
            re.fullmatch("[0-9a-f]{64}", digest) and isinstance(weight, float) and 0 < weight <= 1
            for digest, weight in found.items()
        )
        seeds = spec["source"].get("seeds", 1)
        if sound and isinstance(seeds, int) and seeds > 0:
            return found
    except (KeyError, TypeError, AttributeError):
        pass
    raise CorruptStore("a label set's spec does not say of which label sets it is the mean")


def first_difference(
    expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """First field of ``expected`` that ``found`` has otherwise: (dotted name, expected, found).

    Fields that ``expected`` does not state are not compared.
    """
    for key, value in expected.items():
        other = found.get(key)
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            deeper = first_difference(value, other, f"{name}.")
            if deeper:
                return deeper
            extra = sorted(set(other) - set(value)) if key == "parameters" else []
            if extra:
                return f"{name}.{extra[0]}", None, other[extra[0]]
        elif value != other:
            return name, value, other
    return None


def require(expected: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raises ``SpecMismatch`` with the first differing field and both values."""
    difference = first_difference(expected, found)
    if difference:
        field, want, have = difference
        raise SpecMismatch(
            f"label set {where} was made for something else: {field} is {have!r}, "
            f"expected {want!r}; cache labels for this configuration, or train with that one"
        )
