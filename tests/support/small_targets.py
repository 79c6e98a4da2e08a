"""Small targets of each kind, in memory or in files, and a source that labels them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sskt.teacher_cache.targets.base import Names, Target
from support.clips import pattern
from support.helpers import TINY, write_frames

SOURCE = f"tiny={TINY}:build"
TOGETHER, APART = 4.0, 1e-9
"""GiB with which all seeds of these targets share a decoding, and with which none do."""


def in_memory(n: int, height: int = 24, width: int = 24) -> Target:
    images = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8)
    ids = Names(str(i) for i in range(n))
    return Target("made", "train", ("a",), np.zeros(n, np.int64), ids, images=images)


def write_jpegs(folder: Path, n: int) -> Path:
    """JPEGs of many sizes in two classes."""
    rng = np.random.default_rng(n)
    for i in range(n):
        height, width = 20 + i * 7 % 17, 20 + i * 5 % 19
        smooth = rng.integers(0, 256, (3, 4, 3), np.uint8)
        file = folder / "train" / ("one", "two")[i % 2] / f"{i:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC).save(file)
    return folder


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jpegs(tmp_path_factory.mktemp("jpegs") / "jpegs", 22)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    for i in range(8):
        frames = pattern(40, 24, 30)[3 * i :][: 3 + i]
        write_frames(folder / "train" / ("run", "swim")[i % 2] / f"video {i}", frames)
    return folder
