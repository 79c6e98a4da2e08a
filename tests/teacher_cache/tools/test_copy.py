"""sskt copy, rm, export over folders: equal bytes, damage refused, killed at every step."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import TINY, tree
from support.processes import Launcher, launched

from sskt.cli.main import run
from sskt.teacher_cache.errors import CorruptStore, InputError, SsktError
from sskt.teacher_cache.format.encodings import Encoding, as_tensors, parse_encoding, soft_labels
from sskt.teacher_cache.format.shards import shard_damage
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets, open_label_set
from sskt.teacher_cache.label_sets.documents import array_document
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.tools.copy import copy_label_set
from sskt.teacher_cache.tools.export import _log_p, require_exportable
from sskt.teacher_cache.tools.remove import remove_label_set

Sskt = Callable[..., tuple[int, str, str]]

SOURCE = f"tiny={TINY}:build"


def stage_arguments(target: Path, cache: Path, *more: object) -> list[str]:
    fixed = ("cache-teachers", "--source", SOURCE, "--policy", "pad-crop-flip", "--workers", 0)
    return [str(a) for a in (*fixed, "--target", target, "--cache", cache, *more)]


def contents(cache: Path) -> dict[str, str]:
    """Every file of a cache but the lock files."""
    return {k: v for k, v in tree(cache).items() if not k.startswith(".locks/")}


def one_line(err: str) -> str:
    """The only line of standard error, which must be sskt's own."""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sskt: "), err
    assert "unexpected" not in err and "Traceback" not in err, err
    return lines[0]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with launched(tmp_path_factory.mktemp("launcher")) as started:
        yield started


@pytest.fixture(scope="module")
def broken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, and two files that are none among them: samples 0 and 41."""
    folder = shutil.copytree(images, tmp_path_factory.mktemp("broken") / "images")
    (folder / "train" / "apple" / "!.png").write_bytes(b"no image")
    (folder / "train" / "cup" / "!.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def made(broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches by encoding: 62 samples, 2 of them skipped, 2 seeds, blocks of 16, 16, 16, 14."""
    folder = tmp_path_factory.mktemp("made")
    for encoding in ("f32", "f16", "root4", "root4-coarse", "u8", "topk-5", "topk-3"):
        more = ("--seeds", 2, "--shard-rows", 16, "--encoding", encoding, "--on-error", "skip")
        assert run(stage_arguments(broken, folder / encoding, *more)) == 0
    return folder


def only(cache: Path) -> LabelSet:
    (found,) = list_label_sets(cache)
    return found


# --- copy -------------------------------------------------------------------------------------


def test_copy(made: Path, tmp_path: Path, sskt: Sskt) -> None:
    status, out, err = sskt("copy", made / "f16", tmp_path / "to", "--json")
    assert status == 0, err
    (report,) = json.loads(out)
    assert (report["written"], report["reused"]) == (8, 0)
    assert report["coverage"] == [1.0, 1.0]
    assert contents(tmp_path / "to") == contents(made / "f16")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "to").rglob("*") if p.is_file()}
    status, out, err = sskt("copy", made / "f16", tmp_path / "to")
    assert status == 0 and "0 shards copied (0 B), 8 reused" in out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "to").rglob("*") if p.is_file()}


def test_copy_by_name(made: Path, tmp_path: Path, sskt: Sskt) -> None:
    for encoding in ("f16", "u8"):
        assert sskt("copy", made / encoding, tmp_path / "both")[0] == 0
    wanted = only(made / "u8")
    assert sskt("copy", tmp_path / "both", tmp_path / "to", wanted.digest[:9])[0] == 0
    assert contents(tmp_path / "to") == contents(made / "u8")
    status, _, err = sskt("copy", tmp_path / "both", tmp_path / "to", "nothing-like-it")
    assert status == 2 and "matches nothing-like-it; there are: " in one_line(err)


def test_copy_of_a_part_goes_on_later(made: Path, tmp_path: Path, sskt: Sskt) -> None:
    shutil.copytree(made / "topk-5", tmp_path / "part")
    label_set = only(tmp_path / "part")
    for block in (1, 2):
        label_set.commit_path(label_set.shard(1, block)).unlink()
    status, out, _ = sskt("copy", tmp_path / "part", tmp_path / "to")
    assert status == 0
    assert "6 shards copied" in out and "1 of 2 seeds are not whole at the source" in out
    assert only(tmp_path / "to").coverage() == [1.0, 1 - 32 / 62]
    assert not list((tmp_path / "to").glob("*/index/c/1/1/0"))
    status, out, _ = sskt("copy", made / "topk-5", tmp_path / "to", "--json")
    assert status == 0 and json.loads(out)[0]["written"] == 2
    assert contents(tmp_path / "to") == contents(made / "topk-5")


