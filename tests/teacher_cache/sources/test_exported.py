"""Networks as torch.export files: declared, safe to open, in evaluation mode."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import TINY
from torch import Tensor, nn
from torch.export import Dim

from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData, SsktError
from sskt.teacher_cache.sources.registry import (
    imagenet_classes,
    open_source,
    parse_source,
    places365_classes,
)
from sskt.teacher_cache.sources.source import Preprocessing, Source

HOW = {"size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
OPTION = "size=16,mean=0.5/0.4/0.3,std=0.2/0.25/0.3"


def images(n: int, size: int = 20) -> Tensor:
    rng = np.random.default_rng(n)
    return torch.from_numpy(rng.integers(0, 256, (n, size, size, 3), np.uint8))


def tiny_network() -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(TINY.read_text(), namespace)
    network: nn.Module = namespace["build"]()
    return network.eval()


def export(file: Path, network: nn.Module, n: int = 4, batch: Any = Dim.DYNAMIC) -> None:
    shapes = ({0: batch},) if batch is not None else None
    program = torch.export.export(network, (torch.randn(n, 3, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, file)


MAKERS: dict[str, Callable[[Path, nn.Module], None]] = {
    "dynamic.pt2": export,
    "fixed.pt2": lambda file, network: export(file, network, 4, None),
    "single.pt2": lambda file, network: export(file, network, 1, None),
    "at_most_3.pt2": lambda file, network: export(file, network, 2, Dim("n", max=3)),
    "at_least_4.pt2": lambda file, network: export(file, network, 6, Dim("n", min=4, max=1000)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/networks/tiny.py as each kind of file."""
    folder = tmp_path_factory.mktemp("files")
    for name, make in MAKERS.items():
        make(folder / name, tiny_network())
    return folder


def opened(file: Path, name: str = "tiny", **options: Any) -> Source:
    return open_source(parse_source(f"{name}={file}"), preprocessing=OPTION, **options)


# --- the same labels --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_file_labels_as_its_network_does(name: str, files: Path, tiny: Source) -> None:
    source = opened(files / name)
    for n in (1, 3, 4, 9):
        found, expected = (s.log_probabilities(images(n)) for s in (source, tiny))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert source.classes == tuple(f"class {i}" for i in range(12))
    source.check_frozen()


@pytest.mark.parametrize("name", MAKERS)
def test_a_files_identity(name: str, files: Path, tiny: Source) -> None:
    found, expected = opened(files / name).identity(), tiny.identity()
    digest = hashlib.sha256((files / name).read_bytes()).hexdigest()
    assert found["code"] == f"sha256:{digest}"
    assert found["arch"] == name
    for key in ("weights", "preprocessing", "batchnorm", "precision"):
        assert found[key] == expected[key]


def test_another_graph_over_the_same_weights_is_another_source(files: Path, tmp_path: Path) -> None:
    network = tiny_network()
    assert isinstance(network, nn.Sequential)
    network[2] = nn.Hardswish()
    export(tmp_path / "dynamic.pt2", network)
    one, other = opened(files / "dynamic.pt2"), opened(tmp_path / "dynamic.pt2")
    assert one.weights == other.weights
    assert one.identity() != other.identity()
    assert not torch.equal(one.log_probabilities(images(2)), other.log_probabilities(images(2)))


class Constants(nn.Module):
    """A tensor that is no parameter, a buffer that is not in the state_dict, one in the code."""

    def __init__(self, attribute: float = 2.0, buffer: float = 3.0) -> None:
        super().__init__()
        self.net = tiny_network()
        self.attribute = torch.tensor([attribute])
        self.register_buffer("buffer", torch.tensor([buffer]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x) * self.attribute - self.buffer
        return y + torch.ones(12) / 2


def test_constants_of_an_export_are_part_of_its_weights(tmp_path: Path) -> None:
    hashes = set()
    for attribute, buffer in ((2.0, 3.0), (2.0, 4.0), (5.0, 3.0)):
        export(file := tmp_path / "c.pt2", Constants(attribute, buffer))
        source = opened(file)
        hashes.add(source.weights)
        x = source.preprocessing(images(3))
        expected = torch.log_softmax(Constants(attribute, buffer)(x), dim=1)
        torch.testing.assert_close(
            source.log_probabilities(images(3)), expected, rtol=1e-4, atol=1e-3
        )
    assert len(hashes) == 3


@pytest.mark.parametrize("name", ["dynamic.pt2", "fixed.pt2"])
def test_labels_do_not_depend_on_how_often_it_has_run(name: str, files: Path) -> None:
    source = opened(files / name)
    first = source.log_probabilities(images(5))
    for _ in range(6):
        assert torch.equal(source.log_probabilities(images(5)), first)


@pytest.mark.parametrize("name", ["dynamic.pt2", "fixed.pt2"])
def test_bfloat16_and_stills(name: str, files: Path, tiny: Source) -> None:
    half = opened(files / name, precision="bfloat16")
    exact = tiny.log_probabilities(images(4))
    found = half.log_probabilities(images(4))
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found.exp(), exact.exp(), rtol=0, atol=0.15)
    clips = images(6).view(2, 3, 20, 20, 3)
    torch.testing.assert_close(
        opened(files / name).log_probabilities(clips), tiny.log_probabilities(clips),
        rtol=1e-4, atol=1e-3,
    )  # fmt: skip


