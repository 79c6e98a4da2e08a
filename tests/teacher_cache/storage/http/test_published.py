"""Published label sets: from a real nginx, from a host that redirects, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from support.fronts import NGINX, await_port
from support.helpers import tree
from support.ports import free_ports
from support.random_labels import make_labels, replace_shard
from support.servers import serving, without_times

import sskt as public
from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.label_sets.create import list_label_sets, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.http.published import ALLOWED, INDEX, is_published, may_lead_to
from sskt.trainer.config import TrainConfig
from sskt.trainer.loop.runs import run_training

Sskt = Callable[..., tuple[int, str, str]]
CONFIGURATION = """
daemon off; master_process off; pid {run}/pid; error_log {run}/error.log;
events {{ }}
http {{
    access_log {run}/access.log; client_body_temp_path {run}/body; proxy_temp_path {run}/proxy;
    fastcgi_temp_path {run}/f; uwsgi_temp_path {run}/u; scgi_temp_path {run}/s;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def site(made: LabelSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``sskt copy --publish`` makes, with the label set in it."""
    from sskt.cli.main import run

    folder = tmp_path_factory.mktemp("site") / "sets"
    assert run(["copy", str(made.path.parent), str(folder), "--publish"]) == 0
    return folder


@contextlib.contextmanager
def nginx(root: Path, run: Path) -> Iterator[str]:
    """A plain nginx over a folder."""
    assert NGINX
    run.mkdir()
    (port,) = free_ports(1)
    text = CONFIGURATION.format(run=run, root=root, port=port)
    user = "user root;" if os.geteuid() == 0 else ""
    (run / "nginx.conf").write_text(user + text)
    process = subprocess.Popen([NGINX, "-e", str(run / "error.log"), "-c", str(run / "nginx.conf")])
    try:
        await_port(port, process, run)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own static server, which knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Host:
    """A web host of the tests: its address, and the requests that came to it."""

    url: str
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)


@contextlib.contextmanager
def host(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[Host]:
    """A web host that answers as a function does."""
    found = Host("")

    class Handler(Quiet):
        def do_GET(self) -> None:
            found.seen.append((self.path, dict(self.headers)))
            answer(self)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def static(folder: Path) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """Answers with the files of a folder."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        path = folder / handler.path.partition("?")[0].removeprefix("/")
        data = path.read_bytes() if path.is_file() else None
        handler.send_response(404 if data is None else 200)
        handler.send_header("Content-Length", str(len(data or b"")))
        handler.send_header("ETag", f'"{len(data or b"")}"')
        handler.end_headers()
        handler.wfile.write(data or b"")

    return answer


def moved(to: str, status: int = 302) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """Redirects every request, as Hugging Face's ``resolve`` does, with a signature."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Location", f"{to}{handler.path}?signature=a%2Fb")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@pytest.mark.skipif(not NGINX, reason="nginx not found (Debian's package nginx)")
def test_every_command_reads_a_set_from_nginx(
    made: LabelSet, site: Path, tmp_path: Path, sskt: Sskt
) -> None:
    with nginx(site.parent, tmp_path / "nginx") as url:
        address = f"{url}/sets/{made.name}"
        status, out, err = sskt("ls", address)
        assert status == 0 and made.digest[:12] in out and "3/3" in out, err
        status, out, err = sskt("verify", "--cache", address)
        assert status == 0 and ": clean" in out, err
        assert sskt("copy", address, tmp_path / "to")[0] == 0
        opened = public.open_label_set(address)
        assert np.array_equal(opened.read(2, 100, 900)["labels"], made.read(2, 100, 900)["labels"])
        assert opened.sample_names() == made.sample_names()
        status, _, err = sskt("rm", made.name, "--cache", address, "--yes")
        assert status == 2 and "is published read-only" in err
        with pytest.importorskip("xarray").open_zarr(address, chunks=None) as dataset:
            row = dataset.labels.sel(seed=1, sample="4/18.jpg").values
        assert np.array_equal(row, made.read(1, 18, 19)["labels"][0])
    copied = {k: v for k, v in tree(tmp_path / "to").items() if not k.startswith(".locks")}
    assert copied == {k: v for k, v in tree(made.path.parent).items() if not k.startswith(".locks")}


def test_a_training_gives_the_same_numbers(
    config: TrainConfig, label_cache: Path, tmp_path: Path, sskt: Sskt
) -> None:
    """From a published set, and from a zip file."""
    (name,) = (s.name for s in list_label_sets(label_cache))
    assert sskt("copy", label_cache, tmp_path / "site", "--publish")[0] == 0
    assert sskt("copy", label_cache, tmp_path / "set.zip")[0] == 0
    run_training(dataclasses.replace(config, epochs=2, out=tmp_path / "local"))
    with host(static(tmp_path / "site")) as plain:
        for labels in (f"{plain.url}/{name}", str(tmp_path / "set.zip")):
            out = tmp_path / f"run {labels[-4:]}"
            run_training(dataclasses.replace(config, epochs=2, cache=None, labels=labels, out=out))
            assert without_times(out) == without_times(tmp_path / "local")


def test_a_host_without_ranges_will_do(made: LabelSet, site: Path) -> None:
    with host(static(site)) as plain:
        opened = public.open_label_set(f"{plain.url}/{made.name}")
        assert np.array_equal(opened.read(0, 3, 9)["labels"], made.read(0, 3, 9)["labels"])
        assert not any("Range" in headers for _, headers in plain.seen)


def test_a_redirect_is_followed_to_a_named_host_only(
    made: LabelSet, site: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Hugging Face sends the files of a repository: no token, no further header."""
    monkeypatch.setenv("SSKT_TOKEN", "secret")
    with host(static(site)) as content, host(moved(content.url)) as front:
        address = f"{front.url}/{made.name}"
        name = content.url.removeprefix("http://")
        status, _, err = sskt("ls", address)
        assert status == 2 and f"set {ALLOWED}={name} and run the same command again" in err
        assert content.seen == []
        monkeypatch.setenv(ALLOWED, f"cdn.example.org, {name}")
        status, out, err = sskt("verify", "--cache", address)
        assert status == 0 and ": clean" in out, err
        assert content.seen and all("signature=a%2Fb" in path for path, _ in content.seen)
        for _, headers in (*front.seen, *content.seen):
            assert "Authorization" not in headers and "secret" not in str(headers)


def test_every_redirect_is_checked(
    made: LabelSet, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule holds for each redirect, and there are not more than five."""
    with (
        host(static(site)) as inner,
        host(moved(inner.url)) as content,
        host(moved(content.url)) as front,
    ):
        monkeypatch.setenv(ALLOWED, content.url.removeprefix("http://"))
        with pytest.raises(InputError, match="redirects to another host, 127"):
            public.open_label_set(f"{front.url}/{made.name}")
        assert inner.seen == []
    with (
        host(lambda handler: moved(around.url)(handler)) as around,
        pytest.raises(InputError, match="more than 5 times"),
    ):
        public.open_label_set(f"{around.url}/{made.name}")


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("file:///etc/passwd", "which is no URL"),
        ("http://u:p@127.0.0.1/x", "with a password"),
        ("//169.254.169.254/latest/meta-data", "another host, 169.254.169.254"),
        ("http://127.0.0.1:22/", "another host, 127.0.0.1:22"),
        ("http://[::1/", "which is no URL"),
    ],
)
def test_where_no_redirect_leads(made: LabelSet, location: str, said: str) -> None:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with host(answer) as front, pytest.raises(InputError, match=said):
        public.open_label_set(f"{front.url}/{made.name}")


def test_names_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, " CDN.example.org,*.hf.co , other:8443,*")
    assert may_lead_to("cdn.example.org", 443, "https")
    assert may_lead_to("a.b.hf.co", 443, "https") and not may_lead_to("hf.co", 443, "https")
    assert may_lead_to("other", 8443, "https") and not may_lead_to("other", 443, "https")
    assert not may_lead_to("cdn.example.org", 8443, "https")
    assert not may_lead_to("evil-cdn.example.org", 443, "https")
    monkeypatch.delenv(ALLOWED)
    assert not may_lead_to("", 443, "https")


def test_a_set_that_is_not_published_is_named(
    made: LabelSet, sskt: Sskt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made.path, tmp_path / made.name)
    with host(static(tmp_path)) as plain:
        status, _, err = sskt("ls", f"{plain.url}/{made.name}")
        assert status == 2 and f"has no {INDEX}" in err and "sskt copy --publish" in err

    def refuse(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(401)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with host(refuse) as closed:
        status, _, err = sskt("verify", "--cache", f"{closed.url}/{made.name}")
        assert status == 2 and "must be readable without a password" in err
    with serving(tmp_path) as url:  # the name of a set behind a label server, as before
        assert public.open_label_set(f"{url}/{made.name}").digest == made.digest


@pytest.mark.parametrize("index", [b"", b"[]", b'{"files": {"zarr.json": -1}}', b"{" * 100_000])
def test_a_list_that_is_none(made: LabelSet, site: Path, tmp_path: Path, index: bytes) -> None:
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / made.name / INDEX).write_bytes(index)
    with host(static(tmp_path / "site")) as plain, pytest.raises(InputError, match="no list of"):
        list_label_sets(f"{plain.url}/{made.name}")


def test_damage_on_the_host_is_found(
    made: LabelSet, site: Path, tmp_path: Path, sskt: Sskt
) -> None:
    shutil.copytree(site, tmp_path / "site")
    label_set = open_label_set(tmp_path / "site" / made.name)
    replace_shard(label_set, 1, 0, salt=5)
    (label_set.path / label_set.shard_key("labels", label_set.shard(0, 0))).unlink()
    with host(static(tmp_path / "site")) as plain:
        status, out, _ = sskt("verify", "--cache", f"{plain.url}/{made.name}")
    assert status == 1 and "seed 0, samples 0 to 511" in out


def test_the_list_is_kept_right_and_checked(made: LabelSet, tmp_path: Path, sskt: Sskt) -> None:
    """A later copy writes it anew; what changes a set otherwise is found."""
    few = make_labels(tmp_path / "few", without=[(2, 1)])
    assert sskt("copy", few.path.parent, tmp_path / "site", "--publish")[0] == 0
    label_set = open_label_set(tmp_path / "site" / few.name)
    assert not json.loads((label_set.path / INDEX).read_text())["files"].get("labels/c/2/1/0")
    assert sskt("copy", made.path.parent, tmp_path / "site")[0] == 0
    index = json.loads((label_set.path / INDEX).read_text())["files"]
    assert index["labels/c/2/1/0"] == (label_set.path / "labels/c/2/1/0").stat().st_size
    assert sskt("verify", "--cache", tmp_path / "site")[0] == 0
    assert sskt("rm", "--cache", tmp_path / "site", "--seeds", "2", "--yes", few.name)[0] == 0
    status, out, _ = sskt("verify", "--cache", tmp_path / "site")
    assert status == 1 and f"{INDEX} does not list the files as they are" in out


def test_what_is_the_url_of_a_published_set(made: LabelSet) -> None:
    assert is_published(f"https://example.org/a/{made.name}/")
    for other in ("http://labels:8080", "https://example.org/prefix", f"http://{made.name}"):
        assert not is_published(other)
    with pytest.raises((MissingData, InputError)):
        public.open_label_set(f"http://127.0.0.1:1/{made.name}")