def test_copy_of_a_set_that_has_grown(broken: Path, made: Path, tmp_path: Path, sskt: Sskt) -> None:
    assert sskt("copy", made / "f16", tmp_path / "to")[0] == 0
    shutil.copytree(made / "f16", tmp_path / "more")
    more = ("--seeds", 4, "--on-error", "skip")
    assert sskt(*stage_arguments(broken, tmp_path / "more", *more))[0] == 0
    status, out, err = sskt("copy", tmp_path / "more", tmp_path / "to", "--json")
    assert status == 0, err
    assert (json.loads(out)[0]["written"], json.loads(out)[0]["reused"]) == (8, 8)
    assert contents(tmp_path / "to") == contents(tmp_path / "more")
    # And back: what has more seeds keeps them.
    assert sskt("copy", made / "f16", tmp_path / "to")[0] == 0
    assert contents(tmp_path / "to") == contents(tmp_path / "more")


@pytest.mark.parametrize("array", ["labels", "view_check"])
def test_copy_over_something_else(made: Path, tmp_path: Path, sskt: Sskt, array: str) -> None:
    assert sskt("copy", made / "f16", tmp_path / "to")[0] == 0
    there = only(tmp_path / "to")
    path = there.shard_path(array, there.shard(1, 2))
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    before = contents(tmp_path / "to")
    status, _, err = sskt("copy", made / "f16", tmp_path / "to")
    assert status == 2
    assert f"{path} is there with other bytes than {made}" in one_line(err)
    assert contents(tmp_path / "to") == before


def test_copy_replaces_what_was_never_committed(made: Path, tmp_path: Path, sskt: Sskt) -> None:
    assert sskt("copy", made / "topk-5", tmp_path / "to")[0] == 0
    there = only(tmp_path / "to")
    shard = there.shard(0, 1)
    there.commit_path(shard).unlink()
    there.shard_path("index", shard).write_bytes(b"half")
    assert sskt("copy", made / "topk-5", tmp_path / "to")[0] == 0
    assert contents(tmp_path / "to") == contents(made / "topk-5")


def test_copy_with_other_shards(broken: Path, made: Path, tmp_path: Path, sskt: Sskt) -> None:
    more = ("--seeds", 1, "--shard-rows", 31, "--on-error", "skip")
    assert sskt(*stage_arguments(broken, tmp_path / "to", *more))[0] == 0
    status, _, err = sskt("copy", made / "f16", tmp_path / "to")
    assert status == 2 and "with 31 samples a shard, at the source with 16" in one_line(err)


def test_copy_onto_itself(made: Path, tmp_path: Path, sskt: Sskt) -> None:
    (tmp_path / "link").symlink_to(made / "f16")
    before = contents(made / "f16")
    for to in (made / "f16", tmp_path / "link", made / "u8" / ".." / "f16"):
        status, _, err = sskt("copy", made / "f16", to)
        assert status == 2 and "onto itself" in one_line(err)
    assert contents(made / "f16") == before


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "empty": lambda p: p.write_bytes(b""),
    "flipped": lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 4]) + p.read_bytes()[1:]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("array", ["value", "index", "view_check"])
def test_damage_is_neither_copied_nor_exported(
    made: Path, tmp_path: Path, sskt: Sskt, array: str, damage: str
) -> None:
    shutil.copytree(made / "topk-5", tmp_path / "from")
    label_set = only(tmp_path / "from")
    path = label_set.shard_path(array, label_set.shard(1, 1))
    DAMAGE[damage](path)
    to = (tmp_path / "copied", tmp_path / "exported")
    copied = sskt("copy", tmp_path / "from", to[0])
    exported = sskt(
        *("export", "--cache", tmp_path / "from", "tiny", "--encoding", "topk-3", "--out", to[1])
    )
    assert copied[0] == exported[0] == 1
    assert f"{path} is damaged (" in one_line(copied[2])
    assert "seed 1, samples 16 to 31" in one_line(exported[2])
    for cache in to:
        there = only(cache)
        assert not there.has(there.shard(1, 1))
        assert not list(cache.rglob("*.partial"))


