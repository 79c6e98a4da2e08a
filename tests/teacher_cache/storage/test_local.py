"""Caches in folders: what is listed, and folders that vanish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.random_labels import CLASSES, make_labels, writer_of

from sskt.teacher_cache.errors import MissingData
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.open import open_cache


def test_foreign_folders_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also ones that cannot be read, link loops and files; a set under a wrong name with a word."""
    made = make_labels(tmp_path / "cache")
    cache = tmp_path / "cache"
    for name in ("lost+found", "my notes", ".hidden", "\x1b[31mred"):
        (cache / name).mkdir()
    (cache / "loop").symlink_to("loop")
    (cache / "file").touch()
    (cache / "private one").mkdir(mode=0)
    assert LocalStorage(cache).folders() == [made.name]
    assert not caplog.records
    (cache / "\x1b[31mred" / "zarr.json").touch()
    assert [found.name for found in list_label_sets(cache)] == [made.name]
    (record,) = caplog.records
    assert "has a label set '\\x1b[31mred', which is left out" in record.getMessage()


def test_a_mount_that_is_lost(tmp_path: Path, sskt: Callable[..., tuple[int, str, str]]) -> None:
    """An empty folder is in its place: nothing is read as missing, and nothing written there."""
    cache = tmp_path / "cache"
    made = make_labels(cache)
    writer = writer_of(made)
    labels = {"labels": np.zeros((512, CLASSES), np.float16)}
    checks = np.zeros(512, np.uint32)
    cache.rename(tmp_path / "elsewhere")
    cache.mkdir()
    for use in (
        lambda: made.read(0, 0, 10),
        lambda: made.read_checks(0, 0, 10),
        lambda: made.missing([0]),
        lambda: writer.write(made.shard(0, 0), labels, checks),
        lambda: made.storage.create("labels/c/9/0/0", b"x"),
    ):
        with pytest.raises(MissingData, match=f"{made.storage} is gone: .*not mounted any more"):
            use()
    assert not list(cache.iterdir())
    status, _, err = sskt("ls", "--cache", cache)
    assert status == 2 and "check that its file system is mounted" in err
    cache.rmdir()
    (tmp_path / "elsewhere").rename(cache)
    assert made.missing([0]) == [] and len(made.read(0, 0, 10)["labels"]) == 10
    assert open_cache(cache).folders() == [made.name]
