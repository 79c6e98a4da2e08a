"""The middleware and the connections under it, attacked as strangers would: on a real server."""

from __future__ import annotations

import base64
import json
import logging
import socket
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.served import BIG, WAIT, Served, read_answer, request, serving

from sskt.server.http.logs import JsonLines, TextLines
from sskt.server.http.middleware import LINGER_SECONDS, route_of
from sskt.server.http.protocol import MAX_HEAD, MAX_HEADERS, MAX_PIPELINED, many_files
from sskt.server.http.tokens import new_token, revoke
from sskt.teacher_cache.errors import maintainers

SHORT = 0.3


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("run"), max_body=1000) as server:
        yield server


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def ends(client: socket.socket) -> bytes:
    """Everything until the server closes."""
    got = b""
    try:
        while data := client.recv(2**16):
            got += data
    except ConnectionResetError:
        pass
    return got


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    records = [r for r in caplog.records if r.name == "sskt.access"]
    return [json.loads(JsonLines().format(r)) for r in records]


# Answers


def test_an_answer_names_its_request_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path / "run") as served, caplog.at_level(logging.INFO, "sskt"):
        answer = served.get("/zarr/a%20b/%0d%1bSet?set=x", "X-Request-ID: my-id.7")
        until(lambda: bool(lines_of(caplog)))
    assert answer.status == 200 and answer.body == b"small"
    assert answer.headers["x-request-id"] == "my-id.7"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "server" not in answer.headers
    (line,) = lines_of(caplog)
    assert line["path"] == "/zarr/a%20b/%0d%1bSet"
    said = {k: line[k] for k in ("level", "message", "request_id", "method", "status", "bytes")}
    assert said == {
        "level": "info",
        "message": "request",
        "request_id": "my-id.7",
        "method": "GET",
        "status": 200,
        "bytes": 5,
    }
    assert line["client"] == "127.0.0.1" and 0 < line["seconds"] < WAIT
    assert line["time"].endswith("Z")
    assert served.metrics.totals()["routes"]["/zarr"]["requests"] == 1


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "a;b", "<script>", "\xe4"])
def test_a_request_id_that_could_do_harm_is_replaced(served: Served, sent: str) -> None:
    shown = [served.get("/small", f"X-Request-ID: {sent}").headers["x-request-id"] for _ in "12"]
    assert sent not in shown and shown[0] != shown[1]
    assert all(len(s) == 16 and s.isalnum() for s in shown)


@pytest.mark.parametrize(
    ("path", "status", "title"),
    [
        ("/nothing-there", 404, "not found"),
        ("/echo", 405, "method not allowed"),
        ("/problem", 409, "not stored"),
        ("/incomplete", 409, "conflict"),
        ("/corrupt", 500, "label set damaged"),
        ("/boom", 500, "internal server error"),
        ("/nothing/", 500, "internal server error"),
    ],
)
def test_every_error_is_a_problem(served: Served, path: str, status: int, title: str) -> None:
    answer = served.get(path)
    told = json.loads(answer.body)
    assert (answer.status, told["status"], told["title"]) == (status, status, title)
    assert answer.headers["content-type"] == "application/problem+json"
    assert told["request_id"] == answer.headers["x-request-id"]
    assert "hunter2" not in answer.body.decode() and "Traceback" not in answer.body.decode()
    if status == 405:
        assert answer.headers["allow"] == "POST"
    if path == "/problem":
        assert told["missing"] == [3] and told["detail"] == "seed 3"


