"""A user's network as Python code: NAME=FILE.py:factory or NAME=package.module:factory."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sskt.teacher_cache.errors import (
    InputError,
    SpecMismatch,
    SsktError,
    described,
)
from sskt.teacher_cache.own_code import code_of, load_module, read_code, run_code
from sskt.teacher_cache.sources.known_networks import Loaded, three
from sskt.teacher_cache.sources.names import SourceName
from sskt.teacher_cache.sources.outputs import count_outputs
from sskt.teacher_cache.sources.preprocessing import (
    class_names,
    override_preprocessing,
    undeclared,
)
from sskt.teacher_cache.sources.source import Preprocessing


def own_network(wanted: SourceName, preprocessing: str, code: str = "") -> tuple[Loaded, str]:
    """Runs a user's module and calls its factory.

    Args:
        wanted: The source. Its module declares SIZE, MEAN and STD, and CHANNELS, SCALE and
            CLASSES where needed.
        preprocessing: The --preprocessing text, which wins over the module.
        code: What the file of the module must be, ``sha256:...``; empty: anything.

    Returns:
        The network with its preprocessing and classes, and the SHA-256 of the module's file as
        ``sha256:...``.

    Raises:
        MissingData: If there is no such file or module.
        SpecMismatch: If the file is another one than ``code`` says; it was not run.
        InputError: If the module cannot be used as a source; the message says why.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            module, found = _loaded(wanted, code)
            if not hasattr(module, wanted.factory):
                place = wanted.file or wanted.module
                raise InputError(f"source {wanted.name}: {place} has no '{wanted.factory}'")
            factory = getattr(module, wanted.factory)
            require_no_arguments(factory, f"source {wanted.name}: {wanted.factory}")
            network = factory()
    except SsktError:
        raise
    except Exception as error:
        raise _failed(wanted, error) from error
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise InputError(
            f"source {wanted.name}: {wanted.factory}() gave {kind}, not a torch Module"
        )
    how = override_preprocessing(_declared(wanted, module, preprocessing), preprocessing)
    try:
        count = count_outputs(wanted.name, network, wanted.size or how.size)
    except SsktError:
        raise
    except Exception as error:
        raise _failed(wanted, error) from error
    classes = class_names(wanted, count, getattr(module, "CLASSES", None), "CLASSES")
    return (network, how, classes), found


def _loaded(wanted: SourceName, code: str) -> tuple[ModuleType, str]:
    """The module, and the SHA-256 of its file; a file is compared before it is run."""
    what = f"source {wanted.name}"
    if wanted.file is not None:
        content = read_code(wanted.file, what)
        found = code_of(content)
        require_code(wanted, wanted.file, found, code)
        return run_code(wanted.file, content), found
    if code:
        try:
            spec = importlib.util.find_spec(wanted.module)
        except ModuleNotFoundError:
            spec = None  # load_module raises it again, or says that it is not installed
        if spec is not None:
            path = _file_of(wanted, spec.origin)
            require_code(wanted, path, code_of(path.read_bytes()), code)
    module = load_module(wanted.module, what)
    path = _file_of(wanted, getattr(module, "__file__", None))
    return module, code_of(path.read_bytes())


def require_code(wanted: SourceName, path: Path, found: str, expected: str) -> None:
    """Raises ``SpecMismatch`` if a file is not the one that is expected (empty: any)."""
    if expected and found != expected:
        raise SpecMismatch(
            f"source {wanted.name}: {path} is not the file that the labels were made with "
            f"(source.code: expected {expected}, found {found}); it was not run; give that file"
        )


def _file_of(wanted: SourceName, known: str | None) -> Path:
    if known is None or not Path(known).is_file():
        raise InputError(
            f"source {wanted.name}: {wanted.module} is no module with a file of its own, so its "
            "code cannot be recorded"
        )
    return Path(known)


def _declared(wanted: SourceName, module: ModuleType, preprocessing: str) -> Preprocessing:
    place = wanted.file or wanted.module
    found = {key: getattr(module, key.upper()) for key in ("size", "mean", "std")
             if hasattr(module, key.upper())}  # fmt: skip
    missing = [key.upper() for key in undeclared(found, wanted, preprocessing)]
    if missing:
        raise InputError(
            f"source {wanted.name}: {place} defines no {', '.join(missing)}; define them there, "
            "or give --preprocessing size=...,mean=R/G/B,std=R/G/B"
        )
    usual = Preprocessing()
    try:
        return Preprocessing(
            int(found.get("size", usual.size)),
            three(found.get("mean", usual.mean)),
            three(found.get("std", usual.std)),
            getattr(module, "CHANNELS", "rgb"),
            float(getattr(module, "SCALE", 1.0)),
        )
    except (TypeError, ValueError, InputError) as error:
        names = "SIZE (one number), MEAN and STD (three each), CHANNELS ('rgb', 'bgr'), SCALE"
        raise InputError(f"source {wanted.name}: {place}: check {names}: {error}") from error


def require_no_arguments(factory: Any, what: str) -> None:
    """Raises ``InputError`` if a factory cannot be called without arguments."""
    with contextlib.suppress(TypeError, ValueError):  # no function, or one of C
        needed = [
            p.name
            for p in inspect.signature(factory).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if needed:
            raise InputError(
                f"{what} needs the arguments {', '.join(needed)}, and a factory is called without "
                "any; give them defaults, or write a function around it"
            )


def _failed(wanted: SourceName, error: Exception) -> InputError:
    what = described(error)
    place = wanted.file or wanted.module
    return InputError(f"source {wanted.name}: {place}:{wanted.factory} failed: {what}")
