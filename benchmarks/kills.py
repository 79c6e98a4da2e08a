"""Kills label writers with SIGKILL, over and over: nothing stored is lost, and no byte differs.

Three processes at a time label a tiny target into the same cache, a folder and then a bucket of a
local S3 server. Each is killed: before a random change of what is stored, or after a random time.
After each round every shard that was stored before must still be there, every file must be that
of a run without interruption, and `sskt verify` must find nothing but missing shards. When a
cache is whole it is compared once more, and the next one begins.

    python benchmarks/kills.py [--quick] [--kills N] [--seed N] [--json]

--quick: 30 kills of each kind of cache instead of 500. Exits with status 1 at the first fault.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import report

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from support.object_stores import Server, objects  # noqa: E402
from support.processes import Launcher, launched  # noqa: E402

from sskt.teacher_cache.label_sets.create import look_over  # noqa: E402
from sskt.teacher_cache.tools.verify import verify  # noqa: E402

AT_ONCE = 3
SAMPLES, SHARD_ROWS, SEEDS = 24, 4, 4
Files = dict[str, bytes]


class Fault(Exception):
    """What must never happen."""


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: Processes that were killed.
        ended: Processes that ended before they were killed.
        rounds: Rounds of ``AT_ONCE`` processes.
        whole: Caches that became whole.
        seconds: Duration.
    """

    kills: int = 0
    ended: int = 0
    rounds: int = 0
    whole: int = 0
    seconds: float = field(default_factory=lambda: -time.monotonic())


def labelling(cache: str) -> list[object]:
    """The command line of a writer."""
    source = f"tiny={TESTS}/networks/tiny.py:build"
    sizes = ("--limit", SAMPLES, "--shard-rows", SHARD_ROWS, "--seeds", SEEDS)
    how = ("--encoding", "topk-3", "--batch-size", SHARD_ROWS, "--workers", 0, "--device", "cpu")
    fixed = ("--source", source, "--target", "shapes", "--policy", "pad-crop-flip")
    return ["cache-teachers", *fixed, *sizes, *how, "--cache", cache]


def files(cache: str) -> Files:
    """What a cache holds, without locks and files that were being written."""
    if "://" in cache:
        return objects(cache)
    found = {}
    for path in Path(cache).rglob("*"):
        name = path.relative_to(cache).as_posix()
        if path.is_file() and not (name.startswith(".") or name.endswith(".partial")):
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
    return now


def kill_writers(
    launcher: Launcher,
    new_cache: Callable[[int], str],
    expected: Files,
    kills: int,
    rng: random.Random,
    seconds: float,
) -> Tally:
    """Kills until there were so many kills; ``seconds``: duration of a run without one."""
    tally = Tally()
    cache, before = new_cache(0), Files()
    while tally.kills < kills:
        runs, begin = [], time.monotonic()
        for _ in range(AT_ONCE):
            at_change = rng.random() < 0.5
            run = launcher.start(*labelling(cache), die_at=rng.randrange(1, 40) if at_change else 0)
            runs.append((run, None if at_change else begin + rng.random() * seconds))
        for run, moment in sorted(runs, key=lambda pair: pair[1] or float("inf")):
            if moment is not None:
                time.sleep(max(0.0, moment - time.monotonic()))
                run.kill()
        for run, _ in runs:
            status, _, err = run.wait()
            if status not in (0, -9):
                raise Fault(f"{cache}: a writer ended with status {status}: {err}")
            tally.kills += status == -9
            tally.ended += status == 0
        tally.rounds += 1
        before = check(cache, expected, before)
        if before.keys() == expected.keys():
            if before != expected:
                raise Fault(f"{cache}: whole, and not the same as without a kill")
            tally.whole += 1
            cache, before = new_cache(tally.rounds), Files()
        print(f"\r{tally.kills}/{kills} kills", end="", file=sys.stderr)
    print(file=sys.stderr)
    status, _, err = launcher.start(*labelling(cache)).wait()
    if status or files(cache) != expected:
        raise Fault(f"{cache}: the run that finishes it ended with {status}: {err}")
    tally.seconds += time.monotonic()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="30 kills of each kind of cache.")
    parser.add_argument("--kills", type=int, default=500, help="Kills of each kind of cache.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random moments.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    given = parser.parse_args()
    kills, rng = 30 if given.quick else given.kills, random.Random(given.seed)
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
        with tempfile.TemporaryDirectory(prefix="sskt-kills-") as name, launched(Path(name)) as at:
            whole, begin = f"{name}/whole", time.monotonic()
            if at.start(*labelling(whole)).wait()[0]:
                raise Fault("a run without a kill fails")
            seconds, expected = time.monotonic() - begin, files(whole)
            shards = SEEDS * SAMPLES // SHARD_ROWS
            kinds = {"folder": lambda n: f"{name}/{n}", "bucket": lambda n: f"s3://kills/{n}"}
            found = {
                kind: kill_writers(at, new, expected, kills, rng, 1.5 * seconds)
                for kind, new in kinds.items()
            }
    except Fault as fault:
        sys.exit(f"FAULT: {fault}")
    finally:
        server.stop()
    rows = [
        (f"{kind}: {what}", float(getattr(tally, what)), unit)
        for kind, tally in found.items()
        for what, unit in (("kills", ""), ("ended", ""), ("whole", "caches"), ("seconds", "s"))
    ]
    total = sum(tally.kills for tally in found.values())
    rows += [("files lost", 0.0, f"of {total} kills"), ("files different", 0.0, "")]
    report(f"kills of label writers: {AT_ONCE} at once, {shards} shards a cache", rows, {})


if __name__ == "__main__":
    main()
