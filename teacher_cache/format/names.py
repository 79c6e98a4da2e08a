"""Names of label sets, and of the files in them, that come from outside.

A label server, a bucket, a URL and a command line can name anything. A name that passes these
functions stays in the folder that it is joined to.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable

from sskt.teacher_cache.errors import InputError, printable

LONGEST_NAME = 213
"""Characters of a name. File systems take 255, and a folder that is being made has 42 more."""

LONGEST_KEY = 255
"""Characters of a file's name within a label set."""

_PART = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_NAME = re.compile(_PART)
_KEY = re.compile(rf"{_PART}(/{_PART}){{0,5}}")


class InvalidName(InputError):
    """A name that cannot be that of a label set, or of a file in one."""


def set_name(name: object) -> str:
    """Checks the name of a label set.

    Args:
        name: What should be a name.

    Returns:
        The name.

    Raises:
        InvalidName: If it is anything else than letters, digits, ``_``, ``-`` and ``.``, begins
            with a point, or is longer than ``LONGEST_NAME``.
    """
    if not is_set_name(name):
        shown = name if isinstance(name, str) else repr(name)
        shown = shown if len(shown) <= LONGEST_NAME else f"{shown[:40]}..."
        raise InvalidName(
            f"'{shown}' cannot be the name of a label set; expected at most {LONGEST_NAME} "
            "letters, digits and _ - . without a point at the beginning (sskt ls shows the names)"
        )
    return str(name)


def is_set_name(name: object) -> bool:
    """Whether ``set_name`` accepts a name."""
    return isinstance(name, str) and len(name) <= LONGEST_NAME and bool(_NAME.fullmatch(name))


def is_file_key(key: object) -> bool:
    """Whether a key can be that of a file within a label set, such as ``labels/c/0/3/0``.

    It has one to six parts, each as ``set_name`` takes them, joined by ``/``, and at most
    ``LONGEST_KEY`` characters.
    """
    return isinstance(key, str) and len(key) <= LONGEST_KEY and bool(_KEY.fullmatch(key))


def set_names(found: Iterable[object], where: str) -> list[str]:
    """The names of label sets among those that a cache lists, sorted.

    Hidden ones are left out, and so are those that ``set_name`` refuses, with a warning.

    Args:
        found: What the cache lists.
        where: Path or URL of the cache, for the warning.
    """
    names = {name for name in found if not str(name).startswith(".")}
    for name in names:
        if not is_set_name(name):
            _warn(where, str(name))
    return sorted(str(name) for name in names if is_set_name(name))


@functools.lru_cache(maxsize=64)
def _warn(where: str, name: str) -> None:
    shown = printable(name if len(name) <= LONGEST_NAME else f"{name[:40]}...")
    logging.getLogger("sskt").warning(
        "%s has a label set '%s', which is left out: that cannot be a name", where, shown
    )
