"""What a labelling run will cost: a probe of some seconds on the real target and sources.

Everything is measured on the run's own samples: reading and augmenting, the forward pass of
each source, and the compressed size of each encoding.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.errors import MissingData
from sskt.teacher_cache.format.encodings import Encoding, parse_encoding
from sskt.teacher_cache.format.features import SOFT_LABELS
from sskt.teacher_cache.format.metadata import CHUNK_ROWS, GROUP
from sskt.teacher_cache.format.spec import label_set_spec, name_of
from sskt.teacher_cache.label_sets.create import open_label_set
from sskt.teacher_cache.label_sets.documents import lacks_group
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling.job import Job
from sskt.teacher_cache.labeling.loader import ReadRequest, ViewReader
from sskt.teacher_cache.labeling.units import Unit, seeds_together, units
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.storage.local import LocalStorage
from sskt.teacher_cache.storage.open import open_cache
from sskt.teacher_cache.views.views import Views

ENCODINGS = ("f32", "f16", "root4", "u8", "root4-coarse", "topk-10")
CHECK_BYTES = 4
PROBE_ROWS = 512
"""Views of the probe that the sources label."""

_STEP = 7919
"""A prime, so that the probe visits the target out of order: neighbours may be alike."""


@dataclass(frozen=True)
class SourcePlan:
    """One source: seconds a label takes on one device, bytes a label takes by encoding."""

    name: str
    arch: str
    classes: int
    seconds: float
    bytes: dict[str, float]


@dataclass(frozen=True)
class RunPlan:
    """What the labels that are not stored yet will cost.

    labels: to be made, of all sources; stored: already there. views: to be read. decodings: times
    a file is decoded, at most. read_seconds: for one machine to decode and augment these views;
    label_seconds: for its device to label them. compile_seconds: for each machine to compile the
    sources. hours, by number of machines: the longer of reading and labelling on a GPU, their sum
    where both need the CPU; and the compilation. passes: forward passes over the target, at
    most, that the cache costs each source; trained_passes: those of one training with the sources
    in every step. break_even: trainings from which on the cache takes less time. bytes: to be
    written, by encoding.
    """

    samples: int
    seeds: int
    labels: int
    stored: int
    views: int
    sources: list[SourcePlan]
    decodings: int
    read_seconds: float
    label_seconds: float
    compile_seconds: float
    hours: dict[int, float]
    bytes: dict[str, int]
    passes: int
    trained_passes: int
    break_even: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan(
    job: Job,
    views: Views,
    sources: Sequence[Source],
    *,
    epochs: int,
    machines: Sequence[int] = (1,),
    seconds: float = 6.0,
) -> RunPlan:
    """Probes for about ``seconds`` and predicts; ``epochs`` of one training, for break-even.

    Raises ``MissingData`` if no sample of the probe can be read.
    """
    samples, seeds = len(views.target), job.seeds
    label = sum(job.how.bytes_per_label(s.width) for s in sources)
    together = seeds_together(views, job.shard_rows, label, seeds, job.batch_size, job.memory)
    rate, probe = _probe_reading(job, views, together, seconds / 2)
    fewest = min(source.width for source in sources)
    known = ENCODINGS if job.output == SOFT_LABELS else ("f16", "u8")
    names = dict.fromkeys([job.encoding, *known])
    wanted = [parse_encoding(name, job.output) for name in names]
    encodings = [encoding for encoding in wanted if encoding.k <= fewest]
    planned = [_probe_source(s, probe, encodings, seconds / 2 / len(sources)) for s in sources]
    stored = {str(e): [_stored_set(job, views, s, e) for s in sources] for e in encodings}
    lacking = {name: [_missing(s, seeds) for s in sets] for name, sets in stored.items()}
    sets, missing = stored[str(job.how)], lacking[str(job.how)]
    cut = units(views, sets, seeds, job.batch_size, job.memory)
    read = {unit: _views(sets, unit) for unit in cut}
    often = Counter((unit.rows, unit.shards[0].block) for unit in cut if read[unit])
    seen = sum(read.values())
    read_seconds = seen / rate
    label_seconds = sum(n * p.seconds for n, p in zip(missing, planned, strict=True))
    one_pass = samples * sum(p.seconds for p in planned)
    on_cpu = any(s.device.type == "cpu" for s in sources)
    total = read_seconds + label_seconds if on_cpu else max(read_seconds, label_seconds)
    compiling = sum(s.faster.seconds for s in sources if s.faster) if sum(missing) else 0.0
    in_memory = views.target.images is not None
    return RunPlan(
        samples=samples,
        seeds=seeds,
        labels=sum(missing),
        stored=samples * seeds * len(planned) - sum(missing),
        views=seen,
        sources=planned,
        decodings=0 if in_memory else max(often.values(), default=0),
        read_seconds=read_seconds,
        label_seconds=label_seconds,
        compile_seconds=compiling,
        hours={n: (total * _longest(job, views, sets, n) + compiling) / 3600 for n in machines},
        bytes={
            name: round(sum(n * p.bytes[name] for n, p in zip(counts, planned, strict=True)))
            for name, counts in lacking.items()
        },
        passes=-(-max(missing) // samples),
        trained_passes=epochs,
        break_even=int((total + compiling) / (one_pass * epochs)) + 1,
    )


def _stored_set(job: Job, views: Views, source: Source, encoding: Encoding) -> LabelSet:
    """The label set that the run continues; else an empty one like it."""
    spec = label_set_spec(views, source, encoding)
    if job.cache:
        place = open_cache(job.cache).below(name_of(spec))
        if place.size(GROUP) is not None or lacks_group(place):
            return open_label_set(place)
    samples = len(views.target)
    attributes = {"spec": spec, "classes": source.classes}
    rows = min(job.shard_rows, -(-samples // CHUNK_ROWS) * CHUNK_ROWS)
    return _NothingStored(LocalStorage(Path(os.devnull)), attributes, job.seeds, samples, rows)


class _NothingStored(LabelSet):
    """A label set that does not exist yet: all of its shards are missing."""

    def refresh(self) -> None:
        """Does nothing, as there is no folder to look at."""


def _missing(label_set: LabelSet, seeds: int) -> int:
    return sum(shard.stop - shard.start for shard in label_set.missing(range(seeds)))


def _views(sets: Sequence[LabelSet], unit: Unit) -> int:
    """Views of a unit that some set has no label of."""
    alike = [s for s in sets if s.shard_rows == unit.rows]
    lacking = [shard for shard in unit.shards if not all(s.has(shard) for s in alike)]
    return sum(shard.stop - shard.start for shard in lacking)


def _longest(job: Job, views: Views, sets: Sequence[LabelSet], machines: int) -> float:
    """The share of the missing units of the machine that has most of them."""
    cut = units(views, sets, job.seeds, job.batch_size, job.memory, machines)
    left = [_views(sets, unit) > 0 for unit in cut]
    return max(sum(left[rank::machines]) for rank in range(machines)) / max(1, sum(left))


def _probe_reading(
    job: Job, views: Views, together: int, seconds: float
) -> tuple[float, list[Tensor]]:
    """Views a second as the run itself would read them, and some of what the sources see."""
    count = len(views.target)
    size = min(count, max(4, 4 * job.batch_size // together))
    places = max(1, count // size)
    seeds = tuple(range(together))

    def requests() -> Iterator[ReadRequest]:
        for i in range(places + 1):  # the first is not counted
            start = i * _STEP % places * size
            yield ReadRequest(0, start, min(start + size, count), start, seeds)

    kept: list[Tensor] = []
    begin, read, spent = 0.0, 0, 0.0
    reader = ViewReader(views, job.workers, torch.device("cpu"))
    for number, batch in enumerate(reader.read(requests())):
        if batch.error:
            raise MissingData(batch.error)
        # The last one is the first again: labels that come twice would compress to half.
        if number < places and len(batch.rows) and sum(map(len, kept)) < PROBE_ROWS:
            kept.append(batch.stills[0])
        if not begin:  # starting the workers is no part of the rate
            begin = time.perf_counter()
            continue
        read += len(batch.rows) * together
        spent = time.perf_counter() - begin
        if spent > seconds:
            break
    if not kept or not read:
        raise MissingData(
            f"plan: could read no sample of {views.target.name} {views.target.split} that it tried"
        )
    return read / spent, _batches_of(kept, job.batch_size)


def _batches_of(kept: Sequence[Tensor], size: int) -> list[Tensor]:
    """As the run forwards them; images of several sizes as they came."""
    several = len({stills.shape[1:] for stills in kept}) > 1
    groups = kept if several else [torch.cat(list(kept))]
    parts = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    return [part for part in parts if len(part) == max(map(len, parts))]


def _probe_source(
    source: Source, probe: Sequence[Tensor], encodings: Sequence[Encoding], seconds: float
) -> SourcePlan:
    logs: list[NDArray[np.float32]] = []
    begin, done, spent = 0.0, 0, 0.0
    for turn in itertools.count():
        stills = probe[turn % len(probe)]
        log_p = source.log_probabilities(stills).cpu().numpy()
        if turn < len(probe):
            logs.append(log_p)
        if not turn:  # the first pass also allocates and picks kernels
            begin = time.perf_counter()
            continue
        done += len(stills)
        spent = time.perf_counter() - begin
        if spent > seconds and turn >= min(3, len(probe)):
            break
    rows = np.concatenate(logs)[:CHUNK_ROWS]
    sizes = {str(e): _compressed(e, rows) + CHECK_BYTES for e in encodings}
    return SourcePlan(source.name, source.arch, len(source.classes), spent / done, sizes)


def _compressed(encoding: Encoding, log_p: NDArray[np.float32]) -> float:
    """Bytes of a label as the store's codec leaves them."""
    arrays = encoding.encode(log_p).values()
    return sum(len(encoding.compressed(array)) for array in arrays) / len(log_p)
