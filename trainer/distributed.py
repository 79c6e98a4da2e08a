"""Processes of one training (``torchrun``): who they are, what they share, who writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.sources.source import usable_device

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` of them; ``local``: processes on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def part(self, batch: Int64) -> Int64:
        """This process's samples of a batch: consecutive ones, as even as can be."""
        return np.array_split(batch, self.world)[self.rank] if self.world > 1 else batch

    def seed_dropout(self, seed: int, *position: object) -> None:
        """Seeds torch's generator by the position in the run, so that none has to be saved.

        Args:
            seed: Seed of the run.
            position: Epoch, window and batch, or other plain values.
        """
        text = "/".join(map(str, (seed, *position, self.rank))).encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest()))

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, said: bool) -> bool:
        """What the first process said."""
        if self.world == 1:
            return said
        flag = [said]
        dist.broadcast_object_list(flag)
        return bool(flag[0])

    def summed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars summed over the processes."""
        if self.world == 1 or not values:
            return dict(values)
        together = torch.stack([v.double() for v in values.values()])
        dist.all_reduce(together)
        return dict(zip(values, together.unbind(), strict=True))

    def share_buffers(self, network: nn.Module) -> None:
        """Gives all the first one's buffers: BatchNorm saw other images in each process."""
        for buffer in network.buffers() if self.world > 1 else ():
            dist.broadcast(buffer, 0)

    def gathered(self, part: Any) -> list[Any]:
        """Every process's plain object, in order of rank."""
        if self.world == 1:
            return [part]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, part)
        return parts


def batches_of(order: Int64, size: int, world: int = 1) -> list[Int64]:
    """An order cut into batches of all processes; a rest too small for them joins the last one.

    Too small: less than two samples each, which BatchNorm over 1x1 maps needs. No samples make no
    batch. Raises ``InputError`` for fewer samples than processes.
    """
    if 0 < len(order) < world:
        raise InputError(
            f"{len(order)} samples for {world} processes; start no more processes than samples"
        )
    count = batch_count(len(order), size, world)
    return [order[i * size : (i + 1) * size if i + 1 < count else None] for i in range(count)]


def batch_count(samples: int, size: int, world: int = 1) -> int:
    """How many batches ``batches_of`` makes."""
    whole, rest = divmod(samples, size)
    return whole + (rest >= 2 * world or (rest > 0 and not whole))


def started_by_torchrun() -> bool:
    """Whether the environment names processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def join(device: str, wait_minutes: float = 0) -> tuple[Ranks, torch.device]:
    """This process's ranks and device; with ``torchrun``, meets the others.

    wait_minutes: how long one may keep the others waiting, beyond what torch allows by itself
    (labels of a server that is away: another machine's processes may have theirs already).
    nccl between GPUs (process i of a machine takes its GPU i), gloo between CPUs.
    Raises ``InputError`` for a device that cannot be used.
    """
    if not started_by_torchrun():
        return Ranks(), usable_device(device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number < torch.cuda.device_count():
        torch.cuda.set_device(number)  # so that no process opens another one's GPU
    where = usable_device(device)
    if where.type == "cuda":
        if number >= torch.cuda.device_count():
            raise InputError(
                f"{local} processes on this machine, but {torch.cuda.device_count()} GPUs; start "
                "one process a GPU"
            )
        where = torch.device("cuda", number)
    if not dist.is_initialized():
        longest = timedelta(minutes=wait_minutes + 10) if wait_minutes > 0 else None
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=longest)
    return Ranks(dist.get_rank(), dist.get_world_size(), local), where


def leave() -> None:
    """Parts from the other processes, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
