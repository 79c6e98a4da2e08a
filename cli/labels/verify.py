"""``sskt verify``: checking label sets."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.labels.label_set_options import (
    REOPENED,
    cache_option,
    reopen_options,
    sets_argument,
)
from sskt.cli.output import as_json, counted, print_json, progress, show


@click.command(
    "verify",
    cls=GroupedCommand,
    groups={
        "Checks": ("cache", "count", "tolerance", "bind"),
        "What the labels were made from": REOPENED,
    },
    examples=(
        "sskt verify stl10 --recompute 64",
        "sskt verify --recompute 64 --source tiny=tiny.py:build",
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
    help="Compare N labels with the live source; those of a mean with its parents in --cache.",
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
@reopen_options
@as_json
def verify(
    cache: str,
    sets: tuple[str, ...],
    count: int,
    tolerance: float | None,
    bind: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Check label sets: every checksum, every row, coverage; with --recompute also the labels.

    Only --bind changes anything: it adds the records of shards that have none, and none to a
    damaged shard. A shard is bound to the place where it is: check a set that may be mixed up with
    --recompute first.

    Exit status 1 if anything is wrong or missing.
    """
    from sskt.teacher_cache.errors import SsktError
    from sskt.teacher_cache.format.spec import parents_of
    from sskt.teacher_cache.label_sets.find import choose_all
    from sskt.teacher_cache.tools import verify as checks
    from sskt.teacher_cache.tools.mean import recompute_mean
    from sskt.teacher_cache.tools.reopen import Reopen, require_named_sources

    chosen, damaged = choose_all(cache, sets)
    instead = Reopen(**given)
    require_named_sources(instead, chosen)
    reports = []
    with progress() as bar:
        for label_set in chosen:
            step = bar(f"shards of {label_set.spec['source']['name']}")
            report = checks.bind(cache, label_set, step) if bind else checks.verify(label_set, step)
            if count:
                step = bar(f"recomputing {label_set.spec['source']['name']}")
                try:
                    if parents_of(label_set.spec):
                        report = recompute_mean(
                            label_set, cache, count, report, tolerance=tolerance, progress=step
                        )
                    else:
                        from sskt.teacher_cache.tools.recompute import recompute

                        report = recompute(
                            label_set,
                            count,
                            report,
                            instead=instead,
                            tolerance=tolerance,
                            progress=step,
                        )
                except SsktError as error:
                    if len(chosen) + len(damaged) == 1:
                        raise
                    report.problems.append(f"its labels were not recomputed: {error}")
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
        said = f"{r.name}: {counted(r.shards, 'shard')}, {counted(r.rows, 'row')}"
        if r.skipped:
            said += f", {r.skipped} skipped"
        if r.recomputed:
            said += f", {r.recomputed} recomputed (worst distance {r.worst_distance:.2e})"
        show(said + (f": {counted(len(r.problems), 'problem')}" if r.problems else ": clean"))
        if r.unbound:
            show(
                f"  not bound to their places: {counted(r.unbound, 'shard')}; one in the place of "
                "another would not be noticed; sskt verify --bind adds their records"
            )
        for problem in r.problems[:20]:
            show(f"  {problem}")
        if len(r.problems) > 20:
            show(f"  and {len(r.problems) - 20} more (--json lists them)")
