"""The reference of the HTTP API, written from the server's OpenAPI description.

``python docs/http_reference.py`` writes docs/reference/http.md anew; a test compares them.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sskt.server.http.openapi import ALWAYS, phrase_of
from sskt.server.pages.api_page import Operation, Parameter, operations
from sskt.server.settings import Settings

PAGE = Path(__file__).parent / "reference" / "http.md"

HEAD = """# HTTP API

<!-- Written by docs/http_reference.py from the OpenAPI description of the server. -->

All routes of `sskt serve` for programs. A running server shows the same at `/docs`, and as \
OpenAPI 3.1 at `/v1/openapi.json`. [The label server's routes](../server.md) explains tokens, \
missing shards, batches and limits.

Send a token as `Authorization: Bearer TOKEN`. Errors are problem details (RFC 9457, \
`application/problem+json`) with the members `title`, `status`, `detail` and `request_id`. \
Every route may answer {always}.
"""


def described() -> dict[str, Any]:
    """The OpenAPI document of a server with an empty cache."""
    from sskt.server.app import create_app

    with tempfile.TemporaryDirectory() as folder:
        app: Any = create_app(Settings(cache=folder, run=folder))
        document: dict[str, Any] = app.app.openapi()
        return document


def page() -> str:
    """The text of the page."""
    always = ", ".join(f"{status} ({phrase_of(status)})" for status in ALWAYS)
    parts = [HEAD.format(always=always)]
    for tag, found in itertools.groupby(operations(described()), key=lambda one: one.tag):
        parts.append(f"## {tag[:1].upper()}{tag[1:]}\n")
        for operation in found:
            parts += _lines(operation)
    return "\n".join(parts)


def _lines(operation: Operation) -> Iterator[str]:
    yield f"### `{operation.method} {operation.path}`\n"
    yield f"{operation.summary}.\n"
    if operation.about and operation.about != operation.summary:
        yield f"{operation.about}\n"
    if operation.parameters:
        yield "| parameter | in | type | |\n|---|---|---|---|"
        yield from map(_row, operation.parameters)
        yield ""
    if operation.body:
        yield f"Body, for example:\n\n```text\n{operation.body}\n```\n"
    if operation.answers:
        yield "".join(f"- {status}: {about}\n" for status, about in operation.answers)
    if operation.example:
        yield f"Example of an answer:\n\n```text\n{operation.example}\n```\n"


def _row(parameter: Parameter) -> str:
    about = parameter.about if parameter.required else f"Optional. {parameter.about}".strip()
    name, kind = parameter.name, parameter.kind
    return f"| `{name}` | {parameter.place} | {kind} | {' '.join(about.split())} |"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
