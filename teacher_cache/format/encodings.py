"""How soft labels are stored, and what is lost by it.

Everything stored is a plain numpy array under plain codecs; the decode rule is in the spec.
Temperatures are applied on decoding: p^(1/T), renormalised.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import CorruptStore, InputError, UnknownName
from sskt.teacher_cache.format import features as of_features
from sskt.teacher_cache.format.features import SOFT_LABELS, Head
from sskt.teacher_cache.rng import STUDENT, draw, unit

if TYPE_CHECKING:  # the label server's workers do without torch
    import torch
    from torch import Tensor

Shuffle = Literal["shuffle", "noshuffle", "bitshuffle"]
Float32 = NDArray[np.float32]
Encoded = dict[str, NDArray[Any]]
EncodedTensors = dict[str, "Tensor"]

NAMES = ("f16", "root4", "root4-coarse", "u8", "topk-K", "f32")
POWER = {"u8": 6, "root4": 4}
"""Encodings that hold the n-th root of probabilities on a grid of integers, with n."""
BELOW = {"u8": 0.0, "root4": 0.25}
"""What an entry 0 of these counts as, in steps of the grid."""
STEPS = {"root4": 0.015, "root4-coarse": 0.1}
"""Step of ``root4``, in units of 1 / C."""
ROW_SUM_TOLERANCE = 0.01
ERROR_ROWS = 512
"""Rows on which a set's encoding error is measured (the first ones of seed 0)."""
LOWEST = -65504.0
"""The lowest float16: anything less likely is stored as this."""

DECODE = {
    "f32": "log_p = labels",
    "f16": "log_p = labels; renormalise",
    "u8": f"p = (labels / 255) ** {POWER['u8']}; renormalise",
    "root4": f"p = labels ** {POWER['root4']}, 0 read as {BELOW['root4']}; renormalise",
    "topk": "p[index] = exp(value); the rest is uniform",
    **of_features.DECODE,
}


