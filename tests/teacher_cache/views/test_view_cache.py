"""Views kept in a folder: the same bytes, nothing decoded twice, and never a wrong row."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.helpers import write_frames, write_images

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views import view_cache
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.view_cache import ViewCache, open_view_cache
from sskt.teacher_cache.views.views import Views, checks_of, open_views

CROP = "random-resized-crop-flip:size=16"
CLIP = "clip-corner-crop-flip:frames=4,size=12"
COUNT, SEEDS, GIB = 6, 3, 2.0**-7
ALL = np.arange(COUNT)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images of different sizes."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        image = rng.integers(0, 256, (1, 20 + i, 30 - i, 3), np.uint8)
        write_images(tmp_path / "photos" / "train" / f"class{i % 2}" / str(i), image)
    return tmp_path / "photos"


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Six clips of 5 to 10 frames."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        folder = tmp_path / "clips" / "train" / f"class{i % 2}" / f"v{i}"
        write_frames(folder, rng.integers(0, 256, (5 + i, 18, 24, 3), np.uint8))
    return tmp_path / "clips"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each sample was decoded in this process."""
    counts: Counter[int] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Target, name)

        def read(self: Target, sample: int, *rest: Any) -> Any:
            counts[sample] += 1
            return original(self, sample, *rest)

        return read

    for name in ("read", "read_frames"):
        monkeypatch.setattr(Target, name, counted(name))
    return counts


def cache_of(folder: Path, views: Views, gib: float = GIB, seeds: int = SEEDS) -> ViewCache:
    opened = open_view_cache(folder, gib, views, seeds)
    assert opened is not None
    return opened


def require_same(cache: ViewCache, views: Views, seeds: int = SEEDS) -> None:
    """All views of the cache are those of the policy."""
    for seed in range(seeds):
        seen = cache.seen(ALL, [seed])
        assert seen is not None and not seen.bad and not seen.failure
        expected = views.batch(ALL, seed)
        np.testing.assert_array_equal(seen.views[seed], expected)
        np.testing.assert_array_equal(seen.checks[seed], checks_of(expected))
        np.testing.assert_array_equal(seen.rows, ALL)


def passed(cache: ViewCache, decoded: Counter[int], seeds: int = SEEDS) -> list[int]:
    """Decodings of each sample in a pass over all seeds."""
    decoded.clear()
    for seed in range(seeds):
        assert cache.seen(ALL, [seed]) is not None
    return [decoded[i] for i in range(COUNT)]


@pytest.mark.parametrize("kind", ["photos", "clips"])
def test_a_file_is_decoded_once_for_all_seeds(
    kind: str, tmp_path: Path, decoded: Counter[int], request: pytest.FixtureRequest
) -> None:
    policy = parse_policy(CLIP if kind == "clips" else CROP)
    views = open_views(open_target(str(request.getfixturevalue(kind))), policy)
    cache = cache_of(tmp_path / "cache", views)
    assert passed(cache, decoded) == [1] * COUNT
    assert passed(cache, decoded) == [0] * COUNT
    again = pickle.loads(pickle.dumps(cache_of(tmp_path / "cache", views)))
    assert passed(again, decoded) == [0] * COUNT
    require_same(again, views)
    assert passed(cache_of(tmp_path / "cache", views, seeds=5), decoded, 5) == [1] * COUNT


@pytest.mark.parametrize("kind", ["photos", "clips"])
def test_another_policy_another_target_and_a_changed_file_are_decoded(
    kind: str, tmp_path: Path, decoded: Counter[int], request: pytest.FixtureRequest
) -> None:
    folder, text = request.getfixturevalue(kind), CLIP if kind == "clips" else CROP
    views = open_views(open_target(str(folder)), parse_policy(text))
    assert passed(cache_of(tmp_path / "cache", views), decoded) == [1] * COUNT
    others = [
        open_views(views.target, parse_policy(f"{text.partition(':')[0]}:version=1,{text[-7:]}")),
        open_views(open_target(str(folder), limit=4), views.policy),
    ]
    for other in others:
        cache, samples = cache_of(tmp_path / "cache", other), np.arange(len(other.target))
        decoded.clear()
        seen = cache.seen(samples, [1])
        assert seen is not None and len(decoded) == len(samples)
        np.testing.assert_array_equal(seen.views[1], other.batch(samples, 1))
    [changed] = [p for p in folder.rglob("*") if "5" in str(p.relative_to(folder)) and p.is_file()][
        :1
    ]
    before = changed.stat()
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert sorted(passed(cache_of(tmp_path / "cache", views), decoded)) == [0] * (COUNT - 1) + [1]


