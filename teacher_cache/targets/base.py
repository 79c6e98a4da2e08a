"""A target's samples: images or clips in a fixed order, with stable ids."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import BadClip, InputError
from sskt.teacher_cache.media.images import UInt8, cut, read_image
from sskt.teacher_cache.media.regions import BoxOf

Int64 = NDArray[np.int64]


class Names(Sequence[str]):
    """Many strings in two arrays: a million ids cost their bytes, and forked workers share them."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._text = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        text, start = self._text.data, 0
        for end in self._ends.tolist():
            yield str(text[start:end], "utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Names({list(self[:3])}{'...' if len(self) > 3 else ''})"


@dataclass(frozen=True)
class Files(Sequence[Path]):
    """Paths as names under a folder."""

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self.folder / name for name in self.names[index]]
        return self.folder / self.names[index]

    def text(self, index: int) -> str:
        """A path as text, for which no ``Path`` is made: a tenth of the time."""
        return os.path.join(self.folder, self.names[index])  # noqa: PTH118 (it makes a Path)

    def __iter__(self) -> Iterator[Path]:
        return (self.folder / name for name in self.names)


class SampleReader(Protocol):
    """Reads the images of an own dataset."""

    def __call__(self, sample: int, box_of: BoxOf | None = None) -> UInt8:
        """An image, or the box of it that is chosen: uint8 ``[H, W, 3]``. Raises ``BadImage``."""

    def chosen(self, rows: Int64) -> SampleReader:
        """A reader of the samples ``rows``, in that order."""