def test_an_unexpected_error_is_in_the_log_and_nowhere_else(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    before = served.metrics.totals()["errors"].get("ValueError", 0)
    with caplog.at_level(logging.INFO, "sskt"):
        answer = served.get("/boom")
        shown = answer.headers["x-request-id"]
        until(lambda: bool(lines_of(caplog)))
    told = json.loads(answer.body)
    assert told["request_id"] == shown and "hunter2" not in str(told)
    assert told["report"] == f"report it, with the lines of the log about it, {maintainers()}"
    (record,) = [r for r in caplog.records if r.name == "sskt.middleware"]
    line = json.loads(JsonLines().format(record))
    assert line["level"] == "error" and "hunter2" in line["traceback"]
    assert served.metrics.totals()["errors"]["ValueError"] == before + 1
    (last,) = served.metrics.recent_errors(1)
    assert last["request_id"] == shown and "hunter2" in last["detail"]


def test_an_answer_that_fails_half_way_is_no_whole_answer(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        with pytest.raises(ConnectionError, match="closed after"):
            served.get("/half/")
        until(lambda: bool(lines_of(caplog)))  # the line may be written after the client's error
    assert lines_of(caplog)[0]["message"] == "request cut off"
    errors = [r.name for r in caplog.records if r.levelno >= logging.ERROR]
    assert errors == ["sskt.middleware"]


def test_head_has_no_body_and_the_connection_goes_on(served: Served) -> None:
    with served.connect() as client:
        for path, status in (("/small", 200), ("/big", 200), ("/nothing-there", 404)):
            client.sendall(request(path, method="HEAD"))
            head = read_answer(client, "HEAD")
            assert head.status == status and int(head.headers["content-length"]) > 0
        client.sendall(request("/stream"))
        assert read_answer(client).body == b"onetwo"


def test_a_large_answer_is_whole(served: Served) -> None:
    assert served.get("/big").body == BIG


def test_metrics_never_see_a_raw_path(tmp_path: Path) -> None:
    with serving(tmp_path / "run") as served:
        for i in range(5):
            for path in ("/zarr", "/nothing", "/nothing-there"):
                served.get(f"{path}/{i}")
    # Stopped, so that what was sent last has been counted too.
    routes = served.metrics.totals()["routes"]
    assert {route: found["requests"] for route, found in routes.items()} == {
        "/zarr": 5,
        "/nothing": 5,
        "other": 5,
    }
    assert route_of({}) == "other"


# Who may


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Served, Path]]:
    path = tmp_path / "tokens.json"
    new_token(path, "anybody", ["read"], None)
    with serving(tmp_path / "run", path, max_body=1000) as server:
        yield server, path


def basic(secret: str) -> str:
    return "Authorization: Basic " + base64.b64encode(f"any:{secret}".encode()).decode()


def test_tokens_open_what_their_scopes_name(
    guarded: tuple[Served, Path], caplog: pytest.LogCaptureFixture
) -> None:
    server, path = guarded
    reads = new_token(path, "reads", ["read"], None)
    computes = new_token(path, "computes", ["compute"], None)
    until(lambda: server.get("/small", f"Authorization: Bearer {computes}").status == 200)
    caplog.set_level(logging.DEBUG)
    assert server.get("/small", f"authorization: bearer  {reads} ").status == 200
    assert server.get("/small", basic(reads)).status == 200
    post = request("/compute", f"Authorization: Bearer {reads}", method="POST")
    refused = server.ask(post)
    assert refused.status == 403 and 'scope="compute"' in refused.headers["www-authenticate"]
    assert json.loads(refused.body)["title"] == "scope missing"
    assert server.ask(post.replace(reads.encode(), computes.encode())).body == b"computed"
    assert [server.get(p).status for p in ("/healthz", "/readyz")] == [200, 200]
    revoke(path, "reads")
    until(lambda: server.get("/small", f"Authorization: Bearer {reads}").status == 401)
    logged = "\n".join(JsonLines().format(r) for r in caplog.records)
    assert '"token": "computes"' in logged
    for secret in (reads, computes):
        assert secret not in logged and basic(secret).split()[-1] not in logged


FORGED = {
    "none": (),
    "another": ("Authorization: Bearer sskt_" + "A" * 43,),
    "empty": ("Authorization: Bearer ",),
    "no scheme": ("Authorization: SECRET",),
    "another scheme": ("Authorization: Digest SECRET",),
    "twice": ("Authorization: Bearer SECRET", "Authorization: Bearer SECRET"),
    "in a cookie": ("Cookie: token=SECRET",),
    "basic that is no base64": ("Authorization: Basic SECRET",),
    "basic that is no text": ("Authorization: Basic //79",),
    "longer": ("Authorization: Bearer SECRETx",),
    "not ascii": ("Authorization: Bearer \xff\xfe",),
    "endless": ("Authorization: Bearer " + "a" * 60_000,),
}


@pytest.mark.parametrize("kind", FORGED)
def test_whoever_shows_no_token_gets_nothing(guarded: tuple[Served, Path], kind: str) -> None:
    server, path = guarded
    secret = new_token(path, "lab", ["read"], None)
    headers = [h.replace("SECRET", secret) for h in FORGED[kind]]
    for where in ("/small", f"/small?token={secret}", "/metrics", "/nothing-there", "//healthz"):
        answer = server.get(where, *headers)
        assert answer.status == 401, where
        assert answer.head.lower().count("www-authenticate: ") == 2
        assert secret not in answer.head + answer.body.decode()
    assert server.seen.calls == []


