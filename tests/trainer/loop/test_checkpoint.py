"""Runs whose network is built otherwise now: one message instead of a wrong resumption."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from sskt.teacher_cache.errors import BadCheckpoint, InputError
from sskt.trainer.config import TrainConfig
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.models import base as networks

# The stages of sskt 0.1.0: module whose output ends each, by network.
FORMER = {
    "mobilenet_v2": tuple(f"features.{i}" for i in (1, 3, 6, 13, 17)),
    "densenet121": tuple(f"features.denseblock{i}" for i in (1, 2, 3, 4)),
}


def old_run(
    config: TrainConfig, model: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainConfig:
    """Trains one step of 60 images into ``out`` as sskt 0.1.0 would have."""
    config = dataclasses.replace(
        config, model=model, epochs=1, batch_size=60, seeds=1, test_split="none"
    )
    with monkeypatch.context() as patch:
        patch.setitem(networks.KNOWN_TAPS, model, FORMER[model])
        patch.delitem(networks.FIRST_STAGE, model)
        Trainer(make_plan(config)).run(out)
    return config


@pytest.mark.parametrize(
    ("model", "found"),
    [("mobilenet_v2", "[4, 16, 1, 1], not [4, 24, 1, 1]"),
     ("densenet121", "[4, 256, 1, 1], not [4, 128, 1, 1]")],
)  # fmt: skip
def test_transfer_modules_on_other_stages_are_not_resumed(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, found: str
) -> None:
    monkeypatch.setattr(networks.TargetNetwork, "transfer_width", 8)  # 1000 is slow
    path = tmp_path / "run" / "last.pt"
    config = old_run(config, model, path.parent, monkeypatch)
    before = path.read_bytes()
    with pytest.raises(BadCheckpoint) as caught:
        Trainer(make_plan(config)).run(path.parent, resume=True)
    assert str(caught.value) == (
        f"cannot resume {path}: its network is not the one that is built now "
        f"(heads.0.branches.0.0.weight has shape {found}); sskt 0.1.0 divided {model} into other "
        "stages for transfer modules and fine-tuning; train anew with another --out, where --init "
        f"{path} starts from the target network of the old run, or resume it with the version that "
        "trained it"
    )
    assert path.read_bytes() == before
    # The next step that the message names.
    trainer = Trainer(make_plan(dataclasses.replace(config, init=str(path))))
    wanted = torch.load(path)["model"]
    own = {k: v for k, v in trainer.network.state_dict().items() if k.startswith("target.")}
    assert own and all(torch.equal(v, wanted[k]) for k, v in own.items())


def test_other_stages_to_fine_tune_are_not_resumed(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, tm=False, finetune_from=3)
    config = old_run(config, "mobilenet_v2", tmp_path / "run", monkeypatch)
    # 9 parameters in each of the bottlenecks of rows 4 to 7, and formerly of row 3 too (three); 7
    # in the last convolution and its BatchNorm, the classifier and the auxiliary head.
    counts = 9 * (4 + 3 + 3 + 1 + 3) + 7, 9 * (4 + 3 + 3 + 1) + 7
    message = "the run trained {} parameter tensors, not {}".format(*counts)
    with pytest.raises(BadCheckpoint, match=message):
        Trainer(make_plan(config)).run(tmp_path / "run", resume=True)


def test_without_either_an_old_run_is_resumed(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, tm=False)
    config = old_run(config, "mobilenet_v2", tmp_path / "run", monkeypatch)
    assert len(Trainer(make_plan(config)).run(tmp_path / "run", resume=True)) == 1


def test_a_network_whose_own_code_has_changed_is_not_resumed(
    config: TrainConfig, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    code = (
        "from pathlib import Path\nfrom torch import nn\ndef build(classes):\n"
        "    norm = [nn.BatchNorm2d(4)] if Path(__file__).with_name('norm').exists() else []\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 1), *norm, nn.AdaptiveAvgPool2d(1), "
        "nn.Flatten(), nn.Linear(4, classes))\n"
    )
    own.write_text(code)
    norm = tmp_path / "norm"
    changes = {
        True: r"1\.weight is missing\); it was built by another",
        False: r"1\.weight is not a parameter of the network\); it was built by another",
    }
    config = dataclasses.replace(config, model=f"{own}:build", tm=False, epochs=1, batch_size=60)
    for layer, message in changes.items():
        run = tmp_path / f"run-{layer}"
        norm.unlink(missing_ok=True) if layer else norm.touch()
        Trainer(make_plan(config)).run(run)
        norm.touch() if layer else norm.unlink()
        with pytest.raises(BadCheckpoint, match=message):
            Trainer(make_plan(config)).run(run, resume=True)
    own.write_text(code + "\n")
    with pytest.raises(InputError, match="resume it with the same files"):
        Trainer(make_plan(config)).run(run, resume=True)
