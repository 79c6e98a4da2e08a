"""Where a training starts: published weights, a run's own, and which stages stay as they are."""

from __future__ import annotations

import re
import urllib.error
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData
from sskt.teacher_cache.sources.checkpoints import read_checkpoint, read_weights
from sskt.trainer.config import AUTO
from sskt.trainer.models.base import TargetNetwork
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.normalization import NORMALISATIONS

IMAGENET, KINETICS = "imagenet", "kinetics"
INPUT_SCALE = "input_scale"
"""The key under which a run's checkpoints state the input scale that they were trained with."""


def input_scale_of(chosen: str, init: str) -> tuple[str, str]:
    """Decides on which input scale a network trains.

    Args:
        chosen: A key of ``NORMALISATIONS``, or ``auto`` for what the initial weights expect.
        init: What the network starts from, as in ``load_initial``; empty for fresh parameters.

    Returns:
        The key of ``NORMALISATIONS``, and in words why it was taken.

    Raises:
        BadCheckpoint: If a run's checkpoint states an unknown scale.
        InputError: If ``chosen`` is not the scale that a run's checkpoint states.
        MissingData: If ``chosen`` is ``auto`` and the file is missing.
    """
    checkpoint: dict[str, Any] = {}
    if init and init != IMAGENET:
        if chosen == AUTO and not Path(init).is_file():
            raise MissingData(f"no weights file {init}")
        checkpoint = _checkpoint(Path(init)) or {}
    if _target_state(checkpoint):
        # Before checkpoints stated their scale, every run was normalised as for ImageNet.
        stated = str(checkpoint.get(INPUT_SCALE, IMAGENET))
        if stated not in NORMALISATIONS:
            raise BadCheckpoint(
                f"wrong checkpoint {init}: it was trained with the unknown input scale '{stated}'; "
                "read it with the version of sskt that wrote it"
            )
        if chosen not in (AUTO, stated):
            raise InputError(
                f"--input-scale {chosen} contradicts {init}, which was trained with {stated}; "
                "leave --input-scale out"
            )
        return stated, f"{init} was trained with it"
    if chosen != AUTO:
        return chosen, "as given with --input-scale"
    if _is_kinetics_release(checkpoint):
        return KINETICS, f"{init} is a checkpoint of Hara et al. (2017)"
    if not init:
        return IMAGENET, "the network starts from fresh parameters"
    if init == IMAGENET:
        return IMAGENET, "the scale of torchvision's weights"
    return IMAGENET, (
        f"{init} is not recognised as a Kinetics checkpoint of Hara et al. (2017); if it is one, "
        "give --input-scale kinetics"
    )


def _is_kinetics_release(checkpoint: dict[str, Any]) -> bool:
    """Whether the scripts of Hara et al. of 2017 wrote a checkpoint.

    They and the later ones write ``epoch``, ``arch`` (``resnet-18``), ``state_dict`` and
    ``optimizer``. The later ones (from November 2018 on), which divide by a standard deviation,
    also write ``scheduler``. Their released files may lack everything but ``arch`` and
    ``state_dict``, but then hold ``num_batches_tracked``, which PyTorch has had since 0.4.1 (July
    2018) and which the files of 2017 cannot hold.
    """
    arch, state = checkpoint.get("arch"), checkpoint.get("state_dict")
    if not isinstance(arch, str) or not re.fullmatch(r"resnet-\d+", arch):
        return False
    if not isinstance(state, dict) or "scheduler" in checkpoint:
        return False
    stem = state.get("module.conv1.weight", state.get("conv1.weight"))
    if not isinstance(stem, Tensor) or stem.ndim != 5:
        return False
    return "optimizer" in checkpoint or not any(k.endswith("num_batches_tracked") for k in state)


