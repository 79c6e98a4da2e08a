"""The graph of imports has no circle and points one way; what starts must start without torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import package_graph as graphs
import pytest

import sskt

ROOT = Path(__file__).resolve().parents[1]
GRAPH = graphs.module_graph()
PACKAGES = ("teacher_cache", "trainer", "server", "cli", "benchmarks", "recipes")


def ended(code: str) -> int:
    """The exit status of Python with this code."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode


def made(root: Path, **modules: str) -> graphs.Graph:
    """The graph of a small project; ``__`` in a name is a dot."""
    for name, text in modules.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return graphs.module_graph(root)


def test_no_module_imports_itself_by_any_way() -> None:
    assert graphs.circles(GRAPH) == []


def test_imports_point_downward() -> None:
    assert graphs.upward(GRAPH) == []


def test_the_graph_has_every_module_and_the_order_every_folder() -> None:
    files = {p for f in PACKAGES[:-1] for p in (ROOT / f).rglob("*.py")}
    assert len(GRAPH) == len(files) > 150
    assert all(any(graphs.place_of(m) == entry for m in GRAPH) for entry in graphs.ORDER)
    assert sum(map(len, GRAPH.values())) > 500


@pytest.mark.parametrize(
    "second",
    [
        "from sskt.teacher_cache.format import spec\n",
        "from sskt.teacher_cache.format.spec import FORMAT\n",
        "import sskt.teacher_cache.format.spec\n",
        "def late():\n    from sskt.teacher_cache.format import spec\n",
        "LOADER = 'sskt.teacher_cache.format.spec:load'\n",
    ],
)
def test_a_circle_is_found_however_it_is_written(tmp_path: Path, second: str) -> None:
    found = made(
        tmp_path,
        teacher_cache__format__spec="from sskt.teacher_cache.format import encodings\n",
        teacher_cache__format__encodings=second,
        teacher_cache__errors="",
    )
    circle = ["teacher_cache.format.encodings", "teacher_cache.format.spec"]
    assert graphs.circles(found) == [circle]
    assert graphs.upward(found) == []


def test_an_import_for_the_type_checker_alone_is_none(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sskt.cli import main\n"
    found = made(tmp_path, teacher_cache__errors=text, cli__main="")
    assert found == {"teacher_cache.errors": set(), "cli.main": set()}


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("teacher_cache/format/spec", "teacher_cache/label_sets/find"),
        ("teacher_cache/tools/copy", "trainer/config"),
        ("server/app", "trainer/config"),
        ("trainer/config", "server/settings"),
        ("trainer/data/loader", "trainer/loop/setup"),
        ("server/run", "cli/main"),
        ("cli/main", "server/strange"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, module: str, target: str) -> None:
    names = module.replace("/", "__"), target.replace("/", "__")
    text = f"def f():\n    import sskt.{target.replace('/', '.')}\n"
    found = made(tmp_path, **{names[0]: text, names[1]: ""})
    wrong = f"{module} imports {target}".replace("/", ".")
    assert graphs.upward(found) == [wrong] and not graphs.circles(found)


def test_a_relative_import_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relative import in line 1"):
        made(tmp_path, cli__main="from . import output\n")


def test_the_drawing_is_that_of_the_code() -> None:
    page = graphs.PAGE.read_text()
    assert graphs.drawn(page, GRAPH) == page, "run python docs/package_graph.py"


def test_the_trips_name_modules_that_there_are() -> None:
    text = graphs.PAGE.read_text()
    named = re.findall(r"`((?:teacher_cache|trainer|server|cli)/[a-z_0-9/]+\.py)`", text)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_package_is_installed_and_reached_in_a_checkout() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for f in PACKAGES
        for p in (ROOT / f).rglob("__init__.py")
    }
    assert sorted(listed) == sorted({"sskt", *(f"sskt.{name}" for name in found)})
    folders = {p.parent for f in PACKAGES for p in (ROOT / f).rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    for name in PACKAGES:
        assert (ROOT / "sskt" / name).readlink() == Path("..", name)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from sskt.cli.main import run; run(['--help']); "
        "sys.exit('torch' in sys.modules or 'zarr' in sys.modules)"
    )
    assert ended(code) == 0


def test_help_is_cheap() -> None:
    """The least of five, in processor time, so that other load counts little."""
    code = "import time; from sskt.cli.main import run; run(['--help']); print(time.process_time())"
    seconds = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        seconds.append(float(done.stdout.split()[-1]))
    assert min(seconds) < 0.7


def test_a_server_worker_needs_no_torch() -> None:
    code = (
        "import sys, sskt.server.app, sskt.server.pages.summaries; sys.exit('torch' in sys.modules)"
    )
    assert ended(code) == 0


def test_the_package_alone_loads_nothing_heavy() -> None:
    code = (
        "import sys, sskt; dir(sskt); sskt.InputError; sskt.__version__; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'zarr', 'click')))"
    )
    assert ended(code) == 0


@pytest.mark.parametrize("name", sskt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(sskt)
    value = getattr(sskt, name)
    assert value is getattr(sskt, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", value)
    else:
        assert value.__name__ == name and value.__module__.startswith("sskt.") and value.__doc__


def test_every_error_is_public() -> None:
    from sskt.teacher_cache import errors

    found = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert found == {n for n in sskt.__all__ if n in vars(errors)}


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sskt' has no attribute 'nothing'"):
        sskt.nothing  # noqa: B018
