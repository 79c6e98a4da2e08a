"""Soft labels of frozen teachers, computed once and streamed into every training (SSKT).

The names in ``__all__`` are the public interface. Each is imported when it is first used, so that
``import sskt`` loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sskt.teacher_cache.api import cache_teachers as cache_teachers
    from sskt.teacher_cache.api import freeze as freeze
    from sskt.teacher_cache.api import list_label_sets as list_label_sets
    from sskt.teacher_cache.api import open_label_set as open_label_set
    from sskt.teacher_cache.api import open_source as open_source
    from sskt.teacher_cache.api import open_target as open_target
    from sskt.teacher_cache.api import open_views as open_views
    from sskt.teacher_cache.errors import BadCheckpoint as BadCheckpoint
    from sskt.teacher_cache.errors import BadClip as BadClip
    from sskt.teacher_cache.errors import BadImage as BadImage
    from sskt.teacher_cache.errors import CorruptStore as CorruptStore
    from sskt.teacher_cache.errors import DiskFull as DiskFull
    from sskt.teacher_cache.errors import Diverged as Diverged
    from sskt.teacher_cache.errors import IncompleteLabels as IncompleteLabels
    from sskt.teacher_cache.errors import InputError as InputError
    from sskt.teacher_cache.errors import MissingData as MissingData
    from sskt.teacher_cache.errors import SpecMismatch as SpecMismatch
    from sskt.teacher_cache.errors import SsktError as SsktError
    from sskt.teacher_cache.errors import TeacherMoved as TeacherMoved
    from sskt.teacher_cache.errors import UnknownName as UnknownName
    from sskt.teacher_cache.errors import ViewMismatch as ViewMismatch
    from sskt.teacher_cache.label_sets.label_set import LabelSet as LabelSet
    from sskt.teacher_cache.labeling.run import StageReport as StageReport
    from sskt.teacher_cache.sources.source import Source as Source
    from sskt.teacher_cache.targets.base import Target as Target
    from sskt.teacher_cache.views.policies import register_policy as register_policy
    from sskt.teacher_cache.views.views import Views as Views
    from sskt.trainer.api import train as train
    from sskt.trainer.config import TrainConfig as TrainConfig
    from sskt.trainer.data.soft_label_batch import SoftLabelBatch as SoftLabelBatch
    from sskt.trainer.data.soft_label_loader import SoftLabelLoader as SoftLabelLoader
    from sskt.trainer.data.timm_teacher import TimmTeacher as TimmTeacher
    from sskt.trainer.loop.trained import TrainedNetwork as TrainedNetwork
    from sskt.trainer.loop.trained import open_run as open_run
    from sskt.trainer.losses import kl_divergence as kl_divergence
    from sskt.trainer.losses import soft_binary_cross_entropy as soft_binary_cross_entropy
    from sskt.trainer.losses import soft_cross_entropy as soft_cross_entropy
    from sskt.trainer.losses import soft_focal as soft_focal
    from sskt.trainer.losses import total_loss as total_loss
    from sskt.trainer.models.heads import SSKTNetwork as SSKTNetwork

    __version__: str

_MODULES = {
    "sskt.teacher_cache.api": (
        "cache_teachers",
        "freeze",
        "list_label_sets",
        "open_label_set",
        "open_source",
        "open_target",
        "open_views",
    ),
    "sskt.teacher_cache.errors": (
        "BadCheckpoint",
        "BadClip",
        "BadImage",
        "CorruptStore",
        "DiskFull",
        "Diverged",
        "IncompleteLabels",
        "InputError",
        "MissingData",
        "SpecMismatch",
        "SsktError",
        "TeacherMoved",
        "UnknownName",
        "ViewMismatch",
    ),
    "sskt.teacher_cache.label_sets.label_set": ("LabelSet",),
    "sskt.teacher_cache.labeling.run": ("StageReport",),
    "sskt.teacher_cache.sources.source": ("Source",),
    "sskt.teacher_cache.targets.base": ("Target",),
    "sskt.teacher_cache.views.policies": ("register_policy",),
    "sskt.teacher_cache.views.views": ("Views",),
    "sskt.trainer.api": ("train",),
    "sskt.trainer.config": ("TrainConfig",),
    "sskt.trainer.data.soft_label_batch": ("SoftLabelBatch",),
    "sskt.trainer.data.soft_label_loader": ("SoftLabelLoader",),
    "sskt.trainer.data.timm_teacher": ("TimmTeacher",),
    "sskt.trainer.loop.trained": ("TrainedNetwork", "open_run"),
    "sskt.trainer.losses": (
        "kl_divergence",
        "soft_binary_cross_entropy",
        "soft_cross_entropy",
        "soft_focal",
        "total_loss",
    ),
    "sskt.trainer.models.heads": ("SSKTNetwork",),
}
"""The public names, by the module that defines them."""

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562).

    Raises:
        AttributeError: If the name is not public.
        MissingData: If the name needs an extra of sskt that is not installed, such as ``train``.
    """
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("sskt")
    elif name in _MODULE_OF:
        value = getattr(_imported(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module 'sskt' has no attribute {name!r}")
    globals()[name] = value
    return value


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        from sskt.teacher_cache.extras import missing_extra

        if lacking := missing_extra(error):
            raise lacking from error
        raise


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(__all__)
