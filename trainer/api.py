"""The public function that trains."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from sskt.trainer.config import TrainConfig, require_consistent
from sskt.trainer.distributed import leave
from sskt.trainer.loop.preflight import require_present
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.runs import open_live_sources, run_training


def train(config: TrainConfig, hooks: Hooks | None = None) -> list[dict[str, Any]]:
    """Trains a target network, as ``sskt train`` does.

    The loss is equation 1 of the paper: L_prim + alpha * sum of L_aux over the sources. A run that
    is finished is not trained again, and an interrupted one continues where it was saved.

    Args:
        config: The run. Its folder ``out``, which is required, gets metrics, checkpoints and a
            plot.
        hooks: How to follow the run: steps, epochs and notes.

    Returns:
        A record for each epoch: mean losses over the samples, test metrics in percent, seconds.

    Raises:
        InputError: If the configuration cannot be used, or ``out`` holds another run.
        MissingData: If data or labels are missing.
        SpecMismatch: If the label sets were made from other data or under another policy.
        IncompleteLabels: If a view seed that is needed is not stored.
        ViewMismatch: If a view is not the one that the sources saw.
        Diverged: If the loss is no longer a finite number.
    """
    require_consistent(config)
    require_present(config)
    joined = dist.is_available() and dist.is_initialized()
    try:
        return run_training(config, hooks, open_live_sources(config))
    finally:
        if not joined:
            leave()
