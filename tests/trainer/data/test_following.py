"""Trainings that begin before their labels are complete: the same numbers, and an end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.helpers import TINY, one_line
from support.servers import serving

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import IncompleteLabels, InputError
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.labeling.units import units
from sskt.teacher_cache.storage.base import SWEEP
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig
from sskt.trainer.data import following
from sskt.trainer.data.following import Follow
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.data.soft_labels import StoredLabels, Window
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer

Sskt = Callable[..., tuple[int, str, str]]
TIMES = ("seconds", "label_wait_seconds")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(following, "REMOTE_POLL_SECONDS", 0.05)


@pytest.fixture
def whole(label_cache: Path) -> LabelSet:
    """Three seeds of 60 samples in shards of 16."""
    (label_set,) = list_label_sets(label_cache)
    return label_set


def begun(whole: LabelSet, cache: Path) -> LabelSet:
    """The same set without a shard, as the teacher stage leaves it after its first second."""
    made = whole.attributes["made"]
    create_label_set(
        cache, whole.spec, whole.classes, whole.seeds, shard_rows=16, provenance=made
    ).close()
    (label_set,) = list_label_sets(cache)
    return label_set


def write(whole: LabelSet, cache: Path, shards: list[Shard]) -> None:
    with closing(create_label_set(cache, whole.spec, whole.classes, 1)) as writer:
        for shard in shards:
            rows = whole.read(shard.seed, shard.start, shard.stop)
            writer.write(shard, rows, whole.read_checks(shard.seed, shard.start, shard.stop))


@contextmanager
def written_by(
    whole: LabelSet, cache: Path, until: Callable[[Shard], bool]
) -> Iterator[threading.Thread]:
    """Writes shard after shard in a thread, each when ``until`` says so."""

    def work() -> None:
        for shard in whole.shards(range(whole.seeds)):
            while not until(shard):
                time.sleep(0.01)
            write(whole, cache, [shard])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def changed(config: TrainConfig, **fields: Any) -> TrainConfig:
    return TrainConfig(**(vars(config) | fields))


@pytest.mark.parametrize("remote", [False, True])
def test_the_numbers_are_those_of_complete_labels(
    remote: bool, config: TrainConfig, whole: LabelSet, tmp_path: Path
) -> None:
    """The writer is behind at each epoch: it begins a seed when the training waits for it."""
    expected = Trainer(make_plan(config)).run(tmp_path / "before")
    cache = tmp_path / "labels"
    begun(whole, cache)
    notes: list[str] = []
    hooks = Hooks(note=notes.append)

    def run(**where: Any) -> list[dict[str, Any]]:
        follower = Trainer(make_plan(changed(config, follow=5, **where)), hooks)
        with written_by(whole, cache, lambda shard: len(notes) > shard.seed):
            return follower.run(tmp_path / "during")

    if remote:
        with serving(cache) as url:
            found = run(cache=None, labels=url)
    else:
        found = run(cache=cache)
    assert numbers(found) == numbers(expected) and len(found) == 4
    waits = [note for note in notes if note.startswith("waiting")]
    assert [f"under view seed {seed}" in note for seed, note in enumerate(waits)] == [True] * 3
    assert "0 of 4 shards are stored, 0 % of the label set" in waits[0]
    state = "cannot be seen from here" if remote else "process is writing it"
    assert state in waits[0]
    assert sum(record["label_wait_seconds"] for record in found) > 0


def test_an_epoch_does_not_wait_for_other_seeds(
    config: TrainConfig, whole: LabelSet, tmp_path: Path
) -> None:
    cache = tmp_path / "labels"
    begun(whole, cache)
    write(whole, cache, list(whole.shards([0])))
    notes: list[str] = []
    trainer = Trainer(make_plan(changed(config, cache=cache, follow=5)), Hooks(note=notes.append))
    assert trainer.train_epoch()["view_seed"] == 0 and notes == []
    trainer.loader.close()


def test_without_follow_missing_labels_are_an_error(
    config: TrainConfig, whole: LabelSet, tmp_path: Path
) -> None:
    """So are seeds that the label set does not declare, with it."""
    cache = tmp_path / "labels"
    begun(whole, cache)
    with pytest.raises(IncompleteLabels, match="lacks seeds 0-2 of 3"):
        make_plan(changed(config, cache=cache))
    assert make_plan(changed(config, cache=cache, follow=1)).seeds == 3
    with pytest.raises(IncompleteLabels, match="lacks seeds 0-3 of 4"):
        make_plan(changed(config, cache=cache, follow=1, seeds=4))


def labels_of(label_set: LabelSet, minutes: float) -> StoredLabels:
    import torch

    return StoredLabels({"tiny": label_set}, torch.device("cpu"), follow=Follow(minutes))


ALL = Window(0, ((0, 60),))


def test_waiting_ends_when_nobody_writes(whole: LabelSet, tmp_path: Path) -> None:
    label_set = begun(whole, tmp_path)
    write(whole, tmp_path, list(whole.shards([0]))[:2])
    labels = labels_of(label_set, 0.3 / 60)
    begin = time.monotonic()
    with pytest.raises(IncompleteLabels, match=r"seed 0 lacks samples 32 to 47, .* --resume"):
        labels.enter(ALL, None)
    assert 0.3 < time.monotonic() - begin < 10
    labels.close()


def held(cache: Path, name: str) -> subprocess.Popen[str]:
    """Another process that has a label set open for writing and writes nothing."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from sskt.teacher_cache.storage.local import LocalStorage\n"
        "locks = LocalStorage(Path(sys.argv[1])).locks(sys.argv[2])\n"
        f"locks.acquire({SWEEP}, shared=True); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(cache), name]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.parametrize("how", ["the writer holds its lock", "other shards are written"])
