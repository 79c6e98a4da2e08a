"""Opening what a label set was made from: its target, its views and its source.

A label set says in its provenance how it was made. Anyone who writes a cache, or runs a label
server, chooses these words, and they are no part of the digest. So they never choose code, nor a
file that is opened as a program: a known network is opened as recorded, a user's network, target
or frame sampling only from the file that the person at the keyboard names (``Reopen``), and a
file whose SHA-256 is in the spec only if it has that SHA-256, which is compared before it is run.
What was opened is then compared with the spec.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sskt.teacher_cache.errors import CorruptStore, InputError
from sskt.teacher_cache.format.features import output_text
from sskt.teacher_cache.format.spec import label_set_spec, parents_of, require
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.own_code import call_function
from sskt.teacher_cache.sources.names import (
    NETWORK_FILES,
    SourceName,
    parse_source,
    source_name,
)
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.open import load_target
from sskt.teacher_cache.targets.registry import TARGETS, is_function, is_of_hub
from sskt.teacher_cache.targets.spec import DatasetSpec
from sskt.teacher_cache.views.frame_sampling import IDENTITY, FrameSampling, parse_frame_sampling
from sskt.teacher_cache.views.policies import POLICIES, Policy, parse_policy, proposed_policy
from sskt.teacher_cache.views.views import Views, open_views

if TYPE_CHECKING:  # the targets of label sets are opened without torch
    from sskt.teacher_cache.sources.source import Source


@dataclass(frozen=True)
class Reopen:
    """What the person who runs a command gave for opening a label set's target and source.

    Attributes:
        target: Target to open instead of the recorded one; ``FILE.py:function`` calls a function
            that returns what ``sskt.open_target`` returned.
        root: Folder of the target's data instead of the recorded one.
        sources: ``--source`` arguments, of which the one with the source's name is taken. Without
            one, only a known network is opened. A function of ``NAME=FILE.py:function`` returns
            the network, or, for labels that were made from Python, what ``sskt.freeze`` returned.
        weights: The weights file of a known architecture, or a folder that contains the recorded
            one.
        frame_sampling: ``FILE.py:function``, for a set whose stills were chosen by such a function.
        policy: ``FILE.py:function``, for a set whose views were made by such a function.
        device: Device of the source.
        allow_outside_root: Whether a manifest may name files outside its folder.
    """

    target: str | None = None
    root: Path | None = None
    sources: Sequence[str] = ()
    weights: Path | None = None
    frame_sampling: str | None = None
    policy: str | None = None
    device: str = "cpu"
    allow_outside_root: bool = False


def require_named_sources(instead: Reopen, label_sets: Sequence[LabelSet]) -> None:
    """Raises ``InputError`` for a ``--source`` that is none of the label sets' sources."""
    known = {str(label_set.spec["source"]["name"]) for label_set in label_sets}
    for text in instead.sources:
        if source_name(text) not in known:
            raise InputError(
                f"--source {text}: no label set of source {source_name(text)} was chosen; the "
                f"chosen ones are of {', '.join(sorted(known))}"
            )


def reopen(label_set: LabelSet, instead: Reopen) -> tuple[Views, Source]:
    """Opens the views and the source that a label set was made from.

    Args:
        label_set: The label set. What its provenance says is not trusted.
        instead: What the person who asks gave.

    Returns:
        The views, and the source.

    Raises:
        SpecMismatch: If what is opened now is not what the labels were made from. A user's file
            with another SHA-256 than the spec's was not run.
        InputError: If a file is needed that the person did not name.
        MissingData: If a file, a package or a download is missing.
    """
    views = reopen_views(label_set, instead)
    source = reopen_source(label_set, instead)
    require(label_set_spec(views, source, label_set.encoding), label_set.spec, label_set.name)
    return views, source


