"""One optimiser step: equation 1 on a batch, its gradient, and the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sskt.teacher_cache.errors import InputError, first_line
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.losses import (
    auxiliary_loss,
    parse_source_weights,
    primary_loss,
    total_loss,
)
from sskt.trainer.methods.base import Method
from sskt.trainer.models.heads import SSKTNetwork, to_channels_last
from sskt.trainer.optim import build_optimizer, moving_average

if TYPE_CHECKING:
    from sskt.trainer.loop.setup import Plan

Record = dict[str, Any]

TOO_SMALL = ("Output size is too small", "Kernel size can't be greater than actual input size")
"""What PyTorch says of a map that is smaller than a pooling or a convolution over it."""


class Step:
    """Network and optimizer of a run; calling it makes one step.

    Args:
        plan: The training.
        network: The target network with its auxiliary heads, on the device of the plan.
        method: Where the auxiliary labels come from.

    Attributes:
        network: The network that trains.
        optimizer: Its optimizer.
        average: The moving average of its weights, or None.
    """

    def __init__(self, plan: Plan, network: SSKTNetwork, method: Method) -> None:
        config = plan.config
        self._config, self._ranks, self._device = config, plan.ranks, plan.device
        self._normalise, self._method = plan.normalise, method
        self._multi_label = plan.views.target.multi_label
        self.network = to_channels_last(network) if config.channels_last else network
        self.optimizer = build_optimizer(config, self.network.parameters())
        self.average = moving_average(self.network, config.ema) if config.ema else None
        self.primary = partial(primary_loss(plan.loss[0]), gamma=config.focal_gamma)
        found = {text: auxiliary_loss(text) for text in set(plan.auxiliary.values())}
        self._auxiliary = {name: found[text] for name, text in plan.auxiliary.items()}
        self._weights = parse_source_weights(config.source_weight, list(self.network.sources))
        self._forward: Any = self.network
        if plan.ranks.world > 1:
            devices = [plan.device] if plan.device.type == "cuda" else None
            self._forward = DistributedDataParallel(self.network, devices)
        if config.compile:
            self._forward = torch.compile(self._forward)

    @property
    def tested(self) -> SSKTNetwork:
        """The network that is evaluated and kept: the averaged one, if there is one."""
        if self.average is None:
            return self.network
        assert isinstance(self.average.module, SSKTNetwork)
        return self.average.module

    def autocast(self) -> torch.autocast:
        """The arithmetic of the network's forward pass."""
        half = self._config.precision == "bfloat16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half)

    @contextmanager
    def naming_small_input(self, x: Tensor) -> Iterator[None]:
        """Names the cause where an input is too small for the network.

        Args:
            x: The input: ``[n, 3, H, W]``, or ``[n, 3, D, H, W]`` for clips.

        Raises:
            InputError: In place of PyTorch's errors about the size of maps and about BatchNorm.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            text, model = first_line(error), self._config.model
            if any(small in text for small in TOO_SMALL):
                size = "x".join(map(str, x.shape[2:]))
                raise InputError(
                    f"{model} cannot take views of {size} pixels ({text}); choose a --policy "
                    "whose views are larger, or another --model"
                ) from error
            if "Expected more than 1 value per channel" in text:
                raise InputError(
                    f"BatchNorm of {model} needs at least two samples in each process where its "
                    "maps are 1x1, and found one; give a larger --batch-size"
                ) from error
            raise

    def losses(self, batch: SoftLabelBatch) -> tuple[Tensor, Record]:
        """Computes equation 1 of the paper on a batch.

        Args:
            batch: Views, true classes and soft labels.

        Returns:
            The loss, a scalar; and its parts (``loss``, ``loss_primary``, ``loss_NAME`` of each
            source, and for one class a sample ``right``, a count; a mixed sample counts by the
            weight of the class that is predicted).
        """
        truth, x = batch.labels, batch.images
        soft = self._method.soft_labels(batch)
        with self.autocast(), self.naming_small_input(x):
            logits, auxiliary = self._forward(x if self._config.channels_last else x.contiguous())
        primary = self.primary(logits.float(), truth)
        parts = self._parts(auxiliary, soft)
        loss = total_loss(primary, parts, self._config.alpha, self._weights)
        scalars = {"loss": loss, "loss_primary": primary}
        scalars |= {f"loss_{name}": part for name, part in parts.items()}
        if truth.ndim == 1:
            scalars["right"] = (logits.argmax(1) == truth).sum()
        elif batch.weights is not None and not self._multi_label:
            scalars["right"] = truth.gather(1, logits.argmax(1, keepdim=True)).sum()
        return loss, scalars

    def auxiliary_loss(self, logits: dict[str, Tensor], soft: dict[str, Tensor]) -> Tensor:
        """Computes alpha times the sum of the auxiliary losses, a scalar, from both by source."""
        none = torch.zeros((), device=self._device)
        parts = self._parts(logits, soft)
        return total_loss(none, parts, self._config.alpha, self._weights)

    def _parts(self, logits: dict[str, Tensor], soft: dict[str, Tensor]) -> dict[str, Tensor]:
        more = (self._method.temperature, self._config.focal_gamma)
        return {name: self._auxiliary[name](logits[name], soft[name], *more) for name in soft}

    def __call__(self, batch: SoftLabelBatch) -> Record:
        """Steps on this process's part of a batch.

        Args:
            batch: At least one sample.

        Returns:
            The parts of the loss as in ``losses``, detached.
        """
        self.network.train()
        count = max(1, min(self._config.accumulate, len(batch) // 2))
        pieces = np.array_split(np.arange(len(batch)), count)
        self.optimizer.zero_grad(set_to_none=True)
        found: Record = {}
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            with nullcontext() if last or self._ranks.world == 1 else self._forward.no_sync():
                loss, parts = self.losses(batch[piece[0] : piece[-1] + 1])
                weight = len(piece) * self._ranks.world / batch.whole
                torch.autograd.backward(loss if weight == 1 else loss * weight)
            share = len(piece) / len(batch)
            for name, value in parts.items():
                part = value.detach() * share if name.startswith("loss") else value.detach()
                found[name] = found[name] + part if name in found else part
        self._update()
        return found

    def without_samples(self, shape: tuple[int, ...]) -> None:
        """Takes part in a step of the other processes when this one could read no sample.

        Args:
            shape: The shape of a view.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.network.eval()  # a blank image must not reach BatchNorm
        blank = torch.zeros((1, *shape), dtype=torch.uint8, device=self._device)
        logits, auxiliary = self._forward(self._normalise(blank))
        torch.autograd.backward(0 * sum((x.sum() for x in auxiliary.values()), logits.sum()))
        self._update()

    def _update(self) -> None:
        if self._config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._config.clip_grad)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.network)
