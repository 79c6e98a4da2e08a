"""View policies: how a sample becomes the uint8 view of a seed.

Parameters come from Philox words, never from a generator with state. Each policy of images
runs batched (images of one size in RAM) and per sample (files); ``docs/format.md`` gives the
rules for an independent reader.
"""

from __future__ import annotations

import functools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import BadImage, InputError, UnknownName
from sskt.teacher_cache.media.images import UInt8, cut, require_pixels
from sskt.teacher_cache.media.regions import Box, BoxOf
from sskt.teacher_cache.rng import below, draw, unit, words_of
from sskt.teacher_cache.views import augment, mixing
from sskt.teacher_cache.views.own_policies import (
    OWN,
    OwnView,
    environment_of,
    load_view,
    source_hash,
)
from sskt.teacher_cache.views.resizing import VERSION, resized

Int64 = NDArray[np.int64]

STRONG = augment.PARAMETERS | mixing.PARAMETERS
"""Further parameters of the policies with random crops, and their defaults: nothing is done."""
TRIES = 10
"""Attempts of the random resized crop before it falls back to the centre (torchvision's)."""


@dataclass(frozen=True)
class Policy:
    """One augmentation policy with its parameters; ``version`` changes whenever pixels do.

    ``parse_policy`` gives the newest version; label sets and runs of older ones name theirs.
    ``own`` is that of a policy of the user.
    """

    name: str
    version: int = 1
    parameters: Mapping[str, Any] = field(default_factory=dict)
    own: PolicyInfo | None = None

    @property
    def info(self) -> PolicyInfo:
        """How the views are made."""
        return self.own or POLICIES[self.name]

    def identity(self) -> dict[str, Any]:
        """The part of a label set's spec that names these views."""
        named = {"policy": self.name, "version": self.version, "parameters": dict(self.parameters)}
        return named | (dict(self.own.identity) if self.own else {})

    @functools.cached_property
    def key(self) -> int:
        """Second word of the Philox key: CRC-32 of the canonical JSON of ``identity()``."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return zlib.crc32(text.encode())

    def __str__(self) -> str:
        if self.own and self.own.text:
            return self.own.text
        several = {"version": self.version} if self.info.version > 1 else {}
        options = ",".join(f"{k}={v}" for k, v in {**several, **self.parameters}.items())
        return f"{self.name}:{options}" if options else self.name


def crop_words(policy: Policy, samples: Int64, seed: int) -> tuple[Int64, Int64, NDArray[Any]]:
    """Top and left of ``pad-crop-flip``'s crops in the padded images, and flips: ``[n]`` each."""
    words = draw(samples, seed, policy.key)
    shifts = 2 * int(policy.parameters["padding"]) + 1
    return below(words[:, 0], shifts), below(words[:, 1], shifts), below(words[:, 2], 2) == 1


def _pad_crop_flip(policy: Policy, image: UInt8, sample: int, seed: int) -> UInt8:
    padding = int(policy.parameters["padding"])
    words = words_of(sample, seed, policy.key)
    top, left, flip = (
        word * n >> 32
        for word, n in zip(words[:3], (2 * padding + 1, 2 * padding + 1, 2), strict=True)
    )
    height, width = image.shape[:2]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    view = padded[top : top + height, left : left + width]
    return view[:, ::-1] if flip else view


def _pad_crop_flip_batch(policy: Policy, images: UInt8, samples: Int64, seed: int) -> UInt8:
    tops, lefts, flips = crop_words(policy, samples, seed)
    padding = int(policy.parameters["padding"])
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    views = windows[np.arange(len(images)), tops, lefts].transpose(0, 2, 3, 1)
    views = np.ascontiguousarray(views)
    views[flips] = views[flips, :, ::-1]
    return views


