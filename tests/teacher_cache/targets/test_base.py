"""Samples: names, files, and a target's selections, windows, words and identity."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sskt.teacher_cache.errors import BadClip, InputError
from sskt.teacher_cache.targets.base import Files, Int64, Names, Target

# As file names are: any bytes, decoded so that they come back.
names = st.text(max_size=8) | st.binary(max_size=8).map(
    lambda raw: raw.decode("utf-8", "surrogateescape")
)
lists = st.lists(names, max_size=12)
bounds = st.none() | st.integers(-20, 20)


def ints(*values: int) -> Int64:
    return np.array(values, np.int64)


# --- Names --------------------------------------------------------------------------------------


@given(plain=lists, index=st.integers(-20, 20))
@settings(deadline=None)
def test_names_are_a_list(plain: list[str], index: int) -> None:
    packed = Names(plain)
    assert len(packed) == len(plain)
    assert list(packed) == plain
    assert list(reversed(packed)) == plain[::-1]
    assert packed == plain and packed == Names(plain) and plain == packed
    assert packed != [*plain, "more"]
    if -len(plain) <= index < len(plain):
        assert packed[index] == plain[index]
        assert packed[np.int64(index)] == plain[index]  # type: ignore[call-overload]
    else:
        with pytest.raises(IndexError):
            packed[index]
    for name in plain:
        assert name in packed and packed.index(name) == plain.index(name)


@given(plain=lists, start=bounds, stop=bounds, step=bounds.filter(lambda step: step != 0))
@settings(deadline=None)
def test_slices_of_names_are_a_lists(
    plain: list[str], start: int | None, stop: int | None, step: int | None
) -> None:
    assert Names(plain)[start:stop:step] == plain[start:stop:step]


@given(plain=lists)
@settings(deadline=None)
def test_names_travel_to_another_process(plain: list[str]) -> None:
    again = pickle.loads(pickle.dumps(Names(plain)))
    assert isinstance(again, Names) and list(again) == plain


def test_names_take_any_iterable_once() -> None:
    assert list(Names(str(i) for i in range(3))) == ["0", "1", "2"]


def test_names_cost_their_bytes() -> None:
    # 8 bytes of place and the text: a Python string alone takes 50 and more
    size = len(pickle.dumps(Names(f"class/{i:07d}.jpg" for i in range(10_000))))
    assert size < 10_000 * (17 + 8) + 1_000


def test_names_have_a_short_text_and_no_hash() -> None:
    assert repr(Names(["a", "b"])) == "Names(['a', 'b'])"
    assert repr(Names("abcd")) == "Names(['a', 'b', 'c']...)"
    with pytest.raises(TypeError):
        hash(Names(["a"]))


# --- Files --------------------------------------------------------------------------------------


def test_files_are_paths_under_a_folder() -> None:
    odd = os.fsdecode(b"c/\xff.png")
    files = Files(Path("/data"), Names(["a/1.png", odd, "/elsewhere/3.png"]))
    expected = [Path("/data/a/1.png"), Path("/data") / odd, Path("/elsewhere/3.png")]
    assert len(files) == 3
    assert list(files) == expected
    assert files[-1] == expected[-1] and list(files[1:]) == expected[1:]
    assert os.fsencode(files[1]) == b"/data/c/\xff.png"
    with pytest.raises(IndexError):
        files[3]
    assert list(pickle.loads(pickle.dumps(files))) == expected


# --- Target -------------------------------------------------------------------------------------


def images(n: int = 7) -> Target:
    return Target(
        "made",
        "train",
        ("a", "b"),
        np.arange(n, dtype=np.int64) % 2,
        Names(f"{i}.png" for i in range(n)),
        images=np.arange(n * 12, dtype=np.uint8).reshape(n, 2, 2, 3),
    )


def clips(frames: Sequence[int] = (40, 16, 5, 0, 33), **more: Any) -> Target:
    n = len(frames)
    ids = Names(f"c/{i}.avi" for i in range(n))
    return Target(
        "made",
        "train",
        ("c",),
        np.zeros(n, np.int64),
        ids,
        paths=Files(Path("/nowhere"), ids),
        sizes=np.arange(n, dtype=np.int64) + 100,
        decoder="pyav",
        frames=np.array(frames, np.int64),
        **more,
    )


@given(rows=st.lists(st.integers(0, 6), max_size=10))
@settings(deadline=None)
def test_chosen_images_keep_what_is_theirs(rows: list[int]) -> None:
    whole, some = images(), images().chosen(np.array(rows, np.int64))
    assert len(some) == len(rows)
    assert list(some.ids) == [whole.ids[row] for row in rows]
    assert some.labels.tolist() == [whole.labels[row] for row in rows]
    assert some.labels.dtype == np.int64
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(some.read(i), whole.read(row))


@pytest.mark.parametrize("kind", [Files, tuple])
@given(rows=st.lists(st.integers(0, 4), max_size=8))
@settings(deadline=None)
def test_chosen_clips_keep_what_is_theirs(kind: type, rows: list[int]) -> None:
    whole = clips(damaged={3: "no frames", 1: "cut"}, starts=ints(0, 16, 0, 0, 32))
    if kind is tuple:
        assert whole.paths is not None
        whole = replace(whole, paths=tuple(whole.paths))
    some = whole.chosen(np.array(rows, np.int64))
    assert some.paths is not None and whole.paths is not None
    assert [list(some.ids), list(some.paths)] == [
        [whole.ids[row] for row in rows],
        [whole.paths[row] for row in rows],
    ]
    for name in ("sizes", "frames", "starts"):
        assert getattr(some, name).tolist() == [int(getattr(whole, name)[row]) for row in rows]
    assert some.damaged == {i: whole.damaged[row] for i, row in enumerate(rows) if row in (1, 3)}
    assert some.clips and some.decoder == "pyav"


@given(total=st.integers(1, 40), limit=st.integers(1, 60))
@settings(deadline=None)
def test_a_limit_is_the_rule_of_the_format(total: int, limit: int) -> None:
    whole = images(total)
    some = whole.limited(limit)
    if limit >= total:
        assert some is whole
    else:
        order = sorted(range(total), key=lambda i: int(whole.labels[i]))
        rows = sorted(order[i * total // limit] for i in range(limit))
        assert list(some.ids) == [whole.ids[row] for row in rows]


def test_a_limit_takes_all_classes_alike_also_where_they_take_turns() -> None:
    from sskt.teacher_cache.api import open_target

    some = open_target("shapes", limit=200)
    assert np.bincount(some.labels).tolist() == [20] * 10


def test_limits_that_are_none_and_that_are_refused() -> None:
    whole = images()
    assert whole.limited(None) is whole
    for limit in (0, -3):
        with pytest.raises(InputError, match=f"--limit must be at least 1, found {limit}"):
            whole.limited(limit)


@given(
    frames=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    depth=st.integers(1, 20),
)
@settings(deadline=None)
def test_windows_cover_each_frame_once(frames: list[int], depth: int) -> None:
    whole = clips(frames, damaged={i: "none decodes" for i, n in enumerate(frames) if not n})
    cut = whole.windows(depth)
    assert cut.frames is not None and cut.starts is not None
    assert len(cut) == len(cut.starts) == len(cut.frames) == len(cut.ids) == len(cut.labels)
    seen: dict[str, list[int]] = {name: [] for name in whole.ids}
    for row, name in enumerate(cut.ids):
        video, _, start = name.rpartition("#")
        assert int(start) == cut.starts[row]
        assert cut.frames[row] == frames[whole.ids.index(video)]
        stop = min(cut.starts[row] + depth, cut.frames[row])
        seen[video] += range(cut.starts[row], stop)
        assert (row in cut.damaged) == (cut.frames[row] == 0)
    for name, count in zip(whole.ids, frames, strict=True):
        assert seen[name] == list(range(count))
    assert [name.partition("#")[0] for name in cut.ids] == sorted(
        (name.partition("#")[0] for name in cut.ids), key=list(whole.ids).index
    )


def test_a_damaged_clip_is_one_window_however_much_of_it_decodes() -> None:
    cut = clips((40, 40, 40), damaged={1: "33 frames decode of 40 in its header"}).windows(16)
    assert [name.partition("/")[2] for name in cut.ids] == [
        *("0.avi#0", "0.avi#16", "0.avi#32", "1.avi#0", "2.avi#0", "2.avi#16", "2.avi#32")
    ]
    assert set(cut.damaged) == {3}


def test_windows_of_windows_are_the_same() -> None:
    cut = clips().windows(16)
    assert cut.windows(16) is cut


def test_windows_of_another_length_are_not_taken_for_these() -> None:
    # Half of the frames would be in no window, under the same ids and fingerprint.
    cut = clips((64,)).windows(16)
    with pytest.raises(InputError, match="windows"):
        cut.windows(8)


def test_windows_differ_in_identity_from_the_clips_and_by_length() -> None:
    whole = clips((64, 64))
    found = {t.fingerprint for t in (whole, whole.windows(16), whole.windows(8))}
    assert len(found) == 3


def test_a_damaged_clip_says_so_when_read() -> None:
    whole = clips(damaged={3: "damaged clip c/3.avi: 0 frames decode"})
    with pytest.raises(BadClip, match=r"^damaged clip c/3\.avi: 0 frames decode$"):
        whole.read_frames(3, [0])
    with pytest.raises(BadClip):
        whole.windows(16).read_frames(5, [0])  # after windows at 0, 16, 32; 0; 0


def test_label_text() -> None:
    one = images(3)
    assert [one.label_text(i) for i in range(3)] == ["a", "b", "a"]
    assert replace(one, labels=ints(1, -1, 0)).label_text(1) is None
    several = replace(
        one,
        classes=("cat", "dog", "car"),
        labels=np.array([[1, 0, -1], [0, 0, 0], [0, -1, 0]], np.int64),
    )
    assert several.multi_label and not one.multi_label
    assert [several.label_text(i) for i in range(3)] == ["cat, (car)", None, "(dog)"]


# --- fingerprint and identity -------------------------------------------------------------------


def test_the_fingerprint_is_the_rule_of_the_format() -> None:
    memory, files = images(2), clips((9, 9))
    text = b"0.png\x000\n1.png\x000\n(2, 2, 2, 3)" + bytes(range(24))
    assert memory.fingerprint == f"sha256:{hashlib.sha256(text).hexdigest()}"
    text = b"c/0.avi\x00100\nc/1.avi\x00101\n"
    assert files.fingerprint == f"sha256:{hashlib.sha256(text).hexdigest()}"


def test_names_that_are_no_utf8_are_hashed_as_their_bytes() -> None:
    target = replace(clips((9,)), ids=Names([os.fsdecode(b"c/\xff.avi")]))
    expected = hashlib.sha256(b"c/\xff.avi\x00100\n").hexdigest()
    assert target.fingerprint == f"sha256:{expected}"


@pytest.mark.parametrize(
    "change",
    [
        {"ids": Names(["c/0.avi", "c/2.avi", "c/1.avi"])},
        {"ids": Names(["c/0.avi", "c/1.avi", "d/2.avi"])},
        {"sizes": ints(100, 101, 103)},
    ],
    ids=["order", "membership", "size"],
)
def test_the_fingerprint_changes_with(change: dict[str, Any]) -> None:
    whole = clips((9, 9, 9))
    assert whole.fingerprint == clips((9, 9, 9)).fingerprint
    assert replace(whole, **change).fingerprint != whole.fingerprint


def test_the_fingerprint_of_a_selection_is_its_own() -> None:
    whole = images()
    assert whole.fingerprint  # kept from now on; a selection must not take it over
    some = whole.chosen(ints(0, 1))
    assert some.fingerprint == images(2).fingerprint != whole.fingerprint


def test_identity_has_contents_only_if_they_were_asked_for() -> None:
    whole = clips((9,))
    identity = whole.identity()
    assert identity == {
        "name": "made",
        "split": "train",
        "size": 1,
        "fingerprint": whole.fingerprint,
    }
    strict = replace(whole, contents="sha256:0")
    assert strict.identity() == identity | {"contents": "sha256:0"}
    assert strict.windows(16).identity()["contents"] == "sha256:0"


def test_targets_travel_to_another_process() -> None:
    for target in (images(), clips(damaged={3: "cut"}).windows(16)):
        expected = target.fingerprint
        again = pickle.loads(pickle.dumps(target))
        assert again.fingerprint == expected
        assert list(again.ids) == list(target.ids)
        assert again.damaged == target.damaged
        again.__dict__.pop("fingerprint")
        assert again.fingerprint == expected, "computed anew from what travelled"
