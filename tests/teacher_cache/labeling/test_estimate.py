"""``sskt plan``: its predictions against what a run then does, and its sums by hand."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import TINY, one_line, tree
from support.small_targets import APART, SOURCE, TOGETHER, clips, in_memory, jpegs
from torch import Tensor, nn

from sskt.cli.main import COMMANDS
from sskt.teacher_cache.errors import MissingData
from sskt.teacher_cache.labeling.estimate import ENCODINGS, RunPlan
from sskt.teacher_cache.labeling.estimate import plan as plan_run
from sskt.teacher_cache.labeling.job import Job, open_job_sources, open_job_views
from sskt.teacher_cache.labeling.run import open_sets
from sskt.teacher_cache.labeling.units import units
from sskt.teacher_cache.sources.source import Preprocessing, Source, freeze
from sskt.teacher_cache.targets.spec import DatasetSpec
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, open_views

Sskt = Callable[..., tuple[int, str, str]]

__all__ = ["clips", "jpegs"]  # fixtures

SECONDS = 0.2
KEYS = {
    "samples",
    "seeds",
    "labels",
    "stored",
    "views",
    "sources",
    "decodings",
    "read_seconds",
    "label_seconds",
    "compile_seconds",
    "hours",
    "bytes",
    "passes",
    "trained_passes",
    "break_even",
}


def asked(sskt: Sskt, target: Path | str, *more: object) -> dict[str, Any]:
    """``sskt plan --json`` with the tiny source."""
    fixed = ("--source", SOURCE, "--target", target, "--probe", SECONDS, "--workers", 0, "--json")
    status, out, err = sskt("plan", *fixed, *more)
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


# --- against what a run then does ---------------------------------------------------------------


def predicted_and_stored(sskt: Sskt, cache: Path, ask: list[object]) -> dict[str, float]:
    """Bytes of all stored shards divided by the predicted ones, for f16 and u8."""
    status, out, err = sskt("plan", "--cache", "labels", *ask, "--probe", 2, "--json")
    assert status == 0, err
    predicted, ratio = json.loads(out), {}
    for encoding in ("f16", "u8"):
        folder = cache / encoding
        more = ("--cache", folder, "--encoding", encoding, "--json")
        status, out, err = sskt("cache-teachers", *ask, *more)
        assert status == 0, err
        assert json.loads(out)["written"] == predicted["labels"]
        files = [f for a in ("labels", "view_check") for f in folder.glob(f"*/{a}/c/**/*")]
        found = sum(f.stat().st_size for f in files if f.is_file())
        ratio[encoding] = found / predicted["bytes"][encoding]
    return ratio


@pytest.mark.parametrize(("limit", "seeds"), [(1000, 6), (250, 2)])
def test_predicted_bytes_are_about_those_stored(
    sskt: Sskt, cifar: Path, tmp_path: Path, limit: int, seeds: int
) -> None:
    # Of 250 samples the probe meets some twice: that must not make them look smaller.
    ask: list[object] = ["--source", SOURCE, "--target", cifar, "--policy", "pad-crop-flip"]
    ask += ["--limit", limit, "--seeds", seeds, "--workers", 0]
    ratio = predicted_and_stored(sskt, tmp_path, ask)
    assert all(0.85 < r < 1.15 for r in ratio.values()), ratio


@pytest.mark.slow
def test_predicted_bytes_of_a_real_source_are_about_those_stored(
    sskt: Sskt, data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "scenes"
    (root / "train").mkdir(parents=True)
    (root / "train" / "all").symlink_to(data / "miniplaces/images/val")
    (root / "train" / "one").mkdir()  # a folder of one class is refused
    first = min((data / "miniplaces/images/val").rglob("*.jpg"))
    (root / "train" / "one" / "1.jpg").symlink_to(first)
    source = f"places={data}/models/squeezenet_places365.py:build@64"
    ask: list[object] = ["--source", source, "--source", SOURCE, "--target", root]
    ask += ["--policy", "resize-center-crop:resize=72,size=64", "--limit", 250, "--seeds", 2]
    ratio = predicted_and_stored(sskt, tmp_path, [*ask, "--workers", 0])
    assert all(0.85 < r < 1.15 for r in ratio.values()), ratio


@pytest.mark.parametrize("kind", ["memory", "jpegs", "clips"])
@pytest.mark.parametrize("memory", [TOGETHER, 0.002, APART])
@pytest.mark.parametrize("seeds", [1, 5])
def test_decodings_and_hours_are_those_of_the_units(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny: Source,
    kind: str,
    memory: float,
    seeds: int,
) -> None:
    job = Job(
        (SOURCE,),
        DatasetSpec(kind),
        seeds=seeds,
        policy="clip-corner-crop-flip:frames=2,size=20" if kind == "clips" else "auto",
        workers=0,
        shard_rows=4,
        batch_size=3,
        memory=memory,
    )
    if kind == "memory":
        views = open_views(in_memory(10), parse_policy("pad-crop-flip"))
    else:
        job = replace(job, dataset=DatasetSpec(str(request.getfixturevalue(kind))))
        views = open_job_views(job)
    machines = (1, 2, 3, 7, 100)
    found = plan_run(job, views, [tiny], epochs=10, machines=machines, seconds=SECONDS)
    with open_sets(views, [tiny], job.how, seeds, tmp_path, job.options([])) as pairs:
        sets = [pair.label_set for pair in pairs]
    (label_set,) = sets

    def cut(world: int) -> int:
        return len(units(views, sets, seeds, job.batch_size, memory, world))

    blocks = -(-len(views.target) // 4)
    assert label_set.blocks == blocks
    assert found.decodings == (0 if kind == "memory" else cut(1) / blocks)
    total = found.read_seconds + found.label_seconds
    assert found.hours.keys() == set(machines)
    for n in machines:
        share = math.ceil(cut(n) / n) / cut(n)
        assert found.hours[n] == pytest.approx(total / 3600 * share), n


# --- sums by hand -------------------------------------------------------------------------------


def test_the_sums(sskt: Sskt, jpegs: Path) -> None:
    found = asked(sskt, jpegs, "--seeds", 4, "--epochs", 7, "--machines", 1, "--machines", 3)
    assert found.keys() == KEYS
    assert (found["samples"], found["seeds"], found["labels"]) == (22, 4, 88)
    assert (found["passes"], found["trained_passes"]) == (4, 7)
    assert found["decodings"] == 1
    (source,) = found["sources"]
    assert (source["name"], source["arch"], source["classes"]) == ("tiny", "tiny:build", 12)
    assert source["bytes"].keys() == found["bytes"].keys() == set(ENCODINGS)
    assert found["label_seconds"] == pytest.approx(88 * source["seconds"])
    for encoding, size in found["bytes"].items():
        assert size == round(88 * source["bytes"][encoding])
    assert 4 < source["bytes"]["u8"] < source["bytes"]["f16"] < source["bytes"]["f32"]
    assert found["hours"].keys() == {"1", "3"}
    total = found["read_seconds"] + found["label_seconds"]
    assert found["hours"]["1"] == pytest.approx(total / 3600)
    # One training asks the source 7 times for 22 labels; the cache costs `total` once.
    training = 7 * 22 * source["seconds"]
    n = found["break_even"]
    assert total < n * training and total >= (n - 1) * training


def test_what_is_stored_is_not_counted(sskt: Sskt, jpegs: Path, tmp_path: Path) -> None:
    """22 samples in shards of 5: two seeds of the tiny source are there, but for one shard."""
    stored = ("--cache", tmp_path, "--shard-rows", 5)
    ask = ("--source", SOURCE, "--target", jpegs, "--workers", 0, "--seeds", 2)
    assert sskt("cache-teachers", *ask, *stored)[0] == 0
    (shard,) = tmp_path.glob("*/view_check/c/1/2.json")
    shard.unlink()

    found = asked(sskt, jpegs, *stored, "--seeds", 2, "--machines", 1, "--machines", 2)
    assert (found["labels"], found["stored"], found["views"]) == (5, 39, 5)
    assert (found["decodings"], found["passes"]) == (1, 1)
    total = found["read_seconds"] + found["label_seconds"]
    assert found["hours"]["1"] == found["hours"]["2"] == pytest.approx(total / 3600)

    other = ("--source", f"other={TINY}:build@8", "--memory", APART)
    found = asked(sskt, jpegs, *stored, *other, "--seeds", 4)
    assert (found["labels"], found["stored"], found["views"]) == (5 + 44 + 88, 39, 88)
    assert (found["decodings"], found["passes"]) == (4, 4)
    first, second = found["sources"]
    for encoding, size in found["bytes"].items():
        lacking = 49 if encoding == "f16" else 88
        assert size == round(lacking * first["bytes"][encoding] + 88 * second["bytes"][encoding])
    assert found["label_seconds"] == pytest.approx(49 * first["seconds"] + 88 * second["seconds"])


def test_a_run_that_is_done_costs_nothing(sskt: Sskt, jpegs: Path, tmp_path: Path) -> None:
    options = ("--source", SOURCE, "--target", jpegs, "--workers", 0, "--cache", tmp_path)
    assert sskt("cache-teachers", *options, "--seeds", 2)[0] == 0
    found = asked(sskt, jpegs, "--cache", tmp_path, "--seeds", 2, "--machines", 3)
    assert (found["labels"], found["stored"], found["views"], found["passes"]) == (0, 44, 0, 0)
    assert found["hours"] == {"3": 0.0} and found["bytes"]["f16"] == 0 < found["bytes"]["u8"]
    status, out, err = sskt("plan", *options, "--seeds", 2, "--probe", SECONDS)
    assert status == 0, err
    assert "44 of 44 labels are stored; the rest is counted here" in out


def test_two_sources_add_up(sskt: Sskt, images: Path) -> None:
    more = ("--source", f"other={TINY}:build@8", "--encoding", "topk-3", "--limit", 20)
    found = asked(sskt, images, *more, "--policy", "pad-crop-flip", "--seeds", 3)
    assert found["labels"] == 2 * 20 * 3
    assert [s["name"] for s in found["sources"]] == ["tiny", "other"]
    assert list(found["bytes"]) == ["topk-3", *ENCODINGS], "what was asked first"
    for encoding, size in found["bytes"].items():
        assert size == round(60 * sum(s["bytes"][encoding] for s in found["sources"]))
    assert found["label_seconds"] == pytest.approx(60 * sum(s["seconds"] for s in found["sources"]))


class Recording(nn.Module):
    """Logits of ``classes`` classes; remembers how many images came at once."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.sizes = classes, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return x.mean((1, 2, 3))[:, None] * torch.arange(self.classes)


