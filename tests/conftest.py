"""Fixtures: the real data beside the checkout, small folders cut from it, tiny sources."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import TINY, write_images

from sskt.cli.main import run
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig

TRAIN_EACH, TEST_EACH = 200, 50
# Python has the filter since 3.11.4, and asks for it since 3.12.
SAFELY: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cuda",
        help="Device of the tests marked gpu; with cpu they run without a GPU.",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests that need a GPU on a machine without one."""
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Indices of files and compiled networks are kept here and not where the user's are."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSKT_HOME", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        for name in ("SSKT_DATA", "SSKT_CACHE", "SSKT_LABELS"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where a test marked gpu runs."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data (README there); tests that need it are skipped without it."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SSKT_TEST_DATA", beside))
    if not (folder / "README.md").exists():
        pytest.skip(f"real data not found: {folder} (set SSKT_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def cifar(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real CIFAR-10 JPEGs as a folder of class folders: 2,000 train and 500 test images."""
    folder = tmp_path_factory.mktemp("real") / "cifar10"
    counts: dict[tuple[str, str], int] = {}
    with tarfile.open(data / "cifar10-jpeg.tar.gz") as archive:
        for member in archive:
            if not member.isfile():
                continue
            split, name = Path(member.name).parts[:2]
            counts[split, name] = counts.get((split, name), 0) + 1
            if counts[split, name] <= (TRAIN_EACH if split == "train" else TEST_EACH):
                archive.extract(member, folder, **SAFELY)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes x (train 20, test 8) PNGs of 24x24 pixels, written by the test."""
    folder = tmp_path_factory.mktemp("made") / "images"
    rng = np.random.default_rng(0)
    for split, each in (("train", 20), ("test", 8)):
        for name in ("apple", "bear", "cup"):
            write_images(folder / split / name, rng.integers(0, 256, (each, 24, 24, 3), np.uint8))
    return folder


@pytest.fixture(scope="session")
def tiny() -> Source:
    """A small convolutional source with BatchNorm, 12 classes, always the same weights."""
    return open_source(parse_source(f"tiny={TINY}:build"))


@pytest.fixture(scope="session")
def label_cache(images: Path, tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of the tiny source over the made images: f32, 3 view seeds, shards of 16 rows."""
    folder = tmp_path_factory.mktemp("cache")
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    options = StageOptions(batch_size=8, workers=0, shard_rows=16)
    cache_teachers(views, [tiny], parse_encoding("f32"), 3, folder, options)
    return folder


@pytest.fixture
def config(images: Path, label_cache: Path) -> TrainConfig:
    """A small training from those labels."""
    return TrainConfig(
        target=str(images),
        policy="pad-crop-flip",
        source=["tiny=" + f"{TINY}:build"],
        tm=True,
        epochs=4,
        batch_size=16,
        cache=label_cache,
        device="cpu",
        workers=0,
    )


@pytest.fixture
def sskt(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: (exit status, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return call
