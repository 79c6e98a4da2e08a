"""Test metrics and losses of a network over a target's evaluation views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.views.views import Views
from sskt.trainer.data.gpu_loader import ResidentFeed
from sskt.trainer.data.loader import Feed
from sskt.trainer.data.soft_labels import CHECKED_ROWS, Labels, Window
from sskt.trainer.distributed import Ranks
from sskt.trainer.metrics import accuracy_counts, multi_label, single_label, video_level

Record = dict[str, Any]
BATCH = 256
CLIP_BATCH = 32
Forward = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""uint8 views on the device to (primary logits, auxiliary logits by source), float32."""
VIEW_SEED = 0
"""The view seed of an evaluation. Its views are the same under every seed."""


class AuxiliaryLoss:
    """The auxiliary losses of equation 1 on the test split.

    Args:
        labels: Soft labels of the test split's views.
        samples: Number of samples of the test split.
        temperature: T of the soft labels.
        loss: alpha * sum of the auxiliary losses, mean over a batch, from logits and soft labels
            by source.
    """

    def __init__(
        self,
        labels: Labels,
        samples: int,
        temperature: float,
        loss: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor],
    ) -> None:
        self._temperature, self._loss = temperature, loss
        self._labels = labels.enter(Window(VIEW_SEED, ((0, samples),)), None)

    def __call__(
        self, samples: np.ndarray[Any, Any], views: Tensor, logits: dict[str, Tensor]
    ) -> tuple[Tensor, int]:
        """Adds up the loss of a batch.

        Args:
            samples: int64 ``[n]``.
            views: uint8 views of the samples.
            logits: Auxiliary logits of the samples, by source.

        Returns:
            The sum over the samples that have labels, and how many these are.

        Raises:
            ViewMismatch: If a view is not the one that the sources saw.
        """
        there = np.flatnonzero(~self._labels.skipped[samples])
        zero = torch.zeros((), device=views.device)
        if not len(there):
            return zero, 0
        samples, rows = samples[there], torch.from_numpy(there).to(views.device)
        views = views[rows]
        self._labels.check(samples, views[:CHECKED_ROWS].cpu().numpy())
        stored = self._labels.of(samples, views)
        soft = {name: stored.soft(name, self._temperature) for name in logits}
        loss = self._loss({name: x[rows] for name, x in logits.items()}, soft)
        return loss * len(there), len(there)


@torch.inference_mode()
def evaluate(
    forward: Forward,
    network: nn.Module,
    views: Views,
    feed: Feed | ResidentFeed,
    primary: Callable[..., Tensor],
    device: torch.device,
    ranks: Ranks | None = None,
    auxiliary: AuxiliaryLoss | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Record:
    """Mean loss and metrics (%) on a split; the processes share its batches.

    ``test_loss`` is the primary loss; with ``auxiliary`` there is ``test_loss_total`` too, equation
    1 on the split.
    ``test_top1`` and ``test_top5``; for several classes a sample ``test_ap`` and ``test_map``;
    of clips also ``test_video_top1``. Every readable sample counts, whatever the processes.
    """
    ranks, target = ranks or Ranks(), views.target
    network.eval()
    labels = torch.from_numpy(target.labels)
    size = CLIP_BATCH if target.clips else BATCH
    order = np.arange(len(target))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    keep = target.clips or target.multi_label
    loss = torch.zeros((), device=device, dtype=torch.float64)
    counts: dict[str, Tensor] = {}
    kept: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    images = torch.zeros((), device=device)
    extra, labelled = torch.zeros_like(loss), torch.zeros_like(loss)
    mine = batches[ranks.rank :: ranks.world]
    for done, batch in enumerate(feed(mine, 0), 1):
        progress(done, len(mine))
        if not len(batch.samples):
            continue
        truth = labels[torch.from_numpy(batch.samples)].to(device)
        seen = batch.views.to(device)
        logits, others = forward(seen)
        loss += primary(logits, truth, reduction="sum")
        if auxiliary:
            part, number = auxiliary(batch.samples, seen, others)
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
        f"test_{name}": value for name, value in _metrics(views, samples[placed], together).items()
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
