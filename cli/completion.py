"""Values that the shell completes: names of targets, sources, policies, networks and recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def targets() -> Iterable[str]:
    """Names of the known targets."""
    from sskt.teacher_cache.targets.registry import TARGETS

    return TARGETS


def sources() -> Iterable[str]:
    """Names of the known sources."""
    from sskt.teacher_cache.sources.names import SOURCES

    return SOURCES


def policies() -> Iterable[str]:
    """Names of the view policies."""
    from sskt.teacher_cache.views.policies import POLICIES

    return POLICIES


def encodings() -> Iterable[str]:
    """Names of the encodings."""
    from sskt.teacher_cache.format.encodings import NAMES

    return NAMES


def models() -> Iterable[str]:
    """Names of the target networks."""
    from sskt.trainer.models.registry import NETWORKS

    return NETWORKS


def recipes() -> Iterable[str]:
    """Names of the recipes of trainings."""
    from sskt.trainer.recipes import shipped

    return shipped("training")


def completing(known: Callable[[], Iterable[str]]) -> dict[str, Any]:
    """Settings of an option whose values are names, or else files.

    Args:
        known: Returns the names.

    Returns:
        Keyword arguments of ``click.option``.
    """

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in known() if name.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type="file")]

    return {"shell_complete": complete}


OF_OPTIONS: dict[str, Callable[[], Iterable[str]]] = {
    "target": targets,
    "source": sources,
    "policy": policies,
    "model": models,
    "encoding": encodings,
    "recipe": recipes,
}
"""By the name of the option."""
