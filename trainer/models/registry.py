"""Target networks h_t by name."""

from __future__ import annotations

from collections.abc import Sequence

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.sources.names import TIMM
from sskt.trainer.models.base import KNOWN_TAPS, TargetNetwork

SMALL = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
"""Basic blocks in each of the three stages of the small ResNets."""

THREE_D = {"resnet3d10": 10, "resnet3d18": 18, "resnet3d34": 34, "resnet3d50": 50}
"""3D-ResNets, by depth."""

NETWORKS = {
    **dict.fromkeys(SMALL, "images of 32 to 96 pixels; three stages"),
    **dict.fromkeys(KNOWN_TAPS, "images; torchvision's, stages tapped"),
    **dict.fromkeys(THREE_D, "clips; four stages"),
}
"""Networks known by name: what each is for."""

SMALL_IMAGE = 64
"""Up to this many pixels ``stem="auto"`` takes the CIFAR form."""


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

    ``name`` is one of ``NETWORKS``, another classifier of torchvision's, ``timm/ARCH``, or
    ``FILE.py:factory``. ``stem``: ``cifar`` keeps the resolution of small images, ``imagenet``
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

    if name.startswith(TIMM):
        return tapped.timm_network(name, classes, stem, taps, size)
    if ":" in name:
        return tapped.user_network(name, classes, stem, taps, size)
    if name not in NETWORKS and name not in tapped.torchvision_names():
        hint = "or another classifier of torchvision's, timm/ARCH, or FILE.py:factory"
        raise UnknownName("model", name, NETWORKS, hint)
    small = stem == "cifar" or (stem == "auto" and size is not None and size <= SMALL_IMAGE)
    return tapped.torchvision_network(name, classes, small, stem, taps, size)


def is_three_dimensional(name: str) -> bool:
    """Whether the network takes clips ``[n, 3, d, h, w]``."""
    return name in THREE_D
