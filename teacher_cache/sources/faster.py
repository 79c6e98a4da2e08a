"""The same function of a frozen network in less time: BatchNorm folded, or compiled."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from sskt.teacher_cache.sources.outputs import distance, tensor_of

FOLD_TOLERANCE = 1e-4
"""Largest difference of folded outputs, relative to their spread over the classes. Networks that
differ by more are run as they are; measured are differences of about 1e-6."""

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
BATCH_NORMS = (torch.batch_norm, F.batch_norm)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Layers that only normalise. Subclasses may do more: timm's have an activation."""
SHAPES = (int, torch.Size, torch.dtype, torch.device, torch.layout)
"""What a call returns that does not depend on the values of a tensor."""


@dataclass(frozen=True)
class FasterNetwork:
    """What is run in the place of a network.

    Attributes:
        run: From float32 ``[n, 3, H, W]`` to what the network returns.
        folded: Convolutions that a BatchNorm layer was folded into.
        weights: ``state_sha256`` of a folded network; empty for a compiled one.
        seconds: Duration of the compilation; 0 if the network is not compiled.
    """

    run: Callable[[Tensor], Any]
    folded: int = 0
    weights: str = ""
    seconds: float = 0.0

    @property
    def batch(self) -> int | None:
        """Images of a forward pass for which the network was compiled; None: it was not."""
        return self.run.batch if isinstance(self.run, _InBatches) else None

    @property
    def kind(self) -> str:
        """How it differs from the network, for the provenance of labels."""
        return f"folded ({self.folded})" if self.folded else "compiled"


def folded(network: nn.Module, x: Tensor) -> tuple[nn.Module, int] | None:
    """Folds BatchNorm layers in evaluation mode into the convolutions before them.

    A convolution takes its BatchNorm layer in if its output goes nowhere else, which one forward
    pass shows. The network stays as it is: a copy is run that shares its other tensors.

    Args:
        network: The frozen network, in evaluation mode.
        x: Some inputs, float32 ``[n, 3, H, W]``, with which both networks are compared.

    Returns:
        The copy, and how many layers it folds; None if there is nothing to fold, the network
        cannot be copied, or its outputs would differ by more than ``FOLD_TOLERANCE``.
    """
    try:
        pairs = _pairs(network, x[:1])
        if not pairs:
            return None
        held = [*network.parameters(), *network.buffers()]
        other = copy.deepcopy(network, {id(tensor): tensor for tensor in held})
        with torch.inference_mode(False), torch.no_grad():
            for pair in pairs:
                _fold(network, other, pair)
        found, expected = tensor_of(other(x)), tensor_of(network(x))
    except Exception:  # a user's network may raise anything; it then runs as it is
        return None
    if distance(expected, found) > FOLD_TOLERANCE:
        return None
    return other, len(pairs)


@dataclass(frozen=True)
class _Pair:
    """Names of a convolution and of the BatchNorm layer after it, and the layer's epsilon."""

    convolution: str
    norms: tuple[str, ...]
    eps: float


@dataclass
class _Use:
    """A convolution's output, and the running means of the layers that took it (None: another)."""

    output: Tensor
    weight: Any
    bias: Any
    readers: list[int | None] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Follows the outputs of convolutions through a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[int, _Use] = {}
        self.weights: Counter[int] = Counter()
        self.means: dict[int, list[float]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        mean = None
        if func in BATCH_NORMS:
            named = _named(args, kwargs, func)
            mean = id(named["running_mean"])
            if named["training"]:
                mean = None
            else:
                self.means.setdefault(mean, []).append(named["eps"])
        if not isinstance(result, SHAPES):
            for tensor in _tensors([args, kwargs.values()]):
                if id(tensor) in self.uses:
                    self.uses[id(tensor)].readers.append(mean)
        if func in CONVOLUTIONS:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            self.weights[id(named["weight"])] += 1
            use = _Use(result, named["weight"], named.get("bias"))
            self.uses[id(result)] = use
        return result


_FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum",
               "eps")  # fmt: skip
_BUILT_IN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum",
             "eps", "cudnn_enabled")  # fmt: skip


