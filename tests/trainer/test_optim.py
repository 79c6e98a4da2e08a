"""Learning rates against PyTorch's own schedules; averages and early stop written out."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from sskt.teacher_cache.errors import InputError
from sskt.trainer.config import TrainConfig
from sskt.trainer.optim import EarlyStop, Schedule, build_optimizer, moving_average

STEPS = 4


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(target="cifar10", **fields)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(1))


def begin(**fields: Any) -> Schedule:
    made = config(**fields)
    return Schedule(made, build_optimizer(made, [parameter()]), STEPS)


def rates(schedule: Schedule, losses: list[float | None]) -> list[list[float]]:
    """lr in each step of each epoch; the epochs end with these test losses."""
    found: list[list[float]] = []
    for loss in losses:
        found.append([])
        for i in range(STEPS):
            schedule.step(i / STEPS)
            found[-1].append(schedule.lr)
        schedule.end_epoch(loss)
    return found


def reload(state: Any) -> Any:
    """Through a file that holds nothing but plain values and tensors."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.integers(1, 12),
    milestones=st.lists(st.integers(1, 12), max_size=4),
    gamma=st.sampled_from([0.1, 0.2, 0.3, 1.5]),
    lr=st.sampled_from([0.1, 0.05, 0.0123]),
)
def test_multistep_has_the_bits_of_pytorch(
    epochs: int, milestones: list[int], gamma: float, lr: float
) -> None:
    fields = {"epochs": epochs, "milestones": milestones, "gamma": gamma, "lr": lr}
    made = config(**fields)
    reference = torch.optim.SGD([parameter()], lr=lr)
    scheduler = MultiStepLR(reference, made.resolved_milestones(), gamma)
    expected = []
    for _ in range(epochs):
        expected.append([reference.param_groups[0]["lr"]] * STEPS)
        reference.step()
        scheduler.step()
    assert rates(begin(**fields), [None] * epochs) == expected


def test_the_paper_s_schedule() -> None:
    found = rates(begin(), [None] * 200)
    assert {e: found[e][0] for e in (0, 59, 60, 119, 120, 159, 160, 199)} == pytest.approx(
        {0: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 159: 0.004, 160: 0.0008, 199: 0.0008}
    )


def test_cosine_is_pytorch_s_stepped_every_iteration() -> None:
    epochs = 5
    reference = torch.optim.SGD([parameter()], lr=0.1)
    scheduler = CosineAnnealingLR(reference, epochs * STEPS)
    expected = []
    for _ in range(epochs * STEPS):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        scheduler.step()
    schedule = begin(schedule="cosine", epochs=epochs)
    found = [lr for epoch in rates(schedule, [None] * epochs) for lr in epoch]
    assert found == pytest.approx(expected, rel=1e-9)
    schedule.step(0.0)
    assert schedule.lr == 0.0


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.sampled_from([3.0, 2.0, 1.9999, 1.0, 0.0, math.nan]), max_size=14),
    patience=st.integers(0, 3),
    gamma=st.sampled_from([0.1, 0.5]),
)
def test_plateau_is_pytorch_s(losses: list[float], patience: int, gamma: float) -> None:
    reference = torch.optim.SGD([parameter()], lr=1e-6)
    scheduler = ReduceLROnPlateau(reference, factor=gamma, patience=patience)
    expected = []
    for loss in losses:
        expected.append([reference.param_groups[0]["lr"]] * STEPS)
        scheduler.step(loss)
    schedule = begin(schedule="plateau", gamma=gamma, patience=patience, lr=1e-6)
    assert rates(schedule, list(losses)) == expected


def test_plateau_needs_test_losses() -> None:
    with pytest.raises(InputError, match="plateau follows the test loss; give a --test-split"):
        begin(schedule="plateau", test_split="none")
    with pytest.raises(InputError, match=r"needs --gamma below 1, found 1\.0"):
        begin(schedule="plateau", gamma=1.0)
    with pytest.raises(InputError, match="plateau follows the test loss"):
        begin(schedule="plateau").end_epoch(None)


