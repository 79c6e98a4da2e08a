"""Running a training: several processes, kills within an epoch, what is saved, clips, VOC."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import TINY, batch_of, write_frames
from support.ports import free_port

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.rng import permutation
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig, make_config
from sskt.trainer.data.gpu_loader import resident_feed
from sskt.trainer.distributed import Ranks, batch_count, batches_of
from sskt.trainer.loop.checkpoint import Autosave
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.runs import run_training
from sskt.trainer.loop.setup import Plan, make_plan
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.methods.maxl import Maxl
from sskt.trainer.models.normalization import NORMALISATIONS
from sskt.trainer.results import records

TIMES = ("seconds", "label_wait_seconds")


def numbers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


def parameters(out: Path) -> dict[str, torch.Tensor]:
    model = torch.load(out / "last.pt", weights_only=True)["model"]
    return {k: v for k, v in model.items() if "running" not in k and "num_batches" not in k}


def options(config: TrainConfig) -> list[str]:
    assert isinstance(config.cache, Path)
    return [
        *("--target", config.target, "--policy", config.policy, "--cache", str(config.cache)),
        *("--source", config.source[0], "--tm", "--epochs", "2", "--batch-size", "22"),
        *("--device", "cpu", "--clip-grad", "5", "--warmup", "1"),
    ]


@pytest.mark.slow
def test_two_processes_train_what_one_does_on_the_halves_of_each_batch(
    config: TrainConfig, tmp_path: Path
) -> None:
    """60 samples in batches of 22: the last of 16, each cut in two, as torchrun's processes do."""
    run = [
        *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"],
        "sskt",
    ]
    command = [sys.executable, *run, "train", *options(config), "--out", str(tmp_path / "two")]
    bin_folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    halves = dataclasses.replace(
        config, epochs=2, batch_size=22, clip_grad=5.0, warmup=1.0, accumulate=2
    )
    one = Trainer(make_plan(halves)).run(tmp_path / "one")
    two = records.read_metrics(tmp_path / "two")
    expected, found = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    assert expected.keys() == found.keys()
    start = make_plan(halves).build().state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.equal(start[name], value) for name, value in expected.items())
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "loss_primary", "loss_tiny", "images", "train_top1", "lr"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    whole = Trainer(make_plan(dataclasses.replace(halves, accumulate=1))).run(tmp_path / "whole")
    assert whole[-1]["loss"] != pytest.approx(
        one[-1]["loss"], rel=1e-4
    )  # BatchNorm tells them apart


@given(n=st.integers(1, 200), size=st.integers(1, 50), world=st.integers(1, 8))
def test_every_process_has_a_part_of_every_batch(n: int, size: int, world: int) -> None:
    order = np.arange(n)
    if n < world or (size < world and n > size):
        return
    batches = batches_of(order, size, world)
    assert len(batches) == batch_count(n, size, world)
    assert np.array_equal(np.concatenate(batches), order)
    for batch in batches:
        parts = [Ranks(rank, world).part(batch) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), batch)
        assert min(map(len, parts)) >= min(2, size // world) or len(batches) == 1


TOGETHER = """
import os, sys, torch
from sskt.trainer.distributed import join, leave
from sskt.trainer.loop.progress import Progress
os.environ["RANK"] = sys.argv[1]
ranks, device = join("cpu")
batchnorm = torch.nn.BatchNorm1d(2)
batchnorm.running_mean.fill_(ranks.rank + 1)
ranks.share_buffers(batchnorm)
progress = Progress()
if ranks.first:
    progress.add({"loss": torch.tensor(3.0), "right": torch.tensor(1)}, {"images": 2})
sums = progress.summed(ranks, device)
print(batchnorm.running_mean.tolist(), {name: float(sums[name]) for name in sorted(sums)})
leave()
"""


@pytest.mark.slow
def test_a_process_without_a_batch_of_its_own_takes_part_in_what_all_do() -> None:
    """As one that was resumed after the epoch's last batch, or could read none of its images."""
    port = str(free_port())
    setting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(rank)],
            env=os.environ | setting,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert said == ["[1.0, 1.0] {'images': 2.0, 'loss': 6.0, 'right': 1.0}\n"] * 2


