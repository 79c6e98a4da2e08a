"""The Python code of the README and the pages runs as it is printed, every block of it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.servers import serving
from support.transcripts import ROOT

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.media.video import count_frames, read_frames
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig
from sskt.trainer.loop.loggers import find_logger
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.runs import run_training

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
CONTRIBUTING = "CONTRIBUTING.md"  # its blocks run in tests/test_docs.py
TESTED = {
    "README.md": 1,
    "docs/format.md": 1,
    "docs/guides/frameworks.md": 3,
    "docs/guides/other-tools.md": 3,
    "docs/guides/sources-and-targets.md": 1,
    "docs/guides/training.md": 3,
    "docs/paper-settings.md": 1,
    "docs/server.md": 1,
    "docs/tutorials/python.md": 3,
}


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text("utf-8"))


def run(code: str, about: str, **names: Any) -> dict[str, Any]:
    """The names that the code leaves behind."""
    scope = {"__name__": "snippet", **names}
    exec(compile(code, about, "exec"), scope)
    return scope


def changed(code: str, *pairs: tuple[str, str]) -> str:
    """The code with parts replaced, each of which it has once."""
    for old, new in pairs:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


def test_every_block_has_its_test() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    counts = {str(page.relative_to(ROOT)): len(BLOCK.findall(page.read_text())) for page in pages}
    assert {page: count for page, count in counts.items() if count} == TESTED


@pytest.mark.slow
def test_the_loop_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = changed(
        blocks("README.md")[0],
        ('"cifar10", root="data", download=True', '"shapes", limit=64'),
        ('["imagenet", "places365"]', '["imagenet:efficientnet_lite0@32"]'),
        ("seeds=10", "seeds=1"),
        ("batch_size=128", 'batch_size=32, device="cpu"'),
        ("range(200)", "range(1)"),
        ("        ...", "        loss.backward()"),
    )
    left = run(code, "README.md", F=torch.nn.functional)
    assert torch.isfinite(left["loss"])
    assert left["model"].target.fc.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_python_tutorial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("\n".join(blocks("docs/tutorials/python.md")), "python.md")
    printed = capsys.readouterr().out
    assert re.search(r"epoch 1: \d+\.\d{3}\n\(3, 1000\)\n$", printed), printed


def test_the_view_policies_of_the_guide(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(blocks("docs/guides/sources-and-targets.md")[0])
    image = np.arange(80 * 100 * 3, dtype=np.uint8).reshape(1, 80, 100, 3)
    for text in ("brightness:strength=8", "strong:size=32"):
        policy = parse_policy(f"{tmp_path / 'own.py'}:{text}")
        target = Target("made", "train", ("a",), np.zeros(1, np.int64), ["id 0"], images=image)
        views = Views(target, policy)
        made = [views.of_image(image[0], sample, 0) for sample in range(4)]
        assert len({view.tobytes() for view in made}) > 1
        size = (80, 100) if "brightness" in text else (32, 32)
        assert all(view.shape == (*size, 3) and view.dtype == np.uint8 for view in made)


def test_the_page_on_other_tools(
    label_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for needed in ("xarray", "tensorstore"):
        pytest.importorskip(needed)
    (tmp_path / "labels").symlink_to(label_cache)
    monkeypatch.chdir(tmp_path)
    run("\n".join(blocks("docs/guides/other-tools.md")[:2]), "other-tools.md")
    lines = capsys.readouterr().out.splitlines()
    shown = r"\(.seed., .sample., .class.\) float\d\d log-probability of the class"
    assert re.fullmatch(shown, lines[0])
    best = [float(line.rpartition(" ")[2]) for line in lines[1:4]]
    assert best == sorted(best, reverse=True) and 0 < sum(best) < 1.01
    assert lines[4].endswith("('seed', 'sample', 'class')") and len(lines) == 7
    assert lines[6].startswith("('seed', 'sample', 'class') (")


@pytest.mark.parametrize("place", ["server", "bucket", "zip"])
def test_a_set_opens_from_elsewhere(
    place: str,
    label_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sskt: Callable[..., tuple[int, str, str]],
) -> None:
    """The bucket is a folder here: the code differs by its URL alone."""
    for needed in ("xarray", "obstore"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    code = blocks("docs/guides/other-tools.md")[2]
    imports, server, bucket, archive = re.split(r"^# .*\n(?:# .*\n)?", code, flags=re.M)
    (name,) = (path.name for path in label_cache.glob("[!.]*"))
    imports = re.sub(r'NAME = ".*"', f"NAME = {name!r}", imports)
    if place == "server":
        with serving(label_cache) as address:
            line = changed(server.splitlines()[0], ("http://labels:8080", address))
            left = run(f"{imports}data = {line}\nrow = data.labels[0, 0].values", "other-tools.md")
    elif place == "bucket":
        code = changed(bucket, ("s3://bucket/labels", f"file://{label_cache}"))
        code = changed(code, ("xarray.open", "data = xarray.open"))
        left = run(f"{imports}{code}row = data.labels[0, 0].values", "other-tools.md")
    else:
        assert sskt("copy", label_cache, "set.zip")[0] == 0
        code = changed(archive, ("xarray.open", "data = xarray.open"))
        left = run(f"{imports}{code}row = data.labels[0, 0].values", "other-tools.md")
    assert np.isclose(np.exp(left["row"].astype(np.float64)).sum(), 1, atol=1e-3)


@pytest.mark.slow
def test_the_page_on_frameworks(images: Path, tmp_path: Path, tiny: Source) -> None:
    for package in ("timm.task", "lightning"):
        pytest.importorskip(package)
    student, task, module = blocks("docs/guides/frameworks.md")
    left = run(student, "frameworks.md")
    assert len(left["model"].target.stage_widths) == 4
    left = run(module, "frameworks.md", sskt=left["sskt"])
    labels = left["Labels"](open_target(str(images)), tiny, tmp_path)
    labels.prepare_data()
    loader = labels.train_dataloader()
    network = importlib.import_module("timm").create_model("resnet10t", num_classes=12)
    left = run(task, "frameworks.md", sskt=left["sskt"], loader=loader, student=network)
    left["loss"].backward()
    assert network.fc.weight.grad.abs().sum() > 0


def test_reading_from_the_server_without_sskt(label_cache: Path) -> None:
    pytest.importorskip("obstore")
    (name,) = (path.name for path in label_cache.glob("[!.]*"))
    with serving(label_cache) as address:
        code = changed(blocks("docs/server.md")[0], ("http://labels:8080", address), ("NAME", name))
        row = run(code, "server.md")["labels"][0, 0]
    assert np.isclose(np.exp(row.astype(np.float64)).sum(), 1, atol=1e-3)


def test_frames_as_the_format_counts_them(data: Path) -> None:
    import av

    path = sorted((data / "ucf101").rglob("*.avi"))[0]
    code = blocks("docs/format.md")[0] + "\n        frames.append(rgb)\n"
    frames: list[np.ndarray[Any, Any]] = []
    run(code, "format.md", av=av, path=str(path), frames=frames)
    wanted = [0, 7, len(frames) - 1]
    assert len(frames) == count_frames(path).frames > 16
    for k, frame in read_frames(path, wanted).items():
        assert np.array_equal(frames[k], frame)


def test_the_logger_and_the_network_of_a_run(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    _, logger, network = blocks("docs/guides/training.md")  # the first: test_own_code.py
    (tmp_path / "mylog.py").write_text(logger)
    log = find_logger("mylog.py:open_log")({}, tmp_path)
    records = run_training(replace(config, epochs=1, out=Path("run")), Hooks(epoch=log))
    printed = capsys.readouterr().out.split()
    assert printed == [str(records[0][k]) for k in ("epoch", "loss", "test_top1")]
    views = torch.zeros((2, 16, 16, 3), dtype=torch.uint8)
    assert run(network, "training.md", views=views)["logits"].shape[0] == 2


def test_the_evidence_for_the_paper_s_settings(capsys: pytest.CaptureFixture[str]) -> None:
    run(blocks("docs/paper-settings.md")[0], "paper-settings.md")
    text = (ROOT / "docs/paper-settings.md").read_text("utf-8")
    shown = re.search(r"```python\n.*?```\n\n```\n(.*?)```", text, re.S)
    assert shown and capsys.readouterr().out == shown[1]
