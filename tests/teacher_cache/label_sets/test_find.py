"""Finding label sets in a cache that also holds damaged ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.helpers import TINY

from sskt.server.http.problems import problem_of
from sskt.server.state import Sets
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import CorruptStore, InputError
from sskt.teacher_cache.format import metadata
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.format.spec import digest_of
from sskt.teacher_cache.label_sets.create import (
    create_label_set,
    list_label_sets,
    open_label_set,
)
from sskt.teacher_cache.label_sets.find import choose_sets, find_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.sources.registry import parse_source
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.tools.export import export_label_set
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def views(images: Path) -> Views:
    return Views(open_target(str(images)), parse_policy("pad-crop-flip"))


@pytest.fixture
def healthy(label_cache: Path, tmp_path: Path) -> LabelSet:
    """A set in a cache of its own."""
    (label_set,) = list_label_sets(shutil.copytree(label_cache, tmp_path / "labels"))
    return label_set


def resized(path: Path, seeds: Any, samples: int, rows: int) -> None:
    """Writes another size into the metadata of a label set, with the digest that belongs to it."""
    group = path / "zarr.json"
    document = json.loads(group.read_text())
    about = document["attributes"]["sskt"]
    about["spec"]["target"]["size"] = samples
    about["digest"] = digest_of(about["spec"])
    group.write_text(json.dumps(document))
    for array in (path / name / "zarr.json" for name in ("labels", "view_check")):
        document = json.loads(array.read_text())
        document["shape"][:2] = [seeds, samples]
        document["chunk_grid"]["configuration"]["chunk_shape"][1] = rows
        document["codecs"][0]["configuration"]["chunk_shape"][1] = rows
        array.write_text(json.dumps(document))


HOSTILE: dict[str, tuple[Any, int, int, str]] = {
    "seeds": (10**12, 60, 16, "at most 4,194,304 shards"),
    "samples": (3, 10**15, 16, "at most 4,194,304 shards"),
    "both": (10**12, 10**9, 1000, "at most 4,194,304 shards"),
    "rows": (1, 10**12, 10**12, "at most 4,294,967,296 bytes"),
    "rows beyond numpy": (1, 2**63, 2**63, "at most 4,294,967,296 bytes"),
    "no seeds": (0, 60, 16, "at least one seed"),
    "negative": (-5, 60, 16, "at least one seed"),
    "a fraction": (2.5, 60, 16, "at least one seed"),
    "true": (True, 60, 16, "at least one seed"),
    "a text": ("9", 60, 16, "at least one seed"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_size_without_bounds_is_refused_at_once(sskt: Call, healthy: LabelSet, kind: str) -> None:
    """By everything that opens a set, and the sets beside it are not affected."""
    cache = healthy.path.parent
    made = cache / export_label_set(healthy, parse_encoding("u8"), cache).name
    *size, said = HOSTILE[kind]
    resized(made, *size)
    began = time.monotonic()
    with pytest.raises(CorruptStore, match=f"label set {made.name}: unusable metadata .*{said}"):
        open_label_set(made)
    for command in ("ls", "verify"):
        status, out, _ = sskt(command, "--cache", cache)
        assert status == 1 and said in out and healthy.digest[:12] in out
    state = Sets(LocalStorage(cache))
    assert [s.name for s in state.all()] == [healthy.name] and said in state.damaged[made.name]
    assert time.monotonic() - began < 20


def test_no_label_set_is_made_or_grown_beyond_the_limits(
    healthy: LabelSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It could not be opened any more."""
    monkeypatch.setattr(metadata, "MOST_SHARDS", 4 * 5)
    for cache in (tmp_path / "new", healthy.path.parent):
        with pytest.raises(InputError, match=r"at most 20 shards, found 24: 6 seeds of 60 samples"):
            create_label_set(cache, healthy.spec, healthy.classes, 6, shard_rows=16)
    assert open_label_set(healthy.path).seeds == healthy.seeds
    create_label_set(healthy.path.parent, healthy.spec, healthy.classes, 5).close()
    assert open_label_set(healthy.path).seeds == 5


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("file", ["labels/c/1/0/0", "view_check/c/1/0.json"])
def test_a_shard_that_cannot_be_read_now_is_not_called_damaged(
    sskt: Call, healthy: LabelSet, monkeypatch: pytest.MonkeyPatch, file: str, code: int
) -> None:
    """Deleting it would be the wrong advice. The server answers 503: ask again later."""
    opened = os.open

    def refusing(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).endswith(file):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)
    label_set = open_label_set(healthy.path)
    with pytest.raises(InputError, match=f"{file} cannot be read .*give this user the right") as e:
        label_set.read(1, 0, 16)
    assert problem_of(e.value).status == 503
    assert len(label_set.read(0, 0, 16)["labels"]) == 16
    status, out, _ = sskt("verify", "--cache", healthy.path.parent)
    assert status == 1 and f"{file} cannot be read" in out and "delete" not in out


