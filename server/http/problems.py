"""Errors as the server tells them: problem details (RFC 9457), one JSON object each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from sskt.teacher_cache.errors import (
    CorruptStore,
    DiskFull,
    IncompleteLabels,
    InputError,
    MissingData,
    SsktError,
)

MEDIA_TYPE = "application/problem+json"
LONGEST = 1000
"""Characters of a detail: an error that names what was asked for is no copy of it."""
DAMAGED = "label set damaged"
UNREACHABLE = "store not reachable"


class Problem(Exception):
    """What a route raises; ``more`` are members of the answer beside the standard ones."""

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(detail)
        self.status, self.title, self.detail = status, title, _short(detail)
        self.headers, self.more = dict(headers or {}), more

    def document(self, instance: str = "", request_id: str = "") -> dict[str, Any]:
        """The JSON object."""
        about = {"type": "about:blank", "title": self.title, "status": self.status}
        named = {"detail": self.detail, "instance": _short(instance), "request_id": request_id}
        return about | {key: value for key, value in named.items() if value} | self.more


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def problem_response(problem: Problem, request_id: str = "", instance: str = "") -> Response:
    """The answer that tells a problem."""
    body = json.dumps(problem.document(instance, request_id)).encode()
    headers = {"Cache-Control": "no-store"} | problem.headers
    return Response(body, problem.status, headers, MEDIA_TYPE)


def problem_of(error: SsktError) -> Problem:
    """How a failure of the store is told.

    A plain ``InputError`` comes from a place that cannot be reached, and is no fault of a request:
    whoever asks again may be served.
    """
    if type(error) is InputError:
        return Problem(503, UNREACHABLE, str(error), {"Retry-After": "5"})
    status = _status(error)
    title = DAMAGED if isinstance(error, CorruptStore) else HTTPStatus(status).phrase.lower()
    return Problem(status, title, str(error))


def _status(error: SsktError) -> int:
    for kind, status in (
        (MissingData, HTTPStatus.NOT_FOUND),
        (IncompleteLabels, HTTPStatus.CONFLICT),
        (DiskFull, HTTPStatus.INSUFFICIENT_STORAGE),
        (InputError, HTTPStatus.UNPROCESSABLE_ENTITY),
    ):
        if isinstance(error, kind):
            return status
    return HTTPStatus.INTERNAL_SERVER_ERROR
