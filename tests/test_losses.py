"""The losses of REFERENCE.md: divisors, temperatures, gradients."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from sskt.teacher_cache.errors import UnknownName
from sskt.trainer.losses import (
    AUXILIARY,
    kl_divergence,
    kl_divergence_released,
    parse_loss,
    soft_cross_entropy,
    total_loss,
)

N, C = 6, 11


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(N, C, generator=generator, requires_grad=True)
    return z_t, 3 * torch.randn(N, C, generator=generator)


def gradient(name: str, z_t: Tensor, p: Tensor, temperature: float) -> Tensor:
    (found,) = torch.autograd.grad(AUXILIARY[name](z_t, p, temperature), z_t)
    return found


@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.5])
def test_ce_written_out(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    z_t, z_s = logits
    p = torch.softmax(z_s / temperature, 1)
    total = 0.0
    for i in range(N):
        scaled = z_t[i].detach().double() / temperature
        log_q = scaled - torch.logsumexp(scaled, 0)
        total -= sum(float(p[i, c]) * float(log_q[c]) for c in range(C))
    expected = temperature**2 * total / N
    found = float(soft_cross_entropy(z_t.detach(), p, temperature))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_of_ce_is_t_times_q_minus_p(
    logits: tuple[Tensor, Tensor], temperature: float
) -> None:
    z_t, z_s = logits
    p = torch.softmax(z_s / temperature, 1)
    expected = temperature * (torch.softmax(z_t / temperature, 1) - p) / N
    torch.testing.assert_close(gradient("ce", z_t, p, temperature), expected)


def test_kd_is_ce_less_the_entropy_with_the_same_gradient(logits: tuple[Tensor, Tensor]) -> None:
    z_t, z_s = logits
    p = torch.softmax(z_s / 3, 1)
    entropy = -(p * p.log()).sum() / N
    kd, ce = kl_divergence(z_t, p, 3), soft_cross_entropy(z_t, p, 3)
    torch.testing.assert_close(kd, ce - 9 * entropy)
    torch.testing.assert_close(gradient("kd", z_t, p, 3), gradient("ce", z_t, p, 3))


def test_kd_as_released_is_torch_kldiv_with_its_default_reduction(
    logits: tuple[Tensor, Tensor],
) -> None:
    z_t, z_s = logits
    p = torch.softmax(z_s / 3, 1)
    with warnings.catch_warnings(action="ignore"):
        released = 9 * torch.nn.KLDivLoss()(torch.log_softmax(z_t / 3, 1), p)
    torch.testing.assert_close(kl_divergence_released(z_t, p, 3), released)
    torch.testing.assert_close(gradient("kd-released", z_t, p, 3), gradient("ce", z_t, p, 3) / C)


def test_total_is_primary_plus_alpha_times_the_sum() -> None:
    parts = {"imagenet": torch.tensor(2.0), "places365": torch.tensor(5.0)}
    assert float(total_loss(torch.tensor(1.0), parts, 0.1)) == pytest.approx(1.7)
    assert float(total_loss(torch.tensor(1.0), {}, 0.1)) == 1.0


def test_a_label_without_mass_gives_no_nan() -> None:
    z_t = torch.zeros(1, 3, requires_grad=True)
    p = torch.tensor([[1.0, 0.0, 0.0]])
    for name in AUXILIARY:
        assert math.isfinite(float(AUXILIARY[name](z_t.detach(), p, 1.0)))
        assert torch.isfinite(gradient(name, z_t, p, 1.0)).all()


def test_names() -> None:
    assert parse_loss("ce+kd-released") == ("ce", "kd-released")
    assert parse_loss("ce") == ("ce", "ce")
    with pytest.raises(UnknownName, match="unknown auxiliary loss 'mse'; known: ce, kd, kd-"):
        parse_loss("ce+mse")
    with pytest.raises(UnknownName, match="unknown primary loss 'x'"):
        parse_loss("x+ce")
