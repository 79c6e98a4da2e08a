"""3D-ResNets for clips (Hara et al. 2018), named as in their released Kinetics checkpoints."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sskt.trainer.models.base import Features, TargetNetwork

WIDTHS = (64, 128, 256, 512)
BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Blocks of each stage, by depth; from 50 on they are bottlenecks."""


class PaddedShortcut(nn.Module):
    """Option A: every ``stride``-th voxel, channels filled up with zeros. It has a gradient.

    The released code copies ``.data`` here, which cuts the gradient off.
    """

    def __init__(self, stride: int, missing: int) -> None:
        super().__init__()
        self._stride, self._missing = stride, missing

    def forward(self, x: Tensor) -> Tensor:
        s = self._stride
        return F.pad(x[:, :, ::s, ::s, ::s], (0, 0, 0, 0, 0, 0, 0, self._missing))


def _shortcut(kind: str, width_in: int, width: int, stride: int) -> nn.Module | None:
    if stride == 1 and width_in == width:
        return None
    if kind == "a":
        return PaddedShortcut(stride, width - width_in)
    return nn.Sequential(nn.Conv3d(width_in, width, 1, stride, bias=False), nn.BatchNorm3d(width))


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.downsample = _shortcut(shortcut, width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1x1, 3x3x3, 1x1x1 convolutions; four times as many channels leave."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(4 * width)
        self.downsample = _shortcut(shortcut, width_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet3D(TargetNetwork):
    """3D-ResNet-10/18/34/50: stem 7x7x7 of stride (1, 2, 2), max pool, four stages.

    ``shortcut``: ``a`` (padded) or ``b`` (1x1x1 convolution).
    """

    dimensions = 3

    def __init__(self, depth: int, classes: int, shortcut: str = "b") -> None:
        super().__init__()
        block = BasicBlock if depth < 50 else Bottleneck
        self.conv1 = nn.Conv3d(3, WIDTHS[0], 7, (1, 2, 2), 3, bias=False)
        self.bn1 = nn.BatchNorm3d(WIDTHS[0])
        self.maxpool = nn.MaxPool3d(3, 2, 1)
        width_in = WIDTHS[0]
        for i, (width, blocks) in enumerate(zip(WIDTHS, BLOCKS[depth], strict=True)):
            layers: list[nn.Module] = []
            for j in range(blocks):
                layers.append(block(width_in, width, 2 if i and j == 0 else 1, shortcut))
                width_in = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.stage_widths = tuple(width * block.expansion for width in WIDTHS)
        self.width = width_in
        self.fc = nn.Linear(width_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def _stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{i + 1}") for i in range(len(WIDTHS))]

    def features(self, x: Tensor) -> Features:
        """Stage outputs and pooled features of float clips ``[n, 3, d, h, w]``."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        outputs = []
        for stage in self._stages():
            x = stage(x)
            outputs.append(x)
        return Features(outputs, x.mean((2, 3, 4)))

    def parts_before(self, stage: int) -> list[nn.Module]:
        return [self.conv1, self.bn1, *self._stages()[: stage - 1]]
