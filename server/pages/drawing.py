"""Coverage as SVG paths: one row for each seed, one cell for each block, a bar of many blocks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sskt.server.pages.coverage import Coverage
from sskt.teacher_cache.label_sets.label_set import seed_ranges

CELLS = 64
"""Blocks that are drawn as cells of their own; more are drawn as a bar of so many steps."""
ROWS = 16
"""Seeds that have a row with words; more are drawn close together, at most ``DENSE`` rows."""
DENSE = 64
UNIT = 100
"""Width of a cell, and height of a row, in the drawing's units."""
GAP = 12
"""Between two cells at most."""
LEVELS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Steps stored in part are drawn the stronger the more of them is stored."""

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """A seed. paths: SVG path data by class name; stored: its blocks."""

    seed: int
    paths: dict[str, str]
    stored: int
    percent: str


@dataclass(frozen=True)
class Drawing:
    """``rows`` if there are few seeds, else ``paths`` of all together.

    width, height: of the view box of a row, or of all. grid: path data of what separates the
    cells. words: the drawing as a sentence.
    """

    width: int
    height: int
    rows: tuple[Row, ...]
    paths: dict[str, str]
    grid: str
    words: str


def drawn(coverage: Coverage) -> Drawing:
    """The coverage of a set."""
    seeds, blocks = coverage.stored.shape
    steps = _together(coverage.stored.astype(np.float64), CELLS, axis=1)
    gap = min(GAP, max(1, blocks // 2)) if blocks <= CELLS else 0
    width = steps.shape[1] * UNIT - gap
    words = coverage_words(coverage)
    columns = range(UNIT - gap, width, UNIT) if gap else range(0)
    if seeds <= ROWS:
        rows = tuple(
            Row(
                seed,
                _paths(steps[seed : seed + 1]),
                int(coverage.stored[seed].sum()),
                percent(float(coverage.shares[seed])),
            )
            for seed in range(seeds)
        )
        grid = "".join(f"M{x},0h{gap}v{UNIT}h-{gap}z" for x in columns)
        return Drawing(width, UNIT, rows, {}, grid, words)
    together = _together(steps, DENSE, axis=0)
    between = UNIT // 5
    height = len(together) * UNIT - between
    grid = "".join(f"M{x},0h{gap}v{height}h-{gap}z" for x in columns) + "".join(
        f"M0,{y}h{width}v{between}h-{width}z" for y in range(UNIT - between, height, UNIT)
    )
    return Drawing(width, height, (), _paths(together), grid, words)


def _together(shares: Shares, most: int, axis: int) -> Shares:
    """At most ``most`` neighbours along an axis; more are averaged in groups of about a size."""
    count = shares.shape[axis]
    if count <= most:
        return shares
    edges = np.arange(most) * count // most
    sizes = np.diff([*edges, count])
    means = np.add.reduceat(shares, edges, axis=axis)
    return means / (sizes[None] if axis else sizes[:, None])


def _paths(shares: Shares) -> dict[str, str]:
    """Path data of each class of cells that there is."""
    whole = shares > 1 - 1e-9
    marks = {"stored": whole}
    for level, (low, high) in enumerate(itertools.pairwise(LEVELS), 1):
        marks[f"partly{level}"] = (shares > low) & (shares <= high) & ~whole
    return {name: _path(cells) for name, cells in marks.items() if cells.any()}


def _path(cells: NDArray[np.bool_]) -> str:
    """Each run of cells as a rectangle."""
    parts = []
    for row, marks in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], marks.astype(np.int8), [0]])))
        for start, stop in edges.reshape(-1, 2).tolist():
            width = (stop - start) * UNIT
            parts.append(f"M{start * UNIT},{row * UNIT}h{width}v{UNIT}h-{width}z")
    return "".join(parts)


def percent(share: float) -> str:
    """``100 %`` only of what is whole, ``0 %`` only of what is empty."""
    if 0 < share < 0.001:
        return "<0.1 %"
    shown = f"{share * 100:.1f}".removesuffix(".0")
    return f"{'99.9' if shown == '100' and share < 1 else shown} %"


def coverage_words(coverage: Coverage) -> str:
    """The coverage of a set in a sentence."""
    seeds = len(coverage.stored)
    if not seeds:
        return "no seeds"
    whole = coverage.whole
    lacking = sorted(set(range(seeds)) - set(whole))
    if not lacking:
        return f"{seeds} seeds, all whole" if seeds > 1 else "1 seed, whole"
    ranges = seed_ranges(lacking)
    if len(ranges) > 60:
        ranges = f"{len(lacking)} seeds"
    return f"{len(whole)} of {seeds} seeds whole; {ranges} incomplete"
