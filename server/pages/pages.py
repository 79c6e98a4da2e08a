"""HTML pages: templates, static files, and problems as a browser's user reads them.

Nothing is loaded from other servers, and no page contains scripts or styles, so that the policy
sent with it can forbid both. Text that comes from a store or a client is escaped.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from fastapi import APIRouter
from markupsafe import Markup
from starlette.responses import Response
from starlette.types import Scope

from sskt.server.http.problems import Problem, json_answer
from sskt.server.pages.drawing import percent
from sskt.teacher_cache.errors import maintainers, printable

FOLDER = Path(__file__).parent
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FOREVER = "public, max-age=31536000, immutable"

static = APIRouter(include_in_schema=False)


def _static_files() -> dict[str, tuple[bytes, str]]:
    """Content and hash of each file by its name."""
    files = {}
    for path in sorted((FOLDER / "static").iterdir()):
        if path.suffix in TYPES:
            data = path.read_bytes()
            files[path.name] = (data, hashlib.sha256(data).hexdigest()[:12])
    return files


_STATIC = _static_files()


def static_url(name: str) -> str:
    """URL of a static file below the server's root; another one after each change of the file."""
    return f"static/{name}?v={_STATIC[name][1]}"


@static.get("/static/{name}")
async def static_file(name: str, v: str = "") -> Response:
    """A style sheet, script or image of the pages."""
    if name not in _STATIC:
        raise Problem(404, "not found", f"no static file {name}")
    data, digest = _STATIC[name]
    headers = {"Cache-Control": FOREVER if v == digest else "no-cache"}
    return Response(data, headers=headers, media_type=TYPES[Path(name).suffix])


def number(value: float) -> str:
    """``1,234``; of small fractions two digits."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def size(count: float) -> str:
    """``5.4 MiB``."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = 0
    while count >= 1023.95 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:,.1f} {units[power]}" if power else f"{count:,.0f} B"


def duration(seconds: float | None) -> str:
    """``0.5 ms``, ``1.2 s``, ``3 min``, ``2 h 5 min``, ``3 d 4 h``; 0 if the clock was set back."""
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, days = minutes // 60, minutes // 1440
    if not minutes:
        return f"{rest} s"
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if not days else f"{days} d {hours % 24} h"


def part(name: str) -> str:
    """A name as one part of a path in a URL."""
    return quote(name, safe="", errors="surrogateescape")


def moment(seconds: float) -> str:
    """A time since 1970 as ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def coded(text: str) -> Markup:
    """Text whose parts in backticks are shown as code."""
    parts = printable(text).split("`")
    if len(parts) % 2 == 0:
        return Markup.escape(text)
    shown = [Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)]
    return Markup("").join(shown)


def _printable(value: Any) -> Any:
    """What is shown of a value: control characters of metadata are escaped, lines are kept."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(printable, value.split("\n")))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters |= {
        "number": number,
        "size": size,
        "duration": duration,
        "coded": coded,
        "moment": moment,
        "percent": percent,
        "part": part,
    }
    environment.globals |= {"static": static_url, "version": version("sskt")}
    return environment


_TEMPLATES = _environment()


def root_of(scope: Scope) -> str:
    """The server's root relative to a request's URL, so that links work under any path prefix."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode("utf-8", "replace")
    return "../" * (raw.partition(b"?")[0].count(b"/") - 1) or "./"


def page(
    scope: Scope,
    template: str,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **context: Any,
) -> Response:
    """Fills in a template. The answer is the present state, so it is never cached.

    Args:
        scope: Of the request.
        template: Name of the template's file.
        status: HTTP status.
        headers: Further headers.
        **context: The template's variables.

    Returns:
        The page.
    """
    text = _TEMPLATES.get_template(template).render({"root": root_of(scope)} | context)
    fixed = {"Cache-Control": "no-store", "Content-Security-Policy": POLICY}
    # Ids of files whose names are no UTF-8 hold surrogates.
    body = text.encode("utf-8", "replace")
    return Response(body, status, fixed | dict(headers or {}), "text/html; charset=utf-8")


@functools.cache
def how_to_report() -> str:
    """Where to report a failure of the server itself, and what to send."""
    return (
        f"Please report this {maintainers()}, with the request id below and the lines of the "
        "server's log about it."
    )


def answer_problem(problem: Problem, scope: Scope) -> Response:
    """A problem as the client can read it: a page for people with a browser, else JSON."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    if scope["method"] not in ("GET", "HEAD") or b"text/html" not in headers.get(b"accept", b""):
        return json_answer(problem, scope)
    request_id = scope["state"]["request_id"]
    return page(
        scope,
        "problem.html",
        problem.status,
        problem.headers,
        problem=problem,
        request_id=request_id,
        report=how_to_report(),
    )
