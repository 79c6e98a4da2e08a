"""Data cards: Markdown and Croissant, the licence, and text of a label set that would do harm."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.random_labels import make_labels

from sskt.teacher_cache.label_sets.create import create_label_set, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.tools.card import croissant_card, license_of, markdown_card

Sskt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def made(tmp_path: Path) -> LabelSet:
    return make_labels(tmp_path / "cache", samples=20)


def head_of(card: str) -> dict[str, Any]:
    """The YAML head of a Markdown card."""
    _, head, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_a_card_says_what_the_set_is_and_keeps_the_licence(
    made: LabelSet, tmp_path: Path, sskt: Sskt
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "public" / "README.md"
    status, said, err = sskt(
        "card", "--cache", cache, "made", "--license", "CC-BY-4.0", "--out", out
    )
    assert status == 0 and f"wrote {out}" in said, err
    card = out.read_text()
    assert head_of(card)["license"] == "cc-by-4.0"
    assert head_of(card)["size_categories"] == ["n<1K"]
    assert made.digest in card and "20 samples" in card and "12 classes" in card
    kept = open_label_set(made.path)
    assert license_of(kept) == "CC-BY-4.0" and kept.digest == made.digest
    assert sskt("card", "--cache", cache, "made", "--license", "CC0-1.0")[0] == 0
    assert license_of(open_label_set(made.path)) == "CC0-1.0"
    assert sskt("verify", "--cache", cache)[0] == 0


def test_the_licence_travels(made: LabelSet, tmp_path: Path, sskt: Sskt) -> None:
    cache = tmp_path / "cache"
    assert sskt("copy", cache, tmp_path / "before")[0] == 0
    assert sskt("card", "--cache", cache, "made", "--license", "CC0-1.0")[0] == 0
    assert sskt("copy", cache, tmp_path / "before")[0] == 0
    assert sskt("copy", cache, tmp_path / "x.zip")[0] == 0
    assert (
        sskt("export", "--cache", cache, "made", "--encoding", "u8", "--out", tmp_path / "u8")[0]
        == 0
    )
    for copy in ("before", "x.zip", "u8"):
        status, card, _ = sskt("card", "--cache", tmp_path / copy, "made")
        assert status == 0 and head_of(card)["license"] == "cc0-1.0", copy
    status, _, err = sskt("card", "--cache", tmp_path / "x.zip", "made", "--license", "CC0-1.0")
    assert status == 2 and "is read-only" in err


@pytest.mark.parametrize("text", ["", "all rights reserved\n", "\x1b[2J", "-", "x" * 80])
def test_what_is_no_licence(made: LabelSet, tmp_path: Path, sskt: Sskt, text: str) -> None:
    status, _, err = sskt("card", "--cache", tmp_path / "cache", "made", "--license", text)
    assert status == 2 and "is not an SPDX identifier" in err and "\x1b" not in err


def test_croissant_is_valid(
    made: LabelSet, tmp_path: Path, sskt: Sskt, caplog: pytest.LogCaptureFixture
) -> None:
    url = "https://labels.example.org/made"
    out = tmp_path / "croissant.json"
    common = ("card", "--cache", tmp_path / "cache", "made", "--format", "croissant")
    assert sskt(*common, "--license", "CC0-1.0", "--url", url, "--out", out)[0] == 0
    document = json.loads(out.read_text())
    for key in ("@context", "@type", "conformsTo", "name", "description", "license", "url"):
        assert document[key], key
    (file,) = document["distribution"]
    assert file["contentUrl"] == f"{url}/zarr.json" and len(file["sha256"]) == 64
    croissant = pytest.importorskip("mlcroissant")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of rdflib, by mlcroissant
        found = croissant.Dataset(jsonld=str(out)).metadata
    assert not [record for record in caplog.records if "not standard" in record.message]
    assert found.name == made.name and found.license == ["https://spdx.org/licenses/CC0-1.0.html"]


def test_text_of_a_set_stays_text(made: LabelSet, tmp_path: Path) -> None:
    """In a head, a table, a document and a terminal."""
    harm = 'x\n---\nlicense: mine | <script> `rm` "\x1b[2J'
    spec = made.spec | {"source": made.spec["source"] | {"name": harm}}
    create_label_set(tmp_path / "odd", spec, made.classes, 1).close()
    (path,) = [p for p in (tmp_path / "odd").iterdir() if not p.name.startswith(".")]
    label_set = open_label_set(path)
    label_set.attributes["license"] = "x\nlicense: mine"
    card = markdown_card(label_set)
    assert "license" not in head_of(card) and "\x1b" not in card and "\n---\nlicense" not in card
    body = card.split("---\n", 2)[2]
    assert "<script>" not in body and "`rm`" not in body
    document = croissant_card(label_set)
    assert "\\u001b" not in document and json.loads(document)["name"] == label_set.name
