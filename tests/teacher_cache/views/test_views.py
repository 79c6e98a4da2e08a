"""Views: both executions agree, pixels and parameters are pinned, and both sides own theirs."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support.helpers import write_images
from torchvision.transforms import RandomResizedCrop, v2

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import BadImage, InputError, UnknownName
from sskt.teacher_cache.media.images import UInt8, read_image
from sskt.teacher_cache.rng import draw, words_of
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import (
    POLICIES,
    Policy,
    crop_box,
    crop_boxes,
    evaluation_policy,
    parse_policy,
)
from sskt.teacher_cache.views.views import Views, check_of, checks_of

Int64 = NDArray[np.int64]

IMAGES = [name for name, info in POLICIES.items() if info.per_sample]
DRAWS = 4000
FAR = 2**32 + 7


def pattern(n: int, height: int, width: int) -> UInt8:
    """Images from arithmetic: uint8 ``[n, height, width, 3]``."""
    i = np.arange(n * height * width * 3, dtype=np.int64)
    return ((i * i * 7 + i // 5 * 13) % 251).astype(np.uint8).reshape(n, height, width, 3)


def target_of(images: UInt8) -> Target:
    n = len(images)
    return Target("made", "train", ("a",), np.zeros(n, np.int64), [f"id {i}" for i in range(n)],
                  images=images)  # fmt: skip


def views_of(policy: str, images: UInt8 | None = None) -> Views:
    return Views(target_of(pattern(6, 20, 26) if images is None else images), parse_policy(policy))


def numbers(*values: int) -> Int64:
    return np.array(values, np.int64)


# --- the two executions -----------------------------------------------------------------------

sample_ids = st.integers(0, 500) | st.integers(2**31, 2**34) | st.integers(0, 2**62)
ratios = st.sampled_from([(0.5, 0.8), (0.75, 4 / 3), (1.0, 1.0), (2.0, 3.0)])


@st.composite
def policies(drawn: st.DrawFn, name: str) -> Policy:
    if name == "pad-crop-flip":
        return parse_policy(f"{name}:padding={drawn(st.integers(0, 6))}")
    if name == "random-resized-crop-flip":
        size, scale = drawn(st.integers(1, 12)), drawn(st.sampled_from([0.01, 0.08, 0.5, 1.0]))
        low, high = drawn(ratios)
        return parse_policy(
            f"{name}:size={size},scale_min={scale},ratio_min={low},ratio_max={high}"
        )
    return parse_policy(name)


@pytest.mark.parametrize("name", [name for name, info in POLICIES.items() if info.batched])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_batched_and_per_sample_views_are_equal(name: str, data: st.DataObject) -> None:
    policy = data.draw(policies(name))
    height, width = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 14))
    samples = data.draw(st.lists(sample_ids, min_size=1, max_size=5))
    seed = data.draw(st.integers(0, 2**32 - 1))
    images = pattern(len(samples), height, width)
    views = Views(target_of(images), policy)

    batched = views.of_images(images, np.array(samples, np.int64), seed)
    alone = [
        views.of_image(image, sample, seed) for image, sample in zip(images, samples, strict=True)
    ]
    assert batched.dtype == np.uint8
    np.testing.assert_array_equal(batched, np.stack(alone))


@pytest.mark.parametrize("name", IMAGES)
def test_batch_is_indexing_one_by_one_in_any_order(name: str) -> None:
    views = views_of(name)
    samples = numbers(4, 0, 5, 0)
    batch = views.batch(samples, 3)
    np.testing.assert_array_equal(batch, np.stack([views[int(s), 3] for s in samples]))
    assert checks_of(batch).tolist() == [check_of(views[int(s), 3]) for s in samples]


def test_files_and_arrays_of_the_same_pixels_have_the_same_views(tmp_path: Path) -> None:
    images = pattern(4, 20, 26)
    write_images(tmp_path, images)
    policy = parse_policy("pad-crop-flip")
    in_files = Views(open_target(str(tmp_path)), policy)
    in_memory = Views(target_of(images), policy)
    np.testing.assert_array_equal(in_files.batch(np.arange(4), 5), in_memory.batch(np.arange(4), 5))


# --- pinned forever ---------------------------------------------------------------------------

GOLDEN_VIEWS: dict[str, list[int]] = {
    "none": [3596627610] * 5,
    "pad-crop-flip": [3946650897, 2208836145, 997733301, 3596627610, 1291012056],
    "pad-crop-flip:padding=0": [3596627610, 3596627610, 3024668488, 3596627610, 3024668488],
    "random-resized-crop-flip:version=1,size=16": [
        2945128560,
        3650522882,
        10290071,
        1081704575,
        3314134523,
    ],
    "random-resized-crop-flip:version=1,size=31,scale_min=0.5,ratio_min=1.0,ratio_max=2.0": [
        4136700214,
        1784451091,
        3470191046,
        591273372,
        192454982,
    ],
    "resize-center-crop:version=1,resize=18,size=15": [3835731711] * 5,
    "random-resized-crop-flip:version=2,size=16": [
        1540573202,
        3228042639,
        928558128,
        1227985419,
        1074256399,
    ],
    "random-resized-crop-flip:version=2,size=31,scale_min=0.5,ratio_min=1.0,ratio_max=2.0": [
        1971446954,
        221794257,
        2706267307,
        276054876,
        2293529369,
    ],
    "resize-center-crop:version=2,resize=18,size=15": [3071800183] * 5,
}
"""CRC-32 of the view of ``pattern(1, 20, 26)`` at each of ``PLACES``."""

PLACES = ((0, 0), (1, 0), (0, 1), (12345, 9), (FAR, 2**31))
"""Sample, seed."""


def test_every_version_of_every_policy_has_golden_views() -> None:
    versions = {(name, v) for name in IMAGES for v in range(1, POLICIES[name].version + 1)}
    assert {(p.name, p.version) for p in map(parse_policy, GOLDEN_VIEWS)} == versions


@pytest.mark.parametrize("text", GOLDEN_VIEWS)
def test_view_bytes_are_pinned(text: str) -> None:
    views = views_of(text)
    image = pattern(1, 20, 26)[0]
    found = [zlib.crc32(views.of_image(image, *place).tobytes()) for place in PLACES]
    assert found == GOLDEN_VIEWS[text], (
        f"Pillow {PIL.__version__} or torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}) makes other views on this machine: labels "
        "that are cached here cannot be trained from elsewhere"
    )


KERNELS = """
import numpy as np, torch, zlib
from sskt.teacher_cache.views.resizing import resized
rng, crc = np.random.default_rng(0), 0
for n in [*range(1, 513), 2000, 4096, 8000]:
    for m in (224, 112):
        line = rng.integers(0, 256, (1, n, 3), np.uint8)
        for image, size in ((line, (1, m)), (line.swapaxes(0, 1), (m, 1))):
            crc = zlib.crc32(np.ascontiguousarray(resized(image, *size, 2)).data, crc)
