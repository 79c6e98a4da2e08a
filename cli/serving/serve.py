"""``sskt serve``: the label server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.labels.label_set_options import (
    frame_sampling_option,
    outside_option,
    policy_option,
    source_option,
    weights_option,
)
from sskt.cli.locations import DEFAULT_WRITABLE, located_cache

GROUPS = {
    "Labels": ("cache", "root", "allow_outside_root"),
    "Computing on demand": (
        "on_demand",
        "sources",
        "weights",
        "frame_sampling",
        "policy",
        "device",
    ),
    "Network": ("host", "port", "token_file", "allowed_hosts", "cors"),
    "Capacity": (
        "workers",
        "memory",
        "queue",
        "max_requests",
        "max_requests_each",
        "max_ids",
        "max_seeds",
        "max_bytes",
    ),
    "Log": ("log",),
}


@click.command(
    "serve",
    cls=GroupedCommand,
    groups=GROUPS,
    examples=(
        "sskt serve",
        "sskt serve --token-file tokens.json --host 0.0.0.0 --workers 2",
    ),
)
@click.option("--cache", help=f"Folder or URL (s3://...) of the label sets. {DEFAULT_WRITABLE}")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Any but a loopback address requires --token-file.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on. 0: a free one.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Number of worker processes.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="Token file (made by sskt token new). Required unless --host is a loopback address.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Name by which clients may address the server, besides localhost; repeatable. "
    "Default: any name with --token-file, none without.",
)
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin, such as https://viewer.example.org, read the labels in a "
    "browser; repeatable. Default: no other origin.",
)
@click.option(
    "--on-demand", is_flag=True, help="Compute missing shards when a client asks for them."
)
@source_option
@weights_option
@frame_sampling_option
@policy_option
@outside_option
@click.option(
    "--device", default="auto", show_default=True, help="Device that --on-demand computes on."
)
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="Folder of the targets' data, to compute labels and to show samples.",
)
@click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="GiB of decoded labels that are kept for batches; each worker has an equal part.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Shards that may wait to be computed; further requests are answered 503.",
)
@click.option(
    "--max-seeds",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="View seeds to which a request may let a label set grow (--on-demand).",
)
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests that a worker answers at once; further ones are answered 503.",
)
@click.option(
    "--max-requests-each",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Requests at once of one client (token and address); further ones are answered 429.",
)
@click.option(
    "--max-ids", type=click.IntRange(1), default=65536, show_default=True, help="Rows of one batch."
)
@click.option(
    "--log-format",
    "--log",
    "log",
    type=click.Choice(["auto", "json", "text"]),
    default="auto",
    show_default=True,
    help="Format of the log on standard error. auto: text on a terminal, JSON elsewhere.",
)
def serve(
    cache: str | None,
    token_file: Path | None,
    weights: Path | None,
    allowed_hosts: tuple[str, ...],
    root: Path | None,
    log: str,
    **given: Any,
) -> None:
    """Serve the label sets of a cache, read-only, to any number of trainings.

    Trainings read them with sskt train --labels http://HOST:PORT. A browser shows the status page
    at /.
    """
    cache = located_cache(cache, writable=True)
    from sskt.server import run as serving
    from sskt.server.settings import Settings

    settings = Settings(
        run="",
        cache=cache,
        token_file=str(token_file.resolve()) if token_file else None,
        root=str(root.resolve()) if root else None,
        weights=str(weights.resolve()) if weights else None,
        allowed_hosts=tuple(name.lower() for name in allowed_hosts),
        log=("text" if sys.stderr.isatty() else "json") if log == "auto" else log,
        **given,
    )

    def ready(address: str) -> None:
        who = f"tokens in {token_file}" if token_file else "no token file: from this machine only"
        click.echo(f"serving {settings.cache} at {address} ({who}); Ctrl-C stops", err=True)

    serving.serve(settings, ready)
