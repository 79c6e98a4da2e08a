"""A shard in another shard's place is noticed: by verify, by every reader, by copy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.random_labels import make_labels, replace_shard, write_shard

from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels, InputError
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.tools.copy import copy_label_set
from sskt.teacher_cache.tools.verify import verify

Sskt = Callable[..., tuple[int, str, str]]
GOLDEN = Path(__file__).parents[2] / "golden" / "cache"


def keys(label_set: LabelSet, shard: Shard, what: str) -> list[str]:
    """The files of a shard that a fault moves."""
    if what == "everything":
        return label_set.shard_keys(shard)
    return [label_set.shard_key(what, shard)]


def swap(label_set: LabelSet, other: LabelSet, one: Shard, two: Shard, what: str) -> None:
    for a, b in zip(keys(label_set, one, what), keys(other, two, what), strict=True):
        first, second = (label_set.path / a).read_bytes(), (other.path / b).read_bytes()
        (label_set.path / a).write_bytes(second)
        (other.path / b).write_bytes(first)


FAULTS: dict[str, Callable[[LabelSet, LabelSet, str], None]] = {
    "two seeds": lambda s, o, what: swap(s, s, s.shard(0, 1), s.shard(1, 1), what),
    "two blocks": lambda s, o, what: swap(s, s, s.shard(0, 1), s.shard(0, 0), what),
    "two sets": lambda s, o, what: swap(s, o, s.shard(0, 1), o.shard(0, 1), what),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("what", ["everything", "labels", "view_check"])
def test_a_shard_in_anothers_place_is_noticed(tmp_path: Path, fault: str, what: str) -> None:
    label_set = make_labels(tmp_path / "one", "f16")
    other = make_labels(tmp_path / "other", "f32" if what == "everything" else "f16", salt=1)
    FAULTS[fault](label_set, other, what)
    fresh = open_label_set(label_set.storage)
    for start, stop in ((512, 1024), (600, 601), (0, 1300)):
        with pytest.raises(CorruptStore, match="seed 0, samples"):
            fresh.read(0, start, stop)
            fresh.read_checks(0, start, stop)
    if what != "view_check":
        with pytest.raises(CorruptStore, match="seed 0, samples "):
            fresh.encoded_rows(0, [700, 3])
    assert any(p.startswith("seed 0, samples 512 to 1023") for p in verify(fresh).problems)
    with pytest.raises(CorruptStore, match="record"):
        copy_label_set(fresh, tmp_path / "copy")


def test_an_old_shard_put_back_is_noticed(tmp_path: Path) -> None:
    label_set = make_labels(tmp_path / "cache")
    path = label_set.shard_path("labels", label_set.shard(2, 0))
    before = path.read_bytes()
    replace_shard(label_set, 2, 0, salt=3)
    open_label_set(label_set.storage).read(2, 0, 1300)
    path.write_bytes(before)
    with pytest.raises(CorruptStore, match="is not the one that the shard's record names"):
        open_label_set(label_set.storage).read(2, 0, 1300)


def test_a_set_made_again_while_it_is_open_is_read(tmp_path: Path) -> None:
    """A record that was read before is read once more; the labels are those of now."""
    label_set = make_labels(tmp_path / "cache")
    before = label_set.read(1, 0, 512)["labels"]
    replace_shard(label_set, 1, 0, salt=3)
    now = label_set.read(1, 0, 512)["labels"]
    assert not np.array_equal(before, now)
    assert np.array_equal(now, open_label_set(label_set.storage).read(1, 0, 512)["labels"])


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"digest": 1}', "digest", "seed", "block", "checksums", "flip"],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: bytes | str) -> None:
    label_set = make_labels(tmp_path / "cache")
    shard = label_set.shard(1, 1)
    path = label_set.path / label_set.record_key(shard)
    whole = path.read_bytes()
    if content == "flip":
        content = whole[:30] + bytes([whole[30] ^ 1]) + whole[31:]
    elif isinstance(content, str):
        document = json.loads(whole)
        del document[content]
        content = json.dumps(document).encode()
    path.write_bytes(content)
    with pytest.raises(CorruptStore, match="seed 1, samples 512 to 1023: "):
        open_label_set(label_set.storage).read(1, 512, 1024)
    assert len(verify(open_label_set(label_set.storage)).problems) == 1


def test_labels_without_a_record_are_not_stored_yet(tmp_path: Path) -> None:
    """As after a kill just before the record: the next writer makes the same files."""
    label_set = make_labels(tmp_path / "cache")
    shard = label_set.shard(1, 1)
    record = label_set.path / label_set.record_key(shard)
    whole = {p: p.read_bytes() for p in label_set.path.rglob("*") if p.is_file()}
    record.unlink()
    fresh = open_label_set(label_set.storage)
    assert fresh.missing(range(3)) == [shard]
    with pytest.raises(IncompleteLabels, match="seed 1 lacks samples 512 to 1023"):
        fresh.read(1, 512, 1024)
    problems = verify(fresh).problems
    assert len(problems) == 1 and "1 have labels but no record: add it with --bind" in problems[0]
    writer = create_label_set(tmp_path / "cache", fresh.spec, fresh.classes, 3)
    assert writer.acquire(shard)
    write_shard(writer, shard)
    writer.close()
    assert {p: p.read_bytes() for p in label_set.path.rglob("*") if p.is_file()} == whole


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Label sets of version 0.1, which have no records."""
    for label_set in list_label_sets(GOLDEN):
        if not label_set.bound:
            shutil.copytree(label_set.path, tmp_path / "golden" / label_set.name)
    return tmp_path / "golden"