def recording(name: str, classes: int) -> tuple[Source, list[int]]:
    network = Recording(classes)
    names = tuple(str(i) for i in range(classes))
    source = freeze(name, name, network, Preprocessing(8), names)
    network.sizes.clear()
    return source, network.sizes


def in_ram(n: int) -> Views:
    return open_views(in_memory(n), parse_policy("pad-crop-flip"))


def planned(views: Views, sources: list[Source], **job: Any) -> RunPlan:
    texts = tuple(source.name for source in sources)
    return plan_run(
        Job(texts, DatasetSpec("made"), workers=0, **job), views, sources, epochs=1, seconds=SECONDS
    )


@pytest.mark.parametrize("seeds", [1, 5])
def test_sources_are_measured_at_the_batch_size(jpegs: Path, seeds: int) -> None:
    source, sizes = recording("rec", 4)
    job = Job((SOURCE,), DatasetSpec(str(jpegs)), policy="random-resized-crop-flip:size=20")
    planned(open_job_views(job), [source], batch_size=8, seeds=seeds)
    assert sizes and max(sizes) == 8 and sum(size == 8 for size in sizes) >= len(sizes) / 2


def test_an_encoding_that_a_source_cannot_have_is_left_out() -> None:
    few, many = recording("few", 4)[0], recording("many", 40)[0]
    found = planned(in_ram(8), [few, many], seeds=1)
    assert "topk-10" not in found.bytes, "a sum over one of the two would be taken for both"
    assert found.bytes.keys() >= {"f32", "f16", "u8"}
    assert "topk-10" in planned(in_ram(8), [many], seeds=1).bytes


