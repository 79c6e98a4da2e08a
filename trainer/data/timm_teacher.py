"""A teacher for timm's distillation tasks that reads stored labels instead of running a network."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from timm.task import DistillationTeacher
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_label_loader import SoftLabelLoader

RECENT = 2
"""Batches that the loader keeps: accelerate asks for one ahead of the step."""


class TimmTeacher(DistillationTeacher):
    """Takes the place of the teacher network in ``timm.task``, for a ``SoftLabelLoader``.

    ``LogitDistillationTask(student, teacher_model=sskt.TimmTeacher(loader))`` trains from the label
    set. So does ``TokenDistillationTask``; and ``FeatureDistillationTask`` from a set of features,
    with ``teacher_feature_dim=loader.source_widths[source]``. The input must be the ``images`` of
    one of the last two batches of the loader: they are compared, so that a label never goes with
    another image.

    Args:
        loader: The loader of the training.
        source: Name of the source; default: the only one of the loader.
        temperature: The temperature of the task. It matters for top-k labels only, which are
            refused at another temperature than 1.

    Raises:
        UnknownName: If the loader has no such source.
        InputError: If the loader has several sources and none is named.
    """

    def __init__(
        self, loader: SoftLabelLoader, source: str = "", *, temperature: float = 1.0
    ) -> None:
        nn.Module.__init__(self)  # that of timm's class wants a network
        if not source and len(loader.sources) != 1:
            raise InputError(
                f"the loader has the sources {', '.join(loader.sources) or '(none)'}; name one of "
                "them with source="
            )
        self.source = source or loader.sources[0]
        if self.source not in loader.sources:
            raise UnknownName("source of the loader", self.source, loader.sources)
        self.loader, self.temperature = loader, temperature
        loader.recent = deque(loader.recent, maxlen=RECENT)

    def forward(self, input: Tensor, return_features: bool = False) -> Tensor:
        """The stored labels of a batch as logits.

        Args:
            input: The ``images`` of the batch, float ``[n, 3, H, W]``.
            return_features: Whether to give features, as ``FeatureDistillationTask`` asks for.

        Returns:
            T · log softmax(z_s / T): float32 ``[n, C_m]`` on the device of the input. Its softmax
            at temperature T is the stored label. Or the features: float32 ``[n, D_m]``.

        Raises:
            InputError: If the input is not a batch of the loader, or the label set does not hold
                what is asked for.
        """
        if return_features:
            return self._batch(input).features(self.source).to(input.device)
        p_s = self._batch(input).soft(self.source, self.temperature).to(input.device)
        tiny = torch.finfo(torch.float32).tiny  # log(0) would make the task's divergence NaN
        return self.temperature * p_s.clamp_min(tiny).log()

    def _batch(self, input: Tensor) -> SoftLabelBatch:
        for batch in reversed(self.loader.recent):
            images = batch.images
            if images.shape == input.shape and (
                images.data_ptr() == input.data_ptr()
                or torch.equal(images.to(input.device, input.dtype), input)
            ):
                return batch
        raise InputError(
            "the input of the task is not the images of a batch of the loader; pass batch.images "
            "as it is, without mixup or other changes"
        )

    def normalize_input(
        self,
        input: Tensor,
        student_mean: Tensor | None = None,
        student_std: Tensor | None = None,
    ) -> Tensor:
        """The input as it is: the label belongs to the view, whatever its normalisation."""
        return input

    def compile(self, *args: Any, **kwargs: Any) -> TimmTeacher:  # type: ignore[override]
        """Nothing is compiled, since no network is run."""
        return self
