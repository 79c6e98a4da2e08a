"""Losses of SSKT, each with its divisor in its name or docstring.

p_s = softmax(z_s / T) are soft labels ``[n, C]``, z_t auxiliary logits ``[n, C]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sskt.teacher_cache.errors import UnknownName

Auxiliary = Callable[[Tensor, Tensor, float], Tensor]


def soft_cross_entropy(z_t: Tensor, p_s: Tensor, temperature: float) -> Tensor:
    """``ce``, as released and as meant: T^2 * batch mean of -sum p_s log_softmax(z_t / T)."""
    log_q = F.log_softmax(z_t.float() / temperature, dim=1)
    return -(temperature**2) * (p_s * log_q).sum() / len(z_t)


def kl_divergence(z_t: Tensor, p_s: Tensor, temperature: float) -> Tensor:
    """``kd``, as meant: T^2 * KL(p_s || softmax(z_t/T)), divided by the batch.

    Its gradient equals that of ``ce``; its value is lower by the entropy of p_s.
    """
    log_q = F.log_softmax(z_t.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, p_s, reduction="batchmean")


def kl_divergence_released(z_t: Tensor, p_s: Tensor, temperature: float) -> Tensor:
    """``kd-released``: the same divided by batch x classes (PyTorch's default reduction).

    Its gradient is that of ``ce`` with alpha / C: nearly no transfer (REFERENCE.md, Losses).
    """
    return kl_divergence(z_t, p_s, temperature) / z_t.shape[1]


PRIMARY = {"ce": F.cross_entropy}
AUXILIARY: dict[str, Auxiliary] = {
    "ce": soft_cross_entropy,
    "kd": kl_divergence,
    "kd-released": kl_divergence_released,
}


def parse_loss(text: str) -> tuple[str, str]:
    """``PRIMARY+AUXILIARY``, e.g. ``ce+ce``, to its two names. Raises ``UnknownName``."""
    primary, _, auxiliary = text.partition("+")
    auxiliary = auxiliary or "ce"
    if primary not in PRIMARY:
        raise UnknownName("primary loss", primary, PRIMARY)
    if auxiliary not in AUXILIARY:
        raise UnknownName("auxiliary loss", auxiliary, AUXILIARY)
    return primary, auxiliary


def total_loss(primary: Tensor, auxiliary: Mapping[str, Tensor], alpha: float) -> Tensor:
    """Equation 1: L_prim + alpha * sum over sources of L_aux."""
    if not auxiliary:
        return primary
    return primary + alpha * torch.stack(list(auxiliary.values())).sum()
