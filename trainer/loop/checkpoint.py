"""What a checkpoint of a run holds: all that its next step depends on."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.optim import Optimizer

from sskt.teacher_cache.errors import BadCheckpoint, InputError, first_line
from sskt.trainer.config import checked, require_same, run_digest
from sskt.trainer.distributed import Ranks
from sskt.trainer.loop.progress import Progress
from sskt.trainer.loop.setup import TRAINED_ON, trained_on
from sskt.trainer.models.pretrained import INPUT_SCALE
from sskt.trainer.results import records
from sskt.trainer.results.groups import main_metric, result_of

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


Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Tensors = dict[str, Tensor]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, extra="allow")


class _Schedule(_Part):
    epoch: Natural
    best: Annotated[float, Field(ge=-math.inf)]
    bad: Natural
    reductions: Natural


class _Early(_Part):
    best: Annotated[float, Field(allow_inf_nan=False)] | None
    bad: Natural


class _Place(_Part):
    window: Natural
    batch: Natural
    steps: Natural
    seconds: Seconds
    waited: Seconds
    totals: Tensors
    counts: dict[str, Any]


class _Maxl(_Part):
    generator: Tensors
    optimizer: dict[str, Any]


class TrainedOn(_Part):
    """What ``setup.trained_on`` returned, with its types."""

    classes: list[str]
    multi_label: bool
    view_size: Natural | None
    evaluation: str | None = None


class _State(_Part):
    """The types of a checkpoint's entries; ``require_whole`` compares them with the run."""

    model: Tensors
    optimizer: dict[str, Any]
    schedule: _Schedule
    early: _Early
    average: Tensors | None = None
    maxl: _Maxl | None = None
    epoch: Natural
    records: list[dict[str, float | bool]]
    progress: _Place
    processes: Annotated[int, Field(ge=1)] = 1
    config: dict[str, Any] | None = None
    trained_on: TrainedOn | None = None
    digest: str | None = None


def require_whole(trainer: Trainer, state: Record) -> None:
    """Checks that a checkpoint has everything, of the right type and in range.

    Args:
        trainer: The run that it is to be restored into.
        state: What the file holds.

    Raises:
        ValueError: Names the first entry that is wrong.
    """
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg'].lower()}") from None
    epoch, epochs = state["epoch"], trainer.plan.config.epochs
    windows = trainer.plan.windows(epoch) if epoch < epochs else []
    place = state["progress"]
    wrong = {
        f"epoch {epoch} of {epochs}": epoch > epochs,
        f"records of {len(state['records'])} epochs after {epoch}": [
            record.get("epoch") for record in state["records"]
        ]
        != list(range(epoch)),
        "a schedule of another epoch": state["schedule"]["epoch"] != epoch,
        f"window {place['window']} of {len(windows)}": place["window"] >= max(1, len(windows)),
        f"step {place['steps']}": place["steps"] > trainer.plan.order.batch_count(epoch),
        "counts without totals": not place["counts"].keys() <= place["totals"].keys(),
    }
    for what, holds in wrong.items():
        if holds:
            raise ValueError(f"it has {what}")
    _require_optimizer(state["optimizer"], trainer.step.optimizer)


def _require_optimizer(state: Record, own: Optimizer) -> None:
    """Raises ``ValueError`` if an optimizer's state has other settings or shapes than its own."""
    groups = state["param_groups"]
    parameters = [p for group in own.param_groups for p in group["params"]]
    for saved, group in zip(groups, own.param_groups, strict=True):
        for key in (saved.keys() & group.keys()) - {"params", "lr"}:
            if saved[key] != group[key]:
                raise ValueError(f"its optimizer has {key} {saved[key]}, not {group[key]}")
    for number, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameters[number].shape:
                raise ValueError(f"its optimizer's {key} has shape {list(value.shape)}")


