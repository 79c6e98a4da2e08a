"""Every architecture that can be named: it builds, runs at its size, opens from its checkpoint."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import regnet

from sskt.teacher_cache.sources.known_networks import (
    CSAIL_SHA256,
    imagenet_archs,
    imagenet_weights,
    torchvision_preprocessing,
    untrained,
)
from sskt.teacher_cache.sources.registry import open_source, parse_source, places365_classes
from sskt.teacher_cache.sources.source import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

ARCHS = imagenet_archs()[1:]

SIZES = {
    "efficientnet_b1": 240,
    "efficientnet_b2": 288,
    "efficientnet_b3": 300,
    "efficientnet_b4": 380,
    "efficientnet_b5": 456,
    "efficientnet_b6": 528,
    "efficientnet_b7": 600,
    "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_l": 480,
    "inception_v3": 299,
    "regnet_y_128gf": 384,
    "swin_v2_b": 256,
    "swin_v2_s": 256,
    "swin_v2_t": 256,
    "vit_h_14": 518,
}
"""Input sizes other than 224, as torchvision's documentation gives them."""

PAPER = [
    "alexnet", "vgg16", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "densenet121", "densenet161", "densenet169", "densenet201",
    "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
]  # fmt: skip


def images(n: int, size: int = 40) -> Tensor:
    rng = np.random.default_rng(n)
    return torch.from_numpy(rng.integers(0, 256, (n, size, size, 3), np.uint8))


# --- ImageNet ---------------------------------------------------------------------------------


def test_the_papers_classifiers_can_be_named() -> None:
    assert set(PAPER) <= set(ARCHS)
    assert len(ARCHS) >= 80
    assert set(SIZES) <= set(ARCHS)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_preprocessing_of_every_architecture(arch: str) -> None:
    expected = Preprocessing(SIZES.get(arch, 224), IMAGENET_MEAN, IMAGENET_STD)
    if arch == "efficientnet_v2_l":
        expected = Preprocessing(480, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert torchvision_preprocessing(imagenet_weights(arch)) == expected


def test_the_first_published_weights_are_meant() -> None:
    assert imagenet_weights("resnet50").name == "IMAGENET1K_V1"
    assert imagenet_weights("vit_h_14").name == "IMAGENET1K_SWAG_E2E_V1"
    named = imagenet_weights("ResNet50_Weights.IMAGENET1K_V2")
    assert named.name == "IMAGENET1K_V2"


@pytest.mark.slow
def test_every_architecture_runs_at_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: all layers and shapes, no arithmetic and no memory."""
    draw = regnet.BlockParams.from_init_params.__func__

    def on_cpu(cls: Any, *arguments: Any, **options: Any) -> Any:
        with torch.device("cpu"):  # RegNets compute their widths with tensors
            return draw(cls, *arguments, **options)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", classmethod(on_cpu))
    for arch in ARCHS:
        weights = imagenet_weights(arch)
        size = torchvision_preprocessing(weights).size
        with torch.device("meta"), torch.inference_mode():
            output = untrained(weights).eval()(torch.empty(2, 3, size, size))
        assert output.shape == (2, 1000), arch


@pytest.mark.parametrize(
    "name", ["ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", "ViT_B_16_Weights.IMAGENET1K_V1"]
)
def test_a_vit_has_the_size_of_its_weights(name: str) -> None:
    weights = imagenet_weights(name)
    size = torchvision_preprocessing(weights).size
    with torch.device("meta"), torch.inference_mode():
        output = untrained(weights).eval()(torch.empty(1, 3, size, size))
    assert output.shape == (1, 1000)


def no_initialisation(arch: str) -> dict[str, Any]:
    known = {"aux_logits": True, "init_weights": False, "transform_input": True}
    return known if arch in ("googlenet", "inception_v3") else {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["alexnet", "resnet50", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
             "googlenet", "inception_v3", "efficientnet_b0", "swin_t", "vit_b_16"],
)  # fmt: skip
def test_an_architecture_opens_from_a_file_and_labels(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network: nn.Module = models.get_model_builder(arch)(**no_initialisation(arch)).eval()
    torch.save(network.state_dict(), file := tmp_path / "w.pth")
    source = open_source(parse_source(f"imagenet:{arch}"), weights=file)
    x = source.preprocessing(images(2))
    assert x.shape == (2, 3, SIZES.get(arch, 224), SIZES.get(arch, 224))
    with torch.inference_mode():
        expected = torch.log_softmax(network(x), dim=1)
    found = source.log_probabilities(images(2))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    source.check_frozen()


# --- Places365, as CSAIL published it ---------------------------------------------------------


def old_name(key: str) -> str:
    """``norm1`` was ``norm.1`` inside dense layers before torchvision 0.3."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key)


def csail(arch: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """What CSAIL's train_placesCNN.py (PyTorch 0.2) saved: AlexNet's features alone, and of all
    others the whole network, are wrapped in DataParallel; there were no batch counters yet."""
    old = OrderedDict((old_name(k), v) for k, v in state.items() if "num_batches" not in k)
    wrapped = OrderedDict(
        (k.replace("features.", "features.module.") if arch == "alexnet" else f"module.{k}", v)
        for k, v in old.items()
    )
    return {"epoch": 90, "arch": arch, "state_dict": wrapped, "best_prec1": 54.2}


SEEN = {
    "alexnet": ["features.module.0.weight", "classifier.6.bias"],
    "resnet18": ["module.layer4.1.conv2.weight", "module.fc.bias"],
    "resnet50": ["module.layer4.2.conv3.weight", "module.layer1.0.downsample.1.running_var"],
    "densenet161": [
        "module.features.denseblock1.denselayer1.norm.1.weight",
        "module.features.denseblock4.denselayer24.conv.2.weight",
        "module.features.norm5.bias",
    ],
}


@pytest.mark.parametrize("arch", SEEN)
@pytest.mark.slow
def test_csails_checkpoints_open_and_label(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = models.get_model_builder(arch)(num_classes=365).eval()
    checkpoint = csail(arch, network.state_dict())
    assert set(SEEN[arch]) <= set(checkpoint["state_dict"])
    torch.save(checkpoint, file := tmp_path / f"{arch}_places365.pth.tar")
    source = open_source(parse_source(f"places365:{arch}"), weights=file)
    assert source.classes == places365_classes()
    assert source.preprocessing == Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD)
    loaded = source.network.state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(loaded[key], value), key
    with torch.inference_mode():
        expected = torch.log_softmax(network(source.preprocessing(images(1))), dim=1)
    found = source.log_probabilities(images(1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_every_architecture_of_csail_is_tested() -> None:
    assert set(SEEN) == set(CSAIL_SHA256)