def crop_boxes(
    policy: Policy, samples: Int64, seed: int, heights: Int64, widths: Int64
) -> tuple[Int64, NDArray[np.bool_]]:
    """Boxes of the random resized crop: int64 ``[n, 4]`` (top, left, height, width), and flips.

    Torchvision's ``RandomResizedCrop``: ten attempts of area ~ U(scale), log ratio ~ U; else
    the largest centred box whose ratio is allowed.
    """
    p = policy.parameters
    flips = below(draw(samples, seed, policy.key)[:, 2], 2) == 1
    boxes = np.zeros((len(samples), 4), np.int64)
    log_low, log_high = np.log(p["ratio_min"]), np.log(p["ratio_max"])
    open_ = np.ones(len(samples), bool)
    for attempt in range(1, TRIES + 1):
        words = draw(samples, seed, policy.key, block=attempt)
        area = (
            heights
            * widths
            * (p["scale_min"] + unit(words[:, 0]) * (p["scale_max"] - p["scale_min"]))
        )
        ratio = np.exp(log_low + unit(words[:, 1]) * (log_high - log_low))
        w = np.floor(np.sqrt(area * ratio) + 0.5).astype(np.int64)
        h = np.floor(np.sqrt(area / ratio) + 0.5).astype(np.int64)
        fits = open_ & (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
        top = below(words[:, 2], np.where(fits, heights - h + 1, 1))
        left = below(words[:, 3], np.where(fits, widths - w + 1, 1))
        boxes[fits] = np.stack([top, left, h, w], axis=1)[fits]
        open_ &= ~fits
        if not open_.any():
            break
    for i in np.flatnonzero(open_):
        boxes[i] = _centre_box(int(heights[i]), int(widths[i]), p["ratio_min"], p["ratio_max"])
    return boxes, flips


def crop_box(policy: Policy, sample: int, seed: int, height: int, width: int) -> tuple[Box, bool]:
    """The box and the flip of one sample, as ``crop_boxes`` gives them, in a tenth of the time."""
    p = policy.parameters
    flip = words_of(sample, seed, policy.key)[2] * 2 >> 32 == 1
    log_low, log_high = np.log(p["ratio_min"]), np.log(p["ratio_max"])
    for attempt in range(1, TRIES + 1):
        w0, w1, w2, w3 = words_of(sample, seed, policy.key, block=attempt)
        share = p["scale_min"] + w0 / 2.0**32 * (p["scale_max"] - p["scale_min"])
        area = height * width * share
        # numpy's exponential, as for many: that of the C library may differ in the last bit.
        ratio = float(np.exp(log_low + w1 / 2.0**32 * (log_high - log_low)))
        w, h = (int(math.sqrt(side) + 0.5) for side in (area * ratio, area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (w2 * (height - h + 1) >> 32, w3 * (width - w + 1) >> 32, h, w), flip
    return _centre_box(height, width, p["ratio_min"], p["ratio_max"]), flip


def _centre_box(height: int, width: int, low: float, high: float) -> tuple[int, int, int, int]:
    h, w = height, width
    if width / height < low:
        h = max(1, int(np.floor(width / low + 0.5)))
    elif width / height > high:
        w = max(1, int(np.floor(height * high + 0.5)))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized_crop(policy: Policy, image: UInt8, box: Iterable[int], flip: bool) -> UInt8:
    top, left, height, width = box
    size = int(policy.parameters["size"])
    crop = image[top : top + height, left : left + width]
    return resized(crop, size, size, policy.version, flip=flip)


def _random_resized_crop_flip(policy: Policy, image: UInt8, sample: int, seed: int) -> UInt8:
    return _random_resized_crop_flip_of(policy, lambda box_of: cut(image, box_of), sample, seed)


def _random_resized_crop_flip_of(policy: Policy, read: ReadBox, sample: int, seed: int) -> UInt8:
    flip = False

    def box_of(height: int, width: int) -> Box:
        nonlocal flip
        box, flip = crop_box(policy, sample, seed, height, width)
        return box

    crop, size = read(box_of), int(policy.parameters["size"])
    return resized(crop, size, size, policy.version, flip=flip)


def _random_resized_crop_flip_batch(
    policy: Policy, images: UInt8, samples: Int64, seed: int
) -> UInt8:
    n, height, width, _ = images.shape
    boxes, flips = crop_boxes(policy, samples, seed, np.full(n, height), np.full(n, width))
    crops = [
        _resized_crop(policy, im, b.tolist(), bool(f))
        for im, b, f in zip(images, boxes, flips, strict=True)
    ]
    return np.stack(crops)


def _resize_center_crop(policy: Policy, image: UInt8, sample: int, seed: int) -> UInt8:
    height, width = image.shape[:2]
    resize, size = int(policy.parameters["resize"]), int(policy.parameters["size"])
    short = min(height, width)
    new_height, new_width = resize * height // short, resize * width // short
    try:
        require_pixels(new_height, new_width)
    except BadImage as error:
        raise BadImage(f"{width}x{height} pixels are resized to {error}") from None
    view = resized(image, new_height, new_width, policy.version)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return view[top : top + size, left : left + size]


def _none(policy: Policy, image: UInt8, sample: int, seed: int) -> UInt8:
    return image.copy()


def _none_batch(policy: Policy, images: UInt8, samples: Int64, seed: int) -> UInt8:
    return images.copy()


def clip_frames(policy: Policy, sample: int, seed: int, start: int | None, count: int) -> Int64:
    """Numbers of the frames of a clip in its file: int64 ``[frames]``.

    The temporal crop of ``count`` decodable frames, or the window that begins at ``start``.
    What has fewer frames than the clip is repeated from its beginning.
    """
    frames = int(policy.parameters["frames"])
    if start is None:
        word = words_of(sample, seed, policy.key)[0]
        start = word * max(1, count - frames + 1) >> 32
    return start + np.arange(frames, dtype=np.int64) % min(frames, count - start)


def _clip_corner_crop_flip(
    policy: Policy, frames: Sequence[UInt8], sample: int, seed: int
) -> UInt8:
    p = policy.parameters
    words = words_of(sample, seed, policy.key)
    scale, place = words[1] * int(p["scales"]) >> 32, words[2] * 5 >> 32
    height, width = frames[0].shape[:2]
    side = max(1, int(min(height, width) * 2.0 ** (-scale / 4)))
    down, right = height - side, width - side
    top, left = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))[place]
    box, flip = (top, left, side, side), words[3] * 2 >> 32 == 1
    return np.stack([_resized_crop(policy, frame, box, flip) for frame in frames])


def _clip_center_crop(policy: Policy, frames: Sequence[UInt8], sample: int, seed: int) -> UInt8:
    size = policy.parameters["size"]
    still = Policy("", policy.version, {"resize": size, "size": size})
    return np.stack([_resize_center_crop(still, frame, sample, seed) for frame in frames])


ReadBox = Callable[[BoxOf], UInt8]
"""Reads the box of an image that is chosen by its height and width."""
PerSample = Callable[[Policy, UInt8, int, int], UInt8]
Batched = Callable[[Policy, UInt8, Int64, int], UInt8]
PerBox = Callable[[Policy, ReadBox, int, int], UInt8]
PerClip = Callable[[Policy, Sequence[UInt8], int, int], UInt8]


@dataclass(frozen=True)
class PolicyInfo:
    """A view policy of images or of clips.

    Attributes:
        about: What it does.
        defaults: Its parameters.
        evaluation: Name of the policy of the test split.
        per_sample: Makes the view of an image.
        batched: Makes the views of images of one size; None if that is not faster.
        per_box: Makes the view of an image of which it reads a box only; None if it needs all.
        per_clip: Makes the view of a clip.
        windows: Whether the samples are the windows of ``frames`` frames of the clips.
        strong: Whether it also has the parameters ``STRONG``.
        version: The newest version.
        identity: What the spec of a label set has beside the name: the hash of the user's code, and
            for a pipeline its parameters and the version of torchvision. Empty for known policies.
        text: The name as it was given, with the path of the user's file.
    """

    about: str
    defaults: dict[str, int | float]
    evaluation: str
    per_sample: PerSample | None = field(default=None, compare=False)
    batched: Batched | None = None
    per_box: PerBox | None = None
    per_clip: PerClip | None = None
    windows: bool = False
    strong: bool = False
    version: int = 1
    identity: Mapping[str, str] = field(default_factory=dict)
    text: str = ""


POLICIES: dict[str, PolicyInfo] = {
    "none": PolicyInfo("the image as it is", {}, "none", _none, _none_batch),
    "pad-crop-flip": PolicyInfo(
        "zero padding, random crop of the image's own size, flip (CIFAR, STL10)",
        {"padding": 4},
        "none",
        _pad_crop_flip,
        _pad_crop_flip_batch,
        strong=True,
    ),
    "random-resized-crop-flip": PolicyInfo(
        "random area and aspect ratio, resized to size, flip (ImageNet, Places365, VOC)",
        {"size": 224, "scale_min": 0.08, "scale_max": 1.0, "ratio_min": 3 / 4, "ratio_max": 4 / 3},
        "resize-center-crop",
        _random_resized_crop_flip,
        _random_resized_crop_flip_batch,
        _random_resized_crop_flip_of,
        strong=True,
        version=VERSION,
    ),
    "resize-center-crop": PolicyInfo(
        "shorter side to resize, centre crop of size (evaluation)",
        {"resize": 256, "size": 224},
        "resize-center-crop",
        _resize_center_crop,
        version=VERSION,
    ),
    "clip-corner-crop-flip": PolicyInfo(
        "frames from a random start, corner or centre crop at one of five scales, flip (videos)",
        {"frames": 16, "size": 112, "scales": 5},
        "clip-center-crop",
        per_clip=_clip_corner_crop_flip,
        strong=True,
        version=VERSION,
    ),
    "clip-center-crop": PolicyInfo(
        "non-overlapping clips, shorter side to size, centre crop (videos, evaluation)",
        {"frames": 16, "size": 112},
        "clip-center-crop",
        per_clip=_clip_center_crop,
        windows=True,
        version=VERSION,
    ),
}


def is_own_policy(text: str) -> bool:
    """Whether a policy is code of the user, ``FILE.py:function``, and not a known name."""
    return OWN.fullmatch(text) is not None


def _own_policy(text: str, code: str) -> Policy:
    view, found, parameters = load_view(text, code)
    if is_own_policy(view.evaluation):
        raise InputError(
            f"policy {view.what}: EVALUATION is {view.evaluation}; name a known policy (sskt "
            "policies lists them)"
        )
    own = PolicyInfo(
        "of the user",
        {},
        str(parse_policy(view.evaluation)),
        per_sample=view,
        identity={"code": found} | environment_of(view.view),
        text=text,
    )
    return Policy(view.what, 1, parameters, own)


def register_policy(
    name: str,
    view: Callable[..., Any],
    *,
    parameters: Mapping[str, int | float] | None = None,
    evaluation: str = "none",
    version: int = 1,
) -> Policy:
    """Makes a view policy of the user known by a name, in this process.

    Args:
        name: Its name, for ``policy=``.
        view: A function of an image, uint8 ``[H, W, 3]``, its random words (``words(k)`` is block
            k: four integers below 2^32) and the parameters by name, which returns the view. Or a
            transform of ``torchvision.transforms.v2``, which takes and returns a uint8 tensor
            ``[3, H, W]`` and has no parameters here. It may also draw from the global generators
            of ``random``, ``numpy.random`` and ``torch``, which are seeded for each view.
        parameters: Names and defaults of its parameters.
        evaluation: The known policy of the test split.
        version: Raise it when the views change for a reason that the source text does not show.

    Returns:
        The policy with its defaults.

    Raises:
        InputError: If the name is taken or has other characters than letters, digits, ``-`` and
            ``_``, or if the source text of the function is not known.
        UnknownName: If ``evaluation`` is not known.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise InputError(f"policy {name!r}: a name has letters, digits, - and _ only")
    if name in POLICIES and not POLICIES[name].identity:
        raise InputError(f"policy {name} is one of sskt's own; choose another name")
    pipeline = environment_of(view)
    if pipeline and parameters:
        raise InputError(f"policy {name}: a pipeline of torchvision takes no parameters here")
    POLICIES[name] = PolicyInfo(
        "of the user",
        dict(parameters or {}),
        str(parse_policy(evaluation)),
        per_sample=OwnView(view, name),
        version=version,
        identity=pipeline or {"code": source_hash(view)},
    )
    return parse_policy(name)


def parse_policy(text: str, code: str = "") -> Policy:
    """``NAME`` or ``NAME:key=value,...`` to a policy with its defaults filled in.

    ``version=N`` among the keys chooses an older version of a policy that has several.
    ``FILE.py:function[:key=value,...]`` runs the file, and calls the function with the keys.

    Args:
        text: The policy.
        code: What the file has to be, ``sha256:...``; empty: anything.

    Raises ``UnknownName`` for the name or a key, ``InputError`` for a value out of range,
    and what ``own_policies.load_view`` raises.
    """
    if is_own_policy(text):
        return _own_policy(text, code)
    name, _, options = text.partition(":")
    if name not in POLICIES:
        raise UnknownName("policy", name, POLICIES)
    newest = POLICIES[name].version
    known = ({"version": newest} if newest > 1 else {}) | POLICIES[name].defaults
    optional = STRONG if POLICIES[name].strong else {}
    parameters, known = dict(known), known | optional
    for item in filter(None, options.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise UnknownName(f"parameter of policy {name}", key, known or {"(it has none)": 0})
        try:
            parameters[key] = type(known[key])(value)
        except ValueError:
            raise InputError(f"policy {name}: {key} must be a number, found '{value}'") from None
    version = int(parameters.pop("version", 1))
    if not 1 <= version <= newest:
        raise InputError(f"policy {name}: version must be 1 to {newest}, found {version}")
    own = POLICIES[name] if POLICIES[name].identity else None
    if own is None:
        given = {key: parameters.pop(key) for key in optional if key in parameters}
        _check_range(name, parameters)
        mixed = {key: given.pop(key) for key in mixing.PARAMETERS if given.get(key)}
        mixing.require_range(name, mixed)
        parameters |= augment.resolve(name, given) | mixed
    return Policy(name, version, parameters, own)


def shown_policy(views: Mapping[str, Any]) -> str:
    """A policy that a label set's spec names, with the parameters that are not the defaults."""
    known = POLICIES.get(views["policy"])
    defaults = STRONG | known.defaults if known else {}
    given = {k: v for k, v in views["parameters"].items() if k not in defaults or v != defaults[k]}
    return proposed_policy({**views, "parameters": given})


def proposed_policy(views: Mapping[str, Any]) -> str:
    """The option for a policy of the user that a label set's spec names: with its parameters."""
    options = ",".join(f"{key}={value}" for key, value in views["parameters"].items())
    return f"{views['policy']}:{options}" if options else str(views["policy"])


def recorded_policy(text: str) -> str:
    """The text of a policy as sskt 0.1 recorded it, with the version 1 that it then had."""
    name, _, options = text.partition(":")
    if name not in POLICIES or POLICIES[name].version == 1 or "version=" in options:
        return text
    return f"{name}:version=1" + (f",{options}" if options else "")


def _check_range(name: str, p: dict[str, int | float]) -> None:
    bad = [k for k, v in p.items() if not np.isfinite(v) or v < 0 or (v == 0 and k != "padding")]
    if bad:
        raise InputError(f"policy {name}: {bad[0]} must be positive, found {p[bad[0]]}")
    for low, high in (("scale_min", "scale_max"), ("ratio_min", "ratio_max"), ("size", "resize")):
        if low in p and high in p and p[low] > p[high]:
            raise InputError(f"policy {name}: {low} {p[low]} is above {high} {p[high]}")


def evaluation_policy(policy: Policy) -> Policy:
    """The policy of the test split of a target that is trained under ``policy``.

    As in the released code: images of a random resized crop to ``size`` pixels are tested on the
    centre crop after resizing the shorter side to ``size`` * 256 / 224, padded crops unchanged.

    Args:
        policy: The policy of the training split.

    Returns:
        The policy itself where it is one for evaluation.
    """
    name = policy.info.evaluation
    if policy.name == name:
        return policy
    if policy.own is not None:
        return parse_policy(name)
    p, version = policy.parameters, f"version={policy.version}"
    if name == "clip-center-crop":
        return parse_policy(f"{name}:{version},frames={p['frames']},size={p['size']}")
    if name == "resize-center-crop":
        size = int(p["size"])
        return parse_policy(f"{name}:{version},resize={round(size * 256 / 224)},size={size}")
    return parse_policy(name)
