"""Networks of timm: imagenet:timm/ARCH, or NAME:timm/ARCH for other classes than ImageNet's."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from sskt.teacher_cache.errors import (
    BadCheckpoint,
    InputError,
    MissingData,
    UnknownName,
    first_line,
)
from sskt.teacher_cache.sources.checkpoints import (
    listed,
    load_weights,
    read_state,
    variants,
)
from sskt.teacher_cache.sources.known_networks import Loaded, imagenet_classes, three
from sskt.teacher_cache.sources.names import SOURCES, TIMM, SourceName
from sskt.teacher_cache.sources.preprocessing import class_names
from sskt.teacher_cache.sources.source import Preprocessing


def timm_network(wanted: SourceName, file: Path | None, *, features: bool = False) -> Loaded:
    """Builds a network of timm's registry.

    Size, mean and std are those of timm's data configuration (its ``input_size``, not
    ``test_input_size``). timm's ``crop_pct`` and ``interpolation`` are not used: the view policy
    crops, and the whole view is resized bilinearly as for every source.

    Args:
        wanted: The source.
        file: Weights to load instead of those of timm's tag. The number of classes is then that
            of the file's classifier.
        features: Whether a network without classifier is accepted, for its features.

    Returns:
        The network with its preprocessing and classes.

    Raises:
        MissingData: If timm is not installed, or the weights cannot be downloaded.
        UnknownName: If timm has no such network.
        InputError: If it has not as many classes as a known source has.
        BadCheckpoint: If the weights do not belong to it.
    """
    try:
        timm: Any = importlib.import_module("timm")
        data: Any = importlib.import_module("timm.data")
    except ImportError as error:
        raise MissingData(f"{wanted.arch} needs: pip install 'sskt[timm]'") from error
    arch = (wanted.arch or "").removeprefix(TIMM)
    config = _configuration(timm, arch)
    state = None if file is None else read_state(file)
    bare = features and not config.num_classes
    count = config.num_classes if state is None or bare else _classes_in(state, config, file)
    expected = SOURCES[wanted.name][0] if wanted.name in SOURCES else count
    if count != expected or (count < 2 and not bare):
        raise InputError(
            f"source {wanted.name}: {wanted.arch} has {count} classes"
            + (f", not {expected}: use a name of your own, NAME:timm/{arch}" if count > 1 else
               ": it is no classifier; its features are stored with --output features")
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        if state is None:
            network = _downloaded(timm, arch, wanted)
        else:
            network = timm.create_model(arch, pretrained=False, num_classes=count)
    if state is not None and file is not None:
        load_weights(network, state, file)
    found = data.resolve_model_data_config(network)
    channels, height, width = found["input_size"]
    if channels != 3 or height != width:
        raise InputError(f"{wanted.arch}: expected square images of 3 channels, found {found}")
    how = Preprocessing(int(height), three(found["mean"]), three(found["std"]))
    subset = None if state is not None else data.infer_imagenet_subset(network)
    names = _imagenet_names(data, subset) if subset else None
    return (
        network,
        how,
        class_names(wanted, count or int(cast(Any, network).num_features), names, "timm"),
    )


def _configuration(timm: Any, arch: str) -> Any:
    name = arch.partition(".")[0]
    try:
        config = timm.models.get_pretrained_cfg(arch, allow_unregistered=False)
    except RuntimeError:
        config = None
    if not timm.is_model(name) or config is None:
        all_tags = timm.list_models(pretrained=True)
        near = [n for n in all_tags if n.partition(".")[0] == name]
        near = near or difflib.get_close_matches(arch, all_tags, n=6, cutoff=0.4)
        hint = "all: timm.list_models(pretrained=True)"
        raise UnknownName("timm architecture", arch, near or all_tags[:6], hint)
    return config


def _classes_in(state: dict[str, torch.Tensor], config: Any, file: Path | None) -> int:
    heads = config.classifier if isinstance(config.classifier, str) else config.classifier[0]
    for names in variants(state):
        if (weight := names.get(f"{heads}.weight")) is not None:
            return len(weight)
    raise BadCheckpoint(
        f"wrong checkpoint {file}: it holds no classifier ({heads}.weight); it has the keys "
        f"{listed(list(state))}"
    )


def _downloaded(timm: Any, arch: str, wanted: SourceName) -> torch.nn.Module:
    try:
        with _quietly():
            network: torch.nn.Module = timm.create_model(arch, pretrained=True)
    except Exception as error:
        raise MissingData(
            f"cannot get the weights of {wanted.arch} ({first_line(error)}); give them with "
            "--weights FILE"
        ) from error
    return network


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences huggingface-hub, which reports each of its attempts; our error says the last."""
    hub: Any = importlib.import_module("huggingface_hub.utils.logging")
    level = hub.get_verbosity()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        hub.set_verbosity(level)


def _imagenet_names(data: Any, subset: str) -> list[str] | tuple[str, ...]:
    if subset == "imagenet-1k":
        return imagenet_classes()
    names: list[str] = data.ImageNetInfo(subset).label_descriptions()
    return names
