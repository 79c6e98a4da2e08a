"""Auxiliary heads h_aux_m: one per source, with or without the transfer module (TM)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskt.trainer.networks import Features, SmallResNet


class TransferBranch(nn.Sequential):
    """1x1 - 3x3 (stride 2) - 1x1 bottleneck over one stage; every convolution has a bias."""

    def __init__(self, width_in: int, width: int) -> None:
        middle = width // 2
        super().__init__(
            *(nn.Conv2d(width_in, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(inplace=True)),
            *(nn.Conv2d(middle, middle, 3, 2, 1), nn.BatchNorm2d(middle), nn.ReLU(inplace=True)),
            *(nn.Conv2d(middle, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        )


class TransferModule(nn.Module):
    """TM: a branch per stage, pooled, averaged over stages (as released), one linear layer."""

    def __init__(self, stage_widths: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(TransferBranch(w, width) for w in stage_widths)
        self.fc = nn.Linear(width, classes)

    def forward(self, features: Features) -> Tensor:
        pooled = [
            F.adaptive_avg_pool2d(branch(stage), 1).flatten(1)
            for branch, stage in zip(self.branches, features.stages, strict=True)
        ]
        logits: Tensor = self.fc(torch.stack(pooled).mean(0))
        return logits


class LinearHead(nn.Module):
    """Without TM: one linear layer from the pooled features."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, features: Features) -> Tensor:
        logits: Tensor = self.fc(features.pooled)
        return logits


class SSKTNetwork(nn.Module):
    """h_t with its primary head and M auxiliary heads (equation 1)."""

    def __init__(self, target: SmallResNet, source_classes: Mapping[str, int], *, tm: bool) -> None:
        super().__init__()
        self.target = target
        self.sources = tuple(source_classes)
        self.heads = nn.ModuleList(
            TransferModule(target.stage_widths, target.transfer_width, classes)
            if tm
            else LinearHead(target.width, classes)
            for classes in source_classes.values()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """float ``[n, 3, h, w]`` to h_prim(x) ``[n, C]`` and h_aux_m(x) ``[n, C_m]`` by source."""
        features = self.target.features(x)
        heads = zip(self.sources, self.heads, strict=True)
        auxiliary = {name: head(features) for name, head in heads}
        return self.target.fc(features.pooled), auxiliary
