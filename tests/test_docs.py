"""The pages name what exists, and CONTRIBUTING.md's examples of new parts work as printed."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.targets.registry import TARGETS
from sskt.teacher_cache.views.frame_sampling import parse_frame_sampling
from sskt.teacher_cache.views.policies import POLICIES, parse_policy
from sskt.teacher_cache.views.views import open_views
from sskt.trainer.losses import AUXILIARY, parse_loss
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.registry import build_network

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
RECORDS = ROOT / "docs/decisions"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")])
FOLDERS = ("teacher_cache", "trainer", "server", "cli", "tests", "docs", "benchmarks", "recipes")
SECTIONS = ("Status", "Context", "Decision", "Figures", "Consequences")


def links(text: str) -> list[str]:
    """Relative links of a page, without their anchors."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [link for link in found if "://" not in link]


def paths(text: str) -> list[str]:
    """Files and folders of the repository that a page names in backticks."""
    return re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_names_only_what_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    assert [link for link in links(text) if not (page.parent / link).exists()] == []
    if page.name != "CHANGELOG.md":
        assert [path for path in paths(text) if not (ROOT / path).exists()] == []


def test_links_and_paths_are_found() -> None:
    text = "[a](b.md) [c](d/e.md#f) [g](https://h) `docs/x.md` `cli/` `docs/c/0`"
    assert links(text) == ["b.md", "d/e.md"]
    assert paths(text) == ["docs/x.md", "cli/", "docs/c/0"]
    assert len(PAGES) > 30


def test_the_installation_page_has_every_extra() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    page = (ROOT / "docs/installation.md").read_text("utf-8")
    rows = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \|", page, re.M)
    shown = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted([*shown, "docs"]) == sorted(known["optional-dependencies"])


def test_every_record_is_complete_and_in_the_index() -> None:
    files = sorted(RECORDS.glob("0*.md"))
    index = re.findall(
        r"^\| \[(\d+)\. .*?\]\(([\w-]+\.md)\)", (RECORDS / "README.md").read_text(), re.M
    )
    assert index == [(str(n), file.name) for n, file in enumerate(files, 1)]
    for number, file in enumerate(files, 1):
        text = file.read_text("utf-8")
        assert text.startswith(f"# {number}. ")
        assert re.findall(r"^(?:## |\*\*)(\w+)(?=:\*\* |$)", text, re.M) == list(SECTIONS), (
            file.name
        )


def example(part: str) -> str:
    """The code of ``### A part`` in CONTRIBUTING.md."""
    found = re.search(
        rf"^### {part}$.*?^```python\n(.*?)^```", CONTRIBUTING.read_text(), re.M | re.S
    )
    assert found, f"no example of {part}"
    return found[1]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module for examples that register something; the tables are put back afterwards."""
    module = ModuleType("sskt_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tables: tuple[dict[str, Any], ...] = (TARGETS, POLICIES, AUXILIARY)
    before = [dict(table) for table in tables]
    yield module
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "example.py"


def test_the_example_of_a_target_and_a_policy(module: ModuleType) -> None:
    exec(example("A target"), module.__dict__)
    exec(example("A view policy"), module.__dict__)
    target = open_target("stripes")
    assert len(target) == 8 and target.label_text(1) == "vertical"
    views = open_views(target, parse_policy("quarter-turns"))
    image = target.read(0)
    seen = {views[0, seed].tobytes() for seed in range(20)}
    assert seen == {np.rot90(image, turns).tobytes() for turns in range(4)}


def test_the_example_of_a_source(file: Path) -> None:
    file.write_text(example("A source"))
    source = open_source(parse_source(f"mine={file}:build"))
    log_p = source.log_probabilities(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    assert log_p.shape == (2, 2) and torch.allclose(log_p.exp().sum(1), torch.ones(2))


def test_the_example_of_a_frame_sampling(file: Path) -> None:
    file.write_text(example("A frame sampling"))
    assert parse_frame_sampling(f"{file}:last").frames(16, 3, 0).tolist() == [15]


def test_the_example_of_a_target_network(file: Path) -> None:
    file.write_text(example("A target network"))
    target = build_network(f"{file}:build", 10, taps=("1", "3"), size=32)
    assert target.stage_widths == (8, 16)
    logits, auxiliary = SSKTNetwork(target, {"imagenet": 7}, tm=True)(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 10) and auxiliary["imagenet"].shape == (2, 7)


def test_the_example_of_a_loss(module: ModuleType) -> None:
    exec(example("A loss"), module.__dict__)
    assert parse_loss("ce+squared") == ("ce", "squared")
    p = torch.softmax(torch.arange(6.0).reshape(2, 3), 1)
    assert AUXILIARY["squared"](p.log(), p, 1.0, 2.0) == pytest.approx(0, abs=1e-12)
    uniform = AUXILIARY["squared"](torch.zeros(2, 3), p, 1.0, 2.0)
    assert uniform == pytest.approx(float((p - 1 / 3).square().sum() / 2))


def test_the_tests_of_the_promises_exist() -> None:
    text = (ROOT / "docs/promises.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 25
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text("utf-8"), f"{file}::{test}"


def test_troubleshooting_has_every_error() -> None:
    import sskt
    from sskt.teacher_cache import errors

    text = (ROOT / "docs/guides/troubleshooting.md").read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.M)
    known = [
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, errors.SsktError)
    ]
    assert sorted(listed) == sorted(known)
    public = {name for name in sskt.__all__ if name[0].isupper()}
    assert set(known) <= public
    api = (ROOT / "docs/reference/api.md").read_text("utf-8")
    missing = [n for n in sskt.__all__ if n != "__version__" and f"sskt.{n}\n" not in api]
    assert missing == []


def test_the_http_reference_is_that_of_the_server() -> None:
    import http_reference

    assert http_reference.PAGE.read_text("utf-8") == http_reference.page(), (
        "run: python docs/http_reference.py"
    )


def test_every_environment_variable_is_documented() -> None:
    """Those of nginx and compose are in the files that set them."""
    page = (ROOT / "docs/reference/environment.md").read_text("utf-8")
    code = [p for folder in FOLDERS[:4] for p in (ROOT / folder).rglob("*.py")]
    named = {v for path in code for v in re.findall(r"\bSSKT_[A-Z_]+\b", path.read_text("utf-8"))}
    assert {"SSKT_CACHE", "SSKT_TOKEN", "SSKT_HOME"} < named
    documented = set(re.findall(r"^\| (`.*?`) \|", page, re.M))
    assert {f"`{name}`" for name in named} <= documented
    own = {name for name in documented if name.startswith("`SSKT_")}
    assert own == {f"`{name}`" for name in named}
