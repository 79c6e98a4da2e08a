"""The store over HTTP: every byte for any Zarr client, ranges, tags, nothing outside the cache."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.random_labels import SEEDS, make_labels
from support.servers import serving

from sskt.server.compute.queue import Queue
from sskt.server.http.problems import Problem
from sskt.server.routes.zarr import open_local, ranges
from sskt.server.state import Sets
from sskt.teacher_cache.label_sets.create import list_label_sets, open_label_set
from sskt.teacher_cache.storage.local import LocalStorage


@pytest.fixture(scope="module")
def cache(label_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the label cache with things beside it that nobody may read."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(label_cache, folder / "cache")
    (folder / "secret.txt").write_text("secret")
    (folder / "cache" / "set" / "c").mkdir(parents=True)
    (folder / "cache" / "set" / "link").symlink_to(folder / "secret.txt")
    (folder / "cache" / "set" / "folder").symlink_to(folder)
    (folder / "cache" / "set" / "x.0123.partial").write_text("half")
    (folder / "cache" / "set" / ".hidden").write_text("hidden")
    (folder / "cache" / ".locks").mkdir(exist_ok=True)
    (folder / "cache" / ".locks" / "x.lock").write_text("lock")
    return folder / "cache"


@pytest.fixture(scope="module")
def url(cache: Path) -> Iterator[str]:
    with serving(cache) as address:
        yield address


def get(
    url: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """The path is sent as it is, dots and all."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, found


def test_every_file_is_served_byte_for_byte(cache: Path, url: str) -> None:
    (label_set,) = list_label_sets(cache)
    files = [p for p in label_set.path.rglob("*") if p.is_file()]
    assert len(files) > 10
    for path in files:
        key = path.relative_to(cache).as_posix()
        status, headers, body = get(url, f"/zarr/{key}")
        assert (status, body) == (200, path.read_bytes()), key
        assert headers["accept-ranges"] == "bytes"
        immutable = "immutable" in headers["cache-control"]
        assert immutable == (path.name != "zarr.json"), key
        status, looked, body = get(url, f"/zarr/{key}", "HEAD")
        assert (status, body) == (200, b"")
        assert looked["content-length"] == str(path.stat().st_size)
        assert looked["etag"] == headers["etag"]
        assert get(url, f"/zarr/{key}", If_None_Match=headers["etag"])[::2] == (304, b"")


def first_shard(cache: Path) -> tuple[str, bytes]:
    (label_set,) = list_label_sets(cache)
    path = label_set.commit_path(label_set.shard(0, 0))
    return f"/zarr/{path.relative_to(cache).as_posix()}", path.read_bytes()


def test_ranges_over_the_wire(cache: Path, url: str) -> None:
    key, data = first_shard(cache)
    size = len(data)
    for asked, part in (
        ("bytes=0-0", data[:1]),
        ("bytes=5-99", data[5:100]),
        (f"bytes={size - 3}-{size + 100}", data[-3:]),
        ("bytes=-10", data[-10:]),
        (f"bytes=-{size + 5}", data),
        ("bytes=7-", data[7:]),
    ):
        status, headers, body = get(url, key, Range=asked)
        assert (status, body) == (206, part), asked
        assert headers["content-range"].endswith(f"/{size}")
    for asked in (f"bytes={size}-", "bytes=-0", f"bytes={10**30}-"):
        status, headers, body = get(url, key, Range=asked)
        assert (status, headers["content-range"]) == (416, f"bytes */{size}"), asked
    for asked in ("bytes=9-2", "items=0-1", "bytes=0-1,5-6", "bytes=-", "bytes=a-b", ""):
        assert get(url, key, Range=asked)[::2] == (200, data), asked


def test_a_part_of_another_version_is_never_given(cache: Path, url: str) -> None:
    key, data = first_shard(cache)
    tag = get(url, key)[1]["etag"]
    assert not tag.startswith("W/")
    assert get(url, key, Range="bytes=4-", If_Range=tag)[::2] == (206, data[4:])
    assert get(url, key, Range="bytes=4-", If_Range='"other"')[::2] == (200, data)
    path = cache / key.removeprefix("/zarr/")
    path.rename(path.with_name("kept"))
    path.write_bytes(data)
    try:
        assert get(url, key, Range="bytes=4-", If_Range=tag)[::2] == (200, data)
        assert get(url, key, If_None_Match=tag)[0] == 200
    finally:
        path.with_name("kept").replace(path)