def reopen_source(label_set: LabelSet, instead: Reopen) -> Source:
    """Opens the source that a label set names. See ``reopen``, which also compares it."""
    from sskt.teacher_cache.sources.outputs import parse_outputs
    from sskt.teacher_cache.sources.registry import open_source
    from sskt.teacher_cache.sources.source import with_output

    spec = label_set.spec["source"]
    if parents_of(label_set.spec):
        raise InputError(
            f"label set {label_set.name} is the mean of other label sets and has no network of its "
            "own; make it with sskt export --mean"
        )
    given = [text for text in instead.sources if source_name(text) == spec["name"]]
    if len(given) > 1:
        raise InputError(f"--source names {spec['name']} {len(given)} times; give it once")
    text = given[0] if given else _text(label_set, "source")
    if not text:
        raise InputError(
            f"label set {label_set.name} does not record how its source is opened; give a file "
            f"with --source {spec['name']}=FILE.py:function, whose function returns what "
            "sskt.freeze returned"
        )
    wanted = parse_source(text)
    if not given and (wanted.file is not None or wanted.module):
        raise InputError(
            f"label set {label_set.name} was made by code of a user ({spec['arch']}), and code "
            f"that a label set names is not run; give --source {_proposal(spec)}"
        )
    if wanted.factory and wanted.file is not None and _was_frozen(spec):
        return with_output(_frozen_source(wanted, spec), output_text(label_set.spec))
    return open_source(
        wanted,
        weights=None if wanted.file or wanted.module else _weights(label_set, instead),
        preprocessing=_text(label_set, "preprocessing"),
        precision=spec["precision"],
        device=instead.device,
        batchnorm=spec["batchnorm"],
        code=str(spec.get("code") or "none"),
        outputs=parse_outputs(str(spec.get("outputs") or _text(label_set, "logits_are"))),
        output=output_text(label_set.spec),
    )


def _proposal(spec: dict[str, Any]) -> str:
    name, arch = str(spec["name"]), str(spec["arch"])
    if arch.endswith(NETWORK_FILES):
        return f"{name}=FILE, the file {arch}"
    stem, _, function = arch.rpartition(":")
    return f"{name}=FILE.py:{function or 'function'}" + (f", the file {stem}.py" if stem else "")


def _was_frozen(spec: dict[str, Any]) -> bool:
    """Whether ``sskt.freeze`` made the source: then its arch is a class and its code no file."""
    arch = str(spec["arch"])
    return ":" not in arch and "." in arch and "/" not in arch and not arch.endswith(NETWORK_FILES)


def _frozen_source(wanted: SourceName, spec: dict[str, Any]) -> Source:
    """The source that a user's function makes with ``sskt.freeze``.

    Its class has the module's name in the spec, which is another one when a file is run by its
    path: only the class's own name is compared, and the caller compares the rest.
    """
    from sskt.teacher_cache.sources.source import Source

    source = call_function(f"{wanted.file}:{wanted.factory}", f"source {wanted.name}")
    if not isinstance(source, Source):
        raise InputError(
            f"source {wanted.name}: {wanted.file}:{wanted.factory} returned "
            f"{type(source).__name__}; return what sskt.freeze returned when the labels were made"
        )
    class_name = type(source.network).__qualname__
    return replace(source, arch=spec["arch"]) if spec["arch"].endswith(f".{class_name}") else source


def _weights(label_set: LabelSet, instead: Reopen) -> Path | None:
    """The weights file of a known architecture; None for its published weights.

    A recorded path is read only where the person who asks pointed.
    """
    given, recorded = instead.weights, _text(label_set, "weights")
    if given is not None and not given.is_dir():
        return given
    if not recorded:
        return None
    path = Path(recorded)
    if given is not None and path.resolve().is_relative_to(given.resolve()):
        return path
    if given is not None and (given / path.name).is_file():
        return given / path.name
    raise InputError(
        f"label set {label_set.name} was made with weights of its own ({recorded}), and a path "
        "that a label set names is not opened; give --weights FILE, or the folder of that file"
    )


def reopen_views(label_set: LabelSet, instead: Reopen) -> Views:
    """Opens the views that a label set was made over.

    Raises:
        SpecMismatch: If they are not the same now.
        InputError: If the frame sampling is a user's function, and its file was not given.
    """
    target = reopen_target(label_set, instead)
    views = open_views(
        target,
        reopen_policy(label_set, instead.policy),
        _frame_sampling(label_set, instead, clips=target.clips),
    )
    require({"views": views.identity()}, label_set.spec, label_set.name)
    return views


def _frame_sampling(label_set: LabelSet, instead: Reopen, *, clips: bool) -> FrameSampling | None:
    if not clips:
        return None
    name, _, code = str(label_set.spec["views"].get("f_s", IDENTITY.name)).partition("@")
    if not code:
        return parse_frame_sampling(name)
    if instead.frame_sampling is None:
        raise InputError(
            f"label set {label_set.name} has stills chosen by a function of a user ({name}), and "
            f"code that a label set names is not run; give --frame-sampling FILE.py:"
            f"{name.rpartition(':')[2]}, the file {name.rpartition(':')[0]}"
        )
    return parse_frame_sampling(instead.frame_sampling, code=code)


