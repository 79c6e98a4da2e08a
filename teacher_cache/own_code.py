"""Code of a user, named as FILE.py:function or module:attribute."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData, SsktError, described
from sskt.teacher_cache.extras import missing_extra


def code_of(content: bytes) -> str:
    """What identifies the code of a user: the SHA-256 of its file, as ``sha256:...``."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def load_module(place: str, what: str) -> ModuleType:
    """Imports ``package.module``, or runs ``FILE.py``.

    Args:
        place: The name of the module, or the path of the file.
        what: The beginning of each message.

    Returns:
        The module.

    Raises:
        MissingData: If none exists.
        Exception: Whatever the code itself raises.
    """
    if place.endswith(".py"):
        return run_code(Path(place), read_code(Path(place), what))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):
            raise
        raise MissingData(
            f"{what}: no module {place}; install it or put its folder on PYTHONPATH "
            "(a file is named with its .py: FILE.py:factory)"
        ) from error


def find_function(text: str, what: str) -> Callable[..., Any]:
    """Finds a function of a user.

    Args:
        text: ``FILE.py:function`` or ``module:attribute``; ``__main__:function`` is one of the
            program that runs.
        what: The beginning of each message.

    Returns:
        The function.

    Raises:
        MissingData: If there is no such file or module.
        MissingExtra: If it needs a package of an extra that is not installed.
        InputError: If there is no such function in it, or its code fails.
    """
    place, _, name = text.rpartition(":")
    try:
        found = getattr(load_module(place, what), name, None)
    except SsktError:
        raise
    except Exception as error:
        if isinstance(error, ImportError) and (lacking := missing_extra(error)):
            raise lacking from error
        failed = described(error)
        raise InputError(f"{what}: {place} cannot be imported: {failed}") from error
    if not callable(found):
        raise InputError(f"{what}: {place} has no function '{name}'")
    function: Callable[..., Any] = found
    return function


def call_function(text: str, what: str, *arguments: Any, **named: Any) -> Any:
    """Calls a function of a user: see ``find_function``.

    Args:
        text: ``FILE.py:function`` or ``module:attribute``.
        what: The beginning of each message.
        arguments: What the function is called with.
        named: What it is called with by name.

    Returns:
        What the function returned.

    Raises:
        MissingData: If there is no such file or module.
        InputError: If there is no such function, or it fails.
    """
    return called(find_function(text, what), f"{what}: {text}", *arguments, **named)


def called(function: Callable[..., Any], what: str, *arguments: Any, **named: Any) -> Any:
    """Calls a function of a user. Raises ``InputError``, whose message begins with ``what``."""
    try:
        return function(*arguments, **named)
    except SsktError:
        raise
    except Exception as error:
        raise InputError(f"{what} failed: {described(error)}") from error


def hash_of_file(text: str, what: str) -> str:
    """What identifies the code of ``FILE.py:function``; empty for ``module:attribute``.

    Raises ``MissingData``, whose message begins with ``what``, if there is no such file.
    """
    path = Path(text.rpartition(":")[0])
    return code_of(read_code(path, what)) if path.suffix == ".py" else ""


def read_code(path: Path, what: str) -> bytes:
    """Reads a file of a user. Raises ``MissingData``; ``what`` begins the message."""
    if not path.is_file():
        raise MissingData(f"{what}: no file {path}")
    return path.read_bytes()


def run_code(path: Path, content: bytes) -> ModuleType:
    """Runs the content of a file as a module."""
    module = ModuleType(f"sskt_own_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    # Compiled here: Python's cache of compiled files may hold an older text of the same second.
    exec(compile(content, str(path), "exec"), module.__dict__)
    return module
