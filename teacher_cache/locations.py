"""Where data and labels are if no option says so: an environment variable, else a folder here."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sskt.teacher_cache.errors import InputError, MissingData, printable

DATA, CACHE, LABELS = "SSKT_DATA", "SSKT_CACHE", "SSKT_LABELS"
TOKEN = "SSKT_TOKEN"
DATA_FOLDER, LABEL_FOLDER = "data", "labels"

_warned: set[str] = set()
_log = logging.getLogger("sskt")


@dataclass(frozen=True)
class Location:
    """A path or URL, and what it was taken from: an option, a variable, or ``default``."""

    value: str
    origin: str

    def __str__(self) -> str:
        return f"{self.value} ({self.origin})"


def data_location(target: str, root: str | Path | None = None) -> Location:
    """The folder of a known target.

    ``$SSKT_DATA`` and ``data`` may hold several datasets: the folder named like the target is
    taken if there is one (``data/ucf101``), else the folder itself.

    Args:
        target: Name of the target.
        root: The folder that was given with ``--root``.

    Returns:
        The folder that was given, else ``$SSKT_DATA``, else ``data``.
    """
    if root is not None:
        return Location(str(root), "--root")
    base, origin = _from_environment((DATA,), DATA_FOLDER)
    own = Path(base, target)
    return Location(str(own if own.is_dir() else base), origin)


def label_location(
    given: str | Path | None = None, *, writable: bool = False, option: str = "--cache"
) -> Location:
    """The cache of label sets.

    Args:
        given: What was given with ``--cache`` or ``--labels``.
        writable: Whether labels will be written; ``$SSKT_LABELS``, a label server, is then
            left out.
        option: The option that it was given with.

    Returns:
        The cache that was given, else ``$SSKT_CACHE`` or ``$SSKT_LABELS``, else ``labels``.

    Raises:
        InputError: If both variables are set.
    """
    names = (CACHE,) if writable else (CACHE, LABELS)
    found = Location(*_from_environment(names, LABEL_FOLDER)) if not given else None
    location = found or Location(str(given), option)
    warn_of_plain_http(location.value)
    return location


def warn_of_plain_http(url: str) -> None:
    """Logs a warning, once for each URL, if a token would be sent unencrypted to another machine.

    Args:
        url: A label server's URL, or the name of another cache, of which nothing is said.
    """
    if not url.lower().startswith("http://") or not os.environ.get(TOKEN) or url in _warned:
        return
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return
    _warned.add(url)
    _log.warning(
        "the token in %s is sent unencrypted to %s, where others on the network can read it; use "
        "an https:// address (docs/deployment.md)",
        TOKEN,
        printable(url),
    )


def is_zip(name: object) -> bool:
    """Whether a cache is named like a zip file of a label set, and is not a folder."""
    return str(name).endswith(".zip") and "://" not in str(name) and not Path(str(name)).is_dir()


def require_folder(cache: Path) -> None:
    """Raises ``MissingData`` if the folder of a cache does not exist."""
    if not cache.is_dir():
        raise MissingData(
            f"no label sets: the cache folder {cache} does not exist; sskt cache-teachers "
            f"--cache {cache} makes it, --cache and $SSKT_CACHE name another one"
        )


def _from_environment(names: tuple[str, ...], default: str) -> tuple[str, str]:
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    if len(found) > 1:
        raise InputError(
            f"{' and '.join(f'${name}' for name in found)} are both set, and each names the "
            "label sets; unset one of them, or give --cache"
        )
    for name, value in found.items():
        return value, f"${name}"
    return default, "default"
