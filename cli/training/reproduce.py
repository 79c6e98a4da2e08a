"""``sskt reproduce``: a table or figure of the paper, reported beside measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.locations import DEFAULT_LABELS, located_cache
from sskt.cli.output import as_json, print_json, print_table, progress, say, show, working
from sskt.cli.training.reproduce_plan import Training, show_plan
from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.config import INDIFFERENT
from sskt.trainer.paper.select import select_rows
from sskt.trainer.paper.tables import (
    Choices,
    PaperTable,
    Row,
    header,
    parse_settings,
    read_table,
    result_cells,
)

if TYPE_CHECKING:
    from sskt.trainer.config import TrainConfig
    from sskt.trainer.data.label_passes import LabelPass
    from sskt.trainer.paper.table_runs import Bar, Results


FIGURE = "figure.png"


GROUPS = {
    "What to run": ("selectors", "panels", "runs", "epochs", "fraction", "seeds", "dry_run"),
    "Settings": ("kd", "focal_schedule", "given_settings"),
    "Sources and labels": ("given_sources", "weights", "preprocessing", "cache", "encoding"),
    "Data and device": ("roots", "download", "device", "out"),
}


@click.command(
    "reproduce",
    cls=GroupedCommand,
    groups=GROUPS,
    examples=(
        "sskt reproduce table3 --dry-run",
        "sskt reproduce figure2 --panel 3 --runs 1",
    ),
)
@click.argument("table")
@click.option(
    "--row",
    "selectors",
    multiple=True,
    metavar="N|N-M|NAME",
    help="Rows to run: number, range, name or shell pattern. Repeat. --dry-run lists them.",
)
@click.option(
    "--panel",
    "panels",
    multiple=True,
    metavar="N|N-M|NAME",
    help="Graphs of a figure to run: number, range, name or shell pattern. Repeat.",
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    help="Trainings of each row, with training seeds 0 .. N-1; default: 3 where the paper reports "
    "a deviation or draws error bars, else 1.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    help="Epochs of each training. Default: those of the recipe.",
)
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help="Part of the training split to train on, spread evenly.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    help="View seeds to cache and cycle through; default: the recipe's 10.",
)
@click.option(
    "--kd",
    type=click.Choice(["released", "meant"]),
    default="released",
    show_default=True,
    help="CE+KD: divided by batch and classes as in the released code, or by the batch.",
)
@click.option(
    "--focal-schedule",
    type=click.Choice(["multistep", "cosine"]),
    default="multistep",
    show_default=True,
    help="Learning rate of SSKT with a focal loss: the steps of the other rows, or the cosine that "
    "the authors may have used for the rows (F) of table 9.",
)
@click.option(
    "--source",
    "given_sources",
    multiple=True,
    metavar="LETTER=NAME[:ARCH][@SIZE]",
    help="Source for a letter of the table, such as I=imagenet:efficientnet_lite0@74. Repeat.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="LETTER=FILE",
    help="Weights of a source's architecture, or those that rows start from (K). Repeat.",
)
@click.option(
    "--preprocessing",
    multiple=True,
    metavar="LETTER:key=value,...",
    help="Preprocessing of a source: size, mean=a/b/c, std, channels=bgr and scale. Repeat.",
)
@click.option(
    "--set",
    "given_settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another option of sskt train for all rows, such as batch_size=64. Repeat.",
)
@click.option(
    "--root", "roots", multiple=True, metavar="[TARGET=]DIR", help="Folder of a target's data."
)
@click.option("--download", is_flag=True, help="Let torchvision download the targets.")
@click.option("--cache", help=f"Folder or URL of the label sets. {DEFAULT_LABELS}")
@click.option(
    "--encoding",
    default="f16",
    show_default=True,
    help="Encoding of labels that are not cached yet.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/reproduce"),
    show_default=True,
    help="Folder of the results: OUT/TABLE/ROW/seed-K and OUT/TABLE/results.json.",
)
@click.option(
    "--device", default="auto", show_default=True, help="Device of labelling and training."
)
@click.option("--dry-run", is_flag=True, help="Show what would be cached and trained, and stop.")
@as_json
def reproduce(
    table: str,
    selectors: tuple[str, ...],
    panels: tuple[str, ...],
    runs: int | None,
    epochs: int | None,
    fraction: float | None,
    seeds: int | None,
    kd: str,
    focal_schedule: str,
    given_sources: tuple[str, ...],
    weights: tuple[str, ...],
    preprocessing: tuple[str, ...],
    given_settings: tuple[str, ...],
    roots: tuple[str, ...],
    download: bool,
    cache: str | None,
    encoding: str,
    out: Path,
    device: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a table of the paper: cache its labels, train its rows, print reported and measured.

    TABLE is table1 .. table9, figure2, or a .toml file of that form. Finished labels and trainings
    are reused: the same command continues a run that was cut. The points of figure2 are its rows,
    and OUT/figure2/figure.png draws the paper's curves beside the measured ones.
    """
    sources = _pairs(given_sources, "--source")
    paper = read_table(table).with_sources(sources)
    rows = select_rows(paper, selectors, panels)
    files = _files(paper, _pairs(weights, "--weights"))
    shown = _pairs(preprocessing, "--preprocessing", ":")
    for letter, how in shown.items():
        if letter not in paper.letters():
            known = ", ".join(paper.letters())
            raise InputError(f"--preprocessing {letter}:{how}: {paper.name} has {known}")
    fraction = None if fraction == 1 else fraction
    settings = parse_settings(given_settings) | ({"download": True} if download else {})
    _require_focal(paper, focal_schedule, settings)
    needed = _placeholders(paper) if dry_run else {}
    given = settings, _roots(roots), needed | files
    choices = Choices(epochs, seeds, kd, *given, focal_schedule)
    cache = located_cache(cache, make=True)
    trainings = [
        Training(row, choices.config(paper, row, **_place(row, cache, out, paper, device, seed)))
        for seed in range(max(runs or paper.runs_of(row) for row in rows))
        for row in rows
        if seed < (runs or paper.runs_of(row))
    ]
    if dry_run:
        show_plan(paper, trainings, fraction, encoding, cache, as_json)
        return
    from sskt.trainer.paper.table_runs import RESULTS_TEXT, Results

    own = {k: v for k, v in settings.items() if k not in INDIFFERENT}
    changes: dict[str, Any] = {"epochs": epochs, "fraction": fraction, "seeds": seeds}
    changes |= {"kd": kd if kd != "released" else None, "sources": sources, "set": own}
    changes |= {"focal_schedule": focal_schedule if focal_schedule != "multistep" else None}
    changes |= {"preprocessing": shown}
    changed = {k: v for k, v in changes.items() if v not in (None, {})}
    results = Results(out / paper.name, paper, changed)
    try:
        by_source = _by_source(paper, files), _by_source(paper, shown)
        _run(trainings, fraction, encoding, cache, *by_source, results)
    except KeyboardInterrupt:
        if results.measured:
            _draw(rows, results)
        raise KeyboardInterrupt(
            "labels, finished runs and epochs are kept; the same command continues"
        ) from None
    figure_file = _draw(rows, results)
    if as_json:
        print_json(results.as_dict())
        return
    print_table(header(paper), result_cells(rows, results.measured))
    show(f"\nof {paper.name}: {paper.title}; accuracies in %; mean ± deviation over runs")
    for line in (*paper.notes, *results.changes()):
        show(line)
    show(f"written: {', '.join(map(str, [results.folder / RESULTS_TEXT, *figure_file]))}")


