"""A user's network as one file: TorchScript, or a torch.export program.

Such a file is a program, as FILE.py is: open only what you trust. What can be seen before it is
opened is refused here: pickled objects and compiled libraries in it, which would run at once.
"""

from __future__ import annotations

import io
import json
import logging
import operator
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData, SsktError
from sskt.teacher_cache.sources.known_networks import Loaded
from sskt.teacher_cache.sources.names import SourceName
from sskt.teacher_cache.sources.preprocessing import (
    FIELDS,
    class_names,
    count_outputs,
    override_preprocessing,
    rng_kept,
    undeclared,
)
from sskt.teacher_cache.sources.source import Preprocessing, full_float32, state_sha256

EXAMPLE = '{"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}'


class GraphNetwork(nn.Module):
    """A loaded program as the network of a source.

    It is on its device already, its memory format is the one it was exported with, and its mode
    is part of its graph: so ``run`` is a function, no module that would be a part of this, and
    ``eval``, ``to`` and ``requires_grad_`` leave it as it is. A program for fixed numbers of
    pictures, ``least`` to ``most`` (None: any), gets a batch in pieces, the last one filled up
    with copies of its last picture, whose labels are dropped.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Any],
        state: Callable[[], dict[str, Tensor]],
        least: int = 1,
        most: int | None = None,
    ) -> None:
        super().__init__()
        self._run, self._state, self._least, self._most = run, state, least, most

    def state_dict(  # type: ignore[override]
        self, *arguments: Any, **options: Any
    ) -> dict[str, Tensor]:
        """All tensors of the program that its graph reads: parameters, buffers, constants."""
        return self._state()

    def forward(self, x: Tensor) -> Any:
        x = x.contiguous()
        pieces = torch.split(x, self._most) if self._most else (x,)
        outputs = [self._piece(piece) for piece in pieces]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _piece(self, x: Tensor) -> Any:
        lacking = self._least - len(x)
        if lacking <= 0:
            return self._run(x)
        output = self._run(torch.cat([x, x[-1:].expand(lacking, -1, -1, -1)]))
        return output[: len(x)] if isinstance(output, Tensor) else output


@dataclass(frozen=True)
class _Sidecar:
    """FILE.json beside a network file."""

    path: Path
    fields: dict[str, Any]
    classes: list[str] | None


def network_file(wanted: SourceName, preprocessing: str, device: torch.device) -> Loaded:
    """Opens ``wanted.file`` on the device, with the preprocessing that its user declares.

    Size, mean and std come from ``FILE.json`` beside it and from ``preprocessing`` (the
    --preprocessing text, which wins). Raises ``MissingData``, ``InputError`` (undeclared
    preprocessing, not a classifier), ``BadCheckpoint`` (no TorchScript or export, or unsafe).
    """
    path = wanted.file
    assert path is not None
    if not path.is_file():
        raise MissingData(f"source {wanted.name}: no file {path}")
    sidecar = _read_sidecar(wanted, path.with_name(f"{path.name}.json"))
    missing = undeclared(sidecar.fields, wanted, preprocessing)
    if missing:
        raise InputError(
            f"source {wanted.name}: {path.name} does not say how its pictures are prepared "
            f"({', '.join(missing)} missing): write {sidecar.path} like {EXAMPLE} (also channels, "
            "scale, classes), or give --preprocessing size=224,mean=R/G/B,std=R/G/B"
        )
    how = override_preprocessing(Preprocessing(**sidecar.fields), preprocessing)
    how = how if wanted.size is None else replace(how, size=wanted.size)
    try:
        script = _is_script(path)
        network = _torchscript(path, device) if script else _exported(path, device, how.size)
    except (BadCheckpoint, InputError) as error:
        raise type(error)(f"source {wanted.name}: {error}") from error
    try:
        count = count_outputs(wanted, network, how.size, device)
        _require_eval(wanted, network, how, device)
    except SsktError:
        raise
    except Exception as error:
        what = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise InputError(
            f"source {wanted.name}: {path} does not run on batches of any number of pictures of "
            f"{how.size} pixels ({what[:200]}); check its size, and export it so"
        ) from error
    return network, how, class_names(wanted, count, sidecar.classes, f"classes in {sidecar.path}")


def _require_eval(
    wanted: SourceName, network: nn.Module, how: Preprocessing, device: torch.device
) -> None:
    """Raises ``InputError`` if the program was exported in training mode.

    Its mode cannot be asked for, so it is run: labels must not differ from one run to the next
    (dropout), nor with the rest of the batch (BatchNorm), and running must not change it.
    """
    noise = torch.randint(
        256, (how.size, how.size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    views = torch.stack([noise, noise // 4, 255 - noise // 8]).to(device)
    before = state_sha256(network)
    with rng_kept(device), torch.inference_mode(), full_float32():
        x = how(views)
        together, again, *alone = [
            torch.log_softmax(network(part).float(), dim=1) for part in (x, x, *torch.split(x, 1))
        ]
    found = ""
    if state_sha256(network) != before:
        found = "running it changes its statistics"
    elif not torch.allclose(together, again, rtol=1e-3, atol=1e-3):
        found = "running it twice gives two results"
    elif not torch.allclose(together, torch.cat(alone), rtol=1e-3, atol=1e-3):
        found = "a picture's label depends on the others in its batch"
    if found:
        raise InputError(
            f"source {wanted.name}: {wanted.file} was exported in training mode ({found}); call "
            "network.eval() and export it again"
        )


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


def _is_script(path: Path) -> bool:
    """TorchScript (or torch.export), by the archive's members. Raises ``BadCheckpoint``."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inner = {name.partition("/")[2] for name in names}
            if "constants.pkl" in inner:
                return True
            if "models/model.json" in inner or "serialized_exported_program.json" in names:
                _refuse_what_runs(path, archive)
                return False
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, AttributeError) as error:
        if zipfile.is_zipfile(path):
            raise BadCheckpoint(f"{path} is damaged ({error}); export it again") from error
    raise BadCheckpoint(
        f"{path} is neither TorchScript (torch.jit.save) nor a torch.export program: pickled "
        "networks and weights are not opened as networks; give the network as "
        "NAME=FILE.py:factory, or weights for a known architecture with --weights"
    )


