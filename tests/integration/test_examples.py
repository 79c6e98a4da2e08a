"""The examples run as a user runs them, and are as short as they promise."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "huggingface_trainer": "transformers",
    "lightning_module": "lightning",
    "timm_student": "timm",
    "timm_task": "timm.task",
}
FILES = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_trains(path: Path, tmp_path: Path) -> None:
    needed = NEEDS.get(path.stem, "torch")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    environment = os.environ | {"TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(found) for found in re.findall(r"loss ([0-9.]+)$", done.stdout, re.MULTILINE)]
    assert losses and all(map(math.isfinite, losses))
    assert losses[-1] <= losses[0]
    assert not any(tmp_path.glob("labels")), "only a temporary folder is written to"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """Its cells, as one program: they have no magic commands."""
    notebook = json.loads((EXAMPLES / "first_training.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) >= 5
    assert all(c["outputs"] == [] for c in notebook["cells"] if c["cell_type"] == "code")
    program = tmp_path / "notebook.py"
    program.write_text("\n".join(cells), "utf-8")
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    losses = [float(found) for found in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert re.search(r"test accuracy: \d+\.\d %", done.stdout)


def test_examples_are_short() -> None:
    assert {path.stem for path in FILES} == {
        "feature_distillation",
        "huggingface_trainer",
        "own_loop",
        "lightning_module",
        "timm_student",
        "timm_task",
        "own_dataset_and_teacher",
    }
    for path in FILES:
        assert len(path.read_text().splitlines()) < 60, path
    touching = [
        line
        for line in (EXAMPLES / "own_loop.py").read_text().split('"""')[2].splitlines()
        if re.search(r"\b(sskt|loader|batch|target)\b", line)
    ]
    assert len(touching) <= 15