def test_a_damaged_token_file_lets_nobody_in(guarded: tuple[Served, Path]) -> None:
    server, path = guarded
    secret = new_token(path, "lab", ["read"], None)
    bearer = f"Authorization: Bearer {secret}"
    until(lambda: server.get("/small", bearer).status == 200)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    until(lambda: server.get("/small", bearer).status == 503)
    answer = server.get("/small", bearer)
    assert int(answer.headers["retry-after"]) > 0 and str(path) not in answer.body.decode()
    assert server.get("/healthz").status == 200
    path.write_bytes(whole)
    until(lambda: server.get("/small", bearer).status == 200)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((), 200),
        (("Sec-Fetch-Site: same-origin",), 200),
        (("Sec-Fetch-Site: none",), 200),
        (("Origin: http://127.0.0.1:99",), 200),
        (("Sec-Fetch-Site: cross-site",), 403),
        (("Sec-Fetch-Site: same-site",), 403),
        (("Origin: http://evil.example",), 403),
        (("Origin: null",), 403),
        (("Origin: http://[",), 403),
    ],
)
def test_another_sites_page_cannot_make_the_server_work(
    served: Served, headers: tuple[str, ...], status: int
) -> None:
    assert served.get("/compute", *headers, method="POST").status == status


HOSTS = {
    "127.0.0.1": True,
    "127.0.0.1:8080": True,
    "127.9.9.9": True,
    "localhost": True,
    "LocalHost.:80": True,
    "[::1]": True,
    "[::1]:8080": True,
    "labels.example.org": False,
    "127.0.0.1.example.org": False,
    "localhost.example.org": False,
    "example.org:127.0.0.1": False,
    "user@localhost": False,
    "localhost/": False,
    "10.0.0.1": False,
    "0.0.0.0": False,
    "[::]": False,
    "": False,
}
KNOWN, OTHER = "labels.example.org", "evil.example"


def ask_as(server: Served, host: str, path: str = "/small", *headers: str) -> int:
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]
    return server.ask("\r\n".join(lines).encode()).status


@pytest.mark.parametrize("host", HOSTS)
def test_without_tokens_only_names_of_the_loopback_are_answered(served: Served, host: str) -> None:
    """Else a page that lets its own name point to this machine would read everything."""
    for path in ("/small", "/healthz", "/metrics", "/zarr/x"):
        assert ask_as(served, host, path) == (200 if HOSTS[host] else 403)
    post = request("/compute", method="POST").replace(b"Host: 127.0.0.1", b"Host: " + host.encode())
    assert served.ask(post).status == (200 if HOSTS[host] else 403)


def test_names_that_are_allowed(tmp_path: Path) -> None:
    with serving(tmp_path / "run", allowed_hosts=(KNOWN,)) as server:
        answers = [ask_as(server, host) for host in (KNOWN, KNOWN.upper(), "localhost", OTHER)]
        assert answers == [200, 200, 200, 403]
    path = tmp_path / "tokens.json"
    bearer = f"Authorization: Bearer {new_token(path, 'lab', ['read'], None)}"
    with serving(tmp_path / "all", path) as server:
        assert [ask_as(server, host, "/small", bearer) for host in (KNOWN, OTHER)] == [200, 200]
    with serving(tmp_path / "some", path, allowed_hosts=(KNOWN,)) as server:
        assert [ask_as(server, host, "/small", bearer) for host in (KNOWN, OTHER)] == [200, 403]
        assert ask_as(server, "10.0.0.1", "/healthz") == 200, "a cluster's probe"


# How large


def test_bodies_up_to_the_limit_and_not_beyond(served: Served) -> None:
    assert served.get("/echo", method="POST", body=b"\1" * 1000).body == b"1000 1000"
    served.seen.calls.clear()
    refused = served.get("/echo", method="POST", body=bytes(1001))
    assert refused.status == 413 and refused.headers["connection"] == "close"
    assert "at most 1,000 bytes" in json.loads(refused.body)["detail"]
    chunked = request("/echo", "Transfer-Encoding: chunked", method="POST")
    piece = b"1f4\r\n" + bytes(500) + b"\r\n"
    assert served.ask(chunked + piece * 2 + b"0\r\n\r\n").body == b"1000 0"
    served.seen.calls.clear()
    assert served.ask(chunked + piece * 3 + b"0\r\n\r\n").status == 413
    assert served.ask(request("/echo", "Content-Length: " + "9" * 18, method="POST")).status == 413
    assert served.seen.calls == []


