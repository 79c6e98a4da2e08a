"""Target networks and heads: sizes by definition, stages, shortcuts, stems, gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.models.base import TargetNetwork, parameters_of
from sskt.trainer.models.heads import SSKTNetwork, TransferModule
from sskt.trainer.models.registry import NETWORKS, build_network, is_three_dimensional
from sskt.trainer.models.resnet3d import PaddedShortcut
from sskt.trainer.models.resnet_cifar import BasicBlock

SOURCES = {"imagenet": 1000, "places365": 365}

# He et al. 2016, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M for CIFAR-10.
SIZES = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}

# Channels of the stages of the networks that the paper has and its code has not.
STAGES = {
    # Rows 2 to 7 of MobileNetV2's table (Sandler et al. 2018, table 2).
    "mobilenet_v2": (24, 32, 64, 96, 160, 320),
    # 64 channels; 6, 12 and 24 layers add 32 each; each transition halves (Huang et al. 2017).
    "densenet121": ((64 + 6 * 32) // 2, (128 + 12 * 32) // 2, (256 + 24 * 32) // 2),
    # Simonyan and Zisserman 2015, table 1, column D.
    "vgg16": (64, 128, 256, 512, 512),
}

# With 1000 classes, as torchvision's table of weights says.
PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "mobilenet_v2": 3_504_872,
    "densenet121": 7_978_856,
    "vgg16": 138_365_992,
}


# Without numbers where drawing them takes longer than going without.
BIG = ("resnet50", "resnet101", "resnet152", "vgg16", "resnet3d18", "resnet3d34", "resnet3d50")


def convolution(width_in: int, width: int, side: int) -> int:
    """Parameters of a 2-D convolution with bias and of the BatchNorm that follows it."""
    return width_in * width * side**2 + width + 2 * width


def shape_of(name: str, classes: int, **options: object) -> TargetNetwork:
    """A network to look at the shapes of, not at the numbers."""
    with torch.device("meta" if name in BIG else "cpu"):
        return build_network(name, classes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_parameters_of_the_small_resnets(name: str, count: int) -> None:
    assert parameters_of(build_network(name, 10)) == count


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameters_of_torchvisions_networks(name: str, count: int) -> None:
    assert parameters_of(shape_of(name, 1000, stem="imagenet")) == count


# The CIFAR form differs in the stem (3x3 for 7x7, 3 to 64 channels) and the classifier.
SMALL_FORMS = {
    "mobilenet_v2": 3_504_872 - 1281 * 990,
    "densenet121": 7_978_856 - 1025 * 990 - (49 - 9) * 3 * 64,
    "vgg16": 513 * 10
    + sum(convolution(a, b, 3) for a, b in [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256)])
    + 2 * convolution(256, 256, 3)
    + convolution(256, 512, 3)
    + 5 * convolution(512, 512, 3),
}


@pytest.mark.parametrize(("name", "count"), SMALL_FORMS.items())
def test_parameters_of_the_cifar_forms(name: str, count: int) -> None:
    assert parameters_of(shape_of(name, 10, size=32)) == count


@pytest.mark.parametrize(("name", "widths"), STAGES.items())
def test_parameters_of_the_transfer_module(name: str, widths: tuple[int, ...]) -> None:
    target = shape_of(name, 10, size=32)
    assert target.stage_widths == widths
    with torch.device("meta"):
        network = SSKTNetwork(target, SOURCES, tm=True)
    branches = sum(
        convolution(width, 500, 1) + convolution(500, 500, 3) + convolution(500, 1000, 1)
        for width in widths
    )
    for classes, head in zip(SOURCES.values(), network.heads, strict=True):
        assert parameters_of(head) == branches + 1001 * classes


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_clips_are_told_by_name(name: str) -> None:
    assert is_three_dimensional(name) == (shape_of(name, 10, size=32).dimensions == 3)


# The modules of torchvision's networks after which each stage ends, run one after the other.
ENDS = {
    "mobilenet_v2": (4, 7, 11, 14, 17, 18),
    # conv0, norm0, relu0 and pool0, then a dense block and a transition each, pooling included.
    "densenet121": (6, 8, 10),
    # Convolution, BatchNorm and ReLU in turn, 2, 2, 3, 3 and 3 times with a pooling after each.
    "vgg16": (6, 13, 23, 33, 43),
}


@pytest.mark.parametrize(("name", "ends"), ENDS.items())
def test_stages_are_those_that_the_figure_draws(name: str, ends: tuple[int, ...]) -> None:
    network = build_network(name, 10, size=32).eval()
    layers = list(network.get_submodule("body.features").children())
    x = torch.rand(2, 3, 32, 32)
    stages = network.features(x).stages
    assert len(stages) == len(ends)
    for begin, end, stage in zip((0, *ends), ends, stages, strict=False):
        x = torch.nn.Sequential(*layers[begin:end])(x)
        assert torch.equal(stage, x)
    if name == "densenet121":
        kinds = [type(layer).__name__ for layer in layers[4:11]]
        assert kinds == ["_DenseBlock", "_Transition"] * 3 + ["_DenseBlock"]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "resnet3d10"])
def test_initialisation_comes_from_the_seed_alone(name: str) -> None:
    states = []
    for _ in range(2):
        torch.rand(3)
        torch.manual_seed(11)
        states.append(SSKTNetwork(build_network(name, 4), SOURCES, tm=True).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(("name", "fan_out"), [("resnet20", False), ("mobilenet_v2", True)])
def test_initialisation_of_the_transfer_module(name: str, fan_out: bool) -> None:
    torch.manual_seed(0)
    head = SSKTNetwork(build_network(name, 4), SOURCES, tm=True).heads[0]
    weight = head.get_parameter("branches.0.3.weight")
    middle = weight.shape[0]
    # He's fan-out: a normal of std sqrt(2/(9 middle)); PyTorch's: uniform within 1/sqrt(9 middle).
    std = (2 if fan_out else 1 / 3) ** 0.5 / (9 * middle) ** 0.5
    assert float(weight.detach().std()) == pytest.approx(std, rel=0.05)


def test_option_a_shortcut_takes_every_second_pixel_and_pads_with_zeros() -> None:
    block = BasicBlock(4, 8, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_option_a_shortcut_of_clips_has_a_gradient() -> None:
    x = torch.rand(2, 4, 3, 6, 6, requires_grad=True)
    y = PaddedShortcut(2, 3)(x)
    torch.testing.assert_close(y[:, :4], torch.nn.functional.avg_pool3d(x, 1, 2))
    assert y.shape == (2, 7, 2, 3, 3) and not y[:, 4:].any()
    torch.autograd.backward(y.sum())
    assert x.grad is not None and float(x.grad.sum()) == 2 * 4 * 2 * 3 * 3


@pytest.mark.parametrize(("shortcut", "count"), [("a", 0), ("b", 9)])
def test_shortcuts_are_named_as_in_the_released_checkpoints(shortcut: str, count: int) -> None:
    names = list(dict(shape_of("resnet3d18", 400, shortcut=shortcut).named_parameters()))
    assert names[:2] == ["conv1.weight", "bn1.weight"] and names[-1] == "fc.bias"
    found = [name for name in names if ".downsample." in name]
    assert len(found) == count
    assert found[:2] == ["layer2.0.downsample.0.weight", "layer2.0.downsample.1.weight"][:count]


def test_clips_are_halved_as_published() -> None:
    network = shape_of("resnet3d50", 400)
    features = network.features(torch.zeros(1, 3, 16, 112, 112, device="meta"))
    assert [tuple(s.shape[1:]) for s in features.stages] == [
        (256, 8, 28, 28),
        (512, 4, 14, 14),
        (1024, 2, 7, 7),
        (2048, 1, 4, 4),
    ]
    assert features.pooled.shape == (1, network.width)


def test_stages_halve_the_image() -> None:
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


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg16", "resnet3d10"]
)
def test_every_parameter_of_larger_networks_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    target = build_network(name, 10, shortcut="a", size=32)
    network = SSKTNetwork(target, {"imagenet": 20}, tm=True)
    clip = (8,) if is_three_dimensional(name) else ()
    primary, auxiliary = network(torch.rand(4, 3, *clip, 32, 32))
    torch.autograd.backward(primary.square().sum() + auxiliary["imagenet"].square().sum())
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        # A bias before BatchNorm has the gradient 0 by construction: only rounding is left.
        assert parameter.grad.any() or key.endswith("bias"), key


@pytest.mark.parametrize("tm", [False, True])
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "resnet3d10"])
def test_the_auxiliary_loss_reaches_the_target_network(name: str, tm: bool) -> None:
    network = SSKTNetwork(build_network(name, 10, size=32), {"imagenet": 20}, tm=tm)
    clip = (4,) if is_three_dimensional(name) else ()
    torch.autograd.backward(network(torch.rand(2, 3, *clip, 32, 32))[1]["imagenet"].square().sum())
    assert all(p.grad is None for p in network.target.fc.parameters())
    first = next(network.target.parameters()).grad
    assert first is not None and first.abs().sum() > 0


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "resnet3d10"])
def test_a_copy_is_a_network_of_its_own(name: str) -> None:
    network = SSKTNetwork(build_network(name, 3, size=32), {"imagenet": 4}, tm=True).eval()
    clip = (4,) if is_three_dimensional(name) else ()
    x = torch.rand(1, 3, *clip, 32, 32)
    before = network(x)[1]["imagenet"]
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(twin(x)[1]["imagenet"], before)
    assert torch.equal(network(x)[1]["imagenet"], before)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(x)[1]["imagenet"], before)


# The sides of the stages of an image of 32 and of 64 pixels, by the stem.
STEMS = [
    ("resnet18", "cifar", 32, [32, 16, 8, 4]),
    ("resnet18", "imagenet", 64, [16, 8, 4, 2]),
    ("mobilenet_v2", "cifar", 32, [32, 16, 8, 8, 4, 4]),
    ("mobilenet_v2", "imagenet", 64, [16, 8, 4, 4, 2, 2]),
    ("densenet121", "cifar", 32, [16, 8, 4]),
    ("densenet121", "imagenet", 64, [8, 4, 2]),
    ("vgg16", "cifar", 32, [32, 16, 8, 4, 2]),
    ("vgg16", "imagenet", 64, [64, 32, 16, 8, 4]),
]


@pytest.mark.parametrize(("name", "stem", "size", "sides"), STEMS)
def test_stems(name: str, stem: str, size: int, sides: list[int]) -> None:
    network = shape_of(name, 10, stem=stem)
    image = torch.zeros(1, 3, size, size, device=next(network.parameters()).device)
    features = network.features(image)
    assert [s.shape[2] for s in features.stages] == sides
    assert tuple(s.shape[1] for s in features.stages) == network.stage_widths
    assert features.pooled.shape == (1, network.width)
    automatic = shape_of(name, 10, size=64 if stem == "cifar" else 65)
    shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (network, automatic)]
    assert shapes[0] == shapes[1]
    assert [s.shape for s in automatic.features(image).stages] == [s.shape for s in features.stages]


def test_vgg16_of_small_images_has_one_linear_layer() -> None:
    network = shape_of("vgg16", 10, size=32)
    assert network.width == 512
    assert sum(isinstance(m, torch.nn.Linear) for m in network.modules()) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"stem": "imagenet"}, "resnet20 has one stem only; leave --stem imagenet out"),
        ("resnet3d18", {"stem": "cifar"}, "resnet3d18 has one stem only; leave --stem cifar out"),
        ("resnet20", {"taps": ["stages.0"]}, "resnet20 has its stages already; leave --taps out"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shape_of(name, 2, **options)


def test_unknown_network() -> None:
    with pytest.raises(UnknownName, match="unknown model 'resnet21'; known: resnet20, resnet32"):
        build_network("resnet21", 10)
