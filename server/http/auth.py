"""Which requests are allowed: by the server's name, their token, and the page that made them."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from sskt.server.http.problems import Problem
from sskt.server.http.tokens import Token, Tokens
from sskt.server.settings import Settings
from sskt.teacher_cache.errors import SsktError

OPEN = frozenset({"/healthz", "/readyz"})
"""Answered without a token."""

_SAFE = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:@/?#\s]+))(?::[0-9]*)?")


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, and reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_unknown_host(scope: Mapping[str, Any], settings: Settings) -> None:
    """Refuses requests for another server's name.

    A page may let the name of its own server point to this machine (DNS rebinding): the browser
    then takes this server for that page's own, but still sends the name.

    Raises:
        Problem: 403.
    """
    open_to_all = settings.token_file and (not settings.allowed_hosts or scope["path"] in OPEN)
    sent = [value for name, value in scope["headers"] if name == b"host"]
    if open_to_all or not sent:
        return
    text = sent[0].decode("latin-1").strip()
    match = _HOST.fullmatch(text)
    host = (match[1] or match[2]).lower().removesuffix(".") if match else ""
    if not is_loopback(host) and host not in settings.allowed_hosts:
        detail = (
            f"this server is not known as {text!r}; use localhost, or start sskt serve with "
            "--allowed-host"
        )
        raise Problem(403, "host not allowed", detail)


def token_of(scope: Mapping[str, Any], tokens: Tokens | None) -> Token | None:
    """The token of a request; None where none is needed.

    Raises:
        Problem: 401 without a valid token, 403 if it may not read, 503 if the token file cannot
            be read.
    """
    if tokens is None or scope["path"] in OPEN:
        return None
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if not given:
        raise Problem(401, "token needed", "send Authorization: Bearer TOKEN (sskt token new)")
    try:
        token = tokens.check(_secret(given[0])) if len(given) == 1 else None
    except SsktError:  # the cause names a path, which is for the log only
        detail = "the token file cannot be read, so all requests are refused; see the server's log"
        raise Problem(503, "tokens not readable", detail, {"Retry-After": "5"}) from None
    if token is None:
        raise Problem(401, "token refused", "this token is unknown, expired or revoked")
    _require(token, "read")
    return token


def require(scope: Mapping[str, Any], tokens: Tokens | None, wanted: str) -> None:
    """Checks that a request's token has a scope; without a token file every client has all.

    Raises:
        Problem: 403 if it has not, or if the page of another site asks.
    """
    if wanted != "read":
        refuse_cross_site(scope)
    if tokens is not None:
        _require(scope.get("state", {}).get("token"), wanted)


def _require(token: Token | None, wanted: str) -> None:
    if token is None or wanted not in token.scopes:
        challenge = f'Bearer realm="sskt", error="insufficient_scope", scope="{wanted}"'
        detail = f"this needs a token with the scope {wanted} (sskt token new --scope {wanted})"
        raise Problem(403, "scope missing", detail, {"WWW-Authenticate": challenge})


def _secret(given: bytes) -> str:
    """From ``Bearer SECRET``, or the password of ``Basic``; '' if it is neither."""
    scheme, _, rest = given.decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def refuse_cross_site(scope: Mapping[str, Any]) -> None:
    """Refuses what the page of another site makes a browser ask.

    A browser sends the password that it knows, and reaches a server on its own machine, for any
    page.

    Raises:
        Problem: 403.
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
