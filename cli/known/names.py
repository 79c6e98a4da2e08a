"""``sskt policies``, ``models``, ``encodings`` and ``recipes``: what is known by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, print_json, print_table


@click.command("policies", cls=GroupedCommand, examples=("sskt policies", "sskt policies --json"))
@as_json
def policies(as_json: bool) -> None:
    """List the view policies, with their parameters and defaults."""
    from sskt.teacher_cache.views.policies import POLICIES, STRONG

    def listed(parameters: Mapping[str, float]) -> str:
        return ", ".join(f"{key}={value:.4g}" for key, value in parameters.items()) or "-"

    _show(
        ("name", "parameters and defaults", "view"),
        [
            [
                name,
                listed(known.defaults | (STRONG if as_json and known.strong else {})),
                known.about,
            ]
            for name, known in POLICIES.items()
        ],
        as_json,
    )
    if not as_json:
        strong = ", ".join(name for name, known in POLICIES.items() if known.strong)
        click.echo(f"\nOff by default, for {strong}: {listed(STRONG)}.")


@click.command("models", cls=GroupedCommand, examples=("sskt models", "sskt models --json"))
@as_json
def models(as_json: bool) -> None:
    """List the target networks.

    torchvision's other classifiers, timm/ARCH (extra timm) and FILE.py:factory work, too.
    """
    from sskt.trainer.models.registry import NETWORKS

    _show(("name", "for"), [[name, about] for name, about in NETWORKS.items()], as_json)


@click.command(
    "encodings", cls=GroupedCommand, examples=("sskt encodings", "sskt encodings --json")
)
@as_json
def encodings(as_json: bool) -> None:
    """List the encodings of soft labels, with the size of a label of 1,000 classes.

    Bytes on disk are those of real labels (docs/explanation/encodings.md has errors and speeds);
    sskt plan measures them for your source and target.
    """
    from sskt.teacher_cache.format.encodings import parse_encoding

    about = {
        "f16": ("float16 log-probabilities (default)", 1370),
        "root4": ("fourth roots of the probabilities, in 16 bits", 920),
        "u8": ("sixth roots of the probabilities, in 8 bits", 680),
        "root4-coarse": ("fourth roots on a coarser grid", 550),
        "topk-100": ("the K largest probabilities, here K = 100; for T = 1 only", 240),
        "f32": ("float32 log-probabilities", 3020),
    }
    _show(
        ("name", "stores", "bytes in memory", "on disk, about"),
        [
            [
                name.replace("topk-100", "topk-K"),
                text,
                str(parse_encoding(name).bytes_per_label(1000)),
                str(on_disk),
            ]
            for name, (text, on_disk) in about.items()
        ],
        as_json,
    )


@click.command("recipes", cls=GroupedCommand, examples=("sskt recipes", "sskt recipes --json"))
@as_json
def recipes(as_json: bool) -> None:
    """List the recipes that ship with sskt, with the command that reads each."""
    from sskt.trainer.recipes import COMMANDS, shipped

    kinds = {command: kind for kind, command in reversed(COMMANDS.items())}
    _show(
        ("name", "command"),
        [
            [name, f"sskt {command} {name}"]
            for command, kind in kinds.items()
            for name in shipped(kind)
        ],
        as_json,
    )


def _show(columns: Sequence[str], rows: Sequence[Sequence[str]], as_json: bool) -> None:
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(columns, rows)
