"""A user's network as one file: a torch.export program.

Such a file is a program, as FILE.py is: open only what you trust. Pickled objects and compiled
libraries in it, which would run at once, are refused before it is opened.
"""

from __future__ import annotations

import io
import json
import logging
import operator
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData, SsktError, first_line
from sskt.teacher_cache.sources.checkpoints import damaged_member, file_sha256
from sskt.teacher_cache.sources.known_networks import Loaded
from sskt.teacher_cache.sources.names import SourceName
from sskt.teacher_cache.sources.outputs import count_outputs, tensor_of
from sskt.teacher_cache.sources.preprocessing import (
    FIELDS,
    class_names,
    override_preprocessing,
    undeclared,
)
from sskt.teacher_cache.sources.python_code import require_code
from sskt.teacher_cache.sources.source import Preprocessing

EXAMPLE = '{"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}'


class ExportedNetwork(nn.Module):
    """A torch.export program as the network of a source.

    It is on its device already, its memory format is the one it was exported with, and its mode
    is part of its graph: so the program's module is no submodule, and ``eval``, ``to`` and
    ``requires_grad_`` leave it as it is. A program for fixed numbers of images, ``least`` to
    ``most`` (None: any), gets a batch in pieces; the last piece is filled up with copies of its
    last image, whose outputs are dropped.
    """

    def __init__(self, program: Any, least: int, most: int | None) -> None:
        super().__init__()
        module: Any = program.module()
        self._run: Callable[[Tensor], Any] = lambda x: module(x)
        self._tensors: Callable[[], dict[str, Tensor]] = module.state_dict
        constants = {name: operator.attrgetter(name) for name in program.constants}
        self._constants: Callable[[], dict[str, Tensor]] = lambda: {
            name: read(module) for name, read in constants.items()
        }
        self._least, self._most = least, most

    def state_dict(  # type: ignore[override]
        self, *arguments: Any, **options: Any
    ) -> dict[str, Tensor]:
        """All tensors that the graph reads: parameters, buffers, constants."""
        return {**self._tensors(), **self._constants()}

    def forward(self, x: Tensor) -> Any:
        """Outputs of images, float32 ``[n, 3, H, W]``."""
        x = x.contiguous()
        pieces = torch.split(x, self._most) if self._most else (x,)
        outputs = [self._piece(piece) for piece in pieces]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _piece(self, x: Tensor) -> Any:
        lacking = max(0, self._least - len(x))
        filled = torch.cat([x, x[-1:].expand(lacking, -1, -1, -1)]) if lacking else x
        output = tensor_of(self._run(filled))
        return output[: len(x)] if lacking and isinstance(output, Tensor) else output


@dataclass(frozen=True)
class _Sidecar:
    """FILE.json beside a network file."""

    path: Path
    fields: dict[str, Any]
    classes: list[str] | None


def network_file(
    wanted: SourceName, preprocessing: str, device: torch.device, code: str = ""
) -> tuple[Loaded, str]:
    """Opens a torch.export program on the device.

    Args:
        wanted: The source, with its ``file``. Size, mean and std come from ``FILE.json`` beside it.
        preprocessing: The --preprocessing text, which wins over ``FILE.json``.
        device: Where the program is to run.
        code: What the file must be, ``sha256:...``; empty: anything.

    Returns:
        The network with its preprocessing and classes, and the SHA-256 of the file as
        ``sha256:...``.

    Raises:
        MissingData: If there is no such file.
        SpecMismatch: If the file is another one than ``code`` says; it was not opened.
        BadCheckpoint: If the file is no torch.export program, is damaged, or would run code.
        InputError: If its preprocessing is not declared, or it is no classifier.
    """
    path = wanted.file
    assert path is not None
    if not path.is_file():
        raise MissingData(f"source {wanted.name}: no file {path}")
    found = f"sha256:{file_sha256(path)}"
    require_code(wanted, path, found, code)
    try:
        _check_archive(path)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"source {wanted.name}: {error}") from error
    sidecar = _read_sidecar(wanted, path.with_name(f"{path.name}.json"))
    missing = undeclared(sidecar.fields, wanted, preprocessing)
    if missing:
        raise InputError(
            f"source {wanted.name}: {path.name} does not say how its images are prepared "
            f"({', '.join(missing)} missing): write {sidecar.path} like {EXAMPLE} (also channels, "
            "scale, classes), or give --preprocessing size=224,mean=R/G/B,std=R/G/B"
        )
    how = override_preprocessing(Preprocessing(**sidecar.fields), preprocessing)
    how = how if wanted.size is None else replace(how, size=wanted.size)
    try:
        network = _opened(path, device, how.size)
    except (BadCheckpoint, InputError) as error:
        raise type(error)(f"source {wanted.name}: {error}") from error
    try:
        count = count_outputs(wanted.name, network, how.size, device)
    except SsktError:
        raise
    except Exception as error:
        last = str(error).strip().rpartition("\n")[2] or type(error).__name__
        raise InputError(
            f"source {wanted.name}: {path} does not run on images of {how.size} pixels "
            f"({last[:200]}); check its size, and export it for that size"
        ) from error
    classes = class_names(wanted, count, sidecar.classes, f"classes in {sidecar.path}")
    return (network, how, classes), found