def contents(cache: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in cache.rglob("*") if p.is_file() and ".locks" not in p.parts}


def test_old_sets_are_bound_on_request(old: Path, sskt: Sskt) -> None:
    before = contents(old)
    status, out, err = sskt("verify", "--cache", old)
    assert status == 0, err
    assert out.count(": clean") == out.count("  not bound to their places: 4 shards;") == 4
    assert contents(old) == before
    status, out, err = sskt("verify", "--cache", old, "--bind", "--json")
    assert status == 0 and {r["unbound"] for r in json.loads(out)} == {0}, err
    after = contents(old)
    kept = {p: data for p, data in before.items() if p.parent.parent != old}
    assert {p: after[p] for p in kept} == kept
    assert len(after) == len(before) + 4 * 4
    for label_set in list_label_sets(old):
        assert label_set.bound
        path = label_set.path / label_set.record_key(label_set.shard(1, 0))
        path.unlink()
    status, out, _ = sskt("verify", "--cache", old)
    assert status == 1 and out.count("1 of 4 shards are missing (seed 1); 1 have labels") == 4
    assert sskt("verify", "--cache", old, "--bind")[0] == 0
    assert contents(old) == after


def test_a_damaged_shard_is_not_bound(old: Path, sskt: Sskt) -> None:
    label_set = list_label_sets(old)[0]
    path = label_set.shard_path(label_set.arrays[-1], label_set.shard(0, 1))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    status, out, _ = sskt("verify", "--cache", old, "--bind", label_set.name)
    assert status == 1 and ": 1 problem\n" in out and "not bound to their places: 1 shard;" in out
    fresh = open_label_set(label_set.storage)
    assert not fresh.bound and len(list(fresh.path.glob("view_check/c/*/*.json"))) == 3


def test_records_travel_with_copies(old: Path, tmp_path: Path, sskt: Sskt) -> None:
    """Also to a copy that was made before the set was bound."""
    assert sskt("copy", old, tmp_path / "copy")[0] == 0
    assert contents(tmp_path / "copy").keys() == {
        tmp_path / "copy" / p.relative_to(old) for p in contents(old)
    }
    assert sskt("verify", "--cache", old, "--bind")[0] == 0
    assert sskt("copy", old, tmp_path / "copy")[0] == 0

    def relative(cache: Path) -> dict[Path, bytes]:
        return {p.relative_to(cache): data for p, data in contents(cache).items()}

    assert relative(tmp_path / "copy") == relative(old)


def test_new_shards_of_an_old_set_are_bound(old: Path, sskt: Sskt, tmp_path: Path) -> None:
    label_set: Any = list_label_sets(old)[0]
    shard = label_set.shard(1, 1)
    rows, checks = label_set.read(1, 4, 7), label_set.read_checks(1, 4, 7)
    for key in label_set.shard_keys(shard):
        (label_set.path / key).unlink(missing_ok=True)
    writer = create_label_set(old, label_set.spec, label_set.classes, 2)
    writer.write(shard, rows, checks)
    writer.close()
    assert label_set.shard_record(shard) is not None
    assert verify(open_label_set(label_set.storage)).unbound == 3
    original = GOLDEN / label_set.name / label_set.commit_key(shard)
    assert label_set.commit_path(shard).read_bytes() == original.read_bytes()


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


KINDS: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "empty": lambda p: p.write_bytes(b""),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "flipped": lambda p: (
        p.write_bytes(bytes([p.read_bytes()[0] ^ 8]) + p.read_bytes()[1:]) and None
    ),
    "folder": to_folder,
    "FIFO": to_fifo,
    "link loop": to_link_loop,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["labels", "view_check", "record"])
def test_every_file_of_a_shard_is_watched(tmp_path: Path, sskt: Sskt, file: str, kind: str) -> None:
    """Found by ``verify`` and on use, without waiting; a run labels what cannot be right again."""
    label_set = make_labels(tmp_path / "cache")
    shard = label_set.shard(1, 1)
    key = label_set.record_key(shard) if file == "record" else label_set.shard_key(file, shard)
    KINDS[kind](label_set.path / key)
    status, out, _ = sskt("verify", "--cache", tmp_path / "cache")
    assert status == 1 and ": 1 problem\n" in out and "seed 1" in out
    fresh = open_label_set(label_set.storage)
    read = fresh.read_checks if file == "view_check" else fresh.read
    with pytest.raises((CorruptStore, IncompleteLabels), match="seed 1"):
        read(1, 0, 1300)
    assert len(fresh.read(0, 0, 1300)["labels"]) == 1300
    writer = create_label_set(tmp_path / "cache", fresh.spec, fresh.classes, 3)
    if kind == "folder":
        with pytest.raises(InputError, match="is a folder in the place of a shard's file"):
            writer.discard_unsound(writer.shards(range(3)))
        return
    said = writer.discard_unsound(writer.shards(range(3)))
    needs_reading = file != "record" and kind in ("cut", "zeros", "flipped")
    lost = (file, kind) == ("record", "deleted")
    assert len(said) == (not (needs_reading or lost)) and all("seed 1" in what for what in said)
    assert writer.missing(range(3)) == ([] if needs_reading else [shard])
    writer.close()