DOTS = ("..", "%2e%2e", "%2E.", "..%00", "..;", "%252e%252e", "%c0%ae%c0%ae", "%ef%bc%8e%ef%bc%8e")
SLASHES = ("/", "%2f", "%5c", "\\", "//", "/./", "%252f", "%c0%af")


def test_nothing_outside_the_cache(cache: Path, url: str) -> None:
    (label_set,) = list_label_sets(cache)
    tried = [
        f"/zarr/{label_set.name}{slash}{dots}{slash}{dots}{slash}secret.txt"
        for dots in DOTS
        for slash in SLASHES
    ]
    tried += [f"/zarr{slash}{dots}{slash}secret.txt" for dots in DOTS for slash in SLASHES]
    tried += [
        "/zarr/set/link",
        "/zarr/set/folder/secret.txt",
        "/zarr/set/x.0123.partial",
        "/zarr/set/.hidden",
        "/zarr/.locks/x.lock",
        "/zarr/set",
        "/zarr/set/c",
        "/zarr/",
        "/zarr//etc/passwd",
        "/zarr/%2fetc%2fpasswd",
        f"/zarr/{label_set.name}//zarr.json",
        "/zarr/" + "a" * 5000 + "/b",
        "/zarr/" + "a/" * 2000 + "b",
    ]
    for path in tried:
        status, _, body = get(url, path)
        assert status in (400, 404), path
        assert b"secret" not in body.replace(b"secret.txt", b""), path
        assert not {b"half", b"hidden", b"lock"} & {body}, path


def test_only_reading(cache: Path, url: str) -> None:
    key, _ = first_shard(cache)
    for method in ("PUT", "POST", "DELETE", "PATCH", "MKCOL", "PROPFIND"):
        status, _, body = get(url, key, method)
        assert status in (400, 405), method
        assert b"Traceback" not in body


@given(st.text(max_size=40), st.integers(0, 10**6))
def test_any_range_header_is_a_part_or_refused(header: str, size: int) -> None:
    try:
        found = ranges(header, size)
    except Problem as problem:
        assert problem.status == 416
        return
    assert found is None or 0 <= found[0] < found[1] <= size


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 1000))
def test_a_range_is_what_it_says(first: int, last: int, size: int) -> None:
    data = np.arange(size)
    if first <= last and first < size:
        start, stop = ranges(f"bytes={first}-{last}", size) or (0, 0)
        assert (data[start:stop] == data[first : last + 1]).all() and stop - start >= 1


