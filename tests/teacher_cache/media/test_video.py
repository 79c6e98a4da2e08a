"""Clips: the right frame whatever the decoder, and damage by name, never a crash or a hang."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
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

from sskt.teacher_cache.errors import BadClip, MissingData, UnknownName
from sskt.teacher_cache.media import video
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.media.video import (
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


def number_in(image: UInt8) -> int:
    bars = image.reshape(image.shape[0], 8, -1).mean((0, 2)) > 120
    return sum(1 << bit for bit in range(8) if bars[bit])


def write_clip(
    path: Path,
    images: Iterable[Any],
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
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format=pixels)))
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


def sparse(frames: dict[int, UInt8]) -> UInt8:
    """Every 12th row and column."""
    return np.stack([frame[::12, ::12] for frame in frames.values()])


def by_ffmpeg(path: Path, shape: tuple[int, ...]) -> UInt8:
    """All frames as the ffmpeg program puts them out, sparse."""
    exe = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    turn = ["-v", "error", "-threads", "1", "-noautorotate", "-i", str(path), "-map", "0:v:0"]
    form = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([exe, *turn, *form], capture_output=True, check=True, timeout=100)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, *shape)[:, ::12, ::12]


def not_alike(ours: UInt8, theirs: UInt8) -> list[int]:
    """Numbers of frames that are not the same in both, or are closer to one beside them.

    Decoders round colours in their own ways, by about one level; what changes less than that
    from frame to frame tells nothing.
    """
    ours, theirs = ours.astype(np.int16), theirs.astype(np.int16)
    wrong = []
    for k, frame in enumerate(theirs):
        off = np.abs(ours[k] - frame).mean()
        beside = [j for j in (k - 2, k - 1, k + 1, k + 2) if 0 <= j < len(ours)]
        closer = (np.abs(ours[j] - frame).mean() < off for j in beside)
        moved = (np.abs(ours[j] - ours[k]).mean() > 1 for j in beside)
        if off > 2 or any(c and m for c, m in zip(closer, moved, strict=True)):
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
        ours = read_frames(path, range(counted.frames))
        decord = read_frames(path, range(counted.frames), "decord")
        ffmpeg = by_ffmpeg(path, ours[0].shape)
        for name, theirs in (("decord", sparse(decord)), ("ffmpeg", ffmpeg)):
            assert len(theirs) == counted.frames, (name, path)
            assert not not_alike(sparse(ours), theirs), (name, path)
        assert not_alike(sparse(ours)[1:], ffmpeg[:-1]), f"{path}: one off is not seen"


def test_two_frames_in_the_wrong_order_would_be_seen(data: Path) -> None:
    for path in sorted(data.glob("hmdb51/videos/*/*.avi")):
        frames = read_frames(path, range(count_frames(path).frames))
        ours = sparse(frames)
        k = int(np.abs(np.diff(ours.astype(np.int16), axis=0)).mean((1, 2, 3)).argmax())
        swapped = ours.copy()
        swapped[[k, k + 1]] = ours[[k + 1, k]]
        assert not_alike(ours, swapped) == [k, k + 1], path


def test_hmdb51s_headers_are_one_too_high_and_no_damage(data: Path) -> None:
    counts = [count_frames(path) for path in data.glob("hmdb51/videos/*/*.avi")]
    assert [c.header - c.frames for c in counts] == [1] * 9
    assert {c.problem for c in counts} == {""}


# --- which frames ------------------------------------------------------------------------------


def check_subsets(path: Path, decoder: str, examples: int) -> None:
    length = count_frames(path).frames
    whole = read_frames(path, range(length), decoder)

    @settings(max_examples=examples, deadline=None)
    @given(st.lists(st.integers(0, length - 1), max_size=20))
    def check(wanted: list[int]) -> None:
        found = read_frames(path, list(np.array(wanted, int)), decoder)
        assert list(found) == sorted(set(wanted))
        for number, frame in found.items():
            np.testing.assert_array_equal(frame, whole[number])

    check()


@pytest.mark.parametrize("decoder", DECODERS)
def test_any_frames_in_any_order_are_those_of_the_whole(
    decoder: str, made: Callable[[str], Path]
) -> None:
    needs(decoder)
    check_subsets(made("mpeg4.avi"), decoder, 40)


@pytest.mark.parametrize("decoder", DECODERS)
def test_any_frames_of_a_real_clip_are_those_of_the_whole(decoder: str, data: Path) -> None:
    needs(decoder)
    (path,) = data.glob("hmdb51/videos/wave/TrumanShow*.avi")
    check_subsets(path, decoder, 15)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_frame_that_is_not_there_is_named_with_the_counts(
    decoder: str, made: Callable[[str], Path]
) -> None:
    needs(decoder)
    path = made("mpeg4.avi")
    wanted = f"cannot read frame {LENGTH} of clip {path}: {LENGTH} frames decode, its header says "
    with pytest.raises(BadClip, match=re.escape(f"{wanted}{LENGTH} (no such frame); ")) as caught:
        read_frames(path, [3, LENGTH], decoder)
    assert str(caught.value).endswith("replace the file, or leave it out with --on-error skip")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_frame_that_an_hmdb51_header_promises_is_not_made_up(decoder: str, data: Path) -> None:
    needs(decoder)  # decord by itself gives the last frame a second time
    (path,) = data.glob("hmdb51/videos/wave/TrumanShow*.avi")
    with pytest.raises(BadClip, match=r"frame 48 of .*: 48 frames decode, its header says 49"):
        read_frames(path, [48], decoder)


def test_numbers_and_decoders_that_make_no_sense(made: Callable[[str], Path]) -> None:
    path = made("mpeg4.avi")
    assert read_frames(path, []) == {}
    with pytest.raises(ValueError, match="count from 0, got -1"):
        read_frames(path, [2, -1])
    for call in (lambda: count_frames(path, "cv2"), lambda: read_frames(path, [0], "cv2")):
        with pytest.raises(UnknownName, match="unknown decoder 'cv2'; known: pyav, decord"):
            call()


def test_the_bytes_of_a_frame_stay_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (H * 3 // 2, W), np.uint8)  # yuv420p, all values
    path = write_clip(tmp_path / "a.avi", [planes], "ffv1", pixels="yuv420p")
    digest = hashlib.sha256(read_frames(path, [0])[0].tobytes()).hexdigest()
    assert digest == "9cd8347bdf04bff96bebaedfd1bbde75c545edf732ae6a45d3ac4008582d88d6"


# --- what containers do ------------------------------------------------------------------------


def test_rotation_is_not_applied_and_decord_is_kept_off(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", map(numbered, range(9)), "h264", rotation=90)
    assert count_frames(path) == Counted(9, 9)
    frame = read_frames(path, [6])[6]
    assert frame.shape == (H, W, 3)
    assert number_in(frame) == 6
    needs("decord")
    assert count_frames(path, "decord").problem == (
        "decord decodes 0, it has rotation metadata, which decord applies: take --decoder pyav"
    )
    with pytest.raises(BadClip, match=r"rotation metadata.*: take --decoder pyav"):
        read_frames(path, [6], "decord")


def test_a_change_of_size_ends_a_clip(tmp_path: Path) -> None:
    frames = [numbered(k) for k in range(12)]
    first = write_clip(tmp_path / "a.ts", frames, "mpeg2video")
    small = [frame[:32, ::2] for frame in frames]
    second = write_clip(tmp_path / "b.ts", small, "mpeg2video", (32, W // 2))
    path = tmp_path / "both.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    counted = count_frames(path)
    assert counted.problem == f"{W // 2}x32 pixels after {W}x{H}"
    assert counted.frames in (10, 11)
    assert [number_in(f) for f in read_frames(path, range(10)).values()] == list(range(10))
    with pytest.raises(BadClip, match=f"frame 12 of .*: 1. frames decode .*{counted.problem}"):
        read_frames(path, [0, 12])


def test_frames_that_an_edit_list_cuts_away_do_not_count(tmp_path: Path) -> None:
    """As in clips that were cut without encoding anew."""
    whole = write_clip(tmp_path / "a.mp4", map(numbered, range(LENGTH)), "h264", b_frames=2)
    path = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is None or packet.pts is None:
                continue
            late = int(15 * Fraction(1, 25) / packet.time_base)
            packet.dts, packet.pts = packet.dts - late, packet.pts - late
            packet.stream = stream
            target.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == LENGTH
    assert count_frames(path) == Counted(LENGTH - 15, LENGTH - 15)
    assert number_in(read_frames(path, [4])[4]) == 19


def test_an_image_too_large_to_be_honest_is_damage(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_MOST_PIXELS", H * W - 1)
    problem = f"{W}x{H} pixels are more than {H * W - 1}"
    assert problem in count_frames(made("mpeg4.avi")).problem


NAMES = ["(HQ) a+b!!!.avi", "a:b.avi", "http:c.avi", "%03d [1].avi", "-.avi", "é ü.avi"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_names_are_only_names(
    decoder: str, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(decoder)
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        Path(name).write_bytes(made("mpeg4.avi").read_bytes())
        for path in (Path(name), tmp_path / name):
            assert count_frames(path, decoder) == Counted(LENGTH, LENGTH)
            assert number_in(read_frames(path, [9], decoder)[9]) == 9


def odd_name(folder: Path, suffix: str = "") -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/v_\xff\xfe" + os.fsencode(suffix)))
    try:
        path.touch()
    except OSError:
        pytest.skip("a file system of UTF-8 names")
    path.unlink()
    return path


def test_a_name_that_is_not_utf8(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = odd_name(tmp_path, ".avi")
    path.write_bytes(made("mpeg4.avi").read_bytes())
    assert count_frames(path) == Counted(LENGTH, LENGTH)
    assert number_in(read_frames(path, [9])[9]) == 9
    needs("decord")
    assert count_frames(path, "decord").problem.endswith("names in UTF-8: take --decoder pyav")
    with pytest.raises(BadClip, match="names in UTF-8: take --decoder pyav"):
        read_frames(path, [9], "decord")


def test_what_cannot_be_opened_is_missing_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.avi")  # opening one would wait for a writer
    for name, why in (("gone.avi", "No such file"), ("pipe.avi", "expected a file or a folder")):
        path = tmp_path / name
        for call in (lambda p: count_frames(p), lambda p: read_frames(p, [0])):
            with pytest.raises(MissingData, match=re.escape(f"cannot open clip {path}: {why}")):
                call(path)


def test_an_error_of_the_disk_is_no_damage_of_the_clip() -> None:
    path = Path("/proc/self/mem")
    if not path.exists():
        pytest.skip("no file whose reading fails")
    with pytest.raises(MissingData, match=f"{path}: Input/output error"):
        count_frames(path)


# --- damage ------------------------------------------------------------------------------------

WORKER = """
import json, sys
from pathlib import Path
import numpy as np
from sskt.teacher_cache.errors import BadClip
from sskt.teacher_cache.media.video import count_frames, read_frames

