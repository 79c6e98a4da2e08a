"""Images of several runs: curves side by side, and accuracy over T and alpha as in figure 2."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.trainer.results.compare import Comparison, Curve, curve
from sskt.trainer.results.groups import METRICS, Record, main_metric

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#6f4cb0", "#8c564b")
"""Told apart by colour-blind eyes too; with more groups than colours the dashes change."""
DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (2, 2)), (0, (6, 2, 1, 2)))
LOSS, TRAIN = "loss_primary", "train_top1"


@dataclass(frozen=True)
class Chart:
    """What one graph shows over epochs: for each group a curve, None where it has none."""

    key: str
    title: str
    unit: str
    curves: list[Curve | None]


def charts(comparison: Comparison) -> list[Chart]:
    """The graphs of a comparison: every test metric there is, train accuracy, primary loss."""
    wanted = [(key, f"{name}, test", "%") for key, name in METRICS.items()]
    wanted += [(TRAIN, "top-1, train", "%"), (LOSS, "primary loss, train", "")]
    made = [
        Chart(key, title, unit, [curve(group, key) for group in comparison.groups])
        for key, title, unit in wanted
    ]
    return [chart for chart in made if any(chart.curves)]


def focus(curves: Sequence[Curve]) -> tuple[float, float]:
    """The range of values to show, margin included: of all but the first fifth of the epochs.

    The climb of the first epochs would press what the curves differ in into a thin strip.
    """
    skip = max(c.epochs[-1] for c in curves) // 5
    points = [p for c in curves for p in zip(c.epochs, c.mean, c.std, strict=True) if p[0] > skip]
    low, high = min(m - s for _, m, s in points), max(m + s for _, m, s in points)
    margin = 0.05 * (high - low) or max(1.0, abs(high)) * 0.05
    return low - margin, high + margin


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Draws the curves of all groups as PNG; of many charts the main metric and the loss.

    Args:
        comparison: What to draw.
        path: The file to write.

    Raises:
        InputError: If the runs have neither test metrics nor losses.
        OSError: If the file cannot be written.
    """
    shown = charts(comparison)
    if len(shown) > 2:
        shown = [c for c in shown if c.key == comparison.metric or c.key not in (*METRICS, TRAIN)]
    if not shown:
        raise InputError("nothing to draw: the runs have neither test metrics nor losses")
    save_figure(_curves(comparison, shown, len(shown)), path)


