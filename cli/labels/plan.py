"""``sskt plan``: bytes, hours and break-even of a labelling run, from a probe of some seconds."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.labels.labelling_options import (
    GROUPS,
    job_of,
    job_options,
    require_ready,
    run_options,
)
from sskt.cli.locations import DEFAULT_WRITABLE, located_cache
from sskt.cli.output import (
    as_json,
    counted,
    human_bytes,
    print_json,
    print_table,
    progress,
    show,
    working,
)


@click.command(
    "plan",
    cls=GroupedCommand,
    groups=GROUPS,
    examples=(
        "sskt plan --source imagenet --target stl10",
        "sskt plan --source imagenet --target imagenet --machines 8",
    ),
)
@job_options
@click.option(
    "--cache", help=f"Cache of label sets. Labels that it holds are not counted. {DEFAULT_WRITABLE}"
)
@run_options
@click.option(
    "--machines",
    type=click.IntRange(1),
    multiple=True,
    default=(1,),
    help="Number of machines like this one to predict for. Repeat.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Epochs of one training, for the break-even.",
)
@click.option(
    "--probe",
    type=click.FloatRange(0, min_open=True),
    default=6.0,
    show_default=True,
    help="Seconds that the measurement takes.",
)
@as_json
def plan(
    cache: str | None,
    machines: tuple[int, ...],
    epochs: int,
    probe: float,
    as_json: bool,
    **given: Any,
) -> None:
    """What cache-teachers with the same options will cost: bytes, hours, when it pays.

    Only labels that are not stored yet are counted, at the speed of this machine.
    """
    for name in ("share", "engine", "address", "task_gpus", "task_cpus"):
        given.pop(name)
    with working("loading"):
        from sskt.teacher_cache.labeling.estimate import plan as plan_run
        from sskt.teacher_cache.labeling.job import open_job_sources, open_job_views

    require_ready(given)
    job = job_of(located_cache(cache, writable=True, make=True), given)
    with progress() as bar:
        views = open_job_views(job, bar("reading files"))
    with working(f"measuring for {probe:g} s"):
        sources = [one.source for one in open_job_sources(job)]
        found = plan_run(job, views, sources, epochs=epochs, machines=machines, seconds=probe)
    if as_json:
        print_json(found.as_dict())
        return
    device = sources[0].device
    target = f"{views.target.name} {views.target.split}"
    show(f"{target}: {found.samples:,} samples x {counted(found.seeds, 'seed')} on {device}")
    if found.stored:
        everything = f"{found.stored + found.labels:,}"
        show(f"{found.stored:,} of {everything} labels are stored; the rest is counted here")
    rows = [
        [f"{s.name} ({s.arch})", f"{s.classes:,}", f"{1 / s.seconds:,.0f}"] for s in found.sources
    ]
    print_table(["source", "classes", "labels/s"], rows)
    read = found.views / found.read_seconds if found.views else 0
    times = {0: "", 1: ", each file decoded once"}
    decoded = times.get(found.decodings, f", each file decoded {found.decodings} times")
    show(f"\nreading and augmenting: {read:,.0f} views/s{decoded}")
    if found.compile_seconds:
        show(f"compiling the sources: {found.compile_seconds:,.0f} s on each machine")
    rows = [
        [name, human_bytes(size), f"{fmean(s.bytes[name] for s in found.sources):,.0f}"]
        for name, size in found.bytes.items()
    ]
    print_table(["encoding", "to be written", "bytes a label"], rows)
    show("")
    hours = [[str(n), _time(h)] for n, h in found.hours.items()]
    print_table(["machines", "time"], hours)
    show(
        f"\nthe cache costs each source {counted(found.passes, 'pass', 'passes')} over the target; "
        f"one training of {counted(epochs, 'epoch')} with the sources in every step costs "
        f"{found.trained_passes}"
    )
    show(f"it takes less time from {_trainings(found.break_even)} on")


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h"


def _trainings(count: int) -> str:
    return "the first training" if count == 1 else f"training {count:,}"
