"""The index of counted frames and hashes: the same answers as counting anew, whatever happens."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sskt.teacher_cache.errors import BadClip, MissingData
from sskt.teacher_cache.media.video import count_frames
from sskt.teacher_cache.targets.base import Files, Names, Target
from sskt.teacher_cache.targets.files import file_index as index
from sskt.teacher_cache.targets.files.file_index import count_clips, hash_contents, index_folder

MADE = 6  # clips of 3, 4, ... frames


def write_clip(path: Path, frames: int) -> None:
    rng = np.random.default_rng(frames)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(frames):
            image = rng.integers(0, 256, (32, 48, 3), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        file.mux(stream.encode(None))


def of(folder: Path, *, decoder: str = "pyav") -> Target:
    """All that lies in ``folder``, as one class."""
    names = Names(sorted(path.name for path in folder.iterdir()))
    labels = np.zeros(len(names), np.int64)
    paths = Files(folder, names)
    return Target("own", "train", ("a",), labels, names, paths=paths, decoder=decoder)


def anew(target: Target) -> list[int]:
    return [count_frames(path, target.decoder).frames for path in target.paths or ()]


class Calls:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i in range(MADE):
        write_clip(folder / f"{i}.avi", 3 + i)
    return folder


@pytest.fixture
def own(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of clips, and an empty place for indices."""
    monkeypatch.setenv("SSKT_HOME", str(tmp_path / "home"))
    shutil.copytree(clips, tmp_path / "own")
    return tmp_path / "own"


# --- answers -----------------------------------------------------------------------------------


def test_clips_are_counted_once(own: Path) -> None:
    calls = Calls()
    first = count_clips(of(own), calls)
    assert first.frames is not None and first.frames.dtype == np.int64
    assert first.frames.tolist() == [3 + i for i in range(MADE)] and not first.damaged
    assert sorted(calls.seen) == [(i + 1, MADE) for i in range(MADE)]
    calls = Calls()
    again = count_clips(of(own), calls)
    assert again.frames is not None and again.frames.tolist() == first.frames.tolist()
    assert not calls.seen
    assert [p.name.split(".", 1)[1] for p in index_folder().glob("own-*")] == ["frames2-pyav.npz"]


def test_each_decoder_has_its_own_index(own: Path) -> None:
    pytest.importorskip("decord")
    count_clips(of(own))
    calls = Calls()
    found = count_clips(of(own, decoder="decord"), calls)
    assert len(calls.seen) == MADE
    assert found.frames is not None and found.frames.tolist() == [3 + i for i in range(MADE)]


def test_a_file_named_twice_is_counted_once(own: Path) -> None:
    target = of(own).chosen(np.array([2, 0, 2, 2]))
    calls = Calls()
    found = count_clips(target, calls)
    assert found.frames is not None and found.frames.tolist() == [5, 3, 5, 5]
    assert len(calls.seen) == 2


def test_a_part_counted_first_helps_the_whole_and_the_order_does_not_matter(own: Path) -> None:
    count_clips(of(own).chosen(np.array([4, 1])))
    calls = Calls()
    found = count_clips(of(own).chosen(np.arange(MADE)[::-1]), calls)
    assert found.frames is not None and found.frames.tolist() == [8, 7, 6, 5, 4, 3]
    assert [done for done, _ in calls.seen] == [3, 4, 5, 6]


def test_paths_of_a_manifest(own: Path) -> None:
    target = of(own)
    target = replace(target, paths=tuple(target.paths or ()))
    calls = Calls()
    for _ in range(2):
        found = count_clips(target, calls)
        assert found.frames is not None and found.frames.tolist() == [3 + i for i in range(MADE)]
    assert len(calls.seen) == MADE


def test_the_same_folder_under_another_name(own: Path, tmp_path: Path) -> None:
    count_clips(of(own))
    (tmp_path / "link").symlink_to(own)
    calls = Calls()
    count_clips(of(tmp_path / "link"), calls)
    assert not calls.seen


