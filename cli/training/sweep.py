"""``sskt sweep``: trainings over temperature and alpha, drawn as in figure 2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.output import as_json, print_json, print_table, progress, say, show, working
from sskt.cli.training.train import GROUPS, all_options
from sskt.cli.training.training_output import hooks_of
from sskt.teacher_cache.errors import (
    IncompleteLabels,
    InputError,
    MissingData,
    SpecMismatch,
    SsktError,
)

if TYPE_CHECKING:
    from sskt.teacher_cache.sources.source import Source
    from sskt.trainer.config import TrainConfig
    from sskt.trainer.paper.sweep import Outcomes, Sweep
    from sskt.trainer.results.plots import Graph

RESULTS, FIGURE = "results.json", "figure.png"
SWEEP_GROUPS = {
    "Sweep": ("temperatures", "alphas", "runs", "with_scratch", "only", "over", "png"),
    **GROUPS,
}


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    try:
        return value and tuple(dict.fromkeys(float(part) for part in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"'{value}' is no list of numbers, e.g. 1,2,5") from None


@click.command(
    "sweep",
    cls=GroupedCommand,
    groups=SWEEP_GROUPS,
    examples=(
        "sskt sweep --target stl10 --source imagenet --temperatures 1,3,5 --alphas 0.1,1",
        "sskt sweep my-sweep.toml --runs 3 --dry-run",
    ),
)
@click.argument("recipe", required=False)
@click.option(
    "--temperatures",
    metavar="T,...",
    callback=_numbers,
    help="Temperatures T. Default: those of the recipe, or 1,2,3,4,5.",
)
@click.option(
    "--alphas",
    metavar="ALPHA,...",
    callback=_numbers,
    help="Values of alpha. Default: those of the recipe, or 0.1,0.5,1.",
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Trainings of each point, with seeds 0 to N - 1.",
)
@click.option(
    "--with-scratch", is_flag=True, help="Train from scratch, too, and draw the result as a level."
)
@click.option(
    "--panel",
    "only",
    multiple=True,
    type=int,
    help="Graph of the recipe to run, by number. Repeat.",
)
@click.option(
    "--over",
    type=click.Choice(["alpha", "temperature"]),
    default="temperature",
    show_default=True,
    help="Axis of the graphs; each value of the other is a line.",
)
@click.option(
    "--png", type=click.Path(path_type=Path), help=f"File of the figure. Default: OUT/{FIGURE}."
)
@click.option(
    "--dry-run", is_flag=True, help="Show the points and the number of trainings, and stop."
)
@as_json
@all_options
def sweep(
    recipe: str | None,
    temperatures: tuple[float, ...] | None,
    alphas: tuple[float, ...] | None,
    runs: int,
    with_scratch: bool,
    only: tuple[int, ...],
    over: str,
    png: Path | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train at every pair of temperature and alpha, and draw it as the paper's figure 2.

    The options of sskt train say what is trained; RECIPE (a TOML file with [sweep] and [[panel]])
    gives them for several graphs, and options win over it. Labels must be cached: where some are
    missing, the message has the command that makes them. The paper's own figure is
    sskt reproduce figure2.
    Finished trainings are reused, and an interrupted one is resumed by the same command.
    """
    import dataclasses

    from sskt.trainer.paper.sweep import Figure, plan_sweep, read_figure

    options: dict[str, Any] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v not in (None, ())
    }
    figure = read_figure(recipe) if recipe else Figure()
    figure = dataclasses.replace(
        figure,
        temperatures=temperatures or figure.temperatures,
        alphas=alphas or figure.alphas,
    )
    out = options.pop("out", None) or Path("runs") / f"sweep-{Path(recipe or 'own').stem}"
    planned = plan_sweep(figure, options, out, runs=runs, scratch=with_scratch, only=only)
    if dry_run:
        _dry_run(planned, as_json)
        return
    with working("opening targets and labels"):
        _check(planned)
    outcomes = _train(planned, out)
    figure_file = png or out / FIGURE
    from sskt.trainer.paper.sweep import as_dict
    from sskt.trainer.results.plots import draw_sweep

    try:
        draw_sweep(_graphs(planned, outcomes, over), figure_file)
    except OSError as error:
        raise InputError(f"cannot write {figure_file}: {error.strerror}") from error
    if as_json:
        print_json(as_dict(planned, outcomes))
    else:
        _print(planned, outcomes)
    show(f"results: {out / RESULTS}, figure: {figure_file}", err=True)
    if outcomes.failures:
        names = [f"{planned.trainings[i]}: {said}" for i, said in outcomes.failures.items()]
        total = len(planned.trainings)
        raise SsktError(f"{len(names)} of {total} trainings failed ({'; '.join(names)})")


