"""The real server behind the real nginx, with the configuration that ships."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest
from support.fronts import NGINX, OPENSSL, Front, front
from support.ports import free_ports

from sskt.server.http.tokens import new_token, revoke
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.storage.http.storage import HttpStorage
from sskt.teacher_cache.storage.open import open_cache

pytestmark = [
    pytest.mark.skipif(not NGINX, reason="nginx not found (Debian's package nginx)"),
    pytest.mark.skipif(not OPENSSL, reason="openssl not found"),
]
IMMUTABLE = "private, max-age=31536000, immutable"
SECRET = b"not for you"
VERDICT_SECONDS = 2.0
"""How long nginx keeps a verdict."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: bytes

    def problem(self) -> dict[str, object]:
        assert self.headers["Content-Type"] == "application/problem+json", self
        told: dict[str, object] = json.loads(self.body)
        assert told["status"] == self.status
        return told


@dataclass(frozen=True)
class Site:
    """A cache, its server's port, nginx before it, and tokens."""

    cache: Path
    port: int
    nginx: Front
    token_file: Path
    token: str

    def ask(
        self,
        path: str,
        token: str | None = "",
        method: str = "GET",
        body: bytes | None = None,
        **headers: str,
    ) -> Answer:
        """One request to the plain port; ``token``: None shows none, '' the usual one."""
        shown = self.token if token == "" else token
        return ask(self.nginx.local, path, shown, method, body, headers)

    @property
    def shards(self) -> list[str]:
        found = (p.relative_to(self.cache).as_posix() for p in self.cache.rglob("*/c/**/*"))
        return sorted(key for key in found if re.search(r"/c/[0-9/]+$", key) and self.plain(key))

    def plain(self, key: str) -> bool:
        path = self.cache / key
        return path.is_file() and not path.is_symlink()

    def count(self, route: str) -> int:
        """Requests that the label server has answered itself."""
        text = ask(self.port, "/metrics", self.token).body.decode()
        pattern = rf'^sskt_requests_total{{[^}}]*route="{re.escape(route)}"[^}}]*}} ([0-9.]+)$'
        return sum(int(float(n)) for n in re.findall(pattern, text, re.MULTILINE))


