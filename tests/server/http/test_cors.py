"""``--cors``: pages of a named origin may read, and no other page."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.random_labels import make_labels
from support.servers import serving

from sskt.server.http.tokens import new_token

VIEWER = "https://viewer.example.org"
OTHER = "https://elsewhere.example.org"
Headers = dict[str, str]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """A server with tokens that is open to one viewer: its URL, a label set, a token."""
    folder = tmp_path_factory.mktemp("cors")
    name = make_labels(folder / "cache").name
    tokens = folder / "tokens.json"
    token = new_token(tokens, "viewer", ["read"], None)
    with serving(folder / "cache", token_file=str(tokens), cors=(VIEWER,)) as url:
        yield url, name, token


def ask(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, Headers]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, headers=named)
        answer = connection.getresponse()
        answer.read()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_named_origin_reads_parts_of_files(site: tuple[str, str, str], method: str) -> None:
    url, name, token = site
    shown = {"Origin": VIEWER, "Authorization": f"Bearer {token}", "Range": "bytes=-100"}
    status, headers = ask(url, f"/zarr/{name}/labels/c/0/0/0", method, **shown)
    assert status == (206 if method == "GET" else 200)
    assert headers["access-control-allow-origin"] == VIEWER
    exposed = {name.strip() for name in headers["access-control-expose-headers"].split(",")}
    assert {"Content-Range", "Content-Length", "ETag"} <= exposed
    assert "access-control-allow-credentials" not in headers and "Origin" in headers["vary"]


@pytest.mark.parametrize(
    ("path", "token", "status"), [("labels/c/9/9/0", True, 404), ("", False, 401)]
)
def test_a_page_reads_errors_too(
    site: tuple[str, str, str], path: str, token: bool, status: int
) -> None:
    """A missing shard is one: a reader in a browser takes fill values for it."""
    url, name, secret = site
    shown = {"Authorization": f"Bearer {secret}"} if token else {}
    found, headers = ask(url, f"/zarr/{name}/{path}", Origin=VIEWER, **shown)
    assert (found, headers["access-control-allow-origin"]) == (status, VIEWER)


def test_a_preflight_needs_no_token_and_says_what_is_allowed(site: tuple[str, str, str]) -> None:
    url, name, _ = site
    asked = {
        "Access_Control_Request_Method": "GET",
        "Access_Control_Request_Headers": "authorization,range",
    }
    status, headers = ask(url, f"/zarr/{name}/zarr.json", "OPTIONS", Origin=VIEWER, **asked)
    assert status == 200 and headers["access-control-allow-origin"] == VIEWER
    assert set(headers["access-control-allow-methods"].split(", ")) == {"GET", "HEAD"}
    assert "access-control-allow-credentials" not in headers
    asked["Access_Control_Request_Method"] = "POST"
    assert ask(url, "/v1/labels:batch", "OPTIONS", Origin=VIEWER, **asked)[0] == 400


def test_no_other_origin_reads_anything(site: tuple[str, str, str], tmp_path: Path) -> None:
    url, name, token = site
    shown = {"Authorization": f"Bearer {token}"}
    _, headers = ask(url, f"/zarr/{name}/zarr.json", Origin=OTHER, **shown)
    assert "access-control-allow-origin" not in headers
    status, _ = ask(url, "/v1/labels:batch", "POST", Origin=VIEWER, **shown)
    assert status == 403
    make_labels(tmp_path, samples=20)
    with serving(tmp_path) as plain:
        for method in ("GET", "OPTIONS"):
            asked = {"Origin": VIEWER, "Access_Control_Request_Method": "GET"}
            _, headers = ask(plain, "/v1/server", method, **asked)
            assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["*", "viewer.example.org", f"{VIEWER}/", f"{VIEWER}/page", "null"]
)
def test_what_is_no_origin_is_refused(
    tmp_path: Path, sskt: Callable[..., tuple[int, str, str]], origin: str
) -> None:
    status, _, err = sskt("serve", "--cache", tmp_path, "--port", 0, "--cors", origin)
    assert status == 2 and f"--cors {origin} is not the origin of a page" in err
