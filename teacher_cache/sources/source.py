"""Sources: frozen teacher networks, each with its own preprocessing, weights and classes."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, SsktError, TeacherMoved, first_line
from sskt.teacher_cache.format.features import FEATURES, SOFT_LABELS, Head, Output
from sskt.teacher_cache.format.spec import classes_identity
from sskt.teacher_cache.sources.batchnorm import EVAL, batch_of, set_batchnorm
from sskt.teacher_cache.sources.faster import FasterNetwork, compiled, folded
from sskt.teacher_cache.sources.features import (
    FeatureNetwork,
    find_head,
    parse_output,
    require_module,
)
from sskt.teacher_cache.sources.outputs import (
    AGAIN_TOLERANCE,
    BATCH_TOLERANCE,
    LOGITS,
    Outputs,
    as_independent_logits,
    as_logits,
    dependence,
    distance,
    probe_images,
    rng_kept,
    tensor_of,
    wrong_kind,
)

Triple = tuple[float, float, float]
Precision = Literal["float32", "bfloat16"]
FOLD_PROBE = slice(2, 5)
"""Of the fixed images, those with which a folded network is compared: noise, greys, black."""

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Turns a uint8 view into the input that a network was trained on.

    The whole view is resized to ``size`` x ``size`` (bilinear, antialiased when it shrinks);
    then ``(view / 255 * scale - mean) / std``, mean and std in the network's channel order.
    """

    size: int = 224
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std), ("scale", (self.scale,))):
            if len(values) != (1 if name == "scale" else 3) or not all(map(math.isfinite, values)):
                raise InputError(f"preprocessing {name}: cannot use {values}")
        if 0 in self.std or self.scale <= 0 or self.size < 1:
            raise InputError("preprocessing: std must not be 0, scale and size must be above 0")
        if self.channels not in ("rgb", "bgr"):
            raise InputError(f"preprocessing channels: rgb or bgr, found {self.channels!r}")

    def identity(self) -> dict[str, Any]:
        """The part of a label set's spec that names this preprocessing."""
        return {
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": self.channels,
            "scale": self.scale,
            "interpolation": "bilinear",
        }

    def __call__(self, views: Tensor) -> Tensor:
        """uint8 ``[n, H, W, 3]`` on any device to float32 ``[n, 3, size, size]``."""
        x = views.permute(0, 3, 1, 2).float()
        if x.shape[2:] != (self.size, self.size):
            shape = (self.size, self.size)
            x = F.interpolate(x, shape, mode="bilinear", align_corners=False, antialias=True)
        if self.channels == "bgr":
            x = x.flip(1)
        mean, std = _per_channel(self.mean, x.device), _per_channel(self.std, x.device)
        x = (x * (self.scale / 255) - mean) / std
        return x.contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=64)