def test_a_client_in_the_middle_of_a_large_body_reads_why(served: Served) -> None:
    with served.connect() as client:
        client.sendall(request("/echo", f"Content-Length: {2**24}", method="POST"))
        for _ in range(64):  # would be reset, were the connection closed at once
            client.sendall(bytes(2**18))
        assert read_answer(client).status == 413


def test_expecting_clients_are_refused_before_they_send(served: Served) -> None:
    started = time.monotonic()
    head = ("Expect: 100-continue", "Content-Length: 2000")
    assert served.get("/echo", *head, method="POST").status == 413
    assert time.monotonic() - started < LINGER_SECONDS
    with served.connect() as client:
        client.sendall(request("/echo", "Expect: 100-continue", "Content-Length: 2", method="POST"))
        assert client.recv(100).startswith(b"HTTP/1.1 100")
        client.sendall(b"\1\1")
        assert read_answer(client).body == b"2 2"


# How long


def test_a_slow_body_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "run", body_seconds=SHORT) as server, server.connect() as client:
        client.sendall(request("/echo", "Content-Length: 9", method="POST") + b"1")
        answer = read_answer(client)
        assert answer.status == 408 and answer.headers["connection"] == "close"
        assert server.seen.calls == []


@pytest.mark.parametrize("path", ["/slow", "/thread"])
def test_an_answer_in_time_or_a_problem(tmp_path: Path, path: str) -> None:
    with serving(tmp_path / "run", request_seconds=SHORT) as server, server.connect() as client:
        client.sendall(request(path))
        answer = read_answer(client)
        assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
        assert json.loads(answer.body)["title"] == "no answer in time"
        if path == "/slow":
            assert server.seen.cancelled.wait(WAIT)
        client.sendall(request("/small"))
        assert read_answer(client).body == b"small"
        assert server.metrics.totals()["errors"] == {"late": 1}


def test_a_client_that_leaves_stops_the_work(tmp_path: Path) -> None:
    with serving(tmp_path / "run") as server:
        with server.connect() as client:
            client.sendall(request("/slow"))
            assert server.seen.started.wait(WAIT)
        assert server.seen.cancelled.wait(WAIT)
        until(lambda: server.middleware.serving == 0)
        assert server.metrics.totals()["errors"] == {}


def test_a_client_that_leaves_in_mid_body_is_forgotten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path / "run") as server, caplog.at_level(logging.INFO):
        with server.connect() as client:
            client.sendall(request("/echo", "Content-Length: 9", method="POST") + b"1")
            until(lambda: server.middleware.serving == 1)
        until(lambda: bool(lines_of(caplog)))
        assert lines_of(caplog)[0]["status"] == 499
        assert server.middleware.serving == 0 and server.seen.calls == []


def test_a_client_that_takes_nothing_is_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serving(tmp_path / "run", send_seconds=SHORT) as server,
        server.connect(receive_buffer=4096) as client,
        caplog.at_level(logging.INFO),
    ):
        client.sendall(request("/big"))
        until(lambda: bool(lines_of(caplog)))
        (line,) = lines_of(caplog)
        assert line["message"] == "request cut off" and line["seconds"] >= SHORT
        assert line["bytes"] < len(BIG) / 2, "the rest waits in no buffer of the server"
        assert server.middleware.serving == 0
        assert len(ends(client)) < len(BIG)
        assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_a_slow_but_living_client_gets_everything(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "run", send_seconds=SHORT, request_seconds=SHORT) as server,
        server.connect() as client,
    ):
        client.sendall(request("/big"))
        started, got = time.monotonic(), bytearray()
        while len(got) < len(BIG):
            data = client.recv(2**18)
            assert data, "cut off"
            got += data
            if time.monotonic() - started < 3 * SHORT:
                time.sleep(0.01)  # the client's slowness, not a wait for the server
        assert time.monotonic() - started > 2 * SHORT and got.endswith(BIG[-1000:])


# How many


