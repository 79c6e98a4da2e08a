"""``sskt rm``: removing label sets, or the labels of some view seeds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.locations import CACHES, cache_option
from sskt.cli.output import as_json, human_bytes, print_json, print_table, resumable, show
from sskt.teacher_cache.errors import InputError

if TYPE_CHECKING:
    from sskt.teacher_cache.tools.remove import Removable


@click.command(
    "rm",
    cls=GroupedCommand,
    examples=(
        "sskt rm stl10",
        "sskt rm b900af --seeds 8-9 --yes",
    ),
)
@cache_option(f"Cache of the label sets: {CACHES}.", writable=True)
@click.argument("sets", nargs=-1, required=True, metavar="SET...")
@click.option(
    "--seeds", metavar="0,3-5", help="View seeds whose labels to delete. Default: the whole sets."
)
@click.option("--yes", is_flag=True, help="Delete without asking.")
@as_json
def rm(cache: str, sets: tuple[str, ...], seeds: str | None, yes: bool, as_json: bool) -> None:
    """Remove label sets: those whose name contains, or whose digest starts with, SET.

    Shows what would go and asks. A set that another process of this machine is writing to is
    refused; in an object store that cannot be seen. With --seeds the sets stay, and
    cache-teachers labels those seeds again; without its last seeds a set is that much shorter.
    """
    from sskt.teacher_cache.storage.open import is_served, open_cache
    from sskt.teacher_cache.tools.remove import removable, remove_label_set

    if is_served(cache):
        open_cache(cache, make=True)  # refuses before anybody is asked
    found = removable(cache, sets)
    numbers = None if seeds is None else _numbers(seeds)
    if numbers is not None:
        _require_seeds(found, numbers)
    if not yes:
        if as_json or not sys.stdin.isatty():
            names = ", ".join(r.name for r in found)
            raise InputError(f"would remove {names}; not a terminal, so pass --yes to confirm")
        _print_removable(found)
        what = f"{len(found)} label sets" if numbers is None else f"seeds {seeds} of them"
        if not click.confirm(f"Remove {what}?", err=True):
            raise click.Abort()
    with resumable("removed shards stay removed, and the others are whole"):
        for r in found:
            remove_label_set(r.cache, r.name, numbers)
    if as_json:
        print_json([r.about() | {"seeds": numbers} for r in found])
        return
    for r in found:
        size = f" ({human_bytes(r.bytes)})" if numbers is None else f": seeds {seeds}"
        show(f"removed {r.name}{size}")


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