def damage(healthy: LabelSet, name: str = "") -> str:
    """Another set beside it, of another encoding and then damaged: its name."""
    cache = healthy.path.parent
    made = cache / export_label_set(healthy, parse_encoding("u8"), cache).name
    path = made.rename(cache / name) if name else made
    (path / "zarr.json").write_text("{")
    return path.name


def test_a_damaged_set_hides_no_other(sskt: Call, healthy: LabelSet) -> None:
    cache, name = healthy.path.parent, damage(healthy)
    status, out, err = sskt("ls", "--cache", cache)
    assert status == 1, err
    table, said = out[: out.index("unreadable: ")], out[out.index("unreadable: ") :]
    assert healthy.digest[:12] in table and name[-12:] not in table
    assert f"{name}: {cache / name / 'zarr.json'} is not a label set's metadata" in said
    status, out, _ = sskt("ls", "--cache", cache, "--json")
    assert status == 1
    assert [(s["name"], "damaged" in s) for s in json.loads(out)] == [
        (healthy.name, False),
        (name, True),
    ]
    assert sskt("ls", "--cache", cache, healthy.digest[:8])[0] == 0
    assert sskt("inspect", "--cache", cache, healthy.name, "--no-live")[0] == 0
    status, out, _ = sskt("verify", "--cache", cache)
    assert status == 1 and f"{healthy.name}: 12 shards, 180 rows: clean" in out
    assert f"{name}: 0 shards, 0 rows: 1 problem\n" in out


@pytest.mark.parametrize("part", ["whole name", "digest", "both"])
def test_a_damaged_set_that_is_named_is_refused(healthy: LabelSet, part: str) -> None:
    name = damage(healthy)
    wanted = {"whole name": [name], "digest": [name[-12:-4]], "both": ["tiny"]}[part]
    with pytest.raises(CorruptStore, match="not a label set's metadata; name other label sets"):
        choose_sets(healthy.path.parent, wanted)


@pytest.mark.parametrize(
    ("named", "refused"),
    [
        ("", True),
        ("moved", False),
        ("images-train.tiny-other-build.0123456789ab", False),
        ("images-train.other-tiny-build.0123456789ab", False),
        ("images-test.tiny-tiny-build.0123456789ab", False),
    ],
)
def test_a_damaged_set_is_in_the_way_only_where_it_may_be_the_wanted_one(
    healthy: LabelSet, views: Views, named: str, refused: bool
) -> None:
    cache = healthy.path.parent
    damage(healthy, named)
    source = f"tiny={TINY}:build"
    if not refused:
        found = find_label_set(cache, parse_source(source), views)
        assert found and found.name == healthy.name
        return
    with pytest.raises(CorruptStore, match=r"may be the label set that is wanted: .*sskt rm"):
        find_label_set(cache, parse_source(source), views)
    if not named:
        pinned = parse_source(f"{source}#{healthy.digest[:6]}")
        found = find_label_set(cache, pinned, views)
        assert found and found.name == healthy.name


