"""Regions of JPEG files, decoded by nvimgcodec where it is installed.

It skips the inverse DCT and the conversion of colours outside the region, and does not read on
below it. So it does not see damage there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""
BoxOf = Callable[[int, int], Box]
"""Chooses the box that is wanted by the height and the width of an image."""

SPARED_PIXELS = 25_000
"""Pixels outside a region below which the whole image is decoded in less time."""
LEAST_COLUMNS = 16
"""The chroma of narrower regions is upsampled otherwise than that of the whole image."""


def decode_region(data: bytes, box: Box, pixels: int) -> UInt8 | None:
    """Decodes a region of a JPEG file of the colours YCbCr or grey.

    Args:
        data: Content of the file.
        box: The region, which lies within the image.
        pixels: Pixels of the image.

    Returns:
        RGB, uint8 ``[height, width, 3]``, the pixels of the whole image there; None if the whole
        image has to be decoded: it takes less time, or nvimgcodec is not installed or refuses it.
    """
    _, _, height, width = box
    if pixels - height * width < SPARED_PIXELS or width < LEAST_COLUMNS:
        return None
    decode = decoder_of_this_thread()
    if decode is None:
        return None
    try:
        found = decode(data, box)
    except Exception:  # the whole image tells what is wrong with it
        return None
    return found if found.shape == (height, width, 3) else None


def decoder_of_this_thread() -> Callable[[bytes, Box], UInt8] | None:
    """What decodes a region of a JPEG file; None if nvimgcodec is not installed."""
    return _decoder(os.getpid(), threading.get_ident())


@functools.cache
def _decoder(process: int, thread: int) -> Callable[[bytes, Box], UInt8] | None:
    """A decoder of its own for each: one that a forked process inherits is its parent's."""
    codec = _library()
    if codec is None:
        return None
    decoder = codec.Decoder(
        device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[codec.Backend(codec.CPU_ONLY)],
    )
    parameters = codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.SRGB)

    def decode(data: bytes, box: Box) -> UInt8:
        top, left, height, width = box
        region = codec.Region(top, left, top + height, left + width)
        stream = codec.CodeStream(data).get_sub_code_stream(region=region)
        pixels: UInt8 = np.asarray(decoder.decode(stream, params=parameters))
        return pixels

    return decode


@functools.cache
def _library() -> Any:
    """The module ``nvidia.nvimgcodec`` with its JPEG decoder only; None if it is not installed.

    Its other parts complain on stderr that there is no CUDA, and decode what libjpeg-turbo refuses.
    """
    try:
        found = importlib.util.find_spec("nvidia.nvimgcodec")
    except ModuleNotFoundError:
        found = None
    if found is None or not found.submodule_search_locations:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for part in Path(found.submodule_search_locations[0], "extensions").glob("libjpeg_turbo*"):
            (Path(folder) / part.name).symlink_to(part)
        settings = {"NVIMGCODEC_EXTENSIONS_PATH": folder, "PYNVIMGCODEC_VERBOSITY": "0"}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            return importlib.import_module("nvidia.nvimgcodec")
        except ImportError:  # it is not for this machine
            return None
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
