"""How a training gets its auxiliary labels: the protocol, and the method of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.data.soft_labels import labels_for


class Method(Protocol):
    """Where the auxiliary labels of a training come from.

    Attributes:
        temperature: T of the soft labels and of the auxiliary losses.
    """

    temperature: float

    def soft_labels(self, batch: SoftLabelBatch) -> dict[str, Tensor]:
        """Gives the auxiliary labels of a batch.

        Args:
            batch: Views and true classes of n samples.

        Returns:
            What the auxiliary loss of each head takes, by head: probabilities, logits or
            features, float32 ``[n, C_m]``, without a gradient.
        """

    def end_epoch(self, epoch: int, lr: float, loader: SoftLabelLoader) -> dict[str, float]:
        """Does what follows the steps of the target network in an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            lr: Learning rate of the target network.
            loader: The training data.

        Returns:
            What is added to the record of the epoch.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed training needs; empty if there is nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""


class Transfer:
    """SSKT: the auxiliary labels are those of frozen sources (equation 1 of the paper).

    Args:
        taken: What the auxiliary loss of each source takes: ``soft-labels``, ``features`` or
            ``logits``.
        temperature: T of the soft labels softmax(z_s / T).
    """

    def __init__(self, taken: Mapping[str, str], temperature: float) -> None:
        self._taken, self.temperature = taken, temperature

    def soft_labels(self, batch: SoftLabelBatch) -> dict[str, Tensor]:
        """See ``Method``."""
        return {
            name: labels_for(batch, name, what, self.temperature)
            for name, what in self._taken.items()
        }

    def end_epoch(self, epoch: int, lr: float, loader: SoftLabelLoader) -> dict[str, float]:
        """See ``Method``: frozen sources learn nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """See ``Method``: there is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Method``: there is no state."""
