"""Processes that do not outlive the one that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Makes the kernel kill this process when the thread that started it ends."""
    if sys.platform == "linux" and multiprocessing.parent_process() is not None:
        # A terminal that closes sends it to all processes; the parent ends this one.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not parent_is_alive():  # it died before the call
        sys.exit(1)


def parent_is_alive() -> bool:
    """Whether the process that started this one by multiprocessing is alive; True if none did."""
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()
