"""What heads and trainer need of a target network h_t."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

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
    """2 for images, 3 for clips."""
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

    def published_key(self, key: str) -> str:
        """The name of a parameter of this network in a published checkpoint."""
        return key

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).pooled)
        return logits


def parameters_of(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
