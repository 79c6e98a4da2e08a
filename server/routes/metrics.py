"""``/metrics``: everything that the server counts, for Prometheus."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fastapi import APIRouter, Request
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from starlette.responses import Response

from sskt.server.http.openapi import problems
from sskt.server.http.problems import Problem
from sskt.server.metrics.metrics import MOST
from sskt.server.pages.coverage import Coverage, CoverageCache
from sskt.server.state import State, state_of
from sskt.teacher_cache.storage.local import LocalStorage

router = APIRouter(tags=["server"])


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="For Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "Text exposition 0.0.4.",
            "content": {"text/plain": {"example": 'sskt_info{version="0.2.0"} 1.0'}},
        },
        **problems(),
    },
)
def metrics(request: Request) -> Response:
    """Everything the server counts, of all its processes; what the cache holds; its clients."""
    state = state_of(request)
    more = [*client_metrics(state), *cache_metrics(state, request.app.state.coverages)]
    text = state.metrics.text(more)
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(text, headers={"Content-Type": kind, "Cache-Control": "no-store"})


def client_metrics(state: State) -> list[Metric]:
    """What each client of the last hour was sent, and when it last asked."""
    names = ["token", "address"]
    sent = GaugeMetricFamily(
        "sskt_client_sent_bytes_last_hour", "Bytes sent to a client in the last hour.", labels=names
    )
    seen = GaugeMetricFamily(
        "sskt_client_last_seen_timestamp_seconds", "When a client last asked.", labels=names
    )
    for client in state.clients.recent():
        sent.add_metric([client.token, client.address], client.bytes)
        seen.add_metric([client.token, client.address], client.seen)
    return [sent, seen]


def cache_metrics(state: State, coverages: CoverageCache) -> Iterator[Metric]:
    """The label sets, how far they are stored, and the free disk; nothing of an unreachable cache.

    Args:
        state: Of the server.
        coverages: The coverages of this process; one that is being read for the first time is
            left out.

    Yields:
        The metrics.
    """
    with contextlib.suppress(OSError):
        if isinstance(state.home, LocalStorage):
            about = os.statvfs(state.home.path)
            yield GaugeMetricFamily(
                "sskt_cache_free_bytes",
                "Bytes free on the disk of the cache.",
                value=about.f_bavail * about.f_frsize,
            )
    try:
        sets = state.sets.all()
    except Problem:
        return
    damaged = len(state.sets.damaged)
    yield GaugeMetricFamily("sskt_label_sets", "Label sets that can be read.", value=len(sets))
    yield GaugeMetricFamily("sskt_label_sets_damaged", "Damaged label sets.", value=damaged)
    share = GaugeMetricFamily(
        "sskt_label_set_coverage_ratio", "Stored part of a label set, 0 to 1.", labels=["set"]
    )
    size = GaugeMetricFamily("sskt_label_set_bytes", "Size of a label set.", labels=["set"])
    for label_set, found in zip(sets[:MOST], coverages.of(sets[:MOST]), strict=True):
        if isinstance(found, Coverage):
            share.add_metric([label_set.name], found.share)
            size.add_metric([label_set.name], found.bytes)
    yield share
    yield size
