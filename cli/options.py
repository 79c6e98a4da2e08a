"""The options that ``cache-teachers`` and ``plan`` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.locations import data_line
from sskt.teacher_cache.errors import raise_missing

if TYPE_CHECKING:
    from sskt.teacher_cache.labeling.job import Job

Command = Callable[..., Any]

_OPTIONS = (
    click.option(
        "--source",
        "sources",
        multiple=True,
        required=True,
        metavar="NAME[:ARCH][@SIZE]",
        help="Source, e.g. imagenet:resnet50, places365, NAME=FILE.py:factory; repeat for several.",
    ),
    click.option(
        "--target",
        required=True,
        help="Known target (sskt datasets), a folder of class folders (images or clips), or a "
        ".csv or .parquet manifest.",
    ),
    click.option(
        "--root",
        type=click.Path(path_type=Path),
        help="Folder of the target's data. Default: $SSKT_DATA, else ./data (or NAME in it).",
    ),
    click.option("--split", default="train", show_default=True),
    click.option(
        "--seeds",
        type=click.IntRange(1, 2**31),
        default=10,
        show_default=True,
        help="Number of view seeds: 0 .. N-1.",
    ),
    click.option(
        "--policy", default="auto", help="View policy NAME[:key=value,...]; auto: the target's own."
    ),
    click.option(
        "--frame-sampling",
        "--f-s",
        "frame_sampling",
        default="",
        help="Stills of a clip that the sources see: center (default), first, uniform-K, random, "
        "FILE.py:function.",
    ),
    click.option("--encoding", default="f16", show_default=True, help="f16, u8, topk-K or f32."),
    click.option(
        "--limit", type=click.IntRange(1), help="Only this many samples, all classes alike."
    ),
    click.option(
        "--partial", is_flag=True, help="Take what is there of an official list of files."
    ),
    click.option(
        "--decoder",
        type=click.Choice(["pyav", "decord"]),
        default="pyav",
        show_default=True,
        help="Of clips.",
    ),
    click.option(
        "--strict-fingerprint",
        "strict",
        is_flag=True,
        help="The identity covers the files' contents, not only their names and sizes.",
    ),
    click.option("--download", is_flag=True, help="Let torchvision download the target."),
    click.option(
        "--columns",
        default="",
        metavar="path=COLUMN,...",
        help="Manifests: the columns that are not named path, label or labels, split, class_name.",
    ),
    click.option(
        "--label-separator",
        default="",
        help="Manifests: what separates several labels of a sample; none: a label is one name.  "
        "[default: | in a column labels]",
    ),
    click.option(
        "--allow-outside-root",
        is_flag=True,
        help="Manifests: files may lie outside of --root, or else of the manifest's folder.",
    ),
    click.option(
        "--weights",
        multiple=True,
        metavar="[NAME=]FILE",
        help="Own weights for a known architecture.",
    ),
    click.option(
        "--preprocessing",
        multiple=True,
        metavar="[NAME:]key=value,...",
        help="Override size, mean=a/b/c, std, channels=bgr, scale of a source.",
    ),
    click.option(
        "--batchnorm",
        type=click.Choice(["eval", "batch"]),
        default="eval",
        show_default=True,
        help="batch: BatchNorm over each batch, as the paper's code; the batch size is recorded.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "bf16"]),
        default="float32",
        show_default=True,
        help="Arithmetic of the forward pass; recorded.",
    ),
    click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto: cuda if any."
    ),
    click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True),
    click.option(
        "--workers", type=click.IntRange(0), help="Loader processes; default: by cores, 0 for RAM."
    ),
    click.option(
        "--memory",
        type=click.FloatRange(0, min_open=True),
        default=4.0,
        show_default=True,
        help="GiB for labels and views not yet stored: more lets more seeds share a decoding.",
    ),
    click.option(
        "--on-error",
        type=click.Choice(["fail", "skip"]),
        default="fail",
        show_default=True,
        help="What an unreadable image or clip does.",
    ),
    click.option(
        "--shard-rows",
        type=click.IntRange(1),
        default=8192,
        show_default=True,
        help="Samples in a shard, the unit of writing and resuming (a new set only).",
    ),
)


_RUN_OPTIONS = (
    click.option(
        "--share",
        default="auto",
        show_default=True,
        metavar="RANK/WORLD",
        help="Only this part of the run. auto: from RANK and WORLD_SIZE, or srun's SLURM_PROCID "
        "and SLURM_STEP_NUM_TASKS; none: all, divided by locks among processes on one folder.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="ray: spread the shards over a Ray cluster (sskt[ray]).",
    ),
    click.option(
        "--address",
        default="",
        help="Ray cluster: auto, HOST:PORT (from one of its nodes) or ray://HOST:PORT; default: "
        "RAY_ADDRESS, else one started here.",
    ),
    click.option(
        "--task-gpus",
        type=click.FloatRange(0),
        help="GPUs (or a fraction) a Ray task holds; default: 1 if the cluster has any, else 0.",
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
        click.echo(line, err=True)


def job_of(cache: str, given: dict[str, Any], **more: Any) -> Job:
    """The job that the options describe."""
    from sskt.teacher_cache.labeling.job import Job
    from sskt.teacher_cache.targets.spec import DatasetSpec

    dataset = DatasetSpec(**{field.name: given.pop(field.name) for field in fields(DatasetSpec)})
    return Job(dataset=dataset, cache=cache, **given, **more)
