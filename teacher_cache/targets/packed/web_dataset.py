"""WebDataset shards: tar files whose members of one key are a sample (``0001.jpg``, ``0001.cls``).

A shard is scanned once. Then an image is one read at its place in the file, in any order.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData, first_line
from sskt.teacher_cache.media.images import EXTENSIONS
from sskt.teacher_cache.targets.base import Int64
from sskt.teacher_cache.targets.files.file_index import measure
from sskt.teacher_cache.targets.packed.samples import Packed, chosen_columns
from sskt.teacher_cache.targets.packed.shards import names_of, read_shards, shards_of
from sskt.teacher_cache.targets.spec import DatasetSpec

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PICKLES = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz")
"""Members that may hold pickled objects, which can run code when they are read."""
MOST_LABEL_BYTES = 1 << 20

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
_FORMAT = 1  # to be raised where a shard is scanned otherwise

Progress = Callable[[int, int], None]
Members = dict[str, tuple[int, int]]
"""Offset and bytes of each member of a sample, by its extension."""


@dataclass(frozen=True)
class TarImages:
    """The images of tar files by their place. A file is opened for each read."""

    paths: tuple[Path, ...]
    file: Int64
    offset: Int64
    size: Int64

    def read(self, row: int) -> bytes:
        path, size = self.paths[int(self.file[row])], int(self.size[row])
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(int(self.offset[row]))
                data = file.read(size)
        except OSError as error:
            raise MissingData(f"cannot read shard {path}: {error.strerror or error}") from error
        if len(data) != size:
            raise MissingData(f"shard {path} became shorter since it was opened; open it again")
        return data

    def stamp(self, row: int) -> tuple[int, int]:
        return measure(self.paths[int(self.file[row])])

    def where(self, row: int) -> str:
        return f"{self.paths[int(self.file[row])]}, byte {int(self.offset[row])}"


def splits(spec: DatasetSpec) -> list[str]:
    """The splits of a ``wds:`` target."""
    return list(shards_of(spec, ENDINGS))


def load(spec: DatasetSpec, progress: Progress) -> Packed:
    """The samples of a split in the order of the shards and of their members.

    Raises ``MissingData`` and ``InputError`` for shards that cannot be used.
    """
    columns = chosen_columns(spec.columns)
    image, label = columns.get("image", ""), columns.get("label", "")
    if label in PICKLES:
        raise InputError(
            f"--columns label={label}: members .{label} may hold pickled objects, which can run "
            "code, and are not read; write the labels as .cls or .json"
        )
    shards = shards_of(spec, ENDINGS)
    scan = partial(_scan, image=image.lower(), label=label)
    kind = f"tar{_FORMAT}-{image}-{label}".replace("/", "_")
    paths, texts, others = read_shards(spec, shards, kind, scan, progress)
    found = [json.loads(text) for text in texts]

    def joined(key: str) -> list[Any]:
        return [value for each in found for value in each[key]]

    labels = joined("labels")
    counts = [len(each["keys"]) for each in found]
    sizes = np.array(joined("sizes"), np.int64)
    store = TarImages(
        tuple(path.absolute() for path in paths),
        np.repeat(np.arange(len(paths)), counts),
        np.array(joined("offsets"), np.int64),
        sizes,
    )
    rest = (value for text in others for value in json.loads(text)["labels"])
    return Packed(store, joined("keys"), names_of(paths, counts), sizes, labels, [*labels, *rest])


def _scan(path: Path, image: str, label: str) -> str:
    """The samples of a shard as JSON: keys, offsets, sizes and labels."""
    keys, offsets, sizes, labels = [], [], [], []
    with path.open("rb") as file:
        for key, members in _samples(path):
            name = _image_of(path, key, members, image)
            offset, size = members[name]
            keys.append(key)
            offsets.append(offset)
            sizes.append(size)

            def read(place: tuple[int, int], what: str) -> bytes:
                if place[1] > MOST_LABEL_BYTES:
                    raise InputError(f"shard {path}: {what} has {place[1]:,} bytes, too many")
                file.seek(place[0])
                return file.read(place[1])

            labels.append(_label_of(path, key, members, label, read))
    if not keys:
        raise InputError(f"shard {path} has no samples; remove it")
    found = {"keys": keys, "offsets": offsets, "sizes": sizes, "labels": labels}
    return json.dumps(found, ensure_ascii=True, separators=(",", ":"))


def _samples(path: Path) -> Iterator[tuple[str, Members]]:
    """The members of each key. Members of one sample follow one another."""
    key, members = "", Members()
    for info in _members(path):
        name = info.name.removeprefix("./")
        base = name.rpartition("/")[2]
        if info.isdir() or base.startswith((".", "__")):
            continue
        found = _MEMBER.fullmatch(name)
        if found is None:
            continue
        if not info.isreg() or info.issparse():
            raise InputError(
                f"shard {path}: member {name} is a link or no plain file; write it as a file"
            )
        if found[1] != key:
            if members:
                yield key, members
            key, members = found[1], {}
        extension = found[2].lower()
        if extension in members:
            raise InputError(f"shard {path}: {name} comes twice; a key may be of one sample only")
        members[extension] = info.offset_data, info.size
    if members:
        yield key, members


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    with path.open("rb") as file:
        head = file.read(6)
        for start, kind in _COMPRESSED.items():
            if head.startswith(start):
                raise InputError(
                    f"shard {path} is compressed ({kind}), so its samples cannot be read in any "
                    "order; decompress it to a .tar (images hardly get smaller by compression)"
                )
        size = path.stat().st_size
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if info.isreg() and info.offset_data + info.size > size:
                        raise InputError(
                            f"shard {path} is cut: {info.name} ends behind its {size:,} bytes; get "
                            "the file again"
                        )
                    yield info
                    tar.members = []  # type: ignore[attr-defined]  # a shard may have a million
                end = tar.offset
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"shard {path} is no tar file: {first_line(error)}") from error
        # tarfile ends in silence where a header is cut or damaged.
        file.seek(end)
        if file.read(512) != bytes(512):
            raise InputError(
                f"shard {path} is cut or damaged: after its last member there is no end of the "
                "archive; get the file again"
            )


def _image_of(path: Path, key: str, members: Members, wanted: str) -> str:
    found = [name for name in members if (name == wanted if wanted else f".{name}" in EXTENSIONS)]
    if len(found) == 1:
        return found[0]
    if not found:
        what = f"no member .{wanted}" if wanted else "no image"
        raise InputError(
            f"shard {path}: sample {key} has {what}, only {', '.join(sorted(members))}; name the "
            "extension of the images with --columns image=EXTENSION"
        )
    raise InputError(
        f"shard {path}: sample {key} has several images ({', '.join(found)}); name the extension "
        "of one with --columns image=EXTENSION"
    )


def _label_of(
    path: Path,
    key: str,
    members: Members,
    wanted: str,
    read: Callable[[tuple[int, int], str], bytes],
) -> Any:
    """A label: the text of ``.cls`` (or of the member that is wanted), or a field of ``.json``."""
    name = wanted if wanted in members else "cls" if not wanted and "cls" in members else "json"
    if name not in members:
        pickled = sorted(set(members) & set(PICKLES))
        if pickled and not wanted:
            raise InputError(
                f"shard {path}: sample {key} has no .cls or .json, and its member .{pickled[0]} "
                "may hold a pickled object, which can run code and is not read; write the labels "
                "as .cls or .json"
            )
        return None
    what = f"member {key}.{name}"
    content = read(members[name], what)
    try:
        if name != "json":
            text = content.decode().strip()
            return int(text) if re.fullmatch(r"-?\d+", text, re.ASCII) else text
        value = json.loads(content)
    except ValueError as error:
        raise InputError(f"shard {path}: {what} cannot be read: {first_line(error)}") from error
    return value.get(wanted or "label") if isinstance(value, dict) else value
