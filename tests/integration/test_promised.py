"""The commands that the README promises, exactly as typed, with data where they look for it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.models import resnet50

from sskt.cli.training.training_output import EpochLines
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.media.images import read_image
from sskt.teacher_cache.sources import known_networks
from sskt.trainer.config import read_config

Sskt = Callable[..., tuple[int, str, str]]
CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def write_stl10(folder: Path, data: Path) -> None:
    """STL10's binary files with the ten real images whose classes are known, in both splits."""
    files = sorted((data / "stl10/labeled_examples").glob("original_*_*.png"))
    images = np.stack([read_image(file) for file in files])
    labels = [CLASSES.index(file.name.split("_")[1]) + 1 for file in files]
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        images.transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")
        np.array(labels, np.uint8).tofile(folder / f"{split}_y.bin")
    images.transpose(0, 3, 2, 1).tofile(folder / "unlabeled_X.bin")
    (folder / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "fold_indices.txt").write_text("0 1 2\n" * 10)


def write_ucf101(root: Path, data: Path) -> None:
    """Three real clips with lists that name them alone."""
    clips = sorted((data / "ucf101/UCF-101").glob("*/*.avi"), key=lambda p: p.stat().st_size)[:3]
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    names = []
    for clip in clips:
        name = clip.relative_to(data / "ucf101/UCF-101")
        (root / "UCF-101" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, root / "UCF-101" / name)
        names.append(name)
    classes = sorted({name.parts[0] for name in names})
    (lists / "classInd.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(classes, 1)))
    train = "".join(f"{name} {classes.index(name.parts[0]) + 1}\n" for name in names)
    (lists / "trainlist01.txt").write_text(train)
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def lab(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``data``, and a Places365 checkpoint where its download would be."""
    write_stl10(tmp_path / "data/stl10_binary", data)
    write_ucf101(tmp_path / "data/ucf101", data)
    hub = tmp_path / "hub"
    checkpoint = hub / "checkpoints/resnet50_places365.pth.tar"
    checkpoint.parent.mkdir(parents=True)
    torch.manual_seed(0)
    state = {f"module.{key}": v for key, v in resnet50(num_classes=365).state_dict().items()}
    torch.save({"arch": "resnet50", "state_dict": state}, checkpoint)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    monkeypatch.setitem(known_networks.CSAIL_SHA256, "resnet50", digest)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    for split in ("train_list", "test_list"):
        unchecked = [(name, None) for name, _ in getattr(datasets.STL10, split)]
        monkeypatch.setattr(datasets.STL10, split, unchecked)
    for name in ("SSKT_DATA", "SSKT_CACHE", "SSKT_LABELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_promised_commands(lab: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = sskt(*["cache-teachers", "--source", "places365", "--target", "ucf101"])
    assert status == 0, err
    assert "data: data/ucf101 (default)" in err and "labels: labels (default)" in err
    assert "\n30 labels written" in out  # 3 clips x 10 view seeds
    status, _, err = sskt(*["cache-teachers", "--source", "places365", "--target", "stl10"])
    assert status == 0, err
    assert "data: data (default)" in err

    seen: list[Any] = []
    print_line = EpochLines.__call__

    def two_epochs(lines: EpochLines, record: dict[str, Any]) -> None:
        print_line(lines, record)
        seen.append(record)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(EpochLines, "__call__", two_epochs)
    status, _, err = sskt(*["train", "--target", "stl10", "--tm"])
    assert status == 130, err
    first, legend, epoch = err.splitlines()[:3]
    assert first.startswith(
        "stl10 train: 10 samples under pad-crop-flip:padding=4; resnet20 (default for such views) "
        "with transfer modules, from the labels of places365 (resnet50, f16, 10 seeds) in labels "
        "(default); data: data (default)"
    )
    assert legend.startswith("loss = primary + ") and "x (places365)" in legend
    assert epoch.startswith("epoch   1/200  loss ") and "/epoch, ends " in epoch
    assert "--resume --out runs/stl10-resnet20-places365-tm-0 continues" in err
    (found,) = (s for s in list_label_sets(lab / "labels") if s.name.startswith("stl10"))
    kept = read_config(lab / "runs/stl10-resnet20-places365-tm-0/config.json")
    assert kept["source"] == [f"places365#{found.digest[:12]}"]
    assert (kept["policy"], kept["model"]) == ("pad-crop-flip:padding=4", "resnet20")


PROMISED = {
    "cache-teachers --source places365 --target ucf101": ("no data of ucf101 in data (default)",),
    "train --target stl10 --tm": (
        "2 things are missing: (1) no data of stl10 in data (default)",
        "add --download to get it",
        "(2) no label sets in labels (default); make them with: sskt cache-teachers "
        "--source imagenet --source places365 --target stl10 --download\n",
    ),
    "train --target stl10": ("no data of stl10 in data (default)", "add --download to get it"),
    "train --target ucf101 --alpha 0.5": ("2 things are missing: (1) no data of ucf101",),
    "ls": ("the cache folder labels does not exist",),
    "verify": ("the cache folder labels does not exist",),
}


@pytest.mark.parametrize("command", PROMISED)
def test_in_an_empty_folder_all_that_is_missing_is_said_at_once(
    tmp_path: Path, command: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SSKT_")}
    code = "from sskt.cli.main import main; import sys; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *command.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    imported = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout, len(said)) == (2, "", 1), done.stderr[-2000:]
    for part in PROMISED[command]:
        assert part in f"{said[0]}\n"
    assert not any(line.endswith((" torch", " torchvision")) for line in imported)
    assert not list(tmp_path.iterdir())


def test_variables_name_data_and_labels(
    lab: Path, images: Path, label_cache: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSKT_CACHE", str(label_cache))
    status, _, err = sskt("ls")
    assert status == 0 and f"labels: {label_cache} ($SSKT_CACHE)" in err
    monkeypatch.setenv("SSKT_DATA", str(lab / "data"))
    monkeypatch.chdir("/")
    status, _, err = sskt("train", "--target", "ucf101", "--epochs", "1", "--dry-run")
    assert status == 0, err
    monkeypatch.setenv("SSKT_LABELS", "http://127.0.0.1:1")
    status, _, err = sskt("ls")
    assert status == 2 and "$SSKT_CACHE and $SSKT_LABELS are both set" in err


def train(sskt: Sskt, images: Path, cache: Path, *more: object) -> tuple[int, str, str]:
    return sskt("train", "--target", images, "--cache", cache, "--dry-run", "--json", *more)


def test_policy_and_limit_follow_the_one_label_set_that_fits(
    images: Path, tmp_path: Path, sskt: Sskt, tiny_source: str
) -> None:
    cache = tmp_path / "labels"
    label = ["cache-teachers", "--source", tiny_source, "--target", images, "--cache", cache]
    status, _, err = sskt(*label, "--policy", "pad-crop-flip:padding=2", "--limit", 30)
    assert status == 0, err
    status, out, err = train(sskt, images, cache)
    assert status == 0, err
    assert '"policy": "pad-crop-flip:padding=2"' in out and '"limit": 30' in out
    status, _, err = train(sskt, images, cache, "--policy", "none", "--limit", 31)
    assert status == 2
    assert (
        "was made with --limit 30 --policy pad-crop-flip:padding=2, but --limit 31 --policy none "
        "was given"
    ) in err

    # Of two, neither of which is what the target has by default, none is guessed.
    assert sskt(*label, "--policy", "none")[0] == 0
    status, _, err = train(sskt, images, cache)
    assert status == 2 and "choose with --policy none (" in err
    assert "or --policy pad-crop-flip:padding=2 --limit 30 (" in err
    assert train(sskt, images, cache, "--limit", 30)[0] == 0
    assert train(sskt, images, cache, "--policy", "none")[0] == 0

    # The target's own policy over all samples is taken before others.
    assert sskt(*label, "--policy", "random-resized-crop-flip")[0] == 0
    status, out, err = train(sskt, images, cache)
    assert status == 0 and '"limit": null' in out
    assert "random-resized-crop-flip:version=2,size=224" in out


@pytest.fixture
def tiny_source() -> str:
    return f"tiny={Path(__file__).parents[1] / 'networks/tiny.py'}:build"