def chunks_of(label_set: LabelSet, array: str) -> int:
    codec = array_document(label_set.storage, array)["codecs"][0]
    return -(-label_set.shard_rows // int(codec["configuration"]["chunk_shape"][1]))


@given(data=st.data())
def test_no_flip_and_no_cut_passes_the_checksums(data: st.DataObject, made: Path) -> None:
    label_set = only(made / "f16")
    array = data.draw(st.sampled_from(label_set.arrays))
    whole = label_set.shard_path(array, label_set.shard(0, 0)).read_bytes()
    chunks = chunks_of(label_set, array)
    assert shard_damage(whole, chunks) == ""
    at = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(0, 7))
    assert shard_damage(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :], chunks)
    assert shard_damage(whole[:at], chunks)


def test_several_chunks_in_a_shard_pass_the_checksums(tmp_path: Path, sskt: Sskt) -> None:
    more = ("--limit", 1300, "--seeds", 1, "--encoding", "u8")
    assert sskt(*stage_arguments(Path("shapes"), tmp_path / "a", *more))[0] == 0
    assert chunks_of(only(tmp_path / "a"), "labels") == 3
    assert sskt("copy", tmp_path / "a", tmp_path / "b")[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_copy_while_somebody_labels_into_the_same_set(
    broken: Path, made: Path, tmp_path: Path, launcher: Launcher
) -> None:
    more = ("--seeds", 2, "--shard-rows", 16, "--on-error", "skip")
    runs = [
        launcher.start(*stage_arguments(broken, tmp_path / "to", *more)),
        launcher.start("copy", made / "f16", tmp_path / "to"),
        launcher.start("copy", made / "f16", tmp_path / "to"),
    ]
    ended = [r.wait() for r in runs]
    assert [status for status, _, _ in ended] == [0, 0, 0], [err for _, _, err in ended]
    shards = {k: v for k, v in contents(made / "f16").items() if "/c/" in k}
    assert {k: v for k, v in contents(tmp_path / "to").items() if "/c/" in k} == shards


# --- rm ---------------------------------------------------------------------------------------


@pytest.fixture
def several(made: Path, tmp_path: Path) -> Path:
    """A cache with three sets."""
    for encoding in ("f16", "u8", "topk-5"):
        shutil.copytree(made / encoding, tmp_path / "cache", dirs_exist_ok=True)
    return tmp_path / "cache"


def test_rm(several: Path, made: Path, sskt: Sskt) -> None:
    gone = only(made / "u8")
    status, out, err = sskt("rm", "--cache", several, gone.digest, "--yes", "--json")
    assert status == 0, err
    (report,) = json.loads(out)
    assert report["name"] == gone.name and report["coverage"] == [1.0, 1.0]
    assert report["bytes"] == gone.stored_bytes()
    assert contents(several) == contents(made / "f16") | contents(made / "topk-5")
    status, _, err = sskt("rm", "--cache", several, gone.digest[:12], "--yes")
    assert status == 2 and f"no label set in {several} matches {gone.digest[:12]}" in one_line(err)


def test_rm_asks(several: Path, made: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(several)
    status, out, err = sskt("rm", "--cache", several, "tiny")
    assert status == 2 and out == "" and "pass --yes" in one_line(err)
    assert contents(several) == before

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    status, out, err = sskt("rm", "--cache", several, "tiny", "--json")
    assert status == 2 and out == "" and contents(several) == before
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    status, out, err = sskt("rm", "--cache", several, "tiny")
    assert status == 130 and contents(several) == before
    for label_set in list_label_sets(several):
        assert label_set.name in out
    assert "2/2" in out and "KiB" in out and "Remove 3 label sets?" in err
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    status, out, err = sskt("rm", "--cache", several, only(made / "u8").name)
    assert status == 0 and contents(several) == contents(made / "f16") | contents(made / "topk-5")


def test_rm_of_seeds(broken: Path, several: Path, made: Path, sskt: Sskt) -> None:
    name = only(made / "topk-5").name
    status, out, err = sskt("rm", "--cache", several, name, "--seeds", "1", "--yes")
    assert status == 0 and f"removed {name}: seeds 1" in out, err
    left = open_label_set(several / name)
    assert left.coverage() == [1.0]
    for array in left.arrays:
        assert json.loads((several / name / array / "zarr.json").read_bytes())["shape"][0] == 1
    assert not [k for k in contents(several / name) if "/c/1/" in k]
    more = ("--seeds", 2, "--encoding", "topk-5", "--on-error", "skip")
    assert sskt(*stage_arguments(broken, several, *more))[0] == 0
    assert contents(several / name) == contents(made / "topk-5" / name)


def test_rm_of_seeds_that_are_not_the_last(several: Path, made: Path, sskt: Sskt) -> None:
    name = only(made / "f16").name
    assert sskt("rm", "--cache", several, name, "--seeds", "0", "--yes")[0] == 0
    assert open_label_set(several / name).coverage() == [0.0, 1.0]
    assert sskt("rm", "--cache", several, name, "--seeds", "0-1", "--yes")[0] == 0
    assert open_label_set(several / name).coverage() == [0.0]


@pytest.mark.parametrize("seeds", ["2", "1-2", "-1", "x", "1-0", "", "0,,1"])
def test_rm_of_seeds_that_are_not_there(several: Path, sskt: Sskt, seeds: str) -> None:
    before = contents(several)
    status, _, err = sskt("rm", "--cache", several, "tiny", f"--seeds={seeds}", "--yes")
    assert status == 2 and ("0,3-5" in one_line(err) or "has seeds 0 to 1" in one_line(err))
    assert contents(several) == before


def test_rm_of_a_damaged_set(several: Path, made: Path, sskt: Sskt) -> None:
    names = [only(made / encoding).name for encoding in ("u8", "topk-5")]
    (several / names[0] / "zarr.json").unlink()
    (several / names[1] / "labels").mkdir()
    (several / names[1] / "zarr.json").write_bytes(b"{")
    status, _, err = sskt("rm", "--cache", several, names[0], "--seeds", "0", "--yes")
    assert status == 2 and "has lost its zarr.json; remove the whole set" in one_line(err)
    for name in names:
        assert sskt("rm", "--cache", several, name, "--yes")[0] == 0
    assert contents(several) == contents(made / "f16")


def test_rm_of_what_is_no_label_set(several: Path, sskt: Sskt) -> None:
    """Folders that happen to be in a cache, and other people's Zarr groups."""
    for name in ("Documents", "a.b.0123456789ab", ".ssh"):
        (several / name / "deep").mkdir(parents=True)
        (several / name / "deep" / "letter.txt").write_text("dear")
    (several / "Documents" / "zarr.json").write_text("{}")
    before = contents(several)
    for name in ("Documents", "a.b.0123456789ab", ".ssh", "..", "ocum"):
        status, _, err = sskt("rm", "--cache", several, name, "--yes")
        assert status == 2 and f"matches {name}" in one_line(err)
    assert contents(several) == before


def test_rm_of_a_link(made: Path, tmp_path: Path, sskt: Sskt) -> None:
    before, name = contents(made / "u8"), only(made / "u8").name
    (tmp_path / name).symlink_to(made / "u8" / name)
    status, _, err = sskt("rm", "--cache", tmp_path, name, "--yes")
    assert status == 2 and "is a link" in one_line(err)
    assert contents(made / "u8") == before and (tmp_path / name).is_symlink()


def test_rm_of_a_set_in_use(broken: Path, tmp_path: Path, launcher: Launcher, sskt: Sskt) -> None:
    more = ("--seeds", 300, "--shard-rows", 2, "--on-error", "skip")
    run = launcher.start(*stage_arguments(broken, tmp_path / "cache", *more))
    limit = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("[!.]*/labels/c/*/*/0")):
        assert time.monotonic() < limit
    status, _, err = sskt("rm", "--cache", tmp_path / "cache", "tiny", "--yes")
    assert status == 2 and "is in use by another process" in one_line(err)
    assert only(tmp_path / "cache")
    run.kill()
    run.wait()
    assert sskt("rm", "--cache", tmp_path / "cache", "tiny", "--yes")[0] == 0
    assert not contents(tmp_path / "cache")


LOCK = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(handle, fcntl.LOCK_EX, 1, 1)
print("held", flush=True)
sys.stdin.read()
"""


def test_leftovers_of_killed_creations(several: Path, made: Path, sskt: Sskt) -> None:
    """They trip nobody; the next rm or creation of any set sweeps those that nobody is at."""
    before = contents(several)
    dead, alive = "a-train.b-c.0123456789ab", "d-train.e-f.0123456789ab"
    for name in (dead, alive):
        leftover = several / f".{name}.{'0' * 32}.partial"
        shutil.copytree(several / only(made / "u8").name, leftover)
    for command in ("ls", "verify"):
        status, out, err = sskt(command, "--cache", several, "--json")
        assert status == 0 and len(json.loads(out)) == 3, err
    pipe = subprocess.PIPE
    locking = [sys.executable, "-c", LOCK, str(several / ".locks" / f"{alive}.lock")]
    with subprocess.Popen(locking, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert sskt("copy", made / "f16", several)[0] == 0
        assert {p.name[1 : -len(".partial") - 33] for p in several.glob(".*.partial")} == {alive}
        holder.kill()
    assert sskt("rm", "--cache", several, only(made / "u8").name, "--yes")[0] == 0
    assert not list(several.rglob("*.partial"))
    assert contents(several).keys() == {k for k in before if only(made / "u8").name not in k}


def test_a_creation_in_this_process_keeps_its_locks(
    several: Path, made: Path, tmp_path: Path
) -> None:
    """Closing any handle of a lock file drops this process's locks: the sweep must not."""
    source = only(made / "u8")
    fresh = create_label_set(tmp_path / "new", source.spec, source.classes, 2, shard_rows=16)
    assert fresh.acquire(fresh.shard(0, 0))
    shutil.copytree(fresh.path, tmp_path / "new" / f".{fresh.name}.{'0' * 32}.partial")
    other = only(made / "f16")
    create_label_set(tmp_path / "new", other.spec, other.classes, 2).close()
    code = f"""
from sskt.teacher_cache.storage.locks import Locks
from pathlib import Path
print(Locks(Path({str(tmp_path / "new" / ".locks" / f"{fresh.name}.lock")!r})).acquire(2))
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert asked.stdout == "False\n", asked.stderr
    fresh.close()


def test_a_creation_that_fails_gives_its_lock_back(made: Path, tmp_path: Path) -> None:
    source = only(made / "u8")
    shutil.copytree(source.path, tmp_path / source.name)
    (tmp_path / source.name / "labels" / "zarr.json").write_bytes(b"{")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(CorruptStore):
            create_label_set(tmp_path, source.spec, source.classes, 2)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- export -----------------------------------------------------------------------------------


def exporting(cache: Path, encoding: str, to: Path) -> tuple[object, ...]:
    return ("export", "--cache", cache, "tiny", "--encoding", encoding, "--out", to)


@pytest.mark.parametrize("encoding", ["f16", "root4", "root4-coarse", "u8", "topk-5", "topk-3"])
def test_export_from_f32_is_what_the_source_would_have_given(
    made: Path, tmp_path: Path, sskt: Sskt, encoding: str
) -> None:
    status, out, err = sskt(*exporting(made / "f32", encoding, tmp_path / "to"), "--json")
    assert status == 0, err
    report = json.loads(out)
    assert (report["written"], report["reused"], report["coverage"]) == (8, 0, [1.0, 1.0])
    found, direct = only(tmp_path / "to"), only(made / encoding)
    assert report["digest"] == found.digest == direct.digest and found.name == direct.name
    group = f"{found.name}/zarr.json"
    assert {k: v for k, v in contents(tmp_path / "to").items() if k != group} == {
        k: v for k, v in contents(made / encoding).items() if k != group
    }
    one, other = dict(found.attributes), dict(direct.attributes)
    source = only(made / "f32")
    assert one.pop("made") == source.attributes["made"] | {
        "exported_from": source.digest,
        "from_encoding": "f32",
    }
    other.pop("made")
    assert one == other
    assert sskt("verify", "--cache", tmp_path / "to", "--recompute", 8, "--source", SOURCE)[0] == 0
    status, out, _ = sskt(*exporting(made / "f32", encoding, tmp_path / "to"))
    assert status == 0 and "0 shards written, 8 reused" in out
    assert "gradient error relative to the stored labels: " in out


def test_export_of_fewer_entries(made: Path, tmp_path: Path, sskt: Sskt) -> None:
    assert sskt(*exporting(made / "topk-5", "topk-3", tmp_path / "to"))[0] == 0
    found, direct = only(tmp_path / "to"), only(made / "topk-3")
    for shard in direct.shards(range(2)):
        for array in direct.arrays:
            path = direct.shard_path(array, shard)
            assert path.read_bytes() == found.shard_path(array, shard).read_bytes()


@pytest.mark.parametrize(
    ("found", "wanted", "distance"),
    [
        ("f16", "u8", 0.003),
        ("f16", "root4", 1e-3),
        ("f16", "topk-5", 1e-3),
        ("root4", "root4-coarse", 0.02),
        ("root4", "u8", 0.01),
        ("root4-coarse", "topk-5", 0.02),
        ("u8", "topk-5", 0.02),
    ],
)
def test_export_of_an_export(
    made: Path, tmp_path: Path, sskt: Sskt, found: str, wanted: str, distance: float
) -> None:
    """Close to what the source would have given, and the error is that of the last step."""
    status, out, err = sskt(*exporting(made / found, wanted, tmp_path / "to"), "--json")
    assert status == 0, err
    again, direct = only(tmp_path / "to"), only(made / wanted)
    assert again.digest == direct.digest
    for seed in range(2):
        one, other = again.read(seed, 0, 62), direct.read(seed, 0, 62)
        skipped = direct.encoding.skipped(other)
        assert np.array_equal(again.encoding.skipped(one), skipped) and skipped.sum() == 2
        p, q = (soft_labels(direct.encoding, as_tensors(e), 12)[~skipped] for e in (one, other))
        assert float((p - q).abs().sum(dim=1).max() / 2) < distance
        checks = again.read_checks(seed, 0, 62), direct.read_checks(seed, 0, 62)
        assert np.array_equal(*checks)
    error, exact = json.loads(out)["error"], direct.attributes["error"]
    assert error["rows"] == exact["rows"] == 16 - 1
    assert error["T=1"]["gradient"] == pytest.approx(exact["T=1"]["gradient"], rel=0.2, abs=0.02)


CHAINS = [["f32", "f16", "root4", coarse, "topk-5", "topk-3"] for coarse in ("u8", "root4-coarse")]


@pytest.mark.parametrize("chain", CHAINS)
def test_export_only_to_what_holds_less(chain: list[str]) -> None:
    for i, found in enumerate(chain):
        for j, wanted in enumerate(chain):
            encodings = parse_encoding(found), parse_encoding(wanted)
            if j > i:
                require_exportable(*encodings, "name")
                continue
            with pytest.raises(InputError, match="already" if i == j else "cache-teachers"):
                require_exportable(*encodings, "name")


@pytest.mark.parametrize(("found", "wanted"), [("u8", "root4-coarse"), ("root4-coarse", "u8")])
def test_export_between_grids_that_are_alike_is_refused(found: str, wanted: str) -> None:
    with pytest.raises(InputError, match="cache-teachers"):
        require_exportable(parse_encoding(found), parse_encoding(wanted), "name")


def test_export_refusals(made: Path, tmp_path: Path, sskt: Sskt) -> None:
    cases = [
        (("topk-5", "f16"), "is stored as topk-5: f16 labels made of it would pass for exact"),
        (("u8", "u8"), "is stored as u8 already"),
        (("f16", "f8"), "unknown encoding 'f8'"),
        (("f16", "topk-13"), "the source has only 12 classes"),
        (("no-such-cache", "u8"), "does not exist"),
    ]
    for (found, wanted), said in cases:
        status, _, err = sskt(*exporting(made / found, wanted, tmp_path / "to"))
        assert status == 2 and said in one_line(err)
    shutil.copytree(made / "u8", tmp_path / "to", dirs_exist_ok=True)
    before = contents(tmp_path / "to")
    status, _, err = sskt(*exporting(made / "f16", "u8", tmp_path / "to"))
    assert status == 2 and "was not exported from" in one_line(err)
    assert contents(tmp_path / "to") == before
    shutil.copytree(made / "f16", tmp_path / "to", dirs_exist_ok=True)
    status, _, err = sskt(*exporting(tmp_path / "to", "topk-3", tmp_path / "more"))
    assert status == 2 and "fits several label sets" in one_line(err)


def test_export_into_its_own_cache_and_in_part(made: Path, tmp_path: Path, sskt: Sskt) -> None:
    """Beside the set, with shards missing; the rest follows when they are there."""
    cache = shutil.copytree(made / "f32", tmp_path / "cache")
    source = only(cache)
    held = source.commit_path(source.shard(0, 0)).rename(tmp_path / "held")
    status, out, err = sskt(*exporting(cache, "u8", cache))
    assert status == 0 and "7 shards written" in out and "1 of 2 seeds are not whole" in out, err
    assert "not measured yet" in out
    held.rename(source.commit_path(source.shard(0, 0)))
    command = ("export", "--cache", cache, source.digest, "--encoding", "u8", "--out", cache)
    status, out, err = sskt(*command)
    assert status == 0 and "1 shard written, 7 reused" in out, err
    direct = only(made / "u8")
    for array in direct.arrays:
        for shard in direct.shards(range(2)):
            path = cache / direct.name / direct.shard_key(array, shard)
            assert path.read_bytes() == direct.shard_path(array, shard).read_bytes()


def test_export_of_rows_that_are_no_labels(made: Path, tmp_path: Path) -> None:
    """Checksums are right, a row is not."""
    from sskt.teacher_cache.tools.export import export_label_set

    shutil.copytree(made / "f32", tmp_path / "from")
    whole = only(tmp_path / "from")
    shard = whole.shard(1, 2)
    encoded, checks = whole.read(1, 32, 48), whole.read_checks(1, 32, 48)
    faults: list[Callable[[Any], None]] = [
        lambda rows: rows.__setitem__((3, 5), np.nan),
        lambda rows: rows.__setitem__(3, 0.0),
        lambda rows: rows.__setitem__(3, np.nan),
    ]
    for fault in faults:
        rows = {"labels": encoded["labels"].copy()}
        fault(rows["labels"])
        for key in whole.shard_keys(shard):
            (whole.path / key).unlink()
        writer = create_label_set(tmp_path / "from", whole.spec, whole.classes, 2)
        writer.write(shard, rows, checks)
        writer.close()
        with pytest.raises(CorruptStore, match=r"seed 1, samples 32 to 47: 1 rows .* sample 35;"):
            export_label_set(only(tmp_path / "from"), Encoding("u8"), tmp_path / "to")
        assert not only(tmp_path / "to").has(shard)


def test_training_from_an_export(images: Path, tmp_path: Path, sskt: Sskt) -> None:
    cache, to = tmp_path / "f32", tmp_path / "u8"
    assert sskt(*stage_arguments(images, cache, "--seeds", 1, "--encoding", "f32"))[0] == 0
    assert sskt(*exporting(cache, "u8", to))[0] == 0
    shutil.rmtree(cache)
    options = ("--source", SOURCE, "--policy", "pad-crop-flip", "--epochs", 1, "--device", "cpu")
    status, out, err = sskt(
        *("train", "--target", images, "--cache", to, "--out", tmp_path / "run", *options),
        *("--model", "resnet20", "--workers", 0),
    )
    assert status == 0 and "after 1 epoch;" in out, err


@given(data=st.data())
def test_encoding_twice_loses_what_each_step_loses(data: st.DataObject) -> None:
    """Any log-probabilities: the second encoding sees what the first one decodes to."""
    numbers = data.draw(st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6))
    logits = np.array([numbers], np.float64)
    log_p = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
    for name in ("f32", "f16", "u8"):
        encoding = Encoding(name)
        stored = encoding.encode(log_p)
        again = _log_p(encoding, stored, 6).astype(np.float64)
        decoded = soft_labels(encoding, as_tensors(stored), 6).numpy()
        assert np.allclose(np.exp(again) / np.exp(again).sum(), decoded, atol=1e-6)
        for smaller in (Encoding("u8"), Encoding("topk", 2)):
            rows = smaller.encode(_log_p(encoding, stored, 6))
            assert not smaller.faulty(rows, 6).any() and not smaller.skipped(rows).any()


# --- kills and a full disk --------------------------------------------------------------------

COMMANDS: dict[str, tuple[str, Callable[[Path, Path], tuple[object, ...]]]] = {
    "copy": ("topk-5", lambda cache, to: ("copy", cache, to)),
    "export": ("f32", lambda cache, to: exporting(cache, "topk-3", to)),
}


@pytest.fixture(scope="module")
def small(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches by encoding: 6 samples in 2 blocks, 1 seed."""
    folder = tmp_path_factory.mktemp("small")
    for encoding in ("f32", "topk-5"):
        more = ("--limit", 6, "--seeds", 1, "--shard-rows", 3, "--encoding", encoding)
        assert run(stage_arguments(images, folder / encoding, *more)) == 0
    return folder


def sound(cache: Path) -> None:
    """What is there reads: nothing looks stored that is not."""
    for label_set in list_label_sets(cache) if cache.is_dir() else []:
        for shard in label_set.shards(range(label_set.seeds)):
            if label_set.has(shard):
                label_set.read(shard.seed, shard.start, shard.stop)
                label_set.read_checks(shard.seed, shard.start, shard.stop)


@pytest.mark.slow
@pytest.mark.parametrize("what", COMMANDS)
def test_a_kill_at_every_step(
    small: Path, tmp_path: Path, launcher: Launcher, sskt: Sskt, what: str
) -> None:
    encoding, command = COMMANDS[what]
    assert sskt(*command(small / encoding, tmp_path / "whole"))[0] == 0
    expected = contents(tmp_path / "whole")
    for step in range(1, 100):
        to = tmp_path / str(step)
        status, _, err = launcher.start(*command(small / encoding, to), die_at=step).wait()
        if status == 0:
            break
        assert status == -9, err
        sound(to)
        status, _, err = sskt(*command(small / encoding, to))
        assert status == 0, f"step {step}: {err}"
        assert contents(to) == expected, f"step {step}"
        assert not list(to.rglob("*.partial")), f"step {step}"
    assert step > 10


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(), ("--seeds", "0")])
def test_a_kill_at_every_step_of_rm(
    images: Path, small: Path, tmp_path: Path, launcher: Launcher, sskt: Sskt, seeds: Any
) -> None:
    """Whole and untouched, or gone: never something that looks whole; labelling it again works."""
    expected = contents(small / "topk-5")
    for step in range(1, 100):
        cache = shutil.copytree(small / "topk-5", tmp_path / str(step))
        command = ("rm", "--cache", cache, "tiny", "--yes", *seeds)
        status, _, err = launcher.start(*command, die_at=step).wait()
        sound(cache)
        for label_set in list_label_sets(cache):
            if label_set.coverage() == [1.0]:
                assert {k: v for k, v in contents(cache).items() if k in expected} == expected
        if status == 0:
            break
        assert status == -9, err
        more = ("--limit", 6, "--seeds", 1, "--shard-rows", 3, "--encoding", "topk-5")
        assert sskt(*stage_arguments(images, cache, *more))[0] == 0
        assert contents(cache) == expected, f"step {step}"
        assert not list(cache.rglob("*.partial")), f"step {step}"
    assert step > 5


