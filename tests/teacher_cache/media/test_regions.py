"""Regions of JPEG files: the pixels of the whole image, in all kinds of files."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sskt.teacher_cache.errors import BadImage
from sskt.teacher_cache.media import regions
from sskt.teacher_cache.media.images import UInt8, decode_image
from sskt.teacher_cache.media.regions import LEAST_COLUMNS, Box, decode_region

installed = pytest.mark.skipif(
    regions.decoder_of_this_thread() is None, reason="nvidia-nvimgcodec is not installed"
)
ROTATED = Image.Exif()
ROTATED[0x112] = 6
KINDS: dict[str, dict[str, Any]] = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "411": {"subsampling": "4:1:1"},
    "coarse": {"quality": 10},
    "progressive": {"progressive": True, "subsampling": 2},
    "restart": {"restart_marker_blocks": 3, "subsampling": 2},
    "restart rows, progressive": {"restart_marker_rows": 1, "progressive": True},
    "rotated by EXIF": {"exif": ROTATED.tobytes()},
    "grey": {"mode": "L"},
    "grey, progressive": {"mode": "L", "progressive": True},
    "CMYK": {"mode": "CMYK"},
    "RGB": {"keep_rgb": True},
}


def made(height: int, width: int, seed: int = 0) -> UInt8:
    """Smooth colours with noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), np.int64)
    image: UInt8 = np.clip(smooth + rng.integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8)
    return image


def jpeg(image: UInt8, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def boxes(height: int, width: int, count: int) -> list[Box]:
    """Boxes at every edge, at every place within a block, and elsewhere."""
    least = min(LEAST_COLUMNS, width)
    found = [(0, 0, height, width), (0, 0, 1, least), (height - 1, width - least, 1, least)]
    found += [(k, k, height - 2 * k, width - 2 * k) for k in range(1, 18) if 2 * k < height - 1]
    rng = np.random.default_rng(height * width)
    for _ in range(count):
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(least, width + 1))
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        found.append((top, left, h, w))
    return [box for box in found if box[3] >= 1]


def choose(box: Box, height: int, width: int) -> Box:
    return box


def require_equal(data: bytes, count: int) -> int:
    """Compares boxes of the file with the whole image. Returns how many were regions."""
    whole = decode_image(data, "a file")
    taken = 0
    for box in boxes(whole.shape[0], whole.shape[1], count):
        top, left, height, width = box
        expected = whole[top : top + height, left : left + width]
        found = decode_image(data, "a file", functools.partial(choose, box))
        np.testing.assert_array_equal(found, expected, f"{whole.shape} {box}")
        taken += decode_region(data, box, whole.shape[0] * whole.shape[1]) is not None
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_has_the_pixels_of_the_whole_image(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "SPARED_PIXELS", 0)
    for size in ((96, 128), (61, 83), (33, 31), (17, 16)):
        taken = require_equal(jpeg(made(*size), **KINDS[kind]), 30)
        assert taken or regions.decoder_of_this_thread() is None


@pytest.mark.parametrize(
    "pattern",
    ["imagenet/*.JPEG", "miniplaces/images/val/*.jpg", "stl10/*/*.jpg", "voc/VOC2007/**/*.jpg"],
)
def test_a_box_of_a_real_file_has_the_pixels_of_the_whole_image(
    pattern: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "SPARED_PIXELS", 0)
    paths = sorted(data.glob(pattern))[:30]
    assert len(paths) >= 5
    for path in paths:
        require_equal(path.read_bytes(), 10)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "GIF"])
def test_a_box_of_another_format_is_cut_from_the_image(format_: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(made(40, 50)).save(buffer, format_)
    require_equal(buffer.getvalue(), 5)


@installed
def test_regions_are_decoded_where_that_is_faster_and_alike() -> None:
    data = jpeg(made(200, 300), subsampling=2)
    assert decode_region(data, (10, 20, 100, 200), 60_000) is not None
    assert decode_region(data, (0, 0, 190, 290), 60_000) is None  # most of the image
    assert decode_region(data, (0, 0, 100, LEAST_COLUMNS - 1), 60_000) is None


@installed
def test_damage_in_a_region_that_no_decoder_passes_is_told_by_the_whole_image() -> None:
    data = jpeg(made(200, 300))
    for damaged in (data[:3000], data[:300], b"\xff\xd8\xff junk", data[:20] + data[400:]):
        with pytest.raises(BadImage, match="cannot decode image a file"):
            decode_image(damaged, "a file", lambda height, width: (height - 64, 0, 64, 64))


def test_without_the_library_the_whole_image_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(made(200, 300))
    monkeypatch.setattr(regions, "decoder_of_this_thread", lambda: None)
    assert decode_region(data, (10, 20, 100, 200), 60_000) is None
    require_equal(data, 5)


@installed
def test_the_library_says_nothing_and_starts_no_thread(tmp_path: Path) -> None:
    """Loader processes are forked, and their standard error is the user's."""
    (tmp_path / "a.jpg").write_bytes(jpeg(made(200, 300)))
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from sskt.teacher_cache.media.regions import decode_region\n"
        "data = Path('a.jpg').read_bytes()\n"
        "before = dict(os.environ)\n"
        "def decode(): return decode_region(data, (1, 2, 100, 200), 60_000)\n"
        "threads = len(os.listdir('/proc/self/task'))\n"
        "expected = decode()\n"
        "assert expected.shape == (100, 200, 3) and dict(os.environ) == before\n"
        "assert len(os.listdir('/proc/self/task')) == threads\n"
        "child = os.fork()\n"
        "if not child: os._exit(0 if (decode() == expected).all() else 9)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
