"""Answers of a label server while they are read, and what a network does to them."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any


class Unavailable(Exception):
    """What may pass by itself.

    pause: seconds that the server asked for. alive: something went on all the same, so that
    patience begins anew.
    """

    def __init__(
        self, reason: str, *, does: str = "does not answer", pause: float = 0, alive: bool = False
    ) -> None:
        super().__init__(reason)
        self.does, self.pause, self.alive = does, pause, alive


class Computing(Unavailable):
    """The server is at it; there is no limit to waiting for that."""

    def __init__(self, reason: str, pause: float) -> None:
        super().__init__(reason, does="is computing", pause=pause, alive=True)


class Gone(FileNotFoundError):
    """The server has nothing there."""


class Answer:
    """An answer whose body is still to be read. Reading raises ``Unavailable``."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self.status = response.status
        self._problem: dict[str, Any] | None = None

    def header(self, name: str) -> str | None:
        return self._response.getheader(name)

    @property
    def length(self) -> int | None:
        """Bytes of the body, if they are told."""
        text = self.header("Content-Length") or ""
        return int(text) if text.isdecimal() else None

    @property
    def problem(self) -> dict[str, Any]:
        """The problem details that it tells; empty if it tells none."""
        if self._problem is None:
            self._problem = {}
            with contextlib.suppress(ValueError, Unavailable):
                found = json.loads(self.read())
                if isinstance(found, dict):
                    self._problem = found
        return self._problem

    def read(self) -> bytes:
        """The whole body."""
        with network():
            return self._response.read()

    def readinto(self, buffer: memoryview) -> int:
        """Some of the body; 0 at its end, and also where it broke off."""
        with network():
            return self._response.readinto(buffer)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Turns what a network does into ``Unavailable``."""
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
    except http.client.HTTPException as error:
        raise Unavailable(f"no HTTP answer ({type(error).__name__} {error})".strip()) from error


def pause_of(answer: Answer) -> float:
    """Retry-After in seconds; it may be a date."""
    text = (answer.header("Retry-After") or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
