"""Kills label writers and trainings with SIGKILL: nothing stored is lost, and nothing differs.

Label writers: three processes at a time label a target of 24 images into the same cache, a folder
and then a bucket of a local S3 server. Each is killed: before a random change of what is stored,
or after a random time. After each round every shard that was stored before must still be there,
every file must be that of a run without interruption, and `sskt verify` must find nothing but
missing shards. When a cache is whole it is compared once more, and the next one begins.

Trainings: one process at a time trains from these labels and saves after every step. It is
killed in the same two ways and resumed until the run has ended. Its records, apart from times, and
every value of its `last.pt` and `best.pt` must then equal those of a run without interruption.
Then the next run begins.

Every process is a real one with the command line of a user, and is killed by the kernel. It is
forked from a Python that has imported sskt and torch, so that a kill costs about a second and hits
the work instead of the imports. A process that ends before it is killed is not counted.

    python benchmarks/kills.py [--quick] [--kills N] [--trainings N] [--seed N] [--json]

--quick: 6 kills of each kind of cache and 3 of trainings. Exits with status 1 at the first fault.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sskt.benchmarks.common import report

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from support.helpers import write_images  # noqa: E402
from support.object_stores import Server, objects  # noqa: E402
from support.processes import Launcher, Run, launched  # noqa: E402

from sskt.teacher_cache.label_sets.create import look_over  # noqa: E402
from sskt.teacher_cache.tools.verify import verify  # noqa: E402
from sskt.trainer.results import records  # noqa: E402

AT_ONCE = 3
CLASSES, EACH, SHARD_ROWS, SEEDS = 3, 8, 4, 8
QUICK, QUICK_TRAININGS = 6, 3
LAST_CHANGE = 40
"""A process that is killed at a change of what is stored is killed at the 1st to 39th."""
TIMES = ("seconds", "label_wait_seconds")
SOURCE = f"tiny={TESTS}/networks/tiny.py:build"
Files = dict[str, bytes]


class Fault(Exception):
    """What must never happen."""


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: Processes that were killed.
        ended: Processes that ended before they were killed.
        whole: Caches that became whole, or trainings that ended.
        seconds: Duration.
    """

    kills: int = 0
    ended: int = 0
    whole: int = 0
    seconds: float = field(default_factory=lambda: -time.monotonic())


@dataclass
class Killer:
    """Starts processes and kills them.

    Args:
        launcher: Starts them.
        rng: Chooses how and when.
        wanted: Kills after which to stop.
        longest: Seconds after which a process is killed at the latest.
    """

    launcher: Launcher
    rng: random.Random
    wanted: int
    longest: float
    tally: Tally = field(default_factory=Tally)

    def round(self, where: str, *commands: list[object]) -> bool:
        """Starts a process of each command, kills it. Returns whether one of them has ended."""
        runs: list[tuple[Run, float | None]] = []
        for command in commands:
            at_change = self.rng.random() < 0.5
            step = self.rng.randrange(1, LAST_CHANGE) if at_change else 0
            run = self.launcher.start(*command, die_at=step)
            moment = None if at_change else time.monotonic() + self.rng.random() * self.longest
            runs.append((run, moment))
        for run, moment in sorted(runs, key=lambda pair: pair[1] or float("inf")):
            if moment is not None:
                time.sleep(max(0.0, moment - time.monotonic()))
                run.kill()
        ended = [self._ended(where, run) for run, _ in runs]
        print(f"\r{self.tally.kills}/{self.wanted} kills", end="", file=sys.stderr)
        return any(ended)

    def _ended(self, where: str, run: Run) -> bool:
        status, _, err = run.wait()
        if status not in (0, -9):
            raise Fault(f"{where}: a process ended with status {status}: {err}")
        self.tally.kills += status == -9
        self.tally.ended += status == 0
        return status == 0

    def finish(self, where: str, command: list[object]) -> None:
        """Runs a command to its end, and ends the count."""
        status, _, err = self.launcher.start(*command).wait()
        if status:
            raise Fault(f"{where}: the run that finishes it ended with {status}: {err}")
        self.tally.seconds += time.monotonic()
        print(file=sys.stderr)


