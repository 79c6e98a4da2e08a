"""Chooses the label sets of a training, and follows them where the user left a choice open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sskt.teacher_cache.errors import InputError, MissingData, SpecMismatch
from sskt.teacher_cache.format.features import FEATURES
from sskt.teacher_cache.format.spec import canonical_json, parents_of
from sskt.teacher_cache.label_sets.find import is_of, only, readable_sets, replayed
from sskt.teacher_cache.locations import label_location
from sskt.teacher_cache.sources.names import SourceName, parse_source
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.storage.open import is_served, open_cache
from sskt.teacher_cache.targets.open import load_target, policy_of
from sskt.teacher_cache.targets.registry import default_policy, is_function, is_own, own_name
from sskt.teacher_cache.views.policies import (
    POLICIES,
    is_own_policy,
    parse_policy,
    proposed_policy,
    recorded_policy,
)
from sskt.teacher_cache.views.views import Views, open_views
from sskt.trainer.config import AUTO, CHOICES, TrainConfig
from sskt.trainer.data.caching_command import caching_command, sources_to_cache
from sskt.trainer.data.splits import dataset_of
from sskt.trainer.loss_inputs import fits, stated_auxiliary

if TYPE_CHECKING:
    from sskt.teacher_cache.label_sets.label_set import LabelSet
    from sskt.teacher_cache.targets.base import Target

Chosen = dict[str, "LabelSet"]
Difference = tuple[str, str]
"""A setting as given, and as the labels were made with."""


@dataclass(frozen=True)
class Wording:
    """How messages name settings: as options of ``sskt``, or as arguments of Python functions."""

    python: bool = False

    def __call__(self, name: str, value: object) -> str:
        """Returns ``--limit 5``, or ``limit=5``."""
        if self.python:
            return f"{'strict' if name == 'strict_fingerprint' else name}={value!r}"
        option = name.replace("_", "-")
        if isinstance(value, bool):
            return f"--{option}" if value else f"--no-{option}"
        return f"--{option} {value}"

    def make(self, config: TrainConfig, cache: CacheName, sources: Sequence[str]) -> str:
        """Returns the command or the call that makes the labels of a training."""
        if self.python:
            return "sskt.cache_teachers(target, sources, cache=...)"
        command = caching_command(config, sources, None)
        if is_served(cache):
            return f"{command} --cache DIR, where DIR is what {cache} serves"
        return command


def choose_label_sets(
    config: TrainConfig, cache: CacheName, usual: str = "", wording: Wording | None = None
) -> tuple[TrainConfig, Chosen]:
    """The label sets that a training reads, and the configuration that follows them.

    Where ``policy``, ``limit``, ``decoder``, ``partial`` or ``strict_fingerprint`` were not
    given, they become those of the label sets, if the sets of one group of views fit; of several
    groups, the one with the target's default policy and all samples is taken. Sources ``auto``
    are all sources of that group, without means of label sets that are in the cache too.

    Args:
        config: The configuration; its ``source`` is not empty.
        cache: Where the label sets are.
        usual: The default policy of the target; found by the target's name if it is empty.
        wording: How errors name settings; default: as options.

    Returns:
        The configuration with these fields filled in, and a label set by source name.

    Raises:
        MissingData: If a source has no labels of this target.
        SpecMismatch: If all label sets contradict options that were given; names the options.
        InputError: If several choices are left.
        CorruptStore: If a damaged label set may be one of those wanted.
    """
    wanted, say = _wanted(config), wording or Wording()
    sets = _of_target(config, cache, wanted)
    fitting = [s for s in sets if not contradictions(config, s, say)]
    if wanted is None:  # a mean beside its parents would count their labels twice
        there = {s.digest for s in fitting}
        fitting = [s for s in fitting if not there & parents_of(s.spec).keys()]
    groups: dict[str, dict[str, list[LabelSet]]] = {}
    for label_set in fitting:
        group = groups.setdefault(_views_of(label_set), {})
        name = label_set.spec["source"]["name"]
        if wanted is None or any(is_of(label_set, source) for source in wanted):
            group.setdefault(name, []).append(label_set)
    names = None if wanted is None else [source.name for source in wanted]
    complete = [g for g in groups.values() if g and all(n in g for n in names or ())]
    if not complete:
        raise _none_fits(config, cache, sets, fitting, names, say)
    preferred = [g for g in complete if _is_usual(config, next(iter(g.values()))[0], usual)]
    if len(complete) > 1 and len(preferred) != 1:
        raise _several_views(config, complete, say)
    (group,) = complete if len(complete) == 1 else preferred
    chosen = {name: only(name, group[name]) for name in names or sorted(group)}
    return _followed(config, next(iter(chosen.values())), chosen), chosen


def find_labels(
    target: Target, cache: CacheName | None, sources: Sequence[str] | None, policy: str = AUTO
) -> tuple[Views, Chosen]:
    """Finds the label sets of a target by the rules of ``sskt train``.

    Args:
        target: The samples.
        cache: Where the label sets are; None for the default.
        sources: Names of sources; None for all, empty for none.
        policy: View policy, or ``auto``.

    Returns:
        The target under the policy of the label sets, and a label set by source.

    Raises:
        MissingData: If a source has no labels of this target.
        SpecMismatch: If all label sets contradict the target or the policy.
        InputError: If several choices are left.
    """
    sets: Chosen = {}
    usual = policy_of(target)
    if sources is None or len(sources):
        place = label_location(cache).value if isinstance(cache, str | Path | None) else cache
        config = TrainConfig(
            target=target.name,
            split=target.split,
            limit=len(target),
            decoder=target.decoder or AUTO,
            strict_fingerprint=bool(target.contents),
            policy=policy,
            source=[AUTO] if sources is None else list(sources),
        )
        say = Wording(python=True)
        try:
            config, sets = choose_label_sets(config, open_cache(place), usual, say)
        except MissingData as error:
            what = " and ".join(sources) if sources else "any source"
            raise MissingData(
                f"no labels of {what} over {target.name} {target.split} in {place}; make them "
                f"with {say.make(config, place, ())}"
            ) from error
        policy = config.policy
    views = open_views(target, parse_policy(usual if policy == AUTO else policy))
    require_identity(views, sets)
    return views, sets


def require_identity(views: Views, chosen: Mapping[str, LabelSet]) -> None:
    """Checks that label sets were made over exactly these samples and views (any f_s).

    Raises:
        SpecMismatch: Names all differences.
    """
    for label_set in chosen.values():
        spec, target, seen = label_set.spec, views.target, replayed(views.identity())
        found: list[str] = []
        if spec["target"]["size"] != len(target):
            found.append(
                f"it has labels of {spec['target']['size']:,} samples, the data has {len(target):,}"
            )
        elif spec["target"]["fingerprint"] != target.fingerprint:
            found.append("the names, order or sizes of the files (or the pixels) have changed")
        elif spec["target"].get("contents", target.contents) != target.contents:
            found.append("the contents of the files have changed")
        if canonical_json(replayed(spec["views"])) != canonical_json(seen):
            found.append(f"its views are {replayed(spec['views'])}, these are {seen}")
        if found:
            raise SpecMismatch(
                f"label set {label_set.name} was not made from this data: {'; '.join(found)}; "
                "restore the data, or cache its labels again"
            )


def contradictions(config: TrainConfig, label_set: LabelSet, say: Wording) -> list[Difference]:
    """Settings that were given and that a label set was not made with, as (given, recorded)."""
    spec, provenance = label_set.spec, label_set.attributes["made"]
    found: list[Difference] = []
    size, whole = spec["target"]["size"], not provenance.get("limit")
    if config.limit is not None and size != config.limit and not (whole and size < config.limit):
        made_with = say("limit", size)
        if whole:
            leave_out = "limit" if say.python else "--limit"
            made_with += f" (all {size:,} samples; leave {leave_out} out)"
        found.append((say("limit", config.limit), made_with))
    if config.policy != AUTO and not _has_policy(label_set, config.policy):
        policy = parse_policy(config.policy)
        was = say("policy", _policy_text(spec["views"]))
        found.append((say("policy", str(policy)), was))
    decoder = spec["views"].get("decoder")
    if decoder is not None and config.decoder not in (AUTO, decoder):
        found.append((say("decoder", config.decoder), say("decoder", decoder)))
    if config.strict_fingerprint and not spec["target"].get("contents"):
        found.append((say("strict_fingerprint", True), say("strict_fingerprint", False)))
    loss = stated_auxiliary(config.loss)
    if loss and not fits(loss, label_set):
        headless = label_set.output == FEATURES and not label_set.classes
        made_with = say("output", label_set.output) + (" (without a head)" if headless else "")
        found.append((say("loss", config.loss), made_with))
    return found


def _wanted(config: TrainConfig) -> list[SourceName] | None:
    if config.source == [AUTO]:
        return None
    wanted = [parse_source(text, stored=True) for text in config.source]
    if len({source.name for source in wanted}) < len(wanted):
        raise InputError(f"each --source needs a name of its own, found {', '.join(config.source)}")
    return wanted


def _of_target(
    config: TrainConfig, cache: CacheName, wanted: list[SourceName] | None
) -> list[LabelSet]:
    name = config.target
    if is_function(name):
        name = load_target(dataset_of(config, config.split)).name
    elif is_own(name):
        name = own_name(name)
    return readable_sets(cache, {"name": name, "split": config.split}, wanted)


def _views_of(label_set: LabelSet) -> str:
    spec = label_set.spec
    return canonical_json({"target": spec["target"], "views": replayed(spec["views"])})


def _is_usual(config: TrainConfig, label_set: LabelSet, usual: str) -> bool:
    spec, provenance = label_set.spec, label_set.attributes["made"]
    usual = usual or default_policy(config.target, clips="decoder" in spec["views"])
    return _has_policy(label_set, usual) and (
        config.limit is not None or not provenance.get("limit")
    )


def _has_policy(label_set: LabelSet, policy: str) -> bool:
    views = label_set.spec["views"]
    return all(views.get(key) == value for key, value in parse_policy(policy).identity().items())


def _followed(config: TrainConfig, first: LabelSet, chosen: Mapping[str, LabelSet]) -> TrainConfig:
    spec, provenance = first.spec, first.attributes["made"]
    fields: dict[str, Any] = {}
    if not is_own_policy(config.policy):
        fields["policy"] = _policy_text(spec["views"])
        if is_own_policy(fields["policy"]):
            raise InputError(
                f"label set {first.name} has views of a policy of the user, and code that a label "
                f"set names is not run; give --policy {fields['policy']}"
            )
    if config.limit is None and provenance.get("limit"):
        fields["limit"] = int(spec["target"]["size"])
    if spec["views"].get("decoder"):
        fields["decoder"] = _decoder_text(spec["views"]["decoder"])
    if provenance.get("partial"):
        fields["partial"] = True
    if spec["target"].get("contents"):
        fields["strict_fingerprint"] = True
    if config.source == [AUTO]:
        fields["source"] = [f"{name}#{s.digest[:12]}" for name, s in chosen.items()]
    return replace(config, **fields)


def _decoder_text(name: object) -> str:
    """A label set's decoder as an option. Raises ``InputError``."""
    if name not in CHOICES["decoder"]:
        raise InputError(f"a label set names the decoder {name!r}, which is unknown; update sskt")
    return str(name)


