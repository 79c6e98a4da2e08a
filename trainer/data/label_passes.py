"""The passes over a target that make the labels of trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sskt.teacher_cache.sources.names import source_name
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.caching_command import VIEW_FIELDS, caching_command
from sskt.trainer.data.splits import split_to_test
from sskt.trainer.loss_inputs import needed_output

TRAINING_SAMPLES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "stl10": 5_000,
    "imagenet": 1_281_167,
    "places365": 1_803_460,
    "places365-small": 1_803_460,
    "voc2012": 5_717,
    "ucf101": 9_537,
    "hmdb51": 3_570,
    "shapes": 2_000,
}
"""Samples of the split ``train``, so that a dry run can count without the data."""


@dataclass(frozen=True)
class LabelPass:
    """One pass over a target: sources with names of their own, and how many view seeds."""

    config: TrainConfig
    sources: tuple[str, ...]
    seeds: int

    @property
    def samples(self) -> int | None:
        """Samples of the training split, without opening it; None if that is not known."""
        whole = TRAINING_SAMPLES.get(self.config.target) if self.config.split == "train" else None
        limit = self.config.limit
        return min(whole, limit) if whole and limit else whole or limit


def views_key(config: TrainConfig) -> tuple[Any, ...]:
    """Equal for configurations that train on the same views, from the same kind of labels."""
    return (*(getattr(config, name) for name in VIEW_FIELDS), needed_output(config.loss))


def label_passes(configs: Sequence[TrainConfig]) -> list[LabelPass]:
    """All label sets that the configurations train from, in as few passes as names allow."""
    groups: dict[tuple[Any, ...], list[TrainConfig]] = {}
    for config in configs:
        if config.source and not config.live:
            groups.setdefault(views_key(config), []).append(config)
    passes = [
        LabelPass(members[0], tuple(share), max(view_seeds(c) for c in members))
        for members in groups.values()
        for share in _shares(members)
    ]
    followed: dict[tuple[Any, ...], list[TrainConfig]] = {}
    for config in configs:
        if config.needs_test_labels and not config.live:
            over = evaluation_pass(config, config.source).config
            followed.setdefault(views_key(over), []).append(config)
    return passes + [
        evaluation_pass(members[0], share)
        for members in followed.values()
        for share in _shares(members)
    ]


def _shares(configs: Sequence[TrainConfig]) -> list[list[str]]:
    """The sources of configurations in as few lists as names allow, each name once in a list."""
    shares: list[list[str]] = []
    for text in dict.fromkeys(text for c in configs for text in c.source):
        name = source_name(text)
        free = (s for s in shares if name not in map(source_name, s))
        share = next(free, None)
        if share is None:
            shares.append([text])
        else:
            share.append(text)
    return shares


def evaluation_pass(config: TrainConfig, sources: Sequence[str]) -> LabelPass:
    """The pass over the test split of a configuration, for a plateau on the total loss."""
    from sskt.teacher_cache.targets.registry import default_policy
    from sskt.teacher_cache.views.policies import evaluation_policy, parse_policy
    from sskt.trainer.models.registry import is_three_dimensional

    policy = config.policy
    if policy == "auto":
        policy = default_policy(config.target, clips=is_three_dimensional(config.model))
    tested = str(evaluation_policy(parse_policy(policy)))
    over = replace(config, split=split_to_test(config), policy=tested, limit=None)
    return LabelPass(over, tuple(text.partition("#")[0] for text in sources), 1)


def view_seeds(config: TrainConfig) -> int:
    """View seeds that a training sees."""
    seen = -(-config.epochs // config.views_per_image) * config.views_per_image
    return min(config.seeds or seen, seen)


def cache_command(wanted: LabelPass, more: Sequence[str] = ()) -> str:
    """The ``sskt cache-teachers`` that makes the labels of a pass; ``more`` are further options."""
    return caching_command(wanted.config, wanted.sources, wanted.seeds, more)