def test_constant() -> None:
    assert rates(begin(schedule="constant", epochs=3), [None] * 3) == [[0.1] * STEPS] * 3


@pytest.mark.parametrize("name", ["multistep", "cosine", "plateau", "constant"])
def test_warmup_multiplies_every_schedule(name: str) -> None:
    """1.5 epochs of 4 steps: factors 1/6, 2/6, ... 6/6, then 1."""
    fields = {"schedule": name, "epochs": 4, "milestones": [1, 2], "patience": 0}
    losses: list[float | None] = [1.0, 2.0, 3.0, 4.0]
    plain = [lr for epoch in rates(begin(**fields), losses) for lr in epoch]
    warmed = [lr for epoch in rates(begin(**fields, warmup=1.5), losses) for lr in epoch]
    factors = [min(1.0, (i + 1) / 6) for i in range(len(plain))]
    expected = [f * lr for f, lr in zip(factors, plain, strict=True)]
    assert warmed == pytest.approx(expected)
    assert warmed[6:] == plain[6:]


@pytest.mark.parametrize("name", ["multistep", "cosine", "plateau"])
def test_a_schedule_goes_on_from_its_state(name: str) -> None:
    fields = {"schedule": name, "epochs": 8, "milestones": [2, 6], "patience": 1, "warmup": 4.5}
    losses: list[float | None] = [2.0] * 8  # a plateau before the break and one across it
    whole = rates(begin(**fields), losses)
    first = begin(**fields)
    rates(first, losses[:4])
    state = reload({"schedule": first.state_dict(), "optimizer": first.optimizer.state_dict()})
    second = begin(**fields)
    second.optimizer.load_state_dict(state["optimizer"])
    second.load_state_dict(state["schedule"])
    assert rates(second, losses[4:]) == whole[4:]


def test_a_schedule_made_after_the_optimizer_was_restored() -> None:
    """The restored lr is a late one: what is scheduled is the lr that the run began with."""
    first = begin(milestones=[1], epochs=4)
    rates(first, [None, None])
    made = config(milestones=[1], epochs=4)
    optimizer = build_optimizer(made, [parameter()])
    optimizer.load_state_dict(reload(first.optimizer.state_dict()))
    second = Schedule(made, optimizer, STEPS)
    second.load_state_dict(reload(first.state_dict()))
    assert rates(second, [None]) == rates(first, [None])


def test_groups_keep_their_own_lr() -> None:
    made = config(milestones=[1], gamma=0.5)
    optimizer = build_optimizer(made, [parameter()])
    optimizer.add_param_group({"params": [parameter()], "lr": 1.0})
    rates(Schedule(made, optimizer, STEPS), [None, None])
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.5]


@pytest.mark.parametrize("dampening", [0.0, 0.9])
def test_sgd_written_out(dampening: float) -> None:
    """v = momentum * v + (1 - dampening) * (g + decay * w), w = w - lr * v; Nesterov is off.

    The first v is the gradient itself, as in PyTorch.
    """
    made = config(lr=0.1, momentum=0.9, weight_decay=0.01, dampening=dampening)
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(made, [weight])
    w, v = 2.0, 0.0
    for i, gradient in enumerate((1.0, -0.5, 0.25)):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        share = 1 - dampening if i else 1.0
        v = 0.9 * v + share * (gradient + 0.01 * w)
        w -= 0.1 * v
    assert float(weight.detach()) == pytest.approx(w, rel=1e-6)


