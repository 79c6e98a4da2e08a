"""A batch whose soft labels travel with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.views.mixing import Mixed
from sskt.trainer.data.soft_labels import BatchLabels, WindowLabels

Int64 = NDArray[np.int64]
Normalise = Callable[[Tensor], Tensor]
"""uint8 views ``[n, H, W, 3]`` to the float32 input of a network, ``[n, 3, H, W]``."""


class SoftLabelBatch:
    """One batch: views, true classes and soft labels of the same samples.

    A ``SoftLabelLoader`` makes them. A batch stays valid when the loader has gone on.

    Attributes:
        samples: Row numbers of the samples in the target: int64 ``[n]``, a numpy array.
        seeds: The view seed of each view: int64 ``[n]``, a numpy array; None where all views of
            the epoch have one.
        views: uint8 ``[n, H, W, 3]``, or ``[n, D, H, W, 3]`` for clips, on the device.
        labels: True classes on the device: int64 ``[n]``; ``[n, C]`` if a sample may have several
            classes (1 present, 0 absent, -1 difficult). Under a policy that mixes samples
            float32 ``[n, C]``: the classes of both samples by their weights, as
            ``cross_entropy`` and ``binary_cross_entropy_with_logits`` take them.
        position: The window of the epoch that the batch belongs to, and its number in it.
        whole: Samples of the batch in all processes together.
        unreadable: Samples of this process that were left out since the batch before because they
            cannot be read.
        checked: Views of the batch that were compared with the stored checks.
        partners: Row numbers of the samples that the views were mixed with: int64 ``[n]``, a numpy
            array; None under a policy that mixes none.
        weights: The share of the sample itself in its view: float32 ``[n]``, a numpy array; or
            None.
    """

    def __init__(
        self,
        samples: Int64,
        views: Tensor,
        labels: Tensor,
        soft_labels: WindowLabels,
        normalise: Normalise,
        *,
        position: tuple[int, int] = (0, 0),
        whole: int | None = None,
        unreadable: int = 0,
        checked: int = 0,
        mixed: Mixed | None = None,
        seeds: Int64 | None = None,
    ) -> None:
        self.samples, self.views, self.labels = samples, views, labels
        self.position, self.unreadable, self.checked = position, unreadable, checked
        self.seeds = seeds
        self.whole = len(samples) if whole is None else whole
        self._window, self._normalise = soft_labels, normalise
        self.partners = None if mixed is None else mixed.partners
        self.weights = None if mixed is None else mixed.weights
        self._images: Tensor | None = None
        self._soft: BatchLabels | None = None

    def __len__(self) -> int:
        """Samples of this process in the batch."""
        return len(self.samples)

    def __getitem__(self, rows: slice) -> SoftLabelBatch:
        """Some of the samples as a batch of their own, as gradient accumulation needs them."""
        return self._changed(
            samples=self.samples[rows],
            views=self.views[rows],
            labels=self.labels[rows],
            partners=None if self.partners is None else self.partners[rows],
            weights=None if self.weights is None else self.weights[rows],
            seeds=None if self.seeds is None else self.seeds[rows],
        )

    @property
    def images(self) -> Tensor:
        """The input of a network: float32 ``[n, 3, H, W]``, or ``[n, 3, D, H, W]`` for clips.

        The views are normalised on the device when this is first read; channels-last in memory.
        """
        if self._images is None:
            self._images = self._normalise(self.views)
        return self._images

    def soft(self, source: str, temperature: float = 1.0) -> Tensor:
        """Decodes the soft labels of a source.

        Args:
            source: One of the loader's ``sources``.
            temperature: T of the paper's equation 1.

        Returns:
            softmax(z_s / T): float32 ``[n, C_m]`` on the device.

        Raises:
            UnknownName: If the loader has no such source.
            InputError: If the labels are stored as top-k, which is wrong at this temperature; or
                if they are features without the last layer of their source.
        """
        return self._labels.soft(source, temperature).to(self.views.device)

    def features(self, source: str) -> Tensor:
        """Decodes the features of a source, cached with ``--output features``.

        Args:
            source: One of the loader's ``sources``.

        Returns:
            v_s: float32 ``[n, D_m]`` on the device.

        Raises:
            UnknownName: If the loader has no such source.
            InputError: If its label set holds no features.
        """
        return self._labels.features(source).to(self.views.device)

    def logits(self, source: str) -> Tensor:
        """Decodes the logits of a source, cached with ``--output logits``.

        They are also computed from features whose last layer is stored with them.

        Args:
            source: One of the loader's ``sources``.

        Returns:
            z_s: float32 ``[n, C_m]`` on the device.

        Raises:
            UnknownName: If the loader has no such source.
            InputError: If its label set holds soft labels, or features without a last layer.
        """
        return self._labels.logits(source).to(self.views.device)

    @property
    def _labels(self) -> BatchLabels:
        if self._soft is None:
            self._soft = self._window.of(self.samples, self.views, self.seeds)
        return self._soft

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SoftLabelBatch:
        """Gives the batch on another device.

        Args:
            device: The device of views, true classes and soft labels.
            non_blocking: As in ``Tensor.to``.

        Returns:
            The same batch if it is on that device already, else a copy.
        """
        views = self.views.to(device, non_blocking=non_blocking)
        if views is self.views:
            return self
        return self._changed(views=views, labels=self.labels.to(device, non_blocking=non_blocking))

    def _changed(self, **fields: Any) -> SoftLabelBatch:
        other = copy.copy(self)
        vars(other).update(fields, _images=None, _soft=None)
        return other
