"""The public functions that open targets, sources and label sets, and that make labels."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sskt.teacher_cache.errors import InputError, MissingData, first_line
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.format.features import SOFT_LABELS
from sskt.teacher_cache.label_sets import create as store
from sskt.teacher_cache.label_sets.create import SHARD_ROWS
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.labeling import run as stage
from sskt.teacher_cache.labeling.job import Opened, open_sources, provenance
from sskt.teacher_cache.labeling.run import StageOptions, StageReport
from sskt.teacher_cache.labeling.units import MEMORY
from sskt.teacher_cache.locations import label_location
from sskt.teacher_cache.sources import registry
from sskt.teacher_cache.sources import source as frozen
from sskt.teacher_cache.sources.batchnorm import EVAL, parse_batchnorm
from sskt.teacher_cache.sources.features import parse_output
from sskt.teacher_cache.sources.names import SourceName, parse_source
from sskt.teacher_cache.sources.outputs import count_outputs, parse_outputs
from sskt.teacher_cache.sources.preprocessing import class_names
from sskt.teacher_cache.sources.source import Preprocessing, Source, with_output
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.storage.http.published import NotPublished, is_published
from sskt.teacher_cache.storage.open import is_served, open_cache
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.open import load_target, policy_of
from sskt.teacher_cache.targets.own_dataset import open_dataset
from sskt.teacher_cache.targets.registry import TARGETS
from sskt.teacher_cache.targets.spec import DatasetSpec
from sskt.teacher_cache.views import views
from sskt.teacher_cache.views.frame_sampling import parse_frame_sampling
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

Progress = Callable[[int, int], None]
AUTO = "auto"
LIBRARIES = ("torch", "torchvision", "timm")
"""Packages whose classes are identified by name, as the known architectures are."""


def open_target(
    target: Any,
    split: str = "train",
    *,
    root: str | Path | None = None,
    limit: int | None = None,
    download: bool = False,
    partial: bool = False,
    decoder: str = "pyav",
    strict: bool = False,
    columns: str = "",
    label_separator: str = "",
    allow_outside_root: bool = False,
    name: str = "",
    classes: Sequence[str] | None = None,
    labels: Any = None,
    ids: Sequence[str] | None = None,
    fingerprint: str = "",
    progress: Progress = lambda done, total: None,
) -> Target:
    """Opens one split of a dataset as a target: its samples in a fixed order.

    Args:
        target: A known name (``sskt datasets`` lists them), a folder of class folders, a CSV or
            Parquet manifest, packed files (``hf:NAME_OR_PATH[:CONFIGURATION]``, ``wds:PATH``,
            ``parquet:PATH``), or an own map-style ``torch.utils.data.Dataset`` whose items are
            (image, label), with PIL images or uint8 arrays ``[H, W, 3]`` and without random
            transforms.
        split: Name of the split. Of an own dataset it is only recorded.
        root: Folder of the data of a known target or a manifest; default: ``$SSKT_DATA``, else
            ``data``.
        limit: Use only this many samples, all classes alike.
        download: Whether torchvision may download a known target.
        partial: Whether an official list may name files that are missing.
        decoder: Decoder of clips: ``pyav`` or ``decord``.
        strict: Whether the identity covers the contents of files, not only names and sizes.
        columns: Manifests and packed files only: names of the columns that have another name,
            such as ``path=file,label=tag``, or ``image=img,label=fine_label``.
        label_separator: Manifests only: what separates several labels of a sample; ``none`` if a
            label is always one name. Default: ``|`` in a column ``labels``.
        allow_outside_root: Manifests only: whether files may lie outside of ``root``, or else of
            the manifest's folder.
        name: Own datasets only, required: name of the target in the cache.
        classes: Own datasets only: names of the classes; default: ``dataset.classes``, else the
            numbers.
        labels: Own datasets only: true classes, int ``[N]``, or 0 and 1 ``[N, C]``; default:
            ``dataset.targets``, else those of the items.
        ids: Own datasets only: a name for each item; default: ``0``, ``1``, ... The identity
            covers them in their order.
        fingerprint: Own datasets only: identifies the data, such as a version. Without it every
            image is read once, and the identity covers the pixels.
        progress: Called with the number of files or images read, and of all.

    Returns:
        The target. Sample i is row i of every label set over it.

    Raises:
        UnknownName: If the target or the split is not known.
        MissingData: If files are missing; the message has the expected layout.
        InputError: If an own dataset cannot be used, or an argument does not go with the target.
    """
    own = {
        "name": name,
        "classes": classes,
        "labels": labels,
        "ids": ids,
        "fingerprint": fingerprint,
    }
    if isinstance(target, str | Path):
        given = [key for key, value in own.items() if value is not None and len(value)]
        if given:
            raise InputError(f"{given[0]}= goes with an own dataset, not with target {target}")
        spec = DatasetSpec(
            str(target),
            split,
            root,
            limit,
            download,
            partial,
            decoder,
            strict,
            columns,
            label_separator,
            allow_outside_root,
        )
        return load_target(spec, progress)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in TARGETS:
        raise InputError(
            f"an own dataset needs a name for the cache, found {name!r}; give name= of letters, "
            "digits, - and _, other than that of a known target"
        )
    return open_dataset(
        target,
        name=name,
        split=split,
        classes=classes,
        labels=labels,
        ids=ids,
        fingerprint=fingerprint,
        limit=limit,
        progress=progress,
    )


def open_views(target: Target, policy: str = AUTO, frame_sampling: str = "") -> Views:
    """Puts a target under a view policy.

    Args:
        target: What ``open_target`` returned.
        policy: ``NAME[:key=value,...]``; ``auto``: the target's default.
        frame_sampling: Clips only: f_s, the stills that a source sees; default: the centre frame.

    Returns:
        The views: ``views[sample, seed]`` is uint8 ``[H, W, 3]``, or ``[D, H, W, 3]`` for clips,
        and ``views.batch(samples, seed)`` stacks them.

    Raises:
        UnknownName: If the policy is not known.
        InputError: If the policy is not for such a target.
    """
    text = policy_of(target) if policy == AUTO else policy
    f_s = parse_frame_sampling(frame_sampling) if frame_sampling else None
    return views.open_views(target, parse_policy(text), f_s)


def open_source(
    text: str,
    *,
    weights: str | Path | None = None,
    preprocessing: str = "",
    precision: str = "float32",
    device: str | torch.device = AUTO,
    compile: bool = False,
    batchnorm: str = EVAL,
    batch_size: int = 64,
    logits_are: str = "",
) -> Source:
    """Builds a source (a teacher), loads its weights and freezes it.

    Args:
        text: As ``--source``: ``imagenet:resnet50``, ``places365``, ``NAME=FILE.py:factory``,
            ``NAME:timm/ARCH``, each with ``@SIZE`` for another input size.
        weights: Own weights for a known architecture.
        preprocessing: Overrides, ``size=224,mean=a/b/c,std=a/b/c,channels=bgr,scale=255``.
        precision: Arithmetic of the forward pass: ``float32`` or ``bfloat16``.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto``: cuda if there is one.
        compile: Whether to compile the network with ``torch.compile``, for ``batch_size`` images.
        batchnorm: ``eval``, or ``batch`` for BatchNorm over each batch, as in the paper's code.
        batch_size: Samples of such a batch, or of a forward pass of a compiled network.
        logits_are: What the network returns if it is not logits: ``probabilities`` or
            ``log-probabilities``; ``logits`` says that they are although they look like
            probabilities.

    Returns:
        The source, in evaluation mode and without gradients.

    Raises:
        UnknownName: If the source is not known.
        MissingData: If a file or a package is missing.
        BadCheckpoint: If the weights do not belong to the network.
        InputError: If the network cannot be used as a source.
    """
    return registry.open_source(
        parse_source(text),
        weights=None if weights is None else Path(weights),
        preprocessing=preprocessing,
        precision="float32" if precision == "float32" else "bfloat16",
        device=frozen.usable_device(str(device)),
        batchnorm=parse_batchnorm(batchnorm, batch_size),
        outputs=parse_outputs(logits_are),
        compile_batch=batch_size if compile else None,
    )


def freeze(
    module: nn.Module,
    *,
    name: str,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None = None,
    channels: str = "rgb",
    scale: float = 1.0,
    precision: str = "float32",
    device: str | torch.device = AUTO,
    compile: bool = False,
    batchnorm: str = EVAL,
    batch_size: int = 64,
    code: str | None = None,
    logits_are: str = "",
) -> Source:
    """Makes a source (a teacher) of an own module: evaluation mode, no gradients.

    Its input is ``(view / 255 * scale - mean) / std`` of the whole view resized to ``size``.

    Args:
        module: Takes float32 ``[n, 3, size, size]`` and returns logits ``[n, C]``, or an object
            that has them as ``logits``. It is changed:
            it moves to the device and its parameters lose their gradients.
        name: Name of the source: letters, digits, - and _.
        size: Pixels of the input.
        mean: One number for each channel, in the order of ``channels``.
        std: One number for each channel.
        classes: Names of the C classes; default: ``class 0``, ``class 1``, ...
        channels: ``rgb`` or ``bgr``.
        scale: The value of white before the mean is subtracted.
        precision: Arithmetic of the forward pass: ``float32`` or ``bfloat16``.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto``: cuda if there is one.
        compile: Whether to compile the network with ``torch.compile``, for ``batch_size`` images.
        batchnorm: ``eval``, or ``batch`` for BatchNorm over each batch, as in the paper's code.
        batch_size: Samples of such a batch, or of a forward pass of a compiled network.
        code: Identifies the code of the module beside its weights; default: a SHA-256 of its
            printed structure and of the source text of its class.
        logits_are: What the network returns if it is not logits: ``probabilities`` or
            ``log-probabilities``; ``logits`` says that they are although they look like
            probabilities.

    Returns:
        The source.

    Raises:
        InputError: If the module cannot be used as a source.
        TeacherMoved: If running the module changes its weights or statistics.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"source {name} is {type(module).__name__}, not a torch Module")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "primary":
        raise InputError(
            f"source name {name!r} cannot be used; give one of letters, digits, - and _ (not "
            "'primary')"
        )
    if len(mean) != 3 or len(std) != 3 or channels not in ("rgb", "bgr"):
        raise InputError(
            f"source {name}: mean and std need three numbers each, and channels is rgb or bgr; "
            f"found {mean}, {std}, {channels}"
        )
    how = Preprocessing(
        size,
        (float(mean[0]), float(mean[1]), float(mean[2])),
        (float(std[0]), float(std[1]), float(std[2])),
        "rgb" if channels == "rgb" else "bgr",
        scale,
    )
    wanted = SourceName(name)
    kind = type(module)
    try:
        count = count_outputs(name, module.cpu(), size)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"source {name} does not take input of {size} pixels: {first_line(error)}"
        ) from error
    return frozen.freeze(
        name,
        f"{kind.__module__}.{kind.__qualname__}",
        module,
        how,
        class_names(wanted, count, classes, "classes"),
        precision="float32" if precision == "float32" else "bfloat16",
        device=frozen.usable_device(str(device)),
        code=_code_of(module) if code is None else code,
        batchnorm=parse_batchnorm(batchnorm, batch_size),
        outputs=parse_outputs(logits_are),
        compile_batch=batch_size if compile else None,
    )


