"""Labels from a label server: the numbers of the local store, whatever the network does."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import gc
import http.client
import http.server
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from email.utils import format_datetime, formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.damage import FAULTS, in_time
from support.helpers import TINY, tree
from support.ports import free_port
from support.processes import launched
from support.servers import (
    Answered,
    Proxy,
    Served,
    answered,
    misserving,
    serving,
    without_times,
)

from sskt.server.compute.queue import Queue
from sskt.server.http.tokens import new_token, revoke
from sskt.teacher_cache.errors import (
    CorruptStore,
    DiskFull,
    IncompleteLabels,
    InputError,
    SsktError,
)
from sskt.teacher_cache.format.spec import digest_of
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets
from sskt.teacher_cache.label_sets.find import require_seeds
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.http import client as http_client
from sskt.teacher_cache.storage.http import disk_cache
from sskt.teacher_cache.storage.http.answers import Unavailable
from sskt.teacher_cache.storage.http.client import TOKEN, Server
from sskt.teacher_cache.storage.http.storage import Fetching, open_server
from sskt.teacher_cache.storage.http.temporary_folder import private_folder
from sskt.teacher_cache.storage.open import open_cache
from sskt.teacher_cache.views.views import checks_of
from sskt.trainer.config import TrainConfig, make_config
from sskt.trainer.data.soft_labels import StoredLabels, Window
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.runs import run_training
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer

Call = Callable[..., tuple[int, str, str]]
ROWS, CLASSES, SAMPLES = 512, 100, 1024


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses; nobody's token."""
    monkeypatch.setattr(http_client, "PAUSES", (0.01, 0.05))
    monkeypatch.setattr(http_client, "FIRST_SECONDS", 0.3)
    monkeypatch.delenv(TOKEN, raising=False)


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    """Short, so that there are many."""
    return dataclasses.replace(config, tm=False, batch_size=30, test_split="none", epochs=3)


