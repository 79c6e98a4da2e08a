"""MAXL, the method that table 9 compares with: a second network makes the auxiliary labels.

Liu, Davison and Johns, "Self-Supervised Generalisation with Meta Auxiliary Learning" (NeurIPS
2019). The multi-task network (theta_1) has a primary head of C classes and an auxiliary head of
C * psi. The label generator (theta_2), a network of the same architecture, gives every sample a
distribution over the psi auxiliary classes of its true class. An epoch has two passes over the
training data, as in the authors' second-order code (github.com/lorenmt/maxl):

1. theta_1 minimises L_prim + alpha * L_aux on the generated labels, which are constants;
2. theta_2 minimises L_prim(theta_1') + 0.2 * H, where theta_1' = theta_1 - lr * gradient of the
   same L_prim + alpha * L_aux on the same batch, kept differentiable in theta_2.

Published: alpha = 1; both losses focal, gamma = 2; theta_1 by SGD at 0.01 without momentum and
weight decay; theta_2 by SGD at 0.001 with weight decay 5e-4; both rates halved every 50 of 200
epochs; batch 100. Ours: the virtual step stays plain SGD at theta_1's rate where theta_1 itself is
trained with momentum or weight decay; labels are exactly 0 outside the true class (theirs leave
1e-8 there); other numbers of epochs halve theta_2's rate at the same fractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.distributed import Ranks
from sskt.trainer.losses import (
    auxiliary_loss,
    parse_loss,
    parse_source_weights,
    primary_loss,
    resolve_loss,
    total_loss,
)
from sskt.trainer.models.base import TargetNetwork
from sskt.trainer.models.heads import SSKTNetwork

if TYPE_CHECKING:
    from sskt.trainer.loop.setup import Plan

SOURCE = "maxl"
"""Name of the auxiliary head, and of its loss in the records."""
ENTROPY_WEIGHT = 0.2
GENERATOR_LR, GENERATOR_WEIGHT_DECAY = 1e-3, 5e-4
LOSSES = ("ce", "focal")

Outputs = tuple[Tensor, dict[str, Tensor]]
"""Primary logits, and auxiliary logits by head."""


def mask_softmax(logits: Tensor, truth: Tensor, psi: int) -> Tensor:
    """Softmax over the ``psi`` entries of each sample's true class, exactly 0 elsewhere.

    Args:
        logits: float ``[n, classes * psi]``; class c owns entries c * psi to (c + 1) * psi - 1.
        truth: The class of each sample: int64 ``[n]``.
        psi: Auxiliary classes of a class.

    Returns:
        float ``[n, classes * psi]``; each row sums to 1.
    """
    own = truth[:, None] * psi + torch.arange(psi, device=truth.device)
    return torch.zeros_like(logits).scatter(1, own, logits.gather(1, own).softmax(1))


def collapse(labels: Tensor) -> Tensor:
    """H of the paper: the sum of m log m over the batch mean m of labels ``[n, K]``.

    Lowest, -log K, where every auxiliary class is used alike; 0 where one takes all samples.
    """
    mean = labels.mean(0)
    return (mean * mean.clamp_min(1e-20).log()).sum()


def generator_lr(epoch: int, epochs: int) -> float:
    """Learning rate of theta_2 in ``epoch`` (from 0): halved after each quarter of the epochs."""
    return float(GENERATOR_LR * 0.5 ** (4 * epoch // epochs))


class AuxiliaryLabels(nn.Module):
    """The label generator; ``target`` is a network with ``classes * psi`` outputs.

    It keeps ``target``'s parameters under ``target.``; nothing else is learnt.
    """

    def __init__(self, target: TargetNetwork, classes: int, psi: int) -> None:
        super().__init__()
        self.target, self.classes, self.psi = target, classes, psi

    def forward(self, x: Tensor, truth: Tensor) -> Tensor:
        """float ``[n, 3, h, w]`` and int64 ``[n]`` to labels ``[n, classes * psi]``, rows sum to 1.

        Raises ``InputError`` for samples of several classes.
        """
        if truth.dim() != 1:
            raise InputError(
                "MAXL splits the one class of a sample, and these samples have several; "
                "train with --method sskt"
            )
        logits = self.target.fc(self.target.features(x).pooled)
        return mask_softmax(logits.float(), truth, self.psi)


class Maxl:
    """The method object: both passes of MAXL over two networks.

    Args:
        config: The training.
        network: theta_1, which has one auxiliary head, ``maxl``, of ``generator.classes * psi``
            outputs. Its optimizer is not this object's.
        generator: theta_2.

    Raises:
        UnknownName: For an auxiliary loss that is neither ce nor focal.
    """

    temperature = 1.0
    """The losses of MAXL have no temperature."""

    def __init__(
        self, config: TrainConfig, network: SSKTNetwork, generator: AuxiliaryLabels
    ) -> None:
        primary, auxiliary = parse_loss(resolve_loss(config.loss, multi_label=False))
        if auxiliary not in LOSSES:
            raise UnknownName("auxiliary loss of MAXL", auxiliary, LOSSES)
        self.config, self.network, self.generator = config, network, generator
        self._primary, self._auxiliary = primary_loss(primary), auxiliary_loss(auxiliary)
        self._weights = parse_source_weights(config.source_weight, [SOURCE])
        self.optimizer = torch.optim.SGD(
            generator.parameters(), lr=GENERATOR_LR, weight_decay=GENERATOR_WEIGHT_DECAY
        )

    @classmethod
    def of_plan(cls, plan: Plan, network: SSKTNetwork) -> Maxl:
        """Makes the generator for a network that was just built.

        The generator's parameters are drawn after those of the network.

        Args:
            plan: The training.
            network: theta_1.

        Returns:
            The method object.

        Raises:
            InputError: With several processes, as theta_2's step needs the whole batch.
        """
        if plan.ranks.world > 1:
            raise InputError("--method maxl trains in one process; start it without torchrun")
        classes, psi = len(plan.views.target.classes), plan.config.psi
        generator = AuxiliaryLabels(plan.build_target(classes * psi), classes, psi)
        return cls(plan.config, network, generator.to(plan.device))

    def soft_labels(self, batch: SoftLabelBatch) -> dict[str, Tensor]:
        """See ``Method``: the generated labels."""
        return {SOURCE: self.labels(batch.images, batch.labels)}

    def end_epoch(self, epoch: int, lr: float, loader: SoftLabelLoader) -> dict[str, float]:
        """Pass 2 of an epoch, in another order and under another view seed than pass 1.

        Args:
            epoch: Number of the epoch, from 0.
            lr: Learning rate of theta_1.
            loader: The training data.

        Returns:
            ``meta_loss`` and ``meta_entropy``, means over the samples.
        """
        self.start_epoch(epoch)
        totals: dict[str, Tensor] = {}
        images = 0
        for batch in loader.without_labels(self.config.epochs + epoch):
            Ranks().seed_dropout(self.config.seed, epoch, "meta", batch.position[1] + 1)
            for name, value in self.meta_step(batch.images, batch.labels, lr).items():
                scaled = len(batch) * value
                totals[name] = totals[name] + scaled if name in totals else scaled
            images += len(batch)
        return {name: float(total) / images for name, total in totals.items()}

    def start_epoch(self, epoch: int) -> None:
        """Sets theta_2's learning rate for ``epoch``, counted from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = generator_lr(epoch, self.config.epochs)

    def labels(self, x: Tensor, truth: Tensor) -> Tensor:
        """Generated labels ``[n, classes * psi]`` without a gradient; the generator stays as it is.

        Its BatchNorm takes the batch's statistics, as the labels it is trained for had them.
        """
        self.generator.train()
        with torch.no_grad():
            labels: Tensor = functional_call(self.generator, _buffers(self.generator), (x, truth))
        return labels

    def losses(
        self, x: Tensor, truth: Tensor, network: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pass 1: theta_1's loss on a batch and its parts; theta_2 gets no gradient.

        ``network`` is what wraps theta_1 (DDP, compiled), if something does. Among the parts,
        ``right`` is a count.
        """
        logits, auxiliary = (network or self.network)(x)
        return self._losses(logits, auxiliary[SOURCE], truth, self.labels(x, truth))

    def _losses(
        self, logits: Tensor, auxiliary: Tensor, truth: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        primary = self._primary(logits, truth, config.focal_gamma)
        soft = self._auxiliary(auxiliary, labels, 1.0, config.focal_gamma)
        loss = total_loss(primary, {SOURCE: soft}, config.alpha, self._weights)
        right = (logits.argmax(1) == truth).sum()
        parts = {"loss": loss, "loss_primary": primary, f"loss_{SOURCE}": soft, "right": right}
        return loss, parts

    def meta_step(self, x: Tensor, truth: Tensor, lr: float) -> dict[str, Tensor]:
        """Pass 2: one step of theta_2 through a virtual step of theta_1 at its rate ``lr``.

        theta_1, its gradients and its buffers stay as they are: both forward passes use batch
        statistics and move copies (theta_2's own buffers move). Autocast is off, because a second
        derivative is a small difference of rounded numbers. Returns, detached, ``meta_loss``
        (primary loss after the virtual step) and ``meta_entropy`` (``collapse``). theta_2's
        gradient stays in ``grad``; with several processes, average it in a pre-hook of
        ``optimizer``. Neither network may be compiled: that has no second derivative.
        """
        self.network.train()
        self.generator.train()
        weights = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        with torch.autocast(x.device.type, enabled=False):
            labels = self.generator(x, truth)
            logits, auxiliary = self._forward(weights, x)
            loss, _ = self._losses(logits, auxiliary[SOURCE], truth, labels)
            moved = self._virtual_step(weights, loss, lr)
            logits, _ = self._forward(moved, x)
            primary = self._primary(logits, truth, self.config.focal_gamma)
            entropy = collapse(labels)
            objective = primary + ENTROPY_WEIGHT * entropy
        parameters = [p for p in self.generator.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        return {"meta_loss": primary.detach(), "meta_entropy": entropy.detach()}

    def _forward(self, weights: Mapping[str, Tensor], x: Tensor) -> Outputs:
        out: Outputs = functional_call(self.network, {**weights, **_buffers(self.network)}, (x,))
        return out

    @staticmethod
    def _virtual_step(weights: Mapping[str, Tensor], loss: Tensor, lr: float) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(
            loss, list(weights.values()), create_graph=True, allow_unused=True
        )
        pairs = zip(weights.items(), gradients, strict=True)
        return {name: w if g is None else w - lr * g for (name, w), g in pairs}

    def state_dict(self) -> dict[str, Any]:
        """theta_2 and its optimizer. theta_1 is the trainer's to save."""
        return {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next step is then that of the one saved."""
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}
