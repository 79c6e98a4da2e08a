"""POST /v1/labels:batch: the stored rows, in the form asked for, or a problem that says why not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load
from support.batches import read_batch
from support.random_labels import CLASSES, ROWS, SAMPLES, SEEDS, make_labels, write_shard, writer_of

from sskt.server.app import create_app
from sskt.server.http.tokens import new_token
from sskt.server.routes import labels_batch as batch
from sskt.server.routes.batch_formats import OFFERED, RAW, SAFETENSORS, Budget, chosen
from sskt.server.settings import Settings
from sskt.teacher_cache.format.encodings import Encoded
from sskt.teacher_cache.label_sets.label_set import LabelSet

ENCODINGS = ("f32", "f16", "root4", "u8", "topk-3")
JSON = "application/json"
ROW = 4 + 4 * CLASSES
"""Bytes of a row, f32."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        told: dict[str, Any] = json.loads(self.body)
        assert told["status"] == self.status
        assert told["request_id"] == self.headers["x-request-id"]
        assert {"type", "title", "detail", "instance"} <= set(told)
        return told

    @property
    def arrays(self) -> Encoded:
        assert self.status == 200, self.body
        return read_batch(self.headers, self.body)


class Client:
    """Calls the application as a web server does."""

    def __init__(self, run: Path, cache: Path, **more: Any) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.app = cast(Any, create_app(Settings(cache=str(cache), run=str(run), **more)))
        self.state = self.app.state

    def post(self, body: bytes, query: str = "", **headers: str) -> Answer:
        return asyncio.run(self.posting(body, query, **headers))

    def ask(self, wanted: object, **headers: str) -> Answer:
        return self.post(json.dumps(wanted).encode(), content_type=JSON, **headers)

    def raw(self, name: str, seed: object, ids: Any, **headers: str) -> Answer:
        query = f"set={name}&seed={seed}"
        return self.post(np.array(ids, "<i8").tobytes(), query, content_type=RAW, **headers)

    def count(self, name: str) -> float:
        """Of the exposition."""
        lines = self.state.metrics.text().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    async def posting(self, body: bytes, query: str = "", **headers: str) -> Answer:
        pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/labels:batch",
            "raw_path": b"/v1/labels:batch",
            "root_path": "",
            "query_string": query.encode(),
            "headers": [*pairs, (b"content-length", str(len(body)).encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        messages, sent = [{"type": "http.request", "body": body, "more_body": False}], []

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(dict(message, body=bytes(message.get("body", b""))))

        await self.app(scope, receive, send)
        found = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, b"".join(part["body"] for part in sent[1:]))


def stored(label_set: LabelSet, seed: int, ids: Any) -> Encoded:
    """Rows by the store's own way."""
    every = {"view_check": label_set.read_checks(seed, 0, SAMPLES)}
    every |= label_set.read(seed, 0, SAMPLES)
    return {name: array[np.array(ids, int)] for name, array in every.items()}


def same(found: Encoded, wanted: Encoded) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LabelSet]:
    """By encoding, in one cache; of f16, seed 1 lacks block 1 and seed 2 everything."""
    cache = tmp_path_factory.mktemp("cache")
    without = {"f16": [(1, 1), (2, 0), (2, 1), (2, 2)]}
    return {e: make_labels(cache, e, without=without.get(e, [])) for e in ENCODINGS}


@pytest.fixture(scope="module")
def client(sets: dict[str, LabelSet], tmp_path_factory: pytest.TempPathFactory) -> Client:
    cache = sets["f16"].path.parent
    return Client(tmp_path_factory.mktemp("run"), cache, max_ids=100)