def load_initial(target: TargetNetwork, init: str, model: str) -> list[str]:
    """Loads weights into ``target``; only a classifier of another shape may be left out.

    ``init`` is ``imagenet`` (torchvision's weights of ``model``), a file of weights (.pth, .pt,
    .safetensors; Hara's Kinetics checkpoints too) or a run's ``last.pt``, whose auxiliary heads
    are passed over. ``model`` is the target's name. Returns the parameters that keep their fresh
    values. Raises ``MissingData``, ``InputError`` (no such weights), ``BadCheckpoint`` naming the
    first parameter that does not fit.
    """
    where = f"{IMAGENET} weights of {model}" if init == IMAGENET else init
    own = None if init == IMAGENET else _target_state(_checkpoint(Path(init)) or {})
    if own is None:
        found = _imagenet(model) if init == IMAGENET else read_weights(Path(init))
        own = {target.own_key(key): value for key, value in found.items()}
    state = own
    wanted = target.state_dict()
    classifier = {key for key in (*wanted, *state) if key.startswith("fc.")}
    kept: list[str] = []
    if {k: v.shape for k, v in state.items() if k in classifier} != {
        k: v.shape for k, v in wanted.items() if k in classifier
    }:
        state = {key: value for key, value in state.items() if key not in classifier}
        kept = [key for key in wanted if key in classifier]
    _require_fit(state, wanted, kept, where, model)
    target.load_state_dict(state, strict=False)
    return kept


def _require_fit(
    state: dict[str, Tensor], wanted: dict[str, Tensor], kept: list[str], where: str, model: str
) -> None:
    found = ""
    for key, value in wanted.items():
        if key in kept or (key not in state and key.endswith("num_batches_tracked")):
            continue
        if key not in state:
            found = f"{key} is missing"
        elif state[key].shape != value.shape:
            found = f"{key} has shape {list(state[key].shape)}, expected {list(value.shape)}"
        if found:
            break
    else:
        odd = next((key for key in state if key not in wanted), "")
        found = f"{odd} is not of it" if odd else ""
    if found:
        raise BadCheckpoint(
            f"wrong checkpoint: {where} does not fit {model}: {found}; check --model, --stem and "
            "--shortcut"
        )


def _imagenet(model: str) -> dict[str, Tensor]:
    from torchvision import models

    from sskt.trainer.models.tapped import torchvision_arch, torchvision_names

    arch = torchvision_arch(model)
    if arch not in torchvision_names():
        raise InputError(f"torchvision has no ImageNet weights of {model}; give --init FILE")
    known = models.get_model_weights(arch).__members__
    weights = known.get("IMAGENET1K_V1") or next(iter(known.values()))
    try:
        with torch.random.fork_rng(devices=[]):
            # torchvision's own loading: it maps the old names of some of its files.
            network = models.get_model(arch, weights=weights)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = getattr(error, "reason", error)
        raise MissingData(
            f"cannot download the weights of {arch} from {weights.url} ({reason}); "
            "give them with --init FILE"
        ) from error
    state: dict[str, Tensor] = network.state_dict()
    return state


def _checkpoint(path: Path) -> dict[str, Any] | None:
    """What a file of ``torch.save`` holds; None if it is another file. Raises ``BadCheckpoint``."""
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    loaded = read_checkpoint(path)
    return loaded if isinstance(loaded, dict) else None


def _target_state(checkpoint: dict[str, Any]) -> dict[str, Tensor] | None:
    """The target network in a run's checkpoint; None in any other."""
    model = checkpoint.get("model")
    if not isinstance(model, dict):
        return None
    own = {k: v for k, v in model.items() if isinstance(k, str) and k.startswith("target.")}
    return {k.removeprefix("target."): v for k, v in own.items()} or None


def freeze_before(network: SSKTNetwork, stage: int) -> None:
    """Freezes the stem and the stages before ``stage`` (1 is the first): fine-tuning.

    Their parameters need no gradient and they stay in eval mode whatever ``network.train()`` is
    called with. The rest trains: ``stage`` and later ones, the classifier, and the auxiliary
    heads (the released code gives those a learning rate of 0, a bug). One past the last stage
    leaves what follows the stages, and the heads. Call it before the optimizer is made.
    Raises ``InputError`` for a network without stages, or another ``stage``.
    """
    last = len(network.target.stage_widths)
    if not last:
        raise InputError(
            "--finetune-from needs stages: name the modules whose outputs they are with --taps, "
            f"in order, e.g. of {', '.join(network.target.tappable())}"
        )
    if not 1 <= stage <= last + 1:
        raise InputError(
            f"--finetune-from {stage}: the network has stages 1 to {last} ({last + 1}: train what "
            "follows them and the heads only)"
        )
    network.frozen = network.target.parts_before(stage)
    for part in network.frozen:
        part.requires_grad_(False)
    network.train(network.training)