def reopen_target(label_set: LabelSet, instead: Reopen) -> Target:
    """Opens the samples that a label set was made over.

    Raises:
        SpecMismatch: If they are not the same now.
        InputError: If the target is an own dataset, and its file was not given.
    """
    spec, provenance = label_set.spec, _provenance(label_set)
    recorded = _text(label_set, "target")
    if is_function(recorded) or is_of_hub(recorded):
        recorded = ""  # a label set chooses neither code nor what is downloaded
    if instead.target and is_function(instead.target):
        target = load_target(
            DatasetSpec(instead.target, spec["target"]["split"], limit=provenance.get("limit"))
        )
    else:
        name, root = str(spec["target"]["name"]), _text(label_set, "root")
        text = instead.target or recorded or (name if name in TARGETS else "")
        if not text:
            raise InputError(
                f"label set {label_set.name} does not record how its target ({name}) is opened; "
                "give --target, for an own dataset as FILE.py:function, whose function returns "
                "what sskt.open_target returned"
            )
        target = load_target(
            DatasetSpec(
                text,
                spec["target"]["split"],
                root=instead.root or root or None,
                limit=provenance.get("limit"),
                partial=bool(provenance.get("partial")),
                decoder=spec["views"].get("decoder", "pyav"),
                strict=bool(provenance.get("strict")),
                columns=_text(label_set, "columns"),
                label_separator=_text(label_set, "label_separator"),
                # Only the user may allow it, as a label set could name any file of the machine.
                allow_outside_root=instead.allow_outside_root,
            )
        )
    target = open_views(target, reopen_policy(label_set, instead.policy)).target
    require({"target": target.identity()}, spec, label_set.name)
    return target


def reopen_policy(label_set: LabelSet, given: str | None = None) -> Policy:
    """The view policy of a label set.

    Args:
        label_set: The label set. Code that it names is not run.
        given: ``FILE.py:function`` of the person who asks, for a policy of the user. It is not
            looked at for a known policy.

    Raises:
        CorruptStore: If this version does not know the policy, or its parameters are out of range.
        InputError: If it is code, and was not given.
        SpecMismatch: If it is another file than the one that made the labels; it was not run.
    """
    views = label_set.spec["views"]
    name, version = views["policy"], views["version"]
    if given is not None and (views.get("code") or name not in POLICIES):
        return parse_policy(given, str(views.get("code", "")))
    if views.get("code") and name not in POLICIES:
        raise InputError(
            f"label set {label_set.name} has views of a policy of the user ({name}), and code that "
            f"a label set names is not run; give --policy {proposed_policy(views)}"
        )
    if name not in POLICIES or version not in range(1, POLICIES[name].version + 1):
        raise CorruptStore(
            f"label set {label_set.name} has views of policy {name}, version {version}, which this "
            "version of sskt does not know; update sskt"
        )
    parameters = dict(views["parameters"])
    if POLICIES[name].identity:
        return Policy(name, version, parameters, POLICIES[name])
    newest = {"version": version} if POLICIES[name].version > 1 else {}
    text = ",".join(f"{key}={value}" for key, value in (parameters | newest).items())
    with contextlib.suppress(InputError):
        policy = parse_policy(f"{name}:{text}")
        if policy.parameters == parameters:
            return policy
    raise CorruptStore(
        f"label set {label_set.name} has views of policy {name} with parameters out of their "
        "ranges; it is damaged: delete it, and cache its labels again"
    )


def _provenance(label_set: LabelSet) -> dict[str, Any]:
    """How a set was made, as it says itself; stored under the key ``made``."""
    provenance = label_set.attributes.get("made", {})
    limit = provenance.get("limit") if isinstance(provenance, dict) else ""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise CorruptStore(f"label set {label_set.name}: its provenance ('made') is damaged")
    return dict(provenance)


def _text(label_set: LabelSet, key: str) -> str:
    value = _provenance(label_set).get(key)
    if value is not None and not isinstance(value, str):
        raise CorruptStore(f"label set {label_set.name}: 'made.{key}' is no text; it is damaged")
    return value or ""
