"""How a training is followed: a first line, bars, a legend, a line an epoch with its times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sskt.cli.locations import data_line
from sskt.cli.output import counted, say
from sskt.teacher_cache.format.features import FEATURES, LOGITS, SOFT_LABELS
from sskt.trainer.loss_inputs import in_words

if TYPE_CHECKING:
    from sskt.trainer.config import TrainConfig
    from sskt.trainer.loop.loggers import Opener
    from sskt.trainer.loop.progress import Hooks
    from sskt.trainer.loop.setup import Plan

Bars = Callable[[str], Callable[[int, int], None]]

METRICS = {
    "train_top1": "train",
    "test_video_top1": "test by video",
    "test_ap": "test AP",
    "test_map": "mAP",
    "test_top1": "test",
}


def hooks_of(
    config: TrainConfig,
    bars: Bars,
    *,
    name: str = "training",
    lines: bool = True,
    taken: Mapping[str, str] = MappingProxyType({}),
) -> Hooks:
    """Hooks that show a run.

    Args:
        config: The run.
        bars: Makes a progress bar by name, see ``output.progress``.
        name: Name of the bar of the training.
        lines: Whether to print a legend and a line an epoch.
        taken: What the loss of each source takes, see ``Plan.taken``; default: soft labels.
    """
    from sskt.trainer.loop.progress import Hooks

    training = bars(name)

    def step(epoch: int, done: int, total: int) -> None:
        training(epoch * total + done, config.epochs * total)

    hooks = Hooks(step=step, load=bars("reading images"), test=bars("testing"))
    return replace(hooks, epoch=EpochLines(config, taken), note=say) if lines else hooks


@contextmanager
def logging_to(
    text: str, opener: Opener, plan: Plan, out: Path, hooks: Hooks, *, resume: bool
) -> Iterator[Hooks]:
    """Hooks that also log each epoch; a resumed run is logged from its first epoch on.

    Args:
        text: The value of ``--logger``.
        opener: What it names.
        plan: The plan of the run.
        out: The folder of the run.
        hooks: What follows the run beside it.
        resume: Whether the run is continued.

    Yields:
        The hooks.

    Raises:
        InputError: If the logger cannot be opened.
    """
    from sskt.trainer.loop.loggers import open_logger
    from sskt.trainer.results.records import METRICS as FILE
    from sskt.trainer.results.records import read_metrics

    log = open_logger(opener, text, plan.config.as_dict(), out, say)

    def epoch(record: dict[str, Any]) -> None:
        hooks.epoch(record)
        log(record)

    try:
        if resume and (out / FILE).exists():
            for record in read_metrics(out):
                log(record)
        yield replace(hooks, epoch=epoch)
    finally:
        log.close()


class EpochLines:
    """Prints a legend before the first epoch of this process, then a line an epoch."""

    def __init__(self, config: TrainConfig, taken: Mapping[str, str]) -> None:
        self._config, self._taken, self._begin = config, taken, time.monotonic()
        self._first: int | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        if self._first is None:
            self._first = record["epoch"]
            if text := legend(record, self._config, self._taken):
                say(text)
        done = record["epoch"] + 1
        each = (time.monotonic() - self._begin) / (done - self._first)
        left = each * (self._config.epochs - done)
        say(f"{epoch_line(record, self._config.epochs)}  {times(each, left, time.time())}")


def legend(record: dict[str, Any], config: TrainConfig, taken: Mapping[str, str]) -> str:
    """What the losses of an epoch's line are; empty for a training from scratch."""
    names = [key.removeprefix("loss_") for key in record if key.startswith("loss_")]
    auxiliary = [name for name in names if name != "primary"]
    if not auxiliary:
        return ""
    weights = dict(item.partition("=")[::2] for item in config.source_weight)
    terms = [f"{weights[n]} x {n}" if n in weights else n for n in auxiliary]
    text = f"loss = primary + {config.alpha:g} x ({' + '.join(terms)}); primary: loss of the true "
    text += "classes"
    for kind in (SOFT_LABELS, FEATURES, LOGITS):
        if alike := [n for n in auxiliary if taken.get(n, SOFT_LABELS) == kind]:
            text += f"; {', '.join(alike)}: loss of the {in_words(kind)}"
            text += "" if kind == FEATURES else f" at T = {config.temperature:g}"
    return text


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """Losses and metrics of an epoch."""
    width = len(str(epochs))
    parts = [f"epoch {record['epoch'] + 1:{width}d}/{epochs}", f"loss {record['loss']:.4f}"]
    parts += [
        f"{k.removeprefix('loss_')} {v:.4f}" for k, v in record.items() if k.startswith("loss_")
    ]
    parts += [f"{name} {record[key]:.2f} %" for key, name in METRICS.items() if key in record]
    parts.append(f"{record['images'] / record['seconds']:.0f} images/s")
    return "  ".join(parts)


def times(each: float, left: float, now: float) -> str:
    """``14.7 s/epoch, ends 15:32 (in 48 min)``; seconds, and ``now`` since 1970."""
    text = f"{duration(each)}/epoch"
    if left <= 0:
        return text
    form = "%H:%M" if left < 12 * 3600 else "%a %H:%M"
    return f"{text}, ends {time.strftime(form, time.localtime(now + left))} (in {duration(left)})"


def duration(seconds: float) -> str:
    """``14.7 s``, ``48 min``, ``3.2 h``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def auxiliary_line(plan: Plan) -> str:
    """The auxiliary loss of each source; empty if all take soft labels that are stored as such."""
    if all(held.output == SOFT_LABELS for held in plan.held.values()):
        return ""
    parts = []
    for name, held in plan.held.items():
        taken = plan.taken[name]
        how = "" if taken == held.output else f"; {in_words(taken)} by its head"
        parts.append(f"{plan.auxiliary[name]} for {name} ({in_words(held.output)}{how})")
    return f"auxiliary loss: {', '.join(parts)}"


def first_line(asked: TrainConfig, plan: Plan) -> str:
    """What is trained on what, and from which label sets: the choices that were left open."""
    from sskt.teacher_cache.locations import label_location

    config, target = plan.config, plan.views.target
    chosen = " (default for such views)" if asked.model == "auto" else ""
    text = f"{target.name} {target.split}: {len(target):,} samples under {plan.views.policy}"
    text += f"; {Path(config.model).name}{chosen}"
    if plan.label_sets:
        sets = [
            f"{name} ({s.spec['source']['arch']}, {s.encoding}, {counted(s.seeds, 'seed')})"
            for name, s in plan.label_sets.items()
        ]
        option = "--labels" if config.labels else "--cache"
        where = label_location(config.labels or config.cache, option=option)
        text += f" {'with transfer modules, ' if config.tm else ''}from the labels of "
        text += f"{' and '.join(sets)} in {where}"
    elif plan.live:
        text += f" with {' and '.join(s.name for s in plan.live)} run in every step"
    elif config.method == "sskt":
        text += " from scratch (no --source and no option of the auxiliary task was given)"
    data = data_line(config.target, config.root)
    return f"{text}; {data}" if data else text
