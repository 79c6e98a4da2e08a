"""What a checkpoint of a run holds: all that its next step depends on."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sskt.teacher_cache.errors import BadCheckpoint, InputError, first_line
from sskt.trainer.loop.progress import Progress
from sskt.trainer.models.pretrained import INPUT_SCALE
from sskt.trainer.results import records

if TYPE_CHECKING:
    from sskt.trainer.loop.setup import Plan
    from sskt.trainer.loop.trainer import Trainer

Record = dict[str, Any]

RESTAGED = ("mobilenet_v2", "densenet121")
"""Networks that sskt 0.1.0 divided into other stages, and so had transfer modules elsewhere."""


AGREED_EVERY = 50
"""Steps after which several processes agree whether it is time to save."""


class Autosave:
    """Saves a run within an epoch, every ``--save-minutes``.

    Args:
        trainer: The run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._minutes, self._ranks = trainer.plan.config.save_minutes, trainer.plan.ranks
        self._out: Path | None = None
        self._saved = 0.0

    def start(self, out: Path) -> None:
        """Starts the clock; until then nothing is saved."""
        self._out, self._saved = out, time.perf_counter()

    def due(self, steps: int) -> bool:
        """Returns whether it is time to save; the same in every process."""
        if not self._minutes:
            return False
        due = time.perf_counter() - self._saved > 60 * self._minutes
        if self._ranks.world == 1:
            return due
        return steps % AGREED_EVERY == 0 and self._ranks.agree(due)

    def __call__(self, steps: int) -> None:
        """Saves after a step if it is time to."""
        if self._out and self.due(steps):
            save(self._trainer, self._out)
            self._saved = time.perf_counter()


def identity(plan: Plan) -> Record:
    """What must be the same when a run is resumed, beside its configuration."""
    return {
        "digests": {name: s.digest for name, s in plan.label_sets.items()},
        "target": plan.views.target.identity(),
        "seeds": plan.seeds,
        "processes": plan.ranks.world,
        "rows of labels at a time": len(plan.windows(0)[0].samples),
        INPUT_SCALE: plan.config.input_scale,
    }


def save(trainer: Trainer, out: Path, *, better: bool = False) -> None:
    """Writes ``last.pt``, and ``best.pt`` where the epoch before is the best so far.

    Every process has to call it; the first one writes. ``best.pt`` comes first: a run that is
    killed between the two trains the epoch again, and would else never write it.
    """
    trainer.loader.finish_checks()
    plan, progress = trainer.plan, trainer.progress
    place = {f.name: getattr(progress, f.name) for f in dataclasses.fields(progress)}
    place["totals"] = progress.summed(plan.ranks, plan.device)
    if not plan.ranks.first:
        return
    parts = {name: part.state_dict() for name, part in trainer.stateful().items()}
    state = identity(plan) | parts | {"epoch": trainer.epoch, "progress": place}
    if better:
        network = trainer.step.tested
        best = {"epoch": trainer.epoch - 1, "model": network.state_dict()}
        best[INPUT_SCALE] = plan.config.input_scale
        records.save_checkpoint(out, best, records.BEST)
    records.save_checkpoint(out, state | {"records": trainer.records})


def restore(trainer: Trainer, out: Path) -> None:
    """Puts the trainer where ``last.pt`` was written; where there is none, it is at the beginning.

    Raises ``InputError`` if labels, data, processes or windows are not those of the run,
    ``BadCheckpoint`` if the file is damaged or its network is not the one that is built now.
    """
    state = records.load_checkpoint(out)
    if state is None:
        if trainer.restores:
            raise BadCheckpoint(f"{out / records.CHECKPOINT} has just gone; start again")
        return
    for key, now in identity(trainer.plan).items():
        if state.get(key, now) != now:
            raise InputError(
                f"{out} was trained with {key} {state.get(key)}, now found {now}; "
                "resume it with the same labels, data, processes and --memory, or choose another "
                "--out"
            )
    try:
        _require_same_network(trainer, state, out / records.CHECKPOINT)
        for name, part in trainer.stateful().items():
            part.load_state_dict(state[name])
        trainer.epoch, trainer.records = state["epoch"], state["records"]
        place = dict(state["progress"])
        totals = place.pop("totals")
        counts = {name: float(totals.pop(name)) for name in place.pop("counts")}
    except (KeyError, RuntimeError, ValueError) as error:
        raise BadCheckpoint(
            f"{out / records.CHECKPOINT} is not a checkpoint of this run ({first_line(error)}); "
            "delete it to start the run anew"
        ) from error
    if not trainer.plan.ranks.first:  # what was summed over the processes is the first one's now
        totals, counts = {}, {}
    there = {name: total.to(trainer.plan.device) for name, total in totals.items()}
    trainer.progress = Progress(**place, totals=there, counts=counts)


def _require_same_network(trainer: Trainer, state: Record, path: Path) -> None:
    """Raises ``BadCheckpoint`` if the run's network had other parameters, or trained others.

    Loading would raise too, but without the parameter, the cause and a next step.
    """
    saved, own = state["model"], trainer.network.state_dict()
    difference = ""
    for key in (*own, *saved):
        if key not in saved:
            difference = f"{key} is missing"
        elif key not in own:
            difference = f"{key} is not a parameter of the network"
        elif saved[key].shape != own[key].shape:
            difference = f"{key} has shape {list(saved[key].shape)}, not {list(own[key].shape)}"
        if difference:
            break
    counts = [
        sum(len(group["params"]) for group in groups)
        for groups in (state["optimizer"]["param_groups"], trainer.step.optimizer.param_groups)
    ]
    if not difference and counts[0] != counts[1]:
        difference = f"the run trained {counts[0]} parameter tensors, not {counts[1]}"
    if not difference:
        return
    model = trainer.plan.config.model
    cause = "it was built by another version of sskt or of its own code"
    if model in RESTAGED:
        cause = f"sskt 0.1.0 divided {model} into other stages for transfer modules and fine-tuning"
    raise BadCheckpoint(
        f"cannot resume {path}: its network is not the one that is built now ({difference}); "
        f"{cause}; train anew with another --out, where --init {path} starts from the target "
        "network of the old run, or resume it with the version that trained it"
    )
