"""The shape of the project: imports point one way, the command line starts at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "teacher_cache": {"teacher_cache"},
    "trainer": {"teacher_cache", "trainer"},
    "server": {"teacher_cache", "server"},
    "cli": {"teacher_cache", "trainer", "server", "cli"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("sskt.")}


@pytest.mark.parametrize("folder", [f for f in MAY_IMPORT if (ROOT / f).is_dir()])
def test_imports_point_one_way(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path) - MAY_IMPORT[folder]
        assert not wrong, f"{path} imports {wrong}"


def test_an_import_against_the_direction_is_seen(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from sskt.trainer import loop\n")
    assert imported(bad) - MAY_IMPORT["teacher_cache"] == {"trainer"}


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from sskt.cli.main import run; run(['--help']); "
        "sys.exit('torch' in sys.modules or 'zarr' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_server_worker_needs_no_torch() -> None:
    code = (
        "import sys, sskt.server.app, sskt.server.pages.label_set_cards; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_modules_stay_small() -> None:
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