# --- declared preprocessing and classes -------------------------------------------------------


@pytest.fixture
def net(files: Path, tmp_path: Path) -> Path:
    """A copy of a small export, to put a sidecar beside."""
    (tmp_path / "net.pt2").write_bytes((files / "dynamic.pt2").read_bytes())
    return tmp_path / "net.pt2"


def sidecar(net: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    net.with_name("net.pt2.json").write_text(text)


def test_pickled_weights_are_refused_before_a_declaration_is_wanted(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(BadCheckpoint, match=r"source own: .*net.pth is no torch.export program"):
        open_source(parse_source(f"own={tmp_path / 'net.pth'}"))


def test_without_a_declaration_the_message_shows_what_to_write(net: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_source(parse_source(f"own={net}"))
    message = str(caught.value)
    assert "net.pt2 does not say how its images are prepared (mean, std, size missing)" in message
    assert f'write {net}.json like {{"size": 224, "mean": [0.485, 0.456, 0.406], "std"' in message
    assert "--preprocessing size=224,mean=R/G/B,std=R/G/B" in message
    assert "\n" not in message
    example = message[message.index("{") : message.index("}") + 1]
    sidecar(net, example.replace('"size": 224', '"size": 16'))
    assert open_source(parse_source(f"own={net}")).preprocessing == Preprocessing(16)


def test_the_sidecar_declares_and_the_option_wins(net: Path) -> None:
    names = [f"scene {i}" for i in range(12)]
    sidecar(net, HOW | {"channels": "bgr", "scale": 255, "classes": names})
    source = open_source(parse_source(f"own={net}"))
    assert source.preprocessing == Preprocessing(
        16, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bgr", 255.0
    )
    assert source.classes == tuple(names)
    other = open_source(parse_source(f"own={net}"), preprocessing="channels=rgb,mean=0.1")
    assert other.preprocessing == Preprocessing(16, (0.1, 0.1, 0.1), (0.2, 0.25, 0.3), "rgb", 255.0)


def test_each_part_may_come_from_elsewhere(net: Path) -> None:
    sidecar(net, {"mean": HOW["mean"]})
    source = open_source(parse_source(f"own={net}@16"), preprocessing="std=0.2/0.25/0.3")
    assert source.identity()["preprocessing"] == HOW | {
        "channels": "rgb", "scale": 1.0, "interpolation": "bilinear",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"\(std, size missing\)"):
        open_source(parse_source(f"own={net}"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "expected {"),
        (HOW | {"sizes": 3}, "unknown: sizes"),
        (HOW | {"size": 16.0}, "float"),
        (HOW | {"size": "16"}, "str"),
        (HOW | {"size": 0}, "size must be above 0"),
        (HOW | {"mean": [0.5, 0.5]}, "preprocessing mean: cannot use (0.5, 0.5)"),
        (HOW | {"mean": "abc"}, "could not convert"),
        (HOW | {"std": [1, 0, 1]}, "std must not be 0"),
        (HOW | {"scale": "x"}, "could not convert"),
        (HOW | {"channels": "BGR"}, "rgb or bgr, found 'BGR'"),
        (HOW | {"classes": "twelve class"}, "classes must be a list of names"),
        (HOW | {"classes": [1, 2]}, "classes must be a list of names"),
        (HOW | {"classes": ["a", "b"]}, "has 2 names, the network 12 outputs"),
    ],
)
def test_a_faulty_sidecar_is_named(content: Any, message: str, net: Path) -> None:
    sidecar(net, content)
    pattern = rf"source own: .*net\.pt2\.json.*{re.escape(message)}"
    with pytest.raises(InputError, match=pattern) as caught:
        open_source(parse_source(f"own={net}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "count", "names"),
    [("places365", 365, places365_classes), ("imagenet", 1000, imagenet_classes)],
)
def test_a_known_name_brings_its_class_names(
    name: str, count: int, names: Callable[[], tuple[str, ...]], tmp_path: Path
) -> None:
    export(tmp_path / "n.pt2", nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3, count)))
    assert opened(tmp_path / "n.pt2", name).classes == names()
    assert opened(tmp_path / "n.pt2", "other").classes[-1] == f"class {count - 1}"


# --- files that are no classifiers for these images -----------------------------------------


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3)), x.amax((2, 3))


