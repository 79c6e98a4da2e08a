"""A labelling run in words: what a command line says, enough to open it on any machine."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.format.encodings import Encoding, parse_encoding
from sskt.teacher_cache.format.features import SOFT_LABELS
from sskt.teacher_cache.label_sets.create import SHARD_ROWS
from sskt.teacher_cache.labeling.run import StageOptions
from sskt.teacher_cache.labeling.units import MEMORY
from sskt.teacher_cache.sources.batchnorm import parse_batchnorm
from sskt.teacher_cache.sources.features import parse_output
from sskt.teacher_cache.sources.outputs import parse_outputs
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Source, usable_device
from sskt.teacher_cache.targets.open import load_target, policy_of
from sskt.teacher_cache.targets.spec import DatasetSpec
from sskt.teacher_cache.views.frame_sampling import parse_frame_sampling
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, open_views

Progress = Callable[[int, int], None]
LIBRARIES = [
    "sskt",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "simplejpeg",
    "av",
    "zarr",
    "numcodecs",
]


@dataclass(frozen=True)
class Job:
    """The arguments of ``sskt cache-teachers`` that say what to compute, and how it runs.

    ``memory`` in GiB; ``frame_sampling`` empty: the paper's centre frame, for clips.
    """

    sources: tuple[str, ...]
    dataset: DatasetSpec
    cache: str = ""
    seeds: int = 10
    policy: str = "auto"
    frame_sampling: str = ""
    encoding: str = "f16"
    output: str = SOFT_LABELS
    weights: tuple[str, ...] = ()
    preprocessing: tuple[str, ...] = ()
    batchnorm: str = "eval"
    logits_are: tuple[str, ...] = ()
    precision: str = "float32"
    device: str = "auto"
    compile: bool = False
    batch_size: int = 64
    workers: int | None = None
    on_error: str = "fail"
    shard_rows: int = SHARD_ROWS
    memory: float = MEMORY

    @property
    def how(self) -> Encoding:
        """The encoding."""
        return parse_encoding(self.encoding, self.output)

    def options(self, opened: Sequence[Opened]) -> StageOptions:
        """How the stage runs this job."""
        return StageOptions(
            batch_size=self.batch_size,
            workers=self.workers,
            on_error=self.on_error,
            shard_rows=self.shard_rows,
            memory=self.memory,
            provenance={one.source.name: self._provenance(one) for one in opened},
        )

    def _provenance(self, opened: Opened) -> dict[str, Any]:
        more = {"frame_sampling": self._frame_sampling()} if self.frame_sampling else {}
        return provenance(opened, self.dataset.provenance(), self.batch_size, more)

    def _frame_sampling(self) -> str:
        file, colon, function = self.frame_sampling.rpartition(":")
        return f"{full_path(file)}:{function}" if colon else self.frame_sampling


@dataclass(frozen=True)
class Opened:
    """A source, and the arguments that open it again."""

    source: Source
    arguments: dict[str, Any]


def provenance(
    opened: Opened, target: Mapping[str, Any], batch_size: int, more: Mapping[str, Any]
) -> dict[str, Any]:
    """What a label set records of how it was made; it is no part of its identity.

    Args:
        opened: The source.
        target: What opens the target again: name or full path, root, limit.
        batch_size: Samples of a forward pass.
        more: Further arguments of the labelling.
    """
    device, faster = opened.source.device, opened.source.faster
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return {
        **opened.arguments,
        **target,
        "batch_size": batch_size,
        "device": f"{device.type} ({where})",
        "forward": "as given" if faster is None else faster.kind,
        "versions": _versions(),
        **more,
    }


def _versions() -> dict[str, str]:
    """The versions of the libraries that are installed; PyAV is an extra."""
    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def open_job_views(job: Job, progress: Progress = lambda done, total: None) -> Views:
    """The target and its views. Raises what ``load_target`` and ``open_views`` raise."""
    parse_output(job.output)
    parse_encoding(job.encoding, job.output)
    f_s = parse_frame_sampling(job.frame_sampling) if job.frame_sampling else None
    policy = None if job.policy == "auto" else parse_policy(job.policy)
    target = load_target(job.dataset, progress)
    return open_views(target, policy or parse_policy(policy_of(target)), f_s)


def open_job_sources(job: Job) -> list[Opened]:
    """The sources of a job, on its device."""
    return open_sources(
        job.sources,
        job.weights,
        job.preprocessing,
        job.precision,
        job.device,
        parse_batchnorm(job.batchnorm, job.batch_size),
        job.logits_are,
        job.batch_size if job.compile else None,
        job.output,
    )


def open_sources(
    texts: Sequence[str],
    weights: Sequence[str],
    preprocessing: Sequence[str],
    precision: str,
    device: str,
    batchnorm: str = "eval",
    logits_are: Sequence[str] = (),
    compile_batch: int | None = None,
    output: str = SOFT_LABELS,
) -> list[Opened]:
    """Opens sources as a command line names them.

    Args:
        texts: ``--source`` arguments.
        weights: ``[NAME=]FILE`` each.
        preprocessing: ``[NAME:]key=value,...`` each.
        precision: ``float32``, else bfloat16.
        device: See ``usable_device``.
        batchnorm: ``eval`` or ``batch-B``.
        logits_are: ``[NAME=]KIND`` each, see ``parse_outputs``.
        compile_batch: Images of a forward pass for which networks are compiled; None: they are not.
        output: What is stored, see ``parse_output``.

    Returns:
        The sources, with the arguments that open them again.

    Raises:
        InputError: If an argument does not say for which source it is; and what ``open_source``
            raises.
    """
    wanted = [parse_source(text) for text in texts]
    names = [w.name for w in wanted]
    files = _by_name(weights, "=", names, "--weights")
    fields = _by_name(preprocessing, ":", names, "--preprocessing")
    kinds = _by_name(logits_are, "=", names, "--logits-are")
    place = usable_device(device)
    opened = []
    for text, name in zip(texts, wanted, strict=True):
        file = files.get(name.name)
        source = open_source(
            name,
            weights=Path(file) if file else None,
            preprocessing=fields.get(name.name, ""),
            precision="float32" if precision == "float32" else "bfloat16",
            device=place,
            batchnorm=batchnorm,
            outputs=parse_outputs(kinds.get(name.name, "")),
            compile_batch=compile_batch,
            output=output,
        )
        arguments = {
            "source": source_at(text, name.file, full_path(name.file)) if name.file else text,
            "weights": full_path(file) if file else None,
            "preprocessing": fields.get(name.name, ""),
        }
        arguments |= {"logits_are": kinds[name.name]} if name.name in kinds else {}
        opened.append(Opened(source, arguments))
    return opened


def source_at(text: str, file: Path, path: str) -> str:
    """A ``--source`` argument that names a file, with another path to it."""
    name, _, place = text.partition("=")
    return f"{name}={path}{place[place.rindex(file.name) + len(file.name) :]}"


def full_path(path: str | Path) -> str:
    """As recorded, so that verify finds it from any folder."""
    return str(Path(path).resolve())


def _by_name(items: Sequence[str], mark: str, names: list[str], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items:
        name, has_mark, rest = item.partition(mark)
        if has_mark and name in names:
            found[name] = rest
        elif len(names) == 1:
            found[names[0]] = item
        else:
            known = ", ".join(names)
            raise InputError(f"{option} {item}: say for which source ({known}), as NAME{mark}...")
    return found