def test_the_asked_encoding_that_a_source_cannot_have_is_refused(sskt: Sskt, images: Path) -> None:
    ask = ("--source", SOURCE, "--target", images, "--encoding", "topk-20", "--probe", 0.1)
    status, _, err = sskt("plan", "--cache", "labels", *ask, "--workers", 0)
    assert status == 2
    assert one_line(err) == "encoding topk-20: the source has only 12 classes"


@pytest.mark.parametrize("kind", ["memory", "jpegs", "clips"])
def test_a_target_of_one_sample(
    request: pytest.FixtureRequest, sskt: Sskt, kind: str, tmp_path: Path
) -> None:
    target = "shapes" if kind == "memory" else request.getfixturevalue(kind)
    found = asked(sskt, target, "--limit", 1, "--seeds", 2, "--machines", 4)
    assert (found["samples"], found["labels"]) == (1, 2)
    assert found["break_even"] >= 1 and found["read_seconds"] > 0
    assert found["hours"]["4"] > 0


def test_in_batches_of_batchnorm(sskt: Sskt, jpegs: Path) -> None:
    more = ("--batchnorm", "batch", "--batch-size", 4, "--seeds", 3)
    found = asked(sskt, jpegs, *more)
    assert found["labels"] == 66 and found["sources"][0]["seconds"] > 0


# --- it only looks ------------------------------------------------------------------------------


def test_nothing_is_written(sskt: Sskt, jpegs: Path, tmp_path: Path, home: Path) -> None:
    before, indices = tree(jpegs), tree(home)
    asked(sskt, jpegs, "--cache", tmp_path / "cache", "--seeds", 2)
    assert list(tmp_path.iterdir()) == [] and tree(jpegs) == before and tree(home) == indices


