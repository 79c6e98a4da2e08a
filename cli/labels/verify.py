"""``sskt verify``: checking label sets."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.labels.label_set_options import (
    cache_option,
    device_option,
    root_option,
    sets_argument,
    target_option,
)
from sskt.cli.output import as_json, print_json, progress
from sskt.teacher_cache.errors import InputError


@click.command(
    "verify",
    cls=GroupedCommand,
    examples=(
        "sskt verify",
        "sskt verify stl10 --recompute 64",
    ),
)
@cache_option
@sets_argument
@click.option(
    "--recompute",
    "count",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Compare N labels with the live source.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Allowed total variation distance; default 0.005, 0.05 for bfloat16 sources.",
)
@click.option(
    "--bind",
    is_flag=True,
    help="Bind the shards of sets of older versions to their places, after the check.",
)
@click.option("--source", help="Source to open instead of the recorded one (one set only).")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Its weights, if not the recorded file."
)
@root_option
@target_option
@device_option
@as_json
def verify(
    cache: str,
    sets: tuple[str, ...],
    count: int,
    tolerance: float | None,
    bind: bool,
    source: str | None,
    weights: Path | None,
    root: Path | None,
    target: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Check label sets: every checksum, every row, coverage; with --recompute also the labels.

    Only --bind changes anything: it adds the records of shards that have none, and none to a
    damaged shard. A shard is bound to the place where it is: check a set that may be mixed up with
    --recompute first.

    Exit status 1 if anything is wrong or missing.
    """
    from sskt.teacher_cache.label_sets.find import choose_all
    from sskt.teacher_cache.tools import verify as checks

    chosen, damaged = choose_all(cache, sets)
    if source and len(chosen) > 1:
        raise InputError(f"--source goes with one label set, found {len(chosen)}; name it")
    instead = checks.Reopen(target, root, source, weights, device)
    reports = []
    with progress() as bar:
        for label_set in chosen:
            step = bar(f"shards of {label_set.spec['source']['name']}")
            report = checks.bind(cache, label_set, step) if bind else checks.verify(label_set, step)
            if count:
                step = bar(f"recomputing {label_set.spec['source']['name']}")
                report = checks.recompute(
                    label_set, count, report, instead=instead, tolerance=tolerance, progress=step
                )
            reports.append(report)
    reports += [checks.Report(name, problems=[str(e)]) for name, e in damaged.items()]
    if as_json:
        print_json([dataclasses.asdict(r) for r in reports])
    else:
        _print_reports(reports)
    if any(r.problems for r in reports):
        sys.exit(1)


def _print_reports(reports: list[Any]) -> None:
    for r in reports:
        said = f"{r.name}: {r.shards} shards, {r.rows:,} rows"
        if r.skipped:
            said += f", {r.skipped} skipped"
        if r.recomputed:
            said += f", {r.recomputed} recomputed (worst distance {r.worst_distance:.2e})"
        click.echo(said + (": clean" if not r.problems else f": {len(r.problems)} problems"))
        if r.unbound:
            click.echo(
                f"  {r.unbound} shards are not bound to their places: one in the place of another "
                "would not be noticed; sskt verify --bind adds their records"
            )
        for problem in r.problems[:20]:
            click.echo(f"  {problem}")
        if len(r.problems) > 20:
            click.echo(f"  and {len(r.problems) - 20} more (--json lists them)")
