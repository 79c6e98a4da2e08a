"""The small ResNets of the paper (He et al. 2016, section 4.2, option A)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskt.trainer.models.base import Features, TargetNetwork

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self._stride, self._missing = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self._stride > 1 or self._missing:
            half = self._missing // 2
            x = F.pad(
                x[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, half, self._missing - half)
            )
        return F.relu(y + x, inplace=True)


class SmallResNet(TargetNetwork):
    """ResNet-20/32/44/56/110: one 3x3 convolution, three stages of 16, 32, 64 channels.

    ``transfer_width`` is the transfer module's output width for these networks.
    """

    stage_widths = WIDTHS
    width = WIDTHS[-1]
    transfer_width = 64

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        before = (WIDTHS[0], *WIDTHS)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    BasicBlock(before[i] if j == 0 else width, width, 2 if i and j == 0 else 1)
                    for j in range(blocks)
                )
            )
            for i, width in enumerate(WIDTHS)
        )
        self.fc = nn.Linear(self.width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x: Tensor) -> Features:
        """Stage outputs and pooled features of float images ``[n, 3, h, w]``."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return Features(outputs, torch.mean(x, (2, 3)))

    def parts_before(self, stage: int) -> list[nn.Module]:
        return [self.conv1, self.bn1, *self.stages[: stage - 1]]
