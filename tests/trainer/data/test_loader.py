"""Loader processes: killed, silent, with little shared memory, with few open files."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.helpers import write_images

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import SsktError
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.data import loader
from sskt.trainer.data.loader import Feed


def feed_of(folder: Path, workers: int) -> Feed:
    return Feed(Views(open_target(str(folder)), parse_policy("none")), workers, checked=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, "a loader process was killed .* --resume, with fewer --workers"),
        (signal.SIGSTOP, "no loader process sent a batch for .* run again with --resume"),
    ],
)
def test_a_dead_or_silent_loader_process_ends_the_pass_in_a_sentence(
    images: Path, how: signal.Signals, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "SILENT_SECONDS", 3)
    others = set(multiprocessing.active_children())
    batches = feed_of(images, 1)([np.arange(4)] * 400, 0)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    assert worker.pid is not None
    os.kill(worker.pid, how)
    with pytest.raises(SsktError, match=message):
        list(batches)
    worker.join(20)
    assert not worker.is_alive()


READ = """
import sys
import numpy as np
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.data.loader import Feed

views = Views(open_target(sys.argv[1]), parse_policy("none"))
samples = [np.arange(16)] * int(sys.argv[2])
kept = list(Feed(views, 2, checked=True)(samples, 0))
expected = views.batch(samples[0], 0)
assert all(np.array_equal(batch.views.numpy(), expected) for batch in kept)
print(len(kept))
"""


def limited(images: Path, batches: int, *before: str, **settings: Any) -> int:
    command = [*before, sys.executable, "-c", READ, str(images), str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """16 images of 150 KB: a batch of 2.4 MB."""
    rng = np.random.default_rng(0)
    write_images(tmp_path / "train" / "a", rng.integers(0, 256, (16, 224, 224, 3), np.uint8))
    shutil.copytree(tmp_path / "train" / "a", tmp_path / "train" / "b")
    return tmp_path


def test_batches_that_do_not_fit_the_shared_memory_arrive(large: Path) -> None:
    small = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    shell = ["unshare", "--mount", "--map-root-user", "sh", "-c", small, "sh"]
    if subprocess.run([*shell, "true"], capture_output=True).returncode:
        pytest.skip("a mount of its own is not allowed here")
    assert limited(large, 6, *shell) == 6


def test_more_batches_than_open_files_are_kept(images: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 512:
        pytest.skip("the system allows few open files")
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))  # noqa: E731
    assert limited(images, 150, preexec_fn=few) == 150