def _code_of(module: nn.Module) -> str:
    text, kind = repr(module), type(module)
    if kind.__module__.partition(".")[0] not in LIBRARIES:
        with contextlib.suppress(OSError, TypeError):  # defined where Python keeps no text
            text += inspect.getsource(kind)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def cache_teachers(
    target: Target,
    sources: str | Source | Sequence[str | Source],
    *,
    cache: CacheName | None = None,
    seeds: int = 10,
    policy: str = AUTO,
    encoding: str = "f16",
    output: str = SOFT_LABELS,
    frame_sampling: str = "",
    device: str | torch.device = AUTO,
    batch_size: int = 64,
    workers: int | None = None,
    memory: float = MEMORY,
    shard_rows: int = SHARD_ROWS,
    on_error: str = "fail",
    progress: Progress = lambda done, total: None,
) -> StageReport:
    """Labels a target once with frozen sources, as ``sskt cache-teachers`` does.

    What is stored already is kept. It is safe to stop anywhere and to run in several processes on
    one folder: the bytes are the same.

    Args:
        target: What ``open_target`` returned.
        sources: Sources as ``open_source`` or ``freeze`` return them, or texts as ``--source``.
        cache: Folder or bucket of the label sets; default: ``$SSKT_CACHE``, else ``labels``.
        seeds: View seeds S: 0 to S - 1.
        policy: View policy ``NAME[:key=value,...]``; ``auto``: the target's default.
        encoding: How labels are stored: ``f16``, ``root4``, ``root4-coarse``, ``u8``,
            ``topk-K`` or ``f32``; features and logits: ``f16`` or ``u8``.
        output: What is stored: ``soft-labels``; ``features``, the input of the network's last
            layer, with that layer, or ``features:MODULE``, the output of a module; ``logits``.
        frame_sampling: Clips only: f_s, the stills that a source sees; default: the centre frame.
        device: Device of the sources that are given as texts.
        batch_size: Samples of a forward pass.
        workers: Loader processes for files; default: by cores.
        memory: GiB for labels and views that are not yet stored.
        shard_rows: Samples in a shard of a new label set.
        on_error: What an unreadable sample does: ``fail`` raises ``BadImage``, ``skip`` leaves its
            row empty.
        progress: Called with the number of labels done in this run, and of all.

    Returns:
        The label sets, how many labels were written and how many reused, the skipped samples and
        the seconds.

    Raises:
        BadImage: If a sample cannot be read (with ``on_error="fail"``).
        DiskFull: If there is no room; what was stored before stays valid.
        TeacherMoved: If a source changed while it was labelling.
        InputError: If an argument cannot be used.
    """
    if seeds < 1 or on_error not in ("fail", "skip"):
        raise InputError(
            f"seeds must be at least 1 and on_error 'fail' or 'skip', found {seeds}, {on_error!r}"
        )
    seen = open_views(target, policy, frame_sampling)
    parse_output(output)
    how, given = parse_encoding(encoding, output), sources
    if isinstance(given, str | Source):
        given = [given]
    opened = [
        Opened(with_output(one, output), {"source": "", "weights": None, "preprocessing": ""})
        if isinstance(one, Source)
        else open_sources([one], [], [], "float32", str(device), output=output)[0]
        for one in given
    ]
    more = {"frame_sampling": frame_sampling} if frame_sampling else {}
    options = StageOptions(
        batch_size=batch_size,
        workers=workers,
        on_error=on_error,
        shard_rows=shard_rows,
        memory=memory,
        provenance={
            one.source.name: provenance(one, target.provenance, batch_size, more) for one in opened
        },
    )
    home = open_cache(_cache(cache, writable=True), make=True)
    return stage.cache_teachers(
        seen, [one.source for one in opened], how, seeds, home, options, progress
    )


