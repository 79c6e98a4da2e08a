"""f_s: which stills of a clip a source of images sees (equation 1's f_s for videos).

``center`` is the paper's. A user's own is a function ``(depth, sample, seed) -> frame numbers``
in a file of theirs, whose SHA-256 joins the identity.
"""

from __future__ import annotations

import hashlib
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import InputError, MissingData, SpecMismatch, UnknownName
from sskt.teacher_cache.rng import FRAMES, below, draw

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
        """Whether it is for clips."""
        return self.pick is not None

    def identity(self) -> str:
        """The part of a label set's spec that names it."""
        return f"{self.name}@{self.code}" if self.code else self.name

    def frames(self, depth: int, sample: int, seed: int) -> NDArray[np.int64]:
        """Numbers of the stills: int64 ``[K]``. Raises ``InputError`` for what is none of them."""
        assert self.pick is not None
        given = self.pick(depth, sample, seed)
        try:
            chosen = np.array(given)
        except ValueError:  # lists of several lengths
            chosen = np.array(None)
        whole = chosen.ndim == 1 and chosen.size and chosen.dtype.kind in "iu"
        if not whole or chosen.min() < 0 or chosen.max() >= depth:
            raise InputError(
                f"frame sampling {self.name} gave {given!r} for a clip of {depth} frames; "
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


def parse_frame_sampling(text: str, *, code: str = "") -> FrameSampling:
    """Reads the name of a frame sampling; of a user's function, runs the file.

    Args:
        text: ``center``, ``first``, ``uniform-K``, ``random``, or ``FILE.py:function``.
        code: What the file's content must be, ``sha256:...``; empty: anything.

    Returns:
        The frame sampling.

    Raises:
        UnknownName: If there is no such frame sampling.
        MissingData: If there is no such file.
        SpecMismatch: If the file is another one than ``code`` says; it was not run.
        InputError: If there is no such function in it.
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
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise MissingData(f"frame sampling: cannot read {file} ({error.strerror})") from error
    found = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if code and found != code:
        raise SpecMismatch(
            f"frame sampling {file} is not the file that the labels were made with (views.f_s: "
            f"expected {code}, found {found}); it was not run; give that file"
        )
    pick = _Own(str(Path(file).resolve()), function, content)
    return FrameSampling(f"{Path(file).name}:{function}", pick, found)


class _Own:
    """A user's function. What is run is the text that was hashed, in every process it goes to."""

    def __init__(self, file: str, function: str, content: bytes) -> None:
        self._file, self._function, self._content = file, function, content
        self._pick: Pick = self._load()

    def __reduce__(self) -> tuple[type[_Own], tuple[str, str, bytes]]:
        return _Own, (self._file, self._function, self._content)

    def _load(self) -> Pick:
        module = types.ModuleType("sskt_frame_sampling")
        module.__file__ = self._file
        try:
            exec(compile(self._content, self._file, "exec"), module.__dict__)
            pick: Pick = getattr(module, self._function)
        except (Exception, SystemExit) as error:
            raise self._failed(error) from error
        return pick

    def __call__(self, depth: int, sample: int, seed: int) -> Sequence[int]:
        try:
            return self._pick(depth, sample, seed)
        except (Exception, SystemExit) as error:
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> InputError:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return InputError(f"frame sampling {self._file}:{self._function}: {what}")
