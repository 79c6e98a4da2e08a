"""Networks that a user names as a module: found, declared, identified by their code."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.helpers import TINY

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.sources.registry import SourceName, open_source, parse_source
from sskt.teacher_cache.sources.source import Preprocessing, Source

LINEAR = """from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
"""
DECLARED = "MEAN = STD = (0.5, 0.5, 0.5)\nSIZE = 8\n"
OPTION = "size=8,mean=0.1/0.2/0.3,std=0.5"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package ``lab_of_tests``, forgotten after the test."""
    folder = tmp_path / "lab_of_tests"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "arch"),
    [
        ("own=nets:build", SourceName("own", factory="build", module="nets"), "nets:build"),
        ("own=a.b_c.d:f@32", SourceName("own", None, None, "f", 32, "", "a.b_c.d"), "a.b_c.d:f"),
        ("own=a.b:f#12", SourceName("own", factory="f", digest="12", module="a.b"), "a.b:f"),
        ("own=a/n.pt", SourceName("own", file=Path("a/n.pt")), "n.pt"),
        ("own=n.pth@32#0a", SourceName("own", None, Path("n.pth"), "", 32, "0a"), "n.pth"),
        ("own=/a:b/n.pt2", SourceName("own", file=Path("/a:b/n.pt2")), "n.pt2"),
        ("own=n.torchscript", SourceName("own", file=Path("n.torchscript")), "n.torchscript"),
        ("own=n.ts", SourceName("own", file=Path("n.ts")), "n.ts"),
        ("own:timm/a.b_c", SourceName("own", "timm/a.b_c"), "timm/a.b_c"),
        ("imagenet:timm/a@96", SourceName("imagenet", "timm/a", size=96), "timm/a"),
    ],
)
def test_names_of_own_networks_are_read(text: str, expected: SourceName, arch: str) -> None:
    assert parse_source(text) == expected
    assert parse_source(text, stored=True).recorded_arch == arch


@pytest.mark.parametrize(
    "text",
    ["own=a.b", "own=a..b:f", "own=a.b:", "own=a.b:1", "own=.a:f", "own=a-b:f", "own=n.pt:f",
     "own=n.pt2:f", "=a.b:f", "=n.pt2", "own=a.1b:f", "own=./a.txt:f", "own=n.onnx"],
)  # fmt: skip
def test_names_that_are_neither_are_told_all_forms(text: str) -> None:
    forms = "expected NAME=FILE.py:factory, NAME=package.module:factory, NAME=FILE.pt2, NAME:tim"
    with pytest.raises(InputError, match=re.escape(forms)):
        parse_source(text)


@pytest.mark.parametrize("text", ["primary=a:f", "a/b=n.pt2", "primary:timm/a", "a b:timm/a"])
def test_names_that_cannot_name_a_label_set_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="a source's name has letters, digits, - and _"):
        parse_source(text)


# --- modules ----------------------------------------------------------------------------------


def test_a_module_gives_the_same_source_as_its_file(lab: Path, tiny: Source) -> None:
    shutil.copy(TINY, lab / "tiny.py")
    source = open_source(parse_source("tiny=lab_of_tests.tiny:build"))
    assert source.identity() == tiny.identity() | {"arch": "lab_of_tests.tiny:build"}


def test_other_code_is_another_source(lab: Path) -> None:
    (lab / "one.py").write_text(DECLARED + LINEAR)
    (lab / "two.py").write_text(DECLARED + LINEAR + "# another file\n")
    one, two = (open_source(parse_source(f"own=lab_of_tests.{n}:build")) for n in ("one", "two"))
    digest = hashlib.sha256((lab / "one.py").read_bytes()).hexdigest()
    assert one.identity()["code"] == f"sha256:{digest}"
    assert one.code != two.code


def test_a_package_is_identified_by_its_init(lab: Path) -> None:
    (lab / "__init__.py").write_text(DECLARED + LINEAR)
    source = open_source(parse_source("own=lab_of_tests:build"))
    digest = hashlib.sha256((lab / "__init__.py").read_bytes()).hexdigest()
    assert source.code == f"sha256:{digest}"
    assert source.arch == "lab_of_tests:build"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("own=lab_of_tests.gone:f", MissingData, "no module lab_of_tests.gone; install it or put"),
        ("own=not_there_at_all.x:f", MissingData, "no module not_there_at_all.x; install it"),
        ("own=net.txt:f", MissingData, "no module net.txt; install it or put its folder on PYTHON"),
        ("own=lab_of_tests.lacking:f", InputError, "failed: ModuleNotFoundError: No module named"),
        ("own=lab_of_tests.net:f", InputError, "lab_of_tests.net has no 'f'"),
        ("own=lab_of_tests.net:SIZE", InputError, "failed: TypeError: 'int' object is not call"),
        ("own=lab_of_tests.net:sized", InputError, "sized needs the arguments size, and a factory"),
        ("own=lab_of_tests.net:dict", InputError, "dict() gave dict, not a torch Module"),
        ("own=time:time", InputError, "time is no module with a file of its own"),
    ],
)
def test_modules_that_cannot_be_used_are_named(
    text: str, kind: type[InputError], message: str, lab: Path
) -> None:
    (lab / "net.py").write_text(DECLARED + LINEAR + "dict = dict\ndef sized(size): pass\n")
    (lab / "lacking.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(kind, match=f"source own: .*{re.escape(message)}") as caught:
        open_source(parse_source(text))
    assert type(caught.value) is kind


# --- declared preprocessing -------------------------------------------------------------------


def test_the_preprocessing_can_be_declared_by_the_option(lab: Path) -> None:
    (lab / "net.py").write_text(LINEAR)
    shutil.copy(lab / "net.py", file := lab.parent / "net.py")
    expected = Preprocessing(8, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    for text in ("own=lab_of_tests.net:build", f"own={file}:build"):
        source = open_source(parse_source(text), preprocessing=OPTION)
        assert source.preprocessing == expected
        sized = open_source(parse_source(f"{text}@8"), preprocessing=OPTION.partition(",")[2])
        assert sized.preprocessing == expected


def test_the_option_wins_over_the_module(lab: Path) -> None:
    (lab / "net.py").write_text(DECLARED + "CHANNELS = 'bgr'\nSCALE = 255\n" + LINEAR)
    base = Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr", 255.0)
    wanted = parse_source("own=lab_of_tests.net:build")
    assert open_source(wanted).preprocessing == base
    mixed = open_source(wanted, preprocessing="std=0.25,channels=rgb").preprocessing
    assert mixed == replace(base, std=(0.25, 0.25, 0.25), channels="rgb")


@pytest.mark.parametrize(
    ("option", "missing"),
    [("", "MEAN, STD, SIZE"), ("size=8", "MEAN, STD"), ("mean=0,std=1", "SIZE"),
     ("size=8,std=1,channels=bgr", "MEAN")],
)  # fmt: skip
def test_what_nobody_declared_is_named(option: str, missing: str, lab: Path) -> None:
    (lab / "net.py").write_text(LINEAR)
    message = f"lab_of_tests.net defines no {missing}; define them there, or give --preprocessing"
    with pytest.raises(InputError, match=re.escape(message)):
        open_source(parse_source("own=lab_of_tests.net:build"), preprocessing=option)


def test_weights_do_not_go_with_a_module(lab: Path, tmp_path: Path) -> None:
    (lab / "net.py").write_text(DECLARED + LINEAR)
    with pytest.raises(InputError, match="--weights goes with a known architecture"):
        open_source(parse_source("own=lab_of_tests.net:build"), weights=tmp_path / "w.pth")
