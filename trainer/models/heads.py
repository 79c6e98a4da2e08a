"""Auxiliary heads h_aux_m: one per source, with or without the transfer module (TM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError
from sskt.trainer.models.base import Features, TargetNetwork
from sskt.trainer.models.registry import build_network

CONVOLUTION: dict[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, type[nn.BatchNorm2d | nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class TransferBranch(nn.Sequential):
    """1x1 - 3x3 (stride 2) - 1x1 bottleneck over one stage; every convolution has a bias."""

    def __init__(self, width_in: int, width: int, dimensions: int = 2) -> None:
        middle = width // 2
        conv, norm = CONVOLUTION[dimensions], NORM[dimensions]
        super().__init__(
            *(conv(width_in, middle, 1), norm(middle), nn.ReLU(inplace=True)),
            *(conv(middle, middle, 3, 2, 1), norm(middle), nn.ReLU(inplace=True)),
            *(conv(middle, width, 1), norm(width), nn.ReLU(inplace=True)),
        )


class TransferModule(nn.Module):
    """TM: a branch per stage, pooled, averaged over stages (as released), one linear layer.

    ``fan_out`` draws the convolutions as He et al. do, as the released code does for its 2-D
    ResNets of ImageNet size; else PyTorch's defaults, as for its small and 3-D networks.
    """

    def __init__(
        self,
        stage_widths: tuple[int, ...],
        width: int,
        classes: int,
        dimensions: int = 2,
        *,
        fan_out: bool = False,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(TransferBranch(w, width, dimensions) for w in stage_widths)
        self.fc = nn.Linear(width, classes)
        for module in self.modules() if fan_out else ():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Features) -> Tensor:
        pooled = [
            branch(stage).mean(tuple(range(2, stage.ndim)))
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
    """h_t with its primary head and M auxiliary heads (equation 1 of the paper).

    ``forward`` takes float32 ``[n, 3, h, w]`` (``[n, 3, d, h, w]`` for clips) and returns the
    primary logits ``[n, C]`` and the auxiliary logits ``[n, C_m]`` by source. Fresh parameters are
    drawn from torch's global generator.

    Args:
        target: Name of a target network (``resnet20``, ``resnet18``, ``mobilenet_v2``, ...), an own
            module of images whose last linear layer is its classifier, or a ``TargetNetwork``.
        source_classes: Number of classes C_m by source, as ``SoftLabelLoader.source_classes``;
            for a loss of features their number D_m, as ``SoftLabelLoader.source_widths``: the
            auxiliary head is then a trained projection to D_m values.
        tm: Whether the auxiliary heads are transfer modules over the stages, instead of linear
            layers over the pooled features.
        classes: Number of classes C of the target; not with a ``TargetNetwork``, which has them.
        taps: Names of the modules whose outputs ``[n, c, h, w]`` are the stages, in order; known
            networks and those of timm have theirs.
        size: Pixels of the images. Small ones make ``auto`` stems keep their resolution; an own
            module is run on one black image of this size, 224 by default.
        stem: ``cifar`` for small images, ``imagenet``, or ``auto`` by ``size``.

    Attributes:
        target: The target network.
        sources: Names of the sources.
        heads: The auxiliary heads, in the order of ``sources``.
        frozen: Modules of the target that stay in evaluation mode whatever ``train`` is called
            with (``initial.freeze_before`` fills it).

    Raises:
        UnknownName: If no network has this name.
        InputError: If the network cannot be used, or ``tm`` is set and no stages are known.
    """

    def __init__(
        self,
        target: str | nn.Module,
        source_classes: Mapping[str, int],
        *,
        tm: bool = False,
        classes: int | None = None,
        taps: Sequence[str] = (),
        size: int | None = None,
        stem: str = "auto",
    ) -> None:
        super().__init__()
        target = _target_network(target, classes, taps, size, stem)
        if tm and source_classes and not target.stage_widths:
            raise InputError(
                "--tm needs stages: name the modules whose outputs they are with --taps, in "
                f"order, e.g. of {', '.join(target.tappable()) or 'FILE.py'}"
            )
        self.target = target
        self.sources = tuple(source_classes)
        self.frozen: list[nn.Module] = []
        self.heads = nn.ModuleList(
            TransferModule(
                target.stage_widths,
                target.transfer_width,
                classes,
                target.dimensions,
                fan_out=target.transfer_fan_out,
            )
            if tm
            else LinearHead(target.width, classes)
            for classes in source_classes.values()
        )

    def train(self, mode: bool = True) -> SSKTNetwork:
        """As any module's, but for the frozen parts."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Float ``[n, 3, h, w]`` or ``[n, 3, d, h, w]`` to (primary logits, auxiliary logits).

        h_prim(x) ``[n, C]`` and h_aux_m(x) ``[n, C_m]`` by source.
        """
        features = self.target.features(x)
        heads = zip(self.sources, self.heads, strict=True)
        auxiliary = {name: head(features) for name, head in heads}
        return self.target.fc(features.pooled), auxiliary


def _target_network(
    target: str | nn.Module, classes: int | None, taps: Sequence[str], size: int | None, stem: str
) -> TargetNetwork:
    if isinstance(target, TargetNetwork):
        if classes is not None or taps:
            raise InputError(
                "a TargetNetwork has its classes and taps; leave classes= and taps= out"
            )
        return target
    if classes is None:
        raise InputError("classes= is missing: the number of classes of the target")
    if isinstance(target, str):
        return build_network(target, classes, stem=stem, taps=taps, size=size)
    from sskt.trainer.models.tapped import USUAL, TappedNetwork, is_of_timm, timm_target

    if is_of_timm(target):
        return timm_target(type(target).__name__, target, classes, taps, size)
    return TappedNetwork(type(target).__name__, target, classes, taps, size or USUAL)


def to_channels_last(network: SSKTNetwork) -> SSKTNetwork:
    """The network with the memory layout of its convolutions changed, in place."""
    if network.target.dimensions == 2:
        return network.to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
    return network