def _policy_text(views: Mapping[str, Any]) -> str:
    """A label set's policy as an option. Raises ``UnknownName``, ``InputError``.

    Code that a label set names is not run: its name is not parsed.
    """
    if views.get("code") and views["policy"] not in POLICIES:
        return proposed_policy(views)
    options = ",".join(f"{key}={value}" for key, value in views["parameters"].items())
    version = "" if views["version"] == 1 else f"version={views['version']},"
    return str(parse_policy(recorded_policy(f"{views['policy']}:{version}{options}")))


def _none_fits(
    config: TrainConfig,
    cache: CacheName,
    sets: Sequence[LabelSet],
    fitting: Sequence[LabelSet],
    names: Sequence[str] | None,
    say: Wording,
) -> InputError:
    texts = dict(zip(names or (), config.source, strict=False))
    lacking = [n for n in texts if not any(is_of(s, _parsed(texts[n])) for s in sets)]
    if lacking or not sets:
        make = say.make(config, cache, [texts[n] for n in lacking] or sources_to_cache(config))
        what = " or ".join(_described(_parsed(texts[n])) for n in lacking)
        of = f"source {what}" if lacking else "any source"
        return MissingData(
            f"no labels of {of} over {config.target} {config.split} in {cache}; make them with: "
            f"{make}"
        )
    asked = [s for s in sets if not texts or any(is_of(s, _parsed(t)) for t in texts.values())]
    if not fitting or not any(s in fitting for s in asked):
        closest = min(asked, key=lambda s: len(contradictions(config, s, say)))
        found = contradictions(config, closest, say)
        typed, recorded = (" ".join(side) for side in zip(*found, strict=True))
        return SpecMismatch(
            f"label set {closest.name} was made with {recorded}, but {typed} was given; leave that "
            f"out to train from it, or make other labels with: "
            f"{say.make(config, cache, list(texts.values()) or sources_to_cache(config))}"
        )
    by_name = {s.spec["source"]["name"]: s for s in asked if s in fitting}
    short = [n for n in texts if n not in by_name]
    views = "; ".join(
        f"{name}: {say('policy', _policy_text(s.spec['views']))}, "
        f"{s.spec['target']['size']:,} samples"
        for name, s in by_name.items()
    )
    return SpecMismatch(
        f"the sources have no label sets over the same views ({views}"
        + (f"; {', '.join(short)}: none that fits the options" if short else "")
        + "); make them with: "
        + say.make(config, cache, list(texts.values()))
    )


def _several_views(
    config: TrainConfig, groups: Sequence[Mapping[str, Sequence[LabelSet]]], say: Wording
) -> InputError:
    choices = []
    for group in groups:
        label_set = next(iter(group.values()))[0]
        provenance, spec = label_set.attributes["made"], label_set.spec
        settings = [say("policy", _policy_text(spec["views"]))]
        settings += [say("limit", spec["target"]["size"])] if provenance.get("limit") else []
        if "decoder" in spec["views"]:
            settings.append(say("decoder", spec["views"]["decoder"]))
        text = (", " if say.python else " ").join(settings)
        choices.append(f"{text} ({', '.join(s.digest[:12] for v in group.values() for s in v)})")
    return InputError(
        f"label sets over several views of {config.target} {config.split} fit; choose with "
        f"{' or '.join(sorted(choices))}"
    )


def _parsed(text: str) -> SourceName:
    return parse_source(text, stored=True)


def _described(source: SourceName) -> str:
    return source.name + (f" ({source.recorded_arch})" if source.recorded_arch else "")
