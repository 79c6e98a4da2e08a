"""Arrays as the bytes of an answer: what a client may ask for, and how it reads it.

``application/octet-stream``: the arrays one after the other, little-endian, rows in the order of
the ids; the header ``SSKT-Arrays`` names them: ``view_check uint32 256; labels float16 256x1000``.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sskt.teacher_cache.errors import SsktError
from sskt.teacher_cache.format.encodings import Encoded

RAW = "application/octet-stream"
SAFETENSORS = "application/vnd.safetensors"
OFFERED = (RAW, SAFETENSORS)
ARRAYS = "SSKT-Arrays"

_ARRAY = re.compile(r"(\w+) (u?int\d+|float\d+) (\d+(?:x\d+)*)")
_QUALITY = re.compile(r"[01](\.\d{0,3})?")


def chosen(accept: str | None) -> str | None:
    """What an Accept header likes best of what is offered (RFC 9110), None if nothing.

    Without a header, and where two are liked alike: raw bytes.
    """
    if accept is None or not accept.strip():
        return RAW
    ranges = [_range(part) for part in accept.split(",") if part.strip()]
    liked = {kind: _liking(kind, ranges) for kind in OFFERED}
    best = max(OFFERED, key=lambda kind: liked[kind])
    return best if liked[best] > 0 else None


def _range(part: str) -> tuple[str, float]:
    kind, *parameters = (p.strip().lower() for p in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            value = value.strip()
            return kind, min(1.0, float(value)) if _QUALITY.fullmatch(value) else 0.0
    return kind, 1.0


def _liking(kind: str, ranges: list[tuple[str, float]]) -> float:
    """The quality that the most precise range gives to a kind."""
    for precise in (kind, f"{kind.partition('/')[0]}/*", "*/*"):
        fitting = [quality for asked, quality in ranges if asked == precise]
        if fitting:
            return max(fitting)
    return 0.0


def described(arrays: Encoded) -> str:
    """The value of ``SSKT-Arrays``."""
    return "; ".join(
        f"{name} {array.dtype.name} {'x'.join(map(str, array.shape))}"
        for name, array in arrays.items()
    )


def packed(arrays: Encoded) -> bytes:
    """The arrays one after the other, little-endian, row-major."""
    return b"".join(
        np.ascontiguousarray(a, a.dtype.newbyteorder("<")).data for a in arrays.values()
    )


def read_answer(headers: Mapping[str, str], body: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a raw answer: views into ``body``, in its order, by name.

    ``headers`` may spell ``SSKT-Arrays`` in any case. Raises ``SsktError`` if they do not
    describe the body.
    """
    header = next((v for k, v in headers.items() if k.lower() == ARRAYS.lower()), None)
    if header is None:
        raise SsktError(f"the answer has no header {ARRAYS}; it is no batch of labels")
    arrays: dict[str, NDArray[Any]] = {}
    offset = 0
    for text in header.split(";"):
        match = _ARRAY.fullmatch(text.strip())
        if not match:
            raise SsktError(f"cannot read the header {ARRAYS}: {header!r}")
        shape = tuple(int(n) for n in match[3].split("x"))
        dtype = np.dtype(match[2]).newbyteorder("<")
        stop = offset + math.prod(shape) * dtype.itemsize
        if stop > len(body):
            break
        arrays[match[1]] = np.frombuffer(body, dtype, math.prod(shape), offset).reshape(shape)
        offset = stop
    if offset != len(body) or len(arrays) != header.count(";") + 1:
        raise SsktError(f"the answer has {len(body)} bytes, which is not {header!r}")
    return arrays


class Budget:
    """Bytes of answers that a worker holds at once. One answer alone may be any size."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, count: int) -> bool:
        """False, and nothing taken, if that is too much now."""
        if self.held and self.held + count > self.most:
            return False
        self.held += count
        return True

    def give_back(self, count: int) -> None:
        """What was taken is free again."""
        self.held -= count


class HeldResponse(Response):
    """Bytes that are counted until a client has taken them: ``done`` is called then."""

    def __init__(
        self, body: bytes, headers: dict[str, str], kind: str, done: Callable[[], object]
    ) -> None:
        super().__init__(body, headers=headers, media_type=kind)
        self._done = weakref.finalize(self, done)  # also where nobody sends it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()
