"""A run: its parts, its epochs, and what it leaves in its folder."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import Diverged
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import config_json, read_config, require_same, run_digest
from sskt.trainer.data.loader import naming_dead_workers
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.loop import checkpoint as checkpoints
from sskt.trainer.loop.callbacks import Callbacks
from sskt.trainer.loop.epoch import Epoch
from sskt.trainer.loop.evaluate import Evaluation
from sskt.trainer.loop.progress import Hooks, Progress
from sskt.trainer.loop.setup import Plan
from sskt.trainer.loop.step import Step
from sskt.trainer.methods.base import Method, Transfer
from sskt.trainer.methods.maxl import SOURCE as MAXL
from sskt.trainer.methods.maxl import Maxl
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.optim import EarlyStop, Schedule
from sskt.trainer.results import records
from sskt.trainer.results.groups import main_metric
from sskt.trainer.results.plots import plot_runs

Record = dict[str, Any]


class Trainer:
    """One run; ``run`` trains it to its last epoch.

    Args:
        plan: The training.
        hooks: How the caller follows it.
        resumed: The folder that ``run`` will resume. Its checkpoint has the weights, so the file
            of ``--init`` may be gone.

    Attributes:
        plan: The training.
        network: The target network with its auxiliary heads.
        method: Where the auxiliary labels come from.
        step: Makes an optimiser step of a batch.
        loader: The training data.
        epoch: Epochs that are done, so the number of the next one.
        records: A record for each epoch that is done.
    """

    def __init__(self, plan: Plan, hooks: Hooks | None = None, resumed: Path | None = None) -> None:
        config = plan.config
        self.restores = resumed is not None and (resumed / records.CHECKPOINT).exists()
        self.plan, self.hooks = plan, hooks or Hooks()
        network = plan.build(initial=not self.restores).to(plan.device)
        self.method: Method = Transfer(plan.taken, config.temperature)
        if config.method == MAXL:
            self.method = Maxl.of_plan(plan, network)
        self.step = Step(plan, network, self.method)
        self.schedule = Schedule(config, self.step.optimizer, plan.steps_per_epoch)
        self.early = EarlyStop(config.early_stop)
        # First the test split: with little room for views, its are those of every epoch.
        self.evaluation = Evaluation(plan, self.step, self.method, self.hooks)
        self.loader = SoftLabelLoader.of_plan(plan, self.hooks.load, self.hooks.note)
        self._autosave = checkpoints.Autosave(self)
        self.epoch = 0
        self.progress = Progress()
        self.records: list[Record] = []
        self._callbacks = Callbacks(config.callback, self)

    @property
    def network(self) -> SSKTNetwork:
        return self.step.network

    @property
    def views(self) -> Views:
        """The training samples under the policy."""
        return self.loader.views

    @property
    def test(self) -> Views | None:
        """The test samples under the evaluation policy; None without evaluation."""
        return self.evaluation.views

    def losses(self, batch: SoftLabelBatch) -> tuple[Any, Record]:
        """See ``Step.losses``."""
        return self.step.losses(batch)

    def train_epoch(self, max_steps: int | None = None) -> Record:
        """Trains the next epoch from where ``progress`` is; ``epoch`` stays.

        Args:
            max_steps: Steps to end after; default: all.

        Returns:
            The record of the epoch.

        Raises:
            ViewMismatch: If a view is not the one that the sources saw.
            Diverged: If a loss is no finite number.
        """
        epoch = self.epoch

        def after_step(done: int, steps: int) -> None:
            self.hooks.step(epoch, done, steps)
            self._callbacks.on_step(epoch, done, steps)
            self._autosave(done)

        one = Epoch(self.plan, self.step, self.loader, self.schedule)
        record = one(epoch, self.progress, after_step, max_steps)
        if max_steps is None:
            begin = time.perf_counter()
            record |= self.method.end_epoch(epoch, self.schedule.lr, self.loader)
            record["seconds"] += time.perf_counter() - begin
        self.progress = Progress()
        return record

    def evaluate(self) -> Record:
        """Returns mean losses and metrics (%) on the test split; empty without one."""
        return self.evaluation()

    def run(self, out: Path, *, resume: bool = False) -> list[Record]:
        """Trains to the last epoch.

        Args:
            out: The folder for metrics, TensorBoard events, checkpoints and a plot.
            resume: Whether to continue the run in it.

        Returns:
            A record for each epoch.

        Raises:
            InputError: If the folder cannot be used, or holds another run.
            BadCheckpoint: If its checkpoint cannot be resumed.
            BadImage: If a sample cannot be read (with ``--on-error fail``); one of the test split
                is found before the first epoch.
            ViewMismatch: If a view is not the one that the sources saw.
            Diverged: If a loss or a metric is no finite number.
            SsktError: If a loader process was killed, or sends nothing.
        """
        mine = self.plan.ranks.first
        held = records.held_folder(out, resume=resume) if mine else nullcontext()
        with held, naming_dead_workers():
            return self._run(out, resume)

    def _run(self, out: Path, resume: bool) -> list[Record]:
        first = self.plan.ranks.first
        config = dataclasses.replace(self.plan.config, out=out, seeds=self.plan.seeds)
        self.plan.ranks.wait()
        if resume:
            require_same(read_config(out / records.CONFIG), config, out)
            checkpoints.restore(self, out)
        digest = run_digest(config.as_dict())
        if first:
            durable_write(
                out / records.CONFIG, config_json(config, self.plan.recorded_label_sets())
            )
            if resume:
                records.write_metrics(out, self.records, digest)
        self._autosave.start(out)
        for sentence in self.plan.lossy_labels():
            self.hooks.note(sentence)
        if not self.epoch and not self.progress.steps:
            self.evaluation.require_readable()
        events = records.Events(out, self.epoch) if first else None
        try:
            while not records.is_finished(self.records, config.epochs):
                self._add_epoch(out, events, digest)
        finally:
            if events:
                events.close()
            self.loader.close()
            self.evaluation.close()
        if first:
            plot_runs({out.name: self.records}, out / records.PLOT)
        self._callbacks.on_end(self.records)
        self.plan.ranks.wait()
        return self.records

    def _add_epoch(self, out: Path, events: records.Events | None, digest: str) -> None:
        finished = self.progress
        record = self.train_epoch()
        done, config = self.epoch + 1, self.plan.config
        if done == config.epochs or done % config.eval_every == 0:
            try:
                record |= self.evaluate()
            except BaseException:
                # A test image that has become unreadable must not cost the epoch that was trained.
                # With several processes the others may be elsewhere, and MAXL has no such position.
                if self.plan.ranks.world == 1 and config.method != MAXL:
                    self.progress = finished
                    checkpoints.save(self, out)
                raise
        if odd := [k for k, v in record.items() if not math.isfinite(v)]:
            raise Diverged(
                f"{odd[0]} is not finite in epoch {done}; lower --lr, or train with "
                "--precision float32"
            )
        name = main_metric([record])
        better = name is not None and self.early.better(record[name])
        stop = self._callbacks.on_epoch(record) or self.early.stop
        record |= {"stopped_early": True} if stop else {}
        self.schedule.end_epoch(record.get("test_loss_total", record.get("test_loss")))
        self.epoch += 1
        self.records.append(record)
        checkpoints.save(self, out, better=better)
        if events:
            records.write_metrics(out, self.records, digest)
            events.add(record)
            self.hooks.epoch(record)

    def stateful(self) -> dict[str, Any]:
        """Returns what has a state that the next step depends on, by its name in a checkpoint."""
        found: dict[str, Any] = {
            "model": self.network,
            "optimizer": self.step.optimizer,
            "schedule": self.schedule,
            "early": self.early,
        }
        found |= {"average": self.step.average.module} if self.step.average else {}
        return found | ({MAXL: self.method} if self.plan.config.method == MAXL else {})
