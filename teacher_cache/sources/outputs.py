"""What a network returns: logits, and whether they are a function of its image alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, UnknownName

Run = Callable[[Tensor], Tensor]
Outputs = Literal["logits", "probabilities", "log-probabilities"]
"""What a network's outputs are. Softmax of logits and of log-probabilities is the soft label."""

LOGITS: Outputs = "logits"
PROBABILITIES: Outputs = "probabilities"
CPU = torch.device("cpu")

AGAIN_TOLERANCE = 1e-3
"""Largest difference of an image's outputs in two runs, relative to their spread."""

BATCH_TOLERANCE = 3e-2
"""The same of an image alone and in a batch. Other kernels run for other sizes of a batch: of
layers in half precision they differ by about 1 %."""

SMALLEST_SPREAD = 0.1
"""Spread of outputs below which differences are not taken relative to it."""

SUM_TOLERANCE = 1e-2
"""Largest difference from 1 of the sum of an image's probabilities, in half precision."""


def parse_outputs(text: str) -> Outputs | None:
    """Reads ``--logits-are``; None for an empty text. Raises ``UnknownName``."""
    kinds: tuple[Outputs, ...] = get_args(Outputs)
    if text and text not in kinds:
        raise UnknownName("--logits-are", text, kinds)
    return next((kind for kind in kinds if kind == text), None)


def tensor_of(output: Any) -> Any:
    """The ``logits`` of an output object that has them (Hugging Face's do); else the output."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


LEAST_ODDS = 2.0**-24
"""Probabilities of independent classes are clamped to this and its difference from 1, the largest
float32 below 1. Their logits lie between -16.6 and 16.6."""


def as_logits(outputs: Tensor, kind: Outputs) -> Tensor:
    """Outputs as float32 logits; probabilities below float32's smallest normal number become it."""
    if kind != PROBABILITIES:
        return outputs.float()
    return outputs.float().clamp_min(torch.finfo(torch.float32).tiny).log()


def as_independent_logits(outputs: Tensor, kind: Outputs) -> Tensor:
    """Outputs of classes that do not exclude each other as float32 logits, log(p / (1 - p))."""
    if kind == LOGITS:
        return outputs.float()
    p = outputs.float() if kind == PROBABILITIES else outputs.float().exp()
    return p.clamp(LEAST_ODDS, 1 - LEAST_ODDS).logit()


@contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """Restores the global random numbers afterwards, whatever a user's network draws."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def count_outputs(name: str, network: nn.Module, size: int, device: torch.device = CPU) -> int:
    """C of a network that returns logits ``[n, C]`` for images of ``size`` pixels.

    Args:
        name: Name of the source, for messages.
        network: It is put into evaluation mode.
        size: Pixels of the input.
        device: The device that the network is on.

    Returns:
        The number of classes.

    Raises:
        InputError: If the network returns something else.
        Exception: Whatever the network itself raises.
    """
    with rng_kept(device), torch.inference_mode():
        output = tensor_of(network.eval()(torch.zeros(1, 3, size, size, device=device)))
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"source {name}: the network must return logits [n, C], found {found}")
    return int(output.shape[1])


def probe_images(size: int) -> Tensor:
    """Eight fixed images for testing a network: uint8 ``[8, size, size, 3]``.

    Noise, dark noise, bright noise, grey levels from left to right, black, white, red and blue.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
    ramp = torch.linspace(0, 255, size).to(torch.uint8)[None, :, None].expand(size, size, 3)
    flat = [
        torch.tensor(color, dtype=torch.uint8).expand(size, size, 3)
        for color in ((0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255))
    ]
    return torch.stack([noise, noise // 4, 255 - noise // 8, ramp, *flat])


def dependence(run: Run, pair: Tensor, outputs: Tensor, *, in_batches: bool) -> str:
    """Why outputs are no function of their image alone.

    The second of two images is run twice alone. If that drew random numbers, it is run eight
    times more: what they decide may be the same by chance.

    Args:
        run: From images ``[n, H, W, 3]`` to outputs ``[n, C]``.
        pair: Two images.
        outputs: Their outputs when they were run together.
        in_batches: Whether labels are meant to depend on their batch; then only both images
            together are run again.

    Returns:
        The cause; empty if the outputs are such a function, within the tolerances above.
    """
    images = pair if in_batches else pair[1:]
    before = _rng_state(pair.device)
    alone = run(images)
    draws = not torch.equal(before, _rng_state(pair.device))
    for _ in range(9 if draws else 1):
        if distance(alone, run(images)) > AGAIN_TOLERANCE:
            return "running it twice gives two results, as with dropout"
    if in_batches or distance(alone, outputs[1:]) <= BATCH_TOLERANCE:
        return ""
    return "an image's outputs depend on the others in its batch, as with batch statistics"


def _rng_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.random.get_rng_state()


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference of outputs ``[n, C]``, relative to their spread over the classes."""
    one, other = (x.float() - x.float().mean(dim=1, keepdim=True) for x in (one, other))
    return float((one - other).abs().max() / one.abs().max().clamp_min(SMALLEST_SPREAD))


def wrong_kind(run: Run, images: Tensor, outputs: Tensor, declared: Outputs | None) -> str:
    """Why outputs are not of the kind that is declared, or not logits if nothing is.

    If all are between 0 and 1, the other images are run too: a few logits may be by chance.

    Args:
        run: From images ``[n, H, W, 3]`` to outputs ``[n, C]``.
        images: As ``probe_images``.
        outputs: Those of the first images.
        declared: What the user says they are; None: nothing.

    Returns:
        The cause; empty if they may be of that kind.
    """
    if declared == LOGITS:
        return ""
    if declared is not None:
        least, most = float(outputs.min()), float(outputs.max())
        lowest = 0.0 if declared == PROBABILITIES else float("-inf")
        highest = 1.0 if declared == PROBABILITIES else 0.0
        if least < lowest or most > highest + SUM_TOLERANCE:
            return f"its outputs, from {least:.3g} to {most:.3g}, are no {declared}"
        return ""
    if not _are_probabilities(outputs) or not _are_probabilities(outputs := run(images)):
        return ""
    if _sum_to_1(outputs):
        how, hint = "and sum to 1, as after a softmax", ""
    else:
        how = "as after a sigmoid"
        hint = (
            " (if its classes do not exclude each other, store their logits with --output logits "
            "--logits-are probabilities)"
        )
    return f"its outputs are all between 0 and 1 {how}, so that labels would be flat{hint}"


def _are_probabilities(outputs: Tensor) -> bool:
    least, most = float(outputs.min()), float(outputs.max())
    constant = least == most  # as the logits of a network whose last layer is zero
    return least >= 0 and most <= 1 and (not constant or _sum_to_1(outputs))


def _sum_to_1(outputs: Tensor) -> bool:
    return bool((outputs.float().sum(dim=1) - 1).abs().max() < SUM_TOLERANCE)
