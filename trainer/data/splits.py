"""The splits of a configuration's target."""

from __future__ import annotations

from collections.abc import Callable

from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.registry import evaluation_split, open_target
from sskt.trainer.config import TrainConfig


def open_split(
    config: TrainConfig,
    split: str,
    *,
    limit: int | None = None,
    download: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Target:
    """A split of the configuration's target. Raises what ``open_target`` raises."""
    return open_target(
        config.target,
        split,
        root=config.root,
        limit=limit,
        download=download,
        partial=config.partial,
        decoder=config.used_decoder,
        strict=config.strict_fingerprint,
        progress=progress,
    )


def split_to_test(config: TrainConfig) -> str:
    """The split that a configuration is judged on; ``none``."""
    if config.test_split == "auto":
        return evaluation_split(config.target, config.split)
    return config.test_split