@dataclass(frozen=True)
class Encoding:
    """How soft labels, features or logits are stored; ``parse_encoding`` makes one of its name.

    The methods take the ``width`` of a set: C, or D of features.

    Attributes:
        name: ``f32`` or ``f16`` (log-probabilities), ``u8``, ``root4``, ``topk``; of features and
            logits ``features-f16``, ``features-u8``.
        k: Of ``topk``, the number of classes that are kept.
        step: Of ``root4``, the step of its grid in units of 1 / C.
    """

    name: str
    k: int = 0
    step: float = 0.0

    def __str__(self) -> str:
        known = {step: name for name, step in STEPS.items()}
        if self.step:
            return known.get(self.step, f"{self.name}-{self.step:g}")
        return f"topk-{self.k}" if self.k else self.name

    @property
    def option(self) -> str:
        """What ``--encoding`` is given for it, beside ``--output`` of features and logits."""
        return str(self).removeprefix("features-")

    @property
    def of_features(self) -> bool:
        """Whether rows are features or logits, and no probabilities."""
        return self.name in of_features.ENCODINGS

    def identity(self) -> dict[str, Any]:
        """The part of a label set's spec that names this encoding."""
        more = {"k": self.k} if self.k else {"step": self.step} if self.step else {}
        return {"name": self.name, "decode": DECODE[self.name]} | more

    def codec(self, dtype: np.dtype[Any]) -> tuple[int, Shuffle]:
        """Level and shuffle of Blosc's zstd for a stored array, by what ``benchmarks`` measured."""
        if self.name == "f16":
            return 5, "bitshuffle"
        fast = self.of_features or self.name in POWER
        return 1 if fast else 5, "shuffle" if dtype.itemsize > 1 else "noshuffle"

    def compressed(self, rows: NDArray[Any]) -> bytes:
        """Rows of a stored array as its codec compresses them, without checksum."""
        from numcodecs import Blosc

        level, shuffle = self.codec(rows.dtype)
        codec = Blosc("zstd", clevel=level, shuffle=getattr(Blosc, shuffle.upper()))
        data: bytes = codec.encode(np.ascontiguousarray(rows))
        return data

    def grid(self, classes: int) -> tuple[float, np.dtype[Any]]:
        """Of ``root4``: the step of the grid, of a root of probability, and its integers' dtype.

        16 bits hold all roots from 0 to 1 unless the step would be below half of 1 / 65535.
        """
        step, smallest = self.step / classes, 1 / 65535
        if step < smallest / 2:
            return max(step, 2.0**-32), np.dtype("<u4")
        return max(step, smallest), np.dtype("<u2")

    def arrays(self, width: int) -> dict[str, tuple[np.dtype[Any], int, float]]:
        """Stored arrays by name: dtype, entries a row, fill value. The last one commits a shard."""
        if self.of_features:
            return of_features.arrays(self.name, width)
        if self.name == "topk":
            if self.k > width:
                raise InputError(f"encoding topk-{self.k}: the source has only {width} classes")
            return {
                "index": (np.dtype("<u2" if width <= 2**16 else "<u4"), self.k, 0),
                "value": (np.dtype("<f2"), self.k, np.nan),
            }
        if self.name == "root4":
            return {"labels": (self.grid(width)[1], width, 0)}
        dtype = {"f32": "<f4", "f16": "<f2", "u8": "|u1"}[self.name]
        return {"labels": (np.dtype(dtype), width, 0 if self.name == "u8" else np.nan)}

    def described(self, array: str) -> dict[str, str]:
        """Zarr attributes of a stored array, for people and other tools: what its values are."""
        if self.of_features:
            about = "minimum and step of the row" if array == of_features.RANGE else "output"
            return {"long_name": f"{about} of the source", "decode": DECODE[self.name]}
        value = {"index": "class of the rank", "value": "log-probability of the class of the rank"}
        if self.name in POWER:
            value["labels"] = "code of the probability of the class"
        about = value.get(array, "log-probability of the class")
        return {"long_name": about, "decode": DECODE[self.name]}

    def bytes_per_label(self, width: int) -> int:
        """Bytes of one row before compression."""
        return sum(dtype.itemsize * entries for dtype, entries, _ in self.arrays(width).values())

    def encode(self, log_p: Float32) -> Encoded:
        """float32 log-probabilities ``[n, C]``, features or logits to the stored arrays."""
        if self.of_features:
            return of_features.encode(self.name, log_p)
        if self.name == "f32":
            return {"labels": log_p.astype("<f4")}
        if self.name == "f16":
            return {"labels": np.maximum(log_p, LOWEST).astype("<f2")}
        if self.name in POWER:
            relative = (log_p - log_p.max(axis=1, keepdims=True)).astype(np.float32)
            root = np.exp(relative / POWER[self.name])
            if self.name == "u8":
                return {"labels": np.rint(255 * root).astype("u1")}
            step, dtype = self.grid(log_p.shape[1])
            total = root.sum(axis=1, keepdims=True, dtype=np.float64)
            return {"labels": np.rint(root / (total * step)).astype(dtype)}
        order = np.argsort(-log_p, axis=1, kind="stable")[:, : self.k]
        dtype = self.arrays(log_p.shape[1])["index"][0]
        value = np.maximum(np.take_along_axis(log_p, order, axis=1), LOWEST)
        return {"index": order.astype(dtype), "value": value.astype("<f2")}

    def empty(self, rows: int, width: int) -> Encoded:
        """Rows that all read as skipped."""
        arrays = self.arrays(width).items()
        return {key: np.full((rows, own), fill, dtype) for key, (dtype, own, fill) in arrays}

    def skipped(self, encoded: Encoded) -> NDArray[np.bool_]:
        """Which rows hold no label (bool ``[n]``): all NaN, or for u8 and root4 all zero."""
        if self.of_features:
            return of_features.skipped(encoded)
        if self.name in POWER:
            return np.asarray(~encoded["labels"].any(axis=1))
        return np.asarray(
            np.isnan(encoded["value" if self.name == "topk" else "labels"]).all(axis=1)
        )

    def faulty(self, encoded: Encoded, width: int) -> NDArray[np.bool_]:
        """Which rows cannot be a probability distribution (bool ``[n]``); skipped ones are not.

        Features and logits have to be finite.
        """
        if self.of_features:
            return of_features.faulty(encoded)
        if self.name == "u8":
            wrong = encoded["labels"].max(axis=1) != 255
        elif self.name == "root4":
            step = self.grid(width)[0]
            total = encoded["labels"].sum(axis=1, dtype=np.uint64) * step
            wrong = ~(np.abs(total - 1) <= width * step / 2 + ROW_SUM_TOLERANCE)
        else:
            values = encoded["value" if self.name == "topk" else "labels"].astype(np.float32)
            with np.errstate(over="ignore"):  # infinity is faulty
                total = np.exp(values).sum(axis=1)  # in float64 this takes ten times as long
            wrong = ~(np.abs(total - 1) < ROW_SUM_TOLERANCE)
            if self.name == "topk":
                beyond = (encoded["index"] >= width).any(axis=1)
                wrong = ~((total > 0) & (total < 1 + ROW_SUM_TOLERANCE) & ~beyond)
        return np.asarray(wrong & ~self.skipped(encoded) if wrong.any() else wrong)


