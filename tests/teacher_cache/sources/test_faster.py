"""Folded and compiled networks: the function of the network, or the network as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import TINY
from torch import Tensor, nn

from sskt.teacher_cache import api
from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.labeling.job import Opened, provenance
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Preprocessing, Source, freeze

SIZE = 64
HOW = Preprocessing(SIZE)


def images(n: int = 6) -> Tensor:
    rng = np.random.default_rng(1)
    brightness = rng.integers(40, 256, (n, 1, 1, 1))
    return torch.from_numpy((rng.random((n, SIZE, SIZE, 3)) * brightness).astype(np.uint8))


def frozen(network: nn.Module, **options: Any) -> Source:
    for module in network.modules():  # statistics and scales as of a trained network
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    network = network.eval()
    with torch.no_grad():
        classes = network(torch.zeros(2, 3, SIZE, SIZE)).shape[1]
    names = tuple(map(str, range(classes)))
    return freeze("own", "own", network, options.pop("how", HOW), names, **options)


def difference(source: Source) -> float:
    """Largest difference of probabilities from those of the network as it is."""
    given = replace(source, faster=None)
    return float((source.forward(images()).exp() - given.forward(images()).exp()).abs().max())


def torchvision(name: str) -> nn.Module:
    from torchvision import models

    torch.manual_seed(0)
    network: nn.Module = models.get_model(name, weights=None, num_classes=12)
    return network


def timm(name: str) -> nn.Module:
    made: Any = pytest.importorskip("timm")
    torch.manual_seed(0)
    network: nn.Module = made.create_model(name, num_classes=12)
    return network


class Block(nn.Module):
    """One convolution and its BatchNorm layer, in a ``forward`` of the test's own."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(8)
        self.other = nn.BatchNorm2d(8)

    def pooled(self, x: Tensor) -> Tensor:
        return x.relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.norm(self.conv(x)))


