"""Requests to a label server, repeated while the server is away.

Each request has a connection of its own: beside a shard of about 11 MB its cost does not show, and
no answer can be taken for another one, also where a process forks. ``http.client`` is used as it
leaves the socket to us, which the deadlines in ``answers.py`` need. Proxies of the environment
(``http_proxy``) are not used, and redirects are not followed: the token goes to no other server.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from sskt.teacher_cache.errors import CorruptStore, DiskFull, InputError, SsktError, printable
from sskt.teacher_cache.storage.http.answers import (
    DOCUMENT_BYTES,
    Answer,
    Computing,
    Deadline,
    Gone,
    Oversized,
    TimedResponse,
    Unavailable,
    network,
    retry_after,
)

TOKEN = "SSKT_TOKEN"
"""Environment variable with the token. URLs and files hold no token, as both end up in logs."""

FIRST_SECONDS = 5.0
"""How long a command tries to reach a server that has not answered it yet. The URL may be wrong."""

WAIT_MINUTES = 60.0
"""How long a server that is away is waited for."""

CONNECT_SECONDS = 5.0

PAUSES = (0.25, 10.0)
"""Seconds between two tries: the first pause, which doubles from try to try, and the longest."""

LONGEST_PAUSE, COMPUTING_SECONDS = 300.0, 5.0
"""Longest pause that a server may ask for, and the one between two requests for a shard that it is
computing."""

DAMAGED = "label set damaged"
"""Title of the problem by which a server reports a damaged label set."""

_BUSY = frozenset((429, 502, 503, 504))
_LONGEST = 500
_T = TypeVar("_T")
_log = logging.getLogger("sskt")


class Server:
    """A label server. Threads and forked processes may share it.

    Args:
        url: ``http://HOST:PORT`` or ``https://HOST/PREFIX``.
        wait_minutes: How long the server is waited for when it is away.
        patient: Whether it is waited for so long also before it has answered for the first time.

    Raises:
        InputError: If the URL is not one of a server.
    """

    kind = "label server"
    """What it is, for messages."""

    files = "/zarr"
    """Path below which the files of label sets are."""

    def __init__(
        self, url: str, wait_minutes: float = WAIT_MINUTES, *, patient: bool = False
    ) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")
        except ValueError as error:
            raise InputError(f"{url} is not the URL of a label server ({error})") from error
        odd = parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", url)
        if parts.scheme not in ("http", "https") or not host or odd:
            raise InputError(
                f"{url} is not the URL of a label server; expected http://HOST:PORT or https://..."
            )
        if parts.username is not None or parts.password is not None:
            raise InputError(
                f"the URL of a label server must not hold a password; put the token for {host} "
                f"into the environment variable {TOKEN}"
            )
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host, self._port = host, port
        self.prefix = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        self.wait_minutes, self._answered = wait_minutes, patient
        self._waiting = False
        self._guard = threading.Lock()
        self.closed = threading.Event()

    def __str__(self) -> str:
        return self.url

    def close(self) -> None:
        """Ends all requests and all waiting, in every thread; they raise ``InputError``."""
        self.closed.set()

    def pause(self, seconds: float) -> None:
        """Sleeps. Raises ``InputError`` if ``close`` has been called."""
        if self.closed.wait(seconds):
            raise InputError(f"stopped while waiting for {self}")

    def json(self, path: str, shape: Callable[[Any], _T]) -> _T:
        """Requests a JSON document.

        Args:
            path: Path below the server's URL, quoted.
            shape: Takes the document and returns what is needed of it; raises ``ValueError``,
                ``KeyError``, ``TypeError`` or ``AttributeError`` if it is not as expected.

        Returns:
            What ``shape`` returns.

        Raises:
            InputError: If the answer is not such a document; and as ``ask``.
        """
        try:
            return shape(json.loads(self.ask(path, lambda answer: answer.read(DOCUMENT_BYTES))))
        except Oversized as error:
            raise InputError(f"{self} answers with too large a {unquote(path)}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{self} answers, but {unquote(path)} is not as a label server sends it; check "
                "the URL, which sskt serve prints, and that both sides have the same version"
            ) from error

    def ask(
        self,
        path: str,
        use: Callable[[Answer], _T],
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        wanted: Collection[int] = (HTTPStatus.OK,),
    ) -> _T:
        """Sends a request, again and again while the server is away.

        Args:
            path: Path below the server's URL, quoted.
            use: Reads the answer; what it raises as ``Unavailable`` is tried again.
            method: HTTP method.
            headers: Further headers.
            body: Body of the request.
            wanted: The statuses that ``use`` takes.

        Returns:
            What ``use`` returns.

        Raises:
            Gone: For status 404.
            InputError: If the server does not answer in time or refuses the request.
            SsktError: As ``require``.
        """

        def attempt() -> _T:
            with self.exchange(path, method, headers, body) as answer:
                self.require(answer, wanted)
                return use(answer)

        return self.patiently(attempt, unquote(path))

    def patiently(self, attempt: Callable[[], _T], what: str) -> _T:
        """Calls a function again and again while it raises ``Unavailable``.

        It is called for ``wait_minutes``, or for a few seconds if the server is not patient and
        has never answered.

        Args:
            attempt: The function.
            what: What it requests, for messages.

        Returns:
            What the function returns.

        Raises:
            InputError: If that time is over.
        """
        began, tries = time.monotonic(), 0
        while True:
            try:
                found = attempt()
            except Unavailable as error:
                if self.closed.is_set():
                    raise InputError(f"stopped while waiting for {self}") from error
                now = time.monotonic()
                if isinstance(error, Computing):
                    began, tries = now, 0
                shortest, longest = PAUSES
                longest = min(longest, shortest * 2 ** min(tries, 30))
                pause = random.uniform(0, longest)  # "full jitter"
                pause += min(error.pause, LONGEST_PAUSE)
                limit = 60 * self.wait_minutes if self._answered else FIRST_SECONDS
                if now - began + pause > limit:
                    raise self._given_up(error, what) from error
                if self._answered and (tries or isinstance(error, Computing)):
                    self._report(error, what)
                tries += 1
                self.pause(pause)
            else:
                self._answered = True
                self._report(None, what)
                return found

    def _given_up(self, error: Unavailable, what: str) -> InputError:
        if not self._answered:
            return InputError(f"cannot reach {self}: {error}")
        return InputError(
            f"{self} {error.does} ({error}), and did not for {self.wait_minutes:g} minutes "
            f"(--label-wait) when {what} was requested; when it is back, the same command with "
            "--resume continues"
        )

    def _report(self, error: Unavailable | None, what: str) -> None:
        """Logs once that waiting begins, and once that it ends."""
        with self._guard:
            if self._waiting == (error is not None):
                return
            self._waiting = error is not None
        why = printable(str(error))
        if error is None:
            _log.warning("%s %s answers again", self.kind, self)
        elif isinstance(error, Computing):
            _log.warning("%s %s is computing labels (%s); waiting for them", self.kind, self, why)
        else:
            _log.warning(
                "%s %s %s (%s); waiting for %s, trying again for up to %g minutes",
                self.kind,
                self,
                error.does,
                why,
                what,
                self.wait_minutes,
            )

    @contextlib.contextmanager
    def exchange(
        self,
        path: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Iterator[Answer]:
        """Sends a request once.

        Yields:
            Its answer, whatever its status, until the context ends.

        Raises:
            Unavailable: If there is no answer.
            InputError: If the server's certificate is not trusted.
        """
        token = _token()
        shown = {"Authorization": f"Bearer {token}"} if token else {}
        target = f"{self.prefix}{path}"
        with self.once(target, method, dict(headers or {}) | shown, body) as answer:
            yield answer

    @contextlib.contextmanager
    def once(
        self,
        target: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Iterator[Answer]:
        """As ``exchange``, without the token and below no prefix."""
        sent = {"Accept-Encoding": "identity", "User-Agent": "sskt"} | dict(headers or {})
        with contextlib.closing(self._connection()) as connection:
            deadline = Deadline(self.closed)
            connection.response_class = functools.partial(  # type: ignore[assignment]
                TimedResponse, deadline
            )
            with network():
                self._connect(connection)
                connection.request(method, target, body, sent)
                response = connection.getresponse()
            with response:
                yield Answer(response, deadline)

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self.host, self._port, timeout=CONNECT_SECONDS)
        return http.client.HTTPSConnection(
            self.host, self._port, timeout=CONNECT_SECONDS, context=self._tls
        )

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            raise
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason or str(error)
            raise InputError(
                f"no TLS connection to {self}: {str(why).lower().replace('_', ' ')}; "
                "SSL_CERT_FILE can name the certificates to trust"
            ) from error
        if self.closed.is_set():
            raise Unavailable("stopped")

    def require(self, answer: Answer, wanted: Collection[int]) -> None:
        """Checks the status of an answer.

        Raises:
            Unavailable: If the server is overloaded or starting (429, 502, 503, 504).
            Gone: If it has no such file (404).
            DiskFull: If it has no room (507).
            CorruptStore: If it reports a damaged label set.
            InputError: If it refuses the request (any other 3xx or 4xx).
            SsktError: If it failed (any other 5xx).
        """
        status = answer.status
        if status in wanted:
            if answer.header("Content-Encoding") not in (None, "identity"):
                raise InputError(
                    f"{self} sends compressed answers; switch compression off in the proxy "
                    "before the label server"
                )
            return
        problem = answer.problem
        phrase = HTTPStatus(status).phrase.lower() if status in set(HTTPStatus) else "unknown"
        said = str(problem.get("detail") or f"{status} {phrase}")[:_LONGEST]
        if status in _BUSY:
            pause = retry_after(answer)
            if "title" in problem:  # of a label server, and not of a proxy before it
                self._answered = True
            if "state" in problem:  # the server holds the next request until the shard is stored
                raise Computing(said, min(pause, COMPUTING_SECONDS))
            raise Unavailable(said, does=f"is overloaded ({status})", pause=pause)
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            if _token():
                raise InputError(f"label server {self} refused the token in {TOKEN}: {said}")
            raise InputError(
                f"label server {self} needs a token; put it into the environment variable {TOKEN}"
            )
        if status == HTTPStatus.NOT_FOUND:
            raise Gone(said)
        if status == HTTPStatus.INSUFFICIENT_STORAGE:
            raise DiskFull(f"{self.kind} {self}: {said}")
        if 300 <= status < 400:
            location = (answer.header("Location") or "another URL")[:_LONGEST]
            raise InputError(f"{self} redirects to {location}; use that URL")
        if status < 500:
            raise InputError(f"{self.kind} {self} refused a request ({status}): {said}")
        kind = CorruptStore if problem.get("title") == DAMAGED else SsktError
        raise kind(f"{self.kind} {self} failed: {said}")


def _token() -> str:
    """The token of the environment, "" without one. Raises ``InputError`` that does not show it."""
    token = os.environ.get(TOKEN, "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise InputError(
            f"the environment variable {TOKEN} holds no token: it has blanks or unusual characters"
        )
    return token
