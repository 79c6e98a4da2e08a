"""The input scale of a target network: what it computes, which weights have which, who keeps it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.helpers import TINY, batch_of, write_frames
from torch import Tensor, nn

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import open_views
from sskt.trainer.config import AUTO, CHOICES, TrainConfig, read_config
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.runs import run_training
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.methods.maxl import Maxl
from sskt.trainer.models.normalization import NORMALISATIONS
from sskt.trainer.models.pretrained import input_scale_of, load_initial
from sskt.trainer.models.registry import build_network
from sskt.trainer.results import records
from sskt.trainer.results.groups import load_run

Call = Callable[..., tuple[int, str, str]]
SCALES = ("imagenet", "kinetics")
CLIPS = "clip-corner-crop-flip:frames=4,size=16"


def by_rule(views: np.ndarray[Any, Any], scale: str) -> np.ndarray[Any, Any]:
    """What a network sees, in float64, from the published numbers: ``[n, 3, (D,) H, W]``."""
    pixels = np.moveaxis(views.astype(np.float64), -1, 1)
    mean, std = {
        "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        "kinetics": ((114.7748, 107.7354, 99.4750), (1.0, 1.0, 1.0)),
    }[scale]
    shape = (1, 3, *(1,) * (pixels.ndim - 2))
    scaled: np.ndarray[Any, Any] = (pixels - np.reshape(mean, shape)) / np.reshape(std, shape)
    return scaled


# --- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (2, 3, 5, 4, 3)])
def test_every_pixel_is_the_published_rule(scale: str, shape: tuple[int, ...]) -> None:
    views = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    views.reshape(-1, 3)[:2] = [[0, 0, 0], [255, 255, 255]]
    found = NORMALISATIONS[scale](torch.from_numpy(views))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), by_rule(views, scale), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_rows_of_pixels_have_the_bits_of_the_plain_formula(scale: str) -> None:
    views = torch.randint(0, 256, (3, 7, 6, 3), dtype=torch.uint8)
    how = NORMALISATIONS[scale]
    unit = 255 / how.maximum
    mean, factor = torch.tensor(how.mean) * unit, 1 / (torch.tensor(how.std) * unit)
    plain = views.float().sub(mean).mul(factor).permute(0, 3, 1, 2)
    assert torch.equal(how(views), plain)
    assert how(views).is_contiguous(memory_format=torch.channels_last)


def test_every_choice_of_the_option_has_a_normalisation() -> None:
    assert CHOICES["input_scale"] == (AUTO, *NORMALISATIONS)


# --- the network of a run sees that, wherever it runs -------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made clips of two classes: three each to train on, two each to test on."""
    folder, rng = tmp_path_factory.mktemp("made") / "clips", np.random.default_rng(0)
    for split, each in (("train", 3), ("test", 2)):
        for name in ("jump", "run"):
            for i in range(each):
                frames = rng.integers(0, 256, (5 + i, 24, 30, 3), np.uint8)
                write_frames(folder / split / name / f"v{i}", frames)
    return folder


def plain(images: Path, clips: Path, kind: str, **fields: Any) -> TrainConfig:
    """A small training from scratch on made images or clips."""
    of: dict[str, dict[str, Any]] = {
        "images": {"target": str(images), "policy": "pad-crop-flip", "limit": 12},
        "clips": {"target": str(clips), "policy": CLIPS, "model": "resnet3d10"},
    }
    fixed: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 6,
        "device": "cpu",
        "workers": 0,
        "seeds": 1,
        "lr": 1e-3,
    }
    return TrainConfig(**of[kind] | fixed | fields)


@contextmanager
def seen_by(network: nn.Module) -> Iterator[list[Tensor]]:
    """The inputs of a network's first convolution."""
    inputs: list[Tensor] = []
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    handle = first.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))
    yield inputs
    handle.remove()


def require_same_rows(found: list[Tensor], expected: np.ndarray[Any, Any]) -> None:
    """Every expected sample was seen, in whatever order."""
    rows = torch.cat(found).numpy()
    assert rows.shape == expected.shape
    for row in expected:
        assert min(float(np.abs(row - other).max()) for other in rows) < 1e-4


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["images", "clips"])
def test_training_and_evaluation_see_the_scale_of_the_run(
    images: Path, clips: Path, kind: str, scale: str
) -> None:
    trainer = Trainer(make_plan(plain(images, clips, kind, input_scale=scale)))
    assert trainer.test is not None
    with seen_by(trainer.network) as inputs:
        trainer.train_epoch()
    require_same_rows(
        inputs, by_rule(trainer.views.batch(np.arange(len(trainer.views.target)), 0), scale)
    )
    with seen_by(trainer.network) as inputs:
        trainer.evaluate()
    test = trainer.test.batch(np.arange(len(trainer.test.target)), 0)
    require_same_rows(inputs, by_rule(test, scale))


