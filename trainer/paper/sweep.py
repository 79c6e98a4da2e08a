"""A sweep over temperature and alpha, as in figure 2: its trainings, and what became of them.

A recipe for it has fields of ``TrainConfig`` for all graphs, a table ``[sweep]`` with the lists
``temperature`` and ``alpha``, and any number of ``[[panel]]``: a ``name`` (the graph's title) and
the fields in which the graph differs. No torch here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.trainer.config import TrainConfig, make_config, read_fields
from sskt.trainer.recipes import load_recipe
from sskt.trainer.results.groups import AUXILIARY_ONLY, mean_std, method_name

SWEPT = ("temperature", "alpha")
OWN = (*SWEPT, "seed", "out")
"""Fields that a sweep gives to its trainings, and no recipe does."""
TEMPERATURES, ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0), (0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Figure:
    """A recipe that was read: shared fields, the two lists, (title, fields) of each graph."""

    base: dict[str, Any] = field(default_factory=dict)
    temperatures: tuple[float, ...] = TEMPERATURES
    alphas: tuple[float, ...] = ALPHAS
    panels: tuple[tuple[str, dict[str, Any]], ...] = (("", {}),)


@dataclass(frozen=True)
class Training:
    """One training of a sweep; ``temperature`` and ``alpha`` are None for one from scratch."""

    panel: int
    temperature: float | None
    alpha: float | None
    config: TrainConfig

    def __str__(self) -> str:
        if self.temperature is None or self.alpha is None:
            return f"scratch, seed {self.config.seed}"
        return f"T {self.temperature:g}, alpha {self.alpha:g}, seed {self.config.seed}"


@dataclass(frozen=True)
class Panel:
    """A graph: its title, its folder, its configuration but for what is swept."""

    title: str
    folder: Path
    config: TrainConfig


@dataclass(frozen=True)
class Sweep:
    """All of a sweep, in the order of training: by panel, then seed, then point."""

    panels: list[Panel]
    temperatures: tuple[float, ...]
    alphas: tuple[float, ...]
    trainings: list[Training]


@dataclass
class Outcomes:
    """What became of the trainings so far: results (%) and failures by index, and the metrics."""

    results: dict[int, float] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    metrics: dict[int, str] = field(default_factory=dict)


def read_figure(recipe: str) -> Figure:
    """A shipped recipe by name, or a TOML file. Raises ``MissingData``, ``InputError``."""
    table = load_recipe(recipe, "sweep")
    lists, panels = table.pop("sweep", {}), table.pop("panel", [{}])
    table.pop("title", None)
    if not isinstance(lists, dict) or not all(isinstance(p, dict) for p in panels) or not panels:
        raise InputError(f"recipe {recipe}: expected a table [sweep] and tables [[panel]]")
    for key in lists:
        if key not in SWEPT:
            raise UnknownName(f"key in [sweep] of recipe {recipe}", key, SWEPT)
    where = f"recipe {recipe}"
    read = [(str(p.get("name", "")), {k: v for k, v in p.items() if k != "name"}) for p in panels]
    return Figure(
        read_fields(table, where, OWN),
        _numbers(lists.get("temperature", TEMPERATURES), f"{where}: [sweep] temperature"),
        _numbers(lists.get("alpha", ALPHAS), f"{where}: [sweep] alpha"),
        tuple((name, read_fields(own, f"{where}: panel {name}", OWN)) for name, own in read),
    )


def _numbers(values: Any, where: str) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise InputError(f"{where} must be a list of numbers, found {values!r}")
    if not all(type(v) in (int, float) for v in values):
        raise InputError(f"{where} must be a list of numbers, found {values!r}")
    return tuple(dict.fromkeys(float(v) for v in values))


def plan_sweep(
    figure: Figure,
    options: Mapping[str, Any],
    out: Path,
    *,
    runs: int = 1,
    scratch: bool = False,
    only: Sequence[int] = (),
) -> Sweep:
    """Every training of ``figure`` under ``options``, each in a folder of its own below ``out``.

    ``only`` picks panels by number from 1. Raises ``InputError`` before anything is trained.
    """
    for number in only:
        if not 1 <= number <= len(figure.panels):
            raise InputError(f"panel {number}: the recipe has panels 1 to {len(figure.panels)}")
    panels: list[Panel] = []
    trainings: list[Training] = []
    slugs: list[str] = []
    for number, (name, own) in enumerate(figure.panels, 1):
        config = make_config(figure.base, own, options)
        # A panel's folder does not depend on which panels are trained this time.
        slugs.append(_slug(config, slugs))
        if only and number not in only:
            continue
        if not config.source:
            raise InputError("a sweep over temperature and alpha needs --source")
        if config.test_split == "none":
            raise InputError("a sweep compares test metrics: leave --test-split none out")
        folder = out / slugs[-1]
        panels.append(Panel(name or panel_title(config), folder, config))
        for seed in range(config.seed, config.seed + runs):
            if scratch:
                place = folder / "scratch" / f"seed-{seed}"
                from_scratch = dataclasses.replace(without_sources(config), seed=seed, out=place)
                trainings.append(Training(len(panels) - 1, None, None, from_scratch))
            for t in figure.temperatures:
                for a in figure.alphas:
                    place = folder / f"T{t:.12g}-alpha{a:.12g}" / f"seed-{seed}"
                    here = dataclasses.replace(config, temperature=t, alpha=a, seed=seed, out=place)
                    trainings.append(Training(len(panels) - 1, t, a, here))
    return Sweep(panels, figure.temperatures, figure.alphas, trainings)


def without_sources(config: TrainConfig) -> TrainConfig:
    """The same training from scratch: what only the auxiliary losses read is at its default."""
    defaults = {k: v for k, v in vars(TrainConfig()).items() if k in AUXILIARY_ONLY - {"seeds"}}
    return dataclasses.replace(config, source=[], **defaults)


def panel_title(config: TrainConfig) -> str:
    """D_t (target model, T_s, auxiliary loss), as figure 2 writes it."""
    auxiliary = "ce" if config.loss == "auto" else config.loss.split("+")[-1]
    model = Path(config.model).name + (" + TM" if config.tm else "")
    sources = method_name(vars(config))
    return f"{Path(config.target).name} ({model}, {sources}, {auxiliary.upper()})"


def _slug(config: TrainConfig, taken: Sequence[str]) -> str:
    parts = [Path(config.target).name, Path(config.model).name, method_name(vars(config))]
    parts += ["tm"] if config.tm else []
    parts += [config.loss] if config.loss != "auto" else []
    slug = re.sub(r"[^A-Za-z0-9+._-]+", "_", "-".join(parts))
    same = sum(t == slug or t.startswith(f"{slug}.") for t in taken)
    return f"{slug}.{same + 1}" if same else slug


def point(
    sweep: Sweep, outcomes: Outcomes, panel: int, t: float | None, a: float | None
) -> dict[str, Any]:
    """A point as in results.json: mean and std (None without a result), results and failures."""
    here = [
        (i, training)
        for i, training in enumerate(sweep.trainings)
        if (training.panel, training.temperature, training.alpha) == (panel, t, a)
    ]
    results = {str(x.config.seed): outcomes.results[i] for i, x in here if i in outcomes.results}
    failed = {str(x.config.seed): outcomes.failures[i] for i, x in here if i in outcomes.failures}
    mean, std = mean_std(list(results.values())) if results else (None, None)
    return {
        "temperature": t,
        "alpha": a,
        "mean": mean,
        "std": std,
        "results": results,
        "failed": failed,
        "trainings": len(here),
    }


def as_dict(sweep: Sweep, outcomes: Outcomes) -> dict[str, Any]:
    """``results.json``: every panel with all its points, also those without a result yet."""
    panels = []
    for i, panel in enumerate(sweep.panels):
        scratch = point(sweep, outcomes, i, None, None)
        panels.append(
            {
                "title": panel.title,
                "folder": str(panel.folder),
                "metric": outcomes.metrics.get(i),
                "config": panel.config.as_dict(),
                "points": [
                    point(sweep, outcomes, i, t, a)
                    for t in sweep.temperatures
                    for a in sweep.alphas
                ],
                "scratch": scratch if scratch["trainings"] else None,
            }
        )
    return {
        "temperatures": list(sweep.temperatures),
        "alphas": list(sweep.alphas),
        "panels": panels,
    }
