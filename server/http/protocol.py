"""Connections with limits: the head of a request is small and arrives in time.

uvicorn's httptools protocol has no limit on a request's head, on idle or half-sent requests, on
pipelined ones, or on how long a closed connection may refuse its last bytes. The answer's body
and its time limits are the middleware's.
"""

from __future__ import annotations

import functools
import logging
import os
import resource
from asyncio import TimerHandle, Transport
from http import HTTPStatus
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from sskt.server.http.problems import Problem, json_answer
from sskt.server.settings import VARIABLE, Settings, from_environment

MAX_HEAD = 2**16
"""Bytes of a request's line and headers."""
MAX_HEADERS = 100
MAX_PIPELINED = 16
"""Requests that may have come while one is answered."""
MAX_FILES = 2**20
SPARE_FILES = 256
"""Open files that connections leave to the rest of the process."""
CUT = "sskt.cut"
"""ASGI extension: ``scope["extensions"][CUT]()`` closes the connection without a further byte."""

_log = logging.getLogger("sskt.connections")


class LimitedProtocol(HttpToolsProtocol):
    """One connection, limited by the settings (those in the environment unless given)."""

    settings: ClassVar[Settings | None] = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = self.settings or _settings_of(os.environ.get(VARIABLE, ""))
        self._head_timer: TimerHandle | None = None
        self._in_head = True
        self._too_large = False
        self._answering: RequestResponseCycle | None = None
        self._head_bytes = 0
        self._budget = MAX_HEAD

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Closes the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > min(self._limits.max_connections, _most_connections()):
            transport.abort()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells the requests of the connection that the client is gone."""
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            # uvicorn tells the latest request only, which need not be the one under way.
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        """Parses, and refuses what is not HTTP or too large."""
        if self.parser is None or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._budget -= len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse()
            return
        if self._budget < 0:
            self._too_large = True
            self._refuse()
        elif self._idle():
            self._await_head()

    def _feed(self, data: bytes) -> None:
        """Treats a request for an upgrade, which is not offered, as an ordinary one."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self.scope["extensions"] = {CUT: self._cut}  # type: ignore[dict-item]

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. Those after the body are ignored."""
        self._count(len(name) + len(value) + 4)
        if self._in_head:
            super().on_header(name, value)
            if len(self.headers) > MAX_HEADERS:
                self._over()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD:
            self._over()

    def _over(self) -> None:
        self._too_large = True
        raise ValueError("too large")  # httptools makes an HttpParserError of it

    def on_headers_complete(self) -> None:
        """A request can be answered."""
        self._in_head = False
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests in one go")
        if self.parser.should_upgrade() and _has_body(self.headers):
            # httptools would take the body for the next request.
            raise ValueError("a body under an upgrade")
        version = self.parser.get_http_version()
        hosts = sum(name == b"host" for name, _ in self.headers)
        if version not in ("1.0", "1.1") or hosts > 1 or (hosts == 0 and version == "1.1"):
            raise ValueError("no request of HTTP/1.1 (RFC 9112, 2.3 and 3.2)")
        super().on_headers_complete()
        self._stop_head_timer()

    def on_body(self, body: bytes) -> None:
        """A part of the body: its bytes, and some framing for each, need no room in the head."""
        self._budget += 8 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._budget = MAX_HEAD
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer has been handed over."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()
        elif self._in_head and self._idle():
            self._await_head()

    def timeout_keep_alive_handler(self) -> None:
        """There was no request for a while."""
        super().timeout_keep_alive_handler()
        self._abort_later()

    def shutdown(self) -> None:
        """The server stops: answers that have begun are finished."""
        super().shutdown()
        if self.transport.is_closing():
            self._abort_later()

    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        if self._head_timer is None:
            later = self.loop.call_later
            self._head_timer = later(self._limits.header_seconds, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._idle():
            self._cut()

    def _cut(self) -> None:
        self.transport.abort()

    def _abort_later(self) -> None:
        """Cuts a client that would keep its closed connection by not taking the last bytes."""
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self._limits.send_seconds, self.transport.abort)

    def _refuse(self) -> None:
        """Answers what was wrong, unless another answer has begun, and closes."""
        status = (
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            if self._too_large
            else (HTTPStatus.BAD_REQUEST)
        )
        _log.info(
            "no HTTP request" if status == HTTPStatus.BAD_REQUEST else "request's head too large",
            extra={"status": int(status), "client": self.client[0] if self.client else ""},
        )
        cycle = self.cycle
        unanswered = self._idle() or (
            cycle.more_body and not cycle.response_started and not self.pipeline
        )
        if not unanswered:
            self._cut()
            return
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.write(_refusal(status))
        self.transport.close()
        self._abort_later()


def limited_by(settings: Settings) -> type[LimitedProtocol]:
    """The protocol with settings of its own, for a server in this process."""
    return type("LimitedProtocol", (LimitedProtocol,), {"settings": settings})


def many_files() -> int:
    """Raises the limit on open files of this process and those it starts; each connection is one.

    Returns:
        The limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return int(soft if soft != resource.RLIM_INFINITY else MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    _most_connections.cache_clear()
    return int(most)


@functools.cache
def _most_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_FILES if soft == resource.RLIM_INFINITY else max(soft - SPARE_FILES, 16)


@functools.cache
def _settings_of(environment: str) -> Settings:
    return from_environment()


def _has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
        for name, value in headers
    )


def _refusal(status: HTTPStatus) -> bytes:
    answer = json_answer(Problem(status, status.phrase.lower(), ""))
    head = [*answer.raw_headers, (b"x-content-type-options", b"nosniff"), (b"connection", b"close")]
    lines = b"".join(b"%s: %s\r\n" % pair for pair in head)
    return STATUS_LINE[status] + lines + b"\r\n" + bytes(answer.body)
