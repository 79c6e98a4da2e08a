"""BatchNorm of a source: stored statistics, or those of its batch, and never a moved statistic."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import TINY
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, TeacherMoved
from sskt.teacher_cache.sources.batchnorm import batch_of, parse_batchnorm
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Preprocessing, Source, freeze, state_sha256

HOW = Preprocessing(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def images(n: int, size: int = 20, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    brightness = rng.integers(40, 256, (n, 1, 1, 1))
    return torch.from_numpy((rng.random((n, size, size, 3)) * brightness).astype(np.uint8))


@pytest.fixture(scope="module")
def batch6() -> Source:
    return open_source(parse_source(f"tiny={TINY}:build"), batchnorm="batch-6")


def frozen(network: nn.Module, batchnorm: str = "batch-4", classes: int = 3) -> Source:
    names = tuple(str(i) for i in range(classes))
    return freeze("own", "own", network, HOW, names, batchnorm=batchnorm)


# --- the modes and their names ----------------------------------------------------------------


def test_modes_are_read() -> None:
    assert parse_batchnorm("eval", 64) == "eval"
    assert parse_batchnorm("eval", 1) == "eval"
    assert parse_batchnorm("batch", 64) == "batch-64"
    assert batch_of("eval") is None
    assert batch_of("batch-64") == 64
    for mode, size, message in [
        ("train", 64, "--batchnorm train: expected eval or batch"),
        ("batch", 1, "a batch of 1 has no statistics of its own; give --batch-size 2"),
    ]:
        with pytest.raises(InputError, match=message):
            parse_batchnorm(mode, size)


@pytest.mark.parametrize("text", ["", "batch", "batch-", "batch-0", "batch-1", "batch-04", "b-4"])
def test_a_mode_without_its_batch_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected eval, or batch-B with B of 2 or more"):
        open_source(parse_source(f"tiny={TINY}:build"), batchnorm=text)


def test_the_mode_is_part_of_the_identity_and_nothing_else_is(tiny: Source, batch6: Source) -> None:
    assert tiny.identity()["batchnorm"] == "eval"
    assert batch6.identity() == tiny.identity() | {"batchnorm": "batch-6"}
    assert (tiny.batch, batch6.batch) == (None, 6)


# --- what batch mode computes -----------------------------------------------------------------


def test_batch_mode_is_training_mode_of_the_batchnorm_layers_alone(tiny: Source) -> None:
    layers = list(copy.deepcopy(tiny.network).children())
    network = nn.Sequential(*layers[:3], nn.Dropout(0.5), *layers[3:])
    reference = copy.deepcopy(network).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    source = frozen(network, "batch-5", 12)
    views = images(5)
    with torch.inference_mode():
        expected = torch.log_softmax(reference(HOW(views)), dim=1)
    found = source.log_probabilities(views)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    stored = frozen(copy.deepcopy(network.eval()), "eval", 12).log_probabilities(views)
    assert (found.exp() - stored.exp()).abs().sum(dim=1).max() > 0.1


def test_mean_and_biased_variance_are_those_of_the_batch() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3))
    found = frozen(network).log_probabilities(views := images(4, 8)).double().numpy()
    x = HOW(views).double().flatten(1).numpy()
    linear = network[1]
    assert isinstance(linear, nn.Linear)
    y = x @ linear.weight.double().numpy().T + linear.bias.double().numpy()
    y = (y - y.mean(axis=0)) / np.sqrt(y.var(axis=0) + 1e-5)
    expected = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(6)), seed=st.integers(0, 100))
def test_labels_belong_to_the_set_of_images_not_to_their_order(
    batch6: Source, order: list[int], seed: int
) -> None:
    views = images(6, seed=seed)
    found = batch6.log_probabilities(views)[order]
    torch.testing.assert_close(batch6.log_probabilities(views[order]), found, rtol=1e-4, atol=1e-3)


def test_a_label_depends_on_its_batch_in_batch_mode_only(tiny: Source, batch6: Source) -> None:
    one, other = images(6), torch.cat([images(6)[:1], images(5, seed=9)])

    def distance(source: Source) -> float:
        first = [source.log_probabilities(views)[0].exp() for views in (one, other)]
        return float((first[0] - first[1]).abs().sum() / 2)

    assert distance(batch6) > 0.01
    assert distance(tiny) < 1e-5


def test_stored_statistics_are_not_read_in_batch_mode(batch6: Source) -> None:
    network = copy.deepcopy(batch6.network)
    views, names = images(6), batch6.classes
    source = freeze("own", "own", network, batch6.preprocessing, names, batchnorm="batch-6")
    expected = source.log_probabilities(views)
    for module in source.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.fill_(float("nan"))
            module.running_var.fill_(float("nan"))
    assert torch.equal(source.log_probabilities(views), expected)


# --- frozen all the same ----------------------------------------------------------------------


def test_statistics_do_not_move_in_batch_mode(tiny: Source, batch6: Source) -> None:
    for seed in range(3):
        batch6.log_probabilities(images(6, seed=seed))
    assert batch6.weights == tiny.weights == state_sha256(batch6.network)
    batch6.check_frozen()
    assert not any(module.training for module in batch6.network.modules())
    views = images(6)
    assert torch.equal(batch6.log_probabilities(views), batch6.log_probabilities(views))


def test_a_network_that_changes_in_batch_mode_is_found_out() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 8), nn.BatchNorm2d(3), nn.Flatten())
    source = frozen(network)
    running = network[1].running_mean
    assert isinstance(running, Tensor)
    running.add_(1)
    with pytest.raises(TeacherMoved, match="source own changed while labelling"):
        source.check_frozen()


def test_an_error_on_the_way_leaves_the_statistics_in_place() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3))
    source = frozen(network)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        source.log_probabilities(images(1, 8))
    source.check_frozen()
    assert network[2].running_mean is not None


def test_the_state_is_whole_during_a_forward_pass() -> None:
    """The thread that writes labels hashes the network while the next batch runs."""

    class Watched(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(state_sha256(network))
            return super().forward(x)

    seen: list[str] = []
    network = nn.Sequential(nn.Conv2d(3, 3, 8), Watched(3), nn.Flatten())
    source = frozen(network)
    source.log_probabilities(images(4, 8))
    assert seen and set(seen) == {source.weights}


# --- networks of all kinds --------------------------------------------------------------------


def test_a_layer_that_does_more_than_normalise_keeps_the_rest() -> None:
    """timm's BatchNormAct2d is a BatchNorm2d with the activation inside."""
    timm = pytest.importorskip("timm.layers")
    torch.manual_seed(2)
    conv = nn.Conv2d(3, 6, 3)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    inside = nn.Sequential(conv, timm.BatchNormAct2d(6), *head)
    beside = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), *head)
    without = nn.Sequential(conv, nn.BatchNorm2d(6), *head)
    views = images(4)
    inside_, beside_, without_ = (
        frozen(copy.deepcopy(n)).log_probabilities(views) for n in (inside, beside, without)
    )
    torch.testing.assert_close(inside_, beside_)
    assert not torch.allclose(inside_, without_, atol=1e-3)


