"""Where sources come from: known networks, timm's, and the user's own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.sources.batchnorm import EVAL, parse_batchnorm
from sskt.teacher_cache.sources.exported import network_file
from sskt.teacher_cache.sources.known_networks import (
    CSAIL_SHA256,
    efficientnet_lite0,
    imagenet_archs,
    imagenet_classes,
    places365_classes,
    places365_network,
    torchvision_network,
)
from sskt.teacher_cache.sources.names import DEFAULT_ARCH, SOURCES, TIMM, SourceName, parse_source
from sskt.teacher_cache.sources.preprocessing import override_preprocessing
from sskt.teacher_cache.sources.python_code import own_network
from sskt.teacher_cache.sources.source import Precision, Source, freeze, usable_device
from sskt.teacher_cache.sources.timm import timm_network

__all__ = [
    "CSAIL_SHA256",
    "DEFAULT_ARCH",
    "SOURCES",
    "SourceName",
    "imagenet_archs",
    "imagenet_classes",
    "open_source",
    "override_preprocessing",
    "parse_batchnorm",
    "parse_source",
    "places365_classes",
]


def open_source(
    wanted: SourceName,
    *,
    weights: Path | None = None,
    preprocessing: str = "",
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
    batchnorm: str = EVAL,
) -> Source:
    """Builds, loads and freezes a source.

    ``weights`` replaces the weights of a known architecture (.safetensors, or a checkpoint that
    loads with ``weights_only=True``); ``preprocessing`` overrides fields, see
    ``override_preprocessing``; ``batchnorm`` is ``eval`` or ``batch-B``, see ``parse_batchnorm``.
    Raises ``UnknownName``, ``MissingData``, ``BadCheckpoint``, ``InputError``.
    """
    arch, code = wanted.arch or DEFAULT_ARCH, ""
    if (wanted.file is not None or wanted.module) and weights is not None:
        raise InputError(f"source {wanted.name}: --weights goes with a known architecture")
    if wanted.file is not None and not wanted.factory:
        if batchnorm != EVAL:
            raise InputError(
                f"source {wanted.name}: --batchnorm batch needs a Python network "
                f"(NAME=FILE.py:factory); the mode of {wanted.file.name} is fixed in its graph"
            )
        place = usable_device(str(device))
        (network, how, classes), path = network_file(wanted, preprocessing, place), wanted.file
        code = _file_sha256(path)
    elif wanted.factory:
        (network, how, classes), path = own_network(wanted, preprocessing)
        code = _file_sha256(path)
    elif arch.startswith(TIMM):
        network, how, classes = timm_network(wanted, weights)
    elif arch == "efficientnet_lite0":
        network, how, classes = efficientnet_lite0(wanted.name, weights)
    elif wanted.name == "places365":
        network, how, classes = places365_network(arch, weights)
    else:
        network, how, classes = torchvision_network(arch, weights)
    how = override_preprocessing(how, preprocessing)
    if wanted.size is not None:
        how = replace(how, size=wanted.size)
    return freeze(
        wanted.name,
        replace(wanted, arch=arch).recorded_arch or arch,
        network,
        how,
        classes,
        precision=precision,
        device=device,
        code=code,
        batchnorm=batchnorm,
    )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
