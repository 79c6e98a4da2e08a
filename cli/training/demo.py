"""``sskt demo``: the whole path on the embedded target, measured as it goes."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, human_bytes, print_json, print_table, progress, say, show
from sskt.teacher_cache.errors import InputError

if TYPE_CHECKING:
    from sskt.cli.training.demo_figure import LabelledView
    from sskt.teacher_cache.label_sets.label_set import LabelSet
    from sskt.teacher_cache.views.views import Views
    from sskt.trainer.config import TrainConfig

Bar = Callable[[str], Callable[[int, int], None]]

SOURCE = "imagenet:efficientnet_lite0@128"
BATCH_SIZE = 32
ROUNDS, STEPS = 3, 4
"""Steps that are timed with the source in the step, and as many from the cache, in turn: what else
the machine does then slows both down."""
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
    "--limit",
    type=click.IntRange(1),
    default=1200,
    show_default=True,
    help="Number of training samples, of 2,000.",
)
@as_json
def demo(out: Path, epochs: int, seeds: int, limit: int, as_json: bool) -> None:
    """Cache a real ImageNet source over `shapes`, train with and without it, compare.

    ResNet-20 from scratch and with SSKT + TM from the cache; the paper's way (source in every
    step) is timed over a few steps. The last lines say what the labels cost, what an epoch costs
    each way, and from which epoch on the cache has paid. A rerun reuses the cache and trains anew.
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
        schedule="cosine",
        cache=out / "cache",
    )
    taught = dataclasses.replace(base, source=[SOURCE], tm=True)
    with progress() as bar:
        views, cached = _cache(base, seeds, bar)
        runs = {
            "scratch": _train(base, out / "scratch", bar),
            "SSKT + TM": _train(taught, out / "sskt-tm", bar),
        }
        slowdown = _time_slowdown(taught, bar)
    result = _result(runs, cached, slowdown)
    plot = out / "demo.png"
    from sskt.cli.training.demo_figure import draw_demo

    draw_demo(plot, labelled_views(views, cached.label_sets[0]), runs, result)
    result |= {"figure": str(plot), "next": _next_commands(out)}
    if as_json:
        print_json(result)
    else:
        _print(result)


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


def _cache(config: TrainConfig, seeds: int, bar: Bar) -> tuple[Views, Any]:
    from sskt.teacher_cache.labeling import run as stage
    from sskt.teacher_cache.labeling.job import Job, open_job_sources, open_job_views
    from sskt.teacher_cache.targets.spec import DatasetSpec

    say(f"caching {SOURCE} over shapes, {seeds} view seeds")
    dataset = DatasetSpec("shapes", limit=config.limit)
    job = Job((SOURCE,), dataset, str(config.cache), device=config.device)
    opened = open_job_sources(job)
    sources, options = [one.source for one in opened], job.options(opened)
    views = open_job_views(job)
    label = stage.cache_teachers
    return views, label(views, sources, job.how, seeds, job.cache, options, bar("labels"))


def _train(config: TrainConfig, out: Path, bar: Bar) -> list[dict[str, Any]]:
    import shutil

    from sskt.cli.training.training_output import hooks_of
    from sskt.trainer.loop.setup import make_plan
    from sskt.trainer.loop.trainer import Trainer

    say(f"training into {out}")
    shutil.rmtree(out, ignore_errors=True)
    hooks = hooks_of(config, bar, name=out.name)
    return Trainer(make_plan(config), hooks).run(out)


def _time_slowdown(config: TrainConfig, bar: Bar) -> float:
    """How many times as long a step takes with the source in it as one with stored labels."""
    from sskt.trainer.loop.runs import open_live_sources
    from sskt.trainer.loop.setup import make_plan
    from sskt.trainer.loop.trainer import Trainer

    live = dataclasses.replace(config, live=True)
    timing = bar("source in every step")
    trainers = {
        "live": Trainer(make_plan(live, open_live_sources(live))),
        "cached": Trainer(make_plan(config)),
    }
    seconds = dict.fromkeys(trainers, 0.0)
    for trainer in trainers.values():
        trainer.train_epoch(max_steps=1)
    for done in range(ROUNDS):
        for name, trainer in trainers.items():
            seconds[name] += float(trainer.train_epoch(max_steps=STEPS)["seconds"])
        timing(done + 1, ROUNDS)
    return seconds["live"] / seconds["cached"]


