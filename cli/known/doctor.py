"""``sskt doctor``: what of this installation and machine will work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.locations import DEFAULT_LABELS
from sskt.cli.output import as_json, human_bytes, print_json, print_table
from sskt.teacher_cache.errors import MissingData, SsktError, first_line
from sskt.teacher_cache.extras import install_command

OK, NOTE, FAILS = "ok", "note", "fails"
PACKAGES = (
    ("zarr", ""), ("numcodecs", ""), ("fastapi", ""), ("uvicorn", ""), ("torch", "train"),
    ("torchvision", "train"), ("av", "video"), ("decord", "decord"),
    ("efficientnet-lite-pytorch", "lite"), ("timm", "timm"), ("obstore", "cloud"), ("ray", "ray"),
    ("pyarrow", "parquet"), ("datasets", "hf"), ("scipy", "imagenet"),
    ("nvidia-nvimgcodec-cu12", "nvimgcodec"), ("mlflow-skinny", "mlflow"), ("wandb", "wandb"),
    ("trackio", "trackio"),
)  # fmt: skip
"""Packages, and the extra of sskt that brings each; empty for the core."""
LITTLE_DISK = 2**30
LITTLE_SHARED_MEMORY = 256 * 2**20
FEW_FILES = 1024


@dataclass(frozen=True)
class Check:
    """One line of the report; ``result`` is ``ok``, ``note`` or ``fails``."""

    what: str
    result: str
    found: str


@click.command(
    "doctor", cls=GroupedCommand, examples=("sskt doctor", "sskt doctor --cache /srv/labels --json")
)
@click.option("--cache", help=f"Cache of label sets to check. {DEFAULT_LABELS}")
@as_json
def doctor(cache: str | None, as_json: bool) -> None:
    """Check versions, devices, data, the cache and the limits of this machine.

    Exit status 1 if something will fail. Notes are no failures, such as an optional part that is
    not installed.
    """
    checks = [
        *_versions(),
        *_devices(),
        *_data(),
        *_cache(cache),
        _home(),
        _shared_memory(),
        _open_files(),
    ]
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        print_table(["check", "result", "found"], [[c.what, c.result, c.found] for c in checks])
    failed = sum(check.result == FAILS for check in checks)
    if failed:
        click.echo(f"\n{failed} of {len(checks)} checks failed", err=True)
        sys.exit(1)


def _versions() -> Iterator[Check]:
    yield Check("sskt", OK, importlib.metadata.version("sskt"))
    yield Check("Python", OK, f"{platform.python_version()} on {platform.platform()}")
    for name, extra in PACKAGES:
        try:
            yield Check(name, OK, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            how = install_command(extra) if extra else "pip install --force-reinstall sskt"
            yield Check(name, NOTE if extra else FAILS, f"not installed; {how}")


def _devices() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU", OK, f"{cores} cores, {platform.machine()}")
    try:
        import torch
    except ImportError as error:
        if importlib.util.find_spec("torch"):
            yield Check("GPU", FAILS, f"torch cannot be imported: {first_line(error)}")
        return
    if not torch.cuda.is_available():
        yield Check("GPU", NOTE, "none that torch can use; networks run on the CPU")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield Check(f"cuda:{i}", OK, f"{about.name}, {human_bytes(about.total_memory)}")


def _data() -> Iterator[Check]:
    from sskt.teacher_cache.locations import data_location
    from sskt.teacher_cache.targets.registry import TARGETS
    from sskt.teacher_cache.targets.spec import DatasetSpec

    found = []
    for name, info in TARGETS.items():
        if info.markers and not DatasetSpec(name, "train").lacking_data():
            found.append(name)
    where = data_location("")
    known = (
        f"found {', '.join(found)}" if found else "no known dataset; sskt datasets shows layouts"
    )
    yield Check("datasets", OK if found else NOTE, f"{where}: {known}")


def _cache(given: str | None) -> Iterator[Check]:
    from sskt.teacher_cache.label_sets.find import choose_all
    from sskt.teacher_cache.locations import is_zip, label_location

    try:
        where = label_location(given)
        name = where.value
        if "://" not in name and not is_zip(name):
            yield from _folder(Path(name), str(where))
            if not Path(name).is_dir():
                return
        sets, damaged = choose_all(name, ())
    except MissingData as error:
        yield Check("label sets", NOTE, first_line(error))
        return
    except SsktError as error:
        yield Check("label sets", FAILS, first_line(error))
        return
    found = f"{len(sets)} in {where}"
    if damaged:
        broken = "; ".join(f"{set_name}: {error}" for set_name, error in damaged.items())
        yield Check("label sets", FAILS, f"{found}, and {len(damaged)} unreadable: {broken}")
    else:
        yield Check("label sets", OK, found)


def _folder(cache: Path, where: str) -> Iterator[Check]:
    above = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(above).free
    enough = OK if free > LITTLE_DISK else NOTE
    yield Check("disk of the cache", enough, f"{human_bytes(free)} free at {above}")
    if not cache.is_dir():
        can = os.access(above, os.W_OK)
        found = f"{where} does not exist yet; sskt cache-teachers makes it"
        yield Check(
            "cache", NOTE if can else FAILS, found if can else f"{above} cannot be written to"
        )
        return
    if not os.access(cache, os.W_OK):
        yield Check("cache", NOTE, f"{where} can be read, but not written to")
        return
    yield _tried("locks of the cache", lambda: _try_locks(cache))


def _try_locks(cache: Path) -> str:
    from sskt.teacher_cache.storage.locks import lock_file

    with tempfile.NamedTemporaryFile(dir=cache, prefix=".doctor-") as one:
        if not lock_file(one.fileno(), wait=False):
            raise OSError("a new file is locked already")
    return f"{cache} can be written to and has locks"


def _home() -> Check:
    from sskt.teacher_cache.targets.files.file_index import home_folder

    def write() -> str:
        folder = home_folder().expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return f"{folder} can be written to"

    return _tried("SSKT_HOME", write, worst=NOTE)


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", NOTE, "this system has no /dev/shm")
    free = shutil.disk_usage(folder).free
    found = f"{human_bytes(free)} free in /dev/shm"
    if free < LITTLE_SHARED_MEMORY:
        return Check("shared memory", NOTE, f"{found}; loader processes will be slower (shm_size)")
    return Check("shared memory", OK, found)


def _open_files() -> Check:
    try:
        import resource
    except ImportError:
        return Check("open files", NOTE, "this system has no limits of its own")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    enough = hard == resource.RLIM_INFINITY or hard > FEW_FILES
    raised = "" if soft == hard else f" (can be raised to {highest})"
    return Check("open files", OK if enough else NOTE, f"{soft:,}{raised}")


def _tried(what: str, attempt: Callable[[], str], worst: str = FAILS) -> Check:
    try:
        return Check(what, OK, attempt())
    except (OSError, SsktError) as error:
        return Check(what, worst, first_line(error))
