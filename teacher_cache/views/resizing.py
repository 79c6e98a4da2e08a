"""Resizing of uint8 images: one rule in integers for each version of the policies that resize.

``docs/format.md``, section 6, has both rules for an independent reader.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from sskt.teacher_cache.extras import MissingExtra
from sskt.teacher_cache.media.images import UInt8

VERSION = 2
"""Newest version of the policies that resize."""


def resized(image: UInt8, height: int, width: int, version: int, *, flip: bool = False) -> UInt8:
    """Resizes an image by the bilinear filter, antialiased.

    Args:
        image: RGB, uint8 ``[H, W, 3]``; any strides.
        height: Rows of the result.
        width: Columns of the result.
        version: Version of the view policy: 1 resizes by Pillow, 2 by torch.
        flip: Whether to mirror the result left to right.

    Returns:
        uint8 ``[height, width, 3]``; of version 2 in memory of its own.

    Raises:
        MissingExtra: If version 2 is wanted and torch is not installed.
    """
    if version == 1:
        by_pillow = _by_pillow(Image.fromarray(np.ascontiguousarray(image)), height, width)
        return by_pillow[:, ::-1] if flip else by_pillow
    try:  # late, as commands that make no views run without torch
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtra("views of version 2 of a policy", "train") from error
    if image.shape[1] == width == 1 and (len(image), height) != (1, 1):
        # torch's plain kernel takes a column for another order of memory and resizes it wrongly.
        return resized(image.swapaxes(0, 1), width, height, version).swapaxes(0, 1)
    if not image.flags.writeable or min(image.strides) < 0:
        image = image.copy()  # torch takes no other memory
    # In this order the strides are those of channels last, for which torch has its fast kernels.
    # In others its plain kernel resizes to a width of 1 wrongly.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    made = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    if flip:
        made = made.flip(3)
    view: UInt8 = made[0].permute(1, 2, 0).numpy()
    return view


def _by_pillow(image: Image.Image, height: int, width: int) -> UInt8:
    # One axis at a time: which of them Pillow takes first, and so the rounding, depends on its
    # version (before 13.0 always the width, since then on the sizes).
    wide = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return np.asarray(wide.resize((width, height), Image.Resampling.BILINEAR))
