"""The middleware that every request passes: tokens, limits, errors, and a line in the log.

It is plain ASGI and stands outside of the application, so that its limits hold for every route. A
request's body is read whole (``max_body`` keeps it small) before the application is called.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from anyio import CancelScope, move_on_after
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sskt.server.http.auth import OPEN, refuse_unknown_host, refuse_unsafe, require, token_of
from sskt.server.http.logs import REQUEST_ID, shown_path
from sskt.server.http.problems import Problem, json_answer, problem_of
from sskt.server.http.protocol import CUT
from sskt.server.http.tokens import Token
from sskt.teacher_cache.errors import SsktError

if TYPE_CHECKING:
    from sskt.server.state import State

UNCOUNTED = OPEN | {"/metrics"}
"""Answered also when the server is overloaded."""
RETRY = {"Retry-After": "1"}
PIECE = 2**20
"""Bytes handed over at once: what a client must take within ``send_seconds``."""
DIRECT = 2**16
"""A larger body is followed by an empty piece, which waits until nearly all has left: only then
is the request over and its memory free."""
WATCH_AFTER = 0.05
"""Seconds of work after which it is worth watching whether the client is still connected."""
LINGER_SECONDS = 2.0
"""How long a refused client may go on sending its body before the connection is closed."""
GONE = 499
"""Status, in the log and the metrics, of a request whose client left before the answer."""
SECURITY = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": (
        b"default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        b"form-action 'self'; frame-ancestors 'none'"
    ),
}
"""Headers of every answer that does not set them itself."""

_CHALLENGES = [
    (b"www-authenticate", b'Bearer realm="sskt"'),
    (b"www-authenticate", b'Basic realm="sskt", charset="UTF-8"'),
]
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_REST_OF_PATH = re.compile(r"/\{\w+:path\}$")
_log = logging.getLogger("sskt.middleware")
_access = logging.getLogger("sskt.access")

Render = Callable[[Problem, Scope], Response]


class Middleware:
    """The outermost application of one worker process; of one event loop only.

    Attributes:
        serving: How many requests are being answered, those of ``UNCOUNTED`` not included.
        serving_each: The same for each client (a token from one address).
    """

    def __init__(self, app: ASGIApp, state: State, render: Render = json_answer) -> None:
        self.app, self.state, self.render = app, state, render
        self.serving = 0
        self.serving_each: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    @contextmanager
    def counted(self, scope: Scope, token: Token | None) -> Iterator[None]:
        """Counts a request while it is answered.

        Raises:
            Problem: 429 if the client has as many as it may, 503 if the server has.
        """
        if scope["path"] in UNCOUNTED:
            yield
            return
        settings = self.state.settings
        client = f"{token.name}@{client_of(scope)}" if token else client_of(scope)
        if self.serving_each[client] >= settings.max_requests_each:
            detail = f"{self.serving_each[client]} requests of this client are being answered"
            raise Problem(429, "too many requests at once", detail, RETRY)
        if self.serving >= settings.max_requests:
            detail = f"{self.serving} requests are being answered"
            raise Problem(503, "server overloaded", detail, RETRY)
        self.serving += 1
        self.serving_each[client] += 1
        try:
            yield
        finally:
            self.serving -= 1
            self.serving_each[client] -= 1
            if not self.serving_each[client]:
                del self.serving_each[client]


def require_scope(request: HTTPConnection, scope: str) -> None:
    """For routes: raises ``Problem`` 403 unless the request's token has a scope."""
    require(request.scope, request.app.state.sskt.tokens, scope)


class _ClientLeft(Exception):
    """The client left before its request was complete."""


