"""Names and metadata of label sets cannot control the terminal of those who look at them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sskt.cli.main import run
from sskt.teacher_cache.format.spec import classes_identity, digest_of

GOLDEN = Path(__file__).parents[1] / "golden/cache"
HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e\r\nsskt: all is well"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label set whose writer put control sequences into everything that is free text."""
    folder = tmp_path_factory.mktemp("hostile")
    found = next(path for path in sorted(GOLDEN.iterdir()))
    document = json.loads((found / "zarr.json").read_text())
    attributes = document["attributes"]["sskt"]
    spec = attributes["spec"]
    for place in (spec["target"], spec["source"]):
        place["name"] += HOSTILE
    spec["source"]["arch"] += HOSTILE
    attributes["classes"] = [name + HOSTILE for name in attributes["classes"]]
    spec["source"]["classes"] = classes_identity(attributes["classes"])
    attributes["digest"] = digest_of(spec)
    attributes.setdefault("made", {})["target"] = HOSTILE
    copied = folder / f"{found.name.rpartition('.')[0]}.{attributes['digest'][:12]}"
    shutil.copytree(found, copied)
    (copied / "zarr.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(
    params=[
        "ls",
        "ls -v",
        "inspect --no-live",
        "inspect",
        "verify",
        "verify --recompute 2",
        "train --target shapes --dry-run",
        "rm --yes zzz",
    ]
)
def command(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    yield str(request.param).split()


def test_nothing_of_it_reaches_the_terminal(
    command: list[str], cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run([*command, "--cache", str(cache)])
    out, err = capfd.readouterr()
    printed = out + err
    assert "owned" in printed or command[0] in ("verify", "train", "rm")
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(printed)
    assert not any(line.startswith("sskt: all is well") for line in printed.splitlines())