def test_waiting_goes_on_while_somebody_writes(how: str, whole: LabelSet, tmp_path: Path) -> None:
    """A slow writer, or one whose lock cannot be seen: longer than the time that was given."""
    label_set = begun(whole, tmp_path)
    labels = labels_of(label_set, 0.3 / 60)
    holder = None
    if how == "the writer holds its lock":
        holder = held(tmp_path, label_set.name)

        def work() -> None:
            time.sleep(1.0)
            write(whole, tmp_path, list(whole.shards([0])))
    else:

        def work() -> None:
            for shard in [*whole.shards([1, 2]), *whole.shards([0])]:
                time.sleep(0.1)
                write(whole, tmp_path, [shard])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert not labels.enter(ALL, None).skipped.any()
    finally:
        thread.join()
        labels.close()
        if holder is not None:
            holder.kill()
            holder.communicate()


def test_the_end_of_the_lock_ends_waiting(whole: LabelSet, tmp_path: Path) -> None:
    label_set = begun(whole, tmp_path)
    labels = labels_of(label_set, 0.2 / 60)
    writer = create_label_set(tmp_path, whole.spec, whole.classes, 1)
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            labels.enter(ALL, None)
        except IncompleteLabels as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    time.sleep(0.6)
    assert thread.is_alive()
    writer.close()
    thread.join(10)
    assert len(failed) == 1
    labels.close()


def test_closing_ends_waiting(whole: LabelSet, tmp_path: Path) -> None:
    label_set = begun(whole, tmp_path)
    write(whole, tmp_path, list(whole.shards([0])))
    labels = labels_of(label_set, 60)
    labels.enter(ALL, Window(1, ((0, 60),)))
    assert labels._ahead is not None
    time.sleep(0.1)
    labels.close()
    with pytest.raises(InputError, match="closed while it waited"):
        labels._ahead[1].result(10)


@pytest.mark.slow
def test_ctrl_c_ends_a_training_that_waits(
    config: TrainConfig, images: Path, whole: LabelSet, tmp_path: Path
) -> None:
    """In the first epoch, and while the labels of the second are read ahead."""
    for seeds in ([], [0]):
        cache = tmp_path / f"labels{len(seeds)}"
        begun(whole, cache)
        write(whole, cache, list(whole.shards(seeds)))
        command = ["train", "--target", images, "--source", f"tiny={TINY}:build", "--epochs", 3]
        command += ["--cache", cache, "--follow", 60, "--device", "cpu", "--workers", 0]
        command += ["--policy", "pad-crop-flip", "--model", "resnet20", "--out", cache / "run"]
        started = subprocess.Popen(
            [sys.executable, "-c", "from sskt.cli.main import main; main()", *map(str, command)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert started.stderr is not None
        for line in started.stderr:
            if line.startswith("waiting for labels of tiny under view seed"):
                break
        assert f"seed {len(seeds)}:" in line
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=30)
        assert started.returncode == 130 and "Traceback" not in err, err


def test_the_loader_of_python_follows(images: Path, whole: LabelSet, tmp_path: Path) -> None:
    begun(whole, tmp_path)
    target = open_target(str(images))
    loader = SoftLabelLoader(target, cache=tmp_path, batch_size=16, workers=0, follow=5)
    with written_by(whole, tmp_path, lambda shard: True):
        found = [batch.soft("tiny").shape[0] for _ in range(3) for batch in loader]
    assert sum(found) == 180
    loader.close()


def test_follow_asks_for_labels(
    images: Path, whole: LabelSet, tmp_path: Path, sskt: Sskt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--follow`` belongs to the auxiliary task, and needs a label set that exists."""
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "labels", ignore_errors=True)
    status, _, err = sskt("train", "--target", images, "--follow", 1, "--cache", tmp_path)
    assert status == 2 and "make them with" in one_line(err)
    status, _, err = sskt("train", "--target", images, "--follow", 0, "--cache", tmp_path)
    assert status == 2 and "follow" in err
    begun(whole, tmp_path)
    more = ("--follow", 1, "--cache", tmp_path, "--epochs", 3, "--dry-run", "--json")
    status, out, err = sskt("train", "--target", images, "--policy", "pad-crop-flip", *more)
    assert status == 0 and json.loads(out)["config"]["source"][0].startswith("tiny#"), err


def test_units_come_seed_by_seed_where_that_costs_nothing(images: Path, whole: LabelSet) -> None:
    """Files are decoded once for the seeds of a unit, so only units are ordered."""
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    held = 16 * 12 * 4 + 3 * 8 * 3 * 224 * 224
    two = units(views, [whole], 3, 8, 2 * 2 * held / 2**30)
    assert [unit.seeds for unit in two] == [(0, 1)] * 4 + [(2,)] * 4
    assert [unit.shards[0].block for unit in two] == [0, 1, 2, 3] * 2
