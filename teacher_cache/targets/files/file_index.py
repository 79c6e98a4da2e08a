"""What is known about a dataset's files, kept on disk: frames that decode, hashes of contents.

Clips are counted once; the next opening only looks at sizes and times of change. One file for
each dataset folder and kind of knowledge lies in ``$SSKT_HOME/index``, else
``$XDG_CACHE_HOME/sskt/index``, else ``~/.cache/sskt/index``. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import stat
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.storage.atomic import durable_rename, durable_write
from sskt.teacher_cache.storage.locks import Locks
from sskt.teacher_cache.storage.regular_files import read_regular
from sskt.teacher_cache.targets.base import Files, Target
from sskt.teacher_cache.targets.files.scan import entries

if TYPE_CHECKING:
    from sskt.teacher_cache.media.video import Counted

Progress = Callable[[int, int], None]

COUNTING = 2  # to be raised where count_frames counts otherwise: what is kept says then nothing
SAVE_SECONDS = 20.0
MOST_WORKERS = 32
BATCH = 4096  # files in work at once: a million futures would take a gigabyte
HASHED_TOGETHER = 32  # a future costs as much as hashing a small image

_log = logging.getLogger("sskt")


def count_clips(target: Target, progress: Progress = lambda done, total: None) -> Target:
    """The target with ``frames`` (int64 ``[N]``) and ``damaged``, which names bad clips.

    Each file is decoded once, on all cores, and remembered by size and time of change.
    progress: called with (files done, files) while there is something to count. Raises
    ``MissingData`` for a file that is gone, cannot be opened, or changes meanwhile.
    """
    with _counting(target.decoder) as count:

        def counted(path: Path) -> str:
            found = count(path)
            return f"{found.frames} {found.header} {found.problem}"

        assert target.paths is not None
        known = known_of_files(
            target.paths, f"frames{COUNTING}-{target.decoder}", counted, progress
        )
    values = [value.split(" ", 2) for value in known]
    damaged = {
        i: _damage(target.paths[i], frames, header, problem)
        for i, (frames, header, problem) in enumerate(values)
        if problem or frames == "0"
    }
    frames = np.array([frames for frames, _, _ in values], np.int64)
    return replace(target, frames=frames, damaged=damaged)


@contextlib.contextmanager
def _counting(decoder: str) -> Iterator[Callable[[Path], Counted]]:
    """What threads may call to count frames."""
    from sskt.teacher_cache.media.decord_worker import Counter
    from sskt.teacher_cache.media.video import count_frames

    if decoder != "decord":  # PyAV needs no process of its own, which takes half a second to start
        yield lambda path: count_frames(path, decoder)
        return
    counters = [Counter(decoder) for _ in range(_workers())]
    idle = list(counters)

    def count(path: Path) -> Counted:
        counter = idle.pop()
        try:
            return counter.count(path)
        finally:
            idle.append(counter)

    try:
        yield count
    finally:
        for counter in counters:
            counter.close()


def hash_contents(target: Target, progress: Progress = lambda done, total: None) -> str:
    """``sha256:...`` over the ordered ids and the SHA-256 of each file's bytes.

    A folder of frames counts as the names and hashes of its files in order. Hashes are
    remembered like counts. Raises ``MissingData`` as ``count_clips`` does.
    """
    digest = hashlib.sha256()
    assert target.paths is not None
    together = 1 if target.clips else HASHED_TOGETHER
    known = known_of_files(target.paths, "sha256", _hashed, progress, together)
    for sample, value in zip(target.ids, known, strict=True):
        digest.update(f"{sample}\0{value}\n".encode("utf-8", "surrogateescape"))
    return f"sha256:{digest.hexdigest()}"


def measure(path: Path | str) -> tuple[int, int]:
    """Bytes and time of change (ns) of a file; of a folder of frames the sum and a number of all.

    Raises ``MissingData`` if it cannot be looked at.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 (a Path takes twice as long as looking)
        if not stat.S_ISDIR(found.st_mode):
            return found.st_size, found.st_mtime_ns
        inside = [file.stat() for file in _inside(path)]
    except OSError as error:
        raise MissingData(f"cannot look at {path}: {error.strerror or error}") from error
    # Not the newest: a frame that is replaced after the clock was set back is older than others.
    times = repr([(file.st_size, file.st_mtime_ns) for file in (found, *inside)]).encode()
    changed = int.from_bytes(hashlib.sha256(times).digest()[:8], "little", signed=True)
    return sum(file.st_size for file in inside), changed


def _inside(folder: Path | str) -> list[os.DirEntry[str]]:
    """The files that ``sizes_of_clips`` counts, in order."""
    files = (entry for entry in entries(folder) if not entry.is_dir())
    return sorted(files, key=lambda entry: os.fsencode(entry.name))


def _hashed(path: Path) -> str:
    if path.is_dir():
        digest = hashlib.sha256()
        for entry in _inside(path):
            line = f"{entry.name}\0{_hashed(Path(entry.path))}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:  # half the time of file_digest on small images
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _damage(path: Path, frames: str, header: str, problem: str) -> str:
    counts = f"{frames} frames decode" + (f" of {header} in its header" if header != "0" else "")
    why = f" ({problem})" if problem else ""
    return (
        f"damaged clip {path}: {counts}{why}; "
        "replace the file, or leave it out with --on-error skip"
    )


# --- every file once ---------------------------------------------------------------------------