@pytest.fixture(scope="module")
def large(label_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose shards are of about 200 KB: two seeds of two shards, random f32 labels."""
    folder = tmp_path_factory.mktemp("large")
    fill(folder, list_label_sets(label_cache)[0], 0)
    return folder


def fill(folder: Path, like: LabelSet, state: int) -> LabelSet:
    classes = tuple(f"class {i}" for i in range(CLASSES))
    from sskt.teacher_cache.format.spec import classes_identity

    target = like.spec["target"] | {"size": SAMPLES}
    source = like.spec["source"] | {"classes": classes_identity(list(classes))}
    spec = like.spec | {"target": target, "source": source}
    rng = np.random.default_rng(state)
    with contextlib.closing(create_label_set(folder, spec, classes, 2, shard_rows=ROWS)) as made:
        for shard in made.shards(range(2)):
            logits = rng.normal(size=(ROWS, CLASSES)).astype(np.float32)
            labels = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            checks = rng.integers(1, 2**32, ROWS).astype(np.uint32)
            made.write(shard, made.encoding.encode(labels), checks)
    assert digest_of(spec) == made.digest
    return made


def only(cache: Any) -> LabelSet:
    (found,) = list_label_sets(cache)
    return found


def fetched(url: str, folder: Path, **how: Any) -> LabelSet:
    """The only label set of a server, through a node cache that is kept in ``folder``."""
    return only(open_server(url, Fetching(folder=folder, **how)))


def everything(label_set: LabelSet) -> list[Any]:
    """All labels and view checks."""
    return [
        (
            label_set.read(seed, 0, label_set.samples),
            label_set.read_checks(seed, 0, label_set.samples),
        )
        for seed in range(label_set.seeds)
    ]


def same(one: LabelSet, other: LabelSet) -> bool:
    pairs = zip(everything(one), everything(other), strict=True)
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) and (x == y).all()
        for (a, x), (b, y) in pairs
    )


def from_server(config: TrainConfig, url: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, cache=None, labels=url, **changes)


# The same as the local store


@pytest.mark.slow
def test_training_gives_the_same_numbers_and_resumes_from_either(
    config: TrainConfig, label_cache: Path, tmp_path: Path
) -> None:
    Trainer(make_plan(config)).run(tmp_path / "local")
    with serving(label_cache) as url:
        remote = from_server(config, url, label_cache=tmp_path / "node")
        Trainer(make_plan(remote)).run(tmp_path / "remote")

        def stop(record: Any) -> None:
            raise KeyboardInterrupt

        for name, first, then in (("there", remote, config), ("back", config, remote)):
            out = tmp_path / name
            with pytest.raises(KeyboardInterrupt):
                run_training(dataclasses.replace(first, out=out), Hooks(epoch=stop))
            assert len(without_times(out)) == 1
            run_training(dataclasses.replace(then, out=out))
    expected = without_times(tmp_path / "local")
    assert len(expected) == 3
    for name in ("remote", "there", "back"):
        assert without_times(tmp_path / name) == expected, name


def test_ls_and_verify_show_the_same(sskt: Call, large: Path, label_cache: Path) -> None:
    for cache in (large, label_cache):
        with serving(cache) as url:
            assert sskt("ls", url) == sskt("ls", "--cache", cache)
            assert sskt("ls", url, "tiny", "--json") == sskt("ls", "--cache", cache, "--json")
            assert sskt("ls", "--cache", url, "nothing")[0] == 2
            assert sskt("verify", "--cache", url) == sskt("verify", "--cache", cache)
    status, _, err = sskt("ls")
    assert status == 2 and "the cache folder labels does not exist" in err


def test_a_copy_from_a_server_is_the_set(sskt: Call, large: Path, tmp_path: Path) -> None:
    with serving(large) as url:
        assert sskt("copy", url, tmp_path)[0] == 0
    name = only(large).name
    assert tree(tmp_path / name) == tree(large / name)


REFUSALS: dict[str, tuple[dict[str, Any], Callable[[LabelSet], None]]] = {
    "other views": ({"policy": "pad-crop-flip:padding=2"}, lambda made: None),
    "other samples": ({"limit": 30}, lambda made: None),
    "seeds": ({"seeds": 5, "epochs": 5}, lambda made: None),
    "gone": ({}, lambda made: made.commit_path(made.shard(1, 2)).unlink()),
    "digest": ({"source": [f"tiny={TINY}:build#abcdef"]}, lambda made: None),
    "format": ({}, lambda made: _rewrite(made, b'"format": 1', b'"format": 9')),
    "not JSON": ({}, lambda made: _rewrite(made, b'"format"', b'format"')),
    "array": ({}, lambda made: (made.path / "labels" / "zarr.json").unlink()),
}


def _rewrite(made: LabelSet, old: bytes, new: bytes) -> None:
    path = made.path / "zarr.json"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_word_for_word_those_of_a_folder(
    config: TrainConfig, label_cache: Path, tmp_path: Path, case: str
) -> None:
    cache = shutil.copytree(label_cache, tmp_path / "labels")
    changes, damage = REFUSALS[case]
    damage(only(cache))
    config = dataclasses.replace(config, cache=cache, **changes)
    with pytest.raises(SsktError) as local:
        make_plan(config)
    with serving(cache) as url:
        with pytest.raises(SsktError) as remote:
            make_plan(from_server(config, url))
        here = str(local.value).replace(
            f"--cache {cache}", f"--cache DIR, where DIR is what {url} serves"
        )
        here = here.replace(f"{cache}/images", f"{url}/zarr/images").replace(str(cache), url)
    assert type(remote.value) is type(local.value)
    if case in ("format", "array", "not JSON"):  # the server says it in the list of label sets
        said = str(local.value).replace(f"{cache}/", "")
        name = next(path.name for path in cache.glob("images*"))
        here = f"label set {name}: the label server cannot read it: {said}"
    assert str(remote.value) == here


@pytest.mark.parametrize("array", ["labels", "view_check"])
def test_a_file_that_goes_after_the_start_is_named_as_in_a_folder(
    large: Path, tmp_path: Path, array: str
) -> None:
    cache = shutil.copytree(large, tmp_path / "labels")
    local = only(cache)
    with serving(cache) as url:
        remote = fetched(url, tmp_path / "node")
        assert remote.missing(range(2)) == []
        remote.read(1, 0, SAMPLES)
        local.shard_path(array, local.shard(0, 1)).unlink()
        for label_set in (local, remote):
            read = label_set.read if array == "labels" else label_set.read_checks
            with pytest.raises(CorruptStore) as said:
                read(0, 0, SAMPLES)
            if label_set is local:
                expected = str(said.value)
        assert str(said.value) == expected
        remote.read(0, 0, ROWS)


def test_a_damaged_shard_is_no_label(large: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(large, tmp_path / "labels")
    local = only(cache)
    path = local.shard_path("labels", local.shard(0, 1))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with serving(cache) as url:
        remote = fetched(url, tmp_path / "node")
        with pytest.raises(CorruptStore, match=f"as {url} sends it, is damaged .the checksum of"):
            remote.read(0, 0, SAMPLES)
        path.write_bytes(b"")
        remote.storage.refresh()
        with pytest.raises(CorruptStore, match="labels/c/0/1/0 is gone or empty"):
            remote.read(0, 0, SAMPLES)


def test_nothing_is_written_to_a_server(
    sskt: Call, large: Path, images: Path, tmp_path: Path
) -> None:
    with serving(large) as url:
        make = ["cache-teachers", "--source", f"tiny={TINY}:build", "--target", images]
        for command in (
            [*make, "--cache", url],
            ["copy", large, url],
            ["rm", "--cache", url, only(large).name],
            ["export", "--cache", large, only(large).name, "--encoding", "u8", "--out", url],
        ):
            status, _, err = sskt(*command)
            assert status == 2 and "is served read-only; run this on the cache" in err, err


# What the network does


@pytest.fixture
def proxied(large: Path) -> Iterator[tuple[Proxy, Served]]:
    seen, port = Served(), free_port()
    with serving(large, port=port, seen=seen):
        proxy = Proxy(port)
        yield proxy, seen
        proxy.close()


def shard_requests(seen: Served, *statuses: int) -> list[Any]:
    """Of the arrays' files, not of the records."""
    return [request for request in seen.of("GET", "/c/", *statuses) if ".json" not in request[1]]


@pytest.mark.parametrize("always", [False, True])
def test_an_answer_that_breaks_off_is_requested_again(
    large: Path, tmp_path: Path, proxied: tuple[Proxy, Served], always: bool
) -> None:
    proxy, _ = proxied
    cut: list[int] = []

    def treat(sent: int, data: bytes) -> bytes | None:
        if sent < 90_000 or (len(cut) > 2 and not always):
            return data
        cut.append(sent)
        return None

    proxy.treat = treat
    remote = fetched(proxy.url, tmp_path, wait_minutes=0.01)
    if always:
        said = r"does not answer \(the answer broke off\), and did not for .* when /zarr/.*/c/0/0/0"
        with pytest.raises(InputError, match=said):
            remote.read(0, 0, ROWS)
    else:
        assert same(remote, only(large))
    assert len(cut) > 2
    assert not list(tmp_path.rglob("*.partial"))


def test_a_training_that_starts_while_the_server_is_away_waits_for_it(
    config: TrainConfig, label_cache: Path, tmp_path: Path, log: Heard
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = contextlib.ExitStack()

    def start() -> None:
        assert log.heard.wait(30)
        server.enter_context(serving(label_cache, port=port))

    waiting = threading.Thread(target=start)
    with server:
        waiting.start()
        plan = make_plan(from_server(config, url, label_cache=tmp_path / "node"))
        waiting.join()
    assert plan.label_sets
    assert log.said[0] == (
        f"label server {url} does not answer (connection refused); waiting for /v1/label-sets, "
        "trying again for up to 60 minutes"
    )


def empty(path: str, body: bytes) -> bytes:
    """As nginx answers for a file that was lost in a full disk."""
    return answered(path, b"")


def cut(path: str, body: bytes) -> bytes:
    return answered(path, body)[:-100]


def too_short(path: str, body: bytes) -> bytes:
    """Cut, by something that makes its length anew."""
    return answered(path, body[:-100])


def too_long(path: str, body: bytes) -> bytes:
    return answered(path, body + bytes(100))


def larger_than_a_shard(path: str, body: bytes) -> bytes:
    return answered(path, body + bytes(ROWS * CLASSES * 5))


def without_length(path: str, body: bytes) -> bytes:
    return b"HTTP/1.0 200 OK\r\n\r\n" + body[:-100]


def an_error_page(path: str, body: bytes) -> bytes:
    return answered(path, b"<html>It works!</html>")


WRONG: dict[Answered, str] = {
    empty: r"is damaged \(it is empty\)",
    cut: r"the answer broke off",
    too_short: r"is damaged \(the checksum of its index fails\)",
    too_long: r"is damaged \(the checksum of its index fails\)",
    larger_than_a_shard: r"is damaged \(it has \d+ bytes or more, expected at most \d+\)",
    without_length: r"is damaged \(the checksum of its index fails\)",
    an_error_page: r"is damaged \(the checksum of its index fails\)",
}


@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_answers_for_a_shard(
    large: Path, tmp_path: Path, wrong: Answered, times: int, sskt: Call
) -> None:
    """They are requested once more; then the error names the shard, and nothing is kept."""
    made, asked = only(large), []

    def answer(path: str, body: bytes) -> bytes:
        if path.endswith("/labels/c/0/1/0"):
            asked.append(path)
            return wrong(path, body) if len(asked) <= times else answered(path, body)
        return answered(path, body)

    with misserving(made.path, answer) as url:
        remote = fetched(url, tmp_path / "node", wait_minutes=0.005)
        remote.read(0, 0, ROWS)
        if times == 1:
            assert same(remote, made) and len(asked) == 2
        else:
            with pytest.raises(SsktError, match=WRONG[wrong]) as error:
                remote.read(0, ROWS, SAMPLES)
            assert "labels/c/0/1/0" in str(error.value) and len(asked) >= 2
            assert len(list(tmp_path.rglob("*.shard"))) == 1
        asked.clear()
        if times == 99 and wrong is cut:  # waited for as any server that is away
            times = 1
        status, _, err = sskt("copy", url, tmp_path / "to")
        if times == 1:
            assert status == 0, err
            assert tree(tmp_path / "to" / made.name) == tree(made.path)
        else:
            assert status in (1, 2) and "labels/c/0/1/0" in err, err


@pytest.mark.parametrize("always", [False, True])
def test_a_byte_that_flips_on_the_way_is_found(
    large: Path, tmp_path: Path, proxied: tuple[Proxy, Served], always: bool
) -> None:
    proxy, seen = proxied
    flipped: list[int] = []

    def treat(sent: int, data: bytes) -> bytes:
        if data.isascii() or len(data) < 4096 or (flipped and not always):
            return data
        flipped.append(sent)
        return data[:2000] + bytes([data[2000] ^ 16]) + data[2001:]

    proxy.treat = treat
    remote = fetched(proxy.url, tmp_path)
    if always:
        with pytest.raises(CorruptStore, match=rf"as {proxy.url} sends it, is damaged"):
            remote.read(0, 0, SAMPLES)
        assert not list(tmp_path.rglob("*.shard"))
    else:
        assert same(remote, only(large)) and flipped
        assert len(shard_requests(seen, 200)) == 9


class Heard(logging.Handler):
    """What was logged, and an event for each message that contains a word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.said: list[str] = []
        self._word, self.heard = word, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        if self._word in self.said[-1]:
            self.heard.set()


@pytest.fixture
def log() -> Iterator[Heard]:
    handler = Heard("does not answer")
    logging.getLogger("sskt").addHandler(handler)
    yield handler
    logging.getLogger("sskt").removeHandler(handler)


def test_training_waits_for_a_server_that_restarts_in_mid_epoch(
    config: TrainConfig, label_cache: Path, tmp_path: Path, log: Heard
) -> None:
    Trainer(make_plan(config)).run(tmp_path / "local")
    port = free_port()
    server = contextlib.ExitStack()
    url = server.enter_context(serving(label_cache, port=port))
    again: list[bool] = []

    def restart() -> None:
        assert log.heard.wait(30)
        again.append(True)
        server.enter_context(serving(label_cache, port=port))

    def stop(epoch: int, done: int, total: int) -> None:
        if epoch == 0 and done == 1:
            server.close()

    waiting = threading.Thread(target=restart)
    with server:
        remote = from_server(config, url, label_cache=tmp_path / "node")
        trainer = Trainer(make_plan(remote), Hooks(step=stop))
        waiting.start()
        trainer.run(tmp_path / "remote")
        waiting.join()
    assert again and without_times(tmp_path / "remote") == without_times(tmp_path / "local")
    assert len(log.said) == 2
    assert log.said[0].startswith(f"label server {url} does not answer (connection refused)")
    assert ", trying again for up to 60 minutes" in log.said[0] and "waiting for /" in log.said[0]
    assert log.said[1] == f"label server {url} answers again"


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_jumps_changes_nothing(
    config: TrainConfig,
    label_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    jump: float,
) -> None:
    """An hour after every step, for the training and the label server in the same process."""
    tokens, ahead, clock = tmp_path / "tokens.json", [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: clock() + ahead[0])
    monkeypatch.setenv(TOKEN, new_token(tokens, "cluster", ["read"], None))
    Trainer(make_plan(config)).run(tmp_path / "local")

    def step(epoch: int, done: int, total: int) -> None:
        ahead[0] += jump
        for path in (tmp_path / "node").rglob("*.shard"):
            os.utime(path, (time.time(), time.time()))

    with serving(label_cache, token_file=str(tokens)) as url, in_time(100):
        remote = from_server(config, url, label_cache=tmp_path / "node")
        Trainer(make_plan(remote), Hooks(step=step)).run(tmp_path / "remote")
    assert abs(ahead[0]) >= 6 * 3600
    assert without_times(tmp_path / "remote") == without_times(tmp_path / "local")


def test_files_from_before_the_clock_was_set_back_are_the_first_to_go(
    large: Path, tmp_path: Path
) -> None:
    """Otherwise they would stay, and each new file would be removed at once."""
    with serving(large) as url:
        everything(fetched(url, tmp_path))
        old, *kept = sorted(tmp_path.rglob("labels.*.shard"))
        later = time.time() + 3600
        os.utime(old, (later, later))
        cache = disk_cache.disk_cache(url, tmp_path)
        total = sum(path.stat().st_size for path in tmp_path.rglob("*.shard"))
        cache._evict(total - 1)
        assert not old.exists() and all(path.exists() for path in kept)
        assert same(fetched(url, tmp_path), only(large))


def test_closing_ends_the_waiting_of_what_reads_ahead(
    config: TrainConfig, label_cache: Path, tmp_path: Path, log: Heard
) -> None:
    with serving(label_cache) as url:
        plan = make_plan(from_server(config, url, label_cache=tmp_path))
        labels = StoredLabels(plan.label_sets, plan.device)
        first = Window(0, ((0, 60),))
        labels.enter(first, None)
    labels.enter(first, Window(1, ((0, 60),)))
    assert log.heard.wait(30)
    began = time.monotonic()
    labels.close()
    assert time.monotonic() - began < 10


def test_a_revoked_token_stops_the_training_at_once(
    config: TrainConfig, label_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens.json"
    secret = new_token(tokens, "cluster", ["read"], None)
    with serving(label_cache, token_file=str(tokens)) as url:
        remote = from_server(config, url, label_cache=tmp_path / "node")
        with pytest.raises(InputError, match=f"needs a token; put it into .* {TOKEN}"):
            make_plan(remote)
        monkeypatch.setenv(TOKEN, "sskt_" + "x" * 43)
        with pytest.raises(InputError, match=f"{url} refused the token in {TOKEN}: "):
            make_plan(remote)
        monkeypatch.setenv(TOKEN, secret)

        def stop(epoch: int, done: int, total: int) -> None:
            if epoch == 0 and done == 1:
                revoke(tokens, "cluster")

        trainer = Trainer(make_plan(remote), Hooks(step=stop))
        with pytest.raises(InputError, match=f"{url} refused the token in {TOKEN}: "):
            trainer.run(tmp_path / "run")
    everywhere = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert secret.encode() not in everywhere


def test_a_token_that_cannot_be_sent_is_not_shown(
    sskt: Call, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens.json"
    secret = new_token(tokens, "cluster", ["read"], None)
    with serving(large, token_file=str(tokens)) as url:
        monkeypatch.setenv(TOKEN, f"{secret}\r\n")  # as from a file
        assert sskt("ls", url)[0] == 0
        for odd in (f"{secret}\nX: y", f"{secret} y", f"{secret}\u00fc"):
            monkeypatch.setenv(TOKEN, odd)
            status, _, err = sskt("ls", url)
            assert status == 2 and f"variable {TOKEN} holds no token" in err and secret not in err


def test_nobody_there(sskt: Call, large: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    status, _, err = sskt("ls", url)
    assert status == 2 and err == f"sskt: cannot reach {url}: connection refused\n"


def test_what_is_kept_is_not_used_without_its_server(large: Path, tmp_path: Path) -> None:
    port = free_port()
    with serving(large, port=port) as url:
        remote = fetched(url, tmp_path, wait_minutes=0)
        everything(remote)
    assert len(list(tmp_path.rglob("*.shard"))) == 8
    with pytest.raises(InputError, match=f"cannot reach {url}"):
        only(open_server(url))


class Scripted(http.server.BaseHTTPRequestHandler):
    """Gives one prepared (status, headers, body) after the other, as a proxy might."""

    answers: list[tuple[int, dict[str, str], bytes]]

    def do_GET(self) -> None:
        status, headers, body = self.answers.pop(0)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def scripted(*answers: tuple[int, dict[str, str], bytes]) -> Iterator[str]:
    handler = type("Handler", (Scripted,), {"answers": list(answers)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/behind/a/proxy"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


GOOD: tuple[int, dict[str, str], bytes] = (200, {}, b'{"on_demand": false}')


@pytest.mark.parametrize("ahead", [-3600, 0, 3600])
@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_pauses_that_the_server_asks_for(
    status: int, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the server may be an hour ahead of this machine's, or behind it."""
    now = time.time
    monkeypatch.setattr(
        http.server.BaseHTTPRequestHandler,
        "date_time_string",
        lambda self: formatdate(now() + ahead, usegmt=True),
    )
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=40 + ahead)
    date = format_datetime(soon, usegmt=True)
    pauses: list[float] = []
    answers = [(status, {"Retry-After": text}, b"busy") for text in ("7", date, "soon", "9999")]
    with scripted(GOOD, *answers, GOOD) as url:
        server = Server(url)
        monkeypatch.setattr(server, "pause", pauses.append)
        assert (
            server.json("/v1/server", dict)
            == server.json("/v1/server", dict)
            == {"on_demand": False}
        )
    assert [round(p) for p in pauses] == [7, pytest.approx(39, abs=1.01), 0, 300]


def test_very_many_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a wait of hours."""
    server = Server("http://host:1", patient=True)
    pauses: list[float] = []
    monkeypatch.setattr(server, "pause", pauses.append)

    def attempt() -> int:
        if len(pauses) < 1100:
            raise Unavailable("away")
        return 1

    assert server.patiently(attempt, "the labels") == 1
    assert max(pauses) <= 0.05


def test_a_busy_server_is_there_even_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    busy: tuple[int, dict[str, str], bytes] = (
        429,
        {},
        b'{"title": "too many requests at once", "detail": "16 requests"}',
    )
    monkeypatch.setattr(http_client, "FIRST_SECONDS", 0)
    with scripted(*[busy] * 9, GOOD) as url:
        assert Server(url).json("/v1/server", dict) == {"on_demand": False}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {}, b"<html>"), "answers, but /v1/label-sets is not as a label server sends it"),
        ((404, {}, b"no"), "has no /v1/label-sets .*: it is not a label server"),
        ((302, {"Location": "https://other/"}, b""), "redirects to https://other/; use that"),
        ((200, {"Content-Encoding": "gzip"}, b"x"), "sends compressed answers"),
        ((507, {}, b'{"detail": "no room"}'), "label server .*: no room"),
        ((500, {}, b'{"title": "label set damaged", "detail": "x"}'), "failed: x"),
        ((418, {}, b""), "refused a request .418."),
        ((503, {}, b'{"detail": "starting"}'), "cannot reach http.*: starting"),
        ((200, {"Content-Length": "99"}, b"{}"), "cannot reach http.*: the answer broke off"),
    ],
)
def test_other_answers(answer: tuple[int, dict[str, str], bytes], said: str) -> None:
    with scripted(*[answer] * 50) as url, pytest.raises(SsktError, match=said):
        list_label_sets(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://", "expected http://HOST:PORT"),
        ("http:///labels", "expected http://HOST:PORT"),
        ("http://host:99999", "is not the URL of a label server"),
        ("http://host/?set=1", "expected http://HOST:PORT"),
        ("https://me:secret@host", f"token for host into the environment variable {TOKEN}"),
        ("http://[::1", "is not the URL of a label server"),
        ("http://a..b", "is not the URL of a label server"),
        ("http://h ost:1", "expected http://HOST:PORT"),
    ],
)
def test_what_is_not_the_url_of_a_server(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("?", "[?]")) as error:
        open_cache(url)
    assert "secret" not in str(error.value)


def test_labels_and_cache_name_one_place() -> None:
    given = {"target": "cifar10", "source": ["imagenet"]}
    config = make_config(given)
    assert (config.cache, config.labels) == (None, None)  # the default location is taken
    with pytest.raises(InputError, match="both say where the labels are; give one"):
        make_config(given, {"cache": "labels", "labels": "http://host:1"})
    with pytest.raises(InputError, match="found s3://bucket; a folder or s3"):
        make_config(given, {"labels": "s3://bucket"})
    with pytest.raises(InputError, match="label_cache_size must be above 0"):
        make_config(given, {"labels": "http://host:1", "label_cache_size": -1.0})
    later = make_config(given | {"cache": "labels"}, {"labels": "http://host:1"})
    assert (later.cache, later.labels) == (None, "http://host:1")
    back = make_config(later.as_dict(), {"cache": "labels"})
    assert (back.cache, back.labels) == ("labels", None)


def test_tls_that_cannot_be_trusted(sskt: Call, large: Path, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the program openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    make += f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run(make.split(), check=True, capture_output=True)
    with serving(large) as plain:
        status, _, err = sskt("ls", plain.replace("http:", "https:"))
        assert status == 2 and "no TLS connection to https://127.0.0.1:" in err
    with serving(large, tls=(key, certificate)) as url:
        assert url.startswith("https://localhost:")
        status, _, err = sskt("ls", url)
        assert (
            status == 2
            and f"no TLS connection to {url}: self-signed certificate; SSL_CERT_FILE" in err
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(certificate))
            assert sskt("ls", url) == sskt("ls", "--cache", large)


# Computed on demand


@pytest.fixture
def wanting(label_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the labels that lacks a shard of seed 1 and knows its source."""
    monkeypatch.setattr(http_client, "COMPUTING_SECONDS", 0.05)
    cache = shutil.copytree(label_cache, tmp_path / "wanting")
    local = only(cache)
    for key in local.shard_keys(local.shard(1, 2)):
        (local.path / key).unlink()
    document = json.loads((local.path / "zarr.json").read_bytes())
    document["attributes"]["sskt"]["made"] = {"source": f"tiny={TINY}:build"}
    (local.path / "zarr.json").write_text(json.dumps(document))
    return cache


def test_what_is_missing_is_waited_for_where_the_server_computes(
    config: TrainConfig, label_cache: Path, wanting: Path, tmp_path: Path
) -> None:
    """The test stands in for the owner of the accelerator: the numbers must not differ."""
    config = dataclasses.replace(config, epochs=4, seeds=4)
    checks = checks_of(
        make_plan(dataclasses.replace(config, seeds=3)).views.batch(np.arange(60), 3)
    )
    whole = only(shutil.copytree(label_cache, tmp_path / "whole"))

    def store(cache: Path, seeds: int) -> None:
        """What is missing of so many seeds; the fourth has the first one's labels."""
        create = create_label_set(cache, whole.spec, whole.classes, seeds, shard_rows=16)
        with contextlib.closing(create) as made:
            for shard in made.missing(range(seeds)):
                rows = (shard.start, shard.stop)
                seen = checks[slice(*rows)] if shard.seed == 3 else whole.read_checks(1, *rows)
                made.write(shard, whole.read(shard.seed % 3, *rows), seen)

    store(tmp_path / "whole", 4)
    run_training(dataclasses.replace(config, cache=tmp_path / "whole", out=tmp_path / "local"))
    computing = Heard("is computing labels")
    logging.getLogger("sskt").addHandler(computing)

    def own() -> None:
        assert computing.heard.wait(30)
        store(wanting, 3)
        store(wanting, 4)

    owner = threading.Thread(target=own)
    with serving(wanting, on_demand=True, wait_seconds=0.05) as url:
        remote = from_server(config, url, label_cache=tmp_path / "node", out=tmp_path / "remote")
        owner.start()
        run_training(remote)
        owner.join()
    logging.getLogger("sskt").removeHandler(computing)
    assert without_times(tmp_path / "remote") == without_times(tmp_path / "local")
    assert f"label server {url} is computing labels (block 2 of seed 1 of" in computing.said[0]


def test_computing_needs_a_token_for_it(
    config: TrainConfig, wanting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens.json"
    monkeypatch.setenv(TOKEN, new_token(tokens, "reader", ["read"], None))
    refused = pytest.raises(InputError, match=rf"refused the token in {TOKEN}: .*compute")
    with serving(wanting, on_demand=True, token_file=str(tokens)) as url, refused:
        make_plan(from_server(config, url))
    refused = pytest.raises(IncompleteLabels, match="lacks seed 1 of 3; run sskt cache-teachers")
    with serving(wanting, token_file=str(tokens)) as url, refused:
        make_plan(from_server(config, url))


def test_a_computation_that_fails_stops_the_training_with_its_reason(
    wanting: Path, tmp_path: Path
) -> None:
    with serving(wanting, run=tmp_path / "run", on_demand=True, wait_seconds=0.05) as url:
        label_set = only(url)
        require_seeds(label_set, 3)
        queue = Queue(tmp_path / "run" / "queue", 64)
        (entry,) = queue.state()
        queue.fail(entry, "SsktError", "no weights of the source")
        with pytest.raises(SsktError, match=f"{url} failed: no weights of the source"):
            label_set.read(1, 0, 60)


# The node cache


@pytest.mark.slow
def test_a_shard_comes_once_for_all_processes(
    config: TrainConfig, label_cache: Path, tmp_path: Path
) -> None:
    """Two trainings at once get the numbers of the local store and download every shard once."""
    run_training(dataclasses.replace(config, out=tmp_path / "local"))
    seen = Served()
    options: list[object] = [
        "--source",
        config.source[0],
        "--target",
        config.target,
        "--test-split",
        "none",
    ]
    options += ["--policy", config.policy, "--batch-size", 30, "--device", "cpu", "--workers", 0]
    with serving(label_cache, seen=seen) as url, launched(tmp_path) as launcher:
        options += ["--epochs", 3, "--labels", url, "--label-cache", tmp_path / "node"]
        outs = [tmp_path / f"run-{i}" for i in range(2)]
        for run in [launcher.start("train", *options, "--out", out) for out in outs]:
            status, _, err = run.wait()
            assert status == 0, err
    assert len(shard_requests(seen, 200)) == len(shard_requests(seen, 304)) == 24
    assert len(shard_requests(seen)) == 48
    for out in outs:
        assert without_times(out) == without_times(tmp_path / "local")


def test_a_temporary_folder_goes_with_its_last_user(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(large) as url:
        everything(only(url))  # this process is a user from now on
        base = tmp_path / f"sskt-labels-{os.getuid()}"
        assert base.stat().st_mode & 0o777 == 0o700
        (home,) = base.glob("sskt-labels-*[!s]")
        left = base / "sskt-labels-killed-0123abcd"
        (left / "locks").mkdir(parents=True)
        left.with_name(f"{left.name}.users").touch()
        code = "import sys; from sskt.cli.main import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", code, "verify", "--cache", url]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not left.exists()  # what a killed process left is swept
        assert len(list(home.rglob("*.shard"))) == 8  # but not what somebody uses
        disk_cache.disk_cache.cache_clear()
        gc.collect()
        assert [path.name for path in base.iterdir()] == ["lock"]
    base.chmod(0o755)
    with pytest.raises(InputError, match="other users can use"):
        private_folder()


def test_threads_of_a_process_share_a_download(large: Path, tmp_path: Path) -> None:
    seen = Served()
    with serving(large, seen=seen) as url:
        sets = [fetched(url, tmp_path) for _ in range(4)]
        readers = [threading.Thread(target=everything, args=(s,)) for s in sets]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    # A thread may ask whether a shard that another one has just kept is still the same (304).
    assert len(shard_requests(seen, 200)) == 8


def test_a_kept_cache_is_asked_about_and_not_fetched_again(large: Path, tmp_path: Path) -> None:
    seen = Served()
    with serving(large, seen=seen) as url:
        assert same(fetched(url, tmp_path), only(large))
        disk_cache.disk_cache.cache_clear()  # as another process
        (path, *_) = tmp_path.rglob("labels*.shard")
        data = path.read_bytes()
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])  # a bad disk
        assert same(fetched(url, tmp_path), only(large))
    assert len(shard_requests(seen, 200)) == 9 and len(shard_requests(seen, 304)) == 8


