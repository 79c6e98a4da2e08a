"""Options of the commands that look at label sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sskt.cli.locations import cache_option as label_cache_option

cache_option = label_cache_option("Folder or URL (s3://..., http://HOST:PORT) of the label sets.")

sets_argument = click.argument("sets", nargs=-1, metavar="[SET]...")

root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="Folder of the target's data, instead of the recorded one.",
)

target_option = click.option(
    "--target",
    help="Target to open instead of the recorded one; FILE.py:function calls a function that "
    "returns what sskt.open_target returned, as own datasets need it.",
)

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

policy_option = click.option(
    "--policy",
    metavar="FILE.py:function",
    help="The function that made the views, for a set that was made with one.",
)

device_option = click.option(
    "--device", default="cpu", show_default=True, help="Device that recomputes labels."
)

outside_option = click.option(
    "--allow-outside-root",
    is_flag=True,
    help="Accept files outside the folder of a manifest.",
)

_REOPEN = (
    source_option,
    weights_option,
    root_option,
    target_option,
    outside_option,
    frame_sampling_option,
    policy_option,
    device_option,
)
REOPENED = (
    "sources", "weights", "root", "target", "allow_outside_root", "frame_sampling", "policy",
    "device",
)  # fmt: skip
"""The names of the options that ``reopen_options`` adds: the fields of ``Reopen``."""


def reopen_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say what the labels were made from."""
    for option in reversed(_REOPEN):
        command = option(command)
    return command
