"""Reads label sets from docs/format.md alone: imports nothing from sskt.

By hand: python tests/support/independent_reader.py LABEL_SET FOLDER NETWORK.py:factory
where FOLDER holds class folders of images or of clips.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import math
import operator
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

Float64 = NDArray[np.float64]
UInt8 = NDArray[np.uint8]

IMAGE = re.compile(r".*\.(avif|bmp|gif|jfif|jpe|jpeg|jpg|pgm|png|ppm|tif|tiff|webp)", re.IGNORECASE)
VIDEO = re.compile(r".*\.(3gp|avi|flv|m4v|mkv|mov|mp4|mpeg|mpg|mts|ogv|ts|webm|wmv)", re.IGNORECASE)
EXACT = 0x2 | 0x40000 | 0x80000
"""SWS_BILINEAR | SWS_ACCURATE_RND | SWS_BITEXACT."""
WRITE_ORDER = {
    "f32": ("labels",),
    "f16": ("labels",),
    "u8": ("labels",),
    "root4": ("labels",),
    "topk": ("index", "value"),
    "features-f16": ("features",),
    "features-u8": ("range", "features"),
}


class FormatError(Exception):
    """The label set is damaged, incomplete or not of this format."""


def canonical_json(value: Any) -> str:
    """Section 3."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


