"""Test metrics of a network over a target's evaluation views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.views import Views
from sskt.trainer.distributed import Ranks
from sskt.trainer.feed import Feed, normalise
from sskt.trainer.metrics import accuracy_counts, multi_label, single_label, video_level
from sskt.trainer.resident import ResidentFeed

Record = dict[str, Any]
BATCH = 256
CLIP_BATCH = 32


@torch.inference_mode()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    network: nn.Module,
    views: Views,
    feed: Feed | ResidentFeed,
    primary: Callable[..., Tensor],
    device: torch.device,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Record:
    """Mean loss and metrics (%) on a split; the processes share its batches.

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
    mine = batches[ranks.rank :: ranks.world]
    for done, batch in enumerate(feed(mine, 0), 1):
        progress(done, len(mine))
        if not len(batch.samples):
            continue
        truth = labels[torch.from_numpy(batch.samples)].to(device)
        logits = forward(normalise(batch.views.to(device))).float()
        loss += primary(logits, truth, reduction="sum")
        images += len(batch.samples)
        if keep:
            kept.append((batch.samples, logits.cpu().numpy()))
        else:
            for name, count in accuracy_counts(logits, truth).items():
                counts[name] = counts.get(name, torch.zeros((), device=device)) + count
    zero = {name: torch.zeros((), device=device) for name in ("top1", "top5") if not keep}
    sums = ranks.summed({"loss": loss, "images": images, **zero, **counts})
    seen = float(sums.pop("images"))
    if not seen:
        raise InputError(f"no readable sample in {target.name} {target.split}")
    record = {"test_loss": float(sums.pop("loss")) / seen}
    if not keep:
        return record | {f"test_{name}": 100 * float(n) / seen for name, n in sums.items()}
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
