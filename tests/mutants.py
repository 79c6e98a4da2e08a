"""Deliberate mistakes: applied one at a time to a copy of the checkout, each must fail a test.

``python tests/mutants.py`` prints which mistakes the tests notice, and the score. The list is
``mutants.toml`` beside this file; ``docs/mutants.md`` has the latest score. ``--list`` shows the
list, ``--only TEXT`` (repeatable) runs those with TEXT in their name or file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutants.toml")
LEFT_OUT = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "runs", "dist")
SECONDS = 600
"""A mutant whose tests take longer is taken for noticed: it made the code wait for ever."""
IMPORTED = ("torch", "torchvision", "av", "torch.utils.tensorboard")
"""What most tests need, and no mistake is made in."""
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")
"""The same examples with and without a mistake: no failure by chance may be taken for notice."""
SURVIVED = "SURVIVED"


@dataclass(frozen=True)
class Mutant:
    """One deliberate mistake: ``old`` becomes ``new`` in ``file``, and ``tests`` must fail."""

    name: str
    file: Path
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The file's text with the mistake.

        Raises:
            ValueError: ``old`` does not occur exactly once, or nothing would change.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: the old text occurs {found} times in {self.file}")
        if self.old == self.new:
            raise ValueError(f"{self.name}: the new text is the old one")
        return text.replace(self.old, self.new)


def read_list(path: Path = LIST) -> list[Mutant]:
    """All mutants of the list, in its order.

    Raises:
        ValueError: Two mutants have one name.
        KeyError: A field is missing, or a file is not in the table of files.
    """
    document = tomllib.loads(path.read_text())
    files = document["files"]
    mutants = [
        Mutant(m["name"], Path(files[m["file"]]), m["old"], m["new"], tuple(m["tests"]))
        for m in document["mutant"]
    ]
    if len({m.name for m in mutants}) < len(mutants):
        raise ValueError("two mutants have one name")
    return mutants


def selected_test(text: str, root: Path = ROOT) -> str:
    """``FILE`` or ``FILE::TEST`` as an argument of pytest, wherever the file is under ``tests``.

    Raises:
        ValueError: There is no such file or no such test in it.
    """
    stem, _, name = text.partition("::")
    files = list((root / "tests").rglob(f"{stem}.py"))
    if len(files) != 1:
        raise ValueError(f"tests: expected one file {stem}.py under tests, found {len(files)}")
    if name and not re.search(rf"^def {re.escape(name)}\(", files[0].read_text(), re.MULTILINE):
        raise ValueError(f"tests: {files[0].name} has no test {name}")
    path = str(files[0].relative_to(root))
    return f"{path}::{name}" if name else path


def copied(to: Path) -> Path:
    """A copy of the checkout without what is built or stored there."""
    return shutil.copytree(ROOT, to, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))


def pytest_in(root: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """Exit status of pytest in ``root`` (None if it took too long), and what it printed.

    It runs in a forked process: torch is imported once and not for every mutant.
    """
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            _run_pytest(root, tests, output.fileno())
        limit = time.monotonic() + SECONDS
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None, ""
            time.sleep(0.05)
        output.seek(0)
        return os.waitstatus_to_exitcode(ended[1]), output.read().decode(errors="replace")


def _run_pytest(root: Path, tests: Sequence[str], output: int) -> NoReturn:
    """The child's part: never returns, and leaves the parent's temporary files alone."""
    status = 99
    try:
        os.setpgid(0, 0)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(root)
        source = str(root)
        os.environ["PYTHONPATH"] = source
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # two mutants of one second may have one size
        os.environ.setdefault("SSKT_TEST_DATA", str(ROOT.parent / "shared" / "data"))
        sys.dont_write_bytecode = True
        sys.path[:] = [source, *(p for p in sys.path if Path(p).resolve() != LIST.parent)]
        found = importlib.import_module("sskt.teacher_cache.errors").__file__
        if not str(found).startswith(str(root)):
            raise RuntimeError(f"another checkout would be tested: {found}")
        status = pytest.main([*OPTIONS, *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def outcome(mutant: Mutant, root: Path) -> str:
    """``killed by`` the test that failed in the copy ``root``, or ``SURVIVED``.

    Raises:
        RuntimeError: The tests could not run, e.g. as the mutant is no Python.
    """
    path = root / mutant.file
    whole = path.read_text()
    path.write_text(mutant.applied(whole))
    try:
        status, said = pytest_in(root, [selected_test(t, root) for t in mutant.tests])
    finally:
        path.write_text(whole)
        shutil.rmtree(root / ".hypothesis", ignore_errors=True)  # it would repeat a failure
    if status is None:
        return "killed by a timeout"
    ran = "ERROR collecting" not in said and re.search(r"\d (passed|failed|error)", said)
    if status not in (0, 1) or not ran:
        raise RuntimeError(f"{mutant.name}: pytest ended with {status}\n{said[-2000:]}")
    if not status:
        return SURVIVED
    failed = re.search(r"^(?:FAILED|ERROR) \S*::(\w+)", said, re.MULTILINE)
    return f"killed by {failed[1] if failed else 'a test'}"


def require_whole(root: Path, mutants: Sequence[Mutant]) -> None:
    """Raises ``RuntimeError`` unless the tests pass in the copy without any mistake."""
    tests = list(dict.fromkeys(selected_test(t, root) for m in mutants for t in m.tests))
    status, said = pytest_in(root, tests)
    if status != 0:
        raise RuntimeError(f"the tests fail without any mistake:\n{said[-4000:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the chosen mutants. Returns 1 if one survives, else 0."""
    parser = argparse.ArgumentParser(description="Deliberate mistakes that the tests must notice.")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT")
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args(arguments)
    mutants = [
        m
        for m in read_list()
        if not chosen.only or any(text in m.name or text in str(m.file) for text in chosen.only)
    ]
    if chosen.list:
        for mutant in mutants:
            print(f"{mutant.file}: {mutant.name} ({', '.join(mutant.tests)})")
        return 0
    begin, survived = time.monotonic(), 0
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="sskt-mutants-") as folder:
        root = copied(Path(folder).resolve() / "checkout")
        require_whole(root, mutants)
        for number, mutant in enumerate(mutants, 1):
            found = outcome(mutant, root)
            survived += found == SURVIVED
            print(f"{number}/{len(mutants)} {mutant.file}: {mutant.name}: {found}", flush=True)
    killed, seconds = len(mutants) - survived, time.monotonic() - begin
    print(f"score: {killed} of {len(mutants)} mistakes noticed, in {seconds / 60:.0f} minutes")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