for _ in range(500):
    height, width, rows, columns = rng.integers(1, 60, 4).tolist()
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    view = resized(image, rows, columns, 2, flip=bool(rows % 2))
    crc = zlib.crc32(np.ascontiguousarray(view).data, crc)
print(torch.backends.cpu.get_cpu_capability(), crc)
"""
"""Prints the kernel and the CRC-32 of what it makes of images of all sizes up to 512 pixels."""


@pytest.mark.slow
def test_all_kernels_of_torch_resize_to_the_same_bytes() -> None:
    """The second half of the reason why views are the same on every machine: see KERNELS."""
    for wanted in ("default", "avx2", "avx512"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": wanted}
        command = [sys.executable, "-c", KERNELS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        kernel, crc = done.stdout.split()
        assert crc == KERNELS_CRC, (
            f"torch {torch.__version__} resizes to other bytes by its kernel {kernel} on this "
            "machine: labels that are cached here cannot be trained from elsewhere"
        )


KERNELS_CRC = "2781440556"


def test_policy_keys_are_pinned() -> None:
    keys = {
        "none": 2484658524,
        "pad-crop-flip": 1854016548,
        "random-resized-crop-flip:version=1": 2215168660,
        "random-resized-crop-flip": 2938476887,
        "resize-center-crop:version=1": 4110661938,
        "resize-center-crop": 3727616753,
    }
    assert {text: parse_policy(text).key for text in keys} == keys


def test_the_key_is_the_crc32_of_the_canonical_identity() -> None:
    text = '{"parameters":{"padding":4},"policy":"pad-crop-flip","version":1}'
    policy = parse_policy("pad-crop-flip")
    assert policy.key == zlib.crc32(text.encode())
    assert policy.identity() == json.loads(text)
    assert Policy("pad-crop-flip", 2, {"padding": 4}).key != policy.key


def where(size: int) -> UInt8:
    """An image that tells each pixel's row and column, counted from 1 so that padding is 0."""
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    return np.stack([y + 1, x + 1, y * 0], axis=-1).astype(np.uint8)


