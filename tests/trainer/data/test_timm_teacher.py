"""``TimmTeacher``: a task of timm with stored labels equals the task with the live network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import TINY
from torch import nn

from sskt.teacher_cache.api import cache_teachers, open_target
from sskt.teacher_cache.errors import InputError, UnknownName
from sskt.teacher_cache.sources.source import Source
from sskt.trainer.data.soft_label_loader import SoftLabelLoader

pytest.importorskip("timm.task")

from timm.task import FeatureDistillationTask, LogitDistillationTask

from sskt.trainer.data.timm_teacher import TimmTeacher

T = 2.0


class Student(nn.Module):
    """As timm's networks: classes, channels and the normalisation of its input."""

    num_classes, in_chans, num_features = 12, 3, 3
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 12)

    def forward_features(self, x: Any) -> Any:
        return x.mean((2, 3))

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        return x if pre_logits else self.fc(x)

    def forward(self, x: Any) -> Any:
        return self.forward_head(self.forward_features(x))


class Live(nn.Module):
    """The source as a module that gets the views of the loader."""

    def __init__(self, source: Source, loader: SoftLabelLoader) -> None:
        super().__init__()
        self.source, self.loader = source, loader

    def forward(self, x: Any) -> Any:
        return self.source.log_probabilities(self.loader.recent[-1].views)


@pytest.fixture(scope="module")
def cache(images: Path, tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    target = open_target(images)
    for encoding in ("f32", "topk-4"):
        cache_teachers(
            target, tiny, cache=folder / encoding, seeds=2, policy="pad-crop-flip",
            encoding=encoding,
        )  # fmt: skip
    return folder


def loader_of(images: Path, cache: Path, encoding: str = "f32") -> SoftLabelLoader:
    return SoftLabelLoader(
        open_target(images), cache=cache / encoding, batch_size=20, device="cpu", workers=0
    )


def task_of(teacher: Any, **how: Any) -> LogitDistillationTask:
    return LogitDistillationTask(
        Student(), teacher_model=teacher, temperature=T, task_loss_weight=0.3, verbose=False, **how
    )


def test_a_task_has_the_loss_of_the_live_teacher(images: Path, cache: Path, tiny: Source) -> None:
    loader = loader_of(images, cache)
    stored = task_of(TimmTeacher(loader, temperature=T))
    live = task_of(Live(tiny, loader))
    live.trainable_module = stored.trainable_module
    count = 0
    for batch in loader:
        found = stored(batch.images, batch.labels)
        wanted = live(batch.images, batch.labels)
        for name in ("loss", "kd_loss", "output"):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
        count += 1
    assert count == 3
    torch.autograd.backward(found["loss"])
    assert not list(stored.teacher.parameters())


def test_the_softmax_at_the_temperature_is_the_stored_label(images: Path, cache: Path) -> None:
    loader = loader_of(images, cache)
    teacher = TimmTeacher(loader, temperature=T)
    for batch in loader:
        z = teacher(batch.images)
        torch.testing.assert_close(torch.softmax(z / T, 1), batch.soft("tiny", T))
        copied = teacher(batch.images.clone().contiguous())
        assert torch.equal(copied, z), "by value where the address is another one"


def test_a_batch_ahead_is_told_apart(images: Path, cache: Path) -> None:
    loader = loader_of(images, cache)
    teacher = TimmTeacher(loader)
    batches = iter(loader)
    first, second = next(batches), next(batches)
    for batch in (first, second):
        torch.testing.assert_close(teacher(batch.images).softmax(1), batch.soft("tiny"))
    next(batches)
    with pytest.raises(InputError, match="not the images of a batch of the loader"):
        teacher(first.images)


def test_labels_never_go_with_other_images(images: Path, cache: Path) -> None:
    loader = loader_of(images, cache)
    teacher = TimmTeacher(loader)
    for batch in loader:
        for wrong in (batch.images.flip(0), batch.images[:-1], batch.images + 1e-3):
            with pytest.raises(InputError, match=r"pass batch.images as it is, without mixup"):
                teacher(wrong)


def test_the_features_of_a_task_are_those_of_the_label_set(images: Path, tmp_path: Path) -> None:
    """A set with a head gives both: features, and logits for the other tasks."""
    target = open_target(images)
    cache_teachers(
        target, f"tiny={TINY}:build", cache=tmp_path, seeds=1, policy="pad-crop-flip",
        output="features", workers=0,
    )  # fmt: skip
    loader = SoftLabelLoader(target, cache=tmp_path, batch_size=20, device="cpu", workers=0)
    teacher = TimmTeacher(loader, temperature=T)
    task = FeatureDistillationTask(
        Student(), teacher, student_feature_dim=3, verbose=False,
        teacher_feature_dim=loader.source_widths["tiny"],
    )  # fmt: skip
    for batch in loader:
        assert torch.equal(teacher(batch.images, True), batch.features("tiny"))
        assert torch.isfinite(task(batch.images, batch.labels)["loss"])
        found = task_of(teacher)(batch.images, batch.labels)
        assert torch.isfinite(found["loss"])
        z = teacher(batch.images)
        torch.testing.assert_close(torch.softmax(z / T, 1), batch.soft("tiny", T))


def test_zeros_of_top_k_labels_give_a_finite_loss(images: Path, cache: Path) -> None:
    loader = loader_of(images, cache, "topk-4")
    task = LogitDistillationTask(Student(), TimmTeacher(loader), temperature=1.0, verbose=False)
    hot = task_of(TimmTeacher(loader, temperature=T))
    for batch in loader:
        assert torch.isfinite(task(batch.images, batch.labels)["loss"])
        with pytest.raises(InputError, match="labels stored as topk-4 are wrong at temperature 2"):
            hot(batch.images, batch.labels)


def test_what_cannot_be(images: Path, cache: Path) -> None:
    loader = loader_of(images, cache)
    with pytest.raises(UnknownName, match="unknown source of the loader 'imagenet'; known: tiny"):
        TimmTeacher(loader, "imagenet")
    without = SoftLabelLoader(open_target(images), sources=[], device="cpu", workers=0)
    with pytest.raises(InputError, match=r"the loader has the sources \(none\); name one of them"):
        TimmTeacher(without)
    assert without.recent.maxlen == 0, "no batch is kept for nothing"
    features = FeatureDistillationTask(
        Student(), TimmTeacher(loader), student_feature_dim=3, teacher_feature_dim=3, verbose=False
    )
    for batch in loader:
        with pytest.raises(InputError, match="are soft labels, and give no features"):
            features.teacher(batch.images, return_features=True)
