"""Networks after their training: evaluation, predictions, export."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.helpers import write_images

import sskt
from sskt.cli.main import run
from sskt.trainer.config import config_json, make_config, read_config
from sskt.trainer.loop.runs import run_training
from sskt.trainer.loop.setup import build_target
from sskt.trainer.loop.trained import TrainedNetwork, open_run
from sskt.trainer.models.normalization import NORMALISATIONS
from sskt.trainer.results import records

Trained = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A short run on rendered images: its folder and records."""
    out = tmp_path_factory.mktemp("trained") / "run"
    config = sskt.TrainConfig(
        "shapes", limit=40, epochs=2, batch_size=20, model="resnet18", stem="imagenet", out=out,
        device="cpu", save_minutes=0,
    )  # fmt: skip
    return out, sskt.train(config)


@pytest.fixture(scope="module")
def network(trained: Trained) -> TrainedNetwork:
    return open_run(trained[0], "last", device="cpu")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_the_evaluation_is_that_of_the_training(trained: Trained) -> None:
    out, found = trained
    best = max(range(2), key=lambda epoch: float(found[epoch]["test_top1"]))
    for checkpoint, epoch in (("last", 1), ("best", best)):
        opened = open_run(out, checkpoint, device="cpu")
        measured = opened.evaluate()
        assert opened.epoch == epoch
        assert measured["samples"] == 500
        for key in ("test_loss", "test_top1", "test_top5"):
            assert measured[key] == pytest.approx(found[epoch][key], rel=1e-5)


def test_a_prediction_is_the_softmax_of_the_network(network: TrainedNetwork, image: Path) -> None:
    (one,) = network.predict([image], top=10)
    pixels = torch.from_numpy(np.array(Image.open(image)))[None]
    p = network.network(NORMALISATIONS["imagenet"](pixels))[0].softmax(1)[0]
    assert one.probabilities == pytest.approx(sorted(p.tolist(), reverse=True), abs=1e-6)
    assert one.classes[0] == network.classes[int(p.argmax())]
    assert sum(one.probabilities) == pytest.approx(1)


def test_an_image_of_another_size_is_resized(network: TrainedNetwork, tmp_path: Path) -> None:
    # A large uniform image becomes the same view as a small one.
    for size in ((48, 48), (400, 300)):
        Image.new("RGB", size, (10, 200, 30)).save(tmp_path / f"{size[0]}.png")
    small, large = network.predict([tmp_path / "48.png", tmp_path / "400.png"])
    assert small.probabilities == large.probabilities


def test_exported_weights_load_into_torchvision(
    network: TrainedNetwork, image: Path, tmp_path: Path
) -> None:
    from torchvision.models import resnet18

    pixels = torch.from_numpy(np.array(Image.open(image)))[None]
    wanted = network.logits(pixels)
    network.export(tmp_path / "net.safetensors")
    network.export(tmp_path / "net.pt")
    for state in (
        load_file(tmp_path / "net.safetensors"),
        torch.load(tmp_path / "net.pt", weights_only=True),
    ):
        theirs = resnet18(num_classes=10).eval()
        theirs.load_state_dict(state)
        described = json.loads((tmp_path / "net.pt.json").read_text())
        how = described["input"]
        x = pixels.movedim(-1, 1).float() / 255 * how["maximum"]
        x = (x - torch.tensor(how["mean"])[:, None, None]) / torch.tensor(how["std"])[:, None, None]
        with torch.inference_mode():
            assert torch.allclose(theirs(x), wanted, atol=1e-4)
    assert described["classes"] == list(network.classes)


def test_an_exported_program_gives_the_same_logits(network: TrainedNetwork, tmp_path: Path) -> None:
    network.export(tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    views = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 48, 48, 3), np.uint8))
    with torch.inference_mode():
        found = program(NORMALISATIONS["imagenet"](views).contiguous())
    assert torch.allclose(found, network.logits(views), atol=1e-4)