def labelling(images: Path, cache: str) -> list[object]:
    """The command line of a label writer."""
    how = ("--encoding", "topk-3", "--batch-size", SHARD_ROWS, "--workers", 0, "--device", "cpu")
    sizes = ("--shard-rows", SHARD_ROWS, "--seeds", SEEDS)
    fixed = ("--source", SOURCE, "--target", images, "--policy", "pad-crop-flip")
    return ["cache-teachers", *fixed, *sizes, *how, "--cache", cache]


def training(images: Path, cache: str, out: Path) -> list[object]:
    """The command line of a training, or of its continuation."""
    how = ("--epochs", 3, "--batch-size", 8, "--save-minutes", 1e-6, "--device", "cpu")
    kept = ("--ema", 0.9, "--early-stop", 9, "--workers", 0, "--out", out)
    fixed = ("--source", "tiny", "--tm", "--target", images, "--cache", cache)
    more = ["--resume"] if (out / records.CONFIG).exists() else []
    return ["train", *fixed, *how, *kept, *more]


def is_unfinished(path: Path) -> bool:
    """Whether a file was being written."""
    return path.name.endswith(".partial")


def files(cache: str) -> Files:
    """What a cache holds, without locks and files that were being written."""
    if "://" in cache:
        return objects(cache)
    found = {}
    for path in Path(cache).rglob("*"):
        name = path.relative_to(cache).as_posix()
        if path.is_file() and not name.startswith(".") and not is_unfinished(path):
            found[name] = path.read_bytes()
    return found


def check(cache: str, expected: Files, before: Files) -> Files:
    """Raises ``Fault`` if something is lost or different. Returns what the cache holds."""
    now = files(cache)
    for name, data in now.items():
        growing = name.endswith("zarr.json")  # gets the encoding's error later
        if not growing and data != expected.get(name):
            raise Fault(f"{cache}: {name} has other bytes than a run without a kill")
    lost = [name for name in before if name not in now]
    if lost:
        raise Fault(f"{cache}: {lost[0]} was stored and is gone")
    sets, damaged = look_over(cache)
    for label_set in sets:
        problems = [p for p in verify(label_set).problems if "shards are missing" not in p]
        if problems:
            raise Fault(f"{cache}: {problems[0]}")
    if damaged:
        raise Fault(f"{cache}: {next(iter(damaged.values()))}")
    if now.keys() == expected.keys() and now != expected:
        raise Fault(f"{cache}: whole, and not the same as without a kill")
    return now


def require_no_rest(folder: Path) -> None:
    """Raises ``Fault`` if a file of a killed process is left after a run that has ended."""
    if rest := [path for path in folder.rglob("*") if is_unfinished(path)]:
        raise Fault(f"{rest[0]} was left by a killed process")


def kill_writers(
    killer: Killer, images: Path, new_cache: Callable[[int], str], expected: Files
) -> Tally:
    """Kills label writers until there were so many kills."""
    tally, rounds = killer.tally, 0
    cache, before = new_cache(0), Files()
    while tally.kills < killer.wanted:
        killer.round(cache, *[labelling(images, cache)] * AT_ONCE)
        rounds += 1
        before = check(cache, expected, before)
        if before.keys() == expected.keys():
            tally.whole += 1
            cache, before = new_cache(rounds), Files()
    killer.finish(cache, labelling(images, cache))
    if check(cache, expected, before) != expected:
        raise Fault(f"{cache}: the run that finishes it has left something out")
    if "://" not in cache:
        require_no_rest(Path(cache))
    return tally


def numbers(out: Path) -> dict[str, Any]:
    """All that a run has found out: its records without times, and its checkpoints."""
    found: dict[str, Any] = {
        name: records.load_checkpoint(out, name) for name in (records.CHECKPOINT, records.BEST)
    }
    found["metrics"] = records.read_metrics(out)
    return dict(_flat(found))


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        return [(name, (str(value.dtype), tuple(value.shape), value.numpy().tobytes()))]
    if isinstance(value, dict):
        inner = [(key, part) for key, part in value.items() if key not in TIMES]
    elif isinstance(value, list | tuple):
        inner = list(enumerate(value))
    else:
        return [(name, json.dumps(value))]
    return [one for key, part in inner for one in _flat(part, f"{name}/{key}")]


