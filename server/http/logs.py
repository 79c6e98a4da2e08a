"""The server's log: one line an event on standard error, JSON or text.

Text from clients is never printed raw, so that it cannot pass for another line of the log.
"""

from __future__ import annotations

import json
import logging.config
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote

from sskt.teacher_cache.errors import printable

REQUEST_ID: ContextVar[str] = ContextVar("sskt_request_id", default="")
"""The request that is being answered; every line that is logged meanwhile carries it."""

FIELDS = ("method", "path", "status", "seconds", "bytes", "client", "token")
"""Further members of a request's line (``extra=`` of the logging call)."""

_LONGEST_PATH = 1024


def set_up(style: str) -> None:
    """Sends the logs and the warnings of this process through ``log_config``."""
    logging.config.dictConfig(log_config(style))
    logging.captureWarnings(True)


def log_config(style: str = "json", level: str = "INFO") -> dict[str, Any]:
    """For ``logging.config.dictConfig`` and uvicorn's ``log_config``. style: json or text."""
    formatter = TextLines if style == "text" else JsonLines
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": formatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stderr",
                "formatter": "line",
            }
        },
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {"sskt": {"level": level}, "uvicorn": {"level": level}},
    }


def shown_path(scope: Mapping[str, Any]) -> str:
    """A request's path as it was sent, percent-encoded, without the query."""
    raw = scope.get("raw_path") or str(scope["path"]).encode("utf-8", "replace")
    return quote(raw, safe="%/:@!$&'()*+,;=~")[:_LONGEST_PATH]


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, message, request_id and ``FIELDS``."""

    def format(self, record: logging.LogRecord) -> str:
        line = json.dumps(_facts(self, record), default=str)
        return line.replace("\x7f", "\\u007f")  # the one control character that JSON leaves


class TextLines(logging.Formatter):
    """The same as text; tracebacks are on lines of their own, marked by a bar."""

    def format(self, record: logging.LogRecord) -> str:
        facts = _facts(self, record)
        traceback = facts.pop("traceback", "")
        head = [printable(str(facts.pop(name))) for name in ("time", "level", "message")]
        rest = [f"{name}={printable(str(value))}" for name, value in facts.items()]
        lines = [" ".join([*head, *rest])]
        return "\n".join(lines + [f"  | {printable(line)}" for line in traceback.splitlines()])


def _facts(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, Any]:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    facts: dict[str, Any] = {
        "time": f"{seconds}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "message": record.getMessage(),
    }
    request_id = getattr(record, "request_id", "") or REQUEST_ID.get()
    if request_id:
        facts["request_id"] = request_id
    facts |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
    if record.exc_info:
        facts["traceback"] = formatter.formatException(record.exc_info)
    return facts
