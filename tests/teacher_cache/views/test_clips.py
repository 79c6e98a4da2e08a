"""Clips: their policies, their views under many seeds, f_s, and the whole way on real videos."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import operator
import os
import pickle
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support.clips import SMALL, pattern
from support.helpers import TINY, one_line, write_frames
from support.independent_reader import (
    below,
    canonical_json,
    center_crop,
    crc_of,
    distance,
    load_factory,
    log_probabilities,
    open_set,
    philox,
    resized,
)

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import BadImage, MissingData, UnknownName
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.format.spec import digest_of, label_set_spec
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.labeling import run as stage
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.registry import default_policy
from sskt.teacher_cache.views.frame_sampling import parse_frame_sampling
from sskt.teacher_cache.views.policies import POLICIES, clip_frames, evaluation_policy, parse_policy
from sskt.teacher_cache.views.views import open_views

Sskt = Callable[..., tuple[int, str, str]]
Int64 = NDArray[np.int64]

CLIPS = [name for name, info in POLICIES.items() if info.per_clip]
SOURCE = f"tiny={TINY}:build"
WINDOWS = "clip-center-crop:frames=4,size=20"
FAR = 2**32 + 7
PLACES = ((0, 0), (1, 0), (0, 1), (12345, 9), (FAR, 2**31))
"""Sample, seed."""


COUNTS = (9, 3, 6, 12)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of 9, 3, 6 and 12 frames of 24 x 30 pixels in two classes."""
    folder = tmp_path_factory.mktemp("made") / "clips"
    for i, count in enumerate(COUNTS):
        name = folder / "train" / ("run", "swim")[i // 2] / f"video {i}"
        write_frames(name, pattern(100 + count, 24, 30)[100 - i :][:count])
    return folder


def frames_of(folder: Path, sample: int) -> UInt8:
    """All frames of a clip of ``made``."""
    files = sorted((folder / "train").glob("*/*"))[sample].glob("image_*.jpg")
    return np.stack([np.asarray(Image.open(file)) for file in sorted(files)])


# --- the rules, once more and independently -----------------------------------------------------


def words_of(views: dict[str, Any], sample: int, seed: int) -> tuple[int, int, int, int]:
    """Block 0 of the view's random words (docs/format.md, section 6)."""
    named = {key: views[key] for key in ("policy", "version", "parameters")}
    key = zlib.crc32(canonical_json(named).encode())
    return philox((sample & 0xFFFFFFFF, sample >> 32, 0, 0), (seed, key))


def numbers_by_rule(views: dict[str, Any], sample: int, seed: int, count: int) -> list[int]:
    """The frames of a training view."""
    depth = views["parameters"]["frames"]
    start = below(words_of(views, sample, seed)[0], max(1, count - depth + 1))
    return [start + i % min(depth, count - start) for i in range(depth)]


def crop_by_rule(
    views: dict[str, Any], sample: int, seed: int, height: int, width: int
) -> tuple[int, int, int, bool]:
    """Top, left, side and flip of a training view."""
    _, w1, w2, w3 = words_of(views, sample, seed)
    scale, place = below(w1, views["parameters"]["scales"]), below(w2, 5)
    side = int(min(height, width) * 2 ** (-scale / 4))
    top = (0, 0, height - side, height - side, (height - side) // 2)[place]
    left = (0, width - side, 0, width - side, (width - side) // 2)[place]
    return top, left, side, below(w3, 2) == 1


def view_by_rule(
    frames: Sequence[UInt8] | UInt8, views: dict[str, Any], sample: int, seed: int
) -> UInt8:
    """A training view of a clip from all its frames."""
    size, version = views["parameters"]["size"], views["version"]
    top, left, side, flip = crop_by_rule(views, sample, seed, *frames[0].shape[:2])
    clip = np.stack([frames[n] for n in numbers_by_rule(views, sample, seed, len(frames))])
    made = resized(clip[:, top : top + side, left : left + side], size, size, version)
    return made[:, :, ::-1] if flip else made


def window_by_rule(frames: UInt8, views: dict[str, Any], start: int) -> UInt8:
    """An evaluation view: the window of a clip that begins at frame ``start``."""
    depth, size = views["parameters"]["frames"], views["parameters"]["size"]
    taken = [start + i % min(depth, len(frames) - start) for i in range(depth)]
    return center_crop(frames[taken], size, size, views["version"])


@pytest.mark.parametrize(
    "text",
    [
        SMALL,
        "clip-corner-crop-flip:frames=16,size=12,scales=3",
        "clip-corner-crop-flip:version=1,frames=4,size=20",
    ],
)
def test_training_views_are_the_rules(made: Path, text: str) -> None:
    views = open_views(open_target(str(made)), parse_policy(text))
    for sample, seed in itertools.product(range(4), (0, 1, 2, 2**31 - 1)):
        expected = view_by_rule(frames_of(made, sample), views.identity(), sample, seed)
        np.testing.assert_array_equal(views[sample, seed], expected)


@pytest.mark.parametrize("version", [1, 2])
def test_evaluation_views_are_the_rules_under_every_seed(made: Path, version: int) -> None:
    policy = parse_policy(f"clip-center-crop:version={version},frames=4,size=20")
    views = open_views(open_target(str(made)), policy)
    rows = [(i, start) for i, count in enumerate(COUNTS) for start in range(0, count, 4)]
    assert len(views.target) == len(rows) == 9
    for row, (video, start) in enumerate(rows):
        expected = window_by_rule(frames_of(made, video), views.identity(), start)
        for seed in (0, 5):
            np.testing.assert_array_equal(views[row, seed], expected)


def test_views_of_a_real_clip_are_the_rules(data: Path) -> None:
    import av
    from av.video.reformatter import Interpolation

    target = open_target("ucf101", root=data / "ucf101", partial=True, limit=1)
    assert target.paths is not None and target.frames is not None
    how = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    with av.open(str(target.paths[0])) as container:
        frames = [
            np.asarray(frame.reformat(format="rgb24", interpolation=how).to_ndarray(), np.uint8)
            for frame in container.decode(video=0)
        ]
    assert len(frames) == target.frames[0]
    views = open_views(target, parse_policy(default_policy("ucf101")))
    assert views.policy.parameters == {"frames": 16, "size": 112, "scales": 5}
    for seed in range(3):
        expected = view_by_rule(frames, views.identity(), 0, seed)
        np.testing.assert_array_equal(views[0, seed], expected)


# --- pinned forever -----------------------------------------------------------------------------

GOLDEN_VIEWS: dict[str, list[int]] = {
    "clip-corner-crop-flip:version=1,frames=4,size=16": [
        3342940182,
        311700861,
        1940268835,
        1191363909,
        3979952955,
    ],
    "clip-corner-crop-flip:version=1,frames=16,size=23,scales=2": [
        34082997,
        724383157,
        34082997,
        705072511,
        724383157,
    ],
    "clip-center-crop:version=1,frames=8,size=15": [3093914614] * 5,
    "clip-corner-crop-flip:version=2,frames=4,size=16": [
        2956652928,
        1367630235,
        596276979,
        768885371,
        3038209176,
    ],
    "clip-corner-crop-flip:version=2,frames=16,size=23,scales=2": [
        3062101239,
        165726577,
        3871196362,
        1209723128,
        3177668790,
    ],
    "clip-center-crop:version=2,frames=8,size=15": [597378204] * 5,
}
"""CRC-32 of the view of a clip of the 11 frames ``pattern(11, 20, 26)`` at each of ``PLACES``."""


def made_views(text: str, place: tuple[int, int], count: int = 11) -> UInt8:
    """The view of ``pattern`` as sample ``place[0]``, from the functions of the table alone."""
    policy, frames = parse_policy(text), pattern(count, 20, 26)
    info = POLICIES[policy.name]
    assert info.per_clip is not None
    numbers = clip_frames(policy, *place, 8 if info.windows else None, count)
    return info.per_clip(policy, [frames[n] for n in numbers], *place)


def test_every_version_of_every_policy_of_clips_has_golden_views() -> None:
    versions = {(name, v) for name in CLIPS for v in range(1, POLICIES[name].version + 1)}
    assert {(p.name, p.version) for p in map(parse_policy, GOLDEN_VIEWS)} == versions


@pytest.mark.parametrize("text", GOLDEN_VIEWS)
def test_view_bytes_are_pinned(text: str) -> None:
    found = [zlib.crc32(made_views(text, place).tobytes()) for place in PLACES]
    assert found == GOLDEN_VIEWS[text]


def test_policies_and_their_keys_are_pinned() -> None:
    texts = {
        "clip-corner-crop-flip:version=1,frames=16,size=112,scales=5": 1956059400,
        "clip-corner-crop-flip:version=2,frames=16,size=112,scales=5": 1606044363,
        "clip-center-crop:version=1,frames=16,size=112": 4027502373,
        "clip-center-crop:version=2,frames=16,size=112": 3676544230,
    }
    assert {str(parse_policy(text)): parse_policy(text).key for text in texts} == texts
    assert {str(parse_policy(name)) for name in CLIPS} == {t for t in texts if "version=2" in t}


# --- frame numbers, boxes, windows --------------------------------------------------------------


@given(
    count=st.integers(1, 60),
    depth=st.integers(1, 24),
    sample=st.integers(0, 500) | st.integers(2**31, 2**34),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_frames_follow_each_other_and_short_clips_begin_again(
    count: int, depth: int, sample: int, seed: int
) -> None:
    policy = parse_policy(f"clip-corner-crop-flip:frames={depth}")
    numbers = clip_frames(policy, sample, seed, None, count)
    assert numbers.shape == (depth,) and numbers.dtype == np.int64
    assert numbers.min() >= 0 and numbers.max() < count
    if count >= depth:
        assert (np.diff(numbers) == 1).all()
    else:
        assert numbers.tolist() == [i % count for i in range(depth)]


@given(count=st.integers(1, 60), depth=st.integers(1, 24), block=st.integers(0, 60))
@settings(deadline=None)
def test_a_window_has_its_own_frames_and_the_last_one_repeats_them(
    count: int, depth: int, block: int
) -> None:
    start = block * depth % (count + -count % depth)
    policy = parse_policy(f"clip-center-crop:frames={depth}")
    numbers = clip_frames(policy, 3, 4, start, count).tolist()
    left = min(depth, count - start)
    assert numbers == [start + i % left for i in range(depth)]


def about_uniform(counts: Sequence[int]) -> bool:
    """Within five standard deviations of equal shares."""
    total, share = sum(counts), sum(counts) / len(counts)
    return all(abs(n - share) < 5 * (share * (1 - share / total)) ** 0.5 for n in counts)


def test_all_starts_are_reached_about_equally() -> None:
    policy = parse_policy("clip-corner-crop-flip")
    starts = Counter(int(clip_frames(policy, i % 50, i // 50, None, 25)[0]) for i in range(2000))
    assert sorted(starts) == list(range(10)), "25 - 16 + 1 of them"
    assert about_uniform(list(starts.values()))


@functools.cache
def boxes() -> list[tuple[int, int, int, bool]]:
    """Top, left, side and flip of 1,000 views of frames that tell where each pixel is from."""
    policy = parse_policy("clip-corner-crop-flip:frames=1,size=64")
    rows, columns = np.mgrid[0:60, 0:80] * 2
    where = np.stack([rows, columns, rows * 0], -1).astype(np.uint8)
    crop = POLICIES[policy.name].per_clip
    assert crop is not None
    found = []
    for i in range(1000):
        (view,) = crop(policy, [where], i % 100, i // 100).astype(float)
        flip = bool(view[0, 0, 1] > view[0, -1, 1])
        top, bottom = view[0, 0, 0] / 2, view[-1, 0, 0] / 2
        left = min(view[0, 0, 1], view[0, -1, 1]) / 2
        found.append((round(top), round(left), round(bottom - top + 1), flip))
    return found


SIDES = [60, 50, 42, 35, 30]
"""int(60 * 2 ** (-i / 4)), by hand: 60, 50.45, 42.43, 35.68, 30."""


def test_five_scales_and_five_places_and_flips_are_reached_about_equally() -> None:
    scales, places = Counter[int](), Counter[str]()
    for top, left, side, _ in boxes():
        near = min(range(5), key=lambda i: abs(SIDES[i] - side))
        assert abs(SIDES[near] - side) <= 1
        scales[near] += 1
        down, right = 60 - SIDES[near], 80 - SIDES[near]
        corners = {"tl": (0, 0), "tr": (0, right), "bl": (down, 0), "br": (down, right),
                   "c": (down // 2, right // 2)}  # fmt: skip
        name = min(corners, key=lambda n: abs(corners[n][0] - top) + abs(corners[n][1] - left))
        assert abs(corners[name][0] - top) <= 1 and abs(corners[name][1] - left) <= 1
        places[name if near else "full height: two of them are alike"] += 1
    full = places.pop("full height: two of them are alike")
    assert len(scales) == len(places) == 5 and full == scales[0]
    assert about_uniform(list(scales.values())) and about_uniform(list(places.values()))
    flips = sum(flip for _, _, _, flip in boxes())
    assert about_uniform([flips, 1000 - flips])


def test_scales_places_and_flips_do_not_hang_together() -> None:
    pairs = Counter(
        (min(range(5), key=lambda i: abs(SIDES[i] - side)), flip) for _, _, side, flip in boxes()
    )
    assert len(pairs) == 10 and about_uniform(list(pairs.values()))


@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_is_cut_from_the_same_box(name: str) -> None:
    frame = pattern(1, 24, 30)[0]
    crop = POLICIES[name].per_clip
    assert crop is not None
    for seed in range(8):
        clip = crop(parse_policy(f"{name}:size=12"), [frame] * 5, 3, seed)
        assert clip.shape == (5, 12, 12, 3)
        np.testing.assert_array_equal(clip, np.broadcast_to(clip[0], clip.shape))


def test_a_box_has_at_least_one_pixel() -> None:
    policy = parse_policy("clip-corner-crop-flip:frames=2,size=4,scales=60")
    crop = POLICIES[policy.name].per_clip
    assert crop is not None
    for seed in range(20):
        view = crop(policy, [np.full((6, 8, 3), 9, np.uint8)] * 2, 0, seed)
        np.testing.assert_array_equal(view, np.full((2, 4, 4, 3), 9, np.uint8))


def test_windows_are_the_samples_of_an_evaluation(made: Path) -> None:
    target = open_target(str(made))
    views = open_views(target, parse_policy(WINDOWS))
    videos = ["run/video 0", "run/video 1", "swim/video 2", "swim/video 3"]
    assert list(target.ids) == videos
    assert list(views.target.ids) == [
        f"{video}#{start}"
        for video, count in zip(videos, COUNTS, strict=True)
        for start in range(0, count, 4)
    ]
    assert views.target.label_text(3) == "run" and views.target.label_text(8) == "swim"
    training = open_views(target, parse_policy(SMALL))
    assert training.target is target, "a training view is of the whole clip"


def test_how_a_target_of_clips_is_evaluated() -> None:
    for text, expected in (
        ("clip-corner-crop-flip", "clip-center-crop:frames=16,size=112"),
        ("clip-corner-crop-flip:frames=8,size=64,scales=2", "clip-center-crop:frames=8,size=64"),
        ("clip-center-crop:frames=4,size=20", "clip-center-crop:frames=4,size=20"),
    ):
        assert evaluation_policy(parse_policy(text)) == parse_policy(expected)
    assert default_policy("anything", clips=True) == "clip-corner-crop-flip"


@pytest.mark.parametrize("policy", CLIPS)
def test_a_policy_of_clips_is_not_for_images(
    images: Path, sskt: Sskt, tmp_path: Path, policy: str
) -> None:
    status, err = cache(sskt, images, tmp_path, "--policy", policy)
    assert status == 2 and one_line(err) == (
        f"policy {policy} is for clips, target images has images; choose none, pad-crop-flip, "
        "random-resized-crop-flip, resize-center-crop"
    )


def test_a_policy_of_images_is_not_for_clips(made: Path, sskt: Sskt, tmp_path: Path) -> None:
    status, err = cache(sskt, made, tmp_path, "--policy", "pad-crop-flip")
    assert status == 2 and one_line(err) == (
        "policy pad-crop-flip is for images, target clips has clips; choose "
        "clip-corner-crop-flip, clip-center-crop"
    )


def test_f_s_is_not_for_images(images: Path, sskt: Sskt, tmp_path: Path) -> None:
    status, err = cache(sskt, images, tmp_path, "--f-s", "center")
    assert status == 2
    assert one_line(err) == (
        "frame sampling center: target images is of images, which have no frames"
    )


def cache(sskt: Sskt, target: Path | str, cache: Path, *more: object) -> tuple[int, str]:
    """``cache-teachers`` with the tiny source, one seed and no loader process."""
    fixed = ("--source", SOURCE, "--target", target, "--cache", cache, "--workers", 0, "--seeds", 1)
    status, _, err = sskt("cache-teachers", *fixed, *more)
    return status, err


# --- one view, however it is asked for ----------------------------------------------------------


@pytest.mark.parametrize("text", [SMALL, WINDOWS])
def test_a_view_is_the_same_alone_with_other_seeds_in_batches_and_in_any_order(
    made: Path, text: str
) -> None:
    views = open_views(open_target(str(made)), parse_policy(text))
    alone = {(s, seed): views[s, seed] for s in range(len(views.target)) for seed in range(4)}
    for samples, seeds in (((0, 1, 2, 3), (0, 1, 2, 3)), ((3, 0), (2, 0)), ((2, 2, 1), (3,))):
        seen = views.seen(np.array(samples), seeds)
        assert seen.rows.tolist() == list(samples) and not seen.bad and set(seen.views) == {*seeds}
        for seed in seeds:
            expected = np.stack([alone[s, seed] for s in samples])
            np.testing.assert_array_equal(seen.views[seed], expected)
            np.testing.assert_array_equal(views.batch(np.array(samples), seed), expected)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_view_is_the_same_in_another_process(made: Path, context: str) -> None:
    views = open_views(open_target(str(made)), parse_policy(SMALL), parse_frame_sampling("random"))
    with ProcessPoolExecutor(1, multiprocessing.get_context(context)) as pool:
        again = pool.submit(operator.getitem, views, (3, 7)).result(timeout=120)
    np.testing.assert_array_equal(again, views[3, 7])


def test_a_batch_names_a_damaged_clip_and_gives_the_others(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(made, folder)
    (folder / "train/run/video 1/image_00002.jpg").write_bytes(b"no image")
    views = open_views(open_target(str(folder)), parse_policy(SMALL))
    seen = views.seen(np.arange(4), [0, 1])
    ((bad, why),) = seen.bad
    assert bad == 1 and "run/video 1" in why and "image_00002.jpg" in why
    assert seen.rows.tolist() == [0, 2, 3]
    whole = open_views(open_target(str(made)), parse_policy(SMALL))
    for seed in (0, 1):
        np.testing.assert_array_equal(seen.views[seed], whole.batch(np.array([0, 2, 3]), seed))
    with pytest.raises(BadImage, match="image_00002"):
        views.batch(np.arange(4), 0)


# --- f_s ----------------------------------------------------------------------------------------


def picked(text: str, depth: int, sample: int = 0, seed: int = 0) -> list[int]:
    return list(map(int, parse_frame_sampling(text).frames(depth, sample, seed)))


def test_frames_by_hand() -> None:
    assert [picked("center", d) for d in (1, 2, 3, 16, 17)] == [[0], [1], [1], [8], [8]]
    assert [picked("first", d) for d in (1, 16)] == [[0], [0]]
    assert picked("uniform-1", 16) == [8]
    assert picked("uniform-2", 16) == [4, 12]
    assert picked("uniform-4", 16) == [2, 6, 10, 14]
    assert picked("uniform-3", 16) == [2, 8, 13]
    assert picked("uniform-3", 10) == [1, 5, 8]
    assert picked("uniform-4", 2) == [0, 0, 1, 1]
    assert picked("uniform-16", 16) == list(range(16))


@given(depth=st.integers(1, 64), k=st.integers(1, 80))
@settings(deadline=None)
def test_uniform_takes_the_middles_of_equal_parts(depth: int, k: int) -> None:
    found = picked(f"uniform-{k}", depth)
    assert found == [int((i + 0.5) * depth / k + 1e-9) for i in range(k)]
    assert found == sorted(found) and found[0] >= 0 and found[-1] < depth


def test_random_is_drawn_from_sample_and_seed_in_a_stream_of_its_own() -> None:
    for (sample, seed), depth in itertools.product(PLACES, (1, 7, 16)):
        words = philox((sample & 0xFFFFFFFF, sample >> 32, 0, 5), (seed, 0))
        assert picked("random", depth, sample, seed) == [below(words[0], depth)]


def test_random_reaches_every_frame_about_equally() -> None:
    found = Counter(picked("random", 16, i % 100, i // 100)[0] for i in range(3200))
    assert len(found) == 16 and about_uniform(list(found.values()))


@pytest.mark.parametrize("text", ["uniform-0", "uniform", "uniform-", "uniform-x", "middle", ""])
def test_unknown_frame_samplings_are_named_with_the_known(text: str) -> None:
    with pytest.raises(UnknownName) as caught:
        parse_frame_sampling(text)
    message = str(caught.value)
    assert message.startswith(f"unknown frame sampling '{text}'; ")
    assert "known: center, first, uniform-K, random" in message
    assert message.endswith("; or your own as FILE.py:function")


OWN = "def last(depth, sample, seed):\n    return [depth - 1]\n"


def own(folder: Path, body: str, name: str = "last") -> str:
    """A file of the user's with a function."""
    file = folder / "mine.py"
    file.write_text(body)
    return f"{file}:{name}"


def test_a_users_function_is_part_of_the_identity(made: Path, tmp_path: Path, tiny: Source) -> None:
    target, policy = open_target(str(made)), parse_policy(SMALL)
    encoding, digests = parse_encoding("f16"), set[str]()
    for body in (OWN, OWN.replace("- 1", "- 2")):
        f_s = parse_frame_sampling(own(tmp_path, body))
        code = sha256(body.encode()).hexdigest()
        assert f_s.identity() == f"mine.py:last@sha256:{code}"
        views = open_views(target, policy, f_s)
        assert views.identity()["f_s"] == f_s.identity()
        digests.add(digest_of(label_set_spec(views, tiny, encoding)))
        assert f_s.frames(16, 0, 0) == [15 if body == OWN else 14]
    for text in ("center", "uniform-2"):
        views = open_views(target, policy, parse_frame_sampling(text))
        assert views.identity()["f_s"] == text
        digests.add(digest_of(label_set_spec(views, tiny, encoding)))
    assert len(digests) == 4
    (tmp_path / "moved").mkdir()
    moved = parse_frame_sampling(own(tmp_path / "moved", OWN))
    assert moved.identity() == f"mine.py:last@sha256:{sha256(OWN.encode()).hexdigest()}"


def test_the_code_that_runs_is_the_code_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    # Python's own cache of compiled files looks at the second of the change and the size only.
    text = own(tmp_path, OWN)
    os.utime(tmp_path / "mine.py", (1e9, 1e9))
    assert parse_frame_sampling(text).frames(16, 0, 0) == [15]
    own(tmp_path, OWN.replace("- 1", "- 2"))
    os.utime(tmp_path / "mine.py", (1e9, 1e9))
    again = parse_frame_sampling(text)
    assert again.code == f"sha256:{sha256(OWN.replace('- 1', '- 2').encode()).hexdigest()}"
    assert again.frames(16, 0, 0) == [14]


def test_a_users_function_goes_to_other_processes_as_it_was(tmp_path: Path) -> None:
    f_s = parse_frame_sampling(own(tmp_path, OWN))
    sent = pickle.dumps(f_s)
    own(tmp_path, OWN.replace("- 1", "- 2"))  # edited while the run goes on
    assert pickle.loads(sent).identity() == f_s.identity()
    assert pickle.loads(sent).frames(16, 0, 0) == [15]


def test_nothing_is_written_beside_a_users_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    parse_frame_sampling(own(tmp_path, OWN))
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.py"]


WRONG = {
    "floats": ("return [0.5]", "gave [0.5] for a clip of 4 frames"),
    "beyond the end": ("return [depth]", "gave [4] for a clip of 4 frames"),
    "before the beginning": ("return [-1]", "gave [-1] for a clip of 4 frames"),
    "no frame": ("return []", "gave [] for a clip of 4 frames"),
    "not a list": ("return None", "gave None for a clip of 4 frames"),
    "words": ("return ['a']", "gave ['a'] for a clip of 4 frames"),
    "true": ("return [True]", "gave [True] for a clip of 4 frames"),
    "nested": ("return [[0], [1]]", "gave [[0], [1]] for a clip of 4 frames"),
    "ragged": ("return [[0], [1, 2]]", "for a clip of 4 frames"),
    "too large for the machine": ("return [2 ** 70]", f"gave [{2**70}] for a clip of 4 frames"),
    "an exception": ("raise KeyError('oops')", "KeyError: 'oops'"),
    "an exception of two lines": ("raise ValueError('one\\ntwo')", "ValueError: one two"),
    "as many as it likes": ("return range(1 + sample % 2)", "1 and 2 stills"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_frame_number_is_refused_in_one_line(
    made: Path, sskt: Sskt, tmp_path: Path, case: str
) -> None:
    body, message = WRONG[case]
    text = own(tmp_path, f"def last(depth, sample, seed):\n    {body}\n")
    status, err = cache(sskt, made, tmp_path / "cache", "--policy", SMALL, "--f-s", text)
    assert status == 2
    line = one_line(err)
    assert "mine.py:last" in line and message in line


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        (OWN, "first", "has no attribute 'first'"),
        (OWN, "", "mine.py:"),
        ("last = 3\n", "last", "mine.py:last"),
        ("def last(:\n", "last", "SyntaxError"),
        ("import no_such_module_at_all\n", "last", "No module named 'no_such_module_at_all'"),
        ("def last(depth):\n    return [0]\n", "last", "TypeError"),
        ("raise SystemExit(3)\n", "last", "SystemExit"),
    ],
)
def test_a_file_without_the_function_is_refused_in_one_line(
    made: Path, sskt: Sskt, tmp_path: Path, body: str, name: str, message: str
) -> None:
    text = own(tmp_path, body, name)
    status, err = cache(sskt, made, tmp_path / "cache", "--policy", SMALL, "--f-s", text)
    assert status == 2 and "frame sampling" in one_line(err) and message in err


def test_a_missing_file_is_missing_data(made: Path, sskt: Sskt, tmp_path: Path) -> None:
    text = f"{tmp_path}/none.py:last"
    with pytest.raises(MissingData, match=r"frame sampling: cannot read .*none\.py"):
        parse_frame_sampling(text)
    status, err = cache(sskt, made, tmp_path / "cache", "--policy", SMALL, "--f-s", text)
    assert status == 2 and "none.py (No such file or directory)" in one_line(err)


def test_a_recorded_function_is_run_only_from_the_file_that_is_named(
    made: Path, sskt: Sskt, tmp_path: Path
) -> None:
    folder, png, flag = tmp_path / "cache", tmp_path / "stills.png", tmp_path / "was run"
    text = own(tmp_path, OWN)
    status, err = cache(sskt, made, folder, "--policy", SMALL, "--f-s", text)
    assert status == 0, err
    verify = ("verify", "--cache", folder, "--recompute", 3, "--source", SOURCE)
    inspect = ("inspect", "--cache", folder, "--no-live", "--png", png)
    shutil.copy(tmp_path / "mine.py", tmp_path / "moved.py")
    for named in (text, f"{tmp_path}/moved.py:last"):
        status, out, err = sskt(*verify, "--frame-sampling", named)
        assert status == (0 if named == text else 2), err
    assert "views.f_s" in one_line(err), "the name of the file is part of the identity"
    status, out, err = sskt(*inspect, "--f-s", text)
    assert status == 0 and "f_s = mine.py:last: frame 3 of the clip" in out, err
    png.unlink()
    own(tmp_path, f"open({str(flag)!r}, 'w').close()\n" + OWN)
    for ask in (verify, inspect):
        status, _, err = sskt(*ask)
        assert status == 2 and "give --frame-sampling FILE.py:last, the file mine.py" in err
        status, _, err = sskt(*ask, "--frame-sampling", text)
        assert status == 2 and "it was not run" in one_line(err)
    assert not png.exists() and not flag.exists()


def test_every_f_s_is_shown(made: Path, sskt: Sskt, tmp_path: Path) -> None:
    """Sets over the same views whose sources saw other frames of them: a row of stills each."""
    from sskt.teacher_cache.tools.reopen import Reopen, reopen_views

    folder, png = tmp_path / "cache", tmp_path / "stills.png"
    for f_s in ("uniform-2", "center"):
        status, err = cache(sskt, made, folder, "--policy", SMALL, "--f-s", f_s)
        assert status == 0, err
    ask = ("inspect", "--cache", folder, "--sample", 2, "--png", png, "--no-live")
    status, out, err = sskt(*ask)
    assert status == 0, err
    assert "f_s = center: frame 2 of" in out and "f_s = uniform-2: frame 1, 3 of" in out
    assert json.loads(sskt(*ask, "--json")[1])["stills"] == {"center": [2], "uniform-2": [1, 3]}
    view = reopen_views(list_label_sets(folder)[0], Reopen())[2, 0]
    rows = [[view[2], np.zeros_like(view[0])], [view[1], view[3]]]
    with Image.open(png) as image:
        expected = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_a_users_function_works_in_loader_workers_of_both_kinds(made: Path, tmp_path: Path) -> None:
    f_s = parse_frame_sampling(own(tmp_path, OWN))
    views = open_views(open_target(str(made)), parse_policy(SMALL), f_s)
    expected = views.stills(views.batch(np.arange(4), 3), np.arange(4), 3)
    ask = partial(views.stills, views.batch(np.arange(4), 3), np.arange(4), 3)
    for context in ("fork", "spawn"):
        with ProcessPoolExecutor(1, multiprocessing.get_context(context)) as pool:
            np.testing.assert_array_equal(pool.submit(ask).result(timeout=120), expected)


@pytest.mark.parametrize("text", ["center", "uniform-3", "random", "own"])
def test_stored_labels_are_the_mean_of_the_softmaxes_of_a_bare_network(
    made: Path, tmp_path: Path, tiny: Source, text: str
) -> None:
    f_s = parse_frame_sampling(own(tmp_path, OWN) if text == "own" else text)
    views = open_views(open_target(str(made)), parse_policy(SMALL), f_s)
    folder, encoding = tmp_path / "cache", parse_encoding("f32")
    stage.cache_teachers(views, [tiny], encoding, 2, folder, stage.StageOptions(workers=0))
    (path,) = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    reader, network = open_set(path), load_factory(SOURCE.partition("=")[2])
    how = reader.spec["source"]["preprocessing"]
    expected = {"center": [2], "uniform-3": [0, 2, 3], "own": [3]}
    for seed, sample in itertools.product(range(2), range(4)):
        clip = views[sample, seed]
        word = philox((sample, 0, 0, 5), (seed, 0))[0]
        stills = expected.get(text, [below(word, 4)])
        each = [np.exp(log_probabilities(network, how, clip[i])) for i in stills]
        stored = reader.label(seed, sample)
        assert stored is not None and distance(np.mean(each, axis=0), stored) < 1e-5
        assert reader.check(seed, sample) == crc_of(clip), "of the whole clip, not of its stills"


# --- real videos, all the way -------------------------------------------------------------------


@pytest.fixture(scope="module")
def ucf(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of three clips of UCF101 under two seeds, by three stills each."""
    from sskt.cli.main import run

    folder = tmp_path_factory.mktemp("ucf")
    ask = ["cache-teachers", "--source", SOURCE, "--target", "ucf101", "--partial", "--limit", "3"]
    ask += ["--root", str(data / "ucf101"), "--seeds", "2", "--f-s", "uniform-3", "--workers", "1"]
    assert run([*ask, "--cache", str(folder)]) == 0
    return folder


def test_ucf101_is_listed_and_verified(sskt: Sskt, ucf: Path) -> None:
    status, out, err = sskt("verify", "--cache", ucf, "--recompute", 3, "--source", SOURCE)
    assert status == 0, err
    assert "6 rows, 3 recomputed" in out and ": clean" in out
    (shown,) = json.loads(sskt("ls", "--cache", ucf, "-v", "--json")[1])
    assert shown["views"] == {
        "policy": "clip-corner-crop-flip",
        "version": 2,
        "parameters": {"frames": 16, "size": 112, "scales": 5},
        "f_s": "uniform-3",
        "decoder": "pyav",
    }
    assert [s["rows"] for s in shown["audit"]] == [3, 3] and shown["target"]["size"] == 3
    assert shown["no_truth"] == "the source has none of the target's classes by name"
    status, out, _ = sskt("ls", "--cache", ucf, "-v")
    assert status == 0 and "no true classes to compare with" in out


def test_ucf101_is_inspected(sskt: Sskt, ucf: Path, data: Path, tmp_path: Path) -> None:
    from sskt.teacher_cache.tools.reopen import Reopen, reopen_views

    png, clip = tmp_path / "stills.png", tmp_path / "clip.png"
    ask = ["inspect", "--cache", ucf, "--sample", 1, "--seed", 1, "--png", png, "--clip", clip]
    ask += ["--source", SOURCE]
    status, out, err = sskt(*ask, "--json")
    assert status == 0, err
    shown = json.loads(out)
    assert shown["view"]["shape"] == [16, 112, 112, 3] and shown["view_matches"] is True
    assert shown["stills"] == {"uniform-3": [2, 8, 13]} and shown["id"].endswith(".avi")
    assert shown["label"] == shown["id"].split("/")[0]
    assert shown["sources"][0]["live"]["distance"] < 1e-3
    view = reopen_views(list_label_sets(ucf)[0], Reopen())[1, 1]
    with Image.open(png) as image:
        np.testing.assert_array_equal(np.asarray(image), np.concatenate(view[[2, 8, 13]], axis=1))
    with Image.open(clip) as image:
        sheet = np.asarray(image).reshape(4, 112, 4, 112, 3).transpose(0, 2, 1, 3, 4)
        np.testing.assert_array_equal(sheet.reshape(view.shape), view)
    status, out, _ = sskt(*ask)
    assert status == 0 and "f_s = uniform-3: frame 2, 8, 13 of the clip" in out
    assert "seed 1: 16x112x112, as the sources saw it" in out


def test_hmdb51_in_windows(sskt: Sskt, data: Path, tmp_path: Path) -> None:
    ask = ["--root", data / "hmdb51", "--partial", "--limit", 2, "--policy", "clip-center-crop"]
    status, err = cache(sskt, "hmdb51", tmp_path, *ask)
    assert status == 0, err
    (label_set,) = list_label_sets(tmp_path)
    target = open_target("hmdb51", root=data / "hmdb51", partial=True, limit=2)
    assert target.frames is not None
    assert label_set.samples == sum(-(-int(n) // 16) for n in target.frames) > 2
    status, out, err = sskt("verify", "--cache", tmp_path, "--recompute", 2, "--source", SOURCE)
    assert status == 0 and ": clean" in out, err
    last = label_set.samples - 1
    shown = json.loads(sskt("inspect", "--cache", tmp_path, "--sample", last, "--json")[1])
    start = (int(target.frames[1]) - 1) // 16 * 16
    assert shown["id"] == f"{target.ids[1]}#{start}" and shown["stills"] == {"center": [8]}


@pytest.fixture(scope="module")
def cut(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of three real clips, and one in which the second of them is cut."""
    clips = sorted((data / "ucf101/UCF-101").glob("*/*.avi"), key=lambda p: p.stat().st_size)[:3]
    whole = tmp_path_factory.mktemp("whole")
    for clip in clips:
        (whole / clip.parent.name).mkdir(exist_ok=True)
        shutil.copy(clip, whole / clip.parent.name)
    other = tmp_path_factory.mktemp("cut")
    shutil.copytree(whole, other, dirs_exist_ok=True)
    short = sorted(other.glob("*/*.avi"), key=lambda p: p.as_posix().encode())[1]
    os.truncate(short, short.stat().st_size * 6 // 10)
    return whole, other


def test_a_truncated_clip_fails_the_run_and_is_named(
    sskt: Sskt, cut: tuple[Path, Path], tmp_path: Path
) -> None:
    short = open_target(str(cut[1])).ids[1]
    for workers in (0, 1):
        status, err = cache(sskt, cut[1], tmp_path, "--workers", workers)
        line = one_line(err)
        assert status == 2 and line.startswith(f"damaged clip {cut[1] / short}: "), line
        assert re.search(r"\d+ frames decode of \d+ in its header \(truncated", line), line
        assert "--on-error skip" in line
        assert not list(tmp_path.glob("*/labels/c/*/*/0"))


def test_a_truncated_clip_is_skipped_and_the_others_do_not_notice(
    sskt: Sskt, cut: tuple[Path, Path], tmp_path: Path
) -> None:
    # One clip a forward, so that the last bits of the others cannot depend on who else is there.
    more = ["--seeds", 2, "--batch-size", 1, "--on-error", "skip"]
    found = {}
    for name, folder in zip(("whole", "cut"), cut, strict=True):
        status, err = cache(sskt, folder, tmp_path / name, *more)
        assert status == 0, err
        (found[name],) = list_label_sets(tmp_path / name)
    for seed in range(2):
        labels = {name: s.read(seed, 0, 3)["labels"] for name, s in found.items()}
        checks = {name: s.read_checks(seed, 0, 3) for name, s in found.items()}
        assert np.isnan(labels["cut"][1]).all() and checks["cut"][1] == 0
        assert np.isfinite(labels["whole"]).all()
        for row in (0, 2):
            assert labels["cut"][row].tobytes() == labels["whole"][row].tobytes()
            assert checks["cut"][row] == checks["whole"][row] != 0
    status, out, _ = sskt(
        "verify", "--cache", tmp_path / "cut", "--recompute", 6, "--source", SOURCE
    )
    assert status == 0 and "2 skipped" in out and ": clean" in out
    ask = ("inspect", "--cache", tmp_path / "cut", "--sample", 1)
    status, out, _ = sskt(*ask)
    assert status == 0 and "no label: the sample could not be read" in out
    for option in ("--png", "--clip"):
        status, _, err = sskt(*ask, option, tmp_path / "view.png")
        assert status == 2 and f"there is no view for {option}" in one_line(err)
    assert not (tmp_path / "view.png").exists()


def test_both_decoders_have_sets_of_their_own(
    sskt: Sskt, cut: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("decord")
    for decoder in ("pyav", "decord"):
        status, err = cache(sskt, cut[0], tmp_path, "--decoder", decoder)
        assert status == 0, err
    found = list_label_sets(tmp_path)
    assert sorted(s.spec["views"]["decoder"] for s in found) == ["decord", "pyav"]
    status, out, err = sskt("verify", "--cache", tmp_path, "--recompute", 2, "--source", SOURCE)
    assert status == 0 and out.count(": clean") == 2, err
