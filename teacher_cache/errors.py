"""Every failure sskt reports: what was expected, what was found, what to do next.

``InputError`` and its children mean that the user can put it right (exit status 2);
any other ``SsktError`` is a failure of the run itself (exit status 1).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Makes text from elsewhere safe for a terminal and a log.

    Names, class names and metadata of label sets, and messages of servers, can hold sequences that
    move the cursor, rename the window or reverse the order of what follows.

    Args:
        text: Any text.

    Returns:
        The text in one line. Line breaks and tabulators are blanks, and other control characters,
        controls of the writing direction and lone surrogates are escaped (``\\x1b``).
    """
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0].isspace():
        return " "
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class SsktError(Exception):
    """Base of all errors that sskt raises on purpose. Their messages are ``printable``."""

    exit_code = 1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in arguments))


class InputError(SsktError):
    """Something the user named, gave or configured is not usable as it is."""

    exit_code = 2


class UnknownName(InputError):
    """A name that is not in the table it was looked up in.

    The message suggests the names that are spelled alike; without any it lists the known ones.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = list(known)
        near = did_you_mean(name, names)
        listed = f"known: {', '.join(names)}"
        if near:
            listed = f"{listed} ({near})" if len(names) <= FEW else near
        tail = f"; {hint}" if hint else ""
        super().__init__(f"unknown {kind} '{name}'; {listed}{tail}")


FEW = 25
"""Up to so many known names are listed beside a suggestion."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean 'stl10'?`` with the nearest known names; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(repr(one) for one in near)}?" if near else ""


class MissingData(InputError):
    """A folder or file that should hold the data is absent or empty."""


class BadImage(InputError):
    """An image that cannot be decoded; the message names the file."""


class BadClip(BadImage):
    """A clip that is truncated or cannot be decoded; the message names the file."""


class BadCheckpoint(InputError):
    """Weights that do not belong to the network, or a damaged or unsafe file."""


class SpecMismatch(InputError):
    """A label set that was made for something else; names the first differing field."""


class IncompleteLabels(InputError):
    """A label set without the seeds or blocks that were asked for; names them."""


class DiskFull(InputError):
    """No room for a shard; what was stored before stays valid."""


class CorruptStore(SsktError):
    """Stored bytes that fail their checksum or break the format."""


class ViewMismatch(SsktError):
    """A replayed view differs from the one that the source saw."""


class Diverged(SsktError):
    """A training whose loss is no longer a finite number."""


class TeacherMoved(SsktError):
    """A frozen source changed while it was labelling."""


TRACKERS = ("issues", "issue tracker", "bug tracker", "tracker")
"""Names of the project's URL, in the package's metadata, at which failures are reported."""


def maintainers() -> str:
    """Where to report a failure of sskt itself.

    Returns:
        ``at URL`` of the issue tracker, or else of the repository, that the metadata of the
        installed package names; without one, ``to the maintainers of this copy of sskt``.
    """
    from importlib.metadata import PackageNotFoundError, metadata  # takes 20 ms to import

    try:
        entries = metadata("sskt").get_all("Project-URL") or []
    except PackageNotFoundError:  # a checkout that is not installed
        entries = []
    urls = {name.lower(): url for name, _, url in (entry.partition(", ") for entry in entries)}
    wanted = [*TRACKERS, "repository", "source", "homepage"]
    found = next((urls[name] for name in wanted if name in urls), None)
    return f"at {found}" if found else "to the maintainers of this copy of sskt"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of one line.

    Args:
        error: Any exception, usually one of a library.

    Returns:
        The first line that is not blank, with the second if the first ends in a colon; the name of
        the exception's class if there is none.
    """
    lines = list(filter(None, map(str.strip, str(error).splitlines())))
    announced = len(lines) > 1 and lines[0].endswith(":")
    return " ".join(lines[: 1 + announced]) or type(error).__name__


def described(error: BaseException) -> str:
    """Class and first line of an error that the user's own code or a library raised.

    Args:
        error: Any exception.

    Returns:
        Such as "ValueError: no image"; the name of the class alone if the error has no message.
    """
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name


def raise_missing(problems: Sequence[str]) -> None:
    """Raises ``MissingData`` with all problems in one message, if there are any."""
    if len(problems) == 1:
        raise MissingData(problems[0])
    if problems:
        numbered = "; ".join(f"({i}) {problem}" for i, problem in enumerate(problems, 1))
        raise MissingData(f"{len(problems)} things are missing: {numbered}")