def test_more_requests_than_one_client_may(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    secrets = [new_token(path, name, ["read"], None) for name in "abc"]
    bearers = [f"Authorization: Bearer {secret}" for secret in secrets]
    with ExitStack() as stack:
        run = serving(tmp_path / "run", path, max_requests_each=2, max_requests=3)
        server = stack.enter_context(run)
        waiting = []
        for who in (0, 0, 1):
            waiting.append(stack.enter_context(server.connect()))
            waiting[-1].sendall(request("/slow", bearers[who]))
            until(lambda: server.middleware.serving == len(waiting))
        for who, status in ((0, 429), (1, 503), (2, 503)):
            answer = server.get("/small", bearers[who])
            assert answer.status == status and int(answer.headers["retry-after"]) > 0
        for free in ("/healthz", "/readyz", "/metrics"):
            assert server.get(free, bearers[2]).status == 200
        server.seen.go_on.set()
        for client in waiting:
            assert read_answer(client).body == b"at last"
        until(lambda: server.middleware.serving == 0)
        assert not server.middleware.serving_each
        assert server.get("/small", bearers[0]).status == 200


def test_a_place_is_held_until_the_last_byte_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path / "run", max_requests=1) as server, server.connect() as client:
        client.sendall(request("/big"))
        assert client.recv(1)
        assert server.get("/small").status == 503
        left = len(BIG)
        while server.get("/small").status == 503:
            left -= len(client.recv(2**20))
            assert left > 0


# Connections


def test_a_head_that_does_not_come_closes_the_connection(tmp_path: Path) -> None:
    with serving(tmp_path / "run", header_seconds=SHORT) as server:
        sent: list[bytes] = [
            b"",
            b"GET",
            b"\r\n\r\n",
            b"GET /small HTTP/1.1\r\nHost: localhost\r\n",
        ]
        sent.append(request("/small") + b"GET /sm")  # the next request on a kept connection
        for data in sent:
            with server.connect() as client:
                client.sendall(data)
                started = time.monotonic()
                if data.startswith(b"GET /small HTTP/1.1\r\nHost: 127"):
                    assert read_answer(client).body == b"small"
                    client.sendall(b"a")
                assert ends(client) == b""
                assert SHORT / 2 < time.monotonic() - started < WAIT / 2


def test_a_head_that_trickles_is_no_better(tmp_path: Path) -> None:
    with serving(tmp_path / "run", header_seconds=SHORT) as server, server.connect() as client:
        client.sendall(b"GET /small HTTP/1.1\r\n")
        client.settimeout(0.02)
        started = time.monotonic()
        with pytest.raises((ConnectionError, AssertionError)):
            while time.monotonic() - started < WAIT:
                client.sendall(b"a: b\r\n")
                with suppress(TimeoutError):
                    assert client.recv(1)
        assert time.monotonic() - started < WAIT / 2


def test_a_busy_request_is_no_late_head(tmp_path: Path) -> None:
    with serving(tmp_path / "run", header_seconds=SHORT) as server, server.connect() as client:
        client.sendall(request("/slow"))
        started = time.monotonic()
        client.settimeout(3 * SHORT)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert time.monotonic() - started >= 3 * SHORT
        client.settimeout(WAIT)
        server.seen.go_on.set()
        assert read_answer(client).body == b"at last"


LARGE = {
    "a long target": b"GET /" + b"a" * MAX_HEAD + b" HTTP/1.1\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nA: " + b"a" * MAX_HEAD + b"\r\n\r\n",
    "an endless target": b"GET /" + b"a" * 4 * MAX_HEAD,
    "an endless header": b"GET / HTTP/1.1\r\nA: " + b"a" * 4 * MAX_HEAD,
    "an endless name": b"GET / HTTP/1.1\r\n" + b"a" * 4 * MAX_HEAD,
    "many headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
    "blank lines": b"\r\n" * MAX_HEAD,
    "an endless trailer": (
        b"POST /echo HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
        b"A: " + b"a" * 4 * MAX_HEAD
    ),
    "many trailers": (
        b"POST /echo HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
        + b"a: b\r\n" * MAX_HEAD
    ),
}


@pytest.mark.parametrize("kind", LARGE)
def test_heads_are_bounded(served: Served, kind: str) -> None:
    with served.connect() as client:
        try:
            client.sendall(LARGE[kind])
        except ConnectionError:
            return  # closed under our hands
        got = ends(client)
    assert got == b"" or got.startswith(b"HTTP/1.1 431 ")
    assert b"200 OK" not in got


def test_a_large_head_that_is_allowed(served: Served) -> None:
    headers = [f"a{i}: {'x' * 600}" for i in range(MAX_HEADERS - 1)]
    assert served.get("/small", *headers).status == 200


