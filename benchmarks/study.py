"""The study of docs/results.md: training from scratch against SSKT on real images.

    python benchmarks/study.py --data ../shared/data --out runs/study [--part 0/2] [--only cifar]

Trains ResNet-20 on real CIFAR-10 images (as JPEGs) and on MiniPlaces, with labels of a real
ImageNet and a real Places365 network. Labels are cached first, then every row is trained with three
seeds (the run that is twice as long with one: it only shows that scratch has levelled off). A
finished run is kept, an interrupted one continues. Finished runs are also copied to
``--kept`` (configuration and metrics only), which is part of the repository, so that the study can
be continued on another machine. ``--write FILE`` writes tables and curves of the finished runs.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tarfile
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sskt.benchmarks.common import SAFELY
from sskt.teacher_cache.format.encodings import Encoding, parse_encoding
from sskt.teacher_cache.format.features import SOFT_LABELS
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.labeling.job import Job, open_job_sources, open_job_views
from sskt.teacher_cache.labeling.run import cache_teachers
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.targets.spec import DatasetSpec
from sskt.teacher_cache.tools.export import export_label_set
from sskt.trainer.config import TrainConfig, read_config
from sskt.trainer.loop.runs import run_training
from sskt.trainer.results import records
from sskt.trainer.results.compare import compare, find_runs
from sskt.trainer.results.groups import mean_std, result_of
from sskt.trainer.results.plots import draw_curves

RUNS = 3
IN, PL = "imagenet", "places365"
LONG = "scratch, twice as long"
KEPT = Path(__file__).parent / "study"
KEPT_METRICS = ("epoch", "loss", "loss_primary", "train_top1", "test_loss", "test_top1", "images",
                "seconds")  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Rows of one target that share everything but the fields that a row names.

    ``encoding`` among the fields is that of the soft labels, if not ``f16``. The sources see images
    of ``size`` pixels; ``view_seeds`` views of each sample are cached, as ``output`` says. A run is
    evaluated ``evaluations`` times.
    """

    title: str
    target: str
    base: dict[str, Any]
    size: int = 74
    view_seeds: int = 8
    rows: dict[str, dict[str, Any]] = field(default_factory=lambda: ROWS)
    output: str = SOFT_LABELS
    evaluations: int = 6


def sskt(*sources: str, **fields: Any) -> dict[str, Any]:
    return {"source": list(sources), **fields}


ROWS: dict[str, dict[str, Any]] = {
    "scratch": {},
    LONG: {},
    "P": sskt(PL),
    "I": sskt(IN),
    "P+I": sskt(PL, IN),
    "P, TM": sskt(PL, tm=True),
    "I, TM": sskt(IN, tm=True),
    "P+I, TM": sskt(PL, IN, tm=True),
    "P+I, T 3, alpha 0.1": sskt(PL, IN, alpha=0.1, temperature=3.0),
    "P+I, TM, T 3, alpha 0.1": sskt(PL, IN, tm=True, alpha=0.1, temperature=3.0),
}
"""T = 1 and alpha = 1 unless a row says otherwise."""

ENCODINGS = {
    "f16": Encoding("f16"),
    "root4": parse_encoding("root4"),
    "root4-coarse": parse_encoding("root4-coarse"),
    "root4, step 1 / C": Encoding("root4", step=1.0),
    "top 100": Encoding("topk", 100),
}
ENCODED: dict[str, dict[str, Any]] = {
    "scratch": {},
    **{name: sskt(PL, IN, encoding=name, force_topk=True) for name in ENCODINGS},
}
"""P+I at T = 3, where top-k labels lose most, with labels that are stored ever more coarsely."""

