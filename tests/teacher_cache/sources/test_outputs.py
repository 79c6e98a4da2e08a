"""What a network returns: a function of its image, and logits; anything else is refused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sskt
from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.sources.outputs import parse_outputs
from sskt.teacher_cache.sources.source import Source

Body = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """A small classifier whose outputs go through ``after``."""

    def __init__(self, after: Body, classes: int = 12, scale: float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 3 * 16, generator=generator) * scale)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        features = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.after(self, features @ self.weight.T)


def frozen(after: Body, *, logits_are: str = "", batchnorm: str = "eval", **more: Any) -> Source:
    return sskt.freeze(
        Net(after, **more), name="net", size=8, mean=(0.5,) * 3, std=(0.25,) * 3, device="cpu",
        logits_are=logits_are, batchnorm=batchnorm,
    )  # fmt: skip


def views(n: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(n).integers(0, 256, (n, 8, 8, 3), np.uint8))


def drop_path(net: Any, z: Tensor) -> Tensor:
    """Rarely drops: twice the same result is likely, so that only the drawing gives it away."""
    return z * (torch.rand(()) > 0.3)


DEPENDENT: dict[str, tuple[Body, str]] = {
    "functional dropout": (lambda net, z: F.dropout(z, 0.5), "running it twice"),
    "a little dropout": (lambda net, z: F.dropout(z, 0.05), "running it twice"),
    "drop path": (drop_path, "running it twice"),
    "noise": (lambda net, z: z + 0.05 * torch.randn_like(z), "running it twice"),
    "noise that torch does not draw": (lambda net, z: z + random.random() * z, "running it twice"),
    "batch statistics": (
        lambda net, z: F.batch_norm(z[..., None].expand(-1, -1, 2), None, None, training=True)[
            ..., 0
        ],
        "depend on the others",
    ),
    "mean of the batch": (lambda net, z: z - 0.2 * z.mean(0), "depend on the others"),
    "first of the batch": (lambda net, z: z - 0.2 * z[:1], "depend on the others"),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_outputs_that_are_no_function_of_their_image_are_refused(kind: str) -> None:
    after, cause = DEPENDENT[kind]
    with pytest.raises(InputError, match=f"source net: .*{cause}.*evaluation mode") as caught:
        frozen(after)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "after",
    [
        lambda net, z: z,
        lambda net, z: z * 1e4,
        lambda net, z: z * 1e-6,
        lambda net, z: z.bfloat16().float(),
        lambda net, z: F.dropout(z, 0.5, training=net.training),
        lambda net, z: z + 0 * torch.rand_like(z),  # draws what changes nothing
        lambda net, z: z[:, :2] * 0.01,
        lambda net, z: torch.zeros_like(z),
        lambda net, z: F.log_softmax(z, dim=1),
    ],
)
def test_outputs_that_are_a_function_of_their_image_are_taken(after: Body) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    source = frozen(after)
    assert torch.equal(torch.rand(2), expected), "the global random numbers go on as before"
    assert "outputs" not in source.identity()


def test_in_batch_mode_only_a_whole_batch_has_to_give_the_same_again() -> None:
    layer = nn.BatchNorm1d(12)
    with pytest.raises(InputError, match="running it twice"):
        net = Net(lambda net, z: F.dropout(net.norm(z)))
        net.norm = layer
        sskt.freeze(net, name="net", size=8, mean=(0.5,) * 3, std=(0.25,) * 3, device="cpu",
                    batchnorm="batch", batch_size=4)  # fmt: skip


KINDS: dict[str, Body] = {
    "softmax": lambda net, z: F.softmax(z, dim=1),
    "softmax in half precision": lambda net, z: F.softmax(z, dim=1).half(),
    "sigmoid": lambda net, z: torch.sigmoid(z),
}


@pytest.mark.parametrize("classes", [2, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_recognised_and_refused(kind: str, classes: int) -> None:
    message = f"source net: .*between 0 and 1.*as after a {kind.split()[0]}.*--logits-are prob"
    with pytest.raises(InputError, match=message):
        frozen(KINDS[kind], classes=classes)


def test_declared_probabilities_give_the_labels_of_the_logits() -> None:
    bare, softmax = frozen(lambda net, z: z), frozen(KINDS["softmax"], logits_are="probabilities")
    torch.testing.assert_close(softmax.forward(views(5)), bare.forward(views(5)))
    logs = frozen(lambda net, z: F.log_softmax(z, dim=1), logits_are="log-probabilities")
    torch.testing.assert_close(logs.forward(views(5)), bare.forward(views(5)))
    assert softmax.identity()["outputs"] == "probabilities"
    assert logs.identity()["outputs"] == "log-probabilities"
    sure = frozen(KINDS["softmax"], logits_are="probabilities", scale=1e4)
    log_p = sure.log_probabilities(views(5))
    assert log_p.min() < -80, "a probability of 0 becomes the smallest one"
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(5))


def test_declared_logits_are_taken_as_they_are() -> None:
    source = frozen(KINDS["sigmoid"], logits_are="logits")
    assert "outputs" not in source.identity()
    expected = torch.log_softmax(source.raw_outputs(views(3)), dim=1)
    torch.testing.assert_close(source.forward(views(3)), expected)


@pytest.mark.parametrize("declared", ["probabilities", "log-probabilities"])
def test_a_wrong_declaration_is_refused(declared: str) -> None:
    with pytest.raises(InputError, match=rf"from -\S+ to \S+, are no {declared}; return the log"):
        frozen(lambda net, z: z, logits_are=declared)
    with pytest.raises(UnknownName, match="unknown --logits-are 'odds'; known: logits, prob"):
        parse_outputs("odds")


@dataclass
class ModelOutput:
    """As transformers returns it."""

    logits: Tensor
    loss: None = None


def test_an_output_object_with_logits_is_taken() -> None:
    bare, wrapped = frozen(lambda net, z: z), frozen(lambda net, z: ModelOutput(z))
    assert torch.equal(wrapped.log_probabilities(views(4)), bare.log_probabilities(views(4)))
    with pytest.raises(InputError, match=re.escape("must return logits [n, C], found tuple")):
        frozen(lambda net, z: (z, z))


def test_one_class_is_refused() -> None:
    with pytest.raises(InputError, match=r"has 1 output, and the softmax of one is always 1"):
        frozen(lambda net, z: z[:, :1])
