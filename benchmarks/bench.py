"""Runs the comparisons in turn: what ``sskt bench`` and ``make benchmarks`` do.

A comparison is a module of this package with a function ``main`` that hands its results to
``common.report``. Rows are named ``CASE: MEASURE``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sskt.benchmarks.common import Run, machine_details, real_data, running
from sskt.teacher_cache.errors import SsktError, UnknownName, first_line
from sskt.teacher_cache.extras import missing_extra

COMPARISONS = {
    "labels": ("sskt.benchmarks.labels", "ways of storing labels, read in random order", True),
    "encodings": ("sskt.benchmarks.label_encodings", "encodings, on labels of real images", False),
    "images": ("sskt.benchmarks.images", "views for the network, beside torchvision", True),
    "teacher-stage": ("sskt.benchmarks.teacher_stage", "labelling, beside the bare network", True),
    "delivery": ("sskt.benchmarks.label_delivery", "steps with stored labels", True),
    "views": ("sskt.benchmarks.kept_views", "epochs with views in a folder", True),
    "step": ("sskt.benchmarks.step", "a training step, beside one written by hand", True),
    "scale": ("sskt.benchmarks.scale", "growth of time and memory, large caches", True),
    "server": ("sskt.benchmarks.server", "the label server, beside nginx", False),
}
"""Module, what it compares, and whether it is part of a quick run."""

Document = dict[str, Any]


def chosen(names: Sequence[str], full: bool) -> list[str]:
    """The comparisons of these names, in the order in which they run; without names all.

    Raises:
        UnknownName: If a name is that of none.
    """
    for name in names:
        if name not in COMPARISONS:
            raise UnknownName("comparison", name, COMPARISONS)
    return [n for n, (*_, quick) in COMPARISONS.items() if (n in names if names else full or quick)]


def run_comparisons(
    names: Sequence[str], full: bool = False, say: Callable[[str], None] = lambda line: None
) -> Document:
    """Runs comparisons in this process, one after the other.

    Args:
        names: Which ones; none for all.
        full: Whether to measure for minutes instead of seconds.
        say: Called with a line before each comparison.

    Returns:
        The machine, the results of each comparison with their units, which ones were left out or
        failed and why, and which peers are not installed.

    Raises:
        UnknownName: If a name is that of no comparison.
    """
    work = Path(tempfile.mkdtemp(prefix="sskt-bench-"))
    found: list[Document] = []
    absent: dict[str, str] = {}
    try:
        for name in chosen(names, full):
            module, about, _ = COMPARISONS[name]
            say(f"{name}: {about}")
            run, begin = Run(not full, work), time.monotonic()
            entry: Document = {"name": name, "about": about, "results": []}
            with running(run), contextlib.redirect_stdout(sys.stderr):
                entry |= _outcome(module)
            entry["seconds"] = round(time.monotonic() - begin, 1)
            for title, rows, extra in run.reports:
                entry |= {"title": title, "settings": extra}
                entry["results"] += [
                    {"name": row, "value": float(value), "unit": unit} for row, value, unit in rows
                ]
            absent |= run.absent
            found.append(entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "sskt": importlib.metadata.version("sskt"),
        "machine": machine_details(),
        "data": "generated images" if real_data() is None else "real images",
        "full": full,
        "comparisons": found,
        "not_installed": absent,
    }


def _outcome(module: str) -> Document:
    """Runs a comparison: nothing, or why it was left out, or how it failed."""
    try:
        importlib.import_module(module).main()
    except ImportError as error:
        lacking = missing_extra(error)
        return {"left_out" if lacking else "failed": first_line(lacking or error)}
    except SsktError as error:
        return {"left_out": first_line(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}
    return {}


def table(document: Document) -> list[list[str]]:
    """One line for each case of each comparison, and for each one that was left out."""
    lines: list[list[str]] = []
    for entry in document["comparisons"]:
        cases: dict[str, list[str]] = {}
        for result in entry["results"]:
            case, _, measure = result["name"].rpartition(": ")
            value = f"{number(result['value'])} {result['unit']}".strip()
            measured = cases.setdefault(case or measure, [])
            measured.append(f"{measure} {value}" if case else value)
        lines += [[entry["name"], case, ", ".join(values)] for case, values in cases.items()]
        for word, key in (("left out", "left_out"), ("failed", "failed")):
            if key in entry:
                lines.append([entry["name"], word, entry[key]])
    return lines


def number(value: float) -> str:
    """Three digits, or all of a whole part."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
