"""f_s: which stills of a clip a source of pictures sees (equation 1's f_s for videos).

``center`` is the paper's. A user's own is a function ``(depth, sample, seed) -> frame numbers``
in a file of theirs, whose SHA-256 joins the identity.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.philox import FRAMES, below, draw

Pick = Callable[[int, int, int], Sequence[int]]
"""``(depth, sample, seed)`` to the numbers of the stills in the clip, each in ``[0, depth)``."""


@dataclass(frozen=True)
class FrameSampling:
    """A named f_s. Several stills: y is the mean of their softmaxes."""

    name: str
    pick: Pick | None = None
    code: str = ""

    @property
    def clips(self) -> bool:
        """Whether it is of clips."""
        return self.pick is not None

    def identity(self) -> str:
        """The part of a label set's spec that names it."""
        return f"{self.name}@{self.code}" if self.code else self.name

    def frames(self, depth: int, sample: int, seed: int) -> NDArray[np.int64]:
        """Numbers of the stills: int64 ``[K]``. Raises ``InputError`` for what is none of them."""
        assert self.pick is not None
        chosen = np.array(self.pick(depth, sample, seed))
        whole = chosen.ndim == 1 and chosen.size and chosen.dtype.kind in "iu"
        if not whole or chosen.min() < 0 or chosen.max() >= depth:
            raise InputError(
                f"frame sampling {self.name} gave {chosen.tolist()} for a clip of {depth} frames; "
                f"expected whole numbers from 0 to {depth - 1}"
            )
        return chosen.astype(np.int64)


def _center(depth: int, sample: int, seed: int) -> Sequence[int]:
    return [depth // 2]


def _first(depth: int, sample: int, seed: int) -> Sequence[int]:
    return [0]


def _random(depth: int, sample: int, seed: int) -> Sequence[int]:
    return [int(below(draw(sample, seed, stream=FRAMES)[0, 0], depth))]


@dataclass(frozen=True)
class _Uniform:
    k: int

    def __call__(self, depth: int, sample: int, seed: int) -> Sequence[int]:
        return [(2 * i + 1) * depth // (2 * self.k) for i in range(self.k)]


IDENTITY = FrameSampling("identity")
CENTER = FrameSampling("center", _center)
FRAME_SAMPLINGS: dict[str, str] = {
    "center": "the frame D // 2 (the paper)",
    "first": "frame 0",
    "uniform-K": "the middle frames of K equal parts; y is the mean of K softmaxes",
    "random": "one frame, drawn from (sample, seed)",
}
_PICKS: dict[str, Pick] = {"center": _center, "first": _first, "random": _random}


def parse_frame_sampling(text: str) -> FrameSampling:
    """``center``, ``first``, ``uniform-K``, ``random``, or ``FILE.py:function``.

    Raises ``UnknownName``, ``MissingData`` (no such file), ``InputError`` (no such function).
    """
    if text in _PICKS:
        return FrameSampling(text, _PICKS[text])
    match = re.fullmatch(r"uniform-([1-9]\d*)", text)
    if match:
        return FrameSampling(text, _Uniform(int(match[1])))
    file, _, function = text.rpartition(":")
    if not file.endswith(".py"):
        raise UnknownName(
            "frame sampling", text, FRAME_SAMPLINGS, "or your own as FILE.py:function"
        )
    return FrameSampling(f"{Path(file).name}:{function}", _Own(file, function), _sha256(Path(file)))


def _sha256(file: Path) -> str:
    try:
        return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    except OSError as error:
        raise MissingData(f"frame sampling: cannot read {file} ({error.strerror})") from error


class _Own:
    """A user's function, loaded anew in each process that it is sent to."""

    def __init__(self, file: str, function: str) -> None:
        self._file, self._function = str(Path(file).resolve()), function
        self._pick: Pick = self._load()

    def __reduce__(self) -> tuple[type[_Own], tuple[str, str]]:
        return _Own, (self._file, self._function)

    def _load(self) -> Pick:
        spec = importlib.util.spec_from_file_location("sskt_frame_sampling", self._file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            pick: Pick = getattr(module, self._function)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"frame sampling {self._file}:{self._function}: {what}") from error
        return pick

    def __call__(self, depth: int, sample: int, seed: int) -> Sequence[int]:
        try:
            return self._pick(depth, sample, seed)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"frame sampling {self._file}:{self._function}: {what}") from error
