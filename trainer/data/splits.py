"""The splits of a configuration's target."""

from __future__ import annotations

from collections.abc import Callable

from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.open import evaluation_split, load_target
from sskt.teacher_cache.targets.spec import DatasetSpec
from sskt.trainer.config import TrainConfig


def open_split(
    config: TrainConfig,
    split: str,
    *,
    limit: int | None = None,
    download: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Target:
    """A split of the configuration's target. Raises what ``load_target`` raises."""
    return load_target(dataset_of(config, split, limit=limit, download=download), progress)


def dataset_of(
    config: TrainConfig, split: str, *, limit: int | None = None, download: bool = False
) -> DatasetSpec:
    """What opens a split of the configuration's target."""
    return DatasetSpec(
        config.target,
        split,
        root=config.root,
        limit=limit,
        download=download,
        partial=config.partial,
        decoder=config.used_decoder,
        strict=config.strict_fingerprint,
        columns=config.columns,
        label_separator=config.label_separator,
        allow_outside_root=config.allow_outside_root,
    )


def split_to_test(config: TrainConfig) -> str:
    """The split that a configuration is judged on; ``none``."""
    if config.test_split == "auto":
        return evaluation_split(dataset_of(config, config.split))
    return config.test_split