def test_an_export_for_another_size_is_refused(files: Path) -> None:
    message = "fixed.pt2 was exported for images of 16 x 16, but its preprocessing says size 20"
    with pytest.raises(InputError, match=message):
        opened(Path(f"{files}/fixed.pt2@20"))


def test_networks_that_give_no_logits_are_refused(tmp_path: Path) -> None:
    for network in (Two(), nn.Identity()):
        export(tmp_path / "n.pt2", network)
        with pytest.raises(InputError, match=r"must return logits \[n, C\]"):
            opened(tmp_path / "n.pt2")


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.mean((2, 3)) + y


def test_an_export_of_two_inputs_is_refused(tmp_path: Path) -> None:
    inputs = (torch.randn(4, 3, 16, 16), torch.randn(4, 3))
    torch.export.save(torch.export.export(Sum(), inputs), tmp_path / "n.pt2")
    with pytest.raises(InputError, match=r"expected a program of one input \[n, 3, H, W\]"):
        opened(tmp_path / "n.pt2")


def test_batch_statistics_need_a_python_network(files: Path) -> None:
    message = r"--batchnorm batch needs a Python network \(NAME=FILE.py:factory\); the mode of"
    with pytest.raises(InputError, match=message):
        opened(files / "dynamic.pt2", batchnorm="batch-4")


def test_weights_do_not_go_with_a_network_file(files: Path) -> None:
    with pytest.raises(InputError, match="--weights goes with a known architecture"):
        opened(files / "dynamic.pt2", weights=files / "w.pth")


# --- training mode ----------------------------------------------------------------------------


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x.mean((2, 3))


def in_training(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 12, 3), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()


TRAINING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batchnorm": (lambda: in_training(nn.BatchNorm2d(12)), "source tiny changed while labelling"),
    "dropout": (lambda: in_training(nn.Dropout(0.5)), "running it twice gives two results"),
    "batch statistics": (
        lambda: in_training(nn.BatchNorm2d(12, track_running_stats=False)),
        "an image's outputs depend on the others in its batch",
    ),
    "counter": (lambda: Counts(), "source tiny changed while labelling"),
}


@pytest.mark.parametrize("kind", ["dynamic.pt2", "fixed.pt2"])
@pytest.mark.parametrize("what", TRAINING)
def test_training_mode_in_a_graph_is_found_out(kind: str, what: str, tmp_path: Path) -> None:
    network, found = TRAINING[what]
    MAKERS[kind](tmp_path / kind, network())
    with pytest.raises(SsktError, match=rf"{found}.*before torch\.export call network\.eval\(\)"):
        opened(tmp_path / kind)


def test_opening_leaves_the_global_rng_alone(tmp_path: Path) -> None:
    MAKERS["dynamic.pt2"](tmp_path / "n.pt2", in_training(nn.Dropout(0.5)))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(InputError, match="running it twice"):
        opened(tmp_path / "n.pt2")
    assert torch.equal(torch.rand(3), expected)


# --- what is not opened -----------------------------------------------------------------------


class Bomb:
    """Unpickling this by plain pickle makes a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".torchscript", ".ts", ".pt2"])
def test_pickles_and_weights_are_not_opened_as_networks(suffix: str, tmp_path: Path) -> None:
    flag, file = tmp_path / "was run", tmp_path / f"n{suffix}"
    contents: dict[str, Callable[[], Any]] = {
        "module": lambda: torch.save(tiny_network(), file),
        "weights": lambda: torch.save(tiny_network().state_dict(), file),
        "bomb": lambda: torch.save({"x": Bomb(flag)}, file),
        "pickle": lambda: file.write_bytes(pickle.dumps(Bomb(flag))),
        "text": lambda: file.write_bytes(b"not a network\n"),
        "empty": lambda: file.write_bytes(b""),
    }
    for what, write in contents.items():
        write()
        with pytest.raises(BadCheckpoint) as caught:
            opened(file)
        message = str(caught.value)
        assert "is no torch.export program" in message, what
        assert "NAME=FILE.py:factory" in message
        assert "\n" not in message
    assert not flag.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".torchscript", ".ts"])
def test_torchscript_is_refused_with_the_way_to_export(suffix: str, tmp_path: Path) -> None:
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jit.trace(tiny_network(), torch.zeros(2, 3, 16, 16)).save(str(tmp_path / f"n{suffix}"))
    with pytest.raises(BadCheckpoint, match="is TorchScript, which PyTorch has deprec") as caught:
        opened(tmp_path / f"n{suffix}")
    message = str(caught.value)
    assert "\n" not in message
    command = message[message.index("torch.export.save(") :].replace("SIZE", "16")
    file = tmp_path / "converted.pt2"
    exec(command.replace("FILE.pt2", str(file)), {"torch": torch, "network": tiny_network()})
    assert opened(file).log_probabilities(images(5)).shape == (5, 12)


def rewritten(file: Path, source: Path, changed: dict[str, bytes]) -> None:
    """``source`` with members replaced or added, by their names without the first folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
        top = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if name.partition("/")[2] not in changed:
                new.writestr(name, old.read(name))
        for name, content in changed.items():
            new.writestr(f"{top}/{name}", content)


