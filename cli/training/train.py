"""``sskt train``: its options are the fields of ``TrainConfig``."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sskt.cli.completion import OF_OPTIONS, completing, recipes
from sskt.cli.help import GroupedCommand
from sskt.cli.output import (
    as_json,
    counted,
    error_text,
    print_json,
    print_table,
    progress,
    say,
    show,
    working,
)
from sskt.cli.training.training_output import auxiliary_line, first_line, hooks_of, logging_to
from sskt.teacher_cache.errors import InputError
from sskt.trainer.config import (
    CHOICES,
    FIELDS,
    TYPES,
    WITH_OWN,
    TrainConfig,
    extended,
    help_texts,
    is_run,
    make_config,
    read_config,
    read_recipe,
    require_named_code,
)
from sskt.trainer.loop.preflight import require_present

Command = Callable[..., None]

GROUPS = {
    "Data": (
        "target",
        "root",
        "download",
        "split",
        "test_split",
        "limit",
        "partial",
        "decoder",
        "strict_fingerprint",
        "columns",
        "label_separator",
        "allow_outside_root",
        "policy",
        "frame_sampling",
        "on_error",
    ),
    "Soft labels": (
        "source",
        "cache",
        "labels",
        "label_cache",
        "label_cache_size",
        "label_wait",
        "follow",
        "seeds",
        "views_per_image",
        "live",
        "weights",
        "preprocessing",
        "output",
        "force_topk",
    ),
    "Network": (
        "model",
        "tm",
        "stem",
        "shortcut",
        "taps",
        "init",
        "input_scale",
        "finetune_from",
    ),
    "Loss": ("loss", "alpha", "temperature", "source_weight", "focal_gamma", "method", "psi"),
    "Optimisation": (
        "epochs",
        "batch_size",
        "accumulate",
        "optimizer",
        "lr",
        "momentum",
        "dampening",
        "weight_decay",
        "schedule",
        "warmup",
        "milestones",
        "gamma",
        "patience",
        "plateau_on",
        "clip_grad",
        "ema",
        "early_stop",
        "callback",
    ),
    "Run": (
        "recipe",
        "out",
        "resume",
        "logger",
        "dry_run",
        "seed",
        "eval_every",
        "save_minutes",
        "device",
        "precision",
        "channels_last",
        "compile",
        "view_cache",
        "view_cache_size",
        "workers",
        "memory",
    ),
}
"""The options of ``sskt train`` in the groups of its help; ``sweep`` shows them, too."""


def _option(name: str, about: str) -> Callable[[Command], Command]:
    kind = TYPES[name][0]
    item = typing.get_args(kind)
    default = getattr(TrainConfig, name, None)
    if default not in (None, "", False) and not item:
        about += f" [default: {default}]"
    settings: dict[str, Any] = {"help": about, "default": None}
    if name in OF_OPTIONS:
        settings |= completing(OF_OPTIONS[name])
    if kind is bool:
        return click.option(
            f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}", name, **settings
        )
    if name in CHOICES and name not in WITH_OWN:
        settings["type"] = click.Choice(CHOICES[name])
    elif kind is Path:
        settings["type"] = click.Path(path_type=Path)
    else:
        settings["type"] = item[0] if item else kind
    return click.option(f"--{name.replace('_', '-')}", name, multiple=bool(item), **settings)


def all_options(command: Command) -> Command:
    """Adds an option for each field of ``TrainConfig``."""
    about = help_texts()
    for name in reversed(FIELDS):
        command = _option(name, about.get(name, ""))(command)
    return command


@click.command(
    "train",
    cls=GroupedCommand,
    groups=GROUPS,
    examples=(
        "sskt train --target stl10 --tm",
        "sskt train --target ./photos --source imagenet --epochs 50 --out run",
    ),
)
@all_options
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Recipe by name (sskt recipes), TOML file, or a run's folder: its configuration.",
    **completing(recipes),
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out from its last epoch. Code of your own, such as --model "
    "FILE.py:factory, has to be named again.",
)
@click.option(
    "--logger",
    metavar="NAME",
    help="Where each epoch is also logged: mlflow, wandb, trackio, FILE.py:function or "
    "module:attribute. It is not stored with the run: name it again with --resume.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and stop.")
@as_json
def train(
    recipe: Path | None,
    resume: bool,
    logger: str | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a target network: from scratch, or (with --source) from stored soft labels.

    Options win over the recipe, the recipe over the defaults.
    """
    options: dict[str, Any] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v not in (None, ())
    }
    layers = [read_recipe(recipe)] if recipe else []
    if recipe and is_run(recipe):
        require_named_code(layers[0], options, recipe)
    if resume:
        if "out" not in options:
            raise InputError("--resume needs --out, the folder of the run")
        stored = read_config(options["out"] / "config.json")
        require_named_code(stored, options, options["out"])
        layers.append(dict(extended(stored, options.get("epochs", 0))))
    config = make_config(*layers, options)
    require_present(config)
    with working("opening target and labels"):
        from sskt.trainer.distributed import leave
        from sskt.trainer.loop.loggers import find_logger
        from sskt.trainer.loop.runs import open_live_sources
        from sskt.trainer.loop.setup import make_plan
        from sskt.trainer.loop.trainer import Trainer

        opener = find_logger(logger) if logger else None
        plan = make_plan(config, open_live_sources(config), ask=not dry_run)
    if dry_run:
        described = plan.describe()
        if as_json:
            print_json(described)
        else:
            _print_plan(described)
        return
    if plan.ranks.first:
        say(first_line(config, plan))
        if line := auxiliary_line(plan):
            say(line)
        if config.init:
            say(f"input scale: {plan.config.input_scale} ({plan.input_scale_reason})")
    out = config.out or Path("runs") / default_name(plan.config)
    try:
        with progress() as bar:
            mine = hooks_of(plan.config, bar, taken=plan.taken) if plan.ranks.first else None
            with contextlib.ExitStack() as stack:
                if mine and logger and opener:
                    mine = stack.enter_context(
                        logging_to(logger, opener, plan, out, mine, resume=resume)
                    )
                records = Trainer(plan, mine, out if resume else None).run(out, resume=resume)
    except KeyboardInterrupt:
        kept = "finished epochs are kept"
        if config.save_minutes:
            kept += f", and what was saved within this one (every {config.save_minutes:g} minutes)"
        raise KeyboardInterrupt(f"{kept}; --resume --out {out} continues") from None
    leave()
    if not plan.ranks.first:
        return
    if as_json:
        print_json({"out": str(out), "epochs": records})
        return
    many = "s" if len(records) > 1 else ""
    show(f"{_results(records[-1])} after {len(records)} epoch{many}; written to {out}")


