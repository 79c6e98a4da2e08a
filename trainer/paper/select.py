"""Which rows of a table, or graphs of a figure, a user asks for. No torch here."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.paper.tables import PaperTable, Row


def select_rows(
    table: PaperTable, selectors: Sequence[str], panels: Sequence[str] = ()
) -> list[Row]:
    """The chosen rows of a table, in its order.

    Args:
        table: a table or a figure of the paper.
        selectors: rows by number (``3``, ``2-5``) or name (with ``*``); all if empty.
        panels: graphs of a figure by number from 1 or name (with ``*``); all if empty.

    Returns:
        The rows that are chosen by one of ``selectors`` and lie in one of ``panels``.

    Raises:
        UnknownName: for a selector that chooses nothing.
        InputError: if panels are chosen of a table, or no row is left.
    """
    names = {row.number: row.name for row in table.rows}
    chosen = _select(names, selectors, f"row of {table.name}", "or a pattern such as *-tm-*")
    rows = [row for row in table.rows if row.number in chosen]
    if not panels:
        return rows
    titles = dict(enumerate(dict.fromkeys(row.panel for row in table.rows if row.panel), 1))
    if not titles:
        raise InputError(f"--panel {panels[0]}: {table.name} has rows, no panels; use --row")
    numbers = _select(titles, panels, f"panel of {table.name}", "or a pattern such as *KD*")
    rows = [row for row in rows if row.panel in {titles[number] for number in numbers}]
    if not rows:
        raise InputError(f"no row chosen by --row {selectors[0]} lies in panel {panels[0]}")
    return rows


def _select(names: Mapping[int, str], selectors: Sequence[str], what: str, hint: str) -> set[int]:
    chosen: set[int] = set()
    for selector in selectors:
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", selector)
        if span:
            wanted = range(int(span[1]), int(span[2] or span[1]) + 1)
            found = {number for number in names if number in wanted}
        else:
            pattern = selector.lower()
            found = {n for n, name in names.items() if fnmatch.fnmatchcase(name.lower(), pattern)}
        if not found:
            raise UnknownName(what, selector, [f"{n} {name}" for n, name in names.items()], hint)
        chosen |= found
    return chosen if selectors else set(names)
