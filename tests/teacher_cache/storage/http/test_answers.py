"""Answers of hostile, broken or slow servers: they end in an error, in time and in one line."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.servers import raw_server

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.storage.http import answers, client
from sskt.teacher_cache.storage.http.client import TOKEN, Server
from sskt.teacher_cache.storage.http.storage import open_server

Answer = Callable[[socket.socket, bytes], None]

HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSES", (0.01, 0.05))
    monkeypatch.setattr(client, "FIRST_SECONDS", 0)
    monkeypatch.setattr(answers, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(answers, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(answers, "SLOWEST", 100_000)
    monkeypatch.delenv(TOKEN, raising=False)


def sends(*pieces: bytes, again: bytes = b"", every: float = 0.0) -> Answer:
    """Sends some bytes, and then others again and again until the client closes."""

    def answer(end: socket.socket, request: bytes) -> None:
        for piece in pieces:
            end.sendall(piece)
        while again:
            end.sendall(again)
            time.sleep(every)

    return answer


def silent(end: socket.socket, request: bytes) -> None:
    """Never answers, until the client closes."""
    end.recv(1)


def stops(end: socket.socket, request: bytes) -> None:
    """Sends a byte of the body and then nothing, until the client closes."""
    end.sendall(HEAD + LENGTH + b"{")
    end.recv(1)


LENGTH = b"Content-Length: 20000\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SLOW = {
    "silence": silent,
    "headers byte by byte": sends(HEAD + b"X: ", again=b"x", every=0.02),
    "header after header": sends(HEAD, again=b"X: x\r\n", every=0.1),
    "a body byte by byte": sends(HEAD + LENGTH, again=b" ", every=0.02),
    "a body that stops": stops,
    "chunk after chunk": sends(CHUNKED, again=b"1\r\n \r\n", every=0.02),
    "no length, byte by byte": sends(HEAD + b"\r\n", again=b" ", every=0.02),
}


@pytest.mark.parametrize("case", SLOW)
def test_an_answer_has_a_deadline(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only between two bytes, and for headers too."""
    monkeypatch.setattr(client, "DOCUMENT_BYTES", 50_000)
    with raw_server(SLOW[case]) as url:
        began = time.monotonic()
        with pytest.raises(InputError, match=f"cannot reach {url}: timed out"):
            Server(url).json("/v1/server", dict)
        assert 0.4 < time.monotonic() - began < 3


LARGE = {
    "announced": sends(HEAD + b"Content-Length: 1000000000000000\r\n\r\n", again=b" " * 4096),
    "endless": sends(HEAD + b"\r\n", again=b" " * 65536),
    "endless chunks": sends(CHUNKED, again=b"1000\r\n" + b" " * 4096 + b"\r\n"),
}


@pytest.mark.parametrize("case", LARGE)
def test_an_answer_has_a_largest_size(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "DOCUMENT_BYTES", 1_000_000)
    monkeypatch.setattr(answers, "IDLE_SECONDS", 30)
    with raw_server(LARGE[case]) as url, pytest.raises(InputError, match="at most 1000000"):
        Server(url).json("/v1/server", dict)


def document(body: bytes) -> Answer:
    return sends(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"null",
        b"[]",
        b'{"label_sets": 5}',
        b'{"label_sets": [5]}',
        b'{"label_sets": [{"name": 5}]}',
        b'{"label_sets": [{"name": null}], "damaged": {"x": "y"}}',
        b'{"label_sets": [], "damaged": 5}',
        b"\xff\xfe",
        b"9" * 10_000,
    ],
)
def test_a_document_of_another_shape_is_an_error_in_one_line(
    body: bytes, sskt: Callable[..., tuple[int, str, str]]
) -> None:
    with raw_server(document(body)) as url:
        status, out, err = sskt("ls", url)
    assert (status, out) == (2, "")
    assert err.startswith(f"sskt: {url} answers, but /v1/label-sets is not as a label server")
    assert err.count("\n") == 1


@pytest.mark.parametrize("size", ["-1", "1.5", '"7"', "true", "null", "9223372036854775808"])
def test_a_size_that_is_none(size: str) -> None:
    body = f'{{"files": {{"labels/c/0/0/0": {size}}}}}'.encode()
    with raw_server(document(body)) as url, pytest.raises(InputError, match="not as a label"):
        open_server(url).below("images.tiny.0123456789ab").sizes()


def test_a_redirect_is_not_followed_and_the_token_goes_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TOKEN, "sskt_secret")
    seen: list[bytes] = []

    def other(end: socket.socket, request: bytes) -> None:
        seen.append(request)

    with raw_server(other) as elsewhere:

        def redirect(end: socket.socket, request: bytes) -> None:
            assert b"Bearer sskt_secret" in request
            end.sendall(b"HTTP/1.1 307 -\r\nLocation: %s/\r\n\r\n" % elsewhere.encode())

        with raw_server(redirect) as url:
            said = f"{url} redirects to {elsewhere}/; use that URL"
            with pytest.raises(InputError, match=said):
                open_server(url).folders()
    assert not seen


@contextlib.contextmanager
def asking(server: Server) -> Iterator[list[Any]]:
    """A thread that requests a document: what it raised."""
    raised: list[Any] = []

    def ask() -> None:
        try:
            server.json("/v1/server", dict)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    yield raised
    thread.join()


@pytest.mark.parametrize("case", ["silence", "a body that stops", "a body byte by byte"])
def test_closing_ends_an_answer_that_does_not_end(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "IDLE_SECONDS", 60)
    with raw_server(SLOW[case]) as url:
        server = Server(url)
        with asking(server) as raised:
            time.sleep(0.3)
            assert not raised
            server.close()
            began = time.monotonic()
        assert time.monotonic() - began < 2
    assert "stopped while waiting" in str(raised[0])
