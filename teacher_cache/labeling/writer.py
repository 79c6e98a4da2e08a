"""A thread that fetches, encodes and stores labels, so that the accelerator does not wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

QUEUED = 8
"""Jobs waiting at most: what the accelerator may be ahead of the thread."""


class Writer:
    """Runs jobs one after another in a thread; after an error, none."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=QUEUED)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sskt-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:
                    self._error = error

    def put(self, job: Callable[[], None]) -> None:
        """Queues a job; waits while the queue is full. Raises what an earlier job raised."""
        self.check()
        self._queue.put(job)

    def close(self) -> None:
        """Finishes what is queued. Raises what a job raised."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raises what a job raised."""
        if self._error is not None:
            raise self._error
