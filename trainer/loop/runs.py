"""One training in its folder, whatever became of an earlier attempt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.sources.source import Source
from sskt.trainer.config import TrainConfig, adopted, read_config, require_same
from sskt.trainer.distributed import join
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.loss_inputs import needed_output
from sskt.trainer.results import records

Record = dict[str, Any]


def run_training(
    config: TrainConfig, hooks: Hooks | None = None, live: Sequence[Source] = ()
) -> list[Record]:
    """Trains into ``config.out``: a finished run is returned, an interrupted one continues.

    Raises ``InputError`` for a folder that holds a run of another configuration, and all that
    ``make_plan`` and ``Trainer.run`` raise.
    """
    if config.out is None:
        raise InputError("a run needs a folder: --out")
    out = Path(config.out)
    begun = (out / records.CONFIG).exists()
    if begun:
        stored = read_config(out / records.CONFIG)
        require_same(stored, config, out)
        # More seeds may have been cached since; the run continues with those that it began with.
        config = adopted(stored, config, out)
        done = records.read_metrics(out) if (out / records.METRICS).exists() else []
        if records.is_finished(done, config.epochs):
            return done
    trainer = Trainer(make_plan(config, live), hooks, out if begun else None)
    return trainer.run(out, resume=begun)


def open_live_sources(config: TrainConfig) -> list[Source]:
    """The sources that a configuration runs in every step; none without ``live``.

    With ``torchrun`` each process has them on its own device.
    """
    if not (config.live and config.source):
        return []
    from sskt.teacher_cache.labeling.job import open_sources

    device = str(join(config.device)[1])
    opened = open_sources(
        config.source,
        config.weights,
        config.preprocessing,
        "float32",
        device,
        output=config.output or needed_output(config.loss),
    )
    return [one.source for one in opened]
