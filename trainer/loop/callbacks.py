"""Functions of a user that are called during a training: ``--callback``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sskt.teacher_cache.own_code import call_function, called

if TYPE_CHECKING:
    from sskt.trainer.loop.trainer import Trainer

Record = dict[str, Any]


class Callbacks:
    """What the user's functions returned: objects with any of the methods below.

    With several processes each of them calls its own. A resumed run has new objects.

    Args:
        texts: ``FILE.py:function`` or ``module:attribute`` of each. The function is called with
            the ``Trainer`` once, whose ``network``, ``schedule`` and ``plan`` it may use.
        trainer: The training.

    Raises:
        MissingData: If there is no such file or module.
        InputError: If there is no such function, or it fails.
    """

    def __init__(self, texts: Sequence[str], trainer: Trainer) -> None:
        self._objects = [(text, call_function(text, "--callback", trainer)) for text in texts]

    def on_step(self, epoch: int, step: int, steps: int) -> None:
        """Called after each optimizer step.

        Args:
            epoch: Number of the epoch, from 0.
            step: Steps of the epoch that are done.
            steps: Steps of the epoch.

        Raises:
            InputError: If a function of the user fails.
        """
        self._call("on_step", epoch, step, steps)

    def on_epoch(self, record: Record) -> bool:
        """Called after each epoch, before it is saved.

        Args:
            record: The record of the epoch, as ``metrics.jsonl`` will have it.

        Returns:
            Whether the training is to stop after this epoch: if one of them returned True.

        Raises:
            InputError: If a function of the user fails.
        """
        return any(answer is True for answer in self._call("on_epoch", dict(record)))

    def on_end(self, records: Sequence[Record]) -> None:
        """Called after the last epoch.

        Args:
            records: The records of all epochs.

        Raises:
            InputError: If a function of the user fails.
        """
        self._call("on_end", [dict(record) for record in records])

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return [
            called(function, f"--callback {text}: {method}", *arguments)
            for text, one in self._objects
            if (function := getattr(one, method, None)) is not None
        ]