class Branching(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.pooled(self.norm(x) + x)


class TwoNorms(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.pooled(torch.cat([self.norm(x), self.other(x)], 1))


class TwiceConvolved(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.norm(self.conv(x)) + self.conv(x.flip(3)))


class TwiceNormalised(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.norm(self.norm(self.conv(x))))


class SharedWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.norm(self.conv(x))) + self.conv.weight.mean((1, 2, 3))


class Hidden(torch.autograd.Function):
    """A reader of a convolution's output that is no function of PyTorch's."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x * 2


class HiddenReader(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        found: Tensor = Hidden.apply(x)
        return self.pooled(self.norm(x) + found)


class Uncopyable(Block):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


class FixedWeight(nn.Conv2d):
    """A layer whose weight is made from its parameter, as standardised ones are."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


class Standardised(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = FixedWeight(3, 8, 3)


class Plain(nn.Sequential):
    """Without affine parameters and without a bias, and with the norm under two names."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8, affine=False, eps=0.1)
        super().__init__(nn.Conv2d(3, 8, 3, bias=False), norm, nn.AdaptiveAvgPool2d(1))
        nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
        self.alias = norm
        self.end = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.end(self[2](self.alias(self[0](x))))
        return found


FOLDED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision("resnet18"), 20),
    "mobilenet_v2": (lambda: torchvision("mobilenet_v2"), 52),
    "activations in the norm": (lambda: timm("efficientnet_b0"), 49),
    "one pair": (Block, 1),
    "no affine": (Plain, 1),
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_network_computes_the_same(name: str) -> None:
    build, count = FOLDED[name]
    network = build()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    source = frozen(network)
    assert source.faster is not None and source.faster.folded == count
    assert difference(source) < 1e-5
    # The network itself stays as it was given, and so does the identity that its weights give.
    assert source.network is network and list(network.state_dict()) == list(state)
    source.check_frozen()


AS_THEY_ARE: dict[str, Callable[[], nn.Module]] = {
    "a branch before the norm": Branching,
    "two norms": TwoNorms,
    "a convolution that runs twice": TwiceConvolved,
    "a norm that runs twice": TwiceNormalised,
    "a weight with another reader": SharedWeight,
    "a reader that is not seen": HiddenReader,
    "no copy": Uncopyable,
    "a weight that is computed": Standardised,
    "no convolution": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 4)),
    "half precision": lambda: nn.Sequential(Half(), nn.Flatten()),
}


class Half(Block):
    """Weights in half precision, where folding would be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.half())


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_a_network_that_cannot_be_folded_runs_as_it_is(name: str) -> None:
    source = frozen(AS_THEY_ARE[name]())
    assert source.faster is None
    assert source.run is source.network


def test_in_bfloat16_folding_is_no_further_from_float32() -> None:
    network = torchvision("resnet18")
    exact = frozen(network).forward(images()).exp()
    half = freeze("own", "own", network, HOW, tuple(map(str, range(12))), precision="bfloat16")
    assert half.faster is not None
    errors = [
        (source.forward(images()).exp() - exact).abs().max()
        for source in (half, replace(half, faster=None))
    ]
    assert errors[0] <= 2 * errors[1] < 0.05


def test_batches_of_batchnorm_are_not_folded() -> None:
    source = open_source(parse_source(f"tiny={TINY}:build"), batchnorm="batch-6")
    assert source.faster is None


def test_the_provenance_says_what_ran(tiny: Source) -> None:
    opened = Opened(tiny, {})
    assert provenance(opened, {}, 64, {})["forward"] == "folded (2)"
    given = Opened(replace(tiny, faster=None), {})
    assert provenance(given, {}, 64, {})["forward"] == "as given"


# --- compiled ---------------------------------------------------------------------------------


def test_batches_of_batchnorm_are_not_compiled() -> None:
    with pytest.raises(InputError, match="leave out --compile or --batchnorm batch"):
        open_source(parse_source(f"tiny={TINY}:build"), batchnorm="batch-6", compile_batch=6)


@pytest.mark.slow
def test_a_compiled_network_computes_the_same_in_batches_of_any_size(tiny: Source) -> None:
    source = open_source(parse_source(f"tiny={TINY}:build"), compile_batch=4)
    assert source.faster is not None and source.faster.kind == "compiled"
    assert source.identity() == tiny.identity()
    views = images(9)
    expected = replace(source, faster=None).forward(views).exp()
    for count in (1, 3, 4, 9):
        found = source.forward(views[:count]).exp()
        assert (found - expected[:count]).abs().max() < 1e-5
    # The bits do not depend on what was in the batch, nor on its size.
    assert torch.equal(source.forward(views)[8:], source.forward(views[8:]))
    source.check_frozen()


@pytest.mark.slow
def test_labels_of_compiled_sources(
    sskt: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    what = ("--source", f"tiny={TINY}:build", "--target", "shapes", "--limit", 20, "--seeds", 1)
    how = ("--workers", 0, "--device", "cpu", "--batch-size", 8, "--json")
    for name, more in (("given", ()), ("compiled", ("--compile",))):
        status, _, err = sskt("cache-teachers", *what, *how, "--cache", tmp_path / name, *more)
        assert status == 0, err
    (given,), (compiled,) = (list_label_sets(tmp_path / name) for name in ("given", "compiled"))
    assert given.digest == compiled.digest
    assert compiled.attributes["made"]["forward"] == "compiled"
    one, other = (s.read(0, 0, 20)["labels"].astype(np.float32) for s in (given, compiled))
    assert np.abs(np.exp(one) - np.exp(other)).max() < 1e-3
    status, out, err = sskt("plan", *what, *how, "--probe", 0.2, "--compile")
    assert status == 0, err
    plan = json.loads(out)
    assert plan["compile_seconds"] > 0
    assert plan["hours"]["1"] * 3600 > plan["compile_seconds"]


@pytest.mark.slow
def test_what_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    message = "source tiny cannot be compiled: .*; leave --compile out .*C\\+\\+ compiler"
    with pytest.raises(InputError, match=message):
        open_source(parse_source(f"tiny={TINY}:build"), compile_batch=3)


def test_the_function_of_the_package_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    from sskt.teacher_cache.sources import registry

    monkeypatch.setattr(registry, "open_source", lambda *a, **k: asked.append(k["compile_batch"]))
    api.open_source("imagenet", device="cpu", compile=True, batch_size=32)
    api.open_source("imagenet", device="cpu")
    assert asked == [32, None]
