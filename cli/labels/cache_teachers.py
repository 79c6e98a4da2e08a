"""``sskt cache-teachers``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    error_text,
    human_bytes,
    input_line,
    print_json,
    print_table,
    progress,
    show,
    working,
)
from sskt.teacher_cache.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sskt.teacher_cache.labeling.run import StageReport
    from sskt.teacher_cache.labeling.units import Share
    from sskt.teacher_cache.views.views import Views


@click.command(
    "cache-teachers",
    cls=GroupedCommand,
    groups=GROUPS,
    examples=(
        "sskt cache-teachers --source places365 --target ucf101",
        "sskt cache-teachers --source imagenet --source places365 --target ./photos --seeds 4",
    ),
)
@job_options
@click.option(
    "--cache",
    help=f"Cache of the label sets: a folder, or s3://, gs://, az://. {DEFAULT_WRITABLE}",
)
@run_options
@as_json
def cache_teachers(
    cache: str | None,
    share: str,
    engine: str,
    address: str,
    task_gpus: float | None,
    task_cpus: float,
    as_json: bool,
    **given: Any,
) -> None:
    """Label a target once with frozen sources.

    One pass over the data for all sources and seeds. Stop it anywhere: the same command
    finishes the rest, and the bytes are the same as without the stop.
    """
    if engine == "ray" and share != "auto":
        raise InputError("--share goes with --engine local: a Ray cluster divides the run itself")
    if engine == "local" and (address or task_gpus is not None):
        raise InputError("--address and --task-gpus go with --engine ray")
    require_ready(given)
    job = job_of(located_cache(cache, writable=True, make=True), given)
    part = None

    def said(views: Views) -> None:
        if not as_json:
            target = views.target
            classes = f" of {len(target.classes):,} classes" if target.classes else ""
            show(
                f"{target.name} {target.split}: {len(target):,} samples{classes} "
                f"x {counted(job.seeds, 'view seed')}"
            )

    try:
        with progress() as bar:
            if engine == "ray":
                from sskt.teacher_cache.labeling.ray.driver import RayOptions, cache_with_ray

                how = RayOptions(address, task_gpus, task_cpus)
                report = cache_with_ray(job, how, bar("labels"), bar("reading files"), said)
            else:
                report, part = _here(job, share, bar, said)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "finished shards are stored; run the same command again to label the rest"
        ) from None
    _report(report, part, as_json)
    if given["weights"] and not as_json:
        _show_preprocessing(report)


def _show_preprocessing(report: StageReport) -> None:
    """Says how images were prepared for weights of the user: wrong values go unnoticed."""
    for label_set in report.label_sets:
        spec = label_set.spec["source"]
        show(
            f"{spec['name']} saw its images as {input_line(spec['preprocessing'])}; if its weights "
            "expect others, label anew with --preprocessing (channels=bgr, scale=255, ...)"
        )


def _here(
    job: Any, share: str, bar: Any, said: Callable[[Views], None]
) -> tuple[StageReport, Share | None]:
    with working("loading"):
        from dataclasses import replace

        from sskt.teacher_cache.labeling import run as stage
        from sskt.teacher_cache.labeling.job import open_job_sources, open_job_views
        from sskt.teacher_cache.labeling.units import parse_share
        from sskt.teacher_cache.storage.open import open_cache

    part = parse_share(share)
    views = open_job_views(job, bar("reading files"))
    with working("opening sources"):
        opened = open_job_sources(job)
        open_cache(job.cache, make=True)
    said(views)
    options = replace(job.options(opened), share=part)
    sources = [one.source for one in opened]
    report = stage.cache_teachers(
        views, sources, job.how, job.seeds, job.cache, options, bar("labels")
    )
    return report, part


def _report(report: StageReport, part: Share | None, as_json: bool) -> None:
    rate = report.written / report.seconds if report.seconds else 0.0
    sets: list[dict[str, Any]] = [
        {"name": s.name, "bytes": s.stored_bytes(), "error": s.attributes.get("error")}
        for s in report.label_sets
    ]
    if as_json:
        print_json(
            {
                "share": str(part) if part else None,
                "written": report.written,
                "reused": report.reused,
                "skipped": report.skipped,
                "seconds": report.seconds,
                "label_sets": sets,
            }
        )
        return
    if part:
        show(f"share {part} of the run (all of it: --share none)")
    show(f"{report.written:,} labels written ({rate:,.0f}/s), {report.reused:,} reused")
    if report.skipped:
        show(f"skipped, unreadable: {', '.join(report.skipped)}")
    rows = [[s["name"], human_bytes(s["bytes"]), error_text(s["error"])] for s in sets]
    print_table(["label set", "size", "gradient error of the encoding"], rows)
    for label_set in report.label_sets:
        if label_set.encoding.of_features:
            show(f"{label_set.name} holds {label_set.contents}")
