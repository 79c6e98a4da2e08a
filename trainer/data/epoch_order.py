"""The order of an epoch: windows of labels, and batches in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.label_sets.create import LabelSet
from sskt.teacher_cache.rng import permutation
from sskt.trainer.data.soft_labels import Window, epoch_windows
from sskt.trainer.distributed import Ranks, batch_count, batches_of

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class EpochOrder:
    """Which samples an epoch visits in which order: a function of these numbers alone.

    Attributes:
        samples: Samples of the target.
        sets: The label sets that are read, by source; empty without stored labels.
        seeds: View seeds S: epoch e sees view seed e mod S.
        batch_size: Samples of a batch, of all processes together.
        seed: Seed of the order.
        memory: Bytes that the labels of this process may take, those read ahead included.
        ranks: The processes that share each batch.
    """

    samples: int
    sets: Mapping[str, LabelSet]
    seeds: int
    batch_size: int
    seed: int
    memory: float
    ranks: Ranks

    def windows(self, epoch: int) -> list[Window]:
        """The epoch's windows; one, unless the labels of a view seed exceed half the memory."""
        view_seed = epoch % self.seeds
        if not self.sets:
            return [Window(view_seed, ((0, self.samples),))]
        sets = list(self.sets.values())
        row = sum(s.encoding.bytes_per_label(len(s.classes)) for s in sets)
        rows = int(self.memory / 2 / row)
        block = max(s.shard_rows for s in sets)
        return epoch_windows(self.samples, view_seed, rows, block, self.seed, epoch)

    def batches(self, window: Window, skipped: NDArray[np.bool_], epoch: int) -> list[Int64]:
        """The batches of a window, of all processes together, without skipped samples."""
        order = permutation(window.samples[~skipped], self.seed, epoch)
        return batches_of(order, self.batch_size, self.ranks.world)

    def batch_count(self, epoch: int) -> int:
        """Batches of an epoch, if no sample is skipped."""
        counts = (len(window.samples) for window in self.windows(epoch))
        return sum(batch_count(n, self.batch_size, self.ranks.world) for n in counts)
