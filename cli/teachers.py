"""``sskt cache-teachers``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.output import as_json, human_bytes, print_json, print_table, progress, working
from sskt.teacher_cache.errors import InputError

if TYPE_CHECKING:
    from sskt.teacher_cache.sources import Source
    from sskt.teacher_cache.stage import StageReport


@click.command("cache-teachers")
@click.option(
    "--source",
    "sources",
    multiple=True,
    required=True,
    metavar="NAME[:ARCH][@SIZE]",
    help="Source, e.g. imagenet:resnet50, places365, NAME=FILE.py:factory; repeat for several.",
)
@click.option(
    "--target", required=True, help="Known target (sskt datasets) or a folder of class folders."
)
@click.option(
    "--cache", type=click.Path(path_type=Path), required=True, help="Folder of the label sets."
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 2**31),
    default=10,
    show_default=True,
    help="Number of view seeds: 0 .. N-1.",
)
@click.option("--root", type=click.Path(path_type=Path), help="Where the target's data lives.")
@click.option("--split", default="train", show_default=True)
@click.option(
    "--policy", default="auto", help="View policy NAME[:key=value,...]; auto: the target's own."
)
@click.option("--encoding", default="f16", show_default=True, help="f16, u8, topk-K or f32.")
@click.option("--limit", type=click.IntRange(1), help="Only this many samples, evenly spread.")
@click.option(
    "--weights", multiple=True, metavar="[NAME=]FILE", help="Own weights for a known architecture."
)
@click.option(
    "--preprocessing",
    multiple=True,
    metavar="[NAME:]key=value,...",
    help="Override size, mean=a/b/c, std, channels=bgr, scale of a source.",
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto: cuda if any."
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "bf16"]),
    default="float32",
    show_default=True,
    help="Arithmetic of the forward pass; recorded.",
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--workers", type=click.IntRange(0), help="Loader processes; default: by cores, 0 for RAM."
)
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="What an unreadable image does.",
)
@click.option(
    "--shard-rows",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Samples in a shard, the unit of writing and resuming (a new set only).",
)
@click.option("--download", is_flag=True, help="Let torchvision download the target.")
@as_json
def cache_teachers(
    sources: tuple[str, ...],
    target: str,
    cache: Path,
    seeds: int,
    root: Path | None,
    split: str,
    policy: str,
    encoding: str,
    limit: int | None,
    weights: tuple[str, ...],
    preprocessing: tuple[str, ...],
    device: str,
    precision: str,
    batch_size: int,
    workers: int | None,
    on_error: str,
    shard_rows: int,
    download: bool,
    as_json: bool,
) -> None:
    """Label a target once with frozen sources.

    One pass over the data for all sources and seeds. Stop it anywhere: the same command
    finishes the rest, and the bytes are the same as without the stop.
    """
    _check_folder(cache)
    with working("opening target and sources"):
        from sskt.teacher_cache import stage
        from sskt.teacher_cache.encodings import parse_encoding
        from sskt.teacher_cache.targets import default_policy, is_folder, open_target
        from sskt.teacher_cache.views import Views, parse_policy

        how = parse_encoding(encoding)
        seen = parse_policy(default_policy(target) if policy == "auto" else policy)
        views = Views(open_target(target, split, root=root, limit=limit, download=download), seen)
        opened = open_sources(sources, weights, preprocessing, precision, device)
    where = {
        "target": _full(Path(target)) if is_folder(target) else target,
        "root": _full(root) if root else None,
        "limit": limit,
    }
    options = stage.StageOptions(
        batch_size=batch_size,
        workers=workers,
        on_error=on_error,
        shard_rows=shard_rows,
        made={s.name: how_made | where | _versions(s, batch_size) for s, how_made in opened},
    )
    try:
        with progress() as bar:
            report = stage.cache_teachers(
                views, [s for s, _ in opened], how, seeds, cache, options, bar("labels")
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "finished shards are stored; run the same command again to label the rest"
        ) from None
    _report(report, as_json)


def open_sources(
    texts: tuple[str, ...],
    weights: tuple[str, ...],
    preprocessing: tuple[str, ...],
    precision: str,
    device: str,
) -> list[tuple[Source, dict[str, Any]]]:
    """The sources of a command line, each with the arguments that open it again."""
    from sskt.teacher_cache.sources import usable_device
    from sskt.teacher_cache.zoo import open_source, parse_source

    wanted = [parse_source(text) for text in texts]
    names = [w.name for w in wanted]
    files, fields = (
        _by_name(weights, "=", names, "--weights"),
        _by_name(preprocessing, ":", names, "--preprocessing"),
    )
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
        )
        how = {
            "source": text if name.file is None else text.replace(str(name.file), _full(name.file)),
            "weights": _full(Path(file)) if file else None,
            "preprocessing": fields.get(name.name, ""),
        }
        opened.append((source, how))
    return opened


def _full(path: Path) -> str:
    """As recorded, so that verify finds it from any folder."""
    return str(path.resolve())


def _by_name(items: tuple[str, ...], mark: str, names: list[str], option: str) -> dict[str, str]:
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


def _check_folder(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {cache} as cache folder: {error.strerror}") from error


def _versions(source: Source, batch_size: int) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    device = source.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    libraries = ("sskt", "torch", "torchvision", "numpy", "pillow", "zarr", "numcodecs")
    return {
        "batch_size": batch_size,
        "device": f"{device.type} ({name})",
        "versions": {library: version(library) for library in libraries},
    }


def _report(report: StageReport, as_json: bool) -> None:
    rate = report.written / report.seconds if report.seconds else 0.0
    sets: list[dict[str, Any]] = [
        {"name": s.name, "bytes": s.stored_bytes(), "error": s.attributes.get("error")}
        for s in report.label_sets
    ]
    if as_json:
        print_json(
            {
                "written": report.written,
                "reused": report.reused,
                "skipped": report.skipped,
                "seconds": report.seconds,
                "label_sets": sets,
            }
        )
        return
    click.echo(
        f"{report.written:,} labels written ({rate:,.0f}/s), {report.reused:,} were there already"
    )
    if report.skipped:
        click.echo(f"skipped, unreadable: {', '.join(report.skipped)}")
    rows = [[s["name"], human_bytes(s["bytes"]), error_text(s["error"])] for s in sets]
    print_table(["label set", "size", "gradient error of the encoding"], rows)


def error_text(error: dict[str, Any] | None) -> str:
    """The measured encoding error in words."""
    if not error:
        return "not measured yet"
    return ", ".join(f"{error[t]['gradient']:.2g} at {t}" for t in ("T=1", "T=3"))