@pytest.mark.slow
@pytest.mark.parametrize("what", COMMANDS)
def test_no_room_at_every_step(
    small: Path, tmp_path: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The disk fills up at the n-th sync, for every n."""
    encoding, command = COMMANDS[what]
    assert sskt(*command(small / encoding, tmp_path / "whole"))[0] == 0
    expected = contents(tmp_path / "whole")
    fsync, left, tried = os.fsync, 0, 0

    def failing(handle: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    for step in range(1, 100):
        to, left = tmp_path / str(step), step
        monkeypatch.setattr(os, "fsync", failing)
        status, _, err = sskt(*command(small / encoding, to))
        monkeypatch.setattr(os, "fsync", fsync)
        if left > 0:
            assert status == 0
            break
        tried += 1
        assert status == 2 and "No space left" in one_line(err), f"step {step}: {err}"
        sound(to)
        assert sskt(*command(small / encoding, to))[0] == 0
        assert contents(to) == expected, f"step {step}"
        assert not list(to.rglob("*.partial"))
    assert tried >= 15


def test_ctrl_c(made: Path, tmp_path: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to do, and the rest follows."""
    from sskt.teacher_cache.tools import copy as transfer

    write, left = transfer._write_shard, 3

    def interrupted(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(transfer, "_write_shard", interrupted)
    status, _, err = sskt("copy", made / "f16", tmp_path / "to")
    assert status == 130 and "what is copied stays; run the same command again" in err
    assert sskt("copy", made / "f16", tmp_path / "to")[0] == 0
    assert contents(tmp_path / "to") == contents(made / "f16")


def test_what_was_written_is_read_back(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stores something else than it was given."""
    from sskt.teacher_cache.storage.local import LocalStorage

    put = LocalStorage.put

    def lying(place: LocalStorage, key: str, data: bytes) -> None:
        put(place, key, data[:-1] + b"?" if key.endswith("/c/1/2/0") else data)

    monkeypatch.setattr(LocalStorage, "put", lying)
    with pytest.raises(CorruptStore, match=r"labels/c/1/2/0 reads back otherwise"):
        copy_label_set(only(made / "f16"), tmp_path / "to")


def test_removing_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SsktError):
        remove_label_set(tmp_path, "a-train.b-c.0123456789ab")
