"""A machine with few open files and little shared memory, as containers are, changes no number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.helpers import TINY
from support.servers import without_times

FILES, SHARED, SEEDS = 256, "1m", 40
LIMITED = """
import resource, sys
files = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
from sskt.cli.main import main
sys.argv = ["sskt", *sys.argv[2:]]
main()
"""
NETWORK = """
from torch import nn

def build(classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, classes),
    )
"""
SMALL = f'mount -t tmpfs -o size={SHARED} tmpfs /dev/shm && exec "$@"'
OWN_MOUNTS = ["unshare", "--mount", "--map-root-user", "sh", "-c", SMALL, "sh"]


def sskt(*arguments: object, before: tuple[str, ...] = (), files: int = 4096) -> None:
    command = [*before, sys.executable, "-c", LIMITED, files, *arguments]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_forty_seeds_with_few_open_files_and_little_shared_memory(tmp_path: Path) -> None:
    """Labels and a training, through loader processes: a batch does not fit the shared memory."""
    if subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode:
        pytest.skip("a mount of its own is not allowed here")
    rng = np.random.default_rng(0)
    for split, each in (("train", 12), ("test", 3)):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(each):  # of several sizes, so that they are read from files
                pixels = rng.integers(0, 256, (230 + i, 240, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    (tmp_path / "net.py").write_text(NETWORK)
    policy = ("--target", tmp_path / "images", "--policy", "random-resized-crop-flip:size=224")
    labelling = ("--source", f"tiny={TINY}:build", "--seeds", SEEDS, "--shard-rows", 8)
    network = ("--source", "tiny", "--model", f"{tmp_path}/net.py:build", "--batch-size", 12)
    length = ("--epochs", SEEDS, "--eval-every", SEEDS // 2, "--save-minutes", 0)
    for name, limits in (
        ("free", {}),
        ("small", {"before": tuple(OWN_MOUNTS), "files": FILES}),
    ):
        workers = 2 if limits else 0
        fixed = (*policy, "--workers", workers, "--device", "cpu", "--cache", tmp_path / name)
        sskt("cache-teachers", *fixed, *labelling, **limits)  # type: ignore[arg-type]
        sskt("train", *fixed, *network, *length, "--out", tmp_path / f"{name}-run", **limits)  # type: ignore[arg-type]
    found = without_times(tmp_path / "small-run")
    assert len(found) == SEEDS and found == without_times(tmp_path / "free-run")