@dataclass(frozen=True)
class Reader:
    """An opened label set."""

    path: Path
    attributes: dict[str, Any]
    seeds: int
    samples: int
    rows: int

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.attributes["spec"]
        return spec

    @property
    def classes(self) -> int:
        return len(self.attributes["classes"])

    def shard_file(self, array: str, seed: int, block: int) -> Path:
        file = self.path / array / "c" / str(seed) / str(block)
        return file if array == "view_check" else file / "0"

    def missing(self) -> list[tuple[int, int]]:
        """(seed, block) of each shard that is not stored; FormatError if one is stored in part."""
        order = ("view_check", *WRITE_ORDER[self.spec["encoding"]["name"]])
        lacking = []
        for seed in range(self.seeds):
            for block in range(math.ceil(self.samples / self.rows)):
                there = [_holds_bytes(self.shard_file(array, seed, block)) for array in order]
                committed = self.record_file(seed, block).exists() if self.bound else there[-1]
                if committed and not all(there):
                    raise FormatError(f"seed {seed}, block {block} is there in part: {there}")
                if not committed:
                    lacking.append((seed, block))
        return lacking

    @property
    def bound(self) -> bool:
        """Section 3."""
        return self.attributes.get("bound") is True

    def record_file(self, seed: int, block: int) -> Path:
        return self.path / "view_check" / "c" / str(seed) / f"{block}.json"

    def require_bound(self, seed: int, block: int) -> None:
        """FormatError if a shard's files are not those that its record names. Section 2."""
        file = self.record_file(seed, block)
        if not file.exists():
            if self.bound:
                raise FormatError(f"seed {seed}, block {block} has no record")
            return
        record = json.loads(file.read_bytes())
        if canonical_json(record).encode() != file.read_bytes():
            raise FormatError(f"{file} is not canonical JSON")
        checksums = {
            array: self.checksums(array, seed, block)
            for array in ("view_check", *WRITE_ORDER[self.spec["encoding"]["name"]])
        }
        digest = hashlib.sha256(canonical_json(self.spec).encode()).hexdigest()
        expected = {"digest": digest, "seed": seed, "block": block, "checksums": checksums}
        if record != expected:
            raise FormatError(f"{file} holds {record}, its place and files say {expected}")

    def checksums(self, array: str, seed: int, block: int) -> str:
        """What a record says of an array's file: the ends of its chunks and of the file."""
        document = json.loads((self.path / array / "zarr.json").read_bytes())
        shard = document["chunk_grid"]["configuration"]["chunk_shape"][1]
        chunk = document["codecs"][0]["configuration"]["chunk_shape"][1]
        data = self.shard_file(array, seed, block).read_bytes()
        count = math.ceil(shard / chunk)
        found = b""
        for position in struct.iter_unpack("<QQ", data[-16 * count - 4 : -4]):
            stop = sum(position)
            found += bytes(4) if stop >= 2**64 else data[stop - 4 : stop]
        return (found + data[-4:]).hex()

    def stored(self, array: str, seed: int, sample: int) -> NDArray[Any]:
        """One row of an array (of view_check: one number) as it is stored."""
        if not _holds_bytes(self.shard_file(array, seed, sample // self.rows)):
            raise FormatError(f"{array}: no shard for seed {seed}, sample {sample}")
        self.require_bound(seed, sample // self.rows)
        opened = zarr.open_array(self.path / array, mode="r")
        return np.asarray(opened[seed, sample])

    def features(self, seed: int, sample: int) -> Float64 | None:
        """Features or logits ``[D]``; None for a skipped row. Section 4."""
        codes = self.stored("features", seed, sample).astype(np.float64)
        if self.spec["encoding"]["name"] == "features-u8":
            least, step = self.stored("range", seed, sample).astype(np.float64)
            codes = least + step * codes
        return None if np.isnan(codes).all() else codes

    def head(self) -> tuple[Float64, Float64]:
        """Weight ``[C, D]`` and bias ``[C]``; FormatError if the spec names another head."""
        if "head" not in self.spec["output"]:
            raise FormatError("the set has no head, and so no soft labels")
        weight, bias = (
            np.asarray(zarr.open_array(self.path / name, mode="r")[...])
            for name in ("head_weight", "head_bias")
        )
        digest = hashlib.sha256(weight.astype("<f4").tobytes() + bias.astype("<f4").tobytes())
        if f"sha256:{digest.hexdigest()}" != self.spec["output"]["head"]:
            raise FormatError("the head is not the one that the spec names")
        return weight.astype(np.float64), bias.astype(np.float64)

    def label(self, seed: int, sample: int, temperature: float = 1.0) -> Float64 | None:
        """Probabilities ``[C]``; None for a skipped row. Section 4."""
        name = self.spec["encoding"]["name"]
        if name.startswith("features-"):
            weight, bias = self.head()
            found = self.features(seed, sample)
            if found is None:
                return None
            logits = (weight @ found + bias) / temperature
            p = np.exp(logits - logits.max())
        elif name == "topk":
            value = self.stored("value", seed, sample).astype(np.float64)
            if np.isnan(value).all():
                return None
            top = np.exp(value)
            others = max(self.classes - len(top), 1)
            q = np.full(self.classes, max(0.0, 1 - top.sum()) / others)
            q[self.stored("index", seed, sample).astype(np.int64)] = top
            p = q ** (1 / temperature)
        elif name == "u8":
            code = self.stored("labels", seed, sample).astype(np.float64)
            if not code.any():
                return None
            p = (code / 255) ** (6 / temperature)
        elif name == "root4":
            code = self.stored("labels", seed, sample).astype(np.float64)
            if not code.any():
                return None
            p = np.where(code == 0, 0.25, code) ** (4 / temperature)
        else:
            log_p = self.stored("labels", seed, sample).astype(np.float64)
            if np.isnan(log_p).all():
                return None
            p = np.exp(log_p / temperature)
        probabilities: Float64 = p / p.sum()
        return probabilities

    def check(self, seed: int, sample: int) -> int:
        return int(self.stored("view_check", seed, sample))


def _holds_bytes(shard: Path) -> bool:
    """Zarr gives fill values for a file that is missing, and for one of 0 bytes."""
    return shard.is_file() and shard.stat().st_size > 0


def open_set(path: Path) -> Reader:
    """Opens a label set and checks its digest, its format and its arrays' metadata."""
    attributes = json.loads((path / "zarr.json").read_text("utf-8"))["attributes"]["sskt"]
    if attributes["format"] != 1:
        raise FormatError(f"format {attributes['format']}, this reader knows 1")
    spec = attributes["spec"]
    if hashlib.sha256(canonical_json(spec).encode("ascii")).hexdigest() != attributes["digest"]:
        raise FormatError("the spec does not match its digest")
    if not path.name.endswith("." + attributes["digest"][:12]):
        raise FormatError(f"{path.name} does not end in the digest {attributes['digest'][:12]}")
    names = "\n".join(attributes["classes"]).encode()
    if spec["source"]["classes"] != {
        "count": len(attributes["classes"]),
        "sha256": "sha256:" + hashlib.sha256(names).hexdigest(),
    }:
        raise FormatError("the class names do not match the spec")
    encoding = spec["encoding"]["name"]
    if encoding not in WRITE_ORDER:
        raise FormatError(f"unknown encoding {encoding}")
    check = json.loads((path / "view_check" / "zarr.json").read_text("utf-8"))
    seeds, samples = check["shape"]
    rows = check["chunk_grid"]["configuration"]["chunk_shape"][1]
    width = spec["encoding"]["k"] if encoding == "topk" else len(attributes["classes"])
    if ("output" in spec) != encoding.startswith("features-"):
        raise FormatError(f"encoding {encoding} does not go with the output of the spec")
    widths = {"features": spec["output"]["width"], "range": 2} if "output" in spec else {}
    for array in WRITE_ORDER[encoding]:
        meta = json.loads((path / array / "zarr.json").read_text("utf-8"))
        shard = meta["chunk_grid"]["configuration"]["chunk_shape"]
        entries = widths.get(array, width)
        if meta["shape"][1:] != [samples, entries] or shard != [1, rows, entries]:
            raise FormatError(f"{array}: shape {meta['shape']} in shards of {shard}")
    if samples != spec["target"]["size"]:
        raise FormatError(f"{samples} samples, the spec says {spec['target']['size']}")
    return Reader(path, attributes, seeds, samples, rows)


# --- views, section 6 -----------------------------------------------------------------------


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in plain integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            b >> 32 ^ c1 ^ k0,
            b & 0xFFFFFFFF,
            a >> 32 ^ c3 ^ k1,
            a & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def below(word: int, bound: int) -> int:
    return word * bound >> 32


def unit(word: int) -> float:
    return word / 2**32


def half_up(x: float) -> int:
    return math.floor(x + 0.5)


Words = Callable[[int], tuple[int, int, int, int]]
"""The four random words of a block."""


def words_of(views: dict[str, Any], sample: int, seed: int, stream: int = 0) -> Words:
    identity = {key: views[key] for key in ("policy", "version", "parameters")}
    key = (seed, zlib.crc32(canonical_json(identity).encode("ascii")))
    return lambda block: philox((sample & 0xFFFFFFFF, sample >> 32, block, stream), key)


def view_of(image: UInt8, views: dict[str, Any], sample: int, seed: int) -> UInt8:
    """The view of an image under the spec's ``views``, before it is mixed with another."""
    cropped = cropped_view_of(image, views, sample, seed)
    made: UInt8 = augmented(cropped[None], views, sample, seed)[0]
    return made


def cropped_view_of(image: UInt8, views: dict[str, Any], sample: int, seed: int) -> UInt8:
    resizes = views["policy"] not in ("none", "pad-crop-flip")
    if views["version"] not in ((1, 2) if resizes else (1,)):
        raise FormatError(f"unknown version {views['version']} of policy {views['policy']}")
    p, version = views["parameters"], views["version"]
    words = words_of(views, sample, seed)
    height, width = image.shape[:2]
    if views["policy"] == "none":
        return image
    if views["policy"] == "pad-crop-flip":
        pad = p["padding"]
        w0, w1, w2, _ = words(0)
        canvas = np.zeros((height + 2 * pad, width + 2 * pad, 3), np.uint8)
        canvas[pad : pad + height, pad : pad + width] = image
        top, left = below(w0, 2 * pad + 1), below(w1, 2 * pad + 1)
        cut = canvas[top : top + height, left : left + width]
        return cut[:, ::-1] if below(w2, 2) else cut
    if views["policy"] == "random-resized-crop-flip":
        flip = below(words(0)[2], 2)
        top, left, h, w = _box(words, height, width, p)
        cut = resized(image[top : top + h, left : left + w], p["size"], p["size"], version)
        return cut[:, ::-1] if flip else cut
    if views["policy"] == "resize-center-crop":
        return center_crop(image, p["resize"], p["size"], version)
    raise FormatError(f"unknown policy {views['policy']}")


def _box(words: Any, height: int, width: int, p: dict[str, Any]) -> tuple[int, int, int, int]:
    log_low, log_high = math.log(p["ratio_min"]), math.log(p["ratio_max"])
    for block in range(1, 11):
        w0, w1, w2, w3 = words(block)
        scale = p["scale_min"] + unit(w0) * (p["scale_max"] - p["scale_min"])
        area = height * width * scale
        ratio = math.exp(log_low + unit(w1) * (log_high - log_low))
        w, h = half_up(math.sqrt(area * ratio)), half_up(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return below(w2, height - h + 1), below(w3, width - w + 1), h, w
    h, w = height, width
    if width / height < p["ratio_min"]:
        h = half_up(width / p["ratio_min"])
    elif width / height > p["ratio_max"]:
        w = half_up(height * p["ratio_max"])
    return (height - h) // 2, (width - w) // 2, h, w


def center_crop(images: UInt8, resize: int, size: int, version: int) -> UInt8:
    """``resize-center-crop`` of uint8 ``[..., H, W, 3]``."""
    height, width = images.shape[-3:-1]
    short = min(height, width)
    high, wide = resize * height // short, resize * width // short
    top, left = round((high - size) / 2), round((wide - size) / 2)
    return resized(images, wide, high, version)[..., top : top + size, left : left + size, :]


def resized(images: UInt8, width: int, height: int, version: int) -> UInt8:
    """uint8 ``[..., H, W, 3]`` to ``[..., height, width, 3]``: section 6, Resizing."""
    return _axis_resized(_axis_resized(images, width, -2, version), height, -3, version)


def _axis_resized(values: UInt8, m: int, axis: int, version: int) -> UInt8:
    n = values.shape[axis]
    if n == m:
        return values
    places, weights, bits = _taps(n, m, version)
    shape = [1] * values.ndim
    shape[axis] = m
    total: Any = np.int32(2 ** (bits - 1))
    for place, weight in zip(places.T, weights.T, strict=True):
        total = total + values.take(place, axis) * weight.reshape(shape)
    result: UInt8 = np.minimum(total >> bits, 255).astype(np.uint8)
    return result


@functools.cache
def _taps(n: int, m: int, version: int) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """The values that each of ``m`` results takes, their weights, int32 ``[m, taps]``, and b."""
    r = n / m
    f = max(r, 1.0)
    rows = []
    for i in range(m):
        c = (i + 0.5) * r
        taken = range(max(0, int(c - f + 0.5)), min(n, int(c + f + 0.5)))
        weight = [max(0.0, 1 - abs((j - c + 0.5) * (1 / f))) for j in taken]
        total = functools.reduce(operator.add, weight)
        rows.append([(j, w / total) for j, w in zip(taken, weight, strict=True)])
    bits, largest = 22, max(w for row in rows for _, w in row)
    if version == 2:
        bits = next(b for b in range(23) if b == 22 or int(largest * 2 ** (b + 1) + 0.5) >= 2**15)
    taps = np.zeros((2, m, max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        taps[:, i, : len(row)] = np.transpose([(j, int(w * 2**bits + 0.5)) for j, w in row])
    return taps[0], taps[1], bits


def frames_of(file: Path) -> list[Any]:
    """The frames of a clip's file, each to be given to ``rgb_of``."""
    if file.is_dir():
        first = 1 - (file / "image_00000.jpg").exists()
        images = (file / f"image_{number:05d}.jpg" for number in itertools.count(first))
        return list(itertools.takewhile(Path.exists, images))
    older = int(av.__version__.partition(".")[0]) < 19  # later versions never decode strictly
    options: dict[str, Any] = {"metadata_errors": "ignore"} if older else {}
    with av.open(str(file), **options) as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)
        return list(container.decode(stream))


def rgb_of(frame: Any) -> UInt8:
    """A frame as uint8 ``[H, W, 3]``."""
    if isinstance(frame, Path):
        return image_of(frame)
    rgb: UInt8 = frame.reformat(format="rgb24", interpolation=EXACT).to_ndarray()
    return rgb


def image_of(file: Path) -> UInt8:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def clip_of(
    frames: list[Any], views: dict[str, Any], sample: int, seed: int, window: int | None
) -> UInt8:
    """The view of a clip: uint8 ``[D, size, size, 3]``. ``window``: its START, if it has one."""
    version = views["version"]
    if version not in (1, 2):
        raise FormatError(f"unknown version {version} of policy {views['policy']}")
    if views["decoder"] != "pyav":
        raise FormatError(f"this reader has no {views['decoder']}")
    p = views["parameters"]
    depth, size, n = p["frames"], p["size"], len(frames)
    w0, w1, w2, w3 = words_of(views, sample, seed)(0)
    start = below(w0, max(1, n - depth + 1)) if window is None else window
    taken = [start + i % min(depth, n - start) for i in range(depth)]
    rgb = {k: rgb_of(frames[k]) for k in set(taken)}
    clip = np.stack([rgb[k] for k in taken])
    if views["policy"] == "clip-center-crop":
        return center_crop(clip, size, size, version)
    if views["policy"] != "clip-corner-crop-flip":
        raise FormatError(f"unknown policy {views['policy']}")
    height, width = clip.shape[1:3]
    side = max(1, math.floor(min(height, width) * 2 ** (-below(w1, p["scales"]) / 4)))
    down, right = height - side, width - side
    corners = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))
    top, left = corners[below(w2, 5)]
    cut = resized(clip[:, top : top + side, left : left + side], size, size, version)
    return augmented(cut[:, :, ::-1] if below(w3, 2) else cut, views, sample, seed)


# --- strong augmentation, section 6 ---------------------------------------------------------


def augmented(frames: UInt8, views: dict[str, Any], sample: int, seed: int) -> UInt8:
    """The frames ``[D, H, W, 3]`` of a view after the policy's own section."""
    p, words = views["parameters"], words_of(views, sample, seed, stream=6)
    made = [frame.astype(np.int64) for frame in frames]
    chosen = []
    for k in range(p.get("randaugment", 0)):
        w0, w1, _, _ = words(k)
        chosen.append((below(w0, 14), -1 if below(w1, 2) else 1, p["magnitude"], False))
    if p.get("trivial"):
        w0, w1, w2, _ = words(0)
        chosen.append((below(w0, 14), -1 if below(w1, 2) else 1, below(w2, 31), True))
    for choice in chosen:
        made = [_operation(frame, *choice) for frame in made]
    if p.get("jitter") or p.get("hue"):
        j = math.floor(65536 * p.get("jitter", 0) + 0.5)
        g = math.floor(65536 * (6 * p.get("hue", 0)) + 0.5)
        v, order = words(65), words(64)
        q = [65536 - j + below(v[i], 2 * j + 1) for i in range(3)] + [below(v[3], 2 * g + 1) - g]
        waiting = list(zip((_brightness, _contrast, _saturation, _hue), q, strict=True))
        while waiting:
            operation, strength = waiting.pop(below(order[4 - len(waiting)], len(waiting)))
            made = [operation(frame, strength) for frame in made]
    found = np.stack(made).astype(np.uint8)
    height, width = found.shape[1:3]
    if unit(words(66)[0]) < p.get("erase", 0):
        for block in range(67, 77):
            w0, w1, w2, w3 = words(block)
            area = height * width * (0.02 + unit(w0) * (0.33 - 0.02))
            ratio = math.exp(math.log(0.3) + unit(w1) * (math.log(3.3) - math.log(0.3)))
            h, w = half_up(math.sqrt(area * ratio)), half_up(math.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                top, left = below(w2, height - h + 1), below(w3, width - w + 1)
                found[:, top : top + h, left : left + w] = (124, 116, 104)
                break
    return found


Int64 = NDArray[np.int64]


def mixed_view_of(
    own: Callable[[int], UInt8], views: dict[str, Any], sample: int, seed: int, count: int
) -> tuple[UInt8, int, float]:
    """A view under mixup or cutmix, the partner, and the weight; ``own`` gives unmixed views.

    ``own`` raises OSError for a sample that cannot be decoded.
    """
    p, words = views["parameters"], words_of(views, sample, seed, stream=7)
    alphas = {kind: p[kind] for kind in ("mixup", "cutmix") if kind in p}
    view, other = own(sample), _partner(views, sample, seed, count)
    if not alphas:
        return view, sample, 1.0
    try:
        theirs = own(other)
    except OSError:
        return view, other, 1.0
    w0, w1, w2, _ = words(0)
    kind = ("mixup", "cutmix")[below(w0, 2)] if len(alphas) == 2 else next(iter(alphas))
    q = 32768
    for block in range(1, 65):
        x, y = (((w + 0.5) / 2**32) ** (1 / alphas[kind]) for w in words(block)[:2])
        if x + y <= 1:
            q = half_up(65536 * (x / (x + y)))
            break
    if kind == "mixup":
        mixed = _blend(view.astype(np.int64), theirs.astype(np.int64), q)
        return mixed.astype(np.uint8), other, q / 65536
    height, width = view.shape[-3:-1]
    side = math.sqrt((65536 - q) / 65536)
    down, across = math.floor(height * side) // 2, math.floor(width * side) // 2
    y, x = below(w1, height), below(w2, width)
    rows = slice(max(0, y - down), min(height, y + down))
    columns = slice(max(0, x - across), min(width, x + across))
    made = view.copy()
    made[..., rows, columns, :] = theirs[..., rows, columns, :]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return made, other, 1 - area / (height * width)


def _partner(views: dict[str, Any], sample: int, seed: int, count: int) -> int:
    rows = next(a for a in itertools.count(1) if a * a >= count)
    columns = math.ceil(count / rows)
    at = sample
    while True:
        high, low = divmod(at, columns)
        for number in range(6):
            if number % 2 == 0:
                high = (high + below(words_of(views, low, seed, 8)(number)[0], rows)) % rows
            else:
                low = (low + below(words_of(views, high, seed, 8)(number)[0], columns)) % columns
        at = high * columns + low
        if at < count:
            return at


def _u(a: int, b: int) -> int:
    return (2 * 65536 * a + b) // (2 * b)


def _operation(x: Int64, number: int, s: int, m: int, trivial: bool) -> Int64:
    height, width = x.shape[:2]
    shear = s * (_u(33 * m, 1000) if trivial else _u(m, 100))
    right, down = (
        s * (16 * m // 15 if trivial else 5 * side * m // 331) for side in (width, height)
    )
    q = 65536 + s * (_u(33 * m, 1000) if trivial else _u(3 * m, 100))
    theta = math.radians(s * (4.5 * m if trivial else m))
    o, i = half_up(65536 * math.cos(theta)), half_up(65536 * math.sin(theta))
    bits = 8 - ((2 * m + 5) // 10 if trivial else (4 * m + 15) // 30)
    t = 255 - 17 * m // 2
    one = 65536
    doing: list[Callable[[], Any]] = [
        lambda: x,
        lambda: _placed(x, (one, shear, 0), (0, one, 0)),
        lambda: _placed(x, (one, 0, 0), (shear, one, 0)),
        lambda: _placed(x, (one, 0, -131072 * right), (0, one, 0)),
        lambda: _placed(x, (one, 0, 0), (0, one, -131072 * down)),
        lambda: _placed(
            x,
            (o, -i, one * width - o * width + i * height),
            (i, o, one * height - i * width - o * height),
        ),
        lambda: _brightness(x, q),
        lambda: _saturation(x, q),
        lambda: _contrast(x, q),
        lambda: _sharpness(x, q),
        lambda: x >> (8 - bits) << (8 - bits),
        lambda: np.where(x >= t, 255 - x, x),
        lambda: np.stack([_stretched(x[..., c]) for c in range(3)], -1),
        lambda: np.stack([_equalised(x[..., c]) for c in range(3)], -1),
    ]
    done: Int64 = doing[number]()
    return done


def _blend(v: Int64, o: Any, q: int) -> Int64:
    mixed: Int64 = np.clip((q * v + (65536 - q) * o + 32768) // 65536, 0, 255)
    return mixed


def _grey(x: Int64) -> Int64:
    luma: Int64 = (x @ np.array([19595, 38470, 7471]) + 32768) // 65536
    return luma


def _brightness(x: Int64, q: int) -> Int64:
    return _blend(x, 0, q)


def _saturation(x: Int64, q: int) -> Int64:
    return _blend(x, _grey(x)[:, :, None], q)


def _contrast(x: Int64, q: int) -> Int64:
    luma = _grey(x)
    return _blend(x, (2 * int(luma.sum()) + luma.size) // (2 * luma.size), q)


def _sharpness(x: Int64, q: int) -> Int64:
    height, width = x.shape[:2]
    smooth = x.copy()
    for row in range(1, height - 1):
        for column in range(1, width - 1):
            around = x[row - 1 : row + 2, column - 1 : column + 2].sum((0, 1))
            smooth[row, column] = (around + 4 * x[row, column] + 6) // 13
    return _blend(x, smooth, q)


def _hue(x: Int64, q: int) -> Int64:
    made = x.copy()
    for row, column in np.ndindex(*x.shape[:2]):
        red, green, blue = x[row, column].tolist()
        a, i = max(red, green, blue), min(red, green, blue)
        c = a - i
        if c == 0:
            continue
        h = 4 * c + red - green
        if red == a:
            h = green - blue
        elif green == a:
            h = 2 * c + blue - red
        t = (65536 * h + q * c) % (6 * 65536 * c)
        k, f = divmod(t, 65536 * c)
        x_ = i + ((f if k % 2 == 0 else 65536 * c - f) + 32768) // 65536
        made[row, column] = (
            (a, x_, i), (x_, a, i), (i, a, x_), (i, x_, a), (x_, i, a), (a, i, x_),
        )[k]  # fmt: skip
    return made


def _stretched(channel: Int64) -> Int64:
    a, b = int(channel.min()), int(channel.max())
    return channel if a == b else 255 * (channel - a) // (b - a)


def _equalised(channel: Int64) -> Int64:
    e = (channel.size - int((channel == channel.max()).sum())) // 255
    if e == 0:
        return channel
    smaller = np.array([(channel < v).sum() for v in range(256)])
    levels: Int64 = np.minimum(255, (smaller[channel] + e // 2) // e)
    return levels


def _placed(x: Int64, across: tuple[int, int, int], down: tuple[int, int, int]) -> Int64:
    made = np.zeros_like(x)
    height, width = x.shape[:2]
    for row, column in np.ndindex(height, width):
        left = (across[0] * (2 * column + 1) + across[1] * (2 * row + 1) + across[2]) // 131072
        top = (down[0] * (2 * column + 1) + down[1] * (2 * row + 1) + down[2]) // 131072
        if 0 <= left < width and 0 <= top < height:
            made[row, column] = x[top, left]
    return made


def crc_of(view: UInt8) -> int:
    """Section 5."""
    return zlib.crc32(view.tobytes())  # in C order, whatever the strides


# --- the target, section 7 ------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """The samples of a target of files, in order. ``starts``: first frames, of windows."""

    ids: list[str]
    files: list[Path]
    starts: list[int] | None = None

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for sample, file in zip(self.ids, self.files, strict=True):
            size = sum(one.stat().st_size for one in parts_of(file))
            digest.update(as_bytes(sample) + b"\0%d\n" % size)
        return "sha256:" + digest.hexdigest()

    def contents(self) -> str:
        entries = dict(zip(self.ids, self.files, strict=True))
        if self.starts is not None:
            entries = {sample.rpartition("#")[0]: file for sample, file in entries.items()}
        digest = hashlib.sha256()
        for sample, file in entries.items():
            digest.update(as_bytes(sample) + f"\0{_hash_of(file)}\n".encode())
        return "sha256:" + digest.hexdigest()

    def image(self, sample: int) -> UInt8:
        return image_of(self.files[sample])


def as_bytes(name: str) -> bytes:
    """A name as the file system has it."""
    return name.encode("utf-8", "surrogateescape")


def parts_of(file: Path) -> list[Path]:
    """A file itself; the files of a folder of frames, in order."""
    if not file.is_dir():
        return [file]
    inside = (one for one in file.iterdir() if one.is_file() and not one.name.startswith("."))
    return sorted(inside, key=lambda one: as_bytes(one.name))


def _hash_of(file: Path) -> str:
    if not file.is_dir():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    lines = (as_bytes(one.name) + f"\0{_hash_of(one)}\n".encode() for one in parts_of(file))
    return hashlib.sha256(b"".join(lines)).hexdigest()


Listed = tuple[int, str, Path]
"""Class, id and file of a sample."""


def limited(listed: list[Listed], limit: int | None) -> Files:
    """The samples that --limit leaves."""
    if limit is not None and limit < len(listed):
        order = sorted(range(len(listed)), key=lambda row: listed[row][0])
        rows = sorted(order[i * len(listed) // limit] for i in range(limit))
        listed = [listed[row] for row in rows]
    return Files([sample for _, sample, _ in listed], [file for *_, file in listed])


def open_folder(folder: Path, split: str, limit: int | None, *, clips: bool = False) -> Files:
    """The images, or clips, of the class folders under ``folder/split``."""
    base = folder / split if (folder / split).is_dir() or split != "train" else folder
    listed: list[Listed] = []
    kinds = [d.name for d in base.iterdir() if d.is_dir() and not _ignored(d.name)]
    for label, kind in enumerate(sorted(kinds, key=as_bytes) or ["."]):
        found = sorted(_below(base, kind, clips), key=as_bytes)
        listed += [(label, sample, base / sample) for sample in found]
    return limited(listed, limit)


def _below(base: Path, kind: str, clips: bool) -> Iterator[str]:
    """Ids of a class's samples."""
    for at, inside, files in os.walk(base / kind, followlinks=True):
        inside[:] = [d for d in inside if not _ignored(d)]
        place = Path(at).relative_to(base).as_posix()
        place = "" if place == "." else f"{place}/"
        if clips:
            frames = [d for d in inside if _holds_frames(Path(at, d))]
            inside[:] = [d for d in inside if d not in frames]
            yield from (f"{place}{d}" for d in frames)
        pattern = VIDEO if clips else IMAGE
        names = (file for file in files if pattern.fullmatch(file) and not file.startswith("."))
        yield from (f"{place}{file}" for file in names)


def _ignored(folder: str) -> bool:
    names = "@eaDir @Recycle @Recently-Snapshot @tmp #recycle #snapshot $RECYCLE.BIN lost+found"
    return folder[0] == "." or folder in (*names.split(), "System Volume Information", "__MACOSX")


def _holds_frames(folder: Path) -> bool:
    names = (one.name for one in folder.iterdir())
    return any(re.fullmatch(r"image_[0-9]{5,}\.jpg|n_frames", name) for name in names)


def open_ucf101(lists: Path, clips: Path, split: str, limit: int | None) -> Files:
    """UCF101 by its official list, without the videos that are not there."""
    side, fold = _side_and_fold(split)
    classes = [line.split()[1] for line in (lists / "classInd.txt").read_text().splitlines()]
    listed = []
    for line in (lists / f"{side}list0{fold}.txt").read_text().splitlines():
        kind, _, video = line.split()[0].partition("/")
        (label,) = (i for i, name in enumerate(classes) if name.lower() == kind.lower())
        listed += _found(clips, label, classes[label], Path(video).stem)
    return limited(listed, limit)


def open_hmdb51(lists: Path, clips: Path, split: str, limit: int | None) -> Files:
    """HMDB51 by its official lists, without the videos that are not there."""
    side, fold = _side_and_fold(split)
    ending = f"_test_split{fold}.txt"
    kinds = sorted((f.name.removesuffix(ending) for f in lists.glob(f"*{ending}")), key=as_bytes)
    listed = []
    for label, kind in enumerate(kinds):
        for line in filter(str.strip, (lists / f"{kind}{ending}").read_text().splitlines()):
            video, number = line.rsplit(maxsplit=1)
            if number == {"train": "1", "test": "2"}[side]:
                listed += _found(clips, label, kind, Path(video).stem)
    return limited(listed, limit)


def _side_and_fold(split: str) -> tuple[str, str]:
    side = split.rstrip("23")
    return side, split[len(side) :] or "1"


def _found(clips: Path, label: int, kind: str, video: str) -> list[Listed]:
    """A listed video, or nothing if it is not there."""
    inside = (one.name for one in (clips / kind).glob("*") if VIDEO.fullmatch(one.name))
    names = [name for name in inside if name.rpartition(".")[0] == video]
    names.sort(key=lambda name: (not name.lower().endswith(".avi"), as_bytes(name)))
    names += [video] if (clips / kind / video).is_dir() else []
    if not names:
        return []
    extension = names[0][len(video) :].lower()
    return [(label, f"{kind}/{video}{extension}", clips / kind / names[0])]


def windows_of(reader: Reader, target: Files) -> Files:
    """The windows of a target of clips under ``clip-center-crop``."""
    depth = reader.spec["views"]["parameters"]["frames"]
    ids, files, starts = list[str](), list[Path](), list[int]()
    for sample, file in zip(target.ids, target.files, strict=True):
        skipped = reader.label(0, len(ids)) is None
        count = 1 if skipped else math.ceil(len(frames_of(file)) / depth)
        starts += [j * depth for j in range(count)]
        files += [file] * count
        ids += [f"{sample}#{j * depth}" for j in range(count)]
    return Files(ids, files, starts)


# --- recomputation, section 8 ---------------------------------------------------------------


def load_factory(text: str) -> Any:
    """``FILE.py:factory`` to what the factory gives."""
    path, _, factory = text.rpartition(":")
    spec = importlib.util.spec_from_file_location("bare_network", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, factory)()


def weights_digest(network: Any) -> str:
    """``source.weights`` of the spec."""
    digest = hashlib.sha256()
    state = network.state_dict()
    for name in sorted(state):
        array = state[name].numpy()
        head = f"{name}\0torch.{array.dtype.name}\0{array.shape}\0"
        digest.update(head.encode() + np.ascontiguousarray(array).tobytes())
    return "sha256:" + digest.hexdigest()


def log_probabilities(network: Any, how: dict[str, Any], view: UInt8) -> Float64:
    """The network's log-probabilities for one view, through the preprocessing ``how``."""
    import torch

    x = torch.from_numpy(view.copy()).permute(2, 0, 1)[None].float()
    size = how["size"]
    if tuple(x.shape[2:]) != (size, size):
        x = torch.nn.functional.interpolate(
            x, (size, size), mode="bilinear", align_corners=False, antialias=True
        )
    if how["channels"] == "bgr":
        x = x.flip(1)
    mean, std = (torch.tensor(how[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = network.eval()((x * (how["scale"] / 255) - mean) / std)
        return np.asarray(torch.log_softmax(logits[0].float(), 0).double().numpy())


def stills_of(f_s: str, depth: int, sample: int, seed: int) -> list[int]:
    """The frames of a clip that the source saw."""
    if f_s == "center":
        return [depth // 2]
    if f_s == "first":
        return [0]
    if f_s == "random":
        return [below(philox((sample & 0xFFFFFFFF, sample >> 32, 0, 5), (seed, 0))[0], depth)]
    if not re.fullmatch(r"uniform-[1-9][0-9]*", f_s):
        raise FormatError(f"unknown f_s {f_s}")
    k = int(f_s.removeprefix("uniform-"))
    return [(2 * i + 1) * depth // (2 * k) for i in range(k)]


def encoded(reader: Reader, log_p: Float64) -> Float64:
    """What log-probabilities become through the set's encoding, decoded at T = 1."""
    name, p = reader.spec["encoding"]["name"], np.exp(log_p)
    if name == "f16":
        p = np.exp(np.maximum(log_p, -65504).astype(np.float16).astype(np.float64))
    elif name == "u8":
        p = (np.rint(255 * np.exp((log_p - log_p.max()) / 6)) / 255) ** 6
    elif name == "root4":
        a, classes = reader.spec["encoding"]["step"], len(log_p)
        d = max(a / classes, 1 / 65535) if a / classes >= 1 / 131070 else a / classes
        root = np.exp(log_p / 4) / np.exp(log_p / 4).sum()
        code = np.rint(root / d)
        p = np.where(code == 0, 0.25, code) ** 4
    elif name == "topk":
        k = reader.spec["encoding"]["k"]
        order = np.argsort(-log_p, kind="stable")[:k]
        top = np.exp(log_p[order].astype(np.float16).astype(np.float64))
        p = np.full(len(log_p), max(0.0, 1 - top.sum()) / max(len(log_p) - k, 1))
        p[order] = top
    probabilities: Float64 = p / p.sum()
    return probabilities


def distance(p: Float64, q: Float64) -> float:
    """Total variation."""
    return float(np.abs(p - q).sum() / 2)


@dataclass
class Agreement:
    """What ``compare`` found."""

    compared: int = 0
    skipped: int = 0
    wrong_views: int = 0
    worst: float = 0.0
    worst_exact: float = 0.0


def _unmixed(
    reader: Reader, folder: Files, seed: int, decoded: dict[int, list[Any]], sample: int
) -> UInt8:
    """The own view of a sample; ``decoded``: frames by sample."""
    views = reader.spec["views"]
    if reader.label(seed, sample) is None:
        raise OSError(f"sample {sample} cannot be decoded")
    if views["f_s"] == "identity":
        return view_of(folder.image(sample), views, sample, seed)
    start = None if folder.starts is None else folder.starts[sample]
    frames = decoded.get(sample) or frames_of(folder.files[sample])
    return clip_of(frames, views, sample, seed, start)


def compare(reader: Reader, folder: Files, network: Any, every: int = 1) -> Agreement:
    """Replays the views of every ``every``-th sample under all seeds and recomputes the labels.

    ``worst`` is the largest total variation distance to the live label sent through the
    encoding, ``worst_exact`` to the live label itself.
    """
    source, found = reader.spec["source"], Agreement()
    if reader.missing():
        raise FormatError(f"{len(reader.missing())} shards are missing")
    target, views = reader.spec["target"], reader.spec["views"]
    if folder.fingerprint() != target["fingerprint"]:
        raise FormatError("the folder is not the target: fingerprints differ")
    if "contents" in target and folder.contents() != target["contents"]:
        raise FormatError("the files are not those of the target: contents differ")
    if weights_digest(network) != source["weights"]:
        raise FormatError("the network is not the source: weights differ")
    clips = views["f_s"] != "identity"
    frames: list[Any] = []
    for sample in range(0, reader.samples, every):
        if sample == 0 or folder.files[sample] != folder.files[sample - every]:
            frames = []
        for seed in range(reader.seeds):
            stored = reader.label(seed, sample)
            if stored is None:
                found.skipped += 1
                continue
            frames = frames or (frames_of(folder.files[sample]) if clips else [])
            own = functools.partial(_unmixed, reader, folder, seed, {sample: frames})
            view, _, _ = mixed_view_of(own, views, sample, seed, reader.samples)
            stills = view[stills_of(views["f_s"], len(view), sample, seed)] if clips else view[None]
            found.wrong_views += crc_of(view) != reader.check(seed, sample)
            each = [log_probabilities(network, source["preprocessing"], still) for still in stills]
            live = np.logaddexp.reduce(each) - math.log(len(each))
            found.worst = max(found.worst, distance(encoded(reader, live), stored))
            found.worst_exact = max(found.worst_exact, distance(np.exp(live), stored))
            found.compared += 1
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    path, folder, network = arguments
    reader = open_set(Path(path))
    target = reader.spec["target"]
    windows = reader.spec["views"]["policy"] == "clip-center-crop"
    opened = open_folder(
        Path(folder),
        target["split"],
        reader.attributes["made"].get("limit") if windows else target["size"],
        clips=reader.spec["views"]["f_s"] != "identity",
    )
    if windows:
        opened = windows_of(reader, opened)
    found = compare(reader, opened, load_factory(network))
    print(
        f"{reader.path.name}: {reader.seeds} seeds x {reader.samples} samples, "
        f"{found.compared} labels recomputed, {found.skipped} skipped, "
        f"{found.wrong_views} views differ, worst distance {found.worst:.2e}"
    )
    return int(found.wrong_views > 0 or found.worst > 0.005)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