@pytest.mark.parametrize("process", ["the same", "another"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_of_the_disk_cache_is_fetched_again(
    large: Path, tmp_path: Path, fault: str, process: str
) -> None:
    with serving(large) as url, in_time(60):
        first = fetched(url, tmp_path)
        everything(first)
        files = sorted(tmp_path.rglob("labels.*.shard"))
        FAULTS[fault](files[0], files[1])
        if process == "another":
            disk_cache.disk_cache.cache_clear()
        assert same(fetched(url, tmp_path), only(large))


def test_a_set_that_was_made_again_is_not_mixed_with_the_old_one(
    large: Path, label_cache: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(large, tmp_path / "labels")
    old = only(cache)
    with serving(cache) as url:
        assert same(fetched(url, tmp_path / "node"), old)
        shutil.rmtree(old.path)
        new = fill(cache, only(label_cache), 1)
        assert new.digest == old.digest and not same(only(cache), only(large))
        disk_cache.disk_cache.cache_clear()
        assert same(fetched(url, tmp_path / "node"), only(cache))
    assert len(list(tmp_path.rglob("*.shard"))) == 8


def test_a_budget_is_kept_and_the_labels_are_right(large: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in large.rglob("c/*/*/0"))
    budget = 0.6 * size
    mine = tmp_path / "notes.shard"  # nothing of ours
    mine.write_bytes(bytes(1000))
    with serving(large) as url:
        for _ in range(2):
            assert same(fetched(url, tmp_path, gibibytes=budget / 2**30), only(large))
            kept = sum(p.stat().st_size for p in tmp_path.rglob("sskt-labels-*/*/*.shard"))
            assert 0.3 * size < kept <= budget
        assert same(fetched(url, tmp_path, gibibytes=1 / 2**30), only(large))
    assert mine.exists()


def test_what_lies_there_does_not_shrink_a_temporary_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    free = [8 * 2**20]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    cache = disk_cache.DiskCache("http://host:1")
    before = cache._budget
    (cache._home / "set").mkdir()
    (cache._home / "set" / "labels.c.0.0.0@x.shard").write_bytes(bytes(3 * 2**20))
    free[0] -= 3 * 2**20
    cache.limit(None)
    assert cache._budget == before == 4 * 2**20


def test_another_process_that_is_waited_for_is_told(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be stopped, or wait for the server itself."""
    monkeypatch.setattr(disk_cache, "REPORT_SECONDS", 0.01)
    heard = Heard("another process of this machine")
    logging.getLogger("sskt").addHandler(heard)
    with serving(large) as url:
        remote = fetched(url, tmp_path)
        home = disk_cache.disk_cache(url, tmp_path)._home
        files = [(home / "locks" / str(i)).open("w") for i in range(disk_cache.LOCKS)]
        for file in files:
            fcntl.flock(file, fcntl.LOCK_EX)
        reader = threading.Thread(target=everything, args=(remote,))
        reader.start()
        told = heard.heard.wait(20)
        for file in files:
            file.close()
        reader.join()
    logging.getLogger("sskt").removeHandler(heard)
    assert told and len(heard.said) == 1


def test_a_folder_that_cannot_be_used(large: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with serving(large) as url, pytest.raises(InputError, match=r"cannot keep labels in .*file"):
        fetched(url, blocked).read(0, 0, 10)


def test_a_full_disk_is_named(large: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it; only here files are written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(large) as url:
        remote = fetched(url, tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(DiskFull, match=f"no room for labels in {tmp_path} .*--label-cache"):
                remote.read(0, 0, ROWS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert same(remote, only(large))


def test_a_forked_process_has_connections_of_its_own(large: Path) -> None:
    with serving(large) as url:
        place = open_cache(url)
        expected = place.folders()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are threads is the point
            child = os.fork()
        if not child:
            right = all(place.folders() == expected for _ in range(30))
            os._exit(0 if right else 1)
        assert all(place.folders() == expected for _ in range(30))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_server_that_hangs(
    large: Path, proxied: tuple[Proxy, Served]
) -> None:
    proxy, _ = proxied
    hanging, over = threading.Event(), threading.Event()

    def treat(sent: int, data: bytes) -> bytes | None:
        if data.isascii() or len(data) < 4096:
            return data
        hanging.set()
        over.wait(60)
        return None

    proxy.treat = treat
    code = "import sys; from sskt.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "verify", "--cache", proxy.url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert hanging.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        over.set()
        process.kill()
    assert process.returncode == 130 and err.strip() == "sskt: interrupted", err
