"""Views in a local folder, so that a training decodes each file once.

One file holds the views of one target under one policy as rows of equal size: row
``seed * N + sample`` of N samples is a tag of 24 bytes and the bytes of the view. A tag holds the
CRC-32 of the view, whether the row was written, and size and time of change of the sample's file.
A row counts only if all of them are right, so a row that is torn, damaged or older than its file is
made again, and processes may write the same row at once. Nothing else is read from the folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import BadImage, InputError
from sskt.teacher_cache.format.spec import digest_of
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.storage.locks import file_lock
from sskt.teacher_cache.storage.regular_files import require_regular
from sskt.teacher_cache.targets.files.file_index import measure
from sskt.teacher_cache.targets.packed.samples import PackedImages
from sskt.teacher_cache.views.mixing import Mixed, mixes
from sskt.teacher_cache.views.views import DecodedViews, Views, check_of, checks_of

Int64 = NDArray[np.int64]

DEFAULT_GIB = 50.0
"""Default size of the folder."""
ENDING = ".views"
LAYOUT = 1
"""Version of the layout of the file."""
WRITTEN = 1
TOGETHER_BYTES = 64 * 2**20
"""Bytes of the views that one decoding makes ahead for other seeds, at most."""
_TAG = np.dtype([("check", "<u4"), ("written", "<u4"), ("bytes", "<i8"), ("changed", "<i8")])
_log = logging.getLogger("sskt")


@dataclass(frozen=True)
class CachedViews:
    """Views of several samples under several seeds.

    Attributes:
        rows: The samples that could be read, int64 ``[n]``.
        views: Their views by seed: uint8 ``[n, H, W, 3]``, or ``[n, D, H, W, 3]`` for clips.
        checks: Their view checks by seed: uint32 ``[n]``.
        bad: The other samples, each with the reason.
        failure: Why a view could not be stored; empty if none was refused.
        mixed: What the views of a seed were mixed with; empty under a policy that mixes none.
    """

    rows: Int64
    views: dict[int, UInt8]
    checks: dict[int, NDArray[np.uint32]]
    bad: list[tuple[int, str]]
    failure: str = ""
    mixed: dict[int, Mixed] = field(default_factory=dict)


class ViewCache:
    """The stored views of one target under one policy; ``open_view_cache`` makes it.

    Loader processes and several trainings may use the same file at once.

    Args:
        views: The target under its policy.
        path: The file of the views.
        shape: Shape of a view.
        seeds: View seeds of the training.
        rows: Rows that the file may have.
    """

    def __init__(
        self, views: Views, path: Path, shape: tuple[int, ...], seeds: int, rows: int
    ) -> None:
        self._views, self.path, self._shape, self._rows = views, path, shape, rows
        self._stride = _TAG.itemsize + int(np.prod(shape))
        samples = len(views.target)
        self._seeds = range(min(seeds, -(-rows // max(1, samples))))
        self._storing, self._filled = True, False
        self._handle = -1

    def __getstate__(self) -> dict[str, Any]:
        """Each process opens the file for itself."""
        return vars(self) | {"_handle": -1}

    def stop(self, failure: str) -> None:
        """Stores no further views, and says so once.

        Args:
            failure: Why.
        """
        if self._storing:
            self._storing = False
            _log.warning(
                "%s: %s: no further views are stored, and those that are not are decoded in each "
                "epoch; make room, or name another --view-cache",
                self.path.parent,
                failure,
            )

    def filled(self) -> None:
        """Takes note that every sample was read once, so that its views are stored."""
        self._filled = True

    def holds(self, seed: int) -> bool:
        """Whether all views of a seed are likely to be stored; those that are not are made."""
        return self._filled and self._storing and self._rows >= (seed + 1) * len(self._views.target)

    def seen(self, samples: Int64, seeds: Sequence[int]) -> CachedViews | None:
        """Reads the views of several samples, and makes and stores those that are missing.

        A sample that is decoded gets its views under the other seeds of the training too.

        Args:
            samples: int64 ``[n]``.
            seeds: View seeds.

        Returns:
            The views; None if one has another shape than the first view of the target.

        Raises:
            MissingData: If a file cannot be opened.
        """
        own = self._unmixed(samples, seeds)
        if own is None or not mixes(self._views.policy):
            return own

        def read(rows: Int64, seed: int) -> DecodedViews:
            found = self._unmixed(rows, [seed])
            if found is None:
                return self._views.unmixed(rows, [seed])
            return DecodedViews(found.rows, found.views, found.bad)

        found = self._views.mix(DecodedViews(own.rows, own.views, own.bad), read)
        checks = {seed: checks_of(views) for seed, views in found.views.items()}
        return replace(own, views=found.views, checks=checks, mixed=found.mixed)

    def _unmixed(self, samples: Int64, seeds: Sequence[int]) -> CachedViews | None:
        """The samples' own views. What is stored depends on one file each, also of mixed views."""
        views = {seed: np.empty((len(samples), *self._shape), np.uint8) for seed in seeds}
        checks = {seed: np.zeros(len(samples), np.uint32) for seed in seeds}
        there = np.ones(len(samples), np.bool_)
        bad: list[tuple[int, str]] = []
        failure = ""
        for i, sample in enumerate(samples.tolist()):
            tag = self._tag_of(sample)
            missing = []
            for seed in seeds:
                check = self._read(seed, sample, tag, views[seed][i])
                if check is None:
                    missing.append(seed)
                else:
                    checks[seed][i] = check
            if not missing:
                continue
            ahead = self._lacking(missing[0], sample, tag)
            made = self._views.unmixed(np.array([sample]), list(dict.fromkeys((*missing, *ahead))))
            if made.bad:
                bad += made.bad
                there[i] = False
                continue
            if any(some.shape[1:] != self._shape for some in made.views.values()):
                return None
            for seed in missing:
                views[seed][i] = made.views[seed][0]
                checks[seed][i] = check_of(views[seed][i])
            failure = failure or self._store(made, sample, tag)
        if bad:
            samples = samples[there]
            views = {seed: some[there] for seed, some in views.items()}
            checks = {seed: some[there] for seed, some in checks.items()}
        return CachedViews(samples, views, checks, bad, failure)

    def _tag_of(self, sample: int) -> NDArray[Any]:
        """The tag of a sample's rows, without the check of the view."""
        target, tag = self._views.target, np.zeros((), _TAG)
        tag["written"] = WRITTEN
        if target.paths is not None:  # the identity of own datasets covers their pixels
            tag["bytes"], tag["changed"] = measure(target.paths[sample])
        elif isinstance(target.reader, PackedImages):
            tag["bytes"], tag["changed"] = target.reader.stamp(sample)
        return tag

    def _place(self, seed: int, sample: int) -> int | None:
        """Where the row of a view begins; None if the file has no room for it."""
        row = seed * len(self._views.target) + sample
        return row * self._stride if seed in self._seeds and row < self._rows else None

    def _file(self) -> int:
        if self._handle < 0:
            self._handle = _open(self.path)
            weakref.finalize(self, os.close, self._handle)
        return self._handle

    def _read(self, seed: int, sample: int, tag: NDArray[Any], out: UInt8) -> int | None:
        """Reads a view into ``out``. Returns its check; None if it is not there."""
        place = self._place(seed, sample)
        if place is None:
            return None
        found = np.zeros((), _TAG)
        try:
            got = os.preadv(self._file(), [_bytes(found), _bytes(out)], place)
        except OSError:
            return None
        expected, check = tag.copy(), check_of(out)
        expected["check"] = check
        return check if got == self._stride and found == expected else None

    def _lacking(self, seed: int, sample: int, tag: NDArray[Any]) -> list[int]:
        """The other seeds whose view of a sample can be stored and is not there, next ones first.

        Whether their bytes are right turns out when they are read.
        """
        if not self._storing:
            return []
        lacking, count = [], len(self._seeds)
        for other in ((seed + i) % count for i in range(1, count + 1)):
            place = self._place(other, sample)
            if other == seed or place is None:
                continue
            found = np.zeros((), _TAG)
            with contextlib.suppress(OSError):
                os.preadv(self._file(), [_bytes(found)], place)
            found["check"] = tag["check"]
            if found != tag:
                lacking.append(other)
        return lacking[: TOGETHER_BYTES // self._stride]

    def _store(self, made: DecodedViews, sample: int, tag: NDArray[Any]) -> str:
        """Stores the views of one sample. Returns why not; empty if they are stored."""
        for seed, (view,) in made.views.items():
            place = self._place(seed, sample) if self._storing else None
            if place is None:
                continue
            row = tag.copy()
            row["check"] = check_of(view)
            try:
                written = os.pwritev(self._file(), [_bytes(row), _bytes(view)], place)
                if written < self._stride:  # the rest says why
                    rest = (row.tobytes() + view.tobytes())[written:]
                    os.pwrite(self._file(), rest, place + written)
            except OSError as error:
                return error.strerror or str(error)
        return ""


def open_view_cache(
    folder: Path | None, gibibytes: float, views: Views, seeds: int
) -> ViewCache | None:
    """Opens the views of a target in a folder.

    The file that holds them is as long as its share of the folder from the beginning, and takes
    no room on the disk for rows that are not written. Its name is a digest of target and policy.

    Args:
        folder: The folder, which is created if it does not exist; or None.
        gibibytes: Size of all views in the folder, of other targets and policies too.
        views: The target under its policy.
        seeds: View seeds of the training: seed s is in ``range(seeds)``.

    Returns:
        The cache; None without a folder, for images in RAM, and if no sample can be read.

    Raises:
        InputError: If the folder cannot be used.
    """
    if folder is None:
        return None
    shape = _view_shape(views)
    if shape is None:
        return None
    identity = views.identity()
    del identity["f_s"]  # it chooses among the frames of a view
    record = {"layout": LAYOUT, "target": views.target.identity(), "views": identity}
    record |= {"shape": list(shape)}
    path = folder / f"{digest_of(record)[:32]}{ENDING}"
    stride, samples = _TAG.itemsize + int(np.prod(shape)), len(views.target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / "lock"):
            room = int(gibibytes * 2**30) - _bytes_of_others(path)
            rows = max(0, min(room // stride, samples * seeds))
            handle = _open(path)
            try:
                # Another training may use more seeds of the same views.
                size = max(os.fstat(handle).st_size, rows * stride)
                os.ftruncate(handle, max(0, min(size, room)))
            finally:
                os.close(handle)
            text = json.dumps(record, indent=1)
            durable_write(path.with_suffix(".json"), f"{text}\n".encode())
    except OSError as error:
        raise InputError(
            f"cannot keep views in {folder}: {error.strerror or error}; name a folder that can be "
            "written as --view-cache"
        ) from error
    if rows < samples * seeds:
        _log.warning(
            "%s: --view-cache-size %g (GiB) has room for %s views of %s %s, of which there are %s "
            "under each view seed; the others are decoded in each epoch",
            folder,
            gibibytes,
            f"{rows:,}",
            views.target.name,
            views.target.split,
            f"{samples:,}",
        )
    return ViewCache(views, path, shape, seeds, rows)


def _view_shape(views: Views) -> tuple[int, ...] | None:
    """The shape of a view; None for images in RAM, and if no sample can be read."""
    target, parameters = views.target, views.policy.parameters
    if target.images is not None:
        return None
    if views.policy.own is None and "size" in parameters:
        size = int(parameters["size"])
        return (*([int(parameters["frames"])] if target.clips else []), size, size, 3)
    for sample in range(len(target)):
        with contextlib.suppress(BadImage):
            return views[sample, 0].shape
    return None


def _bytes_of_others(path: Path) -> int:
    """Bytes of the other files of views in the folder, as long as they may become."""
    return sum(
        other.stat().st_size
        for other in path.parent.iterdir()
        if other.suffix == ENDING and other.name != path.name
    )


def _open(path: Path) -> int:
    """Opens the file of the views. Raises ``OSError`` if something else is in its place."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    handle = os.open(path, flags, 0o644)
    try:
        require_regular(handle, path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _bytes(values: NDArray[Any]) -> memoryview:
    """The memory of an array. One that is not contiguous has none to read into."""
    return np.atleast_1d(values).view(np.uint8).reshape(-1).data
