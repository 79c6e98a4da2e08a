"""Figures of the paper: a figure's recipe read as a table, and drawn beside what was measured.

A recipe ``figureN.toml`` has fields as that of a table has, a table ``[figure]`` with
``temperatures`` (the x axis) and ``runs`` (trainings of each point), and a ``[[panel]]`` for each
graph: its ``name``, its own fields, and ``curve``: ``alpha``, any fields of the curve's own, and
``reported``, an accuracy in % for each temperature. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sskt.teacher_cache.errors import InputError

if TYPE_CHECKING:
    from sskt.trainer.paper.tables import Row
    from sskt.trainer.results.plots import Graph, Line

Measured = Mapping[str, Mapping[int, float]]
"""Accuracies in %, by the name of a row and the training seed."""
FIGURE_KEYS = ("temperatures", "runs")
CLOSE = 3.0
"""Two graphs share a y axis whose range is at most so many times the smaller of their own."""


def figure_rows(read: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The points of a figure as rows of a table, by panel, curve and temperature.

    Args:
        read: the recipe, top-level keys with ``_``.
        where: what to call the recipe in a message.

    Returns:
        For each point the fields of its panel and curve, with ``temperature`` and ``reported``.

    Raises:
        InputError: naming the part of the recipe that is not as it must be.
    """
    figure, panels = read["figure"], read.get("panel")
    if not isinstance(figure, dict) or set(figure) - set(FIGURE_KEYS):
        raise InputError(f"{where}: figure must be a table of {' and '.join(FIGURE_KEYS)}")
    if type(figure.get("runs", 1)) is not int or figure.get("runs", 1) < 1:
        raise InputError(f"{where}: figure.runs must be an integer above 0")
    temperatures = figure.get("temperatures", [])
    if not _numbers(temperatures):
        raise InputError(f"{where}: figure.temperatures must be a list of numbers")
    if not isinstance(panels, list) or not panels or not all(isinstance(p, dict) for p in panels):
        raise InputError(f"{where}: expected [[panel]], one for each graph")
    names = [panel.get("name") for panel in panels]
    if not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        raise InputError(f"{where}: each panel needs a name of its own")
    rows = []
    for panel in panels:
        shared = {k: v for k, v in panel.items() if k not in ("name", "curve")}
        for curve in _curves(panel, len(temperatures), f"{where}, panel {panel['name']}"):
            points = zip(temperatures, curve["reported"], strict=True)
            own = shared | curve | {"panel": panel["name"]}
            rows += [own | {"temperature": t, "reported": value} for t, value in points]
    return rows


def _curves(panel: Mapping[str, Any], points: int, where: str) -> list[dict[str, Any]]:
    curves = panel.get("curve")
    if not isinstance(curves, list) or not curves or not all(isinstance(c, dict) for c in curves):
        raise InputError(f"{where}: expected curve = [...], one {{ ... }} for each curve")
    for curve in curves:
        reported = curve.get("reported")
        if "alpha" not in curve or not _numbers(reported) or len(reported) != points:
            raise InputError(
                f"{where}: a curve needs alpha and reported = [...], a number in % for each of "
                f"the {points} temperatures"
            )
    return curves


def _numbers(values: Any) -> bool:
    return (
        isinstance(values, list) and bool(values) and all(type(v) in (int, float) for v in values)
    )


def panel_graphs(rows: Sequence[Row], measured: Measured) -> list[Graph]:
    """Two graphs for each panel: the paper's curves, and beside them the measured ones.

    Args:
        rows: points of a figure; those of a panel make a pair of graphs.
        measured: accuracies of the rows that were trained.

    Returns:
        Accuracy in % over T, a line for each alpha, dashed with transfer modules; what was
        measured with the standard deviation over the training seeds. The graphs of a pair have
        the same y axis unless this would flatten the curves of one of them.
    """
    from sskt.trainer.results.groups import mean_std
    from sskt.trainer.results.plots import Graph

    graphs = []
    for panel in dict.fromkeys(row.panel for row in rows):
        mine = [row for row in rows if row.panel == panel]
        found = {
            row.number: mean_std(list(measured[row.name].values()))
            for row in mine
            if measured.get(row.name)
        }
        paper = _lines(mine, {row.number: (row.reported, 0.0) for row in mine})
        ours = _lines(mine, found)
        ranges = _ranges(paper, ours)
        for what, lines, limits in (
            ("paper", paper, ranges[0]),
            ("measured", ours, ranges[1]),
        ):
            graphs.append(Graph(f"{panel}\n{what}", "T", "accuracy, %", lines, None, limits))
    return graphs


def _lines(rows: Sequence[Row], values: Mapping[int, tuple[float, float]]) -> list[Line]:
    """A line for each alpha without and with transfer modules, of the rows that have a value."""
    from sskt.trainer.results.plots import Line

    alphas = list(dict.fromkeys(row.fields["alpha"] for row in rows))
    curves: dict[tuple[float, bool], list[Row]] = {}
    for row in rows:
        curves.setdefault((row.fields["alpha"], bool(row.fields.get("tm"))), []).append(row)
    lines = []
    for (alpha, tm), points in curves.items():
        here = [row for row in points if row.number in values]
        if here:
            x = [float(row.fields["temperature"]) for row in here]
            mean, std = zip(*(values[row.number] for row in here), strict=True)
            label = f"$\\alpha$ = {alpha:g}" + (", with TM" if tm else "")
            lines.append(Line(label, x, list(mean), list(std), alphas.index(alpha), dashed=tm))
    return lines


def _ranges(paper: Sequence[Line], ours: Sequence[Line]) -> list[tuple[float, float] | None]:
    own = [_range(lines) for lines in (paper, ours)]
    known = [r for r in own if r is not None]
    if not known:
        return own
    both = min(low for low, _ in known), max(high for _, high in known)
    if both[1] - both[0] <= CLOSE * min(high - low for low, high in known):
        return [both, both]
    return own


def _range(lines: Sequence[Line]) -> tuple[float, float] | None:
    points = [p for line in lines for p in zip(line.mean, line.std, strict=True)]
    if not points:
        return None
    low, high = min(m - s for m, s in points), max(m + s for m, s in points)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin
