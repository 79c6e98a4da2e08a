"""Decoders that crash or hang over a clip, in a process of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sskt.teacher_cache.errors import MissingData, SsktError
from sskt.teacher_cache.media import decord_worker as apart
from sskt.teacher_cache.media.decord_worker import Counter
from sskt.teacher_cache.media.video import Counted, count_frames
from sskt.teacher_cache.targets.base import Files, Names, Target
from sskt.teacher_cache.targets.files.file_index import count_clips

FOLDER = "SoccerPenalty"


@pytest.fixture
def clip(data: Path) -> Path:
    return data / "ucf101" / "UCF-101" / FOLDER / f"v_{FOLDER}_g17_c04.avi"


@pytest.fixture
def counter() -> Iterator[Counter]:
    counter = Counter("pyav")
    yield counter
    counter.close()


def pid(counter: Counter) -> int:
    assert counter._running
    return counter._running[0].pid


def test_a_decoder_that_crashes_is_the_clips_problem(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSKT_HOME", str(tmp_path))
    names = Names([clip.name])
    paths = Files(clip.parent, names)
    labels = np.zeros(1, np.int64)
    target = Target("own", "train", ("a",), labels, names, paths=paths, decoder="decord")
    monkeypatch.setattr(apart, "_SERVE", "import os; os.abort()")
    found = count_clips(target)
    assert found.frames is not None and found.frames.tolist() == [0]
    assert str(clip) in found.damaged[0] and "decord crashes or hangs over it" in found.damaged[0]
    assert "take --decoder pyav" in found.damaged[0]


def test_the_same_answers_as_in_this_process(counter: Counter, clip: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut \udcff.avi"
    cut.write_bytes(clip.read_bytes()[:100_000])
    for path in (clip, cut, clip):
        assert counter.count(path) == count_frames(path)
    with pytest.raises(MissingData, match=r"nothing\.avi"):
        counter.count(tmp_path / "nothing.avi")
    assert counter.count(clip) == count_frames(clip)


def test_one_crash_may_be_an_earlier_clips(counter: Counter, clip: Path) -> None:
    counter.count(clip)
    os.kill(pid(counter), signal.SIGSEGV)
    assert counter.count(clip) == count_frames(clip)


def test_a_process_ended_from_outside_is_no_damage(counter: Counter, clip: Path) -> None:
    counter.count(clip)
    os.kill(pid(counter), signal.SIGKILL)
    with pytest.raises(SsktError, match=r"v_SoccerPenalty_g17_c04\.avi was ended \(status -9\)"):
        counter.count(clip)


def test_a_decoder_that_hangs_is_given_up(
    counter: Counter, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "_SERVE", "import time; time.sleep(600)")
    monkeypatch.setattr(apart, "SILENT_SECONDS", 0)
    monkeypatch.setattr(apart, "SECONDS_PER_BYTE", 0)
    found = counter.count(clip)
    assert found == Counted(0, 0, "pyav crashes or hangs over it; take --decoder pyav")
    monkeypatch.undo()
    assert counter.count(clip) == count_frames(clip)


def test_nothing_is_counted_after_the_end(counter: Counter, clip: Path) -> None:
    counter.count(clip)
    process = pid(counter)
    counter.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    with pytest.raises(SsktError):
        counter.count(clip)
