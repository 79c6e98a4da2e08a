"""Whatever reads a recipe: the same errors are told in the same words."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from sskt.trainer.recipes import shipped

Call = Callable[..., tuple[int, str, str]]

READERS = {
    "training": ["train", "--target", "shapes", "--dry-run", "--recipe"],
    "sweep": ["sweep", "--dry-run"],
    "table": ["reproduce", "--dry-run"],
}
OF_A_KIND = {"sweep": "[sweep]\nalpha = [1]", "table": "row = [{ reported = 1 }]"}


def test_every_shipped_recipe_is_of_one_kind() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    found = {kind: shipped(kind) for kind in READERS}
    assert sorted(chain(*found.values())) == sorted(f.stem for f in folder.glob("*.toml"))
    assert found["sweep"] == [] and found["training"] == ["stl10-resnet20"]


@pytest.mark.parametrize("kind", READERS)
def test_a_recipe_that_cannot_be_read(sskt: Call, tmp_path: Path, kind: str) -> None:
    (tmp_path / "bad.toml").write_text("alpha =")
    (tmp_path / "latin.toml").write_bytes(b'target = "\xe9"')
    names = ", ".join(shipped(kind))
    known = f"shipped recipes: {names}" if names else f"give a TOML file, as no {kind} ships"
    for name, message in {
        "none": f"cannot read recipe none: No such file or directory; {known}\n",
        f"{tmp_path}": f"cannot read recipe {tmp_path}: Is a directory; {known}\n",
        f"{tmp_path}/bad.toml": f"recipe {tmp_path}/bad.toml is not TOML: Invalid value",
        f"{tmp_path}/latin.toml": f"recipe {tmp_path}/latin.toml is not TOML: 'utf-8' codec",
    }.items():
        status, out, err = sskt(*READERS[kind], name)
        assert (status, out) == (2, "")
        assert err.startswith(f"sskt: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("other", OF_A_KIND)
def test_a_recipe_of_another_kind(sskt: Call, tmp_path: Path, kind: str, other: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(OF_A_KIND[other])
    status, _, err = sskt(*READERS[kind], file)
    assert status == 2
    command = {"sweep": "sweep", "table": "reproduce"}[other]
    told = f"sskt: recipe {file} is a {other}: sskt {command} {file}\n"
    assert (err == told) == (kind != other)


def test_a_shipped_one_of_another_kind(sskt: Call) -> None:
    told = "sskt: recipe figure2 is a figure: sskt reproduce figure2\n"
    assert sskt("sweep", "figure2")[2] == told


def test_a_folder_of_the_name_does_not_hide_a_shipped_one(
    sskt: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table1").mkdir()
    assert sskt("reproduce", "table1", "--dry-run")[0] == 0