def test_dampening_makes_the_steps_under_a_constant_gradient_ten_times_smaller() -> None:
    """With momentum 0.9: v tends to g / (1 - 0.9) without dampening, and to g with 0.9."""
    steps = {}
    for dampening in (0.0, 0.9):
        weight = nn.Parameter(torch.zeros(1))
        made = config(lr=0.1, momentum=0.9, weight_decay=0.0, dampening=dampening)
        optimizer = build_optimizer(made, [weight])
        for _ in range(300):
            before = float(weight.detach())
            weight.grad = torch.ones(1)
            optimizer.step()
        steps[dampening] = before - float(weight.detach())
    assert steps[0.0] == pytest.approx(1.0, rel=1e-3)
    assert steps[0.9] == pytest.approx(0.1, rel=1e-3)


def test_adamw_decays_apart_from_the_gradient() -> None:
    """Its first step is lr * sign(g), whatever the decay; the decay is lr * decay * w."""
    made = config(optimizer="adamw", lr=0.1, weight_decay=0.01)
    weight = nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.tensor([7.0])
    build_optimizer(made, [weight]).step()
    assert float(weight.detach()) == pytest.approx(2 - 0.1 * 0.01 * 2 - 0.1, rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_parameters_are_not_optimised(name: str) -> None:
    frozen, trained = parameter(), parameter()
    frozen.requires_grad_(False)
    made = config(optimizer=name)
    optimizer = build_optimizer(made, iter([frozen, trained]))
    assert [p for g in optimizer.param_groups for p in g["params"]] == [trained]
    with pytest.raises(InputError, match="no parameter of the network trains"):
        build_optimizer(made, [frozen])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


def train(
    model: nn.Module, steps: int, average: AveragedModel | None = None
) -> list[dict[str, Tensor]]:
    """Weights after each of a few steps on noise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    weights = []
    for _ in range(steps):
        loss = model(torch.randn(5, 3, 8, 8, generator=generator)).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if average:
            average.update_parameters(model)
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
    return weights


@pytest.mark.parametrize("decay", [0.9, 0.25])
def test_average_written_out(decay: float) -> None:
    model = network()
    expected = {k: v.double() for k, v in model.state_dict().items()}
    average = moving_average(model, decay)
    for weights in train(model, 4, average):
        for name, value in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    found = average.module.state_dict()
    for name, value in found.items():
        if name == "1.num_batches_tracked":
            assert value.dtype == torch.int64 and int(value) == 4
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_average_leaves_the_training_as_it_is() -> None:
    plain, averaged = network(), network()
    average = moving_average(averaged, 0.9)
    for a, b in zip(train(plain, 3), train(averaged, 3, average), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert averaged.training and not average.module.training
    assert not any(p.requires_grad or p.grad is not None for p in average.module.parameters())
    assert all(p.requires_grad for p in averaged.parameters())


def test_average_of_what_does_not_move_is_that() -> None:
    model = network()
    average = moving_average(model, 0.999)
    for _ in range(3):
        average.update_parameters(model)
    now = average.module.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in model.state_dict().items())


def test_average_goes_on_from_its_state() -> None:
    model = network()
    average = moving_average(model, 0.9)
    train(model, 2, average)
    state = reload(average.module.state_dict())
    other = moving_average(network(), 0.9)
    other.module.load_state_dict(state)
    train(model, 1, average)
    other.update_parameters(model)
    expected = average.module.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in other.module.state_dict().items())


def test_early_stop_counts_epochs_without_a_better_one() -> None:
    early = EarlyStop(2)
    seen = [(early.better(v), early.stop) for v in (1.0, 3.0, 3.0, 4.0, 2.0, math.nan)]
    better = [True, True, False, True, False, False]
    assert seen == list(zip(better, [False] * 5 + [True], strict=True))


def test_early_stop_without_patience_never_stops() -> None:
    early = EarlyStop(None)
    assert [early.better(v) for v in (1.0, *[0.0] * 50)].count(True) == 1
    assert not early.stop


def test_early_stop_goes_on_from_its_state() -> None:
    early = EarlyStop(2)
    early.better(5.0)
    early.better(4.0)
    other = EarlyStop(2)
    other.load_state_dict(reload(early.state_dict()))
    assert not other.better(5.0) and other.stop
