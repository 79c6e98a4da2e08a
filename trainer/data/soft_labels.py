"""Soft labels beside the batches: from the store (read ahead) or live from the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.errors import CorruptStore, UnknownName, ViewMismatch
from sskt.teacher_cache.format.encodings import (
    ROW_SUM_TOLERANCE,
    Encoded,
    EncodedTensors,
    as_tensors,
    head_logits,
    require_temperature,
    soft_labels,
)
from sskt.teacher_cache.format.features import FEATURES, LOGITS, SOFT_LABELS, Head
from sskt.teacher_cache.format.features import features as decoded_features
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.rng import permutation
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.views.views import Views
from sskt.trainer.data.following import Follow
from sskt.trainer.loss_inputs import Live, require_readable

Int64 = NDArray[np.int64]
UInt32 = NDArray[np.uint32]

SHARE = 0.25
"""Part of the device's free memory that labels may take, and images as much again."""
STUB = 128
"""A last block of less than this part of a whole one (8,192 samples: 64) joins the one before."""
FAULTY_ROWS = 2048
"""Rows of labels that are checked at once, which bounds the memory of their float copies."""


@dataclass(frozen=True)
class Window:
    """A part of an epoch whose labels are in RAM together.

    A row of it is a sample under a view seed: all samples under the first seed come first.

    Attributes:
        seed: The first view seed.
        ranges: Sample ranges.
        others: Further view seeds, where a batch has several views of an image.
    """

    seed: int
    ranges: tuple[tuple[int, int], ...]
    others: tuple[int, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """All view seeds."""
        return (self.seed, *self.others)

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """View seed, first sample and end of each run of rows."""
        return [(seed, start, stop) for seed in self.seeds for start, stop in self.ranges]

    def pair(self, row: int) -> tuple[int, int]:
        """The sample and the view seed of a row."""
        turn, place = divmod(row, len(self.samples))
        return int(self.samples[place]), self.seeds[turn]

    @property
    def samples(self) -> Int64:
        """Sample ids, range by range."""
        return np.concatenate([np.arange(a, b) for a, b in self.ranges])


def epoch_windows(
    samples: int,
    view_seed: int,
    rows: int,
    block: int,
    seed: int,
    epoch: int,
    others: tuple[int, ...] = (),
) -> list[Window]:
    """The whole epoch if ``rows`` allow it, else shuffled blocks in groups of about ``rows``."""
    stub = samples % block if samples % block < block // STUB else 0
    if rows >= samples or samples - stub <= block:
        return [Window(view_seed, ((0, samples),), others)]
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
            others,
        )
        for group in groups
    ]


class BatchLabels(Protocol):
    """Labels of the samples of a batch, computed when they are asked for.

    Each method raises ``InputError`` for a source whose labels do not hold what it gives.
    """

    def soft(self, source: str, temperature: float) -> Tensor:
        """softmax(z_s / T) of a source, on the device: float32 ``[n, C_m]``."""

    def features(self, source: str) -> Tensor:
        """The features v_s of a source, on the device: float32 ``[n, D_m]``."""

    def logits(self, source: str) -> Tensor:
        """The logits z_s of a source, on the device: float32 ``[n, C_m]``."""


def labels_for(labels: BatchLabels, source: str, what: str, temperature: float) -> Tensor:
    """What a loss takes of a source: ``soft-labels`` at a temperature, ``features``, ``logits``."""
    if what == FEATURES:
        return labels.features(source)
    return labels.logits(source) if what == LOGITS else labels.soft(source, temperature)


class WindowLabels(Protocol):
    """Soft labels of the samples of a window. They stay valid when another window is entered."""

    @property
    def skipped(self) -> NDArray[np.bool_]:
        """Which samples of the window to leave out: bool ``[n]``, one for each sample."""

    @property
    def checked(self) -> bool:
        """Whether the labels have view checks to compare with."""

    def check(self, samples: Int64, checks: UInt32, seeds: Int64 | None = None) -> int:
        """Compares the view checks of a batch with the stored ones; how many were compared."""

    def of(self, samples: Int64, views: Tensor, seeds: Int64 | None = None) -> BatchLabels:
        """The labels of a batch.

        Args:
            samples: int64 ``[n]``.
            views: Their uint8 views on the device.
            seeds: The view seed of each, int64 ``[n]``; default: the window's first one.
        """