@pytest.mark.parametrize("before", [-3600, -1e-9, 1e-9, 86400])
def test_a_change_of_size_or_time_is_seen(own: Path, before: float) -> None:
    """Also of a clock that was set back; the size stays the same here."""
    count_clips(of(own))
    clip, other = own / "0.avi", own / "5.avi"
    was = clip.stat()
    room = other.stat().st_size
    os.truncate(clip, room)
    stamp = was.st_mtime_ns
    os.utime(clip, ns=(stamp, stamp))
    count_clips(of(own))
    shutil.copyfile(other, clip)
    changed = stamp - round(before * 1e9)
    os.utime(clip, ns=(changed, changed))
    calls = Calls()
    found = count_clips(of(own), calls)
    assert found.frames is not None and found.frames[0] == 8
    assert len(calls.seen) == 1


steps = st.lists(
    st.tuples(
        st.sampled_from(["replace", "cut", "zero", "touch", "remove", "frames"]),
        st.integers(0, MADE - 1),
        st.integers(0, MADE - 1),
    ),
    max_size=8,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps)
def test_the_index_answers_as_counting_anew_does(
    clips: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    taken: list[tuple[str, int, int]],
) -> None:
    folder = tmp_path_factory.mktemp("changing")
    monkeypatch.setenv("SSKT_HOME", str(folder / "home"))
    own = folder / "own"
    shutil.copytree(clips, own)
    for step, (what, to, by) in enumerate(taken):
        path = own / f"{to}.avi"
        change(path, what, clips / f"{by}.avi", by)
        if path.exists():  # two changes within one tick of the clock could not be told apart
            newest = max((p for p in (path, *path.glob("*"))), key=lambda p: p.stat().st_mtime_ns)
            os.utime(newest, ns=(0, newest.stat().st_mtime_ns + step + 1))
        target = of(own)
        if not len(target):
            return
        found = count_clips(target)
        assert found.frames is not None and found.frames.tolist() == anew(target)
        problems = [count_frames(p) for p in target.paths or ()]
        bad = {i for i, c in enumerate(problems) if c.problem or not c.frames}
        assert set(found.damaged) == bad


