"""The study of docs/results.md: scratch against SSKT on real images, three seeds each.

    python benchmarks/study.py --data ../shared/data --out runs/study [--part 0/2] [--only cifar]

Real CIFAR-10 (as JPEGs) and MiniPlaces, real ImageNet and Places365 sources, ResNet-20. Labels
are cached first, then every row is trained; a run that is there is kept, one that was cut goes on.
``--write FILE`` writes the tables and curves from what is there.
"""

from __future__ import annotations

import argparse
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import SAFELY

from sskt.teacher_cache.durable import durable_write
from sskt.teacher_cache.jobs import Job, open_job_sources, open_job_views
from sskt.teacher_cache.stage import cache_teachers
from sskt.trainer import records
from sskt.trainer.comparing import compare, find_runs
from sskt.trainer.config import TrainConfig
from sskt.trainer.drawing import draw_curves
from sskt.trainer.runs import run_training
from sskt.trainer.summary import mean_std, result_of

RUNS = 3
IN, PL = "imagenet", "places365"


@dataclass(frozen=True)
class Study:
    """Rows of one target that share everything but what is named in a row.

    Rows in ``once`` are trained with one seed only. The sources see ``size`` pixels, and
    ``view_seeds`` views of each sample are cached.
    """

    title: str
    target: str
    base: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    size: int = 74
    view_seeds: int = 8


def sskt(*sources: str, **fields: Any) -> dict[str, Any]:
    return {"source": list(sources), **fields}


