"""Test metrics and losses of a network over a target's evaluation views."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sskt.teacher_cache.errors import BadImage, InputError
from sskt.teacher_cache.views.view_cache import ViewCache, open_view_cache
from sskt.teacher_cache.views.views import Views, checks_of
from sskt.trainer.data.gpu_loader import ResidentFeed
from sskt.trainer.data.loader import Batch, Feed
from sskt.trainer.data.soft_label_loader import feed_of, held_in_memory
from sskt.trainer.data.soft_labels import Labels, Window, labels_for, labels_over
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.step import Step
from sskt.trainer.methods.base import Method
from sskt.trainer.metrics import accuracy_counts, multi_label, single_label, video_level
from sskt.trainer.models.heads import SSKTNetwork

if TYPE_CHECKING:
    from sskt.trainer.loop.setup import Plan

Record = dict[str, Any]
BATCH = 256
CLIP_BATCH = 32
VIEW_SEED = 0
"""The view seed of an evaluation. Its views are the same under every seed."""


class AuxiliaryLoss:
    """The auxiliary losses of equation 1 on the test split.

    Args:
        labels: Labels of the test split's views.
        samples: Number of samples of the test split.
        taken: What the auxiliary loss of each source takes, see ``Plan.taken``.
        temperature: T of the soft labels.
        loss: alpha * sum of the auxiliary losses, mean over a batch, from logits and soft labels
            by source.
    """

    def __init__(
        self,
        labels: Labels,
        samples: int,
        taken: Mapping[str, str],
        temperature: float,
        loss: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor],
    ) -> None:
        self._taken, self._temperature, self._loss = taken, temperature, loss
        self._labels = labels.enter(Window(VIEW_SEED, ((0, samples),)), None)

    def __call__(
        self, batch: Batch, views: Tensor, logits: dict[str, Tensor]
    ) -> tuple[Tensor, int]:
        """Adds up the loss of a batch.

        Args:
            batch: The samples.
            views: uint8 views of the samples, on the device.
            logits: Auxiliary logits of the samples, by source.

        Returns:
            The sum over the samples that have labels, and how many these are.

        Raises:
            ViewMismatch: If a view is not the one that the sources saw.
        """
        there = np.flatnonzero(~self._labels.skipped[batch.samples])
        zero = torch.zeros((), device=views.device)
        if not len(there):
            return zero, 0
        samples, rows = batch.samples[there], torch.from_numpy(there).to(views.device)
        views = views[rows]
        if self._labels.checked:
            checks = batch.checks
            if checks is None:
                checks = checks_of(batch.views.cpu().numpy())
            self._labels.check(samples, checks[there])
        stored = self._labels.of(samples, views)
        soft = {
            name: labels_for(stored, name, self._taken[name], self._temperature) for name in logits
        }
        loss = self._loss({name: x[rows] for name, x in logits.items()}, soft)
        return loss * len(there), len(there)


class Evaluation:
    """Losses and metrics of a run's network on the test split; the processes share its batches.

    Args:
        plan: The training. Without a test split an evaluation is empty.
        step: The network, its losses and its arithmetic.
        method: T of the soft labels.
        hooks: How the caller follows it.

    Attributes:
        views: The test samples under the evaluation policy, or None.
    """

    def __init__(self, plan: Plan, step: Step, method: Method, hooks: Hooks) -> None:
        self._plan, self._step, self._hooks = plan, step, hooks
        self._temperature = method.temperature
        self.views: Views | None = None
        self._labels: Labels | None = None
        self._cache: ViewCache | None = None
        if plan.test is None:
            return
        config = plan.config
        self.views = held_in_memory(plan.test, plan.order.memory, hooks.load)
        self._cache = open_view_cache(
            config.view_cache, config.view_cache_size, self.views, VIEW_SEED + 1
        )
        if config.needs_test_labels:
            self._labels = labels_over(
                self.views,
                plan.test_sets,
                plan.live,
                plan.device,
                force_topk=config.force_topk,
            )

    @functools.cached_property
    def _feed(self) -> Feed | ResidentFeed:
        assert self.views is not None
        config = self._plan.config
        checked = bool(self._plan.test_sets)
        return feed_of(
            self.views,
            self._plan.device,
            config.workers,
            config.on_error,
            checked=checked,
            cache=self._cache,
        )

    def require_readable(self) -> None:
        """Reads the test split once, so that a sample that cannot be read ends no finished epoch.

        It costs the reading of one evaluation, and nothing where the images are in memory. Clips
        were read when their frames were counted.

        Raises:
            BadImage: If a sample cannot be read (with ``--on-error fail``).
            MissingData: If a file cannot be opened.
            InputError: If the views of a batch differ in size.
        """
        if self.views is None or self.views.target.images is not None:
            return
        config, target = self._plan.config, self.views.target
        if target.clips:
            if target.damaged and config.on_error != "skip":
                raise BadImage(target.damaged[min(target.damaged)])
            return
        feed = Feed(self.views, config.workers, config.on_error, cache=self._cache)
        mine = self._batches()
        for done, _ in enumerate(feed(mine, VIEW_SEED), 1):
            self._hooks.test(done, len(mine))

    def _batches(self) -> list[np.ndarray[Any, Any]]:
        """The batches of this process: row numbers of samples."""
        assert self.views is not None
        size = CLIP_BATCH if self.views.target.clips else BATCH
        order, ranks = np.arange(len(self.views.target)), self._plan.ranks
        return [order[i : i + size] for i in range(0, len(order), size)][ranks.rank :: ranks.world]

    def close(self) -> None:
        """Ends reading the labels of the test split."""
        if self._labels:
            self._labels.close()

    def _forward(self, network: SSKTNetwork, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self._plan.normalise(views)
        with self._step.autocast(), self._step.naming_small_input(x):
            logits, auxiliary = network(x)
        return logits.float(), auxiliary

    @torch.inference_mode()
    def __call__(self) -> Record:
        """Evaluates the network, or its moving average. Every readable sample counts.

        Returns:
            Empty without a test split, else ``test_loss``, the mean primary loss;
            ``test_loss_total``, equation 1 on the split, if the run needs it; ``test_top1`` and
            ``test_top5``, or ``test_ap`` and ``test_map`` if a sample may have several classes;
            ``test_video_top1`` for clips. Metrics are in percent.

        Raises:
            InputError: If no sample can be read, or none has a label that is needed.
            BadImage: If a sample cannot be read (with ``--on-error fail``).
            ViewMismatch: If a view is not the one that the sources saw.
        """
        if self.views is None:
            return {}
        views, network, ranks = self.views, self._step.tested, self._plan.ranks
        target, device = views.target, self._plan.device
        ranks.share_buffers(network)
        auxiliary = None
        if self._labels:
            auxiliary = AuxiliaryLoss(
                self._labels,
                len(target),
                self._plan.taken,
                self._temperature,
                self._step.auxiliary_loss,
            )
        network.eval()
        labels = torch.from_numpy(target.labels)
        keep = target.clips or target.multi_label
        loss = torch.zeros((), device=device, dtype=torch.float64)
        counts: dict[str, Tensor] = {}
        kept: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        images = torch.zeros((), device=device)
        extra, labelled = torch.zeros_like(loss), torch.zeros_like(loss)
        mine = self._batches()
        for done, batch in enumerate(self._feed(mine, VIEW_SEED), 1):
            self._hooks.test(done, len(mine))
            if not len(batch.samples):
                continue
            truth = labels[torch.from_numpy(batch.samples)].to(device)
            seen = batch.views.to(device)
            logits, others = self._forward(network, seen)
            loss += self._step.primary(logits, truth, reduction="sum")
            if auxiliary:
                part, number = auxiliary(batch, seen, others)
                extra, labelled = extra + part, labelled + number
            images += len(batch.samples)
            if keep:
                kept.append((batch.samples, logits.cpu().numpy()))
            else:
                for name, count in accuracy_counts(logits, truth).items():
                    counts[name] = counts.get(name, torch.zeros((), device=device)) + count
        zero = {name: torch.zeros((), device=device) for name in ("top1", "top5") if not keep}
        auxiliaries = {"auxiliary": extra, "labelled": labelled}
        sums = ranks.summed({"loss": loss, "images": images, **auxiliaries, **zero, **counts})
        total = float(sums.pop("images"))
        if not total:
            raise InputError(f"no readable sample in {target.name} {target.split}")
        record = {"test_loss": float(sums.pop("loss")) / total}
        extra, labelled = sums.pop("auxiliary"), sums.pop("labelled")
        if auxiliary:
            if not labelled:
                raise InputError(f"no sample of {target.name} {target.split} has a label")
            record["test_loss_total"] = record["test_loss"] + float(extra / labelled)
        if not keep:
            return record | {f"test_{name}": 100 * float(n) / total for name, n in sums.items()}
        parts = [pair for part in ranks.gathered(kept) for pair in part]
        samples = np.concatenate([s for s, _ in parts])
        placed = np.argsort(samples, kind="stable")
        together = torch.from_numpy(np.concatenate([x for _, x in parts])[placed])
        return record | {
            f"test_{name}": value
            for name, value in _metrics(views, samples[placed], together).items()
        }


def _metrics(views: Views, samples: np.ndarray[Any, Any], logits: Tensor) -> dict[str, float]:
    target = views.target
    truth = torch.from_numpy(target.labels[samples])
    if target.multi_label:
        return multi_label(logits, truth)
    found = single_label(logits, truth)
    if target.clips:
        names = [target.ids[int(s)].rpartition("#")[0] or target.ids[int(s)] for s in samples]
        found |= video_level(logits, truth, names)
    return found
