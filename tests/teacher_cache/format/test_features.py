"""Label sets of features and logits: encodings, the head, damage, and the golden store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from support import make_golden
from support.helpers import TINY, tree
from support.independent_reader import FormatError, compare, load_factory, open_folder, open_set

from sskt.teacher_cache.api import cache_teachers, open_target
from sskt.teacher_cache.errors import CorruptStore, InputError, UnknownName
from sskt.teacher_cache.format.encodings import (
    Encoding,
    as_tensors,
    decoded,
    error_text,
    measured_error,
    parse_encoding,
    soft_labels,
)
from sskt.teacher_cache.format.features import ENCODINGS, Head, features, values
from sskt.teacher_cache.label_sets.create import open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.tools.copy import copy_label_set
from sskt.teacher_cache.tools.export import export_label_set
from sskt.teacher_cache.tools.mean import mean_of
from sskt.teacher_cache.tools.verify import verify

Sskt = Callable[..., tuple[int, str, str]]
Float32 = NDArray[np.float32]

GOLDEN = Path(__file__).parents[2] / "golden"
F16, U8 = (Encoding(name) for name in ENCODINGS)


def rows(largest: float) -> st.SearchStrategy[Float32]:
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 40))
    numbers = st.floats(-largest, largest, width=32, allow_subnormal=False)
    return arrays(np.float32, shapes, elements=numbers)


@given(rows(65504))
@settings(deadline=None)
def test_f16_is_the_nearest_float16(f: Float32) -> None:
    encoded = F16.encode(f)
    np.testing.assert_allclose(values(encoded), f, rtol=2**-11, atol=2**-24)
    assert not F16.skipped(encoded).any() and not F16.faulty(encoded, f.shape[1]).any()


@given(rows(2.0**126))
@example(np.array([[2.0**-126, 0]], np.float32))
@settings(deadline=None)
def test_u8_is_off_by_half_a_step_at_most(f: Float32) -> None:
    encoded = U8.encode(f)
    least, step = encoded["range"].astype(np.float64).T
    assert (least == f.min(axis=1)).all()
    smallest = 255 * 2.0**-149  # a step that is a subnormal number is rounded to 2**-149
    np.testing.assert_allclose(step * 255, f.max(axis=1) - least, rtol=1e-6, atol=smallest)
    error = np.abs(values(encoded).astype(np.float64) - f)
    rounding = 2.0**-22 * np.abs(f).max(axis=1, keepdims=True)
    assert (error <= step[:, None] / 2 + rounding + smallest).all()
    assert not U8.skipped(encoded).any() and not U8.faulty(encoded, f.shape[1]).any()


@given(rows(1e4), st.sampled_from([F16, U8]))
@settings(deadline=None)
def test_torch_and_numpy_decode_alike(f: Float32, encoding: Encoding) -> None:
    encoded = encoding.encode(f)
    assert np.array_equal(features(as_tensors(encoded)).numpy(), values(encoded))
    weight = np.ones((3, f.shape[1])) * [[0.1], [0.2], [-0.3]] / f.shape[1]
    head = Head(weight.astype(np.float32), np.arange(3, dtype=np.float32))
    for temperature in (1.0, 3.0):
        p = decoded(encoding, encoded, 3, temperature, head)
        logits = values(encoded).astype(np.float64) @ head.weight.T.astype(float) + head.bias
        np.testing.assert_allclose(p, torch.softmax(torch.tensor(logits) / temperature, 1))
        found = soft_labels(encoding, as_tensors(encoded), 3, temperature, head)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), p, atol=2e-3)


def test_equal_values_and_empty_rows() -> None:
    for encoding in (F16, U8):
        assert (
            values(encoding.encode(np.full((2, 4), -3.5, np.float32))).tolist() == [[-3.5] * 4] * 2
        )
        empty = encoding.empty(2, 4)
        assert encoding.skipped(empty).all() and not encoding.faulty(empty, 4).any()
        assert np.isnan(values(empty)).all()
        bad = encoding.encode(np.ones((2, 4), np.float32))
        next(iter(bad.values()))[1, 0] = np.inf
        assert encoding.faulty(bad, 4).tolist() == [False, True]
    broken = U8.encode(np.arange(8, dtype=np.float32).reshape(2, 4))
    broken["range"][0, 1] *= -1
    assert U8.faulty(broken, 4).tolist() == [True, False]


def test_beyond_float16_is_refused() -> None:
    large = np.array([[0, 65600]], np.float32)
    with pytest.raises(InputError, match=r"up to 6.56e\+04 are beyond float16.*--encoding u8"):
        F16.encode(large)
    assert values(U8.encode(large)).tolist() == [[0, 65600]]


def test_names_of_encodings() -> None:
    assert parse_encoding("u8", "features:layer4") == U8
    with pytest.raises(UnknownName, match="encoding of logits 'topk-3'; known: f16, u8"):
        parse_encoding("topk-3", "logits")


def test_the_measured_error_is_that_of_rows_and_of_the_gradient() -> None:
    f = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    head = Head(np.eye(8, 32, dtype=np.float32), np.zeros(8, np.float32))
    found = measured_error(U8, f, head)
    error = np.linalg.norm(values(U8.encode(f)) - f, axis=1) / np.linalg.norm(f, axis=1)
    assert found["relative"]["mean"] == pytest.approx(error.mean(), rel=1e-3)
    assert found["relative"]["worst"] == pytest.approx(error.max(), rel=1e-3)
    assert 0 < found["T=1"]["gradient"] < 0.05 and found["rows"] == 64
    bare = measured_error(U8, f)
    assert set(bare) == {"rows", "relative"} and "of a row" in error_text(bare)


# --- whole sets ---------------------------------------------------------------------------------


def make(cache: Path, images: Path, tiny: Source, output: str, encoding: str = "f16") -> LabelSet:
    target = open_target(str(images))
    report = cache_teachers(
        target, tiny, cache=cache, seeds=2, policy="pad-crop-flip", output=output,
        encoding=encoding, batch_size=32, workers=0, shard_rows=16,
    )  # fmt: skip
    return open_label_set(report.label_sets[0].path)


@pytest.fixture(scope="module")
def cache(images: Path, tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for output in ("features", "features:5", "logits"):
        make(folder, images, tiny, output)
    make(folder, images, tiny, "features", "u8")
    return folder


def of(cache: Path, output: str, encoding: str = "f16") -> LabelSet:
    for path in cache.iterdir():
        if (path / "zarr.json").exists():
            found = open_label_set(path)
            module = found.spec.get("output", {}).get("module", "")
            if (found.output + f":{module}" * bool(module), str(found.encoding)) == (
                output, f"features-{encoding}",
            ):  # fmt: skip
                return found
    raise AssertionError(output)


@pytest.mark.parametrize("encoding", ["f16", "u8"])
def test_features_with_a_head_are_soft_labels(
    cache: Path, images: Path, tiny: Source, label_cache: Path, encoding: str
) -> None:
    """As the soft labels of the same source in f32, and by the reader of docs/format.md."""
    found = of(cache, "features", encoding)
    exact = open_label_set(next(label_cache.glob("images*")))
    assert (found.width, len(found.classes), found.classes) == (16, 12, exact.classes)
    for temperature in (1.0, 3.0):
        expected = exact.rows(1, np.arange(60), temperature=temperature)
        soft = found.rows(1, np.arange(60), temperature=temperature)
        within = {"f16": 2e-2, "u8": 0.1}[encoding]  # logits of the tiny source are large
        np.testing.assert_allclose(soft.numpy(), expected.numpy(), atol=within)
    reader, folder = open_set(found.path), open_folder(images, "train", 60)
    agreement = compare(reader, folder, load_factory(f"{TINY}:build"))
    assert (agreement.compared, agreement.wrong_views) == (120, 0) and agreement.worst < within
    own = np.stack([reader.features(1, i) for i in range(60)])  # type: ignore[misc]
    np.testing.assert_allclose(found.features(1, np.arange(60)).numpy(), own, rtol=1e-6, atol=1e-6)
    assert verify(found).problems == []


def test_sets_without_soft_labels_say_so(cache: Path) -> None:
    bare, logits = of(cache, "features:5"), of(cache, "logits")
    assert (bare.classes, bare.width, bare.head, bare.output) == ((), 16, None, "features")
    assert "class" not in bare.coordinates and len(logits.classes) == logits.width == 12
    for found in (bare, logits):
        assert found.features(0, [3, 1]).shape == (2, found.width)
        assert verify(found).problems == []
        with pytest.raises(InputError, match=r"give no soft labels.*LabelSet\.features"):
            found.rows(0, [1])
        with pytest.raises(FormatError, match="no soft labels"):
            open_set(found.path).label(0, 0)
        with pytest.raises(InputError, match="a mean is of soft labels"):
            mean_of([found, found])
    p = logits.probabilities(logits.read(0, 0, 4))
    assert p is not None and bare.probabilities(bare.read(0, 0, 4)) is None
    z = logits.features(0, np.arange(4)).double()
    np.testing.assert_allclose(p, torch.sigmoid(z).numpy(), atol=1e-12)


def test_features_of_soft_labels_are_refused(label_cache: Path) -> None:
    with pytest.raises(InputError, match=r"holds soft labels and no features.*--output features"):
        open_label_set(next(label_cache.glob("images*"))).features(0, [0])


def test_other_tools_see_features_by_name(cache: Path) -> None:
    import xarray

    opened = xarray.open_zarr(of(cache, "features", "u8").path)
    assert opened["features"].dims == ("seed", "sample", "feature")
    assert opened["head_weight"].dims == ("class", "feature")
    assert opened["range"].dims == ("seed", "sample", "entry")
    weight, bias = load_factory(f"{TINY}:build")[8].parameters()
    np.testing.assert_array_equal(opened["head_weight"], weight.detach())
    np.testing.assert_array_equal(opened["head_bias"], bias.detach())
    assert xarray.open_zarr(of(cache, "logits").path)["features"].dims[2] == "class"


def test_copy_and_export_carry_the_head(cache: Path, tmp_path: Path) -> None:
    found = of(cache, "features")
    copy_label_set(found, tmp_path / "copy")
    copied = open_label_set(tmp_path / "copy" / found.name)
    assert tree(copied.path) == tree(found.path)
    export_label_set(found, U8, tmp_path / "small")
    (path,) = (p for p in (tmp_path / "small").iterdir() if (p / "zarr.json").exists())
    small = open_label_set(path)
    assert small.head is not None and found.head is not None
    assert small.head.sha256 == found.head.sha256 and verify(small).problems == []
    with pytest.raises(InputError, match=r"would pass for exact.*--encoding f16"):
        export_label_set(small, F16, tmp_path / "again")
    with pytest.raises(InputError, match="holds something else"):
        export_label_set(found, parse_encoding("u8"), tmp_path / "again")


HEAD = ("head_weight/c/0/0", "head_bias/c/0", "head_weight/zarr.json", "head_bias/zarr.json")


@pytest.mark.parametrize("key", HEAD)
@pytest.mark.parametrize("how", ["gone", "flipped", "cut"])
def test_a_damaged_head_is_noticed(cache: Path, tmp_path: Path, key: str, how: str) -> None:
    source = of(cache, "features")
    path = shutil.copytree(source.path, tmp_path / source.name)
    file = path / key
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0x55
        file.write_bytes(data if how == "flipped" else data[: len(data) // 2])
    found = open_label_set(path)
    if how == "flipped" and key.endswith("json"):
        file.write_bytes(file.read_bytes().replace(b"float32", b"float64"))
    problems = verify(found).problems
    if not (how == "flipped" and key.endswith("json")):
        assert any("head cannot be read" in problem for problem in problems), problems
        with pytest.raises(CorruptStore, match="its head cannot be read"):
            found.rows(0, [0])
        with pytest.raises(CorruptStore):
            copy_label_set(found, tmp_path / "copy")
    else:
        assert problems


def test_another_head_is_noticed(cache: Path, tmp_path: Path) -> None:
    """A sound array of other values, as of another checkpoint: the spec names its SHA-256."""
    import zarr

    source = of(cache, "features")
    path = shutil.copytree(source.path, tmp_path / source.name)
    array: Any = zarr.open_array(path / "head_bias", mode="r+")
    array[:] = np.asarray(array[:]) + 1
    with pytest.raises(CorruptStore, match="not the one that its spec names"):
        open_label_set(path).rows(0, [0])
    with pytest.raises(FormatError, match="not the one"):
        open_set(path).label(0, 0)


def test_an_output_of_a_later_version_asks_for_an_update(cache: Path, tmp_path: Path) -> None:
    from sskt.teacher_cache.format.spec import digest_of

    source = of(cache, "features:5")
    for output in ({"kind": "tokens", "width": 16}, {"kind": "features", "width": 0}):
        path = shutil.copytree(source.path, tmp_path / output["kind"])  # type: ignore[operator]
        document = json.loads((path / "zarr.json").read_text())
        sskt = document["attributes"]["sskt"]
        sskt["spec"]["output"] = output
        sskt["digest"] = digest_of(sskt["spec"])
        (path / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(CorruptStore, match=r"does not know.*update sskt"):
            open_label_set(path)


def test_commands_over_features(cache: Path, sskt: Sskt) -> None:
    ask = ("--source", f"tiny={TINY}:build")
    status, out, err = sskt("verify", "--cache", cache, "--recompute", 6, *ask)
    assert status == 0 and out.count("6 recomputed") == 4, out + err
    for output, text in (
        ("features", "16 features"), ("features:5", "16 features"), ("logits", "thing"),
    ):  # fmt: skip
        digest = of(cache, output).digest[:12]
        status, out, err = sskt("inspect", "--cache", cache, digest, *ask)
        assert status == 0 and text in out and "relative error" in out, out + err
        status, out, err = sskt("card", "--cache", cache, digest)
        assert status == 0 and f"{output.partition(':')[0].capitalize()} of tiny" in out, err
    status, out, err = sskt("ls", "--cache", cache, "--audit", "--json")
    assert status == 0, err
    by_output: dict[str, Any] = {s["output"]: s["audit"][0] for s in json.loads(out)}
    assert by_output["features"]["entropy"] > 0 and by_output["logits"]["entropy"] is None
    assert all(a["rows"] == 60 and a["faulty"] == 0 for a in by_output.values())


# --- the golden store: written once, read forever -----------------------------------------------

DIGESTS = {
    ("logits", "f16"): "011a54d73911bb05deba8545ccfe5bd33daf1ca8581bcae212caea1d61abae10",
    ("features:6", "u8"): "4adf623ba609282bd4ecd08b9da1e0a50825589830233f5231bb9b0aea1351cc",
    ("features", "f16"): "ee0696e0f0ed9f069def4b88d28928eb0104190e478dcaacd7ab78eb996215da",
    ("features", "u8"): "fb56acbb40eea157c7b4c449da0d1efe47048b342095476ee8716c74d659254c",
}
STORED = {
    ("logits", "f16"): {"features": [46.59375, 8.5546875, 37.6875]},
    ("features:6", "u8"): {
        "range": [0.25617551803588867, 0.09895293414592743],
        "features": [62, 35, 16],
    },
    ("features", "f16"): {"features": [6.37890625, 3.76171875, 1.806640625]},
    ("features", "u8"): {
        "range": [0.1502389758825302, 0.14149592816829681],
        "features": [57, 38, 52],
    },
}
DECODED = {
    ("features", "f16"): [0.004681497376796705, 0.0004528107541905952],
    ("features", "u8"): [0.016846591813239536, 4.649961206529468e-08],
}


@pytest.mark.parametrize("key", make_golden.feature_sets())
def test_golden_features(key: tuple[str, str]) -> None:
    path = make_golden.feature_sets()[key]
    label_set, reader = open_label_set(path), open_set(path)
    assert label_set.digest == DIGESTS[key]
    stored = {k: v[0, :3].tolist() for k, v in label_set.read(1, 5, 6).items()}
    assert stored == STORED[key]
    own = reader.features(1, 5)
    assert own is not None
    np.testing.assert_allclose(label_set.features(1, [5])[0].numpy(), own, rtol=1e-6)
    assert label_set.encoding.skipped(label_set.read(0, 0, 7)).tolist() == [
        i == 3 for i in range(7)
    ]
    if label_set.head is not None:
        p = reader.label(1, 5, 3.0)
        assert p is not None and p[:2].tolist() == pytest.approx(DECODED[key], rel=1e-6)
        soft = label_set.rows(1, [5], temperature=3.0)[0]
        np.testing.assert_allclose(soft.numpy(), p, rtol=2e-4, atol=1e-7)


def test_golden_features_verify(sskt: Sskt) -> None:
    before = tree(GOLDEN)
    status, out, err = sskt("verify", "--cache", GOLDEN / "features", "--json")
    assert status == 0, out + err
    assert [(r["rows"], r["skipped"], r["problems"]) for r in json.loads(out)] == [(14, 2, [])] * 4
    assert tree(GOLDEN) == before
