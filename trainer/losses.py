"""Losses of SSKT, each with its divisor in its name or docstring.

p_s = softmax(z_s / T) are soft labels ``[n, C]``, z_s logits ``[n, C]`` and v_s features ``[n, D]``
of a source; z_t is what the auxiliary head returns, of the same width. ``loss_inputs.READS`` says
which loss takes which of them. Everything is computed in float32, whatever z_t comes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.own_code import called, find_function

Reduction = Literal["mean", "sum"]
Auxiliary = Callable[[Tensor, Tensor, float, float], Tensor]
"""(z_t, p_s or z_s or v_s, temperature, gamma) to a scalar; gamma is for ``focal`` only."""


class Primary(Protocol):
    """(logits, truth, gamma) to a scalar: the mean over the samples of a batch.

    ``truth`` is int64, or under a policy that mixes samples float ``[n, C]``.

    ``reduction="sum"`` is the sum over samples: added up over the batches and divided by the
    number of samples it is the mean over a split. gamma has a meaning for ``focal`` only.
    """

    def __call__(
        self, logits: Tensor, truth: Tensor, gamma: float, reduction: Reduction = "mean"
    ) -> Tensor: ...


def cross_entropy(
    logits: Tensor, truth: Tensor, gamma: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """The primary loss ``ce``: -log softmax(z)_y, y being the class of a sample.

    Args:
        logits: z: float ``[n, C]``.
        truth: y: int64 ``[n]``; or the weights of the classes of mixed samples, float ``[n, C]``.
        gamma: Without a meaning here; the primary losses have one signature.
        reduction: ``mean`` or ``sum`` over the samples.

    Returns:
        A scalar in nats, float32.
    """
    return F.cross_entropy(logits.float(), truth, reduction=reduction)


def binary_cross_entropy(
    logits: Tensor, truth: Tensor, gamma: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """The primary loss ``bce``: a sample's loss is the mean over its C classes.

    Args:
        logits: float ``[n, C]``.
        truth: ``[n, C]``: 1 (positive), 0, or -1 (difficult). As in the released code, which
            knows positives and all the rest, a difficult class is a negative one here. Or the
            weights of the classes of mixed samples, float ``[n, C]``.
        gamma: Without a meaning here; the primary losses have one signature.
        reduction: ``mean`` or ``sum`` over the samples.

    Returns:
        A scalar in nats, float32.
    """
    wanted = truth.float() if truth.is_floating_point() else (truth > 0).to(torch.float32)
    loss = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction=reduction)
    return loss / logits.shape[1] if reduction == "sum" else loss


def focal(logits: Tensor, truth: Tensor, gamma: float, reduction: Reduction = "mean") -> Tensor:
    """The primary loss ``focal`` of Lin et al. (arXiv:1708.02002): -(1 - q_y)^gamma log q_y.

    Args:
        logits: z, with q = softmax(z): float ``[n, C]``.
        truth: y: int64 ``[n]``; or the weights of the classes of mixed samples, float ``[n, C]``.
        gamma: Exponent of the modulation, at least 0; 0 is ``ce``.
        reduction: ``mean`` or ``sum`` over the samples.

    Returns:
        A scalar in nats, float32.
    """
    log_q = F.log_softmax(logits.float(), dim=1)
    if truth.is_floating_point():
        losses = -(truth * _modulation(log_q, gamma) * log_q).sum(dim=1)
    else:
        log_q = log_q.gather(1, truth[:, None])[:, 0]
        losses = -_modulation(log_q, gamma) * log_q
    return losses.sum() if reduction == "sum" else losses.mean()


def soft_cross_entropy(z_t: Tensor, p_s: Tensor, temperature: float, gamma: float = 0.0) -> Tensor:
    """The auxiliary loss ``ce``: cross-entropy with soft labels (equation 1 of the paper).

    T^2 times the mean over the batch of -sum_c softmax(z_s / T)_c log softmax(z_t / T)_c, as
    released and as meant; computed in float32.

    Args:
        z_t: Auxiliary logits: float ``[n, C]``.
        p_s: Soft labels softmax(z_s / T): float32 ``[n, C]``.
        temperature: T, above 0.
        gamma: Without a meaning here; the auxiliary losses have one signature.

    Returns:
        A scalar in nats, float32.
    """
    log_q = F.log_softmax(z_t.float() / temperature, dim=1)
    return -(temperature**2) * (p_s * log_q).sum() / len(z_t)


def kl_divergence(z_t: Tensor, p_s: Tensor, temperature: float, gamma: float = 0.0) -> Tensor:
    """The auxiliary loss ``kd``, as meant: T^2 * KL(p_s || softmax(z_t / T)), mean over the batch.

    Its gradient equals that of ``soft_cross_entropy``; its value is lower by T^2 times the entropy
    of p_s. Computed in float32.

    Args:
        z_t: Auxiliary logits: float ``[n, C]``.
        p_s: Soft labels softmax(z_s / T): float32 ``[n, C]``.
        temperature: T, above 0.
        gamma: Without a meaning here; the auxiliary losses have one signature.

    Returns:
        A scalar in nats, float32.
    """
    log_q = F.log_softmax(z_t.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, p_s, reduction="batchmean")


def kl_divergence_released(
    z_t: Tensor, p_s: Tensor, temperature: float, gamma: float = 0.0
) -> Tensor:
    """The auxiliary loss ``kd-released``: ``kd`` divided by batch x classes.

    That is PyTorch's default reduction. Its gradient is that of ``ce`` with alpha / C, C being the
    classes of the source (1000 or 365): nearly no transfer. The CE+KD rows of the paper's 2-D
    tables were trained with it.

    Args:
        z_t: Auxiliary logits: float ``[n, C]``.
        p_s: Soft labels softmax(z_s / T): float32 ``[n, C]``.
        temperature: T, above 0.
        gamma: Without a meaning here; the auxiliary losses have one signature.

    Returns:
        A scalar in nats, float32.
    """
    return kl_divergence(z_t, p_s, temperature) / z_t.shape[1]


def soft_focal(z_t: Tensor, p_s: Tensor, temperature: float, gamma: float) -> Tensor:
    """The auxiliary loss ``focal``: T^2 * mean over the batch of -sum p_s (1 - q)^gamma log q.

    q = softmax(z_t / T). With a one-hot p_s and T = 1 it is the primary ``focal``; with gamma = 0
    it is ``soft_cross_entropy``. Computed in float32.

    Args:
        z_t: Auxiliary logits: float ``[n, C]``.
        p_s: Soft labels softmax(z_s / T): float32 ``[n, C]``.
        temperature: T, above 0.
        gamma: Exponent of the modulation, at least 0.

    Returns:
        A scalar in nats, float32.
    """
    log_q = F.log_softmax(z_t.float() / temperature, dim=1)
    return -(temperature**2) * (p_s * _modulation(log_q, gamma) * log_q).sum() / len(z_t)


def soft_binary_cross_entropy(
    z_t: Tensor, z_s: Tensor, temperature: float, gamma: float = 0.0
) -> Tensor:
    """The auxiliary loss ``bce``, for a source whose classes are independent (sigmoid outputs).

    T^2 times the binary cross-entropy of sigmoid(z_t / T) with sigmoid(z_s / T), mean over the
    batch and the classes. It is the distillation of one binary task for each class of Yang et al.
    (arXiv:2308.06453), up to the entropy of the source, which has no gradient; T^2 is that of
    Hinton et al. (arXiv:1503.02531), and the mean over the classes that of the primary ``bce``.
    Computed in float32.

    Args:
        z_t: Auxiliary logits: float ``[n, C]``.
        z_s: Logits of the source: float32 ``[n, C]``.
        temperature: T, above 0.
        gamma: Without a meaning here; the auxiliary losses have one signature.

    Returns:
        A scalar in nats, float32.
    """
    p_s = torch.sigmoid(z_s / temperature)
    loss = F.binary_cross_entropy_with_logits(z_t.float() / temperature, p_s)
    return temperature**2 * loss


def cosine_distance(
    z_t: Tensor, v_s: Tensor, temperature: float = 1.0, gamma: float = 0.0
) -> Tensor:
    """The auxiliary loss ``cosine``: 1 - cosine similarity, mean over the batch.

    It compares the direction of the features and leaves their length free, as Wang et al.
    (arXiv:2011.01424) argue for. A row of zeros has the similarity 0 to any other. Computed in
    float32.

    Args:
        z_t: Features of the target network, projected by its auxiliary head: float ``[n, D]``.
        v_s: Features of the source: float32 ``[n, D]``.
        temperature: Without a meaning here; the auxiliary losses have one signature.
        gamma: Without a meaning here.

    Returns:
        A scalar from 0 to 2, float32.
    """
    return (1 - F.cosine_similarity(z_t.float(), v_s, dim=1)).mean()


def squared_error(z_t: Tensor, v_s: Tensor, temperature: float = 1.0, gamma: float = 0.0) -> Tensor:
    """The auxiliary loss ``mse``: (z_t - v_s)^2, mean over the batch and the D dimensions.

    The features are taken as they are, as in FitNets (Romero et al., arXiv:1412.6550, equation 3)
    and SimKD (Chen et al., arXiv:2203.14001): of features of length 1 it would be ``cosine`` times
    2 / D. Its size is that of the features, so ``alpha`` depends on the source. Computed in
    float32.

    Args:
        z_t: Features of the target network, projected by its auxiliary head: float ``[n, D]``.
        v_s: Features of the source: float32 ``[n, D]``.
        temperature: Without a meaning here; the auxiliary losses have one signature.
        gamma: Without a meaning here.

    Returns:
        A scalar, float32.
    """
    return F.mse_loss(z_t.float(), v_s)


def _modulation(log_q: Tensor, gamma: float) -> Tensor:
    # Below gamma = 1 the slope of (1 - q)^gamma is infinite at q = 1, and 0 * inf is NaN.
    smallest = torch.finfo(log_q.dtype).tiny
    return torch.expm1(log_q).neg().clamp_min(smallest).pow(gamma)


PRIMARY: dict[str, Primary] = {
    "ce": cross_entropy,
    "bce": binary_cross_entropy,
    "focal": focal,
}
AUXILIARY: dict[str, Auxiliary] = {
    "ce": soft_cross_entropy,
    "kd": kl_divergence,
    "kd-released": kl_divergence_released,
    "focal": soft_focal,
    "bce": soft_binary_cross_entropy,
    "cosine": cosine_distance,
    "mse": squared_error,
}
MULTI_LABEL = frozenset(("bce",))
"""Primary losses for targets with several classes a sample; the others are for one class."""


def parse_loss(text: str) -> tuple[str, str]:
    """``PRIMARY+AUXILIARY``, e.g. ``ce+ce``, to its two names. Raises ``UnknownName``.

    Either may be a function of the user, ``FILE.py:function`` or ``module:attribute``.
    """
    primary, _, auxiliary = text.partition("+")
    auxiliary = auxiliary or "ce"
    if primary not in PRIMARY and ":" not in primary:
        raise UnknownName("primary loss", primary, [*PRIMARY, "FILE.py:function"])
    if auxiliary not in AUXILIARY and ":" not in auxiliary:
        raise UnknownName("auxiliary loss", auxiliary, [*AUXILIARY, "FILE.py:function"])
    return primary, auxiliary


def primary_loss(name: str) -> Primary:
    """Finds a primary loss.

    Args:
        name: A key of ``PRIMARY``, or ``FILE.py:function`` or ``module:attribute`` of the user: a
            function as ``Primary`` describes it, for one or several classes a sample.

    Returns:
        The loss.

    Raises:
        MissingData: If there is no such file or module.
        InputError: If there is no such function in it; when it is called, also if it fails or
            returns anything but one number.
    """
    if name in PRIMARY:
        return PRIMARY[name]
    return _own_loss(name, f"primary loss {name}")


def auxiliary_loss(name: str) -> Auxiliary:
    """Finds an auxiliary loss.

    Args:
        name: A key of ``AUXILIARY``, or ``FILE.py:function`` or ``module:attribute`` of the user: a
            function of z_t, of what the label set holds (p_s of soft labels, v_s of features, z_s
            of logits), T and gamma.

    Returns:
        The loss.

    Raises:
        MissingData: If there is no such file or module.
        InputError: As of ``primary_loss``.
    """
    if name in AUXILIARY:
        return AUXILIARY[name]
    return _own_loss(name, f"auxiliary loss {name}")


def _own_loss(text: str, what: str) -> Callable[..., Tensor]:
    function = find_function(text, what)

    def loss(*arguments: Any, **named: Any) -> Tensor:
        found = called(function, what, *arguments, **named)
        if not isinstance(found, Tensor) or found.ndim:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"{what} returned {shape}; a loss is a tensor of one number, []")
        return found

    return loss


def resolve_loss(text: str, multi_label: bool) -> str:
    """``PRIMARY+AUXILIARY`` with ``auto`` filled in: ``ce+ce``, or ``bce+ce`` if multi-label.

    Raises ``UnknownName``, and ``InputError`` if the primary loss cannot read such labels.
    """
    if text == "auto":
        return "bce+ce" if multi_label else "ce+ce"
    primary, auxiliary = parse_loss(text)
    if primary in PRIMARY and (primary in MULTI_LABEL) != multi_label:
        labels = "several classes a sample" if multi_label else "one class a sample"
        fitting = [f"{p}+{auxiliary}" for p in PRIMARY if (p in MULTI_LABEL) == multi_label]
        raise InputError(
            f"--loss {text}: primary loss {primary} does not fit a target with {labels}; "
            f"use {' or '.join(fitting)}"
        )
    return f"{primary}+{auxiliary}"


def parse_source_weights(texts: Iterable[str], names: Collection[str]) -> dict[str, float]:
    """``["imagenet=0.5"]`` to ``{"imagenet": 0.5}``; a source that is not there weighs 1.

    Raises ``UnknownName`` for a name that is not a source of the run, and ``InputError`` for
    anything but a finite number of at least 0, or for two weights of one source.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, given, number = text.rpartition("=")
        if not given:
            raise InputError(f"--source-weight must be NAME=W, e.g. imagenet=0.5, found '{text}'")
        if not names:
            raise InputError(f"--source-weight {text}: the run has no source; give --source")
        if name not in names:
            raise UnknownName("source in --source-weight", name, names)
        if name in weights:
            raise InputError(f"--source-weight gives {name} two weights; keep one of them")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not 0 <= weights[name] < math.inf:
            raise InputError(
                f"--source-weight {name} must be a finite number of at least 0, found '{number}'"
            )
    return weights


def total_loss(
    primary: Tensor,
    auxiliary: Mapping[str, Tensor],
    alpha: float,
    weights: Mapping[str, float] = MappingProxyType({}),
) -> Tensor:
    """Equation 1 of the paper: L_prim + alpha * sum over the sources of w * L_aux.

    Args:
        primary: L_prim, a scalar.
        auxiliary: L_aux by source, scalars; without any, the result is ``primary``.
        alpha: Weight of the auxiliary losses.
        weights: w by source; 1 for a source that is not in it.

    Returns:
        The loss, a scalar.
    """
    if not auxiliary:
        return primary
    parts = [weights[name] * part if name in weights else part for name, part in auxiliary.items()]
    return primary + alpha * torch.stack(parts).sum()
