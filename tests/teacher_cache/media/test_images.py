"""Image files: one path to the same pixels, and damaged files by name."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sskt.teacher_cache.errors import BadImage, MissingData
from sskt.teacher_cache.media.images import UInt8, read_image


def by_pil(path: Path) -> UInt8:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def colours() -> UInt8:
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (11, 17, 3), np.uint8)


@pytest.mark.parametrize(
    "pattern",
    ["imagenet/*.JPEG", "miniplaces/images/val/*.jpg", "stl10/*/*.jpg", "voc/VOC2007/**/*.jpg"],
)
def test_real_jpegs_have_pils_pixels(pattern: str, data: Path) -> None:
    paths = sorted(data.glob(pattern))[:12]
    assert len(paths) >= 5
    for path in paths:
        found = read_image(path)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, by_pil(path), path.name)


def test_a_truncated_real_jpeg_is_named_in_one_line(data: Path) -> None:
    paths = sorted((data / "voc" / "corrupt").rglob("*.jpg"))
    assert paths
    for path in paths:
        with pytest.raises(BadImage, match=re.escape(str(path))) as caught:
            read_image(path)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < len(str(path)) + 200
        assert "truncated" in message
        assert f"({path.stat().st_size} bytes)" in message


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("part", [0.02, 0.5])
def test_half_a_file_is_refused_whatever_its_format(
    format_: str, part: float, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(colours()).save(buffer, format_)
    path = tmp_path / f"half.{format_.lower()}"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * part)])
    with pytest.raises(BadImage, match=re.escape(str(path))):
        read_image(path)


@pytest.mark.parametrize("content", [b"no image at all\n", b"", b"\xff\xd8\xff and no more"])
def test_a_file_that_is_no_image_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=re.escape(f"cannot decode image {path}: ")) as caught:
        read_image(path)
    message = str(caught.value)
    assert f"({len(content)} bytes); replace the file" in message
    assert "BytesIO" not in message
    assert "\n" not in message


def test_an_image_too_large_to_be_honest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = tmp_path / "bomb.png"
    Image.fromarray(colours()).save(path)
    with pytest.raises(BadImage, match=re.escape(str(path))):
        read_image(path)


def test_a_missing_file_and_a_folder_are_missing_data(tmp_path: Path) -> None:
    gone = tmp_path / "gone.jpg"
    with pytest.raises(MissingData, match=re.escape(f"{gone}: No such file")):
        read_image(gone)
    with pytest.raises(MissingData, match=re.escape(f"{tmp_path}: Is a directory")):
        read_image(tmp_path)


def test_png_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(colours()).save(path)
    np.testing.assert_array_equal(read_image(path), colours())


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_content_decides_not_the_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colours()).save(path, "PNG")
    np.testing.assert_array_equal(read_image(path), colours())


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_grey_becomes_three_equal_channels(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"grey.{suffix}"
    grey = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (8, 1))
    Image.fromarray(grey).save(path)
    found = read_image(path)
    assert found.shape == (8, 16, 3)
    np.testing.assert_allclose(found[..., 0], grey, atol=6)
    for channel in (1, 2):
        np.testing.assert_array_equal(found[..., channel], found[..., 0])


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff\x40"])
def test_a_palette_becomes_its_colours(transparency: int | bytes | None, tmp_path: Path) -> None:
    palette = [10, 20, 30, 200, 100, 0, 0, 255, 0, 7, 7, 7]
    image = Image.new("P", (2, 2))
    image.putpalette(palette)
    image.putdata([0, 1, 2, 3])
    path = tmp_path / "palette.png"
    if transparency is None:
        image.save(path)
    else:
        image.save(path, transparency=transparency)
    expected = np.array(palette, np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(read_image(path), expected)


def test_transparency_is_dropped_and_the_colour_kept(tmp_path: Path) -> None:
    alpha = np.full((11, 17, 1), 40, np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(np.concatenate([colours(), alpha], axis=-1)).save(path)
    np.testing.assert_array_equal(read_image(path), colours())


def test_a_cmyk_jpeg_becomes_rgb_like_pils(tmp_path: Path) -> None:
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:, :8], colours[:, 8:] = (200, 30, 60), (10, 180, 220)
    path = tmp_path / "cmyk.jpg"
    Image.fromarray(colours).convert("CMYK").save(path, quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    found = read_image(path)
    np.testing.assert_allclose(found.astype(int), colours, atol=25)
    np.testing.assert_allclose(found.astype(int), by_pil(path), atol=1)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    for suffix in ("jpg", "png"):
        path = tmp_path / f"turned.{suffix}"
        Image.fromarray(colours()).save(path, exif=exif)
        assert read_image(path).shape == (11, 17, 3)