def check_run(out: Path, expected: dict[str, Any]) -> None:
    """Raises ``Fault`` if a run that has ended differs from one that was not interrupted."""
    found = numbers(out)
    for name in {**expected, **found}:
        own = name.startswith((f"/{records.CHECKPOINT}/config/out", f"/{records.BEST}/config/out"))
        if not own and found.get(name) != expected.get(name):
            raise Fault(f"{out}: {name} is not that of a training without a kill")
    require_no_rest(out)


def kill_trainings(
    killer: Killer, images: Path, labels: str, folder: Path, expected: dict[str, Any]
) -> Tally:
    """Kills trainings until there were so many kills."""
    tally = killer.tally
    out = folder / "0"
    while tally.kills < killer.wanted:
        if killer.round(str(out), training(images, labels, out)):
            check_run(out, expected)
            tally.whole += 1
            out = folder / str(tally.whole)
    killer.finish(str(out), training(images, labels, out))
    check_run(out, expected)
    return tally


def kill_all(folder: Path, kills: int, trainings: int, seed: int) -> dict[str, Tally]:
    """Kills writers of a folder, writers of a bucket, and trainings. Raises ``Fault``."""
    rng, images, whole = random.Random(seed), folder / "images", str(folder / "whole")
    pixels = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in range(CLASSES):
            drawn = pixels.integers(0, 256, (EACH, 16, 16, 3), np.uint8)
            write_images(images / split / f"class{name}", drawn)
    with launched(folder) as at:

        def timed(command: list[object]) -> float:
            begin = time.monotonic()
            status, _, err = at.start(*command).wait()
            if status:
                raise Fault(f"a run without a kill fails: {err}")
            return time.monotonic() - begin

        timed(labelling(images, whole))
        expected = files(whole)
        writing = timed(labelling(images, f"{folder}/again"))  # the first one reads modules
        check(f"{folder}/again", expected, expected)
        found = {}
        for kind, new in (("folder", f"{folder}/cache-"), ("bucket", "s3://kills/")):
            killer = Killer(at, rng, kills, writing)
            found[kind] = kill_writers(killer, images, lambda n, new=new: f"{new}{n}", expected)  # type: ignore[misc]
        run = folder / "whole-run"
        killer = Killer(at, rng, trainings, timed(training(images, whole, run)))
        found["trainings"] = kill_trainings(killer, images, whole, folder / "runs", numbers(run))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="A few kills of each kind.")
    parser.add_argument("--kills", type=int, default=500, help="Kills of each kind of cache.")
    parser.add_argument("--trainings", type=int, default=100, help="Kills of trainings.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random moments.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    given = parser.parse_args()
    kills, trainings = (QUICK, QUICK_TRAININGS) if given.quick else (given.kills, given.trainings)
    server = Server()
    os.environ.update(
        AWS_ENDPOINT_URL=server.url,
        AWS_ALLOW_HTTP="true",
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_REGION="us-east-1",
    )
    server.new_bucket("kills")
    try:
        with tempfile.TemporaryDirectory(prefix="sskt-kills-") as name:
            found = kill_all(Path(name), kills, trainings, given.seed)
    except Fault as fault:
        sys.exit(f"\nFAULT: {fault}")
    finally:
        server.stop()
    rows = [
        (f"{kind}: {what}", float(getattr(tally, what)), unit)
        for kind, tally in found.items()
        for what, unit in (("kills", ""), ("ended", ""), ("whole", ""), ("seconds", "s"))
    ]
    total = sum(tally.kills for tally in found.values())
    rows += [("files lost", 0.0, f"of {total} kills"), ("files or weights different", 0.0, "")]
    shards = SEEDS * CLASSES * EACH // SHARD_ROWS
    report(f"kills: {AT_ONCE} writers at once, {shards} shards a cache", rows, {})


if __name__ == "__main__":
    main()
