"""Small files laid out like the published datasets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sskt.teacher_cache.sources.registry import places365_classes
from sskt.teacher_cache.targets.image_datasets import imagenet_wnids

WNIDS = imagenet_wnids()
SCENES = places365_classes()


def write_image(path: Path, seed: int, height: int | None = None) -> None:
    """A JPEG or PNG of noise, of another size in bytes for (almost) every seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height or 12 + seed % 7, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if path.suffix == ".png" else "JPEG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def write_list(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_imagenet(root: Path, labels: Sequence[int] = (3, 7, 400), each: int = 4) -> None:
    """``{train,val}/WNID/*.JPEG`` for a few of the classes."""
    for split in ("train", "val"):
        for label in labels:
            for i in range(each):
                name = f"{WNIDS[label]}_{i}" if split == "train" else f"val_{label:04d}{i:04d}"
                write_image(root / split / WNIDS[label] / f"{name}.JPEG", 10 * label + i)


def write_places365(root: Path, size: str = "large", each: int = 3) -> None:
    """The first, an outdoor and the last scene; val is in another order than its labels."""
    write_list(
        root / "categories_places365.txt", [f"/{n[0]}/{n} {i}" for i, n in enumerate(SCENES)]
    )
    train = [
        (f"{SCENES[label][0]}/{SCENES[label]}/{i:08d}.jpg", label)
        for label in (0, SCENES.index("apartment_building/outdoor"), 364)
        for i in range(1, each + 1)
    ]
    val = [(f"Places365_val_{i:08d}.jpg", 364 - 7 * i) for i in range(1, 8)]
    write_list(root / "places365_train_standard.txt", [f"/{name} {label}" for name, label in train])
    write_list(root / "places365_val.txt", [f"{name} {label}" for name, label in val])
    for folder, listed in ((f"data_{size}_standard", train), (f"val_{size}", val)):
        for seed, (name, _) in enumerate(listed):
            write_image(root / folder / name, seed)


def annotation(objects: Sequence[tuple[str, int | None]], year: str = "VOC2007") -> str:
    """An annotation with (class, difficult) objects; None: without that element."""
    text = "".join(
        f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Left</pose>\n"
        + ("" if difficult is None else f"\t\t<difficult>{difficult}</difficult>\n")
        + "\t\t<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>\n\t</object>\n"
        for name, difficult in objects
    )
    return f"<annotation>\n\t<folder>{year}</folder>\n{text}</annotation>\n"


VOC_OBJECTS: dict[str, list[tuple[str, int | None]]] = {
    "000005": [("chair", 1), ("chair", 0), ("person", 1)],
    "000007": [("car", 0)],
    "000012": [("tvmonitor", None), ("tvmonitor", 1)],
    "000016": [],
    "000021": [("dog", 1), ("dog", 1), ("aeroplane", 0)],
    "000023": [("sofa", 0), ("cat", 0)],
}


def write_voc(folder: Path, splits: Sequence[str]) -> None:
    """``folder`` is VOC2007 or VOC2012; each split leaves one of the images out."""
    for number, (name, objects) in enumerate(VOC_OBJECTS.items()):
        write_image(folder / "JPEGImages" / f"{name}.jpg", number)
        note = folder / "Annotations" / f"{name}.xml"
        note.parent.mkdir(exist_ok=True)
        note.write_text(annotation(objects, folder.name))
    for number, split in enumerate(splits):
        names = [name for i, name in enumerate(VOC_OBJECTS) if i != number]
        write_list(folder / "ImageSets" / "Main" / f"{split}.txt", names)


def write_frames(folder: Path, seed: int, frames: int = 3) -> None:
    """A clip as extracted frames."""
    for i in range(frames):
        write_image(folder / f"image_{i + 1:05d}.jpg", 100 * seed + i, 12 + seed % 7)


def write_ucf101(root: Path) -> None:
    """Three classes, lists of three folds, clips as extracted frames."""
    classes = ("ApplyLipstick", "Archery", "YoYo")
    write_list(
        root / "ucfTrainTestlist" / "classInd.txt", [f"{i} {n}" for i, n in enumerate(classes, 1)]
    )
    videos = [
        (i, f"{name}/v_{name}_g{g:02d}_c01")
        for i, name in enumerate(classes, 1)
        for g in range(1, 5)
    ]
    for seed, (_, video) in enumerate(videos):
        write_frames(root / "UCF-101" / video, seed, 2 + seed % 3)
    for fold in (1, 2, 3):
        train = [f"{video}.avi {label}" for label, video in videos if f"g0{fold}" not in video]
        test = [f"{video}.avi" for _, video in videos if f"g0{fold}" in video]
        write_list(root / "ucfTrainTestlist" / f"trainlist0{fold}.txt", train)
        write_list(root / "ucfTrainTestlist" / f"testlist0{fold}.txt", test)


def write_hmdb51(root: Path) -> None:
    """51 classes, most of them without a clip; lists of three folds; extracted frames."""
    for label in range(51):
        name = f"act{label:02d}"
        for fold in (1, 2, 3):
            lines = []
            if label < 4:
                sides = {i: 1 if i != fold else 2 for i in range(1, 4)}
                lines = [f"{name}_{i}.avi {side} " for i, side in sides.items()]
            write_list(root / "splits" / f"{name}_test_split{fold}.txt", lines)
        for i in range(1, 4) if label < 4 else ():
            write_frames(root / "videos" / name / f"{name}_{i}", 10 * label + i)
