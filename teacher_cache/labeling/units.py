"""Cutting a run into units of work, and dividing them among processes and machines.

A unit is one block of samples under some seeds, for all sources: its files are decoded once.
Units are a pure function of the run, so processes that never talk agree on them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.views.views import Views

MEMORY = 4.0
"""Default budget in GiB for the labels and views that a run holds before they are stored."""

VIEW_BYTES = 3 * 224 * 224
"""Size of a view for the budget, where it is not known beforehand."""


@dataclass(frozen=True)
class Share:
    """This process does the units ``rank``, ``rank + world``, ... of a run."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.world < 1:
            raise InputError(f"share {self.rank}/{self.world}: expected at least one process")
        if not 0 <= self.rank < self.world:
            raise InputError(
                f"share {self.rank}/{self.world}: expected a rank from 0 to {self.world - 1}"
            )

    def __str__(self) -> str:
        return f"{self.rank}/{self.world}"


_TORCHRUN = ("RANK", "WORLD_SIZE")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""A batch script without srun has a SLURM_PROCID of 0 too, and SLURM_NTASKS of its allocation,
but is one process: only srun tells the tasks of a step."""


def parse_share(text: str, environment: Mapping[str, str] = os.environ) -> Share | None:
    """``RANK/WORLD``; ``none``; or ``auto``: from RANK and WORLD_SIZE, else from srun's variables.

    None: the whole run, shared by locks with all other processes on the same folder. Raises
    ``InputError`` for what is no share, or half of a pair of variables.
    """
    if text == "none":
        return None
    if text != "auto":
        rank, _, world = text.partition("/")
        return _share(rank, world, f"--share {text}")
    for rank_name, world_name in (_TORCHRUN, _SRUN):
        rank, world = environment.get(rank_name, ""), environment.get(world_name, "")
        if world or (rank and rank_name == "RANK"):
            share = _share(rank, world, f"{rank_name}={rank} {world_name}={world}")
            return share if share.world > 1 else None
    return None


def _share(rank: str, world: str, where: str) -> Share:
    try:
        return Share(int(rank), int(world))
    except ValueError:
        expected = "a rank and a number of processes, as in --share 0/4 (or --share none)"
        raise InputError(f"{where}: expected {expected}") from None


@dataclass(frozen=True)
class Unit:
    """The shards of one block under some seeds; ``rows`` is the shard size of its label sets."""

    rows: int
    shards: tuple[Shard, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """View seeds of the unit."""
        return tuple(shard.seed for shard in self.shards)

    def holds(self, label_set: LabelSet) -> bool:
        """Whether the shards of the unit are those of this label set."""
        return label_set.shard_rows == self.rows


def units(
    views: Views, sets: Sequence[LabelSet], seeds: int, batch: int, memory: float, world: int = 1
) -> list[Unit]:
    """All units of a run, stored or not.

    From files, the seeds of a block share a unit, as many as ``memory`` GiB allow when two units
    are open at once, and few enough that each of ``world`` processes has one. Images in RAM
    need no decoding: one shard a unit. The units of the first seeds come first, so that a training
    that follows can begin with them.
    """
    found: list[Unit] = []
    for rows in sorted({s.shard_rows for s in sets}):
        alike = [s for s in sets if s.shard_rows == rows]
        blocks = alike[0].blocks
        label = sum(s.encoding.bytes_per_label(s.width) for s in alike)
        together = seeds_together(views, rows, label, seeds, batch, memory)
        together = min(together, max(1, seeds * blocks // world))
        for block in range(blocks):
            shards = [alike[0].shard(seed, block) for seed in range(seeds)]
            found += [
                Unit(rows, tuple(shards[i : i + together])) for i in range(0, seeds, together)
            ]
    return sorted(found, key=lambda unit: unit.shards[0].seed)


def seeds_together(
    views: Views, rows: int, label_bytes: int, seeds: int, batch: int, memory: float
) -> int:
    """Seeds that share one decoding: ``label_bytes`` of all sources a view, ``memory`` in GiB."""
    if views.target.images is not None:
        return 1
    held = min(rows, len(views.target)) * label_bytes + 3 * batch * view_bytes(views)
    return max(1, min(seeds, int(memory * 2**30 / 2 / held)))


def view_bytes(views: Views) -> int:
    """Bytes of a view as the policy makes it, or of a usual one."""
    p = views.policy.parameters
    return int(3 * p["size"] ** 2 * p.get("frames", 1)) if "size" in p else VIEW_BYTES
