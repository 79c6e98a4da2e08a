"""Clients of the last hour: what they were sent, over processes, and within bounds."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sskt.server.metrics import clients as module
from sskt.server.metrics.clients import HOUR, MOST, Client, Clients


class Clock:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_an_hour_is_added_up_and_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    clients = Clients(tmp_path, clock)
    clients.answered("lab", "10.0.0.1", 100)
    clock.now += HOUR / 2
    clients.answered("lab", "10.0.0.1", 20)
    clients.answered("", "10.0.0.2", 7)
    assert clients.recent() == [
        Client("lab", "10.0.0.1", 2, 120, clock.now),
        Client("", "10.0.0.2", 1, 7, clock.now),
    ]
    clock.now += HOUR / 2 + module.SLOT_SECONDS
    assert [(c.address, c.bytes) for c in clients.recent()] == [("10.0.0.1", 20), ("10.0.0.2", 7)]
    clock.now += HOUR
    assert clients.recent() == []


def test_no_number_of_clients_fills_the_server(tmp_path: Path) -> None:
    clients = Clients(tmp_path)
    for number in range(3 * MOST):
        clients.answered("lab", f"10.0.{number // 256}.{number % 256}", 1)
        if number == MOST // 2:
            clients.recent()
    found = clients.recent()
    assert len(found) <= MOST + 1
    assert sum(c.bytes for c in found) == 3 * MOST
    assert max(found, key=lambda c: c.bytes).address == "other"


def test_workers_see_each_others_clients(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sskt.server.metrics.clients import *; "
        "Clients(Path(sys.argv[1])).answered('other-worker', '10.0.0.9', 5); "
        "time.sleep(FLUSH_SECONDS + 1)"
    )
    mine = Clients(tmp_path)
    mine.answered("mine", "10.0.0.1", 9)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert [c.token for c in mine.recent()] == ["mine", "other-worker"]


def test_a_folder_that_is_gone_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    run = tmp_path / "run"
    Clients(run).answered("lab", "10.0.0.1", 1)
    time.sleep(0.3)
    assert not run.exists()


def test_a_folder_that_cannot_be_read_any_more_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = Clients(tmp_path)
    clients.answered("lab", "127.0.0.1", 10)

    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refused)
    clients._flush_later()
    assert not (tmp_path / "clients.sqlite3").exists()
