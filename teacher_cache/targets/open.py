"""Opens a dataset as a target."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.folder import find_split, open_folder
from sskt.teacher_cache.targets.manifest import manifest_splits, open_manifest
from sskt.teacher_cache.targets.registry import TARGETS, default_policy, is_manifest, is_own
from sskt.teacher_cache.targets.spec import DatasetSpec, named_like

Progress = Callable[[int, int], None]


def load_target(spec: DatasetSpec, progress: Progress = lambda done, total: None) -> Target:
    """Opens a known target, a folder of class folders, or a CSV or Parquet manifest.

    The frames of every clip are counted, once (``file_index.py``).

    Args:
        spec: The dataset.
        progress: Called with the number of files read, and of all.

    Returns:
        The target, limited and with its default view policy.

    Raises:
        UnknownName: If the target or the split is not known.
        MissingData: If files are missing; the message has the expected layout.
        InputError: If a file that describes the dataset is wrong.
    """
    if is_own(spec.target):
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
    return target


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
    if name in TARGETS:
        evaluation = TARGETS[name].evaluation
        if split == f"train{evaluation}":
            raise InputError(
                f"{name} {split} holds {evaluation}, the split that accuracy is measured on; take "
                "--split train, or train without evaluation: --test-split none"
            )
        fold = split.removeprefix("train")
        return evaluation + fold if evaluation + fold in TARGETS[name].splits else evaluation
    if is_manifest(name):
        splits = manifest_splits(spec)
        found = [s for s in ("test", "val", "validation") if s in splits]
        found += [s for s in ("test", "val") if named_like(s, splits)]
    else:
        found = [s for s in ("test", "val", "validation") if (Path(name) / s).is_dir()]
        found += [s for s in ("test", "val") if find_split(Path(name), s)]
    if found:
        return found[0]
    lacking = "rows of a split test or val" if is_manifest(name) else "test or val folder"
    raise MissingData(
        f"no {lacking} in {name}; add {'some' if is_manifest(name) else 'one'}, or train without "
        "evaluation: --test-split none"
    )
