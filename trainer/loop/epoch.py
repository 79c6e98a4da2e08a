"""One pass over the training data, under one view seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sskt.teacher_cache.errors import BadImage, Diverged, InputError
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.loop.progress import Progress
from sskt.trainer.loop.step import Step
from sskt.trainer.optim import Schedule

if TYPE_CHECKING:
    from sskt.trainer.loop.setup import Plan

Record = dict[str, Any]


class Epoch:
    """Makes the steps of an epoch and adds up what they say.

    Args:
        plan: The training.
        step: What makes a step.
        loader: The training data.
        schedule: The learning rate.
    """

    def __init__(self, plan: Plan, step: Step, loader: SoftLabelLoader, schedule: Schedule) -> None:
        self._plan, self._step = plan, step
        self._loader, self._schedule = loader, schedule
        self._shape: tuple[int, ...] | None = None

    def __call__(
        self,
        epoch: int,
        progress: Progress,
        after_step: Callable[[int, int], None],
        max_steps: int | None = None,
    ) -> Record:
        """Trains one epoch, under view seed e mod S.

        Args:
            epoch: Number of the epoch, from 0.
            progress: How far the epoch is, where a run was cut; it is brought up to date at each
                step.
            after_step: Called with the steps done and the steps of the epoch.
            max_steps: Steps to end after; default: all.

        Returns:
            The record of the epoch: mean losses over the images, counts, seconds.

        Raises:
            ViewMismatch: If a view is not the one that the sources saw.
            Diverged: If a loss is no finite number.
            InputError: If no sample can be read.
        """
        loader, config, ranks = self._loader, self._plan.config, self._plan.ranks
        waited = loader.label_wait_seconds
        planned = self._plan.order.batch_count(epoch)
        steps = planned if max_steps is None else min(max_steps, planned)
        loader.seek(epoch, progress.window, progress.batch)
        begin = time.perf_counter()
        for batch in loader:
            progress.waited += loader.label_wait_seconds - waited
            waited = loader.label_wait_seconds
            if progress.steps == steps:
                break
            ranks.seed_dropout(config.seed, epoch, *batch.position)
            self._schedule.step(progress.steps / planned)
            found: Record = {}
            if len(batch):
                self._shape = tuple(batch.views.shape[1:])
                found = self._step(batch)
            else:
                self._shape = self._shape or self._view_shape()
                self._step.without_samples(self._shape)
            counts = {
                "images": len(batch),
                "unreadable": batch.unreadable,
                "checked": batch.checked,
            }
            progress.add(found, counts)
            progress.window, progress.batch = batch.position[0], batch.position[1] + 1
            progress.steps += 1
            progress.seconds += time.perf_counter() - begin
            after_step(progress.steps, steps)
            begin = time.perf_counter()
        return self._record(epoch, progress, max_steps)

    def _record(self, epoch: int, progress: Progress, max_steps: int | None) -> Record:
        sums = progress.summed(self._plan.ranks, self._plan.device)
        totals = {name: float(total) for name, total in sums.items()}
        images, unreadable, checked = (
            int(totals.pop(name, 0)) for name in ("images", "unreadable", "checked")
        )
        if not images:
            raise self._nothing_readable()
        means = {name: total / images for name, total in totals.items()}
        if not all(map(math.isfinite, means.values())):
            raise Diverged(
                f"the loss is not finite in epoch {epoch + 1} ({means['loss']}); lower --lr, "
                "or train with --precision float32"
            )
        if "right" in means:
            means["train_top1"] = 100 * means.pop("right")
        samples = self._plan.order.view_count(epoch)
        return {
            "epoch": epoch,
            "view_seed": self._plan.windows(epoch)[0].seed,
            "lr": self._schedule.lr,
            **means,
            "images": images,
            "skipped": samples - images if max_steps is None else unreadable,
            "views_checked": checked,
            "seconds": progress.seconds,
            "label_wait_seconds": progress.waited,
        }

    def _view_shape(self) -> tuple[int, ...]:
        """The shape of a view, of the first sample that can be read."""
        views = self._loader.views
        for sample in range(len(views.target)):
            with suppress(BadImage):
                return views[sample, 0].shape
        raise self._nothing_readable()

    def _nothing_readable(self) -> InputError:
        config = self._plan.config
        return InputError(f"no readable sample in {config.target} {config.split}")
