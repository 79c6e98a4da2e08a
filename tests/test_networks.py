"""Target networks and heads: the paper's sizes, option A, gradients everywhere."""

from __future__ import annotations

import pytest
import torch

from sskt.teacher_cache.errors import UnknownName
from sskt.trainer.heads import SSKTNetwork, TransferModule
from sskt.trainer.networks import BasicBlock, build_network, parameters_of

# He et al. 2016, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M for CIFAR-10.
SIZES = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_parameters_of_the_small_resnets(name: str, count: int) -> None:
    assert parameters_of(build_network(name, 10)) == count


@pytest.mark.parametrize(("classes", "count"), [(1000, 103_528), (365, 62_253)])
def test_parameters_of_the_transfer_module(classes: int, count: int) -> None:
    network = build_network("resnet20", 10)
    module = TransferModule(network.stage_widths, network.transfer_width, classes)
    assert parameters_of(module) == count


def test_parameters_of_heads_without_tm() -> None:
    network = SSKTNetwork(build_network("resnet20", 10), {"i": 1000, "p": 365}, tm=False)
    assert network.sources == ("i", "p")
    assert [parameters_of(head) for head in network.heads] == [64 * 1000 + 1000, 64 * 365 + 365]


def test_option_a_shortcut_takes_every_second_pixel_and_pads_with_zeros() -> None:
    block = BasicBlock(4, 8, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_stages_halve_the_picture() -> None:
    features = build_network("resnet20", 10).features(torch.rand(2, 3, 32, 32))
    assert [tuple(s.shape) for s in features.stages] == [
        (2, 16, 32, 32),
        (2, 32, 16, 16),
        (2, 64, 8, 8),
    ]
    assert features.pooled.shape == (2, 64)


def test_transfer_module_averages_its_branches() -> None:
    network = build_network("resnet20", 10).eval()
    module = TransferModule(network.stage_widths, 64, 5).eval()
    features = network.features(torch.rand(2, 3, 16, 16))
    means = [
        branch(stage).mean((2, 3))
        for branch, stage in zip(module.branches, features.stages, strict=True)
    ]
    torch.testing.assert_close(module(features), module.fc(sum(means) / 3))


@pytest.mark.parametrize("tm", [False, True])
def test_every_parameter_gets_a_gradient(tm: bool) -> None:
    network = SSKTNetwork(build_network("resnet20", 10), {"imagenet": 20, "places365": 7}, tm=tm)
    primary, auxiliary = network(torch.rand(4, 3, 16, 16))
    assert primary.shape == (4, 10)
    assert {k: tuple(v.shape) for k, v in auxiliary.items()} == {
        "imagenet": (4, 20),
        "places365": (4, 7),
    }
    loss = primary.square().sum() + sum(v.square().sum() for v in auxiliary.values())
    torch.autograd.backward(loss)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_auxiliary_loss_reaches_the_target_network() -> None:
    network = SSKTNetwork(build_network("resnet20", 10), {"imagenet": 20}, tm=True)
    torch.autograd.backward(network(torch.rand(2, 3, 16, 16))[1]["imagenet"].square().sum())
    assert network.target.fc.weight.grad is None
    gradient = network.target.conv1.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_unknown_network() -> None:
    with pytest.raises(UnknownName, match="unknown model 'resnet21'; known: resnet20, resnet32"):
        build_network("resnet21", 10)
