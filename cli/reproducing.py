"""``sskt reproduce``: a table of the paper, reported beside measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.output import as_json, human_bytes, print_json, print_table, progress, say, working
from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.config import INDIFFERENT
from sskt.trainer.tables import (
    COLUMNS,
    Choices,
    PaperTable,
    Row,
    parse_settings,
    read_table,
    result_cells,
    select_rows,
)

if TYPE_CHECKING:
    from sskt.trainer.config import TrainConfig
    from sskt.trainer.table_runs import Bar, LabelPass, Results


@dataclasses.dataclass(frozen=True)
class _Training:
    """One training of one row."""

    row: Row
    config: TrainConfig


@click.command("reproduce")
@click.argument("table")
@click.option(
    "--row",
    "selectors",
    multiple=True,
    metavar="N|N-M|NAME",
    help="Only these rows: number, range, or name (with *); repeat. --dry-run lists them.",
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    help="Trainings of each row, with training seeds 0 .. N-1; default: 3 where the paper reports "
    "a deviation, else 1.",
)
@click.option("--epochs", type=click.IntRange(1), help="Instead of the recipe's.")
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help="Train on this part of the training split, evenly spread.",
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
    "--source",
    "given_sources",
    multiple=True,
    metavar="LETTER=NAME[:ARCH][@SIZE]",
    help="Another source for a letter of the table, e.g. I=imagenet:efficientnet_lite0@74; repeat.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="LETTER=FILE",
    help="Weights of a source's architecture, or those that rows start from (K); repeat.",
)
@click.option(
    "--preprocessing",
    multiple=True,
    metavar="LETTER:key=value,...",
    help="Override size, mean=a/b/c, std, channels=bgr, scale of a source; repeat.",
)
@click.option(
    "--set",
    "given_settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other field of sskt train, for all rows, e.g. batch_size=64; repeat.",
)
@click.option(
    "--root", "roots", multiple=True, metavar="[TARGET=]DIR", help="Where a target's data lives."
)
@click.option("--download", is_flag=True, help="Let torchvision download the targets.")
@click.option("--cache", help="Label sets: a folder or URL; default: OUT/cache.")
@click.option("--encoding", default="f16", show_default=True, help="Of labels not yet cached.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/reproduce"),
    show_default=True,
    help="Runs go to OUT/TABLE/ROW/seed-K, results to OUT/TABLE/results.json and .md.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--dry-run", is_flag=True, help="Show what would be cached and trained, and stop.")
@as_json
def reproduce(
    table: str,
    selectors: tuple[str, ...],
    runs: int | None,
    epochs: int | None,
    fraction: float | None,
    seeds: int | None,
    kd: str,
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

    TABLE is table1 .. table9, or a .toml file of that form. What is there already is kept:
    the same command continues a run that was cut.
    """
    sources = _pairs(given_sources, "--source")
    paper = read_table(table).with_sources(sources)
    rows = select_rows(paper, selectors)
    files = _files(paper, _pairs(weights, "--weights"))
    shown = _pairs(preprocessing, "--preprocessing", ":")
    for letter, how in shown.items():
        if letter not in paper.letters():
            known = ", ".join(paper.letters())
            raise InputError(f"--preprocessing {letter}:{how}: {paper.name} has {known}")
    fraction = None if fraction == 1 else fraction
    settings = parse_settings(given_settings) | ({"download": True} if download else {})
    needed = _placeholders(paper) if dry_run else {}
    choices = Choices(epochs, seeds, kd, settings, _roots(roots), needed | files)
    cache = cache or str(out / "cache")
    trainings = [
        _Training(row, choices.config(paper, row, **_place(row, cache, out, paper, device, seed)))
        for seed in range(max(_runs_of(row, runs) for row in rows))
        for row in rows
        if seed < _runs_of(row, runs)
    ]
    if dry_run:
        _dry_run(paper, trainings, fraction, encoding, cache, as_json)
        return
    from sskt.trainer.table_runs import RESULTS_TEXT, Results

    own = {k: v for k, v in settings.items() if k not in INDIFFERENT}
    changes: dict[str, Any] = {"epochs": epochs, "fraction": fraction, "seeds": seeds}
    changes |= {"kd": kd if kd != "released" else None, "sources": sources, "set": own}
    changes |= {"preprocessing": shown}
    changed = {k: v for k, v in changes.items() if v not in (None, {})}
    results = Results(out / paper.name, paper, changed)
    try:
        by_source = _by_source(paper, files), _by_source(paper, shown)
        _run(trainings, fraction, encoding, cache, *by_source, results)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "labels, finished runs and epochs are kept; the same command continues"
        ) from None
    if as_json:
        print_json(results.as_dict())
        return
    print_table(COLUMNS, result_cells(rows, results.measured))
    click.echo(f"\nof {paper.name}: {paper.title}; accuracies in %; mean ± deviation over runs")
    for line in results.changes():
        click.echo(line)
    click.echo(f"written: {results.folder / RESULTS_TEXT}")


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
    from sskt.teacher_cache.targets import TARGETS

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


def _runs_of(row: Row, runs: int | None) -> int:
    return runs or (1 if row.reported_std is None else 3)


def _place(
    row: Row, cache: str, out: Path, table: PaperTable, device: str, seed: int
) -> dict[str, Any]:
    folder = out / table.name / row.name / f"seed-{seed}"
    return {"cache": cache, "out": folder, "device": device, "seed": seed}


