"""Where sources come from: known networks, timm's, and the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sskt.teacher_cache.errors import InputError
from sskt.teacher_cache.format.features import FEATURES, SOFT_LABELS
from sskt.teacher_cache.sources.batchnorm import EVAL, parse_batchnorm
from sskt.teacher_cache.sources.exported import network_file
from sskt.teacher_cache.sources.features import parse_output
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
from sskt.teacher_cache.sources.outputs import Outputs
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
    code: str = "",
    outputs: Outputs | None = None,
    compile_batch: int | None = None,
    output: str = SOFT_LABELS,
) -> Source:
    """Builds, loads and freezes a source.

    Args:
        wanted: The source.
        weights: Replaces the weights of a known architecture: .safetensors, or a checkpoint that
            loads with ``weights_only=True``.
        preprocessing: Overrides fields, see ``override_preprocessing``.
        precision: Arithmetic of the forward pass: ``float32`` or ``bfloat16``.
        device: See ``usable_device``.
        batchnorm: ``eval`` or ``batch-B``, see ``parse_batchnorm``.
        code: Of a user's network only: what its file must be, ``sha256:...``, which is compared
            before the file is run; empty: anything.
        outputs: What the network returns, see ``parse_outputs``.
        compile_batch: Images of a forward pass for which the network is compiled; None: it is not.
        output: What is stored, see ``parse_output``.

    Returns:
        The source, in evaluation mode and without gradients.

    Raises:
        UnknownName: If the source, the output or its module is not known.
        MissingData: If a file, a package or a download is missing.
        BadCheckpoint: If the weights do not belong to the network.
        SpecMismatch: If the file of a user's network is another one than ``code`` says.
        InputError: If the network cannot be used as a source.
    """
    arch, found = wanted.arch or DEFAULT_ARCH, ""
    if (wanted.file is not None or wanted.module) and weights is not None:
        raise InputError(f"source {wanted.name}: --weights goes with a known architecture")
    if wanted.file is not None and not wanted.factory:
        if batchnorm != EVAL:
            raise InputError(
                f"source {wanted.name}: --batchnorm batch needs a Python network "
                f"(NAME=FILE.py:factory); the mode of {wanted.file.name} is fixed in its graph"
            )
        place = usable_device(str(device))
        (network, how, classes), found = network_file(wanted, preprocessing, place, code)
    elif wanted.factory:
        (network, how, classes), found = own_network(wanted, preprocessing, code)
    elif arch.startswith(TIMM):
        bare = parse_output(output)[0] == FEATURES
        network, how, classes = timm_network(wanted, weights, features=bare)
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
        code=found,
        batchnorm=batchnorm,
        outputs=outputs,
        compile_batch=compile_batch,
        output=output,
    )
