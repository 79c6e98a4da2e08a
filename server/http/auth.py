"""Who is let in: tokens and their scopes, and how many requests at once."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from sskt.server.http.problems import Problem
from sskt.server.http.tokens import Token, Tokens
from sskt.server.settings import Settings
from sskt.teacher_cache.errors import SsktError

OPEN = frozenset({"/healthz", "/readyz"})
"""Answered without a token."""
UNCOUNTED = OPEN | {"/metrics"}
"""Answered however busy the server is."""
RETRY = {"Retry-After": "1"}

_SAFE = ("GET", "HEAD", "OPTIONS")


def token_of(scope: Mapping[str, Any], tokens: Tokens | None) -> Token | None:
    """The token that a request shows; None where none is needed. Raises ``Problem``."""
    if tokens is None or scope["path"] in OPEN:
        return None
    shown = [value for name, value in scope["headers"] if name == b"authorization"]
    if not shown:
        raise Problem(401, "token needed", "send Authorization: Bearer TOKEN (sskt token new)")
    try:
        token = tokens.check(_secret(shown[0])) if len(shown) == 1 else None
    except SsktError:  # what is wrong with the file is the log's to tell
        detail = "the server cannot read its tokens; its log says why"
        raise Problem(503, "nobody is let in", detail, {"Retry-After": "5"}) from None
    if token is None:
        raise Problem(401, "token refused", "this token is unknown, expired or revoked")
    _require(token, "read")
    return token


def require(scope: Mapping[str, Any], tokens: Tokens | None, wanted: str) -> None:
    """Raises ``Problem`` 403 if a request's token does not have a scope."""
    if wanted != "read":
        refuse_cross_site(scope)
    if tokens is not None:
        _require(scope.get("state", {}).get("token"), wanted)


def _require(token: Token | None, wanted: str) -> None:
    if token is None or wanted not in token.scopes:
        challenge = f'Bearer realm="sskt", error="insufficient_scope", scope="{wanted}"'
        detail = f"this needs a token with the scope {wanted} (sskt token new --scope {wanted})"
        raise Problem(403, "scope missing", detail, {"WWW-Authenticate": challenge})


def _secret(shown: bytes) -> str:
    """From ``Bearer SECRET``, or the password of ``Basic``; '' if it is neither."""
    scheme, _, rest = shown.decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def refuse_cross_site(scope: Mapping[str, Any]) -> None:
    """Raises ``Problem`` 403 for what another site's page makes a browser ask.

    A browser sends the password it knows, or reaches a server on its own machine, for any page.
    """
    headers = dict(scope["headers"])
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        foreign = site not in (b"same-origin", b"none")
    else:
        foreign = origin is not None and _host(origin) != _host(b"//" + headers.get(b"host", b""))
    if foreign:
        raise Problem(403, "another site", "a page of another site may not ask for this")


def _host(url: bytes) -> str | None:
    try:
        return urlsplit(url.decode("latin-1")).hostname
    except ValueError:
        return None


def refuse_unsafe(scope: Mapping[str, Any]) -> None:
    """``refuse_cross_site`` for methods that may change something."""
    if scope["method"] not in _SAFE:
        refuse_cross_site(scope)


class Admission:
    """Counts the requests of one worker that are being answered. Of one event loop only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._total = 0
        self._each: Counter[str] = Counter()

    @contextmanager
    def held(self, scope: Mapping[str, Any], token: Token | None) -> Iterator[None]:
        """A place while a request is answered. Raises ``Problem`` 429, 503 if there is none."""
        if scope["path"] in UNCOUNTED:
            yield
            return
        client = f"{token.name}@{client_of(scope)}" if token else client_of(scope)
        if self._each[client] >= self._settings.max_requests_each:
            detail = f"{self._each[client]} requests of this client are being answered"
            raise Problem(429, "too many requests at once", detail, RETRY)
        if self._total >= self._settings.max_requests:
            detail = f"{self._total} requests are being answered"
            raise Problem(503, "server busy", detail, RETRY)
        self._total += 1
        self._each[client] += 1
        try:
            yield
        finally:
            self._total -= 1
            self._each[client] -= 1
            if not self._each[client]:
                del self._each[client]


def client_of(scope: Mapping[str, Any]) -> str:
    """The peer's address."""
    client = scope.get("client")
    return str(client[0]) if client else ""
