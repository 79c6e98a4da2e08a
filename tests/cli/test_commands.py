"""The commands that only look, as a user calls them."""

from __future__ import annotations

import email.message
import gc
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.helpers import TINY
from support.independent_reader import open_set

from sskt.cli.main import COMMANDS, cli
from sskt.cli.training.demo import paid_from, paid_text
from sskt.teacher_cache.errors import maintainers
from sskt.teacher_cache.targets.registry import TARGETS

Call = Callable[..., tuple[int, str, str]]
SOURCE = ("--source", f"tiny={TINY}:build")


@pytest.fixture(scope="module")
def cache(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sskt.cli.main import run

    folder = tmp_path_factory.mktemp("cache")
    arguments = ["cache-teachers", "--source", f"tiny={TINY}:build", "--target", str(images)]
    arguments += ["--policy", "pad-crop-flip", "--seeds", "2", "--cache", str(folder)]
    assert run([*arguments, "--workers", "0"]) == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(sskt: Call, command: str) -> None:
    status, out, _ = sskt(command, "--help")
    assert status == 0 and out.startswith(f"Usage: sskt {command}")


def test_ls(sskt: Call, cache: Path) -> None:
    status, out, _ = sskt("ls", "--cache", cache)
    assert status == 0 and "tiny (tiny:build)" in out and "2/2" in out
    (shown,) = json.loads(sskt("ls", "--cache", cache, "--json")[1])
    assert shown["coverage"] == [1.0, 1.0]
    assert shown["target"]["size"] == 60 and shown["encoding"] == "f16"
    assert shown["error"]["T=3"]["gradient"] < 2e-3
    assert sskt("ls", "--cache", cache, shown["digest"][:8])[0] == 0
    status, _, err = sskt("ls", "--cache", cache, "nothing")
    assert status == 2 and "matches nothing; there are: images-train.tiny" in err
    assert "pad-crop-flip " in out and "padding" not in out, "defaults are not shown"
    assert gc.get_freeze_count() == 0, "what is imported is collected again at the end"


def test_inspect_shows_the_view_and_the_labels(sskt: Call, cache: Path, tmp_path: Path) -> None:
    from sskt.teacher_cache.label_sets.find import choose_sets
    from sskt.teacher_cache.tools.reopen import Reopen, reopen

    png = tmp_path / "view.png"
    ask = ["inspect", "--cache", cache, "--sample", 33, "--seed", 1, "--png", png, *SOURCE]
    shown = json.loads(sskt(*ask, "--json")[1])
    views, _ = reopen(choose_sets(cache, [])[0], Reopen(sources=SOURCE[1:]))
    with Image.open(png) as image:
        assert np.array_equal(np.asarray(image), views[33, 1])
    assert shown["id"] == "bear/0013.png" and shown["label"] == "bear"
    assert shown["view_matches"] is True
    (source,) = shown["sources"]
    assert len(source["top5"]) == 5 and source["top5"][0]["class"].startswith("thing ")
    assert source["live"]["distance"] < 1e-3
    assert shown["specs"][source["label_set"]]["views"]["policy"] == "pad-crop-flip"
    status, out, _ = sskt(*ask)
    assert status == 0
    assert "as the sources saw it" in out and "input 16x16 rgb" in out and "thing" in out


def test_inspect_of_what_is_not_there(sskt: Call, cache: Path) -> None:
    status, _, err = sskt("inspect", "--cache", cache, "--sample", 60)
    assert status == 2 and "samples 0 to 59 and seeds 0 to 1, found sample 60" in err


def test_verify_and_recompute(sskt: Call, cache: Path) -> None:
    status, out, _ = sskt("verify", "--cache", cache, "--recompute", 10, *SOURCE)
    assert status == 0 and "120 rows, 10 recomputed" in out and ": clean" in out
    (report,) = json.loads(sskt("verify", "--cache", cache, "--recompute", 5, "--json", *SOURCE)[1])
    assert report["problems"] == [] and report["recomputed"] == 5


def test_verify_with_another_network_is_refused(sskt: Call, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny.py"
    other.write_text(TINY.read_text() + "# another file\n")
    status, _, err = sskt(
        "verify", "--cache", cache, "--recompute", 3, "--source", f"tiny={other}:build"
    )
    assert status == 2 and "is not the file that the labels were made with" in err


def test_verify_goes_on_after_a_set_that_cannot_be_recomputed(
    sskt: Call, cache: Path, images: Path, tmp_path: Path
) -> None:
    """Its network is the user's own and was not named: the other sets are compared all the same."""
    import shutil

    both = tmp_path / "cache"
    shutil.copytree(cache, both)
    made = sskt("cache-teachers", "--source", f"other={TINY}:build", "--target", images, "--seeds",
                1, "--cache", both)  # fmt: skip
    assert made[0] == 0, made[2]
    status, out, _ = sskt("verify", "--cache", both, "--recompute", 5, "--json", *SOURCE)
    reports = {r["name"].split(".")[1].split("-")[0]: r for r in json.loads(out)}
    assert status == 1 and reports["tiny"]["recomputed"] == 5 and not reports["tiny"]["problems"]
    (problem,) = reports["other"]["problems"]
    assert problem.startswith("its labels were not recomputed: ") and "--source other=" in problem


def test_verify_finds_labels_that_are_not_the_sources(
    sskt: Call, cache: Path, tmp_path: Path
) -> None:
    import shutil

    from sskt.teacher_cache.label_sets.find import choose_sets

    damaged = tmp_path / "cache"
    shutil.copytree(cache, damaged)
    (label_set,) = choose_sets(damaged, [])
    for array in ("labels/c", "view_check/c"):
        shutil.rmtree(label_set.path / array / "1")
        shutil.copytree(label_set.path / array / "0", label_set.path / array / "1")
    status, out, _ = sskt("verify", "--cache", damaged)
    assert status == 1 and "seed 1, samples 0 to 59: " in out
    for record in damaged.glob("*/view_check/c/1/*.json"):
        record.unlink()
    file = label_set.path / "zarr.json"
    document = json.loads(file.read_text())
    del document["attributes"]["sskt"]["bound"]
    file.write_text(json.dumps(document))
    status, out, _ = sskt("verify", "--cache", damaged)
    assert status == 0, "whole shards of a set without records pass their checksums"
    status, out, _ = sskt("verify", "--cache", damaged, "--recompute", 20, *SOURCE)
    assert status == 1 and "seed 1: the view is not the one the source saw" in out


def rewritten(cache: Path, to: Path, change: Callable[[np.ndarray, np.ndarray], None]) -> Path:
    """A copy of a cache of one label set, its stored labels and view checks changed."""
    import shutil

    from sskt.teacher_cache.label_sets.create import create_label_set
    from sskt.teacher_cache.label_sets.find import choose_sets

    shutil.copytree(cache, to)
    (found,) = choose_sets(to, [])
    label_set = create_label_set(to, found.spec, found.classes, found.seeds)
    for shard in label_set.shards(range(found.seeds)):
        encoded = label_set.read(shard.seed, shard.start, shard.stop)
        checks = label_set.read_checks(shard.seed, shard.start, shard.stop)
        change(encoded["labels"], checks)
        label_set.write(shard, encoded, checks)
    label_set.close()
    return to


def test_recomputing_finds_labels_of_other_images(sskt: Call, cache: Path, tmp_path: Path) -> None:
    """Good distributions with good checksums, each at the place of the sample before it."""

    def shift(labels: np.ndarray, checks: np.ndarray) -> None:
        labels[1:] = labels[:-1].copy()

    damaged = rewritten(cache, tmp_path / "cache", shift)
    assert sskt("verify", "--cache", damaged)[0] == 0
    status, out, _ = sskt("verify", "--cache", damaged, "--recompute", 20, "--json", *SOURCE)
    (report,) = json.loads(out)
    problems = [p for p in report["problems"] if "stored and recomputed labels differ by" in p]
    assert status == 1 and report["recomputed"] == 20 and len(problems) > 9
    (stored,) = (open_set(f.parent) for f in damaged.glob("*/zarr.json"))
    place = re.match(r"sample (\d+) \(.*\), seed (\d+): .* differ by ([\d.]+)", problems[0])
    assert place is not None
    sample, seed = int(place[1]), int(place[2])
    (true,) = (open_set(f.parent) for f in cache.glob("*/zarr.json"))
    one, other = stored.label(seed, sample), true.label(seed, sample)
    assert one is not None and other is not None
    expected = float(np.abs(one - other).sum()) / 2
    assert float(place[3]) == pytest.approx(expected, abs=2e-3)
    assert report["worst_distance"] >= expected - 2e-3


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no distribution", "2 rows are no probability distribution, first sample 7"),
        ("empty", "2 rows are empty though their views were seen, first sample 7"),
        ("skipped", ""),
    ],
)
def test_verify_finds_rows_that_are_no_labels(
    sskt: Call, cache: Path, tmp_path: Path, what: str, said: str
) -> None:
    """The files are as good as they were written: what is wrong is in the rows."""
    places = [7, 31]

    def spoil(labels: np.ndarray, checks: np.ndarray) -> None:
        if what == "no distribution":
            labels[places] -= np.log(2)  # sums to a half
        else:
            labels[places] = np.nan
        if what == "skipped":
            checks[places] = 0

    damaged = rewritten(cache, tmp_path / "cache", spoil)
    status, out, _ = sskt("verify", "--cache", damaged, "--json")
    (report,) = json.loads(out)
    assert status == (1 if said else 0)
    assert len(report["problems"]) == (2 if said else 0), "one for each seed"
    assert all(said in problem for problem in report["problems"])
    assert report["skipped"] == (0 if what == "no distribution" else 4)