class _Exchange:
    """One request and its answer.

    ``begun``, ``complete``: how far the answer is. ``ended``: the application's answer is no
    longer wanted. ``gone``: the connection is.
    """

    def __init__(self, middleware: Middleware, scope: Scope, receive: Receive, send: Send) -> None:
        self.middleware, self.scope, self.receive, self.send = middleware, scope, receive, send
        self.settings, self.metrics = middleware.state.settings, middleware.state.metrics
        self.loop = asyncio.get_running_loop()
        self.started = time.perf_counter()
        self.body, self.body_left = b"", False
        self.head: Message | None = None  # the answer's, kept until its first bytes
        self.status = self.sent = 0
        self.begun = self.complete = self.gone = self.ended = False
        self.over = asyncio.Event()
        self.work = CancelScope()
        self.watcher: asyncio.Task[None] | None = None
        self.late_answer: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """From the head of the request to the line in the log."""
        headers = dict(self.scope["headers"])
        sent_id = headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(8)
        own = self.scope.setdefault("state", {})
        own["request_id"], own["token"] = self.request_id, None
        reset = REQUEST_ID.set(self.request_id)
        self.metrics.serving(1)
        try:
            await self._handle(headers)
        except _ClientLeft:
            self.gone = True
        except asyncio.CancelledError:  # the server stops and waits no longer
            self._cut()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)  # the protocol learns of it
        except Exception as error:
            await self._fail(error)
        finally:
            self.metrics.serving(-1)
            self._log_request()
            REQUEST_ID.reset(reset)

    async def _handle(self, headers: Mapping[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        self.body_left = length.strip(b"0") != b"" or b"transfer-encoding" in headers
        refuse_unknown_host(self.scope, self.settings)
        token = self.scope["state"]["token"] = token_of(self.scope, self.middleware.state.tokens)
        if token is not None:
            self.metrics.token_used(token.name)
        refuse_unsafe(self.scope)
        with self.middleware.counted(self.scope, token):
            if self.body_left:
                await self._read_body(length)
            await self._call_application()

    async def _read_body(self, length: bytes) -> None:
        most = self.settings.max_body
        if not length.isdigit():
            raise Problem(400, "bad request", "Content-Length is no number")
        parts, size = [], 0
        too_large = len(length) > 18 or int(length) > most
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while self.body_left and not too_large:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeft
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    too_large = size > most
                    self.body_left = message.get("more_body", False)
        except TimeoutError:
            seconds = self.settings.body_seconds
            detail = f"the body did not arrive within {seconds:g} s"
            raise Problem(408, "request timeout", detail) from None
        if too_large:
            raise Problem(413, "content too large", f"a body has at most {most:,} bytes here")
        self.body = b"".join(parts)

    async def _call_application(self) -> None:
        """Calls the application, which has so long as the client waits and a limit allows."""
        timers = (
            self.loop.call_later(self.settings.request_seconds, self._late),
            self.loop.call_later(WATCH_AFTER, self._watch),
        )
        try:
            with self.work:
                await self.middleware.app(self.scope, self._receive, self._answer)
        finally:
            for timer in timers:
                timer.cancel()
            if self.watcher is not None:
                self.watcher.cancel()
            if self.late_answer is not None:
                await self.late_answer
        if not self.complete and not self.ended:
            raise RuntimeError("the application ended without a complete answer")

    def _late(self) -> None:
        if not self.begun:
            self.ended = True
            seconds = self.settings.request_seconds
            detail = f"no answer within {seconds:g} s; the work may go on: ask again"
            path = f"{self.scope['method']} {shown_path(self.scope)}"
            self.metrics.error("late", f"{path}: {detail}", self.request_id)
            problem = Problem(503, "no answer in time", detail, {"Retry-After": "5"})
            self.late_answer = self.loop.create_task(self._answer_problem(problem))
            self.work.cancel()

    def _watch(self) -> None:
        if self.watcher is None:
            self.watcher = self.loop.create_task(self._await_leaving())

    async def _await_leaving(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.complete:
            self.ended = self.gone = True
            self.work.cancel()
        self.over.set()

    async def _receive(self) -> Message:
        """What the application receives: its body in one piece, then, when it comes, the end."""
        if self.body is not None:
            body, self.body = self.body, None  # type: ignore[assignment]
            return {"type": "http.request", "body": body, "more_body": False}
        self._watch()
        await self.over.wait()
        return {"type": "http.disconnect"}

    async def _answer(self, message: Message) -> None:
        """What the application sends."""
        if self.ended or self.complete:
            return
        if message["type"] == "http.response.start":
            self.head = message
        elif message["type"] == "http.response.body":
            await self._deliver(message.get("body", b""), message.get("more_body", False))
        else:
            await self.send(message)

    async def _deliver(self, body: bytes, more: bool, linger: bool = False) -> None:
        if self.scope["method"] == "HEAD":
            body, more = b"", False
        if not self.begun:
            await self._begin()
        if len(body) > DIRECT:
            view = memoryview(body)
            for start in range(0, len(body), PIECE):
                await self._hand_over(view[start : start + PIECE], True)
            if more:
                return
            body = b""
        if linger:
            await self._hand_over(body, True)
            await self._drop_body()
            body = b""
        await self._hand_over(body, more)
        if not more and not self.gone:
            self.complete = True
            self.over.set()

    async def _begin(self) -> None:
        assert self.head is not None
        self.begun, self.status = True, self.head["status"]
        headers = list(self.head.get("headers", ()))
        given = {name.lower() for name, _ in headers}
        headers += [(name, value) for name, value in SECURITY.items() if name not in given]
        headers.append((b"x-request-id", self.request_id.encode()))
        head = {"type": "http.response.start", "status": self.status, "headers": headers}
        await self._limited(self.send(head))

    async def _hand_over(self, body: bytes | memoryview, more: bool) -> None:
        if not self.gone:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await self._limited(self.send(message))
            self.sent += 0 if self.gone else len(body)

    async def _limited(self, sending: Awaitable[None]) -> None:
        """Closes the connection of a client that takes nothing."""
        timer = self.loop.call_later(self.settings.send_seconds, self._stalled)
        try:
            await sending
        except OSError:  # some servers report so that the client is gone
            self.ended = self.gone = True
        finally:
            timer.cancel()

    def _stalled(self) -> None:
        _log.info("a client took nothing for %g s: cut off", self.settings.send_seconds)
        self._cut()

    def _cut(self) -> None:
        """Ends the connection in mid-answer, so that a part is not taken for the whole."""
        self.ended = self.gone = True
        cut: Callable[[], None] | None = self.scope.get("extensions", {}).get(CUT)
        if cut is not None:
            cut()
        self.work.cancel()

    async def _drop_body(self) -> None:
        with move_on_after(LINGER_SECONDS):
            while self.body_left:
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    return
                self.body_left = message.get("more_body", False)

    async def _fail(self, error: Exception) -> None:
        """Answers an error, and records those that are failures of the server."""
        problem = problem_of(error)
        kind = type(error).__name__
        if self.ended:
            if not isinstance(error, Problem):
                _log.info("after its end: %s: %s", kind, error, exc_info=error)
            return
        overloaded = problem.status == 503 and "Retry-After" in problem.headers
        if problem.status >= 500 and not overloaded:
            if not isinstance(error, Problem):
                known = isinstance(error, SsktError)
                _log.error("%s: %s", kind, error, exc_info=None if known else error)
            kind = kind if problem.title == "internal server error" else problem.title
            self.metrics.error(kind, str(error), self.request_id)
        await self._answer_problem(problem)

    async def _answer_problem(self, problem: Problem) -> None:
        """Answers with a problem if an answer is still possible."""
        if self.complete or self.gone:
            return
        if self.begun:
            self._cut()
            await asyncio.sleep(0)  # the protocol learns of it
            return
        answer = self.middleware.render(problem, self.scope)
        headers = list(answer.raw_headers)
        if problem.status == HTTPStatus.UNAUTHORIZED:
            headers += _CHALLENGES
        if self.body_left:
            headers.append((b"connection", b"close"))
        self.head = {"status": problem.status, "headers": headers}
        # Closing at once would reset the connection under a client that is still sending.
        sending = self.body_left and not any(n == b"expect" for n, _ in self.scope["headers"])
        await self._deliver(bytes(answer.body), False, sending)

    def _log_request(self) -> None:
        seconds = time.perf_counter() - self.started
        status, method = self.status or GONE, self.scope["method"]
        self.metrics.request(route_of(self.scope), method, status, seconds, self.sent)
        token: Token | None = self.scope["state"]["token"]
        state = self.middleware.state
        if self.scope["path"] not in UNCOUNTED and (token or state.tokens is None):
            state.clients.answered(token.name if token else "", client_of(self.scope), self.sent)
        if not _access.isEnabledFor(logging.INFO):
            return
        facts: dict[str, Any] = {
            "request_id": self.request_id,
            "method": method,
            "path": shown_path(self.scope),
            "status": status,
            "seconds": round(seconds, 6),
            "bytes": self.sent,
            "client": client_of(self.scope),
        }
        message = "request" if self.complete else "request cut off"
        _access.info(message, extra=facts | ({"token": token.name} if token else {}))


def client_of(scope: Mapping[str, Any]) -> str:
    """The peer's address."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def route_of(scope: Mapping[str, Any]) -> str:
    """The template of the route that answered, without the rest of a path; else ``other``."""
    template = getattr(scope.get("route"), "path", "")
    return _REST_OF_PATH.sub("", template) or ("/" if template else "other")