def change(path: Path, what: str, other: Path, amount: int) -> None:
    if what in ("replace", "frames", "remove") or path.is_dir() or not path.exists():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if what == "frames":
            path.mkdir()
            for i in range(amount):
                (path / f"image_{i + 1:05d}.jpg").write_bytes(b"jpeg")
            (path / "n_frames").write_text(str(amount))
        elif what != "remove":
            shutil.copyfile(other, path)
    elif what == "cut":
        os.truncate(path, path.stat().st_size * (amount + 1) // (MADE + 1))
    elif what == "zero":
        with path.open("r+b") as file:
            file.seek(path.stat().st_size * (amount + 1) // (MADE + 1))
            file.write(bytes(500))


# --- damaged clips -----------------------------------------------------------------------------


def test_a_truncated_clip_is_named_with_both_counts(data: Path, own: Path) -> None:
    real = next((data / "ucf101" / "UCF-101").rglob("*.avi"))
    whole = count_frames(real)
    clip = own / "cut.avi"
    clip.write_bytes(real.read_bytes()[: real.stat().st_size // 2])
    (own / "empty.avi").touch()
    target = count_clips(of(own))
    names = list(target.ids)
    assert set(target.damaged) == {names.index("cut.avi"), names.index("empty.avi")}
    message = target.damaged[names.index("cut.avi")]
    assert target.frames is not None
    decoded = int(target.frames[names.index("cut.avi")])
    assert 0 < decoded < whole.frames
    assert str(clip) in message and f"{decoded} frames decode of {whole.header}" in message
    assert message.endswith("replace the file, or leave it out with --on-error skip")
    assert target.frames[names.index("empty.avi")] == 0
    assert target.damaged == count_clips(of(own)).damaged
    with pytest.raises(BadClip, match="--on-error skip"):
        target.read_frames(names.index("cut.avi"), [0])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damage_never_raises(clips: Path, own: Path, drawn: st.DataObject) -> None:
    content = bytearray((clips / "3.avi").read_bytes())
    for _ in range(drawn.draw(st.integers(1, 8))):
        at = drawn.draw(st.integers(0, len(content) - 1))
        content[at] = drawn.draw(st.integers(0, 255))
    (own / "3.avi").write_bytes(content[: drawn.draw(st.integers(0, len(content)))])
    found = count_clips(of(own))
    assert found.frames is not None and found.frames.tolist()[:3] == [3, 4, 5]


def test_a_file_that_is_gone_or_being_written_is_no_damage(own: Path) -> None:
    target = of(own)
    (own / "2.avi").unlink()
    with pytest.raises(MissingData, match=r"cannot look at .*2\.avi"):
        count_clips(target)

    def grows(path: Path) -> str:
        with path.open("ab") as file:
            file.write(b"more")
        return "3 3 truncated"

    clip = own / "0.avi"
    with pytest.raises(MissingData, match=r"0\.avi changed while it was read; wait"):
        index._unchanged(clip, index.measure(clip), grows)


def test_a_frame_that_is_replaced_by_an_older_one_is_noticed(tmp_path: Path) -> None:
    """Of the same size, in a folder that has a file from a time when the clock was ahead."""
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"frame")
    now = time.time()
    os.utime(tmp_path / "2.jpg", (now + 3600, now + 3600))
    before = index.measure(tmp_path)
    assert index.measure(tmp_path) == before
    kept_time = tmp_path.stat().st_mtime_ns
    (tmp_path / "1.jpg").write_bytes(b"other")
    os.utime(tmp_path / "1.jpg", (now - 7200, now - 7200))
    os.utime(tmp_path, ns=(kept_time, kept_time))
    assert index.measure(tmp_path) != before


# --- the file on disk --------------------------------------------------------------------------


def kept() -> Path:
    (found,) = index_folder().glob("*.npz")
    return found


names = st.binary(min_size=1, max_size=30).filter(lambda b: 0 not in b).map(os.fsdecode)
sizes = st.integers(-(2**63), 2**63 - 1)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(names, st.tuples(sizes, sizes, names | st.just("")), min_size=1))
def test_entries_come_back_as_they_were(
    tmp_path: Path, entries: dict[str, tuple[int, int, str]]
) -> None:
    path = tmp_path / "entries.npz"
    path.write_bytes(index._packed(entries))
    assert index._read(path) == entries


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_index_is_set_aside_and_never_believed(
    own: Path, caplog: pytest.LogCaptureFixture, drawn: st.DataObject
) -> None:
    shutil.rmtree(index_folder(), ignore_errors=True)
    expected = count_clips(of(own)).frames
    content = bytearray(kept().read_bytes())
    if drawn.draw(st.booleans()):
        content = content[: drawn.draw(st.integers(0, len(content) - 1))]
    else:
        content[drawn.draw(st.integers(0, len(content) - 1))] ^= drawn.draw(st.integers(1, 255))
    kept().write_bytes(content)
    caplog.clear()
    calls = Calls()
    found = count_clips(of(own), calls).frames
    assert found is not None and expected is not None
    assert found.tolist() == expected.tolist()
    aside = list(index_folder().glob("*.damaged"))
    # a flipped bit may lie where it says nothing (a time stamp within the zip file)
    assert bool(aside) == bool(calls.seen) == bool(caplog.records)
    if aside:
        assert "is damaged" in caplog.text and aside[0].read_bytes() == bytes(content)
        calls = Calls()
        count_clips(of(own), calls)
        assert not calls.seen


def test_an_index_that_cannot_be_kept_is_a_warning(
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSKT_HOME", str(tmp_path / "file" / "home"))
    found = count_clips(of(own))
    assert found.frames is not None and found.frames.tolist() == [3 + i for i in range(MADE)]
    assert {(r.name, r.levelno) for r in caplog.records} == {("sskt", logging.WARNING)}
    assert "set SSKT_HOME to a folder that can be written to" in caplog.text


def test_a_full_disk_is_a_warning(own: Path) -> None:
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n" + COUNT
    done = subprocess.run(
        [sys.executable, "-c", script, str(own), "0", "99"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()[-1]) == (0, str(MADE)), done.stderr
    assert "cannot keep" in done.stderr and "no room to write" in done.stderr
    assert not list(index_folder().glob("*.npz*"))


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSKT_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert index_folder() == tmp_path / "own" / "index"
    monkeypatch.setenv("SSKT_HOME", "")
    assert index_folder() == tmp_path / "xdg" / "sskt" / "index"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert index_folder() == tmp_path / ".cache" / "sskt" / "index"


# --- several processes, and interruptions ------------------------------------------------------

COUNT = """
import sys
from pathlib import Path
import numpy as np
from sskt.teacher_cache.targets.files import file_index as index
from sskt.teacher_cache.targets.base import Files, Names, Target

def main(folder, first, last):
    index.SAVE_SECONDS = 0
    names = Names(sorted(p.name for p in folder.iterdir())[first:last])
    labels = np.zeros(len(names), np.int64)
    target = Target("own", "train", ("a",), labels, names, paths=Files(folder, names),
                    decoder="pyav")
    def said(done, total):
        print(done, flush=True)
        if "hold" in sys.argv and done == 1:
            sys.stdin.readline()

    index.count_clips(target, said)

main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def call(folder: Path, first: int, last: int, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COUNT, str(folder), str(first), str(last), *more]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        return running[-1]

    yield call
    for process in running:
        process.kill()
        process.communicate()


def many(folder: Path, copies: int) -> None:
    for path in sorted(folder.iterdir()):
        for i in range(copies):
            shutil.copyfile(path, path.with_name(f"{path.stem}-{i}.avi"))


def test_processes_that_count_at_once_lose_nothing(
    own: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    many(own, 9)
    half = MADE * 10 // 2
    first = start(own, 0, half + 5, "hold")
    assert first.stdout and first.stdout.readline() == "1\n"
    second = start(own, half - 5, MADE * 10)
    assert second.communicate()[0] and second.returncode == 0
    first.communicate("go on\n")
    assert first.returncode == 0
    calls = Calls()
    found = count_clips(of(own), calls)
    assert not calls.seen
    assert found.frames is not None and found.frames.tolist() == anew(of(own))


def test_what_was_counted_before_a_kill_is_kept(
    own: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    many(own, 9)
    process = start(own, 0, 99)
    assert process.stdout
    for line in process.stdout:
        if line.strip() == "30":
            process.kill()
            break
    assert process.wait() == -9
    calls = Calls()
    found = count_clips(of(own), calls)
    assert calls.seen[0][0] > 1 and calls.seen[-1] == (MADE * 10, MADE * 10)
    assert found.frames is not None and found.frames.tolist() == anew(of(own))
    assert not list(index_folder().glob("*.damaged"))


def test_ctrl_c_keeps_what_was_counted(own: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count_clips(of(own), interrupt)
    calls = Calls()
    count_clips(of(own), calls)
    assert [done for done, _ in calls.seen] == [4, 5, 6]


# --- contents ----------------------------------------------------------------------------------


def test_the_hash_is_of_ids_and_contents_in_order(own: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted(own.iterdir()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.name}\0{content}\n".encode())
    calls = Calls()
    target = of(own)
    assert hash_contents(target, calls) == f"sha256:{digest.hexdigest()}"
    assert calls.seen[-1] == (MADE, MADE)
    calls = Calls()
    assert hash_contents(target, calls) == f"sha256:{digest.hexdigest()}"
    assert not calls.seen
    assert hash_contents(target.chosen(np.arange(MADE)[::-1])) != f"sha256:{digest.hexdigest()}"


def test_one_changed_byte_changes_the_hash_and_not_the_fingerprint(own: Path) -> None:
    target = of(own)
    before = hash_contents(target)
    stamp = (own / "1.avi").stat().st_mtime_ns
    with (own / "1.avi").open("r+b") as file:
        file.seek(300)
        byte = file.read(1)
        file.seek(300)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(own / "1.avi", ns=(0, stamp + 1))
    calls = Calls()
    assert hash_contents(target, calls) != before
    assert calls.seen == [(MADE, MADE)]
    assert of(own).fingerprint == target.fingerprint


def test_frames_are_hashed_in_order_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            (folder / name / f"image_{i + 1:05d}.jpg").write_bytes(bytes([i]) * 10)
    target = of(folder)
    before = hash_contents(target)
    first, second = folder / "b" / "image_00001.jpg", folder / "b" / "image_00002.jpg"
    swap = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(swap)
    stamp = second.stat().st_mtime_ns + 1
    os.utime(second, ns=(stamp, stamp))
    assert hash_contents(target) != before


def test_images_are_hashed_too(images: Path) -> None:
    found = {hash_contents(of(images / split / "bear", decoder="")) for split in ("train", "test")}
    assert len(found) == 2
    gone = of(images / "train" / "bear", decoder="")
    gone = replace(gone, paths=Files(images / "nowhere", gone.ids))
    with pytest.raises(MissingData, match="cannot look at"):
        hash_contents(gone)
