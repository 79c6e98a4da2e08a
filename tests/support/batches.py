"""Reading a raw answer of the batch route, as its documentation describes it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from sskt.teacher_cache.format.encodings import Encoded

_ARRAY = re.compile(r"(\w+) (u?int\d+|float\d+) (\d+(?:x\d+)*)")


def read_batch(headers: Mapping[str, str], body: bytes) -> Encoded:
    """The arrays of an answer by name. Raises ``AssertionError`` if its header does not fit."""
    header = next(v for k, v in headers.items() if k.lower() == "sskt-arrays")
    arrays: Encoded = {}
    offset = 0
    for text in header.split("; "):
        match = _ARRAY.fullmatch(text)
        assert match, header
        shape = tuple(int(n) for n in match[3].split("x"))
        dtype = np.dtype(match[2]).newbyteorder("<")
        arrays[match[1]] = np.frombuffer(body, dtype, math.prod(shape), offset).reshape(shape)
        offset += arrays[match[1]].nbytes
    assert offset == len(body), (header, len(body))
    return arrays