def crop_of(view: UInt8, padding: int) -> tuple[int, int, bool]:
    """Top and left in the padded image, and flip, read off a view of ``where``."""
    centre = len(view) // 2
    flip = bool(view[centre, centre, 1] < view[centre, centre - 1, 1])
    row, column, _ = (view[:, ::-1] if flip else view)[centre, centre].tolist()
    return row - 1 - centre + padding, column - 1 - centre + padding, flip


def test_pad_crop_flip_parameters_are_pinned() -> None:
    views = views_of("pad-crop-flip")
    assert [crop_of(views.of_image(where(20), *place), 4) for place in PLACES] == [
        (3, 4, False),
        (0, 7, True),
        (2, 4, True),
        (4, 4, False),
        (5, 0, True),
    ]


@given(
    st.integers(0, 2**40),
    st.integers(0, 2**32 - 1),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from(["", ":scale_min=0.3", ":scale_min=0.9,ratio_min=0.2,ratio_max=0.3"]),
)
@settings(deadline=None, max_examples=300)
def test_a_box_alone_is_that_of_many(
    sample: int, seed: int, height: int, width: int, more: str
) -> None:
    policy = parse_policy(f"random-resized-crop-flip{more}")
    boxes, flips = crop_boxes(policy, numbers(sample), seed, numbers(height), numbers(width))
    box, flip = crop_box(policy, sample, seed, height, width)
    assert (list(box), flip) == (boxes[0].tolist(), bool(flips[0]))
    assert list(words_of(sample, seed, policy.key, block=3, stream=2)) == (
        draw(sample, seed, policy.key, block=3, stream=2)[0].tolist()
    )


def test_crop_boxes_are_pinned() -> None:
    policy = parse_policy("random-resized-crop-flip:version=1")
    found = []
    for sample, seed in PLACES:
        boxes, flips = crop_boxes(policy, numbers(sample), seed, numbers(375), numbers(500))
        found.append((*boxes[0].tolist(), bool(flips[0])))
    assert found == [  # top, left, height, width, flip
        (4, 65, 357, 367, True),
        (70, 206, 257, 273, True),
        (1, 184, 332, 306, False),
        (141, 228, 109, 140, True),
        (53, 57, 288, 326, False),
    ]


# --- what each policy does --------------------------------------------------------------------


