"""A comparison as one self-contained HTML page: tables, and curves with values under the pointer.

Nothing is loaded from elsewhere; without scripts the page still shows everything but the values.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from sskt.trainer.results.compare import Comparison, Spread
from sskt.trainer.results.groups import METRICS, deciding, differences, values_of
from sskt.trainer.results.plots import COLOURS, Chart, charts, focus

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34
DASHES = ("", "7 4", "2 3", "7 3 1 3")
BRIGHT = ("#3d9bff", "#ff8a3d", "#2fc79b", "#dd88dd", "#f2b632", "#a8e4ff", "#a98cf0", "#c9917f")
"""The colours of ``drawing``, for a dark page."""


def page(comparison: Comparison) -> str:
    """The page, as text. Whatever comes from a run (names, paths, values) is escaped."""
    groups = comparison.groups
    runs = sum(len(group.runs) for group in groups)
    heading = f"{runs} run{'s' * (runs > 1)} in {len(groups)} group{'s' * (len(groups) > 1)}"
    shown = charts(comparison)
    parts = [
        f"<h1>{heading}</h1>",
        *(f'<p class="warning">{_text(w)}</p>' for w in comparison.warnings),
        _results(comparison),
        _judged(comparison),
        f'<section class="charts">{"".join(map(_chart, shown))}</section>',
        _configurations(comparison),
        _folders(comparison),
    ]
    data = [_data(chart, [group.name for group in groups]) for chart in shown]
    # "<" would end the element wherever a name holds "</script>".
    packed = json.dumps(data).replace("<", "\\u003c")
    colours = "".join(f"--c{i}:{c};" for i, c in enumerate(COLOURS))
    bright = "".join(f"--c{i}:{c};" for i, c in enumerate(BRIGHT))
    style = STYLE.replace("/*colours*/", colours).replace("/*bright*/", bright)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>sskt: {heading}</title>\n<style>{style}</style></head>\n<body>\n"
        + "\n".join(p for p in parts if p)
        + f'\n<div id="tip" hidden></div>\n<script type="application/json" id="data">{packed}'
        f"</script>\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _stroke(index: int) -> str:
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return f'stroke="var(--c{index % len(COLOURS)})"' + (f' stroke-dasharray="{dash}"' * bool(dash))


def _key(index: int) -> str:
    line = f'<line x1="0" y1="6" x2="26" y2="6" stroke-width="3" {_stroke(index)}/>'
    return f'<svg class="key" width="26" height="12" aria-hidden="true">{line}</svg>'


def _results(comparison: Comparison) -> str:
    keys = [key for key in METRICS if any(key in row.last for row in comparison.rows)]
    heads = ["group", "runs", "epochs"]
    for key in keys:
        heads += [f"{METRICS[key]}, last", f"{METRICS[key]}, best"]
    heads += ["train top-1", "images/s", "waiting for labels"]
    body = []
    for i, (group, row) in enumerate(zip(comparison.groups, comparison.rows, strict=True)):
        epochs = min(len(run.records) for run in group.counted)
        cells = [f"<th scope=row>{_key(i)} {_text(row.name)}</th>"]
        unfinished = f" ({row.unfinished} unfinished)" if row.unfinished else ""
        cells += [_cell(f"{row.runs}{unfinished}", row.runs), _cell(row.epochs, epochs)]
        for key in keys:
            cells += [_spread(row.last.get(key)), _spread(row.best.get(key))]
        cells += [_spread(row.train), _spread(row.images_per_second, 0)]
        cells.append(_spread(row.label_wait, 1, " %"))
        body.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "Accuracies in %. Mean ± standard deviation over the runs of a group (n - 1). The best "
        "epoch is chosen by the test data, so it flatters; judge by the last."
    )
    return f"<h2>Results</h2>{_table(heads, body, sort=True)}<p class=note>{note}</p>"


def _judged(comparison: Comparison) -> str:
    if not comparison.differences or comparison.metric is None:
        return ""
    body = []
    for i, one in enumerate(comparison.differences):
        error = "" if one.error is None else f" ± {one.error:.2f}"
        cells = f"<th scope=row>{_key(i + 1)} {_text(one.name)}</th>"
        cells += _cell(f"{one.points:+.2f}{error}", one.points)
        body.append(f"<tr>{cells}<td>{_text(one.verdict)}</td></tr>")
    metric, first = METRICS[comparison.metric], _text(comparison.rows[0].name)
    note = (
        "± is the standard error of the difference. It is called larger than the spread when it "
        "passes Welch's t test at 95 %; of many such comparisons one in twenty does so by chance."
    )
    heads = ["group", "difference in points", ""]
    title = f"<h2>Difference to {first}: {metric}, last epoch</h2>"
    return f"{title}{_table(heads, body)}<p class=note>{note}</p>"


def _configurations(comparison: Comparison) -> str:
    configs = [group.config for group in comparison.groups]
    found = differences(configs)
    every = {k: v for config in configs for k, v in deciding(config).items()}
    shared = {k: v for k, v in every.items() if k not in found}
    listed = "".join(
        f"<tr><th scope=row>{_text(k)}</th><td>{_value(v)}</td></tr>" for k, v in shared.items()
    )
    listed = f"<details><summary>What all share</summary><table>{listed}</table></details>"
    if not found:
        return f"<h2>Configuration</h2>{listed}"
    heads = ["group", *found]
    body = []
    for i, group in enumerate(comparison.groups):
        cells = "".join(f"<td>{_value(values[i])}</td>" for values in found.values())
        body.append(f"<tr><th scope=row>{_key(i)} {_text(group.name)}</th>{cells}</tr>")
    return f"<h2>What differs</h2>{_table(heads, body)}{listed}"


def _value(value: Any) -> str:
    if value in (None, "", []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _text(", ".join(map(str, value)) if isinstance(value, list) else value)


def _folders(comparison: Comparison) -> str:
    body = []
    for i, group in enumerate(comparison.groups):
        for run in group.runs:
            total = run.config["epochs"]
            values = values_of(run.records, comparison.metric) if comparison.metric else []
            result, shown = (values[-1], f"{values[-1]:.2f}") if values else (None, "-")
            state = "" if run.finished else " unfinished"
            body.append(
                f"<tr><th scope=row>{_key(i)} {_text(run.folder)}</th>"
                f"{_cell(run.config['seed'], run.config['seed'])}"
                f"{_cell(f'{len(run.records)}/{total}{state}', len(run.records))}"
                f"{_cell(shown, result)}</tr>"
            )
    metric = METRICS[comparison.metric] if comparison.metric else "result"
    heads = ["run", "seed", "epochs", f"{metric}, last"]
    return f"<h2>Runs</h2>{_table(heads, body, sort=True)}"


def _table(heads: Sequence[str], body: Sequence[str], *, sort: bool = False) -> str:
    head = "".join(f"<th scope=col>{_text(h)}</th>" for h in heads)
    kind = ' class="sort"' if sort else ""
    return (
        f"<div class=wide><table{kind}><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(shown: Any, value: float | None) -> str:
    sort = "" if value is None else f' data-value="{value}"'
    return f"<td class=number{sort}>{_text(shown)}</td>"


def _spread(spread: Spread | None, digits: int = 2, unit: str = "") -> str:
    if spread is None:
        return _cell("-", None)
    std = f" ± {spread.std:.{digits}f}" if spread.n > 1 else ""
    return _cell(f"{spread.mean:.{digits}f}{std}{unit}", spread.mean)


def _chart(chart: Chart) -> str:
    drawn = [(i, c) for i, c in enumerate(chart.curves) if c is not None]
    y0, y1 = focus([c for _, c in drawn])
    x0, x1 = 1, max(2, *(c.epochs[-1] for _, c in drawn))

    def x(epoch: float) -> float:
        return round(LEFT + (epoch - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    marks = []
    for value in _ticks(y0, y1, 8):
        marks.append(
            f'<path class="grid" d="M{LEFT} {y(value)}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
        )
    for value in _ticks(x0, x1, 8):
        if value == int(value):
            marks.append(
                f'<text x="{x(value)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                f"{value:g}</text>"
            )
    marks.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">epoch</text>'
    )
    bands, lines = [], []
    for i, found in drawn:
        points = list(zip(found.epochs, found.mean, found.std, strict=True))
        if found.n > 1:
            around = [(e, m + s) for e, m, s in points] + [(e, m - s) for e, m, s in points[::-1]]
            corners = " ".join(f"{x(e)},{y(v)}" for e, v in around)
            bands.append(f'<polygon points="{corners}" fill="var(--c{i % len(COLOURS)})"/>')
        line = " ".join(f"{x(e)},{y(m)}" for e, m, _ in points)
        lines.append(f'<polyline points="{line}" {_stroke(i)}/>')
        if len(points) <= 20:
            fill = f'fill="var(--c{i % len(COLOURS)})"'
            lines += [f'<circle cx="{x(e)}" cy="{y(m)}" r="3" {fill}/>' for e, m, _ in points]
    unit = f", {chart.unit}" if chart.unit else ""
    return (
        f"<figure><figcaption>{_text(chart.title)}{unit}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{_text(chart.title)} over epochs" data-key="{_text(chart.key)}" '
        f'data-x="{x0} {x1} {LEFT} {WIDTH - RIGHT}">'
        f'{"".join(marks)}<svg width="{WIDTH}" height="{HEIGHT - BOTTOM + 4}">'
        f'<g class="bands">{"".join(bands)}</g><g class="lines">{"".join(lines)}</g></svg>'
        f'<path class="pointer" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/></svg></figure>'
    )


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within a range, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def _data(chart: Chart, names: Sequence[str]) -> dict[str, Any]:
    return {
        "key": chart.key,
        "unit": chart.unit,
        "curves": [
            {
                "name": names[i],
                "colour": i % len(COLOURS),
                "n": found.n,
                "epochs": found.epochs,
                "mean": [round(v, 4) for v in found.mean],
                "std": [round(v, 4) for v in found.std],
            }
            for i, found in enumerate(chart.curves)
            if found is not None
        ],
    }


STYLE = """
:root{color-scheme:light dark;--ink:#1c2126;--soft:#5c6670;--paper:#fff;--line:#d9dee3;
--tint:#f4f6f8;--warn:#8a5200;/*colours*/}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa5b0;--paper:#14181c;
--line:#333b43;--tint:#1d2328;--warn:#f0b860;/*bright*/}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:1180px;margin:0 auto;padding:1.5rem}
h1{font-size:1.4rem;margin:0 0 .8rem}h2{font-size:1.05rem;margin:2rem 0 .5rem}
.note,figcaption,summary{color:var(--soft);font-size:.9rem}.note{margin:.4rem 0;max-width:75ch}
.warning{color:var(--warn);border-left:3px solid;padding-left:.6rem;margin:.4rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse}
th,td{padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--line);text-align:left;
font-weight:400;vertical-align:top}
thead th{color:var(--soft);font-size:.85rem;vertical-align:bottom}
td.number{font-variant-numeric:tabular-nums;white-space:nowrap}
tbody th{min-width:13rem}
table.sort thead th{cursor:pointer}table.sort thead th:hover{color:var(--ink)}
th[aria-sort=ascending]::after{content:" \\2191"}th[aria-sort=descending]::after{content:" \\2193"}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));
gap:1rem 1.5rem;margin-top:2rem}
figure{margin:0}svg.chart{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:12px}.key{vertical-align:middle;margin-right:.3rem}
.grid,.pointer{stroke:var(--line);fill:none}.pointer{stroke:var(--soft)}
.bands polygon{opacity:.16}.lines polyline{fill:none;stroke-width:2;stroke-linejoin:round}
#tip{position:fixed;pointer-events:none;background:var(--tint);border:1px solid var(--line);
border-radius:4px;padding:.4rem .6rem;font-size:.85rem;max-width:min(90vw,34rem)}
#tip div{display:flex;justify-content:space-between;gap:1.2rem}#tip b{font-weight:600}
#tip span{font-variant-numeric:tabular-nums;white-space:nowrap}
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll("svg.chart")) {
  const chart = data.find(d => d.key === svg.dataset.key);
  const [x0, x1, left, right] = svg.dataset.x.split(" ").map(Number);
  const pointer = svg.querySelector(".pointer");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = x0 + (at - left) / (right - left) * (x1 - x0);
    const far = e => Math.abs(e - wanted);
    const epoch = chart.curves.flatMap(c => c.epochs).reduce((a, b) => far(b) < far(a) ? b : a);
    const rows = chart.curves.map(c => ({ ...c, at: c.epochs.indexOf(epoch) }))
      .filter(c => c.at >= 0).sort((a, b) => b.mean[b.at] - a.mean[a.at]);
    const x = left + (epoch - x0) / (x1 - x0) * (right - left);
    pointer.setAttribute("transform", `translate(${x} 0)`);
    pointer.setAttribute("visibility", "visible");
    const head = document.createElement("b");
    head.textContent = "epoch " + epoch;
    tip.replaceChildren(head, ...rows.map(c => {
      const row = document.createElement("div"), name = document.createElement("span");
      const value = document.createElement("span"), digits = chart.unit ? 2 : 4;
      name.textContent = c.name;
      name.style.color = `var(--c${c.colour})`;
      name.style.whiteSpace = "normal";
      value.textContent = c.mean[c.at].toFixed(digits)
        + (c.n > 1 ? " \\u00b1 " + c.std[c.at].toFixed(digits) : "");
      row.append(name, value);
      return row;
    }));
    tip.hidden = false;
    const room = event.clientX + tip.offsetWidth + 24 < innerWidth;
    tip.style.left = Math.max(4, event.clientX + (room ? 14 : -tip.offsetWidth - 14)) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4) + "px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    pointer.setAttribute("visibility", "hidden");
  });
}
for (const head of document.querySelectorAll("table.sort thead th")) {
  head.tabIndex = 0;
  const sort = () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const order = (a, b) => value(a).localeCompare(value(b));
    const rows = [...body.rows].sort((a, b) => (+value(a) - +value(b)) || order(a, b));
    body.append(...(down ? rows.reverse() : rows));
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
"""
