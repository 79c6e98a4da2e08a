"""Commands that need no extra run without torch, PyAV and matplotlib; the others name theirs."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.helpers import TINY

from sskt.teacher_cache.extras import EXTRAS, MissingExtra, install_command, missing_extra

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
from importlib import metadata
installed = metadata.Distribution.from_name
def from_name(name):
    if name in {packages}:
        raise metadata.PackageNotFoundError(name)
    return installed(name)
metadata.Distribution.from_name = from_name
from sskt.cli.main import main
main(sys.argv[1:])
"""


def sskt(
    *arguments: str, cwd: Path, extras: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A command in a Python that has the packages of these extras only."""
    code = BLOCKED.format(packages={name for name, extra in EXTRAS.items() if extra not in extras})
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with one golden label set."""
    golden = Path(__file__).parents[1] / "golden"
    shutil.copytree(golden / "cache", tmp_path / "labels")
    return tmp_path / "labels"


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "datasets --json",
        "ls --json",
        "ls -v",
        "verify",
        "copy labels copied",
        "export 1024fba2 --encoding u8 --out exported",
        "token new lab --token-file tokens.json",
        "serve --help",
    ],
)
def test_the_core_needs_no_extra(command: str, cache: Path) -> None:
    done = sskt(*command.split(), cwd=cache.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("version", "shown"), [(1, "a view"), (2, "extra 'train'")])
def test_views_of_version_1_need_no_extra(version: int, shown: str, tmp_path: Path) -> None:
    code = f"""
import numpy as np
from sskt.teacher_cache.errors import SsktError
from sskt.teacher_cache.views.resizing import resized
try:
    print(resized(np.zeros((9, 9, 3), np.uint8), 4, 4, {version}).shape, "a view")
except SsktError as error:
    print(error)
"""
    blocked = BLOCKED.format(packages=set(EXTRAS)).partition("from sskt.cli.main")[0]
    command = [sys.executable, "-c", blocked + code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown in done.stdout, done.stderr


@pytest.mark.slow
def test_images_are_labelled_with_the_extra_train_alone(tmp_path: Path) -> None:
    """As ``make demo`` installs it: PyAV, whose version a label set records, is not there."""
    given = ("--source", f"tiny={TINY}:build", "--target", "shapes", "--limit", "20")
    more = ("--seeds", "1", "--workers", "0", "--cache", "labels")
    done = sskt("cache-teachers", *given, *more, cwd=tmp_path, extras=("train",))
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "labels").glob("*/zarr.json")
    versions = json.loads(found.read_text())["attributes"]["sskt"]["made"]["versions"]
    assert "torch" in versions and "av" not in versions


@pytest.mark.parametrize(
    "command",
    [
        "cache-teachers --source imagenet --target shapes",
        "train --target shapes",
        "demo",
    ],
)
def test_a_command_names_the_extra_that_it_needs(command: str, tmp_path: Path) -> None:
    done = sskt(*command.split(), cwd=tmp_path)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("sskt: ")
    assert "the extra 'train' of sskt is not installed; run: pip install " in error
    assert "[train]" in error


@pytest.mark.parametrize(
    ("recorded", "command"),
    [
        (None, "pip install 'sskt[cloud]'"),
        ({"url": "file:///a%20b/sskt", "dir_info": {}}, "pip install '/a b/sskt[cloud]'"),
        (
            {"url": "file:///src/sskt", "dir_info": {"editable": True}},
            "pip install -e '/src/sskt[cloud]'",
        ),
        (
            {"url": "file:///w/sskt-1-py3-none-any.whl", "archive_info": {}},
            "pip install 'sskt[cloud] @ file:///w/sskt-1-py3-none-any.whl'",
        ),
        (
            {"url": "https://host/sskt", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install 'sskt[cloud] @ git+https://host/sskt'",
        ),
    ],
)
def test_the_command_installs_from_where_this_copy_came_from(
    recorded: dict[str, object] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorded:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if recorded is None else json.dumps(recorded)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Recorded())
    assert install_command("cloud") == command
    assert str(MissingExtra("s3:// caches", "cloud")).endswith(f"run: {command}")


def test_only_packages_of_extras_are_explained() -> None:
    assert missing_extra(ModuleNotFoundError("no", name="torch.nn")) is not None
    assert missing_extra(ModuleNotFoundError("no", name="numpy")) is None
    assert missing_extra(ImportError("libcuda", name="torch")) is None


def test_every_extra_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert set(EXTRAS.values()) <= set(project["project"]["optional-dependencies"])