def known_of_files(
    paths: Sequence[Path],
    kind: str,
    make: Callable[[Path], str],
    progress: Progress = lambda done, total: None,
    together: int = 1,
) -> list[str]:
    """Computes something of each file once, and remembers it by the file's size and time of change.

    Args:
        paths: The files. Those of ``Files`` are remembered in one file for their folder.
        kind: What is remembered, as part of the name of that file.
        make: Text without NUL of a file.
        progress: Called with the number of files done, and of all.
        together: Files of one task of the threads.

    Returns:
        A text for each file.

    Raises:
        MissingData: If a file cannot be read, or changes meanwhile.
    """
    folder, names = _names(paths)
    index = _Index(_place(folder, kind))
    now = {name: measure(_full(folder, name)) for name in dict.fromkeys(names)}
    todo = [name for name, seen in now.items() if index.entries.get(name, ())[:2] != seen]
    done = len(now) - len(todo)

    def of_several(chunk: Sequence[str]) -> list[str]:
        return [_unchanged(Path(_full(folder, name)), now[name], make) for name in chunk]

    pool = ThreadPoolExecutor(_workers())
    try:
        for batch in _pieces(todo, BATCH):
            chunks = _pieces(batch, together)
            work = {pool.submit(of_several, chunk): chunk for chunk in chunks}
            for future in as_completed(work):
                for name, value in zip(work[future], future.result(), strict=True):
                    index.add(name, (*now[name], value))
                done += len(work[future])
                progress(done, len(now))
    finally:
        # what runs is not waited for: after Ctrl-C one long clip would hold up all the rest
        pool.shutdown(wait=False, cancel_futures=True)
        index.save()
    return [index.entries[name][2] for name in names]


def _workers() -> int:
    return min(MOST_WORKERS, os.cpu_count() or 1)


def _names(paths: Sequence[Path]) -> tuple[Path, list[str]]:
    if isinstance(paths, Files):
        return paths.folder.resolve(), list(paths.names)
    return Path("/"), [str(path.absolute()) for path in paths]


def _full(folder: Path, name: str) -> str:
    return name if name.startswith("/") else f"{folder}/{name}"


def _pieces(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _unchanged(path: Path, seen: tuple[int, int], make: Callable[[Path], str]) -> str:
    """A file that is still being copied must not be remembered as damaged."""
    try:
        value = make(path)
    except OSError as error:
        raise MissingData(f"cannot read {path}: {error.strerror or error}") from error
    if measure(path) != seen:
        raise MissingData(
            f"{path} changed while it was read; wait until it is complete and run this again"
        )
    return value.replace("\0", " ")


# --- the file on disk --------------------------------------------------------------------------


def index_folder() -> Path:
    """Where indices are kept. Raises ``InputError`` where there is no home."""
    return home_folder() / "index"


def home_folder() -> Path:
    """Folder of what is remembered between commands. Raises ``InputError`` if there is no home."""
    if own := os.environ.get("SSKT_HOME"):
        return Path(own)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (cache if cache.is_absolute() else Path.home() / ".cache") / "sskt"
    except RuntimeError as error:
        raise InputError(f"no home folder ({error}); set SSKT_HOME") from error


def _place(folder: Path, kind: str) -> Path | None:
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    try:
        return index_folder() / f"{folder.name[:60] or 'files'}-{digest}.{kind}.npz"
    except InputError as error:
        _warn_unkept(error)
        return None


def _warn_unkept(why: Exception) -> None:
    _log.warning(
        "cannot keep what was found out about the files (%s); they will be read again next time: "
        "set SSKT_HOME to a folder that can be written to",
        why,
    )


Entries = dict[str, tuple[int, int, str]]


class _Index:
    """Entries (bytes, time of change in ns, value) by name, and those not yet on disk."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._new: Entries = {}
        self._saved_at = time.monotonic()
        self.entries = _read(path) if path else {}

    def add(self, name: str, entry: tuple[int, int, str]) -> None:
        """Remembers an entry, on disk at the latest after ``SAVE_SECONDS`` more work."""
        self.entries[name] = self._new[name] = entry
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            started = time.monotonic()
            self.save()
            # a large index on a slow disk must not become the work itself
            self._saved_at = time.monotonic() + 10 * (time.monotonic() - started)

    def save(self) -> None:
        """Joins what is new to what is on disk, where another process may have written."""
        if not self._path or not self._new:
            return
        try:
            with _locked(self._path.with_name("lock")):
                durable_write(self._path, _packed(_read(self._path) | self._new))
            self._new = {}
        except (OSError, InputError) as error:
            _warn_unkept(error)
            self._path = None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    locks = Locks(path)
    try:
        # some network file systems have no locks: the rename still keeps the file whole
        with contextlib.suppress(OSError):
            locks.acquire(0, wait=True)
        yield
    finally:
        locks.close()


def _packed(known: Entries) -> bytes:
    sizes, times, values = zip(*known.values(), strict=True)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=_joined(list(known)),
        sizes=np.array(sizes, np.int64),
        times=np.array(times, np.int64),
        values=_joined(values),
    )
    return buffer.getvalue()


def _read(path: Path) -> Entries:
    """What is on disk; a damaged file is set aside, and everything is found out anew."""
    try:
        data = read_regular(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn_unkept(error)
        return {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"checksum of {damaged}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            columns = (
                _split(arrays["names"]),
                arrays["sizes"].tolist(),
                arrays["times"].tolist(),
                _split(arrays["values"]),
            )
        return {n: (s, t, v) for n, s, t, v in zip(*columns, strict=True)}
    except Exception as error:
        _log.warning("%s is damaged (%s); it is set aside and built anew", path, error)
        with contextlib.suppress(OSError):
            durable_rename(path, path.with_suffix(".damaged"))
        return {}


def _joined(texts: Sequence[str]) -> UInt8:
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _split(texts: UInt8) -> list[str]:
    return texts.tobytes().decode("utf-8", "surrogateescape").split("\0")