def _pairs(items: Sequence[str], option: str, mark: str = "=") -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in items:
        key, found, value = item.partition(mark)
        if not found or not key or not value:
            raise InputError(f"{option} {item}: expected LETTER{mark}...")
        if key in pairs:
            raise InputError(f"{option} gives {key} twice: {pairs[key]} and {value}; keep one")
        pairs[key] = value
    return pairs


def _roots(items: Sequence[str]) -> dict[str, Path]:
    from sskt.teacher_cache.targets.registry import TARGETS

    roots = {}
    for item in items:
        target, equals, folder = item.partition("=")
        if equals and "/" not in target and target not in TARGETS and not Path(item).exists():
            raise UnknownName("target in --root", target, TARGETS, "a folder alone is for all")
        roots[target if equals and target in TARGETS else ""] = Path(
            folder if equals and target in TARGETS else item
        )
    return roots


def _files(table: PaperTable, given: dict[str, str]) -> dict[str, str]:
    known = [*table.letters(), *table.needs]
    for letter, file in given.items():
        if letter not in known:
            raise InputError(f"--weights {letter}={file}: {table.name} has {', '.join(known)}")
        if not Path(file).is_file():
            raise InputError(f"--weights {letter}={file}: no such file")
    return given


def _placeholders(table: PaperTable) -> dict[str, str]:
    return {letter: f"({letter}: {get})" for letter, get in table.needs.items()}