BAD = {
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT a:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an unknown method": b"BREW / HTTP/1.1\r\n\r\n",
    "no path": b"GET ?a HTTP/1.1\r\n\r\n",
    "a path beyond ASCII": b"GET /\xff HTTP/1.1\r\n\r\n",
    "a line break in a header": b"GET / HTTP/1.1\r\nA: b\nB\x00: c\r\n\r\n",
    "length and chunks": (
        b"POST /echo HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "two lengths": b"POST /echo HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a negative length": b"POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "a length with a sign": b"POST /echo HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
    "a bad chunk": b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_http_is_refused(served: Served, kind: str) -> None:
    served.seen.calls.clear()
    with served.connect() as client:
        client.sendall(BAD[kind])
        answer = read_answer(client)
        assert answer.status == 400 and json.loads(answer.body)["title"] == "bad request"
        assert ends(client) == b""
    assert served.seen.calls == []


@given(data=st.binary(max_size=200))
def test_no_bytes_at_all_break_the_server(served: Served, data: bytes) -> None:
    with served.connect() as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert b"HTTP/1.1 5" not in ends(client)


def test_an_upgrade_is_not_offered_and_does_no_harm(served: Served) -> None:
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    with served.connect() as client:
        for headers in (upgrade, (), ("Connection: Upgrade", "Upgrade: websocket")):
            client.sendall(request("/small", *headers))
            assert read_answer(client).body == b"small"
        served.seen.calls.clear()
        hidden = request("/small")  # httptools would take this body for a request
        client.sendall(request("/echo", *upgrade, method="POST", body=hidden))
        assert read_answer(client).status == 400 and ends(client) == b""
    assert served.seen.calls == []


def test_trailers_are_not_taken_for_headers(served: Served) -> None:
    head = request("/echo", "Transfer-Encoding: chunked", method="POST")
    assert served.ask(head + b"1\r\na\r\n0\r\nAuthorization: Bearer x\r\n\r\n").body == b"1 97"
    assert "authorization" not in served.seen.headers


def test_pipelined_requests_are_answered_in_order_and_bounded(tmp_path: Path) -> None:
    with serving(tmp_path / "run") as server:
        with server.connect() as client:
            client.sendall(request("/small") * 5 + request("/echo", method="POST", body=b"\3"))
            file = [read_one(client) for _ in range(6)]
            assert file == [b"small"] * 5 + [b"1 3"]
        with server.connect() as client:
            client.sendall(request("/slow") + request("/small") * 5000)
            assert ends(client) == b"", "a flood behind a request under way"
        assert server.seen.started.wait(WAIT) and server.seen.cancelled.wait(WAIT)
        assert len(server.seen.calls) <= 5 + MAX_PIPELINED


def read_one(client: socket.socket) -> bytes:
    """One answer, and no byte more."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line[:15] == b"content-length:")
    return client.recv(length, socket.MSG_WAITALL)


def test_idle_connections_stop_nobody_and_are_bounded(tmp_path: Path) -> None:
    with ExitStack() as stack:
        run = serving(tmp_path / "run", header_seconds=60, max_connections=201)
        server = stack.enter_context(run)
        idle = [stack.enter_context(server.connect()) for _ in range(200)]
        for client in idle[:100]:
            client.sendall(b"GET /")
        with server.connect() as client:
            client.sendall(request("/small"))
            assert read_answer(client).body == b"small"
            with server.connect() as one_more:
                assert ends(one_more) == b""
        idle[0].sendall(b"small HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_answer(idle[0]).body == b"small"


def test_files_may_be_opened_up_to_the_systems_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        assert many_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert many_files() >= min(hard, 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# The log


@given(text=st.text() | st.text("\x00\x1b\x7f\x9b\n\u2028\u202e\ud800"), value=st.text())
def test_a_line_of_the_log_is_a_line(text: str, value: str) -> None:
    record = logging.makeLogRecord({"msg": "%s", "args": (text,), "path": value, "levelname": "X"})
    line = JsonLines().format(record)
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["message"] == text and json.loads(line)["path"] == value
    shown = TextLines().format(record)
    assert len(shown.splitlines()) == 1
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(c) for c in shown} & {"RLO", "LRO", "RLI", "LRI", "PDF"}


def test_a_traceback_in_text_cannot_pass_for_lines_of_the_log() -> None:
    try:
        raise ValueError("a\n2026-01-01T00:00:00.000Z info request status=200\x1b[2J")
    except ValueError as error:
        raised = (ValueError, error, error.__traceback__)
    record = logging.makeLogRecord({"msg": "failed", "exc_info": raised, "levelname": "ERROR"})
    first, *rest = TextLines().format(record).splitlines()
    assert first.endswith("error failed") and all(line.startswith("  | ") for line in rest)
    assert "\x1b" not in "".join(rest)
    assert "\\n2026" in JsonLines().format(record)
