"""MAXL: generated labels, their regulariser, and the second-order step of the label generator."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.config import TrainConfig
from sskt.trainer.losses import AUXILIARY, PRIMARY
from sskt.trainer.methods.maxl import (
    ENTROPY_WEIGHT,
    AuxiliaryLabels,
    Maxl,
    collapse,
    generator_lr,
    mask_softmax,
)
from sskt.trainer.models.base import Features, TargetNetwork
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.pretrained import freeze_before
from sskt.trainer.models.registry import build_network

C, PSI, N = 3, 2, 8


class Smooth(TargetNetwork):
    """The smallest target network with a convolution, BatchNorm and no kink."""

    stage_widths = (4,)
    width = 4
    transfer_width = 4
    dimensions = 2

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def features(self, x: Tensor) -> Features:
        stage = torch.tanh(self.bn(self.conv(x)))
        return Features([stage], stage.mean((2, 3)))

    def parts_before(self, stage: int) -> list[nn.Module]:
        return [self.conv, self.bn] if stage > 1 else []


def smooth(loss: str = "focal+focal", seed: int = 0, alpha: float = 1.0) -> Maxl:
    torch.manual_seed(seed)
    network = SSKTNetwork(Smooth(C), {"maxl": C * PSI}, tm=False)
    generator = AuxiliaryLabels(Smooth(C * PSI), C, PSI)
    for parameter in generator.target.fc.parameters():
        nn.init.normal_(parameter)
    return Maxl(TrainConfig(loss=loss, alpha=alpha), network, generator)


def small_resnet(seed: int = 0) -> Maxl:
    torch.manual_seed(seed)
    network = SSKTNetwork(build_network("resnet20", C), {"maxl": C * PSI}, tm=False)
    generator = AuxiliaryLabels(build_network("resnet20", C * PSI), C, PSI)
    return Maxl(TrainConfig(loss="focal+focal"), network, generator)


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, size, size, generator=rng), torch.arange(N) % C


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


@given(
    classes=st.integers(1, 5),
    psi=st.integers(1, 4),
    data=st.data(),
    scale=st.sampled_from([1.0, 1e4]),
)
@settings(deadline=None, max_examples=50)
def test_mask_softmax(classes: int, psi: int, data: st.DataObject, scale: float) -> None:
    truth = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=4)))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = scale * torch.randn(len(truth), classes * psi, generator=rng)
    labels = mask_softmax(logits, truth, psi)
    for i, c in enumerate(truth.tolist()):
        first, end = c * psi, (c + 1) * psi
        outside = torch.cat([labels[i, :first], labels[i, end:]])
        assert not outside.count_nonzero()
        expected = torch.softmax(logits[i, first:end], 0)
        torch.testing.assert_close(labels[i, first:end], expected)
    own = truth[:, None] * psi + torch.arange(psi)
    others_huge = torch.full_like(logits, 1e6).scatter(1, own, logits.gather(1, own))
    assert torch.equal(mask_softmax(others_huge, truth, psi), labels)


def test_collapse_written_out() -> None:
    labels = torch.tensor([[0.75, 0.25, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0]], dtype=torch.float64)
    means = (0.375, 0.125, 0.25, 0.25)
    expected = sum(m * math.log(m) for m in means)
    labels.requires_grad_()
    found = collapse(labels)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(found, labels)
    assert torch.isfinite(gradient).all()  # also of classes that no sample of the batch has
    assert collapse(torch.full((5, 6), 1 / 6)).item() == pytest.approx(-math.log(6))


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_focal_losses_have_second_derivatives_where_the_answer_is_certain(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [0.5, 0.5]], requires_grad=True)
    hard = PRIMARY["focal"](logits, torch.tensor([0, 1]), gamma)
    loss = hard + AUXILIARY["focal"](logits, labels, 1.0, gamma)
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    second = torch.autograd.grad(first.square().sum() + first.sum(), (logits, labels))
    assert all(torch.isfinite(g).all() for g in (first, *second))


def reference(
    maxl: Maxl, x: Tensor, truth: Tensor, lr: float, gammas: tuple[float, float]
) -> float:
    """Pass 2's objective in float64, by a real step of torch's SGD on a copy of theta_1."""

    def focal(z: Tensor, p: Tensor, gamma: float) -> Tensor:
        q = torch.softmax(z, 1)
        return -(p * (1 - q) ** gamma * q.log()).sum(1).mean()

    network, x = copy.deepcopy(maxl.network).double().train(), x.double()
    target = copy.deepcopy(maxl.generator.target).double().train()
    with torch.no_grad():
        own = target.fc(target.features(x).pooled).view(N, C, PSI).softmax(2)
        hard = F.one_hot(truth, C).double()
        labels = (own * hard[:, :, None]).flatten(1)
    logits, auxiliary = network(x)
    loss = focal(logits, hard, gammas[0])
    loss = loss + maxl.config.alpha * focal(auxiliary["maxl"], labels, gammas[1])
    torch.autograd.backward(loss)
    torch.optim.SGD(network.parameters(), lr=lr).step()
    mean = labels.mean(0)
    with torch.no_grad():
        primary = focal(network(x)[0], hard, gammas[0])
    return float(primary + ENTROPY_WEIGHT * (mean * mean.log()).sum())


@pytest.mark.parametrize(
    ("loss", "gammas", "alpha"),
    [("focal+focal", (2.0, 2.0), 1.0), ("ce+focal", (0.0, 2.0), 0.5), ("ce+ce", (0.0, 0.0), 1.0)],
)
def test_meta_gradient_is_that_of_a_real_step(
    loss: str, gammas: tuple[float, float], alpha: float
) -> None:
    maxl, (x, truth), lr = smooth(loss, alpha=alpha), batch(), 3.0
    probe, h = copy.deepcopy(maxl), 1e-5
    probe.generator.double()
    parts = maxl.meta_step(x, truth, lr)
    objective = float(parts["meta_loss"] + ENTROPY_WEIGHT * parts["meta_entropy"])
    assert objective == pytest.approx(reference(probe, x, truth, lr, gammas), rel=1e-5)

    def slope(entry: Tensor, lr: float) -> float:
        kept, ends = entry.clone(), []
        for end in (kept + h, kept - h):
            entry.copy_(end)
            ends.append(reference(probe, x, truth, lr, gammas))
        entry.copy_(kept)
        return (ends[0] - ends[1]) / (2 * h)

    through_theta_1 = 0.0
    found = dict(maxl.generator.named_parameters())
    for name, parameter in probe.generator.named_parameters():
        gradient = found[name].grad
        assert gradient is not None
        for i in range(0, parameter.numel(), 5):
            entry = parameter.data.view(-1)[i]
            whole = slope(entry, lr)
            assert float(gradient.view(-1)[i]) == pytest.approx(whole, rel=1e-3, abs=1e-6), name
            through_theta_1 = max(through_theta_1, abs(whole - slope(entry, 0.0)))
    assert through_theta_1 > 1e-3  # else the regulariser alone would pass


def test_meta_step_descends_its_objective() -> None:
    maxl, (x, truth), lr = smooth(), batch(), 3.0
    maxl.optimizer.param_groups[0]["lr"] = 0.3
    objective = [reference(maxl, x, truth, lr, (2.0, 2.0))]
    for _ in range(10):
        maxl.meta_step(x, truth, lr)
        objective.append(reference(maxl, x, truth, lr, (2.0, 2.0)))
    assert all(b < a for a, b in itertools.pairwise(objective))


def test_meta_step_of_a_real_network_changes_theta_2_only() -> None:
    maxl, (x, truth) = small_resnet(), batch(8)
    maxl.network.train()
    torch.autograd.backward(maxl.losses(x, truth)[0])
    gradients = [p.grad.clone() for p in maxl.network.parameters() if p.grad is not None]
    theta_1, theta_2 = state(maxl.network), state(maxl.generator)
    parts = maxl.meta_step(x, truth, 0.1)
    assert all(map(torch.isfinite, parts.values()))
    assert not changed(theta_1, maxl.network)
    after = [p.grad for p in maxl.network.parameters() if p.grad is not None]
    assert len(after) == len(gradients)
    assert all(map(torch.equal, gradients, after))
    assert changed(theta_2, maxl.generator) == set(theta_2)


def test_losses_send_theta_2_nothing() -> None:
    maxl, (x, truth) = small_resnet(), batch(8)
    maxl.network.train()
    theta_2 = state(maxl.generator)
    loss, parts = maxl.losses(x, truth)
    torch.autograd.backward(loss)
    assert all(p.grad is None for p in maxl.generator.parameters())
    assert not changed(theta_2, maxl.generator)
    for name, parameter in maxl.network.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero(), name
    expected = parts["loss_primary"] + maxl.config.alpha * parts["loss_maxl"]
    torch.testing.assert_close(loss, expected)


def test_labels_do_not_depend_on_the_running_statistics() -> None:
    maxl, (x, truth) = smooth(), batch()
    before = maxl.labels(x, truth)
    maxl.generator.eval()
    maxl.generator.target.get_buffer("bn.running_mean").add_(5)
    assert torch.equal(maxl.labels(x, truth), before)


def test_frozen_parts_take_no_virtual_step() -> None:
    (x, truth), lr = batch(), 3.0
    free, maxl = smooth(), smooth()
    freeze_before(maxl.network, 2)
    expected = reference(maxl, x, truth, lr, (2.0, 2.0))
    theta_1 = state(maxl.network)
    parts = maxl.meta_step(x, truth, lr)
    objective = float(parts["meta_loss"] + ENTROPY_WEIGHT * parts["meta_entropy"])
    assert objective == pytest.approx(expected, rel=1e-5)
    assert objective != pytest.approx(reference(free, x, truth, lr, (2.0, 2.0)), rel=1e-3)
    assert not changed(theta_1, maxl.network)


def alternate(maxl: Maxl, steps: int) -> None:
    """Both passes, a batch at a time."""
    x, truth = batch()
    optimizer = torch.optim.SGD(maxl.network.parameters(), lr=0.1)
    for _ in range(steps):
        maxl.network.train()
        optimizer.zero_grad()
        torch.autograd.backward(maxl.losses(x, truth)[0])
        optimizer.step()
        maxl.meta_step(x, truth, 0.1)


def test_state_round_trip_repeats_the_next_step() -> None:
    maxl, other = smooth(), smooth(seed=9)
    maxl.start_epoch(150)
    alternate(maxl, 2)
    file = io.BytesIO()
    torch.save({"model": maxl.network.state_dict(), "maxl": maxl.state_dict()}, file)
    alternate(maxl, 2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.network.load_state_dict(saved["model"])
    other.load_state_dict(saved["maxl"])
    alternate(other, 2)
    assert not changed(state(maxl.generator), other.generator)
    assert not changed(state(maxl.network), other.network)


def test_seeds_reproduce() -> None:
    first, same, other = smooth(), smooth(), smooth(seed=1)
    for maxl in (first, same, other):
        alternate(maxl, 3)
    assert not changed(state(first.generator), same.generator)
    assert "target.fc.weight" in changed(state(first.generator), other.generator)


def test_rate_is_halved_every_quarter() -> None:
    rates = [generator_lr(epoch, 200) for epoch in (0, 49, 50, 99, 100, 150, 199)]
    assert rates == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 1.25e-4, 1.25e-4]
    assert generator_lr(0, 1) == 1e-3
    maxl = smooth()
    maxl.start_epoch(60)
    assert maxl.optimizer.param_groups[0]["lr"] == 5e-4


def test_other_losses_are_refused() -> None:
    with pytest.raises(UnknownName, match="auxiliary loss of MAXL 'kd'; known: ce, focal"):
        smooth("ce+kd")
    with pytest.raises(InputError, match="bce"):
        smooth("bce+ce")


def test_several_classes_a_sample_are_refused() -> None:
    maxl, (x, _) = smooth(), batch()
    with pytest.raises(InputError, match="samples have several"):
        maxl.labels(x, torch.ones(N, C))
