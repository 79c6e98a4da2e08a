"""How far an epoch is, and how a caller follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sskt.trainer.distributed import Ranks

Record = dict[str, Any]


@dataclass(frozen=True)
class Hooks:
    """How a caller follows a run.

    Steps of an epoch, images loaded, batches tested, and the record of an epoch. ``note`` gets
    what a user must know of the run, one sentence a call: before the first epoch, and when the
    training waits for labels.
    """

    step: Callable[[int, int, int], None] = lambda epoch, done, total: None
    load: Callable[[int, int], None] = lambda done, total: None
    test: Callable[[int, int], None] = lambda done, total: None
    epoch: Callable[[Record], None] = lambda record: None
    note: Callable[[str], None] = lambda sentence: None


@dataclass
class Progress:
    """Where an epoch is: batches done in a window, and what was summed up so far.

    totals: losses times images, and counts, on the device; counts: images, unreadable, checked.
    """

    window: int = 0
    batch: int = 0
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, found: Record, counts: dict[str, int]) -> None:
        """Counts a step: its losses are means over its images."""
        for name, value in found.items():
            scaled = counts["images"] * value if name.startswith("loss") else value
            self.totals[name] = self.totals[name] + scaled if name in self.totals else scaled
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def summed(self, ranks: Ranks, device: torch.device) -> dict[str, Tensor]:
        """Totals and counts of all processes, float64."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        mine = self.totals | {name: zero + count for name, count in self.counts.items()}
        # A process that was just resumed, or could read no image yet, has not all of them.
        names = dict.fromkeys(name for part in ranks.gathered(list(mine)) for name in part)
        return ranks.summed({name: mine.get(name, zero) for name in names})