@pytest.mark.slow
def test_a_process_that_can_read_nothing_of_its_first_batch(images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    target, first = open_target(str(folder)), permutation(np.arange(60), 0, 0)[:20]
    for sample in Ranks(1, 2).part(first):
        (folder / "train" / target.ids[sample]).write_bytes(b"no image")
    port = str(free_port())
    command = [sys.executable, "-c", "from sskt.cli.main import main; main()", "train"]
    command += ["--target", str(folder), "--policy", "pad-crop-flip", "--on-error", "skip"]
    command += ["--epochs", "1", "--batch-size", "20", "--device", "cpu", "--workers", "0"]
    command += ["--test-split", "none", "--out", str(tmp_path / "run")]
    setting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children = [
        subprocess.Popen(command, env=os.environ | setting | {"RANK": rank}) for rank in "01"
    ]
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    (record,) = records.read_metrics(tmp_path / "run")
    assert (record["images"], record["skipped"]) == (50, 10)


def test_fewer_samples_than_processes() -> None:
    with pytest.raises(InputError, match="3 samples for 4 processes"):
        batches_of(np.arange(3), 8, 4)


SAVING = """
import sys
from sskt.trainer.loop.checkpoint import Autosave
Autosave.due = lambda self, steps: True
from sskt.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet20", "mobilenet_v2"])
def test_a_run_killed_within_an_epoch_ends_with_the_numbers_of_an_uninterrupted_one(
    config: TrainConfig, tmp_path: Path, model: str
) -> None:
    """kill -9 after some step, a save after every step; MobileNetV2 has dropout."""
    config = dataclasses.replace(
        config,
        model=model,
        epochs=2,
        batch_size=8,
        ema=0.9,
        schedule="cosine",
        memory=2 * 20 * 12 * 4 / 2**30,  # windows of 16 samples
    )
    whole = Trainer(make_plan(config)).run(tmp_path / "whole")
    arguments = [
        *("train", *options(config), "--batch-size", "8", "--model", model, "--ema", "0.9"),
        *("--schedule", "cosine", "--memory", str(config.memory)),
        *("--warmup", "0", "--out", str(tmp_path / "cut")),
    ]
    arguments = [a for a in arguments if a not in ("--clip-grad", "5")]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen([sys.executable, "-c", SAVING, *arguments], stdout=log, stderr=log)
        limit = time.monotonic() + 120
        while _steps(tmp_path / "cut") < 3:
            assert child.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < limit
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    resumed = Trainer(make_plan(config)).run(tmp_path / "cut", resume=True)
    assert numbers(resumed) == numbers(whole)
    one, other = (torch.load(tmp_path / d / "last.pt") for d in ("whole", "cut"))
    for part in ("model", "average"):
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])


def _steps(out: Path) -> int:
    """Steps that the last checkpoint knows of."""
    try:
        state = torch.load(out / "last.pt", weights_only=True)
    except OSError:
        return 0
    return int(state["progress"]["steps"]) + 100 * int(state["epoch"])


class Stopped(Exception):
    pass


def test_a_finished_run_is_kept_a_cut_one_goes_on_another_is_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, epochs=2, out=tmp_path / "run")

    def stop(epoch: int, done: int, total: int) -> None:
        if epoch == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run_training(config, Hooks(step=stop))
    found = run_training(config)
    assert [r["epoch"] for r in found] == [0, 1]
    stamp = (tmp_path / "run/last.pt").stat().st_mtime_ns
    assert run_training(config) == found
    assert (tmp_path / "run/last.pt").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"holds a run with alpha = 1\.0, not 0\.5"):
        run_training(dataclasses.replace(config, alpha=0.5))


def test_a_run_goes_on_when_the_file_it_started_from_is_gone(
    config: TrainConfig, tmp_path: Path, sskt: Any
) -> None:
    torch.manual_seed(5)
    initial = tmp_path / "initial.pth"
    torch.save(make_plan(config).build_target(3).state_dict(), initial)
    config = dataclasses.replace(config, epochs=2, init=str(initial), out=tmp_path / "whole")
    whole = run_training(config)
    assert numbers(whole) != numbers(
        run_training(dataclasses.replace(config, init="", out=tmp_path / "fresh"))
    )

    def stop(epoch: int, done: int, total: int) -> None:
        if epoch == stop_in:
            raise Stopped

    for stop_in in (1, 0):
        with pytest.raises(Stopped):
            run_training(dataclasses.replace(config, out=tmp_path / f"{stop_in}"), Hooks(step=stop))
    initial.unlink()
    status, _, err = sskt("train", "--resume", "--out", tmp_path / "1")
    assert status == 0, err
    assert numbers(records.read_metrics(tmp_path / "1")) == numbers(whole)
    # Nothing was saved yet.
    with pytest.raises(InputError, match=r"initial\.pth"):
        run_training(dataclasses.replace(config, out=tmp_path / "0"))


def test_a_run_cut_within_its_first_epoch_is_neither_overwritten_nor_continued_otherwise(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 2 * 16 * 12 * 4 / 2**30  # windows of 16 samples
    config = dataclasses.replace(
        config, epochs=3, memory=memory, test_split="none", out=tmp_path / "run"
    )

    def stop(epoch: int, done: int, total: int) -> None:
        if done == 3:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Autosave, "due", lambda autosave, steps: True)
        run_training(dataclasses.replace(config, seeds=2), Hooks(step=stop))
    with pytest.raises(InputError, match="already holds a run"):
        Trainer(make_plan(config)).run(tmp_path / "run")
    with pytest.raises(InputError, match="rows of labels at a time 16, now found 60"):
        run_training(dataclasses.replace(config, memory=8))
    # Three seeds are stored; the run goes on with the two that it began with.
    assert [r["view_seed"] for r in run_training(config)] == [0, 1, 0]


def test_the_best_weights_are_there_if_the_run_is_killed_between_two_writes(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, epochs=1, out=tmp_path / "run")
    save = records.save_checkpoint

    def killed(*arguments: Any) -> None:
        save(*arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(records, "save_checkpoint", killed)
        with pytest.raises(Stopped):
            run_training(config)
    run_training(config)
    last, best = (torch.load(tmp_path / "run" / f"{n}.pt")["model"] for n in ("last", "best"))
    assert all(torch.equal(last[key], best[key]) for key in last)


def test_early_stop_ends_the_run_and_the_best_weights_are_kept(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, epochs=50, early_stop=2, lr=1e-9, out=tmp_path / "run")
    found = run_training(config)
    assert len(found) < 50 and found[-1]["stopped_early"]
    assert len(run_training(config)) == len(found)
    accuracies = [r["test_top1"] for r in found]
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert accuracies[best["epoch"]] == max(accuracies)
    assert best["epoch"] == len(found) - 3


def test_evaluation_every_third_epoch_and_after_the_last(
    config: TrainConfig, tmp_path: Path
) -> None:
    found = Trainer(make_plan(dataclasses.replace(config, eval_every=3))).run(tmp_path / "run")
    assert ["test_top1" in r for r in found] == [False, False, True, True]
    assert (tmp_path / "run/curves.png").stat().st_size


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), padding=st.integers(0, 5), data=st.data())
def test_images_on_the_device_give_the_very_views(
    images: Path, seed: int, padding: int, data: st.DataObject
) -> None:
    target = open_target("shapes", limit=20)
    name = data.draw(st.sampled_from(["none", f"pad-crop-flip:padding={padding}"]))
    views = Views(target, parse_policy(name))
    feed = resident_feed(views, torch.device("cpu"))
    assert feed is not None
    samples = np.array(data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=9)))
    (batch,) = feed([samples], seed)
    assert np.array_equal(batch.views.numpy(), views.batch(samples, seed))


def test_policies_without_a_device_form_are_left_to_the_loader(images: Path) -> None:
    views = Views(open_target("shapes", limit=4), parse_policy("random-resized-crop-flip:size=16"))
    assert resident_feed(views, torch.device("cpu")) is None


def test_source_weights_and_focal_losses_reach_the_step(config: TrainConfig) -> None:
    samples = np.arange(12)

    def parts(**fields: Any) -> dict[str, float]:
        trainer = Trainer(make_plan(dataclasses.replace(config, **fields)))
        trainer.network.train()
        parts = trainer.losses(batch_of(trainer, samples))[1]
        return {k: float(v.detach()) for k, v in parts.items()}

    plain = parts(alpha=1.0)
    weighted = parts(alpha=1.0, source_weight=["tiny=0.25"])
    assert weighted["loss"] == pytest.approx(
        plain["loss_primary"] + 0.25 * plain["loss_tiny"], rel=1e-5
    )
    assert parts(loss="focal+ce")["loss_primary"] < plain["loss_primary"]
    flat = parts(loss="focal+focal", focal_gamma=0.0)
    assert flat["loss_primary"] == pytest.approx(plain["loss_primary"], rel=1e-5)
    assert flat["loss_tiny"] == pytest.approx(plain["loss_tiny"], rel=1e-5)


def test_the_bfloat16_step_is_near_the_float32_one(config: TrainConfig) -> None:
    samples = np.arange(32)
    found = []
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(make_plan(dataclasses.replace(config, precision=precision)))
        found.append(float(trainer.step(batch_of(trainer, samples))["loss"]))
        assert all(p.dtype == torch.float32 for p in trainer.network.parameters())
    assert found[0] == pytest.approx(found[1], rel=0.02) and found[0] != found[1]


def test_options_that_cannot_go_together(config: TrainConfig, tmp_path: Path) -> None:
    for fields, message in (
        (
            {"model": "resnet3d18"},
            "resnet3d18 does not take images, which .* holds; choose a 2-D",
        ),
        ({"loss": "bce+ce"}, "does not fit a target with one class a sample"),
        ({"source_weight": ["imagenet=1"]}, "unknown source in --source-weight 'imagenet'"),
        ({"schedule": "plateau", "test_split": "none"}, "follows the test loss"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(make_plan(dataclasses.replace(config, **fields)))


def test_options_that_no_target_is_needed_for_to_refuse() -> None:
    with pytest.raises(InputError, match="--early-stop follows the test result"):
        make_config({"target": "shapes", "early_stop": 3, "test_split": "none"})


@pytest.mark.parametrize(("processes", "done"), [(4, 0), (4, 2), (8, 0), (8, 2)])
def test_a_run_goes_on_with_another_number_of_processes_if_the_batches_stay(
    config: TrainConfig, tmp_path: Path, processes: int, done: int
) -> None:
    """60 samples in batches of 16: the rest of 12 is too small for 8 processes."""
    config = dataclasses.replace(config, epochs=2, source=[], tm=False, out=tmp_path / "run")

    def stop(epoch: int, step: int, total: int) -> None:
        if (epoch, step) == (1, 1 + done):
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        if done:
            patch.setattr(Autosave, "due", lambda autosave, steps: True)
        run_training(config, Hooks(step=stop))
    state = records.load_checkpoint(tmp_path / "run")
    assert state is not None and state["progress"]["steps"] == done
    records.save_checkpoint(tmp_path / "run", state | {"processes": processes})
    said: list[str] = []
    if processes == 8 and done:
        with pytest.raises(InputError, match=r"3 batches for 8 processes, and 1 make 4; .* with 8"):
            run_training(config, Hooks(note=said.append))
        return
    assert len(run_training(config, Hooks(note=said.append))) == 2
    assert said[0].startswith(f"the number of processes is 1 instead of {processes}: the same")


@pytest.mark.slow
def test_maxl_trains_both_networks_and_resumes_exactly(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        config, method="maxl", psi=2, source=[], tm=False, cache=None, alpha=1.0, epochs=2,
        loss="focal+focal", batch_size=20, lr=0.01, out=tmp_path / "whole",
    )  # fmt: skip
    whole = run_training(config)
    assert {"loss_maxl", "meta_loss", "meta_entropy", "test_top1"} <= whole[-1].keys()
    start = Trainer(make_plan(config))
    assert isinstance(start.method, Maxl)
    first = start.method.generator.state_dict()
    last = torch.load(tmp_path / "whole/last.pt", weights_only=True)
    moved = [n for n, v in last["maxl"]["generator"].items() if not torch.equal(v, first[n])]
    assert len(moved) > 50
    own = start.network.state_dict()["target.fc.weight"]
    assert not torch.equal(first["target.fc.weight"][: len(own)], own)

    def stop(epoch: int, done: int, total: int) -> None:
        if (epoch, done) == (1, 2):
            raise Stopped

    config = dataclasses.replace(config, out=tmp_path / "cut")
    with pytest.raises(Stopped):
        run_training(config, Hooks(step=stop))
    assert numbers(run_training(config)) == numbers(whole)


def test_maxl_normalises_a_batch_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, method="maxl", psi=2, source=[], tm=False, cache=None)
    trainer, seen = Trainer(make_plan(config)), []

    def counted(plan: Plan, views: torch.Tensor) -> torch.Tensor:
        seen.append(len(views))
        return NORMALISATIONS["imagenet"](views)

    monkeypatch.setattr(Plan, "normalise", counted)
    samples = np.arange(6)
    parts = trainer.step(batch_of(trainer, samples))
    assert seen == [6] and parts["loss_maxl"] > 0


@pytest.mark.slow
def test_clips_are_trained_on_and_judged_by_video(tmp_path: Path, sskt: Any, tiny: Any) -> None:
    """Two classes of made clips, labels of the centre frame; a 3D-ResNet-10 with TM."""
    rng = np.random.default_rng(0)
    for split, each in (("train", 3), ("test", 2)):
        for name in ("jump", "run"):
            for i in range(each):
                folder = tmp_path / "clips" / split / name / f"v{i}"
                write_frames(folder, rng.integers(0, 256, (10 + 4 * i, 24, 30, 3), np.uint8))
    arguments = ["--target", tmp_path / "clips", "--cache", tmp_path / "cache"]
    arguments += ["--policy", "clip-corner-crop-flip:frames=8,size=16"]
    status, _, err = sskt(
        "cache-teachers", "--source", f"tiny={TINY}:build", "--seeds", 2, *arguments
    )
    assert status == 0, err
    arguments += ["--source", "tiny", "--tm", "--model", "resnet3d10", "--epochs", 1]
    arguments += ["--batch-size", 3, "--alpha", 1, "--temperature", 1, "--out", tmp_path / "run"]
    status, out, err = sskt("train", *arguments)
    assert status == 0, err
    assert "test top-1 by video" in out
    (record,) = records.read_metrics(tmp_path / "run")
    assert record["images"] == 6 and record["views_checked"] == 6
    assert record["test_videos"] == 4
    live = ["--live", "--frame-sampling", "center", "--source", f"tiny={TINY}:build"]
    arguments[-1] = tmp_path / "live"
    arguments[arguments.index("--source") + 1] = f"tiny={TINY}:build"
    status, _, err = sskt("train", *arguments, *live[:3])
    assert status == 0, err
    (alive,) = records.read_metrics(tmp_path / "live")
    assert alive["loss_tiny"] == pytest.approx(record["loss_tiny"], rel=1e-3)


def test_voc_is_trained_with_bce_and_judged_both_ways(
    data: Path, tmp_path: Path, sskt: Any
) -> None:
    arguments = ["--target", "voc2007", "--root", data / "voc", "--partial", "--batch-size", 4]
    arguments += ["--policy", "random-resized-crop-flip:size=32", "--model", "resnet18"]
    arguments += ["--split", "trainval"]
    status, _, err = sskt(
        "train", *arguments, "--epochs", 1, "--test-split", "test", "--out", tmp_path / "run"
    )
    assert status == 0, err
    (record,) = records.read_metrics(tmp_path / "run")
    assert 0 <= record["test_ap"] <= 100 and 0 <= record["test_map"] <= 100
    assert "train_top1" not in record and "test AP" in err
    status, _, err = sskt(
        "train", *arguments, "--loss", "ce+ce", "--test-split", "none", "--out", tmp_path / "no"
    )
    assert status == 2 and "use bce+ce" in err
