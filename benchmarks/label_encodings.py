"""What each encoding of soft labels takes and loses, on labels of real images.

    python benchmarks/label_encodings.py [--rows 2048] [--json FILE]

Sources: EfficientNet-Lite0 (ImageNet, 1,000 classes) and a SqueezeNet (Places365, 365 classes) on
views of MiniPlaces. Prints, for each encoding, bytes of a label as they are stored, the relative
error of the gradient of the soft-label loss at several temperatures, and the time to write and to
read labels. Every encoding is timed in turn, several times, and its time is given beside that of
``f16`` of the same turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Blosc
from numpy.typing import NDArray

from sskt.benchmarks.common import PLACES, Row, data_folder, in_a_run, machine, paired_ratio, report
from sskt.teacher_cache.format.encodings import (
    Encoding,
    as_tensors,
    measured_error,
    parse_encoding,
    soft_labels,
)
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

NAMES = ("f32", "f16", "root4", "u8", "root4-coarse", "topk-100", "topk-10")
TEMPERATURES = (1, 2, 3, 4, 6)
CHUNK, TURNS = 512, 7


def log_probabilities(source: str, rows: int) -> NDArray[np.float32]:
    """Of one view of each of so many images of MiniPlaces: float32 ``[rows, C]``."""
    paths = sorted((data_folder() / "miniplaces/images/train").rglob("*.jpg"))
    paths = paths[:: max(1, len(paths) // rows)][:rows]
    target = Target("miniplaces", "train", ("all",), np.zeros(len(paths), np.int64),
                    [str(i) for i in range(len(paths))], paths=tuple(paths))  # fmt: skip
    views = Views(target, parse_policy("random-resized-crop-flip:size=96"))
    opened = open_source(parse_source(source))
    parts = [
        opened.log_probabilities(torch.from_numpy(views.batch(part, 0))).numpy()
        for part in np.array_split(np.arange(len(paths)), max(1, len(paths) // 64))
    ]
    return np.concatenate(parts)


def written(encoding: Encoding, log_p: NDArray[np.float32]) -> dict[str, list[bytes]]:
    """The compressed chunks of each array."""
    chunks: dict[str, list[bytes]] = {}
    for start in range(0, len(log_p), CHUNK):
        for key, rows in encoding.encode(log_p[start : start + CHUNK]).items():
            chunks.setdefault(key, []).append(encoding.compressed(rows))
    return chunks


def read(
    encoding: Encoding, chunks: dict[str, list[bytes]], classes: int, temperature: float
) -> None:
    """Decompresses and decodes all rows, as the trainer does."""
    layout = encoding.arrays(classes)
    for parts in zip(*chunks.values(), strict=True):
        rows = {}
        for key, part in zip(chunks, parts, strict=True):
            dtype, width, _ = layout[key]
            rows[key] = np.frombuffer(Blosc().decode(part), dtype).reshape(-1, width).copy()
        soft_labels(encoding, as_tensors(rows), classes, temperature)


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="write the figures to FILE")
    asked = parser.parse_args([] if in_a_run() else None)
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    sources = (
        "imagenet:efficientnet_lite0@96",
        f"places365={data_folder() / PLACES}:build@96",
    )
    print(machine())
    for source in sources:
        log_p = log_probabilities(source, asked.rows)
        n, classes = log_p.shape
        encodings = {name: parse_encoding(name) for name in NAMES}
        stored = {name: written(e, log_p) for name, e in encodings.items()}
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(TURNS):
            for name, e in encodings.items():
                for what, work in (
                    ("write", partial(written, e, log_p)),
                    ("read", partial(read, e, stored[name], classes, 1.0)),
                ):
                    times.setdefault((name, what), []).append(seconds(work))
        print(f"\n{source.partition(':')[0].partition('=')[0]}: {n:,} labels, {classes} classes")
        print(
            f"{'encoding':<14}{'bytes':>7}"
            + "".join(f"{f'T = {t}':>10}" for t in TEMPERATURES)
            + f"{'us write':>10}{'us read':>9}{'write/f16':>11}{'read/f16':>10}"
        )
        for name, encoding in encodings.items():
            size = sum(len(c) for chunks in stored[name].values() for c in chunks) / n
            error = measured_error(encoding, log_p)
            row: dict[str, Any] = {"encoding": name, "classes": classes, "bytes": size}
            row |= {f"T={t}": error[f"T={t}"]["gradient"] for t in TEMPERATURES}
            for what in ("write", "read"):
                mine, base = times[name, what], times["f16", what]
                row[what] = 1e6 * statistics.median(mine) / n
                row[f"{what}/f16"] = paired_ratio(mine, base)
            found.append(row)
            print(
                f"{name:<14}{size:>7.0f}"
                + "".join(f"{row[f'T={t}']:>10.2g}" for t in TEMPERATURES)
                + f"{row['write']:>10.1f}{row['read']:>9.1f}"
                f"{row['write/f16']:>11.2f}{row['read/f16']:>10.2f}",
                flush=True,
            )
    rows: list[Row] = []
    for row in found:
        name = f"{row['encoding']}, {row['classes']:,} classes"
        rows.append((f"{name}: stored", row["bytes"], "bytes/label"))
        rows += [(f"{name}: gradient error {t}", 100 * row[t], "%") for t in ("T=1", "T=3")]
        rows += [(f"{name}: {what} as f16", row[f"{what}/f16"], "x") for what in ("write", "read")]
    if in_a_run():
        report("encodings, on labels of real images", rows, {})
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
