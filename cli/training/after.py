"""``sskt evaluate``, ``sskt predict`` and ``sskt export-model``: a network after its training."""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, print_json, progress, show, working

Command = Callable[..., Any]

_RUN = (
    click.argument("run", type=click.Path(path_type=Path)),
    click.option(
        "--checkpoint",
        type=click.Choice(["best", "last"]),
        default="best",
        show_default=True,
        help="Weights: those with the best test metric, or the last ones.",
    ),
    click.option(
        "--model",
        default="",
        metavar="FILE.py:factory",
        help="Code of the network, if the run was trained with a network of your own.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Device: cpu, cuda or cuda:1. auto: cuda if there is one.",
    ),
)


def _of_a_run(command: Command) -> Command:
    for decorate in reversed(_RUN):
        command = decorate(command)
    return command


@click.command(
    "evaluate",
    cls=GroupedCommand,
    examples=("sskt evaluate run", "sskt evaluate run --target ./photos --split val"),
)
@_of_a_run
@click.option("--target", help="Dataset to evaluate on. Default: that of the run.")
@click.option("--split", help="Split to evaluate on. Default: the test split.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the dataset.")
@click.option("--limit", type=click.IntRange(1), help="Number of samples to evaluate.")
@as_json
def evaluate(
    run: Path,
    checkpoint: str,
    model: str,
    device: str,
    target: str | None,
    split: str | None,
    root: Path | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Measure the network of a run on a split of a dataset.

    The dataset must have the classes that the network was trained on, in the same order.
    """
    with working("loading"):
        from sskt.trainer.loop.progress import Hooks
        from sskt.trainer.loop.trained import open_run
        from sskt.trainer.results.groups import METRICS

        network = open_run(run, checkpoint, model=model, device=device)
    with progress() as bar:
        hooks = Hooks(test=bar("evaluation"), load=bar("reading images"))
        found = network.evaluate(target, split, root=root, limit=limit, hooks=hooks)
    if as_json:
        print_json(found)
        return
    metrics = [f"{name} {found[key]:.2f} %" for key, name in METRICS.items() if key in found]
    show(
        f"{', '.join(metrics)}, loss {found['test_loss']:.4f} on {found['samples']:,} samples "
        f"(weights after epoch {network.epoch + 1})"
    )


@click.command(
    "predict",
    cls=GroupedCommand,
    examples=("sskt predict run photo.jpg", "sskt predict run photos/*.jpg --csv > classes.csv"),
)
@_of_a_run
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--top", type=click.IntRange(1), default=5, show_default=True, help="Classes to show."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: file, rank, class, probability.")
@as_json
def predict(
    run: Path,
    checkpoint: str,
    model: str,
    device: str,
    files: tuple[Path, ...],
    top: int,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Classify image files, or clips, with the network of a run.

    FILES are images. For a network of clips they are videos, or folders of frames.
    """
    with working("loading"):
        from sskt.trainer.loop.trained import open_run

        network = open_run(run, checkpoint, model=model, device=device)
    found = []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if as_csv:
        writer.writerow(["file", "rank", "class", "probability"])
    for one in network.predict(files, top=top):
        pairs = list(zip(one.classes, one.probabilities, strict=True))
        if as_json:
            found.append(dataclasses.asdict(one) | {"path": str(one.path)})
        elif as_csv:
            writer.writerows(
                [str(one.path), rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(pairs, 1)
            )
        else:
            show(f"{one.path}: {', '.join(f'{name} {p:.3f}' for name, p in pairs)}")
    if as_json:
        print_json(found)


@click.command(
    "export-model",
    cls=GroupedCommand,
    examples=(
        "sskt export-model run --out network.safetensors",
        "sskt export-model run --out network.pt2",
    ),
)
@_of_a_run
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write: .pt or .safetensors for the weights, .pt2 for a torch.export program.",
)
def export_model(run: Path, checkpoint: str, model: str, device: str, out: Path) -> None:
    """Write the target network of a run for use without sskt, without its auxiliary heads.

    OUT.json beside the file has the class names and the preprocessing.
    """
    with working("loading"):
        from sskt.trainer.loop.trained import open_run

        network = open_run(run, checkpoint, model=model, device=device)
        described = network.export(out)
    show(f"written: {out}, {described}")
