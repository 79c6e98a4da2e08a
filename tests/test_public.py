"""The public interface: its names, its docstrings, and what it costs to import it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import sskt

NAMES = [
    "__version__",
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
    "LabelSet",
    "SSKTNetwork",
    "SoftLabelBatch",
    "SoftLabelLoader",
    "Source",
    "StageReport",
    "Target",
    "TimmTeacher",
    "TrainConfig",
    "TrainedNetwork",
    "Views",
    "cache_teachers",
    "freeze",
    "kl_divergence",
    "list_label_sets",
    "open_label_set",
    "open_run",
    "open_source",
    "open_target",
    "open_views",
    "register_policy",
    "soft_binary_cross_entropy",
    "soft_cross_entropy",
    "soft_focal",
    "total_loss",
    "train",
]
LOSSES = (
    "kl_divergence",
    "soft_binary_cross_entropy",
    "soft_cross_entropy",
    "soft_focal",
    "total_loss",
)
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(sskt, name))]


def test_the_names_are_these() -> None:
    """A name that goes is an incompatible change; a new one is a promise."""
    assert sorted(sskt.__all__) == sorted(NAMES)
    assert dir(sskt) == sorted(NAMES)
    with pytest.raises(AttributeError, match="module 'sskt' has no attribute 'open_everything'"):
        _ = sskt.open_everything


@pytest.mark.parametrize("name", [n for n in NAMES if n != "__version__"])
def test_every_name_is_documented(name: str) -> None:
    text = inspect.getdoc(getattr(sskt, name)) or ""
    assert text.partition("\n")[0].endswith(".") and len(text) > 40


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_names_its_arguments_its_result_and_its_errors(name: str) -> None:
    function: Any = getattr(sskt, name)
    text = inspect.getdoc(function) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    missing = [p for p in inspect.signature(function).parameters if f"    {p}: " not in arguments]
    assert not missing and "\nReturns:\n" in text
    assert name in LOSSES or "\nRaises:\n" in text


def test_the_import_is_cheap() -> None:
    """The least of five, in processor time, so that other load counts little."""
    code = "import time; t = time.process_time(); import sskt; print(time.process_time() - t)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(5)
    ]
    assert min(seconds) < 0.1