def test_a_link_out_is_no_file(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-other"
    for folder in (root / "a", outside):
        folder.mkdir(parents=True)
    (outside / "x").write_bytes(b"x")
    (root / "a" / "in").write_bytes(b"12345")
    (root / "a" / "out").symlink_to(outside / "x")
    (root / "a" / "within").symlink_to(root / "a" / "in")
    (root / "a" / "loop").symlink_to(root / "a" / "loop")
    os.mkfifo(root / "a" / "fifo")
    assert open_local(root, "a/none") is None
    for key in ("a/out", "a", "a/loop", "a/fifo"):
        with pytest.raises(Problem, match="not a regular file") as told:
            open_local(root, key)
        assert told.value.status == 500, "Zarr clients take 404 for fill values"
    for name in ("in", "within"):
        file = open_local(root, f"a/{name}")
        assert file is not None and file.size == 5
        file.close()
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    file = open_local(linked, "a/in")
    assert file is not None
    file.close()


def test_a_file_that_is_replaced_meanwhile_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a ``zarr.json`` that grows: the old or the new one, but never none."""
    (tmp_path / "zarr.json").write_bytes(b"old")
    look = os.fstat

    def replaced(handle: int) -> os.stat_result:
        (tmp_path / "new").write_bytes(b"newer")
        (tmp_path / "new").replace(tmp_path / "zarr.json")
        return look(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", replaced)
        file = open_local(tmp_path, "zarr.json")
    assert file is not None
    assert asyncio.run(file.read(0, file.size)) == b"old"
    file.close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ETIMEDOUT])
def test_a_shard_that_cannot_be_read_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Zarr clients take 404 for fill values."""
    (tmp_path / "x").write_bytes(b"x")

    def failing(*_: Any, **__: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(Problem) as told:
        open_local(tmp_path, "x")
    assert told.value.status == 503 and str(tmp_path) not in told.value.detail


def test_a_file_system_that_cannot_say_it_would_wait_is_read_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    file = open_local(tmp_path, "x")
    assert file is not None
    read, readers = os.preadv, []

    def as_on_nfs(handle: int, buffers: Any, start: int, flags: int = 0) -> int:
        if handle != file.handle:  # of a server that another test left running
            return read(handle, buffers, start, flags)
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        readers.append(threading.current_thread())
        return read(handle, buffers, start)

    monkeypatch.setattr(os, "preadv", as_on_nfs)
    assert asyncio.run(file.read(1, 4)) == b"234"
    assert threading.main_thread() not in readers and len(readers) == 1
    file.close()


def test_a_slow_look_at_the_cache_holds_up_nobody_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (label_set,) = list_label_sets(cache)
    looking, go_on, look = threading.Event(), threading.Event(), Sets._opened

    def slow(sets: Sets, name: str, **how: bool) -> Any:
        looking.set()
        assert go_on.wait(30)
        return look(sets, name, **how)

    monkeypatch.setattr(Sets, "_opened", slow)
    answers = []
    with serving(cache) as url:

        def ask() -> None:
            path = f"/v1/labels:batch?set={label_set.name}&seed=0"
            answers.append(get(url, path, "POST", Content_Type="application/octet-stream")[0])

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            assert looking.wait(30)
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
            connection.close()
        finally:
            go_on.set()
            asking.join()
    assert answers == [200]


def test_a_name_that_is_no_folder_computes_nothing(tmp_path: Path) -> None:
    label_set = make_labels(tmp_path / "cache", without=[(0, 1)])
    inner = label_set.commit_key(label_set.shard(0, 1))
    with serving(tmp_path / "cache", on_demand=True, run=tmp_path / "run", wait_seconds=0) as url:
        assert get(url, f"/zarr/{label_set.digest[:12]}/{inner}")[0] == 404
        assert Queue(tmp_path / "run/queue", 1).state() == []
        assert get(url, f"/zarr/{label_set.name}/{inner}")[0] == 503
        assert len(Queue(tmp_path / "run/queue", 1).state()) == 1


def test_only_files_of_label_sets_are_served(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    label_set = make_labels(cache, without=[(1, 0), (1, 1)])
    notes = cache / "notes"
    notes.mkdir()
    (notes / "passwords.txt").write_text("secret")
    (notes / "zarr.json").write_text("secret")
    outside = tmp_path / "outside"
    (outside / "c" / "2").mkdir(parents=True)
    (outside / "c" / "2" / "0").write_text("secret")
    inside = {
        "passwords.txt": "file",
        "other/zarr.json": "file",
        "labels/passwords.txt": "file",
        "labels/c/1/0/1": "file",
        "labels/c/1/1/0": outside / "c" / "2" / "0",
        "labels/c/01/1/0": "file",
        "labels/c/9/0/0": "file",
        "labels/c/0/0/0.json": "file",
        "view_check/c/9/0.json": "file",
        "labels/c/1/0/0.0123456789abcdef.partial": "file",
        "view_check/c/1/9": "file",
        "view_check/c/1/0/0": "file",
        "labels/c/1/0": "folder",
    }
    for key, what in inside.items():
        path = label_set.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, Path):
            path.symlink_to(what)
        elif what == "file":
            path.write_text("secret")
    with serving(cache) as url:
        keys = ["notes/passwords.txt", "notes/zarr.json", "notes/c/0/0", label_set.name]
        for key in [*keys, *(f"{label_set.name}/{key}" for key in inside)]:
            for method in ("GET", "HEAD"):
                status, _, body = get(url, f"/zarr/{key}", method)
                assert status in (404, 500) and b"secret" not in body, key
        files = json.loads(get(url, f"/v1/label-sets/{label_set.name}/files")[2])["files"]
        assert not set(files) & set(inside)
        assert len(files) == 3 + 3 * 7 + 6  # documents, shards, coordinates
        assert all(get(url, f"/zarr/{label_set.name}/{key}")[0] == 200 for key in files)


def test_reading_never_makes_a_label_set_grow(tmp_path: Path) -> None:
    label_set = make_labels(tmp_path / "cache")
    about = f"/v1/label-sets/{label_set.name}"
    with serving(
        tmp_path / "cache", on_demand=True, run=tmp_path / "run", wait_seconds=0, max_seeds=8
    ) as url:

        def read(seed: int) -> tuple[int, str]:
            status, _, body = get(url, f"/zarr/{label_set.name}/labels/c/{seed}/0/0")
            return status, json.loads(body)["detail"]

        def post(*seeds: int) -> tuple[int, Any]:
            body = json.dumps({"seeds": seeds}).encode()
            path = f"{about}:compute"
            status, _, told = get(url, path, "POST", body, Content_Type="application/json")
            return status, json.loads(told)

        for seed in (SEEDS, 7, 4099, 2**31 - 1):
            status, said = read(seed)
            assert status == 404 and f"has seeds 0 to {SEEDS - 1}, not {seed}" in said
            assert (":compute with" if seed < 8 else "cache-teachers --seeds") in said
        assert Queue(tmp_path / "run/queue", 1).state() == []
        assert open_label_set(label_set.storage).seeds == SEEDS

        status, told = post(0, 8)
        assert (status, told["max_seeds"]) == (422, 8) and "--max-seeds" in told["detail"]
        assert open_label_set(label_set.storage).seeds == SEEDS
        assert post(4)[0] == 202
        assert open_label_set(label_set.storage).seeds == 5
        assert json.loads(get(url, about)[2])["seeds"] == 5
        assert read(4)[0] == 503, "waits for the labels"
        assert read(5)[0] == 404


UNREADABLE = {
    "folder": "not a regular file",
    "fifo": "not a regular file",
    "loop": "Too many levels of symbolic links",
    "foreign group": "not a label set's metadata",
    "deep": "not a label set's metadata",
    "no JSON": "not a label set's metadata",
    "lost": "has lost its zarr.json",
    "link out": "leaves the cache",
    "not permitted": "Permission denied",
    "newer": "update sskt",
}


def unreadable(cache: Path, kind: str, model: Path) -> str:
    """Puts something that is not a readable label set into a cache; the name of its folder."""
    name = "broken"
    if kind == "link out":
        shutil.copytree(model, cache.parent / "elsewhere")
        (cache / name).symlink_to(cache.parent / "elsewhere")
        return name
    shutil.copytree(model, cache / name)
    document = cache / name / "zarr.json"
    text = document.read_text()
    document.unlink()
    if kind == "folder":
        document.mkdir()
    elif kind == "fifo":
        os.mkfifo(document)
    elif kind == "loop":
        document.symlink_to(document)
    elif kind in ("foreign group", "deep", "no JSON"):
        texts = {"foreign group": '{"zarr_format": 3, "node_type": "group", "attributes": {}}'}
        document.write_text(texts.get(kind, "[" * 10**5 if kind == "deep" else "{"))
    elif kind == "newer":
        document.write_text(text.replace('"format": 1', '"format": 2'))
    elif kind == "not permitted":
        (cache / name).chmod(0o700)
    return name


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_label_set_hides_no_other(tmp_path: Path, kind: str) -> None:
    cache = tmp_path / "cache"
    label_set = make_labels(cache)
    name = unreadable(cache, kind, label_set.path)
    with contextlib.ExitStack() as stack:
        if kind == "not permitted" and os.geteuid() == 0:
            stack.enter_context(as_nobody(tmp_path))
        url = stack.enter_context(serving(cache, run=tmp_path / "run"))
        found = json.loads(get(url, "/v1/label-sets")[2])
        assert [s["name"] for s in found["label_sets"]] == [label_set.name]
        ((broken, reason),) = found["damaged"].items()
        assert broken == name and UNREADABLE[kind] in reason
        assert str(tmp_path) not in reason
        assert get(url, "/readyz")[0] == 200
        if kind != "not permitted":  # the templates may lie where others than root cannot read
            assert get(url, "/")[0] == 200
        assert get(url, f"/zarr/{label_set.name}/zarr.json")[0] == 200
        assert get(url, f"/v1/label-sets/{label_set.digest[:6]}/coverage")[0] == 200
        for path in (f"/v1/label-sets/{name}", f"/zarr/{name}/zarr.json"):
            status, _, body = get(url, path)
            assert status == 500 and UNREADABLE[kind] in json.loads(body)["detail"]


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Takes the rights of root from this process, but lets it use a test's folder."""
    checkout = Path(__file__).resolve()
    if any(parent.stat().st_mode & 0o005 != 0o005 for parent in checkout.parents):
        pytest.skip("another user cannot read this checkout")
    parents = [p for p in (folder, *folder.parents) if p.owner() == "root" and p != p.parent]
    modes = {parent: parent.stat().st_mode for parent in parents}
    for parent, mode in modes.items():
        parent.chmod(mode | 0o755)
    (folder / "run").mkdir()
    os.chown(folder / "run", 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in modes.items():
            parent.chmod(mode)


def test_folders_with_other_names_are_left_out(tmp_path: Path) -> None:
    label_set = make_labels(tmp_path / "cache")
    shutil.copytree(label_set.path, tmp_path / "cache" / "a copy #1")
    with serving(tmp_path / "cache") as url:
        found = json.loads(get(url, "/v1/label-sets")[2])
        assert [s["name"] for s in found["label_sets"]] == [label_set.name]
        for path in ("/zarr/a%20copy%20%231/zarr.json", "/v1/label-sets/a%20copy%20%231"):
            assert get(url, path)[0] == 404


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop", "empty", "link out", "dangling"])
@pytest.mark.parametrize("array", ["labels", "view_check"])
def test_a_shard_that_is_no_file_is_damage(tmp_path: Path, kind: str, array: str) -> None:
    label_set = make_labels(tmp_path / "cache")
    key = label_set.shard_key(array, label_set.shard(0, 1))
    path = label_set.path / key
    path.rename(tmp_path / "kept")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    else:
        links = {"loop": path, "link out": tmp_path / "kept", "dangling": tmp_path / "none"}
        path.symlink_to(links[kind])
    about = f"/v1/label-sets/{label_set.name}"
    with serving(tmp_path / "cache") as url:

        def ask(*ids: int) -> tuple[int, bytes]:
            body = np.array(ids, "<i8").tobytes()
            query = f"/v1/labels:batch?set={label_set.name}&seed=0"
            return get(url, query, "POST", body, Content_Type="application/octet-stream")[::2]

        found = get(url, f"/zarr/{label_set.name}/{key}")
        assert found[0] == (404 if kind == "dangling" else 500)
        for route in ("/v1/label-sets", about, f"{about}/coverage", f"{about}/files", "/readyz"):
            assert get(url, route)[0] == 200, route
        assert key not in json.loads(get(url, f"{about}/files")[2])["files"] or kind == "empty"
        assert ask(0, 1299)[0] == 200
        if kind != "link out":  # the labels are right; /zarr and /files alone give files away
            assert ask(0, 600)[0] == 500


def test_a_copy_of_a_label_set_is_told(tmp_path: Path) -> None:
    label_set = make_labels(tmp_path / "cache")
    shutil.copytree(label_set.path, tmp_path / "cache" / "copy")
    with serving(tmp_path / "cache") as url:
        found = json.loads(get(url, "/v1/label-sets")[2])
        assert [s["name"] for s in found["label_sets"]] == [label_set.name]
        assert f"is a copy of {label_set.name}" in found["damaged"]["copy"]
        status, _, body = get(url, f"/v1/label-sets/{label_set.digest[:12]}")
        assert (status, json.loads(body)["name"]) == (200, label_set.name)


@pytest.mark.parametrize(
    "name", ["n" * 214, "n" * 256, "n" * 4000, "a%23b", "a#b", "%00", "..", "a%2fb"]
)
def test_names_that_no_label_set_has(url: str, name: str) -> None:
    for path in (f"/v1/label-sets/{name}/coverage", f"/zarr/{name}/zarr.json", f"/sets/{name}"):
        status, _, body = get(url, path)
        assert status in (400, 404) and b"Traceback" not in body, path


def test_a_label_set_that_is_made_anew_is_never_an_error(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    label_set = make_labels(cache)
    statuses: list[tuple[int, str, bytes]] = []
    ended = threading.Event()

    def make_anew() -> None:
        for rows in (256, 512, 1024, 512):
            gone = label_set.path.rename(cache / ".gone.partial")
            shutil.rmtree(gone)
            time.sleep(0.05)
            make_labels(cache, rows=rows)
            time.sleep(0.15)
        ended.set()

    with serving(cache) as url:
        ids = np.array([0, 700], "<i8").tobytes()
        query = f"/v1/labels:batch?set={label_set.name}&seed=0"
        maker = threading.Thread(target=make_anew)
        maker.start()
        while not ended.is_set():
            for method, path, body in (
                ("POST", query, ids),
                ("GET", f"/zarr/{label_set.name}/labels/c/0/0/0", None),
                ("GET", f"/v1/label-sets/{label_set.name}/coverage", None),
                ("GET", "/v1/label-sets", None),
            ):
                kind = "application/octet-stream"
                status, _, told = get(url, path, method, body, Content_Type=kind)
                statuses.append((status, path, told[:300] if status > 499 else b""))
        maker.join()
        assert {s[0] for s in statuses} <= {200, 404, 409, 503}, statuses
        assert get(url, query, "POST", ids, Content_Type=kind)[0] == 200
    assert sum(s[0] == 200 for s in statuses) > 20


@pytest.mark.parametrize("since_start", [True, False])
def test_a_lost_mount_is_not_ready(tmp_path: Path, since_start: bool) -> None:
    """An empty folder in place of the cache, also for a worker process that starts later."""
    label_set = make_labels(tmp_path / "cache")
    here = (tmp_path / "cache").stat().st_dev
    with serving(tmp_path / "cache", cache_device=here + 1) as url:
        if since_start:
            assert get(url, "/readyz")[0] == 200
        shutil.rmtree(label_set.path)
        time.sleep(1.1 if since_start else 0)  # a listing is kept for a second
        key = f"/zarr/{label_set.name}/labels/c/0/0/0"
        for path in ("/readyz", "/v1/label-sets", f"/v1/label-sets/{label_set.name}", key):
            status, _, body = get(url, path)
            assert (status, json.loads(body)["title"]) == (503, "cache out of reach"), path
        assert "mount its file system again" in json.loads(get(url, "/readyz")[2])["detail"]
    with serving(tmp_path / "cache", cache_device=here) as url:
        assert get(url, "/readyz")[0] == 200, "removed label sets are no lost mount"


def test_a_cache_that_cannot_be_listed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(_: LocalStorage) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(cache))

    monkeypatch.setattr(LocalStorage, "folders", unreadable)
    with serving(cache) as url:
        assert get(url, "/readyz")[0] == 503


@pytest.fixture(scope="module", params=["f32", "golden"])
def readable(request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """A served cache and its URL: three seeds in f32, or the golden sets (f16, u8, top-k)."""
    if request.param == "f32":
        yield request.getfixturevalue("cache"), request.getfixturevalue("url")
        return
    golden = Path(__file__).parents[2] / "golden" / "cache"
    assert {str(s.encoding) for s in list_label_sets(golden)} >= {"f16", "u8"}
    with serving(golden) as address:
        yield golden, address


def arrays(cache: Path) -> Iterator[tuple[str, Any]]:
    import zarr

    for label_set in list_label_sets(cache):
        for name in label_set.arrays:
            found = zarr.open_array(label_set.path / name, mode="r")
            yield f"{label_set.name}/{name}", np.asarray(found[:])


def test_zarr_over_obstore(readable: tuple[Path, str]) -> None:
    cache, url = readable
    import zarr
    from obstore.store import HTTPStore
    from zarr.storage import ObjectStore

    store = ObjectStore(
        HTTPStore.from_url(f"{url}/zarr", client_options={"allow_http": True}), read_only=True
    )
    for path, expected in arrays(cache):
        found = zarr.open_array(store, path=path, mode="r")
        assert np.array_equal(np.asarray(found[:]), expected, equal_nan=expected.dtype.kind == "f")


def test_zarr_over_fsspec(readable: tuple[Path, str]) -> None:
    cache, url = readable
    import zarr
    from zarr.storage import FsspecStore

    store = FsspecStore.from_url(f"{url}/zarr", read_only=True)
    for path, expected in arrays(cache):
        found = zarr.open_array(store, path=path, mode="r")
        assert np.array_equal(np.asarray(found[:]), expected, equal_nan=expected.dtype.kind == "f")


def test_tensorstore(readable: tuple[Path, str]) -> None:
    cache, url = readable
    import tensorstore

    for path, expected in arrays(cache):
        spec = {"driver": "zarr3", "kvstore": {"driver": "http", "base_url": f"{url}/zarr/{path}/"}}
        found = tensorstore.open(spec, read=True).result().read().result()
        assert np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f")


def test_a_slow_client_does_not_hold_the_file_in_memory(cache: Path, url: str) -> None:
    """Many clients ask for a big file and take nothing: each costs a piece, not the file."""
    import socket

    import psutil

    key, data = first_shard(cache)
    big = cache / key.removeprefix("/zarr/")
    size, clients = 64 * 2**20, 12
    with big.open("wb") as file:
        file.truncate(size)
    where = urlsplit(url)
    address = (where.hostname, where.port)

    def memory() -> int:
        found = 0
        for process in psutil.process_iter(["net_connections"]):
            for held in process.info["net_connections"] or ():
                if held.status == "LISTEN" and held.laddr.port == where.port:
                    found = max(found, process.memory_info().rss)
        return found

    before = memory()
    assert before
    held = []
    try:
        for _ in range(clients):
            one = socket.create_connection(address)
            one.sendall(f"GET {key} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            held.append(one)
        assert all(one.recv(15) == b"HTTP/1.1 200 OK" for one in held)
        deadline = time.monotonic() + 0.5
        peak = 0
        while time.monotonic() < deadline:
            peak = max(peak, memory())
        assert peak - before < size, (before, peak)
    finally:
        for one in held:
            one.close()
        big.write_bytes(data)


def test_a_cache_that_is_gone_is_no_missing_shard(cache: Path, url: str) -> None:
    key, data = first_shard(cache)
    away = cache.with_name("away")
    cache.rename(away)
    try:
        status, headers, _ = get(url, key)
        assert status == 503 and headers["retry-after"] == "5"
    finally:
        away.rename(cache)
    assert get(url, key)[2] == data


def test_an_empty_shard_is_damage_and_no_fill_values(cache: Path, url: str) -> None:
    key, data = first_shard(cache)
    path = cache / key.removeprefix("/zarr/")
    path.write_bytes(b"")
    try:
        status, _, body = get(url, key)
        assert status == 500 and b"label set damaged" in body
    finally:
        path.write_bytes(data)
    assert get(url, key)[2] == data


def test_features_and_their_head_over_http() -> None:
    """The golden sets of features and logits are read as from their folder; pages show them."""
    golden = Path(__file__).parents[2] / "golden" / "features"
    known = {s.name: s for s in list_label_sets(golden)}
    rows = [0, 1, 2, 4, 5, 6]
    with serving(golden) as url:
        remote = list_label_sets(url)
        assert {s.name for s in remote} == set(known) and len(known) == 4
        for found in remote:
            own = known[found.name]
            assert found.features(1, rows).equal(own.features(1, rows))
            if own.head is not None:
                assert found.rows(1, rows, temperature=3.0).equal(
                    own.rows(1, rows, temperature=3.0)
                )
            for page in ("", "/samples/5?seed=1"):
                status, _, body = get(url, f"/sets/{own.name}{page}")
                assert status == 200
                if own.head is None:
                    assert own.contents.encode() in body
