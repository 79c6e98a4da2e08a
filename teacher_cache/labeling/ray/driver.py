"""The teacher stage over a Ray cluster: plain tasks, one a unit of whole shards.

Shards are there whole or not at all, so whatever dies is simply labelled again: Ray retries the
task, the task skips what is stored. Nothing is kept in actors
(``docs/decisions/0010-many-machines.md``).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, SsktError, described
from sskt.teacher_cache.label_sets.create import open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling.job import Job, open_job_views, source_at
from sskt.teacher_cache.labeling.ray.cluster import (
    RayOptions,
    connected,
    import_ray,
    require_reachable,
    slots_of,
    task_gpus_of,
)
from sskt.teacher_cache.labeling.ray.progress import UnitProgress
from sskt.teacher_cache.labeling.ray.tasks import (
    SHARED,
    Failure,
    Labelled,
    Missing,
    Work,
    find_missing,
    label,
    require_shared,
)
from sskt.teacher_cache.labeling.run import StageReport
from sskt.teacher_cache.labeling.units import Unit
from sskt.teacher_cache.sources.names import parse_source
from sskt.teacher_cache.storage.open import open_cache
from sskt.teacher_cache.views.views import Views

__all__ = ["RayOptions", "cache_with_ray"]

Progress = Callable[[int, int], None]

RETRIES = 5
"""Times a unit is tried again after its worker or node died. Errors of ours are not retried."""

LOOK_SECONDS = 0.5
"""How often the driver looks at the tasks; its pause while another process is at a shard."""

NODES_SECONDS = 10.0
GONE_SECONDS = 900.0
"""How often the driver asks for the nodes, and how long it waits for one that can hold a task."""

SEEN_SECONDS = 60.0
"""How long a shard that a node has stored may stay out of sight: what NFS caches at most."""


def cache_with_ray(
    job: Job,
    options: RayOptions | None = None,
    progress: Progress = lambda done, total: None,
    reading: Progress = lambda done, total: None,
    opened: Callable[[Views], None] = lambda views: None,
) -> StageReport:
    """``cache_teachers`` with the units spread over a Ray cluster; the same bytes.

    The target is read here, once; all nodes see its files, the sources' and the cache under the
    same paths. ``written`` of the report is what was missing before and is stored now. A Ray
    session that the program has open is used and left open. Raises what ``cache_teachers``
    raises, ``MissingData`` without Ray, ``InputError`` for a cluster that cannot be used.
    """
    begin, options = time.monotonic(), options or RayOptions()
    ray = import_ray()
    _check(job, options)
    address = options.address or os.environ.get("RAY_ADDRESS", "")
    require_reachable(address)
    job = _everywhere(job)
    open_cache(job.cache, make=True)
    views = open_job_views(job, reading)
    opened(views)
    views.target.identity()  # takes the fingerprint here, not in every worker
    with connected(ray, address):
        gpus = task_gpus_of(ray.nodes(), job.device, options)
        slots = slots_of(ray.nodes(), options.task_cpus, gpus)
        work = Work(job, version("sskt"), options.task_cpus, gpus, slots)
        return _Run(ray, work, ray.put(views), views, progress).finish(begin)


def _check(job: Job, options: RayOptions) -> None:
    gpus = options.task_gpus
    if gpus is not None and not 0 <= gpus <= 1:
        raise InputError(f"--task-gpus {gpus:g}: a task uses one GPU or a fraction of it (0 to 1)")
    if options.task_cpus <= 0:
        raise InputError(f"--task-cpus must be above 0, found {options.task_cpus:g}")
    if job.device.startswith("cuda:"):
        raise InputError(f"--device {job.device}: Ray chooses the GPU of a task; use --device cuda")


def _everywhere(job: Job) -> Job:
    """The job with full paths: tasks have another working folder."""

    def source(text: str) -> str:
        file = parse_source(text).file
        return text if file is None else source_at(text, file, _full(file))

    def weights(text: str) -> str:
        name, mark, file = text.partition("=")
        named = bool(mark) and name in {parse_source(s).name for s in job.sources}
        return f"{name}={_full(file)}" if named else _full(text)

    file, colon, function = job.frame_sampling.rpartition(":")
    return replace(
        job,
        sources=tuple(map(source, job.sources)),
        weights=tuple(map(weights, job.weights)),
        dataset=job.dataset.absolute(),
        frame_sampling=f"{_full(file)}:{function}" if colon else job.frame_sampling,
        cache=job.cache if "://" in job.cache else _full(job.cache),
    )


def _full(path: str | Path) -> str:
    return str(Path(path).absolute())


@dataclass
class _Run:
    """One run: a find_missing, then tasks until nothing is missing."""

    ray: Any
    work: Work
    ref: Any
    views: Views
    progress: Progress
    pending: dict[Any, int] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    looked: float = field(default_factory=time.monotonic)
    held: float = field(default_factory=time.monotonic)

    def finish(self, begin: float) -> StageReport:
        """Labels until nothing is missing."""
        try:
            found = self._find_missing()
            self._label(found)
        except BaseException:
            self._cancel()
            raise
        names = [name for name in self.views.target.ids if name in self.skipped]
        written = sum(owed for _, owed in found.todo)
        sets = self._sets(found.names)
        return StageReport(sets, written, found.stored, names, time.monotonic() - begin)

    def _task(self, function: Callable[..., Any], name: str) -> Any:
        more: dict[str, Any] = {}
        if self.work.gpus:
            # A worker that gets another GPU later could not see it once CUDA has begun: all are
            # left visible and the task takes its own. By default Ray ends GPU workers after each
            # task, and the sources would be loaded each time.
            unset = ("CUDA", "HIP")
            names = [f"RAY_EXPERIMENTAL_NOSET_{kind}_VISIBLE_DEVICES" for kind in unset]
            more = {"runtime_env": {"env_vars": dict.fromkeys(names, "1")}, "max_calls": 0}
        cpus, gpus = self.work.cpus, self.work.gpus
        return self.ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, name=name, **more
        )(function)

    def _find_missing(self) -> Missing:
        asked = self._task(find_missing, "sskt survey").remote(self.work, self.ref)
        self.pending = {asked: -1}
        while not self._ready():
            pass
        self.pending = {}
        found: Missing = self._result(asked)
        self.work = replace(self.work, names=found.names)
        require_shared(self.work.job.cache, found.names)
        return found

    def _label(self, found: Missing) -> None:
        todo = {number: unit for number, (unit, _) in enumerate(found.todo)}
        owed = {number: missing for number, (_, missing) in enumerate(found.todo)}
        if not todo:
            return
        task, bar = self._task(label, "sskt label"), _Bar(self.ray, self.progress, owed)
        sets = self._sets(found.names)
        while todo:
            for number, unit in todo.items():
                asked = task.remote(self.work, self.ref, number, unit, owed[number], bar.actor)
                self.pending[asked] = number
            before = len(todo)
            while self.pending:
                for asked in self._ready():
                    number = self.pending.pop(asked)
                    labelled = self._result(asked)
                    self.skipped.update(labelled.skipped)
                    if labelled.stored:
                        self._require_seen(sets, todo.pop(number), labelled.node)
                        bar.finished(number)
                bar.refresh()
            if len(todo) == before:  # the rest is locked by another run or a lost worker
                time.sleep(LOOK_SECONDS)

    def _ready(self) -> list[Any]:
        """Tasks that have ended, after a while. Raises ``InputError`` if none can ever run."""
        ready: list[Any] = self.ray.wait(list(self.pending), timeout=LOOK_SECONDS)[0]
        if ready or time.monotonic() < self.looked + NODES_SECONDS:
            return ready
        self.looked = time.monotonic()
        try:
            slots_of(self.ray.nodes(), self.work.cpus, self.work.gpus)
            self.held = self.looked
        except InputError as error:
            if self.looked > self.held + GONE_SECONDS:
                raise InputError(f"{error}; finished shards are stored") from error
        return ready

    def _result(self, asked: Any) -> Any:
        """What a task gave back. Raises its error, or says how Ray failed it."""
        try:
            result: Missing | Labelled | Failure = self.ray.get(asked)
        except self.ray.exceptions.RayTaskError as error:
            if "failed to import on the worker" in str(error):
                lines = str(error).strip().splitlines()
                raise InputError(
                    "a node of the Ray cluster cannot run sskt: install the same version of "
                    f"sskt[ray] on all nodes ({lines[-1]})"
                ) from error
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise SsktError(f"a Ray task failed: {described(error)}") from error
        except self.ray.exceptions.RayError as error:
            raise SsktError(
                f"a Ray task was lost {RETRIES + 1} times or cannot run: {described(error)} (if "
                "its node ran out of memory: fewer tasks at a time with --task-cpus, or a smaller "
                "--batch-size or --memory); finished shards are stored"
            ) from error
        if isinstance(result, Failure):
            raise result.error()
        return result

    def _require_seen(self, sets: Sequence[LabelSet], unit: Unit, node: str) -> None:
        """Raises ``InputError`` if what a node has stored does not come into sight here."""
        limit = time.monotonic() + SEEN_SECONDS
        alike = [s for s in sets if s.shard_rows == unit.rows]
        unseen = [(s, shard) for s in alike for shard in unit.shards]
        while True:
            unseen = [(s, shard) for s, shard in unseen if not s.has(shard, fresh=True)]
            if not unseen:
                return
            if time.monotonic() >= limit:
                label_set, shard = unseen[0]
                raise InputError(
                    f"node {node} stored samples {shard.start} to {shard.stop - 1} of seed "
                    f"{shard.seed} in {self.work.job.cache}, but {socket.gethostname()} does not "
                    f"see them in {label_set.name}: {SHARED}"
                )
            time.sleep(LOOK_SECONDS)

    def _sets(self, names: Sequence[str]) -> list[LabelSet]:
        home = open_cache(self.work.job.cache)
        return [open_label_set(home.below(name)) for name in names]

    def _cancel(self) -> None:
        """Tasks that wait never begin, those that run are interrupted; stored shards stay."""
        for asked in self.pending:
            with contextlib.suppress(Exception):
                self.ray.cancel(asked)


class _Bar:
    """Labels done so far, from the tasks' words while they run."""

    def __init__(self, ray: Any, progress: Progress, owed: Mapping[int, int]) -> None:
        self._ray, self._progress, self._owed = ray, progress, owed
        self._total, self._done = sum(owed.values()), dict.fromkeys(owed, 0)
        self._finished: set[int] = set()
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        node = ray.get_runtime_context().get_node_id()
        here = strategies.NodeAffinitySchedulingStrategy(node, soft=True)
        actor = ray.remote(num_cpus=0, scheduling_strategy=here)(UnitProgress)
        self.actor = actor.remote()
        self._asked = self.actor.read.remote()

    def finished(self, number: int) -> None:
        """A unit is stored."""
        self._finished.add(number)
        self._done[number] = self._owed[number]

    def refresh(self) -> None:
        """Shows what is known; never waits."""
        if self._asked is not None and self._ray.wait([self._asked], timeout=0)[0]:
            try:
                said: dict[int, int] = self._ray.get(self._asked)
                self._asked = self.actor.read.remote()
            except self._ray.exceptions.RayError:
                said, self._asked = {}, None
            for number in said.keys() - self._finished:
                self._done[number] = said[number]
        self._progress(sum(self._done.values()), self._total)