def test_unreadable_images_are_passed_over(sskt: Sskt, jpegs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(jpegs, tmp_path / "jpegs")
    files = sorted(folder.rglob("*.jpg"))
    for file in files[::2]:
        file.write_bytes(b"\xff\xd8\xff no image")
    found = asked(sskt, folder, "--seeds", 2, "--batch-size", 2)
    assert found["labels"] == 44 and found["sources"][0]["seconds"] > 0
    for file in files:
        file.write_bytes(b"\xff\xd8\xff no image")
    ask = ("--source", SOURCE, "--target", folder, "--probe", SECONDS, "--workers", 0)
    status, _, err = sskt("plan", "--cache", "labels", *ask)
    assert status == 2
    assert one_line(err) == "plan: could read no sample of jpegs train that it tried"


def test_mixed_sizes_and_a_gone_file_are_named(sskt: Sskt, jpegs: Path, tmp_path: Path) -> None:
    ask = ("--source", SOURCE, "--target", jpegs, "--probe", SECONDS, "--workers", 0)
    status, _, err = sskt("plan", "--cache", "labels", *ask, "--policy", "pad-crop-flip")
    assert status == 2 and "differ in size" in one_line(err)
    dataset = DatasetSpec(str(shutil.copytree(jpegs, tmp_path / "jpegs")))
    job = Job((SOURCE,), dataset, workers=0)
    views = open_job_views(job)
    shutil.rmtree(tmp_path / "jpegs")
    sources = [one.source for one in open_job_sources(job)]
    with pytest.raises(MissingData, match="cannot read image"):
        plan_run(job, views, sources, epochs=1, seconds=SECONDS)


# --- the command --------------------------------------------------------------------------------


def test_it_is_told_in_words(sskt: Sskt, jpegs: Path) -> None:
    ask = ("--source", SOURCE, "--target", jpegs, "--probe", SECONDS, "--workers", 0)
    status, out, err = sskt(
        "plan", "--cache", "labels", *ask, "--seeds", 3, "--machines", 1, "--machines", 2
    )
    assert status == 0, err
    assert "jpegs train: 22 samples x 3 seeds on cpu" in out
    assert "tiny (tiny:build)" in out and "views/s, each file decoded once" in out
    assert "the cache costs each source 3 passes over the target; one training of 200 epochs" in out
    assert "it takes less time from the first training on" in out
    status, out, _ = sskt("plan", "--cache", "labels", *ask, "--seeds", 3, "--memory", APART)
    assert status == 0 and "each file decoded 3 times" in out
    fixed = ("--source", SOURCE, "--target", "shapes", "--limit", 9, "--probe", SECONDS)
    status, out, _ = sskt("plan", *fixed, "--epochs", 1)
    assert status == 0 and "decoded" not in out and "from training " in out


def test_a_command_line_of_cache_teachers_can_be_planned(
    sskt: Sskt, jpegs: Path, tmp_path: Path
) -> None:
    options = ["--source", SOURCE, "--target", str(jpegs), "--cache", str(tmp_path / "cache")]
    options += ["--workers", "0", "--seeds", "2", "--on-error", "skip", "--share", "0/2"]
    status, _, err = sskt("cache-teachers", *options)
    assert status == 0, err
    status, _, err = sskt("plan", *options, "--probe", SECONDS)
    assert status == 0, err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--machines", 0), "--machines"),
        (("--epochs", 0), "--epochs"),
        (("--probe", 0), "--probe"),
        (("--seeds", 0), "--seeds"),
        (("--memory", 0), "--memory"),
        (("--encoding", "f8"), "unknown encoding 'f8'"),
        (("--policy", "crop"), "unknown policy 'crop'"),
        (("--split", "val"), "no folder"),
        (("--f-s", "first"), "is of images, which have no frames"),
    ],
)
def test_what_it_refuses_in_one_line(
    sskt: Sskt, jpegs: Path, more: tuple[object, ...], message: str
) -> None:
    ask = ("--source", SOURCE, "--target", jpegs, "--probe", SECONDS, "--workers", 0)
    status, _, err = sskt("plan", "--cache", "labels", *ask, *more)
    assert status == 2 and message in one_line(err)


def test_help_of_every_command_that_only_labels_or_looks_needs_no_torch() -> None:
    names = [name for name in COMMANDS if name not in ("train", "demo")]
    assert {"plan", "cache-teachers", "ls", "inspect", "verify"} <= set(names)
    code = (
        "import sys; from sskt.cli.main import run\n"
        f"for name in {names}:\n"
        "    assert run([name, '--help']) == 0\n"
        "    heavy = {'torch', 'zarr', 'av', 'ray'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--machines" in done.stdout and "--task-gpus" in done.stdout
