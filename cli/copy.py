"""``sskt copy``, ``rm``, ``export``: what may be done with label sets besides making them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from sskt.cli.cache_teachers import error_text
from sskt.cli.locations import cache_option
from sskt.cli.output import as_json, human_bytes, print_json, print_table, progress
from sskt.teacher_cache.errors import InputError

if TYPE_CHECKING:
    from sskt.teacher_cache.tools.remove import Removable

PLACES = "a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"


@click.command("copy")
@click.argument("source", metavar="SRC")
@click.argument("to", metavar="DST")
@click.argument("sets", nargs=-1, metavar="[SET]...")
@as_json
def copy(source: str, to: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Copy label sets from one cache to another, byte for byte.

    Each cache is a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX; SRC
    may also be a label server, http://HOST:PORT. SET is a part of a name or the begin of a
    digest; all sets without it. What is there already is compared, what is written is checked.
    Stop it anywhere: the same command copies the rest.
    """
    from sskt.teacher_cache.label_sets.find import choose_sets
    from sskt.teacher_cache.tools.copy import copy_label_set

    done = []
    with resumable("what is copied stays"), progress() as bar:
        for label_set in choose_sets(source, sets):
            done.append(copy_label_set(label_set, to, bar(label_set.name)))
    if as_json:
        print_json([dataclasses.asdict(c) for c in done])
        return
    for c in done:
        said = f"{c.name}: {c.written:,} shards copied ({human_bytes(c.bytes)})"
        click.echo(f"{said}, {c.reused:,} were there already{_partly(c.coverage)}")


@click.command("rm")
@cache_option(f"Cache of the label sets: {PLACES}.", writable=True)
@click.argument("sets", nargs=-1, required=True, metavar="SET...")
@click.option("--seeds", metavar="0,3-5", help="Only the labels of these view seeds.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json
def rm(cache: str, sets: tuple[str, ...], seeds: str | None, yes: bool, as_json: bool) -> None:
    """Remove label sets: those whose name contains, or whose digest starts with, SET.

    Shows what would go and asks. A set that another process of this machine is writing to is
    refused; in an object store that cannot be seen. With --seeds the sets stay, and
    cache-teachers labels those seeds again.
    """
    from sskt.teacher_cache.storage.open import (
        is_served,
        open_cache,
    )
    from sskt.teacher_cache.tools.remove import (
        removable,
        remove_label_set,
    )

    if is_served(cache):
        open_cache(cache, make=True)  # refuses before anybody is asked
    found = removable(cache, sets)
    numbers = None if seeds is None else _numbers(seeds)
    if numbers is not None:
        _require_seeds(found, numbers)
    if not yes:
        if as_json or not sys.stdin.isatty():
            names = ", ".join(r.name for r in found)
            raise InputError(f"would remove {names}; there is nobody to ask: add --yes")
        _print_removable(found)
        what = f"{len(found)} label sets" if numbers is None else f"seeds {seeds} of them"
        if not click.confirm(f"Remove {what}?", err=True):
            raise click.Abort()
    with resumable("what is gone is gone, what is left is whole shards"):
        for r in found:
            remove_label_set(r.cache, r.name, numbers)
    if as_json:
        print_json([r.about() | {"seeds": numbers} for r in found])
        return
    for r in found:
        size = f" ({human_bytes(r.bytes)})" if numbers is None else f": seeds {seeds}"
        click.echo(f"removed {r.name}{size}")


def _numbers(text: str) -> list[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            begin, end = int(first), int(last or first)
        except ValueError:
            begin, end = 0, -1
        if not 0 <= begin <= end:
            raise InputError(f"--seeds {text}: expected numbers and ranges such as 0,3-5")
        found |= set(range(begin, end + 1))
    return sorted(found)


def _require_seeds(found: list[Removable], seeds: list[int]) -> None:
    for r in found:
        if r.coverage is None:
            raise InputError(f"{r.fault}; remove the whole set")
        if seeds[-1] >= len(r.coverage):
            raise InputError(
                f"label set {r.name} has seeds 0 to {len(r.coverage) - 1}, found {seeds[-1]}"
            )


def _print_removable(found: list[Removable]) -> None:
    rows = []
    for r in found:
        whole = sum(c == 1.0 for c in r.coverage or [])
        state = "damaged" if r.coverage is None else f"{whole}/{len(r.coverage)}"
        rows.append([r.name, state, human_bytes(r.bytes)])
    print_table([f"label set in {found[0].cache}", "seeds", "size"], rows)


@click.command("export")
@cache_option(f"Cache of the label set: {PLACES}.")
@click.argument("label_set", metavar="SET")
@click.option("--encoding", required=True, metavar="f16|u8|topk-K", help="The new encoding.")
@click.option("--out", required=True, help="Cache for the new label set; may be the same one.")
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
    said = f"{done.name}: {done.written:,} shards written, {done.reused:,} were there already"
    click.echo(f"{said}{_partly(done.coverage)}")
    sizes = f"{human_bytes(chosen[0].stored_bytes())} as {chosen[0].encoding}"
    click.echo(f"{sizes}, {human_bytes(done.bytes)} as {wanted}")
    click.echo(f"gradient error relative to the stored labels: {error_text(done.error)}")


def _partly(coverage: list[float]) -> str:
    lacking = sum(c < 1.0 for c in coverage)
    return f"; {lacking} of {len(coverage)} seeds are not whole at the source" if lacking else ""


@contextmanager
def resumable(state: str) -> Iterator[None]:
    """Says at Ctrl-C what has become of the work."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{state}; run the same command again for the rest") from None