def _by_source(table: PaperTable, given: dict[str, str]) -> dict[str, str]:
    return {
        names[letter]: value
        for names in table.sources.values()
        for letter, value in given.items()
        if letter in names
    }


def _require_focal(table: PaperTable, schedule: str, settings: dict[str, Any]) -> None:
    if schedule == "multistep":
        return
    if not any(row.focal for row in table.rows):
        raise InputError(
            f"--focal-schedule {schedule}: {table.name} has no rows with a focal loss; use "
            f"--set schedule={schedule} for all of its rows"
        )
    if "schedule" in settings:
        raise InputError("--focal-schedule and --set schedule both choose one; leave one out")


def _draw(rows: Sequence[Row], results: Results) -> list[Path]:
    """Draws the panels of a figure that have rows here; the path of the image, if there is one."""
    shown = dict.fromkeys(row.panel for row in rows if row.panel)
    if not shown:
        return []
    from sskt.trainer.paper.figures import panel_graphs
    from sskt.trainer.results.plots import draw_sweep

    figure_file = results.folder / FIGURE
    points = [row for row in results.table.rows if row.panel in shown]
    try:
        draw_sweep(
            panel_graphs(points, results.measured), figure_file, columns=min(6, 2 * len(shown))
        )
    except OSError as error:
        raise InputError(f"cannot write {figure_file}: {error.strerror}") from error
    return [figure_file]


def _place(
    row: Row, cache: str, out: Path, table: PaperTable, device: str, seed: int
) -> dict[str, Any]:
    folder = out / table.name / row.name / f"seed-{seed}"
    return {"cache": cache, "out": folder, "device": device, "seed": seed}


def _run(
    trainings: Sequence[Training],
    fraction: float | None,
    encoding: str,
    cache: str,
    weights: dict[str, str],
    preprocessing: dict[str, str],
    results: Results,
) -> None:
    from sskt.trainer.data.label_passes import label_passes, views_key
    from sskt.trainer.paper import table_runs
    from sskt.trainer.paper.table_runs import by_name

    with progress() as bar:
        configs = [t.config for t in trainings]
        if fraction is not None:
            configs = _limited(configs, fraction, bar)
        for config in {(c.target, c.root): c for c in configs}.values():
            table_runs.require_test_split(config, bar)
        table_runs.require_networks(configs)
        digests: dict[tuple[Any, ...], dict[str, str]] = {}
        for wanted in label_passes(configs):
            say(f"labels: {_pass_text(wanted)}")
            found = table_runs.cache_labels(wanted, cache, encoding, weights, preprocessing, bar)
            digests.setdefault(views_key(wanted.config), {}).update(found)
    for training, config in zip(trainings, configs, strict=True):
        if config.source and config.live:
            files = by_name(config.source, weights, "=")
            how = [*config.preprocessing, *by_name(config.source, preprocessing, ":")]
            config = dataclasses.replace(config, weights=files, preprocessing=how)
        elif config.source:
            config = table_runs.pinned(config, digests[views_key(config)])
        results.add(training.row, config.seed, _train(training.row, config))


def _limited(configs: Sequence[TrainConfig], fraction: float, bar: Bar) -> list[TrainConfig]:
    from sskt.trainer.paper.table_runs import limited

    limits: dict[tuple[str, str], int | None] = {}
    for config in configs:
        key = (config.target, config.split)
        if key not in limits:
            limits[key] = limited(config, fraction, bar).limit
    return [dataclasses.replace(c, limit=limits[c.target, c.split]) for c in configs]


def _train(row: Row, config: TrainConfig) -> float:
    with working("loading"):
        from sskt.cli.training.training_output import hooks_of
        from sskt.trainer.loop.runs import open_live_sources, run_training
        from sskt.trainer.models.pretrained import input_scale_of
        from sskt.trainer.results.groups import result_of
    show(f"row {row.number}, {row.name}: {config.out}", err=True)
    if config.init:
        scale, reason = input_scale_of(config.input_scale, config.init)
        show(f"input scale: {scale} ({reason})", err=True)
    with progress() as bar:
        hooks = hooks_of(config, bar, name=row.name)
        return result_of(run_training(config, hooks, open_live_sources(config)))


def _pass_text(wanted: LabelPass) -> str:
    sources, target = ", ".join(wanted.sources), wanted.config.target
    split = f"{target} {wanted.config.split}"
    return f"{sources} over {split}, view seeds 0 .. {wanted.seeds - 1}"
