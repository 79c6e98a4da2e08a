"""Makes the golden store that test_format.py reads forever. Refuses to overwrite what it has.

python tests/support/make_golden.py in the checkout's root, once for each encoding; never again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from sskt.cli.main import run
from sskt.teacher_cache.format.encodings import encoding_of
from support.helpers import write_images

GOLDEN = Path(__file__).parents[1] / "golden"
PAD = "pad-crop-flip:padding=2"
RESIZED = "random-resized-crop-flip:size=12"
SETS = (
    ("f32", PAD),
    ("f16", RESIZED),
    ("u8", PAD),
    ("topk-3", RESIZED),
    ("root4", RESIZED),
    ("root4-coarse", PAD),
)


def sets() -> dict[str, Path]:
    """The golden label sets by encoding."""
    found = {}
    for document in sorted(GOLDEN.glob("cache/*/zarr.json")):
        spec = json.loads(document.read_text())["attributes"]["sskt"]["spec"]
        found[str(encoding_of(spec["encoding"]))] = document.parent
    return found


def main() -> int:
    missing = [(encoding, policy) for encoding, policy in SETS if encoding not in sets()]
    if not missing:
        print(f"{GOLDEN} exists: a golden store is never made again", file=sys.stderr)
        return 1
    if not GOLDEN.exists():
        rng = np.random.default_rng(7)
        for name in ("ant", "bee"):
            images = rng.integers(0, 256, (3, 10, 14, 3), np.uint8)
            write_images(GOLDEN / "images" / "train" / name, images)
        (GOLDEN / "images" / "train" / "ant" / "0003.png").write_bytes(b"no image")
    for encoding, policy in missing:
        command = (
            "cache-teachers --source tiny=tests/networks/tiny.py:build "
            "--target tests/golden/images --cache tests/golden/cache --seeds 2 --shard-rows 4 "
            f"--encoding {encoding} --policy {policy} --workers 0 --on-error skip --device cpu"
        )
        status = run(command.split())
        if status:
            return status
    here = f"{Path.cwd()}/".encode()  # the provenance has full paths
    for document in GOLDEN.glob("cache/*/zarr.json"):
        if here in (content := document.read_bytes()):
            document.write_bytes(content.replace(here, b""))
    shutil.rmtree(GOLDEN / "cache" / ".locks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
