"""What a configuration names, found and checked: the plan of a training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sskt.teacher_cache.errors import BadImage, InputError, MissingData
from sskt.teacher_cache.format.encodings import gradient_error, require_temperature
from sskt.teacher_cache.label_sets.find import require_seeds
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.locations import label_location
from sskt.teacher_cache.own_code import hash_of_file
from sskt.teacher_cache.sources.registry import parse_source
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.storage.base import Storage
from sskt.teacher_cache.storage.http.storage import Fetching
from sskt.teacher_cache.storage.open import is_served, open_cache, open_served
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.registry import default_policy
from sskt.teacher_cache.views.frame_sampling import parse_frame_sampling
from sskt.teacher_cache.views.mixing import mixes
from sskt.teacher_cache.views.policies import evaluation_policy, parse_policy
from sskt.teacher_cache.views.views import Views, open_views
from sskt.trainer.config import AUTO, TrainConfig, code_of
from sskt.trainer.data.epoch_order import EpochOrder, require_repeats, seeds_needed
from sskt.trainer.data.label_choice import choose_label_sets, require_identity
from sskt.trainer.data.soft_labels import Window
from sskt.trainer.data.splits import open_split, split_to_test
from sskt.trainer.data.test_labels import find_test_sets
from sskt.trainer.distributed import Ranks, join
from sskt.trainer.loop.preflight import require_present
from sskt.trainer.loss_inputs import (
    Holding,
    Live,
    fits,
    needed_output,
    stated_auxiliary,
    taken_by,
    usual_auxiliary,
)
from sskt.trainer.losses import PRIMARY, parse_loss, parse_source_weights, resolve_loss
from sskt.trainer.methods.maxl import LOSSES
from sskt.trainer.methods.maxl import SOURCE as MAXL
from sskt.trainer.models.base import TargetNetwork, parameters_of
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.normalization import NORMALISATIONS
from sskt.trainer.models.pretrained import freeze_before, input_scale_of, load_initial
from sskt.trainer.models.registry import build_network, is_three_dimensional

Record = dict[str, Any]

TRAINED_ON = "trained_on"
"""The key under which a checkpoint keeps ``trained_on``."""
SMALL_VIEW = 96
"""Largest views, in pixels, for which ``--model auto`` takes a small ResNet."""


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
    loss: tuple[str, str]
    ranks: Ranks = field(default_factory=Ranks)
    test_sets: dict[str, LabelSet] = field(default_factory=dict)
    """Labels of the test split, if a plateau follows the total loss."""
    input_scale_reason: str = ""
    """Why ``config.input_scale`` was taken."""
    code: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each file of the user that the training runs, by ``FILE.py:function``."""

    @property
    def source_classes(self) -> dict[str, int]:
        """Outputs of each auxiliary head: C of its loss, D for a loss of features; or MAXL's."""
        if self.config.method == MAXL:
            return {MAXL: len(self.views.target.classes) * self.config.psi}
        return {
            name: held.width if self.taken[name] == held.output else len(held.classes)
            for name, held in self.held.items()
        }

    @property
    def held(self) -> dict[str, Holding]:
        """What gives the labels of each source: its label set, or the source itself."""
        return {**self.label_sets, **{source.name: Live.of(source) for source in self.live}}

    @property
    def auxiliary(self) -> dict[str, str]:
        """The auxiliary loss of each head: the one that was named, or what fits its labels."""
        if self.config.method == MAXL:
            return {MAXL: self.loss[1]}
        stated = stated_auxiliary(self.config.loss)
        return {name: stated or usual_auxiliary(held) for name, held in self.held.items()}

    @property
    def taken(self) -> dict[str, str]:
        """What the auxiliary loss of each source takes: soft labels, features or logits."""
        return {name: taken_by(self.auxiliary[name], held) for name, held in self.held.items()}

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.order.batch_count(0)

    @functools.cached_property
    def order(self) -> EpochOrder:
        """Which samples an epoch visits in which order."""
        config, ranks = self.config, self.ranks
        return EpochOrder(
            len(self.views.target),
            self.label_sets,
            self.seeds,
            config.batch_size,
            config.seed,
            config.memory * 2**30 / ranks.local,
            ranks,
            config.views_per_image,
        )

    def windows(self, epoch: int) -> list[Window]:
        """The epoch's windows; one, unless the labels of a view seed exceed half the memory."""
        return self.order.windows(epoch)

    def normalise(self, views: Tensor) -> Tensor:
        """uint8 views as float32 input of the target network; see ``Normalisation``."""
        return NORMALISATIONS[self.config.input_scale](views)

    def build_target(self, classes: int) -> TargetNetwork:
        """A target network with fresh parameters, drawn from torch's generator."""
        return build_target(self.config, classes, view_size(self.views))

    def build(self, *, initial: bool = True) -> SSKTNetwork:
        """The network with fresh parameters, drawn from the run's seed; or with initial ones.

        Without ``initial`` they stay fresh: a checkpoint is going to replace them.
        """
        config = self.config
        torch.manual_seed(config.seed)
        target = self.build_target(len(self.views.target.classes))
        network = SSKTNetwork(target, self.source_classes, tm=config.tm)
        if config.init and initial:
            load_initial(target, config.init, config.model)
        if config.finetune_from is not None:
            freeze_before(network, config.finetune_from)
        return network

    def lossy_labels(self) -> list[str]:
        """What the training loses by label sets that hold the largest probabilities only.

        Returns:
            A sentence for each label set of a top-k encoding, with the gradient error that was
            measured when it was cached.
        """
        found = []
        for name, label_set in self.label_sets.items():
            if label_set.encoding.name == "topk":
                error = gradient_error(label_set.attributes.get("error"), "T=1", "T=3")
                lost = f"error of their gradient: {error}" if error else "their error is not known"
                found.append(f"labels of {name} are stored as {label_set.encoding}; {lost}")
        return found

    def recorded_label_sets(self) -> dict[str, dict[str, str]]:
        """By source, what a run's ``config.json`` says of its label set."""
        return {
            name: {"encoding": str(s.encoding), "digest": s.digest}
            for name, s in self.label_sets.items()
        }

    def describe(self) -> Record:
        """The resolved configuration, sizes of the networks, steps, label sets found."""
        network, losses = self.build(), set(self.auxiliary.values())
        resolved = self.config.as_dict() | {
            "test_split": self.test.target.split if self.test else "none",
            "milestones": self.config.resolved_milestones(),
            "seeds": self.seeds,
            "loss": "+".join(filter(None, [self.loss[0], "/".join(sorted(losses))])),
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
                    "error": s.attributes.get("error"),
                }
                for name, s in self.label_sets.items()
            },
        }


