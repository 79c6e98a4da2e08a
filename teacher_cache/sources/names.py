"""``--source`` arguments: known names, the user's own networks, sizes and digests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sskt.teacher_cache.errors import InputError, UnknownName

SOURCES: dict[str, tuple[int, str]] = {
    "imagenet": (
        1000,
        "torchvision's ImageNet classifiers; efficientnet_lite0; timm/ARCH with sskt[timm]",
    ),
    "places365": (365, "CSAIL's Places365 checkpoints: alexnet, densenet161, resnet18, resnet50"),
}
"""Known sources: number of classes, and what can be had under the name."""

DEFAULT_ARCH = "resnet50"
TIMM = "timm/"
NETWORK_FILES = (".pt", ".pth", ".torchscript", ".ts", ".pt2")
"""Suffixes of files that may be torch.export programs. The content of a file decides."""

OWN = "NAME=FILE.py:factory, NAME=package.module:factory, NAME=FILE.pt2, NAME:timm/ARCH"


@dataclass(frozen=True)
class SourceName:
    """``NAME[:ARCH][@SIZE]``, or a user's own network, with ``#DIGEST`` for reading.

    Own networks: ``NAME=FILE.py:factory`` and ``NAME=package.module:factory`` (``module``),
    ``NAME=FILE.pt2`` (a torch.export file: ``file`` without ``factory``), ``NAME:timm/ARCH``.
    """

    name: str
    arch: str | None = None
    file: Path | None = None
    factory: str = ""
    size: int | None = None
    digest: str = ""
    module: str = ""

    @property
    def recorded_arch(self) -> str | None:
        """The ``arch`` a label set's spec carries; None if the user left it open."""
        if self.module:
            return f"{self.module}:{self.factory}"
        if self.file is not None:
            return f"{self.file.stem}:{self.factory}" if self.factory else self.file.name
        return (
            self.arch.split("_Weights")[0].lower()
            if self.arch and "_Weights." in self.arch
            else self.arch
        )


def parse_source(text: str, *, stored: bool = False) -> SourceName:
    """Reads a ``--source`` argument; to read ``stored`` labels, any name may be given.

    Raises:
        UnknownName: If there is no such source.
        InputError: If the text has none of the forms of ``SourceName``.
    """
    body, _, digest = text.partition("#")
    body, size = _split_size(body)
    name, is_own, place = body.partition("=")
    if is_own:
        return _own(text, name, place, size, digest)
    name, _, arch = body.partition(":")
    if name not in SOURCES and not stored:
        if not arch.startswith(TIMM):
            raise UnknownName("source", name, SOURCES, f"or your own network as {OWN}")
        _check_name(text, name)
    return SourceName(name, arch or None, None, "", size, digest)


def _own(text: str, name: str, place: str, size: int | None, digest: str) -> SourceName:
    if place.endswith(NETWORK_FILES) and name:
        _check_name(text, name)
        return SourceName(name, None, Path(place), "", size, digest)
    where, _, factory = place.rpartition(":")
    is_module = bool(re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", where))
    is_file = where.endswith(".py")
    if where.endswith(NETWORK_FILES) or not name or not (is_file or is_module):
        raise InputError(f"--source {text}: expected {OWN}")
    if not factory.isidentifier():
        raise InputError(f"--source {text}: expected {OWN}")
    _check_name(text, name)
    if is_file:
        return SourceName(name, None, Path(where), factory, size, digest)
    return SourceName(name, None, None, factory, size, digest, where)


def _check_name(text: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "primary":
        what = "a source's name has letters, digits, - and _ (and is not 'primary')"
        raise InputError(f"--source {text}: {what}")


def _split_size(text: str) -> tuple[str, int | None]:
    body, at, size = text.rpartition("@")
    if not at or "/" in size or ":" in size:
        return text, None
    if not (size.isascii() and size.isdigit()) or int(size) < 1:
        raise InputError(f"--source {text}: expected a size in pixels after @, found '{size}'")
    return body, int(size)


def source_name(text: str) -> str:
    """``imagenet`` of ``imagenet:resnet50@74``; ``tiny`` of ``tiny=FILE.py:build``."""
    return re.split("[:=@#]", text, maxsplit=1)[0]
