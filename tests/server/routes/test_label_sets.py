"""What the server says about its label sets is what the command line says of the folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from support.servers import serving

from sskt.server.state import FRESH_SECONDS
from sskt.teacher_cache.label_sets.create import list_label_sets, look_over
from sskt.teacher_cache.label_sets.label_set import LabelSet


@pytest.fixture
def cache(label_cache: Path, tmp_path: Path) -> Path:
    """A set that lacks a block of seed 1, and a damaged one."""
    folder = tmp_path / "cache"
    shutil.copytree(label_cache, folder)
    (label_set,) = list_label_sets(folder)
    for key in label_set.shard_keys(label_set.shard(1, 2)):
        (label_set.path / key).unlink()
    (folder / "broken").mkdir()
    (folder / "broken" / "zarr.json").write_text("{}")
    (folder / "broken" / "view_check").mkdir()
    (folder / "broken" / "view_check" / "zarr.json").write_text("{}")
    return folder


@pytest.fixture
def url(cache: Path) -> Iterator[str]:
    with serving(cache) as address:
        yield address


@pytest.fixture
def only(cache: Path) -> LabelSet:
    return next(s for s in list_sets(cache) if s.name != "broken")


def list_sets(cache: Path) -> list[LabelSet]:
    return list(look_over(cache)[0])


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.loads(answer.read())


def refused(url: str) -> tuple[int, Any, Any]:
    """Status, headers and problem of an answer that is none."""
    with pytest.raises(HTTPError) as found, contextlib.closing(urllib.request.urlopen(url)):
        raise AssertionError(url)
    with found.value as error:
        return error.code, error.headers, json.loads(error.read())


def test_the_list_is_that_of_ls(
    cache: Path, url: str, sskt: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, _ = sskt("ls", "--cache", cache, "--json")
    assert status == 1  # one is damaged
    healthy = [s for s in json.loads(out) if "damaged" not in s]
    told = ask(f"{url}/v1/label-sets")
    assert list(told["damaged"]) == ["broken"]
    assert [s | {"on_demand": False} for s in healthy] == told["label_sets"]


def test_one_set_by_name_and_by_digest(cache: Path, url: str, only: LabelSet) -> None:
    for name in (only.name, only.digest, only.digest[:6]):
        told = ask(f"{url}/v1/label-sets/{name}")
        assert told["spec"] == only.spec and told["digest"] == only.digest
        assert told["arrays"]["labels"]["shape"] == [3, 60, 12]
        assert told["arrays"]["labels"]["path"] == f"/zarr/{only.name}/labels"
        assert ask(f"{url}/v1/label-sets/{name}/spec")["spec"] == only.spec
    for name, status in (("nothing", 404), (only.digest[:5], 404), ("broken", 500)):
        code, _, problem = refused(f"{url}/v1/label-sets/{name}")
        assert code == status and problem["request_id"]


def test_coverage_names_the_blocks(url: str, only: LabelSet) -> None:
    told = ask(f"{url}/v1/label-sets/{only.name}/coverage")
    assert told["stored"] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert (told["seeds"], told["blocks"], told["rows"], told["samples"]) == (3, 4, 16, 60)


def test_files_are_those_on_the_disk(url: str, only: LabelSet) -> None:
    (only.path / "view_check" / "c" / "x.0f.partial").write_bytes(b"half")
    found = {
        p.relative_to(only.path).as_posix(): p.stat().st_size
        for p in only.path.rglob("*")
        if p.is_file() and not p.name.endswith(".partial")
    }
    assert ask(f"{url}/v1/label-sets/{only.name}/files")["files"] == found
    under = ask(f"{url}/v1/label-sets/{only.name}/files?under=view_check")["files"]
    assert under == {k: n for k, n in found.items() if k.startswith("view_check/")}
    for bad in ("../broken", ".", "view_check/..", "%2e%2e"):
        assert refused(f"{url}/v1/label-sets/{only.name}/files?under={bad}")[0] == 422


def test_new_and_removed_sets_are_seen(cache: Path, url: str, only: LabelSet) -> None:
    other = cache / "moved"
    only.path.rename(other)
    try:
        time.sleep(FRESH_SECONDS)
        assert [s["name"] for s in ask(f"{url}/v1/label-sets")["label_sets"]] == ["moved"]
    finally:
        other.rename(only.path)
        time.sleep(FRESH_SECONDS)
    assert [s["name"] for s in ask(f"{url}/v1/label-sets")["label_sets"]] == [only.name]


def test_readiness_is_the_cache(cache: Path, url: str) -> None:
    assert ask(f"{url}/readyz") == {"status": "ready", "label_sets": 1}
    away = cache.with_name("away")
    cache.rename(away)
    try:
        time.sleep(FRESH_SECONDS)
        code, headers, _ = refused(f"{url}/readyz")
        assert code == 503 and headers["Retry-After"]
        assert ask(f"{url}/healthz") == {"status": "ok"}
    finally:
        away.rename(cache)
