"""What a server counts: for Prometheus at ``/metrics``, for people on the status page.

With PROMETHEUS_MULTIPROC_DIR set before Python starts, the numbers are those of all processes,
dead ones included; otherwise of this one.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    multiprocess,
    values,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sskt.server.run_folder import database, make_private
from sskt.teacher_cache.errors import InputError, SsktError

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
BOUNDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Upper bounds of the latency buckets, seconds."""

COMPUTE_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})
MOST = 1000
"""Label values kept of one kind; all further ones are counted as ``other``."""
ERRORS_KEPT = 1000
DETAIL = 500
"""Characters of an error's message that are kept."""
_ERRORS = "create table if not exists errors (time real, kind text, detail text, request_id text)"

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """One worker's counters. ``run``: the server's run folder. Safe from any thread.

    Raises ``InputError`` if the variable was set after prometheus_client was imported.
    """

    def __init__(self, run: Path, registry: CollectorRegistry | None = None) -> None:
        self._folder = os.environ.get(DIRECTORY)
        if self._folder and not getattr(values.ValueClass, "_multiprocess", False):
            raise InputError(
                f"{DIRECTORY} was set after prometheus_client was imported; set it in the "
                "environment that the process starts with"
            )
        self._registry = registry or CollectorRegistry()
        self._errors_kept = run / "errors.sqlite3"
        self._children: dict[tuple[str, str, int], tuple[Any, Any, Any]] = {}
        self._sets: dict[str, Any] = {}
        self._kinds: dict[str, Any] = {}
        self._tokens: dict[str, Any] = {}
        self._define(self._registry)

    def _define(self, on: CollectorRegistry) -> None:
        self._requests = Counter(
            "sskt_requests", "Answers sent.", ["route", "method", "status"], registry=on
        )
        self._seconds = Histogram(
            "sskt_request_seconds",
            "From the request to the last byte of its answer.",
            ["route"],
            registry=on,
            buckets=BOUNDS,
        )
        self._sent = Counter("sskt_sent_bytes", "Bytes of answers' bodies.", ["route"], registry=on)
        self._labels = Counter("sskt_labels", "Labels sent.", ["set"], registry=on)
        self._hits = Counter(
            "sskt_decoded_hits", "Batches whose labels were decoded already.", registry=on
        )
        self._misses = Counter(
            "sskt_decoded_misses", "Batches that had to decode labels.", registry=on
        )
        computed = Counter("sskt_computed_shards", "Shards computed.", ["result"], registry=on)
        self._computed = {ok: computed.labels("ok" if ok else "failed") for ok in (True, False)}
        self._compute_seconds = Histogram(
            "sskt_compute_seconds",
            "Computing one shard.",
            registry=on,
            buckets=COMPUTE_BOUNDS,
        )
        self._waiting = Gauge(
            "sskt_compute_waiting",
            "Shards waiting to be computed.",
            registry=on,
            multiprocess_mode="livemostrecent",
        )
        self._serving = Gauge(
            "sskt_requests_serving",
            "Requests being answered.",
            registry=on,
            multiprocess_mode="livesum",
        )
        self._token_used = Gauge(
            "sskt_token_last_used_timestamp_seconds",
            "When a token was last used.",
            ["token"],
            registry=on,
            multiprocess_mode="max",
        )
        self._errors = Counter("sskt_errors", "Errors.", ["kind"], registry=on)
        info = Gauge(
            "sskt_info",
            "What is running.",
            ["version"],
            registry=on,
            multiprocess_mode="livemax",
        )
        info.labels(version("sskt")).set(1)

    def request(self, route: str, method: str, status: int, seconds: float, sent: int) -> None:
        """Counts an answer. route: the route's template; sent: bytes of the body."""
        try:
            requests, latency, size = self._children[route, method, status]
        except KeyError:
            requests, latency, size = self._child(route, method, status)
        requests.inc()
        latency.observe(seconds)
        size.inc(sent)

    def _child(self, route: str, method: str, status: int) -> tuple[Any, Any, Any]:
        """Neither a made-up method nor a raw path may fill the memory."""
        if method not in METHODS:
            return self._known(route, "other", status)
        return self._known(route, method, status)

    def _known(self, route: str, method: str, status: int) -> tuple[Any, Any, Any]:
        if len(self._children) >= MOST:
            route = "other"
        key = (route, method, status)
        if key not in self._children:
            self._children[key] = (
                self._requests.labels(route, method, str(status)),
                self._seconds.labels(route),
                self._sent.labels(route),
            )
        return self._children[key]

    def serving(self, change: int) -> None:
        """A request has come (1) or is answered (-1)."""
        self._serving.inc(change)

    def labels(self, set_name: str, count: int) -> None:
        """Counts labels sent of a set."""
        _kept(self._sets, self._labels, set_name).inc(count)

    def decoded(self, hit: bool) -> None:
        """Counts a batch: its labels were decoded already, or had to be."""
        (self._hits if hit else self._misses).inc()

    def token_used(self, name: str) -> None:
        """Records the time at which a token was used."""
        _kept(self._tokens, self._token_used, name).set(time.time())

    def computed(self, seconds: float, ok: bool) -> None:
        """Counts a shard computed on demand."""
        self._computed[ok].inc()
        self._compute_seconds.observe(seconds)

    def waiting(self, count: int) -> None:
        """Sets how many shards wait to be computed."""
        self._waiting.set(count)

    def error(self, kind: str, detail: str, request_id: str) -> None:
        """Counts an error and keeps it among the recent ones, unless the disk is full.

        Args:
            kind: One of few words.
            detail: The message.
            request_id: Of the request that failed; empty if none did.
        """
        _kept(self._kinds, self._errors, kind).inc()
        shown = detail if len(detail) <= DETAIL else detail[: DETAIL - 1] + "…"
        with contextlib.suppress(sqlite3.Error, OSError, SsktError), self._open_errors(1.0) as db:
            row = (time.time(), kind, shown, request_id)
            db.execute("insert into errors values (?, ?, ?, ?)", row)
            db.execute(f"delete from errors where rowid <= last_insert_rowid() - {ERRORS_KEPT}")

    def recent_errors(self, count: int) -> list[dict[str, Any]]:
        """The last errors of all processes, newest first: time, kind, detail, request_id."""
        names = ("time", "kind", "detail", "request_id")
        with contextlib.suppress(sqlite3.Error, OSError, SsktError), self._open_errors(5.0) as db:
            rows = db.execute("select * from errors order by rowid desc limit ?", [count])
            return [dict(zip(names, row, strict=True)) for row in rows]
        return []

    def _open_errors(self, timeout: float) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return database(self._errors_kept, _ERRORS, timeout=timeout)

    def text(self, more: Iterable[Metric] = ()) -> bytes:
        """The exposition, format 0.0.4.

        Args:
            more: Further metrics, of the whole server.
        """
        together = CollectorRegistry(auto_describe=False)
        families = [*self._collected().collect(), *process_metrics(self._processes()), *more]
        together.register(_Collected(families))
        return generate_latest(together)

    def _processes(self) -> set[int]:
        """The numbers of the server's processes that count."""
        pids = {os.getpid()}
        if self._folder:
            pids |= {pid_of(path) for path in Path(self._folder).glob("gauge_live*.db")}
        return pids

    def _collected(self) -> CollectorRegistry:
        """A registry of all processes' numbers."""
        if not self._folder:
            return self._registry
        make_private(Path(self._folder))  # a cleaner of temporary folders may have removed it
        forget_dead(Path(self._folder))
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together, self._folder)  # type: ignore[no-untyped-call]
        return together

    def totals(self) -> dict[str, Any]:
        """All workers' numbers since the server's start.

        requests, sent_bytes, labels, hits, misses, computed, compute_failed, waiting, serving,
        errors (by kind), tokens (when each was last used, in seconds since 1970), routes (by
        template: requests, sent_bytes, buckets as in ``BOUNDS`` and one more), labels_by_set.
        """
        totals: dict[str, Any] = {
            "labels_by_set": {},
            "errors": {},
            "tokens": {},
            "routes": {},
        } | dict.fromkeys(_PLAIN.values(), 0)
        for metric in self._collected().collect():
            for sample in metric.samples:
                _add(totals, sample.name, sample.labels, sample.value)
        routes = totals["routes"].values()
        for route in routes:
            # The exposition accumulates the buckets.
            rising = [count for _, count in sorted(route.pop("le").items())]
            route["buckets"] = tuple(
                int(b - a) for a, b in zip([0, *rising], rising, strict=False)
            ) or (0,) * (len(BOUNDS) + 1)
        totals["requests"] = sum(route["requests"] for route in routes)
        totals["sent_bytes"] = sum(route["sent_bytes"] for route in routes)
        totals["labels"] = sum(totals["labels_by_set"].values())
        return totals


