"""``/metrics``: everything that the server counts, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sskt.server.http.openapi import problems
from sskt.server.state import state_of

router = APIRouter(tags=["server"])


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="For Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "Text exposition 0.0.4.",
            "content": {"text/plain": {"example": 'sskt_info{version="0.1.0"} 1.0'}},
        },
        **problems(),
    },
)
def metrics(request: Request) -> Response:
    """Everything the server counts, of all its processes."""
    text = state_of(request).metrics.text()
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(text, headers={"Content-Type": kind, "Cache-Control": "no-store"})