def test_verify_finds_missing_shards(sskt: Call, cache: Path, tmp_path: Path) -> None:
    import shutil

    lacking = shutil.copytree(cache, tmp_path / "cache")
    (file,) = lacking.glob("*/view_check/c/1/0.json")
    file.unlink()
    status, out, _ = sskt("verify", "--cache", lacking, "--json")
    (report,) = json.loads(out)
    assert status == 1 and report["problems"] == [
        "1 of 2 shards are missing (seed 1); 1 have labels but no record: add it with --bind"
    ]
    assert (report["shards"], report["rows"]) == (1, 60)


def test_label_sets_over_different_views_are_not_shown_together(
    sskt: Call, images: Path, cache: Path, tmp_path: Path
) -> None:
    import shutil

    both = shutil.copytree(cache, tmp_path / "cache")
    ask = ["cache-teachers", "--source", f"other={TINY}:build", "--target", images, "--cache", both]
    assert sskt(*ask, "--policy", "none", "--seeds", 2, "--workers", 0)[0] == 0
    for command in (["inspect", "--cache", both], ["inspect", "--cache", both, "--no-live"]):
        status, _, err = sskt(*command)
        assert status == 2 and "differ in views.policy ('" in err, err
        assert "pad-crop-flip" in err and err.count("\n") == 1
    assert sskt("inspect", "--cache", both, ".other-")[0] == 0


