"""Clips to uint8 frames, decoded in sequence, by one path, so that teacher and trainer agree.

Fetching a frame by its index gives another frame, without an error, where a clip has B-frames
(decord, decord2 and torchcodec do so). Nothing here seeks: frame k is the k-th frame that comes
out of the decoder, and a clip is as long as the number of frames that come out.

A clip is a video file, or a folder of extracted frames ``image_00001.jpg``, ``image_00002.jpg``,
... (or from ``image_00000.jpg`` on) with an optional file ``n_frames`` that holds their number.
"""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sskt.teacher_cache.errors import BadClip, BadImage, MissingData, UnknownName, first_line
from sskt.teacher_cache.media.containers import cut_off, is_whole_avi
from sskt.teacher_cache.media.images import UInt8, read_image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DECODERS = ("pyav", "decord")

VIDEO_EXTENSIONS = frozenset(
    (".avi", ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts")
) | {".flv", ".wmv", ".ogv"}

# Whatever a file pretends to be, nothing else is opened: FFmpeg also reads single images, text,
# and playlists that name other files and addresses.
_CONTAINERS = "avi,mov,matroska,mpeg,mpegts,mpegvideo,flv,asf,ogg,m4v"
_MOST_PIXELS = 1 << 26  # twice 8K; a damaged header may ask for gigabytes

# What PyAV raises over damaged files besides its own: Python's errors, where numbers make no sense.
_PYTHONS = (OSError, ValueError, RuntimeError, LookupError, ArithmeticError, MemoryError)

_B, _MOST_WAITING = 3, 16  # AV_PICTURE_TYPE_B; the most frames that h264 may reorder

# SWS_BILINEAR | SWS_ACCURATE_RND | SWS_BITEXACT: without the last two, which PyAV names from 18 on,
# the bytes depend on the processor's instructions.
_EXACT = 0x2 | 0x40000 | 0x80000

_INSTEAD = "take --decoder pyav"

_FRAME_FILE = re.compile(r"image_(\d{5,})\.jpg")

_Still = Callable[[], UInt8]
"""A decoded frame: called, it becomes RGB."""


@dataclass(frozen=True)
class Counted:
    """What sequential decoding of a whole clip found."""

    frames: int  # that can be decoded, up to the first fault
    header: int  # the container's own count, 0 if it has none
    problem: str = ""  # why the clip is damaged, in one line


class _Fault(Exception):
    """Why a clip gives no further frames."""


def is_frame_folder(path: Path) -> bool:
    """Whether ``path`` is a folder of extracted frames, be it complete or not.

    Raises ``MissingData`` for a folder that cannot be listed.
    """
    if not path.is_dir():
        return False
    try:
        with os.scandir(path) as entries:  # which ends at the first, unlike listing them all
            return any(_FRAME_FILE.fullmatch(e.name) or e.name == "n_frames" for e in entries)
    except OSError as error:
        raise _missing(path, error) from error


def count_frames(path: Path, decoder: str = "pyav") -> Counted:
    """Decodes the whole clip, in one thread, and counts its frames.

    A header may promise one frame more than there is, as all of HMDB51's do. mp4 and mov files
    count without what their edit list cuts away, AVI files without empty chunks. PyAV counts in
    every case, since decord sees neither the header nor damage; with ``decoder="decord"`` it is a
    problem if decord does not give the same number. A change of the image's size is a problem: a
    clip has one size. A file without a count (mpg, ts, flv) that ends early between two frames
    cannot be told from a shorter one.

    Of a folder, the frames are the consecutive images from ``image_00001.jpg`` (or
    ``image_00000.jpg``) on, which must all decode to one size, and the header is ``n_frames``.

    Raises ``MissingData`` for a file that is absent or cannot be opened, never for a damaged one.
    """
    _check(decoder)
    if _is_folder(path):
        return _count_folder(path)
    counted = _count_file(path)
    if decoder == "decord" and not counted.problem:
        found, fault = 0, ""
        try:
            with _by_decord(path) as stills:
                for _ in stills:
                    found += 1
        except _Fault as error:
            fault = f", {error}"
        if found != counted.frames:
            return replace(counted, problem=f"decord decodes {found}{fault}: {_INSTEAD}")
    return counted


def read_frames(path: Path, wanted: Sequence[int], decoder: str = "pyav") -> dict[int, UInt8]:
    """The wanted frames of a clip by number, in order: uint8 ``[H, W, 3]`` RGB, C-contiguous.

    Numbers count from 0 in the order in which the decoder puts frames out, which is the order of
    display. All frames up to the last wanted one are decoded, in one thread (loader workers are
    processes); the wanted ones become RGB. PyAV's conversion gives the same bytes whatever
    instructions the processor has; decord's differs from it by about a level. Rotation metadata
    is not applied; decord would apply it, so it is not given such clips.

    The file is opened and closed within the call: forked workers and threads may call this.

    Raises ``BadClip`` naming a clip that lacks a wanted frame, is damaged before the last of them,
    or changes its size; ``MissingData`` if it cannot be opened, or if decord is not installed.
    decord does not notice damage inside frames, so count first.
    """
    _check(decoder)
    numbers = sorted({int(number) for number in wanted})
    if not numbers:
        return {}
    if numbers[0] < 0:
        raise ValueError(f"frame numbers count from 0, got {numbers[0]}")
    if _is_folder(path):
        return _read_folder(path, numbers)
    try:
        with _by_decord(path) if decoder == "decord" else _by_pyav(path) as stills:
            return _pick(stills, numbers)
    except _Fault as fault:
        found = _count_file(path)
        why = found.problem or str(fault)
        if numbers[-1] < found.frames:  # PyAV can
            why = f"{fault}: {_INSTEAD}"
        raise _bad_clip(path, numbers[-1], found, why) from fault


def _is_folder(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _missing(path, error) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise MissingData(f"cannot open clip {path}: expected a file or a folder of frames")
    return stat.S_ISDIR(mode)


def _missing(path: Path, error: OSError) -> MissingData:
    return MissingData(f"cannot open clip {path}: {error.strerror or error}")


def _check(decoder: str) -> None:
    if decoder not in DECODERS:
        raise UnknownName("decoder", decoder, DECODERS)


def _pick(stills: Iterator[_Still], numbers: Sequence[int]) -> dict[int, UInt8]:
    wanted, picked = set(numbers), {}
    for number, still in enumerate(stills):
        if number in wanted:
            picked[number] = still()
            if number == numbers[-1]:
                return picked
    raise _Fault("no such frame")


def _bad_clip(path: Path, wanted: int, found: Counted, why: str) -> BadClip:
    header = f", its header says {found.header}" if found.header else ""
    return BadClip(
        f"cannot read frame {wanted} of clip {path}: {found.frames} frames decode{header} ({why}); "
        "replace the file, or leave it out with --on-error skip"
    )


# --- video files -------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream, int]]:
    """The container, its best video stream, and the number of frames that it promises (or 0).

    What PyAV raises in the body becomes ``_Fault``.
    """
    import av
    from av.codec.context import ThreadType

    options: dict[str, Any] = {"container_options": {"format_whitelist": _CONTAINERS}}
    if int(av.__version__.partition(".")[0]) < 19:  # later versions never decode strictly
        options["metadata_errors"] = "ignore"
    try:
        # with a scheme and absolute, so that no name is taken for an address
        name = f"file:{path.absolute()}"
        container = av.open(name, "r", **options)
    except (*_PYTHONS, av.FFmpegError) as error:
        raise _Fault(f"no video that can be opened: {_text(error)}") from error
    with container:
        try:
            stream = container.streams.best("video")
            # PyAV 18.0 ends the process where a stream without a context is decoded (its #2344)
            if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
                raise _Fault("no video that can be decoded")
            stream.codec_context.thread_type = ThreadType.NONE
            stream.codec_context.thread_count = 1
            yield container, stream, _promised(path, container, stream)
        except (*_PYTHONS, av.FFmpegError) as error:
            raise _Fault(_text(error)) from error


def _text(error: Exception) -> str:
    return getattr(error, "strerror", "") or first_line(error)


def _decoded(container: InputContainer, stream: VideoStream, promised: int) -> Iterator[VideoFrame]:
    """All frames in order; ``_Fault`` at the first that is not whole or has another size.

    A frame waits until a later one that is no B-frame came out of a later packet: B-frames take
    from the frame behind them, and the last packet of a file that ends early may be cut without
    the decoder noticing.
    """
    waiting: deque[VideoFrame] = deque()
    first: tuple[int, int] | None = None
    given = 0
    for packet in container.demux(stream):
        for frame in packet.decode():
            size = frame.width, frame.height
            first = first or size
            if size != first:
                raise _Fault(f"{size[0]}x{size[1]} pixels after {first[0]}x{first[1]}")
            if size[0] * size[1] > _MOST_PIXELS:
                raise _Fault(f"{size[0]}x{size[1]} pixels are more than {_MOST_PIXELS}")
            if frame.is_corrupt:
                raise _Fault("the next decodes with errors")
            free = len(waiting) if packet.size and frame.pict_type != _B else 0
            for _ in range(max(free, len(waiting) - _MOST_WAITING)):
                yield waiting.popleft()
                given += 1
            waiting.append(frame)
    if promised - given - len(waiting) > 1:
        raise _Fault("it ends early")
    yield from waiting


@contextmanager
def _by_pyav(path: Path) -> Iterator[Iterator[_Still]]:
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()

    def still(frame: VideoFrame) -> UInt8:
        rgb = reformatter.reformat(frame, format="rgb24", interpolation=_EXACT, threads=1)
        return np.ascontiguousarray(rgb.to_ndarray(), np.uint8)

    with _opened(path) as opened:
        yield (partial(still, frame) for frame in _decoded(*opened))


@contextmanager
def _by_decord(path: Path) -> Iterator[Iterator[_Still]]:
    try:
        import decord
    except ImportError as error:
        raise MissingData(f"decord needs: pip install decord; or {_INSTEAD}") from error
    # PyAV looks first: decord opens anything, and turns what has rotation metadata
    with _opened(path) as opened:
        if any(frame.rotation for frame in islice(_decoded(*opened), 1)):
            raise _Fault("it has rotation metadata, which decord applies")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        name = str(path.absolute())  # no file object: decord ends the process seeking in one
        # where frames are missing decord repeats the one before; this tolerance forbids it
        reader = decord.VideoReader(name, num_threads=1, fault_tol=1e-9)
        yield _decord_stills(reader)
    except decord.DECORDLimitReachedError as error:
        raise _Fault("no such frame") from error
    except UnicodeEncodeError as error:
        raise _Fault("decord opens only names in UTF-8") from error
    except (decord.DECORDError, AssertionError, *_PYTHONS) as error:
        text = re.sub(r"^\[[\d:]+\] \S+: (\[.*\])?", "", _text(error))
        raise _Fault(f"decord says: {text}") from error


def _decord_stills(reader: Any) -> Iterator[_Still]:
    while True:
        try:
            frame = reader.next()
        except StopIteration:
            return
        yield frame.asnumpy


def _count_file(path: Path) -> Counted:
    frames = header = 0
    problem = ""
    try:
        with _opened(path) as opened:
            *_, header = opened
            for _ in _decoded(*opened):
                frames += 1
    except _Fault as fault:
        _read_through(path)
        problem = str(fault)
    if header - frames > 1 or cut_off(path):
        problem = f"truncated or damaged{problem and f': {problem}'}"
    elif not frames and not problem:
        problem = "no frame can be decoded"
    return Counted(frames, header, problem)


def _read_through(path: Path) -> None:
    """Raises ``MissingData`` if the disk fails, which FFmpeg does not tell from damage."""
    try:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        raise _missing(path, error) from error


def _promised(path: Path, container: InputContainer, stream: VideoStream) -> int:
    """The frames that the header counts, without those that the index shows not to exist.

    Those are the frames that the edit list of an mp4 or mov file cuts away, and the empty chunks
    of an AVI file: dropped frames, and those that an encoder with B-frames puts in front.
    """
    formats, indexed = container.format.name.split(","), stream.frames
    if "mov" in formats:
        indexed = sum(not entry.is_discard for entry in stream.index_entries)
    elif "avi" in formats and len(stream.index_entries) and is_whole_avi(path):
        indexed = sum(entry.size > 0 for entry in stream.index_entries)
    return min(stream.frames, indexed)


# --- folders of frames -------------------------------------------------------------------------


def _frame_name(number: int) -> str:
    return f"image_{number:05d}.jpg"


def _first(folder: Path) -> int:
    """The number of the first frame in the names: 1, or 0 if there is such a file."""
    return 0 if (folder / _frame_name(0)).exists() else 1


def _count_folder(folder: Path) -> Counted:
    try:
        names = {entry.name for entry in folder.iterdir()}
        text = (folder / "n_frames").read_bytes().strip() if "n_frames" in names else b"0"
    except OSError as error:
        raise _missing(folder, error) from error
    frames, first = 0, 1 - (_frame_name(0) in names)
    while _frame_name(first + frames) in names:
        frames += 1
    if not text.isdigit():
        return Counted(frames, 0, f"n_frames holds {ascii(text[:20])[1:]}, expected a number")
    header = int(text[:20])
    if header > frames or frames < sum(bool(_FRAME_FILE.fullmatch(name)) for name in names):
        return Counted(frames, header, f"{_frame_name(first + frames)} is missing")
    return _all_decode(folder, first, Counted(frames, header, "" if frames else "no frames"))


def _all_decode(folder: Path, first: int, counted: Counted) -> Counted:
    """Looked at here, so that a clip is damaged whichever of its frames are seen later."""
    sizes = set()
    for number in range(counted.frames):
        name = _frame_name(first + number)
        try:
            sizes.add(read_image(folder / name).shape)
        except BadImage:
            return replace(counted, frames=number, problem=f"{name} cannot be decoded")
        if len(sizes) > 1:
            return replace(counted, frames=number, problem=f"{name} has another size")
    return counted


def _read_folder(folder: Path, numbers: Sequence[int]) -> dict[int, UInt8]:
    picked: dict[int, UInt8] = {}
    first = _first(folder)
    for number in numbers:
        file = folder / _frame_name(first + number)
        try:
            picked[number] = read_image(file)
        except BadImage as error:
            raise BadClip(str(error)) from error
        except MissingData as error:
            if file.exists():
                raise
            raise _bad_clip(folder, number, _count_folder(folder), f"no {file.name}") from error
        if picked[number].shape != picked[numbers[0]].shape:
            size = "x".join(map(str, picked[number].shape[1::-1]))
            why = f"{file.name} is of {size} pixels, not as the others"
            raise _bad_clip(folder, number, _count_folder(folder), why)
    return picked
