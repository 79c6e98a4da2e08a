"""The routes of the API as a page: the same as ``/v1/openapi.json``, for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sskt.server.http.openapi import ALWAYS, phrase_of
from sskt.server.pages.pages import page

LONGEST = 1200
"""Characters of an example that are shown."""

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a route."""

    name: str
    place: str
    kind: str
    required: bool
    about: str


@dataclass(frozen=True)
class Operation:
    """A route with its method.

    Attributes:
        tag: The group that it belongs to.
        method: HTTP method.
        path: Template of the path.
        summary: One line.
        about: More about it.
        parameters: In the path, the query and the headers.
        body: An example of the request's body; empty if it has none.
        answers: Statuses with their meaning, without those that every route may answer.
        example: An example of the answer; empty if none is described.
    """

    tag: str
    method: str
    path: str
    summary: str
    about: str
    parameters: tuple[Parameter, ...]
    body: str
    answers: tuple[tuple[str, str], ...]
    example: str


def operations(described: Mapping[str, Any]) -> list[Operation]:
    """The operations of an OpenAPI document, in its order of tags.

    Args:
        described: The document.

    Returns:
        All operations; those of one tag stand together.
    """
    found = list(_operations(described))
    tags = list(dict.fromkeys(operation.tag for operation in found))
    return sorted(found, key=lambda operation: tags.index(operation.tag))


def _operations(described: Mapping[str, Any]) -> Iterator[Operation]:
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            answers: dict[str, Any] = about.get("responses", {})
            good: dict[str, Any] = next(
                (a for status, a in answers.items() if status.startswith("2")), {}
            )
            yield Operation(
                tag=next(iter(about.get("tags", [])), "other"),
                method=method.upper(),
                path=path,
                summary=about.get("summary", ""),
                about=about.get("description", ""),
                parameters=tuple(map(_parameter, about.get("parameters", []))),
                body=_example(about.get("requestBody", {})),
                answers=tuple(
                    (status, answer.get("description") or phrase_of(int(status)))
                    for status, answer in answers.items()
                    if int(status) not in ALWAYS
                ),
                example=_example(good),
            )


def _parameter(about: Mapping[str, Any]) -> Parameter:
    schema = about.get("schema", {})
    kinds = [schema.get("type", "")] + [s.get("type", "") for s in schema.get("anyOf", [])]
    return Parameter(
        name=about["name"],
        place=about["in"],
        kind=" or ".join(kind for kind in kinds if kind and kind != "null"),
        required=about.get("required", False),
        about=about.get("description", "") or schema.get("description", ""),
    )


def _example(about: Mapping[str, Any]) -> str:
    """The first example of a body, as text."""
    for content in about.get("content", {}).values():
        given = content.get("example")
        if given is None and content.get("examples"):
            given = next(iter(content["examples"].values())).get("value")
        if given is not None:
            text = (
                given if isinstance(given, str) else json.dumps(given, indent=2, ensure_ascii=False)
            )
            return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n..."
    return ""


@router.get("/docs")
def api_page(request: Request) -> Response:
    """All routes with their parameters, answers and examples."""
    described = request.app.openapi()
    return page(
        request.scope,
        "api.html",
        operations=operations(described),
        about=described["info"]["description"],
        always=[(status, phrase_of(status)) for status in ALWAYS],
    )
