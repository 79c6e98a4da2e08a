"""docs/format.md is the format: a reader written from it agrees with the code, now and later."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from support import independent_reader, make_golden
from support.helpers import TINY, tree
from support.independent_reader import FormatError, compare, load_factory, open_folder, open_set
from support.random_labels import make_labels

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels, SsktError
from sskt.teacher_cache.format.encodings import as_tensors, parse_encoding, soft_labels
from sskt.teacher_cache.format.spec import canonical_json, digest_of
from sskt.teacher_cache.label_sets.create import open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.tools.reopen import reopen_policy
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, check_of

Sskt = Callable[..., tuple[int, str, str]]

PAD, RESIZED = "pad-crop-flip", "random-resized-crop-flip:size=20"
ENCODINGS = ("f32", "f16", "root4", "u8", "root4-coarse", "topk-5")
GOLDEN = Path(__file__).parents[2] / "golden"


def make(
    cache: Path,
    target: Target,
    source: Source,
    policy: str = PAD,
    encoding: str = "f16",
    seeds: int = 2,
    rows: int = 16,
) -> LabelSet:
    views = Views(target, parse_policy(policy))
    options = StageOptions(batch_size=32, workers=0, shard_rows=rows)
    report = cache_teachers(views, [source], parse_encoding(encoding), seeds, cache, options)
    return report.label_sets[0]


# --- the independent reader against the stage -----------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("policy", [PAD, RESIZED])
def test_an_independent_reader_agrees(
    images: Path, tiny: Source, tmp_path: Path, policy: str, encoding: str
) -> None:
    made = make(tmp_path, open_target(str(images)), tiny, policy, encoding)
    reader = open_set(made.path)
    assert (reader.seeds, reader.samples, reader.rows, reader.classes) == (2, 60, 16, 12)
    folder = open_folder(images, "train", 60)
    assert folder.ids == list(open_target(str(images)).ids)
    found = compare(reader, folder, load_factory(f"{TINY}:build"))
    assert (found.compared, found.skipped, found.wrong_views) == (120, 0, 0)
    assert found.worst < 1e-5 if encoding == "f32" else found.worst < 5e-3


@pytest.mark.parametrize("policy", ["none", "resize-center-crop:resize=21,size=18"])
def test_the_policies_without_random_words(
    images: Path, tiny: Source, tmp_path: Path, policy: str
) -> None:
    made = make(tmp_path, open_target(str(images), limit=7), tiny, policy)
    folder = open_folder(images, "train", 7)
    found = compare(open_set(made.path), folder, load_factory(f"{TINY}:build"))
    assert (found.compared, found.wrong_views) == (14, 0)


@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (31, 32), (1, 1)])
@pytest.mark.parametrize(
    "policy",
    [
        "random-resized-crop-flip:size=8,scale_min=0.9,ratio_min=0.8,ratio_max=1.25",
        "random-resized-crop-flip:size=30",
        "random-resized-crop-flip:version=1,size=30",
        "resize-center-crop:resize=11,size=8",
        "resize-center-crop:version=1,resize=11,size=8",
        "pad-crop-flip:padding=3",
    ],
)
def test_views_of_odd_shapes(policy: str, shape: tuple[int, int]) -> None:
    """Narrow images reach the fallback of the random resized crop; odd sizes the rounding."""
    rng = np.random.default_rng(5)
    parsed = parse_policy(policy)
    images = rng.integers(0, 256, (40, *shape, 3), np.uint8)
    target = Target("t", "train", ("a",), np.zeros(40, np.int64), [""] * 40, images=images)
    views = Views(target, parsed)
    for sample in range(40):
        for seed in (0, 2**31 - 1):
            ours = views[sample, seed]
            theirs = independent_reader.view_of(images[sample], parsed.identity(), sample, seed)
            assert np.array_equal(ours, theirs), (sample, seed)


def test_a_changed_pixel_is_seen(tmp_path: Path, tiny: Source) -> None:
    """A view check is compared for each view: one pixel of one image, file size unchanged."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.bmp")
    made = make(tmp_path / "cache", open_target(str(tmp_path / "images")), tiny, "none")
    images[1, 8, 8, 0] ^= 1
    Image.fromarray(images[1]).save(folder / "1.bmp")
    opened = open_folder(tmp_path / "images", "train", 3)
    found = compare(open_set(made.path), opened, load_factory(f"{TINY}:build"))
    assert found.wrong_views == 2


