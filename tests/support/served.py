"""A real uvicorn server on 127.0.0.1 with middleware and limited protocol, and raw clients."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from sskt.server.http.middleware import Middleware, require_scope
from sskt.server.http.problems import Problem, leave_errors_to_middleware
from sskt.server.http.protocol import limited_by
from sskt.server.http.tokens import Tokens
from sskt.server.metrics.clients import Clients
from sskt.server.metrics.metrics import Metrics
from sskt.server.settings import Settings
from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels

BIG = bytes(range(256)) * 2**17  # 32 MiB
WAIT = 20
"""Seconds after which a test fails that waits for something."""


@dataclass
class Seen:
    """What the application saw."""

    started: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    calls: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


def small_app(seen: Seen) -> Starlette:
    """Routes that behave and routes that do not."""

    async def small(request: Request) -> Response:
        seen.calls.append(request.url.path)
        return PlainTextResponse("small")

    async def big(request: Request) -> Response:
        return Response(BIG, media_type="application/octet-stream")

    async def stream(request: Request) -> Response:
        return StreamingResponse(iter([b"one", b"two"]))

    async def echo(request: Request) -> Response:
        seen.calls.append("echo")
        body = await request.body()
        seen.headers = dict(request.headers)
        return PlainTextResponse(f"{len(body)} {sum(body)}")

    async def slow(request: Request) -> Response:
        seen.started.set()
        try:
            while not seen.go_on.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            seen.cancelled.set()
            raise
        return PlainTextResponse("at last")

    def thread(request: Request) -> Response:
        seen.started.set()
        assert seen.go_on.wait(WAIT)
        return PlainTextResponse("at last")

    async def boom(request: Request) -> Response:
        raise ValueError("the key is\nhunter2")

    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"200000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
        raise ValueError("in mid-answer")

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        return

    async def problem(request: Request) -> Response:
        raise Problem(409, "not stored", "seed 3", missing=[3])

    async def incomplete(request: Request) -> Response:
        raise IncompleteLabels("seed 3 is missing")

    async def corrupt(request: Request) -> Response:
        raise CorruptStore("shard 7 is damaged")

    async def compute(request: Request) -> Response:
        require_scope(request, "compute")
        return PlainTextResponse("computed")

    routes = [
        *(Route(path, small) for path in ("/small", "/", "/healthz", "/readyz", "/metrics")),
        Route("/zarr/{path:path}", small),
        *(Route(f"/{f.__name__}", f) for f in (big, stream, slow, thread, boom, problem)),
        *(Route(f"/{f.__name__}", f) for f in (incomplete, corrupt)),
        *(Route(f"/{f.__name__}", f, methods=["POST"]) for f in (echo, compute)),
        *(Mount(f"/{f.__name__}", f) for f in (half, nothing)),
    ]
    app = Starlette(routes=routes)
    leave_errors_to_middleware(app)
    return app


@dataclass
class Served:
    """A running server."""

    port: int
    seen: Seen
    metrics: Metrics
    middleware: Middleware

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        """A connection. receive_buffer: bytes, for a client that is slow to take an answer."""
        client = socket.socket()
        client.settimeout(WAIT)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(("127.0.0.1", self.port))
        return client

    def ask(self, data: bytes) -> Answer:
        """Sends a request and reads its answer."""
        with self.connect() as client:
            client.sendall(data)
            return read_answer(client)

    def get(self, path: str, *headers: str, method: str = "GET", body: bytes = b"") -> Answer:
        """Asks for a path."""
        return self.ask(request(path, *headers, method=method, body=body))


@dataclass
class Answer:
    """An HTTP answer. ``more``: bytes that came after it."""

    status: int
    headers: dict[str, str]
    body: bytes
    head: str


def request(path: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read_answer(client: socket.socket, method: str = "GET") -> Answer:
    """Reads one answer. Raises ``ConnectionError`` if it ends before its time."""
    file = client.makefile("rb")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = file.readline()
        if not line:
            raise ConnectionError(f"closed after {head!r}")
        head += line
    lines = head.decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in lines[1:] if line]
    headers = {name.lower(): value for name, value in pairs}
    length = int(headers.get("content-length", 0))
    body = b"" if method == "HEAD" else file.read(length)
    if method != "HEAD" and headers.get("transfer-encoding") == "chunked":
        while size := int(file.readline(), 16):
            body += file.read(size + 2)[:-2]
        file.readline()
    elif method != "HEAD" and len(body) < length:
        raise ConnectionError(f"closed after {len(body)} of {length} bytes")
    return Answer(int(lines[0].split()[1]), headers, body, head.decode("latin-1"))


def make_state(run: Path, tokens: Path | None = None, **changes: Any) -> Any:
    """What the middleware needs of a server's state."""
    metrics = Metrics(run)
    return SimpleNamespace(
        settings=Settings(
            cache="", run=str(run), token_file=str(tokens) if tokens else None, **changes
        ),
        metrics=metrics,
        clients=Clients(run),
        tokens=Tokens(tokens) if tokens else None,
    )


@contextmanager
def serving(run: Path, tokens: Path | None = None, **changes: Any) -> Iterator[Served]:
    """A server with some settings changed, in a thread."""
    run.mkdir(exist_ok=True)
    seen, state = Seen(), make_state(run, tokens, **changes)
    app = small_app(seen)
    app.state.sskt = state
    middleware = Middleware(app, state)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        middleware,
        http=limited_by(state.settings),
        loop="uvloop",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Served(listener.getsockname()[1], seen, state.metrics, middleware)
    finally:
        seen.go_on.set()
        server.should_exit = True
        thread.join(WAIT)
        listener.close()
        assert not thread.is_alive()