def _result(runs: dict[str, list[dict[str, Any]]], cached: Any, slowdown: float) -> dict[str, Any]:
    import statistics

    seconds = {
        name: statistics.median(r["seconds"] for r in records) for name, records in runs.items()
    }
    live = seconds["SSKT + TM"] * slowdown
    epochs = len(runs["scratch"])
    return {
        "epochs": epochs,
        "accuracy": {name: records[-1]["test_top1"] for name, records in runs.items()},
        "seconds_per_epoch": seconds | {"source in every step": live},
        "speedup": slowdown,
        "labels_written": cached.written,
        "labels_reused": cached.reused,
        "cache_seconds": cached.seconds,
        "cache_bytes": sum(sum(s.storage.sizes().values()) for s in cached.label_sets),
        "paid_from_epoch": paid_from(cached.seconds, seconds["SSKT + TM"], live),
    }


def paid_from(cache: float, cached: float, live: float) -> int | None:
    """The first epoch at whose end caching and training took no longer than training alone.

    Args:
        cache: Seconds that the labels cost, once.
        cached: Seconds of an epoch from stored labels.
        live: Seconds of an epoch with the source in every step.

    Returns:
        Its number, from 1; None if an epoch from stored labels is not the faster one.
    """
    return max(1, math.ceil(cache / (live - cached))) if live > cached else None


def labelled_views(views: Views, label_set: LabelSet) -> list[LabelledView]:
    """The first samples under view seed 0, with the classes that the source found likeliest.

    Args:
        views: The samples under the policy.
        label_set: The labels of the source over these views.

    Returns:
        At most ``VIEWS`` views.
    """
    import numpy as np

    from sskt.cli.training.demo_figure import TOP, VIEWS, LabelledView
    from sskt.teacher_cache.tools.verify import stored_probabilities

    found = []
    for row in range(min(VIEWS, len(views.target))):
        p = stored_probabilities(label_set, row, 0)
        if p is not None:
            best = np.argsort(-p, kind="stable")[:TOP]
            top = [(label_set.classes[i], float(p[i])) for i in best]
            found.append(LabelledView(views[row, 0], views.label_text(row, 0) or "", top))
    return found


def _next_commands(out: Path) -> list[str]:
    cache, png, other = (shlex.quote(str(out / n)) for n in ("cache", "sample.png", "other-seed"))
    taught = shlex.quote(str(out / "sskt-tm"))
    return [
        f"sskt inspect --cache {cache} --sample 3 --seed 0 --png {png}",
        f"sskt train --recipe {taught} --seed 1 --out {other}",
        f"sskt compare {shlex.quote(str(out / 'scratch'))} {taught} {other}",
    ]


def _print(result: dict[str, Any]) -> None:
    accuracy, seconds = result["accuracy"], result["seconds_per_epoch"]
    cached, live = seconds["SSKT + TM"], seconds["source in every step"]
    timed = f"{ROUNDS * STEPS} steps timed"
    rows = [
        ["scratch", f"{accuracy['scratch']:.1f}", f"{seconds['scratch']:.1f}"],
        ["SSKT + TM, labels from the cache", f"{accuracy['SSKT + TM']:.1f}", f"{cached:.1f}"],
        [f"SSKT + TM, source in every step ({timed})", "same labels", f"{live:.1f}"],
    ]
    print_table(["ResNet-20 on shapes", "test top-1, %", "seconds an epoch (median)"], rows)
    disk = f"{human_bytes(result['cache_bytes'])} on disk"
    if result["labels_written"]:
        made = f"{result['labels_written']:,} in {result['cache_seconds']:.0f} s, once"
        show(f"\nlabels cached: {made}; {disk}")
    else:
        show(f"\nlabels reused: {result['labels_reused']:,}; {disk}")
    show(paid_text(result))
    show("500 test images: accuracies within about 4 points are not a difference")
    show(f"figure: {result['figure']}")
    show("\nthree commands to try next:")
    for command in result["next"]:
        show(f"  {command}")


def paid_text(result: dict[str, Any]) -> str:
    """What an epoch costs each way, and from which epoch on the cache has paid."""
    seconds, times = result["seconds_per_epoch"], result["speedup"]
    each = (
        f"an epoch takes {seconds['SSKT + TM']:.1f} s from the cache and "
        f"{seconds['source in every step']:.1f} s with the source in every step"
    )
    paid, epochs = result["paid_from_epoch"], result["epochs"]
    if paid is None:
        return f"{each}: here the cache saves no time"
    each += f" ({times:.1f} times as long)"
    if not result["labels_written"]:
        return f"{each}: the labels exist, so the cache pays from the first epoch on"
    if paid <= epochs:
        return f"{each}: the cache has paid from epoch {paid} of {epochs} on"
    return (
        f"{each}: the cache would have paid from epoch {paid} on, not within these {epochs}; "
        "further trainings read the same labels"
    )