def curves_svg(comparison: Comparison, shown: Sequence[Chart]) -> bytes:
    """Draws charts, two in a row, as an SVG document."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        _curves(comparison, shown, 2).savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _curves(comparison: Comparison, shown: Sequence[Chart], columns: int) -> Any:
    """A figure: the mean of each group, and one standard deviation as a band."""
    from matplotlib.ticker import MaxNLocator

    names = [group.name for group in comparison.groups]
    legend = 0.25 * (len(names) + 1)
    rows = -(-len(shown) // columns)
    figure = new_figure(5.2 * columns, 3.6 * rows + legend)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes in places[len(shown) :]:
        axes.set_visible(False)
    for axes, chart in zip(places, shown, strict=False):
        for i, found in enumerate(chart.curves):
            if found is None:
                continue
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
            marker = "o" if len(found.epochs) <= 20 else None
            label = f"{names[i]} (mean of {found.n})" if found.n > 1 else names[i]
            style = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 3}
            axes.plot(found.epochs, found.mean, label=label, **style)
            if found.n > 1:
                low = [m - s for m, s in zip(found.mean, found.std, strict=True)]
                high = [m + s for m, s in zip(found.mean, found.std, strict=True)]
                axes.fill_between(found.epochs, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set(xlabel="epoch", ylabel=chart.unit, title=chart.title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(focus([c for c in chart.curves if c is not None]))
        axes.grid(alpha=0.3)
    _legend(figure, columns=1)
    return figure


@dataclass(frozen=True)
class Line:
    """A line of a sweep's graph: accuracies (%) over x, with their standard deviation.

    ``colour`` is an index into ``COLOURS``; by default the place of the line in its graph.
    """

    label: str
    x: list[float]
    mean: list[float]
    std: list[float]
    colour: int | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Graph:
    """A graph of a sweep.

    ``level`` is the accuracy from scratch: (mean, std); ``limits`` is the range of the y axis.
    """

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    level: tuple[float, float] | None
    limits: tuple[float, float] | None = None


def draw_sweep(graphs: Sequence[Graph], path: Path, columns: int = 2) -> None:
    """A PNG of graphs in rows of ``columns``: accuracy over one of T and alpha, lines by the other.

    Args:
        graphs: the graphs, row by row.
        path: the file to write.
        columns: graphs of a row; more than two are drawn smaller.

    Raises:
        OSError: if the file cannot be written.
    """
    columns = min(columns, len(graphs))
    rows = -(-len(graphs) // columns)
    scale = 1.0 if columns <= 2 else 0.65
    figure = new_figure(5.2 * scale * columns, 3.9 * max(scale, 0.75) * rows)
    places = figure.subplots(rows, columns, squeeze=False)
    for axes in places.flat[len(graphs) :]:
        axes.set_visible(False)
    for axes, graph in zip(places.flat, graphs, strict=False):
        ticks = sorted({x for line in graph.lines for x in line.x})
        for i, line in enumerate(graph.lines):
            k = i if line.colour is None else line.colour
            colour, marker = COLOURS[k % len(COLOURS)], "osD^v<>P"[k % 8]
            style = {"color": colour, "marker": marker, "markersize": 5, "capsize": 3}
            style |= {"linestyle": "--" if line.dashed else "-"}
            # Points of equal x stand side by side, or their error bars would hide each other.
            shift = (i - (len(graph.lines) - 1) / 2) * 0.06
            x = [ticks.index(value) + shift for value in line.x]
            bars = line.std if any(line.std) else None
            axes.errorbar(x, line.mean, yerr=bars, label=line.label, **style)
        if graph.level is not None:
            mean, std = graph.level
            axes.axhline(mean, color="0.35", linestyle="--", linewidth=1.2, label="scratch")
            axes.axhspan(mean - std, mean + std, color="0.5", alpha=0.15, linewidth=0)
        axes.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
        axes.set(xlabel=graph.x_label, ylabel=graph.y_label, title=graph.title)
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        if graph.limits is not None:
            axes.set_ylim(graph.limits)
        axes.grid(alpha=0.3)
        if not graph.lines:
            axes.text(0.5, 0.5, "no result yet", ha="center", transform=axes.transAxes)
    _legend(figure, columns=max(3, 4 * columns - 1))
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib without a display; inches, 130 pixels each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Any, columns: int) -> None:
    """One for all graphs, below them: within a graph it would hide points."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    where = {"loc": "outside lower center", "frameon": False}
    if handles:
        figure.legend(handles.values(), handles.keys(), ncols=min(columns, len(handles)), **where)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all. Raises ``OSError``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    durable_write(path, buffer.getvalue())


def plot_runs(runs: dict[str, list[Record]], path: Path) -> None:
    """Loss and accuracy over epochs of one or several runs, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    judged = "top-1"
    for i, (name, records) in enumerate(runs.items()):
        epochs = [r["epoch"] + 1 for r in records]
        style = {"color": f"C{i}", "marker": "o" if len(epochs) < 20 else None, "markersize": 3}
        losses.plot(epochs, [r["loss_primary"] for r in records], label=name, **style)
        result = main_metric(records)
        if result:
            judged = METRICS[result]
            tested = [(r["epoch"] + 1, r[result]) for r in records if result in r]
            accuracies.plot(*zip(*tested, strict=True), label=f"{name}, test", **style)
        style["marker"] = None
        if records and "train_top1" in records[0]:
            train = [r["train_top1"] for r in records]
            accuracies.plot(epochs, train, label=f"{name}, train", linestyle=":", **style)
    losses.set(xlabel="epoch", ylabel="primary loss (train)", title="Loss")
    accuracies.set(xlabel="epoch", ylabel=f"{judged}, %", title="Accuracy")
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(path)
