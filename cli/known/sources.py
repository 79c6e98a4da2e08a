"""``sskt sources``: the known sources."""

from __future__ import annotations

from typing import Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, print_json

OWN_NETWORKS = (
    "your own (they are programs: open only what you trust):",
    "  NAME=FILE.py:factory or NAME=package.module:factory, a function without arguments that",
    "    returns a torch Module; beside it SIZE, MEAN, STD (where needed CHANNELS, SCALE, CLASSES)",
    "  NAME=FILE.pt2 (torch.export), with FILE.pt2.json beside it, or --preprocessing",
    "  NAME:timm/ARCH for timm networks with other classes",
)


@click.command(
    "sources",
    cls=GroupedCommand,
    examples=(
        "sskt sources",
        "sskt sources --json",
    ),
)
@as_json
def sources(as_json: bool) -> None:
    """List the known sources and their architectures."""
    from sskt.teacher_cache.sources.registry import (
        CSAIL_SHA256,
        DEFAULT_ARCH,
        SOURCES,
        imagenet_archs,
    )

    archs = {"imagenet": imagenet_archs(), "places365": list(CSAIL_SHA256)}
    known: list[dict[str, Any]] = [
        {"name": n, "classes": count, "about": about, "default": DEFAULT_ARCH, "archs": archs[n]}
        for n, (count, about) in SOURCES.items()
    ]
    if as_json:
        print_json(known)
        return
    for source in known:
        click.echo(f"{source['name']}: {source['classes']} classes; {source['about']}")
        click.echo(f"  default {source['default']}; {', '.join(source['archs'])}")
    for line in OWN_NETWORKS:
        click.echo(line)