@pytest.mark.parametrize(("padding", "size"), [(4, 32), (4, 96), (1, 5), (0, 8)])
def test_pad_crop_flip_against_loops(padding: int, size: int) -> None:
    images = pattern(8, size, size)
    parameters = json.dumps({"padding": padding}, separators=(",", ":"))
    text = f'{{"parameters":{parameters},"policy":"pad-crop-flip","version":1}}'
    words = draw(np.arange(8), 11, zlib.crc32(text.encode())).astype(object)
    found = Views(target_of(images), parse_policy(f"pad-crop-flip:padding={padding}"))
    for sample, image in enumerate(images):
        shifts = 2 * padding + 1
        down = words[sample, 0] * shifts // 2**32 - padding
        right = words[sample, 1] * shifts // 2**32 - padding
        flip = words[sample, 2] >= 2**31
        expected = np.zeros_like(image)
        for y in range(size):
            for x in range(size):
                from_y, from_x = y + down, (size - 1 - x if flip else x) + right
                if 0 <= from_y < size and 0 <= from_x < size:
                    expected[y, x] = image[from_y, from_x]
        np.testing.assert_array_equal(found[sample, 11], expected)


def test_pad_crop_flip_reaches_every_shift_about_equally() -> None:
    views = views_of("pad-crop-flip:padding=1")
    counts = Counter(crop_of(views.of_image(where(6), sample, 0), 1) for sample in range(1800))
    assert set(counts) == set(itertools.product((0, 1, 2), (0, 1, 2), (False, True)))
    assert min(counts.values()) > 60  # 100 each are expected
    assert max(counts.values()) < 140


@pytest.mark.parametrize("name", ["pad-crop-flip", "random-resized-crop-flip"])
def test_half_are_flipped_and_seeds_are_independent(name: str) -> None:
    policy = parse_policy(name)
    ids = np.arange(DRAWS)
    if name == "pad-crop-flip":
        views = views_of("pad-crop-flip:padding=0")
        images = np.broadcast_to(where(3), (DRAWS, 3, 3, 3))
        flips = [views.of_images(images, ids, s)[:, 0, 0, 1] == 3 for s in (0, 1)]
    else:
        square = np.full(DRAWS, 64)
        flips = [crop_boxes(policy, ids, s, square, square)[1] for s in (0, 1)]
    for flip in flips:
        assert abs(flip.mean() - 0.5) < 0.025
        assert abs((flip[1:] == flip[:-1]).mean() - 0.5) < 0.025
    assert abs((flips[0] == flips[1]).mean() - 0.5) < 0.025


@pytest.mark.parametrize("version", [1, 2])
def test_random_resized_crop_is_the_box_resized_and_flipped(version: int) -> None:
    """Torchvision's of a PIL image, and of a uint8 tensor."""
    image = pattern(1, 40, 60)[0]
    views = views_of(f"random-resized-crop-flip:version={version},size=17")
    given: Any = Image.fromarray(image)
    if version == 2:
        given = torch.from_numpy(image)[None].permute(0, 3, 1, 2)[0]
    seen = set()
    for sample in range(12):
        boxes, flips = crop_boxes(views.policy, numbers(sample), 4, numbers(40), numbers(60))
        top, left, height, width = boxes[0].tolist()
        expected = v2.functional.resized_crop(given, top, left, height, width, [17, 17])
        if flips[0]:
            expected = v2.functional.horizontal_flip(expected)
        if version == 2:
            expected = expected.permute(1, 2, 0)
        np.testing.assert_array_equal(views.of_image(image, sample, 4), np.asarray(expected))
        seen.add(bool(flips[0]))
    assert seen == {False, True}


@pytest.mark.parametrize(("height", "width"), [(375, 500), (128, 128), (500, 200)])
def test_crop_boxes_stay_in_the_image_and_in_bounds(height: int, width: int) -> None:
    n = 2000
    policy = parse_policy("random-resized-crop-flip:scale_min=0.2,scale_max=0.6")
    boxes, _ = crop_boxes(policy, np.arange(n), 0, np.full(n, height), np.full(n, width))
    top, left, h, w = boxes.T
    assert boxes.min() >= 0
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    slack = 1.05  # sides are rounded to whole pixels
    assert (w / h > 3 / 4 / slack).all()
    assert (w / h < 4 / 3 * slack).all()
    area = h * w / (height * width)
    assert area.min() > 0.2 / slack
    assert area.max() < 0.6 * slack


