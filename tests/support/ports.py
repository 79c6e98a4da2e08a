"""Ports for servers of tests."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that no process uses, and that no connection will be given.

    They lie below the range from which the system takes the ports of outgoing connections, one of
    which could otherwise take a port before the server of the test does.
    """
    lowest = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            # pytest-randomly seeds random alike in all workers
            port = random.SystemRandom().randrange(max(2000, lowest - 20000), lowest)
            one = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
    return found


def free_port() -> int:
    """One of ``free_ports``."""
    return free_ports(1)[0]
