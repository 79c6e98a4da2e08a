"""Tokens: what is kept, who gets in, and what damage, races and full disks do to the file."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.damage import FAULTS, in_time

from sskt.cli.serving.token import token as command
from sskt.server.http import tokens as module
from sskt.server.http.tokens import (
    FRESH_SECONDS,
    Tokens,
    list_tokens,
    new_token,
    revoke,
    rotate,
)
from sskt.teacher_cache.errors import DiskFull, InputError, MissingData, UnknownName


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)


def test_a_token_opens_and_only_its_hash_is_kept(path: Path) -> None:
    secret = new_token(path, "lab", ["read"], None)
    assert secret.startswith("sskt_") and len(secret) == 5 + 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = path.read_text()
    assert secret not in kept and secret[5:] not in kept
    found = Tokens(path).check(secret)
    assert found is not None
    assert found.name == "lab" and found.scopes == ("read",) and found.expires is None
    assert [t.name for t in list_tokens(path)] == ["lab"]


def test_compute_brings_read(path: Path) -> None:
    new_token(path, "gpu", ["compute"], 1.5)
    (token,) = list_tokens(path)
    assert token.scopes == ("compute", "read")
    assert token.expires is not None
    assert abs(token.expires - time.time() - 1.5 * 86400) < 60


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("filled") / "tokens.json"
    new_token(path, "a", ["read"], None)
    return path, new_token(path, "b", ["read"], None)


@given(data=st.data())
def test_no_other_secret_opens(filled: tuple[Path, str], data: st.DataObject) -> None:
    path, secret = filled
    tokens = Tokens(path)
    changed = data.draw(
        st.one_of(
            st.text(max_size=60),
            st.integers(0, len(secret) - 1).map(lambda n: secret[:n]),
            st.text(min_size=1, max_size=300).map(lambda more: secret + more),
            st.tuples(st.integers(0, len(secret) - 1), st.characters()).map(
                lambda at: secret[: at[0]] + at[1] + secret[at[0] + 1 :]
            ),
        )
    )
    if changed != secret:
        assert tokens.check(changed) is None
    assert tokens.check(secret) is not None
    entry = json.loads(path.read_text())["tokens"][1]
    assert tokens.check(entry["hash"]) is None
    assert tokens.check(entry["hash"].removeprefix("sha256:")) is None


def test_an_expired_token_is_refused_while_the_server_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = new_token(path, "short", ["read"], 1.0)
    tokens = Tokens(path)
    assert tokens.check(secret) is not None
    later = time.time() + 86401
    monkeypatch.setattr(time, "time", lambda: later)
    assert tokens.check(secret) is None
    assert [t.expired() for t in list_tokens(path)] == [True]


def test_a_revoked_token_stops_within_the_time_named(path: Path) -> None:
    kept = new_token(path, "kept", ["read"], None)
    gone = new_token(path, "gone", ["read"], None)
    workers = [Tokens(path), Tokens(path)]
    assert all(tokens.check(gone) for tokens in workers)
    revoke(path, "gone")
    revoked = time.monotonic()
    for tokens in workers:
        while tokens.check(gone):
            assert time.monotonic() - revoked < FRESH_SECONDS + 0.5
        assert tokens.check(kept)


def test_a_new_token_works_at_once(path: Path) -> None:
    tokens = [Tokens(path) for _ in range(2)]
    for i in range(5):
        secret = new_token(path, f"t{i}", ["read"], None)
        assert all(each.check("x") is None and each.check(secret) for each in tokens)


@pytest.mark.usefixtures("at_once")
def test_tokens_come_and_go_under_a_running_server(path: Path) -> None:
    new_token(path, "first", ["read"], None)
    tokens = Tokens(path)
    for i in range(20):  # a file system may give the same inode again and again
        secret = new_token(path, f"t{i}", ["read"], None)
        assert tokens.check(secret) is not None
        revoke(path, f"t{i}")
        assert tokens.check(secret) is None


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no version": lambda d: {"tokens": d["tokens"]},
    "a later version": lambda d: d | {"version": 2},
    "a list": lambda d: d["tokens"],
    "null": lambda d: None,
    "tokens of another kind": lambda d: d | {"tokens": {"a": 1}},
    "an empty hash": lambda d: _with(d, hash=""),
    "a short hash": lambda d: _with(d, hash="sha256:00"),
    "a hash that is a number": lambda d: _with(d, hash=0),
    "an unknown scope": lambda d: _with(d, scopes=["root"]),
    "scopes as one word": lambda d: _with(d, scopes="read"),
    "expires as a word": lambda d: _with(d, expires="never"),
    "expires as no number": lambda d: _with(d, expires=float("nan")),
    "expires beyond floats": lambda d: _with(d, expires=10**400),
    "a name with a line break": lambda d: _with(d, name="a\nb"),
    "no name": lambda d: _with(d, name=None),
    "two of a name": lambda d: d | {"tokens": d["tokens"] * 2},
}


def _with(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return document | {"tokens": [document["tokens"][0] | changes]}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_lets_nobody_in_until_it_is_mended(
    path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = new_token(path, "lab", ["read"], None)
    whole = path.read_bytes()
    tokens = Tokens(path)
    assert tokens.check(secret)
    path.write_text(json.dumps(DAMAGE[kind](json.loads(whole))))
    for _ in range(3):
        with pytest.raises(InputError, match="is damaged") as error:
            tokens.check(secret)
        assert json.loads(whole)["tokens"][0]["hash"] not in str(error.value)
    assert len([r for r in caplog.records if "all requests are refused" in r.message]) == 1
    for change in (lambda: new_token(path, "x", ["read"], None), lambda: revoke(path, "lab")):
        with pytest.raises(InputError, match="is damaged"):
            change()
    path.write_bytes(whole)
    assert tokens.check(secret)


@pytest.mark.usefixtures("at_once")
def test_a_file_cut_anywhere_lets_nobody_in(path: Path) -> None:
    secret = new_token(path, "lab", ["read"], None)
    whole = path.read_bytes()
    tokens = Tokens(path)
    for length in range(len(whole) - 1):  # the last byte is a line break
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is damaged"):
            tokens.check(secret)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("fault", FAULTS)
def test_no_damage_of_the_file_lets_another_secret_in(
    path: Path, tmp_path: Path, fault: str
) -> None:
    """Nor keeps the server waiting; when the file is back, its tokens work again."""
    secret = new_token(path, "lab", ["read"], None)
    sibling = tmp_path / "sibling.json"
    foreign = new_token(sibling, "other", ["read"], None)
    whole, other = path.read_bytes(), sibling.read_bytes()
    tokens = Tokens(path)
    with in_time(30):
        assert tokens.check(secret) and not tokens.check(foreign)
        FAULTS[fault](path, sibling)
        another_file = fault in ("swapped", "link to a sibling")
        for given in (secret, foreign, "sskt_x"):
            try:
                found = tokens.check(given)
            except InputError as error:
                assert "\n" not in str(error) and str(path) in str(error)
            else:
                assert found is None or given == (foreign if another_file else secret)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        sibling.write_bytes(other)
        path.write_bytes(whole)
        assert tokens.check(secret) and not tokens.check(foreign)


@pytest.mark.usefixtures("at_once")
def test_a_file_that_vanishes_lets_nobody_in(path: Path) -> None:
    tokens = Tokens(path)
    with pytest.raises(MissingData, match="sskt token new NAME --token-file"):
        tokens.require_usable()
    secret = new_token(path, "lab", ["read"], None)
    assert tokens.check(secret)
    path.unlink()
    with pytest.raises(MissingData):
        tokens.check(secret)
    with pytest.raises(MissingData):
        revoke(path, "lab")


@pytest.mark.usefixtures("at_once")
def test_without_tokens_nobody_is_let_in(path: Path) -> None:
    secret = new_token(path, "lab", ["read"], None)
    revoke(path, "lab")
    assert list_tokens(path) == [] and Tokens(path).check(secret) is None
    assert Tokens(path).check("") is None


def test_nothing_is_lost_when_many_are_made_at_once(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sskt.server.http.tokens import new_token\n"
        "for i in range(10): new_token(Path(sys.argv[1]), f'{sys.argv[2]}{i}', ['read'], None)"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]

    def make(name: str) -> None:
        for i in range(10):
            new_token(path, f"{name}{i}", ["read"], None)

    threads = [threading.Thread(target=make, args=(name,)) for name in "cd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait(timeout=60) for other in others] == [0, 0]
    assert {t.name for t in list_tokens(path)} == {f"{n}{i}" for n in "abcd" for i in range(10)}
    assert sorted(p.name for p in path.parent.iterdir()) == [".tokens.json.lock", "tokens.json"]


def test_a_full_disk_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = new_token(path, "lab", ["read"], None)
    whole = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull):
            new_token(path, "more", ["read"], None)
    assert path.read_bytes() == whole and not list(path.parent.glob("*.partial"))
    assert Tokens(path).check(secret)


def test_a_file_open_to_others_is_named_and_closed_by_the_next_change(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = new_token(path, "lab", ["read"], None)
    path.chmod(0o644)
    tokens = Tokens(path)
    with caplog.at_level(logging.WARNING, "sskt.tokens"):
        for _ in range(3):
            assert tokens.check(secret)
    (record,) = caplog.records
    assert "is open to others (mode 644)" in record.getMessage()
    new_token(path, "more", ["read"], None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_administrator_leaves_the_file_to_the_servers_user(path: Path) -> None:
    new_token(path, "lab", ["read"], None)
    os.chown(path, 12345, 12346)
    path.chmod(0o640)
    new_token(path, "more", ["read"], None)
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 12346, 0o640)


def test_a_link_to_the_file_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(path)
    secret = new_token(link, "lab", ["read"], None)
    assert link.is_symlink() and Tokens(link).check(secret) and list_tokens(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=70).filter(lambda s: not re.fullmatch(module._NAME, s)))
def test_names_that_would_break_a_log_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="a token's name is"):
        new_token(tmp_path / "none.json", name, ["read"], None)
    assert not (tmp_path / "none.json").exists()


def test_what_cannot_be_made(path: Path) -> None:
    new_token(path, "lab", ["read"], None)
    whole = path.read_bytes()
    with pytest.raises(InputError, match="has a token 'lab'"):
        new_token(path, "lab", ["read"], None)
    with pytest.raises(UnknownName, match="unknown scope 'write'; known: read, compute"):
        new_token(path, "x", ["read", "write"], None)
    with pytest.raises(InputError, match="without scopes"):
        new_token(path, "x", [], None)
    for days in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InputError, match="days must be"):
            new_token(path, "x", ["read"], days)
    with pytest.raises(UnknownName, match="unknown token 'x'; known: lab"):
        revoke(path, "x")
    assert path.read_bytes() == whole


def test_the_command_prints_the_secret_alone(path: Path) -> None:
    runner = CliRunner()

    def call(*arguments: str) -> tuple[str, str]:
        done = runner.invoke(command, [*arguments, "--token-file", str(path)])
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr

    out, err = call("new", "lab", "--scope", "compute", "--days", "30")
    secret = out.removesuffix("\n")
    found = Tokens(path).check(secret)
    assert found is not None and found.scopes == ("compute", "read")
    assert "token lab (compute, read), valid until 20" in err and secret not in err
    made = json.loads(call("new", "ci", "--json")[0])
    assert Tokens(path).check(made["token"]) and made["scopes"] == ["read"]
    out, _ = call("list")
    assert "lab" in out and "compute read" in out and "expired" not in out
    listed = json.loads(call("list", "--json")[0])
    assert [t["name"] for t in listed] == ["lab", "ci"]
    assert all("hash" not in t and "token" not in t for t in listed)
    call("revoke", "lab")
    assert [t.name for t in list_tokens(path)] == ["ci"]


def test_the_command_starts_without_heavy_libraries() -> None:
    code = (
        "import sys; from sskt.cli.serving.token import token; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'zarr', 'fastapi')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_secret_goes_into_a_private_file_and_never_over_another(path: Path) -> None:
    runner = CliRunner()
    out = path.with_name("secret")

    def call(*arguments: str) -> Any:
        return runner.invoke(command, [*arguments, "--token-file", str(path), "--out", str(out)])

    done = call("new", "lab")
    assert done.exit_code == 0 and done.stdout == ""
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    secret = out.read_text().strip()
    assert Tokens(path).check(secret) is not None and secret not in done.stderr
    done = call("new", "other")
    assert isinstance(done.exception, InputError) and "is not overwritten" in str(done.exception)
    assert out.read_text().strip() == secret
    assert [t.name for t in list_tokens(path)] == ["lab"]
    out.unlink()
    assert isinstance(call("new", "lab").exception, InputError)  # the name is taken
    assert not out.exists()


def test_a_rotated_token_has_two_secrets_for_a_while(path: Path, at_once: None) -> None:
    first = new_token(path, "lab", ["compute"], 10)
    spare = new_token(path, "spare", ["read"], None)
    second = rotate(path, "lab", 24)
    tokens = Tokens(path)
    old, new, other = (tokens.check(secret) for secret in (first, second, spare))
    assert new is not None and new.name == "lab" and new.scopes == ("compute", "read")
    assert new.expires is not None and abs(new.expires - time.time() - 10 * 86400) < 60
    assert old is not None and old.name == "lab.old" and old.scopes == ("compute", "read")
    assert old.expires is not None and abs(old.expires - time.time() - 86400) < 60
    assert other is not None and other.name == "spare" and other.expires is None
    with pytest.raises(InputError, match=r"still valid as lab\.old; first run: sskt token revoke"):
        rotate(path, "lab", 1)
    assert tokens.check(second) is not None
    revoke(path, "lab.old")
    assert tokens.check(first) is None
    third = rotate(path, "lab", 0)
    assert tokens.check(second) is None and tokens.check(third) is not None
    assert [t.name for t in list_tokens(path)] == ["spare", "lab"]


def test_the_grace_never_makes_a_secret_live_longer(path: Path) -> None:
    first = new_token(path, "lab", ["read"], 0.5)
    (made,) = list_tokens(path)
    rotate(path, "lab", 1000)
    old = Tokens(path).check(first)
    assert old is not None and old.expires == made.expires
    with pytest.raises(UnknownName, match="nobody"):
        rotate(path, "nobody", 1)
    with pytest.raises(InputError, match="--grace"):
        rotate(path, "lab", -1)


def test_a_missing_file_is_named_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MissingData, match="no token file"):
        Tokens(path).require_usable()
    assert caplog.records == []