@pytest.mark.parametrize(("height", "width"), [(256, 256), (300, 500), (600, 250)])
def test_crop_boxes_are_distributed_like_torchvision(height: int, width: int) -> None:
    policy = parse_policy("random-resized-crop-flip")
    ids = np.arange(DRAWS)
    boxes, _ = crop_boxes(policy, ids, 1, np.full(DRAWS, height), np.full(DRAWS, width))
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]
        )

    def summary(b: NDArray[Any]) -> list[float]:
        top, left, h, w = b.T
        area, ratio = h * w / (height * width), np.log(w / h)
        return [
            area.mean(),
            area.std(),
            ratio.mean(),
            ratio.std(),
            np.quantile(ratio, 0.01),
            np.quantile(ratio, 0.99),
            (top / height).mean(),
            (left / width).mean(),
        ]

    np.testing.assert_allclose(summary(boxes), summary(theirs), atol=0.02)


@pytest.mark.parametrize(("height", "width"), [(4, 400), (301, 7), (10, 33)])
def test_an_image_too_narrow_for_any_try_gives_torchvisions_centre_box(
    height: int, width: int
) -> None:
    policy = parse_policy("random-resized-crop-flip:scale_min=1.0")
    boxes, _ = crop_boxes(policy, numbers(3), 0, numbers(height), numbers(width))
    image = torch.empty(3, height, width)
    expected = RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])
    assert boxes[0].tolist() == list(expected)


@functools.cache
def jpeg(height: int, width: int) -> bytes:
    rng = np.random.default_rng(height)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("height", "width"),
    [
        *[(256, 256), (224, 224), (300, 401), (1000, 333)],
        *[(97, 203), (257, 255), (31, 500), (511, 767)],
        # Half a pixel to round on either side, down and up.
        *[(257, 256), (259, 256), (256, 257), (256, 259)],
    ],
)
def test_resize_center_crop_is_torchvisions(height: int, width: int) -> None:
    image = Image.open(io.BytesIO(jpeg(height, width)))
    expected = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
    found = views_of("resize-center-crop").of_image(np.asarray(image.convert("RGB")), 0, 0)
    assert found.shape == (224, 224, 3)
    # Pillow 13 rounds after the height first where that is less work, which is one level.
    np.testing.assert_allclose(found, np.asarray(expected, np.int64), atol=1, rtol=0)


def test_resize_center_crop_of_real_photographs_is_torchvisions(data: Path) -> None:
    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    for path in sorted((data / "imagenet").glob("*.JPEG"))[:5]:
        with Image.open(path) as image:
            expected = np.asarray(transform(image.convert("RGB")))
        pixels = read_image(path)
        found = views_of("resize-center-crop:version=1").of_image(pixels, 0, 0)
        np.testing.assert_array_equal(found, expected, path.name)
        found = views_of("resize-center-crop").of_image(pixels, 0, 0)
        np.testing.assert_allclose(found, expected.astype(np.int64), atol=1, rtol=0)


def test_policies_without_chance_ignore_sample_and_seed() -> None:
    image = pattern(1, 20, 26)[0]
    for text in ("none", "resize-center-crop:resize=18,size=15"):
        views = views_of(text)
        np.testing.assert_array_equal(
            views.of_image(image, 0, 0), views.of_image(image, 9, 3), text
        )
    np.testing.assert_array_equal(views_of("none").of_image(image, 0, 0), image)


# --- tiny and narrow images -------------------------------------------------------------------

sides = st.integers(1, 5) | st.sampled_from([8000, 65500])
anyhow = (
    "none",
    "pad-crop-flip",
    "random-resized-crop-flip:size=9",
    "random-resized-crop-flip:size=3,ratio_min=0.01,ratio_max=0.02",
    "random-resized-crop-flip:size=3,ratio_min=50,ratio_max=99",
    "resize-center-crop:resize=10,size=9",
    "resize-center-crop",
    "clip-corner-crop-flip:frames=2,size=9",
    "clip-center-crop:frames=2,size=9",
)