def identity(plan: Plan) -> Record:
    """What must be the same when a run is resumed, beside its configuration."""
    return {
        "code": plan.code,
        "digests": {name: s.digest for name, s in plan.label_sets.items()},
        "target": plan.views.target.identity(),
        "seeds": plan.seeds,
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
    config = dataclasses.replace(plan.config, seeds=plan.seeds).as_dict()
    whose = {"config": config, "digest": run_digest(checked(config))}
    whose |= {TRAINED_ON: trained_on(plan.views)}
    parts = {name: part.state_dict() for name, part in trainer.stateful().items()}
    state = identity(plan) | whose | parts
    state |= {"processes": plan.ranks.world, "epoch": trainer.epoch, "progress": place}
    if better:
        best = {"epoch": trainer.epoch - 1, "model": trainer.step.tested.state_dict()}
        best |= whose | {INPUT_SCALE: plan.config.input_scale}
        records.save_checkpoint(out, best, records.BEST)
    records.save_checkpoint(out, state | {"records": trainer.records})


def restore(trainer: Trainer, out: Path) -> None:
    """Puts the trainer where ``last.pt`` was written; where there is none, it is at the beginning.

    Args:
        trainer: The run, before its first epoch.
        out: Its folder.

    Raises:
        InputError: If configuration, labels, data or windows are not those of the run.
        BadCheckpoint: If ``last.pt`` or ``best.pt`` is damaged, or the network is not the one that
            is built now.
    """
    path = out / records.CHECKPOINT
    state = records.load_checkpoint(out)
    if state is None:
        if trainer.restores:
            raise BadCheckpoint(f"{path} has just gone; start again")
        return
    wanted = identity(trainer.plan)
    try:
        if state.get("config") is not None:
            stored = checked(state["config"])
            wanted["seeds"] = stored["seeds"]  # a run that is extended may have more now
            if state.get("digest") != run_digest(stored):
                raise ValueError("its configuration does not have its digest")
            now = dataclasses.replace(trainer.plan.config, seeds=trainer.plan.seeds)
            require_same(stored, now, path)
        for key, value in wanted.items():
            if state.get(key, value) != value:
                raise InputError(
                    f"{out} was trained with {key} {state.get(key)}, now found {value}; resume it "
                    f"with the same {'files' if key == 'code' else 'labels, data and --memory'}, "
                    "or choose another --out"
                )
        _require_same_network(trainer, state, path)
        require_whole(trainer, state)
        _require_same_batches(trainer, state, out)
        for name, part in trainer.stateful().items():
            part.load_state_dict(state[name])
        trainer.epoch, trainer.records = state["epoch"], state["records"]
        place = dict(state["progress"])
        totals = dict(place.pop("totals"))
        counts = {name: float(totals.pop(name)) for name in place.pop("counts")}
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise records.unusable(
            path, f"not a checkpoint of this run ({first_line(error)})"
        ) from error
    if not trainer.plan.ranks.first:  # what was summed over the processes is the first one's now
        totals, counts = {}, {}
    there = {name: total.to(trainer.plan.device) for name, total in totals.items()}
    trainer.progress = Progress(**place, totals=there, counts=counts)
    if trainer.plan.ranks.first:
        _require_own_best(trainer, out)


def _require_same_batches(trainer: Trainer, state: Record, out: Path) -> None:
    """Allows another number of processes where the batches that follow stay the same.

    The order of an epoch does not depend on the processes. Only the last batch does: a rest that
    is too small for all of them joins the batch before it.
    """
    plan, before = trainer.plan, state.get("processes", trainer.plan.ranks.world)
    if before == plan.ranks.world:
        return
    order, epoch = plan.order, state["epoch"]
    old = dataclasses.replace(order, ranks=Ranks(0, before, order.ranks.local))
    if state["progress"]["steps"] and old.batch_count(epoch) != order.batch_count(epoch):
        raise InputError(
            f"{out} was cut within an epoch of {old.batch_count(epoch)} batches for {before} "
            f"processes, and {plan.ranks.world} make {order.batch_count(epoch)}; resume it "
            f"with {before} processes until the epoch ends, then with as many as you like"
        )
    trainer.hooks.note(
        f"the number of processes is {plan.ranks.world} instead of {before}: the same batches "
        "in the same order, but BatchNorm and dropout see other parts of them"
    )


def _require_own_best(trainer: Trainer, out: Path) -> None:
    """Raises ``BadCheckpoint`` if ``best.pt`` is damaged or of another run; notes if it is gone."""
    path = out / records.BEST
    best = records.load_checkpoint(out, records.BEST)
    if best is None:
        if trainer.early.best is not None:
            trainer.hooks.note(
                f"{path} is gone; the weights of the best epoch so far cannot be restored"
            )
        return
    if "digest" not in best:
        return  # of an older version
    done = [main_metric([record]) and result_of([record]) for record in trainer.records]
    ranked = [value for value in done if value is not None]
    epochs = {trainer.epoch}  # killed between best.pt and last.pt
    if ranked:
        epochs.add(done.index(max(ranked)))
    config = dataclasses.replace(trainer.plan.config, seeds=trainer.plan.seeds)
    if best["digest"] != run_digest(config.as_dict()) or best.get("epoch") not in epochs:
        raise records.unusable(path, "it belongs to another run, or to another epoch")


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
