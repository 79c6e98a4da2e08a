"""Real label servers on loopback for tests, and a connection to them that misbehaves."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import uvicorn

from sskt.server.app import create_app
from sskt.server.http.protocol import LimitedProtocol
from sskt.server.settings import Settings
from support.ports import free_port


@dataclass
class Served:
    """What came to a server and what it answered: (method, path, range, status)."""

    requests: list[tuple[str, str, str, int]] = field(default_factory=list)

    def of(self, method: str, part: str, *statuses: int) -> list[tuple[str, str, str, int]]:
        """Requests whose path contains ``part``, with one of ``statuses`` (any if none)."""
        return [
            r
            for r in self.requests
            if r[0] == method and part in r[1] and (not statuses or r[3] in statuses)
        ]


@contextlib.contextmanager
def serving(
    cache: object,
    *,
    port: int = 0,
    seen: Served | None = None,
    tls: tuple[Path, Path] | None = None,
    run: Path | None = None,
    **settings: Any,
) -> Iterator[str]:
    """The server's application in a thread: its URL. Leaving cuts all connections.

    ``settings`` are fields of ``Settings``; ``seen`` is told of every request; ``tls``: files of
    a key and a certificate for localhost; ``run``: where its run folder is to be.
    """
    run = run or Path(tempfile.mkdtemp(prefix="sskt-test-"))
    port = port or free_port()
    chosen = Settings(cache=str(cache), run=str(run), port=port, **settings)
    app: Any = create_app(chosen)
    if seen is not None:
        app = _watched(app, seen)
    config = uvicorn.Config(
        app,
        port=port,
        http=type("Protocol", (LimitedProtocol,), {"settings": chosen}),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=0,
        ssl_keyfile=tls[0] if tls else None,
        ssl_certfile=tls[1] if tls else None,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        shutil.rmtree(run, ignore_errors=True)


def _watched(app: Any, seen: Served) -> Any:
    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def telling(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = {k.decode(): v.decode() for k, v in scope["headers"]}
                about = (scope["method"], scope["path"], headers.get("range", ""))
                seen.requests.append((*about, message["status"]))
            await send(message)

        await app(scope, receive, telling)

    return watched


Pass = Callable[[int, bytes], bytes | None]
"""What becomes of (bytes sent so far, these bytes); None cuts the connection."""


class Proxy:
    """Forwards TCP connections to a port; ``treat`` says what becomes of what the server sends.

    A connection is treated as ``treat`` is when it begins.
    """

    def __init__(self, port: int) -> None:
        self.treat: Pass = lambda sent, data: data
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        for end in [self._listener, *self._ends]:
            _shut(end)
        for thread in self._threads:
            thread.join()
        for end in [self._listener, *self._ends]:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [client, server]
                for one, other, treat in ((client, server, None), (server, client, self.treat)):
                    thread = threading.Thread(target=_pump, args=(one, other, treat))
                    self._threads.append(thread)
                    thread.start()


def _pump(one: socket.socket, other: socket.socket, treat: Pass | None) -> None:
    sent = 0
    with contextlib.suppress(OSError):
        while data := one.recv(4096):
            passed = treat(sent, data) if treat else data
            sent += len(data)
            if passed is None:
                break
            other.sendall(passed)
    _shut(one)
    _shut(other)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket, bytes], None]) -> Iterator[str]:
    """A server that answers each connection as a function does: its URL.

    The function is called with the socket and the beginning of the request, in a thread. A
    connection is closed when it returns; leaving the context closes all.
    """
    listener, ends, threads = socket.create_server(("127.0.0.1", 0)), [], []

    def serve(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            answer(end, end.recv(65536))
        _shut(end)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                ends.append(listener.accept()[0])
                threads.append(threading.Thread(target=serve, args=(ends[-1],)))
                threads[-1].start()

    threads.append(threading.Thread(target=accept))
    threads[0].start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for end in [listener, *ends]:
            _shut(end)
        for thread in threads:
            thread.join()
        for end in [listener, *ends]:
            end.close()


Answered = Callable[[str, bytes], bytes]
"""Makes a whole HTTP answer of (path, the right body)."""


def answered(path: str, body: bytes) -> bytes:
    """An answer as it should be."""
    head = f'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: {len(body)}\r\n\r\n'
    return head.encode() + body


@contextlib.contextmanager
def misserving(
    label_set: Path, answer: Answered = answered, listed: str | None = None
) -> Iterator[str]:
    """A hand-made label server of one set, which answers as it likes: its URL.

    ``answer`` makes its answers. ``listed`` is the name under which it serves the set; it looks
    only at the end of a path.
    """
    files = {
        p.relative_to(label_set).as_posix(): p.read_bytes()
        for p in label_set.rglob("*")
        if p.is_file()
    }
    listing = {
        "label_sets": [{"name": label_set.name if listed is None else listed}],
        "damaged": {},
    }
    sizes = {"files": {key: len(data) for key, data in files.items()}, "on_demand": False}

    def respond(end: socket.socket, request: bytes) -> None:
        path = unquote(request.split(b" ")[1].decode())
        if path.startswith("/v1/"):
            body = json.dumps(listing if path == "/v1/label-sets" else sizes).encode()
        else:
            keys = sorted(files, key=len, reverse=True)
            body = next((files[key] for key in keys if path.endswith(f"/{key}")), b"")
        end.sendall(answer(path, body))

    with raw_server(respond) as url:
        yield url


def without_times(out: Path) -> list[dict[str, Any]]:
    """The numbers of a run's metrics.jsonl that do not depend on the clock."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "label_wait_seconds", "check")  # the last is of the whole line
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]
