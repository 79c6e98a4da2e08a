"""A source's forward pass: several stills a clip, nothing waited for, finite or refused."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.sources.source import Preprocessing, Source, freeze

PLAIN = Preprocessing(4, (0, 0, 0), (1, 1, 1), scale=255)


class Scaled(nn.Module):
    """Logits far apart: the mean colour of an image, times ``by``."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * self.by


def clips(n: int, k: int, size: int = 20, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, k, size, size, 3), np.uint8))


def scaled(by: float) -> Source:
    return freeze("scaled", "scaled", Scaled(by), PLAIN, ("r", "g", "b"))


# --- stills -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 5), k=st.integers(1, 6), seed=st.integers(0, 1000))
def test_stills_give_the_mean_of_their_softmaxes(tiny: Source, n: int, k: int, seed: int) -> None:
    views = clips(n, k, seed=seed)
    found = tiny.log_probabilities(views)
    assert found.shape == (n, 12)
    assert found.dtype == torch.float32
    each = torch.stack([tiny.log_probabilities(views[:, i]) for i in range(k)])
    expected = each.double().exp().mean(dim=0)
    torch.testing.assert_close(found.double().exp(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(n))


def test_one_still_is_a_image_to_the_last_bit(tiny: Source) -> None:
    views = clips(7, 1)
    assert torch.equal(tiny.log_probabilities(views), tiny.log_probabilities(views[:, 0]))


def test_equal_stills_give_the_label_of_one(tiny: Source) -> None:
    one = clips(3, 1)
    found = tiny.log_probabilities(one.expand(-1, 4, -1, -1, -1))
    torch.testing.assert_close(found, tiny.log_probabilities(one), rtol=1e-5, atol=1e-4)


def test_the_mean_is_stable_where_probabilities_underflow() -> None:
    views = torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8)
    views[0, 0, ..., 0], views[0, 1, ..., 1] = 250, 250
    found = scaled(by=40.0).log_probabilities(views)[0]
    # 10,000 nats apart: each of the two wins one still, the third none, and none is -inf
    expected = torch.tensor([np.log(0.5), np.log(0.5), -10000.0], dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_stills_go_through_the_network_in_one_pass(tiny: Source) -> None:
    seen: list[int] = []
    assert isinstance(tiny.run, nn.Module)
    hook = tiny.run.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    tiny.log_probabilities(clips(5, 3))
    hook.remove()
    assert seen == [15]


@pytest.mark.parametrize(
    "views",
    [
        torch.zeros(2, 8, 8, 3),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 0, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 2, 2, 8, 8, 3, dtype=torch.uint8),
    ],
)
def test_views_of_another_form_are_refused(tiny: Source, views: Tensor) -> None:
    message = f"expected views of uint8 [n, H, W, 3] or [n, K, H, W, 3], found {views.dtype} "
    with pytest.raises(InputError, match=re.escape(message + str(tuple(views.shape)))):
        tiny.forward(views)


# --- finite or refused, when it is off the device ---------------------------------------------


def test_forward_leaves_the_check_to_whoever_has_the_labels() -> None:
    source = replace(scaled(by=1.0), network=Scaled(1e38))
    dark, bright = clips(2, 1, 4)[:, 0] * 0, clips(2, 1, 4)[:, 0] | 128
    source.require_finite(source.forward(dark).numpy())
    log_p = source.forward(bright)
    assert not torch.isfinite(log_p).all()
    message = "source scaled: the network's outputs are not finite"
    with pytest.raises(InputError, match=message):
        source.require_finite(log_p.numpy())
    with pytest.raises(InputError, match=message):
        source.log_probabilities(bright)


def test_one_value_that_is_not_finite_is_enough(tiny: Source) -> None:
    log_p = tiny.forward(clips(3, 1)).numpy()
    tiny.require_finite(log_p)
    for value in (np.nan, np.inf, -np.inf):
        faulty = log_p.copy()
        faulty[2, 11] = value
        with pytest.raises(InputError, match="not finite"):
            tiny.require_finite(faulty)


def test_constants_of_the_preprocessing_can_be_used_after_inference(tiny: Source) -> None:
    """They are kept from batch to batch: those of inference mode would be of no use outside."""
    how = Preprocessing(16, (0.11, 0.22, 0.33), (0.4, 0.5, 0.6))
    with torch.inference_mode():
        first = how(clips(2, 1)[:, 0])
    network = nn.Conv2d(3, 1, 3)
    x = how(clips(2, 1)[:, 0])
    assert torch.equal(x, first)
    network(x).sum().backward()
    assert network.weight.grad is not None


@pytest.mark.gpu
def test_forward_does_not_wait_for_the_accelerator(tiny: Source, device: torch.device) -> None:
    network = copy.deepcopy(tiny.network)
    source = freeze("t", "t", network, tiny.preprocessing, tiny.classes, device=device)
    cuda = device.type == "cuda"
    views = clips(8, 2).pin_memory() if cuda else clips(8, 2)
    source.forward(views)
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        log_p = source.forward(views)
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    source.require_finite(log_p.cpu().numpy())
