"""The normalisation of a target network's input, which belongs to the network's initial weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sskt.teacher_cache.sources.source import IMAGENET_MEAN, IMAGENET_STD, Triple


@dataclass(frozen=True)
class Normalisation:
    """``(view * maximum / 255 - mean) / std``, with one mean and one std for each RGB channel.

    Attributes:
        mean: What is subtracted, in units in which white is ``maximum``.
        std: What is divided by, in the same units.
        maximum: The value of white before the mean is subtracted.
    """

    mean: Triple
    std: Triple
    maximum: float

    def __call__(self, views: Tensor) -> Tensor:
        """Makes the input of the target network.

        Args:
            views: uint8 ``[n, H, W, 3]``, or ``[n, D, H, W, 3]`` for clips, on any device.

        Returns:
            float32 ``[n, 3, H, W]`` or ``[n, 3, D, H, W]``, channels-last in memory as the views
            are.
        """
        # Whole rows of pixels at a time, in place: loops of three channels are ten times as slow.
        mean, scale = _mean_and_scale(self, views.device, views.shape[-2])
        rows = views.reshape(*views.shape[:-2], -1).float()
        return rows.sub_(mean).mul_(scale).view(views.shape).movedim(-1, 1)


NORMALISATIONS: dict[str, Normalisation] = {
    "imagenet": Normalisation(IMAGENET_MEAN, IMAGENET_STD, 1.0),
    "kinetics": Normalisation((114.7748, 107.7354, 99.4750), (1.0, 1.0, 1.0), 255.0),
}
"""The normalisations by input scale.

``imagenet``: that of torchvision's weights, and of networks that start from fresh parameters.
``kinetics``: that of the 3D-ResNets which Hara et al. released for Kinetics-400 in 2017 (0 to 255
minus the mean of ActivityNet, no division; https://github.com/kenshohara/3D-ResNets-PyTorch, branch
CVPR2018, ``mean.py`` and the defaults of ``opts.py``).
"""


@functools.lru_cache(64)
def _mean_and_scale(
    normalisation: Normalisation, device: torch.device, width: int
) -> tuple[Tensor, Tensor]:
    """For rows of ``width`` pixels; kept, as a copy to a GPU would wait for the step before."""
    unit = 255 / normalisation.maximum
    with torch.inference_mode(False):
        mean = torch.tensor(normalisation.mean, device=device) * unit
        scale = 1 / (torch.tensor(normalisation.std, device=device) * unit)
        return mean.repeat(width), scale.repeat(width)
