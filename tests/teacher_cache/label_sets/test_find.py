"""Finding label sets in a cache that also holds damaged ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.helpers import TINY

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import CorruptStore
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.label_sets.create import list_label_sets
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
    assert f"{name}: 0 shards, 0 rows: 1 problems" in out


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
