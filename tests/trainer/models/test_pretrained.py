"""Where a training starts: files, runs' checkpoints, torchvision's weights, frozen stages."""

from __future__ import annotations

import copy
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData
from sskt.trainer.models.base import TargetNetwork
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.pretrained import freeze_before, load_initial
from sskt.trainer.models.registry import build_network, is_three_dimensional
from sskt.trainer.results import records


def fresh(name: str, classes: int = 3, seed: int = 1, **options: Any) -> TargetNetwork:
    torch.manual_seed(seed)
    network = build_network(name, classes, **options)
    # Fresh BatchNorms are all alike: what was loaded must be told from what was there.
    for key, buffer in network.named_buffers():
        if key.endswith("running_mean"):
            buffer.add_(seed)
    return network


def published(network: TargetNetwork, name: str) -> dict[str, Tensor]:
    """The state of a network under the names that its published checkpoints have."""
    heads = {"mobilenet_v2": "classifier.1.", "densenet121": "classifier."}
    return {
        (
            f"{heads.get(name, 'fc.')}{key[3:]}"
            if key.startswith("fc.")
            else key.removeprefix("body.")
        ): v
        for key, v in network.state_dict().items()
    }


def same(a: TargetNetwork, b: TargetNetwork, but: tuple[str, ...] = ()) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in a.state_dict().items() if k not in but)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "densenet121"])
@pytest.mark.parametrize("classes", [3, 7])
def test_a_file_of_published_weights(name: str, classes: int, tmp_path: Path) -> None:
    source, target = fresh(name, classes, 1), fresh(name, 3, 2)
    untouched = target.get_parameter("fc.weight").detach().clone()
    path = tmp_path / "weights.pth"
    state = published(source, name)
    if name == "densenet121":  # its published files have the names of an older torchvision
        state = {
            k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.")
            if "denselayer" in k
            else k: v
            for k, v in state.items()
        }
    torch.save(state, path)
    kept = load_initial(target, str(path), name)
    assert kept == ([] if classes == 3 else ["fc.weight", "fc.bias"])
    assert same(target, source, tuple(kept))
    assert torch.equal(target.get_parameter("fc.weight"), untouched) == (classes == 7)


@pytest.mark.parametrize("shortcut", ["a", "b"])
def test_a_kinetics_checkpoint(shortcut: str, tmp_path: Path) -> None:
    source = fresh("resnet3d10", 400, 1, shortcut=shortcut)
    state = {
        f"module.{key}": value
        for key, value in source.state_dict().items()
        if not key.endswith("num_batches_tracked")  # older than PyTorch 0.4.1
    }
    path = tmp_path / "resnet-10-kinetics.pth"
    torch.save({"epoch": 200, "arch": "resnet-10", "state_dict": state, "optimizer": {}}, path)
    target = fresh("resnet3d10", 51, 2, shortcut=shortcut)
    assert load_initial(target, str(path), "resnet3d10") == ["fc.weight", "fc.bias"]
    assert same(target, source, ("fc.weight", "fc.bias"))
    other = fresh("resnet3d10", 51, 2, shortcut="ab".replace(shortcut, ""))
    name = r"layer2\.0\.downsample\.0\.weight is (missing|not of it)"
    with pytest.raises(BadCheckpoint, match=f"{name}; check --model, --stem and --shortcut"):
        load_initial(other, str(path), "resnet3d10")