class Labels(Protocol):
    """Where soft labels come from."""

    def enter(self, window: Window, following: Window | None) -> WindowLabels:
        """Makes a window's labels available, and begins to read those of the following one."""

    def close(self) -> None:
        """Ends reading ahead."""


def labels_over(
    views: Views,
    sets: Mapping[str, LabelSet],
    live: Sequence[Source],
    device: torch.device,
    *,
    force_topk: bool = False,
    follow: Follow | None = None,
) -> Labels:
    """The soft labels of views: from ``live`` sources, else from label sets, else none."""
    if live:
        return LiveLabels(live, views)
    return StoredLabels(sets, device, force_topk=force_topk, follow=follow) if sets else NoLabels()


@dataclass(frozen=True)
class _StoredWindow:
    """The stored labels of a window: encoded rows by source, and their view checks."""

    sets: Mapping[str, LabelSet]
    window: Window
    encoded: Mapping[str, EncodedTensors]
    checks: NDArray[np.uint32]
    skipped: NDArray[np.bool_]
    place: Int64
    device: torch.device
    on_device: bool
    force_topk: bool

    @property
    def checked(self) -> bool:
        return True

    def _rows(self, samples: Int64, seeds: Int64 | None) -> Int64:
        rows: Int64 = self.place[samples]
        if seeds is None or not self.window.others:
            return rows
        turn: Int64 = np.argmax(seeds[:, None] == np.array(self.window.seeds), axis=1)
        return rows + turn * len(self.skipped)

    def check(self, samples: Int64, checks: UInt32, seeds: Int64 | None = None) -> int:
        """See ``WindowLabels``. Raises ``ViewMismatch`` naming the first sample."""
        rows = self._rows(samples, seeds)
        stored = self.checks[rows]
        wrong = np.flatnonzero(checks != stored)
        if wrong.size:
            first = wrong[0]
            sample, seed = self.window.pair(int(rows[first]))
            raise ViewMismatch(
                f"sample {sample} under view seed {seed} is not the image that "
                f"the sources saw (checksum {checks[first]:08x}, stored {stored[first]:08x}; "
                f"{wrong.size} of {len(samples)} views of the batch differ): the image, its "
                "decoder or the augmentation changed; restore the image, or cache the labels again"
            )
        return len(stored)

    def of(self, samples: Int64, views: Tensor, seeds: Int64 | None = None) -> BatchLabels:
        """See ``WindowLabels``."""
        rows = torch.from_numpy(self._rows(samples, seeds))
        if self.on_device:
            rows = rows.to(self.device, non_blocking=True)
        return _StoredBatch(self, rows)


@dataclass(frozen=True)
class _StoredBatch:
    window_labels: _StoredWindow
    rows: Tensor

    def soft(self, source: str, temperature: float) -> Tensor:
        label_set = self._holding(source, SOFT_LABELS)
        error = label_set.attributes.get("error")
        require_temperature(
            label_set.encoding, temperature, error, force=self.window_labels.force_topk
        )
        rows = self._encoded(source)
        return soft_labels(
            label_set.encoding, rows, len(label_set.classes), temperature, label_set.head
        )

    def features(self, source: str) -> Tensor:
        self._holding(source, FEATURES)
        return decoded_features(self._encoded(source))

    def logits(self, source: str) -> Tensor:
        label_set = self._holding(source, LOGITS)
        rows = decoded_features(self._encoded(source))
        return _by_head(rows, label_set.head)

    def _holding(self, source: str, wanted: str) -> LabelSet:
        label_set: LabelSet = _named(self.window_labels.sets, source)
        require_readable(source, label_set, wanted)
        return label_set

    def _encoded(self, source: str) -> EncodedTensors:
        """The encoded rows of the batch, on the device."""
        encoded, device = self.window_labels.encoded[source], self.window_labels.device
        if self.window_labels.on_device and device.type == "cuda":
            # Their memory is that of another stream, which may use it again once they are dropped.
            for values in encoded.values():
                values.record_stream(torch.cuda.current_stream(device))
        return {
            key: values[self.rows].to(device, non_blocking=True) for key, values in encoded.items()
        }


def _by_head(rows: Tensor, head: Head | None) -> Tensor:
    """Logits of features ``[n, D]``; of logits these themselves, which have no head."""
    return rows if head is None else head_logits(rows, head)


