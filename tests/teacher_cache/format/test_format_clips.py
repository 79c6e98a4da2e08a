"""docs/format.md suffices for clips: a reader written from it replays every view of real clips."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support import independent_reader
from support.helpers import TINY, write_frames
from support.independent_reader import (
    Files,
    FormatError,
    Reader,
    compare,
    load_factory,
    open_folder,
    open_hmdb51,
    open_set,
    open_ucf101,
    windows_of,
    words_of,
)

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.media.video import read_frames
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.frame_sampling import parse_frame_sampling
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import open_views

PAGE = Path(__file__).resolve().parents[3] / "docs" / "format.md"
TRAINING, WINDOWS = "clip-corner-crop-flip", "clip-center-crop"
SMALL = "frames=4,size=20"
COUNTS = (9, 3, 6, 12)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 9, 3, 6 and 12 frames in two classes: folders of frames of odd sizes, a video."""
    folder = tmp_path_factory.mktemp("made") / "clips"
    rng = np.random.default_rng(3)
    for i, (count, shape) in enumerate(zip(COUNTS, ((24, 31), (41, 20), (20, 20)), strict=False)):
        name = folder / "train" / ("run", "swim")[i // 2] / f"video {i}"
        write_frames(name, rng.integers(0, 256, (count, *shape, 3), np.uint8))
    (folder / "train/swim/video 2/n_frames").write_text("6")
    (folder / "train/swim/video 2/.hidden").write_text("of no importance")
    path = folder / "train" / "swim" / "deep" / "d.MP4"
    path.parent.mkdir()
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in rng.integers(0, 256, (COUNTS[3], 32, 48, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return folder


def label(
    cache: Path, target: Target, source: Source, policy: str, f_s: str = "center", **more: str
) -> Reader:
    """Labels of two seeds, as the independent reader opens them."""
    views = open_views(target, parse_policy(policy), parse_frame_sampling(f_s))
    encoding = parse_encoding(more.get("encoding", "f32"))
    options = StageOptions(workers=0, shard_rows=16, on_error=more.get("on_error", "fail"))
    (found,) = cache_teachers(views, [source], encoding, 2, cache, options).label_sets
    return open_set(Path(found.path))


def agrees(reader: Reader, files: Files, skipped: int = 0, worst: float = 1e-5) -> None:
    """All stored rows are those that the reader makes anew."""
    found = compare(reader, files, load_factory(f"{TINY}:build"))
    total = reader.seeds * reader.samples
    right = found.compared - found.wrong_views
    print(f"{reader.path.name}: {right} of {found.compared} view checks agree")
    assert (found.compared, found.skipped, found.wrong_views) == (total - skipped, skipped, 0)
    assert found.worst < worst


# --- made clips ------------------------------------------------------------------------------


@pytest.mark.parametrize("f_s", ["center", "first", "uniform-3", "random"])
@pytest.mark.parametrize("policy", [f"{TRAINING}:{SMALL}", f"{TRAINING}:frames=8,size=9,scales=2"])
def test_training_views_and_labels(
    made: Path, tiny: Source, tmp_path: Path, policy: str, f_s: str
) -> None:
    reader = label(tmp_path, open_target(str(made)), tiny, policy, f_s)
    files = open_folder(made, "train", None, clips=True)
    assert files.ids == ["run/video 0", "run/video 1", "swim/deep/d.MP4", "swim/video 2"]
    agrees(reader, files)


@pytest.mark.parametrize("encoding", ["f16", "u8", "topk-5"])
def test_encodings(made: Path, tiny: Source, tmp_path: Path, encoding: str) -> None:
    target = open_target(str(made), limit=3)
    reader = label(tmp_path, target, tiny, f"{TRAINING}:{SMALL}", "uniform-2", encoding=encoding)
    agrees(reader, open_folder(made, "train", 3, clips=True), worst=5e-3)


@pytest.mark.parametrize("damaged", [False, True])
def test_strong_and_mixed_clips(made: Path, tiny: Source, tmp_path: Path, damaged: bool) -> None:
    """Also where a partner is unreadable: what would be mixed with it stays as it is."""
    folder = shutil.copytree(made, tmp_path / "clips")
    if damaged:
        (folder / "train/run/video 0/image_00007.jpg").write_bytes(b"no image")
    policy = f"{TRAINING}:{SMALL},trivial=1,jitter=0.4,erase=0.5,mixup=0.8,cutmix=1"
    reader = label(tmp_path, open_target(str(folder)), tiny, policy, "uniform-2", on_error="skip")
    agrees(reader, open_folder(folder, "train", None, clips=True), skipped=2 * damaged)


@pytest.mark.parametrize("limit", [None, 3])
def test_windows(made: Path, tiny: Source, tmp_path: Path, limit: int | None) -> None:
    target = open_target(str(made), limit=limit, strict=True)
    reader = label(tmp_path, target, tiny, f"{WINDOWS}:{SMALL}", "random")
    files = windows_of(reader, open_folder(made, "train", limit, clips=True))
    assert files.starts is not None and files.ids[:3] == [f"run/video 0#{i}" for i in (0, 4, 8)]
    assert len(files.ids) == (9 if limit is None else 7)
    agrees(reader, files)


def test_an_unreadable_clip_is_one_skipped_window(made: Path, tiny: Source, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "clips")
    (folder / "train/run/video 0/image_00007.jpg").write_bytes(b"no image")
    for policy, samples in ((TRAINING, 4), (WINDOWS, 7)):
        target = open_target(str(folder))
        reader = label(tmp_path / policy, target, tiny, f"{policy}:{SMALL}", on_error="skip")
        files = open_folder(folder, "train", None, clips=True)
        files = windows_of(reader, files) if policy == WINDOWS else files
        assert reader.samples == len(files.ids) == samples
        assert reader.label(0, 0) is None and reader.label(0, 1) is not None
        agrees(reader, files, skipped=2)


@pytest.mark.parametrize("policy", [TRAINING, WINDOWS])
def test_contents_are_those_of_the_page(
    made: Path, tiny: Source, tmp_path: Path, policy: str
) -> None:
    """One byte of one file, its size unchanged: only the contents tell."""
    folder = shutil.copytree(made, tmp_path / "clips")
    target = open_target(str(folder), strict=True)
    reader = label(tmp_path / "cache", target, tiny, f"{policy}:{SMALL}")
    files = open_folder(folder, "train", None, clips=True)
    files = windows_of(reader, files) if policy == WINDOWS else files
    assert files.contents() == reader.spec["target"]["contents"]
    agrees(reader, files)
    (folder / "train/swim/video 2/n_frames").write_text("5")
    assert files.fingerprint() == reader.spec["target"]["fingerprint"]
    with pytest.raises(FormatError, match="contents differ"):
        compare(reader, files, load_factory(f"{TINY}:build"))


def test_contents_of_images_are_those_of_the_page(images: Path) -> None:
    target = open_target(str(images), strict=True, limit=7)
    files = open_folder(images, "train", 7)
    assert (files.fingerprint(), files.contents()) == (target.fingerprint, target.contents)


def test_by_hand(made: Path, tiny: Source, tmp_path: Path) -> None:
    """The reader is a program without sskt: it is run as one, isolated from the checkout."""
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not [m for m in sys.modules if m.split('.')[0] == 'sskt']"
    )
    reader = label(tmp_path, open_target(str(made)), tiny, f"{WINDOWS}:{SMALL}", "uniform-2")
    script = [independent_reader.__file__, str(reader.path), str(made), f"{TINY}:build"]
    run = subprocess.run([sys.executable, "-c", code, *script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "2 seeds x 9 samples, 18 labels recomputed, 0 skipped, 0 views differ" in run.stdout


# --- rules of the page -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "width", "height"),
    [
        ((240, 180), 224, 224),  # Pillow 13 takes the height first
        ((120, 160), 149, 112),
        ((7, 5), 20, 31),
        ((301, 9), 9, 4),
        ((1, 1), 3, 1),
        ((50, 60), 60, 50),
    ],
)
def test_resizing_is_pillows_one_axis_after_the_other(
    shape: tuple[int, int], width: int, height: int
) -> None:
    image = np.random.default_rng(width).integers(0, 256, (*shape, 3), np.uint8)
    bilinear = Image.Resampling.BILINEAR
    wide = Image.fromarray(image).resize((width, shape[0]), bilinear)
    expected = np.asarray(wide.resize((width, height), bilinear))
    found = independent_reader.resized(image, width, height, version=1)
    np.testing.assert_array_equal(found, expected)


COLOURS = {
    (tag, full): (red, blue)
    for tag, red, blue in ((2, 0.299, 0.114), (1, 0.2126, 0.0722), (9, 0.2627, 0.0593))
    for full in (False, True)
}
"""Of frames tagged not at all, BT.709 and BT.2020, of limited and of full range: the shares of
red and blue in luma (BT.601, BT.709, BT.2020)."""
YUV = (150, 90, 160)


def by_definition(tag: int, full: bool) -> NDArray[np.float64]:
    """R, G, B of ``YUV``."""
    red, blue = COLOURS[tag, full]
    y = YUV[0] if full else (YUV[0] - 16) * 255 / 219
    u, v = ((x - 128) * (1 if full else 255 / 224) for x in YUV[1:])
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    return np.array([r, (y - red * r - blue * b) / (1 - red - blue), b])


@pytest.mark.parametrize(("tag", "full"), COLOURS)
def test_colours_are_converted_as_the_frame_is_tagged(tmp_path: Path, tag: int, full: bool) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame(32, 32, "yuv420p")
        for plane, value in zip(frame.planes, YUV, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        for tagged in (stream.codec_context, frame):
            tagged.colorspace, tagged.color_range = tag, 2 if full else 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = read_frames(path, [0])[0]
    off = {kind: np.abs(by_definition(*kind) - found[8, 8]).max() for kind in COLOURS}
    assert min(off, key=lambda kind: off[kind]) == (tag, full) and off[tag, full] < 3.5
    theirs = independent_reader.rgb_of(independent_reader.frames_of(path)[0])
    np.testing.assert_array_equal(theirs, found)


def test_the_example_of_the_page() -> None:
    text = " ".join(PAGE.read_text().split())
    asked = re.search(r"sample (\d+) under seed (\d+) .*? n = (\d+), H = (\d+) and W = (\d+)", text)
    told = re.search(
        r"has the words (0x\w+), (0x\w+), (0x\w+), (0x\w+): start = (\d+), scale = (\d), "
        r"side = (\d+), place = (\d), top = (\d+), left = (\d+), flip = (\d)",
        text,
    )
    assert asked and told
    sample, seed, n, height, width = map(int, asked.groups())
    views = parse_policy(TRAINING).identity()
    words = words_of(views, sample, seed)(0)
    assert [int(word, 16) for word in told.groups()[:4]] == list(words)
    start, scale, side, place, top, left, flip = map(int, told.groups()[4:])
    w0, w1, w2, w3 = words
    assert (start, scale) == (w0 * (n - 16 + 1) >> 32, w1 * 5 >> 32)
    assert (place, flip) == (w2 * 5 >> 32, w3 * 2 >> 32)
    assert side == int(height * 2 ** (-scale / 4))
    down, right = height - side, width - side
    corners = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    assert (top, left) == corners[place]
    key = re.search(r"policy key of `clip-corner-crop-flip` .*? is (\d+)", text)
    assert key and int(key[1]) == parse_policy(TRAINING).key


# --- real clips ------------------------------------------------------------------------------


def linked(data: Path, folder: Path, pattern: str, every: int) -> Path:
    """A folder that links to real clips: of class folders, or without labels if there is one."""
    files = sorted(data.glob(pattern))[::every]
    one = len({path.parent for path in files}) == 1
    for path in files:
        place = folder / "train" / ("" if one else path.parent.name)
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    ("pattern", "every", "clips"),
    [
        ("hmdb51/videos/*/*.avi", 1, 9),
        ("other_clips/*.mp4", 1, 1),
        ("ucf101/UCF-101/*/*.avi", 7, 12),
        pytest.param("ucf101/UCF-101/*/*.avi", 1, 82, marks=pytest.mark.slow),
    ],
)
def test_every_view_of_real_clips(
    data: Path, tiny: Source, tmp_path: Path, pattern: str, every: int, clips: int
) -> None:
    folder = linked(data, tmp_path / "clips", pattern, every)
    reader = label(tmp_path / "cache", open_target(str(folder)), tiny, TRAINING, "uniform-2")
    assert reader.samples == clips
    agrees(reader, open_folder(folder, "train", None, clips=True))


@pytest.mark.parametrize("pattern", ["hmdb51/videos/wave/*.avi", "other_clips/*.mp4"])
def test_every_window_of_real_clips(data: Path, tiny: Source, tmp_path: Path, pattern: str) -> None:
    folder = linked(data, tmp_path / "clips", pattern, 1)
    reader = label(tmp_path / "cache", open_target(str(folder)), tiny, WINDOWS)
    files = windows_of(reader, open_folder(folder, "train", None, clips=True))
    assert reader.samples == len(files.ids) > 2
    agrees(reader, files)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_official_lists(data: Path, tiny: Source, tmp_path: Path, name: str, split: str) -> None:
    """The order of all videos that are there, and the views of some."""
    root = data / name
    lists, clips, read = {
        "ucf101": (root / "ucfTrainTestlist", root / "UCF-101", open_ucf101),
        "hmdb51": (root / "splits", root / "videos", open_hmdb51),
    }[name]
    whole = open_target(name, split, root=root, partial=True)
    files = read(lists, clips, split, None)
    assert files.ids == list(whole.ids) and files.fingerprint() == whole.fingerprint
    target = open_target(name, split, root=root, partial=True, limit=2)
    reader = label(tmp_path, target, tiny, TRAINING)
    agrees(reader, read(lists, clips, split, 2))


def test_a_listed_video_in_other_forms(data: Path, tmp_path: Path) -> None:
    """The id says in which form a video is there: by its extension, or none."""
    (clip,) = data.glob("hmdb51/videos/wave/TrumanShow*.avi")
    (tmp_path / "splits").symlink_to(data / "hmdb51" / "splits")
    place = tmp_path / "videos" / "wave"
    write_frames(place / clip.stem, np.zeros((2, 8, 8, 3), np.uint8))
    for name in ("", f"{clip.stem}.MKV", f"{clip.stem}.avi"):
        if name:
            shutil.copy(clip, place / name)
        (split,) = (s for s in ("train", "test") if _there(tmp_path, s))
        whole = open_target("hmdb51", split, root=tmp_path, partial=True)
        files = open_hmdb51(tmp_path / "splits", tmp_path / "videos", split, None)
        expected = f"wave/{clip.stem}" + Path(name or "-").suffix.lower()
        assert files.ids == list(whole.ids) == [expected]
        assert files.fingerprint() == whole.fingerprint


def _there(root: Path, split: str) -> list[str]:
    return open_hmdb51(root / "splits", root / "videos", split, None).ids