def _are_names(classes: Any) -> bool:
    return isinstance(classes, list) and all(isinstance(name, str) for name in classes)


def _read_sidecar(wanted: SourceName, path: Path) -> _Sidecar:
    if not path.is_file():
        return _Sidecar(path, {}, None)
    try:
        found = json.loads(path.read_text("utf-8"))
        unknown = set(found) - {*FIELDS, "classes"}
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        classes = found.pop("classes", None)
        if classes is not None and not _are_names(classes):
            raise ValueError("classes must be a list of names")
        for key, read in (("size", operator.index), ("scale", float)):
            if key in found:
                found[key] = read(found[key])
        for key in ("mean", "std"):
            if key in found:
                found[key] = tuple(float(x) for x in found[key])
        Preprocessing(**found)
    except (ValueError, TypeError, OSError, InputError) as error:
        raise InputError(
            f"source {wanted.name}: cannot use {path} ({error}); expected {EXAMPLE}, and where "
            "needed channels (rgb, bgr), scale, classes (a list of names)"
        ) from error
    return _Sidecar(path, found, classes)


def _check_archive(path: Path) -> None:
    """Raises ``BadCheckpoint`` if a file is no torch.export program, or would run code."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inner = {name.partition("/")[2] for name in names}
            if "constants.pkl" in inner:
                raise BadCheckpoint(
                    f"{path} is TorchScript, which PyTorch has deprecated and sskt does not open; "
                    "export the network anew: torch.export.save(torch.export.export("
                    "network.eval(), (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes="
                    "({0: torch.export.Dim.DYNAMIC},)), 'FILE.pt2')"
                )
            if "models/model.json" in inner or "serialized_exported_program.json" in names:
                _refuse_what_runs(path, archive)
                if damaged := damaged_member(path):
                    raise BadCheckpoint(
                        f"{path} is damaged (the checksum of {damaged} fails); export it again"
                    )
                return
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, AttributeError) as error:
        if zipfile.is_zipfile(path):
            raise BadCheckpoint(f"{path} is damaged ({error}); export it again") from error
    raise BadCheckpoint(
        f"{path} is no torch.export program: pickled networks and weights are not opened as "
        "networks; give the network as NAME=FILE.py:factory, or weights for a known architecture "
        "with --weights"
    )


def _refuse_what_runs(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses pickled objects and compiled libraries, both of which torch.export.load would run."""
    names = archive.namelist()
    if len(set(names)) < len(names) or any("/aotinductor/" in name for name in names):
        _unsafe(path, "compiled libraries, or two members of one name")
    pickled = [name for name in names if name.endswith(".pt")]
    for name in names:
        if name.endswith("_config.json"):
            for entry in json.loads(archive.read(name))["config"].values():
                member = entry["path_name"]
                if entry["use_pickle"] or not member.startswith(("weight_", "tensor_")):
                    pickled.append(f"{name.rpartition('/')[0]}/{member}")
    for name in pickled:
        try:
            torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
        except Exception:  # whatever torch cannot read without running code is refused
            _unsafe(path, f"pickled objects ({name})")


def _unsafe(path: Path, what: str) -> NoReturn:
    raise BadCheckpoint(
        f"{path} holds {what}: opening it would run code; export the network again with nothing "
        "but tensors, or give it as NAME=FILE.py:factory"
    )


def _opened(path: Path, device: torch.device, size: int) -> ExportedNetwork:
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)  # its tracebacks say what the one line of our error says
    try:
        program = torch.export.load(path)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
    except Exception as error:  # a damaged program makes torch raise a dozen kinds
        what = first_line(error)[:200]
        what = "a part is missing or damaged" if "warnings above" in what else what
        raise BadCheckpoint(
            f"{path} cannot be opened as a torch.export program ({what})"
        ) from error
    finally:
        log.setLevel(level)
    names = program.graph_signature.user_inputs
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    shape: tuple[Any, ...] = inputs[0].meta["val"].shape if len(inputs) == 1 else ()
    if len(shape) != 4:
        raise InputError(f"{path}: expected a program of one input [n, 3, H, W]")
    if any(isinstance(n, int) and n != size for n in shape[2:]):
        raise InputError(
            f"{path} was exported for images of {shape[2]} x {shape[3]}, but its preprocessing "
            f"says size {size}"
        )
    least, most = _batch_range(program, shape[0])
    return ExportedNetwork(program, least, most)


def _batch_range(program: Any, n: Any) -> tuple[int, int | None]:
    if isinstance(n, int):
        return n, n
    allowed = program.range_constraints.get(n.node.expr)
    if allowed is None:
        return 1, None
    least, most = str(allowed.lower), str(allowed.upper)  # sympy's; without a bound infinite
    return max(1, int(least)), int(most) if most.isdigit() else None