def parse_encoding(text: str, output: str = SOFT_LABELS) -> Encoding:
    """Reads ``--encoding``.

    Args:
        text: ``f16``, ``root4``, ``root4-coarse``, ``u8``, ``f32``, ``topk-K``; of features and
            logits ``f16`` or ``u8``.
        output: What is stored: ``soft-labels``, ``features[:MODULE]`` or ``logits``.

    Raises:
        UnknownName: If there is no such encoding.
    """
    if output != SOFT_LABELS:
        if text not in ("f16", "u8"):
            raise UnknownName(f"encoding of {output.partition(':')[0]}", text, ("f16", "u8"))
        return Encoding(f"features-{text}")
    match = re.fullmatch(r"topk-([1-9]\d*)", text)
    if match:
        return Encoding("topk", int(match[1]))
    if text in STEPS:
        return Encoding("root4", step=STEPS[text])
    if text not in ("f16", "u8", "f32"):
        hint = "K is a number: topk-32 keeps the 32 most probable classes"
        raise UnknownName("encoding", text, NAMES, hint if text.startswith("top") else "")
    return Encoding(text)


def encoding_of(identity: dict[str, Any]) -> Encoding:
    """The encoding that a stored spec names. Raises ``CorruptStore`` if it is none of ours."""
    if identity.get("name") not in DECODE:
        raise CorruptStore(
            f"unknown encoding {identity.get('name')!r} in a label set's spec; "
            f"this version of sskt reads {', '.join(DECODE)}: update sskt"
        )
    step = identity.get("step", 0.0)
    if (identity["name"] == "root4") != (isinstance(step, float) and 0 < step < math.inf):
        raise CorruptStore(f"encoding {identity['name']} with step {step!r} in a label set's spec")
    return Encoding(identity["name"], int(identity.get("k", 0)), step)


