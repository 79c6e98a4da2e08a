"""``sskt doctor`` finds what will fail, and says what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from sskt.cli.main import run

GOLDEN = Path(__file__).parents[1] / "golden/cache"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSKT_HOME", str(tmp_path / "home"))
    for name in ("SSKT_DATA", "SSKT_CACHE", "SSKT_LABELS"):
        monkeypatch.delenv(name, raising=False)


def checks(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, list[str]]]:
    status = run(["doctor", "--json", *arguments])
    found = json.loads(capsys.readouterr().out)
    return status, {check["what"]: [check["result"], check["found"]] for check in found}


def test_an_empty_folder_has_notes_only(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = checks(capsys)
    assert status == 0
    assert found["cache"][0] == found["datasets"][0] == "note"
    assert "sskt cache-teachers makes it" in found["cache"][1]
    assert not Path("labels").exists()


def test_a_cache_and_datasets_are_found(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN, "labels")
    Path("data").symlink_to(data)
    status, found = checks(capsys)
    assert status == 0
    assert found["label sets"] == ["ok", f"{len(list(GOLDEN.iterdir()))} in labels (default)"]
    assert found["locks of the cache"][0] == "ok"
    assert "ucf101" in found["datasets"][1]
    assert {path.name for path in Path("labels").iterdir()} == {p.name for p in GOLDEN.iterdir()}


def test_a_damaged_label_set_fails(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN, "labels")
    (next(Path("labels").iterdir()) / "zarr.json").write_text("{")
    status, found = checks(capsys)
    assert status == 1
    assert found["label sets"][0] == "fails"


def test_a_server_that_is_away_fails_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        status, found = checks(capsys, "--cache", f"http://127.0.0.1:{port}")
    assert status == 1
    assert found["label sets"][0] == "fails"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    Path("closed").mkdir(mode=0o500)
    status, found = checks(capsys, "--cache", "closed/labels")
    assert status == 1
    assert found["cache"][0] == "fails"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "result", "found"]
    assert any(line.startswith("open files ") for line in lines)
