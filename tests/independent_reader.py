"""Reads label sets from docs/format.md alone: imports nothing from sskt.

By hand: python tests/independent_reader.py LABEL_SET IMAGE_FOLDER NETWORK.py:factory
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

Float64 = NDArray[np.float64]
UInt8 = NDArray[np.uint8]

IMAGE = re.compile(r".*\.(bmp|gif|jpeg|jpg|pgm|png|ppm|tif|tiff|webp)", re.IGNORECASE)
WRITE_ORDER = {
    "f32": ("labels",),
    "f16": ("labels",),
    "u8": ("labels",),
    "topk": ("index", "value"),
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
                if there[-1] and not all(there):
                    raise FormatError(f"seed {seed}, block {block} is there in part: {there}")
                if not there[-1]:
                    lacking.append((seed, block))
        return lacking

    def stored(self, array: str, seed: int, sample: int) -> NDArray[Any]:
        """One row of an array (of view_check: one number) as it is stored."""
        if not _holds_bytes(self.shard_file(array, seed, sample // self.rows)):
            raise FormatError(f"{array}: no shard for seed {seed}, sample {sample}")
        opened = zarr.open_array(self.path / array, mode="r")
        return np.asarray(opened[seed, sample])

    def label(self, seed: int, sample: int, temperature: float = 1.0) -> Float64 | None:
        """Probabilities ``[C]``; None for a skipped row. Section 4."""
        name = self.spec["encoding"]["name"]
        if name == "topk":
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
    for array in WRITE_ORDER[encoding]:
        meta = json.loads((path / array / "zarr.json").read_text("utf-8"))
        shard = meta["chunk_grid"]["configuration"]["chunk_shape"]
        if meta["shape"][1:] != [samples, width] or shard != [1, rows, width]:
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


def view_of(image: UInt8, views: dict[str, Any], sample: int, seed: int) -> UInt8:
    """The view of an image under the spec's ``views``."""
    if views["version"] != 1:
        raise FormatError(f"unknown version {views['version']} of policy {views['policy']}")
    identity = {key: views[key] for key in ("policy", "version", "parameters")}
    key = (seed, zlib.crc32(canonical_json(identity).encode("ascii")))

    def words(block: int) -> tuple[int, int, int, int]:
        return philox((sample & 0xFFFFFFFF, sample >> 32, block, 0), key)

    p = views["parameters"]
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
        cut = _resize(image[top : top + h, left : left + w], p["size"], p["size"])
        return cut[:, ::-1] if flip else cut
    if views["policy"] == "resize-center-crop":
        short, size = min(height, width), p["size"]
        high, wide = p["resize"] * height // short, p["resize"] * width // short
        top, left = round((high - size) / 2), round((wide - size) / 2)
        return _resize(image, wide, high)[top : top + size, left : left + size]
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


def _resize(image: UInt8, width: int, height: int) -> UInt8:
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def crc_of(view: UInt8) -> int:
    """Section 5."""
    return zlib.crc32(view.tobytes())


# --- the target, section 7 ------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """The samples of a folder, in order."""

    base: Path
    ids: list[str]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for sample in self.ids:
            size = (self.base / sample).stat().st_size
            digest.update(sample.encode("utf-8", "surrogateescape") + b"\0%d\n" % size)
        return "sha256:" + digest.hexdigest()

    def image(self, sample: int) -> UInt8:
        with Image.open(self.base / self.ids[sample]) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)


def open_folder(folder: Path, split: str, size: int) -> Folder:
    """Class folders under ``folder/split``, cut down to ``size`` by the rule of --limit."""
    base = folder / split if (folder / split).is_dir() or split != "train" else folder
    ids: list[bytes] = []
    for kind in sorted(d.name.encode("utf-8", "surrogateescape") for d in base.iterdir()):
        name = kind.decode("utf-8", "surrogateescape")
        if name.startswith(".") or not (base / name).is_dir():
            continue
        found = []
        for at, inside, files in os.walk(base / name, followlinks=True):
            inside[:] = [d for d in inside if not d.startswith(".")]
            place = Path(at).relative_to(base).as_posix()
            found += [
                f"{place}/{file}".encode("utf-8", "surrogateescape")
                for file in files
                if IMAGE.fullmatch(file) and not file.startswith(".")
            ]
        ids += sorted(found)
    if size < len(ids):
        ids = [ids[i * len(ids) // size] for i in range(size)]
    return Folder(base, [i.decode("utf-8", "surrogateescape") for i in ids])


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


def encoded(reader: Reader, log_p: Float64) -> Float64:
    """What log-probabilities become through the set's encoding, decoded at T = 1."""
    name, p = reader.spec["encoding"]["name"], np.exp(log_p)
    if name == "f16":
        p = np.exp(np.maximum(log_p, -65504).astype(np.float16).astype(np.float64))
    elif name == "u8":
        p = (np.rint(255 * np.exp((log_p - log_p.max()) / 6)) / 255) ** 6
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


def compare(reader: Reader, folder: Folder, network: Any, every: int = 1) -> Agreement:
    """Replays the views of every ``every``-th sample under all seeds and recomputes the labels.

    ``worst`` is the largest total variation distance to the live label sent through the
    encoding, ``worst_exact`` to the live label itself.
    """
    source, found = reader.spec["source"], Agreement()
    if reader.missing():
        raise FormatError(f"{len(reader.missing())} shards are missing")
    if folder.fingerprint() != reader.spec["target"]["fingerprint"]:
        raise FormatError("the folder is not the target: fingerprints differ")
    if weights_digest(network) != source["weights"]:
        raise FormatError("the network is not the source: weights differ")
    for sample in range(0, reader.samples, every):
        for seed in range(reader.seeds):
            stored = reader.label(seed, sample)
            if stored is None:
                found.skipped += 1
                continue
            view = view_of(folder.image(sample), reader.spec["views"], sample, seed)
            found.wrong_views += crc_of(view) != reader.check(seed, sample)
            live = log_probabilities(network, source["preprocessing"], view)
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
    opened = open_folder(Path(folder), target["split"], target["size"])
    found = compare(reader, opened, load_factory(network))
    print(
        f"{reader.path.name}: {reader.seeds} seeds x {reader.samples} samples, "
        f"{found.compared} labels recomputed, {found.skipped} skipped, "
        f"{found.wrong_views} views differ, worst distance {found.worst:.2e}"
    )
    return int(found.wrong_views > 0 or found.worst > 0.005)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
