"""Options of ``cache-teachers`` and ``plan``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.completion import completing, encodings, policies, sources, targets
from sskt.cli.locations import data_line
from sskt.cli.output import show
from sskt.teacher_cache.errors import raise_missing

if TYPE_CHECKING:
    from sskt.teacher_cache.labeling.job import Job

Command = Callable[..., Any]

GROUPS = {
    "Data": ("target", "root", "split", "limit", "partial", "strict", "download", "decoder"),
    "Manifests and packed images": ("columns", "label_separator", "allow_outside_root"),
    "Sources": (
        "sources",
        "weights",
        "preprocessing",
        "batchnorm",
        "frame_sampling",
        "logits_are",
    ),
    "Views and labels": (
        "seeds",
        "policy",
        "output",
        "encoding",
        "cache",
        "shard_rows",
        "on_error",
    ),
    "Running": ("device", "precision", "compile", "batch_size", "workers", "memory", "share"),
    "Ray": ("engine", "address", "task_gpus", "task_cpus"),
    "Estimate": ("machines", "epochs", "probe"),
}
"""The options of ``cache-teachers`` and ``plan`` in the groups of their help."""

_OPTIONS = (
    click.option(
        "--source",
        "sources",
        multiple=True,
        required=True,
        metavar="NAME[:ARCH][@SIZE]",
        **completing(sources),
        help="Source: imagenet:resnet50, places365, NAME=FILE.py:factory and so on. Repeat.",
    ),
    click.option(
        "--target",
        required=True,
        **completing(targets),
        help="Target: a known one (sskt datasets lists them), a folder of class folders, a .csv or "
        ".parquet manifest, or images packed in files: hf:NAME_OR_PATH, wds:PATH, parquet:PATH.",
    ),
    click.option(
        "--root",
        type=click.Path(path_type=Path),
        help="Folder of the target's data. Default: $SSKT_DATA, else ./data.",
    ),
    click.option("--split", default="train", show_default=True, help="Split to label."),
    click.option(
        "--seeds",
        type=click.IntRange(1, 2**31),
        default=10,
        show_default=True,
        help="Number S of view seeds: each sample is labelled in S augmented views.",
    ),
    click.option(
        "--policy",
        **completing(policies),
        default="auto",
        show_default=True,
        help="View policy NAME[:key=value,...] (see sskt policies), or your own as "
        "FILE.py:function[:key=value,...]. auto: that of the target.",
    ),
    click.option(
        "--frame-sampling",
        "--f-s",
        "frame_sampling",
        default="",
        help="f_s, the stills of a clip that the sources see: center, first, uniform-K, random or "
        "FILE.py:function. Default: center. (video targets only)",
    ),
    click.option(
        "--encoding",
        **completing(encodings),
        default="f16",
        show_default=True,
        help="Encoding of the labels: f16, root4, root4-coarse, u8, topk-K or f32; of features and "
        "logits: f16 or u8.",
    ),
    click.option(
        "--output",
        default="soft-labels",
        show_default=True,
        metavar="soft-labels|features[:MODULE]|logits",
        help="What is stored. features: the input of the network's last linear layer, with that "
        "layer, which give soft labels at any temperature. features:MODULE: the output of a "
        "module. logits: for classes that do not exclude each other.",
    ),
    click.option(
        "--limit",
        type=click.IntRange(1),
        help="Samples to label, evenly over the classes.",
    ),
    click.option(
        "--partial", is_flag=True, help="Accept that files of the official list are missing."
    ),
    click.option(
        "--decoder",
        type=click.Choice(["pyav", "decord"]),
        default="pyav",
        show_default=True,
        help="Decoder of clips. (video targets only)",
    ),
    click.option(
        "--strict-fingerprint",
        "strict",
        is_flag=True,
        help="Identify the target by the contents of its files, not only by names and sizes.",
    ),
    click.option("--download", is_flag=True, help="Let torchvision download the target."),
    click.option(
        "--columns",
        default="",
        metavar="path=COLUMN,...",
        help="Names of the columns that are not called path, label or labels, split, class_name; "
        "for packed images those of image and label.",
    ),
    click.option(
        "--label-separator",
        default="",
        help="Separator of several labels of a sample; none: a label is always one name. Default: "
        "| in a column labels.",
    ),
    click.option(
        "--allow-outside-root",
        is_flag=True,
        help="Accept files outside of --root, or else of the folder of the manifest.",
    ),
    click.option(
        "--weights",
        multiple=True,
        metavar="[NAME=]FILE",
        help="Weights for a known architecture. Repeat for several sources.",
    ),
    click.option(
        "--preprocessing",
        multiple=True,
        metavar="[NAME:]key=value,...",
        help="Preprocessing of a source: size, mean=a/b/c, std, channels=bgr and scale.",
    ),
    click.option(
        "--logits-are",
        multiple=True,
        metavar="[NAME=]KIND",
        help="What a source's network returns if not logits: probabilities or log-probabilities. "
        "KIND logits accepts logits that look like probabilities.",
    ),
    click.option(
        "--batchnorm",
        type=click.Choice(["eval", "batch"]),
        default="eval",
        show_default=True,
        help="Statistics of BatchNorm. batch: those of each batch, as in the paper's code; the "
        "batch size is then part of the identity.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "bf16"]),
        default="float32",
        show_default=True,
        help="Arithmetic of the forward pass. It is part of the identity.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Device: cpu, cuda or cuda:1. auto: cuda if there is one.",
    ),
    click.option(
        "--compile",
        is_flag=True,
        help="Compile the sources with torch.compile. It takes about half a minute a source and "
        "pays for many labels; sskt plan counts it.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Images of a forward pass.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(0),
        help="Loader processes. Default: by the number of cores; 0 for targets in memory.",
    ),
    click.option(
        "--memory",
        type=click.FloatRange(0, min_open=True),
        default=4.0,
        show_default=True,
        help="GiB for labels and views that are not stored yet. More memory lets more view seeds "
        "share one decoding.",
    ),
    click.option(
        "--on-error",
        type=click.Choice(["fail", "skip"]),
        default="fail",
        show_default=True,
        help="What to do about a sample that cannot be read: fail, or skip it.",
    ),
    click.option(
        "--shard-rows",
        type=click.IntRange(1),
        default=8192,
        show_default=True,
        help="Samples of a shard, the unit of writing and resuming. (new label sets only)",
    ),
)


_RUN_OPTIONS = (
    click.option(
        "--share",
        default="auto",
        show_default=True,
        metavar="RANK/WORLD",
        help="Part of the run that this process labels. auto: from RANK and WORLD_SIZE, or from "
        "srun's variables. none: everything; processes on one folder divide the work by locks.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="ray: spread the shards over a Ray cluster (extra 'ray').",
    ),
    click.option(
        "--address",
        default="",
        help="Address of the Ray cluster: auto, HOST:PORT (from one of its nodes) or "
        "ray://HOST:PORT. Default: $RAY_ADDRESS, else a cluster that is started here.",
    ),
    click.option(
        "--task-gpus",
        type=click.FloatRange(0),
        help="GPUs, or a fraction, that a Ray task holds. Default: 1 if the cluster has any.",
    ),
    click.option(
        "--task-cpus",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        help="CPU cores that a Ray task holds.",
    ),
)


def job_options(command: Command) -> Command:
    """Adds the options; the command gets them as keywords, for ``job_of``."""
    return _with(_OPTIONS, command)


def run_options(command: Command) -> Command:
    """Adds the options that say where a job runs."""
    return _with(_RUN_OPTIONS, command)


def _with(options: Sequence[Command], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def require_ready(given: dict[str, Any]) -> None:
    """Checks what the options name, before torch is imported, and says which data was taken.

    Raises:
        UnknownName: For a source or a target that is not known.
        MissingData: Names all files that are missing.
    """
    from sskt.teacher_cache.sources.names import parse_source
    from sskt.teacher_cache.targets.spec import DatasetSpec

    target, root = given["target"], given["root"]
    files = [parse_source(text).file for text in given["sources"]]
    problems = [f"no file {file}" for file in files if file is not None and not file.is_file()]
    lacking = DatasetSpec(target, root=root, download=given["download"]).lacking_data()
    raise_missing([*problems, lacking] if lacking else problems)
    if line := data_line(target, root):
        show(line, err=True)


def job_of(cache: str, given: dict[str, Any], **more: Any) -> Job:
    """The job that the options describe."""
    from sskt.teacher_cache.labeling.job import Job
    from sskt.teacher_cache.targets.spec import DatasetSpec

    dataset = DatasetSpec(**{field.name: given.pop(field.name) for field in fields(DatasetSpec)})
    return Job(dataset=dataset, cache=cache, **given, **more)
