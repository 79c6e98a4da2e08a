"""A comparison as one self-contained HTML page: tables, and curves as drawn by matplotlib."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment

from sskt.trainer.results.compare import Comparison, Spread
from sskt.trainer.results.groups import METRICS, deciding, differences, values_of
from sskt.trainer.results.plots import Chart, charts, curves_svg


def page(comparison: Comparison) -> str:
    """Renders a comparison. The page loads nothing; everything that comes from a run is escaped.

    Args:
        comparison: What ``compare`` returned.

    Returns:
        The page.
    """
    groups, shown = comparison.groups, charts(comparison)
    configs = [group.config for group in groups]
    differing = differences(configs)
    every = {k: v for config in configs for k, v in deciding(config).items()}
    image = base64.b64encode(curves_svg(comparison, shown)).decode() if shown else ""
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(
        compared=comparison,
        groups=groups,
        runs=sum(len(group.runs) for group in groups),
        metrics={k: v for k, v in METRICS.items() if any(k in r.last for r in comparison.rows)},
        judged=METRICS[comparison.metric] if comparison.metric else "",
        differing=differing,
        shared={k: v for k, v in every.items() if k not in differing},
        image=image,
        values=[(chart, _values(chart)) for chart in shown],
        last=lambda run: values_of(run.records, comparison.metric) if comparison.metric else [],
        spread=_spread,
        plain=_plain,
    )


def _values(chart: Chart) -> list[tuple[int, list[str]]]:
    """Each epoch of a chart with a text for each group."""
    digits = 2 if chart.unit else 4
    cells: dict[int, list[str]] = {}
    for i, found in enumerate(chart.curves):
        if found is None:
            continue
        for epoch, mean, std in zip(found.epochs, found.mean, found.std, strict=True):
            row = cells.setdefault(epoch, ["-"] * len(chart.curves))
            row[i] = _spread(Spread(mean, std, found.n), digits)
    return sorted(cells.items())


def _spread(spread: Spread | None, digits: int = 2) -> str:
    if spread is None:
        return "-"
    std = f" ± {spread.std:.{digits}f}" if spread.n > 1 else ""
    return f"{spread.mean:.{digits}f}{std}"


def _plain(value: Any) -> str:
    if value in (None, "", []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


TEMPLATE = """<!doctype html>
{%- set heading %}{{ runs }} run{{ "s" if runs > 1 }} in {{ groups | length }} group{{
  "s" if groups | length > 1 }}{% endset %}
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sskt: {{ heading }}</title>
<style>
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:0 auto;padding:1.5rem}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin-top:2rem}.note{max-width:75ch;opacity:.75}
.warning{border-left:3px solid #b07000;padding-left:.6rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;border-bottom:1px solid #8886;text-align:left;font-weight:400;
vertical-align:top}
img{width:100%;background:#fff}
</style></head>
<body>
<h1>{{ heading }}</h1>
{% for warning in compared.warnings %}<p class="warning">{{ warning }}</p>
{% endfor %}
<h2>Results</h2>
<div class="wide"><table><thead><tr><th>group</th><th>runs</th><th>epochs</th>
{% for name in metrics.values() %}<th>{{ name }}, last</th><th>{{ name }}, best</th>{% endfor %}
<th>train top-1</th><th>images/s</th><th>waiting for labels, %</th></tr></thead><tbody>
{% for row in compared.rows %}<tr><th>{{ row.name }}</th>
<td>{{ row.runs }}{% if row.unfinished %} ({{ row.unfinished }} unfinished){% endif %}</td>
<td>{{ row.epochs }}</td>
{% for key in metrics %}<td>{{ spread(row.last.get(key)) }}</td>
<td>{{ spread(row.best.get(key)) }}</td>{% endfor %}
<td>{{ spread(row.train) }}</td><td>{{ spread(row.images_per_second, 0) }}</td>
<td>{{ spread(row.label_wait, 1) }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="note">Accuracies in %. Mean ± standard deviation over the runs of a group (n - 1). The
best epoch is chosen by the test data, so it flatters; judge by the last.</p>
{% if compared.differences and judged %}
<h2>Difference to {{ compared.rows[0].name }}: {{ judged }}, last epoch</h2>
<div class="wide"><table><thead><tr><th>group</th><th>difference in points</th><th></th></tr>
</thead><tbody>
{% for one in compared.differences %}<tr><th>{{ one.name }}</th>
<td>{{ "%+.2f" | format(one.points) }}{% if one.error is not none %} ± {{
  "%.2f" | format(one.error) }}{% endif %}</td><td>{{ one.verdict }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="note">± is the standard error of the difference. It is called larger than the spread
when it passes Welch's t test at 95 %; of many such comparisons one in twenty does so by
chance.</p>
{% endif %}
{% if image %}<h2>Curves</h2>
<img alt="Metrics and losses over epochs" src="data:image/svg+xml;base64,{{ image }}">
{% for chart, rows in values %}
<details><summary>{{ chart.title }}{{ ", " + chart.unit if chart.unit }}: values</summary>
<div class="wide"><table class="values"><thead><tr><th>epoch</th>
{% for group in groups %}<th>{{ group.name }}</th>{% endfor %}</tr></thead><tbody>
{% for epoch, cells in rows %}<tr><td>{{ epoch }}</td>
{%- for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></details>
{% endfor %}{% endif %}
{% if differing %}<h2>What differs</h2>
<div class="wide"><table><thead><tr><th>group</th>
{% for name in differing %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for group in groups %}{% set i = loop.index0 %}<tr><th>{{ group.name }}</th>
{% for values in differing.values() %}<td>{{ plain(values[i]) }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
<details><summary>Configuration that all share</summary><table>
{% for name, value in shared.items() %}<tr><th>{{ name }}</th><td>{{ plain(value) }}</td></tr>
{% endfor %}</table></details>
<h2>Runs</h2>
<div class="wide"><table><thead><tr><th>run</th><th>seed</th><th>epochs</th>
<th>{{ judged or "result" }}, last</th></tr></thead><tbody>
{% for group in groups %}{% for run in group.runs %}<tr><th>{{ run.folder }}</th>
<td>{{ run.config["seed"] }}</td>
<td>{{ run.records | length }}/{{ run.config["epochs"] }}{{ "" if run.finished else " unfinished" }}
</td><td>{% if last(run) %}{{ "%.2f" | format(last(run)[-1]) }}{% else %}-{% endif %}</td></tr>
{% endfor %}{% endfor %}</tbody></table></div>
</body></html>
"""
