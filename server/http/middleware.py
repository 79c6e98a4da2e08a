"""The gate that every request passes: who may, how many, how large, how long; then the log.

Outermost and plain ASGI, so that its limits hold whatever a route does. A request's body is read
whole (it is small by ``max_body``) before the application is called.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from anyio import CancelScope, move_on_after
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sskt.server.http.auth import OPEN, Admission, client_of, refuse_unsafe, require, token_of
from sskt.server.http.logs import REQUEST_ID, shown_path
from sskt.server.http.plain_errors import MAX_TEXT, as_problem, is_plain_error
from sskt.server.http.problems import MEDIA_TYPE, Problem, problem_of, problem_response
from sskt.server.http.protocol import CUT
from sskt.teacher_cache.errors import SsktError

if TYPE_CHECKING:
    from sskt.server.state import State

__all__ = ["OPEN", "Gate", "require_scope"]

PIECE = 2**20
"""Bytes handed over at once: what a client must take within ``send_seconds``."""
DIRECT = 2**16
"""Larger bodies wait, after their last piece, until nearly all has left: only then is a request
over, and its memory free."""
WATCH_AFTER = 0.05
"""Seconds of work after which it is worth watching whether the client is still there."""
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
_log = logging.getLogger("sskt.gate")
_access = logging.getLogger("sskt.access")


class Gate:
    """The outermost application."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state
        self.admission = Admission(state.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            await _Passage(self, scope, receive, send).run()
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})


def require_scope(request: HTTPConnection, scope: str) -> None:
    """Raises ``Problem`` 403 unless the request's token has a scope; for routes.

    Without a token file everybody who reaches the server has all.
    """
    require(request.scope, request.app.state.sskt.tokens, scope)


class _Gone(Exception):
    """The client left before its request was whole."""