sweep.params = [p for p in sweep.params if p.name not in ("temperature", "alpha")]
for _parameter in sweep.params:
    if isinstance(_parameter, click.Option) and _parameter.name == "out":
        _parameter.help = (
            f"Folder of {RESULTS}, {FIGURE} and the trainings. Default: runs/sweep-RECIPE."
        )


def _check(planned: Sweep) -> None:
    """Opens every panel's target, labels and network: what is wrong must not show after a night."""
    from sskt.trainer.data.label_passes import cache_command, label_passes
    from sskt.trainer.loop.setup import make_plan
    from sskt.trainer.paper.table_runs import lacking_labels

    lacking: dict[str, TrainConfig] = {}
    for i, panel in enumerate(planned.panels):
        # The hottest point: labels that are stored in part are refused at T other than 1.
        hottest = max(
            (t for t in planned.trainings if t.panel == i), key=lambda t: t.temperature or 0
        )
        try:
            plan = make_plan(hottest.config)
            for sentence in plan.lossy_labels():
                show(f"{panel.title}: {sentence}", err=True)
            if not hottest.config.live:
                plan.build()
        except InputError as error:
            lacks = None
            if isinstance(error, MissingData | SpecMismatch | IncompleteLabels):
                lacks = lacking_labels(hottest.config)
            if lacks is None:
                raise InputError(f"{panel.title}: {error}") from error
            lacking[f"{panel.title}: {error}"] = lacks
    if lacking:
        commands = " && ".join(map(cache_command, label_passes(list(lacking.values()))))
        raise MissingData(f"{next(iter(lacking))}; commands for all missing labels: {commands}")


def _train(planned: Sweep, out: Path) -> Outcomes:
    """Trains what has no result yet; results.json is written after each training."""
    from sskt.trainer.loop.runs import open_live_sources, run_training
    from sskt.trainer.paper.sweep import Outcomes
    from sskt.trainer.results.groups import main_metric, result_of

    outcomes, total = Outcomes(), len(planned.trainings)
    live: list[Source] = []
    opened = -1
    with progress() as bar:
        overall = bar("trainings")
        for i, training in enumerate(planned.trainings):
            overall(i, total)
            title = planned.panels[training.panel].title
            try:
                if opened != training.panel:
                    live = open_live_sources(planned.panels[training.panel].config)
                    opened = training.panel
                own = live if training.config.source else []
                records = run_training(
                    training.config,
                    hooks_of(training.config, bar, name="this training", lines=False),
                    own,
                )
                outcomes.results[i] = result_of(records)
                outcomes.metrics[training.panel] = main_metric(records) or ""
                said = f"{outcomes.results[i]:.2f} %"
            except InputError as error:
                raise InputError(
                    f"{title}, {training}: {error} (what is finished is kept; the same command "
                    "continues)"
                ) from error
            except SsktError as error:
                outcomes.failures[i] = said = f"{type(error).__name__}: {error}"
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"{len(outcomes.results)} of {total} trainings are finished and kept; the "
                    "same command continues"
                ) from None
            say(f"[{i + 1}/{total}] {title}, {training}: {said}")
            _save(planned, outcomes, out)
    return outcomes


def _save(planned: Sweep, outcomes: Outcomes, out: Path) -> None:
    import json

    from sskt.teacher_cache.storage.atomic import durable_write
    from sskt.trainer.paper.sweep import as_dict

    text = json.dumps(as_dict(planned, outcomes), indent=2) + "\n"
    durable_write(out / RESULTS, text.encode())


