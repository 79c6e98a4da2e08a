"""``sskt ls``, ``inspect``, ``verify``, ``datasets``, ``sources``: looking without changing."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from sskt.cli.output import as_json, human_bytes, print_json, print_table, progress, working
from sskt.cli.teachers import error_text
from sskt.teacher_cache.errors import IncompleteLabels, InputError, SsktError

cache_option = click.option(
    "--cache", type=click.Path(path_type=Path), required=True, help="Folder of the label sets."
)
sets_argument = click.argument("sets", nargs=-1, metavar="[SET]...")
root_option = click.option(
    "--root", type=click.Path(path_type=Path), help="Where the target's data lives now."
)
target_option = click.option("--target", help="Target to open instead of the recorded one.")
device_option = click.option("--device", default="cpu", show_default=True)


@click.command("ls")
@cache_option
@sets_argument
@as_json
def ls(cache: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """List the label sets of a cache (or those whose name contains, or digest starts with, SET)."""
    from sskt.teacher_cache.catalog import choose_sets
    from sskt.teacher_cache.verify import summary

    found = [summary(s) for s in choose_sets(cache, sets)]
    if as_json:
        print_json(found)
        return
    rows = []
    for s in found:
        whole = sum(c == 1.0 for c in s["coverage"])
        views = s["views"]
        rows.append(
            [
                s["digest"][:12],
                f"{s['target']['name']} {s['target']['split']}",
                f"{s['target']['size']:,}",
                f"{s['source']['name']} ({s['source']['arch']})",
                views["policy"],
                s["encoding"],
                f"{whole}/{s['seeds']}",
                human_bytes(s["bytes"]),
                error_text(s["error"]),
            ]
        )
    columns = [
        "digest",
        "target",
        "samples",
        "source",
        "views",
        "encoding",
        "seeds",
        "size",
        "gradient error",
    ]
    print_table(columns, rows)


@click.command("inspect")
@cache_option
@sets_argument
@click.option(
    "--sample", type=click.IntRange(0), default=0, show_default=True, help="Sample number."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="View seed.")
@click.option("--png", type=click.Path(path_type=Path), help="Write the view here.")
@click.option(
    "--live/--no-live", default=True, show_default=True, help="Recompute with the live source."
)
@root_option
@target_option
@device_option
@as_json
def inspect(
    cache: Path,
    sets: tuple[str, ...],
    sample: int,
    seed: int,
    png: Path | None,
    live: bool,
    root: Path | None,
    target: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Look at one sample under one seed: its view, each source's top-5, the spec.

    All sets of one target and one view policy are shown together; name one to choose.
    """
    from sskt.teacher_cache.catalog import choose_sets, same_views
    from sskt.teacher_cache.verify import (
        Reopen,
        reopen_policy,
        reopen_target,
        stored_probabilities,
    )
    from sskt.teacher_cache.views import Views, check_of

    chosen = choose_sets(cache, sets)
    same_views(chosen)
    first = chosen[0]
    if sample >= first.samples or seed >= first.seeds:
        raise InputError(
            f"{first.name} has samples 0 to {first.samples - 1} and seeds 0 to {first.seeds - 1}, "
            f"found sample {sample}, seed {seed}"
        )
    for label_set in chosen:
        if seed >= label_set.seeds or not label_set.has(
            label_set.shard(seed, sample // label_set.rows)
        ):
            raise IncompleteLabels(
                f"label set {label_set.name} has no label of sample {sample} under seed {seed} yet"
            )
    instead = Reopen(target=target, root=root, device=device)
    shown: dict[str, Any] = {
        "sample": sample,
        "seed": seed,
        "specs": {s.name: s.spec for s in chosen},
    }
    skipped = stored_probabilities(first, sample, seed) is None
    opened = reopen_target(first, instead) if (live or png) and not skipped else None
    if opened is not None:
        views = Views(opened, reopen_policy(first))
        view = views[sample, seed]
        stored = int(first.read_checks(seed, sample, sample + 1)[0])
        label = int(opened.labels[sample])
        shown |= {
            "id": opened.ids[sample],
            "label": opened.classes[label] if label >= 0 else None,
            "view": {"shape": list(view.shape), "check": f"{check_of(view):08x}"},
            "view_matches": stored == check_of(view),
        }
        if png:
            _write_png(view, png)
            shown["png"] = str(png)
    with working("recomputing" if live else "reading"):
        shown["sources"] = [_labels_of(s, sample, seed, instead if live else None) for s in chosen]
    if as_json:
        print_json(shown)
        return
    _print_inspected(shown)


def _write_png(view: Any, path: Path) -> None:
    from PIL import Image

    try:
        Image.fromarray(view).save(path, format="PNG")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _labels_of(label_set: Any, sample: int, seed: int, instead: Any) -> dict[str, Any]:
    import numpy as np

    from sskt.teacher_cache.verify import compare, reopen, stored_probabilities

    shown: dict[str, Any] = {
        "label_set": label_set.name,
        "source": label_set.spec["source"]["name"],
    }
    shown["arch"], shown["encoding"] = label_set.spec["source"]["arch"], str(label_set.encoding)
    p = stored_probabilities(label_set, sample, seed)
    shown["skipped"] = p is None
    if p is None:
        return shown
    top = np.argsort(-p, kind="stable")[:5]
    shown["top5"] = [{"class": label_set.classes[i], "p": float(p[i])} for i in top]
    if instead is not None:
        try:
            views, source = reopen(label_set, instead)
        except SsktError as error:
            shown["live"] = {"error": str(error)}
            return shown
        found = compare(label_set, views, source, sample, seed)
        best = np.argsort(-found.live, kind="stable")[:5]
        shown["live"] = {
            "distance": found.distance,
            "top5": [{"class": label_set.classes[i], "p": float(found.live[i])} for i in best],
        }
    return shown


def _print_inspected(shown: dict[str, Any]) -> None:
    spec = next(iter(shown["specs"].values()))
    target, views = spec["target"], spec["views"]
    size, fingerprint = f"{target['size']:,} samples", target["fingerprint"][:19]
    click.echo(f"target   {target['name']} {target['split']}, {size}, {fingerprint}...")
    click.echo(f"views    {views['policy']} {views['parameters']}")
    if "id" in shown:
        state = (
            "as the sources saw it" if shown["view_matches"] else "NOT the picture the sources saw"
        )
        height, width, _ = shown["view"]["shape"]
        sample = f"{shown['sample']} = {shown['id']} (label: {shown['label']})"
        click.echo(f"sample   {sample}, seed {shown['seed']}: {width}x{height}, {state}")
    if "png" in shown:
        click.echo(f"view     written to {shown['png']}")
    for source in shown["sources"]:
        name = f"{source['source']} ({source['arch']})"
        click.echo(f"\n{name}, {source['encoding']}, {source['label_set']}")
        _print_source(shown["specs"][source["label_set"]]["source"])
        if source["skipped"]:
            click.echo("  no label: the image could not be read")
            continue
        live = source.get("live", {})
        again = live.get("top5", [{"class": "", "p": 0}] * 5)
        rows = [
            [f"{a['p']:.4f}", a["class"]]
            + ([f"{b['p']:.4f}", b["class"]] if "top5" in live else [])
            for a, b in zip(source["top5"], again, strict=False)
        ]
        print_table(["stored", "class"] + (["live", "class"] if "top5" in live else []), rows)
        if "distance" in live:
            distance = f"{live['distance']:.2e} (total variation)"
            click.echo(f"distance, stored to recomputed label: {distance}")
        if "error" in live:
            click.echo(f"not recomputed: {live['error']}")


def _print_source(spec: dict[str, Any]) -> None:
    how, weights = spec["preprocessing"], spec["weights"][:19]
    size = f"{how['size']}x{how['size']} {how['channels']}"
    numbers = [" ".join(f"{x:.4g}" for x in how[key]) for key in ("mean", "std")]
    click.echo(f"  weights {weights}..., {spec['precision']}, BatchNorm {spec['batchnorm']}")
    click.echo(f"  input {size}, scale {how['scale']:g}, mean {numbers[0]}, std {numbers[1]}")


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
    cache: Path,
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
    from sskt.teacher_cache import verify as checks
    from sskt.teacher_cache.catalog import choose_sets

    chosen = choose_sets(cache, sets)
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
    from sskt.teacher_cache.targets import FOLDER_LAYOUT, FOLDER_POLICY, TARGETS

    known = [
        {
            "name": n,
            "about": t.about,
            "splits": list(t.splits),
            "policy": t.policy,
            "layout": t.layout,
        }
        for n, t in TARGETS.items()
    ]
    folder = {
        "name": "a folder",
        "about": "your own images",
        "splits": ["train", "test", "val"],
        "policy": FOLDER_POLICY,
        "layout": FOLDER_LAYOUT,
    }
    if as_json:
        print_json([*known, folder])
        return
    columns = ["name", "about", "splits", "policy", "layout"]
    rows = [
        [", ".join(t[c]) if c == "splits" else str(t[c]) for c in columns] for t in [*known, folder]
    ]
    print_table(["target", "about", "splits", "default views", "expected under --root"], rows)


@click.command("sources")
@as_json
def sources(as_json: bool) -> None:
    """List the known sources and their architectures."""
    from sskt.teacher_cache.zoo import CSAIL_SHA256, DEFAULT_ARCH, SOURCES, imagenet_archs

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
    click.echo(
        "your own: NAME=FILE.py:factory, a function without arguments that gives a torch Module;"
    )
    click.echo("  FILE.py defines SIZE, MEAN, STD (and, where needed, CHANNELS, SCALE, CLASSES)")
