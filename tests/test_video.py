"""Clips: the right frame whatever the decoder, and damage by name, never a crash or a hang."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sskt.teacher_cache import video
from sskt.teacher_cache.errors import BadClip, MissingData, UnknownName
from sskt.teacher_cache.images import UInt8
from sskt.teacher_cache.video import (
    DECODERS,
    VIDEO_EXTENSIONS,
    Counted,
    count_frames,
    is_frame_folder,
    read_frames,
)

H, W, LENGTH = 48, 128, 40
B_FRAMES = ("mpeg4.avi", "h264.mp4", "mpeg2video.mpg")
MADE = (*B_FRAMES, "ffv1.avi", "libvpx.webm", "mpeg4.mkv", "mpeg2video.ts")


# --- clips whose frames say their number -------------------------------------------------------


def numbered(number: int) -> UInt8:
    """The number in eight black or white bars."""
    bars = [(number >> bit & 1) * 200 + 20 for bit in range(8)]
    grey = np.tile(np.repeat(np.array(bars, np.uint8), W // 8), (H, 1))
    return np.repeat(grey[:, :, None], 3, axis=2)


def number_in(picture: UInt8) -> int:
    bars = picture.reshape(picture.shape[0], 8, -1).mean((0, 2)) > 120
    return sum(1 << bit for bit in range(8) if bars[bit])


def write_clip(
    path: Path,
    pictures: Iterable[Any],
    codec: str,
    shape: tuple[int, int] = (H, W),
    *,
    b_frames: int = 0,
    rotation: int = 0,
    pixels: str = "rgb24",
) -> Path:
    """An encoded clip, one packet after the other; skips where the build lacks the codec."""
    try:
        encoder = av.Codec("libx264" if codec == "h264" else codec, "w").name
    except ValueError:
        pytest.skip(f"PyAV without {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=Fraction(25))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = shape
        lossless = "bgr0" if pixels == "rgb24" else pixels
        stream.pix_fmt = lossless if codec == "ffv1" else "yuv420p"
        stream.codec_context.max_b_frames = b_frames
        if rotation:
            stream.set_display_rotation(rotation)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=pixels)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The clip CODEC.CONTAINER of ``LENGTH`` numbered frames, written at its first use."""
    folder = tmp_path_factory.mktemp("clips")

    @functools.cache
    def make(name: str) -> Path:
        codec = name.partition(".")[0]
        frames = map(numbered, range(LENGTH))
        return write_clip(folder / name, frames, codec, b_frames=2 * (name in B_FRAMES))

    return make


def needs(decoder: str) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", MADE)
def test_frame_k_is_frame_k(name: str, decoder: str, made: Callable[[str], Path]) -> None:
    needs(decoder)
    path = made(name)
    counted = count_frames(path, decoder)
    if decoder == "decord" and path.suffix == ".ts":
        assert re.match(r"decord decodes \d+, .*: take --decoder pyav", counted.problem)
        return
    assert counted == Counted(LENGTH, counted.header)
    assert counted.header in (0, LENGTH)
    found = read_frames(path, range(LENGTH), decoder)
    assert [number_in(found[k]) for k in range(LENGTH)] == list(range(LENGTH))
    for k in (0, LENGTH // 2, LENGTH - 1):
        np.testing.assert_array_equal(read_frames(path, [k], decoder)[k], found[k])
    assert {(f.shape, f.dtype, f.flags.c_contiguous) for f in found.values()} == {
        ((H, W, 3), np.dtype(np.uint8), True)
    }
    if name == "ffv1.avi":  # lossless
        np.testing.assert_array_equal(found[7], numbered(7))


@pytest.mark.parametrize("name", B_FRAMES)
def test_the_made_clips_have_b_frames(name: str, made: Callable[[str], Path]) -> None:
    with av.open(str(made(name))) as container:
        assert sum(frame.pict_type == 3 for frame in container.decode(video=0)) > LENGTH // 4


# --- real clips --------------------------------------------------------------------------------


def by_ffmpeg(path: Path, shape: tuple[int, ...]) -> UInt8:
    """Every 8th row and column of all frames as the ffmpeg program puts them out."""
    exe = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    turn = ["-v", "error", "-threads", "1", "-noautorotate", "-i", str(path), "-map", "0:v:0"]
    form = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([exe, *turn, *form], capture_output=True, check=True, timeout=100)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, *shape)[:, ::8, ::8]


def not_alike(ours: UInt8, theirs: UInt8) -> list[int]:
    """Numbers of the frames that are not the same in both, or closer to a frame beside them."""
    ours, theirs = ours.astype(np.int16), theirs.astype(np.int16)
    wrong = []
    for k, frame in enumerate(theirs):
        beside = range(max(0, k - 2), min(len(ours), k + 3))
        off = {j: np.abs(ours[j] - frame).mean() for j in beside}
        if off[k] > 2 or off[k] > min(off.values()):
            wrong.append(k)
    return wrong


@pytest.mark.parametrize(
    "clips",
    [
        "hmdb51/videos/*/*.avi",
        "other_clips/*.mp4",
        pytest.param("ucf101/**/*.avi", marks=pytest.mark.slow),
    ],
)
def test_decoders_and_ffmpeg_agree_on_every_real_clip(clips: str, data: Path) -> None:
    pytest.importorskip("decord")
    paths = sorted(data.glob(clips))
    assert paths
    for path in paths:
        counted = count_frames(path)
        assert not counted.problem, path
        assert counted.header - counted.frames in (0, 1), path
        assert count_frames(path, "decord") == counted, path
        seen = {}
        for decoder in DECODERS:
            frames = read_frames(path, range(counted.frames), decoder)
            seen[decoder] = np.stack([frame[::8, ::8] for frame in frames.values()])
        shape = read_frames(path, [0])[0].shape
        seen["ffmpeg"] = by_ffmpeg(path, shape)
        for name, theirs in seen.items():
            assert len(theirs) == counted.frames, (name, path)
            assert not not_alike(seen["pyav"], theirs), (name, path)


def test_a_clip_off_by_one_would_be_seen(data: Path) -> None:
    for path in sorted(data.glob("hmdb51/videos/*/*.avi")):
        frames = read_frames(path, range(count_frames(path).frames))
        ours = np.stack([frame[::8, ::8] for frame in frames.values()])
        assert not not_alike(ours, ours)
        assert len(not_alike(ours[1:], ours[:-1])) > len(ours) // 2, path
        swapped = ours.copy()
        swapped[[10, 11]] = ours[[11, 10]]
        assert not_alike(ours, swapped) == [10, 11], path


def test_hmdb51s_headers_are_one_too_high_and_no_damage(data: Path) -> None:
    counts = [count_frames(path) for path in data.glob("hmdb51/videos/*/*.avi")]
    assert [c.header - c.frames for c in counts] == [1] * 9
    assert {c.problem for c in counts} == {""}


# --- which frames ------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
def test_any_frames_in_any_order_are_those_of_the_whole(
    decoder: str, made: Callable[[str], Path]
) -> None:
    needs(decoder)
    path = made("mpeg4.avi")
    whole = read_frames(path, range(LENGTH), decoder)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, LENGTH - 1), max_size=20))
    def check(wanted: list[int]) -> None:
        found = read_frames(path, np.array(wanted, int), decoder)  # type: ignore[arg-type]
        assert list(found) == sorted(set(wanted))
        for number, frame in found.items():
            np.testing.assert_array_equal(frame, whole[number])

    check()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_frames_of_a_real_clip_are_those_of_the_whole(data: Path, st_data: Any) -> None: ...
