"""timm's networks as sources: their own preprocessing and classes, one line where they fail."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData, UnknownName
from sskt.teacher_cache.sources.registry import (
    imagenet_classes,
    open_source,
    parse_source,
    places365_classes,
)
from sskt.teacher_cache.sources.source import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    Source,
    Triple,
)

timm: Any = pytest.importorskip("timm")
SMALL = "test_resnet.r160_in1k"


def images(n: int, size: int = 40) -> Tensor:
    rng = np.random.default_rng(n)
    return torch.from_numpy(rng.integers(0, 256, (n, size, size, 3), np.uint8))


def saved(folder: Path, arch: str = SMALL, classes: int = 1000) -> Path:
    torch.manual_seed(0)
    network = timm.create_model(arch, num_classes=classes)
    torch.save(network.state_dict(), folder / "w.pth")
    return folder / "w.pth"


def opened(text: str, file: Path | None = None, **options: Any) -> Source:
    return open_source(parse_source(text), weights=file, **options)


@pytest.mark.parametrize(
    ("arch", "mean", "std"),
    [
        (SMALL, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("test_efficientnet.r160_in1k", IMAGENET_MEAN, IMAGENET_STD),
        ("test_vit.r160_in1k", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_a_network_of_timm_opens_and_labels(
    arch: str, mean: Triple, std: Triple, tmp_path: Path
) -> None:
    source = opened(f"imagenet:timm/{arch}", saved(tmp_path, arch))
    assert source.classes == imagenet_classes()
    assert source.arch == f"timm/{arch}"
    assert source.preprocessing == Preprocessing(160, mean, std)
    network = timm.create_model(arch).eval()
    network.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
    with torch.inference_mode():
        expected = torch.log_softmax(network(source.preprocessing(images(2))), dim=1)
    torch.testing.assert_close(source.log_probabilities(images(2)), expected)
    source.check_frozen()


def test_timms_size_is_its_input_size_and_can_be_overridden(tmp_path: Path) -> None:
    """Its test_input_size is another."""
    arch = "resnet18.a1_in1k"
    config = timm.get_pretrained_cfg(arch)
    assert (config.input_size, config.test_input_size) == ((3, 224, 224), (3, 288, 288))
    file = saved(tmp_path, arch)
    assert opened(f"imagenet:timm/{arch}", file).preprocessing == Preprocessing()
    other = opened(f"imagenet:timm/{arch}@96", file, preprocessing="mean=0.5,std=0.5")
    assert other.preprocessing == Preprocessing(96, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_a_file_brings_its_number_of_classes(tmp_path: Path) -> None:
    source = opened(f"mine:timm/{SMALL}", saved(tmp_path, classes=37))
    assert source.classes == tuple(f"class {i}" for i in range(37))
    scenes = opened(f"places365:timm/{SMALL}", saved(tmp_path, classes=365))
    assert scenes.classes == places365_classes()


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_names_with_module_inside_stay_whole(prefix: str, tmp_path: Path) -> None:
    """EfficientViT has ``context_module.main`` in its names."""
    arch = "efficientvit_b0"
    state = torch.load(saved(tmp_path, arch, 5), weights_only=True)
    assert any("context_module.main." in key for key in state)
    torch.save({"state_dict": {prefix + key: v for key, v in state.items()}}, tmp_path / "x.pth")
    source = opened(f"mine:timm/{arch}@64", tmp_path / "x.pth")
    torch.testing.assert_close(dict(source.network.state_dict()), state)


def test_a_known_name_has_its_number_of_classes(tmp_path: Path) -> None:
    for text, file, message in [
        (f"imagenet:timm/{SMALL}", saved(tmp_path, classes=37), "has 37 classes, not 1000: use a"),
        (f"places365:timm/{SMALL}", None, "has 1000 classes, not 365: use a name of your own"),
        ("imagenet:timm/convnext_tiny.in12k", None, "has 11821 classes, not 1000: use a name of"),
        ("mine:timm/vit_small_patch14_dinov2.lvd142m", None, "0 classes: it is no classifier"),
    ]:
        with pytest.raises(InputError, match=message):
            opened(text, file)


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, "test_vit.r160_in1k")
    with pytest.raises(BadCheckpoint, match=r"it holds no classifier \(fc.weight\)"):
        opened(f"imagenet:timm/{SMALL}", file)
    with pytest.raises(BadCheckpoint, match=r"wrong checkpoint .*(does not fit|size mismatch)"):
        opened("imagenet:timm/resnet18.a1_in1k", saved(tmp_path))


@pytest.mark.parametrize(
    ("arch", "near"),
    [("resnet50.a9_in1k", "resnet50.a1_in1k"), ("resnett18", "resnet18."), ("", "; all: timm."),
     ("hf-hub:a/b", "; all: timm."), ("resnet50/../x", "resnet50.")],
)  # fmt: skip
def test_unknown_architectures_are_told_what_is_near(arch: str, near: str) -> None:
    pattern = rf"unknown timm architecture '{re.escape(arch)}'; known: .*{re.escape(near)}"
    with pytest.raises(UnknownName, match=pattern):
        opened(f"imagenet:timm/{arch}")


def test_without_a_network_one_line_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    constants: Any = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = f"cannot get the weights of timm/{SMALL} .*give them with --weights FILE"
    with pytest.raises(MissingData, match=message) as caught:
        opened(f"imagenet:timm/{SMALL}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_batch_statistics_and_an_untouched_rng(tmp_path: Path) -> None:
    file = saved(tmp_path, "test_efficientnet.r160_in1k")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stored, batch = (
        opened("imagenet:timm/test_efficientnet.r160_in1k", file, batchnorm=b)
        for b in ("eval", "batch-4")
    )
    assert torch.equal(torch.rand(3), expected)
    assert stored.weights == batch.weights
    views = images(4)
    assert not torch.allclose(
        stored.log_probabilities(views), batch.log_probabilities(views), atol=1e-3
    )
    batch.check_frozen()


@pytest.mark.slow
def test_a_network_without_classifier_gives_features_only(tmp_path: Path) -> None:
    arch = "convnext_tiny.dinov3_lvd1689m"
    network = timm.create_model(arch, pretrained=False, num_classes=0)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    wanted = parse_source(f"dino:timm/{arch}@64")
    source = open_source(wanted, weights=tmp_path / "w.pth", output="features")
    assert (source.width, source.classes, source.head) == (768, (), None)
    views = images(2, 64)
    with torch.no_grad():
        expected = network.eval()(source.preprocessing(views))
    np.testing.assert_allclose(source.forward(views), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="no classifier; its features are stored with --output"):
        open_source(wanted)