@pytest.mark.parametrize("scale", SCALES)
def test_a_step_without_readable_samples_sees_black_at_that_scale(
    images: Path, clips: Path, scale: str
) -> None:
    trainer = Trainer(make_plan(plain(images, clips, "clips", input_scale=scale)))
    with seen_by(trainer.network) as inputs:
        trainer.step.without_samples((4, 16, 16, 3))
    black = np.zeros((1, 4, 16, 16, 3), np.uint8)
    require_same_rows(inputs, by_rule(black, scale))


@pytest.mark.parametrize("scale", SCALES)
def test_both_networks_of_maxl_see_the_scale_of_the_run(
    images: Path, clips: Path, scale: str
) -> None:
    config = plain(images, clips, "images", input_scale=scale, method="maxl", psi=2)
    trainer = Trainer(make_plan(config))
    assert isinstance(trainer.method, Maxl)
    views = by_rule(trainer.views.batch(np.arange(12), 0), scale)
    meta = by_rule(trainer.views.batch(np.arange(12), 1), scale)
    with seen_by(trainer.method.generator) as inputs:
        trainer.train_epoch()
    require_same_rows(inputs, np.concatenate([views, meta]))


# --- whose weights have which -------------------------------------------------------------------


def hara(depth: int = 10, *, counters: bool = False, prefix: str = "module.") -> dict[str, Any]:
    """A checkpoint as the scripts of 2017 write it; ``counters``: with PyTorch 0.4.1 or later."""
    torch.manual_seed(1)
    state = build_network(f"resnet3d{depth}", 400, shortcut="a").state_dict()
    kept = {k: v for k, v in state.items() if counters or not k.endswith("num_batches_tracked")}
    named = {prefix + k: v for k, v in kept.items()}
    return {"epoch": 200, "arch": f"resnet-{depth}", "state_dict": named, "optimizer": {}}


def without(checkpoint: dict[str, Any], *keys: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in checkpoint.items() if k not in keys} | more


RELEASES: list[tuple[str, Callable[[], Any], str]] = [
    ("the release of 2017", hara, "kinetics"),
    ("its copy for CPUs", lambda: without(hara(prefix=""), "optimizer"), "kinetics"),
    ("its scripts with a later PyTorch", lambda: hara(counters=True), "kinetics"),
    (
        "the scripts since November 2018",
        lambda: without(hara(counters=True, prefix=""), scheduler={}),
        "imagenet",
    ),
    (
        "the release of 2020, less its optimizer",
        lambda: without(hara(counters=True, prefix=""), "optimizer"),
        "imagenet",
    ),
    ("another architecture", lambda: without(hara(), arch="resnext-101"), "imagenet"),
    ("weights alone", lambda: hara()["state_dict"], "imagenet"),
    (
        "a 2-D network",
        lambda: {
            "arch": "resnet-18",
            "state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)},
            "optimizer": {},
        },
        "imagenet",
    ),
]


@pytest.mark.parametrize(("name", "make", "scale"), RELEASES, ids=[r[0] for r in RELEASES])
def test_which_checkpoints_are_recognised(
    tmp_path: Path, name: str, make: Callable[[], Any], scale: str
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(make(), path)
    found, reason = input_scale_of(AUTO, str(path))
    assert found == scale
    assert ("is a checkpoint of Hara et al. (2017)" in reason) == (scale == "kinetics")
    assert ("give --input-scale" in reason) == (scale == "imagenet")
    for chosen in SCALES:
        assert input_scale_of(chosen, str(path)) == (chosen, "as given with --input-scale")


def test_other_beginnings(tmp_path: Path) -> None:
    assert input_scale_of(AUTO, "") == ("imagenet", "the network starts from fresh parameters")
    assert input_scale_of(AUTO, "imagenet")[0] == "imagenet"
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7, 7)}, tmp_path / "w.safetensors")
    assert input_scale_of(AUTO, str(tmp_path / "w.safetensors"))[0] == "imagenet"
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(BadCheckpoint, match="cannot be read safely as weights"):
        input_scale_of(AUTO, str(tmp_path / "bad.pth"))
    with pytest.raises(MissingData, match="no weights file"):
        input_scale_of(AUTO, str(tmp_path / "absent.pth"))
    assert input_scale_of("kinetics", str(tmp_path / "absent.pth"))[0] == "kinetics"


# --- a run keeps it -----------------------------------------------------------------------------


