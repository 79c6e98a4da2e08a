"""The status page at ``/``: what the cache holds, and how the server is doing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Query, Request
from starlette.responses import Response

from sskt.server.http.problems import Problem
from sskt.server.metrics.metrics import quantile
from sskt.server.pages import pages, samples
from sskt.server.pages.label_set_cards import cards_of
from sskt.server.pages.pages import html_problem, page, wants_html
from sskt.server.pages.survey import Surveys
from sskt.server.state import State, state_of
from sskt.teacher_cache.errors import SsktError

__all__ = ["html_problem", "mount_static", "router", "wants_html"]

ERRORS = 20
"""Errors that the page shows."""

router = APIRouter(include_in_schema=False)
router.include_router(samples.router)


def mount_static(app: FastAPI) -> None:
    """Adds the pages' static files, and what the pages keep between requests."""
    app.state.surveys = Surveys()
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


def figures(state: State) -> dict[str, Any]:
    """The numbers of the page, of all workers."""
    totals, minute = state.metrics.totals(), state.metrics.last_minute()
    looked_up = minute.hits + minute.misses
    all_hits = totals["hits"] + totals["misses"]
    return {
        "minute": minute,
        "labels_rate": minute.labels / minute.seconds,
        "bytes_rate": minute.bytes / minute.seconds,
        "requests_rate": minute.requests / minute.seconds,
        "p50": quantile(minute.buckets, 0.5),
        "p95": quantile(minute.buckets, 0.95),
        "p99": quantile(minute.buckets, 0.99),
        "hit_rate": minute.hits / looked_up if looked_up else None,
        "hit_rate_ever": totals["hits"] / all_hits if all_hits else None,
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
    return figures(state) | {
        "now": now,
        "q": q,
        "count": len(sets),
        "cards": cards_of(request, wanted),
        "damaged": sorted(state.sets.damaged.items()),
        "queue": state.on_demand.state() if state.on_demand else None,
        "queue_limit": state.settings.queue,
        "errors": state.metrics.recent_errors(ERRORS),
        "workers": state.settings.workers,
        "cache": state.home.name,
    }


Filter = Query("", max_length=200, description="Part of a name, or the start of a digest.")


@router.get("/")
def status_page(request: Request, q: str = Filter) -> Response:
    """The whole page."""
    return page("status.html", **_live(request, q))


@router.get("/status/live")
def live_parts(request: Request, q: str = Filter) -> Response:
    """The parts of the page that change."""
    return page("live.html", **_live(request, q))