def _named(args: Any, kwargs: dict[str, Any], func: Any) -> dict[str, Any]:
    names = _FUNCTIONAL if func is F.batch_norm else _BUILT_IN
    given = dict(zip(names, args, strict=False)) | kwargs
    return {"running_mean": None, "training": False, "eps": 1e-5} | given


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
        elif isinstance(value, list | tuple | type({}.values())):
            found += _tensors(value)
    return found


def _pairs(network: nn.Module, x: Tensor) -> list[_Pair]:
    """Convolutions whose output is read once, by a BatchNorm layer that runs once."""
    convolutions: dict[int, tuple[str, _ConvNd]] = {}
    norms: dict[int, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, _ConvNd):
            convolutions[id(module.weight)] = name, module
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            norms.setdefault(id(module.running_mean), []).append(name)
    if not convolutions or not norms:
        return []
    with _Recorder() as recorder:
        network(x)
    found = []
    for use in recorder.uses.values():
        name, module = convolutions.get(id(use.weight), ("", None))
        mean = use.readers[0] if len(use.readers) == 1 else None
        if mean is None or module is None or use.bias is not module.bias:
            continue
        once = recorder.weights[id(use.weight)] == len(recorder.means[mean]) == 1
        if once and mean in norms:
            found.append(_Pair(name, tuple(norms[mean]), recorder.means[mean][0]))
    return found


def _fold(network: nn.Module, other: nn.Module, pair: _Pair) -> None:
    """Folds a pair of ``other``, whose tensors ``network`` still has."""
    convolution = other.get_submodule(pair.convolution)
    layer: Any = network.get_submodule(pair.norms[0])
    assert isinstance(convolution, _ConvNd)
    # In float64 and on the CPU: each weight is rounded once, the same for every device.
    given = (convolution.weight, convolution.bias, layer.running_mean, layer.running_var)
    weight, bias, mean, variance = (None if t is None else t.cpu().double() for t in given)
    assert weight is not None and mean is not None and variance is not None
    scale, shift = (None if t is None else t.cpu().double() for t in (layer.weight, layer.bias))
    new = fuse_conv_bn_weights(weight, bias, mean, variance, pair.eps, scale, shift)
    like = convolution.weight
    convolution.weight = nn.Parameter(torch.empty_like(like).copy_(new[0]), requires_grad=False)
    convolution.bias = nn.Parameter(new[1].to(like), requires_grad=False)
    for name in pair.norms:
        norm: Any = other.get_submodule(name)
        if type(norm) in NORMS:
            other.set_submodule(name, nn.Identity())
        else:
            norm.forward = _WithoutNorm(norm.forward)


class _WithoutNorm(TorchFunctionMode):
    """The forward of a layer that does more than normalise, without its normalisation."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self._forward = forward

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in BATCH_NORMS:
            return _named(args, kwargs, func)["input"]
        return func(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self:
            return self._forward(*args, **kwargs)


def compiled(network: nn.Module, batch: int, x: Tensor) -> FasterNetwork:
    """Compiles a network for batches of one size, with its weights as constants.

    Args:
        network: The frozen network, in evaluation mode.
        batch: Images that it takes at once. Others are cut and filled up, so that there is one
            program, and a label does not depend on the size of the batch before.
        x: An input, float32 ``[n, 3, H, W]``, which is run.

    Returns:
        What to run instead.

    Raises:
        Exception: Whatever PyTorch's compiler raises.
    """
    begin = time.perf_counter()
    options: dict[str, str | int | bool | Callable[..., Any]] = {"freezing": True}
    run = _InBatches(torch.compile(network, dynamic=False, options=options), batch)
    run(x)
    return FasterNetwork(run, seconds=time.perf_counter() - begin)


@dataclass(frozen=True)
class _InBatches:
    run: Callable[[Tensor], Any]
    batch: int

    def __call__(self, x: Tensor) -> Tensor:
        outputs = []
        for piece in torch.split(x, self.batch):
            lacking = self.batch - len(piece)
            whole = F.pad(piece, (0, 0, 0, 0, 0, 0, 0, lacking)) if lacking else piece
            whole = whole.contiguous(memory_format=torch.channels_last)
            outputs.append(tensor_of(self.run(whole))[: len(piece)])
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
