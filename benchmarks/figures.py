"""The figures of docs/performance.md, drawn from the document of ``sskt bench``.

python benchmarks/figures.py bench.json FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sskt.trainer.results.plots import COLOURS

Measures = dict[str, dict[str, float]]
"""Values by case and measure."""

OTHERS = "s^Dv<>p"
"""Markers of ways that are not ours."""

_COUNT = re.compile(r"([\d,]+) (samples|seeds|clients|sources|files)")


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws what the document has results for.

    Args:
        document: What ``run_comparisons`` returns.
        folder: Where the files are written.

    Returns:
        The files, SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    # Elements of an SVG have random names otherwise.
    matplotlib.rcParams["svg.hashsalt"] = "sskt"
    found = {entry["name"]: measures(entry) for entry in document["comparisons"]}
    written = []
    figures: tuple[tuple[str, Callable[[dict[str, Measures]], Any]], ...] = (
        ("bench-labels.svg", _labels),
        ("bench-ratios.svg", _ratios),
        ("bench-scale.svg", _scale),
    )
    for name, drawn in figures:
        figure = drawn(found)
        if figure is not None:
            figure.savefig(folder / name, metadata={"Date": None})
            written.append(folder / name)
    return written


def measures(entry: Mapping[str, Any]) -> Measures:
    """The results of a comparison by case and measure."""
    found: Measures = {}
    for result in entry["results"]:
        case, _, measure = result["name"].rpartition(": ")
        found.setdefault(case, {})[measure] = result["value"]
    return found


def _axes(columns: int, height: float = 4.0, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _labels(found: dict[str, Measures]) -> Any:
    """Bytes against reading speed, and against the error."""
    cases = found.get("labels")
    if not cases:
        return None
    figure, axes = _axes(2, 5.4)
    for axis, measure, title in (
        (axes[0], "read", "labels read a second"),
        (axes[1], "gradient error T=3", "error of the gradient at T = 3, %"),
    ):
        for i, (case, values) in enumerate(cases.items()):
            if values[measure] <= 0:
                continue  # float32 loses nothing
            axis.scatter(
                values["stored"], values[measure], color=COLOURS[i % len(COLOURS)], s=60,
                alpha=0.8, label=case, zorder=3,
                marker="o" if case.startswith("sskt") else OTHERS[i % len(OTHERS)],
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="bytes a label", ylabel=title)
        axis.margins(0.1, 0.1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=8)  # fmt: skip
    return figure


def _ratios(found: dict[str, Measures]) -> Any:
    """How many times as fast one way is as another one that was run in turn with it."""
    bars = [
        (f"{case}: {measure}", value)
        for name in ("images", "teacher-stage", "views", "step")
        for case, values in found.get(name, {}).items()
        for measure, value in values.items()
        if " / " in measure
    ]
    for values in found.get("delivery", {}).values():
        if "speed-up" in values:
            bars.append(("a step: both sources in it / labels from the cache", values["speed-up"]))
    if not bars:
        return None
    figure, (axis,) = _axes(1, 0.8 + 0.32 * len(bars))
    figure.set_figwidth(9)
    axis.barh([n for n, _ in bars], [v - 1 for _, v in bars], left=1, color=COLOURS[0])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(0.5, *(v for _, v in bars)), 1.4 * max(2.0, *(v for _, v in bars)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("times as fast (two ways run in turn)")
    axis.tick_params(labelsize=8)
    for i, (_, value) in enumerate(bars):
        axis.annotate(f"{value:.2f}", (max(value, 1), i), fontsize=8, va="center", xytext=(3, 0),
                      textcoords="offset points")  # fmt: skip
    return figure


def _scale(found: dict[str, Measures]) -> Any:
    """Time and memory over samples, seeds, files and clients."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for case, values in found.get("scale", {}).items():
        if counted := _COUNT.fullmatch(case):
            for measure, value in values.items():
                points = curves.setdefault(counted[2], {}).setdefault(measure, [])
                points.append((float(counted[1].replace(",", "")), value))
    kinds = [k for k in ("samples", "seeds", "files", "clients") if len(curves.get(k, {}))]
    if not kinds:
        return None
    figure, axes = _axes(len(kinds), rows=2)
    for column, kind in enumerate(kinds):
        for measure, points in curves[kind].items():
            memory = "memory" in measure
            if measure == "errors" or "CPU" in measure:
                continue
            axis = axes[column + (len(kinds) if memory else 0)]
            axis.plot(*zip(*points, strict=True), marker="o", label=measure)
        upper, lower = axes[column], axes[column + len(kinds)]
        linear = kind != "clients"
        upper.set(xscale="log", yscale="log", ylabel="s" if linear else "labels/s", xlabel=kind)
        lower.set(xscale="log", ylabel="MiB", xlabel=kind, ylim=(0, 1.3 * lower.get_ylim()[1]))
        if linear:
            first = next(iter(curves[kind].values()))
            (x, y), (last, _) = first[-1], first[0]
            upper.plot((last, x), (y * last / x, y), ":", color="grey", label="linear")
        upper.legend(fontsize=8)
        lower.legend(fontsize=8, loc="upper left")
    return figure


if __name__ == "__main__":
    for written in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        print(written)