STUDIES = {
    "cifar": Study(
        "CIFAR-10, 1,000 images (100 a class), 30 epochs",
        "cifar10",
        {"policy": "pad-crop-flip", "limit": 1000, "epochs": 30, "batch_size": 64, "lr": 0.05},
        {
            "scratch": {},
            "I": sskt(IN),
            "I, TM": sskt(IN, tm=True),
            "P": sskt(PL),
            "P, TM": sskt(PL, tm=True),
            "P+I": sskt(PL, IN),
            "P+I, TM": sskt(PL, IN, tm=True),
            "P+I, CE+KD as meant": sskt(PL, IN, loss="ce+kd"),
            "P+I, CE+KD as released": sskt(PL, IN, loss="ce+kd-released"),
            "I, alpha 0.03": sskt(IN, alpha=0.03),
            "I, alpha 0.3": sskt(IN, alpha=0.3),
            "I, alpha 1": sskt(IN, alpha=1.0),
            "I, T 1": sskt(IN, temperature=1.0),
        },
        ("P", "P, TM", "P+I, CE+KD as meant", "I, alpha 0.03", "I, alpha 0.3", "I, T 1"),
    ),
    "places": Study(
        "MiniPlaces, 2,000 images (20 a class, 100 classes), views of 48 pixels, 10 epochs",
        "miniplaces",
        {
            "policy": "random-resized-crop-flip:size=48,scale_min=0.3",
            "epochs": 10,
            "batch_size": 32,
            "lr": 0.05,
        },
        {
            "scratch": {},
            "P, alpha 1": sskt(PL, alpha=1.0),
            "P, TM, alpha 1": sskt(PL, tm=True, alpha=1.0),
            "I, alpha 1": sskt(IN, alpha=1.0),
        },
        size=96,
    ),
    "cifar5k": Study(
        "CIFAR-10, 5,000 images (500 a class), 15 epochs",
        "cifar10",
        {"policy": "pad-crop-flip", "limit": 5000, "epochs": 15, "batch_size": 64, "lr": 0.05},
        {"scratch": {}, "I": sskt(IN), "P+I, TM": sskt(PL, IN, tm=True)},
        view_seeds=4,
    ),
    "cifar50k": Study(
        "CIFAR-10, all 50,000 images, 2 epochs",
        "cifar10",
        {"policy": "pad-crop-flip", "epochs": 2, "batch_size": 128, "lr": 0.1},
        {"scratch": {}, "I": sskt(IN)},
        ("scratch", "I"),
        view_seeds=1,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--only", default="", help="names of studies, by commas")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th run from the I-th")
    parser.add_argument("--write", type=Path, help="write results to FILE, train nothing")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    chosen = asked.only.split(",") if asked.only else list(STUDIES)
    if asked.write:
        write({name: STUDIES[name] for name in chosen}, asked.out, asked.write)
        return
    part, parts = map(int, asked.part.split("/"))
    torch.set_num_threads(max(1, torch.get_num_threads() // parts))
    for name in chosen:
        study = STUDIES[name]
        target = unpacked(asked.data, asked.out, study.target)
        cache = asked.out / "labels" / name
        label(study, target, asked.data, cache, asked.device)
        for i, config in enumerate(configs(name, study, target, cache, asked.out, asked.device)):
            if i % parts == part:
                last = run_training(config)[-1]
                print(f"{config.out}: {last['test_top1']:.2f} %", flush=True)


def unpacked(data: Path, out: Path, target: str) -> Path:
    """The target as a folder of class folders, or MiniPlaces as a manifest."""
    folder = out / "targets" / target
    if target == "cifar10" and not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(data / "cifar10-jpeg.tar.gz") as archive:
            archive.extractall(folder.parent / "part", **SAFELY)
        inner = folder.parent / "part"
        while not (inner / "train").is_dir():
            (inner,) = [p for p in inner.iterdir() if p.is_dir()]
        inner.rename(folder)
    if target == "miniplaces":
        return manifest(data / "miniplaces", out / "targets" / "miniplaces.csv")
    return folder


def manifest(data: Path, path: Path) -> Path:
    """MiniPlaces as ``path,label,split``: its class names are those of Places365."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        categories = {}
        for line in (data / "devkit/categories.txt").read_text().split("\n"):
            name, _, number = line.rpartition(" ")
            if name:
                categories[int(number)] = name[3:]  # "/a/abbey"
        rows = [f"{p.resolve()},{'/'.join(p.parent.relative_to(folder).parts[1:])},train"
                for folder in [data / "images/train"]
                for p in sorted(folder.rglob("*.jpg"))]  # fmt: skip
        for line in (data / "val_subset.txt").read_text().split("\n"):
            if line:
                file, number = line.split()
                rows.append(f"{(data / 'images' / file).resolve()},"
                            f"{categories[int(number)]},val")  # fmt: skip
        path.write_text("\n".join(["path,label,split", *rows]) + "\n")
    return path


def label(study: Study, target: Path, data: Path, cache: Path, device: str) -> None:
    known = {
        IN: f"{IN}:efficientnet_lite0@{study.size}",
        PL: f"{PL}={data / 'models/squeezenet_places365.py'}:build@{study.size}",
    }
    used = {name for row in study.rows.values() for name in row.get("source", ())}
    sources = tuple(known[name] for name in known if name in used)
    job = Job(sources, str(target), str(cache), policy=study.base["policy"],
              limit=study.base.get("limit"), device=device)  # fmt: skip
    opened = open_job_sources(job)
    views = open_job_views(job)
    report = cache_teachers(views, [o.source for o in opened], job.how, study.view_seeds, job.cache,
                            job.options(opened))  # fmt: skip
    print(f"{cache}: {report.written} labels written, {report.reused} were there", flush=True)


def configs(
    name: str, study: Study, target: Path, cache: Path, out: Path, device: str
) -> Iterator[TrainConfig]:
    """Seed by seed, so that an unfinished study has some of every row."""
    for seed in range(RUNS):
        for row, fields in study.rows.items():
            if seed and row in study.once:
                continue
            place = out / name / folder_of(row) / f"seed-{seed}"
            yield TrainConfig(
                target=str(target),
                seed=seed,
                out=place,
                cache=cache if fields.get("source") else None,
                seeds=study.view_seeds,
                eval_every=study.base["epochs"] // 2,
                save_minutes=0,
                device=device,
                **study.base,
                **fields,
            )


def write(studies: dict[str, Study], out: Path, path: Path) -> None:
    """A table and curves for each study, from the runs that are there.

    A seed's target network begins alike in all rows and sees the same views in the same order,
    so rows are compared with scratch seed by seed: mean and standard error of the
    differences.
    """
    lines: list[str] = []
    for name, study in studies.items():
        results: dict[str, dict[str, float]] = {}
        drawn: list[tuple[bool, Path]] = []
        for row in study.rows:
            for run in sorted((out / name / folder_of(row)).glob("seed-*")):
                found = records.read_metrics(run) if (run / records.METRICS).exists() else []
                if records.is_finished(found, study.base["epochs"]):
                    results.setdefault(row, {})[run.name] = result_of(found)
            if row in results:
                drawn.append((len(results[row]) > 1, out / name / folder_of(row)))
        base = results.get("scratch", {})
        lines += [f"### {study.title}", "", "| row | by seed | mean ± std, % | against scratch |",
                  "|---|---|---|---|"]  # fmt: skip
        for row, values in results.items():
            mean, std = mean_std(list(values.values()))
            gains = [values[s] - base[s] for s in values if s in base]
            cells = [
                row,
                ", ".join(f"{v:.2f}" for v in values.values()),
                f"{mean:.2f} ± {std:.2f}" if len(values) > 1 else "",
                difference(gains) if row != "scratch" else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        image = path.with_name(f"results-{name}.png")
        # Where some rows have several seeds, only those are drawn.
        folders = [folder for many, folder in drawn if many or not any(m for m, _ in drawn)]
        draw_curves(compare(find_runs(folders)[0]), image)
        lines += ["", f"![{study.title}]({image.name})", ""]
    durable_write(path, "\n".join(lines).encode())


def folder_of(row: str) -> str:
    return row.replace(", ", "-").replace(" ", "-")


def difference(gains: list[float]) -> str:
    mean, std = mean_std(gains)
    if len(gains) < 2:
        return f"{mean:+.2f} (one seed)"
    return f"{mean:+.2f} ± {std / math.sqrt(len(gains)):.2f}"


if __name__ == "__main__":
    main()