@dataclass(frozen=True)
class Target:
    """One split of a dataset, its samples in a fixed order. ``sskt.open_target`` makes it.

    Sample i is row i of every label set over it. Exactly one of ``images``, ``paths`` and
    ``reader`` is given.

    Attributes:
        name: Name in the cache.
        split: Name of the split.
        classes: Names of the classes.
        labels: int64 ``[N]``, index into ``classes``, -1 if none is known; or, if a sample may
            have several classes, int64 ``[N, C]``: 1 present, 0 absent, -1 present only as
            difficult objects.
        ids: A name for each sample, no two alike.
        images: Images in RAM, uint8 ``[N, H, W, 3]`` RGB.
        paths: The file, or the folder of frames, of each sample.
        sizes: Bytes of each file, int64 ``[N]``.
        decoder: Decoder of clips, ``pyav`` or ``decord``; empty for images.
        frames: Decodable frames of each clip, int64 ``[N]``, once they are counted.
        starts: First frame of each sample, int64 ``[N]``, if clips were cut into windows.
        window: Frames of a window.
        damaged: What is wrong with a clip, by sample.
        contents: Hash of the contents of all files, if it is part of the identity.
        reader: Reads the images of an own dataset.
        policy: Default view policy; empty for that of the name.
        provenance: What opens the target again, for the provenance of a label set.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    labels: Int64
    ids: Sequence[str]
    images: UInt8 | None = None
    paths: Sequence[Path] | None = None
    sizes: Int64 | None = None
    decoder: str = ""
    frames: Int64 | None = None
    starts: Int64 | None = None
    window: int = 0
    damaged: Mapping[int, str] = field(default_factory=dict)
    contents: str = ""
    reader: SampleReader | None = None
    policy: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def clips(self) -> bool:
        """Whether samples are clips rather than images."""
        return bool(self.decoder)

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have several classes."""
        return self.labels.ndim == 2

    def read(self, sample: int, box_of: BoxOf | None = None) -> UInt8:
        """Reads the image of a sample.

        Args:
            sample: Number of the sample.
            box_of: Chooses a box of the image by its height and width: (top, left, height, width).
                Damage of a JPEG file outside the box may pass unnoticed. Default: all of it.

        Returns:
            RGB, uint8 ``[H, W, 3]``.

        Raises:
            BadImage: If it cannot be decoded.
            MissingData: If its file cannot be opened.
        """
        if self.images is not None:
            return cut(self.images[sample], box_of)
        if self.reader is not None:
            return self.reader(sample, box_of)
        assert self.paths is not None and not self.clips
        paths = self.paths
        return read_image(paths.text(sample) if isinstance(paths, Files) else paths[sample], box_of)

    def read_frames(self, sample: int, wanted: Sequence[int]) -> dict[int, UInt8]:
        """Reads frames of a clip.

        Args:
            sample: Number of the sample.
            wanted: Numbers of the frames in the file, from 0.

        Returns:
            RGB frames by number, uint8 ``[H, W, 3]`` each.

        Raises:
            BadClip: If the file is damaged.
            MissingData: If it cannot be opened.
        """
        from sskt.teacher_cache.media.video import read_frames

        assert self.paths is not None and self.clips
        if sample in self.damaged:
            raise BadClip(self.damaged[sample])
        return read_frames(self.paths[sample], wanted, self.decoder)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ordered ids and, for files, their sizes; for arrays, the pixels."""
        digest = hashlib.sha256()
        for i, sample in enumerate(self.ids):
            size = 0 if self.sizes is None else int(self.sizes[i])
            digest.update(f"{sample}\0{size}\n".encode("utf-8", "surrogateescape"))
        if self.paths is None and self.reader is None and self.images is not None:
            digest.update(repr(self.images.shape).encode())
            digest.update(np.ascontiguousarray(self.images).data)
        return f"sha256:{digest.hexdigest()}"

    def identity(self) -> dict[str, str | int]:
        """The part of a label set's spec that names this split."""
        identity: dict[str, str | int] = {
            "name": self.name,
            "split": self.split,
            "size": len(self),
            "fingerprint": self.fingerprint,
        }
        return identity | ({"contents": self.contents} if self.contents else {})

    def label_text(self, sample: int) -> str | None:
        """The class of a sample in words.

        Args:
            sample: Number of the sample.

        Returns:
            The name of the class, or of several; those of difficult objects in brackets; None if
            no class is known.
        """
        if not self.multi_label:
            label = int(self.labels[sample])
            return self.classes[label] if label >= 0 else None
        marks = {1: "{}", -1: "({})"}
        row = zip(self.classes, self.labels[sample].tolist(), strict=True)
        return ", ".join(marks[mark].format(name) for name, mark in row if mark) or None

    def limited(self, limit: int | None) -> Target:
        """Takes some of the samples, evenly over the classes and over the order in each.

        Args:
            limit: Number of samples; None for all.

        Returns:
            The target with at most so many samples. If a sample may have several classes, they are
            spread over the order only.

        Raises:
            InputError: If the limit is below 1.
        """
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise InputError(f"--limit must be at least 1, found {limit}")
        rows = np.arange(limit, dtype=np.int64) * len(self) // limit
        if not self.multi_label:
            rows = np.sort(np.argsort(self.labels, kind="stable")[rows])
        return self.chosen(rows)

    def chosen(self, rows: Int64) -> Target:
        """Takes the samples ``rows`` (int64 ``[n]``) in that order, as a target of its own."""
        paths = self.paths
        if isinstance(paths, Files):
            paths = Files(paths.folder, Names(paths.names[i] for i in rows.tolist()))
        elif paths is not None:
            paths = tuple(paths[i] for i in rows.tolist())
        return replace(
            self,
            labels=self.labels[rows],
            ids=Names(self.ids[i] for i in rows.tolist()),
            images=None if self.images is None else self.images[rows],
            reader=None if self.reader is None else self.reader.chosen(rows),
            paths=paths,
            sizes=None if self.sizes is None else self.sizes[rows],
            frames=None if self.frames is None else self.frames[rows],
            starts=None if self.starts is None else self.starts[rows],
            damaged={
                i: self.damaged[int(row)] for i, row in enumerate(rows) if int(row) in self.damaged
            },
        )

    def windows(self, frames: int) -> Target:
        """Cuts each clip into windows that do not overlap, as the paper's validation does.

        The last window of a clip may be short: a view repeats its frames. A damaged clip keeps one
        sample, so that it is reported: how many of its frames decode is no part of the format.

        Args:
            frames: Frames of a window.

        Returns:
            The target with the windows as samples. Their ids are ``ID#FIRST_FRAME``.

        Raises:
            InputError: If it was cut into windows of another length before.
        """
        assert self.frames is not None
        if self.starts is not None:
            if self.window != frames:
                raise InputError(
                    f"{self.name} is cut into windows of {self.window} frames; open it again to "
                    f"cut it into windows of {frames}"
                )
            return self
        usable = self.frames.copy()
        usable[list(self.damaged)] = 0
        counts = np.maximum(1, -(-usable // frames))
        rows = np.repeat(np.arange(len(self)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        starts = (np.arange(len(rows)) - first) * frames
        cut = self.chosen(rows)
        pairs = zip(cut.ids, starts.tolist(), strict=True)
        return replace(
            cut, starts=starts, window=frames, ids=Names(f"{name}#{start}" for name, start in pairs)
        )
