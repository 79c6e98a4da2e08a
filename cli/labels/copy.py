"""``sskt copy``: label sets from one cache to another."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, human_bytes, partly, print_json, progress, resumable, show

if TYPE_CHECKING:
    pass


@click.command(
    "copy",
    cls=GroupedCommand,
    examples=(
        "sskt copy labels /fast/labels",
        "sskt copy http://labels:8080 labels stl10",
    ),
)
@click.argument("source", metavar="SRC")
@click.argument("to", metavar="DST")
@click.argument("sets", nargs=-1, metavar="[SET]...")
@as_json
def copy(source: str, to: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Copy label sets from one cache to another, byte for byte.

    Each cache is a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX; SRC
    may also be a label server, http://HOST:PORT. SET is a part of a name or the begin of a
    digest; all sets without it. Stored shards are compared, and written ones are checked.
    Stop it anywhere: the same command copies the rest.
    """
    from sskt.teacher_cache.label_sets.find import choose_sets
    from sskt.teacher_cache.locations import warn_of_plain_http
    from sskt.teacher_cache.tools.copy import copy_label_set

    warn_of_plain_http(source)
    done = []
    with resumable("what is copied stays"), progress() as bar:
        for label_set in choose_sets(source, sets):
            done.append(copy_label_set(label_set, to, bar(label_set.name)))
    if as_json:
        print_json([dataclasses.asdict(c) for c in done])
        return
    for c in done:
        said = f"{c.name}: {c.written:,} shards copied ({human_bytes(c.bytes)})"
        show(f"{said}, {c.reused:,} reused{partly(c.coverage)}")
