"""``sskt ls``: what a cache holds; with -v, what the labels look like."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.labels.label_set_options import root_option, sets_argument, target_option
from sskt.cli.locations import DEFAULT_LABELS, located_cache
from sskt.cli.output import (
    as_json,
    error_text,
    human_bytes,
    print_json,
    print_table,
    progress,
    show,
)
from sskt.teacher_cache.errors import SsktError

if TYPE_CHECKING:
    from sskt.teacher_cache.label_sets.label_set import LabelSet
    from sskt.teacher_cache.tools.reopen import Reopen

COLUMNS = (
    "digest",
    "target",
    "samples",
    "source",
    "views",
    "encoding",
    "seeds",
    "size",
    "gradient error",
)
AUDIT = (
    "seed",
    "labels",
    "empty",
    "faulty",
    "entropy",
    "top-1 p",
    "top-1",
    "top-5",
    "of",
    "view checks",
)


@click.command(
    "ls",
    cls=GroupedCommand,
    examples=(
        "sskt ls",
        "sskt ls -v http://labels:8080",
    ),
)
@click.option(
    "--cache",
    help=f"Folder or URL (s3://..., http://HOST:PORT) of the label sets. {DEFAULT_LABELS}",
)
@sets_argument
@click.option(
    "-v",
    "--audit",
    "audited",
    is_flag=True,
    help="Read all labels: entropy, confidence, agreement with the true classes, empty rows.",
)
@root_option
@target_option
@as_json
def ls(
    cache: str | None,
    sets: tuple[str, ...],
    audited: bool,
    root: Path | None,
    target: str | None,
    as_json: bool,
) -> None:
    """List the label sets of a cache (or those whose name contains, or digest starts with, SET).

    The cache may also come first: sskt ls ./labels, sskt ls http://HOST:PORT [SET]... Exit status 1
    if a set is damaged.
    """
    if cache is None and sets and "/" in sets[0]:
        cache, sets = sets[0], sets[1:]
    cache = located_cache(cache)
    from sskt.teacher_cache.label_sets.create import summaries
    from sskt.teacher_cache.label_sets.find import choose_all

    # Collections would go through all that was imported, which is a fifth of the time of a cache
    # of a thousand sets.
    gc.freeze()
    try:
        chosen, damaged = choose_all(cache, sets)
        found = summaries(chosen)
    finally:
        gc.unfreeze()
    if audited:
        from sskt.teacher_cache.tools.reopen import Reopen

        instead = Reopen(target=target, root=root)
        with progress() as bar:
            for label_set, shown in zip(chosen, found, strict=True):
                shown |= _audit(label_set, instead, bar(label_set.name))
    if as_json:
        print_json(found + [{"name": n, "damaged": str(e)} for n, e in damaged.items()])
    else:
        if found:
            print_table(COLUMNS, [_row(s) for s in found])
        for shown in found if audited else ():
            _print_audit(shown)
        for name, error in damaged.items():
            show(f"unreadable: {name}: {error}")
    if damaged:
        sys.exit(1)


def _row(s: dict[str, Any]) -> list[str]:
    from sskt.teacher_cache.views.policies import shown_policy

    whole = sum(c == 1.0 for c in s["coverage"])
    return [
        s["digest"][:12],
        f"{s['target']['name']} {s['target']['split']}",
        f"{s['target']['size']:,}",
        f"{s['source']['name']} ({s['source']['arch']})",
        shown_policy(s["views"]),
        s["encoding"],
        f"{whole}/{s['seeds']}",
        human_bytes(s["bytes"]),
        error_text(s["error"]),
    ]


def _audit(label_set: LabelSet, instead: Reopen, bar: Any) -> dict[str, Any]:
    from sskt.teacher_cache.tools.audit import audit, truth_of
    from sskt.teacher_cache.tools.reopen import reopen_target
    from sskt.teacher_cache.views.mixing import mixes_by

    target, why = None, ""
    try:
        target = reopen_target(label_set, instead)
        if mixes_by(label_set.spec["views"]):
            target, why = None, "the views are mixed with those of other samples"
        elif truth_of(target, label_set.classes) is None:
            why = "the source has none of the target's classes by name"
    except SsktError as error:
        why = str(error)
    return {"audit": [seed.as_dict() for seed in audit(label_set, target, bar)], "no_truth": why}


def _print_audit(shown: dict[str, Any]) -> None:
    show(f"\n{shown['name']}")
    rows = [
        [
            str(seed["seed"]),
            f"{seed['rows'] - seed['empty'] - seed['faulty']:,}",
            f"{seed['empty']:,}",
            f"{seed['faulty']:,}",
            _number(seed["entropy"], "{:.3f}"),
            _number(seed["confidence"], "{:.3f}"),
            _number(seed["top1"], "{:.1%}"),
            _number(seed["top5"], "{:.1%}"),
            f"{seed['matched']:,}" if seed["matched"] else "-",
            _number(seed["checked"], "{:.1%}"),
        ]
        for seed in shown["audit"]
    ]
    print_table(AUDIT, rows)
    if shown["no_truth"]:
        show(f"  no true classes to compare with: {shown['no_truth']}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