decoder, whole, *damaged = sys.argv[1:]
right = read_frames(Path(whole), range(count_frames(Path(whole)).frames), decoder)
for name in damaged:
    counted = count_frames(Path(name))
    same = 0
    reads = []
    for wanted in (range(counted.frames), [max(counted.frames // 2, 0)], [counted.frames + 1]):
        try:
            found = read_frames(Path(name), wanted, decoder)
            same += sum(k in right and np.array_equal(f, right[k]) for k, f in found.items())
            reads.append("")
        except BadClip as error:
            reads.append(str(error))
    print(json.dumps([name, counted.frames, counted.header, counted.problem, same, reads]))
"""


def survive(decoder: str, whole: Path, damaged: Sequence[Path]) -> list[Any]:
    """What one process says of damaged clips, one after the other, in silence and in time."""
    command = [sys.executable, "-W", "error", "-c", WORKER, decoder, str(whole), *map(str, damaged)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    # decord's own warnings, "[12:00:00] ...video_reader.cc:312: Failed", cannot be turned off
    noise = [line for line in done.stderr.splitlines() if "/video_reader.cc:" not in line]
    assert (done.returncode, noise) == (0, [])
    assert decoder == "decord" or not done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in told] == [str(path) for path in damaged]
    for name, *_, reads in told:
        for said in filter(None, reads):
            assert re.match(rf"cannot read frame \d+ of clip {re.escape(name)}: \d+ frames", said)
            assert said.endswith("; replace the file, or leave it out with --on-error skip")
            assert "\n" not in said
    return told


def cut_up(whole: Path, folder: Path, points: int) -> list[Path]:
    content = whole.read_bytes()
    paths = []
    for k in range(points):
        paths.append(folder / f"{k:02d}{whole.suffix}")
        paths[-1].write_bytes(content[: len(content) * k // points])
    return paths


def faststart(path: Path, folder: Path) -> Path:
    """With the header first, so that half a file can be opened."""
    target = folder / f"fast{path.suffix}"
    with (
        av.open(str(path)) as source,
        av.open(str(target), "w", options={"movflags": "faststart"}) as to,
    ):
        stream = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                to.mux(packet)
    return target


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["mpeg4.avi", "h264.mp4", "mpeg4.mkv", "libvpx.webm"])
def test_truncated_anywhere_is_said_and_the_rest_is_right(
    name: str, decoder: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    needs(decoder)
    whole = faststart(made(name), tmp_path) if name.endswith(".mp4") else made(name)
    told = survive(decoder, whole, cut_up(whole, tmp_path, 25))
    for cut, frames, _, problem, same, reads in told:
        assert problem or frames >= LENGTH - 1, cut  # an .avi ends with an index
        if decoder == "pyav":
            assert reads[0] == ""
            assert same == frames + (frames > 0), cut  # the range, and the one in the middle
            assert problem in reads[2]
        elif not reads[0]:
            assert same >= frames, cut
    assert sum(frames > 5 for _, frames, *_ in told) > 5


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_real_clip_truncated_anywhere(decoder: str, data: Path, tmp_path: Path) -> None:
    needs(decoder)
    (whole,) = data.glob("hmdb51/videos/wave/TrumanShow*.avi")
    told = survive(decoder, whole, cut_up(whole, tmp_path, 20))
    assert all(problem for *_, problem, _, _ in told)
    assert [frames for _, frames, *_ in told] == sorted(frames for _, frames, *_ in told)
    half = told[10]
    assert 15 < half[1] < 30
    if decoder == "pyav":  # decord goes on with what is left of a frame
        assert f"{half[1]} frames decode, its header says 49 (truncated" in half[5][2]


DROPPED = range(10, 16)


def with_dropped_frames(path: Path, codec: str) -> Path:
    """An AVI file of which some frames are empty chunks: those whose time stamps are left out."""
    name = "libx264" if codec == "h264" else codec
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=Fraction(25))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        stream.codec_context.max_b_frames = 2 * (codec == "h264")
        for number in range(LENGTH):
            if number not in DROPPED:
                frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def by_xvid(path: Path) -> Path:
    """With two B-frames the encoder puts out two packets less than its header counts."""
    exe = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    raw = b"".join(numbered(number).tobytes() for number in range(LENGTH))
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{W}x{H}", "-r", "25", "-i", "-"]
    command = [exe, "-loglevel", "error", *given, "-c:v", "libxvid", "-bf", "2", str(path)]
    if subprocess.run(command, input=raw, check=False).returncode:
        pytest.skip("FFmpeg without libxvid")
    return path


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["mpeg4", "h264", "xvid"])
def test_an_avi_of_fewer_frames_than_its_header_counts(
    kind: str, decoder: str, tmp_path: Path
) -> None:
    """Its index has the right number. Cut, it is refused as before."""
    needs(decoder)
    path = tmp_path / "clip.avi"
    by_xvid(path) if kind == "xvid" else with_dropped_frames(path, kind)
    there = [number for number in range(LENGTH) if kind == "xvid" or number not in DROPPED]
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > len(there) + (1 if kind != "xvid" else -1)
    counted = count_frames(path, decoder)
    assert (counted.header, counted.problem) == (counted.frames, "")
    found = [number_in(still) for still in read_frames(path, range(counted.frames)).values()]
    if kind == "xvid":
        assert counted.frames == LENGTH - 2
        assert found == there[: counted.frames]
    else:
        assert found == there
    content = path.read_bytes()
    for part in (0.5, 0.8, 0.95):
        path.write_bytes(content[: int(len(content) * part)])
        assert count_frames(path, decoder).problem
    index = content.index(b"idx1")
    path.write_bytes(content[:index])
    assert "truncated" in count_frames(path, decoder).problem


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["mpeg4.avi", "h264.mp4", "mpeg4.mkv"])
def test_flipped_bytes_stop_no_worker(
    name: str, decoder: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    needs(decoder)
    rng = random.Random(1)
    damaged = []
    for k in range(30):
        content = bytearray(made(name).read_bytes())
        end = 400 if k % 3 == 0 else len(content)  # in the header, or anywhere
        for _ in range((1, 10, 100)[k // 10]):
            content[rng.randrange(end)] = rng.randrange(256)
        damaged.append(tmp_path / f"{k}{made(name).suffix}")
        damaged[-1].write_bytes(content)
    told = survive(decoder, made(name), damaged)
    assert sum(bool(problem) for *_, problem, _, _ in told) > 15


@pytest.mark.parametrize("name", B_FRAMES)
def test_no_frame_made_from_a_damaged_one_is_given(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """B-frames come before the frame that they are made from."""
    whole = read_frames(made(name), range(LENGTH))
    path = tmp_path / name
    faults = 0
    with av.open(str(made(name))) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.pos is not None]
    for start, size in places:
        content = bytearray(made(name).read_bytes())
        for k in range(start + size // 2, start + size):
            content[k] ^= 0x55
        path.write_bytes(content)
        counted = count_frames(path)
        if counted.problem:
            faults += 1
            for number, frame in read_frames(path, range(counted.frames)).items():
                np.testing.assert_array_equal(frame, whole[number], f"{start}: {counted}")
    assert faults > len(places) // 2


def test_files_that_are_no_clips(made: Callable[[str], Path], tmp_path: Path) -> None:
    clip = made("mpeg2video.ts")
    Image.fromarray(numbered(3)).save(tmp_path / "image.jpg")
    contents = {
        "empty": b"",
        "text": b"no clip at all\n" * 100,
        "image": (tmp_path / "image.jpg").read_bytes(),
        "header": made("mpeg4.avi").read_bytes()[:2000],
        "zeros": bytes(100_000),
        "list": f"ffconcat version 1.0\nfile {clip}\n".encode(),
        "playlist": f"#EXTM3U\n#EXTINF:9.0,\n{clip}\n#EXT-X-ENDLIST\n".encode(),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.avi").write_bytes(content)
    for decoder in DECODERS:
        needs(decoder)
        for _, frames, _, problem, _, reads in survive(
            decoder, made("mpeg4.avi"), [tmp_path / f"{name}.avi" for name in contents]
        ):
            assert frames == 0
            assert problem
            assert reads[0] == ""  # nothing was wanted
            assert "0 frames decode" in reads[1] and problem in reads[1]


# --- loader workers ----------------------------------------------------------------------------

LOADER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from torch.utils.data import DataLoader, Dataset
from sskt.teacher_cache.media.video import count_frames, read_frames

decoder, path = sys.argv[1], Path(sys.argv[2])

class Frames(Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, k):
        return torch.tensor(read_frames(path, [k], decoder)[k])

with ThreadPoolExecutor(4) as pool:
    assert len(set(pool.map(lambda _: count_frames(path, decoder), range(8)))) == 1
here = [Frames()[k] for k in range(12)]
loader = DataLoader(Frames(), None, num_workers=2, multiprocessing_context="fork")
there = list(loader)
assert len(there) == 12 and all(map(torch.equal, here, there))
print("same")
"""


@pytest.mark.parametrize("decoder", DECODERS)
def test_forked_workers_decode_after_their_parent_did(
    decoder: str, made: Callable[[str], Path]
) -> None:
    needs(decoder)
    command = [sys.executable, "-c", LOADER, decoder, str(made("mpeg4.avi"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def test_without_decord_its_name_is_given(made: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "decord.py").write_text("raise ImportError")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pathlib import Path\n"
        "from sskt.teacher_cache import errors\nfrom sskt.teacher_cache.media import video\n"
        "try: video.read_frames(Path(sys.argv[1]), [0], 'decord')\n"
        "except errors.MissingData as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made("mpeg4.avi"))], capture_output=True, text=True
    )
    assert done.stdout == "decord needs: pip install decord; or take --decoder pyav\n", done.stderr


# --- folders of frames -------------------------------------------------------------------------


def frame_folder(folder: Path, numbers: Iterable[int], n_frames: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        Image.fromarray(numbered(number)).save(folder / f"image_{number + 1:05d}.jpg", quality=95)
    if n_frames is not None:
        (folder / "n_frames").write_text(n_frames)
    return folder


@pytest.mark.parametrize(
    ("numbers", "n_frames", "expected"),
    [
        (range(12), None, Counted(12, 0)),
        (range(12), "12\n", Counted(12, 12)),
        (range(12), "11", Counted(12, 11)),
        (range(12), "13", Counted(12, 13, "image_00013.jpg is missing")),
        ([*range(5), *range(6, 12)], "12", Counted(5, 12, "image_00006.jpg is missing")),
        ([*range(5), *range(6, 12)], None, Counted(5, 0, "image_00006.jpg is missing")),
        (range(1, 12), None, Counted(0, 0, "image_00001.jpg is missing")),
        ([], "4", Counted(0, 4, "image_00001.jpg is missing")),
        ([], "0", Counted(0, 0, "no frames")),
        (range(-1, 11), "12", Counted(12, 12)),
        ([-1, 0, 2], None, Counted(2, 0, "image_00002.jpg is missing")),
        ([-1, 0], "3", Counted(2, 3, "image_00002.jpg is missing")),
        (range(12), "twelve", Counted(12, 0, "n_frames holds 'twelve', expected a number")),
        (range(12), "-12", Counted(12, 0, "n_frames holds '-12', expected a number")),
        (range(12), "", Counted(12, 0, "n_frames holds '', expected a number")),
    ],
)
def test_folders_of_frames_are_counted(
    numbers: Iterable[int], n_frames: str | None, expected: Counted, tmp_path: Path
) -> None:
    folder = frame_folder(tmp_path / "v_a (1)!+", numbers, n_frames)
    assert is_frame_folder(folder)
    assert count_frames(folder) == expected
    assert count_frames(folder, "decord") == expected


def test_frames_of_a_folder(tmp_path: Path) -> None:
    folder = frame_folder(odd_name(tmp_path), range(12))
    (folder / "image_00099.png").touch()
    assert count_frames(folder) == Counted(12, 0)
    found = read_frames(folder, [7, 0, 7])
    assert {k: number_in(frame) for k, frame in found.items()} == {0: 0, 7: 7}
    with pytest.raises(BadClip, match=r"frame 12 of .*: 12 frames decode \(no image_00013.jpg\)"):
        read_frames(folder, [0, 12])


def test_frames_of_a_folder_may_be_numbered_from_0(tmp_path: Path) -> None:
    folder = frame_folder(tmp_path / "v", range(12))
    for number in range(12):
        (folder / f"image_{number + 1:05d}.jpg").rename(folder / f"image_{number:05d}.jpg")
    assert count_frames(folder) == Counted(12, 0)
    found = read_frames(folder, [0, 7, 11])
    assert {k: number_in(frame) for k, frame in found.items()} == {0: 0, 7: 7, 11: 11}
    with pytest.raises(BadClip, match=r"frame 12 of .*: 12 frames decode \(no image_00012.jpg\)"):
        read_frames(folder, [12])


def test_damage_inside_a_folder_is_named(tmp_path: Path) -> None:
    folder = frame_folder(tmp_path / "v", range(6))
    file = folder / "image_00003.jpg"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadClip, match=re.escape(f"cannot decode image {file}: ")):
        read_frames(folder, [0, 2])
    Image.new("RGB", (W, H - 2)).save(file)
    with pytest.raises(BadClip, match=f"image_00003.jpg is of {W}x{H - 2} pixels, not as the oth"):
        read_frames(folder, [0, 2])
    assert list(read_frames(folder, [2])) == [2]


def test_other_folders_are_no_frame_folders(tmp_path: Path) -> None:
    for name in ("image_00001.png", "image_1.jpg", "a.jpg", "image_00001.jpg.txt"):
        (tmp_path / name).touch()
    assert not is_frame_folder(tmp_path)
    assert not is_frame_folder(tmp_path / "gone")
    assert not is_frame_folder(tmp_path / "a.jpg")


def test_extensions_are_lower_case_with_their_dot() -> None:
    assert {".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg"} <= VIDEO_EXTENSIONS
    assert all(re.fullmatch(r"\.[a-z0-9]+", extension) for extension in VIDEO_EXTENSIONS)
