"""Label sets on a plain web host: ``https://HOST/PATH/SETNAME``, for reading.

Any host that sends files will do: a folder of nginx, a bucket that is open to all, a repository of
Hugging Face. It lists nothing, so ``sskt copy --publish`` puts a list of the files beside them. No
token is ever sent, and a redirect to another host is followed only if ``SSKT_REDIRECTS`` names
that host.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NoReturn
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.format.names import LONGEST_NAME, is_file_key
from sskt.teacher_cache.storage.http.answers import DOCUMENT_BYTES, Answer, Gone, Oversized
from sskt.teacher_cache.storage.http.client import Server
from sskt.teacher_cache.storage.http.storage import Fetching, HttpStorage

INDEX = "files.json"
"""The file of a published label set that names its other files, with their sizes in bytes."""

ALLOWED = "SSKT_REDIRECTS"
"""Environment variable with the hosts to which a plain web host may redirect."""

REDIRECTS = 5
"""Redirects of one request, at most."""

_SET = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[0-9a-f]{12}")
_MOVED = frozenset((301, 302, 303, 307, 308))
_PORTS = {"http": 80, "https": 443}


class NotPublished(MissingData):
    """A URL at which no published label set can be read."""


def is_published(url: str) -> bool:
    """Whether a URL ends in the name of a label set, and so is that of a published one."""
    try:
        name = urlsplit(url).path.rstrip("/").rpartition("/")[2]
    except ValueError:
        return False
    return len(name) <= LONGEST_NAME and bool(_SET.fullmatch(name))


class WebHost(Server):
    """A plain web host. See ``Server``; no token is sent, and redirects are followed.

    A redirect leads to the same host, or to one that the user has named (``may_lead_to``).
    """

    kind, files = "web host", ""

    @functools.cached_property
    def _hosts(self) -> dict[str, Server]:
        return {}

    @contextlib.contextmanager
    def exchange(
        self,
        path: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Iterator[Answer]:
        """See ``Server``.

        Raises:
            InputError: If a redirect leads to a host that the user has not named.
        """
        server: Server = self
        url = f"{self.url}{path}"
        for _ in range(REDIRECTS + 1):
            at = urlsplit(url)
            target = f"{at.path}?{at.query}" if at.query else at.path
            with server.once(target, method, headers, body) as answer:
                location = answer.header("Location")
                if answer.status not in _MOVED or not location:
                    yield answer
                    return
            url = self._allowed(at, url, location)
            server = self._host(urlsplit(url))
        raise InputError(f"{self} redirects more than {REDIRECTS} times; check the URL")

    def _allowed(self, at: SplitResult, url: str, location: str) -> str:
        """The URL to which a redirect leads. Raises ``InputError`` if it may not be followed."""
        try:
            url = urljoin(url, location)
            to = urlsplit(url)
            host, port = to.hostname or "", to.port or _PORTS[to.scheme]
        except (ValueError, KeyError):
            raise InputError(f"{self} redirects to {location[:200]!r}, which is no URL") from None
        if at.scheme == "https" and to.scheme != "https":
            raise InputError(f"{self} redirects from https to {to.scheme}, which is not followed")
        if not re.fullmatch(r"[!-~]+", url) or to.username is not None:
            raise InputError(f"{self} redirects to a URL with a password or unusual characters")
        own = (at.hostname, at.port or _PORTS[at.scheme])
        upgraded = (at.hostname, 443) if own[1] == 80 and to.scheme == "https" else own
        if (host, port) not in (own, upgraded) and not may_lead_to(host, port, to.scheme):
            name = host if port == _PORTS[to.scheme] else f"{host}:{port}"
            raise InputError(
                f"{self} redirects to another host, {name}; if its files may come from there, set "
                f"{ALLOWED}={name} and run the same command again"
            )
        return url

    def _host(self, to: SplitResult) -> Server:
        name = f"{to.scheme}://{to.netloc}"
        if name not in self._hosts:
            self._hosts[name] = server = Server(name)
            server.closed = self.closed
        return self._hosts[name]

    def require(self, answer: Answer, wanted: Collection[int]) -> None:
        """See ``Server``. Raises ``NotPublished`` where a password is needed (401, 403)."""
        if answer.status in (401, 403):
            raise NotPublished(
                f"{self} refuses to send the file ({answer.status}); a published label set must "
                "be readable without a password"
            )
        super().require(answer, wanted)


def may_lead_to(host: str, port: int, scheme: str) -> bool:
    """Whether the user has named a host to which a plain web host may redirect.

    ``SSKT_REDIRECTS`` holds names, separated by commas: ``cdn.example.org``, with ``:PORT`` for
    another port than that of the scheme; ``*.example.org`` for every host below it.
    """
    for entry in os.environ.get(ALLOWED, "").lower().split(","):
        name, _, number = entry.strip().partition(":")
        if (number or str(_PORTS[scheme])) != str(port) or not name.strip("*."):
            continue
        if host == name or (name.startswith("*.") and fnmatchcase(host, name)):
            return True
    return False


@dataclass
class PublishedStorage(HttpStorage):
    """A label set on a plain web host, or a cache that holds this one alone."""

    only: str = ""
    _index: dict[str, int] | None = field(default=None, repr=False)
    _set: PublishedStorage | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.server.url}/{self.only}"

    def below(self, name: str) -> PublishedStorage:
        if self._set is None or name != self.only:
            self._set = PublishedStorage(self.server, self.how, self.only, only=self.only)
        return self._set

    def _path(self, key: str) -> str:
        return f"{self.server.files}/{quote(f'{self.only}/{key}')}"

    def folders(self) -> list[str]:
        """See ``Storage``. Raises ``NotPublished`` if no label set is published there."""
        self.below(self.only).files()
        return [self.only]

    def damaged(self) -> dict[str, str]:
        """Returns nothing: the one label set says itself what is wrong."""
        return {}

    def files(self) -> dict[str, int]:
        """The sizes of the files by key, as the label set lists them.

        Raises:
            NotPublished: If there is no list.
            InputError: If the host cannot be reached.
        """
        if self._index is None:
            try:
                data = self.server.ask(self._path(INDEX), lambda a: a.read(DOCUMENT_BYTES))
                self._index = parse_index(data)
            except Gone as error:
                raise NotPublished(
                    f"{self} has no {INDEX}: no label set is published there, or not with "
                    "sskt copy --publish; the URL of a label server is http://HOST:PORT"
                ) from error
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{self.where(INDEX)} is no list of files ({error})") from error
            except Oversized as error:
                raise InputError(f"{self.where(INDEX)} is too large: {error}") from error
        return self._index

    def sizes(self, under: str = "") -> dict[str, int]:
        below = f"{under}/" if under else ""
        return {key: size for key, size in self.files().items() if key.startswith(below)}

    def size(self, key: str, *, fresh: bool = False) -> int | None:
        if fresh:
            self.refresh()
        return self.files().get(key)

    def refresh(self) -> None:
        self._index = None

    def read(self, key: str) -> bytes:
        most = self.files().get(key)
        if most is None:
            raise FileNotFoundError(f"{self.where(INDEX)} does not list {key}")
        return self.server.ask(self._path(key), lambda answer: answer.read(most))

    def computes(self) -> bool:
        """Returns False: a plain web host computes nothing."""
        return False

    def refuse_writing(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ``InputError``."""
        raise InputError(f"{self} is published read-only; sskt copy it, and change the copy")

    locks = put = create = update = delete = refuse_writing


def parse_index(data: bytes) -> dict[str, int]:
    """Reads a list of files. Raises ``ValueError``, ``KeyError``, ``TypeError`` or as ``json``."""
    files = json.loads(data)["files"].items()
    found = {str(key): size for key, size in files if is_file_key(key)}
    if not all(type(size) is int and 0 <= size < 2**63 for size in found.values()):
        raise ValueError("a size is not a count")
    return found


def open_published(url: str, how: Fetching | None = None) -> PublishedStorage:
    """Opens a published label set as a cache of one, which is not contacted yet.

    Args:
        url: URL of the label set.
        how: As ``open_server``.

    Raises:
        InputError: If the URL cannot be used.
    """
    patient, how = how is not None, how or Fetching()
    home, _, name = url.rstrip("/").rpartition("/")
    return PublishedStorage(WebHost(home, how.wait_minutes, patient=patient), how, only=name)
