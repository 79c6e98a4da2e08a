"""What ``sskt reproduce --dry-run`` shows: label sets and trainings, without opening data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sskt.cli.output import human_bytes, print_json, print_table, show
from sskt.trainer.paper.tables import PaperTable, Row

if TYPE_CHECKING:
    from sskt.trainer.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of one row."""

    row: Row
    config: TrainConfig


def show_plan(
    table: PaperTable,
    trainings: Sequence[Training],
    fraction: float | None,
    encoding: str,
    cache: str,
    as_json: bool,
) -> None:
    """Prints the label sets and trainings; which of them exist already is not looked up.

    Args:
        table: the table or figure.
        trainings: all that would be trained.
        fraction: the part of the training split, None for all of it.
        encoding: of the labels, to estimate their size.
        cache: where the labels are or would be.
        as_json: print JSON, with every field of every training.

    Raises:
        UnknownName: for a source that does not exist.
    """
    from sskt.teacher_cache.sources.names import parse_source
    from sskt.trainer.data.label_passes import label_passes
    from sskt.trainer.paper.table_runs import label_bytes

    sets: list[dict[str, Any]] = []
    for wanted in label_passes([t.config for t in trainings]):
        samples = wanted.samples
        if samples and fraction is not None:
            samples = max(1, round(fraction * samples))
        for text in wanted.sources:
            parse_source(text)
            size = label_bytes(text, samples, wanted.seeds, encoding)
            sets.append(
                {
                    "source": text,
                    "target": wanted.config.target,
                    "split": wanted.config.split,
                    "samples": samples,
                    "seeds": wanted.seeds,
                    "bytes": size,
                }
            )
    runs = [
        {
            "row": t.row.number,
            "name": t.row.name,
            "seed": t.config.seed,
            "reported": t.row.reported,
            "reported_std": t.row.reported_std,
            "config": t.config.as_dict(),
        }
        | ({"panel": t.row.panel} if t.row.panel else {})
        for t in trainings
    ]
    if as_json:
        shown = {"table": table.name, "title": table.title, "notes": table.notes, "cache": cache}
        print_json(shown | {"label_sets": sets, "trainings": runs})
        return
    show(f"{table.name}: {table.title}")
    show(f"\nlabel sets in {cache}, where not there already")
    rows = [
        [s["source"], s["target"] + ("" if s["split"] == "train" else f" {s['split']}")]
        + [str(s[k] or "?") for k in ("samples", "seeds")]
        for s in sets
    ]
    sizes = [human_bytes(s["bytes"]) if s["bytes"] else "?" for s in sets]
    columns = ["source", "target", "samples", "view seeds", f"{encoding}, at most"]
    print_table(columns, [[*row, size] for row, size in zip(rows, sizes, strict=True)])
    show(f"\ntrainings: {len(runs)}")
    if any(t.row.panel for t in trainings):
        _print_panels(table, trainings)
    else:
        _print_rows(trainings)
    if table.notes:
        show()
        for note in table.notes:
            show(note)
    for letter, get in table.needs.items():
        if any(t.row.fields.get("init") == letter for t in trainings):
            show(f"\nneeds --weights {letter}=FILE: {get}")


def _print_rows(trainings: Sequence[Training]) -> None:
    of_row: dict[int, list[Training]] = {}
    for training in trainings:
        of_row.setdefault(training.row.number, []).append(training)
    lines = []
    for number, found in of_row.items():
        row, config = found[0].row, found[0].config
        reported = f"{row.reported:.2f}"
        lines.append(
            [str(number), row.name, config.target, str(config.epochs), str(len(found)), reported]
        )
    print_table(["row", "name", "target", "epochs", "runs", "reported"], lines)


def _print_panels(table: PaperTable, trainings: Sequence[Training]) -> None:
    names = list(dict.fromkeys(row.panel for row in table.rows))
    of_panel: dict[str, list[Training]] = {}
    for training in trainings:
        of_panel.setdefault(training.row.panel, []).append(training)
    lines = []
    for panel, found in of_panel.items():
        reported = [t.row.reported for t in found]
        lines.append(
            [
                str(names.index(panel) + 1),
                panel,
                found[0].config.target,
                str(found[0].config.epochs),
                str(len({t.row.number for t in found})),
                str(len(found)),
                f"{min(reported):.2f} to {max(reported):.2f}",
            ]
        )
    print_table(["panel", "name", "target", "epochs", "points", "trainings", "reported"], lines)
