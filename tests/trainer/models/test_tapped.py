"""Networks of torchvision's and of users as targets: taps by name, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.registry import build_network

NETWORK = '''
import torch
from torch import nn

class Net(nn.Module):
    """Control flow that a tracer would not follow; classifier registered before the rest."""

    def __init__(self, classes):
        super().__init__()
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True))
        self.stem = nn.Conv2d(3, 3, 1)
        self.unused = nn.Conv2d(3, 3, 1)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, classes)

    def forward(self, x):
        if x.mean() > 1e9:
            raise ValueError("too bright")
        x = self.drop(self.second(self.first(self.stem(x))).mean((2, 3)))
        return self.last(x)

class Soft(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)

def net(classes):
    return Net(classes)

def fixed():
    return Net(1000)

def soft(num_classes):
    return Soft(num_classes)

def convolutional():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def plain(classes):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 6, 1), *pooled,
                         nn.Linear(6, classes))

def failing():
    raise RuntimeError("no luck")

def number():
    return 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(NETWORK)
    return path


def test_taps_on_another_network_of_torchvisions() -> None:
    taps = ("trunk_output.block1", "trunk_output.block3")
    target = build_network("regnet_x_400mf", 5, taps=taps, size=32)
    assert target.stage_widths == (32, 160) and target.width == 400
    network = SSKTNetwork(target, {"imagenet": 7}, tm=True)
    primary, auxiliary = network(torch.rand(3, 3, 32, 32))
    assert primary.shape == (3, 5) and auxiliary["imagenet"].shape == (3, 7)
    torch.autograd.backward(auxiliary["imagenet"].square().sum())
    inner = target.get_submodule("body.trunk_output")
    reached = {k for k, p in inner.named_parameters() if p.grad is not None}
    assert {k.split(".")[0] for k in reached} == {"block1", "block2", "block3"}


def test_without_taps_it_trains_but_has_no_transfer_module() -> None:
    target = build_network("shufflenet_v2_x0_5", 5, size=64)
    assert target.stage_widths == ()
    network = SSKTNetwork(target, {"imagenet": 7}, tm=False)
    assert network(torch.rand(2, 3, 64, 64))[1]["imagenet"].shape == (2, 7)
    with pytest.raises(
        InputError, match=r"--tm needs stages: .* --taps, in order, e\.g\. of conv1"
    ):
        SSKTNetwork(target, {"imagenet": 7}, tm=True)
    SSKTNetwork(target, {}, tm=True)


@pytest.mark.parametrize("factory", ["net", "fixed"])
def test_a_users_network(file: Path, factory: str) -> None:
    torch.manual_seed(0)
    target = build_network(f"{file}:{factory}", 5, taps=("first", "second"), size=16)
    assert (target.stage_widths, target.width) == ((6, 8), 8)
    network = SSKTNetwork(target, {"imagenet": 7}, tm=True)
    statistics = target.get_buffer("body.first.1.running_var")
    assert torch.equal(statistics, torch.ones(6)) and target.get_submodule("body.drop").training
    primary, auxiliary = network(torch.rand(4, 3, 16, 16))
    assert primary.shape == (4, 5)
    torch.autograd.backward(primary.square().sum() + auxiliary["imagenet"].square().sum())
    missing = {name for name, p in network.named_parameters() if p.grad is None}
    assert missing == {"target.body.unused.weight", "target.body.unused.bias"}


def test_a_users_network_means_what_it_meant(file: Path) -> None:
    target = build_network(f"{file}:net", 5, taps=("first",), size=16).eval()
    body = copy.deepcopy(target.get_submodule("body"))
    body.last = target.fc
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(target(x), body(x))
    stage = body.get_submodule("first")(body.get_submodule("stem")(x))
    torch.testing.assert_close(target.features(x).stages[0], stage)


def test_looking_at_a_network_draws_no_numbers(file: Path) -> None:
    states = []
    for taps in ((), ("first", "second")):
        torch.manual_seed(4)
        build_network(f"{file}:net", 5, taps=taps, size=16)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_compiler_follows_the_taps(file: Path) -> None:
    torch.manual_seed(0)
    target = build_network(f"{file}:plain", 3, taps=("0", "2"), size=8)
    network = SSKTNetwork(target, {"imagenet": 4}, tm=False).eval()
    x = torch.rand(2, 3, 8, 8)
    wanted = target.features(x)
    found = torch.compile(target.features, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close([*found.stages, found.pooled], [*wanted.stages, wanted.pooled])
    assert torch.equal(found.stages[0], network.target.get_submodule("body.0")(x))
    copy.deepcopy(target)  # nothing of the pass is left in it


REFUSED = [
    ("squeezenet1_1", {}, r"squeezenet1_1 has no linear classifier \(nn.Linear\)"),
    ("shufflenet_v2_x0_5", {"stem": "cifar"}, "no CIFAR form; --stem cifar is for resnet18, "),
    ("shufflenet_v2_x0_5", {"taps": ["stage9"]}, "no module 'stage9' to tap; it has e.g. conv1, "),
    ("shufflenet_v2_x0_5", {"taps": ["conv1"] * 2}, "names a module of .* twice: conv1, conv1"),
    ("shufflenet_v2_x0_5", {"taps": ["stage3", "stage2"]}, "name them as stage2, stage3"),
    ("vit_b_32", {"size": 33}, "vit_b_32 cannot be built for images of 33 pixels"),
    ("FILE:net", {"stem": "cifar"}, "has the stem that it was written with; leave --stem out"),
    ("FILE:net", {"taps": ["first.1"]}, "changes in place: tap that one; a stage is one tensor"),
    (
        "FILE:net",
        {"taps": ["drop"]},
        r"'drop' returns a tensor of shape \[1, 8\]; a stage is one",
    ),
    ("FILE:net", {"taps": ["unused"]}, "'unused' runs 0 times in one forward"),
    ("FILE:soft", {}, "its last linear layer, last, must be its last step"),
    ("FILE:convolutional", {}, "has no linear classifier"),
    ("FILE:failing", {}, "model .*own.py:failing failed: RuntimeError: no luck"),
    ("FILE:number", {}, r"number\(\) gave int, not a torch Module"),
    ("FILE:absent", {}, "has no function 'absent'"),
    ("no_such_package.nets:build", {}, "no module no_such_package.nets; install it or put"),
    ("missing/own.py:build", {}, "no file missing/own.py"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_refused(file: Path, name: str, options: dict[str, object], message: str) -> None:
    options = {"size": 32, **options}
    with pytest.raises((InputError, MissingData), match=message) as caught:
        build_network(name.replace("FILE", str(file)), 5, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_own_files_are_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    for width in (4, 6):
        path.write_text(
            "from torch import nn\ndef build(classes):\n"
            f"    return nn.Sequential(nn.Conv2d(3, {width}, 1), nn.AdaptiveAvgPool2d(1),"
            f" nn.Flatten(), nn.Linear({width}, classes))\n"
        )
        assert build_network(f"{path}:build", 2, taps=("0",), size=8).stage_widths == (width,)


def test_a_network_of_timm_is_a_target_with_taps() -> None:
    pytest.importorskip("timm")
    taps = ("layer1", "layer2", "layer3", "layer4")
    target = build_network("timm/resnet18", 10, taps=taps, size=64)
    assert target.stage_widths == (64, 128, 256, 512)
    with pytest.raises(UnknownName, match=r"unknown network of timm 'resnet81'; did you mean"):
        build_network("timm/resnet81", 10)
    with pytest.raises(InputError, match="leave --stem out"):
        build_network("timm/resnet18", 10, stem="cifar")