def _results(record: dict[str, Any]) -> str:
    """``test top-1 81.20 %, test top-5 98.10 %, train top-1 99.00 %``: what there is."""
    from sskt.trainer.results.groups import METRICS

    names = {key: f"test {name}" for key, name in METRICS.items()} | {"train_top1": "train top-1"}
    parts = [f"{name} {record[key]:.2f} %" for key, name in names.items() if key in record]
    return ", ".join(parts) or f"loss {record['loss']:.4f}"


def default_name(config: TrainConfig) -> str:
    """A run's folder when --out is not given."""
    from sskt.teacher_cache.sources.names import parse_source

    names = [parse_source(text, stored=True).name for text in config.source]
    sources = "+".join(names) or "scratch"
    if config.method == "maxl":
        sources = f"maxl{config.psi}"
    model = Path(config.model.partition(":")[0]).stem
    tm = "-tm" if config.tm and config.source else ""
    return f"{Path(config.target).name}-{model}-{sources}{tm}-{config.seed}"


def _print_plan(described: dict[str, Any]) -> None:
    rows = [[k, "" if v is None else str(v)] for k, v in described["config"].items()]
    print_table(["field", "value"], rows)
    show(f"\nsamples          {described['samples']:,}")
    show(f"steps an epoch   {described['steps_per_epoch']:,}")
    parameters = described["parameters"]
    show(f"target network   {parameters['target']:,} parameters")
    for name, count in parameters["heads"].items():
        show(f"head {name:<12}{count:,} parameters")
    for name, found in described["label_sets"].items():
        kind = "gradient error" if "T=1" in (found["error"] or ("T=1",)) else "error"
        show(
            f"labels {name:<10}{found['name']} ({found['encoding']}, "
            f"{counted(found['seeds'], 'seed')}, {kind} {error_text(found['error'])})"
        )
