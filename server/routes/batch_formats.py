"""The answers of the batch route: media types, their bytes, and how much memory they take.

``application/octet-stream`` holds the arrays one after the other, little-endian, with the rows in
the order of the ids. The header ``SSKT-Arrays`` names them:
``view_check uint32 256; labels float16 256x1000``.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sskt.teacher_cache.format.encodings import Encoded

RAW = "application/octet-stream"
SAFETENSORS = "application/vnd.safetensors"
OFFERED = (RAW, SAFETENSORS)
ARRAYS = "SSKT-Arrays"

_QUALITY = re.compile(r"[01](\.\d{0,3})?")


def chosen(accept: str | None) -> str | None:
    """The offered media type that an Accept header prefers (RFC 9110).

    Returns:
        Raw bytes without a header and if both are equally welcome; None if neither is.
    """
    if accept is None or not accept.strip():
        return RAW
    # Sorted, so that of two equal ranges the higher quality counts.
    ranges = dict(sorted(_range(part) for part in accept.split(",") if part.strip()))
    qualities = [
        next((ranges[r] for r in (kind, "application/*", "*/*") if r in ranges), 0.0)
        for kind in OFFERED
    ]
    best = int(np.argmax(qualities))
    return OFFERED[best] if qualities[best] > 0 else None


def _range(part: str) -> tuple[str, float]:
    """A media range and its quality."""
    kind, *parameters = (p.strip().lower() for p in part.split(";"))
    for parameter in parameters:
        name, _, value = (p.strip() for p in parameter.partition("="))
        if name == "q":
            return kind, min(1.0, float(value)) if _QUALITY.fullmatch(value) else 0.0
    return kind, 1.0


def described(arrays: Encoded) -> str:
    """The value of ``SSKT-Arrays``."""
    return "; ".join(
        f"{name} {array.dtype.name} {'x'.join(map(str, array.shape))}"
        for name, array in arrays.items()
    )


def packed(arrays: Encoded, kind: str, about: dict[str, object]) -> bytes:
    """The body of an answer.

    Args:
        arrays: The rows.
        kind: Its media type.
        about: Metadata of a safetensors file; what is no string is written as JSON.
    """
    if kind == RAW:
        return b"".join(
            np.ascontiguousarray(a, a.dtype.newbyteorder("<")).data for a in arrays.values()
        )
    from safetensors.numpy import save

    told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, told)


class Budget:
    """Bytes of answers that a worker holds at once. A single answer may have any size."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, count: int) -> bool:
        """False, and nothing is taken, if that is too much now."""
        if self.held and self.held + count > self.most:
            return False
        self.held += count
        return True

    def give_back(self, count: int) -> None:
        """Frees what was taken."""
        self.held -= count


class HeldResponse(Response):
    """Bytes that count until the client has taken them; then ``done`` is called."""

    def __init__(
        self, body: bytes, headers: dict[str, str], kind: str, done: Callable[[], object]
    ) -> None:
        super().__init__(body, headers=headers, media_type=kind)
        self._done = weakref.finalize(self, done)  # also if it is never sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()
