"""Makes the golden store that test_format.py reads forever. Refuses to overwrite it.

python tests/support/make_golden.py in the checkout's root, once; never again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

from sskt.cli.main import run
from support.helpers import write_images

GOLDEN = Path(__file__).parents[1] / "golden"
PAD = "pad-crop-flip:padding=2"
RESIZED = "random-resized-crop-flip:size=12"
SETS = (("f32", PAD), ("f16", RESIZED), ("u8", PAD), ("topk-3", RESIZED))


def main() -> int:
    if GOLDEN.exists():
        print(f"{GOLDEN} exists: a golden store is never made again", file=sys.stderr)
        return 1
    rng = np.random.default_rng(7)
    for name in ("ant", "bee"):
        images = rng.integers(0, 256, (3, 10, 14, 3), np.uint8)
        write_images(GOLDEN / "images" / "train" / name, images)
    (GOLDEN / "images" / "train" / "ant" / "0003.png").write_bytes(b"no image")
    for encoding, policy in SETS:
        command = (
            "cache-teachers --source tiny=tests/networks/tiny.py:build "
            "--target tests/golden/images --cache tests/golden/cache --seeds 2 --shard-rows 4 "
            f"--encoding {encoding} --policy {policy} --workers 0 --on-error skip --device cpu"
        )
        status = run(command.split())
        if status:
            return status
    shutil.rmtree(GOLDEN / "cache" / ".locks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
