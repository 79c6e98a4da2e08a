"""The actor that tasks tell how far they are; of its own module, so that it loads no torch.

Nothing depends on it: without it the bar stands still until a task is done.
"""

from __future__ import annotations


class UnitProgress:
    """Labels that are done of each unit. A retried task overwrites what the lost one said."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def report(self, unit: int, done: int) -> None:
        """Takes in that ``done`` labels of a unit are stored."""
        self._done[unit] = done

    def read(self) -> dict[int, int]:
        """Labels that are done, by unit."""
        return self._done
