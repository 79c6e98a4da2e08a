"""Identity: the digest is stable, every field counts, a mismatch names the field."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import SpecMismatch
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.format.spec import (
    Spec,
    canonical_json,
    digest_of,
    first_difference,
    label_set_spec,
    name_of,
    require,
)
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views

SPEC: Spec = {
    "format": 1,
    "target": {"name": "été", "split": "train", "size": 3, "fingerprint": "sha256:ab"},
    "source": {"name": "imagenet", "arch": "resnet50", "precision": "float32"},
    "views": {"policy": "pad-crop-flip", "version": 1, "parameters": {"padding": 4}},
    "encoding": {"name": "f16"},
}
CANONICAL = (
    '{"encoding":{"name":"f16"},"format":1,'
    '"source":{"arch":"resnet50","name":"imagenet","precision":"float32"},'
    '"target":{"fingerprint":"sha256:ab","name":"\\u00e9t\\u00e9","size":3,"split":"train"},'
    '"views":{"parameters":{"padding":4},"policy":"pad-crop-flip","version":1}}'
)
DIGEST = "3f285f792f26eba6bddfe86c3f4b22bd296bb2bcfefa68c8f646792b4dd0fffa"


def changed(spec: Spec, dotted: str, value: Any) -> Spec:
    """A copy with one field set."""
    other = copy.deepcopy(spec)
    *parts, last = dotted.split(".")
    place = other
    for part in parts:
        place = place[part]
    place[last] = value
    return other


def leaves(spec: Spec, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in spec.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def another(value: Any) -> Any:
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value[:-1], value[-1] + 0.001]
    return value + 1


@pytest.fixture
def made(tiny: Source, images: Path) -> Spec:
    target = open_target(str(images))
    return label_set_spec(
        Views(target, parse_policy("random-resized-crop-flip")), tiny, parse_encoding("topk-5")
    )


def test_canonical_json_and_digest_are_pinned() -> None:
    assert canonical_json(SPEC) == CANONICAL
    assert digest_of(SPEC) == DIGEST == hashlib.sha256(CANONICAL.encode()).hexdigest()


def test_the_order_of_keys_and_a_round_trip_change_nothing(made: Spec) -> None:
    backwards = {key: made[key] for key in reversed(made)}
    assert digest_of(backwards) == digest_of(made)
    assert digest_of(json.loads(json.dumps(made, indent=2))) == digest_of(made)


def test_equal_runs_have_equal_specs(made: Spec, tiny: Source, images: Path) -> None:
    again = label_set_spec(
        Views(open_target(str(images)), parse_policy("random-resized-crop-flip:size=224")),
        tiny,
        parse_encoding("topk-5"),
    )
    assert again == made
    assert digest_of(again) == digest_of(made)


def test_a_spec_states_all_that_a_label_depends_on(made: Spec) -> None:
    assert {name for name, _ in leaves(made)} == {
        "format",
        "target.name",
        "target.split",
        "target.size",
        "target.fingerprint",
        "source.name",
        "source.arch",
        "source.weights",
        "source.code",
        "source.preprocessing.size",
        "source.preprocessing.mean",
        "source.preprocessing.std",
        "source.preprocessing.channels",
        "source.preprocessing.scale",
        "source.preprocessing.interpolation",
        "source.classes.count",
        "source.classes.sha256",
        "source.batchnorm",
        "source.precision",
        "views.policy",
        "views.version",
        "views.parameters.size",
        "views.parameters.scale_min",
        "views.parameters.scale_max",
        "views.parameters.ratio_min",
        "views.parameters.ratio_max",
        "views.f_s",
        "encoding.name",
        "encoding.decode",
        "encoding.k",
    }


def test_every_field_changes_the_digest_and_is_named(made: Spec) -> None:
    seen = {digest_of(made)}
    for field, value in leaves(made):
        other = changed(made, field, another(value))
        seen.add(digest_of(other))
        assert first_difference(made, other) == (field, value, another(value))
    assert len(seen) == 1 + len(list(leaves(made)))


def test_what_goes_in_comes_out(tiny: Source, images: Path) -> None:
    target = open_target(str(images))
    policy, encoding = parse_policy("none"), parse_encoding("f16")
    base = label_set_spec(Views(target, policy), tiny, encoding)

    def differs(
        target: Target = target, source: Source = tiny, policy: str = "none", encoding: str = "f16"
    ) -> str:
        other = label_set_spec(
            Views(target, parse_policy(policy)), source, parse_encoding(encoding)
        )
        difference = first_difference(base, other)
        assert difference is not None
        assert digest_of(other) != digest_of(base)
        return difference[0]

    how = tiny.preprocessing
    assert differs(target=open_target(str(images), "test")) == "target.split"
    assert differs(target=target.limited(30)) == "target.size"
    assert differs(target=target.chosen(np.arange(60)[::-1])) == "target.fingerprint"
    assert differs(source=replace(tiny, precision="bfloat16")) == "source.precision"
    assert differs(source=replace(tiny, classes=tiny.classes[::-1])) == "source.classes.sha256"
    assert differs(source=replace(tiny, code="sha256:0")) == "source.code"
    assert differs(source=replace(tiny, preprocessing=replace(how, size=17))) == (
        "source.preprocessing.size"
    )
    assert differs(policy="pad-crop-flip") == "views.policy"
    assert differs(encoding="u8") == "encoding.name"


def test_only_what_is_expected_is_compared_but_parameters_wholly() -> None:
    assert first_difference({"views": {"policy": "pad-crop-flip"}}, SPEC) is None
    assert first_difference({}, SPEC) is None
    more = changed(SPEC, "views.parameters.fill", 7)
    assert first_difference(SPEC, more) == ("views.parameters.fill", None, 7)
    assert first_difference(more, SPEC) == ("views.parameters.fill", 7, None)
    assert first_difference(SPEC, {"format": 1}) == ("target", SPEC["target"], None)


def test_a_mismatch_names_the_field_and_both_values() -> None:
    found = changed(SPEC, "views.parameters.padding", 2)
    with pytest.raises(SpecMismatch) as caught:
        require(SPEC, found, "somewhere")
    message = str(caught.value)
    assert "label set somewhere" in message
    assert "views.parameters.padding is 2, expected 4" in message
    require(SPEC, copy.deepcopy(SPEC), "somewhere")


def test_the_first_difference_is_the_one_named() -> None:
    found = changed(changed(SPEC, "encoding.name", "u8"), "target.split", "test")
    assert first_difference(SPEC, found) == ("target.split", "train", "test")


def test_the_name_is_safe_and_ends_in_the_digest() -> None:
    assert name_of(SPEC) == f"-t--train.imagenet-resnet50.{DIGEST[:12]}"
    wild = changed(SPEC, "target.name", "../a b/ü:*\n..")
    wild = changed(wild, "source.arch", "net.v2:build")
    name = name_of(wild)
    assert name == f"-a-b--train.imagenet-net-v2-build.{digest_of(wild)[:12]}"
    assert name.count(".") == 2
