"""The public functions: what Python makes and finds is what the command line makes and finds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.helpers import TINY, tree
from support.servers import serving
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from sskt.teacher_cache.api import (
    cache_teachers,
    freeze,
    list_label_sets,
    open_label_set,
    open_source,
    open_target,
    open_views,
)
from sskt.teacher_cache.errors import BadImage, InputError, MissingData, SpecMismatch, UnknownName
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.tools.recompute import compare
from sskt.teacher_cache.tools.reopen import Reopen, reopen
from sskt.trainer.api import train
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.losses import soft_cross_entropy
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.registry import build_network

Call = Callable[..., tuple[int, str, str]]
TEXT = f"tiny={TINY}:build"
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 20, 24, 3), np.uint8)
LABELS = [i % 3 for i in range(30)]


class Own(Dataset[tuple[Any, Any]]):
    """A map-style dataset, changed by what a test gives."""

    def __init__(self, pixels: Any = PIXELS, labels: Any = LABELS, **attributes: Any) -> None:
        self.pixels, self.truth, self.reads = pixels, labels, 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.reads += 1
        return self.pixels[index], self.truth[index]


def own(dataset: Any = None, **given: Any) -> Target:
    return open_target(Own() if dataset is None else dataset, **{"name": "mine"} | given)


@pytest.mark.parametrize("limit", [None, 12])
def test_labels_made_from_python_are_those_of_the_command(
    sskt: Call, images: Path, tmp_path: Path, limit: int | None
) -> None:
    more = ["--limit", limit] if limit else []
    status, _, err = sskt(
        *("cache-teachers", "--source", TEXT, "--target", images, "--seeds", 2, *more),
        *("--policy", "pad-crop-flip", "--cache", tmp_path / "command", "--workers", 0),
    )
    assert status == 0, err
    target = open_target(str(images), limit=limit)
    report = cache_teachers(
        target, TEXT, cache=tmp_path / "python", seeds=2, policy="pad-crop-flip", workers=0
    )
    assert report.written == 2 * len(target) and report.reused == 0
    ours, theirs = tree(tmp_path / "python"), tree(tmp_path / "command")
    assert ours == theirs and len(ours) > 5, "every byte, provenance included"
    again = cache_teachers(
        target, [open_source(TEXT)], cache=tmp_path / "python", seeds=2, policy="pad-crop-flip"
    )
    assert again.written == 0 and again.reused == 2 * len(target)


def test_a_set_made_from_python_is_verified_against_its_source(
    images: Path, tmp_path: Path
) -> None:
    cache_teachers(open_target(images), TEXT, cache=tmp_path, seeds=1, policy="none")
    (label_set,) = list_label_sets(tmp_path)
    views, source = reopen(label_set, Reopen(sources=[TEXT]))
    found = compare(label_set, views, source, 17, 0)
    assert found.same_view and found.distance < 1e-3


def test_cache_teachers_refuses(images: Path, tmp_path: Path) -> None:
    target = open_target(images)
    for given, message in (
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"on_error": "ignore"}, "on_error 'fail' or 'skip'"),
        ({"encoding": "f8"}, "unknown encoding 'f8'"),
        ({"sources": []}, "name at least one"),
        ({"policy": "clip-corner-crop-flip"}, "is for clips"),
    ):
        arguments: dict[str, Any] = {"sources": TEXT, "cache": tmp_path} | given
        with pytest.raises(InputError, match=message):
            cache_teachers(target, **arguments)
    assert not list(tmp_path.iterdir())


def test_views_are_opened_by_the_text_of_a_policy(images: Path) -> None:
    target = open_target(images)
    views = open_views(target, "pad-crop-flip:padding=2")
    assert views[3, 1].shape == (24, 24, 3)
    assert np.array_equal(views.batch(np.array([3, 5]), 1)[0], views[3, 1])
    assert open_views(target).policy.name == "random-resized-crop-flip"
    assert open_views(open_target("shapes")).policy.name == "pad-crop-flip"
    with pytest.raises(UnknownName):
        open_views(target, "mixup")


def test_a_folder_named_as_a_known_target_has_the_policy_of_folders(
    images: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(images, tmp_path / "cifar10")
    assert open_views(open_target(folder)).policy.name == "random-resized-crop-flip"


def test_label_sets_are_opened_by_path_and_by_url(label_cache: Path) -> None:
    (label_set,) = list_label_sets(label_cache)
    assert open_label_set(label_set.path).digest == label_set.digest
    assert open_label_set(str(label_set.path)).digest == label_set.digest
    with serving(label_cache) as url:
        found = open_label_set(f"{url}/{label_set.name}")
        assert torch.equal(found.rows(0, [4, 2]), label_set.rows(0, [4, 2]))
        with pytest.raises(MissingData, match=f"no label set other on .* has: {label_set.name}"):
            open_label_set(f"{url}/other")
        found.storage.close()
    with pytest.raises(MissingData):
        open_label_set(label_cache / "other")


# --- own datasets --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "pil", "pil-grey", "tensor-label"])
def test_an_own_dataset_is_a_target(kind: str) -> None:
    pixels: Any = PIXELS
    labels: Any = LABELS
    if kind.startswith("pil"):
        pixels = [Image.fromarray(x) for x in PIXELS]
    if kind == "pil-grey":
        pixels = [x.convert("L") for x in pixels]
    if kind == "tensor-label":
        labels = torch.tensor(LABELS)
    target = own(Own(pixels, labels), split="fold1")
    assert len(target) == 30 and target.labels.tolist() == LABELS
    assert target.classes == ("0", "1", "2") and (target.name, target.split) == ("mine", "fold1")
    expected = np.asarray(pixels[7].convert("RGB")) if kind == "pil-grey" else PIXELS[7]
    assert np.array_equal(target.read(7), expected)
    assert list(target.ids[:2]) == ["0", "1"]


def test_the_identity_of_an_own_dataset_covers_its_pixels() -> None:
    changed = PIXELS.copy()
    changed[29, 19, 23, 2] ^= 1
    assert own().identity() == own().identity()
    assert own().identity() != own(Own(changed)).identity()
    assert own().identity() != own(Own(PIXELS[::-1])).identity()
    assert own(limit=9).identity() != own().identity()
    # Only the samples that are used count, and one that is not changes nothing.
    assert own(limit=9).identity() == own(Own(changed), limit=9).identity()


def test_a_limited_dataset_has_the_images_of_its_labels() -> None:
    target = own(limit=9)
    assert sorted(target.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for i, row in enumerate(int(name) for name in target.ids):
        assert target.labels[i] == LABELS[row]
        assert np.array_equal(target.read(i), PIXELS[row])
    assert len(set(target.ids)) == 9 and {int(name) for name in target.ids} != set(range(9))


def test_with_a_fingerprint_nothing_is_read_but_labels_that_are_not_known() -> None:
    dataset = Own(targets=LABELS)
    target = own(dataset, fingerprint="v1")
    assert dataset.reads <= 6, "a few images, to notice random transforms"
    assert target.identity() == own(Own(labels=LABELS), fingerprint="v1").identity()
    assert target.identity() != own(dataset, fingerprint="v2").identity()
    assert target.identity() != own(dataset).identity()
    dataset = Own()
    assert own(dataset, fingerprint="v1", labels=np.array(LABELS)).labels.tolist() == LABELS
    assert dataset.reads <= 6


def test_ids_of_an_own_dataset_are_part_of_its_identity() -> None:
    names = [f"photos/{i}.jpg" for i in range(30)]
    target = own(ids=names, fingerprint="v1")
    assert list(target.ids) == names
    turned = own(ids=names[::-1], fingerprint="v1")
    assert target.identity() != turned.identity() != own(fingerprint="v1").identity()
    for wrong, message in (
        (names[:-1], "expected 30 ids, one line of text each; found 29"),
        ([*names[:-1], "a\nb"], "one line of text each"),
        ([*names[:-1], names[0]], r"ids= of dataset mine has 'photos/0.jpg' twice"),
    ):
        with pytest.raises(InputError, match=message):
            own(ids=wrong)


def test_names_of_classes_of_an_own_dataset() -> None:
    names = ["apple", "bear", "cup", "none"]
    assert own(classes=names).classes == tuple(names)
    assert own(Own(classes=names)).classes == tuple(names)
    with pytest.raises(InputError, match="2 names of classes for 3 classes; give classes="):
        own(classes=names[:2])


def test_several_classes_a_sample() -> None:
    labels = np.eye(3, dtype=np.int64)[LABELS] | np.array([1, 0, 0])
    target = own(Own(labels=labels))
    assert target.multi_label and target.labels.shape == (30, 3)
    with pytest.raises(InputError, match="4 names of classes for 3"):
        own(Own(labels=labels), classes=list("abcd"))


class Noisy(Own):
    def __getitem__(self, index: int) -> tuple[Any, Any]:
        noise = np.random.default_rng().integers(0, 256, (20, 24, 3), np.uint8)
        return noise, self.truth[index]


class Damaged(Own):
    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index == 5:
            raise OSError("cannot identify image file")
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Noisy(), "has other pixels when it is read again; open the dataset without random"),
        (Own(torch.zeros(30, 3, 20, 24)), "the image is Tensor .* without ToTensor"),
        (Own(PIXELS / 255), r"the image is ndarray float64 \(20, 24, 3\); expected a PIL image or"),
        (Own(PIXELS[..., 0]), r"ndarray uint8 \(20, 24\); expected"),
        (Own(labels=[0.5] * 30), "expected 30 labels, each a class number"),
        (Own(targets=[0, 1]), "expected 30 labels"),
        (Own(PIXELS[:0], []), "dataset mine is empty"),
        (TensorDataset(torch.zeros(3, 4)), r"is tuple; a dataset must give pairs \(image, label\)"),
        (iter([1]), "has no length and no items; give a map-style dataset"),
    ],
)
def test_datasets_that_cannot_be_used(dataset: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        own(dataset)


@pytest.mark.parametrize("name", ["", "a b", "../up", "cifar10"])
def test_a_name_that_an_own_dataset_cannot_have(name: str) -> None:
    with pytest.raises(InputError, match="an own dataset needs a name for the cache"):
        open_target(Own(), name=name)


def test_arguments_of_own_datasets_go_with_them_only(images: Path) -> None:
    for given in ({"name": "x"}, {"labels": [1]}, {"fingerprint": "v1"}, {"classes": ["a"]}):
        arguments: dict[str, Any] = given
        with pytest.raises(InputError, match="goes with an own dataset"):
            open_target(images, **arguments)


def test_an_own_dataset_is_labelled_and_delivered(tiny: Source, tmp_path: Path) -> None:
    target = own()
    cache_teachers(target, tiny, cache=tmp_path, seeds=2, policy="pad-crop-flip", workers=2)
    loader = SoftLabelLoader(target, cache=tmp_path, batch_size=8, device="cpu")
    assert loader.views.target.images is not None, "small images of one size are held in RAM"
    views = open_views(target, "pad-crop-flip")
    for batch in loader:
        assert np.array_equal(batch.views.numpy(), views.batch(batch.samples, 0))
        assert batch.labels.tolist() == [LABELS[i] for i in batch.samples]
        log_p = tiny.log_probabilities(batch.views)
        assert torch.allclose(batch.soft("tiny"), log_p.exp(), atol=1e-3)
    with pytest.raises(SpecMismatch, match="contents"):
        SoftLabelLoader(own(Own(PIXELS ^ 1)), cache=tmp_path, device="cpu")
    with pytest.raises(MissingData, match="no labels of any source over theirs train"):
        SoftLabelLoader(own(name="theirs"), cache=tmp_path, device="cpu")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_several_sizes_are_read_when_they_are_needed(
    tiny: Source, tmp_path: Path, workers: int
) -> None:
    pixels = [x[: 12 + i % 5] for i, x in enumerate(PIXELS)]
    target = own(Own(pixels))
    policy = "random-resized-crop-flip:size=16"
    cache_teachers(target, tiny, cache=tmp_path, seeds=1, policy=policy, workers=workers)
    loader = SoftLabelLoader(target, cache=tmp_path, batch_size=8, device="cpu", workers=workers)
    assert loader.views.target.images is None
    assert sorted(s for b in loader for s in b.samples.tolist()) == list(range(30))


def test_an_unreadable_item_is_an_error_or_skipped(tiny: Source, tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="item 5 of dataset mine cannot be read: cannot identify"):
        own(Damaged())
    target = own(Damaged(targets=LABELS), fingerprint="v1")
    given: dict[str, Any] = {"cache": tmp_path, "seeds": 1, "policy": "none", "workers": 0}
    with pytest.raises(BadImage, match="item 5"):
        cache_teachers(target, tiny, **given)
    report = cache_teachers(target, tiny, on_error="skip", **given)
    assert report.skipped == ["5"]
    loader = SoftLabelLoader(target, cache=tmp_path, batch_size=8, device="cpu", on_error="skip")
    assert sorted(s for b in loader for s in b.samples.tolist()) == sorted({*range(30)} - {5})


# --- own teachers and students -------------------------------------------------------------------


def small(activation: type[nn.Module] = nn.ReLU, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, classes),
    )


HOW: dict[str, Any] = {
    "name": "own", "size": 16, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "device": "cpu"
}  # fmt: skip


def test_an_own_module_is_a_source() -> None:
    module = small().train()
    source = freeze(module, **HOW)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert source.classes == tuple(f"class {i}" for i in range(5))
    views = torch.from_numpy(PIXELS[:4, :16, :16])
    x = views.permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(HOW["mean"]).view(3, 1, 1)) / torch.tensor(HOW["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = F.log_softmax(module(x), 1)
    assert torch.allclose(source.log_probabilities(views), expected, atol=1e-5)
    named = freeze(small(), **HOW, classes=list("abcde"))
    assert named.classes == tuple("abcde")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)  # type: ignore[no-any-return]


class Thrice(Twice):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.inner(x)  # type: ignore[no-any-return]


def test_the_identity_of_an_own_module_covers_weights_structure_and_code() -> None:
    first = freeze(small(), **HOW).identity()
    assert freeze(small(), **HOW).identity() == first
    moved = small()
    with torch.no_grad():
        next(moved.parameters())[0] += 1
    others = [moved, small(nn.GELU), Twice(), Thrice()]
    found = [freeze(other, **HOW).identity() for other in others]
    assert all(one != first for one in found) and found[2] != found[3]
    assert found[0]["code"] == first["code"] != found[1]["code"]
    assert freeze(small(), **HOW, code="v1").identity()["code"] == "v1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a b"}, "source name 'a b' cannot be used"),
        ({"name": "primary"}, "source name 'primary' cannot be used"),
        ({"mean": (0.5,)}, "mean and std need three numbers each"),
        ({"channels": "hsv"}, "channels is rgb or bgr"),
        ({"std": (0, 1, 1)}, "std must not be 0"),
        ({"classes": ["a"]}, "class"),
        ({"module": nn.Linear(7, 5)}, "source own does not take input of 16 pixels"),
        ({"module": nn.Conv2d(3, 4, 1)}, "own"),
        ({"module": "resnet"}, "source own is str, not a torch Module"),
    ],
)
def test_modules_that_cannot_be_frozen(given: dict[str, Any], message: str) -> None:
    arguments = {"module": small()} | HOW | given
    with pytest.raises(InputError, match=message):
        freeze(arguments.pop("module"), **arguments)


def test_a_source_by_its_text() -> None:
    source = open_source(TEXT, device="cpu")
    assert (source.name, len(source.classes)) == ("tiny", 12)
    with pytest.raises(UnknownName):
        open_source("nothing")


def test_a_network_by_name_is_the_one_of_the_trainer() -> None:
    torch.manual_seed(3)
    ours = SSKTNetwork("resnet20", {"a": 7, "b": 4}, classes=5, tm=True)
    torch.manual_seed(3)
    theirs = SSKTNetwork(build_network("resnet20", 5), {"a": 7, "b": 4}, tm=True)
    ours.eval(), theirs.eval()
    x = torch.rand(2, 3, 32, 32)
    logits, auxiliary = ours(x)
    assert logits.shape == (2, 5) and {n: z.shape[1] for n, z in auxiliary.items()} == {
        "a": 7,
        "b": 4,
    }
    assert torch.equal(logits, theirs(x)[0])
    small_stem = SSKTNetwork("resnet18", {}, classes=5, size=32).target.get_submodule("body.conv1")
    assert small_stem.stride == (1, 1)


def test_an_own_module_is_a_student() -> None:
    module = small(classes=9)
    network = SSKTNetwork(module, {"a": 7}, classes=9, tm=True, taps=["1"], size=20)
    logits, auxiliary = network(torch.rand(2, 3, 20, 20))
    assert logits.shape == (2, 9) and auxiliary["a"].shape == (2, 7)
    assert SSKTNetwork(small(classes=9), {}, classes=4)(torch.rand(2, 3, 20, 20))[0].shape == (2, 4)
    for given, message in (
        ({"target": "resnet20"}, "classes= is missing"),
        ({"target": "resnet21", "classes": 3}, "unknown model 'resnet21'"),
        ({"target": build_network("resnet20", 5), "classes": 5}, "leave classes= and taps= out"),
        ({"target": small(), "classes": 5, "tm": True}, "--tm needs stages"),
    ):
        arguments: dict[str, Any] = {"source_classes": {"a": 7}} | given
        with pytest.raises(InputError, match=message):
            SSKTNetwork(**arguments)


def test_soft_cross_entropy_is_equation_1() -> None:
    rng = np.random.default_rng(0)
    z_s, z_t, temperature = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), 2.5
    p = np.exp(z_s / temperature)
    p /= p.sum(1, keepdims=True)
    q = np.exp(z_t / temperature)
    q /= q.sum(1, keepdims=True)
    expected = -(temperature**2) * (p * np.log(q)).sum(1).mean()
    found = soft_cross_entropy(torch.tensor(z_t), torch.tensor(p), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_train_is_the_command(sskt: Call, config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, epochs=1, test_split="none", out=tmp_path / "python")
    (record,) = train(config)
    assert train(config) == [record], "a finished run is not trained again"
    same = ("target", "policy", "epochs", "batch_size", "cache", "device", "test_split")
    options = [f"--{key.replace('_', '-')}={getattr(config, key)}" for key in same]
    status, _, err = sskt(
        "train", "--tm", "--source", config.source[0], *options, "--out", tmp_path / "command"
    )
    assert status == 0, err
    ours, theirs = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        for name in ("python", "command")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_train_refuses_what_the_command_refuses(config: TrainConfig, tmp_path: Path) -> None:
    for given, message in (
        ({}, "a run needs a folder"),
        ({"out": tmp_path, "early_stop": 2, "test_split": "none"}, "--early-stop follows the test"),
        ({"out": tmp_path, "target": ""}, "no target"),
        ({"out": tmp_path, "cache": tmp_path / "none"}, "no label sets in"),
    ):
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(config, **given))
