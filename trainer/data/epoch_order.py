"""The order of an epoch: windows of labels, and batches in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.label_sets.create import LabelSet
from sskt.teacher_cache.rng import permutation
from sskt.trainer.data.soft_labels import Window, epoch_windows
from sskt.trainer.distributed import Ranks, batch_count, batches_of

Int64 = NDArray[np.int64]


def seeds_needed(seeds: int, epochs: int, repeats: int) -> int:
    """How many of ``seeds`` view seeds the epochs see, with ``repeats`` views of an image."""
    return min(seeds, -(-epochs // repeats) * repeats)


def require_repeats(repeats: int, seeds: int, batch_size: int, world: int) -> None:
    """Raises ``InputError`` if a batch cannot have so many views of each image."""
    if repeats < 1:
        raise InputError(f"views per image must be at least 1, found {repeats}")
    if repeats > seeds:
        raise InputError(
            f"{repeats} views per image need as many view seeds, found {seeds}; cache the labels "
            "of more seeds, or take fewer views per image"
        )
    if batch_size % repeats or batch_size // repeats < world:
        raise InputError(
            f"a batch of {batch_size} has no whole number of images with {repeats} views each for "
            f"{world} process(es); choose a batch size that is a multiple of {repeats * world}"
        )


@dataclass(frozen=True)
class EpochOrder:
    """Which samples an epoch visits in which order: a function of these numbers alone.

    Attributes:
        samples: Samples of the target.
        sets: The label sets that are read, by source; empty without stored labels.
        seeds: View seeds S: epoch e sees view seed e mod S, if images have one view in a batch.
        batch_size: Samples of a batch, of all processes together.
        seed: Seed of the order.
        memory: Bytes that the labels of this process may take, those read ahead included.
        ranks: The processes that share each batch.
        repeats: Views K of each image of a batch, under as many view seeds. K epochs form a cycle:
            cycle c has the view seeds (cK + k) mod S for k < K, and each of its epochs visits one
            K-th of the samples under all of them. So a cycle visits the very pairs of sample and
            view seed that K epochs with one view visit.
    """

    samples: int
    sets: Mapping[str, LabelSet]
    seeds: int
    batch_size: int
    seed: int
    memory: float
    ranks: Ranks
    repeats: int = 1

    def windows(self, epoch: int) -> list[Window]:
        """The epoch's windows; one, unless the labels of a view seed exceed half the memory."""
        cycle = epoch // self.repeats
        first = cycle * self.repeats
        view_seed, *more = (seed % self.seeds for seed in range(first, first + self.repeats))
        others = tuple(more)
        if not self.sets:
            return [Window(view_seed, ((0, self.samples),), others)]
        sets = list(self.sets.values())
        row = sum(s.encoding.bytes_per_label(s.width) for s in sets)
        rows = int(self.memory / 2 / row / self.repeats)
        block = max(s.shard_rows for s in sets)
        return epoch_windows(self.samples, view_seed, rows, block, self.seed, cycle, others)

    def batches(self, window: Window, skipped: NDArray[np.bool_], epoch: int) -> list[Int64]:
        """The images of each batch of a window, of all processes, without skipped samples.

        A batch has ``repeats`` views of each of them.
        """
        cycle, part = divmod(epoch, self.repeats)
        order = permutation(window.samples[~skipped], self.seed, cycle)
        order = np.array_split(order, self.repeats)[part]
        return batches_of(order, self.batch_size // self.repeats, self.ranks.world)

    def batch_count(self, epoch: int) -> int:
        """Batches of an epoch, if no sample is skipped."""
        size, world = self.batch_size // self.repeats, self.ranks.world
        return sum(batch_count(images, size, world) for images in self._images(epoch))

    def view_count(self, epoch: int) -> int:
        """Views of an epoch, if no sample is skipped: that of all samples, up to rounding."""
        return sum(self._images(epoch)) * self.repeats

    def _images(self, epoch: int) -> list[int]:
        """The images that an epoch visits of each window."""
        part = epoch % self.repeats
        counts = (len(window.samples) for window in self.windows(epoch))
        return [n // self.repeats + (part < n % self.repeats) for n in counts]
