"""The arguments that open a dataset, as one object."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import MissingData, UnknownName, first_line
from sskt.teacher_cache.locations import data_location
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.registry import (
    FOLDER_LAYOUT,
    TARGETS,
    is_function,
    is_manifest,
    is_own,
    is_packed,
)

_RECORDED_IF_SET = ("partial", "strict", "columns", "label_separator", "allow_outside_root")

SPLIT_NAMES = {
    "train": ("train", "training", "seg_train"),
    "val": ("val", "valid", "validation", "seg_val"),
    "test": ("test", "testing", "seg_test"),
}
"""Names of a split in folders and manifests, in any case."""


def named_like(split: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are the name of a split: in another case, or another usual name."""
    split = split.casefold()
    known = next((known for known in SPLIT_NAMES.values() if split in known), (split,))
    return [name for name in names if name.casefold() in known]


@dataclass(frozen=True)
class DatasetSpec:
    """One split of a dataset, as a command line names it.

    Attributes:
        target: A known target, a folder of class folders, a CSV or Parquet manifest, or packed
            files: ``hf:NAME_OR_PATH[:CONFIGURATION]``, ``wds:PATH``, ``parquet:PATH``.
        split: Name of the split.
        root: Folder of the data of a known target or a manifest; default: ``$SSKT_DATA``, else
            ``data``, or the folder of the manifest.
        limit: Use only this many samples, all classes alike.
        download: Whether torchvision may download a known target.
        partial: Whether an official list may name files that are missing.
        decoder: Decoder of clips: ``pyav`` or ``decord``.
        strict: Whether the identity covers the contents of files, not only names and sizes.
        columns: Manifests and packed files only: names of the columns that have another name,
            such as ``path=file,label=tag``, or ``image=img,label=fine_label``.
        label_separator: Manifests only: what separates several labels of a sample; ``none`` if a
            label is always one name. Default: ``|`` in a column ``labels``.
        allow_outside_root: Manifests only: whether files may lie outside the folder of the data.
    """

    target: str
    split: str = "train"
    root: str | Path | None = None
    limit: int | None = None
    download: bool = False
    partial: bool = False
    decoder: str = "pyav"
    strict: bool = False
    columns: str = ""
    label_separator: str = ""
    allow_outside_root: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the data."""
        if not is_own(self.target):
            return Path(data_location(self.target, self.root).value)
        own = Path(self.target)
        if not is_manifest(self.target):
            return own
        return own.parent if self.root is None else Path(self.root)

    @property
    def layout(self) -> str:
        """The layout that a known target expects in its folder, and how to get the files."""
        info = TARGETS[self.target]
        return f"{info.layout}; {info.get}"

    def lacking_data(self) -> str:
        """Looks for a few files of a known target.

        Returns:
            Why it cannot be opened: the problem, its cause and the next step; empty if no problem
            was found, and for folders and manifests of the user.

        Raises:
            UnknownName: If the target is not known.
        """
        name = self.target
        if is_function(name):
            file = Path(name.rpartition(":")[0])
            return "" if file.is_file() else f"no file {file}, which --target names"
        if is_own(name):
            return ""
        if name not in TARGETS:
            hint = f"or the path of a folder laid out as {FOLDER_LAYOUT}, or of a .csv or .parquet"
            raise UnknownName("target", name, TARGETS, hint)
        info, found = TARGETS[name], data_location(name, self.root)
        if not info.markers or (self.download and info.downloads):
            return ""
        if any(next(Path(found.value).glob(marker), None) for marker in info.markers):
            return ""
        own = f"; for your own folder of that name write ./{name}" if Path(name).is_dir() else ""
        return (
            f"no data of {name} in {found}: expected {self.layout}, or give its folder "
            f"with --root{own}"
        )

    def not_found(self, what: str) -> MissingData:
        """The error of a known target without the file or folder that ``what`` names."""
        return MissingData(
            f"{self.target} {self.split} not found under {self.folder} ({what}); "
            f"expected {self.layout}"
        )

    def absolute(self) -> DatasetSpec:
        """The same dataset, whatever the working folder is."""
        target, root = self.target, self.root
        if is_packed(target):
            kind, _, rest = target.partition(":")
            if kind != "hf" or Path(rest).exists():  # else a dataset of the hub
                target = f"{kind}:{Path(rest).absolute()}"
        elif is_own(target):
            path = Path(target)
            # A manifest gives the target its name and its folder, so a link to it is kept.
            target = str(
                path.parent.resolve() / path.name if is_manifest(target) else path.resolve()
            )
        elif root is None and target in TARGETS and TARGETS[target].markers:
            root = self.folder
        return replace(
            self, target=target, root=None if root is None else str(Path(root).resolve())
        )

    def provenance(self) -> dict[str, Any]:
        """What a label set records in order to open the dataset again."""
        full = self.absolute()
        more = {key: value for key in _RECORDED_IF_SET if (value := getattr(self, key))}
        return {"target": full.target, "root": full.root, "limit": full.limit, **more}


def or_downloaded(
    spec: DatasetSpec,
    load: Callable[[DatasetSpec], Target],
    download: Callable[[DatasetSpec], None],
) -> Target:
    """Loads a target, after a download if its files are missing and ``spec.download`` is set."""
    try:
        return load(spec)
    except MissingData:
        if not spec.download:
            raise
    try:
        download(spec)
    except (RuntimeError, OSError, EOFError, tarfile.TarError, zlib.error) as error:
        what = first_line(error)
        raise spec.not_found(f"cannot download it: {what}") from error
    return load(spec)
