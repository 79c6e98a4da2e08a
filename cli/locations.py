"""Where a command finds data and labels: options with defaults, and the line that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sskt.teacher_cache.locations import data_location, is_zip, label_location, require_folder
from sskt.teacher_cache.targets.registry import TARGETS, is_own

Command = Callable[..., Any]

CACHES = "a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
DEFAULT_LABELS = "Default: $SSKT_CACHE or $SSKT_LABELS, else ./labels."
DEFAULT_WRITABLE = "Default: $SSKT_CACHE, else ./labels."


def cache_option(about: str, *, writable: bool = False) -> Callable[[Command], Command]:
    """The option ``--cache`` of commands that need a cache to be there; announces its default.

    Args:
        about: What the help says of it, without the default.
        writable: Whether the command takes no label server.
    """

    def located(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
        return located_cache(value, writable=writable)

    default = DEFAULT_WRITABLE if writable else DEFAULT_LABELS
    return click.option("--cache", callback=located, help=f"{about} {default}")


def located_cache(given: str | None, *, writable: bool = False, make: bool = False) -> str:
    """The path or URL of a cache; says on standard error which one was taken by default.

    Args:
        given: The value of ``--cache``.
        writable: Whether the command takes no label server.
        make: Whether the command makes the cache if there is none.

    Raises:
        MissingData: If it is a folder that does not exist.
    """
    location = label_location(given, writable=writable)
    if not make and "://" not in location.value and not is_zip(location.value):
        require_folder(Path(location.value))
    if not given:
        click.echo(f"labels: {location}", err=True)
    return location.value


def data_line(target: str, root: object) -> str:
    """``data: data/ucf101 (default)``; empty if the folder was given or none is needed."""
    if root is not None or is_own(target) or target not in TARGETS or not TARGETS[target].markers:
        return ""
    return f"data: {data_location(target)}"
