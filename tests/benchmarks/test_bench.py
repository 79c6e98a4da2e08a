"""``sskt bench``: a quick run from beginning to end, and what it does about what is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from sskt.benchmarks import bench, common
from sskt.benchmarks.bench import COMPARISONS, chosen, number, table
from sskt.benchmarks.common import Row, interleaved, paired_ratio, report, sized
from sskt.benchmarks.figures import draw
from sskt.teacher_cache.errors import InputError, UnknownName

Sskt = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_a_quick_run_writes_results_a_table_and_figures(
    sskt: Sskt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the comparison that needs no training, with generated data."""
    monkeypatch.setattr(common, "real_data", lambda: None)
    monkeypatch.setattr(bench, "real_data", lambda: None)
    status, out, err = sskt("bench", "labels", "--out", tmp_path)
    assert status == 0 and "labels: ways of storing labels" in err
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["full"] is False and document["data"] == "generated images"
    machine = document["machine"]
    assert machine["cores"] >= 1 and machine["torch"] and machine["memory_gib"] > 0
    first = out.splitlines()[0]
    assert f"{machine['cores']} cores" in first and machine["torch"] in first
    (entry,) = document["comparisons"]
    cases = {row["name"].rpartition(": ")[0] for row in entry["results"]}
    assert len([c for c in cases if c.startswith("sskt")]) >= 4
    assert any("TinyViT" in c for c in cases) and any("FKD" in c for c in cases)
    values = {row["name"]: row["value"] for row in entry["results"]}
    assert all(v > 0 for name, v in values.items() if "read" in name or "stored" in name)
    assert all(case.split()[-1] in out for case in cases)
    ElementTree.parse(tmp_path / "bench-labels.svg")
    assert f"wrote {tmp_path / 'bench-labels.svg'}" in err


def fake(name: str, run: Callable[[], None]) -> Any:
    module = ModuleType(name)
    module.main = run  # type: ignore[attr-defined]
    return module


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """Comparisons of the test, by name, in place of the real ones."""
    found: dict[str, Callable[[], None]] = {}

    class Known(dict[str, Any]):
        def add(self, name: str, run: Callable[[], None], quick: bool) -> None:
            monkeypatch.setitem(sys.modules, f"made_{name}", fake(name, run))
            self[name] = (f"made_{name}", f"about {name}", quick)

    known = Known()

    def measured() -> None:
        rows: list[Row] = [("one: read", 1234.5, "labels/s"), ("one: stored", 2, "B")]
        report("title", [*rows, ("two: read", 0.12345, "labels/s")], {"size": sized(100, 3)})

    def without_peer() -> None:
        common.note_absent("lmdb", "pip install 'sskt[bench]'")
        report("title", [("three", 1.0, "x")], {})

    def failing() -> None:
        raise ZeroDivisionError("division by zero")

    def lacking() -> None:
        raise InputError("nginx is not installed")

    known.add("measured", measured, True)
    known.add("peerless", without_peer, True)
    known.add("failing", failing, False)
    known.add("lacking", lacking, False)
    monkeypatch.setattr(bench, "COMPARISONS", known)
    return found


def test_quick_and_full(sskt: Sskt, comparisons: object) -> None:
    status, out, _ = sskt("bench", "--json")
    document = json.loads(out)
    assert status == 0
    assert [c["name"] for c in document["comparisons"]] == ["measured", "peerless"]
    assert document["comparisons"][0]["settings"] == {"size": 3}
    status, out, _ = sskt("bench", "--full", "--json")
    document = json.loads(out)
    assert status == 1 and document["full"]  # one of them fails
    assert len(document["comparisons"]) == 4
    assert document["comparisons"][0]["settings"] == {"size": 100}


def test_what_fails_or_is_lacking_is_named_and_the_others_go_on(
    sskt: Sskt, comparisons: object
) -> None:
    status, out, err = sskt("bench", "--full")
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert status == 1
    assert ["measured", "one", "read 1,234 labels/s, stored 2 B"] in lines
    assert ["measured", "two", "read 0.123 labels/s"] in lines
    assert "ZeroDivisionError: division by zero" in out and "nginx is not installed" in out
    assert "left out: lmdb is not installed; run: pip install 'sskt[bench]'" in out
    assert sskt("bench", "lacking")[0] == 0  # left out, not failed
    assert "failing: about failing" in err


def test_an_unknown_comparison_is_bad_input(sskt: Sskt) -> None:
    status, _, err = sskt("bench", "lables")
    assert status == 2 and "lables" in err and "labels" in err


def test_comparisons_are_chosen_in_one_order() -> None:
    assert chosen([], full=True) == list(COMPARISONS)
    assert set(chosen([], full=False)) < set(COMPARISONS)
    assert chosen(["step", "labels"], full=False) == ["labels", "step"]
    with pytest.raises(UnknownName):
        chosen(["nothing"], full=False)


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from sskt.benchmarks import labels

    monkeypatch.setitem(sys.modules, "lmdb", None)
    run = common.Run(True, Path())
    with common.running(run):
        found = labels.ways()
    assert run.absent.keys() == {"lmdb"} and "[bench]" in run.absent["lmdb"]
    assert "LMDB, float16" not in found and "np.memmap, float16" in found


def test_ways_run_in_turn_and_ratios_are_of_one_round() -> None:
    order: list[str] = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [len(s) for s in seconds.values()] == [3, 3]
    assert paired_ratio([2.0, 8.0, 3.0], [1.0, 2.0, 1.0]) == 3.0


def test_numbers_of_the_table() -> None:
    assert [number(v) for v in (1234.5, 12, 0.012345, 99.96)] == ["1,234", "12", "0.0123", "100"]


def test_figures_are_drawn_of_what_was_measured_only(tmp_path: Path) -> None:
    results = [
        {"name": f"{n:,} samples: {what}", "value": v * n, "unit": "s"}
        for n in (1000, 10000)
        for what, v in (("read in", 1e-4), ("peak memory", 1e-2))
    ]
    ratio = [{"name": "case: plain / ours", "value": 1.2, "unit": "x"}]
    document = {"comparisons": [
        {"name": "scale", "results": results}, {"name": "step", "results": ratio},
    ]}  # fmt: skip
    found = draw(document, tmp_path)
    assert [p.name for p in found] == ["bench-ratios.svg", "bench-scale.svg"]
    for path in found:
        ElementTree.parse(path)
    first = [p.read_bytes() for p in found]
    assert [p.read_bytes() for p in draw(document, tmp_path)] == first
    assert draw({"comparisons": []}, tmp_path) == []
    assert table({"comparisons": [{"name": "n", "results": ratio}]}) == [
        ["n", "case", "plain / ours 1.2 x"]
    ]
