"""Opens a dataset as a target."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.own_code import called, find_function, hash_of_file
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.folder import find_split, open_folder
from sskt.teacher_cache.targets.manifest import manifest_splits, open_manifest
from sskt.teacher_cache.targets.packed.open import hash_packed, open_packed, packed_splits
from sskt.teacher_cache.targets.registry import (
    TARGETS,
    default_policy,
    is_function,
    is_manifest,
    is_own,
    is_packed,
)
from sskt.teacher_cache.targets.spec import DatasetSpec, named_like

Progress = Callable[[int, int], None]


def load_target(spec: DatasetSpec, progress: Progress = lambda done, total: None) -> Target:
    """Opens a known target, a folder, a manifest, packed files or an own target.

    The last is what ``FILE.py:function`` returns, called with the name of the split if it takes an
    argument. A label set does not record that file. The frames of every clip are counted, once
    (``file_index.py``).

    Args:
        spec: The dataset.
        progress: Called with the number of files read, and of all.

    Returns:
        The target, limited and with its default view policy.

    Raises:
        UnknownName: If the target or the split is not known.
        MissingData: If files are missing; the message has the expected layout.
        InputError: If a file that describes the dataset is wrong, or the function fails.
    """
    if is_function(spec.target):
        return _from_function(spec)
    if is_packed(spec.target):
        target = open_packed(spec, progress)
    elif is_own(spec.target):
        target = (open_manifest if is_manifest(spec.target) else open_folder)(spec)
    else:
        lacking = spec.lacking_data()
        if lacking and spec.root is None:
            raise MissingData(lacking)
        info = TARGETS[spec.target]
        if spec.split not in info.splits:
            raise UnknownName(f"split of {spec.target}", spec.split, info.splits)
        module, _, function = info.loader.partition(":")
        target = getattr(importlib.import_module(module), function)(spec)
    target = target.limited(spec.limit)
    policy = default_policy(spec.target, clips=target.clips)
    target = replace(target, provenance=spec.provenance(), policy=policy)
    if target.clips:
        from sskt.teacher_cache.targets.files.file_index import count_clips

        target = count_clips(target, progress)
    if spec.strict and target.paths is not None:
        from sskt.teacher_cache.targets.files.file_index import hash_contents

        target = replace(target, contents=hash_contents(target, progress))
    elif spec.strict and is_packed(spec.target):
        target = replace(target, contents=hash_packed(target, progress))
    return target


def _from_function(spec: DatasetSpec) -> Target:
    what = f"--target {spec.target}"
    target = _opened(spec.target, spec.split, hash_of_file(spec.target, what))
    if not isinstance(target, Target):
        raise InputError(
            f"{what} returned {type(target).__name__}; return what sskt.open_target returns"
        )
    if target.split != spec.split:
        raise InputError(
            f"{what} opened the split {target.split}, not {spec.split}; let the function take the "
            "name of a split"
        )
    more = {} if spec.limit is None else {"limit": spec.limit}
    return replace(target.limited(spec.limit), provenance={**target.provenance, **more})


@functools.lru_cache(maxsize=4)
def _opened(text: str, split: str, code: str) -> Any:
    """What the function of a file returned; a dataset is read through only once a process."""
    what = f"--target {text}"
    function = find_function(text, what)
    return called(function, what, *([split] if takes_split(function) else []))


def takes_split(function: Callable[..., Any]) -> bool:
    """Whether a function that opens a target takes the name of a split."""
    return bool(inspect.signature(function).parameters)


def policy_of(target: Target) -> str:
    """The default view policy of an opened target."""
    return target.policy or default_policy(target.name, clips=target.clips)


def evaluation_split(spec: DatasetSpec) -> str:
    """The split that accuracy is measured on, if ``spec`` is the one that is trained on.

    Raises:
        MissingData: If the user's folder or manifest has no test or val split.
        InputError: If the split that is trained on holds it.
    """
    name, split = spec.target, spec.split
    if is_function(name):
        if takes_split(find_function(name, f"--target {name}")):
            return "test"
        raise MissingData(
            f"--target {name} takes no argument, so it opens one split only; let it take the "
            "name of a split, or train without evaluation: --test-split none"
        )
    if name in TARGETS:
        evaluation = TARGETS[name].evaluation
        if split == f"train{evaluation}":
            raise InputError(
                f"{name} {split} holds {evaluation}, the split that accuracy is measured on; take "
                "--split train, or train without evaluation: --test-split none"
            )
        fold = split.removeprefix("train")
        return evaluation + fold if evaluation + fold in TARGETS[name].splits else evaluation
    if is_manifest(name) or is_packed(name):
        splits = (packed_splits if is_packed(name) else manifest_splits)(spec)
        found = [s for s in ("test", "val", "validation") if s in splits]
        found += [s for s in ("test", "val") if named_like(s, splits)]
    else:
        found = [s for s in ("test", "val", "validation") if (Path(name) / s).is_dir()]
        found += [s for s in ("test", "val") if find_split(Path(name), s)]
    if found:
        return found[0]
    if is_packed(name):
        raise MissingData(
            f"{name} has no split test or val, only {', '.join(splits)}; name one with "
            "--test-split, or train without evaluation: --test-split none"
        )
    lacking = "rows of a split test or val" if is_manifest(name) else "test or val folder"
    raise MissingData(
        f"no {lacking} in {name}; add {'some' if is_manifest(name) else 'one'}, or train without "
        "evaluation: --test-split none"
    )