_PLAIN = {
    "sskt_decoded_hits_total": "hits",
    "sskt_decoded_misses_total": "misses",
    "sskt_compute_waiting": "waiting",
    "sskt_requests_serving": "serving",
    "computed ok": "computed",
    "computed failed": "compute_failed",
}


def _add(totals: dict[str, Any], name: str, labels: dict[str, str], value: float) -> None:
    if name == "sskt_computed_shards_total":
        name = f"computed {labels['result']}"
    if name in _PLAIN:
        totals[_PLAIN[name]] += int(value)
    elif name == "sskt_errors_total":
        totals["errors"][labels["kind"]] = int(value)
    elif name == "sskt_token_last_used_timestamp_seconds":
        totals["tokens"][labels["token"]] = value
    elif name == "sskt_labels_total":
        totals["labels_by_set"][labels["set"]] = int(value)
    elif "route" in labels:
        empty = {"requests": 0, "sent_bytes": 0, "le": {}}
        route = totals["routes"].setdefault(labels["route"], empty)
        if name == "sskt_requests_total":
            route["requests"] += int(value)
        elif name == "sskt_sent_bytes_total":
            route["sent_bytes"] += int(value)
        elif name == "sskt_request_seconds_bucket":
            route["le"][float(labels["le"])] = value