def pickled(value: Any) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def config(source: Path, member: str, **changes: Any) -> bytes:
    with zipfile.ZipFile(source) as archive:
        found = json.loads(archive.read(f"{archive.namelist()[0].partition('/')[0]}/{member}"))
    found["config"]["0.weight"] |= changes
    return json.dumps(found).encode()


def test_pickled_code_in_an_export_is_refused_and_not_run(files: Path, tmp_path: Path) -> None:
    """torch.export.load falls back to plain unpickling (pytorch/pytorch#176791)."""
    flag, file, source = tmp_path / "was run", tmp_path / "n.pt2", files / "dynamic.pt2"
    weights = "data/weights/model_weights_config.json"
    bomb = pickled((Bomb(flag),))
    cases = {
        "sample_inputs": {"data/sample_inputs/model.pt": bomb},
        "weight_0": {
            weights: config(source, weights, use_pickle=True),
            "data/weights/weight_0": bomb,
        },
        "opaque_obj_0": {
            weights: config(source, weights, path_name="opaque_obj_0"),
            "data/weights/opaque_obj_0": pickle.dumps(Bomb(flag)),
        },
        "model.pt": {"data/weights/model.pt": bomb},
    }
    for what, changed in cases.items():
        rewritten(file, source, changed)
        with pytest.raises(BadCheckpoint, match=rf"holds pickled objects \(.*{what}.*run code"):
            opened(file)
        assert not flag.exists()
    rewritten(file, source, cases["weight_0"])
    with contextlib.suppress(Exception):
        torch.export.load(file)
    assert flag.exists(), "the bomb is a dud: this test would prove nothing"


def test_compiled_libraries_and_doubled_members_are_refused(files: Path, tmp_path: Path) -> None:
    file = tmp_path / "n.pt2"
    rewritten(file, files / "dynamic.pt2", {"data/aotinductor/model/x.so": b"\x7fELF"})
    with pytest.raises(BadCheckpoint, match="holds compiled libraries"):
        opened(file)
    rewritten(file, files / "dynamic.pt2", {})
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"x")
    with pytest.raises(BadCheckpoint, match="two members of one name"):
        opened(file)


def test_damaged_files_are_refused(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "dynamic.pt2"
    whole = (files / name).read_bytes()
    file = tmp_path / name
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadCheckpoint, match="source tiny: "):
        opened(file)
    rewritten(file, files / name, {"models/model.json": b"{"})
    with pytest.raises(BadCheckpoint, match=f"{name} cannot be opened as ") as caught:
        opened(file)
    assert "\n" not in str(caught.value)
    with zipfile.ZipFile(files / name) as old, zipfile.ZipFile(file, "w") as new:
        for part in old.namelist():
            if not part.endswith("weights/weight_0"):
                new.writestr(part, old.read(part))
    with pytest.raises(BadCheckpoint, match=f"{name} cannot be opened as "):
        opened(file)
    assert capfd.readouterr() == ("", "")


def test_a_flipped_bit_in_a_weight_is_noticed(files: Path, tmp_path: Path) -> None:
    data = bytearray((files / "dynamic.pt2").read_bytes())
    weight = tiny_network().state_dict()["0.weight"].numpy().tobytes()
    data[data.index(weight) + 10] ^= 1
    (tmp_path / "n.pt2").write_bytes(data)
    with pytest.raises(BadCheckpoint, match=r"is damaged \(the checksum of .*; export it again"):
        opened(tmp_path / "n.pt2")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"source tiny: no file .*gone\.pt2"):
        opened(tmp_path / "gone.pt2")