# --- answers ----------------------------------------------------------------------------------


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    encoding=st.sampled_from(ENCODINGS),
    ids=st.lists(st.integers(0, SAMPLES - 1), max_size=20),
    seed=st.integers(0, SEEDS - 1),
    form=st.sampled_from(["json", "raw"]),
    accept=st.sampled_from(OFFERED),
    digits=st.sampled_from([6, 12, 64, 0]),
)
def test_stored_rows_in_every_form(
    sets: dict[str, LabelSet],
    client: Client,
    encoding: str,
    ids: list[int],
    seed: int,
    form: str,
    accept: str,
    digits: int,
) -> None:
    label_set = sets[encoding]
    seed = 0 if encoding == "f16" else seed
    name = label_set.digest[:digits] or label_set.name
    if form == "json":
        answer = client.ask({"set": name, "seed": seed, "ids": ids}, accept=accept)
    else:
        answer = client.raw(name, seed, ids, accept=accept)
    assert answer.headers["content-type"] == accept
    assert answer.headers["sskt-digest"] == label_set.digest
    wanted = stored(label_set, seed, ids)
    if accept == RAW:
        same(answer.arrays, wanted)
    else:
        loaded = load(answer.body)
        same({key: loaded[key] for key in label_set.arrays}, wanted)
        size = int.from_bytes(answer.body[:8], "little")
        about = json.loads(answer.body[8 : 8 + size])["__metadata__"]
        assert about == {"set": label_set.name, "digest": label_set.digest, "seed": str(seed)}


def test_a_seed_for_each_id(sets: dict[str, LabelSet], client: Client) -> None:
    label_set, ids, seeds = sets["topk-3"], [5, 1299, 5, 600], [2, 0, 1, 1]
    wanted = [stored(label_set, s, [i]) for s, i in zip(seeds, ids, strict=True)]
    answer = client.ask({"set": label_set.name, "seed": seeds, "ids": ids})
    same(answer.arrays, {k: np.concatenate([w[k] for w in wanted]) for k in wanted[0]})
    expected = "view_check uint32 4; index uint16 4x3; value float16 4x3"
    assert answer.headers["sskt-arrays"] == expected


def test_what_is_counted(sets: dict[str, LabelSet], client: Client) -> None:
    name = sets["u8"].name
    client.raw(name, 0, [0])
    labels, hits = (
        client.count(f'sskt_labels_total{{set="{name}"}}'),
        client.count("sskt_decoded_h"),
    )
    client.raw(name, 0, [7, 8, 9])
    assert client.count(f'sskt_labels_total{{set="{name}"}}') == labels + 3
    assert client.count("sskt_decoded_hits_total") == hits + 1
    client.raw(name, 0, [7, SAMPLES])
    assert client.count(f'sskt_labels_total{{set="{name}"}}') == labels + 3


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, RAW),
        ("", RAW),
        ("*/*", RAW),
        ("application/*", RAW),
        ("text/html, */*;q=0.1", RAW),
        (SAFETENSORS, SAFETENSORS),
        (f"{RAW};q=0.5, {SAFETENSORS}", SAFETENSORS),
        (f"*/*;q=0.5, {SAFETENSORS.upper()} ; Q=0.6", SAFETENSORS),
        (f"{RAW};q=0, */*", SAFETENSORS),
        (f"application/*;q=0.2, {RAW};q=0.1", SAFETENSORS),
        ("application/json", None),
        (f"{RAW};q=0", None),
        (f"{RAW};q=much", None),
        ("text/*, image/png", None),
        (",;=,", None),
    ],
)
def test_what_accept_likes_best(accept: str | None, kind: str | None) -> None:
    assert chosen(accept) == kind


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'{"set": "SET", "seed": 0}', "ids"),
        (b'{"set": "SET", "seed": 0, "ids": 3}', "ids"),
        (b'{"set": "SET", "seed": 0, "ids": ["3"]}', "ids.0"),
        (b'{"set": "SET", "seed": 0, "ids": [1.5]}', "ids.0"),
        (b'{"set": "SET", "seed": 0, "ids": [true]}', "ids.0"),
        (b'{"set": "SET", "seed": 0, "ids": [0, -1]}', "ids.1"),
        (b'{"set": "SET", "seed": 0, "ids": [99999999999999999999999]}', "ids.0"),
        (b'{"set": "SET", "seed": -1, "ids": [0]}', "seed"),
        (b'{"set": "SET", "seed": 2147483648, "ids": [0]}', "seed"),
        (b'{"set": "SET", "seed": [0, -1], "ids": [0, 0]}', "seed"),
        (b'{"set": 3, "seed": 0, "ids": [0]}', "set"),
        (b'{"set": "SET", "seed": 0, "ids": [0], "more": 1}', "more"),
        (b'{"set": "\\ud800", "seed": 0, "ids": [0]}', "body"),
    ],
)
def test_a_json_body_that_is_wrong(
    sets: dict[str, LabelSet], client: Client, body: bytes, where: str
) -> None:
    body = body.replace(b"SET", sets["f32"].name.encode())
    told = client.post(body, content_type=JSON).problem
    assert told["status"] == 422
    assert told["errors"][0]["where"].startswith("" if where == "body" else where)
    assert told["detail"].startswith(where)


