"""``benchmarks/kills.py``: its short form finds no fault, and it would find one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.object_stores import NEEDED

from sskt.trainer.results import records

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} not installed")
def test_a_few_kills_of_each_kind_lose_and_change_nothing() -> None:
    command = [sys.executable, str(BENCHMARKS / "kills.py"), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for kind, least in (("folder", 6), ("bucket", 6), ("trainings", 3)):
        assert found[f"{kind}: kills"] >= least
    assert found["files lost"] == found["files or weights different"] == 0


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kills")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "lost": (Path.unlink, "was stored and is gone"),
    "different": (lambda path: path.write_bytes(path.read_bytes()[::-1]), "other bytes"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_lost_or_different_shard_is_a_fault(
    kills: Any, label_cache: Path, tmp_path: Path, fault: str
) -> None:
    cache = shutil.copytree(label_cache, tmp_path / "cache")
    whole = kills.files(str(cache))
    assert kills.check(str(cache), whole, whole) == whole
    spoil, said = SPOILT[fault]
    spoil(next(path for path in cache.rglob("labels/c/*/*/0") if path.is_file()))
    with pytest.raises(kills.Fault, match=said):
        kills.check(str(cache), whole, whole)


@pytest.mark.parametrize("fault", ["weight", "metric", "rest"])
def test_another_number_or_a_rest_in_a_run_is_a_fault(
    kills: Any, tmp_path: Path, fault: str
) -> None:
    def write(weight: float, metric: float, seconds: float) -> None:
        state = {"model": {"w": torch.tensor([weight])}, "progress": {"seconds": seconds}}
        for name in (records.CHECKPOINT, records.BEST):
            records.save_checkpoint(tmp_path, state, name)
        record = {"epoch": 0, "loss": metric, "seconds": seconds}
        (tmp_path / records.METRICS).write_text(json.dumps(record) + "\n")

    write(1.0, 2.0, 3.0)
    expected = kills.numbers(tmp_path)
    write(1.0, 2.0, 4.0)
    kills.check_run(tmp_path, expected)
    write(1.0000001 if fault == "weight" else 1.0, 2.5 if fault == "metric" else 2.0, 3.0)
    if fault == "rest":
        (tmp_path / "last.pt.0.partial").touch()
    with pytest.raises(kills.Fault):
        kills.check_run(tmp_path, expected)
