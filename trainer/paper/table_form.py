"""Whether what a recipe of a table holds has the form of one, before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sskt.teacher_cache.errors import InputError


def require_form(read: Mapping[str, Any], where: str) -> None:
    """Raises ``InputError`` naming the first key that is not what a table's recipe has there.

    ``read``: the TOML, keys with ``_``. Fields of ``TrainConfig`` are not looked at.
    """
    rows = read.get("row")
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise InputError(f"{where}: expected row = [...], one {{ ... }} for each row of the paper")
    notes = read.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(text, str) for text in notes):
        raise InputError(f"{where}: notes must be a list of texts, found {notes!r}")
    for key in ("sources", "needs"):
        _require_texts(read.get(key, {}), f"{where}: {key}")
    on = _require_table(read.get("on", {}), f"{where}: on")
    for target, fields in on.items():
        own = _require_table(fields, f"{where}: on.{target}")
        _require_texts(own.get("sources", {}), f"{where}: on.{target}.sources")
    for number, row in enumerate(rows, 1):
        _require_row({k.replace("-", "_"): v for k, v in row.items()}, f"{where}, row {number}")


def _require_row(row: Mapping[str, Any], where: str) -> None:
    if type(row.get("reported")) not in (int, float):
        raise InputError(f"{where}: expected a target and reported = a number in %")
    if type(row.get("reported_std", 0.0)) not in (int, float):
        found = row["reported_std"]
        raise InputError(f"{where}: reported-std must be a number in %, found {found!r}")
    sources, name = row.get("sources", []), row.get("name", "")
    if not isinstance(sources, list) or not all(isinstance(s, str) for s in sources):
        raise InputError(f"{where}: sources must be a list of letters, found {sources!r}")
    if not isinstance(name, str) or "/" in name or name in (".", ".."):
        raise InputError(f"{where}: name must be one that a folder can have, found {name!r}")


def _require_table(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a table, found {value!r}")
    return value


def _require_texts(value: Any, what: str) -> None:
    if not all(isinstance(text, str) for text in _require_table(value, what).values()):
        raise InputError(f"{what} must be a table of texts, found {value!r}")
