"""A label server as this process talks to it: kept connections, patience, plain refusals.

``http.client`` and not httpx: shards are read straight from the socket into one buffer. Proxies of
the environment (``http_proxy``) are not used: the server is the lab's own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sskt.teacher_cache.errors import CorruptStore, DiskFull, InputError, SsktError
from sskt.teacher_cache.storage.http.answers import (
    Answer,
    Computing,
    Gone,
    Unavailable,
    network,
    pause_of,
)

TOKEN = "SSKT_TOKEN"
"""Environment variable with the token. It stands in no URL and no file: both end up in logs."""
FIRST_SECONDS = 5.0
"""How long a server is tried that has not answered this process yet: the address may be wrong."""
WAIT_MINUTES = 60.0
CONNECT_SECONDS = 5.0
READ_SECONDS = 75.0
"""Longer than the server waits for anything itself."""
PAUSES = (0.25, 10.0)
"""The first pause between two tries, doubled from try to try, and the longest, in seconds."""
LONGEST_PAUSE, COMPUTING_SECONDS = 300.0, 5.0
"""Of those that a server asks for: any, and between two looks at what it computes."""
DAMAGED = "label set damaged"
"""Title of the problem that tells a damaged label set."""

_BUSY = frozenset((429, 502, 503, 504))
_MET: set[str] = set()
"""URLs of servers that have answered this process: one that is away now will be back."""
_T = TypeVar("_T")
_log = logging.getLogger("sskt")


class Server:
    """One label server. Threads may share it; a forked child begins with new connections.

    Raises ``InputError`` for what is no address of a server.
    """

    def __init__(self, url: str, wait_minutes: float = WAIT_MINUTES) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")
        except ValueError as error:
            raise InputError(f"{url} is no address of a label server ({error})") from error
        odd = parts.query or parts.fragment or re.search(r"\s", url) or not parts.path.isascii()
        if parts.scheme not in ("http", "https") or not host or odd:
            raise InputError(
                f"{url} is no address of a label server; expected http://HOST:PORT or https://..."
            )
        if parts.username is not None or parts.password is not None:
            raise InputError(
                f"no passwords in a URL; put the token for {host} into the environment variable "
                f"{TOKEN}"
            )
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host, self._port = host, port
        self.prefix = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        self.wait_minutes = wait_minutes
        self._waiting = False
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._process = os.getpid()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        weakref.finalize(self, _close_all, self._idle)

    def __str__(self) -> str:
        return self.url

    @property
    def met(self) -> bool:
        """Whether this process has had an answer of the label server."""
        return self.url in _MET

    def close(self) -> None:
        """Ends all waiting, in every thread: what is under way raises ``InputError``."""
        self._stopped.set()
        with self._guard:
            for connection in self._busy:
                sock = connection.sock  # its thread may be closing it
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
            _close_all(self._idle)

    def pause(self, seconds: float) -> None:
        """Sleeps. Raises ``InputError`` if ``close`` was called."""
        if self._stopped.wait(seconds):
            raise InputError(f"stopped while waiting for {self}")

    def json(self, path: str) -> Any:
        """A JSON answer."""

        def attempt() -> bytes:
            with self.exchange("GET", path) as answer:
                self.require(answer, (HTTPStatus.OK,))
                return answer.read()

        try:
            return json.loads(self.patiently(attempt))
        except ValueError:
            raise InputError(
                f"{self} answers, but not as a label server; expected the address that sskt serve "
                "prints"
            ) from None

    def patiently(self, attempt: Callable[[], _T]) -> _T:
        """What ``attempt`` gives, tried again while it raises ``Unavailable``.

        For a few seconds as long as the server has not answered at all, then for
        ``wait_minutes``. Raises ``InputError`` when that is over.
        """
        began, tries = time.monotonic(), 0
        while True:
            try:
                found = attempt()
            except Unavailable as error:
                if self._stopped.is_set():
                    raise InputError(f"stopped while waiting for {self}") from error
                now = time.monotonic()
                if error.alive:
                    began, tries = now, 0
                shortest, longest = PAUSES
                longest = min(longest, shortest * 2 ** min(tries, 30))
                pause = random.uniform(0, longest)  # "full jitter"
                pause += min(error.pause, LONGEST_PAUSE)
                limit = 60 * self.wait_minutes if self.met else FIRST_SECONDS
                if now - began + pause > limit:
                    raise self._given_up(error) from error
                if self.met and (tries or isinstance(error, Computing)):  # a hiccup is not told
                    self._say(error)
                tries += 1
                self.pause(pause)
            else:
                _MET.add(self.url)
                self._say(None)
                return found

    def _given_up(self, error: Unavailable) -> InputError:
        if not self.met:
            return InputError(f"cannot reach {self}: {error}")
        return InputError(
            f"{self} {error.does} ({error}), and did not for {self.wait_minutes:g} minutes "
            "(--label-wait); when it is back, the same command goes on with --resume"
        )

    def _say(self, error: Unavailable | None) -> None:
        """Once when waiting begins, and once when it ends."""
        with self._guard:
            if self._waiting == (error is not None):
                return
            self._waiting = error is not None
        if error is None:
            _log.warning("label server %s goes on", self)
        elif isinstance(error, Computing):
            _log.warning("label server %s is computing labels (%s); waiting for them", self, error)
        else:
            _log.warning(
                "label server %s %s (%s); trying again for up to %g minutes",
                self,
                error.does,
                error,
                self.wait_minutes,
            )

    @contextlib.contextmanager
    def exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Iterator[Answer]:
        """One request, its answer open. Raises ``Unavailable``, ``InputError`` for bad TLS."""
        sent = {"Accept-Encoding": "identity", "User-Agent": "sskt"} | dict(headers or {})
        token = _token()
        if token:
            sent["Authorization"] = f"Bearer {token}"
        connection = self._take()
        try:
            response = self._ask(connection, method, f"{self.prefix}{path}", sent, body)
            yield Answer(response)
            if response.isclosed() and connection.sock is not None:
                self._give(connection)
        finally:
            with self._guard:
                kept = connection not in self._busy
                self._busy.discard(connection)
            if not kept:  # what is left of the answer must not be taken for the next one
                connection.close()

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None,
    ) -> http.client.HTTPResponse:
        if connection.sock is not None:
            try:
                connection.request(method, path, body, headers)
                return connection.getresponse()
            except TimeoutError as error:
                raise Unavailable("timed out") from error
            except (OSError, http.client.HTTPException):
                connection.close()  # the server had closed it in the meantime: no failure
        with network():
            try:
                connection.connect()
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                raise
            except ssl.SSLError as error:
                why = getattr(error, "verify_message", "") or error.reason or str(error)
                raise InputError(
                    f"no TLS with {self}: {str(why).lower().replace('_', ' ')}; SSL_CERT_FILE can "
                    "name the certificates to trust"
                ) from error
            if self._stopped.is_set():  # ``close`` saw no socket to shut
                raise Unavailable("stopped")
            connection.sock.settimeout(READ_SECONDS)
            connection.request(method, path, body, headers)
            return connection.getresponse()

    def _take(self) -> http.client.HTTPConnection:
        with self._guard:
            if self._process != os.getpid():  # a child must not talk over its parent's sockets
                self._process, self._busy = os.getpid(), set()
                _close_all(self._idle)
            connection = self._idle.pop() if self._idle else self._new()
            self._busy.add(connection)
        return connection

    def _give(self, connection: http.client.HTTPConnection) -> None:
        with self._guard:
            self._busy.discard(connection)
            self._idle.append(connection)

    def _new(self) -> http.client.HTTPConnection:
        if self._tls is not None:
            return http.client.HTTPSConnection(
                self.host, self._port, timeout=CONNECT_SECONDS, context=self._tls
            )
        return http.client.HTTPConnection(self.host, self._port, timeout=CONNECT_SECONDS)

    def require(self, answer: Answer, wanted: Collection[int]) -> None:
        """Raises what an answer of another status than ``wanted`` means.

        ``Unavailable``, ``Gone`` (404), ``DiskFull`` (507), ``CorruptStore``,
        ``InputError`` (other 3xx and 4xx), ``SsktError``.
        """
        status = answer.status
        if status in wanted:
            if answer.header("Content-Encoding") not in (None, "identity"):
                raise InputError(
                    f"what {self} sends is compressed on the way; switch that off in the proxy"
                )
            return
        problem = answer.problem
        phrase = HTTPStatus(status).phrase.lower() if status in set(HTTPStatus) else "unknown"
        said = str(problem.get("detail") or f"{status} {phrase}")
        if status in _BUSY:
            pause = pause_of(answer)
            if "title" in problem:  # so does a label server say it, and no proxy before it
                _MET.add(self.url)
            if "state" in problem:  # it holds the next request until it is done
                raise Computing(said, min(pause, COMPUTING_SECONDS))
            raise Unavailable(said, does=f"has no time ({status})", pause=pause)
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            if _token():
                raise InputError(f"label server {self} refused the token in {TOKEN}: {said}")
            raise InputError(
                f"label server {self} wants a token; put it into the environment variable {TOKEN}"
            )
        if status == HTTPStatus.NOT_FOUND:
            raise Gone(said)
        if status == HTTPStatus.INSUFFICIENT_STORAGE:
            raise DiskFull(f"label server {self}: {said}")
        if 300 <= status < 400:
            raise InputError(f"{self} sends on to {answer.header('Location')}; give that address")
        if status < 500:
            raise InputError(f"label server {self} refused a request ({status}): {said}")
        kind = CorruptStore if problem.get("title") == DAMAGED else SsktError
        raise kind(f"label server {self} failed: {said}")


def _token() -> str:
    """Of the environment; empty if there is none. Raises ``InputError``, without showing it."""
    token = os.environ.get(TOKEN, "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise InputError(f"what {TOKEN} holds is no token: it has blanks or odd characters in it")
    return token


def _close_all(connections: list[http.client.HTTPConnection]) -> None:
    while connections:
        connections.pop().close()
