"""``benchmarks/gpu.py`` is tried here without a GPU, so that it does not fail where one is lent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sskt.benchmarks.gpu import PARTS, main

MEASURED = {
    "checks": ("tests", "tests failed"),
    "teacher stage": ("bfloat16: stage from RAM / bare network", "float32: stage from JPEG"),
    "loader": ("32 pixels, made on the device",),
}
STEPS = ("trained in whole epochs", "cached / in memory", "waits for the device in a step")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_on_a_cpu(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--device", "cpu", "--small", "--minutes", "15", "--out", str(tmp_path)]
    status = main([*given, "--parts", part])
    document = json.loads((tmp_path / "gpu.json").read_text())
    log = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert status == 0, document["parts"][0].get("failed", "") + log[-3000:]
    (entry,) = document["parts"]
    values = {row["name"]: row["value"] for row in entry["results"]}
    assert set(MEASURED.get(part, STEPS)) <= set(values)
    assert values.get("tests", 20) >= 20 and not values.get("tests failed", 0)
    printed = capsys.readouterr().out
    assert all(name in printed for name in values) and "FAILED" not in printed


def test_a_part_that_fails_or_hangs_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processes are real; what they run is short."""
    script = (
        "import sys, time\n"
        "part = sys.argv[sys.argv.index('--part') + 1]\n"
        'print(\'{"name": "m", "value": 1.5, "unit": "s"}\', flush=True)\n'
        "time.sleep(60) if part == 'loader' else sys.exit(part == 'checks')\n"
    )
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\nimport sys\ndel sys.argv[1:3]\n{script}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setitem(PARTS, "loader", (PARTS["loader"][0], 0.2))
    parts = ["checks", "loader", "teacher stage"]
    status = main(["--device", "cpu", "--out", str(tmp_path / "out"), "--parts", *parts])
    assert status == 1
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert [entry["name"] for entry in found] == parts
    assert [entry.get("failed", "")[:11] for entry in found] == ["exit status", "took more t", ""]
    assert all(entry["results"] == [{"name": "m", "value": 1.5, "unit": "s"}] for entry in found)
    assert capsys.readouterr().out.count("FAILED") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", "unused"]) == 2
    assert "torch finds no GPU; give --device cpu" in capsys.readouterr().err