def _refuse_what_runs(path: Path, archive: zipfile.ZipFile) -> None:
    """torch.export.load unpickles whatever a program's archive has pickled, and loads libraries."""
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
        except Exception:
            _unsafe(path, f"pickled objects ({name})")


def _unsafe(path: Path, what: str) -> NoReturn:
    raise BadCheckpoint(
        f"{path} holds {what}: opening it would run code; export the network again with nothing "
        "but tensors, or give it as NAME=FILE.py:factory"
    )


def _torchscript(path: Path, device: torch.device) -> GraphNetwork:
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit", category=DeprecationWarning)
        try:
            program = jit.load(str(path), map_location=device).eval()
        except Exception as error:
            what = str(error).splitlines()[0]
            raise BadCheckpoint(f"{path} cannot be opened as TorchScript ({what[:200]})") from error

    def run(x: Tensor) -> Any:
        # As written: the optimiser rewrites a graph after its first runs, and with it last bits,
        # so that labels would depend on how often the network has run before.
        with jit.optimized_execution(False):
            return program(x)

    return GraphNetwork(run, program.state_dict)


def _exported(path: Path, device: torch.device, size: int) -> GraphNetwork:
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)  # it would print a traceback of what is said in one line here
    try:
        program = torch.export.load(path)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        module = program.module()
    except Exception as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "a part is missing or damaged" if "warnings above" in what else what[:200]
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
            f"{path} was exported for pictures of {shape[2]} x {shape[3]}, but its preprocessing "
            f"says size {size}"
        )
    least, most = _batch_range(program, shape[0])
    read = [operator.attrgetter(name) for name in program.constants]

    def run(x: Tensor) -> Any:
        return module(x)

    def state() -> dict[str, Tensor]:
        constants = zip(program.constants, (get(module) for get in read), strict=True)
        return {**module.state_dict(), **dict(constants)}

    return GraphNetwork(run, state, least, most)


def _batch_range(program: Any, n: Any) -> tuple[int, int | None]:
    if isinstance(n, int):
        return n, n
    allowed = program.range_constraints.get(n.node.expr)
    if allowed is None:
        return 1, None
    least, most = str(allowed.lower), str(allowed.upper)  # sympy's; without a bound infinite
    return max(1, int(least)), int(most) if most.isdigit() else None