def ask(
    port: int,
    path: str,
    token: str | None = None,
    method: str = "GET",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    over: http.client.HTTPConnection | None = None,
) -> Answer:
    connection = over or http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    shown = {"Authorization": f"Bearer {token}"} if token is not None else {}
    shown |= {name.replace("_", "-"): value for name, value in (headers or {}).items()}
    try:
        connection.request(method, path, body, shown)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def site(label_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    cache, token_file = folder / "cache", folder / "tokens.json"
    shutil.copytree(label_cache, cache)
    (name,) = (s.name for s in list_label_sets(cache))
    (folder / "outside").write_bytes(SECRET)
    (cache / ".locks").mkdir(exist_ok=True)
    (cache / ".locks" / "x.lock").write_bytes(SECRET)
    (cache / name / "labels/c/0/0/0.0123456789abcdef0123456789abcdef.partial").write_bytes(SECRET)
    (cache / name / "labels/c/7/0").mkdir(parents=True)
    (cache / name / "labels/c/7/0/0").symlink_to(folder / "outside")
    token = new_token(token_file, "trainings", ["read"], None)
    options = ["--cache", str(cache), "--port", "0", "--token-file", str(token_file)]
    command = [sys.executable, "-c", "from sskt.cli.main import main; main()", "serve", *options]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        port = listening(folder / "server.log", process)
        with front(folder / "nginx", cache, f"127.0.0.1:{port}") as nginx:
            yield Site(cache, port, nginx, token_file, token)
    finally:
        process.terminate()
        assert process.wait(30) == 0  # SIGTERM is how everything here stops it


def listening(log: Path, process: subprocess.Popen[bytes]) -> int:
    """The port that the server says it listens on, once it answers."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        said = re.search(r"at http://127\.0\.0\.1:(\d+)", log.read_text())
        if said:
            try:
                assert ask(int(said[1]), "/healthz").status == 200
                return int(said[1])
            except ConnectionError:
                pass
        time.sleep(0.02)
    raise RuntimeError(f"the server does not start: {log.read_text()}")


def test_shards_are_the_files_and_python_is_not_asked_for_them(site: Site) -> None:
    token = new_token(site.token_file, "new-to-nginx", ["read"], None)
    until = time.monotonic() + 5
    while ask(site.port, "/v1/server", token).status != 200:  # it looks at its file now and then
        assert time.monotonic() < until
    before, asked = site.count("/zarr"), site.count("/v1/auth")
    started = time.monotonic()
    assert len(site.shards) >= 24
    for key in site.shards:
        answer = site.ask(f"/zarr/{key}", token)
        assert (answer.status, answer.body) == (200, (site.cache / key).read_bytes())
        assert answer.headers.get_all("Cache-Control") == [IMMUTABLE]
    verdicts = 1 + (time.monotonic() - started) / VERDICT_SECONDS
    assert site.count("/zarr") == before
    assert 1 <= site.count("/v1/auth") - asked <= verdicts
    assert ask(site.port, f"/zarr/{key}", site.token).body == answer.body
    assert site.count("/zarr") == before + 1


def test_parts_and_tags(site: Site) -> None:
    key = max(site.shards, key=lambda k: (site.cache / k).stat().st_size)
    whole, path = (site.cache / key).read_bytes(), f"/zarr/{key}"
    head = site.ask(path, method="HEAD")
    assert (head.status, head.body, int(head.headers["Content-Length"])) == (200, b"", len(whole))
    tag = head.headers["ETag"]
    assert tag.startswith('"') and head.headers["Accept-Ranges"] == "bytes"
    for wanted, expected in (
        ("bytes=3-9", whole[3:10]),
        ("bytes=-5", whole[-5:]),
        (f"bytes={len(whole) - 2}-{len(whole) + 99}", whole[-2:]),
    ):
        part = site.ask(path, Range=wanted, If_Range=tag)
        assert (part.status, part.body) == (206, expected)
        assert part.headers["ETag"] == tag
    assert site.ask(path, Range="bytes=3-9", If_Range='"other"').body == whole
    assert site.ask(path, Range="bytes=0-1,4-5").body == whole  # as the label server: one range
    same = site.ask(path, If_None_Match=tag)
    assert (same.status, same.body, same.headers["ETag"]) == (304, b"", tag)
    beyond = site.ask(path, Range=f"bytes={len(whole)}-")
    assert beyond.problem()["title"] == "range not satisfiable"
    assert beyond.headers.get_all("Content-Range") == [f"bytes */{len(whole)}"]
    assert "no-store" in beyond.headers.get_all("Cache-Control", [])


def test_what_is_no_shard_comes_from_the_label_server(site: Site) -> None:
    name = site.shards[0].split("/")[0]
    metadata = site.ask(f"/zarr/{name}/zarr.json", X_Request_ID="mine-1")
    assert metadata.body == (site.cache / name / "zarr.json").read_bytes()
    assert metadata.headers["Cache-Control"] == "no-cache"
    assert metadata.headers.get_all("X-Request-ID") == ["mine-1"]
    missing = site.ask(f"/zarr/{name}/labels/c/99/0/0", X_Request_ID="mine-2")
    told = missing.problem()
    assert (missing.status, told["request_id"]) == (404, "mine-2")
    assert told["detail"] and missing.headers.get_all("Cache-Control") == ["no-store"]
    listed = json.loads(site.ask("/v1/label-sets").body)
    assert [one["name"] for one in listed["label_sets"]] == [name]
    assert site.ask("/healthz", token=None).status == 200


SET = "{set}/labels/c/0/0"
FORBIDDEN = [
    "/zarr/.locks/x.lock",
    "/zarr/%2elocks/x.lock",
    "/zarr/%2Elocks%2Fx.lock",
    f"/zarr/{SET}/0.0123456789abcdef0123456789abcdef.partial",
    f"/zarr/{SET}/0.0123456789abcdef0123456789abcdef%2epartial",
    "/zarr/{set}/labels/c/7/0/0",  # a link to a file outside
    "/zarr/../outside",
    "/zarr/..%2foutside",
    "/zarr/%2e%2e/outside",
    "/zarr/%2e%2e%2foutside",
    "/zarr/%252e%252e/outside",
    "/zarr/..%5coutside",
    "/zarr/....//outside",
    f"/zarr/{SET}/../../../../../../outside",
    "/zarr//../outside",
    "/zarr../outside",
    "/zarr/./../outside",
    "/zarr/%c0%ae%c0%ae/outside",
    f"/zarr/{SET}/0%00",
    f"/zarr/{SET}/0/../../../../../.locks/x.lock",
    "/zarr/{set}",
    "/zarr/{set}/",
    "/zarr/{set}/labels/c/0/",
    "/zarr/",
    "/zarr//etc/passwd",
    "//etc/passwd",
    "/verdict",
    "/problem.json",
    "/range.json",
]


@pytest.mark.parametrize("path", FORBIDDEN)
def test_nothing_else_is_served(site: Site, path: str) -> None:
    answer = site.ask(path.format(set=site.shards[0].split("/")[0]))
    assert answer.status in (400, 404)
    assert SECRET not in answer.body and b"root:" not in answer.body
    answer.problem()


def test_locks_and_partial_files_are_refused_without_asking(site: Site) -> None:
    before = site.count("/zarr")
    for path in FORBIDDEN[:5]:
        assert site.ask(path.format(set=site.shards[0].split("/")[0])).status == 404
    assert site.count("/zarr") == before


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH", "OPTIONS", "MKCOL", "TRACE"])
def test_only_reading(site: Site, method: str) -> None:
    key = site.shards[0]
    before = (site.cache / key).read_bytes()
    assert site.ask(f"/zarr/{key}", method=method, body=b"x").status == 405
    assert (site.cache / key).read_bytes() == before


def test_tokens(site: Site) -> None:
    path = f"/zarr/{site.shards[0]}"
    data = (site.cache / site.shards[0]).read_bytes()
    basic = base64.b64encode(f"anybody:{site.token}".encode()).decode()
    assert site.ask(path, token=None, Authorization=f"Basic {basic}").body == data
    for wrong in (None, "", "sskt_wrong", site.token[:-1], site.token + "x", "x" * 7000):
        answer = ask(site.nginx.local, path, wrong)
        answer.problem()
        assert answer.status == 401
        assert any(c.startswith("Bearer") for c in answer.headers.get_all("WWW-Authenticate", []))
        assert answer.headers.get_all("Cache-Control") == ["no-store"]


def test_a_token_works_at_once_and_a_revoked_one_no_longer_than_a_verdict(site: Site) -> None:
    path = f"/zarr/{site.shards[0]}"
    token = new_token(site.token_file, "short", ["read"], None)
    until = time.monotonic() + 5
    while site.ask(path, token).status != 200:  # the server looks at its file now and then
        assert time.monotonic() < until
    revoke(site.token_file, "short")
    revoked = time.monotonic()
    while site.ask(path, token).status == 200:
        assert time.monotonic() < revoked + VERDICT_SECONDS + 2
    assert site.ask(path, token).status == 401
    assert site.ask(path).status == 200


def test_tls(site: Site) -> None:
    def over() -> http.client.HTTPSConnection:
        context = site.nginx.trusting()
        return http.client.HTTPSConnection("localhost", site.nginx.tls, timeout=30, context=context)

    key = site.shards[0]
    answer = ask(0, f"/zarr/{key}", site.token, over=over())
    assert (answer.status, answer.body) == (200, (site.cache / key).read_bytes())
    for path in (f"/zarr/{key}", "/v1/server", "/zarr/.locks/x"):
        answer = ask(0, path, site.token, over=over())
        assert answer.headers.get_all("Strict-Transport-Security") == ["max-age=31536000"], path
        assert answer.headers["Server"] == "nginx"
        assert "Strict-Transport-Security" not in site.ask(path).headers
    for port in (site.nginx.redirect, site.nginx.tls):  # plain HTTP
        moved = ask(port, "/v1/server?a=b", headers={"Host": "elsewhere.example"})
        public = f"https://localhost:{site.nginx.tls}/v1/server?a=b"
        assert (moved.status, moved.headers["Location"]) == (308, public)


def test_our_client_reads_it_all(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSKT_TOKEN", site.token)
    monkeypatch.setenv("SSL_CERT_FILE", str(site.nginx.certificate))
    home = open_cache(f"https://localhost:{site.nginx.tls}")
    assert isinstance(home, HttpStorage)
    with contextlib.closing(home):
        assert [home.below(name).name for name in home.folders()] == [site.shards[0].split("/")[0]]
        for key in site.shards:
            name, _, inner = key.partition("/")
            assert home.below(name).read(inner) == (site.cache / key).read_bytes()


def test_what_nginx_refuses_is_told_as_a_problem(site: Site) -> None:
    for answer, status in (
        (site.ask("/v1/labels:batch", method="POST", body=b"x" * (2**20 + 1)), 413),
        (site.ask("/" + "x" * 20000), 414),
        (site.ask("/healthz", X=("x" * 20000)), 431),
        (site.ask("/healthz", Host="a b"), 400),
    ):
        assert answer.status == status
        answer.problem()
    end = time.monotonic() + 30  # nginx may still be closing the connection before
    while not site.ask("/nginx-status", token=None).body.startswith(b"Active connections: 1 "):
        assert time.monotonic() < end


def test_log_lines_are_json_without_secrets(site: Site) -> None:
    key = site.shards[0]
    site.ask(f"/zarr/{key}?x=%22%0a", X_Request_ID="logged-1", User_Agent='a"b\\')
    site.ask(f"/zarr/{key}", X_Request_ID='no" id')
    text = (site.nginx.folder / "access.log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    (line,) = (entry for entry in lines if entry["request_id"] == "logged-1")
    assert line["request"] == f"GET /zarr/{key}?x=%22%0a HTTP/1.1"
    assert (line["status"], line["bytes"]) == (200, (site.cache / key).stat().st_size)
    assert (line["agent"], line["client"]) == ('a"b\\', "127.0.0.1")
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", entry["request_id"]) for entry in lines)
    errors = site.nginx.folder / "error.log"
    assert site.token not in text + errors.read_text()


def test_limits_and_a_server_that_is_gone(site: Site, tmp_path: Path) -> None:
    (nobody,) = free_ports(1)
    slow = {f"SSKT_{kind}_RATE": "1r/m" for kind in ("SHARD", "CALL")}
    slow |= {f"SSKT_{kind}_BURST": "2" for kind in ("SHARD", "CALL")}
    with front(tmp_path / "nginx", site.cache, f"127.0.0.1:{nobody}", **slow) as nginx:
        for path in (f"/zarr/{site.shards[0]}", "/v1/server"):
            answers = [ask(nginx.local, path, site.token) for _ in range(4)]
            assert [answer.status for answer in answers] == [503, 503, 503, 429]
            for answer in answers:
                answer.problem()
                assert int(answer.headers["Retry-After"]) >= 1
