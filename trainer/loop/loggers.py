"""Sending the records of a run to MLflow, Weights & Biases, Trackio, or to code of one's own.

A logger is never stored with a run: who resumes a run names it again, so that no folder of a run
chooses code.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, SsktError, UnknownName, described
from sskt.teacher_cache.own_code import find_function

Record = Mapping[str, Any]
Log = Callable[[Record], None]
"""Gets the record of each epoch; with an attribute ``close``, that is called at the end."""
Opener = Callable[[Mapping[str, Any], Path], Log]
"""Gets the configuration of a run and its folder; returns the logger of the run."""

KNOWN = ("mlflow", "wandb", "trackio")
PROJECT = "sskt"
_OWN = re.compile(r"(?P<place>[^:]+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


class RunLogger:
    """The logger of one run. An error of it never ends the training.

    Args:
        log: Gets the record of each epoch.
        text: The name of the logger, as it was given.
        note: Gets a sentence about an error.
    """

    def __init__(self, log: Log, text: str, note: Callable[[str], None]) -> None:
        self._log: Log | None = log
        self._text, self._note = text, note

    def __call__(self, record: Record) -> None:
        """Logs the record of an epoch."""
        if self._log is not None:
            self._guarded(self._log, record)

    def close(self) -> None:
        """Ends the logger, if it has an end."""
        close = getattr(self._log, "close", None)
        if close is not None:
            self._guarded(close)
        self._log = None

    def _guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            self._log = None
            what = described(error)
            self._note(f"--logger {self._text} failed ({what}); the training goes on without it")


def find_logger(text: str) -> Opener:
    """Finds a logger before the training begins.

    Args:
        text: ``mlflow``, ``wandb``, ``trackio``, ``FILE.py:function`` or ``module:attribute``.
            The function or attribute is called with the configuration (a dict of plain values)
            and the folder of the run, and returns a function that gets each epoch's record.

    Returns:
        What opens the logger of a run.

    Raises:
        UnknownName: If there is no such logger.
        MissingExtra: If its package is not installed.
        MissingData: If there is no such file or module.
        InputError: If there is no such function in it, or its code fails.
    """
    if text == "mlflow":
        import mlflow

        return lambda config, out: _Mlflow(mlflow, config, out)
    if text in ("wandb", "trackio"):
        package = importlib.import_module(text)
        return lambda config, out: _Wandb(package, config, out)
    if not _OWN.fullmatch(text):
        raise UnknownName("logger", text, [*KNOWN, "FILE.py:function", "module:attribute"])
    return find_function(text, f"--logger {text}")


def open_logger(
    opener: Opener, text: str, config: Mapping[str, Any], out: Path, note: Callable[[str], None]
) -> RunLogger:
    """Opens the logger of a run.

    Args:
        opener: What ``find_logger`` returned.
        text: The name of the logger, as it was given.
        config: The fields of the configuration.
        out: The folder of the run.
        note: Gets a sentence if the logger fails later.

    Returns:
        The logger.

    Raises:
        InputError: If it cannot be opened.
    """
    try:
        log = opener(config, out)
    except SsktError:
        raise
    except Exception as error:
        what = described(error)
        raise InputError(f"--logger {text} cannot be opened: {what}") from error
    if not callable(log):
        raise InputError(
            f"--logger {text} returned {type(log).__name__}, expected a function that takes the "
            "record of an epoch"
        )
    return RunLogger(log, text, note)


def numbers(record: Record) -> dict[str, float]:
    """The finite numbers of an epoch's record, without the number of the epoch."""
    found = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "epoch"}
    return {k: float(v) for k, v in found.items() if math.isfinite(v)}


class _Mlflow:
    """A run of MLflow; where it goes, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

    LONGEST = 500  # characters of a parameter that every MLflow server takes

    def __init__(self, mlflow: Any, config: Mapping[str, Any], out: Path) -> None:
        self._mlflow = mlflow
        self._run = mlflow.start_run(run_name=out.name)
        mlflow.log_params({k: str(v)[: self.LONGEST] for k, v in config.items()})

    def __call__(self, record: Record) -> None:
        self._mlflow.log_metrics(numbers(record), step=record["epoch"] + 1)

    def close(self) -> None:
        self._mlflow.end_run()


class _Wandb:
    """A run of Weights & Biases, or of Trackio, which has the same functions."""

    def __init__(self, package: Any, config: Mapping[str, Any], out: Path) -> None:
        project = os.environ.get(f"{package.__name__.upper()}_PROJECT") or PROJECT
        self._package = package
        package.init(project=project, name=out.name, config=dict(config))

    def __call__(self, record: Record) -> None:
        self._package.log(numbers(record), step=record["epoch"] + 1)

    def close(self) -> None:
        self._package.finish()
