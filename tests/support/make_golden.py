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
from sskt.teacher_cache.format.features import output_text
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
FEATURE_SETS = (
    ("features", "f16", RESIZED),
    ("features", "u8", PAD),
    ("features:6", "u8", RESIZED),
    ("logits", "f16", PAD),
)
"""Output, encoding and policy of the sets in ``features``, a cache of its own."""


def feature_sets() -> dict[tuple[str, str], Path]:
    """The golden sets of features and logits by output and encoding."""
    found = {}
    for document in sorted(GOLDEN.glob("features/*/zarr.json")):
        spec = json.loads(document.read_text())["attributes"]["sskt"]["spec"]
        encoding = spec["encoding"]["name"].removeprefix("features-")
        found[output_text(spec), encoding] = document.parent
    return found


def sets() -> dict[str, Path]:
    """The golden label sets of soft labels by encoding."""
    found = {}
    for document in sorted(GOLDEN.glob("cache/*/zarr.json")):
        spec = json.loads(document.read_text())["attributes"]["sskt"]["spec"]
        found[str(encoding_of(spec["encoding"]))] = document.parent
    return found


def main() -> int:
    missing = [("soft-labels", *one) for one in SETS if one[0] not in sets()]
    missing += [one for one in FEATURE_SETS if one[:2] not in feature_sets()]
    if not missing:
        print(f"{GOLDEN} exists: a golden store is never made again", file=sys.stderr)
        return 1
    if not GOLDEN.exists():
        rng = np.random.default_rng(7)
        for name in ("ant", "bee"):
            images = rng.integers(0, 256, (3, 10, 14, 3), np.uint8)
            write_images(GOLDEN / "images" / "train" / name, images)
        (GOLDEN / "images" / "train" / "ant" / "0003.png").write_bytes(b"no image")
    for output, encoding, policy in missing:
        cache = "cache" if output == "soft-labels" else "features"
        command = (
            "cache-teachers --source tiny=tests/networks/tiny.py:build "
            f"--target tests/golden/images --cache tests/golden/{cache} --seeds 2 --shard-rows 4 "
            f"--output {output} --encoding {encoding} --policy {policy} --workers 0 "
            "--on-error skip --device cpu"
        )
        status = run(command.split())
        if status:
            return status
    here = f"{Path.cwd()}/".encode()  # the provenance has full paths
    for document in GOLDEN.glob("*/*/zarr.json"):
        if here in (content := document.read_bytes()):
            document.write_bytes(content.replace(here, b""))
    for locks in GOLDEN.glob("*/.locks"):
        shutil.rmtree(locks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
