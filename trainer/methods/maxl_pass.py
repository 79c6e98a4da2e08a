"""MAXL inside the loop: its two networks, and the second pass of an epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.rng import permutation
from sskt.trainer.distributed import batches_of
from sskt.trainer.methods.maxl import AuxiliaryLabels, Maxl
from sskt.trainer.models.heads import SSKTNetwork

if TYPE_CHECKING:
    from sskt.trainer.loop.setup import Plan
    from sskt.trainer.loop.trainer import Trainer


def build_maxl(plan: Plan, network: SSKTNetwork) -> Maxl:
    """MAXL over a network that was just built; the generator's parameters follow its own.

    Raises ``InputError`` with several processes: theta_2's step sees the whole batch.
    """
    if plan.ranks.world > 1:
        raise InputError("--method maxl trains in one process; start it without torchrun")
    classes, psi = len(plan.views.target.classes), plan.config.psi
    generator = AuxiliaryLabels(plan.build_target(classes * psi), classes, psi).to(plan.device)
    # Its losses carry no temperature.
    return Maxl(dataclasses.replace(plan.config, temperature=1.0), network, generator)


def meta_pass(trainer: Trainer, maxl: Maxl, step: Callable[[int, int], None]) -> dict[str, Any]:
    """Pass 2 of the trainer's epoch, in another order under another view seed than pass 1.

    ``step`` is told (done, total). Returns ``meta_loss`` and ``meta_entropy``, means over the
    samples.
    """
    config, plan = trainer.plan.config, trainer.plan
    maxl.start_epoch(trainer.epoch)
    other = config.epochs + trainer.epoch
    order = permutation(np.arange(len(trainer.views.target)), config.seed, other)
    batches = batches_of(order, config.batch_size)
    lr = float(trainer.optimizer.param_groups[0]["lr"])
    totals: dict[str, Tensor] = {}
    images = 0
    for done, batch in enumerate(trainer.loader.feed(batches, other), 1):
        if not len(batch.samples):
            continue
        trainer.seed_step("meta", done)
        x = plan.normalise(batch.views.to(plan.device, non_blocking=True))
        truth = trainer.loader.truth[
            torch.from_numpy(batch.samples).to(plan.device, non_blocking=True)
        ]
        for name, value in maxl.meta_step(x, truth, lr).items():
            scaled = len(batch.samples) * value
            totals[name] = totals[name] + scaled if name in totals else scaled
        images += len(batch.samples)
        step(done, len(batches))
    return {name: float(total) / images for name, total in totals.items()}
