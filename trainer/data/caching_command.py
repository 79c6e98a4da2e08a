"""The ``sskt cache-teachers`` command that makes the labels of a training."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from sskt.teacher_cache.format.features import SOFT_LABELS
from sskt.teacher_cache.sources.names import SOURCES
from sskt.teacher_cache.targets.registry import TARGETS
from sskt.trainer.config import AUTO, FIELDS, TrainConfig
from sskt.trainer.loss_inputs import needed_output

VIEW_FIELDS = (
    "target",
    "root",
    "split",
    "limit",
    "partial",
    "decoder",
    "strict_fingerprint",
    "columns",
    "label_separator",
    "allow_outside_root",
    "policy",
    "download",
)
"""Fields that decide what the sources see."""


def caching_command(
    config: TrainConfig,
    sources: Sequence[str],
    seeds: int | None,
    more: Sequence[str] = (),
    *,
    download: bool = False,
) -> str:
    """The ``sskt cache-teachers`` that makes the labels of a training, ready to be typed.

    Args:
        config: The training.
        sources: ``--source`` arguments.
        seeds: View seeds; None for the command's default.
        more: Further options.
        download: Whether to add ``--download`` if the target can be downloaded.
    """
    words = ["sskt", "cache-teachers"]
    for text in sources:
        words += ["--source", text.partition("#")[0]]
    for name in VIEW_FIELDS:
        value, option = getattr(config, name), f"--{name.replace('_', '-')}"
        if name == "download" and download and config.target in TARGETS:
            value = value or TARGETS[config.target].downloads
        if value != FIELDS[name].default:
            words += [option] if value is True else [option, str(value)]
    if (output := needed_output(config.loss)) != SOFT_LABELS and "--output" not in more:
        words += ["--output", output]
    if seeds is not None:
        words += ["--seeds", str(seeds)]
    words += more
    if config.cache is not None:
        words += ["--cache", str(config.cache)]
    return shlex.join(words)


def sources_to_cache(config: TrainConfig) -> list[str]:
    """The sources to propose for caching: those named, else all known ones."""
    return list(SOURCES) if config.source == [AUTO] else list(config.source)
