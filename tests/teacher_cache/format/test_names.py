"""Names from elsewhere: what they may be, and that nothing is written outside of a cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.helpers import tree
from support.servers import misserving

from sskt.teacher_cache.errors import printable
from sskt.teacher_cache.format.names import (
    LONGEST_NAME,
    InvalidName,
    is_file_key,
    is_set_name,
    set_name,
)
from sskt.teacher_cache.format.spec import name_of
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets
from sskt.teacher_cache.storage.local import LocalStorage

Sskt = Callable[..., tuple[int, str, str]]

HOSTILE = [
    "",
    ".",
    "..",
    ".hidden",
    "../victim",
    "x/../../victim",
    "x/y",
    "/etc",
    "\\\\host\\share",
    "x\x00y",
    "x\ny",
    "x\x1b]0;owned\x07",
    "x ",
    "a" * (LONGEST_NAME + 1),
    "a" * 100_000,
    "\uff052e\uff052e",
    "%2e%2e%2fvictim",
    "x\u202egpj",
    "\ud800",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_a_name(name: str, tmp_path: Path) -> None:
    assert not is_set_name(name)
    with pytest.raises(InvalidName, match="cannot be the name of a label set") as error:
        LocalStorage(tmp_path).below(name)
    said = str(error.value)
    assert len(said) < 500 and said.isprintable()


@pytest.mark.parametrize("name", [None, 5, b"x", ["x"], True])
def test_what_is_not_even_a_text(name: Any) -> None:
    with pytest.raises(InvalidName):
        set_name(name)


def test_names_of_label_sets_are_names(label_cache: Path) -> None:
    (made,) = list_label_sets(label_cache)
    assert set_name(made.name) == made.name
    longest = "a" * LONGEST_NAME
    assert set_name(longest) == longest


def test_a_set_of_a_target_with_a_long_name_can_be_made(label_cache: Path, tmp_path: Path) -> None:
    (like,) = list_label_sets(label_cache)
    spec = like.spec | {"target": like.spec["target"] | {"name": "n" * 255}}
    create_label_set(tmp_path, spec, like.classes, 1).close()
    (made,) = list_label_sets(tmp_path)
    assert made.name == name_of(spec) and made.name.endswith(f".{made.digest[:12]}")
    assert made.name.startswith("nnn") and ".tiny-tiny-" in made.name


@pytest.mark.parametrize(
    ("key", "is_key"),
    [
        ("zarr.json", True),
        ("labels/zarr.json", True),
        ("labels/c/0/12/0", True),
        ("view_check/c/0/0.json", True),
        ("labels/c/../../../x", False),
        ("/labels/c/0/0/0", False),
        ("labels//c", False),
        ("labels/.lock", False),
        ("labels/c/0/0/0/0/0", False),
        ("a" * 256, False),
        (5, False),
    ],
)
def test_keys_of_files(key: object, is_key: bool) -> None:
    assert is_file_key(key) is is_key


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ResNet-50 größe 猫 👩‍🚀", "ResNet-50 größe 猫 👩‍🚀"),
        ("a\x1b[2Jb\x9b0m\x07", "a\\x1b[2Jb\\x9b0m\\x07"),
        ("two\r\nlines\tand\u2028more", "two  lines and more"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\udc80", "\\udc80"),
    ],
)
def test_what_is_printed(text: str, shown: str) -> None:
    assert printable(text) == shown


# --- a label server that wants to write elsewhere -----------------------------------------------


def test_the_hostile_server_serves(label_cache: Path, tmp_path: Path, sskt: Sskt) -> None:
    """With an honest name its labels are copied: the tests below fail for the name only."""
    (made,) = list_label_sets(label_cache)
    with misserving(label_cache / made.name) as url:
        status, _, err = sskt("copy", url, tmp_path / "to")
    assert status == 0, err
    assert tree(tmp_path / "to" / made.name) == tree(label_cache / made.name)


@pytest.mark.parametrize("kind", ["parent", "absolute", "escape", "long", "empty"])
def test_a_server_writes_nothing_outside_of_the_destination(
    kind: str, label_cache: Path, tmp_path: Path, sskt: Sskt, caplog: pytest.LogCaptureFixture
) -> None:
    (made,) = list_label_sets(label_cache)
    victim = tmp_path / "victim"
    shutil.copytree(label_cache / made.name, victim / made.name)
    before = tree(tmp_path)
    listed = {
        "parent": f"x/../../victim/{made.name}",
        "absolute": f"{victim}/{made.name}",
        "escape": f"\x1b]0;owned\x07{made.name}",
        "long": "a" * 5000,
        "empty": "",
    }[kind]
    with misserving(label_cache / made.name, listed=listed) as url:
        for command in (["ls", url], ["verify", "--cache", url], ["copy", url, tmp_path / "to"]):
            status, out, err = sskt(*command)
            assert status == 2 and "no label set in" in err, (command, out, err)
            assert "\x1b" not in out + err + caplog.text
        status, _, err = sskt("copy", url, tmp_path / "to", made.name)
        assert status == 2, err
    assert tree(tmp_path) == before
