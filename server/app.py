"""The web application: its routes and its description."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from sskt.server.compute.supervisor import end_with_parent
from sskt.server.http.auth import OPEN
from sskt.server.http.middleware import Middleware
from sskt.server.http.problems import leave_errors_to_middleware
from sskt.server.pages import status
from sskt.server.routes import compute as on_demand
from sskt.server.routes import label_sets as listing
from sskt.server.routes import labels_batch as batch
from sskt.server.routes import metrics
from sskt.server.routes import zarr as files
from sskt.server.settings import Settings, from_environment
from sskt.server.state import make_state

ABOUT = """Soft labels of frozen sources, keyed by sample and view seed.

To read labels in order, read the store itself under `/zarr` with any Zarr v3 client
(`docs/format.md`). To read them in any order, use `POST /v1/labels:batch`. Errors are problem
details (RFC 9457).
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
    leave_errors_to_middleware(app)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    served = Middleware(app, state, status.answer_problem)
    return open_to_pages(served, settings.cors) if settings.cors else served


def open_to_pages(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Lets pages of other origins read what the server answers to GET and HEAD.

    It stands outside of the middleware, so that a page also reads errors, of which a missing shard
    is one. A browser shows no password or cookie for such a page. A page may send a token that it
    was given.
    """
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "HEAD"],
        allow_headers=["Authorization", "If-None-Match", "Range"],
        expose_headers=["Accept-Ranges", "Content-Length", "Content-Range", "ETag", "Retry-After"],
        allow_credentials=False,
    )


def worker() -> ASGIApp:
    """The application of one worker process, from what the supervisor left in the environment."""
    end_with_parent()
    logging.captureWarnings(True)
    return create_app(from_environment())


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
