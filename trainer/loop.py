"""The training loop: primary loss + alpha * sum of auxiliary losses, over replayed views."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from sskt.teacher_cache.catalog import find_label_set, require_seeds
from sskt.teacher_cache.durable import durable_write
from sskt.teacher_cache.encodings import require_temperature
from sskt.teacher_cache.errors import Diverged, InputError
from sskt.teacher_cache.philox import permutation
from sskt.teacher_cache.policies import evaluation_policy, parse_policy
from sskt.teacher_cache.sources import Source, usable_device
from sskt.teacher_cache.store import LabelSet
from sskt.teacher_cache.targets import default_policy, evaluation_split, open_target
from sskt.teacher_cache.views import Views, open_views
from sskt.teacher_cache.zoo import parse_source
from sskt.trainer import records
from sskt.trainer.config import TrainConfig, config_json, read_config, require_same
from sskt.trainer.feed import Feed, in_memory, normalise
from sskt.trainer.heads import SSKTNetwork
from sskt.trainer.labels import Labels, LiveLabels, NoLabels, StoredLabels, Window, epoch_windows
from sskt.trainer.losses import AUXILIARY, PRIMARY, parse_loss, total_loss
from sskt.trainer.networks import build_network, parameters_of

Record = dict[str, Any]
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Plan:
    """A configuration with all that it names found: what ``--dry-run`` shows."""

    config: TrainConfig
    views: Views
    test: Views | None
    label_sets: dict[str, LabelSet]
    live: list[Source]
    seeds: int
    device: torch.device

    @property
    def source_classes(self) -> dict[str, int]:
        """Number of classes of each source."""
        stored = {name: len(s.classes) for name, s in self.label_sets.items()}
        return stored | {s.name: len(s.classes) for s in self.live}

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        size = self.config.batch_size
        return sum(-(-len(w.samples) // size) for w in self.windows(0))

    def windows(self, epoch: int) -> list[Window]:
        """The epoch's windows; one, unless a slab exceeds the memory budget."""
        samples, view_seed = len(self.views.target), epoch % self.seeds
        if not self.label_sets:
            return [Window(view_seed, ((0, samples),))]
        sets = list(self.label_sets.values())
        row = sum(s.encoding.bytes_per_label(len(s.classes)) for s in sets)
        rows = int(self.config.memory * 2**30 / 2 / row)
        block = max(s.rows for s in sets)
        return epoch_windows(samples, view_seed, rows, block, self.config.seed, epoch)

    def build(self) -> SSKTNetwork:
        """The network with fresh parameters, drawn from the run's seed."""
        torch.manual_seed(self.config.seed)
        target = build_network(self.config.model, len(self.views.target.classes))
        return SSKTNetwork(target, self.source_classes, tm=self.config.tm)

    def describe(self) -> Record:
        """The resolved configuration, sizes of the networks, steps, label sets found."""
        network = self.build()
        resolved = self.config.as_dict() | {
            "policy": str(self.views.policy),
            "test_split": self.test.target.split if self.test else "none",
            "milestones": self.config.resolved_milestones(),
            "seeds": self.seeds,
            "device": str(self.device),
        }
        return {
            "config": resolved,
            "parameters": {
                "target": parameters_of(network.target),
                "heads": {
                    name: parameters_of(head)
                    for name, head in zip(network.sources, network.heads, strict=True)
                },
            },
            "samples": len(self.views.target),
            "steps_per_epoch": self.steps_per_epoch,
            "label_sets": {
                name: {
                    "name": s.name,
                    "digest": s.digest,
                    "encoding": str(s.encoding),
                    "seeds": s.seeds,
                }
                for name, s in self.label_sets.items()
            },
        }


def make_plan(config: TrainConfig, live: Sequence[Source] = ()) -> Plan:
    """Opens target and label sets and checks that they fit each other.

    Raises ``UnknownName``, ``MissingData``, ``SpecMismatch``, ``IncompleteLabels``, ``InputError``.
    """
    parse_loss(config.loss)
    build_network(config.model, 2)
    target = open_target(
        config.target,
        config.split,
        root=config.root,
        limit=config.limit,
        download=config.download,
        **_opening(config),
    )
    if target.clips or target.multi_label:
        what = "clips" if target.clips else "several classes a sample"
        raise InputError(f"{config.target} has {what}; train takes pictures of one class each")
    policy = parse_policy(
        default_policy(config.target) if config.policy == "auto" else config.policy
    )
    views = open_views(target, policy)
    if (target.labels < 0).any():
        raise InputError(
            f"{config.target} {config.split} has no labels to train the target task on"
        )
    names = [parse_source(text, stored=not config.live) for text in config.source]
    if len({n.name for n in names}) < len(names):
        raise InputError(f"each --source needs a name of its own, found {', '.join(config.source)}")
    sets: dict[str, LabelSet] = {}
    if not config.live:
        assert config.cache is not None or not names
        sets = {n.name: find_label_set(config.cache, n, views) for n in names if config.cache}
    seeds = config.seeds or min([s.seeds for s in sets.values()], default=config.epochs)
    for label_set in sets.values():
        require_seeds(label_set, min(seeds, config.epochs))
        require_temperature(label_set.encoding, config.temperature, force=config.force_topk)
    device = usable_device(config.device)
    return Plan(config, views, _test_views(config, views), sets, list(live), seeds, device)