def test_refusals(sets: dict[str, LabelSet], client: Client) -> None:
    name = sets["f32"].name
    body = json.dumps({"set": name, "seed": 0, "ids": [0]}).encode()
    ids = np.array([0], "<i8").tobytes()
    query = f"set={name}&seed=0"
    cases: list[tuple[int, str, Callable[[], Answer]]] = [
        (415, "no type", lambda: client.post(body)),
        (415, "text/plain", lambda: client.post(body, content_type="text/plain")),
        (415, "gzip", lambda: client.post(body, content_type=JSON, content_encoding="gzip")),
        (406, RAW, lambda: client.post(body, content_type=JSON, accept="text/html")),
        (404, "no label set 'none'", lambda: client.raw("none", 0, [0])),
        (404, "no label set", lambda: client.raw("", 0, [0])),
        (404, "no label set", lambda: client.raw("..%2f..%2fetc", 0, [0])),
        (422, "raw ids need", lambda: client.post(ids, f"set={name}", content_type=RAW)),
        (422, "raw ids need", lambda: client.post(ids, "seed=0", content_type=RAW)),
        (422, "seed", lambda: client.raw(name, -1, [0])),
        (422, "seed", lambda: client.raw(name, "x", [0])),
        (422, "seed", lambda: client.raw(name, 2**31, [0])),
        (422, "9 bytes", lambda: client.post(ids + b"x", query, content_type=RAW)),
        (422, "belong into it", lambda: client.post(body, query, content_type=JSON)),
        (422, "the first is 1300", lambda: client.raw(name, 0, [0, SAMPLES])),
        (422, "the first is -1", lambda: client.raw(name, 0, [0, -1])),
        (422, str(-(2**63)), lambda: client.raw(name, 0, [-(2**63)])),
        (422, "2 seeds for 1 ids", lambda: client.ask({"set": name, "seed": [0, 0], "ids": [0]})),
        (413, "101 ids", lambda: client.raw(name, 0, [0] * 101)),
        (413, "101 ids", lambda: client.ask({"set": name, "seed": 0, "ids": [0] * 101})),
        (413, "bytes", lambda: client.post(bytes(2**20 + 8), query, content_type=RAW)),
    ]
    for status, said, call in cases:
        told = call().problem
        assert (told["status"], said in told["detail"]) == (status, True), (said, told)
    assert client.raw(name, 0, [0] * 100).status == 200


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_ids": 5}, ["8 ids", "at most 5"]),
        ({"max_answer": 5 * ROW + 1}, [f"has {8 * ROW} bytes", f"at most {5 * ROW + 1}"]),
        ({"max_decoded": 3 * ROWS * ROW}, ["in 5 chunks", f"at most {3 * ROWS * ROW}"]),
    ],
)
@pytest.mark.parametrize("form", ["json", "raw"])
def test_a_batch_is_bounded_in_ids_bytes_and_work(
    sets: dict[str, LabelSet],
    tmp_path: Path,
    limits: dict[str, int],
    named: list[str],
    form: str,
) -> None:
    label_set, ids = sets["f32"], [0, 600, 600, 1, 1200, 5, 1201, 7]
    client = Client(tmp_path / "run", label_set.path.parent, **limits)
    seeds = [0, 0, 0, 0, 0, 1, 1, 1] if "max_decoded" in limits else 0
    if form == "raw" and isinstance(seeds, list):
        seeds, ids = 1, [0, 600, 600, 1, 599, 1200, 3, 1299]
        client = Client(tmp_path / "run", label_set.path.parent, max_decoded=2 * ROWS * ROW)
        named = ["in 3 chunks"]

    def ask(count: int) -> Answer:
        each = seeds[:count] if isinstance(seeds, list) else seeds
        if form == "raw":
            return client.raw(label_set.name, each, ids[:count])
        return client.ask({"set": label_set.name, "seed": each, "ids": ids[:count]})

    told = ask(8).problem
    assert (told["status"], told["title"], told["max_ids"]) == (413, "too many ids", 5)
    for part in [*named, "the first 5 ids fit"]:
        assert part in told["detail"]
    assert ask(6).status == 413
    assert ask(5).status == 200
    assert batch._answers.held == 0


