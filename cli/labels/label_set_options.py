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

target_option = click.option("--target", help="Target to open instead of the recorded one.")

device_option = click.option(
    "--device", default="cpu", show_default=True, help="Device that recomputes labels."
)