def _opening(config: TrainConfig) -> dict[str, Any]:
    return {
        "partial": config.partial,
        "decoder": config.decoder,
        "strict": config.strict_fingerprint,
    }


def _test_views(config: TrainConfig, views: Views) -> Views | None:
    if config.test_split == "none":
        return None
    split = config.test_split
    if split == "auto":
        split = evaluation_split(config.target, config.split)
    test = open_target(
        config.target, split, root=config.root, download=config.download, **_opening(config)
    )
    if test.classes != views.target.classes:
        odd = sorted(set(test.classes) ^ set(views.target.classes))
        raise InputError(
            f"{config.target}: splits {config.split} and {split} differ in class {odd[0]}"
        )
    return open_views(test, evaluation_policy(views.policy))


@dataclass(frozen=True)
class Hooks:
    """How a caller follows a run: steps of an epoch, images loaded, an epoch's record."""

    step: Callable[[int, int, int], None] = lambda epoch, done, total: None
    load: Callable[[int, int], None] = lambda done, total: None
    epoch: Callable[[Record], None] = lambda record: None


class Trainer:
    """Network, optimizer and labels of one run; ``run`` trains it to its last epoch."""

    def __init__(self, plan: Plan, hooks: Hooks | None = None) -> None:
        config = plan.config
        self.plan, self.hooks = plan, hooks or Hooks()
        budget = config.memory * 2**30 / 4
        self.views = Views(in_memory(plan.views.target, budget, self.hooks.load), plan.views.policy)
        self.test = plan.test
        if plan.test:
            self.test = Views(
                in_memory(plan.test.target, budget, self.hooks.load), plan.test.policy
            )
        self.network = plan.build().to(plan.device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.scheduler = MultiStepLR(self.optimizer, config.resolved_milestones(), config.gamma)
        self.labels: Labels = NoLabels()
        if plan.live:
            self.labels = LiveLabels(plan.live)
        elif plan.label_sets:
            self.labels = StoredLabels(plan.label_sets, plan.device)
        pin = plan.device.type == "cuda"
        self.feed = Feed(self.views, config.batch_size, config.workers, config.on_error, pin)
        self.epoch = 0
        self.records: list[Record] = []
        primary, auxiliary = parse_loss(config.loss)
        self._primary, self._auxiliary = PRIMARY[primary], AUXILIARY[auxiliary]
        self._truth = torch.from_numpy(self.views.target.labels).to(plan.device)

    def losses(self, samples: np.ndarray[Any, Any], views: Tensor) -> tuple[Tensor, Record]:
        """Equation 1 on a batch of uint8 views on the device: the loss, and its parts."""
        config = self.plan.config
        soft = self.labels.soft(samples, views, config.temperature)
        half = config.precision == "bfloat16"
        with torch.autocast(self.plan.device.type, dtype=torch.bfloat16, enabled=half):
            logits, auxiliary = self.network(normalise(views))
        truth = self._truth[torch.from_numpy(samples).to(self.plan.device)]
        primary = self._primary(logits.float(), truth)
        parts = {
            name: self._auxiliary(auxiliary[name], soft[name], config.temperature) for name in soft
        }
        loss = total_loss(primary, parts, config.alpha)
        right = (logits.argmax(1) == truth).sum()
        scalars = {"loss": loss, "loss_primary": primary, "right": right}
        return loss, scalars | {f"loss_{name}": part for name, part in parts.items()}

    def step(self, samples: np.ndarray[Any, Any], views: Tensor) -> Record:
        """One optimizer step on a batch; the parts of its loss, detached."""
        self.network.train()
        loss, parts = self.losses(samples, views)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        return {name: value.detach() for name, value in parts.items()}

    def train_epoch(self, max_steps: int | None = None) -> Record:
        """One pass under view seed e mod S. Raises ``ViewMismatch`` if a view was not replayed."""
        config, epoch, begin = self.plan.config, self.epoch, time.perf_counter()
        windows = self.plan.windows(epoch)
        following = [*windows[1:], *self.plan.windows(epoch + 1)[:1]]
        if epoch + 1 == config.epochs:
            following[-1:] = []
        planned = sum(-(-len(w.samples) // config.batch_size) for w in windows)
        steps = planned if max_steps is None else min(max_steps, planned)
        totals: dict[str, Tensor] = {}
        images = checked = done = unreadable = 0
        waited = 0.0
        for i, window in enumerate(windows):
            entered = time.perf_counter()
            skipped = self.labels.enter(window, following[i] if i < len(following) else None)
            waited += time.perf_counter() - entered
            order = permutation(window.samples[~skipped], config.seed, epoch)
            for batch in self.feed(order, window.seed):
                if done == steps:
                    break
                unreadable += len(batch.bad)
                if not len(batch.samples):
                    continue
                checked += self.labels.check(batch.samples, batch.views.numpy())
                views = batch.views.to(self.plan.device, non_blocking=True)
                n = len(batch.samples)
                for name, value in self.step(batch.samples, views).items():
                    weight = 1 if name == "right" else n
                    totals[name] = (
                        totals.get(name, torch.zeros((), device=value.device)) + weight * value
                    )
                images += n
                done += 1
                self.hooks.step(epoch, done, steps)
        if not images:
            raise InputError(f"no readable sample in {config.target} {config.split}")
        means = {name: float(total) / images for name, total in totals.items()}
        seconds = time.perf_counter() - begin
        right = means.pop("right")
        if not all(map(math.isfinite, means.values())):
            raise Diverged(
                f"the loss is not finite in epoch {epoch + 1} ({means['loss']}); lower --lr, "
                "or train with --precision float32"
            )
        return {
            "epoch": epoch,
            "view_seed": windows[0].seed,
            "lr": self.optimizer.param_groups[0]["lr"],
            **means,
            "train_top1": 100 * right,
            "images": images,
            "skipped": len(self.views.target) - images if max_steps is None else unreadable,
            "views_checked": checked,
            "seconds": seconds,
            "label_wait_seconds": waited,
        }

    @torch.inference_mode()
    def evaluate(self, network: nn.Module | None = None) -> Record:
        """Top-1 accuracy (%) and mean loss on the test split; empty without one."""
        if self.test is None:
            return {}
        network = network or self.network
        network.eval()
        config, device = self.plan.config, self.plan.device
        feed = Feed(self.test, EVALUATION_BATCH, config.workers, config.on_error)
        labels = torch.from_numpy(self.test.target.labels)
        loss = right = torch.zeros((), device=device)
        count = 0
        half = config.precision == "bfloat16"
        for batch in feed(np.arange(len(self.test.target)), 0):
            if not len(batch.samples):
                continue
            truth = labels[torch.from_numpy(batch.samples)].to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                logits = network(normalise(batch.views.to(device)))[0].float()
            loss = loss + self._primary(logits, truth, reduction="sum")
            right = right + (logits.argmax(1) == truth).sum()
            count += len(batch.samples)
        return {"test_loss": float(loss) / count, "test_top1": 100 * float(right) / count}

    def run(self, out: Path, *, resume: bool = False) -> list[Record]:
        """Trains to the last epoch, leaving metrics, events, checkpoints and a plot in ``out``."""
        config = dataclasses.replace(self.plan.config, out=out, seeds=self.plan.seeds)
        records.prepare_folder(out, resume=resume)
        if resume:
            require_same(read_config(out / records.CONFIG), config, out)
            self._restore(out)
            records.write_metrics(out, self.records)
        durable_write(out / records.CONFIG, config_json(config))
        events = records.Events(out, self.epoch)
        try:
            while self.epoch < config.epochs:
                record = self.train_epoch() | self.evaluate()
                self.scheduler.step()
                self.epoch += 1
                self.records.append(record)
                records.save_checkpoint(out, self._state())
                records.write_metrics(out, self.records)
                events.add(record)
                self.hooks.epoch(record)
        finally:
            events.close()
            if isinstance(self.labels, StoredLabels):
                self.labels.close()
        records.plot_runs({out.name: self.records}, out / records.PLOT)
        return self.records

    def _digests(self) -> dict[str, str]:
        return {name: s.digest for name, s in self.plan.label_sets.items()}

    def _state(self) -> Record:
        return {
            "epoch": self.epoch,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "digests": self._digests(),
            "target": self.plan.views.target.identity(),
            "seeds": self.plan.seeds,
            "records": self.records,
        }

    def _restore(self, out: Path) -> None:
        state = records.load_checkpoint(out)
        if state is None:
            return
        for key, now in (
            ("digests", self._digests()),
            ("target", self.plan.views.target.identity()),
            ("seeds", self.plan.seeds),
        ):
            if state[key] != now:
                raise InputError(
                    f"{out} was trained with {key} {state[key]}, now found {now}; "
                    "resume it with the same labels and data, or choose another --out"
                )
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        self.epoch, self.records = state["epoch"], state["records"]
