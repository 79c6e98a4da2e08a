"""The whole server attacked as strangers on its network would: no 500, no leak, bounded memory."""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import json
import selectors
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.attacks import WAIT, Attacked, make_wide, many_files, serving, tuned
from support.helpers import TINY
from support.served import read_answer, request

from sskt.cli.main import run
from sskt.server.http.tokens import new_token, revoke

MIB = 2**20
WIDE = 16384
"""Rows of the wide set: 32 MiB of labels, in two shards."""
SECONDS = 2
"""How long the impatient server waits for a client."""


@pytest.fixture(scope="module")
def cache(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of real labels, one with large answers, one damaged; and a file beside them."""
    folder = tmp_path_factory.mktemp("attacked")
    options = {
        "--source": f"tiny={TINY}:build",
        "--target": images,
        "--policy": "pad-crop-flip",
        "--seeds": 3,
        "--shard-rows": 16,
        "--batch-size": 8,
        "--workers": 0,
        "--device": "cpu",
        "--cache": folder / "cache",
    }
    words = itertools.chain.from_iterable(options.items())
    assert run(["cache-teachers", *map(str, words)]) == 0
    (small,) = (folder / "cache").glob("images*")
    shutil.copytree(small, folder / "cache" / "damaged")
    (folder / "cache" / "damaged" / "zarr.json").write_text("{")
    make_wide(folder / "cache", WIDE)
    (folder / "secret.txt").write_text("hunter2")
    return folder / "cache"


@pytest.fixture(scope="module")
def name(cache: Path) -> str:
    return next(path.name for path in cache.glob("images*"))


@pytest.fixture(scope="module")
def wide(cache: Path) -> str:
    return next(path.name for path in cache.glob("wide*"))


@pytest.fixture(scope="module")
def running(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with serving(tmp_path_factory.mktemp("open"), cache) as server:
        yield server


@pytest.fixture
def server(running: Attacked) -> Iterator[Attacked]:
    """The server as it comes, for this machine only; well after every test."""
    yield running
    running.require_well()


@pytest.fixture(scope="module")
def guarding(
    cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Attacked, Path]]:
    folder = tmp_path_factory.mktemp("guarded")
    tokens = folder / "tokens.json"
    new_token(tokens, "first", ["read"], None)
    arguments = ("--token-file", tokens, "--on-demand", "--device", "cpu", "--queue", 2)
    named = ("--source", f"tiny={TINY}:build")
    with serving(folder, cache, *arguments, *named, "--max-ids", 100) as server:
        yield server, tokens


@pytest.fixture
def guarded(guarding: tuple[Attacked, Path]) -> Iterator[tuple[Attacked, Path]]:
    """A server with tokens that computes on demand; well after every test."""
    yield guarding
    guarding[0].require_well()


@pytest.fixture(scope="module")
def hurried(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    limits = {f"{what}_seconds": SECONDS for what in ("header", "body", "send")}
    with tuned(tmp_path_factory.mktemp("short"), cache, **limits) as server:
        yield server


@pytest.fixture
def impatient(hurried: Attacked) -> Iterator[Attacked]:
    """A server that cuts slow clients off soon; well after every test."""
    yield hurried
    hurried.require_well()


# What the description promises


def schemathesis(server: Attacked, folder: Path, described: dict[str, Any], *more: str) -> str:
    """Its command line over a description; '' if nothing contradicts that."""
    (folder / "openapi.json").write_text(json.dumps(described))
    (folder / "schemathesis.toml").write_text("")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file"),
        *(str(folder / "schemathesis.toml"), "run", str(folder / "openapi.json")),
        *("--url", f"http://127.0.0.1:{server.port}", "--phases", "examples,coverage,fuzzing"),
        *("--generation-deterministic", "--no-shrink", "--continue-on-failure"),
        *("--warnings", "off", "--request-timeout", "20", "--max-examples", "8", *more),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=4 * WAIT)
    assert "Test cases:" in done.stdout, done.stdout + done.stderr
    return done.stdout if done.returncode else ""


@pytest.mark.slow
def test_no_answer_contradicts_openapi(server: Attacked, tmp_path: Path) -> None:
    """Any names: a client of this machine needs no token."""
    described = json.loads(server.get("/v1/openapi.json").body)
    # With raw ids, set and seed are in the query; OpenAPI has no word for that.
    failed = schemathesis(
        server, tmp_path, described, "--exclude-checks", "positive_data_acceptance"
    )
    assert not failed, failed


@pytest.mark.slow
def test_no_answer_with_tokens_contradicts_openapi(
    guarded: tuple[Attacked, Path], tmp_path: Path, name: str
) -> None:
    """Names and rows that exist: what is valid is accepted, and only with a token."""
    server, tokens = guarded
    header = shown(server, tokens, "schema", "compute")
    described = json.loads(server.get("/v1/openapi.json", header).body)
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in ("name", "path"):
                    value = name if parameter["name"] == "name" else f"{name}/zarr.json"
                    parameter["schema"] |= {"enum": [value]}
        if path == "/v1/labels:batch":
            body = operations["post"]["requestBody"]["content"]
            operations["post"]["parameters"] = []
            del body["application/octet-stream"], body["application/json"]["examples"]
            known = body["application/json"]["schema"]["properties"]
            known["set"]["enum"], known["seed"] = [name], {"enum": [0, 1, 2]}
            known["ids"] = {"type": "array", "items": {"enum": [0, 1, 59]}}
            body["application/json"]["schema"].pop("examples", None)
    seeds = described["components"]["schemas"]["ComputeRequest"]["properties"]["seeds"]
    seeds["items"] = {"enum": [0, 1, 2]}
    failed = schemathesis(server, tmp_path, described, "-H", header)
    assert not failed, failed
    assert {"GET", "POST"} <= {line.get("method") for line in server.lines()}


def test_openapi_asks_for_a_token_where_one_is_needed(
    server: Attacked, guarded: tuple[Attacked, Path]
) -> None:
    free = json.loads(server.get("/v1/openapi.json").body)
    assert {} in free["security"]
    secret = new_token(guarded[1], "reader", ["read"], None)
    described = json.loads(
        guarded[0].get("/v1/openapi.json", f"Authorization: Bearer {secret}").body
    )
    assert {} not in described["security"] and described["security"]
    for path in ("/healthz", "/readyz"):
        assert described["paths"][path]["get"]["security"] == []


# Tokens


def shown(server: Attacked, tokens: Path, name: str, scope: str = "read") -> str:
    """A header with a new token that the server knows already."""
    header = f"Authorization: Bearer {new_token(tokens, name, [scope], None)}"
    end = time.monotonic() + WAIT
    while server.get("/v1/auth", header).status != 204:
        assert time.monotonic() < end
        time.sleep(0.05)
    return header


def basic(text: bytes) -> bytes:
    return b"Authorization: Basic " + base64.b64encode(text)


def test_forged_tokens_open_nothing(guarded: tuple[Attacked, Path], name: str) -> None:
    server, tokens = guarded
    good = shown(server, tokens, "forged-from").rpartition(" ")[2].encode()
    other = bytes([good[-1] ^ 1])
    forged = {
        "nothing": b"X: y",
        "empty": b"Authorization:",
        "scheme only": b"Authorization: Bearer",
        "no scheme": b"Authorization: " + good,
        "another scheme": b"Authorization: Digest " + good,
        "prefix": b"Authorization: Bearer sskt_",
        "short": b"Authorization: Bearer " + good[:-1],
        "long": b"Authorization: Bearer " + good + b"A",
        "one bit": b"Authorization: Bearer " + good[:-1] + other,
        "case": b"Authorization: Bearer " + good.swapcase(),
        "quoted": b'Authorization: Bearer "' + good + b'"',
        "two words": b"Authorization: Bearer " + good + b" " + good,
        "list": b"Authorization: Bearer x, Bearer " + good,
        "unicode": "Authorization: Bearer sskt_\N{SNOWMAN}\u0430".encode(),
        "latin-1": b"Authorization: Bearer \xff\xfe\xe4" + good[3:],
        "hash": b"Authorization: Bearer "
        + json.loads(tokens.read_text())["tokens"][-1]["hash"].encode(),
        "32 kB": b"Authorization: Bearer " + b"A" * 2**15,
        "basic user": basic(good + b":"),
        "basic no colon": basic(good),
        "basic empty": basic(b""),
        "basic no text": basic(b"a:\xff\xfe"),
        "basic no base64": b"Authorization: Basic \xe4%%%=",
        "basic bare": b"Authorization: Basic",
        "basic NUL": basic(b"a:" + good + b"\0"),
        "twice": b"Authorization: Bearer " + good + b"\r\nAuthorization: Bearer " + good,
        "good and bad": b"Authorization: Bearer " + good + b"\r\nAuthorization: Bearer x",
        "proxy": b"Proxy-Authorization: Bearer " + good,
        "cookie": b"Cookie: token=" + good + b"; Authorization=Bearer " + good,
        "folded": b"Authorization: Bearer\r\n " + good,
    }
    targets = [f"/zarr/{name}/zarr.json", "/v1/openapi.json"]
    for target in targets:
        for kind, header in forged.items():
            lines = (f"GET {target} HTTP/1.1".encode(), b"Host: localhost", header, b"", b"")
            answer = server.ask(b"\r\n".join(lines))
            assert answer.status in ((400, 401) if kind in ("folded",) else (401,)), (kind, target)
            assert "sha256" not in answer.body.decode("latin-1")
    end = b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    secret = good.decode()
    for target in (
        *(f"{targets[0]}?{key}={secret}" for key in ("token", "access_token", "Authorization")),
        f"http://any:{secret}@127.0.0.1{targets[0]}",
        f"/healthz/../{targets[0]}",
        f"/healthz/..{targets[0]}",
        f"/healthz;{targets[0]}",
        f"/%2e%2e/healthz{targets[0]}",
        "/healthz/",
        "/metrics",
        "/",
        "/static/page.css",
        "/sets/x",
        "//healthz",
        "/HEALTHZ",
    ):
        assert server.ask(b"GET " + target.encode() + end).status in (400, 401), target
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH", "PROPFIND"):
        with server.connect() as client:
            client.sendall(f"{method} {targets[0]} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert read_answer(client, method).status == 401, method
    huge = request(targets[0], "Authorization: Bearer " + "A" * MIB)
    assert server.ask(huge).status == 431
    good_header = f"Authorization: Bearer {secret}"
    assert server.get(targets[0], good_header).status == 200
    assert secret not in server.log.read_text(), "a token was logged"


def test_tokens_end_at_once(guarded: tuple[Attacked, Path], name: str) -> None:
    server, tokens = guarded
    expiring = f"Authorization: Bearer {new_token(tokens, 'expiring', ['read'], 2 / 86400)}"
    made = time.monotonic()
    revoked = shown(server, tokens, "revoked")
    path = f"/zarr/{name}/zarr.json"
    with server.connect() as first, server.connect() as second:
        for client, header in ((first, expiring), (second, revoked)):
            client.sendall(request(path, header))
            assert read_answer(client).status == 200
        revoke(tokens, "revoked")
        time.sleep(max(0.3, made + 2.1 - time.monotonic()))
        for client, header in ((first, expiring), (second, revoked)):  # the connections are open
            client.sendall(request(path, header))
            answer = read_answer(client)
            assert answer.status == 401 and "www-authenticate" in answer.headers


def test_reading_is_not_computing(guarded: tuple[Attacked, Path], name: str) -> None:
    server, tokens = guarded
    reads = shown(server, tokens, "only-reads")
    computes = shown(server, tokens, "computes", "compute")
    kind = "Content-Type: application/json"
    body = json.dumps({"seeds": [0]}).encode()
    for path in (f"/v1/label-sets/{name}:compute", f"/v1/label-sets/{name}%3Acompute"):
        assert server.get(path, reads, kind, method="POST", body=body).status == 403
        assert server.get(path, computes, kind, method="POST", body=body).status == 202
    for origin in ("https://evil.example", "null"):
        foreign = f"Origin: {origin}"
        answer = server.get(
            f"/v1/label-sets/{name}:compute", computes, kind, foreign, method="POST", body=body
        )
        assert answer.status == 403
    missing = f"/zarr/{name}/view_check/c/3/0"
    assert server.get(missing, reads).status == 404
    asked = json.dumps({"set": name, "seed": 3, "ids": [0]}).encode()
    answer = server.get("/v1/labels:batch", reads, kind, method="POST", body=asked)
    assert answer.status == 409 and json.loads(answer.body)["missing"]["seeds"] == [3]
    assert json.loads(server.get("/v1/compute", reads).body)["entries"] == []


# Two readings of one request

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/labels:batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/server HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

AMBIGUOUS = {
    "length and chunks": POST
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunks and length": POST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 35\r\n\r\n" + SMUGGLED,
    "two lengths in one": POST + b"Content-Length: 0, 35\r\n\r\n" + SMUGGLED,
    "length with a sign": POST + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
    "negative length": POST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "hexadecimal length": POST + b"Content-Length: 0x0\r\n\r\n" + SMUGGLED,
    "length with a space": POST + b"Content-Length: 0 0\r\n\r\n" + SMUGGLED,
    "length of 2**64": POST + b"Content-Length: 18446744073709551616\r\n\r\n" + SMUGGLED,
    "length of 10**40": POST + b"Content-Length: 1" + b"0" * 40 + b"\r\n\r\n" + SMUGGLED,
    "length of letters": POST + b"Content-Length: none\r\n\r\n" + SMUGGLED,
    "no length": POST + b"Content-Length: \r\n\r\n" + SMUGGLED,
    "space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "space before a name": POST + b" Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "NUL in a name": POST + b"Transfer\0-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "coding after chunked": POST + b"Transfer-Encoding: chunked, x\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two codings": POST
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "length and unknown coding": POST
    + b"Content-Length: 5\r\nTransfer-Encoding: cow\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "bare CR": GET + b"X: y\rContent-Length: 35\r\n\r\n" + SMUGGLED,
    "chunk size with 0x": CHUNKED + b"0x0\r\n\r\n" + SMUGGLED,
    "negative chunk size": CHUNKED + b"-1\r\n\r\n" + SMUGGLED,
    "chunk size with a sign": CHUNKED + b"+0\r\n\r\n" + SMUGGLED,
    "chunk size of 2**64": CHUNKED + b"10000000000000000\r\n\r\n" + SMUGGLED,
    "huge chunk size": CHUNKED + b"F" * 40 + b"\r\n\r\n" + SMUGGLED,
    "no chunk size": CHUNKED + b"\r\n\r\n" + SMUGGLED,
    "chunk size in words": CHUNKED + b"zero\r\n\r\n" + SMUGGLED,
    "chunk longer than it says": CHUNKED + b"1\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "LF in an extension": CHUNKED + b"2;a\nx\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "NUL in the line": b"GET /v1/\0server HTTP/1.1\r\nHost: localhost\r\n\r\n" + SMUGGLED,
    "space in the target": b"GET /v1/server x HTTP/1.1\r\nHost: localhost\r\n\r\n" + SMUGGLED,
    "no version": b"GET /v1/server\r\n\r\n" + SMUGGLED,
    "version 0.9": b"GET /v1/server HTTP/0.9\r\nHost: localhost\r\n\r\n" + SMUGGLED,
    "version 1.2": b"GET /v1/server HTTP/1.2\r\nHost: localhost\r\n\r\n" + SMUGGLED,
    "version 2": b"GET /v1/server HTTP/2.0\r\nHost: localhost\r\n\r\n" + SMUGGLED,
    "version 9.9": b"GET /v1/server HTTP/9.9\r\nHost: localhost\r\n\r\n" + SMUGGLED,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0" + SMUGGLED,
    "TLS": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(range(256)) + SMUGGLED,
    "SSH": b"SSH-2.0-OpenSSH_9.0\r\n" + SMUGGLED,
    "zeros": bytes(1000) + SMUGGLED,
    "response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "no colon": GET + b"Content-Length 35\r\n\r\n" + SMUGGLED,
    "no name": GET + b": 36\r\n\r\n" + SMUGGLED,
    "NUL in a value": GET + b"X-Request-ID: a\0b\r\n\r\n" + SMUGGLED,
    "escape in a value": GET + b"X-Request-ID: \x1b[2J\r\n\r\n" + SMUGGLED,
    "body under an upgrade": POST
    + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 35\r\n\r\n"
    + SMUGGLED,
    "unknown method": b"EVIL /v1/server HTTP/1.1\r\nHost: localhost\r\n\r\n" + SMUGGLED,
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n" + SMUGGLED,
}
"""What a proxy could read in another way: the server reads none of it, and nothing after it."""


def test_nothing_is_smuggled(server: Attacked) -> None:
    found = {}
    for kind, (answer, closed) in server.together(AMBIGUOUS).items():
        statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
        if not closed or len(statuses) > 1 or not set(statuses) <= {400, 405, 431}:
            found[kind] = (answer[:60], closed)
    smuggled = [line for line in server.lines() if line.get("path") == "/smuggled"]
    assert not smuggled
    assert not found


ODD = {
    "absolute": b"GET http://evil.example/v1/server HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "absolute with port": b"GET http://x:99999/v1/server HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "absolute, bad address": b"GET http://[::1/v1/server HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another scheme": b"GET file:///etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no path": b"GET http://evil.example HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two slashes": b"GET //evil.example/v1/server HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "star": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "GET star": b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "relative": b"GET v1/server HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "question": b"GET ? HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two spaces": b"GET /v1/server  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "fragment": b"GET /v1/server#../x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "8 bits": b"GET /v1/\xff\xfe\xe4 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "8 bits, encoded": b"GET /v1/label-sets/%ff%fe%e4 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "surrogates": b"GET /v1/label-sets/%ed%a0%80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "NUL, encoded": b"GET /v1/label-sets/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "bad encoding": b"GET /v1/label-sets/%zz%a%/files?under=%zz%& HTTP/1.1\r\nHost: [::1]\r\n\r\n",
    "line break, encoded": b"GET /v1/x%0d%0aSet-Cookie:%20a=b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "line break in a query": b"GET /sets/x?row=%0d%0aCookie:%20 HTTP/1.1\r\nHost: [::1]\r\n\r\n",
    "1.0": b"GET /v1/server HTTP/1.0\r\n\r\n",
    "websocket": GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "h2c": GET
    + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAAA\r\n\r\n",
    "expectation": GET + b"Expect: a-miracle\r\n\r\n",
    "blank lines first": b"\r\n\r\n" + GET + b"\r\n",
    "hop by hop": GET + b"Connection: close, Host, Authorization\r\n\r\n",
    "odd host": b'GET / HTTP/1.1\r\nHost: [::1]:x/../@"<script>\r\nAccept: text/html\r\n\r\n',
    "forwarded": GET + b"X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\n\r\n",
    "rewritten": GET + b"X-Original-URL: /smuggled\r\nX-Rewrite-URL: /smuggled\r\n\r\n",
    "another method": GET + b"X-HTTP-Method-Override: DELETE\r\n\r\n",
    "range of a page": GET + b"Range: bytes=0-,0-,0-\r\n\r\n",
    "body of a GET": GET + b"Content-Length: 35\r\n\r\n" + SMUGGLED,
    "8 bits in a value": GET + b"X-Request-ID: \xff\xe4\r\nAccept: \xff\r\nOrigin: \xff\r\n\r\n",
    "100 headers": GET + b"a:b\r\n" * 99 + b"\r\n",
    "trailers": POST
    + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nHost: evil\r\nX: y\r\n\r\n",
    "an extension": CHUNKED + b'2;a="b"\r\n{}\r\n0\r\n\r\n',
    "small chunks": CHUNKED + b"1\r\n{\r\n" * 100 + b"0\r\n\r\n",
}
"""Odd and understood: one answer each, and no failure."""


def test_odd_requests_get_one_answer(server: Attacked) -> None:
    odd = {}
    # Other tests share this server and connect from other addresses.
    before = len(server.lines())
    # The first page of a server may take a second: it looks at the cache.
    for kind, (answer, _) in server.together(ODD, seconds=10, enough=2.5).items():
        head = answer.partition(b"\r\n\r\n")[0].lower()
        statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
        if len(statuses) != 1 or not 200 <= statuses[0] < 500 or b"set-cookie" in head:
            odd[kind] = answer[:60]
        elif kind == "1.0" or statuses[0] in (400, 431):
            pass
        elif b"x-request-id: " not in head or b"\xff" in head:
            odd[kind] = answer[:60]
    assert not odd
    shown = [line.get("client") for line in server.lines()[before:]]
    assert set(shown) <= {None, "", "127.0.0.1"}, "a header changed who asked"


def test_a_host_is_needed_once(server: Attacked) -> None:
    """RFC 9112, 3.2: anything else is refused, as caches and proxies go by it."""
    sent = {
        "none": b"GET /v1/server HTTP/1.1\r\n\r\n",
        "two": GET + b"Host: y\r\n\r\n",
    }
    for kind, (answer, _) in server.together(sent).items():
        assert answer.startswith(b"HTTP/1.1 400 "), (kind, answer[:60])


def test_another_sites_name_for_this_machine_opens_nothing(server: Attacked, name: str) -> None:
    """DNS rebinding: the browser takes the server for the site whose name it sends."""
    host = b"Host: rebound.example\r\nOrigin: http://rebound.example\r\n"
    order = b'{"seeds": [3]}'
    post = f"POST /v1/label-sets/{name}:compute HTTP/1.1\r\nContent-Length: {len(order)}\r\n"
    asked = [f"GET {path} HTTP/1.1\r\n".encode() + host + b"\r\n" for path in OPEN_PATHS]
    asked += [f"GET /zarr/{name}/labels/c/0/0/0 HTTP/1.1\r\n".encode() + host + b"\r\n"]
    asked += [post.encode() + host + b"Content-Type: application/json\r\n\r\n" + order]
    for data in asked:
        answer = server.ask(data)
        assert answer.status == 403 and b"host not allowed" in answer.body, data
        assert name.encode() not in answer.body.replace(b"/" + name.encode(), b"")


OPEN_PATHS = ("/", "/v1/label-sets", "/v1/server", "/metrics", "/healthz", "/static/live.js")


def test_heads_are_bounded(server: Attacked) -> None:
    line = b"GET /v1/server HTTP/1.1\r\nHost: localhost\r\n"
    heads = (
        line + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        line + b"a" * 70_000 + b": x\r\n\r\n",
        line + b"a: b\r\n" * 10_000 + b"\r\n",
        line + b"X: y\r\n" * 101 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/server?" + b"a=b&" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        CHUNKED + b"2;" + b"a" * 600_000 + b"\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"0\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"GET" + b"T" * 100_000,
        b"\r\n" * 100_000,
    )
    came = server.together({f"{i}: {h[:60]!r}": h for i, h in enumerate(heads)})
    for kind, (answer, closed) in came.items():
        assert closed and answer[:13] in (b"", b"HTTP/1.1 431 ", b"HTTP/1.1 400 "), kind


# Bodies


def batch(server: Attacked, body: bytes, *headers: str, query: str = "") -> tuple[int, Any]:
    kinds = [h for h in headers if h.lower().startswith("content-type")]
    named = headers if kinds else (*headers, "Content-Type: application/json")
    answer = server.get(f"/v1/labels:batch{query}", *named, method="POST", body=body)
    if answer.status == 200:
        return 200, answer.body
    told = json.loads(answer.body)
    assert told["status"] == answer.status
    assert len(answer.body) < 30_000, "an error as large as its question"
    return answer.status, told


def test_bodies_of_batches(server: Attacked, cache: Path, name: str) -> None:
    def asks(ids: str, seed: str = "0") -> bytes:
        return f'{{"set": "{name}", "seed": {seed}, "ids": {ids}}}'.encode()

    assert batch(server, asks("[0, 59]"))[0] == 200
    refused = {
        "empty": b"",
        "not closed": b"[",
        "deep": b"[" * 200_000,
        "deep ids": asks("[" * 100_000 + "]" * 100_000),
        "deep objects": b'{"a":' * 100_000,
        "NaN": asks("[NaN]"),
        "infinity": asks("[Infinity, -Infinity]"),
        "float": asks("[1.0]"),
        "1e3": asks("[1e1]"),
        "1e999": asks("[1e999]"),
        "text": asks('["1"]'),
        "bool": asks("[true]"),
        "null": asks("[null]"),
        "no list": asks("7"),
        "-1": asks("[-1]"),
        "rows": asks("[60]"),
        "2**63-1": asks(f"[{2**63 - 1}]"),
        "2**63": asks(f"[{2**63}]"),
        "2**64": asks(f"[{2**64}]"),
        "digits": asks("[" + "9" * 100_000 + "]"),
        "-digits": asks("[-" + "9" * 5000 + "]"),
        "seed -1": asks("[0]", "-1"),
        "seed 2**31": asks("[0]", f"{2**31}"),
        "seed text": asks("[0]", '"0"'),
        "seed float": asks("[0]", "0.0"),
        "seeds for none": asks("[]", "[0]"),
        "fewer seeds": asks("[0, 1]", "[0]"),
        "seed digits": asks("[0]", "1" + "0" * 5000),
        "more": asks("[0]")[:-1] + b', "more": 1}',
        "no UTF-8": asks("[0]").replace(b"0]", b"\xff]"),
        "no UTF-8 in a name": asks("[0]").replace(name.encode(), b"\xed\xa0\x80"),
        "UTF-16": asks("[0]").decode().encode("utf-16"),
        "comment": b"/**/" + asks("[0]"),
        "twice": asks("[0]") * 2,
        "single quotes": asks("[0]").replace(b'"', b"'"),
    }
    for kind, body in refused.items():
        status, told = batch(server, body)
        assert status == 422, (kind, status, told)
    # Which of two is meant is not for this server to say, but it is one of them.
    assert batch(server, asks("[99999]")[:-1] + b', "ids": [0]}')[0] in (200, 422)
    surrogate = asks("[0]").replace(name.encode(), b"\\ud800")
    assert batch(server, surrogate)[0] in (404, 422)
    for odd in ("", "\\u0000", "../" * 9, "a\\nb", "<script>", "x" * 100_000, "%s%n", name[:3]):
        status, told = batch(server, asks("[0]").replace(name.encode(), odd.encode()))
        assert status == 404 and "<script>" not in told.get("instance", ""), odd
    assert batch(server, asks(json.dumps([0] * 65_536)))[0] == 200
    assert batch(server, asks(json.dumps([0] * 65_537)))[0] == 413


def test_raw_bodies(server: Attacked, name: str) -> None:
    raw, query = "Content-Type: application/octet-stream", f"?set={name}&seed=0"
    good = np.array([0, 59], "<i8").tobytes()
    assert batch(server, good, raw, query=query)[0] == 200
    for ids in ([-1], [2**63 - 1], [-(2**63)], [60], [0, 60]):
        assert batch(server, np.array(ids, "<i8").tobytes(), raw, query=query)[0] == 422
    assert batch(server, np.array([0], ">i8").tobytes(), raw, query=query)[0] == 200  # zero is zero
    assert batch(server, np.array([1], ">i8").tobytes(), raw, query=query)[0] == 422
    for odd in (1, 7, 9, 4097):
        assert batch(server, bytes(odd), raw, query=query)[0] == 422
    assert batch(server, bytes(8 * 65_537), raw, query=query)[0] == 413
    for seed in ("-1", "x", "", "1.5", "0x0", str(2**31), "9" * 5000, "%00", "0&seed=1"):
        status = batch(server, good, raw, query=f"?set={name}&seed={seed}")[0]
        assert status in ((200,) if seed == "0&seed=1" else (422,)), seed
    for query in ("", "?seed=0", f"?set={name}", "?set&seed", f"?set={name}&seed=0&ids=1"):
        assert batch(server, good, raw, query=query)[0] == (200 if "ids" in query else 422)
    for kind in ("text/plain", "application/json+x", "", "\xff", "multipart/form-data", "a" * 9000):
        assert batch(server, good, f"Content-Type: {kind}", query=query)[0] == 415, kind


def test_nothing_is_inflated(server: Attacked, name: str) -> None:
    before = server.rss()
    bomb = gzip.compress(bytes(64 * MIB))
    assert len(bomb) < MIB / 8
    kind = "Content-Type: application/octet-stream"
    for coding in ("gzip", "deflate", "br", "gzip, gzip", "zstd", "GZIP"):
        headers = (kind, f"Content-Encoding: {coding}")
        assert batch(server, bomb, *headers, query=f"?set={name}&seed=0")[0] == 415
    assert server.rss() < before + 32 * MIB


def test_oversize_bodies(server: Attacked, name: str) -> None:
    """Refused before they are read, or as soon as they are too large."""
    too_large = POST + f"Content-Length: {MIB + 1}\r\n\r\n".encode()
    answer = server.ask(too_large)  # without sending it
    assert answer.status == 413
    assert server.ask(POST + b"Content-Length: 999999999999999999\r\n\r\n").status == 413
    before = server.rss()
    with server.connect() as client, contextlib.suppress(ConnectionError):
        client.sendall(CHUNKED)
        chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
        for _ in range(1024):  # 64 MiB, if anybody takes them
            client.sendall(chunk)
    assert server.rss() < before + 32 * MIB
    with server.connect() as client:
        client.sendall(CHUNKED + chunk * 20)
        assert read_answer(client).status == 413
    expecting = POST + f"Content-Length: {MIB + 1}\r\nExpect: 100-continue\r\n\r\n".encode()
    assert server.ask(expecting).status == 413


def test_bodies_of_orders(guarded: tuple[Attacked, Path], name: str) -> None:
    server, tokens = guarded
    headers = (shown(server, tokens, "orders", "compute"), "Content-Type: application/json")

    def order(body: bytes, of: str = name) -> int:
        path = f"/v1/label-sets/{of}:compute"
        answer = server.get(path, *headers, method="POST", body=body)
        assert json.loads(answer.body) and len(answer.body) < 20_000
        return answer.status

    seeds = [
        *("", "NaN", "1.5", '"0"', "true", "null", "-1", "2147483648", "9" * 4000, "9" * 100_000),
        *("1e999", "[" * 50_000, "[0]", ",", "{}", str(2**64)),
    ]
    for odd in seeds:  # 400: not even JSON, or beyond what is parsed
        assert order(f'{{"seeds": [{odd}]}}'.encode()) in (400, 422), odd[:20]
    for body in (b"", b"[", b"[]", b"null", b"{}", b'{"seeds": "\xff"}', b'{"seeds": 0}', b"\xff"):
        assert order(body) in (400, 422), body
    assert order(b'{"seeds": [%s]}' % b",".join([b"0"] * 4097)) == 422
    assert order(b'{"seeds": [999999]}') == 422
    assert order(b'{"seeds": [0]}', "%2e%2e") == 404
    assert order(b'{"seeds": [0]}', "x" * 1000) == 404
    assert order(b'{"seeds": [0, 0, 1, 2]}') == 202
    assert order(b'{"seeds": [2]}', name.rpartition(".")[2]) == 202


# Names and paths

DOTS = ("..", "%2e%2e", "%2E.", "..%00", "..;", "%252e%252e", "%c0%ae%c0%ae", "%ff%fe..")
SLASHES = ("/", "%2f", "%5c", "\\", "//", "/./", "%252f", "%c0%af")
PREFIXES = (
    "/static",
    "/sets",
    "/v1/label-sets",
    "/v1",
    "",
    "/zarr",
    "/status",
)


def test_no_path_leads_out(server: Attacked, cache: Path, name: str) -> None:
    tried = [
        f"{prefix}{slash}{dots}{slash}{dots}{slash}{end}"
        for prefix in PREFIXES
        for dots in DOTS
        for slash in SLASHES
        for end in ("secret.txt",)
    ]
    folder = str(cache.parent)
    tried += [f"{prefix}/{folder}/secret.txt" for prefix in PREFIXES]
    tried += [f"{prefix}{folder}/secret.txt".replace("/", "%2f") for prefix in PREFIXES]
    tried += [f"{prefix}/file:%2f%2f{folder}/secret.txt" for prefix in PREFIXES]
    own = ("pages.py", "app.py", "../pages.py", "..%2fpages.py", "..%5cpages.py", "%2e%2e/pages.py")
    tried += [f"/static/{path}" for path in own]
    tried += [
        f"/v1/label-sets/{name}/files?under={u}" for u in ("..", "/etc", "%2e%2e/x", "a" * 99)
    ]
    tried += [f"/sets/{name}/samples/{row}" for row in ("-1", "60", "9" * 5000, "1.5", "x", "%00")]
    tried += [f"/sets/{name}?row={row}" for row in ("-1", "60", "9" * 5000, "1.5", "x", "%00")]
    tried += [f"/sets/{name}/samples/0?seed={n}" for n in ("-1", "3", "9" * 5000, "1.5", "")]
    tried += [f"/sets/{name}/samples/random?seed={n}" for n in ("-1", "3", str(2**63), "")]
    for path, accept in zip(tried, itertools.cycle(["*/*", "text/html"]), strict=False):
        answer = server.get(path, f"Accept: {accept}")
        assert answer.status in (400, 404, 422), path
        assert b"hunter2" not in answer.body and b"import" not in answer.body, path
        if folder not in path:
            assert folder not in answer.body.decode(), f"{path} tells where the cache lies"


ODD_NAMES = (
    "a%0ab",
    "%0d%0aX-Evil:%201",
    "<script>alert(1)</script>",
    "%3Cscript%3Ealert(1)%3C/script%3E",
    "'%22%3E%3Cimg src=x onerror=alert(1)%3E".replace(" ", "%20"),
    "{{7*7}}",
    "${7*7}",
    "%25s%25n",
    "%00",
    "%E2%80%AE%E2%80%A8",
    "a" * 40_000,
    "%F0%9F%92%A9" * 1000,
)


def test_odd_names_are_escaped(server: Attacked) -> None:
    for odd in ODD_NAMES:
        for path in (
            f"/v1/label-sets/{odd}",
            f"/v1/label-sets/{odd}/spec",
            f"/v1/label-sets/{odd}/coverage",
            f"/v1/label-sets/{odd}/files",
            f"/sets/{odd}",
            f"/sets/{odd}/samples/0",
            f"/static/{odd}",
            f"/zarr/{odd}/zarr.json",
            f"/nothing/{odd}",
        ):
            answer = server.get(path, "Accept: text/html")
            assert answer.status == 404, path[:80]
            assert answer.headers["content-type"].startswith("text/html")
            text = answer.body.decode()
            assert "<script>alert" not in text and "<img src=x" not in text, path
            assert "49" not in text.replace(answer.headers["x-request-id"], ""), path
            assert "x-evil" not in answer.headers
            told = server.get(path)
            assert told.status == 404
            assert told.headers["content-type"] == "application/problem+json"
            assert len(told.body) < 30_000, "an error as large as its question"
    for path in ("/?q=", "/status/live?q="):
        for odd in ODD_NAMES:
            answer = server.get(path + odd.replace("&", "%26"), "Accept: text/html")
            assert answer.status in (200, 422), odd[:80]
            assert b"<script>alert" not in answer.body and b"<img src=x" not in answer.body
    longest = max(len(line) for line in server.log.read_bytes().splitlines())
    assert longest < 10_000, "a line of the log as long as somebody likes"


def test_errors_do_not_tell_where_things_lie(server: Attacked, cache: Path, name: str) -> None:
    """Paths of the server's machine are for its log."""
    server.excused.append("damaged")
    leaks = []
    for path in (
        "/v1/label-sets",
        "/v1/label-sets/damaged",
        "/sets/damaged",
        "/zarr/damaged/zarr.json",
        "/zarr/damaged/nothing",
        f"/v1/label-sets/{name}",
        f"/v1/label-sets/{name}/files",
        f"/sets/{name}",
        f"/sets/{name}/samples/0",
        f"/sets/{name}/samples/0/view.png",
        "/",
        "/v1/server",
        "/metrics",
        "/v1/openapi.json",
    ):
        answer = server.get(path)
        assert answer.status < 500 or "damaged" in path, (path, answer.body[:300])
        if str(cache.parent).encode() in answer.body or b"site-packages" in answer.body:
            leaks.append(path)
    assert not leaks


def test_a_cache_out_of_reach_is_told_without_its_path(server: Attacked, cache: Path) -> None:
    """As when a disk of the network is gone: whoever asks is told to come back."""
    away = cache.with_name("away")
    cache.rename(away)
    try:
        end = time.monotonic() + WAIT
        while server.get("/readyz").status != 503:  # what was seen last holds for a second
            assert time.monotonic() < end
            time.sleep(0.1)
        for path in ("/readyz", "/v1/label-sets", "/v1/server", "/"):
            answer = server.get(path)
            assert answer.status == 503 and "retry-after" in answer.headers, path
            assert str(cache).encode() not in answer.body, path
    finally:
        away.rename(cache)


# Slow clients and many of them


def closed_after(
    clients: dict[str, tuple[socket.socket, bytes]], seconds: float
) -> dict[str, float]:
    """Feeds each connection a byte every 0.1 s, until the server has closed them all; when each."""
    began = time.monotonic()
    closed: dict[str, float] = {}
    while len(closed) < len(clients):
        now = time.monotonic() - began
        assert now < seconds, set(clients) - closed.keys()
        for kind, (client, byte) in clients.items():
            if kind in closed:
                continue
            try:
                if byte:
                    client.send(byte)
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while data := client.recv(2**16):
                        assert b" 200 " not in data
                    closed[kind] = now
            except ConnectionError:
                closed[kind] = now
        time.sleep(0.1)
    return closed


def test_slow_clients_are_cut_off(impatient: Attacked, name: str) -> None:
    """One byte at a time: the limit is for the whole head, and for the whole body."""
    with contextlib.ExitStack() as stack:
        begun = {
            "idle": (b"", b""),
            "a byte": (b"G", b""),
            "line": (b"GET /", b"a"),
            "headers": (GET + b"X: ", b"a"),
            "many headers": (GET, b"a:b\r\n"),
            "blank lines": (b"", b"\r\n"),
            "body": (POST + b"Content-Length: 1000\r\n\r\n", b"a"),
            "no body": (POST + b"Content-Length: 1000\r\n\r\n", b""),
            "chunks": (CHUNKED, b"1\r\na\r\n"),
            "chunk size": (CHUNKED, b"0"),
            "extension": (CHUNKED + b"1;", b"a"),
            "trailers": (CHUNKED + b"0\r\n", b"a:b\r\n"),
            "body of a GET": (GET + b"Content-Length: 1000\r\n\r\n", b"a"),
            "second request": (GET + b"\r\n" + GET, b""),
        }
        clients = {}
        for kind, (first, byte) in begun.items():
            client = stack.enter_context(impatient.connect())
            client.sendall(first)
            if kind == "second request":
                read_answer(client)
            clients[kind] = (client, byte)
        done = threading.Event()
        with ThreadPoolExecutor(1) as other:
            waited = other.submit(waits, impatient, f"/zarr/{name}/zarr.json", done)
            try:
                closed = closed_after(clients, 20)
            finally:
                done.set()
            assert waited.result() < 1.5
    assert max(closed.values()) < SECONDS + 2 + 4, closed
    assert min(closed.values()) > SECONDS / 2, closed


def waits(server: Attacked, path: str, done: threading.Event) -> float:
    """Asks again and again, as everybody else does; seconds of the longest wait."""
    longest = 0.0
    while not done.is_set():
        began = time.monotonic()
        assert server.get(path).status == 200
        longest = max(longest, time.monotonic() - began)
        done.wait(0.1)
    return longest


def test_readers_that_take_nothing(impatient: Attacked, wide: str, name: str) -> None:
    """They are cut off, hold little memory, and leave room for others."""
    path = f"/zarr/{wide}/labels/c/0/0/0"
    assert int(headers_of(impatient, path)["content-length"]) > 8 * MIB
    before = impatient.rss()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(impatient.connect(2 + i // 16, 4096)) for i in range(64)]
        for client in clients[:60]:
            client.sendall(request(path))
        body = json.dumps({"set": wide, "seed": 0, "ids": list(range(8192))}).encode()
        for client in clients[60:]:
            kind = "Content-Type: application/json"
            client.sendall(request("/v1/labels:batch", kind, method="POST", body=body))
        peak = 0
        for _ in range(10):
            assert impatient.get("/readyz").status == 200
            peak = max(peak, impatient.rss())
            time.sleep(0.1)
        # 60 x 1 MiB and what the sockets hold, 4 answers of 16 MiB.
        assert peak < before + 400 * MIB
        deadline = time.monotonic() + SECONDS + 15
        while impatient.get(f"/zarr/{name}/zarr.json").status == 503 or not_ended(impatient, 64):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    # The decoded labels of the batches stay, and malloc keeps some of what was freed.
    assert impatient.rss() < before + 350 * MIB


def headers_of(server: Attacked, path: str) -> dict[str, str]:
    with server.connect() as client:
        client.sendall(request(path, method="HEAD"))
        return read_answer(client, "HEAD").headers


def not_ended(server: Attacked, count: int) -> bool:
    cut = [line for line in server.lines() if line["message"] == "request cut off"]
    return len(cut) < count


@pytest.mark.slow
def test_ten_thousand_idle_connections(server: Attacked, name: str) -> None:
    count, path = 10_000, f"/zarr/{name}/zarr.json"
    before = server.rss()
    with many_files(count + 500) as enough, contextlib.ExitStack() as stack:
        if not enough:
            pytest.skip(f"this system does not let a process have {count + 500} open files")
        waiting = stack.enter_context(selectors.DefaultSelector())
        began = time.monotonic()
        longest = 0.0
        for i in range(count):
            client = stack.enter_context(server.connect(2 + i % 4))
            if i % 2:
                client.sendall(b"GET /")
            waiting.register(client, selectors.EVENT_READ)
            if i % 500 == 0:
                asked = time.monotonic()
                assert server.get(path).status == 200
                longest = max(longest, time.monotonic() - asked)
        assert time.monotonic() - began < 18, "too slow a machine for this test"
        assert server.rss() < before + 400 * MIB
        assert longest < 2
        left = count
        while left:
            assert time.monotonic() - began < 55, left
            for key, _ in waiting.select(1):
                with contextlib.suppress(ConnectionError):
                    assert not key.fileobj.recv(1000)  # type: ignore[union-attr]
                waiting.unregister(key.fileobj)
                left -= 1
            assert server.get(path).status == 200
        assert time.monotonic() - began >= 19
    assert server.rss() < before + 400 * MIB


@pytest.mark.slow
def test_large_answers_for_200_clients_at_once(server: Attacked, wide: str, name: str) -> None:
    """Those who find no room are told to come back; memory stays within the budget."""
    before = server.rss()
    ids = np.random.default_rng(0).permutation(WIDE).astype("<i8").tobytes()
    query = f"/v1/labels:batch?set={wide}&seed=0"
    message = request(
        query,
        "Content-Type: application/octet-stream",
        "Connection: close",
        method="POST",
        body=ids,
    )
    statuses: dict[int, int] = {}
    peak, longest = 0, 0.0
    with selectors.DefaultSelector() as waiting, contextlib.ExitStack() as stack:
        for i in range(200):
            client = stack.enter_context(server.connect(2 + i % 20))
            client.sendall(message)
            client.setblocking(False)
            waiting.register(client, selectors.EVENT_READ, [b"", 0])
        end = time.monotonic() + 50
        look = 0.0
        while waiting.get_map():
            assert time.monotonic() < end
            for key, _ in waiting.select(0.2):
                reader, seen = key.fileobj, key.data
                assert isinstance(reader, socket.socket)
                try:
                    data = reader.recv(MIB)
                except ConnectionResetError:
                    data = b""
                seen[0] = seen[0] or data[:12]
                seen[1] += len(data)
                if not data:
                    status = int(seen[0][9:])
                    statuses[status] = statuses.get(status, 0) + 1
                    assert status != 200 or seen[1] > WIDE * 2004
                    waiting.unregister(reader)
            if time.monotonic() - look > 0.3:
                peak = max(peak, server.rss())
                asked = time.monotonic()
                assert server.get("/healthz").status == 200
                look = time.monotonic()
                longest = max(longest, look - asked)
    assert set(statuses) <= {200, 429, 503} and statuses[200] >= 8, statuses
    assert peak < before + 900 * MIB, peak / MIB
    assert longest < 5
    assert server.get(f"/zarr/{name}/zarr.json").status == 200
