"""Strong augmentation: its definition, its distribution, and torchvision's operations beside it."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import independent_reader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.media.images import UInt8, read_image
from sskt.teacher_cache.rng import AUGMENT, draw
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views import image_operations as ops
from sskt.teacher_cache.views.augment import (
    ERASED,
    OPERATIONS,
    PARAMETERS,
    RANDAUGMENT,
    TRIVIAL,
    Ranges,
    operated,
)
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, check_of

PAD, CROP = "pad-crop-flip:padding=0", "random-resized-crop-flip:size=24"
ALL = "jitter=0.4,hue=0.1,erase=0.5"


def noise(height: int, width: int, seed: int = 0) -> UInt8:
    """An image with large and small structure: uint8 ``[height, width, 3]``."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3))
    large = coarse.repeat(4, 0).repeat(4, 1)[:height, :width]
    fine: UInt8 = np.clip(large + rng.integers(-9, 10, large.shape), 0, 255).astype(np.uint8)
    return fine


def views_of(policy: str, images: UInt8) -> Views:
    n = len(images)
    target = Target("t", "train", ("a",), np.zeros(n, np.int64), [str(i) for i in range(n)],
                    images=images)  # fmt: skip
    return Views(target, parse_policy(policy))


# --- pinned -----------------------------------------------------------------------------------

GOLDEN: dict[str, list[int]] = {
    "pad-crop-flip:randaugment=2": [
        65739524,
        1779669301,
        395212756,
        1078715637,
        2964836133,
    ],
    "pad-crop-flip:randaugment=3,magnitude=15,jitter=0.4,hue=0.1,erase=0.5": [
        3659361123,
        3378101561,
        1602943662,
        3925864185,
        392835584,
    ],
    "pad-crop-flip:trivial=1,erase=0.25": [
        1539072491,
        3746185522,
        1305841388,
        2777758914,
        1233679042,
    ],
    "random-resized-crop-flip:size=16,randaugment=2,magnitude=9,erase=0.25": [
        10448323,
        573198373,
        526436822,
        3896910358,
        3521579827,
    ],
    "random-resized-crop-flip:version=1,size=16,trivial=1": [
        4021788926,
        2860036812,
        160557323,
        4120966165,
        3113910730,
    ],
    "random-resized-crop-flip:size=16,jitter=0.4,hue=0.1": [
        2353114476,
        2293614872,
        320371764,
        3433250472,
        1661104427,
    ],
}
"""View checks of ``noise(20, 26)`` at each of ``PLACES``."""

PLACES = ((0, 0), (1, 0), (0, 1), (12345, 9), (2**32 + 7, 2**31))


@pytest.mark.parametrize("text", GOLDEN)
def test_view_bytes_are_pinned(text: str) -> None:
    image = noise(20, 26)
    views = views_of(text, image[None])
    found = [check_of(views.of_image(image, *place)) for place in PLACES]
    assert found == GOLDEN[text]


def test_operations_are_pinned() -> None:
    image, crc = noise(33, 40), 0
    for name in OPERATIONS:
        for ranges in (RANDAUGMENT, TRIVIAL):
            for magnitude in range(31):
                for negative in (False, True):
                    made = operated(image, name, magnitude, negative, ranges)
                    crc = zlib.crc32(np.ascontiguousarray(made).data, crc)
    for q in range(-3 * ops.ONE, 3 * ops.ONE, 4999):
        crc = zlib.crc32(ops.hue(image, q).data, crc)
    assert crc == OPERATIONS_CRC


OPERATIONS_CRC = 4280025109


