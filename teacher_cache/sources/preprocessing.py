"""What a user declares of a network: its preprocessing, and the names of its classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.sources.known_networks import imagenet_classes, places365_classes
from sskt.teacher_cache.sources.names import SOURCES, SourceName
from sskt.teacher_cache.sources.source import Preprocessing

FIELDS = ("size", "mean", "std", "channels", "scale")
NEEDED = ("mean", "std", "size")


def override_preprocessing(base: Preprocessing, text: str) -> Preprocessing:
    """Reads ``--preprocessing``.

    Args:
        base: The preprocessing of the network.
        text: ``size=227,channels=bgr,scale=255,mean=104/117/123,std=1/1/1``; a single number for
            mean or std stands for all three channels.

    Returns:
        ``base`` with the fields that ``text`` names.

    Raises:
        UnknownName: If a field is not known.
        InputError: If a value cannot be used.
    """
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in FIELDS:
            raise UnknownName("preprocessing field", key, FIELDS)
        try:
            base = replace(base, **{key: _field(key, value)})
        except (ValueError, InputError):
            raise InputError(f"--preprocessing {key}: cannot use '{value}'") from None
    return base


def _field(key: str, value: str) -> Any:
    if key in ("mean", "std"):
        numbers = tuple(float(x) for x in value.split("/"))
        return numbers * 3 if len(numbers) == 1 else numbers
    if key == "channels":
        return value
    return int(value) if key == "size" else float(value)


def undeclared(given: Iterable[str], wanted: SourceName, text: str) -> list[str]:
    """Which of size, mean and std are missing in ``given``, --preprocessing and @SIZE."""
    known = {*given, *(item.partition("=")[0] for item in text.split(","))}
    known |= {"size"} if wanted.size is not None else set()
    return [key for key in NEEDED if key not in known]


def class_names(
    wanted: SourceName, count: int, names: Sequence[Any] | None, what: str
) -> tuple[str, ...]:
    """Names of a network's classes.

    Args:
        wanted: The source.
        count: Number of the network's outputs.
        names: Names that the user gave.
        what: Where they were given, for messages.

    Returns:
        ``names``; if there are none, those of a known source with as many classes, else
        ``class 0``, ``class 1`` and so on.

    Raises:
        InputError: If there are not ``count`` names.
    """
    if names is None and wanted.name in SOURCES and count == SOURCES[wanted.name][0]:
        names = places365_classes() if wanted.name == "places365" else imagenet_classes()
    if names is None:
        return tuple(f"class {i}" for i in range(count))
    if len(names) != count:
        raise InputError(
            f"source {wanted.name}: {what} has {len(names)} names, the network {count} outputs"
        )
    return tuple(str(name) for name in names)
