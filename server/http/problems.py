"""Errors as the server answers them: problem details (RFC 9457), one JSON object each.

Routes raise, and the middleware answers: it is the only place where an error becomes an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NoReturn

from fastapi.exceptions import RequestValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sskt.server.http.logs import shown_path
from sskt.teacher_cache.errors import (
    CorruptStore,
    DiskFull,
    IncompleteLabels,
    InputError,
    MissingData,
    SsktError,
    maintainers,
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


def json_answer(problem: Problem, scope: Scope | None = None) -> Response:
    """The answer that describes a problem as JSON; ``scope`` is that of the request, if any."""
    request_id = scope["state"]["request_id"] if scope else ""
    document = problem.document(shown_path(scope) if scope else "", request_id)
    headers = {"Cache-Control": "no-store"} | problem.headers
    return Response(json.dumps(document).encode(), problem.status, headers, MEDIA_TYPE)


def problem_of(error: Exception) -> Problem:
    """How an error is answered.

    A plain ``InputError`` comes from a store that cannot be reached and is no fault of the
    request: a later one may be served.
    """
    if isinstance(error, Problem):
        return error
    if not isinstance(error, SsktError):
        detail = "unexpected error; the server's log has the cause under this request_id"
        report = f"report it, with the lines of the log about it, {maintainers()}"
        return Problem(500, "internal server error", detail, report=report)
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


def leave_errors_to_middleware(app: Starlette) -> None:
    """Makes an application raise its errors instead of answering them in words of its own."""
    app.add_exception_handler(HTTPException, _raise_refused)
    app.add_exception_handler(RequestValidationError, _raise_invalid)
    app.add_exception_handler(Exception, _no_answer)


async def _raise_refused(request: Request, error: Exception) -> NoReturn:
    assert isinstance(error, HTTPException)
    path = request.url.path
    known = {404: f"nothing at {path}", 405: f"{request.method} is not supported at {path}"}
    detail = known.get(error.status_code, str(error.detail))
    raise Problem(error.status_code, str(error.detail).lower(), detail, error.headers)


async def _raise_invalid(request: Request, error: Exception) -> NoReturn:
    assert isinstance(error, RequestValidationError)
    found = [
        {"where": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()[:20]
    ]
    first = f"{found[0]['where']}: {found[0]['message']}" if found else "invalid request"
    raise Problem(422, "invalid request", first, errors=found)


async def _no_answer(request: Request, error: Exception) -> Response:
    return _Nothing()


class _Nothing(Response):
    """Sends nothing: Starlette raises the error after its answer, which is left out."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass
