"""What the auxiliary losses take of a source, and which of them fit what a label set holds.

No torch here: label sets are chosen by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.format.features import FEATURES, LOGITS, SOFT_LABELS

if TYPE_CHECKING:
    from sskt.teacher_cache.sources.source import Source

READS = {"bce": LOGITS, "cosine": FEATURES, "mse": FEATURES}
"""What an auxiliary loss takes of a source; the others of ours take soft labels."""
METHODS = {SOFT_LABELS: "soft", FEATURES: "features", LOGITS: "logits"}
"""The method of a batch that gives each of them."""


class Holding(Protocol):
    """What gives labels: a label set, or what is known of a source that runs in the step."""

    @property
    def output(self) -> str:
        """What it holds: ``soft-labels``, ``features`` or ``logits``."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for features without a head."""

    @property
    def width(self) -> int:
        """Values of a sample: D of features, else C."""


@dataclass(frozen=True)
class Live:
    """See ``Holding``: what is known of a source that runs in the step."""

    output: str
    classes: tuple[str, ...]
    width: int

    @classmethod
    def of(cls, source: Source) -> Live:
        """Makes it of a source."""
        kind = source.output.kind if source.output else SOFT_LABELS
        return cls(kind, source.classes, source.width)


def readable(held: Holding) -> set[str]:
    """What can be had of a label set: features with a head give soft labels and logits, too."""
    if held.output == FEATURES and held.classes:
        return {FEATURES, SOFT_LABELS, LOGITS}
    return {held.output}


def in_words(output: str) -> str:
    """``soft labels``, ``features`` or ``logits``."""
    return output.replace("-", " ")


def stated_auxiliary(loss: str) -> str:
    """The auxiliary loss of ``PRIMARY+AUXILIARY``; empty if it is left to the label sets.

    Whether there is such a loss is for ``losses.parse_loss`` to say.
    """
    return loss.partition("+")[2]


def needed_output(loss: str) -> str:
    """What label sets are made with for a ``PRIMARY+AUXILIARY`` that names an auxiliary loss."""
    return READS.get(stated_auxiliary(loss), SOFT_LABELS)


def usual_auxiliary(held: Holding) -> str:
    """The auxiliary loss that ``--loss auto`` takes for a label set."""
    if held.output == LOGITS:
        return "bce"
    return "ce" if SOFT_LABELS in readable(held) else "cosine"


def taken_by(loss: str, held: Holding) -> str:
    """What an auxiliary loss takes of a label set; one of the user takes what is held."""
    return held.output if ":" in loss else READS.get(loss, SOFT_LABELS)


def fits(loss: str, held: Holding) -> bool:
    """Whether an auxiliary loss can be computed from a label set."""
    return taken_by(loss, held) in readable(held)


def require_readable(source: str, held: Holding, wanted: str) -> None:
    """Raises ``InputError`` if a label set does not give what is asked for."""
    if wanted not in readable(held):
        what = in_words(held.output) + (" without a head" if held.output == FEATURES else "")
        raise InputError(
            f"the labels of source {source} are {what}, and give no {in_words(wanted)}; read them "
            f"with batch.{METHODS[held.output]}({source!r}), or cache with --output {wanted}"
        )
