"""The last errors of all processes of a server: one bounded file of JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from sskt.teacher_cache.storage.locks import lock_file

LIMIT = 256 * 1024
"""Bytes after which the file is put aside; the one before it is deleted then."""

DETAIL = 500
"""Characters of a message that are kept."""


class ErrorLog:
    """Appended to by every process; a full disk never turns an error into another one."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self._path, self._limit = path, limit
        self._old = path.with_name(f"{path.stem}.1{path.suffix}")

    def add(self, kind: str, detail: str, request_id: str) -> None:
        """Adds an error. ``time`` is seconds since 1970."""
        shown = detail if len(detail) <= DETAIL else detail[: DETAIL - 1] + "…"
        entry = {"time": time.time(), "kind": kind, "detail": shown, "request_id": request_id}
        line = json.dumps(entry).encode() + b"\n"
        with contextlib.suppress(OSError):
            file = self._opened()
            try:
                os.write(file, line)
            finally:
                os.close(file)

    def _opened(self) -> int:
        """The file, locked; a full one is put aside by exactly one process."""
        while True:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                lock_file(file)
                found = os.fstat(file)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(found, self._path.stat()):
                        if found.st_size < self._limit:
                            return file
                        self._path.replace(self._old)
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def last(self, count: int) -> list[dict[str, Any]]:
        """The last ``count`` errors, newest first."""
        found: list[dict[str, Any]] = []
        for path in (self._path, self._old):
            with contextlib.suppress(OSError):
                for line in reversed(path.read_bytes().splitlines()):
                    if len(found) == count:
                        return found
                    with contextlib.suppress(ValueError):  # cut short by a full disk
                        found.append(json.loads(line))
        return found
