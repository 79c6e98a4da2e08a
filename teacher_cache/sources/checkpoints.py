"""Weights from files: read without running code from them, checked, and loaded whole."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import BadCheckpoint, MissingData, first_line

State = dict[str, Tensor]

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts store a ``state_dict``."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, ``torch.compile`` and Lightning put before the names of all parameters."""


def read_checkpoint(path: Path) -> Any:
    """Reads what ``torch.save`` wrote, without running code from it.

    ``torch.load`` ignores the checksums of the archive, so that a flipped bit in a weight would
    pass for another weight. They are compared first. Files in the format of PyTorch before 1.6,
    and those written with ``set_crc32_options(False)``, have none.

    Args:
        path: The file.

    Returns:
        The stored object: tensors (on the CPU) and plain values only.

    Raises:
        MissingData: If there is no such file.
        BadCheckpoint: If the file is damaged, is no checkpoint, or holds other objects; the
            message names their class.
    """
    if not path.is_file():
        raise MissingData(f"no weights file {path}")
    try:
        damaged = damaged_member(path)
        if damaged:
            raise BadCheckpoint(
                f"wrong checkpoint {path}: the checksum of {damaged} fails, so the file is "
                "damaged; restore it from its origin"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except BadCheckpoint:
        raise
    except Exception as error:  # a damaged file makes torch raise a dozen kinds
        raise BadCheckpoint(f"wrong checkpoint {path}: {_refusal(error)}") from error


def damaged_member(path: Path) -> str:
    """The first member of a zip archive whose CRC-32 fails.

    Args:
        path: The file.

    Returns:
        The name of the member; empty if there is none, or if the file is no archive or one
        without checksums.

    Raises:
        zipfile.BadZipFile: If the archive itself is damaged.
    """
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        if not any(member.CRC for member in archive.infolist()):
            return ""
        return archive.testzip() or ""


def _refusal(error: Exception) -> str:
    found = re.search(r"Unsupported global: GLOBAL (\S+)|Unsupported class (\S+)", str(error))
    if found:
        return (
            f"it holds an object of class {found[1] or found[2]}, and reading it could run code; "
            "save network.state_dict() instead"
        )
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return f"it cannot be read safely as weights ({reason.splitlines()[0][:160]})"


def read_state(path: Path) -> State:
    """Reads a ``state_dict`` from a .safetensors file or a checkpoint, without running code.

    Args:
        path: The file. A checkpoint holds the ``state_dict`` itself, or holds it under one of
            ``WRAPPERS``.

    Returns:
        The tensors by name. DenseNet's old names (``norm.1`` for ``norm1``) are replaced; what
        wrapped the network is still in the names (see ``variants``).

    Raises:
        MissingData: If there is no such file.
        BadCheckpoint: If the file is damaged, unsafe, or holds no ``state_dict``; the message
            names its keys.
    """
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    parts = [loaded]
    if isinstance(loaded, Mapping):
        parts = [*(loaded[key] for key in WRAPPERS if key in loaded), loaded]
    state = next(filter(_is_state, parts), None)
    if state is None:
        keys = list(loaded) if isinstance(loaded, Mapping) else []
        found = f"it has the keys {listed(keys)}" if keys else f"it is {type(loaded).__name__}"
        raise BadCheckpoint(
            f"wrong checkpoint {path}: it holds no state_dict ({found}); save network.state_dict()"
        )
    return {new_name(key): value for key, value in state.items()}


def _read_safetensors(path: Path) -> State:
    if not path.is_file():
        raise MissingData(f"no weights file {path}")
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise BadCheckpoint(
            f"wrong checkpoint {path}: it cannot be read as safetensors ({first_line(error)[:160]})"
        ) from error


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def read_weights(path: Path) -> State:
    """Reads a ``state_dict`` for a network that is not built yet. See ``read_state``.

    Returns:
        The tensors by name, without the prefixes that ``module.`` and ``_orig_mod.`` put before
        all names.
    """
    state = read_state(path)
    while (cut := _without(state, ("module.", "_orig_mod."))) is not None:
        state = cut
    return state


def variants(state: State) -> Iterator[State]:
    """The ``state_dict`` under the names that it may have had before something wrapped the network.

    Yields:
        The state as it is; without the prefixes in ``PREFIXES``, one after the other, where all
        names have them; and without ``module`` inside the names, where a part of the network was
        in DataParallel, as ``features`` is in CSAIL's AlexNet.
    """
    bare = state
    yield bare
    while (cut := _without(bare, PREFIXES)) is not None:
        bare = cut
        yield bare
    inner = {key.replace(".module.", "."): value for key, value in bare.items()}
    if len(inner) == len(bare) and inner.keys() != bare.keys():
        yield inner


def _without(state: State, prefixes: tuple[str, ...]) -> State | None:
    for prefix in prefixes:
        if state and all(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items()}
    return None


def new_name(key: str) -> str:
    """A parameter's name in torchvision's DenseNets of today; other names as they are."""
    if ".denselayer" not in key:
        return key
    for part in ("norm", "conv", "relu"):
        for number in "12":
            key = key.replace(f".{part}.{number}.", f".{part}{number}.")
    return key


def load_weights(network: nn.Module, state: State, path: Path) -> None:
    """Loads a ``state_dict`` into its network.

    Args:
        network: The network.
        state: What ``read_state`` gave. The first of its ``variants`` that has exactly the names
            of the network is loaded.
        path: Its file, for messages.

    Raises:
        BadCheckpoint: If no variant has the network's names and shapes; the message names the
            parameters that differ.
    """
    names = network.state_dict().keys()
    needed = {name for name in names if not name.endswith("num_batches_tracked")}
    fitting = (s for s in variants(state) if needed <= s.keys() <= names)
    chosen = next(fitting, None)
    if chosen is None:
        closest = min(variants(state), key=lambda s: len(needed ^ s.keys()))
        missing = [name for name in names if name in needed - closest.keys()]
        unexpected = [key for key in closest if key not in names]
        raise BadCheckpoint(
            f"wrong checkpoint {path}: it does not fit the architecture ({len(missing)} "
            f"parameters missing{_example(missing)}, {len(unexpected)} not of it"
            f"{_example(unexpected)}; the file has the keys {listed(list(state))})"
        )
    try:
        network.load_state_dict(chosen, strict=False)
    except RuntimeError as error:
        lines = str(error).splitlines()
        what = lines[1].strip() if len(lines) > 1 else lines[0]
        raise BadCheckpoint(f"wrong checkpoint {path}: {what}") from error


def _example(keys: list[str]) -> str:
    return f", e.g. {keys[0]}" if keys else ""


def listed(keys: list[Any], most: int = 5) -> str:
    """The first keys, for messages."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(str(key)[:60] for key in keys[:most]) + more


def check_sha256(path: Path, expected: str) -> None:
    """Raises ``BadCheckpoint`` unless the file has this SHA-256."""
    found = file_sha256(path)
    if found != expected:
        raise BadCheckpoint(
            f"wrong checkpoint {path}: expected SHA-256 {expected}, found {found}; "
            "delete it and run again, or give another with --weights FILE"
        )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
