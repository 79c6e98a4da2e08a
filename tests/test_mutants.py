"""The list of deliberate mistakes (``mutants.toml``) still fits the code and the tests."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from mutants import ROOT, Mutant, main, read_list, selected_test

MUTANTS = read_list()


def meaning(file: Path, text: str) -> object:
    """What a Python or TOML file says, without its comments. Raises if it is neither."""
    return ast.dump(ast.parse(text)) if file.suffix == ".py" else tomllib.loads(text)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_mistake_can_be_made(mutant: Mutant) -> None:
    whole = (ROOT / mutant.file).read_text()
    changed = mutant.applied(whole)
    assert meaning(mutant.file, changed) != meaning(mutant.file, whole)
    assert mutant.tests
    for test in mutant.tests:
        assert (ROOT / selected_test(test).partition("::")[0]).exists()


def test_what_does_not_fit_any_more_is_an_error() -> None:
    mutant = Mutant("n", Path("f.py"), "a = 1", "a = 2", ("test_mutants",))
    assert mutant.applied("a = 1\nb = 1\n") == "a = 2\nb = 1\n"
    for text, times in (("b = 1\n", 0), ("a = 1\na = 1\n", 2)):
        with pytest.raises(ValueError, match=rf"n: the old text occurs {times} times in f\.py"):
            mutant.applied(text)
    with pytest.raises(ValueError, match="the new text is the old one"):
        Mutant("n", Path("f.py"), "a = 1", "a = 1", ()).applied("a = 1")
    with pytest.raises(ValueError, match=r"expected one file test_nothing\.py"):
        selected_test("test_nothing")
    with pytest.raises(ValueError, match="has no test test_nothing"):
        selected_test("test_mutants::test_nothing")


def test_the_list_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MUTANTS) > 60
    assert main(["--list", "--only", "evaluation in training mode"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
