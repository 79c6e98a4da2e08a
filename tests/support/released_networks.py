"""Makes tests/golden/networks.json from the paper's released networks, and what its test shares.

python tests/support/released_networks.py RELEASED prints the file (RELEASED: a checkout of ORIGIN).
The released modules are run as they are; only their parameter counts and outputs are kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ORIGIN = "generation21/generation6011 at 19ecfbb82f0b2e05bf2755a880cc94105c6787de"
SOURCES = {"imagenet": 1000, "places365": 365}
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A released network: our name, the shape of its input, the shortcut of 3-D networks."""

    name: str
    shape: tuple[int, ...]
    shortcut: str = "b"

    def __str__(self) -> str:
        return f"{self.name}-{self.shortcut}" if len(self.shape) == 5 else self.name


# Odd sides show how strides round, and unequal ones which side is which; the released pooling of
# clips needs squares.
SMALL = tuple(Case(f"resnet{n}", (2, 3, 27, 21)) for n in (20, 32, 44, 56, 110))
LARGE = tuple(Case(f"resnet{n}", (2, 3, 65, 43)) for n in (18, 34, 50, 101, 152))
CLIPS = tuple(
    Case(f"resnet3d{n}", (2, 3, 16, 48, 48), kind) for n in (10, 18, 34, 50) for kind in "ab"
)
CASES = (*SMALL, *LARGE, *CLIPS)


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of -1 .. 1 in float64 that depend on ``name`` alone, the same on every machine.

    The SHA-256 of the name seeds PCG64, whose raw bits NumPy never changes; each half of 64 bits,
    the low one first, gives a multiple of 2**-23.
    """
    count = math.prod(shape)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    raw = np.random.PCG64(seed).random_raw((count + 1) // 2)
    bits = raw.astype("<u8", copy=False).view("<u4")[:count] >> 8
    return torch.from_numpy(bits.astype(np.float64)).mul_(2**-23).sub_(1).reshape(shape)


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of the parameter or buffer of that canonical name (test_released_networks.py)."""
    drawn = uniform(name, shape)
    if name.endswith("running_var"):
        return drawn.div_(2).add_(1)
    if len(shape) > 1:
        # Variance 2 / fan-in, with which activations keep their size (He et al. 2015).
        return drawn.mul_((6 / math.prod(shape[1:])) ** 0.5)
    # A BatchNorm halves what it gets, so that sums over 50 blocks stay within range.
    return drawn.div_(4).add_(0.5) if name.endswith("weight") else drawn.div_(5)


def fill(module: nn.Module, names: dict[str, str]) -> None:
    """Sets all parameters and buffers, in float64; ``names``: canonical name by name there."""
    module.double()
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(value(names[key], tuple(tensor.shape)))
        else:
            tensor.zero_()


def summary(z: Tensor) -> list[float]:
    """The first two logits of each sample, mean and standard deviation over all logits."""
    return [*z[:, :2].flatten().tolist(), z.mean().item(), z.std().item()]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"released_{path.parents[1].name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(modules: dict[str, ModuleType], case: Case, tm: bool) -> nn.Module:
    options: dict[str, Any] = {
        "num_classes": CLASSES, "isSource": True, "multi_source": True,
        "sourceKind": "imagenet", "transfer_module": tm,
    }  # fmt: skip
    depth = case.name.removeprefix("resnet").removeprefix("3d")
    if case in SMALL:  # resnet56 and resnet110 take no options there
        released = modules["small"]
        network = released.ResNet(released.BasicBlock, [(int(depth) - 2) // 6] * 3, **options)
    elif case in LARGE:
        network = getattr(modules["large"], f"resnet{depth}")(**options)
    else:
        options |= {"sample_size": case.shape[-1], "sample_duration": case.shape[2]}
        kind = case.shortcut.upper()
        network = getattr(modules["clips"], f"resnet{depth}")(shortcut_type=kind, **options)
    assert isinstance(network, nn.Module)
    return network


def _canonical(key: str) -> str:
    """Of the released name: only the auxiliary heads are called otherwise."""
    for source, there in (("imagenet", "auxiliary_imagenet"), ("places365", "auxiliary_places")):
        if key.startswith(f"{there}."):
            rest = key.removeprefix(f"{there}.")
            branch, found, last = rest.partition("_feature.")
            if found:
                return f"{source}.branch{branch.removeprefix('b')}.{last}"
            return f"{source}.fc.{rest.removeprefix('linear.')}"
    return key


def _released(modules: dict[str, ModuleType], case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for head in ("tm", "linear"):
        network = _build(modules, case, head == "tm").eval()
        names = {key: _canonical(key) for key in network.state_dict()}
        fill(network, names)
        with torch.no_grad():
            outputs = network(uniform("input", case.shape))
        counts = dict.fromkeys(("target", *SOURCES), 0)
        for key, parameter in network.named_parameters():
            head_of = names[key].partition(".")[0]
            counts[head_of if head_of in SOURCES else "target"] += parameter.numel()
        for name, z in zip(counts, outputs, strict=True):
            key = name if name == "target" else f"{name} {head}"
            values = [float(f"{x:.10g}") for x in summary(z)]
            row = {"parameters": counts[name], "outputs": values}
            assert found.setdefault(key, row) == row
    return found


def main(released: Path) -> None:
    warnings.simplefilter("ignore")
    paths = {
        "small": released / "2D_SSKT/models/small_resnet.py",
        "large": released / "2D_SSKT/models/resnet.py",
        "clips": released / "3D_SSKT/models/resnet.py",
    }
    modules = {name: _load(path) for name, path in paths.items()}
    lines = [f'"origin": {json.dumps(ORIGIN)}']
    for path in paths.values():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f'"sha256 of {path.relative_to(released)}": "{digest}"')
    for case in CASES:
        rows = ",\n  ".join(
            f"{json.dumps(k)}: {json.dumps(v)}" for k, v in _released(modules, case).items()
        )
        lines.append(f"{json.dumps(str(case))}: {{\n  {rows}}}")
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