def test_safetensors(tmp_path: Path) -> None:
    source, target = fresh("resnet20", 3, 1), fresh("resnet20", 3, 2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert load_initial(target, str(tmp_path / "w.safetensors"), "resnet20") == []
    assert same(target, source)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_the_checkpoint_of_a_run(name: str, tmp_path: Path) -> None:
    source, target = fresh(name, 3, 1), fresh(name, 3, 2)
    network = SSKTNetwork(source, {"imagenet": 4}, tm=False)
    records.save_checkpoint(tmp_path, {"epoch": 3, "model": network.state_dict(), "rng": [1]})
    assert load_initial(target, str(tmp_path / records.CHECKPOINT), name) == []
    assert same(target, source)


def test_imagenet_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.models import MobileNet_V2_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = MobileNet_V2_Weights.IMAGENET1K_V1
    place = tmp_path / "hub" / "checkpoints" / Path(weights.url).name
    place.parent.mkdir(parents=True)
    source, target = fresh("mobilenet_v2", 1000, 1), fresh("mobilenet_v2", 5, 2)
    torch.save(published(source, "mobilenet_v2"), place)
    state = torch.get_rng_state()
    assert load_initial(target, "imagenet", "mobilenet_v2") == ["fc.weight", "fc.bias"]
    assert same(target, source, ("fc.weight", "fc.bias"))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    message = r"cannot download the weights of mobilenet_v2 from http.*\(no route.*\); give.*--init"
    with pytest.raises(MissingData, match=message):
        load_initial(fresh("mobilenet_v2"), "imagenet", "mobilenet_v2")


@pytest.mark.parametrize("name", ["resnet20", "resnet3d10", "own.py:build"])
def test_networks_without_published_weights(name: str) -> None:
    with pytest.raises(InputError, match=f"no ImageNet weights of {name}; give --init FILE"):
        load_initial(fresh("resnet20"), "imagenet", name)


def _drop(state: dict[str, Tensor]) -> None:
    del state["bn1.weight"]


def _add(state: dict[str, Tensor]) -> None:
    state["conv9.weight"] = torch.zeros(1)


def _stem(state: dict[str, Tensor]) -> None:
    state["conv1.weight"] = torch.zeros(64, 3, 7, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "bn1.weight is missing"),
        (_add, "conv9.weight is not of it"),
        (_stem, r"conv1.weight has shape \[64, 3, 7, 7\], expected \[16, 3, 3, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, message: str, tmp_path: Path) -> None:
    state = dict(fresh("resnet20").state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    target = fresh("resnet20", 3, 2)
    before = copy.deepcopy(target)
    with pytest.raises(BadCheckpoint, match=f"w.pth does not fit resnet20: {message}"):
        load_initial(target, str(tmp_path / "w.pth"), "resnet20")
    assert same(target, before)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(BadCheckpoint, match="cannot be read safely"):
        load_initial(fresh("resnet20"), str(tmp_path / "bad.pth"), "resnet20")
    with pytest.raises(MissingData, match="no weights file"):
        load_initial(fresh("resnet20"), str(tmp_path / "absent.pth"), "resnet20")


# By stage that fine-tuning begins with: the first parts of parameters' names that train.
FROZEN: list[tuple[str, list[set[str]]]] = [
    (
        "resnet20",
        [
            {"stages.0", "stages.1", "stages.2", "fc"},
            {"stages.1", "stages.2", "fc"},
            {"stages.2", "fc"},
            {"fc"},
        ],
    ),
    (
        "resnet18",
        [{*(f"body.layer{k}" for k in range(i, 5)), "fc"} for i in range(1, 6)],
    ),
    (
        "resnet3d10",
        [{*(f"layer{k}" for k in range(i, 5)), "fc"} for i in range(1, 6)],
    ),
    (
        "mobilenet_v2",
        [{*(f"body.features.{k}" for k in range(i, 19)), "fc"} for i in (1, 4, 7, 11, 14, 17, 18)],
    ),
    (
        "vgg16",
        [
            {*(f"body.features.{k}" for k in range(44) if k > i), "fc"}
            for i in (-1, 5, 12, 22, 32, 42)
        ],
    ),
    (
        "densenet121",
        [
            {f"body.features.{name}" for name in names} | {"fc"}
            for names in (
                {*(f"denseblock{k}" for k in range(i, 5)), "norm5"}
                | {f"transition{k}" for k in range(i, 4)}
                for i in range(1, 5)
            )
        ],
    ),
]


@pytest.mark.parametrize(("name", "expected"), FROZEN)
def test_stages_that_fine_tuning_trains(name: str, expected: list[set[str]]) -> None:
    network = SSKTNetwork(build_network(name, 3, size=32), {"imagenet": 4}, tm=False)
    stages = len(network.target.stage_widths)
    assert len(expected) == stages + 1
    for stage, wanted in enumerate(expected, 1):
        network.requires_grad_(True)
        freeze_before(network, stage)
        trained = {key for key, p in network.target.named_parameters() if p.requires_grad}
        prefixes = tuple(f"{part}." for part in wanted)
        all_of_them = {k for k, _ in network.target.named_parameters() if k.startswith(prefixes)}
        assert trained == all_of_them, stage
        assert all(p.requires_grad for p in network.heads.parameters())
    for stage in (0, stages + 2):
        with pytest.raises(InputError, match=f"network has stages 1 to {stages} "):
            freeze_before(network, stage)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "resnet3d10"])
def test_frozen_parts_do_not_move_and_all_others_do(name: str) -> None:
    network = SSKTNetwork(fresh(name, size=32), {"imagenet": 4}, tm=True)
    freeze_before(network, 3)
    network = copy.deepcopy(network)  # as an average of the weights does
    nn.Module.eval(network)
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    clip = (4,) if is_three_dimensional(name) else ()
    primary, auxiliary = network(torch.rand(4, 3, *clip, 32, 32))
    torch.autograd.backward(primary.square().sum() + auxiliary["imagenet"].square().sum())
    trained = [p for p in network.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()
    after = network.state_dict()
    frozen = {id(m) for part in network.frozen for m in part.modules()}
    seen = 0
    for prefix, module in network.named_modules():
        still = id(module) in frozen
        for key, p in module.named_parameters(prefix, recurse=False):
            assert (p.grad is None) == still and p.requires_grad != still, key
            seen += still
        for key, _ in module.named_buffers(prefix, recurse=False):
            assert torch.equal(after[key], before[key]) == still, key
        if next(module.parameters(recurse=False), None) is not None:
            assert module.training != still, prefix
    assert seen > 5


def test_freezing_needs_stages() -> None:
    network = SSKTNetwork(fresh("shufflenet_v2_x0_5", size=32), {}, tm=False)
    with pytest.raises(
        InputError, match=r"--finetune-from needs stages: name the modules .* --taps"
    ):
        freeze_before(network, 2)
