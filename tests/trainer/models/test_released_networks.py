"""Our networks against the paper's released ones: parameter counts and outputs.

golden/networks.json was made from the released modules by released_networks.py, not from ours. On
both sides every parameter and buffer has a value that depends on its canonical name alone, not on
the order of names or on a generator's state: the SHA-256 of the name seeds raw bits, which become
uniform numbers in the range that suits the parameter (``released_networks.value``). Canonical
names are those of torchvision's ResNets (``layer2.0.bn1.weight``); auxiliary heads are called
``SOURCE.branch2.3.weight`` and ``SOURCE.fc.weight``. ``canonical`` maps our names to them. A
parameter too few, too many or of another shape therefore changes the outputs or has no name.

Networks run in float64 and eval mode, with BatchNorm statistics that are not 0 and 1. Outputs are
the first two logits of two samples and mean and standard deviation over all of them; they have to
agree to TOLERANCE times the largest of them. The ten digits that the file keeps leave 5e-10, and
even the eps of one BatchNorm in each block, made ten times smaller, changes more than TOLERANCE.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.released_networks import CASES, CLASSES, ORIGIN, SOURCES, Case, fill, summary, uniform
from torch import Tensor

from sskt.trainer.models.base import Features, parameters_of
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.registry import build_network

GOLDEN: dict[str, Any] = json.loads(
    Path(__file__).parents[2].joinpath("golden").joinpath("networks.json").read_text()
)
TOLERANCE = 1e-6
SLOW = ("resnet101", "resnet152", "resnet3d18-a", "resnet3d34", "resnet3d50")
"""How the cases begin that take longest; shallower ones run the same code."""


def build(case: Case, *, tm: bool) -> SSKTNetwork:
    """Our network, its parameters without values."""
    with torch.device("meta"):
        target = build_network(
            case.name, CLASSES, stem="auto", shortcut=case.shortcut, size=case.shape[2]
        )
        return SSKTNetwork(target, SOURCES, tm=tm)


def canonical(key: str) -> str:
    key = re.sub(r"^target\.(body\.)?", "", key)
    key = re.sub(r"^stages\.(\d)", lambda found: f"layer{int(found[1]) + 1}", key)
    key = re.sub(r"^heads\.(\d)", lambda found: list(SOURCES)[int(found[1])], key)
    return re.sub(r"\.branches\.(\d)", lambda found: f".branch{int(found[1]) + 1}", key)


def test_the_file_says_where_its_values_come_from() -> None:
    assert GOLDEN["origin"] == ORIGIN
    assert {str(case) for case in CASES} <= GOLDEN.keys()


@pytest.mark.parametrize("tm", [False, True], ids=["linear", "tm"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameter_counts_are_those_of_the_released_networks(case: Case, tm: bool) -> None:
    network, head = build(case, tm=tm), "tm" if tm else "linear"
    rows = GOLDEN[str(case)]
    assert parameters_of(network.target) == rows["target"]["parameters"]
    for source, module in zip(network.sources, network.heads, strict=True):
        assert parameters_of(module) == rows[f"{source} {head}"]["parameters"], source


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=pytest.mark.slow if str(case).startswith(SLOW) else (), id=str(case)
        )
        for case in CASES
    ],
)
def test_outputs_are_those_of_the_released_networks(case: Case) -> None:
    network = build(case, tm=True).to_empty(device="cpu")
    plain = SSKTNetwork(network.target, SOURCES, tm=False)
    fill(network, {key: canonical(key) for key in network.state_dict()})
    fill(plain.heads, {key: canonical(f"heads.{key}") for key in plain.heads.state_dict()})
    pooled: list[Tensor] = []
    network.target.fc.register_forward_pre_hook(lambda module, inputs: pooled.extend(inputs))
    with torch.no_grad():
        primary, auxiliary = network.eval()(uniform("input", case.shape))
        found = {"target": primary} | {f"{source} tm": z for source, z in auxiliary.items()}
        for source, head in zip(plain.sources, plain.heads, strict=True):
            found[f"{source} linear"] = head(Features([], pooled[0]))
    rows = GOLDEN[str(case)]
    assert found.keys() == rows.keys()
    for name, z in found.items():
        wanted = rows[name]["outputs"]
        size = max(map(abs, wanted))
        assert summary(z) == pytest.approx(wanted, rel=0, abs=TOLERANCE * size), name