def _dry_run(planned: Sweep, as_json: bool) -> None:
    from sskt.trainer.results.records import METRICS, is_finished, read_metrics

    done = []
    for training in planned.trainings:
        folder = Path(training.config.out or "")
        there = (folder / METRICS).exists()
        done.append(there and is_finished(read_metrics(folder), training.config.epochs))
    if as_json:
        print_json(
            {
                "trainings": len(done),
                "finished": sum(done),
                "points": [
                    {
                        "panel": planned.panels[t.panel].title,
                        "temperature": t.temperature,
                        "alpha": t.alpha,
                        "seed": t.config.seed,
                        "out": str(t.config.out),
                        "finished": finished,
                    }
                    for t, finished in zip(planned.trainings, done, strict=True)
                ],
            }
        )
        return
    points: dict[tuple[str, ...], list[bool]] = {}
    for t, finished in zip(planned.trainings, done, strict=True):
        values = ["-" if x is None else f"{x:g}" for x in (t.temperature, t.alpha)]
        points.setdefault((planned.panels[t.panel].title, *values), []).append(finished)
    rows = [[*key, str(len(found)), str(sum(found))] for key, found in points.items()]
    print_table(["panel", "T", "alpha", "trainings", "finished"], rows)
    epochs = sum(t.config.epochs for t, f in zip(planned.trainings, done, strict=True) if not f)
    show(f"\n{len(done)} trainings, {sum(done)} finished; {epochs:,} epochs at most to go")


def _graphs(planned: Sweep, outcomes: Outcomes, over: str) -> list[Graph]:
    from sskt.trainer.paper.sweep import point
    from sskt.trainer.results.groups import METRICS
    from sskt.trainer.results.plots import Graph, Line

    by_alpha = over == "alpha"
    xs, others = planned.alphas, planned.temperatures
    if not by_alpha:
        xs, others = others, xs
    graphs = []
    for i, panel in enumerate(planned.panels):
        lines = []
        for other in others:
            pairs = [(other, x) if by_alpha else (x, other) for x in xs]
            points = [point(planned, outcomes, i, t, a) for t, a in pairs]
            found = [(x, p) for x, p in zip(xs, points, strict=True) if p["mean"] is not None]
            if found:
                label = f"T = {other:g}" if by_alpha else f"$\\alpha$ = {other:g}"
                means, stds = [p["mean"] for _, p in found], [p["std"] for _, p in found]
                lines.append(Line(label, [x for x, _ in found], means, stds))
        scratch = point(planned, outcomes, i, None, None)
        level = None if scratch["mean"] is None else (scratch["mean"], scratch["std"])
        metric = METRICS.get(outcomes.metrics.get(i, ""), "test metric")
        graphs.append(
            Graph(panel.title, "$\\alpha$" if by_alpha else "T", f"{metric}, %", lines, level)
        )
    return graphs


def _print(planned: Sweep, outcomes: Outcomes) -> None:
    from sskt.trainer.paper.sweep import point
    from sskt.trainer.results.groups import METRICS

    for i, panel in enumerate(planned.panels):
        metric = METRICS.get(outcomes.metrics.get(i, ""), "test metric")
        show(f"{panel.title}: {metric}, %")
        rows = [
            [f"T {t:g}"] + [_shown(point(planned, outcomes, i, t, a)) for a in planned.alphas]
            for t in planned.temperatures
        ]
        print_table(["", *(f"alpha {a:g}" for a in planned.alphas)], rows)
        scratch = point(planned, outcomes, i, None, None)
        if scratch["trainings"]:
            show(f"scratch {_shown(scratch)}")
        show("")


def _shown(found: dict[str, Any]) -> str:
    failed = f" ({len(found['failed'])} failed)" if found["failed"] else ""
    if found["mean"] is None:
        return "failed" if failed else "-"
    std = f" ± {found['std']:.2f}" if len(found["results"]) > 1 else ""
    return f"{found['mean']:.2f}{std}{failed}"
