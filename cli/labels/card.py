"""``sskt card``: the data card of a label set."""

from __future__ import annotations

from pathlib import Path

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.labels.label_set_options import cache_option
from sskt.cli.output import show
from sskt.teacher_cache.errors import InputError

GROUPS = {
    "Label set": ("cache", "license"),
    "Card": ("form", "url", "out"),
}


@click.command(
    "card",
    cls=GroupedCommand,
    groups=GROUPS,
    examples=(
        "sskt card stl10 --license CC-BY-4.0 --out public/README.md",
        "sskt card stl10 --format croissant --url https://labels.example.org/stl10",
    ),
)
@cache_option
@click.argument("label_set", metavar="SET")
@click.option(
    "--license",
    metavar="SPDX",
    help="Store this licence in the label set first, for example CC-BY-4.0. It is no part of the "
    "identity. Default: the licence that the set has.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["markdown", "croissant"]),
    default="markdown",
    show_default=True,
    help="Markdown with a YAML head, as Hugging Face shows it, or Croissant (JSON-LD).",
)
@click.option("--url", default="", help="Where the set is published, for a Croissant card.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of the card. Default: standard output.",
)
def card(
    cache: str, label_set: str, license: str | None, form: str, url: str, out: Path | None
) -> None:
    """Write the data card of a label set: what it holds, how it was made, its licence.

    SET is a part of its name or the begin of its digest.
    """
    from sskt.teacher_cache.label_sets.find import choose_sets
    from sskt.teacher_cache.tools.card import croissant_card, markdown_card, set_license

    chosen = choose_sets(cache, [label_set])
    if len(chosen) > 1:
        names = ", ".join(s.name for s in chosen)
        raise InputError(f"{label_set} fits several label sets ({names}); name one of them")
    (found,) = chosen
    if license is not None:
        found = set_license(cache, found, license)
    text = markdown_card(found) if form == "markdown" else croissant_card(found, url)
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror}); choose another --out") from error
    show(f"wrote {out}")
