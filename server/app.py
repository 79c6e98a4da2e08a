"""The web application: routes, and how their failures are told."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from sskt.server.compute.supervisor import end_with_parent
from sskt.server.http.middleware import OPEN, Gate
from sskt.server.http.problems import Problem, problem_of, problem_response
from sskt.server.pages import status
from sskt.server.routes import compute as on_demand
from sskt.server.routes import label_sets as listing
from sskt.server.routes import labels_batch as batch
from sskt.server.routes import metrics
from sskt.server.routes import zarr as files
from sskt.server.settings import Settings, from_environment
from sskt.server.state import make_state
from sskt.teacher_cache.errors import SsktError

ABOUT = """Soft labels of frozen sources, keyed by sample and view seed.

In order, read the store itself under `/zarr` (any Zarr v3 client; `docs/format.md`). In any order,
ask `POST /v1/labels:batch`. Errors are problem details (RFC 9457).
"""


def create_app(settings: Settings) -> ASGIApp:
    """The application over one cache. Raises ``InputError``, ``MissingData``."""
    app = FastAPI(
        title="sskt label server",
        version=version("sskt"),
        description=ABOUT,
        redoc_url=None,
        docs_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.state.sskt = state = make_state(settings)
    for part in (on_demand, listing, batch, files, status):
        app.include_router(part.router)
    app.include_router(listing.health)
    status.mount_static(app)
    app.include_router(metrics.router)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(SsktError, _store_failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return Gate(app, state)


def worker() -> ASGIApp:
    """The application of one worker process, from what the supervisor left in the environment."""
    end_with_parent()
    return create_app(from_environment())


def _told(request: Request, problem: Problem) -> Response:
    if status.wants_html(request):
        return status.html_problem(request, problem)
    return problem_response(problem, request.scope["state"]["request_id"], request.url.path)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _told(request, error)


async def _store_failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, SsktError)
    return _told(request, problem_of(error))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [
        {"where": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()[:20]
    ]
    first = f"{found[0]['where']}: {found[0]['message']}" if found else "invalid request"
    return _told(request, Problem(422, "invalid request", first, errors=found))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = str(error.detail)
    known = {404: f"nothing at {request.url.path}", 405: f"{request.method} is not for this path"}
    detail = known.get(error.status_code, title)
    return _told(request, Problem(error.status_code, title.lower(), detail, error.headers))


def _described(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the ways to show a token and without its own error form."""
    if app.openapi_schema is None:
        described = FastAPI.openapi(app)
        components = described.setdefault("components", {})
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {
                "type": "http",
                "scheme": "basic",
                "description": "For browsers: any name, the token as password.",
            },
        }
        free: list[dict[str, list[str]]] = [] if app.state.sskt.tokens else [{}]
        described["security"] = [*free, {"bearer": []}, {"basic": []}]
        for path in OPEN:
            described["paths"][path]["get"]["security"] = []
        for name in ("HTTPValidationError", "ValidationError"):
            components.get("schemas", {}).pop(name, None)
        app.openapi_schema = described
    return app.openapi_schema
