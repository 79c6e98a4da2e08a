"""Soft labels beside the batches: from the store (read ahead) or live from the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.errors import CorruptStore, ViewMismatch
from sskt.teacher_cache.format.encodings import EncodedTensors, as_tensors, soft_labels
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.rng import permutation
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.views.views import Views, check_of

Int64 = NDArray[np.int64]

SHARE = 0.25
"""Part of the device's free memory that labels may take, and pictures as much again."""
STUB = 128
"""A last block of less than this part of a whole one (8,192 samples: 64) joins the one before."""
CHECKED_ROWS = 4
"""Views of each batch that are compared with the checksums the teacher stage stored."""


@dataclass(frozen=True)
class Window:
    """A part of an epoch whose labels are in RAM together: view seed and sample ranges."""

    seed: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def samples(self) -> Int64:
        """Sample ids, range by range."""
        return np.concatenate([np.arange(a, b) for a, b in self.ranges])


def epoch_windows(
    samples: int, view_seed: int, rows: int, block: int, seed: int, epoch: int
) -> list[Window]:
    """The whole epoch if ``rows`` allow it, else shuffled blocks in groups of about ``rows``."""
    stub = samples % block if samples % block < block // STUB else 0
    if rows >= samples or samples - stub <= block:
        return [Window(view_seed, ((0, samples),))]
    # A stub of a block could make a window of its own, too small for a batch.
    count = -(-samples // block) - (stub > 0)
    blocks = permutation(np.arange(count), seed, epoch)
    together = max(1, rows // block)
    groups = [blocks[i : i + together] for i in range(0, len(blocks), together)]
    return [
        Window(
            view_seed,
            tuple(
                (int(b) * block, samples if b == count - 1 else (int(b) + 1) * block) for b in group
            ),
        )
        for group in groups
    ]


class Labels(Protocol):
    """Where soft labels come from."""

    def enter(self, window: Window, following: Window | None) -> NDArray[np.bool_]:
        """Makes a window's labels available; which of its samples to leave out (bool ``[n]``)."""

    def check(self, samples: Int64, views: UInt8) -> int:
        """Compares views with the stored checks; how many were compared."""

    def soft(self, samples: Int64, views: Tensor, temperature: float) -> dict[str, Tensor]:
        """softmax(z_s / T) by source, on the device: float32 ``[n, C_m]``."""

    def close(self) -> None:
        """Ends reading ahead."""


def labels_over(
    views: Views, sets: Mapping[str, LabelSet], live: Sequence[Source], device: torch.device
) -> Labels:
    """The soft labels of views: from ``live`` sources, else from label sets, else none."""
    if live:
        return LiveLabels(live, views)
    return StoredLabels(sets, device) if sets else NoLabels()


@dataclass(frozen=True)
class _Slab:
    encoded: list[EncodedTensors]
    checks: NDArray[np.uint32]
    skipped: NDArray[np.bool_]
    place: Int64


def _checks(label_set: LabelSet, window: Window) -> NDArray[np.uint32]:
    return np.concatenate([label_set.read_checks(window.seed, a, b) for a, b in window.ranges])


class StoredLabels:
    """Slabs of several label sets over the same views, joined; the next one is read ahead.

    Labels stay encoded, on the device where this slab and the next fit there, else in RAM, and
    are decoded on the device a batch at a time.
    """

    def __init__(self, sets: Mapping[str, LabelSet], device: torch.device) -> None:
        self._sets, self._device = dict(sets), device
        row = sum(s.encoding.bytes_per_label(len(s.classes)) for s in sets.values())
        self._rows_there = 0
        if device.type == "cuda":
            self._rows_there = int(SHARE * torch.cuda.mem_get_info(device)[0] / 2 / row)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sskt-labels")
        self._ahead: tuple[Window, Future[_Slab]] | None = None
        self._window: Window | None = None
        self._slab: _Slab | None = None

    def _read(self, window: Window) -> _Slab:
        sets = list(self._sets.values())
        encoded = []
        skipped = np.zeros(len(window.samples), bool)
        for label_set in sets:
            parts = [label_set.read(window.seed, a, b) for a, b in window.ranges]
            rows = {
                key: np.concatenate([p[key] for p in parts]) if len(parts) > 1 else parts[0][key]
                for key in parts[0]
            }
            empty = label_set.encoding.skipped(rows)
            if (empty & (_checks(label_set, window) != 0)).any():
                raise CorruptStore(
                    f"label set {label_set.name}: labels of seed {window.seed} are empty though "
                    "their views were seen; run sskt verify"
                )
            skipped |= empty
            tensors = as_tensors(rows)
            if len(window.samples) <= self._rows_there:
                tensors = {key: held.to(self._device) for key, held in tensors.items()}
            encoded.append(tensors)
        checks = self._checks(window, skipped)
        place = np.full(sets[0].samples, -1, np.int64)
        place[window.samples] = np.arange(len(window.samples))
        return _Slab(encoded, checks, skipped, place)

    def _checks(self, window: Window, skipped: NDArray[np.bool_]) -> NDArray[np.uint32]:
        by_set = [_checks(label_set, window) for label_set in self._sets.values()]
        differ = np.flatnonzero((np.stack(by_set) != by_set[0]).any(axis=0) & ~skipped)
        if len(differ):
            names = " and ".join(s.name for s in self._sets.values())
            raise ViewMismatch(
                f"label sets {names} saw different pictures of sample "
                f"{window.samples[differ[0]]} under view seed {window.seed} "
                f"({len(differ)} samples differ); cache one of them again"
            )
        return by_set[0]

    def enter(self, window: Window, following: Window | None) -> NDArray[np.bool_]:
        """See ``Labels``. Raises ``IncompleteLabels`` or ``CorruptStore``."""
        if window != self._window or self._slab is None:
            ahead = self._ahead
            self._slab = ahead[1].result() if ahead and ahead[0] == window else self._read(window)
            self._window, self._ahead = window, None
        if following is not None and following != window and self._ahead is None:
            self._ahead = (following, self._pool.submit(self._read, following))
        return self._slab.skipped

    def check(self, samples: Int64, views: UInt8) -> int:
        """See ``Labels``. Raises ``ViewMismatch`` naming the sample."""
        assert self._slab is not None and self._window is not None
        stored = self._slab.checks[self._slab.place[samples[:CHECKED_ROWS]]]
        for sample, view, expected in zip(samples, views, stored, strict=False):
            if check_of(view) != expected:
                raise ViewMismatch(
                    f"sample {sample} under view seed {self._window.seed} is not the picture that "
                    f"the sources saw (checksum {check_of(view):08x}, stored {expected:08x}): the "
                    "image, its decoder or the augmentation changed; cache the labels again"
                )
        return len(stored)

    def soft(self, samples: Int64, views: Tensor, temperature: float) -> dict[str, Tensor]:
        """See ``Labels``."""
        assert self._slab is not None
        rows = torch.from_numpy(self._slab.place[samples])
        if len(self._slab.skipped) <= self._rows_there:
            rows = rows.to(self._device, non_blocking=True)
        return {
            name: soft_labels(
                label_set.encoding,
                {k: v[rows].to(self._device, non_blocking=True) for k, v in encoded.items()},
                len(label_set.classes),
                temperature,
            )
            for (name, label_set), encoded in zip(
                self._sets.items(), self._slab.encoded, strict=True
            )
        }

    def forget(self) -> None:
        """Drops the slab in RAM, so that the next window is read from the store again."""
        self._window = self._slab = None

    def close(self) -> None:
        """Stops reading ahead, and what waits for a label server."""
        for label_set in self._sets.values():
            label_set.place.close()
        self._pool.shutdown(cancel_futures=True)


class LiveLabels:
    """The paper's way: every source runs in every step, of clips on the stills of f_s."""

    def __init__(self, sources: Sequence[Source], views: Views) -> None:
        self._sources, self._views, self._seed = sources, views, 0

    def enter(self, window: Window, following: Window | None) -> NDArray[np.bool_]:
        """See ``Labels``: nothing is left out."""
        self._seed = window.seed
        return np.zeros(len(window.samples), bool)

    def check(self, samples: Int64, views: UInt8) -> int:
        """See ``Labels``: the sources see the very batch, there is nothing to compare."""
        return 0

    def soft(self, samples: Int64, views: Tensor, temperature: float) -> dict[str, Tensor]:
        """See ``Labels``."""
        if self._views.target.clips:
            stills = self._views.stills(views.cpu().numpy(), samples, self._seed)
            views = torch.from_numpy(stills).to(views.device)
        return {
            s.name: torch.softmax(s.log_probabilities(views).clone() / temperature, dim=1)
            for s in self._sources
        }

    def close(self) -> None:
        """See ``Labels``: nothing is read."""


class NoLabels:
    """Training from scratch."""

    def enter(self, window: Window, following: Window | None) -> NDArray[np.bool_]:
        """See ``Labels``: nothing is left out."""
        return np.zeros(len(window.samples), bool)

    def check(self, samples: Int64, views: UInt8) -> int:
        """See ``Labels``: nothing is stored."""
        return 0

    def soft(self, samples: Int64, views: Tensor, temperature: float) -> dict[str, Tensor]:
        """See ``Labels``: no auxiliary task."""
        return {}

    def close(self) -> None:
        """See ``Labels``: nothing is read."""