def _named(table: Mapping[str, Any], source: str) -> Any:
    if source not in table:
        raise UnknownName("source of the loader", source, table)
    return table[source]


def _checks(label_set: LabelSet, window: Window) -> NDArray[np.uint32]:
    return np.concatenate([label_set.read_checks(*part) for part in window.parts])


def _require_distributions(label_set: LabelSet, window: Window, rows: Encoded) -> None:
    """Raises ``CorruptStore`` if a row that is not empty is no probability distribution.

    Features and logits have to be finite.
    """
    encoding, width = label_set.encoding, label_set.width
    kind = "not finite" if encoding.of_features else "no probability distribution"
    for start in range(0, len(next(iter(rows.values()))), FAULTY_ROWS):
        part = {key: values[start : start + FAULTY_ROWS] for key, values in rows.items()}
        asked = np.arange(len(next(iter(part.values()))))
        if encoding.name in ("f16", "f32"):
            # torch adds up halves five times as fast, and settles all rows but odd and empty ones.
            total = torch.from_numpy(part["labels"]).float().exp().sum(1)
            asked = np.flatnonzero(~((total - 1).abs() < ROW_SUM_TOLERANCE / 2).numpy())
        faulty = encoding.faulty({key: values[asked] for key, values in part.items()}, width)
        if faulty.any():
            sample, seed = window.pair(int(start + asked[faulty][0]))
            raise CorruptStore(
                f"label set {label_set.name}: the label of sample {sample} under view seed "
                f"{seed} is {kind}; run sskt verify, and cache its "
                "shard again"
            )


class StoredLabels:
    """The labels of several label sets over the same views, joined; the next window is read ahead.

    Labels stay encoded, on the device where this window and the next fit there, else in RAM, and
    are decoded on the device a batch at a time.
    """

    def __init__(
        self,
        sets: Mapping[str, LabelSet],
        device: torch.device,
        *,
        force_topk: bool = False,
        follow: Follow | None = None,
    ) -> None:
        self._sets, self._device, self._force_topk = dict(sets), device, force_topk
        self._follow = follow
        row = sum(s.encoding.bytes_per_label(s.width) for s in sets.values())
        self._rows_there = 0
        if device.type == "cuda":
            self._rows_there = int(SHARE * torch.cuda.mem_get_info(device)[0] / 2 / row)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sskt-labels")
        self._ahead: tuple[Window, Future[_StoredWindow]] | None = None
        self._current: _StoredWindow | None = None

    def _read(self, window: Window) -> _StoredWindow:
        if self._follow is not None:
            for seed in window.seeds:
                self._follow.wait(self._sets, seed, window.ranges)
        encoded: dict[str, EncodedTensors] = {}
        count, turns = len(window.samples), len(window.seeds)
        on_device = count * turns <= self._rows_there
        skipped = np.zeros(count * turns, bool)
        for name, label_set in self._sets.items():
            parts = [label_set.read(*part) for part in window.parts]
            rows = {
                key: np.concatenate([p[key] for p in parts]) if len(parts) > 1 else parts[0][key]
                for key in parts[0]
            }
            empty = label_set.encoding.skipped(rows)
            lost = np.flatnonzero(empty & (_checks(label_set, window) != 0))
            if lost.size:
                _, seed = window.pair(int(lost[0]))
                raise CorruptStore(
                    f"label set {label_set.name}: labels of seed {seed} are empty though "
                    "their views were seen; run sskt verify"
                )
            _require_distributions(label_set, window, rows)
            skipped |= empty
            tensors = as_tensors(rows)
            if on_device:
                tensors = {key: held.to(self._device) for key, held in tensors.items()}
            encoded[name] = tensors
        checks = self._checks(window, skipped)
        samples = next(iter(self._sets.values())).samples
        place = np.full(samples, -1, np.int64)
        place[window.samples] = np.arange(count)
        return _StoredWindow(
            self._sets,
            window,
            encoded,
            checks,
            np.logical_or.reduce(skipped.reshape(turns, count)),
            place,
            self._device,
            on_device,
            self._force_topk,
        )

    def _checks(self, window: Window, skipped: NDArray[np.bool_]) -> NDArray[np.uint32]:
        by_set = [_checks(label_set, window) for label_set in self._sets.values()]
        differ = np.flatnonzero((np.stack(by_set) != by_set[0]).any(axis=0) & ~skipped)
        if len(differ):
            names = " and ".join(s.name for s in self._sets.values())
            sample, seed = window.pair(int(differ[0]))
            raise ViewMismatch(
                f"label sets {names} saw different images of sample {sample} under view seed "
                f"{seed} ({len(differ)} samples differ); cache one of them again"
            )
        return by_set[0]

    def enter(self, window: Window, following: Window | None) -> WindowLabels:
        """See ``Labels``. Raises ``IncompleteLabels`` or ``CorruptStore``."""
        if self._current is None or window != self._current.window:
            ahead, self._current = self._ahead, None
            if self._follow is not None:
                for seed in window.seeds:
                    self._follow.announce(self._sets, seed, window.ranges)
            self._current = (
                ahead[1].result() if ahead and ahead[0] == window else self._read(window)
            )
            self._ahead = None
        if following is not None and following != window and self._ahead is None:
            self._ahead = (following, self._pool.submit(self._read, following))
        return self._current

    def close(self) -> None:
        """Stops reading ahead, and what waits for labels or for a label server."""
        if self._follow is not None:
            self._follow.close()
        for label_set in self._sets.values():
            label_set.storage.close()
        self._pool.shutdown(cancel_futures=True)