def _kept(children: dict[str, Any], metric: Counter | Gauge, value: str) -> Any:
    """The child of a label's value."""
    child = children.get(value)
    if child is None:
        value = value if len(children) < MOST else "other"
        child = children[value] = metric.labels(value)
    return child


def forget_dead(folder: Path) -> None:
    """Removes the gauges of processes that are gone: a killed worker serves no requests.

    Their counters stay, as what they counted has happened.
    """
    for path in folder.glob("gauge_live*.db"):
        try:
            os.kill(pid_of(path), 0)
        except ProcessLookupError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        except PermissionError:
            pass


def pid_of(path: Path) -> int:
    """The process that writes a file of prometheus_client."""
    return int(path.stem.rpartition("_")[2])


class _Collected(Collector):
    """Metrics that were collected before."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


def process_metrics(pids: Iterable[int]) -> list[Metric]:
    """The standard ``process_*`` metrics, of several processes together.

    Memory, CPU time and open files are added up; the start time and the limit of open files are
    the lowest ones. A worker that is replaced takes its CPU time with it, which Prometheus takes
    for a restart of the counter.

    Args:
        pids: The processes; those that are gone are left out.

    Returns:
        The metrics; none on systems without ``/proc``.
    """
    found: dict[str, Metric] = {}
    for pid in pids:
        for metric in ProcessCollector(pid=functools.partial(int, pid), registry=None).collect():
            if metric.name not in found:
                found[metric.name] = metric
                continue
            lowest = metric.name in ("process_start_time_seconds", "process_max_fds")
            together = min if lowest else operator.add
            mine = found[metric.name].samples
            mine[:] = [
                a._replace(value=together(a.value, b.value))
                for a, b in zip(mine, metric.samples, strict=True)
            ]
    return list(found.values())


def quantile(buckets: Sequence[int], q: float) -> float | None:
    """A quantile (seconds) of latencies counted in ``BOUNDS``; None of nothing.

    As Prometheus does it: linear within a bucket, the last bound for what lies beyond it.
    """
    count = sum(buckets)
    if not count:
        return None
    rank, before, low = q * count, 0, 0.0
    for bound, inside in zip(BOUNDS, buckets, strict=False):
        if inside and before + inside >= rank:
            return low + (bound - low) * (rank - before) / inside
        before, low = before + inside, bound
    return BOUNDS[-1]
