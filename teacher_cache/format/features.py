"""Features and logits of a source: what a label set may hold in the place of soft labels.

A row is stored as float16, or as 8-bit codes with a minimum and a step of its own. With the head,
the last linear layer of the source, features give its soft labels at any temperature.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import CorruptStore, InputError

if TYPE_CHECKING:  # the label server's workers do without torch
    from torch import Tensor

Float32 = NDArray[np.float32]
Encoded = dict[str, NDArray[Any]]

SOFT_LABELS = "soft-labels"
FEATURES = "features"
LOGITS = "logits"
OUTPUTS = (SOFT_LABELS, FEATURES, LOGITS)
"""What a label set may hold."""

F16, U8 = ENCODINGS = ("features-f16", "features-u8")
"""Names of the encodings of features and of logits in a spec."""

DECODE = {
    F16: "f = features",
    U8: "f = range[0] + range[1] * features",
}
RANGE = "range"
"""The array of ``features-u8`` with the minimum and the step of each row."""

LARGEST = 65504.0
"""The largest float16."""


@dataclass(frozen=True, eq=False)
class Head:
    """The last linear layer of a network: logits are ``f @ weight.T + bias``.

    Attributes:
        weight: float32 ``[C, D]``.
        bias: float32 ``[C]``; zeros for a layer without one.
    """

    weight: Float32
    bias: Float32

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes of the weight and of the bias, little-endian."""
        digest = hashlib.sha256()
        for array in (self.weight, self.bias):
            digest.update(np.ascontiguousarray(array, "<f4").data)
        return f"sha256:{digest.hexdigest()}"

    def probabilities(self, features: NDArray[Any], temperature: float = 1.0) -> NDArray[Any]:
        """softmax((f W^T + b) / T): float64 ``[n, C]``."""
        logits = features.astype(np.float64) @ self.weight.T.astype(np.float64) + self.bias
        logits = (logits - logits.max(axis=1, keepdims=True)) / temperature
        p = np.exp(logits)
        return np.asarray(p / p.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Output:
    """What a source stores in the place of soft labels.

    Attributes:
        kind: ``features`` or ``logits``.
        width: D, the number of features, or C.
        module: Name of the module whose output the features are; empty for the input of the head,
            or for what a network without head returns.
        head: The head, if the features are its input.
    """

    kind: str
    width: int
    module: str = ""
    head: Head | None = None

    def identity(self) -> dict[str, Any]:
        """The part of a label set's spec that names this output."""
        return (
            {"kind": self.kind, "width": self.width}
            | ({"module": self.module} if self.module else {})
            | ({"head": self.head.sha256} if self.head else {})
        )


def output_text(spec: Mapping[str, Any]) -> str:
    """The ``--output`` of a label set, from its spec: ``features:layer4``."""
    output = spec.get("output", {})
    module = output.get("module", "")
    return str(output.get("kind", SOFT_LABELS)) + (f":{module}" if module else "")


def require_sound_output(spec: Mapping[str, Any], name: str) -> None:
    """Checks what the spec of a label set says of its output.

    Raises:
        CorruptStore: If this version does not know such an output.
        ValueError, TypeError, KeyError: If it is damaged.
    """
    encoded = spec["encoding"]["name"] in ENCODINGS
    if "output" not in spec and not encoded:
        return
    output, count = spec["output"], spec["source"]["classes"]["count"]
    kind, width, head = output["kind"], output["width"], output.get("head")
    sound = (
        encoded
        and (kind == FEATURES or (kind == LOGITS and width == count and head is None))
        and type(width) is int
        and width > 0
        and isinstance(output.get("module", ""), str)
        and isinstance(head, str | None)
        and (count > 0) == (kind == LOGITS or head is not None)
    )
    if not sound:
        raise CorruptStore(
            f"label set {name} holds an output that this version of sskt does not know "
            f"({output!r}); update sskt"
        )


def arrays(name: str, width: int) -> dict[str, tuple[np.dtype[Any], int, float]]:
    """Stored arrays of an encoding: dtype, entries a row, fill value."""
    if name == F16:
        return {FEATURES: (np.dtype("<f2"), width, np.nan)}
    return {RANGE: (np.dtype("<f4"), 2, np.nan), FEATURES: (np.dtype("|u1"), width, 0)}


def encode(name: str, rows: Float32) -> Encoded:
    """Rows ``[n, D]`` as an encoding stores them. Raises ``InputError`` beyond float16."""
    if name == F16:
        largest = float(np.abs(rows).max(initial=0.0))
        if largest > LARGEST:
            raise InputError(
                f"features up to {largest:.4g} are beyond float16, whose largest number is "
                f"{LARGEST:.0f}; store them with --encoding u8, which has a range for each row, or "
                "choose another module with --output features:MODULE"
            )
        return {FEATURES: rows.astype("<f2")}
    least = rows.min(axis=1, keepdims=True)
    step = ((rows.max(axis=1, keepdims=True).astype(np.float64) - least) / 255).astype("<f4")
    codes = (rows.astype(np.float64) - least) / np.where(step > 0, step, 1)
    return {
        RANGE: np.concatenate([least, step], axis=1).astype("<f4"),
        FEATURES: np.rint(codes.clip(0, 255)).astype("u1"),
    }


def skipped(encoded: Encoded) -> NDArray[np.bool_]:
    """Which rows hold nothing (bool ``[n]``): NaN throughout, or with a range of NaN."""
    return np.asarray(np.isnan(encoded.get(RANGE, encoded[FEATURES])).all(axis=1))


def faulty(encoded: Encoded) -> NDArray[np.bool_]:
    """Which rows are not finite (bool ``[n]``); skipped ones are not."""
    wrong = ~np.isfinite(encoded.get(RANGE, encoded[FEATURES])).all(axis=1)
    if RANGE in encoded:
        wrong |= encoded[RANGE][:, 1] < 0
    return np.asarray(wrong & ~skipped(encoded))


def values(encoded: Encoded) -> Float32:
    """Decodes stored rows without torch: float32 ``[n, D]``, NaN where a row holds nothing."""
    found = encoded[FEATURES].astype(np.float32)
    if RANGE in encoded:
        found = encoded[RANGE][:, :1] + encoded[RANGE][:, 1:] * found
    return np.asarray(found, np.float32)


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    """1 / (1 + exp(-z)): float64, of the shape of the logits."""
    return np.asarray((1 + np.tanh(logits.astype(np.float64) / 2)) / 2)


def features(encoded: Mapping[str, Tensor]) -> Tensor:
    """Decodes stored rows of features or logits on the device that they are on.

    Args:
        encoded: The stored arrays as tensors, ``[n, width]`` each.

    Returns:
        float32 ``[n, D]``; NaN where a row holds nothing.
    """
    found = encoded[FEATURES].float()
    if RANGE in encoded:
        found = encoded[RANGE][:, :1] + encoded[RANGE][:, 1:] * found
    return found


def relative_error(rows: NDArray[Any], stored: NDArray[Any]) -> NDArray[np.float64]:
    """||stored - row|| / ||row|| of each row: float64 ``[n]``; 0 where both are zero."""
    rows, stored = rows.astype(np.float64), stored.astype(np.float64)
    difference, norm = np.linalg.norm(stored - rows, axis=1), np.linalg.norm(rows, axis=1)
    return np.asarray(difference / np.where(norm > 0, norm, 1))


def distance_of(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Mean relative error between two versions of a stored array ``[n, width]``.

    Infinity if they differ in which rows are skipped.
    """
    if (np.isnan(one) != np.isnan(other)).any():
        return math.inf
    return float(np.nan_to_num(relative_error(one, other)).mean()) if len(one) else 0.0


def measured_error(name: str, rows: Float32) -> dict[str, float]:
    """The relative error of an encoding on real rows ``[n, D]``: mean and worst."""
    error = relative_error(rows, values(encode(name, rows)))
    return {"mean": float(f"{error.mean():.4g}"), "worst": float(f"{error.max():.4g}")}
