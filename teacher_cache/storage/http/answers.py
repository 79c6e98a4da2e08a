"""Answers of a label server: read within limits, and what may go wrong with them.

Every byte of an answer passes ``_Reader``, which ends an answer that takes too long in all, that
pauses for too long, or that is read by a client that has been closed. The limits therefore hold
for a server that sends its headers or its body byte by byte.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

from sskt.teacher_cache.errors import CorruptStore

IDLE_SECONDS = 75.0
"""Longest pause within an answer, and longest time to its first byte. A server that computes on
demand answers within 60 seconds."""

SLOWEST = 32 * 2**10
"""Bytes in a second below which an answer counts as stalled, beyond ``IDLE_SECONDS``."""

DOCUMENT_BYTES = 64 * 2**20
"""Largest JSON document: the files of a label set with 4,096 seeds are listed in about 20 MB."""

PROBLEM_BYTES = 64 * 2**10
"""Largest description of an error."""

POLL_SECONDS = 0.5
"""How often a client that waits for bytes checks whether it has been closed."""


class Unavailable(Exception):
    """A failure that may pass by itself, so that the request is worth repeating.

    Args:
        reason: The cause.
        does: What the server does, for messages.
        pause: Seconds that the server asked the client to wait.
    """

    def __init__(self, reason: str, *, does: str = "does not answer", pause: float = 0) -> None:
        super().__init__(reason)
        self.does, self.pause = does, pause


class Computing(Unavailable):
    """The server is computing what was requested; waiting for that has no limit."""

    def __init__(self, reason: str, pause: float) -> None:
        super().__init__(reason, does="is computing", pause=pause)


class Gone(FileNotFoundError):
    """The server has no such file."""


class Oversized(CorruptStore):
    """An answer that is larger than what was requested can be."""


class Deadline:
    """When an answer must have ended: a time, or as soon as its client is closed."""

    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed
        self.allow(0)

    def allow(self, count: int) -> None:
        """Sets the time for ``count`` more bytes."""
        self._end = time.monotonic() + IDLE_SECONDS + count / SLOWEST

    def passed(self) -> bool:
        """Whether the answer must end now."""
        return self._closed.is_set() or time.monotonic() > self._end


class _Reader(io.RawIOBase):
    """What a socket receives, until a deadline has passed or no byte has come for too long."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._socket, self._deadline = sock, deadline
        self._keeps_open = sock.makefile("rb", buffering=0)
        sock.settimeout(POLL_SECONDS)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        last = time.monotonic() + IDLE_SECONDS
        while not self._deadline.passed() and time.monotonic() < last:
            with contextlib.suppress(TimeoutError):
                return self._socket.recv_into(buffer)
        raise TimeoutError

    def close(self) -> None:
        self._keeps_open.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    """A response that is read within a deadline."""

    def __init__(self, deadline: Deadline, sock: socket.socket, **options: Any) -> None:
        super().__init__(sock, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Reader(sock, deadline))


class Answer:
    """An answer whose headers have been read and whose body has not."""

    def __init__(self, response: http.client.HTTPResponse, deadline: Deadline) -> None:
        self._response, self._deadline = response, deadline
        self.status = response.status
        self._problem: dict[str, Any] | None = None

    def header(self, name: str) -> str | None:
        return self._response.getheader(name)

    @property
    def length(self) -> int | None:
        """Announced bytes of the body; None if they are not announced."""
        text = self.header("Content-Length") or ""
        return int(text) if text.isdecimal() and len(text) < 19 else None

    def read(self, most: int) -> bytes:
        """Reads the body.

        Args:
            most: Largest size in bytes.

        Raises:
            Unavailable: If it is cut short or takes too long.
            Oversized: If it is larger than ``most``.
        """
        expected = self.length
        size = expected or 0
        if size <= most:
            self._deadline.allow(most if expected is None else expected)
            with network():
                data = self._response.read(most + 1 if expected is None else None)
            size = len(data)
        if size > most:
            raise Oversized(f"it has {size} bytes or more, expected at most {most}")
        return data

    @property
    def problem(self) -> dict[str, Any]:
        """The problem details (RFC 9457) of the body; empty if it has none."""
        if self._problem is None:
            self._problem = {}
            with contextlib.suppress(ValueError, RecursionError, Unavailable, Oversized):
                found = json.loads(self.read(PROBLEM_BYTES))
                if isinstance(found, dict):
                    self._problem = found
        return self._problem


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Turns the errors of connections into ``Unavailable``."""
    try:
        yield
    except TimeoutError as error:
        raise Unavailable("timed out") from error
    except http.client.IncompleteRead as error:
        raise Unavailable("the answer broke off") from error
    except http.client.RemoteDisconnected as error:
        raise Unavailable("the connection was closed") from error
    except OSError as error:
        raise Unavailable((error.strerror or str(error)).lower()) from error
    except (http.client.HTTPException, ValueError) as error:
        raise Unavailable(f"no HTTP answer ({type(error).__name__} {error})".strip()) from error


def retry_after(answer: Answer) -> float:
    """The header ``Retry-After`` in seconds, which may also be a date; 0 without one.

    A date is compared with the ``Date`` of the same answer: the clock of this machine may be wrong.
    """
    text = (answer.header("Retry-After") or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
        sent = parsedate_to_datetime(answer.header("Date") or "")
        return max(0.0, (until - sent).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
