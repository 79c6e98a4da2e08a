"""How the routes' problems look in OpenAPI."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from sskt.server.http.problems import MEDIA_TYPE

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "request_id": {"type": "string"},
    },
}
ALWAYS = (400, 401, 403, 408, 413, 422, 429, 500, 503)
"""What the middleware may answer to any request."""


_RFC_9110 = {
    413: "Content Too Large",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
"""Phrases that Python names otherwise before 3.13."""


def phrase_of(status: int) -> str:
    """The phrase of a status, as RFC 9110 has it."""
    return _RFC_9110.get(status) or HTTPStatus(status).phrase


def problems(*statuses: int, **examples: Any) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route: these and the middleware's; ``examples`` by ``e404``."""
    return {status: _response(status, examples) for status in sorted({*statuses, *ALWAYS})}


def _response(status: int, examples: dict[str, Any]) -> dict[str, Any]:
    phrase = phrase_of(status)
    example = examples.get(f"e{status}") or {
        "type": "about:blank",
        "title": phrase.lower(),
        "status": status,
        "detail": phrase,
        "request_id": "5f0c9a52e1d84b0f",
    }
    headers = {}
    if status in (429, 503):
        headers = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return {
        "description": phrase,
        "content": {MEDIA_TYPE: {"schema": SCHEMA, "example": example}},
        "headers": headers,
    }