def _per_channel(values: Triple, device: torch.device) -> Tensor:
    """``[1, 3, 1, 1]``, kept on the device: a copy for each batch would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def state_sha256(network: nn.Module) -> str:
    """SHA-256 over the sorted ``state_dict``: names, dtypes, shapes, bytes (little-endian).

    The same for the same weights, whatever file they came from.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class Source:
    """A frozen network h_s with everything that its labels depend on.

    Use ``freeze`` to make one: it puts the network in eval mode without gradients.
    ``code`` is the SHA-256 of the file that defines a user's own network, else empty.
    ``batchnorm`` is ``eval`` or ``batch-B``: then a caller passes the B samples that belong
    together (``batch``), and no others with them. ``outputs`` is what the user declared that the
    network returns; None: nothing, and it returns logits. ``faster`` computes the same function,
    up to the rounding of float32. ``output`` is what is stored instead of soft labels, if
    anything; of features, ``network`` returns these, and there are classes only with a head.
    """

    name: str
    arch: str
    network: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    weights: str
    precision: Precision
    device: torch.device
    code: str = ""
    batchnorm: str = EVAL
    outputs: Outputs | None = None
    faster: FasterNetwork | None = None
    output: Output | None = None

    @property
    def width(self) -> int:
        """Entries of a row of ``forward``: C, or D of features."""
        return self.output.width if self.output else len(self.classes)

    @property
    def run(self) -> Callable[[Tensor], Any]:
        """What a forward pass calls: the network, or what computes the same faster."""
        return self.faster.run if self.faster else self.network

    @property
    def head(self) -> Head | None:
        """The last layer of the network, if its input is what is stored."""
        return self.output.head if self.output else None

    @property
    def _features(self) -> bool:
        return self.output is not None and self.output.kind == FEATURES

    @property
    def batch(self) -> int | None:
        """Samples that a forward pass takes together; None where a label depends on its own."""
        return batch_of(self.batchnorm)

    def identity(self) -> dict[str, Any]:
        """The part of a label set's spec that names this source."""
        identity = {
            "name": self.name,
            "arch": self.arch,
            "weights": self.weights,
            "preprocessing": self.preprocessing.identity(),
            "classes": classes_identity(self.classes),
            "batchnorm": self.batchnorm,
            "precision": self.precision,
        }
        converted = self.outputs not in (None, LOGITS)
        return (
            identity
            | ({"code": self.code} if self.code else {})
            | ({"outputs": self.outputs} if converted else {})
        )

    def forward(self, views: Tensor) -> Tensor:
        """What is stored of a batch, on the device and without waiting for it: float32.

        Of a source without ``output`` it is log y_m: ``[n, C]``.

        ``views`` is uint8 ``[n, H, W, 3]``; or ``[n, K, H, W, 3]`` with the K stills that f_s
        took from each clip: then y_m is the mean of their K softmaxes, from one forward pass of
        n * K images. y_m = softmax(h_s_m(x)) of equation 1 is the result's exponential; any
        temperature follows. Features and logits are ``[n, width]``, of a clip the mean of those of
        its stills. Raises ``InputError`` if the network's output is not ``[n, C]``;
        whether it is finite is for ``require_finite`` to say, once it is off the device.
        """
        clips = views.ndim == 5
        usable = views.dtype == torch.uint8 and views.ndim in (4, 5) and views.shape[-1] == 3
        if not usable or 0 in views.shape[1:]:
            raise InputError(
                f"source {self.name}: expected views of uint8 [n, H, W, 3] or [n, K, H, W, 3], "
                f"found {views.dtype} {tuple(views.shape)}"
            )
        stills = views.shape[1] if clips else 1
        images = views.to(self.device, non_blocking=True)
        images = images.flatten(0, 1) if clips else images
        with torch.inference_mode():
            raw, kind = self.raw_outputs(images), self.outputs or LOGITS
            if self.output is not None:
                rows = raw.float() if self._features else as_independent_logits(raw, kind)
                return rows.view(len(views), stills, self.width).mean(dim=1)
            logits = as_logits(raw, kind)
            log_p = F.log_softmax(logits, dim=1)
            if stills > 1:
                by_clip = log_p.view(len(views), stills, len(self.classes))
                log_p = by_clip.logsumexp(dim=1) - math.log(stills)
        return log_p

    def raw_outputs(self, images: Tensor) -> Tensor:
        """What the network returns for images.

        Args:
            images: uint8 ``[n, H, W, 3]`` on the device.

        Returns:
            Outputs of the kind ``outputs``, or features: ``[n, width]`` on the device.

        Raises:
            InputError: If the network returns something else.
        """
        with torch.inference_mode(), full_float32(), self.arithmetic():
            found = tensor_of(self.run(self.preprocessing(images)))
        if not isinstance(found, Tensor) or found.shape != (len(images), self.width):
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"source {self.name}: expected {'features' if self._features else 'logits'} of "
                f"shape ({len(images)}, {self.width}), found {what}"
            )
        return found

    def require_finite(self, log_p: NDArray[np.floating[Any]]) -> None:
        """Raises ``InputError`` if a row of ``forward``'s result, off the device, is not finite."""
        if not np.isfinite(log_p).all():
            raise self.not_finite()

    def log_probabilities(self, views: Tensor) -> Tensor:
        """``forward``, waited for and checked: raises ``InputError`` if it is not finite."""
        log_p = self.forward(views)
        if not bool(torch.isfinite(log_p).all()):
            raise self.not_finite()
        return log_p

    def not_finite(self) -> InputError:
        """The error of a network whose outputs are not finite."""
        half = ", or use --precision float32" if self.precision != "float32" else ""
        return InputError(
            f"source {self.name}: the network's outputs are not finite; "
            f"check its weights and preprocessing{half}"
        )

    def arithmetic(self) -> torch.autocast:
        """The context of a forward pass."""
        half = self.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def check_frozen(self) -> None:
        """Raises ``TeacherMoved`` if any weight or running statistic has changed."""
        held = [(self.network, self.weights)]
        if self.faster is not None and isinstance(self.faster.run, nn.Module):
            held.append((self.faster.run, self.faster.weights))
        if any(one.training or state_sha256(one) != weights for one, weights in held):
            raise TeacherMoved(
                f"source {self.name} changed while labelling (training mode: "
                f"{any(one.training for one, _ in held)}); a source must not update its weights or "
                "BatchNorm statistics in forward; before torch.export call network.eval()"
            )


