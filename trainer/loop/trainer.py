"""The training loop: primary loss + alpha * sum of auxiliary losses, over replayed views."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sskt.teacher_cache.errors import BadImage, Diverged, InputError
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import config_json, read_config, require_same
from sskt.trainer.data.gpu_loader import ResidentFeed
from sskt.trainer.data.loader import Feed
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_label_loader import SoftLabelLoader, feed_of, held_in_memory
from sskt.trainer.data.soft_labels import Labels, labels_over
from sskt.trainer.loop import checkpoint as checkpoints
from sskt.trainer.loop.evaluate import AuxiliaryLoss, evaluate
from sskt.trainer.loop.progress import Hooks, Progress
from sskt.trainer.loop.setup import Plan
from sskt.trainer.losses import AUXILIARY, PRIMARY, parse_source_weights, total_loss
from sskt.trainer.methods.maxl import SOURCE as MAXL
from sskt.trainer.methods.maxl_pass import build_maxl, meta_pass
from sskt.trainer.models.heads import to_channels_last
from sskt.trainer.optim import Average, EarlyStop, Schedule, build_optimizer
from sskt.trainer.results import records
from sskt.trainer.results.groups import main_metric
from sskt.trainer.results.plots import plot_runs

Record = dict[str, Any]
ASKED_EVERY = 50
"""Steps after which several processes agree whether it is time to save."""


class Trainer:
    """Network, optimizer and labels of one run; ``run`` trains it to its last epoch.

    ``resumed``: the folder that ``run`` will resume. Its checkpoint has the weights, so that the
    file of initial ones may be gone.
    """

    def __init__(self, plan: Plan, hooks: Hooks | None = None, resumed: Path | None = None) -> None:
        config = plan.config
        self.restores = resumed is not None and (resumed / records.CHECKPOINT).exists()
        self.plan, self.hooks = plan, hooks or Hooks()
        self.test: Views | None = None
        if plan.test:
            self.test = held_in_memory(plan.test, plan.order.memory, self.hooks.load)
        self.network = plan.build(initial=not self.restores).to(plan.device)
        self.maxl = build_maxl(plan, self.network) if config.method == MAXL else None
        if config.channels_last:
            self.network = to_channels_last(self.network)
        self.optimizer = build_optimizer(config, self.network.parameters())
        self.schedule = Schedule(config, self.optimizer, plan.steps_per_epoch)
        self.average = Average(self.network, config.ema) if config.ema else None
        self.early = EarlyStop(config.early_stop)
        self.loader = SoftLabelLoader.of_plan(plan, self.hooks.load)
        self.views = self.loader.views
        self.test_labels: Labels | None = None
        if self.test and config.needs_test_labels:
            self.test_labels = labels_over(
                self.test,
                plan.test_sets,
                plan.live,
                plan.device,
                force_topk=config.force_topk,
            )
        self._test_feed: Feed | ResidentFeed | None = None
        self._shape: tuple[int, ...] | None = None
        self._out: Path | None = None
        self.epoch = 0
        self.progress = Progress()
        self.records: list[Record] = []
        primary, auxiliary = plan.loss
        self._primary = partial(PRIMARY[primary], gamma=config.focal_gamma)
        self._auxiliary = AUXILIARY[auxiliary]
        self._temperature = 1.0 if self.maxl else config.temperature
        self._weights = parse_source_weights(config.source_weight, list(self.network.sources))
        self._forward: Any = self.network
        if plan.ranks.world > 1:
            devices = [plan.device] if plan.device.type == "cuda" else None
            self._forward = DistributedDataParallel(self.network, devices)
        if config.compile:
            self._forward = torch.compile(self._forward)

    def _autocast(self) -> torch.autocast:
        half = self.plan.config.precision == "bfloat16"
        return torch.autocast(self.plan.device.type, dtype=torch.bfloat16, enabled=half)

    def losses(self, batch: SoftLabelBatch) -> tuple[Tensor, Record]:
        """Equation 1 on a batch: the loss, and its parts."""
        config = self.plan.config
        truth, x = batch.labels, batch.images
        if not self.maxl:
            soft = {name: batch.soft(name, self._temperature) for name in self.loader.sources}
        else:
            soft = {MAXL: self.maxl.labels(x, truth)}
        with self._autocast():
            logits, auxiliary = self._forward(x if config.channels_last else x.contiguous())
        primary = self._primary(logits.float(), truth)
        parts = self._parts(auxiliary, soft)
        loss = total_loss(primary, parts, config.alpha, self._weights)
        scalars = {"loss": loss, "loss_primary": primary}
        scalars |= {f"loss_{name}": part for name, part in parts.items()}
        if truth.ndim == 1:
            scalars["right"] = (logits.argmax(1) == truth).sum()
        return loss, scalars

    def _parts(self, logits: dict[str, Tensor], soft: dict[str, Tensor]) -> dict[str, Tensor]:
        more = (self._temperature, self.plan.config.focal_gamma)
        return {name: self._auxiliary(logits[name], soft[name], *more) for name in soft}

    def step(self, batch: SoftLabelBatch) -> Record:
        """One optimizer step on this process's part of a batch: the parts of its loss, detached."""
        self.network.train()
        config, ranks = self.plan.config, self.plan.ranks
        count = max(1, min(config.accumulate, len(batch) // 2))
        pieces = np.array_split(np.arange(len(batch)), count)
        self.optimizer.zero_grad(set_to_none=True)
        found: Record = {}
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            with nullcontext() if last or ranks.world == 1 else self._forward.no_sync():
                loss, parts = self.losses(batch[piece[0] : piece[-1] + 1])
                weight = len(piece) * ranks.world / batch.whole
                torch.autograd.backward(loss if weight == 1 else loss * weight)
            share = len(piece) / len(batch)
            for name, value in parts.items():
                part = value.detach() * share if name.startswith("loss") else value.detach()
                found[name] = found[name] + part if name in found else part
        self._update()
        return found

    def _idle_step(self) -> None:
        """Takes part in a step of the others: no picture of one's own part could be read."""
        self._shape = self._shape or self._view_shape()
        self.optimizer.zero_grad(set_to_none=True)
        self.network.eval()  # a blank picture must not reach BatchNorm
        blank = torch.zeros((1, *self._shape), dtype=torch.uint8, device=self.plan.device)
        logits, auxiliary = self._forward(self.plan.normalise(blank))
        torch.autograd.backward(0 * sum((x.sum() for x in auxiliary.values()), logits.sum()))
        self._update()

    def _view_shape(self) -> tuple[int, ...]:
        """The shape of a view, of the first sample that can be read."""
        for sample in range(len(self.views.target)):
            with suppress(BadImage):
                return self.views[sample, 0].shape
        raise self._nothing_readable()

    def _nothing_readable(self) -> InputError:
        config = self.plan.config
        return InputError(f"no readable sample in {config.target} {config.split}")

    def _update(self) -> None:
        if self.plan.config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.config.clip_grad)
        self.optimizer.step()
        if self.average:
            self.average.update(self.network)

    def train_epoch(self, max_steps: int | None = None) -> Record:
        """One pass under view seed e mod S, from where ``progress`` is.

        Raises ``ViewMismatch`` if a view was not replayed, ``Diverged``.
        """
        epoch, state, begin = self.epoch, self.progress, time.perf_counter()
        saved, waited = begin, self.loader.label_wait_seconds
        planned = self.plan.order.batch_count(epoch)
        steps = planned if max_steps is None else min(max_steps, planned)
        self.loader.seek(epoch, state.window, state.batch)
        for batch in self.loader:
            state.waited += self.loader.label_wait_seconds - waited
            waited = self.loader.label_wait_seconds
            if state.steps == steps:
                break
            self.seed_step(*batch.position)
            self.schedule.step(state.steps / planned)
            counts = {
                "images": len(batch),
                "unreadable": batch.unreadable,
                "checked": batch.checked,
            }
            found: Record = {}
            state.window, state.batch = batch.position[0], batch.position[1] + 1
            if len(batch):
                self._shape = tuple(batch.views.shape[1:])
                found = self.step(batch)
            else:
                self._idle_step()
            state.add(found, counts)
            state.steps += 1
            self.hooks.step(epoch, state.steps, steps)
            if self._out and self._time_to_save(saved):
                state.seconds += time.perf_counter() - begin
                checkpoints.save(self, self._out)
                begin = saved = time.perf_counter()
        meta: Record = {}
        if self.maxl and max_steps is None:
            hook = self.hooks.step
            meta = meta_pass(self, self.maxl, lambda done, total: hook(epoch, steps, steps))
        state.seconds += time.perf_counter() - begin
        record = self._record(max_steps) | meta
        self.progress = Progress()
        return record

    def _record(self, max_steps: int | None) -> Record:
        state = self.progress
        sums = state.summed(self.plan.ranks, self.plan.device)
        totals = {name: float(total) for name, total in sums.items()}
        images, unreadable, checked = (
            int(totals.pop(name, 0)) for name in ("images", "unreadable", "checked")
        )
        if not images:
            raise self._nothing_readable()
        means = {name: total / images for name, total in totals.items()}
        if not all(map(math.isfinite, means.values())):
            raise Diverged(
                f"the loss is not finite in epoch {self.epoch + 1} ({means['loss']}); lower --lr, "
                "or train with --precision float32"
            )
        if "right" in means:
            means["train_top1"] = 100 * means.pop("right")
        return {
            "epoch": self.epoch,
            "view_seed": self.plan.windows(self.epoch)[0].seed,
            "lr": self.optimizer.param_groups[0]["lr"],
            **means,
            "images": images,
            "skipped": len(self.views.target) - images if max_steps is None else unreadable,
            "views_checked": checked,
            "seconds": state.seconds,
            "label_wait_seconds": state.waited,
        }

    def seed_step(self, *place: object) -> None:
        """Dropout is a function of the place in the run, so that resuming needs no generator."""
        path = (self.plan.config.seed, self.epoch, *place, self.plan.ranks.rank)
        text = "/".join(map(str, path)).encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest()))

    def evaluate(self) -> Record:
        """Mean losses and metrics (%) on the test split; empty without one."""
        if self.test is None:
            return {}
        network = self.average.network if self.average else self.network
        if not self._test_feed:
            config = self.plan.config
            self._test_feed = feed_of(self.test, self.plan.device, config.workers, config.on_error)
        plan, primary = self.plan, self._primary
        plan.ranks.share_buffers(network)

        def forward(views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with self._autocast():
                logits, auxiliary = network(plan.normalise(views))
            return logits.float(), auxiliary

        def weighted(logits: dict[str, Tensor], soft: dict[str, Tensor]) -> Tensor:
            none = torch.zeros((), device=plan.device)
            return total_loss(none, self._parts(logits, soft), plan.config.alpha, self._weights)

        extra = None
        if self.test_labels:
            n = len(self.test.target)
            extra = AuxiliaryLoss(self.test_labels, n, self._temperature, weighted)
        return evaluate(
            forward,
            network,
            self.test,
            self._test_feed,
            primary,
            plan.device,
            plan.ranks,
            extra,
            self.hooks.test,
        )

    def run(self, out: Path, *, resume: bool = False) -> list[Record]:
        """Trains to the last epoch, leaving metrics, events, checkpoints and a plot in ``out``."""
        mine = self.plan.ranks.first
        with records.held_folder(out, resume=resume) if mine else nullcontext():
            return self._run(out, resume)

    def _run(self, out: Path, resume: bool) -> list[Record]:
        first = self.plan.ranks.first
        config = dataclasses.replace(self.plan.config, out=out, seeds=self.plan.seeds)
        self.plan.ranks.wait()
        if resume:
            require_same(read_config(out / records.CONFIG), config, out)
            checkpoints.restore(self, out)
        if first:
            if resume:
                records.write_metrics(out, self.records)
            durable_write(out / records.CONFIG, config_json(config))
        self._out = out
        for sentence in self.plan.lossy_labels():
            self.hooks.note(sentence)
        events = records.Events(out, self.epoch) if first else None
        try:
            while not records.is_finished(self.records, config.epochs):
                self._add_epoch(out, events)
        finally:
            if events:
                events.close()
            self.loader.close()
            if self.test_labels:
                self.test_labels.close()
        if first:
            plot_runs({out.name: self.records}, out / records.PLOT)
        self.plan.ranks.wait()
        return self.records

    def _add_epoch(self, out: Path, events: records.Events | None) -> None:
        record = self.train_epoch()
        done, config = self.epoch + 1, self.plan.config
        if done == config.epochs or done % config.eval_every == 0:
            record |= self.evaluate()
        if odd := [k for k, v in record.items() if not math.isfinite(v)]:
            raise Diverged(
                f"{odd[0]} is not finite in epoch {done}; lower --lr, or train with "
                "--precision float32"
            )
        name = main_metric([record])
        better = name is not None and self.early.better(record[name])
        record |= {"stopped_early": True} if self.early.stop else {}
        self.schedule.end_epoch(record.get("test_loss_total", record.get("test_loss")))
        self.epoch += 1
        self.records.append(record)
        checkpoints.save(self, out, better=better)
        if events:
            records.write_metrics(out, self.records)
            events.add(record)
            self.hooks.epoch(record)

    def _time_to_save(self, saved: float) -> bool:
        minutes, ranks = self.plan.config.save_minutes, self.plan.ranks
        if not minutes:
            return False
        due = time.perf_counter() - saved > 60 * minutes
        if ranks.world == 1:
            return due
        return self.progress.steps % ASKED_EVERY == 0 and ranks.agree(due)

    def stateful(self) -> dict[str, Any]:
        """What has a state that the next step depends on, by its name in a checkpoint."""
        found: dict[str, Any] = {
            "model": self.network,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "early": self.early,
        }
        found |= {"average": self.average} if self.average else {}
        return found | ({"maxl": self.maxl} if self.maxl else {})