@pytest.mark.slow
@pytest.mark.parametrize("policy", [PAD, "random-resized-crop-flip:size=32"])
def test_real_images_and_a_real_network(
    data: Path, cifar: Path, sskt: Sskt, tmp_path: Path, policy: str
) -> None:
    """CIFAR-10 JPEGs (decoded by torchvision there, by Pillow here) and a Places365 network."""
    network = f"{data}/models/squeezenet_places365.py:build"
    status, _, err = sskt(
        *("cache-teachers", "--source", f"places365={network}", "--target", cifar),
        *("--cache", tmp_path, "--seeds", 2, "--limit", 200, "--policy", policy),
        *("--workers", 0, "--device", "cpu"),
    )
    assert status == 0, err
    (path,) = tmp_path.glob("cifar10-train.*")
    reader = open_set(path)
    assert reader.classes == 365 and reader.spec["encoding"]["name"] == "f16"
    assert reader.attributes["classes"][:2] == ["airfield", "airplane_cabin"]
    found = compare(reader, open_folder(cifar, "train", 200), load_factory(network), every=2)
    assert (found.compared, found.wrong_views) == (200, 0)
    assert found.worst_exact < 1e-3


def test_by_hand(images: Path, tiny: Source, tmp_path: Path) -> None:
    """The reader is a program without sskt: it is run as one, isolated from the checkout."""
    made = make(tmp_path, open_target(str(images), limit=6), tiny, RESIZED)
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not [m for m in sys.modules if m.split('.')[0] == 'sskt']"
    )
    script = [independent_reader.__file__, str(made.path), str(images)]
    command = [sys.executable, "-c", code, *script, f"{TINY}:build"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "2 seeds x 6 samples, 12 labels recomputed, 0 skipped, 0 views differ" in run.stdout


# --- metadata as zarr.open gives it ---------------------------------------------------------

ARRAYS: dict[str, dict[str, tuple[str, int, float]]] = {
    "f32": {"labels": ("float32", 12, np.nan)},
    "f16": {"labels": ("float16", 12, np.nan)},
    "u8": {"labels": ("uint8", 12, 0)},
    "root4": {"labels": ("uint16", 12, 0)},
    "root4-coarse": {"labels": ("uint16", 12, 0)},
    "topk-5": {"index": ("uint16", 5, 0), "value": ("float16", 5, np.nan)},
}


CODECS = {
    "f32": (5, "shuffle"),
    "f16": (5, "bitshuffle"),
    "u8": (1, "noshuffle"),
    "root4": (1, "shuffle"),
    "root4-coarse": (1, "shuffle"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("given", "rows", "chunk"), [(7, 7, 7), (512, 512, 512), (9999, 512, 512)])
def test_arrays_are_as_the_page_says(
    images: Path, tiny: Source, tmp_path: Path, encoding: str, given: int, rows: int, chunk: int
) -> None:
    made = make(tmp_path, open_target(str(images), limit=20), tiny, "none", encoding, rows=given)
    group: Any = zarr.open(made.path, mode="r")
    assert isinstance(group, zarr.Group) and set(group.attrs) == {"sskt"}
    expected = {key: ((2, 20, w), d, (w,), f) for key, (d, w, f) in ARRAYS[encoding].items()}
    coordinates = {"seed", "sample", "class"}
    assert set(group.array_keys()) == {*expected, "view_check", *coordinates}
    for name, (shape, dtype, width, fill) in {
        **expected,
        "view_check": ((2, 20), "uint32", (), 0),
    }.items():
        array: Any = group[name]
        assert (array.shape, array.dtype.name) == (shape, dtype)
        assert array.shards == (1, rows, *width) and array.chunks == (1, chunk, *width)
        assert np.array_equal(array.fill_value, fill, equal_nan=True)
        document = json.loads((made.path / name / "zarr.json").read_text())
        (sharding,) = document["codecs"]
        inner = sharding["configuration"]
        assert sharding["name"] == "sharding_indexed" and inner["index_location"] == "end"
        assert [c["name"] for c in inner["index_codecs"]] == ["bytes", "crc32c"]
        assert [c["name"] for c in inner["codecs"]] == ["bytes", "blosc", "crc32c"]
        blosc = inner["codecs"][1]["configuration"]
        one_byte = dtype == "uint8"
        level, shuffle = CODECS[encoding] if name == "labels" else (5, "shuffle")
        assert (blosc["cname"], blosc["clevel"], blosc["shuffle"]) == ("zstd", level, shuffle)
        assert document["chunk_key_encoding"]["configuration"] == {"separator": "/"}
        assert ("configuration" in inner["codecs"][0]) is not one_byte
        last = made.path / name / "c" / "1" / str(-(-20 // rows) - 1)
        assert last.is_file() if name == "view_check" else (last / "0").is_file()


def test_the_last_shard_is_filled_up(images: Path, tiny: Source, tmp_path: Path) -> None:
    """Rows at N and beyond are stored as fill values: seen by widening the shape."""
    made = make(tmp_path, open_target(str(images), limit=20), tiny, rows=16)
    for name in ("labels", "view_check"):
        path = made.path / name / "zarr.json"
        document = json.loads(path.read_text())
        document["shape"][1] = 32
        path.write_text(json.dumps(document))
    group: Any = zarr.open(made.path, mode="r")
    assert np.isnan(group["labels"][:, 20:]).all() and not np.isnan(group["labels"][:, :20]).any()
    assert not group["view_check"][:, 20:].any() and group["view_check"][:, :20].all()


# --- what is missing is named ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "array"),
    [("f16", "labels"), ("u8", "labels"), ("topk-3", "value"), ("topk-3", "index")],
)
def test_a_missing_shard_is_never_fill_values(tmp_path: Path, encoding: str, array: str) -> None:
    path = shutil.copytree(golden_set(encoding), tmp_path / golden_set(encoding).name)
    (path / array / "c" / "1" / "0" / "0").unlink()
    group: Any = zarr.open(path, mode="r")
    row = group[array][1, 0]
    assert np.isnan(row).all() if array in ("value",) or encoding == "f16" else not row.any()
    label_set, reader = open_label_set(path), open_set(path)
    assert label_set.read(0, 0, 4) and label_set.read(1, 4, 7)
    with pytest.raises((IncompleteLabels, CorruptStore), match="seed 1"):
        label_set.read(1, 0, 1)
    with pytest.raises(FormatError, match="seed 1"):
        reader.label(1, 0)
    if array == "index":
        with pytest.raises(FormatError, match="in part"):
            reader.missing()
    else:
        assert reader.missing() == [(1, 0)]
        assert [(s.seed, s.block) for s in label_set.missing(range(2))] == [(1, 0)]


@pytest.mark.parametrize("encoding", ["f32", "f16", "u8", "topk-3"])
def test_an_independent_reader_finds_exchanged_shards(tmp_path: Path, encoding: str) -> None:
    """By the records alone; shards here have three chunks of 512 rows, the last block fewer."""
    label_set = make_labels(tmp_path, encoding, rows=1536, samples=2500)
    reader = open_set(label_set.path)
    for shard in label_set.shards(range(label_set.seeds)):
        reader.require_bound(shard.seed, shard.block)
    array = label_set.arrays[-1]
    first, second = (reader.shard_file(array, seed, 1) for seed in (0, 1))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    for seed in (0, 1):
        reader.require_bound(seed, 0)
        with pytest.raises(FormatError, match="its place and files say"):
            reader.label(seed, 2000)
        with pytest.raises(CorruptStore, match="that the shard's record names"):
            open_label_set(label_set.path).read(seed, 2000, 2001)
    first.write_bytes(one)
    (label_set.path / "view_check" / "c" / "1" / "1.json").unlink()
    assert reader.missing() == [(1, 1)]


# --- identity -------------------------------------------------------------------------------


def test_canonical_json_literally() -> None:
    value = {
        "b": 1.0,
        "a": [1, 1e-05, 1e16, 0.08, True, None],
        "ä": 'é"\\\n😀',
        "B": {"z": 0, "y": -0.5},
    }
    text = (
        '{"B":{"y":-0.5,"z":0},"a":[1,1e-05,1e+16,0.08,true,null],"b":1.0,'
        r'"\u00e4":"\u00e9\"\\\n\ud83d\ude00"}'
    )
    assert canonical_json(value) == text
    assert independent_reader.canonical_json(value) == text


KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_readers_philox(counter: Any, key: Any, words: str) -> None:
    """The known answers that Random123 publishes (kat_vectors, philox 4x32 10)."""
    assert " ".join(f"{w:08x}" for w in independent_reader.philox(counter, key)) == words


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The set with changed attributes, its digest (and so its name) made to fit."""
    document = json.loads((path / "zarr.json").read_text())
    attributes = document["attributes"]["sskt"]
    change(attributes)
    attributes["digest"] = digest_of(attributes["spec"])
    (path / "zarr.json").write_text(json.dumps(document))
    return path.rename(path.with_name(f"x.y.{attributes['digest'][:12]}"))


def test_what_a_later_version_adds_is_ignored(tmp_path: Path) -> None:
    path = shutil.copytree(golden_set("f16"), tmp_path / "cache" / golden_set("f16").name)
    group: Any = zarr.open(path, mode="r+")
    group.create_array("confidence", shape=(2, 7), dtype="f4")
    (path / "notes.txt").write_text("later")
    path = edited(path, lambda a: a.update(future={"x": 1}))
    read = open_label_set(path).read(1, 0, 7)["labels"]
    kept = open_label_set(golden_set("f16")).read(1, 0, 7)["labels"]
    assert np.array_equal(read, kept, equal_nan=True)
    assert open_set(path).label(1, 5) is not None


REFUSED: dict[str, Callable[[dict[str, Any]], None]] = {
    "format": lambda a: a.update(format=2),
    "encoding": lambda a: a["spec"]["encoding"].update(name="zip"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_reader_cannot_know_is_refused(tmp_path: Path, sskt: Sskt, what: str) -> None:
    path = shutil.copytree(golden_set("f16"), tmp_path / "cache" / golden_set("f16").name)
    path = edited(path, REFUSED[what])
    with pytest.raises(FormatError, match=what):
        open_set(path)
    with pytest.raises(SsktError, match=what):
        open_label_set(path).read(0, 0, 1)
    status, out, err = sskt("verify", "--cache", tmp_path / "cache")
    assert status == 1 and what in out + err and "unexpected" not in err


# --- the golden store: written once, read forever -------------------------------------------


def golden_set(encoding: str) -> Path:
    """The committed set of an encoding (``topk-3`` for topk)."""
    return make_golden.sets()[encoding]


DIGESTS = {
    "f16": "981233b7bf860f2fe8b97a24c6b9bc3a81b68346917b81412a97430213c15fbd",
    "f32": "1024fba2c11b64973a20b171cdd492c6baa47ca6fa0e0a4b995bf133e4623bc5",
    "root4": "42e1766653ddcdc31615849e73750871210ce8a8d643538e41a4355188590de2",
    "root4-coarse": "c1e6b0576bbdc80f3791994e5e096a26637b4defdc7f4c699e9a266a1aebf334",
    "topk-3": "1eff8e095ac26305862d4b87caf02e4668c1ce12e7fcaba8ce1ef56526d5ce0a",
    "u8": "23e3dcf7129e65b1d0606df626b4cd025d114000d1fd31bf3a8055a067034bab",
}

# Rows (seed 0, sample 0) and (seed 1, sample 5), as stored, then decoded at T = 1 and T = 3.
STORED: dict[str, list[dict[str, list[float]]]] = {
    "f16": [
        {
            "labels": [
                -11.4296875,
                -24.125,
                -7.25390625,
                -3.341796875,
                -70.0,
                -47.59375,
                -52.03125,
                -10.1484375,
                -29.28125,
                -0.03680419921875,
                -52.0,
                -26.859375,
            ]
        },
        {
            "labels": [
                -17.296875,
                -32.71875,
                -4.609375,
                -5.01171875,
                -84.4375,
                -42.53125,
                -73.375,
                -13.625,
                -31.71875,
                -0.016754150390625,
                -59.75,
                -13.1640625,
            ]
        },
    ],
    "f32": [
        {
            "labels": [
                -20.52224349975586,
                -68.92636108398438,
                -44.14749526977539,
                -35.70802307128906,
                -101.1825180053711,
                -97.11064147949219,
                -81.23062133789062,
                -37.00836944580078,
                -70.47859191894531,
                0.0,
                -89.53850555419922,
                -37.81065368652344,
            ]
        },
        {
            "labels": [
                -12.381884574890137,
                -50.43045425415039,
                -21.29778480529785,
                -8.992575645446777,
                -127.09278869628906,
                -88.85765838623047,
                -97.40252685546875,
                -11.367613792419434,
                -57.50648880004883,
                -0.00014006110723130405,
                -92.69937896728516,
                -44.28943634033203,
            ]
        },
    ],
    "root4": [
        {"labels": [27, 1, 75, 201, 0, 0, 0, 37, 0, 459, 0, 1]},
        {"labels": [6, 0, 150, 136, 0, 0, 0, 16, 0, 474, 0, 18]},
    ],
    "root4-coarse": [
        {"labels": [1, 0, 0, 0, 0, 0, 0, 0, 0, 119, 0, 0]},
        {"labels": [4, 0, 0, 10, 0, 0, 0, 6, 0, 99, 0, 0]},
    ],
    "topk-3": [
        {"index": [9, 3, 2], "value": [-0.03680419921875, -3.341796875, -7.25390625]},
        {"index": [9, 2, 3], "value": [-0.016754150390625, -4.609375, -5.01171875]},
    ],
    "u8": [
        {"labels": [8, 0, 0, 1, 0, 0, 0, 1, 0, 255, 0, 0]},
        {"labels": [32, 0, 7, 57, 0, 0, 0, 38, 0, 255, 0, 0]},
    ],
}

DECODED: dict[str, list[dict[int, list[float]]]] = {
    "f16": [
        {
            1: [
                1.0868052e-05,
                3.3315592e-11,
                0.0007074088,
                0.035373495,
                3.9754673e-31,
                2.1394341e-21,
                2.5299804e-23,
                3.9137358e-05,
                1.920068e-13,
                0.96386909,
                2.6102906e-23,
                2.1633339e-12,
            ],
            3: [
                0.015153027,
                0.00022012263,
                0.060954484,
                0.22456471,
                5.0301187e-11,
                8.8148545e-08,
                2.008266e-08,
                0.023226263,
                3.9465812e-05,
                0.67575333,
                2.0292947e-08,
                8.8475569e-05,
            ],
        },
        {
            1: [
                3.0765218e-08,
                6.1719839e-15,
                0.0099579797,
                0.0066594071,
                2.1343078e-37,
                3.3799493e-19,
                1.3603158e-32,
                1.2098598e-06,
                1.6777192e-14,
                0.98337945,
                1.1243514e-26,
                1.918305e-06,
            ],
            3: [
                0.002200492,
                1.2881746e-05,
                0.15108576,
                0.13212297,
                4.1968051e-13,
                4.891813e-07,
                1.6764079e-11,
                0.0074830412,
                1.7977924e-05,
                0.69835058,
                1.5732599e-09,
                0.0087258085,
            ],
        },
    ],
    "f32": [
        {
            1: [
                1.2226521e-09,
                1.1632196e-30,
                6.7140785e-20,
                3.1060084e-16,
                1.1402255e-44,
                6.6893554e-43,
                5.2721698e-36,
                8.4619288e-17,
                2.4634085e-31,
                1.0,
                1.2999335e-39,
                3.7935145e-17,
            ],
            3: [
                0.0010681453,
                1.0505497e-10,
                4.0599889e-07,
                6.7649343e-06,
                2.2483278e-15,
                8.7362315e-15,
                1.7385713e-12,
                4.3855005e-06,
                6.2619298e-11,
                0.99891694,
                1.0901922e-13,
                3.3564225e-06,
            ],
        },
        {
            1: [
                4.1938784e-06,
                1.2540995e-22,
                5.6297559e-10,
                0.00012432945,
                6.372402e-56,
                2.5680843e-39,
                4.9959726e-43,
                1.1563999e-05,
                1.0598618e-25,
                0.99985991,
                5.510249e-41,
                5.8256203e-20,
            ],
            3: [
                0.014802645,
                4.5945681e-08,
                0.00075793255,
                0.045813349,
                3.6663599e-19,
                1.2570054e-13,
                7.28351e-15,
                0.020757261,
                4.3439396e-09,
                0.91786841,
                3.4929399e-14,
                3.5583453e-07,
            ],
        },
    ],
    "root4": [
        {
            1: [
                1.1539827e-05,
                2.171422e-11,
                0.00068705149,
                0.035442836,
                8.4821172e-14,
                8.4821172e-14,
                8.4821172e-14,
                4.0695944e-05,
                8.4821172e-14,
                0.96381788,
                8.4821172e-14,
                2.171422e-11,
            ],
            3: [
                0.01545379,
                0.00019078753,
                0.060343664,
                0.22463533,
                3.0047154e-05,
                3.0047154e-05,
                3.0047154e-05,
                0.023522616,
                3.0047154e-05,
                0.67551279,
                3.0047154e-05,
                0.00019078753,
            ],
        },
        {
            1: [
                2.5249461e-08,
                7.610394e-14,
                0.0098630706,
                0.0066650397,
                7.610394e-14,
                7.610394e-14,
                7.610394e-14,
                1.2768122e-06,
                7.610394e-14,
                0.98346854,
                7.610394e-14,
                2.0452063e-06,
            ],
            3: [
                0.0020604272,
                2.9762926e-05,
                0.15061814,
                0.13217241,
                2.9762926e-05,
                2.9762926e-05,
                2.9762926e-05,
                0.0076193089,
                2.9762926e-05,
                0.69843618,
                2.9762926e-05,
                0.0089149507,
            ],
        },
    ],
    "root4-coarse": [
        {
            1: [
                4.9866875e-09,
                1.9479248e-11,
                1.9479248e-11,
                1.9479248e-11,
                1.9479248e-11,
                1.9479248e-11,
                1.9479248e-11,
                1.9479248e-11,
                1.9479248e-11,
                0.99999999,
                1.9479248e-11,
                1.9479248e-11,
            ],
            3: [
                0.0017009742,
                0.00026788665,
                0.00026788665,
                0.00026788665,
                0.00026788665,
                0.00026788665,
                0.00026788665,
                0.00026788665,
                0.00026788665,
                0.99562016,
                0.00026788665,
                0.00026788665,
            ],
        },
        {
            1: [
                2.6646917e-06,
                4.0659968e-11,
                4.0659968e-11,
                0.00010408952,
                4.0659968e-11,
                4.0659968e-11,
                4.0659968e-11,
                1.3490002e-05,
                4.0659968e-11,
                0.99987976,
                4.0659968e-11,
                4.0659968e-11,
            ],
            3: [
                0.012749261,
                0.00031622173,
                0.00031622173,
                0.043258524,
                0.00031622173,
                0.00031622173,
                0.00031622173,
                0.021891391,
                0.00031622173,
                0.91957105,
                0.00031622173,
                0.00031622173,
            ],
        },
    ],
    "topk-3": [
        {
            1: [
                6.0458714e-06,
                6.0458714e-06,
                0.00070740568,
                0.035373339,
                6.0458714e-06,
                6.0458714e-06,
                6.0458714e-06,
                6.0458714e-06,
                6.0458714e-06,
                0.96386484,
                6.0458714e-06,
                6.0458714e-06,
            ],
            3: [
                0.01160986,
                0.01160986,
                0.05678455,
                0.20920209,
                0.01160986,
                0.01160986,
                0.01160986,
                0.01160986,
                0.01160986,
                0.62952462,
                0.01160986,
                0.01160986,
            ],
        },
        {
            1: [
                0.0,
                0.0,
                0.0099580112,
                0.0066594282,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.98338256,
                0.0,
                0.0,
            ],
            3: [0.0, 0.0, 0.15392423, 0.13460518, 0.0, 0.0, 0.0, 0.0, 0.0, 0.71147059, 0.0, 0.0],
        },
    ],
    "u8": [
        {
            1: [
                9.5345201e-10,
                0.0,
                0.0,
                3.6371308e-15,
                0.0,
                0.0,
                0.0,
                3.6371308e-15,
                0.0,
                1.0,
                0.0,
                0.0,
            ],
            3: [
                0.00098323885,
                0.0,
                0.0,
                1.5363107e-05,
                0.0,
                0.0,
                0.0,
                1.5363107e-05,
                0.0,
                0.99898603,
                0.0,
                0.0,
            ],
        },
        {
            1: [
                3.9047943e-06,
                0.0,
                4.2784507e-10,
                0.00012472325,
                0.0,
                0.0,
                0.0,
                1.0949641e-05,
                0.0,
                0.99986042,
                0.0,
                0.0,
            ],
            3: [
                0.014465116,
                0.0,
                0.00069217838,
                0.045895665,
                0.0,
                0.0,
                0.0,
                0.020398073,
                0.0,
                0.91854897,
                0.0,
                0.0,
            ],
        },
    ],
}

CHECKS = {
    "pad-crop-flip": [
        [0xB958A682, 0x8C9FCB40, 0xECC2F6DF, 0x00000000, 0x33DB3C73, 0x8D36AF7C, 0x27A08370],
        [0xD9CAFE66, 0x9B1749FE, 0x5DE47A20, 0x00000000, 0x3F6E1301, 0x45C111CE, 0x79F4DBD2],
    ],
    "random-resized-crop-flip": [
        [0x80225CDF, 0x30214807, 0xF9081AB9, 0x00000000, 0xD81EF154, 0xE0300A25, 0x1AFD1EAB],
        [0x2C50329C, 0x1316BC24, 0x89CDA73E, 0x00000000, 0x99B3F457, 0x2E1F077A, 0x5E59A3D0],
    ],
}
PLACES = ((0, 0), (1, 5))
BAD = 3


@pytest.mark.parametrize("encoding", STORED)
def test_golden_labels(encoding: str) -> None:
    path = golden_set(encoding)
    label_set, reader = open_label_set(path), open_set(path)
    assert label_set.digest == DIGESTS[encoding] == digest_of(label_set.spec)
    assert str(label_set.encoding) == encoding
    assert (label_set.seeds, label_set.samples, label_set.shard_rows) == (2, 7, 4)
    for place, stored, decoded in zip(PLACES, STORED[encoding], DECODED[encoding], strict=True):
        seed, sample = place
        encoded = label_set.read(seed, sample, sample + 1)
        assert {key: rows[0].tolist() for key, rows in encoded.items()} == stored
        assert {key: reader.stored(key, seed, sample).tolist() for key in stored} == stored
        for temperature, p in decoded.items():
            soft = soft_labels(label_set.encoding, as_tensors(encoded), 12, temperature)
            assert soft.dtype == torch.float32
            assert soft[0].tolist() == pytest.approx(p, rel=2e-4, abs=1e-30), temperature
            other = reader.label(seed, sample, temperature)
            assert other is not None and other.tolist() == pytest.approx(p, rel=1e-6, abs=1e-45)


@pytest.mark.parametrize("encoding", STORED)
def test_golden_views(encoding: str) -> None:
    """Checks and pixels: a Pillow or numpy that changes a view is seen here first."""
    path = golden_set(encoding)
    label_set, reader = open_label_set(path), open_set(path)
    target = open_target(str(GOLDEN / "images"))
    assert target.fingerprint == label_set.spec["target"]["fingerprint"]
    folder = open_folder(GOLDEN / "images", "train", 7)
    assert folder.ids == list(target.ids)
    views = Views(target, reopen_policy(label_set))
    for seed, checks in enumerate(CHECKS[label_set.spec["views"]["policy"]]):
        assert label_set.read_checks(seed, 0, 7).tolist() == checks
        for sample in set(range(7)) - {BAD}:
            assert reader.check(seed, sample) == checks[sample]
            assert check_of(views[sample, seed]) == checks[sample]
            view = independent_reader.view_of(
                folder.image(sample), reader.spec["views"], sample, seed
            )
            assert independent_reader.crc_of(view) == checks[sample]


@pytest.mark.parametrize("encoding", STORED)
def test_golden_skipped_row(encoding: str) -> None:
    path = golden_set(encoding)
    label_set, reader = open_label_set(path), open_set(path)
    for seed in range(2):
        skipped = label_set.encoding.skipped(label_set.read(seed, 0, 7))
        assert skipped.tolist() == [i == BAD for i in range(7)]
        assert [reader.label(seed, i) is None for i in range(7)] == skipped.tolist()
        assert reader.check(seed, BAD) == 0


def test_golden_store_verifies_and_is_not_written_to(sskt: Sskt) -> None:
    before = tree(GOLDEN)
    status, out, err = sskt("verify", "--cache", GOLDEN / "cache", "--json")
    assert status == 0, out + err
    reports = json.loads(out)
    assert [(r["shards"], r["rows"], r["skipped"], r["problems"]) for r in reports] == [
        (4, 14, 2, [])
    ] * 6
    assert sskt("ls", "--cache", GOLDEN / "cache")[0] == 0
    assert tree(GOLDEN) == before


def test_golden_store_is_never_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(GOLDEN)
    assert make_golden.main() == 1 and "never made again" in capsys.readouterr().err
    assert tree(GOLDEN) == before
