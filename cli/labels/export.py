"""``sskt export``: a label set in a smaller encoding, without its source."""

from __future__ import annotations

import dataclasses

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.locations import CACHES, cache_option
from sskt.cli.output import (
    as_json,
    error_text,
    human_bytes,
    partly,
    print_json,
    progress,
    resumable,
    show,
)
from sskt.teacher_cache.errors import InputError


@click.command(
    "export",
    cls=GroupedCommand,
    examples=(
        "sskt export stl10 --encoding u8",
        "sskt export b900af --encoding topk-16 --out small",
    ),
)
@cache_option(f"Cache of the label set: {CACHES}.")
@click.argument("label_set", metavar="SET")
@click.option("--encoding", required=True, metavar="NAME", help="The new encoding.")
@click.option("--out", required=True, help="Cache of the new label set; it may be the same one.")
@as_json
def export(cache: str, label_set: str, encoding: str, out: str, as_json: bool) -> None:
    """Store a label set once more in a smaller encoding, without its source.

    The new set is of the same source, target and views, and trains like any other. Its error is
    measured against the stored labels. From f32 it is what cache-teachers --encoding would have
    written. Stop it anywhere: the same command exports the rest.
    """
    from sskt.teacher_cache.format.encodings import parse_encoding
    from sskt.teacher_cache.label_sets.find import choose_sets
    from sskt.teacher_cache.tools.export import export_label_set

    wanted = parse_encoding(encoding)
    chosen = choose_sets(cache, [label_set])
    if len(chosen) > 1:
        names = ", ".join(s.name for s in chosen)
        raise InputError(f"{label_set} fits several label sets ({names}); name one of them")
    with resumable("what is exported stays"), progress() as bar:
        done = export_label_set(chosen[0], wanted, out, bar("shards"))
    if as_json:
        print_json(dataclasses.asdict(done) | {"exported_from": chosen[0].digest})
        return
    said = f"{done.name}: {done.written:,} shards written, {done.reused:,} reused"
    show(f"{said}{partly(done.coverage)}")
    sizes = f"{human_bytes(chosen[0].stored_bytes())} as {chosen[0].encoding}"
    show(f"{sizes}, {human_bytes(done.bytes)} as {wanted}")
    show(f"gradient error relative to the stored labels: {error_text(done.error)}")
