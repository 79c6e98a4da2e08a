"""``sskt verify``, ``datasets``, ``sources``: looking without changing."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from sskt.cli.locations import cache_option as label_cache_option
from sskt.cli.output import as_json, print_json, print_table, progress
from sskt.teacher_cache.errors import InputError

OWN_NETWORKS = (
    "your own (they are programs: open only what you trust):",
    "  NAME=FILE.py:factory or NAME=package.module:factory, a function without arguments that",
    "    gives a torch Module; beside it SIZE, MEAN, STD (where needed CHANNELS, SCALE, CLASSES)",
    "  NAME=FILE.pt (TorchScript) or NAME=FILE.pt2 (torch.export), with FILE.pt.json or",
    "    FILE.pt2.json beside it, or --preprocessing",
    "  NAME:timm/ARCH for timm networks with other classes",
)

cache_option = label_cache_option("Folder or URL (s3://..., http://HOST:PORT) of the label sets.")
sets_argument = click.argument("sets", nargs=-1, metavar="[SET]...")
root_option = click.option(
    "--root", type=click.Path(path_type=Path), help="Where the target's data lives now."
)
target_option = click.option("--target", help="Target to open instead of the recorded one.")
device_option = click.option("--device", default="cpu", show_default=True)


@click.command("verify")
@cache_option
@sets_argument
@click.option(
    "--recompute",
    "count",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Compare N labels with the live source.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Allowed total variation distance; default 0.005, 0.05 for bfloat16 sources.",
)
@click.option("--source", help="Source to open instead of the recorded one (one set only).")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Its weights, if not the recorded file."
)
@root_option
@target_option
@device_option
@as_json
def verify(
    cache: str,
    sets: tuple[str, ...],
    count: int,
    tolerance: float | None,
    source: str | None,
    weights: Path | None,
    root: Path | None,
    target: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Check label sets: every checksum, every row, coverage; with --recompute also the labels.

    Exit status 1 if anything is wrong or missing.
    """
    from sskt.teacher_cache.label_sets.find import choose_all
    from sskt.teacher_cache.tools import verify as checks

    chosen, damaged = choose_all(cache, sets)
    if source and len(chosen) > 1:
        raise InputError(f"--source goes with one label set, found {len(chosen)}; name it")
    instead = checks.Reopen(target, root, source, weights, device)
    reports = []
    with progress() as bar:
        for label_set in chosen:
            report = checks.verify(label_set, bar(f"shards of {label_set.spec['source']['name']}"))
            if count:
                step = bar(f"recomputing {label_set.spec['source']['name']}")
                report = checks.recompute(
                    label_set, count, report, instead=instead, tolerance=tolerance, progress=step
                )
            reports.append(report)
    reports += [checks.Report(name, problems=[str(e)]) for name, e in damaged.items()]
    if as_json:
        print_json([dataclasses.asdict(r) for r in reports])
    else:
        _print_reports(reports)
    if any(r.problems for r in reports):
        sys.exit(1)


def _print_reports(reports: list[Any]) -> None:
    for r in reports:
        said = f"{r.name}: {r.shards} shards, {r.rows:,} rows"
        if r.skipped:
            said += f", {r.skipped} skipped"
        if r.recomputed:
            said += f", {r.recomputed} recomputed (worst distance {r.worst_distance:.2e})"
        click.echo(said + (": clean" if not r.problems else f": {len(r.problems)} problems"))
        for problem in r.problems[:20]:
            click.echo(f"  {problem}")
        if len(r.problems) > 20:
            click.echo(f"  and {len(r.problems) - 20} more (--json lists them)")


@click.command("datasets")
@as_json
def datasets(as_json: bool) -> None:
    """List the known targets and the layout that each expects under --root."""
    from sskt.teacher_cache.targets.folder import FOLDER_LAYOUT
    from sskt.teacher_cache.targets.registry import CLIP_POLICY, IMAGE_POLICY, TARGETS

    known: list[dict[str, Any]] = [
        {
            "name": n,
            "about": t.about,
            "splits": list(t.splits),
            "policy": t.policy,
            "layout": t.layout,
        }
        for n, t in TARGETS.items()
    ]
    own = ["train", "test", "val"]
    known += [
        {
            "name": "a folder",
            "about": "your own pictures, or clips (files, or folders of image_00001.jpg ...)",
            "splits": own,
            "policy": f"{IMAGE_POLICY}; {CLIP_POLICY}",
            "layout": FOLDER_LAYOUT,
        },
        {
            "name": "a manifest",
            "about": "your own list, .csv or .parquet",
            "splits": own,
            "policy": f"{IMAGE_POLICY}; {CLIP_POLICY}",
            "layout": "columns path, label (or labels: a|b), split if any; paths under --root",
        },
    ]
    if as_json:
        print_json(known)
        return
    columns = ["name", "about", "splits", "policy", "layout"]
    rows = [[", ".join(t[c]) if c == "splits" else str(t[c]) for c in columns] for t in known]
    print_table(["target", "about", "splits", "default views", "expected under --root"], rows)


@click.command("sources")
@as_json
def sources(as_json: bool) -> None:
    """List the known sources and their architectures."""
    from sskt.teacher_cache.sources.registry import (
        CSAIL_SHA256,
        DEFAULT_ARCH,
        SOURCES,
        imagenet_archs,
    )

    archs = {"imagenet": imagenet_archs(), "places365": list(CSAIL_SHA256)}
    known: list[dict[str, Any]] = [
        {"name": n, "classes": count, "about": about, "default": DEFAULT_ARCH, "archs": archs[n]}
        for n, (count, about) in SOURCES.items()
    ]
    if as_json:
        print_json(known)
        return
    for source in known:
        click.echo(f"{source['name']}: {source['classes']} classes; {source['about']}")
        click.echo(f"  default {source['default']}; {', '.join(source['archs'])}")
    for line in OWN_NETWORKS:
        click.echo(line)
