"""Soft labels of frozen teachers, computed once and streamed into every training (SSKT).

The names in ``__all__`` are the public interface. Each is imported when it is first used, so that
``import sskt`` loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sskt.teacher_cache.errors import (
        BadCheckpoint,
        BadClip,
        BadImage,
        CorruptStore,
        DiskFull,
        Diverged,
        IncompleteLabels,
        InputError,
        MissingData,
        SpecMismatch,
        SsktError,
        TeacherMoved,
        UnknownName,
        ViewMismatch,
    )
    from sskt.teacher_cache.label_sets.create import list_label_sets, open_label_set
    from sskt.teacher_cache.label_sets.label_set import LabelSet
    from sskt.teacher_cache.labeling.run import cache_teachers
    from sskt.teacher_cache.sources.registry import open_source
    from sskt.teacher_cache.sources.source import freeze
    from sskt.teacher_cache.targets.registry import open_target
    from sskt.trainer.config import TrainConfig
    from sskt.trainer.models.heads import SSKTNetwork

    __version__: str

__all__ = [
    "BadCheckpoint",
    "BadClip",
    "BadImage",
    "CorruptStore",
    "DiskFull",
    "Diverged",
    "IncompleteLabels",
    "InputError",
    "LabelSet",
    "MissingData",
    "SSKTNetwork",
    "SpecMismatch",
    "SsktError",
    "TeacherMoved",
    "TrainConfig",
    "UnknownName",
    "ViewMismatch",
    "__version__",
    "cache_teachers",
    "freeze",
    "list_label_sets",
    "open_label_set",
    "open_source",
    "open_target",
]

_PUBLIC = {
    "BadCheckpoint": "sskt.teacher_cache.errors:BadCheckpoint",
    "BadClip": "sskt.teacher_cache.errors:BadClip",
    "BadImage": "sskt.teacher_cache.errors:BadImage",
    "CorruptStore": "sskt.teacher_cache.errors:CorruptStore",
    "DiskFull": "sskt.teacher_cache.errors:DiskFull",
    "Diverged": "sskt.teacher_cache.errors:Diverged",
    "IncompleteLabels": "sskt.teacher_cache.errors:IncompleteLabels",
    "InputError": "sskt.teacher_cache.errors:InputError",
    "LabelSet": "sskt.teacher_cache.label_sets.label_set:LabelSet",
    "MissingData": "sskt.teacher_cache.errors:MissingData",
    "SSKTNetwork": "sskt.trainer.models.heads:SSKTNetwork",
    "SpecMismatch": "sskt.teacher_cache.errors:SpecMismatch",
    "SsktError": "sskt.teacher_cache.errors:SsktError",
    "TeacherMoved": "sskt.teacher_cache.errors:TeacherMoved",
    "TrainConfig": "sskt.trainer.config:TrainConfig",
    "UnknownName": "sskt.teacher_cache.errors:UnknownName",
    "ViewMismatch": "sskt.teacher_cache.errors:ViewMismatch",
    "cache_teachers": "sskt.teacher_cache.labeling.run:cache_teachers",
    "freeze": "sskt.teacher_cache.sources.source:freeze",
    "list_label_sets": "sskt.teacher_cache.label_sets.create:list_label_sets",
    "open_label_set": "sskt.teacher_cache.label_sets.create:open_label_set",
    "open_source": "sskt.teacher_cache.sources.registry:open_source",
    "open_target": "sskt.teacher_cache.targets.registry:open_target",
}
"""``module:attribute`` of each public name."""


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562). Raises ``AttributeError``."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("sskt")
    elif name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module 'sskt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
