"""Images that stay on the device as uint8, and their views made there in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.views.augment import is_strong
from sskt.teacher_cache.views.mixing import mixes
from sskt.teacher_cache.views.policies import crop_words
from sskt.teacher_cache.views.views import Views
from sskt.trainer.data.loader import Batch
from sskt.trainer.data.soft_labels import SHARE

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class ResidentFeed:
    """``Feed`` for images on the device: the very bytes of ``views``, by index arithmetic.

    images: uint8 ``[N, H + 2p, W + 2p, 3]``, padded with zeros by the policy's p.
    """

    views: Views
    images: Tensor

    def __call__(
        self, batches: Sequence[Int64], seed: int, others: Sequence[int] = ()
    ) -> Iterator[Batch]:
        """Batches with views uint8 ``[n, H, W, 3]`` on the device; see ``Feed``."""
        seeds = (seed, *others)
        for samples in batches:
            views = torch.cat([self.seen(samples, each) for each in seeds])
            of_view = np.repeat(seeds, len(samples)) if others else None
            yield Batch(np.tile(samples, len(seeds)), views, None, [], of_view)

    def seen(self, samples: Int64, seed: int) -> Tensor:
        """Views of ``samples`` under ``seed``: uint8 ``[n, H, W, 3]``."""
        device = self.images.device
        rows = torch.from_numpy(samples).to(device, non_blocking=True)
        if self.views.policy.name == "none":
            return self.images[rows]
        tops, lefts, flips = crop_words(self.views.policy, samples, seed)
        padding = int(self.views.policy.parameters["padding"])
        height, width = (n - 2 * padding for n in self.images.shape[1:3])
        # From right to left where the image is flipped.
        first = np.where(flips, lefts + width - 1, lefts)
        step = np.where(flips, -1, 1)
        place = torch.from_numpy(np.stack([tops, first, step])).to(device, non_blocking=True)
        down = place[0, :, None] + torch.arange(height, device=device)
        right = place[1, :, None] + place[2, :, None] * torch.arange(width, device=device)
        return self.images[rows[:, None, None], down[:, :, None], right[:, None, :]]


def resident_feed(views: Views, device: torch.device) -> ResidentFeed | None:
    """The feed, if the images are in RAM, its policy runs on a device, and there is room."""
    images = views.target.images
    if images is None or views.policy.name not in ("none", "pad-crop-flip"):
        return None
    if is_strong(views.policy) or mixes(views.policy):
        return None
    padding = int(views.policy.parameters.get("padding", 0))
    n, height, width, _ = images.shape
    size = n * (height + 2 * padding) * (width + 2 * padding) * 3
    if device.type == "cuda" and size > SHARE * torch.cuda.mem_get_info(device)[0]:
        return None
    held = torch.from_numpy(images).to(device)
    return ResidentFeed(views, F.pad(held, (0, 0, padding, padding, padding, padding)))
