"""Peak memory of caching and of verify, from 1,000 to 200,000 samples.

Each run is a process of its own over a folder of links to real CIFAR-10 JPEGs, with loader
workers; its peak is read from the kernel when it ends. Flat means: what grows is the list of
samples (their ids and sizes), and nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import cifar_folder, report

COUNTS = (1_000, 20_000, 200_000)
NETWORK = Path(__file__).parents[1] / "tests" / "networks" / "tiny.py"


def main() -> None:
    folder = cifar_folder(1000)
    work = Path(tempfile.mkdtemp(prefix="sskt-bench-"))
    rows = []
    for count in COUNTS:
        target = links(folder, work / f"target-{count}", count)
        cache = work / f"cache-{count}"
        source = f"tiny={NETWORK}:build"
        caching = peak("cache-teachers", "--source", source, "--target", target, "--cache", cache,
                       "--policy", "pad-crop-flip", "--seeds", 2, "--workers", 2)  # fmt: skip
        verifying = peak("verify", "--cache", cache)
        rows.append((f"{count:,} samples: cache-teachers, main process", caching, "MiB"))
        rows.append((f"{count:,} samples: verify", verifying, "MiB"))
        shutil.rmtree(cache)
    report("peak resident memory, 2 seeds, 2 loader workers", rows, {"counts": list(COUNTS)})
    shutil.rmtree(work)
    shutil.rmtree(folder.parent)


def links(folder: Path, to: Path, count: int) -> Path:
    """``count`` samples of ten classes, as hard links to the images of ``folder``."""
    images = {c.name: sorted(c.iterdir()) for c in sorted((folder / "train").iterdir())}
    for name, files in images.items():
        (to / "train" / name).mkdir(parents=True)
        for i in range(count // len(images)):
            os.link(files[i % len(files)], to / "train" / name / f"{i:06d}.jpg")
    return to


def peak(*arguments: object) -> float:
    """Peak resident MiB of an ``sskt`` command's main process."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1]) / 1024


PEAK = """
import pathlib, sys
from sskt.cli.main import run
status = run(sys.argv[1:])
print()
# not getrusage: its peak begins with the one of the process that started this one
print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
sys.exit(status)
"""


if __name__ == "__main__":
    main()