def require_temperature(
    encoding: Encoding,
    temperature: float,
    error: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """Refuses a sparse label set at a temperature other than 1.

    A temperature above 1 raises the probabilities that a top-k set does not hold, so that about
    half of the gradient is wrong at T = 3.

    Args:
        encoding: the encoding of the label set.
        temperature: T of the training. It counts as 1 within a relative 1e-9.
        error: what ``measured_error`` found on this label set; None if it was not measured.
        force: whether the user insists on these labels.

    Raises:
        InputError: for a top-k encoding at another temperature without ``force``.
    """
    if encoding.name != "topk" or math.isclose(temperature, 1.0) or force:
        return
    lost = gradient_error(error, "T=3", "T=1") or "not on this set; 15 to 67 % at T = 3 on others"
    raise InputError(
        f"labels stored as {encoding} are wrong at temperature {temperature:g} (gradient error "
        f"measured: {lost}); cache with --encoding f16 or u8, use --temperature 1, or insist with "
        "--force-topk"
    )


def error_text(error: Mapping[str, Any] | None) -> str:
    """The measured error of a label set for tables.

    Args:
        error: What ``measured_error`` found; None if it was not measured.

    Returns:
        For example ``0.002 at T=1, 0.003 at T=3``, the gradient error; of features and logits
        without a head ``9e-05 of a row, 0.0001 at worst``.
    """
    if not error:
        return "not measured yet"
    if known := [t for t in ("T=1", "T=3") if t in error]:
        return ", ".join(f"{error[t]['gradient']:.2g} at {t}" for t in known)
    relative = error["relative"]
    return f"{relative['mean']:.2g} of a row, {relative['worst']:.2g} at worst"


def gradient_error(error: Mapping[str, Any] | None, *temperatures: str) -> str:
    """The gradient error of a label set in words; empty if it was not measured.

    Args:
        error: what ``measured_error`` found.
        temperatures: its keys, ``T=1`` or ``T=3``.

    Returns:
        For example ``52 % at T = 3, 8.1 % at T = 1``.
    """
    known = [(t, error[t]["gradient"]) for t in temperatures if error and t in error]
    return ", ".join(f"{100 * e:.2g} % at {t.replace('=', ' = ')}" for t, e in known)


def soft_labels(
    encoding: Encoding,
    encoded: EncodedTensors,
    classes: int,
    temperature: float = 1.0,
    head: Head | None = None,
) -> Tensor:
    """Decodes stored rows on the device that they are on.

    Args:
        encoding: The encoding of the rows.
        encoded: The stored arrays as tensors, ``[n, width]`` each.
        classes: C, the number of the source's classes.
        temperature: T of the paper's equation 1.
        head: Of features, the head.

    Returns:
        softmax(z_s / T): float32 ``[n, C]``.

    Raises:
        InputError: For features without head, and for logits.
    """
    import torch

    if encoding.of_features:
        logits = head_logits(of_features.features(encoded), require_head(head))
        return torch.softmax(logits / temperature, dim=1)
    if encoding.name in POWER:
        codes = encoded["labels"]
        if codes.dtype == torch.int16:  # unsigned, see as_tensors
            codes = codes.int().bitwise_and_(0xFFFF)
        roots = codes.float()
        largest = roots.amax(dim=1, keepdim=True)
        p = _power(roots.clamp_min_(BELOW[encoding.name]).div_(largest), encoding, temperature)
        return p.div_(p.sum(dim=1, keepdim=True))
    if encoding.name != "topk":
        return torch.softmax(encoded["labels"].float() / temperature, dim=1)
    # float64: what the top leaves over is a small difference, and 1/T < 1 magnifies it.
    top = encoded["value"].double().exp()
    rest = (1 - top.sum(dim=1, keepdim=True)).clamp(min=0) / max(classes - encoding.k, 1)
    p = rest.expand(-1, classes).scatter(1, encoded["index"].long(), top)
    p = p.pow(1 / temperature)
    return (p / p.sum(dim=1, keepdim=True)).float()


def require_head(head: Head | None) -> Head:
    """The head of features. Raises ``InputError`` if there is none."""
    if head is None:
        raise InputError(
            "these rows are features without head, or logits, and give no soft labels; read them "
            "with LabelSet.features, or cache soft labels with --output soft-labels"
        )
    return head


def head_logits(rows: Tensor, head: Head) -> Tensor:
    """The logits that a head gives of features ``[n, D]``: float32 ``[n, C]`` on their device."""
    import torch

    weight, bias = _head_tensors(head, rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        return torch.nn.functional.linear(rows, weight, bias)


@functools.lru_cache(maxsize=8)
def _head_tensors(head: Head, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias of a head on a device, where they are kept."""
    import torch

    with torch.inference_mode(False):
        weight, bias = (torch.tensor(array, device=device) for array in (head.weight, head.bias))
    return weight, bias


def _power(roots: Tensor, encoding: Encoding, temperature: float) -> Tensor:
    """Probabilities of roots at a temperature, in place; torch's ``pow`` is two times slower."""
    power = POWER[encoding.name] / temperature
    if power in (2.0, 4.0):
        return (roots.square_() if power == 4.0 else roots).square_()
    if power == 6.0:
        return roots.mul_(roots.square()).square_()
    return roots.pow_(power)


def distance_of(encoding: Encoding, one: NDArray[Any], other: NDArray[Any]) -> float:
    """How far apart two versions of the same stored labels are.

    Args:
        encoding: Their encoding.
        one: Values of the last array of the encoding: ``[n, width]``.
        other: The same array of the other version.

    Returns:
        The mean total variation distance of a row, half the sum of absolute differences of
        probabilities; of features and logits the mean relative error of a row. Infinity if they
        differ in which rows are skipped.
    """
    if encoding.of_features:
        return of_features.distance_of(one, other)
    p, q = (_probabilities(encoding, values) for values in (one, other))
    if (np.isnan(p) != np.isnan(q)).any():
        return math.inf
    return float(np.nansum(np.abs(p - q)) / 2 / max(1, len(p)))


def _probabilities(encoding: Encoding, values: NDArray[Any]) -> NDArray[np.float64]:
    if encoding.name in POWER:
        return _of_grid(encoding.name, values, 1.0)
    return np.exp(values.astype(np.float64))


def _of_grid(name: str, codes: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Probabilities of a grid of roots at a temperature; NaN where all codes are 0."""
    roots = np.maximum(codes.astype(np.float64), BELOW[name])
    with np.errstate(invalid="ignore", divide="ignore"):
        p = (roots / codes.max(axis=1, keepdims=True)) ** (POWER[name] / temperature)
        return np.asarray(p / p.sum(axis=1, keepdims=True))


def as_tensors(encoded: Encoded) -> EncodedTensors:
    """The same memory as torch tensors.

    Indices of 16 and 32 bits are widened. 16-bit codes of ``root4`` are the same bits as int16,
    as torch computes little with unsigned integers; ``soft_labels`` reads them as unsigned.
    """
    import torch

    wide = {"uint16": np.int32, "uint32": np.int64}

    def signed(key: str, a: NDArray[Any]) -> NDArray[Any]:
        if key == "labels" and a.dtype == np.uint16:
            return a.view(np.int16)
        return a.astype(wide.get(a.dtype.name, a.dtype), copy=False)

    return {
        key: torch.from_numpy(np.ascontiguousarray(signed(key, a))) for key, a in encoded.items()
    }


def decoded(
    encoding: Encoding,
    encoded: Encoded,
    classes: int,
    temperature: float = 1.0,
    head: Head | None = None,
) -> NDArray[np.float64]:
    """Decodes stored rows without torch, as ``soft_labels`` does.

    Args:
        encoding: The encoding of the rows.
        encoded: The stored arrays, ``[n, width]`` each.
        classes: C, the number of the source's classes.
        temperature: T of the paper's equation 1.
        head: Of features, the head.

    Returns:
        softmax(z_s / T): float64 ``[n, C]``; NaN where a row holds no label.

    Raises:
        InputError: For features without head, and for logits.
    """
    if encoding.of_features:
        return require_head(head).probabilities(of_features.values(encoded), temperature)
    if encoding.name == "topk":
        top = np.exp(encoded["value"].astype(np.float64))
        rest = np.maximum(1 - top.sum(axis=1, keepdims=True), 0) / (classes - encoding.k or 1)
        p = np.repeat(rest, classes, axis=1)
        np.put_along_axis(p, encoded["index"].astype(np.int64), top, axis=1)
        p **= 1 / temperature
    elif encoding.name in POWER:
        return _of_grid(encoding.name, encoded["labels"], temperature)
    else:
        log_p = encoded["labels"].astype(np.float64) / temperature
        p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    with np.errstate(invalid="ignore"):
        return np.asarray(p / p.sum(axis=1, keepdims=True))


def measured_error(encoding: Encoding, log_p: Float32, head: Head | None = None) -> dict[str, Any]:
    """What the encoding costs on real rows ``[n, C]``, at T = 1, 2, 3, 4 and 6.

    Args:
        encoding: The encoding.
        log_p: Log-probabilities of a source: float32 ``[n, C]``; or features or logits.
        head: The head of the features, if they have one.

    Returns:
        Of features and logits ``relative``: the ``mean`` and the ``worst`` relative error of a
        row. Of soft labels, and of features with a head, for each temperature ``kl``, the mean
        KL(p || stored) in nats, and ``gradient``: ||stored - p|| / ||q - p|| over all rows, the
        relative error of the gradient T (q - p) of the soft-label loss, for a random student q
        whose logits are uniform in [-1, 1).
    """
    report: dict[str, Any] = {"rows": len(log_p)}
    stored = encoding.encode(log_p)
    if encoding.of_features:
        report["relative"] = of_features.measured_error(encoding.name, log_p)
        if head is None:
            return report
    n, classes = len(log_p), log_p.shape[1] if head is None else len(head.bias)
    blocks = -(-classes // 4)
    words = draw(np.arange(n * blocks), 0, stream=STUDENT).reshape(n, -1)[:, :classes]
    reference, student = Encoding("f32"), {"labels": 2 * unit(words) - 1}
    for temperature in (1, 2, 3, 4, 6):
        p = (
            decoded(reference, {"labels": log_p}, classes, temperature)
            if head is None
            else head.probabilities(log_p, temperature)
        )
        found = decoded(encoding, stored, classes, temperature, head)
        q = decoded(reference, student, classes, temperature)
        terms = p * (np.log(np.where(p > 0, p, 1)) - np.log(np.maximum(found, 1e-300)))
        report[f"T={temperature}"] = {
            "kl": float(f"{terms.sum(axis=1).mean():.4g}"),
            "gradient": float(f"{np.linalg.norm(found - p) / np.linalg.norm(q - p):.4g}"),
        }
    return report
