"""Recipes: TOML files that ship with sskt, or a user's own. No torch here."""

from __future__ import annotations

import importlib.resources
import tomllib
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData

Recipe = dict[str, Any]
COMMANDS = {
    "training": "train --recipe",
    "sweep": "sweep",
    "table": "reproduce",
    "figure": "reproduce",
}
"""The kinds of recipes, and the command that reads each."""


def load_recipe(name: str | Path, kind: str) -> Recipe:
    """A recipe that ships, by its name, or a TOML file.

    Raises ``MissingData`` with those of the ``kind`` that ship, and as ``parse_recipe``.
    """
    path = Path(name)
    named = path.name == str(name) and not path.suffix and not path.is_file()
    file = _folder().joinpath(f"{name}.toml") if named else path
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        known = ", ".join(shipped(kind))
        which = f"shipped recipes: {known}" if known else f"give a TOML file, as no {kind} ships"
        raise MissingData(f"cannot read recipe {name}: {error.strerror}; {which}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {name} is not TOML: {error}") from error
    return parse_recipe(text, str(name), kind)


def parse_recipe(text: str, name: str, kind: str) -> Recipe:
    """The content of a recipe. Raises ``InputError``: no TOML, or of another kind."""
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {name} is not TOML: {error}") from error
    found = _kind(recipe)
    # A recipe of no other kind may be a bad one of the kind that is read.
    if found != "training" and COMMANDS[found] != COMMANDS[kind]:
        raise InputError(f"recipe {name} is a {found}: sskt {COMMANDS[found]} {name}")
    return recipe


def shipped(kind: str) -> list[str]:
    """Names of the recipes that ship and that the command of a kind reads."""
    files = [file for file in _folder().iterdir() if file.name.endswith(".toml")]
    recipes = {file.name.removesuffix(".toml"): file.read_text("utf-8") for file in files}
    found = {name: COMMANDS[_kind(tomllib.loads(text))] for name, text in recipes.items()}
    return sorted(name for name, command in found.items() if command == COMMANDS[kind])


def _kind(recipe: Recipe) -> str:
    if "row" in recipe:
        return "table"
    if "figure" in recipe:
        return "figure"
    return "sweep" if "panel" in recipe or "sweep" in recipe else "training"


def _folder() -> Traversable:
    return importlib.resources.files("sskt.recipes")