def test_absent_parameters_are_no_part_of_the_identity() -> None:
    plain = parse_policy("pad-crop-flip")
    off = ",".join(f"{key}=0" for key in PARAMETERS if key != "magnitude")
    assert parse_policy(f"pad-crop-flip:{off}") == plain
    assert plain.identity()["parameters"] == {"padding": 4}
    strong = parse_policy("pad-crop-flip:randaugment=2,erase=0.25")
    assert strong.identity()["parameters"] == {
        "padding": 4, "randaugment": 2, "magnitude": 9, "erase": 0.25,
    }  # fmt: skip
    assert parse_policy(str(strong)) == strong
    assert strong.key != plain.key


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("pad-crop-flip:randaugment=2,trivial=1", InputError, "give randaugment or trivial"),
        ("pad-crop-flip:magnitude=9", InputError, "magnitude is that of randaugment; add"),
        ("pad-crop-flip:randaugment=17", InputError, "randaugment must be 0 to 16, found 17"),
        ("pad-crop-flip:randaugment=1,magnitude=31", InputError, "magnitude must be 0 to 30"),
        ("pad-crop-flip:jitter=-0.1", InputError, "jitter must be 0 to 1, found -0.1"),
        ("pad-crop-flip:jitter=nan", InputError, "jitter must be 0 to 1, found nan"),
        ("pad-crop-flip:hue=0.6", InputError, "hue must be 0 to 0.5, found 0.6"),
        ("pad-crop-flip:erase=2", InputError, "erase must be 0 to 1, found 2"),
        ("none:jitter=0.4", UnknownName, "parameter of policy none 'jitter'"),
        ("resize-center-crop:erase=1", UnknownName, "parameter of policy resize-center-crop"),
        ("clip-center-crop:trivial=1", UnknownName, "parameter of policy clip-center-crop"),
    ],
)
def test_parameters_that_are_refused(text: str, error: type[InputError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_policy(text)


# --- against the independent reader -----------------------------------------------------------


@given(
    st.sampled_from([PAD, CROP]),
    st.sampled_from(["randaugment=3,magnitude=14", "randaugment=16,magnitude=30", "trivial=1",
                     "jitter=1.0", "hue=0.5", ALL, f"trivial=1,{ALL}", "erase=1.0"]),
    st.integers(1, 17), st.integers(1, 17), st.integers(0, 2**40), st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(deadline=None, max_examples=120)
def test_an_independent_reader_makes_the_same_views(
    policy: str, more: str, height: int, width: int, sample: int, seed: int
) -> None:
    image = noise(height, width, seed)
    views = views_of(f"{policy},{more}".replace("size=24", "size=9"), image[None])
    ours = views.of_image(image, sample, seed)
    theirs = independent_reader.view_of(image, views.policy.identity(), sample, seed)
    np.testing.assert_array_equal(ours, theirs)
    batch = views.of_images(image[None], np.array([sample]), seed)
    np.testing.assert_array_equal(batch[0], ours)


def test_words_are_those_of_a_stream_of_their_own() -> None:
    """RandAugment of one operation, from the words of the documented blocks."""
    text = (
        '{"parameters":{"magnitude":9,"padding":0,"randaugment":2},"policy":"pad-crop-flip",'
        '"version":1}'
    )
    image = noise(24, 24)
    views = views_of(f"{PAD},randaugment=2", image[None])
    assert views.policy.identity() == json.loads(text)
    key = zlib.crc32(text.encode())
    for sample in range(30):
        expected = image[:, ::-1] if draw(sample, 7, key)[0, 2] >= 2**31 else image
        for block in range(2):
            words = draw(sample, 7, key, block=block, stream=AUGMENT)[0].tolist()
            name, negative = OPERATIONS[words[0] * 14 >> 32], words[1] >= 2**31
            expected = operated(expected, name, 9, negative)
        np.testing.assert_array_equal(views.of_image(image, sample, 7), expected)


# --- against torchvision ----------------------------------------------------------------------


def theirs(image: UInt8, name: str, strength: float) -> UInt8:
    """An operation of torchvision's automatic augmentation, with its own strength."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    transform = v2.RandAugment()
    made = transform._apply_image_or_video_transform(
        tensor, name, strength, interpolation=v2.InterpolationMode.NEAREST, fill={}
    )
    return np.asarray(made.permute(1, 2, 0))


NAMES = {
    "shear-x": "ShearX", "shear-y": "ShearY", "translate-x": "TranslateX",
    "translate-y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness",
    "saturation": "Color", "contrast": "Contrast", "sharpness": "Sharpness",
    "posterize": "Posterize", "solarize": "Solarize", "autocontrast": "AutoContrast",
    "equalize": "Equalize", "identity": "Identity",
}  # fmt: skip
PLACED = {"shear-x", "shear-y", "translate-x", "translate-y", "rotate"}


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("magnitude", [0, 1, 9, 14, 30])
@pytest.mark.parametrize("ranges", [RANDAUGMENT, TRIVIAL], ids=["rand", "trivial"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_torchvision(
    name: str, ranges: Ranges, magnitude: int, negative: bool
) -> None:
    image = noise(96, 120)
    transform: Any = v2.RandAugment() if ranges is RANDAUGMENT else v2.TrivialAugmentWide()
    magnitudes, signed = transform._AUGMENTATION_SPACE[NAMES[name]]
    found = magnitudes(31, *image.shape[:2])
    strength = 0.0 if found is None else float(found[magnitude])
    if signed and negative:
        strength = -strength
    ours = operated(image, name, magnitude, negative, ranges).astype(int)
    far = np.abs(ours - theirs(image, NAMES[name], strength))
    if name in PLACED:
        # A pixel may come from its neighbour, as their matrices are float32.
        assert (far.max(-1) > 0).mean() < 0.02, (name, strength)
    else:
        assert far.max() <= (2 if name in ("saturation", "contrast") else 1)  # of blended greys


@pytest.mark.parametrize("turn", [-0.5, -0.2, -0.01, 0.0, 0.1, 1 / 3, 0.5])
def test_hue_is_that_of_torchvision(turn: float) -> None:
    image = noise(64, 64)
    expected = tv.adjust_hue(torch.from_numpy(image).permute(2, 0, 1), turn).permute(1, 2, 0)
    far = np.abs(ops.hue(image, round(6 * turn * ops.ONE)).astype(int) - np.asarray(expected))
    assert far.max() <= 1


def test_hue_keeps_grey_and_comes_round() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(ops.hue(levels, 12345), levels)
    image = noise(32, 32)
    for q in (0, 6 * ops.ONE, -6 * ops.ONE):
        np.testing.assert_array_equal(ops.hue(image, q), image)
    np.testing.assert_array_equal(ops.hue(image, 2 * ops.ONE), image[..., [2, 0, 1]])


def test_a_rotation_has_the_same_pixels_on_every_machine() -> None:
    """No sine or cosine is so near to a half unit that the C library decides its rounding."""
    getcontext().prec = 40
    pi = Decimal("3.14159265358979323846264338327950288419716939937510")
    for half_degrees in {s * per * m for per in (2, 9) for m in range(31) for s in (-1, 1)}:
        angle = Decimal(half_degrees) * pi / 360
        for first in (Decimal(1), angle):  # the series of the cosine and of the sine
            term = total = first
            k = 0 if first == 1 else 1
            while abs(term) > Decimal("1e-35"):
                term *= -angle * angle / ((k + 1) * (k + 2))
                total, k = total + term, k + 2
            exact = total * 65536 + Decimal("0.5")
            near = abs(exact - exact.to_integral_value())
            assert near > Decimal("1e-6") or total in (0, 1), half_degrees


# --- what is drawn ----------------------------------------------------------------------------


def test_jitter_reaches_its_range_in_all_orders() -> None:
    from sskt.teacher_cache.views import augment

    policy = parse_policy(f"{PAD},jitter=0.4,hue=0.1")
    orders, factors = Counter[tuple[str, ...]](), dict[str, list[int]]()
    for sample in range(2400):
        words = draw_words(policy.key, sample)
        steps: list[Any] = augment._jitter(policy, words)
        orders[tuple(step.func.__name__ for step in steps)] += 1
        for step in steps:
            factors.setdefault(step.func.__name__, []).append(step.keywords["q"])
    assert len(orders) == 24
    assert min(orders.values()) > 60 and max(orders.values()) < 145
    turns = np.array(factors.pop("hue")) / ops.ONE / 6
    assert -0.1 <= turns.min() < -0.099 and 0.099 < turns.max() <= 0.1
    for name, values in factors.items():
        strengths = np.array(values) / ops.ONE
        assert 0.5999 < strengths.min() < 0.605 and 1.395 < strengths.max() < 1.4001, name
        assert abs(strengths.mean() - 1) < 0.02


def draw_words(key: int, sample: int) -> Any:
    def words(block: int = 0) -> tuple[int, ...]:
        return tuple(draw(sample, 3, key, block=block, stream=AUGMENT)[0].tolist())

    return words


def test_erasing_has_the_areas_of_the_paper() -> None:
    image = np.full((1, 64, 64, 3), 255, np.uint8)
    views = views_of(f"{PAD},erase=0.25", image)
    shares, aspects = [], []
    for sample in range(2000):
        erased = (views.of_image(image[0], sample, 0) == ERASED).all(-1)
        if erased.any():
            rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
            assert erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            shares.append(erased.mean())
            aspects.append(len(rows) / len(columns))
    assert abs(len(shares) / 2000 - 0.25) < 0.03
    assert 0.018 < min(shares) < 0.03 and 0.31 < max(shares) < 0.34
    assert abs(np.mean(shares) - 0.175) < 0.02
    assert 0.28 < min(aspects) < 0.4 and 2.5 < max(aspects) < 3.5
    assert abs(np.mean(np.log(aspects))) < 0.1


def test_a_clip_is_augmented_as_one(data: Path) -> None:
    """One draw for all frames: frame by frame what an image with the same words becomes."""
    from sskt.teacher_cache.views.augment import augmented

    policy = parse_policy("clip-corner-crop-flip:trivial=1,jitter=0.4,erase=1")
    frames = np.stack([noise(24, 24, i) for i in range(4)])
    for sample in range(20):
        clip = augmented(policy, frames, sample, 5)
        alone = [augmented(policy, frame, sample, 5) for frame in frames]
        np.testing.assert_array_equal(clip, np.stack(alone))


def test_real_images_against_torchvision(data: Path) -> None:
    """The operations on real JPEGs: at most one level from torchvision's."""
    for path in sorted((data / "imagenet").glob("*.JPEG"))[:6]:
        image = read_image(path)
        for name in set(OPERATIONS) - PLACED:
            magnitudes, _ = v2.RandAugment()._AUGMENTATION_SPACE[NAMES[name]]
            found = magnitudes(31, *image.shape[:2])
            strength = 0.0 if found is None else float(found[9])
            far = operated(image, name, 9, False).astype(int) - theirs(image, NAMES[name], strength)
            assert np.abs(far).max() <= 1, (path.name, name)