def _run(
    trainings: Sequence[_Training],
    fraction: float | None,
    encoding: str,
    cache: str,
    weights: dict[str, str],
    preprocessing: dict[str, str],
    results: Results,
) -> None:
    from sskt.trainer import table_runs
    from sskt.trainer.table_runs import by_name

    with progress() as bar:
        configs = [t.config for t in trainings]
        if fraction is not None:
            configs = _limited(configs, fraction, bar)
        for config in {(c.target, c.root): c for c in configs}.values():
            table_runs.require_test_split(config, bar)
        table_runs.require_networks(configs)
        digests: dict[tuple[Any, ...], dict[str, str]] = {}
        for wanted in table_runs.label_passes(configs):
            say(f"labels: {_pass_text(wanted)}")
            found = table_runs.cache_labels(wanted, cache, encoding, weights, preprocessing, bar)
            digests.setdefault(table_runs.views_key(wanted.config), {}).update(found)
    for training, config in zip(trainings, configs, strict=True):
        if config.source and config.live:
            files = by_name(config.source, weights, "=")
            how = [*config.preprocessing, *by_name(config.source, preprocessing, ":")]
            config = dataclasses.replace(config, weights=files, preprocessing=how)
        elif config.source:
            config = table_runs.pinned(config, digests[table_runs.views_key(config)])
        results.add(training.row, config.seed, _train(training.row, config))


def _limited(configs: Sequence[TrainConfig], fraction: float, bar: Bar) -> list[TrainConfig]:
    from sskt.trainer.table_runs import limited

    limits: dict[tuple[str, str], int | None] = {}
    for config in configs:
        key = (config.target, config.split)
        if key not in limits:
            limits[key] = limited(config, fraction, bar).limit
    return [dataclasses.replace(c, limit=limits[c.target, c.split]) for c in configs]


def _train(row: Row, config: TrainConfig) -> float:
    with working("loading"):
        from sskt.cli.following import hooks_of
        from sskt.trainer.initial import input_scale_of
        from sskt.trainer.runs import open_live_sources, run_training
        from sskt.trainer.summary import result_of
    click.echo(f"row {row.number}, {row.name}: {config.out}", err=True)
    if config.init:
        scale, reason = input_scale_of(config.input_scale, config.init)
        click.echo(f"input scale: {scale} ({reason})", err=True)
    with progress() as bar:
        hooks = hooks_of(config, bar, name=row.name)
        return result_of(run_training(config, hooks, open_live_sources(config)))


def _pass_text(wanted: LabelPass) -> str:
    sources, target = ", ".join(wanted.sources), wanted.config.target
    split = f"{target} {wanted.config.split}"
    return f"{sources} over {split}, view seeds 0 .. {wanted.seeds - 1}"


def _dry_run(
    table: PaperTable,
    trainings: Sequence[_Training],
    fraction: float | None,
    encoding: str,
    cache: str,
    as_json: bool,
) -> None:
    """Without opening data: what is there already is not looked up."""
    from sskt.teacher_cache.source_names import parse_source
    from sskt.trainer.table_runs import label_bytes, label_passes

    sets: list[dict[str, Any]] = []
    for wanted in label_passes([t.config for t in trainings]):
        samples = wanted.samples
        if samples and fraction is not None:
            samples = max(1, round(fraction * samples))
        for text in wanted.sources:
            parse_source(text)
            size = label_bytes(text, samples, wanted.seeds, encoding)
            sets.append(
                {
                    "source": text,
                    "target": wanted.config.target,
                    "split": wanted.config.split,
                    "samples": samples,
                    "seeds": wanted.seeds,
                    "bytes": size,
                }
            )
    runs = [
        {
            "row": t.row.number,
            "name": t.row.name,
            "seed": t.config.seed,
            "reported": t.row.reported,
            "config": t.config.as_dict(),
        }
        for t in trainings
    ]
    if as_json:
        print_json({"table": table.name, "cache": cache, "label_sets": sets, "trainings": runs})
        return
    click.echo(f"{table.name}: {table.title}\n\nlabel sets in {cache}, where not there already")
    rows = [
        [s["source"], s["target"] + ("" if s["split"] == "train" else f" {s['split']}")]
        + [str(s[k] or "?") for k in ("samples", "seeds")]
        for s in sets
    ]
    sizes = [human_bytes(s["bytes"]) if s["bytes"] else "?" for s in sets]
    columns = ["source", "target", "samples", "view seeds", f"{encoding}, at most"]
    print_table(columns, [[*row, size] for row, size in zip(rows, sizes, strict=True)])
    click.echo(f"\ntrainings: {len(runs)}")
    lines = []
    for row in dict.fromkeys(t.row.number for t in trainings):
        of_row = [t for t in trainings if t.row.number == row]
        first = of_row[0]
        lines.append(
            [
                str(row),
                first.row.name,
                first.config.target,
                str(first.config.epochs),
                str(len(of_row)),
                f"{first.row.reported:.2f}",
            ]
        )
    print_table(["row", "name", "target", "epochs", "runs", "reported"], lines)
    for letter, get in table.needs.items():
        if any(t.row.fields.get("init") == letter for t in trainings):
            click.echo(f"\nneeds --weights {letter}=FILE: {get}")