def test_a_damaged_row_is_made_again(photos: Path, tmp_path: Path, decoded: Counter[int]) -> None:
    views = open_views(open_target(str(photos)), parse_policy(CROP))
    cache = cache_of(tmp_path / "cache", views)
    require_same(cache, views)
    [file] = (tmp_path / "cache").glob("*.views")
    stride = len(file.read_bytes()) // (COUNT * SEEDS)
    assert stride == 24 + 16 * 16 * 3
    for place in (0, 5, 9, 20, 24, stride - 1):  # each part of the tag, and the view's ends
        row = 4 + COUNT  # sample 4 under seed 1
        with file.open("r+b") as opened:
            opened.seek(row * stride + place)
            [byte] = opened.read(1)
            opened.seek(row * stride + place)
            opened.write(bytes([byte ^ 255]))
        assert passed(cache, decoded) == [0, 0, 0, 0, 1, 0], place
        assert passed(cache, decoded) == [0] * COUNT
    os.truncate(file, 3 * stride + 100)  # a row that is cut, and those behind it
    require_same(cache, views)
    assert passed(cache, decoded) == [0] * COUNT


def test_the_budget_covers_all_views_of_the_folder(
    photos: Path, tmp_path: Path, decoded: Counter[int], caplog: pytest.LogCaptureFixture
) -> None:
    views = open_views(open_target(str(photos)), parse_policy(CROP))
    stride = 24 + 16 * 16 * 3
    gib = (COUNT + 2.5) * stride / 2**30
    cache = cache_of(tmp_path / "cache", views, gib)
    assert "has room for 8 views of" in caplog.text
    first = passed(cache, decoded)
    assert first == [2, 2, 3, 3, 3, 3]
    assert passed(cache, decoded) == [1, 1, 2, 2, 2, 2]
    require_same(cache, views)
    [file] = (tmp_path / "cache").glob("*.views")
    assert file.stat().st_size == (COUNT + 2) * stride
    other = open_views(views.target, parse_policy("random-resized-crop-flip:size=8"))
    small = cache_of(tmp_path / "cache", other, gib)
    require_same(small, other)
    total = sum(f.stat().st_size for f in (tmp_path / "cache").glob("*.views"))
    assert (COUNT + 2) * stride < total <= gib * 2**30
    cache_of(tmp_path / "less", views, gib)
    cache_of(tmp_path / "less", views, gib / 2)
    [file] = (tmp_path / "less").glob("*.views")
    assert file.stat().st_size <= gib / 2 * 2**30


