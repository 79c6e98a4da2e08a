"""Errors that the framework tells in words of its own, as problem details."""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.types import Message

from sskt.server.http.problems import Problem

MAX_TEXT = 2048
"""Bytes of the framework's words that are kept."""


def is_plain_error(head: Message) -> bool:
    """Whether an answer is an error in words of the framework's own."""
    if head["status"] < 400:
        return False
    kind = next((v for n, v in head.get("headers", ()) if n.lower() == b"content-type"), b"")
    return not kind or kind.startswith((b"text/plain", b"application/json"))


def as_problem(head: Message, text: bytes) -> Problem:
    """The same error as problem details; other headers (Allow, Retry-After, ...) stay."""
    status = head["status"]
    try:
        title = HTTPStatus(status).phrase.lower()
    except ValueError:
        title = "error"
    headers = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in head.get("headers", ())
        if not name.lower().startswith(b"content-") or name.lower() == b"content-range"
    }
    if status >= 500:
        return Problem(status, title, "the server's log tells more under this request_id", headers)
    said = text.decode("utf-8", "replace")
    try:
        document = json.loads(said)
        said = str(document["detail"]) if isinstance(document, dict) else said
    except (ValueError, KeyError):
        pass
    return Problem(status, title, said, headers)
