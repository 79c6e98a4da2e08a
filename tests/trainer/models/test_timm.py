"""Networks of timm as targets: their stages, and that they stay what they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.registry import build_network

timm = pytest.importorskip("timm")

STAGES = [
    ("resnet10t", 64, ("layer1", "layer2", "layer3", "layer4"), (64, 128, 256, 512)),
    ("test_efficientnet", 64, ("blocks.1", "blocks.2", "blocks.3", "blocks.4"), None),
    ("vit_tiny_patch16_224", 48, tuple(f"blocks.{i}" for i in (2, 5, 8, 11)), (192,) * 4),
    ("swin_tiny_patch4_window7_224", 224, tuple(f"layers.{i}" for i in range(4)), None),
]


@pytest.mark.parametrize(("arch", "size", "taps", "widths"), STAGES)
def test_stages_are_those_that_timm_lists(
    arch: str, size: int, taps: tuple[str, ...], widths: tuple[int, ...] | None
) -> None:
    torch.manual_seed(0)
    target = build_network(f"timm/{arch}", 5, size=size)
    assert getattr(target, "taps") == taps  # noqa: B009
    assert widths is None or target.stage_widths == widths
    network = SSKTNetwork(target, {"imagenet": 7}, tm=True).train()
    primary, auxiliary = network(torch.rand(2, 3, size, size))
    assert primary.shape == (2, 5) and auxiliary["imagenet"].shape == (2, 7)
    torch.autograd.backward(primary.square().sum() + auxiliary["imagenet"].square().sum())
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    for stage, width in zip(
        target.features(torch.rand(2, 3, size, size)).stages, target.stage_widths, strict=True
    ):
        assert stage.ndim == 4 and stage.shape[1] == width


@pytest.mark.parametrize("arch", ["resnet10t", "vit_tiny_patch16_224", "test_convnext"])
def test_the_network_is_what_timm_built(arch: str) -> None:
    """Its outputs and the names of its weights."""
    torch.manual_seed(3)
    plain = timm.create_model(arch, num_classes=5).eval()
    size = plain.default_cfg["input_size"][-1]
    target = SSKTNetwork(copy.deepcopy(plain), {"a": 2}, classes=5, tm=True, size=size).target
    x = torch.rand(2, 3, size, size)
    torch.testing.assert_close(target.eval()(x), plain(x))
    ours = {target.published_key(key): value for key, value in target.state_dict().items()}
    assert ours.keys() == plain.state_dict().keys()
    assert all(torch.equal(ours[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("arch", ["resnet10t", "vit_tiny_patch16_224"])
def test_drop_path_is_kept(arch: str) -> None:
    network = timm.create_model(arch, num_classes=5, drop_path_rate=0.9)
    size = 224 if arch.startswith("vit") else 64
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm begins with branches that add nothing
            nn.init.ones_(module.weight)
    model = SSKTNetwork(network, {"a": 2}, classes=5, tm=True, size=size)
    x = torch.rand(1, 3, size, size).repeat(8, 1, 1, 1)

    def pooled() -> Tensor:
        with torch.no_grad():
            return model.target.features(x).pooled

    model.eval()
    assert torch.allclose(pooled()[0], pooled()[1], atol=1e-5)
    torch.manual_seed(0)
    model.train()
    found = pooled()
    assert (found - found[0]).abs().max() > 1e-3


def test_frozen_parts_of_a_vit_come_before_their_stage() -> None:
    target = build_network("timm/vit_tiny_patch16_224", 5, size=48)
    body = target.get_submodule("body")
    first = target.parts_before(1)
    assert body.get_submodule("patch_embed") in first
    assert body.get_submodule("blocks.0") not in first
    second = target.parts_before(2)
    assert body.get_submodule("blocks.2") in second
    assert body.get_submodule("blocks.3") not in second


def test_a_resolution_of_one_size_is_that_of_the_views() -> None:
    target = build_network("timm/vit_tiny_patch16_224", 5, size=64)
    assert target.get_parameter("body.pos_embed").shape == (1, 17, 192)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("deit_tiny_distilled_patch16_224", r"has 2 classifiers \(head, head_dist\), whose output"),
        ("dla34", r"has no linear classifier \(nn.Linear\) to replace by one of 5 classes"),
    ],
)
def test_refused_by_name(arch: str, message: str) -> None:
    with pytest.raises(InputError, match=f"timm/{arch} {message}"):
        build_network(f"timm/{arch}", 5, size=224)


def test_other_features_than_those_of_forward_are_refused() -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32)
    given = network.forward_intermediates

    def wrong(x: Tensor, **how: object) -> tuple[Tensor, list[Tensor]]:
        last, stages = given(x, **how)
        return last * 1.1, stages

    vars(network)["forward_intermediates"] = wrong
    with pytest.raises(InputError, match="gives other features than its forward"):
        SSKTNetwork(network, {"a": 2}, classes=5, tm=True, size=32)