def test_missing_labels_are_named(sets: dict[str, LabelSet], client: Client) -> None:
    name = sets["f16"].name
    told = client.raw(name, 1, [0, 600, 5, 700, 600]).problem
    assert (told["status"], told["title"]) == (409, "labels missing")
    assert told["missing"] == {"seeds": [1], "ids": [600, 700], "rows": 3}
    wanted = {"set": name, "seed": [0, 1, 2, SEEDS, 2**31 - 1], "ids": [600, 5, 7, 8, 8]}
    told = client.ask(wanted).problem
    assert told["missing"] == {"seeds": [2, SEEDS, 2**31 - 1], "ids": [7, 8], "rows": 3}
    assert "seeds 0 to 2" in told["detail"]


def test_named_are_not_too_many(
    sets: dict[str, LabelSet], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "NAMED", 3)
    told = client.raw(sets["f16"].name, 2, list(range(50))).problem
    assert told["missing"] == {"seeds": [2], "ids": [0, 1, 2], "rows": 50}


def test_a_damaged_shard_is_an_error_and_others_are_served(tmp_path: Path) -> None:
    label_set = make_labels(tmp_path / "cache")
    client = Client(tmp_path / "run", tmp_path / "cache")
    path = label_set.shard_path("labels", label_set.shard(0, 1))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    told = client.raw(label_set.name, 0, [0, 600]).problem
    assert (told["status"], told["title"]) == (500, "label set damaged")
    assert "sskt verify" in told["detail"]
    same(client.raw(label_set.name, 0, [0]).arrays, stored_block(label_set, [0]))
    assert batch._answers.held == 0


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize(
    "what", ["labels of another seed", "all of another seed", "record", "no record", "rows"]
)
def test_labels_in_the_place_of_others_are_never_sent(tmp_path: Path, what: str, hot: bool) -> None:
    label_set = make_labels(tmp_path / "cache")
    client = Client(tmp_path / "run", tmp_path / "cache")
    if hot:
        assert client.raw(label_set.name, 0, [0, 600]).status == 200
    mine, other = (label_set.shard(seed, 0) for seed in (0, 1))
    keys = list(zip(label_set.shard_keys(mine), label_set.shard_keys(other), strict=True))
    record = label_set.path / label_set.record_key(mine)
    if what == "labels of another seed":
        keys = keys[1:2]
    elif what == "record":
        keys = keys[-1:]
    elif what == "no record":
        record.unlink()
    elif what == "rows":  # with a record of their own
        record.unlink()
        writer = writer_of(label_set)
        rows, checks = label_set.read(1, 0, ROWS), label_set.read_checks(1, 0, ROWS)
        rows["labels"][7] += 3
        writer.write(mine, rows, checks)
    if what not in ("no record", "rows"):
        for key, theirs in keys:
            (label_set.path / key).write_bytes((label_set.path / theirs).read_bytes())
    told = client.raw(label_set.name, 0, [0, 600]).problem
    if what == "no record":
        assert (told["status"], told["missing"]["ids"]) == (409, [0])
    else:
        assert (told["status"], told["title"]) == (500, "label set damaged")
        assert "sskt verify" in told["detail"]
    assert client.raw(label_set.name, 0, [600]).status == 200
    assert client.raw(label_set.name, 1, [0]).status == 200
    assert batch._answers.held == 0


def stored_block(label_set: LabelSet, ids: list[int]) -> Encoded:
    """Rows of the first block of seed 0."""
    every = {"view_check": label_set.read_checks(0, 0, ROWS)} | label_set.read(0, 0, ROWS)
    return {name: array[ids] for name, array in every.items()}