def open_label_set(name: str | Path) -> LabelSet:
    """Opens a label set for reading.

    Args:
        name: Its folder, its zip file, or its URL: ``s3://BUCKET/PREFIX/NAME``,
            ``http://HOST:PORT/NAME`` of a label server, ``https://HOST/PATH/NAME`` of a plain web
            host (``sskt copy --publish``).

    Returns:
        The label set; ``rows(seed, ids)`` reads its labels.

    Raises:
        MissingData: If none exists.
        CorruptStore: If its metadata cannot be read.
    """
    if is_published(str(name)):
        with contextlib.suppress(NotPublished):
            return store.open_label_set(name)
    if is_served(name):
        home, _, last = str(name).rstrip("/").rpartition("/")
        found = {label_set.name: label_set for label_set in store.look_over(home)[0]}
        if last not in found:
            raise MissingData(
                f"no label set {last} on {home}; it has: {', '.join(found) or 'none'}"
            )
        return found[last]
    return store.open_label_set(name)


def list_label_sets(cache: CacheName | None = None) -> list[LabelSet]:
    """Opens all label sets of a cache.

    Args:
        cache: Folder or URL; default: ``$SSKT_CACHE`` or ``$SSKT_LABELS``, else ``labels``.

    Returns:
        The label sets, by name.

    Raises:
        MissingData: If the folder does not exist.
        CorruptStore: If one of the sets is damaged.
    """
    return store.list_label_sets(_cache(cache))


def _cache(cache: CacheName | None, *, writable: bool = False) -> CacheName:
    if cache is None:
        return label_location(writable=writable).value
    return cache
