"""Tables, progress and JSON, the same in every command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sskt.teacher_cache.errors import printable

Step = Callable[[int, int], None]

_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?( ?(B|[KMGT]iB|%|s|min|h))?|\d+/\d+")

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2))


def show(text: str = "", *, err: bool = False) -> None:
    """Prints text in which names and messages from elsewhere cannot control the terminal.

    Args:
        text: A line to print; line breaks at its beginning are empty lines before it.
        err: Print on standard error instead of standard output.
    """
    line = text.lstrip("\n")
    click.echo("\n" * (len(text) - len(line)) + printable(line), err=err)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on standard output.

    Cells are broken between words only, and the first column, which names the row, is never
    broken. Where the terminal is too narrow for that, each row is printed as a block of lines.
    Elsewhere than in a terminal the table is as wide as it needs.
    """
    console = Console(highlight=False)
    widest = _widest(columns, rows)
    if not console.is_terminal or _width(widest) <= console.width:
        _print_lines(console, columns, rows, widest)
        return
    narrowest = [
        max((_longest_word(text) for text in (column, *(row[i] for row in rows))), default=1)
        for i, column in enumerate(columns)
    ]
    narrowest[0] = max((len(row[0]) for row in rows), default=1)
    if _width(narrowest) > console.width:
        _print_blocks(console, columns, rows)
        return
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(
            column,
            justify="right" if _of_numbers(rows, i) else "left",
            no_wrap=i == 0,
            min_width=narrowest[i],
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())


def _print_lines(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
) -> None:
    """Prints a table in which no cell is broken; Rich takes twenty times as long for it."""
    numbers = [_of_numbers(rows, i) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for cell, width, number in zip(cells, widths, numbers, strict=True):
            text = printable(cell)
            space = " " * (width - cell_len(text))
            padded.append(space + text if number else text + space)
        return "  ".join(padded).rstrip()

    console.print(Text(line(columns), "table.header"), soft_wrap=True)
    for row in rows:
        click.echo(line(row))


def _of_numbers(rows: Sequence[Sequence[str]], column: int) -> bool:
    return bool(rows) and all(_is_number(row[column]) for row in rows)


def _print_blocks(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    width = max(map(len, columns))
    for row in rows:
        lines = [printable(row[0])]
        lines += [
            f"  {name:<{width}}  {printable(cell)}"
            for name, cell in zip(columns[1:], row[1:], strict=True)
        ]
        console.print(Text("\n".join(lines)), soft_wrap=True)


def _widest(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        max(cell_len(printable(text)) for text in (c, *(row[i] for row in rows)))
        for i, c in enumerate(columns)
    ]


def _width(widths: Sequence[int]) -> int:
    """Characters of a line of a table whose columns have these widths."""
    return sum(widths) + 2 * (len(widths) - 1)


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _is_number(text: str) -> bool:
    return text in ("", "-") or bool(_NUMBER.fullmatch(text))


_shown: list[Console] = []
"""Consoles of the progress bars that are shown now."""


def say(text: str) -> None:
    """Prints a line on standard error, above the progress bars if there are any."""
    if _shown:
        _shown[-1].print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        click.echo(text, err=True)


@contextmanager
def progress() -> Iterator[Callable[[str], Step]]:
    """Bars on standard error: ``bar(name)`` gives a function of (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def bar(name: str) -> Step:
            task = None

            def step(done: int, total: int) -> None:
                nonlocal task
                if task is None:
                    task = bars.add_task(name, total=total)
                bars.update(task, completed=done, total=total)

            return step

        _shown.append(console)
        try:
            yield bar
        finally:
            _shown.remove(console)


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on standard error, for work without a count."""
    with Console(stderr=True).status(text):
        yield


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def error_text(error: dict[str, Any] | None) -> str:
    """The measured encoding error in words."""
    from sskt.teacher_cache.format import encodings

    return encodings.error_text(error)


def input_line(how: dict[str, Any]) -> str:
    """How a source's images are prepared: ``96x96 rgb, scale 1, mean ..., std ...``."""
    size = f"{how['size']}x{how['size']} {how['channels']}"
    mean, std = (" ".join(f"{x:.4g}" for x in how[key]) for key in ("mean", "std"))
    return f"{size}, scale {how['scale']:g}, mean {mean}, std {std}"


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things: ``1 shard``, ``1,200 shards``; ``many`` where -s makes no plural."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def partly(coverage: list[float]) -> str:
    """How many seeds of a copied or exported label set are not whole; empty if all are."""
    lacking = sum(c < 1.0 for c in coverage)
    return f"; {lacking} of {len(coverage)} seeds are not whole at the source" if lacking else ""


@contextmanager
def resumable(state: str) -> Iterator[None]:
    """Says at Ctrl-C what has become of the work."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{state}; run the same command again for the rest") from None
