"""The figure of ``sskt demo``: labelled views, accuracy over epochs, and time over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sskt.teacher_cache.media.images import UInt8
from sskt.trainer.results.plots import COLOURS, new_figure, save_figure

VIEWS, TOP = 4, 3
"""Views that are shown, and classes of the source beside each."""
LONGEST = 24
"""Characters of a class name that are shown."""
INK, SOFT = "#222222", "#cfe0ee"


@dataclass(frozen=True)
class LabelledView:
    """A view and its soft label.

    Attributes:
        image: uint8 ``[H, W, 3]``.
        label: True class, which the source does not know.
        top: Likeliest classes of the source with their probabilities, best first.
    """

    image: UInt8
    label: str
    top: list[tuple[str, float]]


def draw_demo(
    path: Path,
    views: Sequence[LabelledView],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    result: Mapping[str, Any],
) -> None:
    """Draws the figure as PNG, 1,200 pixels wide.

    Args:
        path: The file to write.
        views: Views with their soft labels.
        runs: The records of each run by its name.
        result: The measured times, as ``sskt demo --json`` prints them.

    Raises:
        OSError: If the file cannot be written.
    """
    figure = new_figure(1200 / 130, 5.4)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left.suptitle("What the source sees, and its soft label (top 3 of 1,000)", fontsize=10)
    _draw_views(left, views)
    accuracy, time = right.subplots(2, 1)
    _draw_accuracy(accuracy, runs)
    _draw_time(time, result)
    save_figure(figure, path)


def _draw_views(figure: Any, views: Sequence[LabelledView]) -> None:
    places = figure.subplots(max(1, len(views)), 2, width_ratios=(1, 3.4), squeeze=False)
    widest = max((p for view in views for _, p in view.top), default=1.0)
    for (image, bars), view in zip(places, views, strict=False):
        image.imshow(view.image, interpolation="nearest")
        image.set(xticks=[], yticks=[])
        image.set_xlabel(f"true class: {view.label}", fontsize=8)
        bars.barh(range(len(view.top)), [p for _, p in view.top], color=SOFT, height=0.8)
        for row, (name, p) in enumerate(view.top):
            shown = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
            percent = f"{100 * p:.0f}" if p >= 0.005 else "<1"
            style = {"va": "center", "fontsize": 9, "color": INK}
            bars.text(0.015 * widest, row, f"{percent} %  {shown}", **style)
        bars.set(xlim=(0, widest), ylim=(len(view.top) - 0.5, -0.5), xticks=[], yticks=[])
        bars.spines[:].set_visible(False)


def _draw_accuracy(axes: Any, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for (name, records), colour in zip(runs.items(), COLOURS, strict=False):
        epochs = [r["epoch"] + 1 for r in records]
        style = {"color": colour, "markersize": 4}
        axes.plot(epochs, [r["test_top1"] for r in records], "o-", label=f"{name}, test", **style)
        train = [r["train_top1"] for r in records]
        axes.plot(epochs, train, ":", label=f"{name}, train", **style)
    axes.set_title("Accuracy of the trained network", fontsize=10)
    axes.set(xlabel="epoch", ylabel="top-1, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _draw_time(axes: Any, result: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs, paid = result["epochs"], result["paid_from_epoch"]
    seconds = result["seconds_per_epoch"]
    cache, cached = result["cache_seconds"], seconds["SSKT + TM"]
    live = seconds["source in every step"]
    shown = range(max(epochs, min(paid or 0, 4 * epochs)) + 1)
    ways = {
        "labels cached once": [cache + cached * e for e in shown],
        "source in every step": [live * e for e in shown],
    }
    for (name, total), colour in zip(ways.items(), (COLOURS[1], COLOURS[2]), strict=True):
        axes.plot(shown, total, "o-", markersize=4, color=colour, label=name)
    if paid in shown:
        axes.axvline(paid, color="0.5", linestyle="--", linewidth=1)
        # Below both lines, on the side of the mark that has more room.
        side = "left" if 2 * paid < len(shown) else "right"
        text = " the cache has paid "
        axes.text(paid, 0, text, ha=side, va="bottom", fontsize=9, color=INK)
    axes.set_title("Time of a training with the source", fontsize=10)
    axes.set(xlabel="epoch", ylabel="seconds in all")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.15 * max(map(max, ways.values())))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")
