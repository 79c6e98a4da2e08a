"""Label sets by name in other tools: xarray, Zarr and tensorstore, from every kind of cache."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.helpers import TINY, tree
from support.object_stores import NEEDED, Server, raw
from support.random_labels import CLASSES, SAMPLES, SEEDS, make_labels, writer_of
from support.servers import serving

from sskt.cli.main import run
from sskt.teacher_cache.format.coordinates import SEED_CHUNK, read_coordinate
from sskt.teacher_cache.format.encodings import decoded, parse_encoding
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.tools.export import export_label_set
from sskt.teacher_cache.tools.remove import remove_label_set
from sskt.teacher_cache.tools.verify import bind, verify

Sskt = Callable[..., tuple[int, str, str]]
ENCODINGS = ("f32", "f16", "u8", "root4", "topk-3")
NAMED = "4/18.jpg"
"""Sample 18 of ``make_labels``."""


def opened(store: Any) -> Any:
    """The label set as xarray opens it without any option."""
    xarray = pytest.importorskip("xarray")
    return xarray.open_zarr(store, chunks=None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LabelSet]:
    """A label set of each encoding, with the names of its samples."""
    folder = tmp_path_factory.mktemp("made")
    return {e: make_labels(folder / e, e) for e in ENCODINGS}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_xarray_opens_labels_by_name(made: dict[str, LabelSet], encoding: str) -> None:
    label_set = made[encoding]
    dataset = opened(label_set.path)
    assert dict(dataset.sizes)["seed"] == SEEDS and dict(dataset.sizes)["sample"] == SAMPLES
    assert list(dataset["class"].values) == [f"class {i}" for i in range(CLASSES)]
    row = dataset.sel(seed=2, sample=NAMED)
    own = label_set.read(2, 18, 19)
    assert int(row.view_check) == label_set.read_checks(2, 18, 19)[0]
    p = decoded(label_set.encoding, own, CLASSES)[0]
    if encoding in ("f32", "f16"):
        assert dataset.labels.dims == ("seed", "sample", "class")
        assert dataset.labels.attrs["long_name"] == "log-probability of the class"
        assert np.allclose(np.exp(row.labels.values.astype(float)), p, atol=2e-3)
        assert np.isclose(float(row.labels.sel({"class": "class 3"})), own["labels"][0, 3])
    elif encoding == "root4":
        code = np.maximum(row.labels.values, 0.25) ** 4
        assert row.labels.dtype == np.uint16 and np.allclose(code / code.sum(), p)
    elif encoding == "u8":
        code = (row.labels.values / 255.0) ** 6
        assert row.labels.dtype == np.uint8 and np.allclose(code / code.sum(), p)
    else:
        assert dataset["value"].dims == dataset["index"].dims == ("seed", "sample", "rank")
        best = dataset["class"].values[row["index"].values]
        assert best[0] == f"class {p.argmax()}"
        assert np.allclose(np.exp(row.value.values.astype(float)), np.sort(p)[::-1][:3], atol=2e-3)


def test_the_stage_writes_the_names_of_the_target(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    common = ["cache-teachers", "--target", images, "--cache", cache, "--workers", 0]
    more = ["--source", f"tiny={TINY}:build", "--policy", "none", "--seeds", 1, "--limit", 9]
    assert run([str(a) for a in (*common, *more)]) == 0
    (label_set,) = list_label_sets(cache)
    names = label_set.sample_names()
    assert names and len(names) == 9 and (images / "train" / names[4]).is_file()
    dataset = opened(label_set.path)
    p = np.exp(dataset.labels.sel(seed=0, sample=names[4]).values.astype(float))
    assert np.allclose(p, label_set.rows(0, [4])[0], atol=2e-3)


def test_names_that_are_no_utf8(tmp_path: Path, made: dict[str, LabelSet]) -> None:
    like = made["f16"]
    odd = os.fsdecode(b"caf\xe9.jpg")
    names = [odd, "b/\N{SNOWMAN}.jpg", "", *map(str, range(SAMPLES - 3))]
    label_set = create_label_set(tmp_path, like.spec, like.classes, 1, samples=names)
    label_set.close()
    assert label_set.sample_names() == ["caf\\xe9.jpg", *names[1:]]
    assert opened(label_set.path)["sample"].values[1] == "b/\N{SNOWMAN}.jpg"


def test_a_set_without_names_of_samples(tmp_path: Path, made: dict[str, LabelSet]) -> None:
    like = made["f16"]
    label_set = create_label_set(tmp_path, like.spec, like.classes, 2)
    label_set.close()
    assert label_set.coordinates == ["seed", "class"] and label_set.sample_names() is None
    assert "sample" not in opened(label_set.path).coords
    assert not [p for p in verify(label_set).problems if "missing" not in p]


def test_growing_and_removing_seeds_keeps_the_names_right(
    tmp_path: Path, made: dict[str, LabelSet]
) -> None:
    path = shutil.copytree(made["f16"].path, tmp_path / "cache" / made["f16"].name)
    writer = create_label_set(path.parent, made["f16"].spec, made["f16"].classes, 5)
    writer.close()
    assert list(opened(path).seed.values) == [0, 1, 2, 3, 4]
    assert opened(path).labels.shape[0] == 5
    remove_label_set(path.parent, path.name, [2, 3, 4])
    label_set = open_label_set(path)
    assert list(opened(path).seed.values) == [0, 1] and verify(label_set).problems == []
    many = writer_of(label_set)
    many.grow(SEED_CHUNK + 2)
    read = LocalStorage(path).read
    assert read_coordinate(read, "seed", SEED_CHUNK + 2) == [*range(SEED_CHUNK + 2)]


def test_an_older_version_that_adds_seeds(tmp_path: Path, made: dict[str, LabelSet]) -> None:
    """It leaves the repetition in the group behind, which ``verify --bind`` mends."""
    path = shutil.copytree(made["f16"].path, tmp_path / "cache" / made["f16"].name)
    for name in ("labels", "view_check", "seed"):
        document = json.loads((path / name / "zarr.json").read_text())
        document["shape"][0] -= 1
        (path / name / "zarr.json").write_text(json.dumps(document, indent=2))
    (problem,) = verify(open_label_set(path)).problems
    assert "does not repeat the metadata" in problem and "verify --bind" in problem
    assert bind(path.parent, open_label_set(path)).problems == []
    assert list(opened(path).seed.values) == [0, 1]


def swapped_names(path: Path, name: str) -> None:
    """Rewrites a coordinate through Zarr, so that all checksums are right."""
    import zarr

    array: Any = zarr.open_array(path / name, mode="r+")
    array[:2] = array[:2][::-1].copy()


@pytest.mark.parametrize("name", ["seed", "class"])
def test_names_that_contradict_the_set_are_found(
    tmp_path: Path, made: dict[str, LabelSet], sskt: Sskt, name: str
) -> None:
    path = shutil.copytree(made["f16"].path, tmp_path / "cache" / made["f16"].name)
    swapped_names(path, name)
    status, out, _ = sskt("verify", "--cache", tmp_path / "cache")
    assert status == 1 and f"{name}: the names are not those of the set" in out
    status, _, err = sskt("copy", tmp_path / "cache", tmp_path / "to")
    assert status == 1 and f"{name}: the names are not those of the set" in err


def test_names_of_other_samples_are_found(images: Path, tmp_path: Path, sskt: Sskt) -> None:
    source = ("--source", f"tiny={TINY}:build")
    more = ("--policy", "none", "--seeds", 1, "--limit", 9, "--workers", 0)
    assert sskt("cache-teachers", "--target", images, "--cache", tmp_path, *source, *more)[0] == 0
    (label_set,) = list_label_sets(tmp_path)
    check = ("verify", "--cache", tmp_path, "--recompute", 2, *source)
    assert sskt(*check)[0] == 0
    swapped_names(label_set.path, "sample")
    status, out, _ = sskt(*check)
    assert status == 1 and "the names of its samples are not those of the target" in out


def test_export_and_copy_carry_the_names(tmp_path: Path, made: dict[str, LabelSet]) -> None:
    done = export_label_set(made["f32"], parse_encoding("u8"), tmp_path / "out")
    exported = open_label_set(tmp_path / "out" / done.name)
    assert exported.sample_names() == made["f32"].sample_names()
    assert opened(exported.path).labels.sel(seed=1, sample=NAMED).shape == (CLASSES,)
    assert tree(exported.path) == tree(made["u8"].path) or verify(exported).problems == []


def test_sets_of_version_0_1_stay_as_they_are(made: dict[str, LabelSet], tmp_path: Path) -> None:
    """Without coordinates and repetition a set is whole, and growing adds none."""
    path = shutil.copytree(made["f16"].path, tmp_path / made["f16"].name)
    for name in ("seed", "sample", "class"):
        shutil.rmtree(path / name)
    document = json.loads((path / "zarr.json").read_text())
    del document["consolidated_metadata"], document["attributes"]["sskt"]["coordinates"]
    (path / "zarr.json").write_text(json.dumps(document))
    label_set = open_label_set(path)
    assert label_set.coordinates == [] and label_set.constant_keys() == []
    assert verify(label_set).problems == []
    writer_of(label_set).grow(5)
    assert "consolidated_metadata" not in (path / "zarr.json").read_text()


# --- other tools, other places ----------------------------------------------------------------


@pytest.fixture(scope="module")
def url(made: dict[str, LabelSet]) -> Iterator[str]:
    """A label server over the f16 label set."""
    with serving(made["f16"].path.parent) as address:
        yield f"{address}/zarr/{made['f16'].name}"


@pytest.fixture(scope="module")
def bucket(made: dict[str, LabelSet]) -> Iterator[str]:
    """The same label set in a bucket, copied there."""
    for needed in NEEDED:
        pytest.importorskip(needed)
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        server.use(patch)
        server.new_bucket("published")
        try:
            copy = ["copy", str(made["f16"].path.parent), "s3://published/labels", "--publish"]
            assert run(copy) == 0
            yield f"s3://published/labels/{made['f16'].name}"
        finally:
            server.stop()


def test_xarray_from_the_server(made: dict[str, LabelSet], url: str) -> None:
    pytest.importorskip("fsspec")
    row = opened(url).labels.sel(seed=1, sample=NAMED)
    assert np.array_equal(row.values, made["f16"].read(1, 18, 19)["labels"][0])


def test_xarray_from_a_bucket(made: dict[str, LabelSet], bucket: str) -> None:
    from zarr.storage import ObjectStore

    row = opened(ObjectStore(raw(bucket), read_only=True)).labels.sel(seed=1, sample=NAMED)
    assert np.array_equal(row.values, made["f16"].read(1, 18, 19)["labels"][0])
    found = open_label_set(bucket)
    assert found.sample_names() == made["f16"].sample_names() and verify(found).problems == []
    listed = json.loads(found.storage.read("files.json"))["files"]
    assert listed == {key: size for key, size in found.storage.sizes().items() if key in listed}
    assert {*found.constant_keys(), *found.shard_keys(found.shard(2, 1))} < set(listed)


def test_zarr_opens_the_group(made: dict[str, LabelSet], url: str) -> None:
    import zarr

    for store in (str(made["f16"].path), url):
        group: Any = zarr.open_group(store, mode="r")
        assert list(group["class"][:3]) == ["class 0", "class 1", "class 2"]
        assert group["labels"].metadata.dimension_names == ("seed", "sample", "class")


def test_tensorstore_opens_the_numbers(made: dict[str, LabelSet], url: str) -> None:
    """It has no strings: the names are in the group's zarr.json, or come by Zarr."""
    tensorstore = pytest.importorskip("tensorstore")
    path = made["f16"].path
    places = ({"driver": "file", "path": f"{path}/"}, {"driver": "http", "base_url": f"{url}/"})
    for kvstore in places:
        spec = {"driver": "zarr3", "kvstore": kvstore, "path": "labels"}
        found = tensorstore.open(spec, read=True).result()
        assert found.domain.labels == ("seed", "sample", "class")
        row = found[tensorstore.d["seed"][1]][tensorstore.d["sample"][18]].read().result()
        assert np.array_equal(row, made["f16"].read(1, 18, 19)["labels"][0])
