"""``LabelSet.rows``: labels of single samples in any order, wherever the set is."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.independent_reader import open_set
from support.random_labels import CLASSES, SAMPLES, SEEDS, make_labels
from support.servers import serving

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels, InputError, ViewMismatch
from sskt.teacher_cache.format.encodings import as_tensors, parse_encoding, soft_labels
from sskt.teacher_cache.label_sets import random_access
from sskt.teacher_cache.label_sets.create import list_label_sets, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.storage.open import open_cache
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

ORDER = np.random.default_rng(5).integers(0, SAMPLES, 90)
"""Rows of all shards in no order; some of them twice."""


@pytest.mark.parametrize("encoding", ["f32", "f16", "u8", "topk-3"])
def test_rows_are_those_of_an_independent_reader(tmp_path: Path, encoding: str) -> None:
    label_set = make_labels(tmp_path, encoding)
    reader = open_set(label_set.path)
    for seed, temperature in ((0, 1.0), (2, 3.0)):
        found = label_set.rows(seed, ORDER, temperature=temperature)
        assert found.dtype == torch.float32 and found.shape == (len(ORDER), CLASSES)
        expected = np.stack([np.asarray(reader.label(seed, int(i), temperature)) for i in ORDER])
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
        one = label_set.rows(seed, int(ORDER[7]), temperature=temperature)
        assert torch.equal(one, found[7:8])


@pytest.mark.parametrize("encoding", ["f16", "topk-3"])
def test_encoded_rows_are_the_stored_ones(tmp_path: Path, encoding: str) -> None:
    label_set = make_labels(tmp_path, encoding)
    whole = label_set.read(1, 0, SAMPLES)
    found = label_set.encoded_rows(1, ORDER)
    assert found.keys() == whole.keys()
    for key, values in found.items():
        assert values.dtype == whole[key].dtype
        assert np.array_equal(values, whole[key][ORDER])
    nothing = label_set.rows(1, [])
    assert nothing.shape == (0, CLASSES)


def test_a_chunk_is_decoded_once_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, int]] = []
    read = LabelSet.read

    def counted(label_set: LabelSet, seed: int, start: int, stop: int) -> Any:
        decoded.append((seed, start))
        return read(label_set, seed, start, stop)

    monkeypatch.setattr(LabelSet, "read", counted)
    label_set = make_labels(tmp_path)
    for i in ORDER.tolist():
        label_set.rows(0, i)
    assert sorted(decoded) == [(0, 0), (0, 512), (0, 1024)]
    decoded.clear()
    monkeypatch.setattr(random_access, "CACHED_BYTES", 512 * CLASSES * 2)
    small = open_label_set(label_set.storage)
    for row in (0, 1, 600, 601, 2):
        small.rows(0, row)
    assert decoded == [(0, 0), (0, 512), (0, 0)], "room for one chunk"


def test_rows_that_a_set_does_not_have(tmp_path: Path) -> None:
    label_set = make_labels(tmp_path, without=[(1, 1)])
    wrong: tuple[Any, ...] = (-1, [0, SAMPLES], [0.5], [[1, 2]], [True], "12")
    for ids in wrong:
        with pytest.raises(InputError, match=r"has rows 0 to 1299, found ids .*; give whole"):
            label_set.rows(0, ids)
    with pytest.raises(InputError, match="temperature must be above 0"):
        label_set.rows(0, 3, temperature=0.0)
    assert label_set.rows(1, [3, 1299]).shape == (2, CLASSES)
    with pytest.raises(IncompleteLabels, match="seed 1 lacks samples 512 to 1023"):
        label_set.rows(1, [3, 600])
    for seed in (-1, SEEDS):
        with pytest.raises(IncompleteLabels):
            label_set.rows(seed, 3)


def test_a_damaged_chunk_is_an_error_and_is_not_kept(tmp_path: Path) -> None:
    label_set = make_labels(tmp_path)
    path = label_set.shard_path("labels", label_set.shard(0, 1))
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(CorruptStore):
        label_set.rows(0, 600)
    assert label_set.rows(0, 5).shape == (1, CLASSES)
    path.write_bytes(whole)
    assert torch.isfinite(label_set.rows(0, 600)).all()


def test_a_sample_that_was_skipped_has_a_row_of_nan(
    images: Path, tiny: Source, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "train" / "bear" / "0003.png").write_bytes(b"no image")
    views = Views(open_target(str(folder)), parse_policy("pad-crop-flip"))
    options = StageOptions(batch_size=8, workers=0, on_error="skip")
    for encoding in ("f16", "u8", "topk-2"):
        report = cache_teachers(
            views, [tiny], parse_encoding(encoding), 1, tmp_path / encoding, options
        )
        rows = report.label_sets[0].rows(0, [22, 23, 24], temperature=2.0)
        assert torch.isnan(rows[1]).all() and torch.isfinite(rows[[0, 2]]).all()


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """The natural map-style dataset over a label set."""

    def __init__(self, label_set: LabelSet) -> None:
        self.label_set = label_set

    def __len__(self) -> int:
        return self.label_set.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.label_set.rows(0, index)[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.slow
def test_loader_processes_read_rows(tmp_path: Path, start: str) -> None:
    label_set = make_labels(tmp_path)
    expected = label_set.rows(0, np.arange(SAMPLES))  # decoded before the processes start
    loader = torch.utils.data.DataLoader(
        Rows(label_set), 200, num_workers=1, multiprocessing_context=start
    )
    assert torch.equal(torch.cat(list(loader)), expected)
    again = pickle.loads(pickle.dumps(label_set))
    assert torch.equal(again.rows(0, ORDER), label_set.rows(0, ORDER))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from support.object_stores import NEEDED, Server

    for needed in NEEDED:
        pytest.importorskip(needed)
    server = Server()
    server.use(monkeypatch)
    server.new_bucket("bucket")
    yield "s3://bucket/lab/labels"
    server.stop()


def test_rows_from_a_bucket(bucket: str) -> None:
    label_set = make_labels(open_cache(bucket))
    (found,) = list_label_sets(bucket)
    expected = soft_labels(found.encoding, as_tensors(found.read(1, 0, SAMPLES)), CLASSES)[ORDER]
    assert torch.equal(found.rows(1, ORDER), expected)
    assert found.digest == label_set.digest


def test_rows_from_a_label_server(tmp_path: Path) -> None:
    label_set = make_labels(tmp_path)
    with serving(tmp_path) as url:
        (served,) = list_label_sets(url)
        assert torch.equal(served.rows(1, ORDER), label_set.rows(1, ORDER))
        served.storage.close()


def test_a_view_is_compared_with_the_stored_check(label_cache: Path, images: Path) -> None:
    (label_set,) = list_label_sets(label_cache)
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    view = views[17, 2]
    label_set.check(view, 17, 2)
    changed = np.invert(view)
    for other, row, seed in ((changed, 17, 2), (view, 18, 2), (view, 17, 1)):
        with pytest.raises(ViewMismatch, match=f"sample {row} under view seed {seed} is not"):
            label_set.check(other, row, seed)
