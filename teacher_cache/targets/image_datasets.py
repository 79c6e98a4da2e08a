"""Known targets of image files: ImageNet-1k and Places365."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sskt.teacher_cache.errors import InputError, MissingData, described
from sskt.teacher_cache.media.images import EXTENSIONS
from sskt.teacher_cache.targets.base import Files, Int64, Names, Target
from sskt.teacher_cache.targets.files.scan import (
    check_unique,
    entries,
    images_and_clips,
    is_folder,
    read_list,
    rows_there,
    sizes_of,
    sizes_of_files,
    subfolders,
)
from sskt.teacher_cache.targets.spec import DatasetSpec, or_downloaded

IMAGENET_FILES = {"train": 1_281_167, "val": 50_000}
KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")
DEVKIT = Path("ILSVRC2012_devkit_t12", "data")


# --- ImageNet ---------------------------------------------------------------------------------


def imagenet(spec: DatasetSpec) -> Target:
    """ILSVRC2012: labels are the positions 0 ... 999 in the byte order of the WordNet ids.

    ``SPLIT/WNID/*.JPEG``, or a flat ``val/*.JPEG`` with the devkit's ground truth or Kaggle's
    ``LOC_val_solution.csv``; also within Kaggle's ``ILSVRC/Data/CLS-LOC/``. Ids are relative to
    the split's folder. Order: class by class, files in byte order of their names; a flat folder
    in that of the images' names. Raises ``MissingData`` unless every image of the split is
    there (or ``spec.partial``), ``InputError`` for what does not belong to it.
    """
    from sskt.teacher_cache.sources.registry import imagenet_classes

    root = spec.folder
    places = root / spec.split, root / KAGGLE / spec.split
    base = next((place for place in places if is_folder(place)), None)
    if base is None:
        raise spec.not_found(f"no folder {places[0]} and no folder {places[1]}")
    wnids = imagenet_wnids()
    folders = subfolders(base)
    unknown = sorted(set(folders) - set(wnids))
    if unknown:
        raise InputError(
            f"{base / unknown[0]} is no class of ImageNet-1k (its folders are WordNet ids such as "
            f"{wnids[0]}); remove it, or use the data as a folder of your own: --target DIR"
        )
    loose = sorted(e.name for e in entries(base) if e.name.lower().endswith(tuple(EXTENSIONS)))
    if folders and loose:
        raise InputError(
            f"{base} holds class folders and a loose image ({loose[0]}); expected only one kind"
        )
    names, labels = (
        _flat_val(spec, root, base, loose)
        if loose and spec.split == "val"
        else _class_folders(spec, base, folders)
    )
    sizes = sizes_of_files(base, names)
    files = Files(base, names)
    return Target(
        spec.target, spec.split, imagenet_classes(), labels, names, paths=files, sizes=sizes
    )


def imagenet_wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in label order."""
    text = importlib.resources.files("sskt.teacher_cache.targets").joinpath("imagenet_classes.txt")
    return tuple(x for x in text.read_text("utf-8").splitlines() if not x.startswith("#"))


def _class_folders(spec: DatasetSpec, base: Path, folders: list[str]) -> tuple[Names, Int64]:
    wnids = imagenet_wnids()
    there = set(folders)
    counts = np.zeros(len(wnids), np.int64)

    def ids() -> Iterator[str]:
        for label, wnid in enumerate(wnids):
            images = images_and_clips(base, wnid)[0] if wnid in there else []
            counts[label] = len(images)
            yield from images

    names = Names(ids())
    lacking = np.flatnonzero(counts == 0)
    if not len(names):
        raise spec.not_found(f"{base} holds no WNID/*.JPEG")
    if len(lacking) and not spec.partial:
        raise MissingData(
            f"{len(lacking):,} of the {len(wnids):,} class folders of {base} are missing or empty, "
            f"first {wnids[int(lacking[0])]}; get them, or accept what exists with --partial"
        )
    expected = IMAGENET_FILES[spec.split]
    if len(names) != expected and not spec.partial:
        raise MissingData(
            f"{base} holds {len(names):,} images, expected {expected:,}; get the official split, "
            "or accept what exists with --partial"
        )
    return names, np.repeat(np.arange(len(wnids), dtype=np.int64), counts)


def _flat_val(spec: DatasetSpec, root: Path, base: Path, found: list[str]) -> tuple[Names, Int64]:
    solution, devkit = root / "LOC_val_solution.csv", root / DEVKIT
    if solution.exists():
        source, truth = solution, _kaggle_truth(solution)
    elif is_folder(devkit):
        source, truth = devkit, _devkit_truth(devkit)
    else:
        raise spec.not_found(
            f"{base} has no class folders; the labels would be in {devkit} or {solution}"
        )
    files = {name.rpartition(".")[0]: name for name in found}
    stray = sorted(set(files) - set(truth))
    if stray:
        raise InputError(f"{base / files[stray[0]]} is not one of the {len(truth):,} of {source}")
    order = sorted(truth)
    there = np.array([name in files for name in order])
    rows = rows_there(there, order, source, spec.layout, spec.partial)
    kept = [order[row] for row in rows.tolist()]
    label = {wnid: i for i, wnid in enumerate(imagenet_wnids())}
    labels = np.array([label[truth[name]] for name in kept], np.int64)
    return Names(files[name] for name in kept), labels


def _kaggle_truth(path: Path) -> dict[str, str]:
    """Image to WordNet id, from rows ``ImageId,WNID x1 y1 x2 y2 ...`` below a header."""
    known = set(imagenet_wnids())
    truth = {}
    for number, line in read_list(path):
        name, _, boxes = line.partition(",")
        wnid = boxes.split(" ")[0]
        if wnid in known:
            truth[name] = wnid
        elif number > 1:
            raise InputError(f"{path}, line {number}: expected IMAGE,WNID ..., found {line!r}")
    return truth


def _devkit_truth(devkit: Path) -> dict[str, str]:
    """Image to WordNet id: line n of the ground truth is image n."""
    wnids = _ilsvrc_ids(devkit / "meta.mat")
    path = devkit / "ILSVRC2012_validation_ground_truth.txt"
    truth = {}
    for number, line in read_list(path):
        if line not in wnids:
            raise InputError(f"{path}, line {number}: expected 1 to 1000, found {line!r}")
        truth[f"ILSVRC2012_val_{number:08d}"] = wnids[line]
    return truth


def _ilsvrc_ids(path: Path) -> dict[str, str]:
    """ILSVRC2012's own ids, "1" to "1000", to WordNet ids: the synsets without children."""
    if not path.exists():
        raise MissingData(f"no file {path}; unpack the whole of ILSVRC2012_devkit_t12.tar.gz")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingData("ImageNet's devkit needs: pip install 'sskt[imagenet]'") from error
    try:
        synsets = np.atleast_1d(loadmat(str(path), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"] == 0]
        found = {str(int(leaf["ILSVRC2012_ID"])): str(leaf["WNID"]) for leaf in leaves}
    except Exception as error:  # a damaged file makes scipy raise a dozen kinds
        what = described(error)
        raise InputError(f"cannot read {path} ({what}); unpack the devkit again") from error
    if set(found) != {str(i) for i in range(1, 1001)} or {*found.values()} != {*imagenet_wnids()}:
        raise InputError(
            f"{path}: expected the 1,000 classes of ILSVRC2012 as its synsets without children, "
            f"found {len(found):,} others; take ILSVRC2012_devkit_t12.tar.gz"
        )
    return found


# --- Places365 --------------------------------------------------------------------------------


def places365(spec: DatasetSpec) -> Target:
    """Places365-Standard, full size or (``places365-small``) 256x256, by CSAIL's lists.

    Order and ids are those of the list (``a/airfield/00000001.jpg``). Raises ``MissingData``
    for a list or folder that is not there, and for listed images (unless ``spec.partial``);
    ``InputError`` for a malformed list.
    """
    return or_downloaded(spec, _places365, _download_places365)


def _places365(spec: DatasetSpec) -> Target:
    from sskt.teacher_cache.sources.registry import places365_classes

    root = spec.folder
    size = "256" if spec.target == "places365-small" else "large"
    train = spec.split == "train"
    path = root / f"places365_{'train_standard' if train else 'val'}.txt"
    # CSAIL's archives unpack to data_SIZE, which torchvision renames.
    folders = (f"data_{size}_standard", f"data_{size}") if train else (f"val_{size}",)
    base = next((root / name for name in folders if is_folder(root / name)), None)
    if base is None or not path.exists():
        folder = f"no folder {folders[0]}" if base is None else f"found {base.name}"
        listed = f"found {path.name}" if path.exists() else f"no {path.name}"
        raise spec.not_found(f"{listed}, {folder}")
    classes = places365_classes()
    categories = root / "categories_places365.txt"
    if categories.exists():  # it tells nothing new, but may show that the list is another's
        _check_categories(categories, classes)
    labels: list[int] = []
    names = Names(_listed(path, len(classes), labels))
    check_unique(names, path)
    sizes = sizes_of(base, names)
    rows = rows_there(sizes >= 0, names, path, spec.layout, spec.partial)
    files = Files(base, names)
    known = np.array(labels, np.int64)
    whole = Target(spec.target, spec.split, classes, known, names, paths=files, sizes=sizes)
    return whole if len(rows) == len(whole) else whole.chosen(rows)


def _listed(path: Path, classes: int, labels: list[int]) -> Iterator[str]:
    """Names of lines ``/a/airfield/00000001.jpg 0``; their labels are appended to ``labels``."""
    known = {str(i): i for i in range(classes)}
    for number, line in read_list(path):
        name, label = [*line.rsplit(None, 1), ""][:2]
        if label not in known:
            wanted = f"expected an image and a class from 0 to {classes - 1}"
            raise InputError(f"{path}, line {number}: {wanted}, found {line!r}")
        labels.append(known[label])
        yield name.lstrip("/")


def _check_categories(path: Path, classes: tuple[str, ...]) -> None:
    """Raises ``InputError`` if the file numbers the scenes otherwise than the networks do."""
    expected = [f"/{name[0]}/{name} {i}" for i, name in enumerate(classes)]
    for (number, line), wanted in zip(read_list(path), expected, strict=False):
        if line != wanted:
            raise InputError(
                f"{path}, line {number}: expected {wanted!r}, found {line!r}; take CSAIL's own file"
            )


def _download_places365(spec: DatasetSpec) -> None:
    from torchvision import datasets

    split = "train-standard" if spec.split == "train" else "val"
    small = spec.target == "places365-small"
    datasets.Places365(str(spec.folder), split=split, small=small, download=True)