def test_the_commands(trained: Trained, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, found = trained
    assert run(["evaluate", str(out), "--checkpoint", "last"]) == 0
    assert f"top-1 {found[-1]['test_top1']:.2f} %" in capsys.readouterr().out
    assert run(["predict", str(out), str(image), "--csv", "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert run(["predict", str(out), str(image), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["classes"][0] == rows[0]["class"]
    assert run(["predict", str(out), str(image)]) == 0
    assert capsys.readouterr().out.startswith(f"{image}: {rows[0]['class']} ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["predict", "RUN", "nowhere.png"], "no file nowhere.png"),
        (["predict", "RUN", __file__], "cannot decode image"),
        (["predict", "nowhere", "x.png"], "nowhere"),
        (["evaluate", "RUN", "--target", "FOLDER"], "differ in their classes"),
        (["evaluate", "RUN", "--split", "tset"], "did you mean 'test'?"),
        (["export-model", "RUN", "--out", "net.onnx"], "expected a file that ends in"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    command: list[str],
    message: str,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "animals" / split / name).mkdir(parents=True)
            Image.new("RGB", (48, 48)).save(tmp_path / "animals" / split / name / "1.png")
    known = {"RUN": str(trained[0]), "FOLDER": str(tmp_path / "animals")}
    assert run([known.get(word, word) for word in command]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def changed_copy(trained: Trained, tmp_path: Path, **changes: Any) -> Path:
    """A copy of a run whose last checkpoint lacks (None) or has other entries."""
    (tmp_path / "run").mkdir()
    config = make_config(read_config(trained[0] / "config.json"))
    state = records.load_checkpoint(trained[0], "last.pt")
    assert state is not None
    if "model" in changes:
        config = dataclasses.replace(config, model=changes["model"])
        state["config"]["model"] = changes.pop("model")
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    (tmp_path / "run" / "config.json").write_bytes(config_json(config))
    records.save_checkpoint(tmp_path / "run", state, "last.pt")
    return tmp_path / "run"


def test_a_checkpoint_of_an_older_version(trained: Trained, tmp_path: Path) -> None:
    older = open_run(changed_copy(trained, tmp_path, trained_on=None), "last", device="cpu")
    assert older.classes == open_run(trained[0], "last", device="cpu").classes


def test_a_run_never_chooses_code(trained: Trained, tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    changed = changed_copy(trained, tmp_path, model=f"{code}:build")
    with pytest.raises(sskt.InputError, match="if you trust it, name it yourself with --model"):
        open_run(changed, "last", device="cpu")
    assert not (tmp_path / "ran").exists()


CODE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "network": ({"model": "CODE.py:build"}, ["--model", "CODE.py:build"]),
    "source": (
        {"source": ["a=CODE.py:build", "imagenet"], "live": True},
        ["--source", "a=CODE.py:build", "--source", "imagenet"],
    ),
    "program": ({"source": ["a=CODE.pt2"], "live": True}, ["--source", "a=CODE.pt2"]),
    "frame sampling": (
        {"source": ["imagenet"], "live": True, "frame_sampling": "CODE.py:build"},
        ["--frame-sampling", "CODE.py:build"],
    ),
}


@pytest.mark.parametrize("how", ["resume", "recipe", "config.json as recipe"])
@pytest.mark.parametrize("what", CODE)
def test_nothing_that_a_run_records_is_run_as_code(
    what: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the person has named the same on the command line: then this check says nothing."""
    code = tmp_path / "code.py"
    code.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    (tmp_path / "code.pt2").write_bytes(b"PK")
    place = str(code.with_suffix(""))
    fields = json.loads(json.dumps(CODE[what][0]).replace("CODE", place))
    named = [text.replace("CODE", place) for text in CODE[what][1]]
    images = tmp_path / "images" / "train"
    for name in ("a", "b"):
        write_images(images / name, np.zeros((2, 8, 8, 3), np.uint8))
    config = sskt.TrainConfig(str(images.parent), out=tmp_path / "run", **fields)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(config_json(config))
    asked = {
        "resume": ["train", "--resume", "--out", str(tmp_path / "run"), "--dry-run"],
        "recipe": ["train", "--recipe", str(tmp_path / "run"), "--dry-run"],
        "config.json as recipe": [
            *("train", "--recipe", str(tmp_path / "run" / "config.json"), "--dry-run")
        ],
    }[how]
    assert run(asked) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"is code, {named[1]}" in said and said.rstrip().endswith(" ".join(named))
    assert not (tmp_path / "ran").exists()
    if what != "frame sampling":  # which would download weights first
        assert run([*asked, *named]) == 2  # there is no such network
        assert "is code" not in capsys.readouterr().err


def test_a_run_of_the_same_configuration_chooses_no_code(tmp_path: Path) -> None:
    """What is left open is taken from the run, but not code."""
    (tmp_path / "run").mkdir()
    config = sskt.TrainConfig("shapes", out=tmp_path / "run", model="own.py:build", limit=40)
    (tmp_path / "run" / "config.json").write_bytes(config_json(config))
    with pytest.raises(sskt.InputError, match=r"name it yourself with --model own\.py:build"):
        run_training(dataclasses.replace(config, model="auto"))


@pytest.mark.parametrize("value", [3, {"classes": "abc"}, {"classes": [1]}])
def test_a_wrong_entry_of_a_checkpoint_is_refused(
    value: Any, trained: Trained, tmp_path: Path
) -> None:
    changed = changed_copy(trained, tmp_path, trained_on=value)
    with pytest.raises(sskt.BadCheckpoint):
        open_run(changed, "last", device="cpu")


def test_a_clip_is_the_mean_over_its_windows(data: Path, tmp_path: Path) -> None:
    clip = next(path for path in sorted(data.rglob("*.avi")))
    config = sskt.TrainConfig(
        "ucf101", model="resnet3d10", policy="clip-corner-crop-flip:size=32", input_scale="kinetics"
    )
    target = build_target(config, 3, 32)
    network = TrainedNetwork(
        sskt.SSKTNetwork(target, {}).eval(), config, ("a", "b", "c"), False, 32, 0,
        torch.device("cpu"),
    )  # fmt: skip
    views = network._views(clip)
    (one,) = network.predict([clip])
    p = torch.cat(
        [network.logits(torch.from_numpy(views[i, 0])[None]) for i in range(len(views.target))]
    ).softmax(1)
    assert len(views.target) > 1
    assert one.probabilities == pytest.approx(sorted(p.mean(0).tolist(), reverse=True), abs=1e-5)


def test_a_run_is_a_recipe(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for recipe in (trained[0], trained[0] / "config.json"):
        asked = ["train", "--recipe", str(recipe), "--epochs", "7", "--dry-run", "--json"]
        assert run(asked) == 0
        config = json.loads(capsys.readouterr().out)["config"]
        assert (config["limit"], config["model"], config["epochs"]) == (40, "resnet18", 7)
        assert config["out"] is None
    code = changed_copy(trained, tmp_path, model="own.py:build")
    assert run(["train", "--recipe", str(code), "--dry-run"]) == 2
    assert "name it yourself with --model own.py:build" in capsys.readouterr().err