def freeze(
    name: str,
    arch: str,
    network: nn.Module,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    *,
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
    code: str = "",
    batchnorm: str = EVAL,
    outputs: Outputs | None = None,
    compile_batch: int | None = None,
    output: str = SOFT_LABELS,
) -> Source:
    """Makes a source: evaluation mode, no gradients, on the device, weights hashed, and tested.

    BatchNorm layers are folded into the convolutions before them, in a copy of the network.

    Args:
        name: Name of the source.
        arch: Name of the architecture in the spec.
        network: The network. It is changed.
        preprocessing: What it takes.
        classes: Names of its classes.
        precision: Arithmetic of the forward pass.
        device: See ``usable_device``.
        code: Identifies the code of a user's network.
        batchnorm: ``eval`` or ``batch-B``, see ``parse_batchnorm``.
        outputs: What the network returns; None: logits, unless they look like probabilities.
        compile_batch: Images of a forward pass for which the network is compiled; None: it is not.
        output: What is stored, see ``parse_output``.

    Returns:
        The source.

    Raises:
        UnknownName: If the output is not known, or the network has no such module.
        InputError: If the network does not run on images of its size, has fewer than two classes,
            returns something other than logits, if its outputs are no function of its image, or if
            it cannot be compiled.
        TeacherMoved: If running it changes its weights or statistics.
    """
    if len(classes) < 2:
        raise InputError(
            f"source {name}: the network has {len(classes)} output, and the softmax of one is "
            "always 1; give a network of two classes or more"
        )
    network = network.eval().requires_grad_(False)
    set_batchnorm(name, network, batchnorm)
    weights = state_sha256(network)
    device = usable_device(str(device))
    network = network.to(device).to(memory_format=torch.channels_last)
    source = Source(
        name,
        arch,
        network,
        preprocessing,
        classes,
        weights,
        precision,
        device,
        code,
        batchnorm,
        outputs,
    )
    try:
        source = _tested(_with_output(source, output))
    except SsktError:
        raise
    except Exception as error:
        raise InputError(
            f"source {name} does not take input of {preprocessing.size} pixels: {first_line(error)}"
        ) from error
    return source if compile_batch is None else _compiled(source, compile_batch)


def with_output(source: Source, output: str) -> Source:
    """The same network as a source of another output.

    Args:
        source: A source of soft labels.
        output: What is stored, see ``parse_output``.

    Returns:
        The source.

    Raises:
        As ``freeze``.
    """
    if output == SOFT_LABELS and source.output is None:
        return source
    if source.output is not None:
        raise InputError(f"source {source.name} was opened for {source.output.kind}; open it again")
    compiled_for = None if source.faster is None else source.faster.batch
    return freeze(
        source.name,
        source.arch,
        source.network,
        source.preprocessing,
        source.classes,
        precision=source.precision,
        device=source.device,
        code=source.code,
        batchnorm=source.batchnorm,
        outputs=source.outputs,
        compile_batch=compiled_for,
        output=output,
    )


