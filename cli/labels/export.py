"""``sskt export``: a label set in a smaller encoding, or a mean of several."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.locations import CACHES, cache_option
from sskt.cli.output import (
    as_json,
    counted,
    error_text,
    human_bytes,
    partly,
    print_json,
    progress,
    resumable,
    show,
)
from sskt.teacher_cache.errors import InputError

if TYPE_CHECKING:
    from sskt.teacher_cache.label_sets.label_set import LabelSet


@click.command(
    "export",
    cls=GroupedCommand,
    groups={
        "New label set": ("cache", "encoding", "out"),
        "Mean of label sets": ("mean", "weights", "over_seeds", "name"),
    },
    examples=(
        "sskt export stl10 --encoding u8 --out small",
        "sskt export --mean resnet50 densenet161 --weights 2,1 --encoding f16 --out labels",
    ),
)
@cache_option(f"Cache of the label sets: {CACHES}.")
@click.argument("label_sets", metavar="SET...", nargs=-1, required=True)
@click.option("--encoding", required=True, metavar="NAME", help="The new encoding.")
@click.option("--out", required=True, help="Cache of the new label set; it may be the same one.")
@click.option(
    "--mean",
    is_flag=True,
    help="Store the mean of the probabilities of several label sets over the same views.",
)
@click.option(
    "--weights",
    metavar="W,...",
    help="Weights of the label sets, in their order. They are divided by their sum. Default: all "
    "alike.",
)
@click.option(
    "--over-seeds",
    is_flag=True,
    help="Average over the view seeds too: every view of a sample gets the mean of the labels of "
    "all its views.",
)
@click.option("--name", metavar="NAME", help="Name of the new set's source. Default: mean.")
@as_json
def export(
    cache: str,
    label_sets: tuple[str, ...],
    encoding: str,
    out: str,
    mean: bool,
    weights: str | None,
    over_seeds: bool,
    name: str | None,
    as_json: bool,
) -> None:
    """Store a label set in a smaller encoding, or the mean of several, without their sources.

    The new set is over the same target and views, and trains like any other. A set in another
    encoding has its error measured against the stored labels; from f32 it is what cache-teachers
    --encoding would have written. A mean (an ensemble of sources) has a source of its own, named
    by --name, and its identity names its parents and weights. Stop it anywhere: the same command
    exports the rest.
    """
    from sskt.teacher_cache.format.encodings import parse_encoding
    from sskt.teacher_cache.tools.export import export_label_set
    from sskt.teacher_cache.tools.mean import NAME, export_mean, mean_of

    given = [option for option, value in (("--weights", weights), ("--name", name)) if value]
    averaged = mean or over_seeds
    if not averaged and (given or len(label_sets) > 1):
        what = given[0] if given else f"{len(label_sets)} label sets"
        raise InputError(f"{what}: that is for a mean; add --mean, or name one label set")
    chosen = [_one(cache, text) for text in label_sets]
    wanted = parse_encoding(encoding, chosen[0].output)
    with resumable("what is exported stays"), progress() as bar:
        if averaged:
            numbers = weights.split(",") if weights else None
            of = mean_of(chosen, numbers, over_seeds=over_seeds)
            done = export_mean(of, wanted, out, name=name or NAME, progress=bar("shards"))
        else:
            done = export_label_set(chosen[0], wanted, out, bar("shards"))
    if as_json:
        origin: dict[str, object] = {"exported_from": chosen[0].digest}
        if averaged:
            origin = {"parents": [s.digest for s in of.parents], "weights": of.weights}
        print_json(dataclasses.asdict(done) | origin)
        return
    said = f"{done.name}: {counted(done.written, 'shard')} written, {done.reused:,} reused"
    show(f"{said}{partly(done.coverage)}")
    if averaged:
        parts = zip(of.parents, of.weights, strict=True)
        views = f", over {of.seeds} view seeds" if of.seeds else ""
        show(f"mean of {', '.join(f'{s.name} ({w:.4g})' for s, w in parts)}{views}")
        show(f"{human_bytes(done.bytes)} as {wanted}")
        show(f"gradient error relative to the mean: {error_text(done.error)}")
        return
    sizes = f"{human_bytes(chosen[0].stored_bytes())} as {chosen[0].encoding}"
    show(f"{sizes}, {human_bytes(done.bytes)} as {wanted}")
    what = "error" if chosen[0].encoding.of_features else "gradient error"
    show(f"{what} relative to the stored labels: {error_text(done.error)}")


def _one(cache: str, text: str) -> LabelSet:
    from sskt.teacher_cache.label_sets.find import choose_sets

    chosen = choose_sets(cache, [text])
    if len(chosen) > 1:
        names = ", ".join(s.name for s in chosen)
        raise InputError(f"{text} fits several label sets ({names}); name one of them")
    return chosen[0]