@pytest.mark.parametrize("text", anyhow)
@given(height=sides, width=sides, sample=sample_ids, seed=st.integers(0, 9))
@example(height=1, width=1, sample=0, seed=0)
@example(height=1, width=8000, sample=0, seed=0)
@example(height=8000, width=1, sample=0, seed=0)
@settings(deadline=None, max_examples=25)
def test_an_image_of_any_shape_has_a_view_or_is_refused(
    text: str, height: int, width: int, sample: int, seed: int
) -> None:
    assume(height * width < 1_000_000)
    policy, image = parse_policy(text), np.full((height, width, 3), 7, np.uint8)
    info, p = POLICIES[policy.name], policy.parameters
    long = max(height, width) / min(height, width) * float(p.get("resize", p.get("size", 0)))
    resized = "center" in text and long * float(p.get("resize", p.get("size", 0))) > 1.7e8
    shape = tuple(map(int, (p["size"], p["size"], 3))) if "size" in p else (height, width, 3)
    try:
        if info.per_clip is None:
            view = views_of(text, image[None]).of_image(image, sample, seed)
        else:
            view, shape = info.per_clip(policy, [image, image], sample, seed), (2, *shape)
    except BadImage as error:
        assert resized, (height, width)
        assert re.fullmatch(r"\d+x\d+ pixels are resized to \d+x\d+ pixels, more .*", str(error))
        return
    assert view.shape == shape
    assert view.dtype == np.uint8
    if text != "pad-crop-flip":
        assert (view == 7).all()


def test_an_image_too_long_to_be_resized_is_skipped_by_name(tmp_path: Path) -> None:
    write_images(tmp_path, pattern(2, 20, 26))
    Image.new("RGB", (8000, 1)).save(tmp_path / "long.png")
    views = Views(open_target(str(tmp_path)), parse_policy("resize-center-crop"))
    seen = views.seen(np.arange(3), [0, 1])
    assert seen.rows.tolist() == [0, 1]
    assert {seed: made.shape for seed, made in seen.views.items()} == dict.fromkeys(
        (0, 1), (2, 224, 224, 3)
    )
    ((sample, why),) = seen.bad
    assert sample == 2
    expected = "long.png: 8000x1 pixels are resized to 2048000x256 pixels, more than 178,956,970"
    assert expected in why
    assert "--on-error skip" in why
    with pytest.raises(BadImage, match=r"long\.png: 8000x1"):
        views[2, 0]


# --- whose memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", GOLDEN_VIEWS)
@pytest.mark.parametrize("how", ["index", "batch", "of_images", "of_image"])
def test_a_view_may_be_changed_and_the_target_stays(text: str, how: str) -> None:
    images = pattern(6, 20, 26)
    views = views_of(text, images)
    before = images.copy()
    made: list[UInt8]
    if how == "index":
        made = [views[i, 0] for i in range(6)]
    elif how == "batch":
        made = [views.batch(np.arange(6), 0)]
    elif how == "of_images":
        made = [views.of_images(images, np.arange(6), 0)]
    else:
        made = [views.of_image(image, i, 0) for i, image in enumerate(images)]
    for view in made:
        assert view.flags.c_contiguous
        torch.from_numpy(view).fill_(0)  # warns, so fails, if the memory is read-only
    np.testing.assert_array_equal(images, before)


# --- policies by name -------------------------------------------------------------------------


def test_parse_policy_fills_in_defaults_and_types() -> None:
    assert parse_policy("pad-crop-flip").parameters == {"padding": 4}
    assert parse_policy("pad-crop-flip:padding=2").parameters == {"padding": 2}
    policy = parse_policy("random-resized-crop-flip:size=64,scale_min=1")
    assert policy.parameters["size"] == 64
    assert type(policy.parameters["scale_min"]) is float
    assert policy.key == parse_policy("random-resized-crop-flip:scale_min=1.0,size=64").key
    assert POLICIES["pad-crop-flip"].defaults == {"padding": 4}


