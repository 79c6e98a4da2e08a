"""A label server over a cache in a bucket: a real S3 server on loopback, and its failures."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.batches import read_batch
from support.object_stores import NEEDED, Server, objects, raw
from support.random_labels import ROWS, SAMPLES, SEEDS, make_labels
from support.servers import serving

from sskt.server import rows as server_rows
from sskt.server import state
from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.object_store import BucketStorage
from sskt.teacher_cache.storage.open import open_cache

for needed in NEEDED:
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def bucket() -> Iterator[LabelSet]:
    """A label set in a bucket, without block 1 of seed 1."""
    with pytest.MonkeyPatch.context() as patch:
        server = Server()
        server.use(patch)
        server.new_bucket("bucket")
        yield make_labels(open_cache("s3://bucket/lab/labels"), without=[(1, 1)])
        server.stop()


@pytest.fixture
def url(bucket: LabelSet, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that looks at the bucket each time."""
    monkeypatch.setattr(state, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(state, "REST", 0)
    monkeypatch.setattr(server_rows, "LISTED_SECONDS", 0.0)
    with serving("s3://bucket/lab/labels") as address:
        yield address


def get(
    url: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, data


def batch(url: str, name: str, seed: int, ids: list[int]) -> tuple[int, dict[str, str], bytes]:
    body = json.dumps({"set": name, "seed": seed, "ids": ids}).encode()
    return get(url, "/v1/labels:batch", "POST", body, Content_Type="application/json")


def test_all_that_is_stored(bucket: LabelSet, url: str) -> None:
    stored = objects("s3://bucket/lab/labels")
    assert len(stored) == 3 + 3 * (3 * SEEDS - 1) + 6  # documents, shards, coordinates
    for key, data in stored.items():
        status, headers, body = get(url, f"/zarr/{key}")
        assert (status, body) == (200, data), key
        status, looked, body = get(url, f"/zarr/{key}", "HEAD")
        assert (status, body, looked["etag"]) == (200, b"", headers["etag"])
        assert looked["content-length"] == str(len(data))
    again = get(url, f"/zarr/{key}", If_None_Match=headers["etag"])
    assert again[::2] == (304, b"") and again[1]["etag"] == headers["etag"]
    for wanted, part in (("5-9", data[5:10]), ("-4", data[-4:]), ("7-", data[7:])):
        assert get(url, f"/zarr/{key}", Range=f"bytes={wanted}")[::2] == (206, part)
    assert get(url, f"/zarr/{key}", Range=f"bytes={len(data)}-")[0] == 416
    for absent in (f"{bucket.name}/labels/c/1/1/0", f"{bucket.name}/labels", "none/zarr.json"):
        assert get(url, f"/zarr/{absent}")[0] == 404

    about = f"/v1/label-sets/{bucket.name}"
    assert json.loads(get(url, f"{about}/coverage")[2])["stored"] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    sizes = {key.partition("/")[2]: len(data) for key, data in stored.items()}
    assert json.loads(get(url, f"{about}/files")[2])["files"] == sizes
    (listed,) = json.loads(get(url, "/v1/label-sets")[2])["label_sets"]
    assert (listed["name"], listed["bytes"]) == (bucket.name, sum(sizes.values()))
    for path in ("/readyz", "/", f"/sets/{bucket.name}", f"/sets/{bucket.name}/samples/0?seed=1"):
        assert get(url, path)[0] == 200, path


def test_batches(bucket: LabelSet, url: str) -> None:
    ids = [SAMPLES - 1, 3, ROWS, 3]
    status, headers, body = batch(url, bucket.name, 2, ids)
    assert status == 200, body
    rows = read_batch(headers, body)
    assert (rows["labels"] == bucket.read(2, 0, SAMPLES)["labels"][ids]).all()
    assert (rows["view_check"] == bucket.read_checks(2, 0, SAMPLES)[ids]).all()
    status, _, body = batch(url, bucket.name, 1, [0, ROWS])
    missing = json.loads(body)["missing"]
    assert (status, missing) == (409, {"seeds": [1], "ids": [ROWS], "rows": 1})


def test_a_shard_that_is_removed_is_missing_and_no_damage(bucket: LabelSet, url: str) -> None:
    import obstore

    assert batch(url, bucket.name, 0, [0])[0] == 200
    place = bucket.storage
    keys = bucket.shard_keys(bucket.shard(0, 0))
    kept = {key: place.read(key) for key in keys}
    store = raw("s3://bucket/lab/labels")
    obstore.delete(store, [f"{bucket.name}/{key}" for key in keys])
    try:
        status, _, body = batch(url, bucket.name, 0, [0])
        assert (status, json.loads(body).get("missing", {}).get("ids")) == (409, [0]), body
    finally:
        for key, data in kept.items():
            obstore.put(store, f"{bucket.name}/{key}", data)
    assert batch(url, bucket.name, 0, [0])[0] == 200


def test_metadata_that_grows_meanwhile_is_never_cut_short(
    bucket: LabelSet, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    store, key = raw("s3://bucket/lab/labels"), f"{bucket.name}/view_check/zarr.json"
    before = bytes(obstore.get(store, key).bytes())
    head = BucketStorage.entity

    def grown(place: BucketStorage, asked: str) -> Any:
        found = head(place, asked)
        obstore.put(store, key, before + b" " * 9)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(BucketStorage, "entity", grown)
        status, headers, _ = get(url, f"/zarr/{key}")
        assert status == 503 and headers["retry-after"]
    assert get(url, f"/zarr/{key}")[2] == before + b" " * 9
    obstore.put(store, key, before)


@pytest.mark.parametrize("broken", ["folders", "read", "entity", "_list", "_head"])
def test_a_bucket_out_of_reach_is_nobodys_fault(
    bucket: LabelSet, url: str, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Whoever asks again is served: a training waits, where 422 or 500 would end it."""

    def unreachable(*_: object, **__: object) -> None:
        raise InputError("cannot reach the bucket")

    monkeypatch.setattr(BucketStorage, broken, unreachable)
    shard = f"/zarr/{bucket.name}/{bucket.commit_key(bucket.shard(0, 0))}"
    answers = [
        get(url, shard),
        get(url, "/readyz"),
        get(url, f"/v1/label-sets/{bucket.name}/coverage"),
        get(url, f"/v1/label-sets/{bucket.name}/files"),
        batch(url, bucket.name, 0, [0, 1, 2]),
    ]
    codes = [status for status, _, _ in answers]
    assert set(codes) <= {200, 503} and 503 in codes, codes
    assert all("retry-after" in headers for status, headers, _ in answers if status == 503)
    assert get(url, "/healthz")[0] == 200


def test_a_shard_read_fails(bucket: LabelSet, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its head was seen."""
    shard = f"{bucket.name}/{bucket.commit_key(bucket.shard(0, 0))}"
    where = BucketStorage.where

    def failing(place: BucketStorage, key: str) -> str:
        if key == shard:
            raise InputError("cannot reach the bucket")
        return where(place, key)

    monkeypatch.setattr(BucketStorage, "entity", lambda *_: (5, '"5"'))
    monkeypatch.setattr(BucketStorage, "where", failing)
    status, headers, _ = get(url, f"/zarr/{shard}")
    assert status == 503 and headers["retry-after"]