def test_answers_in_memory_are_bounded(
    sets: dict[str, LabelSet], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_answers", budget := Budget(3 * ROW))
    name = sets["f32"].name
    assert client.raw(name, 0, [0] * 50).status == 200, "one alone may be any size"
    assert budget.held == 0
    assert budget.take(2 * ROW)
    assert client.raw(name, 0, [0]).status == 200
    answer = client.raw(name, 0, [0, 1])
    assert (answer.problem["status"], answer.headers["retry-after"]) == (503, "1")
    for wrong in (client.raw(sets["f16"].name, 2, [0]), client.raw(name, 0, [0, 1])):
        assert wrong.status in (409, 503)
    assert budget.held == 2 * ROW


# --- computed on demand -----------------------------------------------------------------------


class OnDemand:
    """A server that computes, with one token for each scope."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.label_set = make_labels(folder / "cache", without=[(0, 0), (0, 2)])
        tokens = folder / "tokens.json"
        self.tokens = {
            scope: f"Bearer {new_token(tokens, scope, scopes, None)}"
            for scope, scopes in (("read", ["read"]), ("compute", ["read", "compute"]))
        }
        self.client = Client(
            folder / "run", folder / "cache", on_demand=True, token_file=str(tokens), **more
        )

    def ask(self, scope: str, ids: list[int], seed: int = 0) -> Coroutine[Any, Any, Answer]:
        body, query = np.array(ids, "<i8").tobytes(), f"set={self.label_set.name}&seed={seed}"
        headers = {"content_type": RAW, "authorization": self.tokens[scope]}
        return self.client.posting(body, query, **headers)

    async def asked_for(self, count: int) -> list[tuple[int, int]]:
        """Waits for so many shards in the queue."""
        while len(entries := self.client.state.on_demand.state()) < count:
            await asyncio.sleep(0.01)
        return sorted((entry.seed, entry.block) for entry in entries)

    def store(self, seed: int, block: int) -> None:
        writer = writer_of(self.label_set)
        write_shard(writer, writer.shard(seed, block))


def test_missing_shards_are_waited_for(tmp_path: Path) -> None:
    server = OnDemand(tmp_path)

    async def run() -> Answer:
        answer = asyncio.create_task(server.ask("compute", [0, 600, 1299]))
        for shard in await server.asked_for(2):
            assert not answer.done()
            server.store(*shard)
        return await answer

    answer = asyncio.run(asyncio.wait_for(run(), 30))
    same(answer.arrays, stored(server.label_set, 0, [0, 600, 1299]))


def test_a_shard_stored_at_the_last_moment_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, missing = OnDemand(tmp_path), batch._missing

    def overtaken(*arguments: Any) -> Any:
        server.store(0, 0)
        return missing(*arguments)

    monkeypatch.setattr(batch, "_missing", overtaken)
    answer = asyncio.run(server.ask("read", [0, 600]))
    assert answer.arrays["labels"].shape == (2, CLASSES)


def test_who_may_not_compute_is_told_what_is_missing(tmp_path: Path) -> None:
    server = OnDemand(tmp_path, wait_seconds=0.0)
    told = asyncio.run(server.ask("read", [0, 600, 1299])).problem
    assert (told["status"], told["missing"]["ids"]) == (409, [0, 1299])
    assert server.client.state.on_demand.state() == []
    told = asyncio.run(server.ask("compute", [0], seed=SEEDS)).problem
    assert (told["status"], told["missing"]["seeds"]) == (409, [SEEDS])
    assert server.client.state.on_demand.state() == [], "a batch makes no set grow"
    answer = asyncio.run(server.ask("compute", [0, 600, 1299]))
    assert answer.problem["status"] == 503
    assert int(answer.headers["retry-after"]) > 0
    server.client.post(b"", content_type=RAW)
    without = server.client.raw(server.label_set.name, 0, [600])
    assert without.problem["status"] == 401
    assert batch._answers.held == 0


# --- OpenAPI ----------------------------------------------------------------------------------


def test_it_is_described(client: Client) -> None:
    described = client.app.app.openapi()["paths"]["/v1/labels:batch"]["post"]
    body = described["requestBody"]["content"]
    assert set(body) == {JSON, RAW}
    for example in body[JSON]["examples"].values():
        batch.BatchRequest.model_validate(example["value"])
    for status in (401, 404, 406, 409, 413, 415, 422, 429, 503, 507):
        assert list(described["responses"][str(status)]["content"]) == ["application/problem+json"]
    assert set(described["responses"]["200"]["content"]) == set(OFFERED)
    assert [p["name"] for p in described["parameters"]] == ["set", "seed"]
