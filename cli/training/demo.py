"""``sskt demo``: the whole path on the embedded target, measured as it goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, print_json, print_table, progress, say, show
from sskt.teacher_cache.errors import InputError

if TYPE_CHECKING:
    from sskt.trainer.config import TrainConfig

Bar = Callable[[str], Callable[[int, int], None]]

SOURCE = "imagenet:efficientnet_lite0@96"
BATCH_SIZE = 32
LIVE_STEPS = 8
MARKER = ".sskt-demo"


@click.command(
    "demo",
    cls=GroupedCommand,
    examples=(
        "sskt demo",
        "sskt demo --out runs/demo",
    ),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder of the labels, runs and curves.",
)
@click.option(
    "--epochs", type=click.IntRange(1), default=4, show_default=True, help="Epochs of a training."
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Number of view seeds to cache.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Number of training samples. Default: all 2,000."
)
@as_json
def demo(out: Path, epochs: int, seeds: int, limit: int | None, as_json: bool) -> None:
    """Cache a real ImageNet source over `shapes`, train with and without it, compare.

    ResNet-20 from scratch and with SSKT + TM from the cache; the paper's way (source in every
    step) is timed over a few steps. A rerun reuses the cache and trains anew.
    """
    from sskt.trainer.config import TrainConfig

    _own_folder(out)
    base = TrainConfig(
        target="shapes",
        epochs=epochs,
        seeds=seeds,
        limit=limit,
        batch_size=BATCH_SIZE,
        lr=0.05,
        cache=out / "cache",
    )
    taught = dataclasses.replace(base, source=[SOURCE], tm=True)
    with progress() as bar:
        cached = _cache(base, seeds, bar)
        runs = {
            "scratch": _train(base, out / "scratch", bar),
            "SSKT + TM": _train(taught, out / "sskt-tm", bar),
        }
        live_image = _time_live(taught, bar)
    plot = out / "comparison.png"
    from sskt.trainer.results.plots import plot_runs

    plot_runs(runs, plot)
    result = _result(runs, cached, live_image)
    if as_json:
        print_json(result)
    else:
        _print(result, plot)


def _own_folder(out: Path) -> None:
    """The demo trains anew each time, so it deletes runs: only ever its own."""
    marker = out / MARKER
    try:
        if out.exists() and not marker.exists() and any(out.iterdir()):
            raise InputError(f"{out} is not the folder of an earlier demo; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise InputError(f"cannot use {out}: {error.strerror}") from error


def _cache(config: TrainConfig, seeds: int, bar: Bar) -> Any:
    from sskt.teacher_cache.labeling import run as stage
    from sskt.teacher_cache.labeling.job import Job, open_job_sources, open_job_views
    from sskt.teacher_cache.targets.spec import DatasetSpec

    say(f"caching {SOURCE} over shapes, {seeds} view seeds")
    dataset = DatasetSpec("shapes", limit=config.limit)
    job = Job((SOURCE,), dataset, str(config.cache), device=config.device)
    opened = open_job_sources(job)
    sources, options = [one.source for one in opened], job.options(opened)
    views = open_job_views(job)
    return stage.cache_teachers(views, sources, job.how, seeds, job.cache, options, bar("labels"))


def _train(config: TrainConfig, out: Path, bar: Bar) -> list[dict[str, Any]]:
    import shutil

    from sskt.cli.training.training_output import hooks_of
    from sskt.trainer.loop.setup import make_plan
    from sskt.trainer.loop.trainer import Trainer

    say(f"training into {out}")
    shutil.rmtree(out, ignore_errors=True)
    hooks = hooks_of(config, bar, name=out.name)
    return Trainer(make_plan(config), hooks).run(out)


def _time_live(config: TrainConfig, bar: Bar) -> float:
    """Seconds an image takes with the source run in the step, over a few steps after a first."""
    from sskt.trainer.loop.progress import Hooks
    from sskt.trainer.loop.runs import open_live_sources
    from sskt.trainer.loop.setup import make_plan
    from sskt.trainer.loop.trainer import Trainer

    live = dataclasses.replace(config, live=True)
    timing = bar("source in every step")
    hooks = Hooks(step=lambda epoch, done, total: timing(done, total))
    trainer = Trainer(make_plan(live, open_live_sources(live)), hooks)
    trainer.train_epoch(max_steps=1)
    record = trainer.train_epoch(max_steps=LIVE_STEPS)
    return float(record["seconds"]) / int(record["images"])


def _result(runs: dict[str, list[dict[str, Any]]], cached: Any, image: float) -> dict[str, Any]:
    import statistics

    live = image * runs["SSKT + TM"][-1]["images"]
    seconds = {
        name: statistics.median(r["seconds"] for r in records) for name, records in runs.items()
    }
    return {
        "accuracy": {name: records[-1]["test_top1"] for name, records in runs.items()},
        "seconds_per_epoch": seconds | {"source in every step": live},
        "speedup": live / seconds["SSKT + TM"],
        "labels_written": cached.written,
        "labels_reused": cached.reused,
        "cache_seconds": cached.seconds,
    }


def _print(result: dict[str, Any], plot: Path) -> None:
    accuracy, seconds = result["accuracy"], result["seconds_per_epoch"]
    rows = [
        ["scratch", f"{accuracy['scratch']:.1f}", f"{seconds['scratch']:.1f}"],
        [
            "SSKT + TM, labels from the cache",
            f"{accuracy['SSKT + TM']:.1f}",
            f"{seconds['SSKT + TM']:.1f}",
        ],
        [
            f"SSKT + TM, source in every step ({LIVE_STEPS} steps timed)",
            "same labels",
            f"{seconds['source in every step']:.1f}",
        ],
    ]
    print_table(["ResNet-20 on shapes", "test top-1, %", "seconds an epoch (median)"], rows)
    if result["labels_written"]:
        seconds_once = f"{result['cache_seconds']:.0f} s, once"
        show(f"\nlabels cached: {result['labels_written']:,} in {seconds_once}")
    else:
        show(f"\nlabels reused: {result['labels_reused']:,}")
    speedup = f"{result['speedup']:.1f} times as fast"
    show(f"an epoch from the cache is {speedup} as with the source in every step")
    show("500 test images: accuracies within about 4 points are not a difference")
    show(f"curves: {plot}")
