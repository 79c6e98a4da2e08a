"""What a server counts: over processes, over time, and within bounds."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sskt.server.metrics.metrics import (
    BOUNDS,
    DETAIL,
    DIRECTORY,
    ERRORS_KEPT,
    Metrics,
    quantile,
)
from sskt.teacher_cache.errors import InputError

ANY_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The exposition as another program reads it."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_exposition_has_the_names_that_dashboards_use(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.request("/zarr/{path}", "GET", 206, 0.004, 1000)
    metrics.request("/zarr/{path}", "GET", 206, 0.2, 500)
    metrics.labels("a-set", 512)
    metrics.decoded(True)
    metrics.decoded(False)
    metrics.computed(3.0, True)
    metrics.computed(1.0, False)
    metrics.waiting(7)
    metrics.serving(2)
    metrics.serving(-1)
    metrics.error("overloaded", "too many", "id1")
    found = samples(metrics.text())
    route = ("route", "/zarr/{path}")
    expected: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
        ("sskt_requests_total", (("method", "GET"), route, ("status", "206"))): 2,
        ("sskt_request_seconds_bucket", (("le", "0.0025"), route)): 0,
        ("sskt_request_seconds_bucket", (("le", "0.005"), route)): 1,
        ("sskt_request_seconds_bucket", (("le", "+Inf"), route)): 2,
        ("sskt_request_seconds_sum", (route,)): 0.204,
        ("sskt_sent_bytes_total", (route,)): 1500,
        ("sskt_labels_total", (("set", "a-set"),)): 512,
        ("sskt_decoded_hits_total", ()): 1,
        ("sskt_decoded_misses_total", ()): 1,
        ("sskt_computed_shards_total", (("result", "ok"),)): 1,
        ("sskt_computed_shards_total", (("result", "failed"),)): 1,
        ("sskt_compute_seconds_sum", ()): 4,
        ("sskt_compute_waiting", ()): 7,
        ("sskt_requests_serving", ()): 1,
        ("sskt_errors_total", (("kind", "overloaded"),)): 1,
    }
    assert {key: found.get(key) for key in expected} == pytest.approx(expected)
    assert any(name == "sskt_info" for name, _ in found)
    assert not any(name.endswith("_created") for name, _ in found)


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["/zarr", "/v1/labels:batch"]),
        st.floats(0, 100),
        st.integers(0, 10**12),
    ),
    max_size=30,
)


@given(REQUESTS)
@ANY_FOLDER
def test_totals_are_the_sums_of_what_was_counted(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[str, float, int]]
) -> None:
    metrics = Metrics(tmp_path_factory.mktemp("run"))
    for route, seconds, sent in requests:
        metrics.request(route, "GET", 200, seconds, sent)
    totals = metrics.totals()
    assert totals["requests"] == len(requests)
    assert totals["sent_bytes"] == sum(sent for _, _, sent in requests)
    edges = [0, *BOUNDS, np.inf]
    for route, of in totals["routes"].items():
        mine = [seconds for name, seconds, _ in requests if name == route]
        expected = [sum(a < s <= b or (a == s == 0) for s in mine) for a, b in _pairs(edges)]
        assert list(of["buckets"]) == expected


def _pairs(edges: Sequence[float]) -> list[tuple[float, float]]:
    return list(pairwise(edges))


@given(st.lists(st.floats(0.0001, 29), min_size=1, max_size=200), st.sampled_from([0.5, 0.95, 1]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(latencies: list[float], q: float) -> None:
    edges = [0, *BOUNDS, np.inf]
    buckets = [sum(a < s <= b for s in latencies) for a, b in _pairs(edges)]
    found = quantile(buckets, q)
    true = sorted(latencies)[int(np.ceil(q * len(latencies))) - 1]
    low, high = next((a, b) for a, b in _pairs(edges) if a < true <= b)
    assert found is not None and low <= found <= high
    assert quantile([0] * len(buckets), q) is None


def test_a_client_cannot_fill_the_memory_with_methods_routes_or_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sskt.server.metrics.metrics.MOST", 20)
    metrics = Metrics(tmp_path)
    for i in range(200):
        metrics.request("/zarr", f"METHOD{i}", 400, 0.001, 0)
        metrics.request(f"/raw/{i}", "GET", 404, 0.001, 0)
        metrics.labels(f"set{i}", 1)
        metrics.error(f"kind{i}", "", "")
    totals = metrics.totals()
    for kind in ("routes", "labels_by_set", "errors"):
        assert len(totals[kind]) <= 21
    assert totals["requests"] == 2 * 200
    assert totals["labels"] == sum(totals["errors"].values()) == 200
    found = samples(metrics.text())
    assert {dict(labels).get("method", "GET") for _, labels in found} == {"GET", "other"}


WORKER = """
import json, os, sys
from pathlib import Path
from sskt.server.metrics.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]))
metrics.request("/zarr", "GET", 200, 0.003, 100)
metrics.labels("a", 7)
metrics.serving(1)
metrics.waiting(int(sys.argv[2]))
metrics.token_used("lab")
print(os.getpid(), flush=True)
sys.stdin.readline()
if sys.argv[2] == "3":
    print(json.dumps(metrics.totals()))
