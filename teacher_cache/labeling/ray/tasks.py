"""What a Ray task does on its node: open a run, label one unit, say how it went.

A task's own error comes back as data (``Failure``): most of our exceptions do not survive
pickling, and Ray would wrap them. Whatever else is raised is Ray's to carry.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from sskt.teacher_cache import errors
from sskt.teacher_cache.errors import InputError, SsktError
from sskt.teacher_cache.format.metadata import GROUP
from sskt.teacher_cache.format.spec import label_set_spec, name_of
from sskt.teacher_cache.labeling.job import Job, Opened, open_job_sources
from sskt.teacher_cache.labeling.run import (
    SourceLabels,
    StageOptions,
    count_labels,
    label_units,
    open_sets,
)
from sskt.teacher_cache.labeling.units import Unit, units
from sskt.teacher_cache.storage.open import open_cache
from sskt.teacher_cache.views.views import Views

REPORT_SECONDS = 0.5
"""A task says how far it is this often at most."""


@dataclass(frozen=True)
class Work:
    """The arguments of every task of a run.

    Attributes:
        job: What to label.
        version: Version of sskt that the driver runs.
        cpus: Cores of a task.
        gpus: GPUs of a task.
        slots: Tasks that run at a time.
        names: Names of the run's label sets, once they exist.
    """

    job: Job
    version: str
    cpus: float
    gpus: float
    slots: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """An ``SsktError`` on its way to the driver."""

    kind: str
    message: str
    node: str

    def error(self) -> SsktError:
        """The error again, with its exit status; the node is named where it is another one."""
        kind: type[SsktError] = getattr(errors, self.kind, SsktError)
        there = "" if self.node == socket.gethostname() else f" (on node {self.node})"
        return kind.__new__(kind, f"{self.message}{there}")  # some want more than a message


@dataclass(frozen=True)
class Missing:
    """A run as its first task found it: what is missing, and how many labels are there."""

    names: tuple[str, ...]
    todo: tuple[tuple[Unit, int], ...]
    stored: int


@dataclass(frozen=True)
class Labelled:
    """How a unit went. ``stored``: nothing of it is missing, as far as ``node`` can see."""

    stored: bool
    skipped: tuple[str, ...]
    node: str


def find_missing(work: Work, views: Views) -> Missing | Failure:
    """Opens the run: makes its label sets where they are new, and lists what is missing."""
    try:
        with _opened(work, views) as (_, pairs):
            job, todo, stored = work.job, [], 0
            sets = [pair.label_set for pair in pairs]
            for unit in units(views, sets, job.seeds, job.batch_size, job.memory, work.slots):
                wanted, missing = count_labels(sets, [unit])
                stored += wanted - missing
                if missing:
                    todo.append((unit, missing))
            return Missing(tuple(s.name for s in sets), tuple(todo), stored)
    except SsktError as error:
        return _failure(error)


def label(
    work: Work, views: Views, number: int, unit: Unit, owed: int, actor: Any
) -> Labelled | Failure:
    """Labels what is missing of a unit and not locked by another process.

    Args:
        work: Arguments of the run.
        views: The target under its policy.
        number: Number of the unit.
        unit: The unit.
        owed: Labels that the unit lacked at first.
        actor: The progress actor.
    """
    try:
        with _opened(work, views) as (options, pairs):
            said = _Reporter(actor, number, owed)
            report = label_units(views, pairs, [unit], options, said, wait=False)
            missing = count_labels(report.label_sets, [unit], fresh=True)[1]
            return Labelled(not missing, tuple(report.skipped), socket.gethostname())
    except SsktError as error:
        return _failure(error)


@contextlib.contextmanager
def _opened(work: Work, views: Views) -> Iterator[tuple[StageOptions, list[SourceLabels]]]:
    """The sources and the label sets of a run, if they are those of the other nodes."""
    if version("sskt") != work.version:
        raise InputError(
            f"this node has sskt {version('sskt')}, the command runs {work.version}: install the "
            "same version on all nodes"
        )
    job, threads = work.job, max(1, int(work.cpus))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    opened = _sources(replace(job, device=_device(job.device, work.gpus)))
    sources = [one.source for one in opened]
    names = tuple(name_of(label_set_spec(views, source, job.how)) for source in sources)
    if work.names and names != work.names:
        theirs, ours = next((a, b) for a, b in zip(work.names, names, strict=True) if a != b)
        raise InputError(
            f"this node would label {ours}, another one {theirs}: the sources' weights or code "
            "are not the same file on all nodes"
        )
    require_shared(job.cache, work.names)
    options = _options(work, opened, views)
    with open_sets(views, sources, job.how, job.seeds, job.cache, options) as pairs:
        yield options, pairs


@functools.lru_cache(maxsize=8)
def _sources(job: Job) -> list[Opened]:
    """The sources of a job, opened once a worker process (and once for each GPU it is given)."""
    return open_job_sources(job)


def _options(work: Work, opened: Sequence[Opened], views: Views) -> StageOptions:
    options = work.job.options(opened)
    if options.workers is None:  # a task has its own cores, not the machine's
        fitting = 0 if views.target.images is not None else int(work.cpus) - 1
        options = replace(options, workers=max(0, fitting))
    return options


def _device(wanted: str, gpus: float) -> str:
    """The device of this task: of a GPU, the one that Ray gave it."""
    if not gpus or wanted not in ("auto", "cuda"):
        return "cpu" if wanted == "auto" else wanted
    if not torch.cuda.is_available():
        raise InputError(
            f"Ray gave this node's task a GPU, but its torch {torch.__version__} can use none: "
            "install one with CUDA there, or choose --device cpu"
        )
    import ray

    given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return f"cuda:{gpu_number(str(given[0]), os.environ.get('CUDA_VISIBLE_DEVICES', ''))}"


def gpu_number(given: str, visible: str) -> int:
    """CUDA's number of the GPU that Ray calls ``given``, among those ``visible`` (or all)."""
    names = visible.split(",") if visible else []
    return names.index(given) if given in names else int(given)


def require_shared(cache: str, names: Sequence[str]) -> None:
    """Raises ``InputError`` if this machine does not see the run's label sets."""
    home, here = open_cache(cache), socket.gethostname()
    if home.is_local and not home.there():
        raise InputError(f"{here} has no folder {cache}: {SHARED}")
    for name in names:
        if home.below(name).size(GROUP, fresh=True) is None:
            raise InputError(
                f"{here} does not see label set {name}, which another node has made in {cache}: "
                f"{SHARED}"
            )


SHARED = "with --engine ray the cache is a folder that all nodes share (the same path), or s3://"


def _failure(error: SsktError) -> Failure:
    return Failure(type(error).__name__, str(error), socket.gethostname())


class _Reporter:
    """Tells the progress actor, now and then, how many of a unit's labels are done."""

    def __init__(self, actor: Any, number: int, owed: int) -> None:
        self._actor, self._number, self._owed, self._last = actor, number, owed, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= REPORT_SECONDS:
            self._last = now
            self._actor.report.remote(self._number, self._owed - total + done)