def test_a_full_disk_ends_the_storing_only(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    views = open_views(open_target(str(photos)), parse_policy(CROP))
    cache = cache_of(tmp_path / "cache", views)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written: list[int] = []
    write = os.pwritev

    def nearly_full(handle: int, parts: list[Any], place: int) -> int:
        written.append(place)
        if len(written) > 4:
            return write(handle, [bytes(parts[0]), bytes(parts[1])[:100]], place)
        return write(handle, parts, place)

    monkeypatch.setattr(os, "pwritev", nearly_full)
    monkeypatch.setattr(os, "pwrite", full)
    failures = set()
    for seed in range(SEEDS):
        seen = cache.seen(ALL, [seed])
        assert seen is not None
        np.testing.assert_array_equal(seen.views[seed], views.batch(ALL, seed))
        failures.add(seen.failure)
        if seen.failure:
            cache.stop(seen.failure)
            cache.stop(seen.failure)
    assert failures == {"", "No space left on device"}
    assert caplog.text.count("no further views are stored") == 1
    monkeypatch.undo()
    require_same(cache_of(tmp_path / "cache", views), views)


def _fill(views: Views, folder: Path, start: Any) -> None:
    cache = cache_of(folder, views)
    start.wait()
    for _ in range(3):
        require_same(cache, views)


def test_two_processes_write_the_same_rows(
    photos: Path, tmp_path: Path, decoded: Counter[int]
) -> None:
    views = open_views(open_target(str(photos)), parse_policy(CROP))
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    writers = [
        context.Process(target=_fill, args=(views, tmp_path / "cache", start)) for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert passed(cache_of(tmp_path / "cache", views), decoded) == [0] * COUNT


def test_a_bad_image_and_views_of_several_sizes(photos: Path, tmp_path: Path) -> None:
    [second] = (photos / "train" / "class1" / "1").glob("*")
    views = open_views(open_target(str(photos)), parse_policy(CROP))
    sample = list(views.target.ids).index(str(second.relative_to(photos / "train")))
    second.write_bytes(second.read_bytes()[:-30])
    for _ in range(2):
        seen = cache_of(tmp_path / "cache", views).seen(ALL, [0])
        assert seen is not None and len(seen.views[0]) == len(seen.checks[0]) == COUNT - 1
        assert [s for s, _ in seen.bad] == [sample] == list(set(ALL) - set(seen.rows))
        np.testing.assert_array_equal(seen.views[0], views.seen(ALL, [0]).views[0])
    whole = open_views(views.target, parse_policy("none"))
    assert cache_of(tmp_path / "cache", whole).seen(ALL, [0]) is None


def test_what_needs_no_cache_and_what_cannot_be_one(photos: Path, tmp_path: Path) -> None:
    views = open_views(open_target(str(photos)), parse_policy(CROP))
    assert open_view_cache(None, GIB, views, SEEDS) is None
    held = Target(
        "held", "train", ("a",), np.zeros(1, np.int64), ["0"], np.zeros((1, 8, 8, 3), np.uint8)
    )
    assert open_view_cache(tmp_path / "no", GIB, open_views(held, parse_policy("none")), 1) is None
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot keep views in .*; name a folder"):
        open_view_cache(tmp_path / "file", GIB, views, SEEDS)
    cache_of(tmp_path / "cache", views)
    [file] = (tmp_path / "cache").glob("*.views")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="not a regular file"):
        open_view_cache(tmp_path / "cache", GIB, views, SEEDS)


def test_one_decoding_makes_a_bounded_number_of_views(
    photos: Path, tmp_path: Path, decoded: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_cache, "TOGETHER_BYTES", 24 + 16 * 16 * 3)
    views = open_views(open_target(str(photos)), parse_policy(CROP))
    cache = cache_of(tmp_path / "cache", views)
    assert passed(cache, decoded) == [2] * COUNT
    assert passed(cache, decoded) == [0] * COUNT


@pytest.mark.parametrize("mixing", ["mixup=0.4", "cutmix=1,trivial=1"])
def test_mixed_views_are_made_of_kept_ones(
    photos: Path, tmp_path: Path, decoded: Counter[int], mixing: str
) -> None:
    """Nothing is decoded twice, and a partner's file that has changed is read again."""
    policy = parse_policy(f"{CROP},{mixing}")
    views = Views(open_target(str(photos)), policy)
    cache = open_view_cache(tmp_path / "kept", GIB, views, SEEDS)
    assert cache is not None
    seeds = range(SEEDS)
    expected = views.seen(ALL, seeds)
    for _ in range(2):
        found = cache.seen(ALL, seeds)
        assert found is not None
        for seed in seeds:
            np.testing.assert_array_equal(found.views[seed], expected.views[seed])
            np.testing.assert_array_equal(found.checks[seed], checks_of(expected.views[seed]))
            ours, theirs = found.mixed[seed], expected.mixed[seed]
            np.testing.assert_array_equal(ours.weights, theirs.weights)
            np.testing.assert_array_equal(ours.partners, theirs.partners)
    decoded.clear()
    cache.seen(ALL, seeds)
    assert not decoded
    before = cache.seen(ALL, [0])
    assert before is not None
    changed = 2
    assert views.target.paths is not None
    path = views.target.paths[changed]
    write_images(path.parent, np.full((1, 22, 28, 3), 200, np.uint8))
    assert path.name == "0000.png"
    after, expected = cache.seen(ALL, [0]), Views(open_target(str(photos)), policy).seen(ALL, [0])
    assert after is not None
    np.testing.assert_array_equal(after.views[0], expected.views[0])
    mixed = before.mixed[0]
    by_partner = (mixed.partners == changed) & (changed != ALL)
    differ = (after.views[0] != before.views[0]).any((1, 2, 3))
    assert differ[by_partner & (mixed.weights < 1)].all() and differ.sum() <= 2
