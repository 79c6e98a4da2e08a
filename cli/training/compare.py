"""``sskt compare``: runs side by side, as a table, a figure and a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, print_json, print_table, show
from sskt.teacher_cache.errors import InputError

if TYPE_CHECKING:
    from sskt.trainer.results.compare import Comparison, Difference, Row, Spread

PNG, HTML, JSON = "compare.png", "compare.html", "compare.json"


@click.command(
    "compare",
    cls=GroupedCommand,
    examples=(
        "sskt compare runs/",
        "sskt compare runs/scratch runs/sskt --html compare.html",
    ),
)
@click.argument("run", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help=f"Folder for {PNG}, {HTML} and {JSON}.",
)
@click.option("--png", type=click.Path(path_type=Path), help="File for the curves.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="File for a self-contained page with table and curves.",
)
@as_json
def compare(
    run: tuple[Path, ...], out: Path | None, png: Path | None, html: Path | None, as_json: bool
) -> None:
    """Set runs side by side: accuracies, curves, and which differences exceed the spread.

    RUN is a run's folder or a folder of runs. Runs that differ only in --seed are summarised as
    mean ± standard deviation; differences are those to the first group (from scratch, if a
    folder holds such runs).
    """
    from sskt.trainer.results.compare import as_dict, find_runs
    from sskt.trainer.results.compare import compare as compare_runs

    runs, notes = find_runs(run)
    comparison = compare_runs(runs)
    for note in notes:
        show(note, err=True)
    for warning in comparison.warnings:
        show(f"warning: {warning}", err=True)
    if as_json:
        print_json(as_dict(comparison))
    else:
        _print(comparison)
    written = _write(comparison, png or (out and out / PNG), html or (out and out / HTML), out)
    if written:
        show(f"written: {', '.join(map(str, written))}", err=True)


def _write(
    comparison: Comparison, png: Path | None, html: Path | None, out: Path | None
) -> list[Path]:
    import json

    from sskt.teacher_cache.storage.atomic import durable_write
    from sskt.trainer.results.compare import as_dict
    from sskt.trainer.results.html import page
    from sskt.trainer.results.plots import draw_curves

    plain = out / JSON if out else None
    try:
        if png:
            draw_curves(comparison, png)
        if html:
            durable_write(html, page(comparison).encode())
        if plain:
            durable_write(plain, (json.dumps(as_dict(comparison), indent=2) + "\n").encode())
    except OSError as error:
        # Files are written beside themselves first: that name is no use to anyone.
        place = re.sub(r"\.[0-9a-f]{32}\.partial$", "", str(error.filename))
        raise InputError(f"cannot write {place}: {error.strerror}; choose another place") from error
    return [path for path in (png, html, plain) if path]


def _print(comparison: Comparison) -> None:
    from sskt.trainer.results.groups import METRICS

    main = comparison.metric
    keys = [key for key in METRICS if any(key in row.last for row in comparison.rows)]
    columns = ["group", "runs", "epochs"]
    for key in keys:
        columns.append(f"{METRICS[key]}, last")
        columns += [f"{METRICS[key]}, best"] if key == main else []
    columns += ["train top-1", "images/s", "label wait, %"]
    print_table(columns, [_row(row, keys, main) for row in comparison.rows])
    if comparison.differences and main:
        first = comparison.rows[0].name
        show(f"\n{METRICS[main]}, last epoch, in points against {first}:")
        rows = [_difference(one) for one in comparison.differences]
        print_table(["group", "difference", "standard error", ""], rows)


def _row(row: Row, keys: list[str], main: str | None) -> list[str]:
    unfinished = f" ({row.unfinished} unfinished)" if row.unfinished else ""
    cells = [row.name, f"{row.runs}{unfinished}", row.epochs]
    for key in keys:
        cells.append(_shown(row.last.get(key)))
        cells += [_shown(row.best.get(key))] if key == main else []
    speed = f"{row.images_per_second.mean:.0f}" if row.images_per_second else "-"
    wait = f"{row.label_wait.mean:.1f}" if row.label_wait else "-"
    return [*cells, _shown(row.train), speed, wait]


def _difference(one: Difference) -> list[str]:
    error = "-" if one.error is None else f"{one.error:.2f}"
    return [one.name, f"{one.points:+.2f}", error, one.verdict]


def _shown(spread: Spread | None) -> str:
    return "-" if spread is None else str(spread)
