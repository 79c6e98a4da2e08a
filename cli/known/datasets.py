"""``sskt datasets``: the known targets."""

from __future__ import annotations

from typing import Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, print_json, print_table


@click.command(
    "datasets",
    cls=GroupedCommand,
    examples=(
        "sskt datasets",
        "sskt datasets --json",
    ),
)
@as_json
def datasets(as_json: bool) -> None:
    """List the known targets and the layout that each expects under --root."""
    from sskt.teacher_cache.targets.registry import (
        CLIP_POLICY,
        FOLDER_LAYOUT,
        IMAGE_POLICY,
        TARGETS,
    )

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
            "about": "your own images, or clips (files, or folders of image_00001.jpg ...)",
            "splits": own,
            "policy": f"{IMAGE_POLICY}; {CLIP_POLICY}",
            "layout": f"{FOLDER_LAYOUT}; without labels DIR[/SPLIT]/FILE",
        },
        {
            "name": "a manifest",
            "about": "your own list, .csv or .parquet",
            "splits": own,
            "policy": f"{IMAGE_POLICY}; {CLIP_POLICY}",
            "layout": "columns path, label (or labels: a|b), split if any; paths under --root",
        },
        {
            "name": "hf:NAME_OR_PATH[:CONFIGURATION]",
            "about": "a dataset of Hugging Face's datasets, from the hub or saved to disk",
            "splits": own,
            "policy": IMAGE_POLICY,
            "layout": "columns image, label",
        },
        {
            "name": "wds:PATH",
            "about": "WebDataset shards: a folder, a .tar file or a pattern",
            "splits": own,
            "policy": IMAGE_POLICY,
            "layout": "SPLIT-000000.tar or SPLIT/000000.tar with KEY.jpg and KEY.cls or KEY.json",
        },
        {
            "name": "parquet:PATH",
            "about": "Parquet files with the bytes of images: a folder, a file or a pattern",
            "splits": own,
            "policy": IMAGE_POLICY,
            "layout": "SPLIT-00000.parquet or SPLIT/00000.parquet with columns image, label",
        },
    ]
    if as_json:
        print_json(known)
        return
    columns = ["name", "about", "splits", "policy", "layout"]
    rows = [[", ".join(t[c]) if c == "splits" else str(t[c]) for c in columns] for t in known]
    print_table(["target", "about", "splits", "default views", "expected under --root"], rows)
