"""Weights from files: read without running code from them, checked, loaded whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import BadCheckpoint, MissingData


def read_weights(path: Path) -> dict[str, Tensor]:
    """A ``state_dict`` from .safetensors or a checkpoint, without running code from it.

    CSAIL's form is understood: a dict with ``state_dict``, ``module.`` in its keys,
    DenseNet's old names (``norm.1`` for ``norm1``). Raises ``MissingData``, ``BadCheckpoint``.
    """
    if not path.is_file():
        raise MissingData(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadCheckpoint(
            f"wrong checkpoint {path}: it cannot be read safely as weights ({what[:160]})"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BadCheckpoint(f"wrong checkpoint {path}: it holds no state_dict")
    return {new_name(key.replace("module.", "")): value for key, value in state.items()}


def new_name(key: str) -> str:
    """A parameter's name in torchvision's DenseNets of today; other names as they are."""
    if ".denselayer" not in key:
        return key
    for part in ("norm", "conv", "relu"):
        for number in "12":
            key = key.replace(f".{part}.{number}.", f".{part}{number}.")
    return key


def load_weights(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Loads a ``state_dict`` into its network. Raises ``BadCheckpoint`` if it does not fit."""
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = str(error).splitlines()
        what = lines[1].strip() if len(lines) > 1 else lines[0]
        raise BadCheckpoint(f"wrong checkpoint {path}: {what}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise BadCheckpoint(
            f"wrong checkpoint {path}: it does not fit the architecture "
            f"({len(missing)} parameters missing{_example(missing)}, "
            f"{len(unexpected)} not of it{_example(unexpected)})"
        )


def _example(keys: list[str]) -> str:
    return f", e.g. {keys[0]}" if keys else ""


def check_sha256(path: Path, expected: str) -> None:
    """Raises ``BadCheckpoint`` unless the file has this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise BadCheckpoint(
            f"wrong checkpoint {path}: expected SHA-256 {expected}, found {found}; "
            "delete it and run again, or give another with --weights FILE"
        )
