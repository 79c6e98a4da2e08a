"""``sskt copy``: label sets from one cache to another."""

from __future__ import annotations

import dataclasses

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import (
    as_json,
    counted,
    human_bytes,
    partly,
    print_json,
    progress,
    resumable,
    show,
)
from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.locations import is_zip


@click.command(
    "copy",
    cls=GroupedCommand,
    examples=(
        "sskt copy http://labels:8080 labels stl10",
        "sskt copy labels public stl10 --publish",
    ),
)
@click.argument("source", metavar="SRC")
@click.argument("to", metavar="DST")
@click.argument("sets", nargs=-1, metavar="[SET]...")
@click.option(
    "--publish",
    is_flag=True,
    help="Write files.json into each copy, by which it opens from a plain web host by its URL.",
)
@as_json
def copy(source: str, to: str, sets: tuple[str, ...], publish: bool, as_json: bool) -> None:
    """Copy label sets from one cache to another, byte for byte.

    Each cache is a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or a
    FILE.zip, which holds one set; SRC may also be a label server, http://HOST:PORT, or a published
    set, https://HOST/PATH/SET. SET is a part of a name or the begin of a digest; all sets without
    it. Stored shards are compared, and written ones are checked. Stop it anywhere: the same
    command copies the rest (a zip file is begun anew).
    """
    from sskt.teacher_cache.label_sets.create import open_label_set
    from sskt.teacher_cache.label_sets.find import choose_sets
    from sskt.teacher_cache.locations import warn_of_plain_http
    from sskt.teacher_cache.storage.open import open_cache
    from sskt.teacher_cache.tools.copy import copy_label_set
    from sskt.teacher_cache.tools.publish import write_index

    warn_of_plain_http(source)
    done, chosen = [], choose_sets(source, sets)
    if is_zip(to) and (publish or len(chosen) > 1):
        names = ", ".join(label_set.name for label_set in chosen)
        raise InputError(
            f"{to} holds one label set and no list of files; name one of {names}, without --publish"
        )
    with resumable("what is copied stays"), progress() as bar:
        for label_set in chosen:
            done.append(copy_label_set(label_set, to, bar(label_set.name)))
            if publish:
                write_index(open_label_set(open_cache(to).below(label_set.name)))
    if as_json:
        print_json([dataclasses.asdict(c) for c in done])
        return
    for c in done:
        said = f"{c.name}: {counted(c.written, 'shard')} copied ({human_bytes(c.bytes)})"
        show(f"{said}, {c.reused:,} reused{partly(c.coverage)}")