@pytest.mark.parametrize("text", GOLDEN_VIEWS)
def test_a_policys_text_reads_back(text: str) -> None:
    assert parse_policy(str(parse_policy(text))) == parse_policy(text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("crop", UnknownName, "unknown policy 'crop'; known: none, pad-crop-flip"),
        ("", UnknownName, "unknown policy ''"),
        ("pad-crop-flip:pad=4", UnknownName, "parameter of policy pad-crop-flip 'pad'.*padding"),
        ("none:size=3", UnknownName, "'size'.*it has none"),
        ("pad-crop-flip:padding=four", InputError, "padding must be a number, found 'four'"),
        ("pad-crop-flip:padding=1.5", InputError, "padding must be a number, found '1.5'"),
        ("pad-crop-flip:padding", InputError, "padding must be a number, found ''"),
        ("pad-crop-flip:padding=-1", InputError, "padding must be positive, found -1"),
        ("random-resized-crop-flip:size=0", InputError, "size must be positive, found 0"),
        ("random-resized-crop-flip:scale_min=nan", InputError, "scale_min must be .*found nan"),
        ("random-resized-crop-flip:ratio_max=inf", InputError, "ratio_max must be .*found inf"),
        ("random-resized-crop-flip:scale_max=0.01", InputError, "scale_min 0.08 is above scale_ma"),
        ("random-resized-crop-flip:ratio_min=2", InputError, "ratio_min 2.0 is above ratio_max"),
        ("resize-center-crop:size=300", InputError, "size 300 is above resize 256"),
        ("resize-center-crop:version=3", InputError, "version must be 1 to 2, found 3"),
        ("resize-center-crop:version=0", InputError, "version must be 1 to 2, found 0"),
        ("pad-crop-flip:version=1", UnknownName, "parameter of policy pad-crop-flip 'version'"),
    ],
)
def test_parse_policy_refuses(text: str, error: type[InputError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", "none"),
        ("pad-crop-flip", "none"),
        ("random-resized-crop-flip", "resize-center-crop:resize=256,size=224"),
        ("random-resized-crop-flip:size=112", "resize-center-crop:resize=128,size=112"),
        ("resize-center-crop:resize=40,size=30", "resize-center-crop:resize=40,size=30"),
        (
            "random-resized-crop-flip:version=1,size=112",
            "resize-center-crop:version=1,resize=128,size=112",
        ),
    ],
)
def test_evaluation_policy(text: str, expected: str) -> None:
    assert evaluation_policy(parse_policy(text)) == parse_policy(expected)


@pytest.mark.parametrize("text", ["none", "pad-crop-flip"])
def test_images_of_several_sizes_are_refused_by_name(text: str, tmp_path: Path) -> None:
    for i, size in enumerate([(8, 8), (8, 8), (8, 9)]):
        write_images(tmp_path / "train" / f"class{i}", pattern(1, *size))
    views = Views(open_target(str(tmp_path)), parse_policy(text))
    assert views.batch(numbers(0, 1), 0).shape == (2, 8, 8, 3)
    with pytest.raises(InputError) as caught:
        views.batch(numbers(1, 0, 2), 0)
    message = str(caught.value)
    assert "class1/0000.png gives (8, 8)" in message
    assert "class2/0000.png gives (8, 9)" in message
    assert "resize-center-crop" in message


def test_check_is_zlibs_crc32_of_the_bytes_in_row_order() -> None:
    image = pattern(1, 5, 7)[0]
    assert check_of(image) == zlib.crc32(image.tobytes())
    assert check_of(image[:, ::-1]) == zlib.crc32(image[:, ::-1].tobytes())
    assert check_of(image) != check_of(image[:, ::-1])
    assert checks_of(image[None]).dtype == np.uint32