class _Passage:
    """One request on its way through the gate."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope, self.receive, self.send = gate, scope, receive, send
        self.settings, self.metrics = gate.state.settings, gate.state.metrics
        self.loop = asyncio.get_running_loop()
        self.started = time.perf_counter()
        self.body, self.body_left = b"", False
        self.head: Message | None = None  # the answer's, held until its first bytes
        self.error_text: bytearray | None = None  # of an answer that is to become a problem
        self.plain_error: Problem | None = None
        self.status = self.sent = 0
        self.began = self.complete = self.dead = self.deaf = self.noted = False
        self.gone = asyncio.Event()
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
            await self._pass(headers)
        except _Gone:
            self.dead = True
        except Problem as problem:
            await self._tell(problem)
        except Exception as error:
            await self._failed(error)
        finally:
            self.metrics.serving(-1)
            self._account()
            REQUEST_ID.reset(reset)

    async def _pass(self, headers: Mapping[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        self.body_left = length.strip(b"0") != b"" or b"transfer-encoding" in headers
        token = self.scope["state"]["token"] = token_of(self.scope, self.gate.state.tokens)
        refuse_unsafe(self.scope)
        with self.gate.admission.held(self.scope, token):
            if self.body_left:
                await self._read_body(length)
            await self._work()

    async def _read_body(self, length: bytes) -> None:
        most = self.settings.max_body
        if not length.isdigit():
            raise Problem(400, "bad request", "Content-Length is no number")
        if len(length) > 18 or int(length) > most:
            raise _too_large(most)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while self.body_left:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self.body_left = message.get("more_body", False)
                    if size > most:
                        raise _too_large(most)
        except TimeoutError:
            seconds = self.settings.body_seconds
            detail = f"the body did not arrive within {seconds:g} s"
            raise Problem(408, "request timeout", detail) from None
        self.body = b"".join(parts)

    async def _work(self) -> None:
        """Calls the application, no longer than there is somebody to answer in time."""
        timers = (
            self.loop.call_later(self.settings.request_seconds, self._late),
            self.loop.call_later(WATCH_AFTER, self._watch),
        )
        try:
            with self.work:
                await self.gate.app(self.scope, self._receive, self._answer)
        finally:
            for timer in timers:
                timer.cancel()
            if self.watcher is not None:
                self.watcher.cancel()
            if self.late_answer is not None:
                await self.late_answer
        if self.plain_error is not None:  # not before: an exception that follows says more
            raise self.plain_error
        if not self.complete and not self.deaf:
            raise RuntimeError("the application ended without a whole answer")

    def _late(self) -> None:
        if not self.began:
            self.deaf = True
            seconds = self.settings.request_seconds
            detail = f"no answer within {seconds:g} s; the work may go on: ask again"
            self._note("late", f"{self.scope['method']} {shown_path(self.scope)}: {detail}")
            problem = Problem(503, "no answer in time", detail, {"Retry-After": "5"})
            self.late_answer = self.loop.create_task(self._tell(problem))
            self.work.cancel()

    def _watch(self) -> None:
        if self.watcher is None:
            self.watcher = self.loop.create_task(self._await_leaving())

    async def _await_leaving(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.complete:
            self.deaf = self.dead = True
            self.work.cancel()
        self.gone.set()

    async def _receive(self) -> Message:
        """What the application receives: its body in one piece, then, some day, the end."""
        if self.body is not None:
            body, self.body = self.body, None  # type: ignore[assignment]
            return {"type": "http.request", "body": body, "more_body": False}
        self._watch()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _answer(self, message: Message) -> None:
        """What the application sends."""
        if self.deaf or self.complete:
            return
        if message["type"] == "http.response.start":
            self.head = message
            self.error_text = bytearray() if is_plain_error(message) else None
        elif message["type"] != "http.response.body":
            await self.send(message)
        elif self.error_text is None:
            await self._deliver(message.get("body", b""), message.get("more_body", False))
        else:
            self.error_text += message.get("body", b"")[:MAX_TEXT]
            if not message.get("more_body", False):
                assert self.head is not None
                self.plain_error = as_problem(self.head, bytes(self.error_text))

    async def _deliver(self, body: bytes, more: bool, linger: bool = False) -> None:
        if self.scope["method"] == "HEAD":
            body, more = b"", False
        if not self.began:
            await self._begin(body)
        if len(body) > DIRECT:
            view = memoryview(body)
            for start in range(0, len(body), PIECE):
                await self._hand_over(view[start : start + PIECE], True)
            if more:
                return
            body = b""  # handed over once the pieces have left
        if linger:
            await self._hand_over(body, True)
            await self._drop_body()
            body = b""
        await self._hand_over(body, more)
        if not more and not self.dead:
            self.complete = True
            self.gone.set()

    async def _begin(self, body: bytes) -> None:
        assert self.head is not None
        self.began, self.status = True, self.head["status"]
        headers = list(self.head.get("headers", ()))
        if self.status >= 500 and not self.noted:
            self._note_answer({name.lower(): value for name, value in headers}, body)
        given = {name.lower() for name, _ in headers}
        headers += [(name, value) for name, value in SECURITY.items() if name not in given]
        headers.append((b"x-request-id", self.request_id.encode()))
        head = {"type": "http.response.start", "status": self.status, "headers": headers}
        await self._limited(self.send(head))

    async def _hand_over(self, body: bytes | memoryview, more: bool) -> None:
        if not self.dead:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await self._limited(self.send(message))
            self.sent += 0 if self.dead else len(body)

    async def _limited(self, sending: Awaitable[None]) -> None:
        """Cuts off a client that takes nothing."""
        timer = self.loop.call_later(self.settings.send_seconds, self._stalled)
        try:
            await sending
        except OSError:  # some servers tell it so that the client is gone
            self.deaf = self.dead = True
        finally:
            timer.cancel()

    def _stalled(self) -> None:
        _log.info("a client took nothing for %g s: cut off", self.settings.send_seconds)
        self._cut()

    def _cut(self) -> None:
        """Ends the connection in mid-answer, so that nobody takes a part for the whole."""
        self.deaf = self.dead = True
        cut: Callable[[], None] | None = self.scope.get("extensions", {}).get(CUT)
        if cut is not None:
            cut()
        self.work.cancel()

    async def _tell(self, problem: Problem) -> None:
        """Answers with a problem, if there is still room for an answer."""
        if self.complete or self.dead:
            return
        if self.began:
            self._cut()
            await asyncio.sleep(0)  # the server hears of it
            return
        answer = problem_response(problem, self.request_id, shown_path(self.scope))
        headers = list(answer.raw_headers)
        if problem.status == HTTPStatus.UNAUTHORIZED:
            headers += _CHALLENGES
        if problem.status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.noted = True
        if self.body_left:
            headers.append((b"connection", b"close"))
        self.head = {
            "type": "http.response.start",
            "status": problem.status,
            "headers": headers,
        }
        # Closing at once would reset the connection under a client that is still sending.
        sending = self.body_left and not any(n == b"expect" for n, _ in self.scope["headers"])
        await self._deliver(bytes(answer.body), False, sending)

    async def _drop_body(self) -> None:
        with move_on_after(LINGER_SECONDS):
            while self.body_left:
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    return
                self.body_left = message.get("more_body", False)

    async def _failed(self, error: Exception) -> None:
        """An error that no handler of the application has turned into an answer."""
        if isinstance(error, SsktError):
            problem = problem_of(error)
        else:
            detail = "unexpected error; the server's log tells more under this request_id"
            problem = Problem(500, "internal server error", detail)
        if self.deaf:
            _log.info("after its end: %s: %s", type(error).__name__, error, exc_info=error)
        elif problem.status >= 500:
            _log.error("%s: %s", type(error).__name__, error, exc_info=error)
            self._note(type(error).__name__, str(error))
        await self._tell(problem)

    def _note(self, kind: str, detail: str) -> None:
        self.noted = True
        self.metrics.error(kind, detail, self.request_id)

    def _note_answer(self, headers: Mapping[bytes, bytes], body: bytes) -> None:
        """Remembers a failure that the application has told by itself."""
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE and b"retry-after" in headers:
            return
        told: dict[str, Any] = {}
        if headers.get(b"content-type", b"").startswith(MEDIA_TYPE.encode()):
            try:
                told = json.loads(body)
            except ValueError:
                told = {}
        path = f"{self.scope['method']} {shown_path(self.scope)}"
        self._note(str(told.get("title", self.status)), str(told.get("detail", path)))

    def _account(self) -> None:
        seconds = time.perf_counter() - self.started
        status, method = self.status or GONE, self.scope["method"]
        self.metrics.request(route_of(self.scope), method, status, seconds, self.sent)
        if not _access.isEnabledFor(logging.INFO):
            return
        token = self.scope["state"]["token"]
        facts = {
            "request_id": self.request_id,
            "method": method,
            "path": shown_path(self.scope),
            "status": status,
            "seconds": round(seconds, 6),
            "bytes": self.sent,
            "client": client_of(self.scope),
        }
        whole = "request" if self.complete else "request cut off"
        _access.info(whole, extra=facts | ({"token": token.name} if token else {}))


def route_of(scope: Mapping[str, Any]) -> str:
    """The template of the route that answered, without the rest of a path; else ``other``."""
    template = getattr(scope.get("route"), "path", "")
    return _REST_OF_PATH.sub("", template) or ("/" if template else "other")


def _too_large(most: int) -> Problem:
    return Problem(413, "content too large", f"a body has at most {most:,} bytes here")
