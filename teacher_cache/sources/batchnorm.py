"""BatchNorm of a source: stored statistics (``eval``), or those of fixed batches (``batch-B``)."""

from __future__ import annotations

import copy
import functools
import re

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sskt.teacher_cache.errors import InputError

EVAL = "eval"


def parse_batchnorm(mode: str, batch_size: int) -> str:
    """Reads ``--batchnorm``.

    Args:
        mode: ``eval`` or ``batch``.
        batch_size: B, the samples of a batch.

    Returns:
        What a spec records: ``eval``, or ``batch-B``.

    Raises:
        InputError: If there is no such mode, or a batch has fewer than 2 samples.
    """
    if mode == EVAL:
        return EVAL
    if mode != "batch":
        raise InputError(f"--batchnorm {mode}: expected eval or batch")
    if batch_size < 2:
        raise InputError(
            f"--batchnorm batch: a batch of {batch_size} has no statistics of its own; "
            "give --batch-size 2 or more"
        )
    return f"batch-{batch_size}"


def batch_of(batchnorm: str) -> int | None:
    """Reads a BatchNorm mode of a spec.

    Args:
        batchnorm: ``eval`` or ``batch-B``.

    Returns:
        B; None for ``eval``.

    Raises:
        InputError: If it is neither.
    """
    if batchnorm == EVAL:
        return None
    found = re.fullmatch(r"batch-([1-9][0-9]*)", batchnorm)
    if found is None or int(found[1]) < 2:
        raise InputError(
            f"BatchNorm mode '{batchnorm}': expected eval, or batch-B with B of 2 or more"
        )
    return int(found[1])


def set_batchnorm(name: str, network: nn.Module, batchnorm: str) -> None:
    """Prepares a network in evaluation mode for a BatchNorm mode.

    In batch mode each BatchNorm layer normalises by the mean and the biased variance of its
    batch, and its running statistics are neither read nor changed. Dropout and all other layers
    stay in evaluation mode, and the ``state_dict`` stays as it is.

    Args:
        name: Name of the source, for messages.
        network: The network. Its layers get another ``forward``.
        batchnorm: ``eval`` or ``batch-B``.

    Raises:
        InputError: In batch mode if there is no BatchNorm layer, or if the ``forward`` of a layer
            was replaced; in eval mode if a layer keeps no statistics.
    """
    layers = {k: m for k, m in network.named_modules() if isinstance(m, _BatchNorm)}
    for layer in layers.values():
        before = layer.__dict__.get("forward")
        if isinstance(before, functools.partial) and before.func is _on_its_batch:
            del layer.forward  # of a source that the same network was frozen as before
    if batch_of(batchnorm) is None:
        bare = [key for key, layer in layers.items() if layer.running_mean is None]
        if bare:
            raise InputError(
                f"source {name}: BatchNorm layer '{bare[0]}' keeps no running statistics, so a "
                "label would depend on its batch; use --batchnorm batch, which records the batch"
            )
        return
    if not layers:
        raise InputError(
            f"source {name}: --batchnorm batch, but the network has no BatchNorm layer; "
            "use --batchnorm eval"
        )
    for key, layer in layers.items():
        if "forward" in layer.__dict__:
            raise InputError(
                f"source {name}: the forward of BatchNorm layer '{key}' was replaced, so it cannot "
                "take the statistics of its batch; use --batchnorm eval, or a subclass of the layer"
            )
        layer.forward = functools.partial(_on_its_batch, layer)  # type: ignore[method-assign]


def _on_its_batch(layer: _BatchNorm, x: Tensor) -> Tensor:
    """``forward`` of a layer without running statistics: it takes those of its batch in eval."""
    # Another thread may hash the layer's state meanwhile, so the layer itself keeps it.
    bare = copy.copy(layer)
    bare._buffers = {**layer._buffers, "running_mean": None, "running_var": None}
    # A subclass may do more than normalise, as BatchNormAct2d of timm does.
    normalised: Tensor = type(layer).forward(bare, x)
    return normalised