TRIVIAL, MIXUP = "pad-crop-flip:trivial=1", "pad-crop-flip:mixup=0.2"
FEATURES: dict[str, dict[str, Any]] = {
    "scratch": {},
    "I": sskt(IN, loss="ce+ce"),
    "I, cosine": sskt(IN, loss="ce+cosine"),
    "I, TM": sskt(IN, loss="ce+ce", tm=True),
    "I, TM, cosine": sskt(IN, loss="ce+cosine", tm=True),
    "scratch, TrivialAugment": {"policy": TRIVIAL},
    "I, TrivialAugment": sskt(IN, loss="ce+ce", policy=TRIVIAL),
    "scratch, mixup": {"policy": MIXUP},
    "I, mixup": sskt(IN, loss="ce+ce", policy=MIXUP),
}
"""Rows of a policy share one label set: features with their head, which gives the soft labels of
``ce``."""

TRAINING = {"batch_size": 64, "lr": 0.05, "precision": "float32", "alpha": 1.0, "temperature": 1.0}
"""bfloat16 takes ten times as long on CPUs without it."""

STUDIES = {
    "cifar1k": Study(
        "CIFAR-10, 1,000 images (100 a class), 240 epochs",
        "cifar10",
        {"policy": "pad-crop-flip", "limit": 1000, "epochs": 240, **TRAINING},
    ),
    "places": Study(
        "MiniPlaces, 2,000 images (20 a class, 100 classes), views of 32 pixels, 60 epochs",
        "miniplaces",
        {"policy": "random-resized-crop-flip:size=32,scale_min=0.3", "epochs": 60, **TRAINING},
        size=96,
    ),
    "cifar5k": Study(
        "CIFAR-10, 5,000 images (500 a class), 30 epochs",
        "cifar10",
        {"policy": "pad-crop-flip", "limit": 5000, "epochs": 30, **TRAINING},
        view_seeds=4,
    ),
    "encodings": Study(
        "Encodings: MiniPlaces, 2,000 images, views of 32 pixels, 20 epochs, T = 3",
        "miniplaces",
        {
            "policy": "random-resized-crop-flip:size=32,scale_min=0.3",
            "epochs": 20,
            **TRAINING,
            "temperature": 3.0,
        },
        size=96,
        rows=ENCODED,
    ),
    "features": Study(
        "Features and strong augmentation: CIFAR-10, 1,000 images (100 a class), 20 epochs",
        "cifar10",
        {"policy": "pad-crop-flip", "limit": 1000, "epochs": 20, **TRAINING},
        view_seeds=10,
        rows=FEATURES,
        output="features",
        evaluations=2,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--only", default="", help="names of studies, by commas")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th run from the I-th")
    parser.add_argument("--kept", type=Path, default=KEPT, help="finished runs, kept in git")
    parser.add_argument("--write", type=Path, help="write results to FILE, train nothing")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    chosen = asked.only.split(",") if asked.only else list(STUDIES)
    if asked.write:
        write({name: STUDIES[name] for name in chosen}, asked.kept, asked.write)
        return
    part, parts = map(int, asked.part.split("/"))
    torch.set_num_threads(max(1, torch.get_num_threads() // parts))
    for name in chosen:
        study = STUDIES[name]
        target = unpacked(asked.data, asked.out, study.target)
        cache = asked.out / "labels" / name
        label(study, target, asked.data, cache, asked.device)
        runs = [(s, row) for s in range(RUNS) for row in study.rows if row != LONG or s == 0]
        for seed, row in runs[part::parts]:
            config = config_of(study, row, seed, target, cache, asked.out / name, asked.data)
            if not finished(asked.kept / name / place_of(row, seed)):
                last = run_training(replace(config, device=asked.device))[-1]
                keep(asked.out, asked.kept, config)
                print(f"{config.out}: {last['test_top1']:.2f} %", flush=True)


def finished(run: Path) -> list[dict[str, Any]]:
    """The records of a finished run; empty for any other folder."""
    found = records.read_metrics(run) if (run / records.METRICS).exists() else []
    whole = found and records.is_finished(found, read_config(run / records.CONFIG)["epochs"])
    return found if whole else []


def keep(out: Path, kept: Path, config: TrainConfig) -> None:
    """Copies the configuration and the metrics of a finished run."""
    assert config.out
    folder = kept / config.out.relative_to(out)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(config.out / records.CONFIG, folder)
    lines = [
        json.dumps({k: round(record[k], 4) for k in KEPT_METRICS if k in record})
        for record in records.read_metrics(config.out)
    ]
    (folder / records.METRICS).write_text("\n".join(lines) + "\n")


def unpacked(data: Path, out: Path, target: str) -> Path:
    """The target as a folder of class folders, or MiniPlaces as a manifest."""
    folder = out / "targets" / target
    if target == "cifar10" and not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
        with tarfile.open(data / "cifar10-jpeg.tar.gz") as archive:
            archive.extractall(part, **SAFELY)
        try:
            next(path for path in part.rglob("train")).parent.rename(folder)
        except OSError:
            if not folder.is_dir():  # another part of the study unpacked it meanwhile
                raise
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


def root_of(study: Study, data: Path) -> Path | None:
    """The folder of the images of a manifest, which lie outside of the manifest's own folder."""
    return data / study.target if study.target == "miniplaces" else None


def label(study: Study, target: Path, data: Path, cache: Path, device: str) -> None:
    known = {
        IN: f"{IN}:efficientnet_lite0@{study.size}",
        PL: f"{PL}={data / 'models/squeezenet_places365.py'}:build@{study.size}",
    }
    used = {name for row in study.rows.values() for name in row.get("source", ())}
    sources = tuple(text for name, text in known.items() if name in used)
    dataset = DatasetSpec(str(target), root=root_of(study, data), limit=study.base.get("limit"))
    policies = [(study.base | row)["policy"] for row in study.rows.values() if "source" in row]
    for policy in dict.fromkeys(policies):
        job = Job(sources, dataset, str(cache), policy=policy, device=device, output=study.output)
        opened = open_job_sources(job)
        views = open_job_views(job)
        report = cache_teachers(views, [o.source for o in opened], job.how, study.view_seeds,
                                job.cache, job.options(opened))  # fmt: skip
        print(f"{cache}: {report.written} labels written, {report.reused} reused", flush=True)
    for name in {fields.get("encoding", "f16") for fields in study.rows.values()} - {"f16"}:
        for label_set in list_label_sets(cache):
            export_label_set(label_set, ENCODINGS[name], encoded(cache, name))


def encoded(cache: Path, encoding: str) -> Path:
    """The cache of the same labels in another encoding."""
    return cache if encoding == "f16" else cache.with_name(f"{cache.name}-{folder_of(encoding)}")


def config_of(
    study: Study, row: str, seed: int, target: Path, cache: Path, out: Path, data: Path
) -> TrainConfig:
    epochs = study.base["epochs"] * (2 if row == LONG else 1)
    fields = study.base | study.rows[row] | {"epochs": epochs}
    encoding = fields.pop("encoding", "f16")
    return TrainConfig(
        target=str(target),
        root=root_of(study, data),
        seed=seed,
        out=out / place_of(row, seed),
        cache=encoded(cache, encoding) if fields.get("source") else None,
        seeds=study.view_seeds,
        eval_every=epochs // study.evaluations,
        save_minutes=0,
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
                if found := finished(run):
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
        comparison = compare(find_runs(folders)[0])
        lines.append("")
        # Configurations do not tell rows apart whose labels differ in their encoding only.
        if len(comparison.groups) == len(folders):
            draw_curves(comparison, image)
            lines += [f"![{study.title}]({image.name})", ""]
    durable_write(path, "\n".join(lines).encode())


def place_of(row: str, seed: int) -> Path:
    return Path(folder_of(row), f"seed-{seed}")


def folder_of(row: str) -> str:
    return row.replace(", ", "-").replace(" / ", "-").replace(" ", "-")


def difference(gains: list[float]) -> str:
    mean, std = mean_std(gains)
    if len(gains) < 2:
        return f"{mean:+.2f} (one seed)"
    return f"{mean:+.2f} ± {std / math.sqrt(len(gains)):.2f}"


if __name__ == "__main__":
    main()
