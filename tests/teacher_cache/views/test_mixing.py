"""Mixup and cutmix: partners, shares, pixels, and labels that belong to the mixed view."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import independent_reader
from support.helpers import TINY, write_images
from support.independent_reader import compare, load_factory, open_folder, open_set

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.mixing import partners, share
from sskt.teacher_cache.views.policies import evaluation_policy, parse_policy
from sskt.teacher_cache.views.views import Views, check_of

MIXUP, CUTMIX = "pad-crop-flip:mixup=0.4", "pad-crop-flip:cutmix=1.0"
BOTH = "pad-crop-flip:padding=2,mixup=0.8,cutmix=1.0,randaugment=1"


def images_of(n: int, height: int = 12, width: int = 15) -> UInt8:
    made: UInt8 = np.random.default_rng(3).integers(0, 256, (n, height, width, 3), np.uint8)
    return made


def views_of(policy: str, images: UInt8) -> Views:
    n = len(images)
    target = Target("t", "train", ("a", "b"), np.arange(n) % 2, [str(i) for i in range(n)],
                    images=images)  # fmt: skip
    return Views(target, parse_policy(policy))


@given(st.integers(1, 400), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_partners_are_a_permutation(count: int, seed: int) -> None:
    policy, samples = parse_policy(MIXUP), np.arange(count)
    found = partners(policy, samples, seed, count)
    assert sorted(found.tolist()) == list(range(count))
    some = samples[::-3]
    assert partners(policy, some, seed, count).tolist() == found[some].tolist()
    theirs = [
        independent_reader._partner(policy.identity(), i, seed, count) for i in (0, count - 1)
    ]
    assert theirs == [found[0], found[-1]]


def test_partners_are_spread_over_the_target_and_change_with_the_seed() -> None:
    policy, count = parse_policy(MIXUP), 1000
    shifts = Counter[int]()
    kept = []
    before = np.arange(count)
    for seed in range(20):
        found = partners(policy, np.arange(count), seed, count)
        shifts.update(((found - np.arange(count)) % count // 100).tolist())
        kept.append((found == np.arange(count)).mean())
        assert (found == before).mean() < 0.01
        before = found
    assert all(abs(n - 2000) < 300 for n in shifts.values()) and len(shifts) == 10
    assert np.mean(kept) < 0.004
    assert np.abs(np.corrcoef(np.arange(count), found)[0, 1]) < 0.12


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 0.8, 1.0, 2.0])
def test_shares_have_a_beta_distribution(alpha: float) -> None:
    drawn = np.array([share(alpha, i, 0, 7) for i in range(3000)]) / 65536
    assert abs(drawn.mean() - 0.5) < 0.03
    # The variance of Beta(a, a), and the mean of min(x, 1 - x) by sampling numpy's.
    assert abs(drawn.var() - 1 / (4 * (2 * alpha + 1))) < 0.012
    exact = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        below = np.quantile(exact, quantile) + 1e-4
        assert abs((drawn <= below).mean() - (exact <= below).mean()) < 0.03


def test_mixup_is_the_blend_of_both_views() -> None:
    images = images_of(9)
    views, plain = views_of(MIXUP, images), views_of("pad-crop-flip", images)
    seen = views.seen(np.arange(9), [4])
    weights = seen.mixed[4].weights
    assert len(set(weights.tolist())) > 5
    for i, other in enumerate(seen.mixed[4].partners.tolist()):
        own, theirs = (views.of_image(images[j], j, 4).astype(float) for j in (i, other))
        expected = weights[i] * own + (1 - weights[i]) * theirs
        assert np.abs(seen.views[4][i] - expected).max() <= 0.51
        assert not np.array_equal(views.policy.key, plain.policy.key)
        np.testing.assert_array_equal(views[i, 4], seen.views[4][i])


def test_cutmix_weighs_by_the_exact_area() -> None:
    """Black and white images: the mean of a view tells the area of the box."""
    images = np.zeros((40, 20, 30, 3), np.uint8)
    images[::2] = 255
    views = views_of("pad-crop-flip:padding=0,cutmix=1.0", images)
    seen = views.seen(np.arange(40), [0])
    areas = 0
    for i, other in enumerate(seen.mixed[0].partners.tolist()):
        view, weight = seen.views[0][i], seen.mixed[0].weights[i]
        if i % 2 != other % 2:
            assert abs((view == images[i, 0, 0, 0]).mean() - weight) < 1e-6
            box = np.argwhere((view != images[i, 0, 0, 0]).any(-1))
            if len(box):
                height, width = box.max(0) - box.min(0) + 1
                assert height * width == len(box)
                areas += 1
    assert areas > 8


@pytest.mark.parametrize("policy", [MIXUP, CUTMIX, BOTH])
@given(count=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(deadline=None, max_examples=40)
def test_an_independent_reader_mixes_the_same(
    policy: str, count: int, seed: int, data: st.DataObject
) -> None:
    images = images_of(count, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    views = views_of(policy, images)
    seen = views.seen(np.arange(count), [seed])
    identity = views.policy.identity()
    for sample in range(count):
        view, other, weight = independent_reader.mixed_view_of(
            lambda row: independent_reader.view_of(images[row], identity, row, seed),
            identity, sample, seed, count,
        )  # fmt: skip
        np.testing.assert_array_equal(seen.views[seed][sample], view)
        assert seen.mixed[seed].partners[sample] == other
        assert seen.mixed[seed].weights[sample] == np.float32(weight)


GOLDEN = {
    MIXUP: [2031668132, 207454981, 2276479907, 2249126727],
    CUTMIX: [2415571959, 767050892, 2126989812, 2837655762],
    BOTH: [3267062577, 655237764, 3896626386, 1679853609],
}
"""CRC-32 of views and weights under two seeds."""


@pytest.mark.parametrize("policy", GOLDEN)
def test_mixed_views_are_pinned(policy: str) -> None:
    views, crc = views_of(policy, images_of(11)), []
    for seed in (0, 2**31):
        seen = views.seen(np.arange(11), [seed])
        crc.append(zlib.crc32(seen.views[seed].tobytes()))
        crc.append(zlib.crc32(seen.mixed[seed].weights.tobytes()))
    assert crc == GOLDEN[policy]


def test_an_independent_reader_replays_labels_of_mixed_views(
    images: Path, tiny: Source, tmp_path: Path
) -> None:
    for policy in (BOTH, "random-resized-crop-flip:size=20,mixup=0.2"):
        views = Views(open_target(str(images)), parse_policy(policy))
        options = StageOptions(batch_size=32, workers=0, shard_rows=16)
        report = cache_teachers(views, [tiny], parse_encoding("f32"), 2, tmp_path, options)
        found = compare(
            open_set(report.label_sets[0].path),
            open_folder(images, "train", 60),
            load_factory(f"{TINY}:build"),
        )
        assert (found.compared, found.skipped, found.wrong_views) == (120, 0, 0)
        assert found.worst < 1e-5


def test_a_partner_that_cannot_be_decoded_leaves_the_view_unmixed(tmp_path: Path) -> None:
    write_images(tmp_path, images_of(8))
    first = tmp_path / open_target(str(tmp_path)).ids[0]
    whole = Views(open_target(str(tmp_path)), parse_policy(MIXUP)).seen(np.arange(8), [0, 1])
    first.write_bytes(first.read_bytes()[:60])
    views = Views(open_target(str(tmp_path)), parse_policy(MIXUP))
    seen = views.seen(np.arange(8), [0, 1])
    assert [sample for sample, _ in seen.bad] == [0] and seen.rows.tolist() == list(range(1, 8))
    for seed in (0, 1):
        for i, row in enumerate(seen.rows.tolist()):
            view, weight = seen.views[seed][i], seen.mixed[seed].weights[i]
            if seen.mixed[seed].partners[i] == 0:
                assert weight == 1
                own = views.of_image(views.target.read(row), row, seed)
                assert check_of(view) == check_of(own)
            else:
                assert weight == whole.mixed[seed].weights[row]
                np.testing.assert_array_equal(view, whole.views[seed][row])


def test_evaluation_policies_mix_nothing() -> None:
    assert evaluation_policy(parse_policy(BOTH)) == parse_policy("none")
    strong = parse_policy("random-resized-crop-flip:size=112,cutmix=1,erase=0.25")
    expected = parse_policy("resize-center-crop:resize=128,size=112")
    assert evaluation_policy(strong) == expected
    with pytest.raises(UnknownName, match="parameter of policy none 'mixup'"):
        parse_policy("none:mixup=0.2")


@pytest.mark.parametrize("value", ["0.01", "3", "-1", "nan"])
def test_alphas_out_of_range_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"mixup must be 0 or 0\.05 to 2, found"):
        parse_policy(f"pad-crop-flip:mixup={value}")


def test_words_of_a_view_say_both_classes() -> None:
    views = views_of(MIXUP, images_of(6))
    mixed = views.seen(np.array([3]), [1]).mixed[1]
    other, weight = int(mixed.partners[0]), float(mixed.weights[0])
    text = views.label_text(3, 1)
    assert text == f"b ({weight:.0%}) and {'ab'[other % 2]} ({1 - weight:.0%}, sample {other})"
    assert views_of("pad-crop-flip", images_of(6)).label_text(3, 1) == "b"
