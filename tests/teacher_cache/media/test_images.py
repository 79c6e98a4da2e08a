"""Image files: one path to the same pixels, and damaged files by name."""

from __future__ import annotations

import io
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from sskt.teacher_cache.errors import BadImage, MissingData
from sskt.teacher_cache.media import images as media
from sskt.teacher_cache.media.images import EXTENSIONS, UInt8, read_image

UInt16 = NDArray[Any]


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
        assert "Premature end of JPEG file" in message
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


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


@pytest.mark.parametrize("format_", FORMATS)
def test_the_size_is_limited_before_an_image_is_decoded(
    format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format_ == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"image.{format_.lower()}"
    Image.fromarray(colours()).save(path, format_)
    assert read_image(path).shape == (11, 17, 3)
    monkeypatch.setattr(media, "MOST_PIXELS", 11 * 17 - 1)
    with pytest.raises(BadImage, match=f"{re.escape(str(path))}: 17x11 pixels, more than 186"):
        read_image(path)


def test_a_small_jpeg_that_claims_gigapixels_is_refused_at_once(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(colours()).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = (65500).to_bytes(2, "big") * 2
    path = tmp_path / "bomb.jpg"
    path.write_bytes(data)
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match=r"bomb\.jpg: 65500x65500 pixels, more than 178,956,970"):
        read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun < 2**20  # KiB: 1 GiB


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2] + b"\xff\xd9"


def zeroed(data: bytes) -> bytes:
    start = len(data) // 2
    return data[:start] + bytes(4096) + data[start + 4096 :]


def as_cmyk(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [halved, zeroed])
@pytest.mark.parametrize("made", [bytes, as_cmyk])
def test_damaged_real_jpegs_are_refused(
    damage: Callable[[bytes], bytes], made: Callable[[bytes], bytes], data: Path, tmp_path: Path
) -> None:
    """Pillow would take them, with grey in place of what is missing."""
    files = sorted((data / "imagenet").glob("*.JPEG"))[:40]
    path = tmp_path / "damaged.jpg"
    refused = 0
    for file in files:
        path.write_bytes(damage(made(file.read_bytes())))
        with pytest.raises(BadImage, match=r"damaged\.jpg: .*--on-error skip"):
            read_image(path)
        refused += 1
    assert refused == 40


@pytest.mark.parametrize("damage", [halved, zeroed])
def test_damaged_real_pngs_are_refused(
    damage: Callable[[bytes], bytes], data: Path, tmp_path: Path
) -> None:
    files = sorted((data / "stl10").rglob("*.png"))[:40]
    assert len(files) == 40
    for file in files:
        (tmp_path / "damaged.png").write_bytes(damage(file.read_bytes()))
        with pytest.raises(BadImage, match=r"damaged\.png"):
            read_image(tmp_path / "damaged.png")


def test_a_jpeg_of_an_unknown_jfif_version_is_whole(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(colours()).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    (tmp_path / "a.jpg").write_bytes(data)
    data[data.index(b"JFIF") + 5] = 0
    (tmp_path / "b.jpg").write_bytes(data)
    expected = read_image(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "b.jpg"), expected)


def test_no_other_format_is_opened_under_the_name_of_an_image(tmp_path: Path) -> None:
    """Pillow runs Ghostscript for PostScript."""
    Image.fromarray(colours()).save(tmp_path / "a.png", "EPS")
    with pytest.raises(BadImage, match="no image of a known format"):
        read_image(tmp_path / "a.png")


def pgm(kind: bytes, most: int, values: UInt16) -> bytes:
    height, width = values.shape
    head = b"%s\n%d %d\n%d\n" % (kind, width, height, most)
    if kind == b"P2":
        return head + b" ".join(b"%d" % value for value in values.ravel())
    return head + values.astype(">u2").tobytes()


def saved(format_: str, values: UInt16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format_)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["P5", "P2", "P5 of 10 bits", "PNG", "TIFF"])
def test_of_16_bit_grey_values_the_high_byte_is_taken(kind: str, tmp_path: Path) -> None:
    values = np.arange(0, 65536, 257 * 17 - 5, dtype=np.uint16).reshape(1, -1)
    path = tmp_path / f"a.{'pgm' if kind[0] == 'P' and kind != 'PNG' else kind.lower()}"
    expected = values >> 8
    if kind in ("PNG", "TIFF"):
        path.write_bytes(saved(kind, values))
    elif kind == "P5 of 10 bits":  # scaled to 16 bits, as the format says
        path.write_bytes(pgm(b"P5", 1023, values >> 6))
        expected = np.rint((values >> 6) / 1023 * 65535).astype(int) >> 8
    else:
        path.write_bytes(pgm(kind.encode(), 65535, values))
    found = read_image(path)
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=2))


def twelve_bits() -> bytes:
    """A TIFF of 2 x 1 grey pixels of 12 bits."""
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (279, 3)]
    tags = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    head = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf0\x00\0"
    return head + struct.pack("<H", len(entries)) + tags + bytes(4)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (saved("TIFF", np.full((2, 2), 70000, np.int32)), "its values are 32-bit integers"),
        (saved("TIFF", np.full((2, 2), 0.5, np.float32)), "its values are floating-point numbers"),
        (twelve_bits(), "12-bit values"),
    ],
)
def test_values_that_have_no_high_byte_are_refused(
    content: bytes, what: str, tmp_path: Path
) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(BadImage, match=f"a.tif: {what}.*; expected 8 or 16 bits a channel"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("ending", sorted(EXTENSIONS))
def test_each_ending_can_be_read(ending: str, tmp_path: Path) -> None:
    if ending == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"a{ending}"
    kind = {".jpe": "JPEG", ".jfif": "JPEG"}.get(ending)
    Image.fromarray(colours()[..., 0] if ending == ".pgm" else colours()).save(path, kind)
    assert read_image(path).shape == (11, 17, 3)


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