class LiveLabels:
    """The paper's way: every source runs in every step, for clips on the stills of f_s."""

    def __init__(self, sources: Sequence[Source], views: Views) -> None:
        self._sources, self._views = {s.name: s for s in sources}, views

    def enter(self, window: Window, following: Window | None) -> WindowLabels:
        """See ``Labels``: nothing is read."""
        return _LiveWindow(window, self._sources, self._views)

    def close(self) -> None:
        """See ``Labels``: nothing is read."""


@dataclass(frozen=True)
class _Unchecked:
    """A window without stored labels: no sample is left out, and there is nothing to compare."""

    window: Window

    @property
    def skipped(self) -> NDArray[np.bool_]:
        return np.zeros(len(self.window.samples), bool)

    @property
    def checked(self) -> bool:
        return False

    def check(self, samples: Int64, checks: UInt32, seeds: Int64 | None = None) -> int:
        return 0


@dataclass(frozen=True)
class _LiveWindow(_Unchecked):
    sources: Mapping[str, Source]
    views: Views

    def of(self, samples: Int64, views: Tensor, seeds: Int64 | None = None) -> BatchLabels:
        if self.views.target.clips:
            if seeds is None:
                seeds = np.full(len(samples), self.window.seed)
            clips, several = views.cpu().numpy(), np.unique(seeds).tolist()
            by_seed = [np.flatnonzero(seeds == seed) for seed in several]
            stills = [
                self.views.stills(clips[rows], samples[rows], seed)
                for rows, seed in zip(by_seed, several, strict=True)
            ]
            order = np.argsort(np.concatenate(by_seed))
            views = torch.from_numpy(np.concatenate(stills)[order]).to(views.device)
        return _LiveBatch(self.sources, views)


@dataclass(frozen=True)
class _LiveBatch:
    sources: Mapping[str, Source]
    views: Tensor

    def soft(self, source: str, temperature: float) -> Tensor:
        if self._holding(source, SOFT_LABELS).output is None:
            return torch.softmax(self._rows(source) / temperature, dim=1)
        return torch.softmax(self.logits(source) / temperature, dim=1)

    def features(self, source: str) -> Tensor:
        self._holding(source, FEATURES)
        return self._rows(source)

    def logits(self, source: str) -> Tensor:
        output = self._holding(source, LOGITS).output
        return _by_head(self._rows(source), output.head if output else None)

    def _holding(self, source: str, wanted: str) -> Source:
        found: Source = _named(self.sources, source)
        require_readable(source, Live.of(found), wanted)
        return found

    def _rows(self, source: str) -> Tensor:
        """What the source gives of the views, as a tensor that a gradient may pass by."""
        return self.sources[source].log_probabilities(self.views).clone()


class NoLabels:
    """Training without sources."""

    def enter(self, window: Window, following: Window | None) -> WindowLabels:
        """See ``Labels``: nothing is read."""
        return _NoWindow(window)

    def close(self) -> None:
        """See ``Labels``: nothing is read."""


@dataclass(frozen=True)
class _NoWindow(_Unchecked):
    def of(self, samples: Int64, views: Tensor, seeds: Int64 | None = None) -> BatchLabels:
        return _LiveBatch({}, views)