def test_a_run_records_it_and_is_not_resumed_with_another(
    images: Path, clips: Path, tmp_path: Path, sskt: Call
) -> None:
    torch.save(hara(), tmp_path / "resnet-10-kinetics.pth")
    init = {"init": str(tmp_path / "resnet-10-kinetics.pth"), "shortcut": "a"}
    longer = plain(images, clips, "clips", out=tmp_path / "run", **init, epochs=2)

    def stop(epoch: int, done: int, total: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(longer, Hooks(step=stop))
    assert read_config(tmp_path / "run/config.json")["input_scale"] == "kinetics"
    for name in (records.CHECKPOINT, records.BEST):
        assert torch.load(tmp_path / "run" / name)["input_scale"] == "kinetics"
    with pytest.raises(InputError, match="a run with input_scale = 'kinetics', not 'imagenet'"):
        run_training(dataclasses.replace(longer, input_scale="imagenet"))
    resume = ["train", "--resume", "--out", tmp_path / "run"]
    status, _, err = sskt(*resume, "--input-scale", "imagenet")
    assert status == 2 and "a run with input_scale = 'kinetics', not 'imagenet'" in err
    Path(init["init"]).unlink()
    status, _, err = sskt(*resume)
    assert status == 0, err
    assert len(records.read_metrics(tmp_path / "run")) == 2
    assert run_training(longer)[-1]["epoch"] == 1


@pytest.mark.parametrize("name", [records.BEST, records.CHECKPOINT])
def test_the_checkpoint_of_a_run_states_its_own(
    images: Path, clips: Path, tmp_path: Path, name: str
) -> None:
    config = plain(images, clips, "clips", input_scale="kinetics", out=tmp_path / "run")
    run_training(config)
    after = dataclasses.replace(
        config, init=str(tmp_path / "run" / name), input_scale=AUTO, out=tmp_path / "next"
    )
    assert make_plan(after).config.input_scale == "kinetics"
    make_plan(dataclasses.replace(after, input_scale="kinetics"))
    with pytest.raises(
        InputError, match=rf"imagenet contradicts .*{name}, which was trained with kinetics"
    ):
        make_plan(dataclasses.replace(after, input_scale="imagenet"))
    state = torch.load(tmp_path / "run" / name)
    torch.save(state | {"input_scale": "mars"}, tmp_path / "odd.pt")
    with pytest.raises(BadCheckpoint, match="the unknown input scale 'mars'"):
        make_plan(dataclasses.replace(after, init=str(tmp_path / "odd.pt")))
    torch.save(without(state, "input_scale"), tmp_path / "older.pt")
    older = dataclasses.replace(after, init=str(tmp_path / "older.pt"))
    assert make_plan(older).config.input_scale == "imagenet"


def test_a_stored_configuration_without_it_was_for_imagenet(
    images: Path, clips: Path, tmp_path: Path
) -> None:
    run_training(plain(images, clips, "images", out=tmp_path / "run"))
    path = tmp_path / "run/config.json"
    path.write_text(
        json.dumps(without(without(json.loads(path.read_text()), "input_scale"), "digest"))
    )
    assert read_config(path)["input_scale"] == "imagenet"
    assert load_run(tmp_path / "run")[0]["input_scale"] == "imagenet"
    path.write_text("[]")
    with pytest.raises(InputError, match="is not a run's configuration"):
        read_config(path)


def test_the_choice_is_printed(images: Path, clips: Path, tmp_path: Path, sskt: Call) -> None:
    torch.save(hara(), tmp_path / "k.pth")
    arguments = ["train", "--target", clips, "--policy", CLIPS, "--model", "resnet3d10"]
    arguments += ["--shortcut", "a", "--init", tmp_path / "k.pth", "--epochs", 1]
    status, out, err = sskt(*arguments, "--dry-run", "--json")
    assert status == 0, err
    assert json.loads(out)["config"]["input_scale"] == "kinetics"
    status, _, err = sskt(*arguments, "--batch-size", 6, "--out", tmp_path / "run")
    assert status == 0, err
    reason = f"{tmp_path / 'k.pth'} is a checkpoint of Hara et al. (2017)"
    assert f"input scale: kinetics ({reason})" in err.splitlines()


# --- fine-tuning on real clips ------------------------------------------------------------------

REAL = "clip-corner-crop-flip:frames=16,size=24"


@pytest.fixture(scope="module")
def ucf101(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 real clips of six classes to train on and 3 to test on, as UCF101 is laid out."""
    root, official = tmp_path_factory.mktemp("real") / "ucf101", data / "ucf101"
    (root / "ucfTrainTestlist").mkdir(parents=True)
    index = (official / "ucfTrainTestlist/classInd.txt").read_text()
    (root / "ucfTrainTestlist/classInd.txt").write_text(index)
    numbers = {name: n for n, name in (line.split() for line in index.splitlines())}
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for folder in sorted((official / "UCF-101").iterdir()):
        clips = sorted(folder.glob("*.avi"), key=lambda p: (p.stat().st_size, p.name))[:4]
        if len(clips) < 3:
            continue
        shutil.copytree(folder, root / "UCF-101" / folder.name)
        lists["test"] += [f"{folder.name}/{clips[0].name}"] * (len(clips) == 4)
        lists["train"] += [f"{folder.name}/{c.name} {numbers[folder.name]}" for c in clips[1:]]
    for split, lines in lists.items():
        (root / f"ucfTrainTestlist/{split}list01.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def kinetics(ucf101: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated Kinetics weights of a 3D-ResNet-18, in the layout of the release of 2017.

    The BatchNorm statistics are those of real clips at 0 to 255 minus the mean, computed here.
    """
    views = open_views(open_target("ucf101", root=ucf101), parse_policy(REAL))
    clips = torch.from_numpy(by_rule(views.batch(np.arange(16), 7), "kinetics")).float()
    torch.manual_seed(1)
    network = build_network("resnet3d18", 400, shortcut="a")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = None  # the mean over the batches
    network.train()
    with torch.no_grad():
        network(clips)
    state = {
        f"module.{k}": v
        for k, v in network.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    path = tmp_path_factory.mktemp("weights") / "resnet-18-kinetics.pth"
    torch.save({"epoch": 200, "arch": "resnet-18", "state_dict": state, "optimizer": {}}, path)
    return path


def fine_tuned(ucf101: Path, kinetics: Path, **fields: Any) -> TrainConfig:
    """The fine-tuned video row of table 8 on a few real clips."""
    return TrainConfig(
        target="ucf101",
        root=ucf101,
        policy=REAL,
        model="resnet3d18",
        shortcut="a",
        init=str(kinetics),
        finetune_from=4,
        device="cpu",
        workers=0,
        **fields,
    )


def frozen_features(config: TrainConfig) -> Tensor:
    """What reaches the first stage that trains, in a training step: ``[16, 256]``, pooled."""
    trainer = Trainer(make_plan(config))
    trainer.network.train()
    found: list[Tensor] = []
    stage = trainer.network.target.get_submodule("layer4")
    stage.register_forward_pre_hook(lambda _, given: found.append(given[0].mean((2, 3, 4))))
    samples = np.arange(16)
    with torch.no_grad():
        trainer.losses(batch_of(trainer, samples))
    return found[0]


@pytest.mark.slow
def test_frozen_features_keep_their_variation_between_clips(ucf101: Path, kinetics: Path) -> None:
    config = fine_tuned(ucf101, kinetics)
    views = open_views(open_target("ucf101", root=ucf101), parse_policy(REAL))
    clips = torch.from_numpy(by_rule(views.batch(np.arange(16), 0), "kinetics")).float()
    network = build_network("resnet3d18", 101, shortcut="a")
    load_initial(network, str(kinetics), "resnet3d18")
    with torch.no_grad():
        right = network.eval().features(clips).stages[2].mean((2, 3, 4))
    variation = {}
    for scale in (AUTO, *SCALES):
        features = frozen_features(dataclasses.replace(config, input_scale=scale))
        variation[scale] = float(features.std(0).mean() / right.std(0).mean())
    assert variation[AUTO] == variation["kinetics"] == pytest.approx(1, abs=1e-3)
    assert 0.005 < variation["imagenet"] < 0.03


@pytest.mark.slow
def test_the_fine_tuned_video_row_learns(
    ucf101: Path, kinetics: Path, tmp_path: Path, sskt: Call
) -> None:
    """Row 15 of table 8 as shipped, but for the source, the clips' size, batch and epochs."""
    command = ["reproduce", "table8", "--row", 15, "--weights", f"K={kinetics}"]
    command += ["--source", f"P=tiny={TINY}:build", "--root", f"ucf101={ucf101}", "--seeds", 1]
    command += ["--epochs", 4, "--device", "cpu", "--out", tmp_path, "--json"]
    command += ["--cache", tmp_path / "cache"]
    for setting in (f"policy='{REAL}'", "batch_size=4", "workers=0"):
        command += ["--set", setting]
    status, out, err = sskt(*command)
    assert status == 0, err
    assert "input scale: kinetics" in err
    assert "labels: tiny" in err and "over ucf101 test" in err
    (row,) = (r for r in json.loads(out)["rows"] if r["runs"])
    folder = tmp_path / "table8" / row["name"] / "seed-0"
    config = read_config(folder / "config.json")
    expected = {"input_scale": "kinetics", "finetune_from": 4, "dampening": 0.9}
    expected |= {"schedule": "plateau", "plateau_on": "total", "lr": 0.01, "momentum": 0.9}
    assert {key: config[key] for key in expected} == expected
    found = records.read_metrics(folder)
    losses = [r["loss"] for r in found]
    primary = [r["loss_primary"] for r in found]
    assert losses[-1] < 0.8 * losses[0] and primary[-1] < 0.8 * primary[0]
    assert all(r["test_loss_total"] > r["test_loss"] for r in found)
