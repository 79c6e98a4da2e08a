"""What a training lacks, found before torch is imported: data, labels, names, files."""

from __future__ import annotations

from pathlib import Path

from sskt.teacher_cache.errors import raise_missing
from sskt.teacher_cache.locations import is_zip, label_location
from sskt.teacher_cache.sources.names import parse_source
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.caching_command import caching_command, sources_to_cache
from sskt.trainer.data.splits import dataset_of


def require_present(config: TrainConfig) -> None:
    """Checks names, and that data and labels can be there.

    Raises:
        UnknownName: For a target or a source that is not known.
        MissingData: Names everything that is missing, each with the command that makes it.
    """
    for text in config.source:
        parse_source(text, stored=not config.live)
    lacking = dataset_of(config, config.split, download=config.download).lacking_data()
    problems = [lacking] if lacking else []
    location = label_location(config.labels or config.cache)
    if config.source and not config.live and _is_empty(location.value):
        command = caching_command(config, sources_to_cache(config), None, download=bool(lacking))
        problems.append(f"no label sets in {location}; make them with: {command}")
    raise_missing(problems)


def _is_empty(cache: str) -> bool:
    """Whether a local cache holds no folder; others are not looked at."""
    if "://" in cache or is_zip(cache):
        return False
    path = Path(cache)
    return not path.is_dir() or not any(p.is_dir() for p in path.iterdir() if p.name[:1] != ".")