def test_datasets_and_sources(sskt: Call) -> None:
    status, out, _ = sskt("datasets")
    assert status == 0 and "cifar10" in out and "DIR[/SPLIT]/CLASS/FILE" in out
    names = [t["name"] for t in json.loads(sskt("datasets", "--json")[1])]
    packed = [name.partition(":")[0] for name in names[len(TARGETS) + 2 :]]
    assert names[: len(TARGETS) + 2] == [*TARGETS, "a folder", "a manifest"]
    assert packed == ["hf", "wds", "parquet"]
    status, out, _ = sskt("sources")
    assert status == 0 and "resnet50" in out
    known = {s["name"]: s for s in json.loads(sskt("sources", "--json")[1])}
    assert known["imagenet"]["classes"] == 1000
    assert known["places365"]["archs"] == ["alexnet", "densenet161", "resnet18", "resnet50"]


def test_the_demo_deletes_only_its_own(sskt: Call, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch/last.pt").write_text("a night's work")
    status, _, err = sskt("demo", "--out", tmp_path)
    assert status == 2 and "is not the folder of an earlier demo" in err
    assert (tmp_path / "scratch/last.pt").read_text() == "a night's work"


@pytest.mark.slow
def test_the_demo_says_what_the_cache_costs_and_saves(sskt: Call, tmp_path: Path) -> None:
    ask = ["demo", "--out", tmp_path / "demo", "--epochs", 1, "--seeds", 1, "--limit", 64]
    status, out, err = sskt(*ask)
    assert status == 0, err
    assert "scratch" in out and "SSKT + TM, labels from the cache" in out
    assert re.search(r"labels cached: 64 in \d+ s, once; [\d.]+ KiB on disk", out)
    assert re.search(r"an epoch takes [\d.]+ s from the cache and [\d.]+ s with the source", out)
    with Image.open(tmp_path / "demo/demo.png") as figure:
        assert figure.width == 1200
    result = json.loads(sskt(*ask, "--json")[1])
    assert result["labels_written"] == 0 and result["labels_reused"] == 64
    stored = [p for p in (tmp_path / "demo/cache").rglob("*") if p.is_file()]
    sizes = [p.stat().st_size for p in stored if ".locks" not in p.parts]
    assert result["cache_bytes"] == sum(sizes)
    inspect, train, compare = (shlex.split(line)[1:] for line in result["next"])
    for command in (inspect, train, compare):
        status, out, err = sskt(*command)
        assert status == 0, err
    assert "imagenet, TM" in out and "scratch" in out


@pytest.mark.parametrize(
    ("cache", "cached", "live", "epoch"),
    [(90, 10, 40, 3), (91, 10, 40, 4), (0, 10, 40, 1), (90, 40, 40, None), (90, 50, 40, None)],
)
def test_from_which_epoch_on_the_cache_has_paid(
    cache: float, cached: float, live: float, epoch: int | None
) -> None:
    assert paid_from(cache, cached, live) == epoch


@pytest.mark.parametrize(
    ("written", "epoch", "words"),
    [
        (100, 3, "the cache has paid from epoch 3 of 4 on"),
        (100, 9, "would have paid from epoch 9 on, not within these 4"),
        (100, None, "here the cache saves no time"),
        (0, 1, "the labels exist, so the cache pays from the first epoch on"),
    ],
)
def test_the_demo_does_not_claim_more_than_was_measured(
    written: int, epoch: int | None, words: str
) -> None:
    seconds = {"SSKT + TM": 10.0, "source in every step": 20.0}
    result = {"seconds_per_epoch": seconds, "speedup": 2.0, "epochs": 4}
    said = paid_text(result | {"labels_written": written, "paid_from_epoch": epoch})
    assert words in said


@pytest.mark.parametrize(
    ("urls", "where"),
    [
        ([], "to the maintainers of this copy of sskt"),
        (["Paper, https://x.org/paper"], "to the maintainers of this copy of sskt"),
        (["Paper, https://x.org/p", "Repository, https://x.org/r"], "at https://x.org/r"),
        (["Source, https://x.org/s", "Issues, https://x.org/i"], "at https://x.org/i"),
    ],
)
def test_an_unexpected_failure_says_what_to_send_to_whom(
    sskt: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    urls: list[str],
    where: str,
) -> None:
    about = email.message.Message()
    for url in urls:
        about["Project-URL"] = url
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: about)

    def fails(*given: object, **named: object) -> None:
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(cli, "main", fails)
    status, _, err = sskt("ls")
    assert maintainers() == where and status == 1
    assert err == (
        "sskt: unexpected ZeroDivisionError: by zero (SSKT_DEBUG=1 shows where; please report "
        f"that, with the command and what sskt doctor prints, {where})\n"
    )