"""


def test_numbers_are_those_of_all_processes_and_gauges_of_the_living(tmp_path: Path) -> None:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    environment = os.environ | {DIRECTORY: str(folder)}
    workers = []
    for number in ("1", "2", "3"):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), number],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert worker.stdout is not None
        assert int(worker.stdout.readline()) == worker.pid
        workers.append(worker)
    workers[0].send_signal(signal.SIGKILL)
    workers[0].communicate()
    out, _ = workers[2].communicate("\n")
    workers[1].communicate("\n")
    found: dict[str, Any] = json.loads(out)
    assert (found["requests"], found["labels"], found["sent_bytes"]) == (3, 21, 300)
    assert found["serving"] == 2, "the killed worker serves nothing"
    assert set(found["tokens"]) == {"lab"} and abs(found["tokens"]["lab"] - time.time()) < 300
    assert found["waiting"] == 3, "the last one who said so"
    assert found["routes"]["/zarr"]["buckets"][BOUNDS.index(0.005)] == 3


def test_a_variable_set_too_late_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    with pytest.raises(InputError, match="was set after prometheus_client was imported"):
        Metrics(tmp_path)


def test_recent_errors_are_the_newest_first_and_bounded(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for i in range(ERRORS_KEPT + 5):
        metrics.error("kind", f"error {i}", f"id{i}")
    assert [e["detail"] for e in metrics.recent_errors(3)] == [
        f"error {ERRORS_KEPT + i}" for i in (4, 3, 2)
    ]
    assert len(metrics.recent_errors(2 * ERRORS_KEPT)) == ERRORS_KEPT
    metrics.error("kind", "x" * 10_000, "")
    assert len(metrics.recent_errors(1)[0]["detail"]) == DETAIL


@pytest.mark.parametrize("fault", ["a folder", "no database", "gone"])
def test_an_error_that_cannot_be_recorded_is_still_counted(tmp_path: Path, fault: str) -> None:
    run = tmp_path / "run"
    metrics = Metrics(run)
    metrics.error("kind", "first", "id")
    file = run / "errors.sqlite3"
    if fault == "gone":  # as a cleaner of temporary folders leaves it
        shutil.rmtree(run)
    else:
        file.unlink()
        file.mkdir() if fault == "a folder" else file.write_bytes(b"x" * 5000)
    metrics.error("kind", "second", "id")
    assert metrics.totals()["errors"] == {"kind": 2}
    assert len(metrics.recent_errors(5)) == (fault == "gone")


def _add_many(run: Path, name: str) -> None:
    metrics = Metrics(run)
    for i in range(50):
        metrics.error(name, str(i), "id")


def test_processes_and_threads_record_errors_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_add_many, args=(tmp_path, "process"))
    process.start()
    names = [f"thread{i}" for i in range(2)]
    threads = [threading.Thread(target=_add_many, args=(tmp_path, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.join()
    recent = Metrics(tmp_path).recent_errors(1000)[::-1]
    for name in (*names, "process"):
        numbers = [int(error["detail"]) for error in recent if error["kind"] == name]
        assert numbers == list(range(50))