def _with_output(source: Source, text: str) -> Source:
    """A source whose network returns what is stored. Raises ``InputError``, ``UnknownName``."""
    kind, module = parse_output(text)
    if kind == SOFT_LABELS:
        return source
    if kind == LOGITS:
        return replace(source, output=Output(kind, len(source.classes)))
    images = probe_images(source.preprocessing.size)[:2].to(source.device)
    with torch.inference_mode(), full_float32(), rng_kept(source.device):
        x = source.preprocessing(images)
        if module:
            require_module(source.network, module)
            network = FeatureNetwork(source.network, module)
            output = Output(kind, int(network(x).shape[1]), module)
            return replace(source, network=network, classes=(), output=output)
        found = find_head(source.network, x)
    if found is not None:
        name, head = found
        network = FeatureNetwork(source.network, name, taken=True)
        output = Output(kind, head.weight.shape[1], head=head)
        return replace(source, network=network, output=output)
    if source.classes != tuple(f"class {i}" for i in range(len(source.classes))):
        raise InputError(
            f"source {source.name}: none of its nn.Linear layers returns the outputs of its "
            f"{len(source.classes):,} classes, so that there are no features before it; name a "
            "module with --output features:MODULE"
        )
    return replace(source, classes=(), output=Output(kind, len(source.classes)))


def _compiled(source: Source, batch: int) -> Source:
    """A source whose network is compiled. Raises ``InputError`` if that is not possible."""
    if source.batch is not None:
        raise InputError(
            f"source {source.name}: a network with BatchNorm over its batches is not compiled; "
            "leave out --compile or --batchnorm batch"
        )
    images = probe_images(source.preprocessing.size)[:2].to(source.device)
    try:
        with torch.inference_mode(), full_float32(), source.arithmetic(), rng_kept(source.device):
            faster = compiled(source.network, batch, source.preprocessing(images))
        found = replace(source, faster=faster)
        difference = distance(source.raw_outputs(images), found.raw_outputs(images))
    except Exception as error:
        raise InputError(
            f"source {source.name} cannot be compiled: {first_line(error)}; leave --compile out "
            "(on a CPU torch.compile needs a C++ compiler, on a GPU Triton)"
        ) from error
    limit = AGAIN_TOLERANCE if source.precision == "float32" else BATCH_TOLERANCE
    if difference > limit:
        raise InputError(
            f"source {source.name}: outputs of the compiled network differ by {difference:.1%} of "
            "their spread; leave --compile out"
        )
    return found


def _tested(source: Source) -> Source:
    """Runs a source on a few fixed images; folds it. Raises ``InputError``, ``TeacherMoved``."""
    images = probe_images(source.preprocessing.size).to(source.device)
    pair, run = images[:2], replace(source, precision="float32").raw_outputs
    with rng_kept(source.device):
        outputs = run(pair)
        cause = dependence(run, pair, outputs, in_batches=source.batch is not None)
        kind = "" if source._features else wrong_kind(run, images, outputs, source.outputs)
        if source.precision != "float32":
            outputs = source.raw_outputs(pair)
        found = source if cause or kind else _folded(source, images[FOLD_PROBE])
    found.check_frozen()
    if not bool(torch.isfinite(outputs).all()):
        raise source.not_finite()
    if cause:
        raise InputError(
            f"source {source.name}: {cause}; a soft label must depend on its image alone: put "
            "every layer into evaluation mode (functional dropout with training=self.training; "
            "before torch.export call network.eval())"
        )
    if kind:
        raise InputError(
            f"source {source.name}: {kind}; return the logits, or say what the outputs are with "
            "--logits-are probabilities (or log-probabilities, logits)"
        )
    return found


def _folded(source: Source, images: Tensor) -> Source:
    if source.batch is not None:
        return source
    with torch.inference_mode(), full_float32():
        found = folded(source.network, source.preprocessing(images))
    if found is None:
        return source
    network, count = found
    return replace(source, faster=FasterNetwork(network, count, state_sha256(network)))


def usable_device(name: str) -> torch.device:
    """Reads a device's name.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is cuda if there is one.

    Returns:
        The device, which was tried.

    Raises:
        InputError: If it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = first_line(error)
        if "type at start of device string" in why:  # lists twenty kinds of hardware
            why = "there is no such kind of device"
        raise InputError(
            f"device {name} cannot be used: {why}; give cpu, cuda, cuda:1 (the second GPU), mps "
            "or auto"
        ) from error
    return device


@contextmanager
def full_float32() -> Iterator[None]:
    """Turns TF32 off: a float32 label must not depend on the kind of GPU."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
