"""Finds and sizes up to millions of files: those of a folder, or those that a list names."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.media.images import EXTENSIONS
from sskt.teacher_cache.targets.base import Int64

MISSING, FOLDER = -1, -2
"""Instead of a size: nothing (or a broken link, or no plain file), and a folder."""

CHUNK = 256
THREADS = 16
SLOW_SECONDS = 1e-4
"""Files are looked at one by one (3 us each on a local disk, where threads only get into each
other's way: 0.3 times the speed) until one takes longer than this on average, as over a network:
then ``THREADS`` wait at the same time."""

FOREIGN = frozenset(("@eaDir", "@Recycle", "@Recently-Snapshot", "@tmp", "#recycle", "#snapshot"))
FOREIGN |= {"$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX"}
"""Folders that storage devices, file systems and archives add: thumbnails, wastebaskets."""

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder. Raises ``MissingData`` if that cannot be found out."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise MissingData(f"cannot read {path}: {error.strerror}") from error


def sizes_of(folder: Path, names: Sequence[str]) -> Int64:
    """Bytes of each file (names under ``folder``, or absolute), ``MISSING`` or ``FOLDER``.

    int64 ``[N]``. Raises ``MissingData`` for what may not be looked at.
    """
    sizes = np.empty(len(names), np.int64)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(names), CHUNK)]
    spent = 0.0
    for done, chunk in enumerate(chunks, 1):
        began = time.perf_counter()
        sizes[chunk] = _sizes(folder, names[chunk])
        spent += time.perf_counter() - began
        if spent > SLOW_SECONDS * CHUNK * done:
            break
    else:
        return sizes
    with ThreadPoolExecutor(THREADS) as pool:
        rest = chunks[done:]
        found = pool.map(lambda chunk: _sizes(folder, names[chunk]), rest)
        for chunk, some in zip(rest, found, strict=True):
            sizes[chunk] = some
    return sizes


def sizes_of_files(folder: Path, names: Sequence[str]) -> Int64:
    """Like ``sizes_of``; raises ``MissingData`` for what is no plain file."""
    sizes = sizes_of(folder, names)
    if (sizes < 0).any():
        raise MissingData(f"{folder / names[int(np.argmin(sizes))]} is no file that can be read")
    return sizes


def _sizes(folder: Path, names: Sequence[str]) -> list[int]:
    prefix = f"{folder}/"
    sizes = []
    for name in names:
        try:
            # A Path costs more than the look at the file.
            info = os.stat(name if name.startswith("/") else prefix + name)  # noqa: PTH116
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _ABSENT:
                raise MissingData(f"cannot read {folder / name}: {error.strerror}") from error
            sizes.append(MISSING)
            continue
        if stat.S_ISREG(info.st_mode):
            sizes.append(info.st_size)
        else:
            sizes.append(FOLDER if stat.S_ISDIR(info.st_mode) else MISSING)
    return sizes


def entries(folder: Path | str, left: Counter[str] | None = None) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder, in no order, without hidden ones and those of file systems.

    Args:
        folder: The folder.
        left: Counts the folders of file systems that are left out, such as thumbnails.

    Raises:
        MissingData: If the folder cannot be read, or a link is broken.
    """
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                if entry.name in FOREIGN and entry.is_dir():
                    if left is not None:
                        left[f"{entry.name} folders"] += 1
                    continue
                if entry.is_symlink():
                    _check_link(entry)
                yield entry
    except OSError as error:
        raise MissingData(f"cannot read folder {folder}: {error.strerror}") from error


def _check_link(link: os.DirEntry[str]) -> None:
    try:
        link.stat()
    except OSError as error:
        raise MissingData(
            f"broken link {link.path} ({error.strerror}); remove it, or put in place what it names"
        ) from error


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted by their bytes."""
    return sorted((entry.name for entry in entries(folder) if entry.is_dir()), key=os.fsencode)


def images_and_clips(
    folder: Path, name: str, left: Counter[str] | None = None
) -> tuple[list[str], list[str]]:
    """Finds the images and clips at any depth below a folder.

    A folder of extracted frames is one clip.

    Args:
        folder: Where the ids begin.
        name: The folder in it that is searched.
        left: Counts what is left out, by its ending.

    Returns:
        Ids ``NAME/...`` of the images and of the clips, sorted by their bytes.

    Raises:
        MissingData: If a folder cannot be read or lies in itself, or a link is broken.
    """
    images: list[str] = []
    clips: list[str] = []
    _walk(f"{folder}/", name, (), (images, clips, Counter() if left is None else left))
    return sorted(images, key=os.fsencode), sorted(clips, key=os.fsencode)


_Found = tuple[list[str], list[str], "Counter[str]"]


def _walk(base: str, name: str, above: tuple[tuple[int, int], ...], found: _Found) -> None:
    from sskt.teacher_cache.media.video import is_frame_folder

    try:
        info = Path(base, name).stat()
        frames = bool(above) and is_frame_folder(Path(base, name))
    except OSError as error:
        raise MissingData(f"cannot read folder {base}{name}: {error.strerror}") from error
    here = (info.st_dev, info.st_ino)
    if here in above:
        raise MissingData(f"folder {base}{name} lies in itself, through a link; remove that link")
    if frames:
        found[1].append(name)
        return
    for entry in entries(base + name, found[2]):
        if entry.is_dir():
            _walk(base, f"{name}/{entry.name}", (*above, here), found)
        else:
            sort(entry.name, f"{name}/{entry.name}", found)


def sort(name: str, sample: str, found: _Found) -> None:
    """Adds a file to the images, the clips, or the count of what is left out."""
    from sskt.teacher_cache.media.video import VIDEO_EXTENSIONS

    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path costs more)
    if ending in EXTENSIONS:
        found[0].append(sample)
    elif ending in VIDEO_EXTENSIONS:
        found[1].append(sample)
    elif name.lower() not in ("thumbs.db", "desktop.ini"):
        found[2][ending or "without an ending"] += 1


def sizes_of_clips(folder: Path, names: Sequence[str]) -> Int64:
    """Like ``sizes_of``; a folder of extracted frames counts the bytes of all its files."""
    sizes = sizes_of(folder, names)
    for row in np.flatnonzero(sizes == FOLDER).tolist():
        inside = [entry.name for entry in entries(folder / names[row]) if not entry.is_dir()]
        sizes[row] = sizes_of(folder / names[row], inside).clip(0).sum()
    return sizes


def read_list(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number; outer blanks removed.

    Raises ``MissingData`` for a file that cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if text := line.strip():
                    yield number, text
    except OSError as error:
        raise MissingData(f"cannot read {path}: {error.strerror}") from error


def check_unique(names: Sequence[str], where: object) -> None:
    """Raises ``InputError`` for a name that comes twice: a sample's id must be its own."""
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    if len(np.unique(hashes)) == len(names):
        return
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if seen.setdefault(name, row) != row:
            raise InputError(f"{where} has {name!r} twice; a sample may come once")


def rows_there(
    there: NDArray[np.bool_], names: Sequence[str], where: object, layout: str, partial: bool
) -> Int64:
    """The rows of a list whose files exist.

    Args:
        there: Whether the file of each row exists, ``[N]``.
        names: Names of the files, for the message.
        where: The list, for the message.
        layout: The expected layout, for the message.
        partial: Whether files may be missing.

    Returns:
        The rows, int64.

    Raises:
        MissingData: If files are missing; names their number and the first.
    """
    rows = np.flatnonzero(there)
    if not len(rows):
        raise MissingData(f"none of the {len(names):,} files of {where} exists; expected {layout}")
    if len(rows) < len(names) and not partial:
        raise MissingData(
            f"{len(names) - len(rows):,} of {len(names):,} files of {where} are missing, first "
            f"{names[int(np.argmin(there))]}; get them, or accept what exists with --partial"
        )
    return rows
