"""Runs side by side: grouping, mean and spread, what stands out, the image and the page."""

from __future__ import annotations

import base64
import dataclasses
import decimal
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sskt.teacher_cache.errors import InputError, MissingData
from sskt.trainer.config import TrainConfig, config_json
from sskt.trainer.results.compare import T_975, Spread, compare, find_runs, judge
from sskt.trainer.results.groups import load_run, mean_std, result_of, short_names
from sskt.trainer.results.html import page
from sskt.trainer.results.plots import COLOURS

Call = Callable[..., tuple[int, str, str]]
SCRATCH = TrainConfig(target="cifar10", epochs=3)
TAUGHT = dataclasses.replace(SCRATCH, source=["imagenet:resnet50"], cache="labels", seeds=10)


def write_run(
    folder: Path,
    config: TrainConfig,
    top1: Sequence[float],
    labels: dict[str, dict[str, str]] | None = None,
    **more: Any,
) -> Path:
    """A run's folder as ``sskt train`` leaves it, with these test accuracies."""
    folder.mkdir(parents=True)
    seeds = config.seeds or config.epochs
    folder.joinpath("config.json").write_bytes(
        config_json(dataclasses.replace(config, out=folder, seeds=seeds), labels)
    )
    records = [
        {
            "epoch": epoch,
            "loss": 2.0,
            "loss_primary": 2.0 / (epoch + 1),
            "train_top1": 60.0 + epoch,
            "images": 100,
            "seconds": 2.0,
            "label_wait_seconds": 0.5,
            "test_loss": 1.5,
            "test_top1": value,
            **more,
        }
        for epoch, value in enumerate(top1)
    ]
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def seeds_of(folder: Path, config: TrainConfig, last: Sequence[float]) -> None:
    for seed, value in enumerate(last):
        own = dataclasses.replace(config, seed=seed, workers=seed)
        write_run(folder / f"{seed}", own, [10.0, value + 1, value])


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Scratch 50, 51, 52; alpha 0.1: 50.5, 51.5, 52.5; alpha 0.5 with TM: 60, 61, 62."""
    seeds_of(tmp_path / "study" / "b-scratch", SCRATCH, [50.0, 51.0, 52.0])
    weak = dataclasses.replace(TAUGHT, alpha=0.1)
    seeds_of(tmp_path / "study" / "a-weak", weak, [50.5, 51.5, 52.5])
    strong = dataclasses.replace(TAUGHT, alpha=0.5, tm=True)
    seeds_of(tmp_path / "study" / "c-strong", strong, [60.0, 61.0, 62.0])
    return tmp_path / "study"


@given(st.lists(st.floats(0, 100), min_size=2, max_size=8))
def test_mean_and_sample_standard_deviation(values: list[float]) -> None:
    mean, std = mean_std(values)
    assert mean == pytest.approx(float(np.mean(values)))
    assert std == pytest.approx(float(np.std(values, ddof=1)), abs=1e-9)
    assert mean_std(values[:1]) == (values[0], 0.0)


@pytest.mark.parametrize(
    ("last", "want"),
    [
        ({"test_top1": 1.0, "test_top5": 2.0}, 1.0),
        ({"test_map": 3.0, "test_ap": 4.0}, 4.0),
        ({"test_top1": 5.0, "test_video_top1": 6.0}, 6.0),
    ],
)
def test_a_run_s_result_is_its_last_evaluation(last: dict[str, float], want: float) -> None:
    first = dict.fromkeys(last, 99.0)
    assert result_of([first, last]) == want
    assert result_of([first, last, {"loss": 1.0}]) == want  # --eval-every leaves epochs out


def test_a_run_without_evaluation_has_no_result() -> None:
    with pytest.raises(InputError, match="--test-split"):
        result_of([{"loss": 1.0}])


def test_seeds_and_machines_make_one_group_and_configurations_several(study: Path) -> None:
    compared = compare(find_runs([study])[0])
    assert [g.name for g in compared.groups] == [
        "scratch",
        "imagenet, alpha 0.1",
        "imagenet, TM, alpha 0.5",
    ]
    assert [len(g.runs) for g in compared.groups] == [3, 3, 3]
    row = compared.rows[2]
    assert row.last["test_top1"] == Spread(61.0, 1.0, 3)
    assert row.best["test_top1"] == Spread(62.0, 1.0, 3)
    assert row.train == Spread(62.0, 0.0, 3)
    assert row.images_per_second == Spread(50.0, 0.0, 3)
    assert row.label_wait == Spread(25.0, 0.0, 3)
    assert not compared.warnings


def test_what_only_sources_read_does_not_part_runs_from_scratch(tmp_path: Path) -> None:
    write_run(tmp_path / "0", SCRATCH, [1.0, 2.0, 3.0])
    other = dataclasses.replace(SCRATCH, alpha=0.7, temperature=1.0, loss="ce+kd", seed=1)
    plain = dataclasses.replace(SCRATCH, loss="ce+ce", seed=2)
    write_run(tmp_path / "1", other, [1.0, 2.0, 4.0])
    write_run(tmp_path / "2", plain, [1.0, 2.0, 5.0])
    groups = compare(find_runs([tmp_path])[0]).groups
    assert sorted(len(g.runs) for g in groups) == [1, 2]  # auto may mean bce: not joined
    lr = dataclasses.replace(SCRATCH, lr=0.2)
    write_run(tmp_path / "3", lr, [1.0, 2.0, 4.0])
    assert len(compare(find_runs([tmp_path])[0]).groups) == 3


def test_runs_from_other_label_sets_are_other_runs(tmp_path: Path) -> None:
    """Sources and options may be equal where the labels are not, as with ``sskt export``."""
    stored = {"encoding": "f16", "digest": "12345678" + "0" * 56}
    coarse = {"encoding": "root4-coarse", "digest": "abcdef01" + "0" * 56}
    for seed in range(2):
        own = dataclasses.replace(TAUGHT, seed=seed)
        write_run(tmp_path / f"a{seed}", own, [1.0, 2.0, 3.0], {"imagenet": stored})
        write_run(tmp_path / f"b{seed}", own, [1.0, 2.0, 4.0], {"imagenet": coarse})
    write_run(tmp_path / "c", SCRATCH, [1.0, 2.0, 2.0])
    compared = compare(find_runs([tmp_path])[0])
    assert [g.name for g in compared.groups] == [
        "scratch",
        "imagenet, labels f16 12345678",
        "imagenet, labels root4-coarse abcdef01",
    ]
    assert [len(g.runs) for g in compared.groups] == [1, 2, 2] and not compared.warnings
    assert "root4-coarse abcdef01" in page(compared)


@pytest.mark.parametrize("sets", [[], "f16", {"imagenet": "f16"}, {"imagenet": {"digest": 1}}])
def test_damaged_label_sets_of_a_run_are_refused(tmp_path: Path, sets: Any) -> None:
    folder = write_run(tmp_path / "run", TAUGHT, [1.0])
    fields = json.loads((folder / "config.json").read_text())
    del fields["digest"]
    (folder / "config.json").write_text(json.dumps(fields | {"label_sets": sets}))
    with pytest.raises(InputError, match="is not a run's configuration: label_sets is"):
        find_runs([folder])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ([{}, {"source": []}], ["imagenet", "scratch"]),
        ([{"loss": "ce+kd"}, {"source": [], "loss": "ce+ce"}], ["imagenet", "scratch"]),
        (
            [{}, {"source": ["imagenet:resnet18@74"]}],
            ["imagenet:resnet50", "imagenet:resnet18@74"],
        ),
        ([{"temperature": 3.0}, {"temperature": 1.0}], ["imagenet, T 3", "imagenet, T 1"]),
        ([{}, {"channels_last": False}], ["imagenet, channels last", "imagenet, no channels last"]),
        (
            [{"method": "maxl", "source": [], "psi": 3}, {"method": "maxl", "source": []}, {}],
            ["MAXL, psi 3", "MAXL, psi 5", "imagenet"],
        ),
        (
            [{}, {"limit": 64, "target": "a/stl10"}],
            ["cifar10, imagenet", "stl10, imagenet, limit 64"],
        ),
        ([{}, {}], ["imagenet (1)", "imagenet (2)"]),
    ],
)
def test_names_say_what_differs(changes: list[dict[str, Any]], names: list[str]) -> None:
    assert short_names([vars(dataclasses.replace(TAUGHT, **c)) for c in changes]) == names


def test_differences_are_judged_by_welch_s_test() -> None:
    # Two samples of 3 with variance 1: error sqrt(2/3), 4 degrees of freedom, t = 2.776.
    first = Spread(50.0, 1.0, 3)
    near = judge("near", Spread(52.2, 1.0, 3), first)
    far = judge("far", Spread(52.3, 1.0, 3), first)
    assert near.error == pytest.approx(math.sqrt(2 / 3))
    assert near.needed == pytest.approx(2.266, abs=1e-3)
    assert near.verdict == "within the spread (under 2.27)"
    assert far.verdict == "larger than the spread"
    lone = judge("lone", Spread(90.0, 0.0, 1), first)
    assert lone.error is None
    assert "single run" in lone.verdict


@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=9),
    st.lists(st.floats(0, 100), min_size=2, max_size=9),
)
def test_welch_is_never_bolder_than_the_normal_distribution(a: list[float], b: list[float]) -> None:
    found = judge("a", Spread(*mean_std(a), len(a)), Spread(*mean_std(b), len(b)))
    assert found.error is not None and found.needed is not None
    pooled = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    assert found.error == pytest.approx(pooled, abs=1e-9)
    assert 2.0 * found.error <= found.needed + 1e-12 <= 12.8 * found.error + 1e-9


EXTREME = st.sampled_from(
    [0.0, 5e-324, 5.7e-151, 8.1e-151, 1e-160, 2.2e-308, 1.0, 1e150, 1e200, 1.7e308]
) | st.floats(0, allow_nan=False, allow_infinity=False)


SPREAD = st.builds(Spread, EXTREME, EXTREME, st.integers(2, 80))


@given(SPREAD, SPREAD, st.booleans())
@example(Spread(0.0, 0.0, 2), Spread(5.7e-151, 8.1e-151, 2), False)
@example(Spread(1e300, 1e200, 3), Spread(0.0, 1e-200, 3), True)
def test_extreme_numbers_are_judged_as_in_unlimited_precision(
    one: Spread, first: Spread, sign: bool
) -> None:
    one = dataclasses.replace(one, mean=-one.mean if sign else one.mean)
    found = judge("a", one, first)
    assert found.error is not None and found.needed is not None
    with decimal.localcontext(decimal.Context(prec=80, Emin=-9999, Emax=9999)):
        a, b = (Decimal(s.std) ** 2 / s.n for s in (one, first))
        error, points = (a + b).sqrt(), abs(Decimal(one.mean) - Decimal(first.mean))
        if not error:
            assert (found.error, found.needed) == (0, 0)
            assert found.verdict == ("larger than the spread" if points else "equal")
            return
        freedom = (a + b) ** 2 / (a**2 / (one.n - 1) + b**2 / (first.n - 1))
        # Next to a row of the table either of two values is right.
        fitting = {
            T_975[max(d for d in T_975 if d <= freedom + around)]
            for around in (Decimal("-1e-8"), Decimal("1e-8"))
            if freedom + around >= 1
        }
        needed = {error * Decimal(t) for t in fitting}
        assert float(error) == pytest.approx(found.error, rel=1e-12, abs=1e-322)
        assert any(float(x) == pytest.approx(found.needed, rel=1e-12, abs=1e-321) for x in needed)
        near = Decimal("1e-12") * points + Decimal("1e-320")
        # Of numbers beyond floats, nothing is promised.
        if math.isfinite(found.needed) and all(abs(points - x) > near for x in needed):
            larger = {points > x for x in needed}
            assert len(larger) == 2 or (found.verdict == "larger than the spread") in larger


def test_the_table_and_its_verdicts(sskt: Call, study: Path) -> None:
    status, out, err = sskt("compare", study)
    assert (status, err) == (0, "")
    weak, strong = out.splitlines()[-2:]
    assert weak.split("+", 1)[1].split()[:3] == ["0.50", "0.82", "within"]
    assert strong.split("+", 1)[1].split()[:3] == ["10.00", "0.82", "larger"]
    assert "51.00 ± 1.00" in next(x for x in out.splitlines() if x.startswith("scratch"))


def test_the_first_run_named_is_the_one_to_compare_with(sskt: Call, study: Path) -> None:
    status, out, _ = sskt("compare", study / "c-strong", study / "b-scratch" / "0", "--json")
    found = json.loads(out)
    assert status == 0
    assert [g["name"] for g in found["groups"]] == ["imagenet, TM", "scratch"]
    assert found["differences"][0]["points"] == -11.0
    assert found["differences"][0]["error"] is None
    assert "single run" in found["differences"][0]["verdict"]


def test_a_seed_that_was_run_twice_counts_once(study: Path) -> None:
    write_run(study / "again", dataclasses.replace(SCRATCH, device="cpu"), [10.0, 51.0, 50.0])
    compared = compare(find_runs([study])[0])
    assert compared.rows[0].last["test_top1"] == Spread(51.0, 1.0, 3)
    assert compared.warnings == ["scratch: seed 0 in more than one run; one run a seed counts"]


def test_unfinished_runs_are_shown_as_such_and_left_out(sskt: Call, study: Path) -> None:
    cut = dataclasses.replace(SCRATCH, seed=7)
    write_run(study / "b-scratch" / "7", cut, [10.0])
    write_run(study / "d-cut", dataclasses.replace(SCRATCH, lr=0.3), [10.0, 20.0])
    status, out, err = sskt("compare", study)
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["4", "(1", "unfinished)", "3", "51.00", "±", "1.00"] in [r[3:10] for r in rows]
    assert any("2/3" in r for r in rows)
    assert "1 of 4 runs unfinished, left out" in err
    assert any("cannot tell: unfinished" in line for line in out.splitlines())


def test_runs_that_stopped_early_are_finished(sskt: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "run", SCRATCH, [10.0, 9.0], stopped_early=True)
    status, out, err = sskt("compare", tmp_path)
    assert (status, err) == (0, "")
    assert "2/3" in out


def test_different_targets_are_warned_of(sskt: Call, study: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(SCRATCH, target="stl10")
    status, _, err = sskt("compare", study, write_run(tmp_path / "s", other, [1.0, 2.0, 3.0]))
    assert status == 0
    assert "different targets (cifar10, stl10)" in err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "metrics.jsonl").write_text(""), "not finished an epoch"),
        (lambda f: (f / "metrics.jsonl").write_text('{"epoch": 0, "tes'), "is damaged"),
        (lambda f: (f / "metrics.jsonl").write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda f: (f / "metrics.jsonl").write_text("[1]\n"), "no record of epoch 0"),
        (lambda f: (f / "metrics.jsonl").write_text('{"epoch": 3}\n'), "no record of epoch 0"),
        (
            lambda f: (f / "metrics.jsonl").write_text('{"epoch": 0, "test_top1": "x"}\n'),
            "no record of epoch 0",
        ),
        (
            lambda f: (f / "metrics.jsonl").write_text('{"epoch": 0, "test_top1": 1e300}\n'),
            "no record of epoch 0",
        ),
        (
            lambda f: (f / "metrics.jsonl").write_text(f'{{"epoch": 0, "loss": {10**400}}}\n'),
            "no record of epoch 0",
        ),
        (
            lambda f: (f / "metrics.jsonl").write_text('{"epoch": 0, "loss": NaN}\n'),
            "no record of epoch 0",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not a run's configuration"),
    ],
)
def test_a_damaged_run_is_named(
    sskt: Call, study: Path, damage: Callable[[Path], Any], said: str
) -> None:
    folder = study / "a-weak" / "1"
    damage(folder)
    status, out, err = sskt("compare", folder)
    assert (status, out) == (2, "")
    assert str(folder) in err and said in err and err.count("\n") == 1
    status, out, err = sskt("compare", study)
    assert status == 0
    assert f"skipped {folder}: " in err and said in err
    assert len(find_runs([study])[0]) == 8


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="no such folder"):
        find_runs([tmp_path / "nothing"])
    with pytest.raises(MissingData, match=r"no metrics.jsonl there"):
        find_runs([tmp_path])
    write_run(tmp_path / "run", SCRATCH, [])
    with pytest.raises(MissingData, match="not finished an epoch"):
        find_runs([tmp_path])


def test_runs_of_an_older_version_have_the_defaults(study: Path) -> None:
    path = study / "b-scratch" / "0" / "config.json"
    stored = json.loads(path.read_text())
    del stored["ema"], stored["method"], stored["digest"]
    path.write_text(json.dumps(stored))
    assert load_run(path.parent)[0]["ema"] == 0.0
    assert len(compare(find_runs([study / "b-scratch"])[0]).groups) == 1


def test_the_image_is_drawn(sskt: Call, study: Path, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    assert sskt("compare", study, "--png", path)[0] == 0
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 300 and pixels.shape[1] > 900
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):  # three groups
        assert (abs(pixels.astype(int) - colour).sum(2) < 12).sum() > 50


class Reader(HTMLParser):
    """Text, attributes and balance of a page."""

    VOID = frozenset(("meta", "img"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_loads_nothing(sskt: Call, study: Path, tmp_path: Path) -> None:
    assert sskt("compare", study, "--out", tmp_path / "out")[0] == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "compare.png",
        "compare.html",
        "compare.json",
    }
    text = (tmp_path / "out" / "compare.html").read_text()
    reader = read(text)
    assert "http:" not in text and "https:" not in text and "url(" not in text
    loaded = [a for a in reader.attributes if a[1] in ("src", "href", "srcset", "onload")]
    assert [value[:26] for _, _, value in loaded] == ["data:image/svg+xml;base64,"]
    shown = " ".join(reader.text)
    assert "61.00 ± 1.00" in shown and "larger than the spread" in shown
    assert "imagenet:resnet50" in shown and str(study / "a-weak" / "2") in shown
    assert shown.count("62.00 ± 1.00") == 2 and "10.00 ± 0.00" in shown  # best, and its epoch
    image = base64.b64decode(loaded[0][2].partition(",")[2]).decode()
    for colour in COLOURS[:3]:
        assert f"stroke: {colour}" in image
    assert "top-1, test" in image and "imagenet" in image


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&"'
    folder = tmp_path / "<b>bold&"
    write_run(folder / "0", dataclasses.replace(SCRATCH, model=evil), [1.0, 2.0, 3.0])
    write_run(folder / "1", TAUGHT, [1.0, 2.0, 3.0])
    text = page(compare(find_runs([folder])[0]))
    reader = read(text)
    assert "<b>" not in text and "<script>alert" not in text
    assert "<script" not in text
    shown = " ".join(reader.text)
    assert evil in shown and str(folder) in shown


def test_epochs_without_evaluation_are_no_points(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SCRATCH, [1.0, 2.0, 3.0])
    lines = folder.joinpath("metrics.jsonl").read_text().splitlines()
    second = json.loads(lines[1])
    del second["test_top1"], second["test_loss"]
    lines[1] = json.dumps(second)
    folder.joinpath("metrics.jsonl").write_text("\n".join(lines))
    compared = compare(find_runs([folder])[0])
    text = page(compared)
    table = text.partition("top-1, test, %: values")[2].partition("</table>")[0]
    assert re.findall(r"<td>(.*?)</td>", table) == ["1", "1.00", "3", "3.00"]
    assert compared.rows[0].last["test_top1"].mean == 3.0
