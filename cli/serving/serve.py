"""``sskt serve``: one label store for a whole cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.locations import DEFAULT_WRITABLE, located_cache

GROUPS = {
    "Labels": ("cache", "root", "on_demand", "device"),
    "Network": ("host", "port", "token_file", "allowed_host", "allowed_hosts"),
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
    help="Address to listen on; any but this machine's own needs --token-file.",
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
    help="Who may read (sskt token new makes it); without one, only this machine.",
)
@click.option(
    "--on-demand", is_flag=True, help="Compute a missing shard when a client asks for it."
)
@click.option("--device", default="auto", show_default=True, help="Device of --on-demand.")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="Where the targets' data lies now (to compute, and to show samples).",
)
@click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="GiB for decoded labels of batches, an equal part for each worker.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Shards that may wait to be computed; more are told to come back.",
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
    help="Requests that a worker answers at once; more are told to come back.",
)
@click.option(
    "--max-requests-each",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Of these, for one client (a token from one address).",
)
@click.option(
    "--max-ids",
    type=click.IntRange(1),
    default=65536,
    show_default=True,
    help="Ids that a batch request may name.",
)
@click.option(
    "--log",
    type=click.Choice(["json", "text"]),
    default="json",
    show_default=True,
    help="Lines on standard error.",
)
def serve(cache: str | None, token_file: Path | None, root: Path | None, **given: Any) -> None:
    """Serve the label sets of a cache, read-only, to any number of trainings.

    Trainings read them with sskt train --labels http://HOST:PORT, people with a browser at /.
    """
    cache = located_cache(cache, writable=True)
    from sskt.server import run as serving
    from sskt.server.settings import Settings

    settings = Settings(
        run="",
        cache=cache,
        token_file=str(token_file.resolve()) if token_file else None,
        root=str(root.resolve()) if root else None,
        **given,
    )

    def ready(address: str) -> None:
        who = f"tokens in {token_file}" if token_file else "no token file: this machine only"
        click.echo(f"serving {settings.cache} at {address} ({who}); Ctrl-C stops", err=True)

    serving.serve(settings, ready)