def build_target(config: TrainConfig, classes: int, size: int | None) -> TargetNetwork:
    """Builds the target network of a configuration, with fresh parameters.

    Args:
        config: The configuration; its ``model`` is not ``auto``.
        classes: Number of classes C.
        size: Pixels of a view, or None.

    Returns:
        The network. Its parameters are drawn from torch's generator.
    """
    return build_network(
        config.model,
        classes,
        stem=config.stem,
        shortcut=config.shortcut,
        taps=tuple(config.taps),
        size=size,
    )


def make_plan(config: TrainConfig, live: Sequence[Source] = (), *, ask: bool = True) -> Plan:
    """Opens target and label sets and checks that they fit each other.

    ask: whether a label server that computes on demand is to compute what is missing, so that
    the plan can be carried out.
    Raises ``UnknownName``, ``MissingData``, ``SpecMismatch``, ``IncompleteLabels``, ``InputError``.
    """
    require_present(config)
    scale, reason = input_scale_of(config.input_scale, config.init)
    config = replace(config, input_scale=scale)
    reads = bool(config.source) and not config.live
    served = reads and is_served(label_location(config.labels or config.cache).value)
    ranks, device = join(config.device, config.label_wait if served else 0)
    if config.download and not ranks.first:
        ranks.wait()  # the first process downloads
    download = config.download and ranks.first
    sets: dict[str, LabelSet] = {}
    cache = open_labels(config) if config.source and not config.live else None
    if cache is not None:
        config, sets = choose_label_sets(config, cache)
    target = open_split(config, config.split, limit=config.limit, download=download)
    loss = parse_loss(resolve_loss(config.loss, multi_label=target.multi_label))
    chosen = config.policy
    if chosen == AUTO:
        chosen = default_policy(config.target, clips=target.clips)
    f_s = parse_frame_sampling(config.frame_sampling) if config.frame_sampling else None
    views = open_views(target, parse_policy(chosen), f_s)
    require_identity(views, sets)
    config = replace(config, policy=str(views.policy), decoder=target.decoder or config.decoder)
    if config.model == AUTO:
        config = replace(config, model=_usual_model(views))
    if is_three_dimensional(config.model) != target.clips:
        what, network = ("clips", "3-D network, such as resnet3d18")
        if not target.clips:
            what, network = ("images", "2-D network, such as resnet18")
        raise InputError(
            f"--model {config.model} does not take {what}, which {config.target} holds; choose a "
            f"{network}, or leave --model out"
        )
    if not target.multi_label and (target.labels < 0).any():
        raise InputError(
            f"{config.target} {config.split} has no labels to train the target task on"
        )
    names = list(sets) or [parse_source(text).name for text in config.source]
    if len(set(names)) < len(names):
        raise InputError(f"each --source needs a name of its own, found {', '.join(config.source)}")
    heads = [MAXL] if config.method == MAXL else names
    parse_source_weights(config.source_weight, heads)
    if config.method == MAXL and (target.multi_label or loss[1] not in LOSSES):
        raise InputError(
            f"--method maxl takes one class a sample and auxiliary losses {' and '.join(LOSSES)}; "
            f"found --loss {'+'.join(loss)} over {config.target}"
        )
    for source in live:
        held = Live.of(source)
        if not fits(stated_auxiliary(config.loss) or usual_auxiliary(held), held):
            raise InputError(
                f"--loss {config.loss} takes other labels than the {held.output} of {source.name}; "
                f"give --output {needed_output(config.loss)}, or leave --output out"
            )
    if mixes(views.policy):
        _require_mixable(config, loss, target)
    repeats = config.views_per_image
    every = -(-config.epochs // repeats) * repeats
    seeds = config.seeds or min([s.seeds for s in sets.values()], default=every)
    require_repeats(repeats, seeds, config.batch_size, ranks.world)
    for label_set in sets.values():
        needed = seeds_needed(seeds, config.epochs, repeats)
        if config.follow is None or label_set.seeds < needed:
            require_seeds(label_set, needed, ask=ask)
        error = label_set.attributes.get("error")
        require_temperature(label_set.encoding, config.temperature, error, force=config.force_topk)
    if config.batch_size < ranks.world:
        raise InputError(
            f"--batch-size {config.batch_size} is that of all {ranks.world} processes together; "
            f"give at least {2 * ranks.world}"
        )
    test = _test_views(config, views, download=download)
    if config.download and ranks.first:
        ranks.wait()
    test_sets: dict[str, LabelSet] = {}
    if test is not None and cache is not None and config.needs_test_labels:
        test_sets = find_test_sets(cache, config, sets, test, ask=ask)
    seeds = min(ranks.gathered(seeds))  # a set may have grown while the processes opened it
    plan = Plan(
        config, views, test, sets, list(live), seeds, device, loss, ranks, test_sets, reason,
        _hashes(config),
    )  # fmt: skip
    taken = set(plan.auxiliary.values())
    if config.loss == AUTO and len(taken) == 1 and taken != {loss[1]}:
        # Runs with other losses are told apart by what they have recorded.
        plan = replace(plan, config=replace(config, loss="+".join([loss[0], *taken])))
    return plan


def _hashes(config: TrainConfig) -> dict[str, str]:
    """The hashes of the user's files; the label sets and live sources have those of sources."""
    found = {
        text: hash_of_file(text, f"--{name.replace('_', '-')}")
        for name, texts in code_of(config.as_dict()).items()
        for text in texts
        if name != "source"
    }
    return {text: digest for text, digest in found.items() if digest}


def open_labels(config: TrainConfig) -> Storage:
    """Opens the cache of the configuration, or the default one.

    Raises:
        InputError: If it cannot be reached.
    """
    name = label_location(config.labels or config.cache).value
    if is_served(name):
        how = Fetching(config.label_wait, config.label_cache, config.label_cache_size)
        return open_served(name, how)
    return open_cache(name)


def _test_views(config: TrainConfig, views: Views, *, download: bool) -> Views | None:
    split = split_to_test(config)
    if split == "none":
        return None
    test = open_split(config, split, download=download)
    if test.classes != views.target.classes:
        odd = sorted(set(test.classes) ^ set(views.target.classes))
        raise InputError(
            f"{config.target}: splits {config.split} and {split} differ in class {odd[0]}"
        )
    if not test.multi_label and (test.labels < 0).any():
        raise InputError(
            f"{config.target} {split} has samples without a known class: no accuracy can be "
            "measured on it; choose another --test-split, or none"
        )
    return open_views(test, evaluation_policy(views.policy))


def _require_mixable(config: TrainConfig, loss: tuple[str, str], target: Target) -> None:
    """Raises ``InputError`` for what cannot take the classes of mixed samples."""
    if config.method == MAXL:
        raise InputError(
            f"--method maxl splits the one class of a sample, and --policy {config.policy} mixes "
            "samples; leave mixup and cutmix out"
        )
    if target.multi_label and loss[0] not in PRIMARY:
        raise InputError(
            f"--policy {config.policy} mixes samples: their classes are weights from 0 to 1, which "
            f"the primary loss {loss[0]} may take for 1 and 0; use bce"
        )


def _usual_model(views: Views) -> str:
    """The network of the paper for such views: ResNet-20 up to STL10's 96 pixels."""
    if views.target.clips:
        return "resnet3d18"
    size = view_size(views)
    return "resnet20" if size is not None and size <= SMALL_VIEW else "resnet18"


def trained_on(views: Views) -> Record:
    """Returns what a checkpoint keeps of the target, for predictions without its data."""
    target = views.target
    return {
        "classes": list(target.classes),
        "multi_label": target.multi_label,
        "view_size": view_size(views),
        "evaluation": str(evaluation_policy(views.policy)),
    }


def view_size(views: Views) -> int | None:
    """Pixels of a view's shorter side; None if that depends on a file that cannot be read."""
    if views.policy.own is None and "size" in views.policy.parameters:
        return int(views.policy.parameters["size"])
    try:
        image = views.target.read(0) if views.policy.own is None else views[0, 0]
        height, width, _ = image.shape
        return int(min(height, width))
    except (BadImage, MissingData):
        return None
