"""A user's network as Python code: NAME=FILE.py:factory or NAME=package.module:factory."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from sskt.teacher_cache.errors import InputError, MissingData, SsktError
from sskt.teacher_cache.sources.known_networks import Loaded, three
from sskt.teacher_cache.sources.names import SourceName
from sskt.teacher_cache.sources.preprocessing import (
    class_names,
    count_outputs,
    override_preprocessing,
    undeclared,
)
from sskt.teacher_cache.sources.source import Preprocessing


def own_network(wanted: SourceName, preprocessing: str) -> tuple[Loaded, Path]:
    """Calls the factory. Also gives the file of its module: what identifies the code.

    The module declares SIZE, MEAN and STD unless ``preprocessing`` (the --preprocessing text)
    gives them, and CHANNELS, SCALE and CLASSES where needed.
    Raises ``MissingData``, and ``InputError`` for whatever else is wrong with it.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            module = load_module(str(wanted.file or wanted.module), f"source {wanted.name}")
            path = _file_of(wanted, module)
            place = wanted.file or wanted.module
            if not hasattr(module, wanted.factory):
                raise InputError(f"source {wanted.name}: {place} has no '{wanted.factory}'")
            network = getattr(module, wanted.factory)()
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
        count = count_outputs(wanted, network, wanted.size or how.size)
    except SsktError:
        raise
    except Exception as error:
        raise _failed(wanted, error) from error
    classes = class_names(wanted, count, getattr(module, "CLASSES", None), "CLASSES")
    return (network, how, classes), path


def load_module(place: str, what: str) -> ModuleType:
    """The module of ``FILE.py`` or ``package.module``; ``what`` begins each message.

    Raises ``MissingData`` if there is none, and whatever the code itself raises.
    """
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise
            raise MissingData(
                f"{what}: no module {place}; install it or put its folder on PYTHONPATH "
                "(a file is named with its .py: FILE.py:factory)"
            ) from error
    path = Path(place)
    if not path.is_file():
        raise MissingData(f"{what}: no file {path}")
    module = ModuleType(f"sskt_own_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    # Compiled here: Python's cache of compiled files may hold an older text of the same second.
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def _file_of(wanted: SourceName, module: ModuleType) -> Path:
    known = getattr(module, "__file__", None)
    path = wanted.file or (Path(known) if known else None)
    if path is None:
        raise InputError(
            f"source {wanted.name}: {wanted.module} is no module with a file of its own, so its "
            "code cannot be recorded"
        )
    return path


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


def _failed(wanted: SourceName, error: Exception) -> InputError:
    what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    place = wanted.file or wanted.module
    return InputError(f"source {wanted.name}: {place}:{wanted.factory} failed: {what}")