def test_without_an_architecture_any_set_of_the_source_may_be_meant(
    healthy: LabelSet, views: Views
) -> None:
    damage(healthy, "images-train.tiny-other-build.0123456789ab")
    with pytest.raises(CorruptStore, match="may be the label set that is wanted"):
        find_label_set(healthy.path.parent, parse_source("tiny", stored=True), views)


def foreign_group(path: Path) -> None:
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')


def linked_to_itself(path: Path) -> None:
    (path / "zarr.json").unlink()
    (path / "zarr.json").symlink_to("zarr.json")


def of_kind(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        (path / "zarr.json").unlink()
        make(path / "zarr.json")

    return replace


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "folder": of_kind(Path.mkdir),
    "FIFO": of_kind(os.mkfifo),
    "link loop": linked_to_itself,
    "foreign group": foreign_group,
    "array is a FIFO": lambda p: of_kind(os.mkfifo)(p / "labels"),
    "no permission": lambda p: None,
    "copy": lambda p: None,
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("alike", [False, True], ids=["of another source", "may be wanted"])
def test_an_unreadable_set_stops_no_other(
    sskt: Call,
    healthy: LabelSet,
    views: Views,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    alike: bool,
) -> None:
    """It is listed with its reason, and in the way only of those that may mean it."""
    cache, suffix = healthy.path.parent, "images-train.tiny-tiny-build.0123456789ab"
    name = suffix if alike else f"zz-{suffix}"
    path = shutil.copytree(healthy.path, cache / name)
    UNREADABLE[kind](path)
    if kind == "no permission":  # as root, whom no mode keeps out
        read = LocalStorage.read_part

        def refused(place: LocalStorage, *arguments: Any) -> bytes:
            if place.path == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(place.path))
            return read(place, *arguments)

        monkeypatch.setattr(LocalStorage, "read_part", refused)
    status, out, err = sskt("ls", "--cache", cache)
    assert status == 1 and f"\nunreadable: {name}: " in out and healthy.digest[:12] in out, err
    status, out, _ = sskt("verify", "--cache", cache)
    assert status == 1 and f"{healthy.name}: 12 shards, 180 rows: clean" in out
    assert sskt("verify", "--cache", cache, healthy.digest[:9])[0] == 0
    source = parse_source("tiny", stored=True)
    if not alike:
        found = find_label_set(cache, source, views)
        assert found is not None and found.name == healthy.name
    else:
        with pytest.raises(CorruptStore, match="may be the label set that is wanted"):
            find_label_set(cache, source, views)
    if kind != "no permission":
        assert sskt("rm", "--cache", cache, name, "--yes")[0] == 0
        assert find_label_set(cache, source, views) and not path.exists()
        assert sskt("ls", "--cache", cache)[0] == 0


@pytest.mark.parametrize(
    "command",
    [
        ["ls", "SET"],
        ["ls", "--cache", "SET"],
        ["verify", "--cache", "SET"],
        ["copy", "SET", "copied"],
    ],
    ids=" ".join,
)
def test_a_label_set_is_no_cache(
    sskt: Call,
    healthy: LabelSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    """The folder of a set, where the folder that holds sets is wanted."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "labels" / healthy.name
    status, _, err = sskt(*[path if text == "SET" else text for text in command])
    assert status == 2 and f"{path} is a label set, not a cache: give the folder" in err
    assert healthy.name in err.partition("give the folder")[2]
    assert path.is_dir() and not (tmp_path / "copied").exists()


def test_a_cache_may_come_first_in_ls_and_has_an_option_elsewhere(
    sskt: Call, healthy: LabelSet, tmp_path: Path
) -> None:
    status, out, _ = sskt("ls", tmp_path / "labels")
    assert status == 0 and healthy.digest[:12] in out
    status, _, err = sskt("verify", tmp_path / "labels", "--cache", tmp_path / "labels")
    assert status == 2 and err.endswith("; a folder or URL is given with --cache\n")
