"""Target networks h_t by name, and what heads and trainer need of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, UnknownName

SMALL = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
"""Basic blocks in each of the three stages of the small ResNets."""

KNOWN_TAPS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        ("layer1", "layer2", "layer3", "layer4"),
    ),
    "mobilenet_v2": tuple(f"features.{i}" for i in (3, 6, 10, 13, 16, 17)),
    "densenet121": tuple(f"features.transition{i}" for i in (1, 2, 3)),
    "vgg16": tuple(f"features.{i}" for i in (5, 12, 22, 32, 42)),
}
"""Stages of torchvision's networks: the modules whose outputs they are (figure 1 of the paper).

MobileNetV2: the last bottleneck of rows 2 to 7 of its table (24, 32, 64, 96, 160, 320 channels).
DenseNet-121: the three transition layers, after their pooling. VGG-16, which the figure does not
draw: the last ReLU before each pooling.
"""

FIRST_STAGE = {"mobilenet_v2": "features.1", "densenet121": "features.denseblock1"}
"""The module with which the first stage begins, where the first tap is not the whole stage."""

THREE_D = {"resnet3d10": 10, "resnet3d18": 18, "resnet3d34": 34, "resnet3d50": 50}
"""3D-ResNets, by depth."""

NETWORKS = {
    **dict.fromkeys(SMALL, "pictures of 32 to 96 pixels; three stages"),
    **dict.fromkeys(KNOWN_TAPS, "pictures; torchvision's, stages tapped"),
    **dict.fromkeys(THREE_D, "clips; four stages"),
}
"""Networks known by name: what each is for."""

SMALL_PICTURE = 64
"""Up to this many pixels ``stem="auto"`` takes the CIFAR form."""


class Features(NamedTuple):
    """What a target network computes.

    ``stages``: stage outputs ``[n, c, h, w]``, of clips ``[n, c, d, h, w]``; ``pooled``: what the
    classifier sees, ``[n, width]``.
    """

    stages: list[Tensor]
    pooled: Tensor


class TargetNetwork(nn.Module):
    """A network with its stages' outputs exposed and its classifier apart."""

    stage_widths: tuple[int, ...]
    """Channels of each stage's output; empty where no stage is known."""
    width: int
    """Of what the classifier sees."""
    transfer_width: int = 1000
    """Output width of a transfer module's branches."""
    dimensions: int = 2
    """2 for pictures, 3 for clips."""
    transfer_fan_out: bool = False
    """Whether transfer modules get He's fan-out initialisation, as released for this network."""
    fc: nn.Module
    """The classifier: pooled to logits."""

    @abstractmethod
    def features(self, x: Tensor) -> Features:
        """Stage outputs and pooled features of float ``[n, 3, h, w]`` or ``[n, 3, d, h, w]``."""

    @abstractmethod
    def parts_before(self, stage: int) -> list[nn.Module]:
        """The stem and the stages before ``stage`` (1 is the first; one past the last: all)."""

    def tappable(self) -> list[str]:
        """Some modules whose outputs could be stages, for a message."""
        return []

    def own_key(self, key: str) -> str:
        """The name here of a parameter of a published checkpoint."""
        return key

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).pooled)
        return logits


def build_network(
    name: str,
    classes: int,
    *,
    stem: str = "auto",
    shortcut: str = "b",
    taps: Sequence[str] = (),
    size: int | None = None,
) -> TargetNetwork:
    """A target network by name, with fresh parameters drawn from torch's global generator.

    ``name`` is one of ``NETWORKS``, another classifier of torchvision's, or
    ``FILE.py:factory``. ``stem``: ``cifar`` keeps the resolution of small pictures, ``imagenet``
    is torchvision's; ``auto`` goes by ``size``, the pixels of a view. ``shortcut`` is that of
    3-D ResNets. ``taps`` name the modules whose outputs are the stages, in order; known
    networks have theirs. Raises ``UnknownName``, ``MissingData``, ``InputError``.
    """
    if name in SMALL or name in THREE_D:
        if taps:
            raise InputError(f"{name} has its stages already; leave --taps out")
        if stem == "imagenet" or (stem == "cifar" and name in THREE_D):
            raise InputError(f"{name} has one stem only; leave --stem {stem} out")
    if name in SMALL:
        from sskt.trainer.models.resnet_cifar import SmallResNet

        return SmallResNet(SMALL[name], classes)
    if name in THREE_D:
        from sskt.trainer.models.resnet3d import ResNet3D

        return ResNet3D(THREE_D[name], classes, shortcut)
    # torchvision takes a second to import: not for networks that do without.
    from sskt.trainer.models import tapped

    if ":" in name:
        return tapped.user_network(name, classes, stem, taps, size)
    if name not in NETWORKS and name not in tapped.torchvision_names():
        hint = "or another classifier of torchvision's, or FILE.py:factory"
        raise UnknownName("model", name, NETWORKS, hint)
    small = stem == "cifar" or (stem == "auto" and size is not None and size <= SMALL_PICTURE)
    return tapped.torchvision_network(name, classes, small, stem, taps, size)


def is_three_dimensional(name: str) -> bool:
    """Whether the network takes clips ``[n, 3, d, h, w]``."""
    return name in THREE_D


def parameters_of(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
