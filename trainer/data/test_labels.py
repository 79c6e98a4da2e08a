"""Labels of the test split: what a plateau on the total loss needs beside those of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.format.features import SOFT_LABELS, output_text
from sskt.teacher_cache.format.spec import parents_of
from sskt.teacher_cache.label_sets.find import find_alike, require_seeds
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.sources.batchnorm import batch_of
from sskt.teacher_cache.sources.names import source_name
from sskt.teacher_cache.storage.base import Storage
from sskt.teacher_cache.storage.open import is_served
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.label_passes import cache_command, evaluation_pass


def find_test_sets(
    cache: Storage, config: TrainConfig, sets: Mapping[str, LabelSet], test: Views, *, ask: bool
) -> dict[str, LabelSet]:
    """Finds the labels of the test split that belong to those of the training split.

    Args:
        cache: Where the labels are.
        config: The configuration of the training.
        sets: The label sets that it trains from, by source.
        test: The views of the test split.
        ask: Whether a label server that computes on demand is to compute what is missing.

    Returns:
        A label set for each of ``sets``, of the same source, encoding and f_s.

    Raises:
        MissingData: If one is missing; the message has the command that makes it.
        IncompleteLabels: If one is there and not whole.
        InputError: If a label set of the training is a mean of others.
    """
    for label_set in sets.values():
        if parents_of(label_set.spec):
            raise InputError(
                f"--plateau-on total needs labels of the test split that are made as those of "
                f"training, and {label_set.name} is a mean of label sets; give --plateau-on primary"
            )
    found = {name: find_alike(cache, label_set, test) for name, label_set in sets.items()}
    lacking = [sets[name] for name, label_set in found.items() if label_set is None]
    if lacking:
        here = replace(config, cache="DIR") if is_served(cache) else config
        commands = " && ".join(_commands(here, lacking))
        where = f", where DIR is what {cache} serves" if is_served(cache) else ""
        raise MissingData(
            f"--plateau-on total needs labels of {test.target.name} {test.target.split} too, and "
            f"there are none of {', '.join(s.spec['source']['name'] for s in lacking)}; make them "
            f"with {commands}{where}, or give --plateau-on primary"
        )
    there = {name: label_set for name, label_set in found.items() if label_set is not None}
    for label_set in there.values():
        require_seeds(label_set, 1, ask=ask)
    return there


def _commands(config: TrainConfig, lacking: Sequence[LabelSet]) -> list[str]:
    """The ``sskt cache-teachers`` for the test split, one for all sets with the same options."""
    alike: dict[tuple[str, ...], list[LabelSet]] = {}
    for label_set in lacking:
        alike.setdefault(tuple(_shared_options(label_set)), []).append(label_set)
    typed = {source_name(text): text.partition("#")[0] for text in config.source}
    commands = []
    for shared, members in alike.items():
        sources, own = [], []
        for label_set in members:
            name, provenance = label_set.spec["source"]["name"], label_set.attributes["made"]
            sources.append(str(provenance.get("source") or typed[name]))
            for option, mark in (("weights", "="), ("preprocessing", ":"), ("logits-are", "=")):
                if value := provenance.get(option.replace("-", "_")):
                    own += [f"--{option}", f"{name}{mark}{value}"]
        commands.append(cache_command(evaluation_pass(config, sources), [*own, *shared]))
    return commands


def _shared_options(label_set: LabelSet) -> list[str]:
    """The options of ``sskt cache-teachers`` that hold for all of its sources."""
    source, provenance = label_set.spec["source"], label_set.attributes["made"]
    options = ["--encoding", label_set.encoding.option]
    if label_set.output != SOFT_LABELS:
        options += ["--output", output_text(label_set.spec)]
    if source["precision"] != "float32":
        options += ["--precision", str(source["precision"])]
    if batch := batch_of(source["batchnorm"]):
        options += ["--batchnorm", "batch", "--batch-size", str(batch)]
    if provenance.get("frame_sampling"):
        options += ["--frame-sampling", str(provenance["frame_sampling"])]
    return options
