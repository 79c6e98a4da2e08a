"""The losses of docs/decisions/0014-losses.md: divisors, temperatures, gradients."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.loss_inputs import READS
from sskt.trainer.losses import (
    AUXILIARY,
    PRIMARY,
    kl_divergence,
    kl_divergence_released,
    parse_loss,
    parse_source_weights,
    resolve_loss,
    soft_cross_entropy,
    soft_focal,
    total_loss,
)

N, C = 6, 11
OF_SOFT_LABELS = sorted(AUXILIARY.keys() - READS.keys())


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(N, C, generator=generator, requires_grad=True)
    return z_t, 3 * torch.randn(N, C, generator=generator)


def gradient(name: str, z_t: Tensor, p: Tensor, temperature: float, gamma: float = 2.0) -> Tensor:
    (found,) = torch.autograd.grad(AUXILIARY[name](z_t, p, temperature, gamma), z_t)
    return found


def of_one_class(name: str, logits: Tensor, truth: Tensor, gamma: float) -> float:
    """A primary loss written out, sample by sample and class by class, in float64."""
    total = 0.0
    for z, y in zip(logits.double().numpy(), truth.numpy(), strict=True):
        if name == "bce":
            for one, difficult_or_not in zip(z, y, strict=True):
                q = 1 / (1 + math.exp(-one))
                total -= math.log(q if difficult_or_not == 1 else 1 - q) / len(z)
        else:
            q = math.exp(z[y]) / sum(math.exp(one) for one in z)
            total -= (1 - q) ** (gamma if name == "focal" else 0) * math.log(q)
    return total


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(PRIMARY)),
    n=st.integers(1, 5),
    c=st.integers(2, 6),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
    seed=st.integers(0, 99),
    cut=st.integers(0, 5),
)
def test_primary_losses_written_out(
    name: str, n: int, c: int, gamma: float, seed: int, cut: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, c, generator=generator)
    if name == "bce":
        truth = torch.randint(-1, 2, (n, c), generator=generator)
    else:
        truth = torch.randint(0, c, (n,), generator=generator)
    expected = of_one_class(name, logits, truth, gamma)
    loss = PRIMARY[name]
    # A float32 logarithm near 0 is right to about 1e-7, not to so many of its own digits.
    assert float(loss(logits, truth, gamma)) == pytest.approx(expected / n, rel=1e-5, abs=1e-6)
    halves = [h for h in (slice(0, cut), slice(cut, n)) if len(truth[h])]
    parts = [float(loss(logits[h], truth[h], gamma, reduction="sum")) for h in halves]
    assert sum(parts) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_focal_golden() -> None:
    """q_y = 0.9 and 0.5: 0.1^2 * 0.105360516 = 0.00105360516, 0.5^2 * 0.693147181 = 0.173286795."""
    logits = torch.tensor([[0.0, math.log(9)], [4.0, 4.0]])
    truth = torch.tensor([1, 0])
    assert float(PRIMARY["focal"](logits, truth, 2.0)) == pytest.approx(0.08717020, rel=1e-5)
    summed = PRIMARY["focal"](logits, truth, 2.0, reduction="sum")
    assert float(summed) == pytest.approx(0.17434040, rel=1e-5)


def test_soft_focal_golden() -> None:
    """p = (1/4, 3/4), q = (0.8, 0.2) at T = 2, gamma = 2.

    1/4 * 0.2^2 * 0.223143551 = 0.00223143551, 3/4 * 0.8^2 * 1.609437912 = 0.772530198;
    times T^2 = 4: 3.09904653.
    """
    z_t, p = torch.tensor([[2 * math.log(4), 0.0]]), torch.tensor([[0.25, 0.75]])
    assert float(soft_focal(z_t, p, 2.0, 2.0)) == pytest.approx(3.09904653, rel=1e-6)


def test_bce_takes_a_difficult_class_for_a_negative_one() -> None:
    """At logit 0 every class costs log 2; the mean over classes is log 2 too."""
    logits = torch.zeros(1, 4, requires_grad=True)
    truth = torch.tensor([[1, 0, -1, -1]])
    loss = PRIMARY["bce"](logits, truth, 2.0)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, torch.tensor([[-0.5, 0.5, 0.5, 0.5]]) / 4)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradient_of_focal(logits: tuple[Tensor, Tensor], gamma: float) -> None:
    """By z_j: (gamma (1-q)^(gamma-1) log q - (1-q)^gamma / q) * q (1[j = y] - q_j), over n."""
    z, truth = logits[0], torch.arange(N)
    (found,) = torch.autograd.grad(PRIMARY["focal"](z, truth, gamma), z)
    q = torch.softmax(z.detach().double(), 1)
    q_y = q[truth, truth][:, None]
    slope = gamma * (1 - q_y) ** (gamma - 1) * q_y.log() - (1 - q_y) ** gamma / q_y
    expected = slope * q_y * (torch.eye(C)[:N] - q) / N
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.5])
@pytest.mark.parametrize(("name", "gamma"), [("ce", 0.0), ("focal", 0.5), ("focal", 2.0)])
def test_auxiliary_losses_written_out(
    logits: tuple[Tensor, Tensor], temperature: float, name: str, gamma: float
) -> None:
    z_t, z_s = logits
    p = torch.softmax(z_s / temperature, 1)
    total = 0.0
    for i in range(N):
        scaled = z_t[i].detach().double() / temperature
        log_q = scaled - torch.logsumexp(scaled, 0)
        for c in range(C):
            share = (1 - math.exp(log_q[c])) ** gamma
            total -= float(p[i, c]) * share * float(log_q[c])
    expected = temperature**2 * total / N
    found = float(AUXILIARY[name](z_t.detach(), p, temperature, gamma))
    assert found == pytest.approx(expected, rel=1e-5)


def test_focal_at_gamma_zero_is_ce(logits: tuple[Tensor, Tensor]) -> None:
    z_t, z_s = logits
    p, truth = torch.softmax(z_s / 3, 1), torch.arange(N)
    torch.testing.assert_close(soft_focal(z_t, p, 3, 0.0), soft_cross_entropy(z_t, p, 3))
    torch.testing.assert_close(gradient("focal", z_t, p, 3, 0.0), gradient("ce", z_t, p, 3))
    torch.testing.assert_close(PRIMARY["focal"](z_t, truth, 0.0), PRIMARY["ce"](z_t, truth, 0.0))


def test_soft_focal_of_hard_labels_is_focal(logits: tuple[Tensor, Tensor]) -> None:
    truth = torch.arange(N)
    hard = torch.nn.functional.one_hot(truth, C).float()
    torch.testing.assert_close(
        soft_focal(logits[0], hard, 1.0, 2.0), PRIMARY["focal"](logits[0], truth, 2.0)
    )


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


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_binary_cross_entropy_of_independent_classes_written_out(
    logits: tuple[Tensor, Tensor], temperature: float
) -> None:
    """Value class by class in float64; gradient T (sigmoid(z_t / T) - sigmoid(z_s / T)) / (n C)."""
    z_t, z_s = logits
    total = 0.0
    for student, teacher in zip(z_t.detach().flatten(), z_s.flatten(), strict=True):
        b, a = (1 / (1 + math.exp(-float(z) / temperature)) for z in (student, teacher))
        total -= a * math.log(b) + (1 - a) * math.log(1 - b)
    found = float(AUXILIARY["bce"](z_t.detach(), z_s, temperature, 2.0))
    assert found == pytest.approx(temperature**2 * total / (N * C), rel=1e-5)
    q, p = torch.sigmoid(z_t / temperature), torch.sigmoid(z_s / temperature)
    expected = temperature * (q - p) / (N * C)
    torch.testing.assert_close(gradient("bce", z_t, z_s, temperature), expected.detach())


def test_losses_of_features_written_out(logits: tuple[Tensor, Tensor]) -> None:
    """Gradients by a row: cosine (cos z / |z| - f / |f|) / (|z| n), mse 2 (z - f) / (n D)."""
    z, f = logits[0].detach(), logits[1]
    length, other = z.norm(dim=1, keepdim=True), f.norm(dim=1, keepdim=True)
    cosine = (z * f).sum(1, keepdim=True) / (length * other)
    for temperature in (1.0, 3.0):  # which features do not have
        assert float(AUXILIARY["cosine"](z, f, temperature, 2.0)) == pytest.approx(
            1 - float(cosine.mean()), rel=1e-5
        )
        slope = (cosine * z / length - f / other) / length / N
        torch.testing.assert_close(gradient("cosine", logits[0], f, temperature), slope)
        expected = sum(float(a - b) ** 2 for a, b in zip(z.flatten(), f.flatten(), strict=True)) / (
            N * C
        )
        assert float(AUXILIARY["mse"](z, f, temperature, 2.0)) == pytest.approx(expected, rel=1e-5)
        of_mse = 2 * (z - f) / (N * C)
        torch.testing.assert_close(gradient("mse", logits[0], f, temperature), of_mse)


def test_the_cosine_leaves_the_length_free_and_mse_does_not(logits: tuple[Tensor, Tensor]) -> None:
    _, f = logits
    for scale in (0.1, 10.0):
        assert float(AUXILIARY["cosine"](scale * f, f, 1.0, 0.0)) == pytest.approx(0, abs=1e-6)
        assert float(AUXILIARY["mse"](scale * f, f, 1.0, 0.0)) > 1
    assert float(AUXILIARY["cosine"](-f, f, 1.0, 0.0)) == pytest.approx(2)
    assert float(AUXILIARY["cosine"](torch.zeros_like(f), f, 1.0, 0.0)) == 1


def test_total_is_primary_plus_alpha_times_the_sum() -> None:
    parts = {"imagenet": torch.tensor(2.0), "places365": torch.tensor(5.0)}
    assert float(total_loss(torch.tensor(1.0), parts, 0.1)) == pytest.approx(1.7)
    assert float(total_loss(torch.tensor(1.0), {}, 0.1)) == 1.0


def test_total_with_weights_of_sources() -> None:
    parts = {"imagenet": torch.tensor(2.0), "places365": torch.tensor(5.0)}
    weights = {"places365": 0.5}
    assert float(total_loss(torch.tensor(1.0), parts, 0.1, weights)) == pytest.approx(1.45)


def test_a_label_without_mass_gives_no_nan() -> None:
    z_t = torch.zeros(1, 3, requires_grad=True)
    p = torch.tensor([[1.0, 0.0, 0.0]])
    for name in AUXILIARY:
        assert math.isfinite(float(AUXILIARY[name](z_t.detach(), p, 1.0, 2.0)))
        assert torch.isfinite(gradient(name, z_t, p, 1.0)).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certain_networks_give_finite_losses_and_gradients(
    gamma: float, dtype: torch.dtype
) -> None:
    """q = 1 for the right class (loss 0), and q = 0 for it (loss as large as the logit)."""
    for right in (True, False):
        z = torch.zeros(2, 4, dtype=dtype)
        z[:, 0 if right else 1] = 1000.0
        p = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(2, 4)
        for name, loss in PRIMARY.items():
            z_t = (2 * z - 1000 if name == "bce" else z.clone()).requires_grad_()
            truth = p.long() if name == "bce" else torch.zeros(2, dtype=torch.long)
            value = loss(z_t, truth, gamma)
            (slope,) = torch.autograd.grad(value, z_t)
            assert value.dtype == torch.float32 and slope.isfinite().all(), (name, right)
            wanted = 0.0 if right else (500.0 if name == "bce" else 1000.0)
            assert float(value.detach()) == pytest.approx(wanted, abs=1e-6), (name, right)
        for name in OF_SOFT_LABELS:
            z_t = z.clone().requires_grad_()
            value = AUXILIARY[name](z_t, p, 1.0, gamma)
            (slope,) = torch.autograd.grad(value, z_t)
            wanted = 0.0 if right else 1000.0 / (4 if name == "kd-released" else 1)
            assert slope.isfinite().all(), (name, right)
            assert float(value.detach()) == pytest.approx(wanted, abs=1e-6), (name, right)


def test_losses_are_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, 5, generator=generator)
    p, truth = torch.softmax(z.roll(1, 0), 1), torch.arange(4)
    for name in AUXILIARY:
        plain = AUXILIARY[name](z, p, 3.0, 2.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(AUXILIARY[name](z, p, 3.0, 2.0), plain), name
    for name in PRIMARY:
        right = p.round().long() if name == "bce" else truth
        plain = PRIMARY[name](z, right, 2.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(PRIMARY[name](z, right, 2.0), plain), name


def test_names() -> None:
    assert parse_loss("ce+kd-released") == ("ce", "kd-released")
    assert parse_loss("ce") == ("ce", "ce")
    assert parse_loss("bce+focal") == ("bce", "focal")
    with pytest.raises(UnknownName, match="unknown auxiliary loss 'l1'; known: ce, kd, kd-"):
        parse_loss("ce+l1")
    with pytest.raises(UnknownName, match="unknown primary loss 'x'"):
        parse_loss("x+ce")


def test_auto_follows_the_labels() -> None:
    assert resolve_loss("auto", multi_label=False) == "ce+ce"
    assert resolve_loss("auto", multi_label=True) == "bce+ce"
    assert resolve_loss("focal", multi_label=False) == "focal+ce"
    assert resolve_loss("bce+kd", multi_label=True) == "bce+kd"


@pytest.mark.parametrize(
    ("text", "multi_label", "advice"),
    [
        ("bce+kd", False, r"bce does not fit a target with one class a sample; use ce\+kd or foca"),
        ("ce+ce", True, r"ce does not fit a target with several classes a sample; use bce\+ce$"),
        ("focal+kd", True, r"focal does not fit .* use bce\+kd$"),
    ],
)
def test_a_loss_that_cannot_read_the_labels_is_refused(
    text: str, multi_label: bool, advice: str
) -> None:
    with pytest.raises(InputError, match=advice):
        resolve_loss(text, multi_label)


def test_weights_of_sources() -> None:
    names = ["imagenet", "a=b"]
    assert parse_source_weights([], []) == {}
    assert parse_source_weights(["imagenet=0.5", "a=b=2"], names) == {"imagenet": 0.5, "a=b": 2.0}


@pytest.mark.parametrize(
    ("texts", "names", "message"),
    [
        (["0.5"], ["imagenet"], "must be NAME=W, e.g. imagenet=0.5, found '0.5'"),
        (["places=1"], ["imagenet"], "'places'; known: imagenet"),
        (["places=1"], [], "the run has no source; give --source"),
        (["imagenet=1", "imagenet=2"], ["imagenet"], "gives imagenet two weights"),
        (["imagenet=-1"], ["imagenet"], "at least 0, found '-1'"),
        (["imagenet=nan"], ["imagenet"], "at least 0, found 'nan'"),
        (["imagenet=inf"], ["imagenet"], "at least 0, found 'inf'"),
        (["imagenet="], ["imagenet"], "at least 0, found ''"),
    ],
)
def test_weights_of_sources_that_are_refused(
    texts: list[str], names: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_source_weights(texts, names)
    assert "\n" not in str(caught.value)
