"""``sskt bench``: sskt beside other ways of doing the same, on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, print_json, print_table, show

COLUMNS = ("comparison", "case", "measured")


@click.command(
    "bench",
    cls=GroupedCommand,
    examples=(
        "sskt bench",
        "sskt bench labels images --full --out results",
    ),
)
@click.argument("names", nargs=-1, metavar="[COMPARISON]...")
@click.option("--full", is_flag=True, help="Measure for about an hour instead of two minutes.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for bench.json and the figures. Default: none are written.",
)
@as_json
def bench(names: tuple[str, ...], full: bool, out: Path | None, as_json: bool) -> None:
    """Compare sskt with other ways of doing the same, in turn, on this machine.

    COMPARISON is labels, encodings, images, teacher-stage, delivery, step, scale or server;
    encodings (which needs real images) and server (which needs nginx) run with --full or by name.
    Images are generated unless real ones are found in $SSKT_DATA or $SSKT_TEST_DATA. Read the
    ratios: seconds depend on the machine. Exit status 1 if a comparison failed.
    """
    from sskt.benchmarks.bench import run_comparisons, table

    document = run_comparisons(names, full, lambda line: click.echo(line, err=True))
    if out is not None:
        from sskt.benchmarks.figures import draw

        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(json.dumps(document, indent=2) + "\n")
        for path in draw(document, out):
            show(f"wrote {path}", err=True)
    if as_json:
        print_json(document)
    else:
        machine = document["machine"]
        show(
            f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB, "
            f"{machine['device']}, torch {machine['torch']}, {document['data']}"
        )
        print_table(COLUMNS, table(document))
        for peer, command in document["not_installed"].items():
            show(f"left out: {peer} is not installed; run: {command}")
    if any("failed" in entry for entry in document["comparisons"]):
        sys.exit(1)