@pytest.mark.slow
def test_a_finished_run_is_trained_for_longer_by_the_command_that_is_printed(
    sskt: Call, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ask = ["--target", "shapes", "--limit", 40, "--batch-size", 20, "--epochs", 1, "--out", run]
    assert sskt("train", *ask)[0] == 0
    status, _, err = sskt("train", "--resume", "--out", run, "--epochs", 3)
    assert status == 2 and "holds a finished run (--epochs 1), whose learning rate followed" in err
    command = shlex.split(err.rpartition(" with: ")[2])
    assert command[:2] == ["sskt", "train"] and command[-3:-1] == ["2", "--out"]
    status, out, err = sskt(*command[1:])
    assert status == 0 and f"after 2 epochs; written to {run}-longer" in out, err


def test_own_weights_are_labelled_with_a_word_on_their_preprocessing(
    sskt: Call, tmp_path: Path
) -> None:
    import torch
    from torchvision.models import squeezenet1_0

    torch.save(squeezenet1_0().state_dict(), tmp_path / "weights.pth")
    source = ("--source", "imagenet:squeezenet1_0@64", "--weights", tmp_path / "weights.pth")
    where = ("--target", "shapes", "--limit", 10, "--seeds", 1, "--cache", tmp_path / "labels")
    status, out, err = sskt("cache-teachers", *source, *where)
    assert status == 0, err
    assert "imagenet saw its images as 64x64 rgb, scale 1, mean 0.485 0.456 0.406" in out
    assert "label anew with --preprocessing (channels=bgr" in out


@pytest.mark.parametrize(
    ("given", "terminal", "expected"),
    [
        ((), False, "json"),
        ((), True, "text"),
        (("--log-format", "json"), True, "json"),
        (("--log", "text"), False, "text"),
    ],
)
def test_the_log_of_a_server_is_text_on_a_terminal(
    given: tuple[str, ...],
    terminal: bool,
    expected: str,
    sskt: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sskt.cli.serving import serve
    from sskt.server import run as serving

    served: list[str] = []
    monkeypatch.setattr(serving, "serve", lambda settings, ready: served.append(settings.log))
    monkeypatch.setattr(
        serve, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: terminal))
    )
    assert sskt("serve", "--cache", tmp_path, *given)[0] == 0
    assert served == [expected]
