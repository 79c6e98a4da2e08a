"""What happens around a step: the optimizer, its learning rate, averaged weights, early stop.

Every state dict holds plain values and tensors, which ``torch.load(weights_only=True)`` reads.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sskt.teacher_cache.errors import InputError
from sskt.trainer.config import TrainConfig


def build_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """SGD (momentum, dampening, L2 penalty) or AdamW (decoupled decay) of what trains.

    Raises ``InputError`` if none of them does.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise InputError("no parameter of the network trains; choose an earlier --finetune-from")
    if config.optimizer == "adamw":
        return AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    return SGD(
        trained,
        lr=config.lr,
        momentum=config.momentum,
        dampening=config.dampening,
        weight_decay=config.weight_decay,
    )


class Schedule:
    """The learning rate as a function of the epoch position and, on a plateau, of test losses.

    ``multistep``: times gamma at each milestone. ``cosine``: falls to 0 over the epochs, step by
    step. ``plateau``: times gamma after more than ``patience`` epochs without a better test loss
    (the primary or the total one, ``plateau_on``), as PyTorch's ReduceLROnPlateau. Warm-up
    multiplies any of them by a factor that reaches 1 with the last step of ``warmup`` epochs.
    """

    THRESHOLD = 1e-4  # a test loss is better if it is lower by this fraction: PyTorch's default
    SMALLEST = 1e-8  # no reduction of lr below this one: PyTorch's default

    def __init__(self, config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> None:
        if config.schedule == "plateau" and config.gamma >= 1:
            raise InputError(f"--schedule plateau needs --gamma below 1, found {config.gamma}")
        if config.schedule == "plateau" and config.test_split == "none":
            raise InputError("--schedule plateau follows the test loss; give a --test-split")
        self.config, self.optimizer, self.steps_per_epoch = config, optimizer, steps_per_epoch
        self.epoch = 0
        self._milestones = Counter(config.resolved_milestones())
        self._best, self._bad, self._reductions = math.inf, 0, 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @property
    def lr(self) -> float:
        """The learning rate now in force (of the first group)."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, fraction_of_epoch: float) -> None:
        """Sets lr for the optimizer step that begins at this fraction (0 .. 1) of the epoch."""
        done = self.epoch + fraction_of_epoch
        warm = 1.0
        if done < self.config.warmup:
            # Counted with this step, so that the first one moves the weights too.
            warm = min(1.0, (done + 1 / self.steps_per_epoch) / self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = warm * self._scheduled(group["initial_lr"], done)

    def _scheduled(self, lr: float, done: float) -> float:
        # Factors are multiplied one by one, as PyTorch does, for the same bits.
        if self.config.schedule == "multistep":
            for milestone in sorted(m for m in self._milestones if m <= self.epoch):
                lr = lr * self.config.gamma ** self._milestones[milestone]
        elif self.config.schedule == "cosine":
            lr = lr * (1 + math.cos(math.pi * min(1.0, done / self.config.epochs))) / 2
        elif self.config.schedule == "plateau":
            for _ in range(self._reductions):
                if lr - lr * self.config.gamma > self.SMALLEST:
                    lr = lr * self.config.gamma
        return lr

    def end_epoch(self, test_loss: float | None) -> None:
        """Closes an epoch. Raises ``InputError`` if a plateau is sought without a test loss."""
        self.epoch += 1
        if self.config.schedule != "plateau":
            return
        if test_loss is None:
            raise InputError("--schedule plateau follows the test loss; give a --test-split")
        if test_loss < self._best * (1 - self.THRESHOLD):
            self._best, self._bad = test_loss, 0
        else:
            self._bad += 1
        if self._bad > self.config.patience:
            self._reductions, self._bad = self._reductions + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "best": self._best,
            "bad": self._bad,
            "reductions": self._reductions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._best = state["epoch"], state["best"]
        self._bad, self._reductions = state["bad"], state["reductions"]


class Average:
    """Exponential moving average of a network: a = decay * a + (1 - decay) * w after each step.

    It begins as a copy of the network; ``network`` is that copy, for evaluation. Floating-point
    buffers (BatchNorm's running statistics) are averaged too, other buffers are taken over.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Takes in the weights of ``network``, which must be of the same build."""
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        pairs = [
            *zip(self.network.parameters(), network.parameters(), strict=True),
            *zip(self.network.buffers(), network.buffers(), strict=True),
        ]
        for mine, new in pairs:
            if mine.is_floating_point():
                averaged.append(mine)
                current.append(new)
            else:
                mine.copy_(new)
        torch._foreach_lerp_(averaged, current, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.network.load_state_dict(state)


class EarlyStop:
    """``stop`` turns true after ``patience`` values in a row that are not better; None: never."""

    def __init__(self, patience: int | None, mode: Literal["max", "min"] = "max") -> None:
        self.patience, self.mode = patience, mode
        self.best: float | None = None
        self.bad = 0

    def better(self, value: float) -> bool:
        """Takes in the value of an epoch: is it the best so far? NaN never is."""
        ahead = not math.isnan(value) and (
            self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        )
        self.best, self.bad = (value, 0) if ahead else (self.best, self.bad + 1)
        return ahead

    @property
    def stop(self) -> bool:
        return self.patience is not None and self.bad >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.bad = state["best"], state["bad"]
