"""Options of the commands that look at label sets."""

from __future__ import annotations

from pathlib import Path

import click

from sskt.cli.locations import cache_option as label_cache_option

cache_option = label_cache_option("Folder or URL (s3://..., http://HOST:PORT) of the label sets.")

sets_argument = click.argument("sets", nargs=-1, metavar="[SET]...")

root_option = click.option(
    "--root", type=click.Path(path_type=Path), help="Where the target's data lives now."
)

target_option = click.option(
    "--target",
    help="Target to open instead of the recorded one; FILE.py:function calls a function that "
    "returns what sskt.open_target returned, as own datasets need it.",
)

REOPENED = ("target", "root", "sources", "weights", "frame_sampling", "device")
"""The options that say what the labels were made from."""

source_option = click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME=FILE.py:function",
    help="How to open the source NAME. Required where it is code: code that a label set names is "
    "not run, and FILE only if it is the one that made the labels. Repeat for several sources.",
)

weights_option = click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Weights of a known architecture if the labels were made with own ones: the file, or a "
    "folder that contains it.",
)

frame_sampling_option = click.option(
    "--frame-sampling",
    "--f-s",
    "frame_sampling",
    metavar="FILE.py:function",
    help="The function that chose the stills of clips, for a set that was made with one.",
)

device_option = click.option(
    "--device", default="cpu", show_default=True, help="Device that recomputes labels."
)
