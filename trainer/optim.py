"""What happens around a step: the optimizer, its learning rate, averaged weights, early stop.

Every state dict holds plain values and tensors, which ``torch.load(weights_only=True)`` reads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.own_code import call_function, called, find_function
from sskt.trainer.config import TrainConfig


def build_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """SGD (momentum, dampening, L2 penalty) or AdamW (decoupled decay) of what trains.

    Args:
        config: The training. Its ``optimizer`` may be a function or class of the user, or one of
            ``torch.optim``. That is called with the parameters, ``lr`` and ``weight_decay``.
        parameters: Those of the network.

    Returns:
        The optimizer.

    Raises:
        InputError: If no parameter trains, or the user's function fails or makes no optimizer.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise InputError("no parameter of the network trains; choose an earlier --finetune-from")
    if ":" in config.optimizer:
        what = f"--optimizer {config.optimizer}"
        named = {"lr": config.lr, "weight_decay": config.weight_decay}
        made = call_function(config.optimizer, "--optimizer", trained, **named)
        if not isinstance(made, Optimizer):
            raise InputError(
                f"{what} returned {type(made).__name__}; return a torch.optim.Optimizer"
            )
        return made
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
    (the primary or the total one, ``plateau_on``), as PyTorch's ReduceLROnPlateau. A function of
    the user gets the epochs that are done, a fraction included, and their number, and returns the
    factor. Warm-up multiplies any of them by a factor that reaches 1 with the last step of
    ``warmup`` epochs.
    """

    THRESHOLD = 1e-4  # a test loss is better if it is lower by this fraction: PyTorch's default
    SMALLEST = 1e-8  # no reduction of lr below this one: PyTorch's default

    def __init__(self, config: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> None:
        if config.schedule == "plateau" and config.gamma >= 1:
            raise InputError(f"--schedule plateau needs --gamma below 1, found {config.gamma}")
        if config.schedule == "plateau" and config.test_split == "none":
            raise InputError("--schedule plateau follows the test loss; give a --test-split")
        self.config, self.optimizer, self.steps_per_epoch = config, optimizer, steps_per_epoch
        own = ":" in config.schedule
        self._own = find_function(config.schedule, "--schedule") if own else None
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
        if self._own is not None:
            return lr * self._factor(self._own, done)
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

    def _factor(self, function: Callable[..., Any], done: float) -> float:
        what = f"--schedule {self.config.schedule}"
        factor = called(function, what, done, self.config.epochs)
        if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise InputError(
                f"{what} returned {factor!r} at epoch {done:g}; return a finite number that is "
                "not negative"
            )
        return float(factor)

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


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a network: a = decay * a + (1 - decay) * w after each step.

    It begins as a copy of the network, in evaluation mode. Floating-point buffers (BatchNorm's
    running statistics) are averaged too; other buffers are copied. ``get_ema_multi_avg_fn`` of
    PyTorch would average these as well, and round a count of batches towards 0.

    Args:
        network: The network that trains.
        decay: Weight of the old average, in 0 .. 1.

    Returns:
        The average. ``update_parameters`` takes in the weights of ``network``; ``module`` is the
        averaged network.
    """

    def update(averaged: Any, current: Any, count: object) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)

    average = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
    average.n_averaged.fill_(1)  # else the first update would replace the initial weights
    return average.requires_grad_(False).eval()


class EarlyStop:
    """Ends a run whose result no longer gets better.

    Args:
        patience: Epochs in a row without a better result after which to stop; None: never.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best: float | None = None
        self.bad = 0

    def better(self, value: float) -> bool:
        """Takes in the result of an epoch; returns whether it is the best so far (NaN never is)."""
        ahead = not math.isnan(value) and (self.best is None or value > self.best)
        self.best, self.bad = (value, 0) if ahead else (self.best, self.bad + 1)
        return ahead

    @property
    def stop(self) -> bool:
        """Whether it is time to stop."""
        return self.patience is not None and self.bad >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.bad = state["best"], state["bad"]
