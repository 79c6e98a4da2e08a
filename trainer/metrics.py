"""Metrics of a test split, in percent.

Scores that are equal share one threshold, as in scikit-learn and torchmetrics (which the tests
compare with). torchmetrics itself puts logits through a float32 sigmoid, where all above 17 tie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sskt.teacher_cache.errors import Diverged, InputError


def accuracy_counts(logits: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """How many samples of a batch are right.

    Args:
        logits: float ``[n, C]``.
        truth: int64 ``[n]``.

    Returns:
        ``top1`` and ``top5``: int64 scalars on the device of the logits. With fewer than 5
        classes top-5 takes all of them.
    """
    right = logits.argmax(1) == truth
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    # Among equal logits topk may leave out the one that argmax takes.
    within = (best == truth[:, None]).any(1) | right
    return {"top1": right.sum(), "top5": within.sum()}


def single_label(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy of a split.

    Args:
        logits: float ``[N, C]``, N at least 1.
        truth: int64 ``[N]``.

    Returns:
        ``top1`` and ``top5`` in %.
    """
    return {k: 100 * int(v) / len(truth) for k, v in accuracy_counts(logits, truth).items()}


def multi_label(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """Average precision of a split with several classes a sample.

    Args:
        logits: float ``[N, C]``.
        truth: ``[N, C]``: 1 (positive), 0, or -1 (difficult).

    Returns:
        ``ap`` and ``map`` in %. ``ap`` is the paper's: of each image over its classes, then the
        mean over images; difficult classes count as negatives, and images without a positive
        have no AP and are left out. ``map`` is the VOC challenge's since 2010: of each class over
        the images, precision interpolated at all points, then the mean over classes; difficult
        images are ignored, and classes without a positive are left out.

    Raises:
        Diverged: For logits that are NaN.
        InputError: If no class of any sample is positive.
    """
    if logits.isnan().any():
        raise Diverged("the network's outputs on the test split are NaN; lower --lr")
    if not (truth > 0).any():
        raise InputError("no sample of the test split has a positive class, so there is no AP")
    images = average_precision(logits, truth.clamp_min(0))
    classes = average_precision(logits.T, truth.T, interpolate=True)
    return {"ap": 100 * float(images.nanmean()), "map": 100 * float(classes.nanmean())}


def average_precision(scores: Tensor, truth: Tensor, *, interpolate: bool = False) -> Tensor:
    """AP of each row: the sum over thresholds of (recall gained) x precision.

    Args:
        scores: float ``[R, M]`` without NaN.
        truth: ``[R, M]``: 1 (positive), 0, or -1 for an entry to ignore.
        interpolate: Precision is the best one at this recall or above.

    Returns:
        float64 ``[R]`` in 0 .. 1; NaN for a row without a positive.
    """
    scores, order = scores.sort(dim=1, descending=True)
    truth = truth.gather(1, order)
    positive = (truth == 1).double()
    found = positive.cumsum(1)
    retrieved = (truth >= 0).double().cumsum(1)
    precision = found / retrieved.clamp_min(1)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    tied = torch.zeros_like(scores, dtype=torch.bool)
    tied[:, :-1] = scores[:, :-1] == scores[:, 1:]
    last = place.masked_fill(tied, scores.shape[1]).flip(1).cummin(1).values.flip(1)
    precision = precision.gather(1, last)
    if interpolate:
        precision = precision.flip(1).cummax(1).values.flip(1)
    return (positive * precision).sum(1) / positive.sum(1)


def video_level(logits: Tensor, truth: Tensor, videos: Sequence[str]) -> dict[str, float]:
    """Accuracy by video: the mean softmax over the clips of a video decides.

    Every video counts; the released code never scores the last one.

    Args:
        logits: float ``[N, C]``, one row a clip, in any order.
        truth: int64 ``[N]``.
        videos: The video of each clip.

    Returns:
        ``video_top1`` in %, and ``videos``, how many there are.

    Raises:
        Diverged: For logits that are not finite.
        InputError: For clips of one video that differ in class.
    """
    if not logits.isfinite().all():
        raise Diverged("the network's outputs on the test split are not finite; lower --lr")
    numbers: dict[str, int] = {}
    of = torch.tensor(
        [numbers.setdefault(video, len(numbers)) for video in videos], device=logits.device
    )
    if len(of) != len(logits) or len(truth) != len(logits):
        raise InputError(
            f"{len(logits)} clips were scored, but {len(truth)} have a class and {len(of)} a video"
        )
    label = torch.empty(len(numbers), dtype=truth.dtype, device=logits.device)
    label[of] = truth
    if (odd := (label[of] != truth).nonzero()).numel():
        raise InputError(f"clips of video {videos[int(odd[0])]} are in more than one class")
    # The clips of a video have one count, so their sum ranks its classes as their mean does.
    total = torch.zeros(len(numbers), logits.shape[1], dtype=torch.float64, device=logits.device)
    total.index_add_(0, of, logits.double().softmax(1))
    right = int((total.argmax(1) == label).sum())
    return {"video_top1": 100 * right / len(numbers), "videos": float(len(numbers))}
