"""Made clips, and a policy for them."""

from __future__ import annotations

import numpy as np

from sskt.teacher_cache.media.images import UInt8

SMALL = "clip-corner-crop-flip:frames=4,size=20"


def pattern(frames: int, height: int, width: int) -> UInt8:
    """Frames from arithmetic, no two alike: uint8 ``[frames, height, width, 3]``."""
    i = np.arange(frames * height * width * 3, dtype=np.int64)
    return ((i * i * 7 + i // 5 * 13) % 251).astype(np.uint8).reshape(frames, height, width, 3)