def test_bfloat16_and_sync_batchnorm_work_in_batch_mode() -> None:
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)
    )
    views = images(4, 8)
    exact = frozen(copy.deepcopy(network)).log_probabilities(views)
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    sync = convert(copy.deepcopy(network))
    torch.testing.assert_close(frozen(sync).log_probabilities(views), exact)
    half = freeze("own", "own", network, HOW, ("a", "b", "c"), batchnorm="batch-4",
                  precision="bfloat16")  # fmt: skip
    torch.testing.assert_close(half.log_probabilities(views), exact, rtol=0, atol=0.1)


def test_a_network_can_be_frozen_again_in_the_other_mode(tiny: Source, batch6: Source) -> None:
    network, views = copy.deepcopy(batch6.network), images(6)
    for batchnorm, same in (("eval", tiny), ("batch-6", batch6), ("batch-6", batch6)):
        source = freeze("t", "t", network, tiny.preprocessing, tiny.classes, batchnorm=batchnorm)
        assert torch.equal(source.log_probabilities(views), same.log_probabilities(views))


def test_batch_mode_without_batchnorm_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(InputError, match="the network has no BatchNorm layer; use --batchnorm ev"):
        frozen(network)


def test_a_layer_whose_forward_was_replaced_is_refused_in_batch_mode() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 8), nn.BatchNorm2d(3), nn.Flatten())
    network[1].forward = network[1].forward
    with pytest.raises(InputError, match="forward of BatchNorm layer '1' was replaced"):
        frozen(network)


def test_a_layer_without_statistics_needs_batch_mode() -> None:
    """In eval mode torch takes the batch's statistics for it without a word."""
    network = nn.Sequential(
        nn.Conv2d(3, 3, 8), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()
    )
    with pytest.raises(InputError, match=r"layer '1' keeps no running statistics.*--batchnorm bat"):
        frozen(network, "eval")
    assert frozen(network).log_probabilities(images(4, 8)).shape == (4, 3)


def test_known_networks_open_in_batch_mode(tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    file = tmp_path / "m.pth"
    torch.save(models.mobilenet_v3_small().state_dict(), file)
    wanted = parse_source("imagenet:mobilenet_v3_small@64")
    source = open_source(wanted, weights=file, batchnorm="batch-3")
    assert source.log_probabilities(images(3, 64)).shape == (3, 1000)
    source.check_frozen()
