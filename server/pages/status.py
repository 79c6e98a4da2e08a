"""The status page at ``/``: what the cache holds, and what the server does."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Query, Request
from numpy.typing import NDArray
from starlette.responses import Response

from sskt.server.http.problems import Problem
from sskt.server.http.tokens import Token
from sskt.server.metrics.metrics import BOUNDS, quantile
from sskt.server.pages import api_page, pages, samples
from sskt.server.pages.coverage import CoverageCache
from sskt.server.pages.pages import answer_problem, page
from sskt.server.pages.summaries import summaries_of
from sskt.server.state import State, state_of
from sskt.teacher_cache.errors import SsktError

__all__ = ["answer_problem", "mount_static", "router"]

ERRORS = 20
"""Errors that the page shows."""
RECENT_SECONDS = 60.0
NO_BUCKETS = [0] * (len(BOUNDS) + 1)

router = APIRouter(include_in_schema=False)
router.include_router(samples.router)
router.include_router(api_page.router)


def mount_static(app: FastAPI) -> None:
    """Adds the pages' static files, and what the pages keep between requests."""
    app.state.coverages = CoverageCache()
    app.state.recent = Recent(app.state.sskt.settings.started)
    app.state.opened = samples.Opened()
    app.include_router(pages.static)


@dataclass(frozen=True)
class Route:
    """One line of the table of latencies; seconds."""

    name: str
    requests: int
    sent: int
    p50: float | None
    p95: float | None
    p99: float | None


Counts = NDArray[np.int64]
"""Requests, bytes sent, labels, cache hits and misses, then the latency buckets."""


class Recent:
    """What was counted in the last minute, or since the page was last looked at if that is longer.

    Args:
        started: When the server was started, by ``clock``.
        clock: Seconds.
    """

    def __init__(self, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._guard = clock, threading.Lock()
        self._looks: list[tuple[float, Counts | int]] = [(started, 0)]

    def since(self, now: Counts) -> tuple[float, Counts]:
        """Remembers the counts of now.

        Returns:
            The seconds since an earlier look, and what was counted in them.
        """
        moment = self._clock()
        with self._guard:
            kept = [look for look in self._looks if moment - look[0] <= RECENT_SECONDS]
            kept = kept or self._looks[-1:]
            begin, before = kept[0]
            if moment - kept[-1][0] >= 1:
                kept.append((moment, now))
            self._looks = kept
        return max(1.0, moment - begin), now - before


def figures(request: Request) -> dict[str, Any]:
    """The numbers of the page, of all processes."""
    state = state_of(request)
    totals = state.metrics.totals()
    routes = totals["routes"].values()
    plain = [totals[name] for name in ("requests", "sent_bytes", "labels", "hits", "misses")]
    buckets = np.sum([route["buckets"] for route in routes], axis=0) if routes else NO_BUCKETS
    recent: Recent = request.app.state.recent
    seconds, counts = recent.since(np.array([*plain, *buckets], np.int64))
    requests, size, labels, hits, misses, *latencies = counts.tolist()
    looked_up, all_looked_up = hits + misses, totals["hits"] + totals["misses"]
    return {
        "uptime": time.monotonic() - state.settings.started,
        "seconds": seconds,
        "labels_rate": labels / seconds,
        "bytes_rate": size / seconds,
        "requests_rate": requests / seconds,
        "p50": quantile(latencies, 0.5),
        "p95": quantile(latencies, 0.95),
        "p99": quantile(latencies, 0.99),
        "hit_rate": hits / looked_up if looked_up else None,
        "hit_rate_ever": totals["hits"] / all_looked_up if all_looked_up else None,
        "totals": totals,
        # This request is one of them.
        "serving": max(0, totals["serving"] - 1),
        "routes": [
            Route(
                name,
                of["requests"],
                of["sent_bytes"],
                *(quantile(of["buckets"], q) for q in (0.5, 0.95, 0.99)),
            )
            for name, of in sorted(totals["routes"].items())
        ],
    }


def _live(request: Request, q: str) -> dict[str, Any]:
    """Everything that changes on the page. Raises ``Problem`` 503 if the cache is out of reach."""
    state = state_of(request)
    try:
        sets = state.sets.all()
    except SsktError as error:
        raise Problem(503, "cache out of reach", str(error), {"Retry-After": "5"}) from error
    wanted = [s for s in sets if q.lower() in s.name.lower() or s.digest.startswith(q)]
    now = time.time()
    return figures(request) | {
        "now": now,
        "q": q,
        "count": len(sets),
        "summaries": summaries_of(request, wanted),
        "damaged": sorted(state.sets.damaged.items()),
        "queue": state.on_demand.state() if state.on_demand else None,
        "queue_limit": state.settings.queue,
        "errors": state.metrics.recent_errors(ERRORS),
        "tokens": _tokens(state),
        "clients": state.clients.recent(),
        "workers": state.settings.workers,
        "cache": state.home.name,
        "cache_argument": state.home.name if state.home.is_local else state.settings.cache,
    }


def _tokens(state: State) -> list[Token] | None:
    """The tokens of the file; None if there is no file, or if it cannot be read."""
    with contextlib.suppress(SsktError):
        return state.tokens.all() if state.tokens else None
    return None


Filter = Query("", max_length=200, description="Part of a name, or the start of a digest.")


@router.get("/")
def status_page(request: Request, q: str = Filter) -> Response:
    """The whole page."""
    return page(request.scope, "status.html", **_live(request, q))


@router.get("/status/live")
def live_parts(request: Request, q: str = Filter) -> Response:
    """The parts of the page that change."""
    return page(request.scope, "live.html", root="./", **_live(request, q))
