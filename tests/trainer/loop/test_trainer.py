"""Training from stored labels: the same numbers as live, the right seeds, exact resuming."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.helpers import TINY, batch_of
from support.independent_reader import open_set
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import (
    BadImage,
    CorruptStore,
    Diverged,
    IncompleteLabels,
    InputError,
    MissingData,
    SpecMismatch,
    ViewMismatch,
)
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.registry import open_source, parse_source
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views, checks_of
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.loader import in_memory
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_labels import StoredLabels, Window, epoch_windows
from sskt.trainer.distributed import Ranks
from sskt.trainer.loop.checkpoint import Autosave
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.models.normalization import NORMALISATIONS

Call = Callable[..., tuple[int, str, str]]
SEEDS = 3
TIMES = ("seconds", "label_wait_seconds")


def gradients(trainer: Trainer, samples: Any, seed: int) -> tuple[float, dict[str, Any]]:
    trainer.network.train()
    loss, _ = trainer.losses(batch_of(trainer, samples, seed))
    trainer.network.zero_grad()
    torch.autograd.backward(loss)
    named = trainer.network.named_parameters()
    return float(loss.detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}


def compare_with_live(config: TrainConfig, sources: list[Source], samples: Any) -> None:
    stored = Trainer(make_plan(config))
    live = Trainer(make_plan(dataclasses.replace(config, live=True), sources))
    labels = StoredLabels(stored.plan.label_sets, stored.plan.device)
    window = labels.enter(Window(1, ((0, len(stored.views.target)),)), None)
    assert window.check(samples, checks_of(stored.views.batch(samples, 1))) == len(samples)
    labels.close()
    loss, grads = gradients(stored, samples, 1)
    live_loss, live_grads = gradients(live, samples, 1)
    assert loss == pytest.approx(live_loss, rel=1e-5)
    assert grads.keys() == live_grads.keys() and len(grads) > 60
    for name, gradient in grads.items():
        scale = live_grads[name].abs().max()
        assert (gradient - live_grads[name]).abs().max() <= 1e-5 * max(1.0, float(scale)), name


@pytest.mark.parametrize(
    ("loss", "temperature"), [("ce+ce", 3.0), ("ce+kd", 1.0), ("ce+kd-released", 4.0)]
)
def test_loss_and_gradient_equal_those_of_live_labels(
    config: TrainConfig, tiny: Source, loss: str, temperature: float
) -> None:
    config = dataclasses.replace(config, loss=loss, temperature=temperature, alpha=1.0)
    compare_with_live(config, [tiny], np.arange(3, 40, 2))


@pytest.mark.slow
def test_loss_and_gradient_equal_those_of_live_real_sources(
    cifar: Path, data: Path, tmp_path: Path
) -> None:
    names = [
        "imagenet:efficientnet_lite0@64",
        f"places365={data}/models/squeezenet_places365.py:build@64",
    ]
    sources = [open_source(parse_source(name)) for name in names]
    views = Views(open_target(str(cifar), limit=128), parse_policy("pad-crop-flip"))
    cache_teachers(views, sources, parse_encoding("f32"), 2, tmp_path)
    config = TrainConfig(
        target=str(cifar),
        policy="pad-crop-flip",
        limit=128,
        source=names,
        tm=True,
        cache=tmp_path,
        device="cpu",
        workers=0,
    )
    compare_with_live(config, sources, np.arange(0, 128, 3))


def test_epoch_e_sees_seed_e_mod_s(config: TrainConfig, tmp_path: Path) -> None:
    records = Trainer(make_plan(dataclasses.replace(config, seeds=2))).run(tmp_path / "run")
    assert [r["view_seed"] for r in records] == [0, 1, 0, 1]
    assert all(r["views_checked"] >= 4 for r in records)
    assert all(r["images"] == 60 for r in records)


def test_seeds_default_to_all_that_are_stored(config: TrainConfig) -> None:
    assert make_plan(config).seeds == SEEDS
    scratch = dataclasses.replace(config, source=[])
    assert make_plan(scratch).seeds == config.epochs


class Stopped(Exception):
    pass


@pytest.mark.parametrize("source", [True, False])
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(
    config: TrainConfig, tmp_path: Path, source: bool
) -> None:
    if not source:
        config = dataclasses.replace(config, source=[])
    whole = Trainer(make_plan(config)).run(tmp_path / "whole")

    def stop(epoch: int, done: int, total: int) -> None:
        if (epoch, done) == (2, 2):
            raise Stopped

    with pytest.raises(Stopped):
        Trainer(make_plan(config), Hooks(step=stop)).run(tmp_path / "cut")
    assert len((tmp_path / "cut/metrics.jsonl").read_text().splitlines()) == 2
    resumed = Trainer(make_plan(config)).run(tmp_path / "cut", resume=True)
    without = [{k: v for k, v in r.items() if k not in TIMES} for r in whole]
    assert [{k: v for k, v in r.items() if k not in TIMES} for r in resumed] == without
    for name in ("config.json", "last.pt", "curves.png", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).stat().st_size > 0
    assert list((tmp_path / "cut/tensorboard").glob("events*"))
    one, other = (torch.load(tmp_path / d / "last.pt")["model"] for d in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_is_not_overwritten_and_not_resumed_as_another(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, epochs=1)
    Trainer(make_plan(config)).run(tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        Trainer(make_plan(config)).run(tmp_path / "run")
    with pytest.raises(InputError, match=r"a run with alpha = 1\.0, not 0\.2"):
        other = dataclasses.replace(config, alpha=0.2)
        Trainer(make_plan(other)).run(tmp_path / "run", resume=True)


def test_training_learns_one_batch(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        config, source=[], epochs=30, limit=12, seeds=1, lr=0.05, policy="none", test_split="none"
    )
    records = Trainer(make_plan(config)).run(tmp_path / "run")
    assert records[-1]["train_top1"] == 100 and records[-1]["loss"] < 0.1
    assert "test_top1" not in records[-1]


def test_a_changed_image_is_named_in_the_first_epoch(config: TrainConfig) -> None:
    plan = make_plan(config)
    target = in_memory(plan.views.target, 1e9)
    assert target.images is not None
    target.images[:, 12, 12] ^= 1
    assert target.fingerprint == plan.views.target.fingerprint
    changed = Views(target, plan.views.policy)
    trainer = Trainer(dataclasses.replace(plan, views=changed))
    with pytest.raises(ViewMismatch, match=r"sample \d+ under view seed 0 is not the image"):
        trainer.train_epoch()


def test_refusals_name_the_field_or_the_seeds(config: TrainConfig, label_cache: Path) -> None:
    with pytest.raises(
        SpecMismatch,
        match=r"padding=4, but --policy none was given",
    ):
        make_plan(dataclasses.replace(config, policy="none"))
    with pytest.raises(SpecMismatch, match=r"padding=4, but --policy pad-crop-flip:padding=2 was"):
        make_plan(dataclasses.replace(config, policy="pad-crop-flip:padding=2"))
    with pytest.raises(SpecMismatch, match=r"--limit 60 \(all 60 samples; leave --limit out\)"):
        make_plan(dataclasses.replace(config, limit=30))
    with pytest.raises(IncompleteLabels, match=r"lacks seeds 3-4 of 5; run sskt cache-teachers"):
        make_plan(dataclasses.replace(config, seeds=5, epochs=5))
    with pytest.raises(MissingData, match=r"no labels of source imagenet over .*cache-teachers"):
        make_plan(dataclasses.replace(config, source=["imagenet"]))
    with pytest.raises(MissingData, match=r"no labels of source tiny \(other:build\)"):
        make_plan(dataclasses.replace(config, source=["tiny=other.py:build"]))


def test_top_k_labels_are_refused_at_other_temperatures(
    config: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    cache_teachers(views, [tiny], parse_encoding("topk-3"), 1, tmp_path, StageOptions(workers=0))
    sparse = dataclasses.replace(config, cache=tmp_path)
    hot = dataclasses.replace(sparse, temperature=3.0)
    (stored,) = list_label_sets(tmp_path)
    lost = {t: 100 * stored.attributes["error"][t]["gradient"] for t in ("T=1", "T=3")}
    with pytest.raises(InputError, match="labels stored as topk-3 are wrong at temperature 3") as e:
        make_plan(hot)
    assert f"{lost['T=3']:.2g} % at T = 3, {lost['T=1']:.2g} % at T = 1" in str(e.value)
    assert lost["T=3"] > lost["T=1"] > 0
    make_plan(dataclasses.replace(hot, force_topk=True))
    trainer = Trainer(make_plan(sparse))
    assert np.isfinite(trainer.train_epoch()["loss"])


def test_what_top_k_labels_lose_is_said_before_the_first_epoch(
    config: TrainConfig, images: Path, tiny: Source, tmp_path: Path, sskt: Call
) -> None:
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    cache_teachers(views, [tiny], parse_encoding("topk-3"), 1, tmp_path, StageOptions(workers=0))
    (stored,) = list_label_sets(tmp_path)
    lost = 100 * stored.attributes["error"]["T=1"]["gradient"]
    said = f"labels of tiny are stored as topk-3; error of their gradient: {lost:.2g} % at T = 1"
    base = ["--target", images, "--policy", "pad-crop-flip", "--source", config.source[0]]
    base += ["--epochs", 1, "--workers", 0, "--device", "cpu"]
    status, _, err = sskt("train", *base, "--cache", tmp_path, "--out", tmp_path / "run")
    assert status == 0
    lines = err.splitlines()
    told = next(i for i, line in enumerate(lines) if line.startswith(said))
    assert told < next(i for i, line in enumerate(lines) if line.startswith("epoch"))
    shown = sskt("train", *base, "--cache", tmp_path, "--dry-run")[1]
    assert f"(topk-3, 1 seed, gradient error {lost / 100:.2g} at T=1, " in shown
    status, _, err = sskt("train", *base, "--cache", config.cache, "--out", tmp_path / "whole")
    assert status == 0 and "are stored as" not in err


def test_two_sets_that_fit_have_to_be_chosen_from(
    config: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    digests = []
    for encoding in ("f16", "u8"):
        options = StageOptions(workers=0)
        report = cache_teachers(views, [tiny], parse_encoding(encoding), 1, tmp_path, options)
        digests.append(report.label_sets[0].digest)
    both = dataclasses.replace(config, cache=tmp_path)
    with pytest.raises(InputError, match="several label sets of source tiny fit"):
        make_plan(both)
    one = dataclasses.replace(both, source=[f"{config.source[0]}#{digests[1][:12]}"])
    assert make_plan(one).label_sets["tiny"].digest == digests[1]


def test_windows_of_shards_cover_every_sample_once() -> None:
    for rows in (10, 16, 40, 1000):
        windows = epoch_windows(100, 7, rows, 16, seed=3, epoch=5)
        samples = np.concatenate([w.samples for w in windows])
        assert sorted(samples) == list(range(100))
        assert all(w.seed == 7 for w in windows)
        assert all(len(w.samples) <= max(rows, 16) for w in windows)
    assert epoch_windows(100, 7, 40, 16, 3, 5) != epoch_windows(100, 7, 40, 16, 3, 6)


def test_a_stub_of_a_block_is_no_window_of_its_own() -> None:
    for samples in (3 * 8192 + 10, 8192 + 10):
        for epoch in range(8):
            windows = epoch_windows(samples, 0, 8192, 8192, 0, epoch)
            together = np.sort(np.concatenate([w.samples for w in windows]))
            assert np.array_equal(together, np.arange(samples))
            assert min(len(w.samples) for w in windows) >= 8192


def test_labels_read_by_windows_are_those_of_the_epoch(config: TrainConfig) -> None:
    sets = make_plan(config).label_sets
    whole, parts = (StoredLabels(sets, torch.device("cpu")) for _ in range(2))
    everything = whole.enter(Window(2, ((0, 60),)), None)
    windows = epoch_windows(60, 2, 32, 16, 0, 0)
    assert len(windows) == 2
    for i, window in enumerate(windows):
        part = parts.enter(window, windows[i + 1] if i + 1 < len(windows) else None)
        samples = window.samples[::-3].copy()
        empty = torch.empty(0)
        expected = everything.of(samples, empty).soft("tiny", 3.0)
        assert torch.equal(part.of(samples, empty).soft("tiny", 3.0), expected)
    whole.close()
    parts.close()


def test_another_window_than_was_expected_has_its_own_labels(config: TrainConfig) -> None:
    """A run that is cut, or that evaluates, comes to a window that was not read ahead."""
    sets = make_plan(config).label_sets
    (reader,) = (open_set(s.path) for s in sets.values())
    labels = StoredLabels(sets, torch.device("cpu"))
    first, second, third = (Window(seed, ((0, 32),)) for seed in range(SEEDS))
    for window, following in ((first, second), (third, None), (second, first), (first, None)):
        entered = labels.enter(window, following)
        found = entered.of(np.array([5, 30]), torch.empty(0)).soft("tiny", 1.0).numpy()
        expected = np.stack([np.asarray(reader.label(window.seed, row)) for row in (5, 30)])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    labels.close()


def test_a_small_memory_budget_trains_by_windows(config: TrainConfig) -> None:
    plan = make_plan(dataclasses.replace(config, memory=2 * 20 * 12 * 4 / 2**30))
    assert len(plan.windows(0)) == 4 and plan.steps_per_epoch == 4
    assert Trainer(plan).train_epoch()["images"] == 60


def test_images_in_ram_are_those_of_the_files(images: Path) -> None:
    target = open_target(str(images))
    loaded = in_memory(target, 1e9)
    assert loaded.images is not None and loaded.fingerprint == target.fingerprint
    assert all(np.array_equal(loaded.images[i], target.read(i)) for i in range(len(target)))
    assert in_memory(target, 1000).images is None


def test_loader_workers_change_nothing(config: TrainConfig) -> None:
    few = dataclasses.replace(config, memory=1e-6, source=[], epochs=1)
    one = Trainer(make_plan(few)).train_epoch()
    many = Trainer(make_plan(dataclasses.replace(few, workers=2))).train_epoch()
    assert {k: v for k, v in one.items() if k not in TIMES} == {
        k: v for k, v in many.items() if k not in TIMES
    }


def test_normalise_is_imagenets() -> None:
    from torchvision.transforms import v2

    views = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    chain = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    found = NORMALISATIONS["imagenet"](views)
    torch.testing.assert_close(found, chain(views.permute(0, 3, 1, 2)))


def test_recipe_below_options(sskt: Call, images: Path, label_cache: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "resnet32"\nalpha = 0.5\nweight-decay = 1e-3\nmilestones = [2]\n')
    base = ["train", "--target", images, "--policy", "pad-crop-flip", "--dry-run", "--json"]
    source = ["--source", f"tiny={TINY}:build", "--tm", "--cache", label_cache, "--epochs", 3]
    status, out, _ = sskt(*base, *source, "--recipe", recipe, "--alpha", 0.25)
    shown = json.loads(out)
    assert status == 0
    assert shown["config"]["model"] == "resnet32"
    assert shown["config"]["alpha"] == 0.25
    assert shown["config"]["weight_decay"] == 1e-3
    assert shown["config"]["milestones"] == [2]
    assert shown["config"]["temperature"] == 1.0
    assert shown["parameters"] == {"target": 463_699, "heads": {"tiny": 39_308}}
    assert shown["steps_per_epoch"] == 1
    assert shown["label_sets"]["tiny"]["seeds"] == SEEDS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alfa = 0.1", "unknown key in recipe"),
        ("alpha = 'x'", "alpha must be float, found 'x'"),
        ("epochs = 0", "epochs must be at least 1, found 0"),
        ("precision = 'int8'", "r.toml 'int8'; known: float32, bfloat16"),
        ("alpha =", "is not TOML"),
        ("tm = 1", "tm must be bool, found 1"),
    ],
)
def test_bad_recipes(sskt: Call, tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    status, out, err = sskt("train", "--target", "shapes", "--recipe", recipe, "--dry-run")
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1
    if "alfa" in text:
        assert "did you mean 'alpha'?" in err


def test_train_from_the_command_line(
    sskt: Call, images: Path, label_cache: Path, tmp_path: Path
) -> None:
    arguments = ["train", "--target", images, "--policy", "pad-crop-flip", "--epochs", 2]
    arguments += [
        "--source",
        f"tiny={TINY}:build",
        "--cache",
        label_cache,
        "--out",
        tmp_path / "run",
    ]
    status, out, err = sskt(*arguments)
    assert status == 0, err
    assert "after 2 epochs" in out and "test top-1" in out
    status, _, err = sskt(*arguments)
    assert status == 2 and "already holds a run" in err
    status, out, err = sskt("train", "--resume", "--out", tmp_path / "run")
    assert status == 0, err
    status, _, err = sskt("train", "--resume", "--out", tmp_path / "nothing")
    assert status == 2 and "no run to resume" in err


def test_recipes_that_ship_are_valid() -> None:
    from sskt.trainer.config import make_config, read_recipe

    folder = Path(__file__).parents[3] / "recipes"
    paper = ("table", "figure")  # those are read by sskt reproduce and sskt sweep
    recipes = sorted(r for r in folder.glob("*.toml") if not r.stem.startswith(paper))
    assert recipes
    for recipe in recipes:
        fields = read_recipe(Path(recipe.stem))
        assert fields == read_recipe(recipe)
        make_config(fields, {"cache": Path("cache")})
    with pytest.raises(MissingData, match=r"shipped recipes: .*stl10-resnet20"):
        read_recipe(Path("nope"))


def test_every_sample_is_used_whatever_the_order_of_windows(config: TrainConfig) -> None:
    memory = 2 * 20 * 12 * 4 / 2**30
    plan = make_plan(dataclasses.replace(config, memory=memory, batch_size=12, epochs=9))
    trainer = Trainer(plan)
    images = []
    for trainer.epoch in range(6):
        images.append(trainer.train_epoch()["images"])
    assert images == [60] * 6


def test_a_run_resumes_after_its_cache_has_grown(
    sskt: Call, images: Path, tiny: Source, tmp_path: Path
) -> None:
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    options = StageOptions(workers=0)
    cache_teachers(views, [tiny], parse_encoding("f16"), 1, tmp_path / "cache", options)
    arguments = ["--target", images, "--policy", "pad-crop-flip", "--source", "tiny"]
    arguments += ["--cache", tmp_path / "cache", "--epochs", 1, "--out", tmp_path / "run"]
    assert sskt("train", *arguments)[0] == 0
    cache_teachers(views, [tiny], parse_encoding("f16"), 2, tmp_path / "cache", options)
    (tmp_path / "run/metrics.jsonl").write_text("")
    status, _, err = sskt("train", "--resume", "--out", tmp_path / "run")
    assert status == 0, err
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


def test_an_emptied_shard_is_not_trained_on(
    config: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    options = StageOptions(workers=0, shard_rows=16)
    report = cache_teachers(views, [tiny], parse_encoding("f16"), 1, tmp_path, options)
    label_set = report.label_sets[0]
    (label_set.path / "labels/c/0/1/0").write_bytes(b"")
    with pytest.raises(CorruptStore, match=r"labels/c/0/1/0"):
        Trainer(make_plan(dataclasses.replace(config, cache=tmp_path))).train_epoch()


def test_skipped_samples_are_left_out_and_counted(
    config: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    broken = sorted((folder / "train/apple").iterdir())
    for path in broken:
        path.write_bytes(path.read_bytes()[:40])
    views = Views(open_target(str(folder)), parse_policy("pad-crop-flip"))
    options = StageOptions(workers=0, shard_rows=10, on_error="skip")
    report = cache_teachers(views, [tiny], parse_encoding("u8"), 2, tmp_path / "cache", options)
    assert len(report.skipped) == len(broken) == 20
    assert report.label_sets[0].coverage() == [1.0, 1.0]
    plan = make_plan(dataclasses.replace(config, target=str(folder), cache=tmp_path / "cache"))
    record = Trainer(plan).train_epoch()
    assert (record["images"], record["skipped"]) == (40, 20)
    scratch = dataclasses.replace(config, target=str(folder), source=[], tm=False)
    with pytest.raises(BadImage, match=r"cannot decode image .*/train/apple/\d+\.png"):
        Trainer(make_plan(scratch)).train_epoch()
    skipping = dataclasses.replace(scratch, on_error="skip")
    record = Trainer(make_plan(skipping)).train_epoch()
    assert (record["images"], record["skipped"]) == (40, 20)
    (folder / "train/bear/0000.png").unlink()
    with pytest.raises(InputError, match="cannot read image"):
        Trainer(dataclasses.replace(make_plan(skipping), views=views)).train_epoch()


def test_divergence_is_said(config: TrainConfig) -> None:
    plan = make_plan(dataclasses.replace(config, lr=1e18, source=[], tm=False))
    with pytest.raises(Diverged, match="the loss is not finite in epoch 1"):
        Trainer(plan).train_epoch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--live"], "name them with --source"),
        (["--tm"], "no label sets in labels (default); make them with: sskt cache-teachers"),
        (["--weights", "x"], "--weights goes with --live"),
        (["--momentum", "-1"], "momentum must be at least 0, found -1.0"),
        (["--dampening", "1.1"], "dampening must be at most 1, found 1.1"),
        (
            ["--dampening", "0.9", "--optimizer", "adamw"],
            "--dampening is a setting of SGD; leave it out with --optimizer adamw",
        ),
        (["--memory", "inf"], "memory must be finite, found inf"),
        (
            ["--lr", "0", "--epochs", "-1", "--ema", "1"],
            "3 settings cannot be used: (1) epochs must be at least 1, found -1; (2) lr must be "
            "above 0, found 0.0; (3) ema must be below 1, found 1.0",
        ),
        (["--device", "cuda:77"], "device cuda:77 cannot be used"),
        (["--model", "resnet21"], "unknown model 'resnet21'; known: "),
    ],
)
def test_options_that_cannot_be_meant(sskt: Call, options: list[str], message: str) -> None:
    status, out, err = sskt("train", "--target", "shapes", "--dry-run", *options)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_out_that_is_a_file(sskt: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = sskt("train", "--target", "shapes", "--limit", 8, "--out", tmp_path / "file")
    first, last = err.splitlines()
    assert status == 2 and first.startswith("shapes train: 8 samples") and "cannot use" in last


# --- what a step and an evaluation compute, written out -----------------------------------------


def by_hand(views: Any) -> Tensor:
    """uint8 ``[n, H, W, 3]`` as the target network expects it: ImageNet mean and std."""
    x = torch.from_numpy(np.asarray(views)).permute(0, 3, 1, 2).double() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)).float()


def held_out(images: Path) -> tuple[Tensor, Tensor]:
    """The test split, read by Pillow: network input and classes in the order of the folders."""
    folders = sorted((images / "test").iterdir())
    files = [(i, file) for i, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    pixels = np.stack([np.asarray(Image.open(file)) for _, file in files])
    return by_hand(pixels), torch.tensor([i for i, _ in files])


def loss_and_top1(network: nn.Module, images: Path) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (%) of a copy of the network in evaluation mode."""
    x, truth = held_out(images)
    with torch.no_grad():
        logits = copy.deepcopy(network).eval()(x)[0]
    right = (logits.argmax(1) == truth).double().mean()
    return float(F.cross_entropy(logits, truth)), 100 * float(right)


def test_evaluation_is_in_evaluation_mode(config: TrainConfig, images: Path) -> None:
    trainer = Trainer(make_plan(config))
    trainer.train_epoch()
    assert trainer.network.training
    loss, top1 = loss_and_top1(trainer.network, images)
    x, truth = held_out(images)
    with torch.no_grad():
        in_training_mode = F.cross_entropy(copy.deepcopy(trainer.network)(x)[0], truth)
    assert abs(float(in_training_mode) - loss) > 0.1, "the two modes must differ"
    found = trainer.evaluate()
    assert found["test_loss"] == pytest.approx(loss, rel=1e-4)
    assert found["test_top1"] == pytest.approx(top1)


def test_averaged_weights_are_evaluated_and_kept_as_the_best(
    config: TrainConfig, images: Path, tmp_path: Path
) -> None:
    """a = decay * a + (1 - decay) * w after each step, in float64 from the weights themselves."""
    decay = 0.8
    trainers: list[Trainer] = []
    average: dict[str, Tensor] = {}
    ends: list[dict[str, Tensor]] = []

    def follow(epoch: int, done: int, total: int) -> None:
        for name, now in trainers[0].network.state_dict().items():
            old = average[name]
            average[name] = decay * old + (1 - decay) * now.double() if now.ndim else now.clone()
        if done == total:
            ends.append(dict(average))

    config = dataclasses.replace(config, ema=decay, epochs=3)
    trainers.append(Trainer(make_plan(config), Hooks(step=follow)))
    average |= {k: v.double() for k, v in trainers[0].network.state_dict().items()}
    found = trainers[0].run(tmp_path / "run")

    network = trainers[0].network
    weights = [{k: v.to(network.state_dict()[k].dtype) for k, v in end.items()} for end in ends]
    last, _ = loss_and_top1(network, images)
    for record, averaged in zip(found, weights, strict=True):
        network.load_state_dict(averaged)
        assert record["test_loss"] == pytest.approx(loss_and_top1(network, images)[0], rel=1e-3)
    assert abs(last - found[-1]["test_loss"]) > 0.1, "the weights of the last step must differ"
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert best["epoch"] == int(np.argmax([r["test_top1"] for r in found]))
    for name, value in weights[best["epoch"]].items():
        torch.testing.assert_close(best["model"][name], value, rtol=1e-4, atol=1e-5)


def sgd(config: TrainConfig, **fields: Any) -> Trainer:
    """A training from scratch whose update is lr times the gradient."""
    plain: dict[str, Any] = {"source": [], "tm": False, "momentum": 0.0, "weight_decay": 0.0}
    return Trainer(make_plan(dataclasses.replace(config, **plain, **fields)))


def gradient(trainer: Trainer, samples: Any, views: Any, parts: int = 1) -> list[Tensor]:
    """Of the mean cross-entropy over a batch, which passes through the network in parts."""
    network = copy.deepcopy(trainer.network).train()
    total = [torch.zeros_like(p) for p in network.parameters()]
    for part in np.array_split(np.arange(len(samples)), parts):
        truth = torch.from_numpy(samples[part] // 20)  # three classes of 20 images
        loss = F.cross_entropy(network(by_hand(views[part]))[0], truth)
        new = torch.autograd.grad(loss, list(network.parameters()))
        for mine, one in zip(total, new, strict=True):
            mine += one * len(part) / len(samples)
    return total


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_follows_the_gradient_of_its_own_batch(config: TrainConfig, accumulate: int) -> None:
    trainer = sgd(config, lr=0.05, accumulate=accumulate)
    for samples in (np.arange(0, 60, 3), np.arange(1, 60, 4)):
        views = trainer.views.batch(samples, 0)
        expected = gradient(trainer, samples, views, accumulate)
        before = [p.detach().clone() for p in trainer.network.parameters()]
        trainer.step(batch_of(trainer, samples))
        after = [p.detach() for p in trainer.network.parameters()]
        moved = [(old - new) / 0.05 for old, new in zip(before, after, strict=True)]
        missed = norm([a - b for a, b in zip(moved, expected, strict=True)])
        assert missed < 0.01 * norm(expected)


def test_the_norm_of_the_gradient_is_clipped(config: TrainConfig) -> None:
    samples = np.arange(0, 60, 3)
    whole = 0.0
    for share in (None, 2.0, 0.25):
        clip = share and share * whole
        trainer = sgd(config, lr=1.0, clip_grad=clip)
        views = trainer.views.batch(samples, 0)
        expected = gradient(trainer, samples, views)
        whole = norm(expected)
        before = [p.detach().clone() for p in trainer.network.parameters()]
        trainer.step(batch_of(trainer, samples))
        moved = [b - p.detach() for b, p in zip(before, trainer.network.parameters(), strict=True)]
        scale = min(1.0, share or 1.0)
        assert norm(moved) == pytest.approx(scale * whole, rel=1e-3)
        missed = norm([a - scale * b for a, b in zip(moved, expected, strict=True)])
        assert missed < 1e-3 * whole, "its direction stays"


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_step_s_loss_is_equation_1(config: TrainConfig, temperature: float) -> None:
    """CE + alpha * T^2 * CE(softmax(z_s / T), softmax(z_t / T)), from the stored probabilities."""
    alpha, seed, samples = 0.7, 2, np.arange(5, 45, 3)
    fields: dict[str, Any] = {"alpha": alpha, "temperature": temperature, "loss": "ce+ce"}
    trainer = Trainer(make_plan(dataclasses.replace(config, **fields)))
    trainer.network.train()
    views = trainer.views.batch(samples, seed)
    loss, parts = trainer.losses(batch_of(trainer, samples, seed))

    (label_set,) = trainer.plan.label_sets.values()
    reader = open_set(label_set.path)
    p = np.stack([np.asarray(reader.label(seed, int(s))) for s in samples]) ** (1 / temperature)
    soft = torch.from_numpy(p / p.sum(axis=1, keepdims=True))
    with torch.no_grad():
        logits, auxiliary = trainer.network(by_hand(views))
    primary = float(F.cross_entropy(logits.double(), torch.from_numpy(samples // 20)))
    log_q = F.log_softmax(auxiliary["tiny"].double() / temperature, 1)
    transferred = -(temperature**2) * float((soft * log_q).sum(1).mean())
    assert float(parts["loss_primary"].detach()) == pytest.approx(primary, rel=1e-4)
    assert float(parts["loss_tiny"].detach()) == pytest.approx(transferred, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(primary + alpha * transferred, rel=1e-4)


def orders(config: TrainConfig, epochs: int) -> list[list[int]]:
    """The samples of each epoch in the order of its steps."""
    trainer = Trainer(make_plan(config))
    found: list[list[int]] = []
    step = trainer.step

    def recorded(batch: SoftLabelBatch) -> dict[str, Any]:
        found[-1] += batch.samples.tolist()
        return step(batch)

    trainer.step = recorded  # type: ignore[assignment]
    for trainer.epoch in range(epochs):
        found.append([])
        trainer.train_epoch()
    return found


def test_every_epoch_has_an_order_of_its_own(config: TrainConfig) -> None:
    config = dataclasses.replace(config, epochs=9)
    found = orders(config, 4)
    everything = list(range(60))
    assert all(sorted(order) == everything != order for order in found)
    assert len({tuple(order) for order in found}) == 4
    assert orders(config, 2) == found[:2]
    assert orders(dataclasses.replace(config, seed=1), 1) != found[:1]


def test_the_samples_of_a_window_have_an_order_of_their_own(config: TrainConfig) -> None:
    config = dataclasses.replace(config, epochs=9, memory=2 * 20 * 12 * 4 / 2**30)
    assert len(make_plan(config).windows(0)) == 4
    found = orders(config, 6)
    firsts = [[s for s in order if s < 16] for order in found]  # one block of the label set
    assert all(sorted(order) == list(range(60)) for order in found)
    assert len({tuple(first) for first in firsts}) == 6


def test_dropout_depends_on_the_run_the_epoch_the_step_and_the_process(config: TrainConfig) -> None:
    def mask() -> tuple[bool, ...]:
        return tuple(bool(kept) for kept in F.dropout(torch.ones(64), 0.5))

    def masks(seed: int) -> list[tuple[bool, ...]]:
        trainer = Trainer(make_plan(dataclasses.replace(config, seed=seed, source=[], tm=False)))
        found: list[tuple[bool, ...]] = []
        step = trainer.step
        trainer.network.register_forward_pre_hook(lambda module, x: found.append(mask()))
        for trainer.epoch in range(2):
            trainer.train_epoch(2)
        assert trainer.step is step
        return found

    first = masks(0)
    assert len(set(first + masks(1))) == 8  # two epochs of two steps, of two seeds
    assert masks(0) == first
    Ranks(1, 2).seed_dropout(0, 0, 0, 0)
    assert mask() != first[0]


def test_a_plateau_is_one_of_the_test_loss(config: TrainConfig, tmp_path: Path) -> None:
    """On noise the training loss falls and the test loss does not."""
    fields: dict[str, Any] = {
        "schedule": "plateau",
        "patience": 0,
        "gamma": 0.5,
        "lr": 0.05,
        "epochs": 7,
    }
    config = dataclasses.replace(config, **fields, source=[], tm=False)
    found = Trainer(make_plan(config)).run(tmp_path / "run")

    def expected(key: str) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.05)
        schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        rates = []
        for record in found:
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step(record[key])
        return rates

    assert [r["lr"] for r in found] == pytest.approx(expected("test_loss"))
    assert expected("test_loss") != expected("loss") and found[-1]["lr"] < 0.05


def everything_in(out: Path) -> dict[str, Any]:
    """All of ``last.pt`` by dotted names, but for the times."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            name = f"{prefix}.{key}"
            if key in (*TIMES, "waited"):
                continue
            if isinstance(inner, dict | list | tuple) and len(inner):
                walk(name, inner)
            else:
                flat[name] = inner

    walk("", torch.load(out / "last.pt", weights_only=True))
    return flat


def test_a_run_cut_within_an_epoch_ends_in_the_same_state(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, averages, the optimizer's momenta, schedule, early stop, records and counts."""
    fields: dict[str, Any] = {
        "epochs": 3,
        "ema": 0.9,
        "schedule": "plateau",
        "patience": 0,
        "early_stop": 9,
    }
    config = dataclasses.replace(config, **fields, memory=2 * 20 * 12 * 4 / 2**30)
    Trainer(make_plan(config)).run(tmp_path / "whole")

    def stop(epoch: int, done: int, total: int) -> None:
        if (epoch, done) == (1, 3):
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Autosave, "due", lambda autosave, steps: True)
        Trainer(make_plan(config), Hooks(step=stop)).run(tmp_path / "cut")
    state = torch.load(tmp_path / "cut/last.pt", weights_only=True)
    assert (state["epoch"], state["progress"]["steps"]) == (1, 2)
    Trainer(make_plan(config)).run(tmp_path / "cut", resume=True)
    whole, cut = (everything_in(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        same = torch.equal(value, cut[name]) if isinstance(value, Tensor) else value == cut[name]
        assert same, name


def test_an_epoch_s_loss_is_the_mean_over_its_images(config: TrainConfig) -> None:
    """Batches of 44 and 16: what counts is the image and not the batch."""
    trainer = Trainer(make_plan(dataclasses.replace(config, batch_size=44, alpha=0.3)))
    step, found = trainer.step, list[tuple[int, dict[str, float]]]()

    def recorded(batch: SoftLabelBatch) -> dict[str, Any]:
        parts = step(batch)
        found.append((len(batch), {k: float(v) for k, v in parts.items()}))
        return parts

    trainer.step = recorded  # type: ignore[assignment]
    record = trainer.train_epoch()
    assert [n for n, _ in found] == [44, 16]
    for name in ("loss", "loss_primary", "loss_tiny"):
        assert record[name] == pytest.approx(sum(n * p[name] for n, p in found) / 60, rel=1e-5)
    assert record["train_top1"] == pytest.approx(100 * sum(p["right"] for _, p in found) / 60)


def test_a_resumed_run_stops_early_where_the_whole_one_does(
    config: TrainConfig, tmp_path: Path
) -> None:
    """A learning rate that changes nothing: the first epoch stays the best."""
    config = dataclasses.replace(config, epochs=9, early_stop=3, lr=1e-9, source=[], tm=False)
    whole = Trainer(make_plan(config)).run(tmp_path / "whole")
    assert whole[-1]["stopped_early"] and 4 <= len(whole) < 9
    last = len(whole) - 1

    def stop(epoch: int, done: int, total: int) -> None:
        if epoch == last:
            raise Stopped

    with pytest.raises(Stopped):
        Trainer(make_plan(config), Hooks(step=stop)).run(tmp_path / "cut")
    resumed = Trainer(make_plan(config)).run(tmp_path / "cut", resume=True)
    assert [r["epoch"] for r in resumed] == [r["epoch"] for r in whole]


def test_a_run_is_not_resumed_with_other_labels(
    config: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    views = Views(open_target(str(images)), parse_policy("pad-crop-flip"))
    for encoding in ("f16", "u8"):
        how = StageOptions(workers=0)
        cache_teachers(views, [tiny], parse_encoding(encoding), 1, tmp_path / encoding, how)

    def stop(epoch: int, done: int, total: int) -> None:
        if epoch == 1:
            raise Stopped

    fields: dict[str, Any] = {"epochs": 2, "source": ["tiny"], "seeds": 1}
    begun = dataclasses.replace(config, cache=tmp_path / "f16", **fields)
    with pytest.raises(Stopped):
        Trainer(make_plan(begun), Hooks(step=stop)).run(tmp_path / "run")
    with pytest.raises(InputError, match=r"was trained with digests .* resume it with the same"):
        other = dataclasses.replace(begun, cache=tmp_path / "u8")
        Trainer(make_plan(other)).run(tmp_path / "run", resume=True)


# --- several sources ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other() -> Source:
    return open_source(parse_source(f"other={TINY}:build"), preprocessing="size=12")


def label(views: Views, source: Source, cache: Path) -> None:
    how = StageOptions(workers=0, shard_rows=16, on_error="skip")
    cache_teachers(views, [source], parse_encoding("f16"), 1, cache, how)


def test_sources_that_saw_different_images_are_refused(
    config: TrainConfig, images: Path, tiny: Source, other: Source, tmp_path: Path
) -> None:
    """One file of sixty changes between the two runs, and its name and size do not."""
    target = in_memory(open_target(str(images)), 1e9)
    assert target.images is not None
    label(Views(target, parse_policy("none")), tiny, tmp_path)
    both = dataclasses.replace(config, source=["tiny", "other"], cache=tmp_path, policy="none")
    changed = target.images.copy()
    changed[37, 12, 12] ^= 1
    altered = dataclasses.replace(target, images=changed)
    assert altered.fingerprint == target.fingerprint
    label(Views(altered, parse_policy("none")), other, tmp_path)
    with pytest.raises(ViewMismatch, match=r"of sample 37 under view seed 0 \(1 samples differ\)"):
        Trainer(make_plan(both)).train_epoch()


def test_a_sample_that_any_source_lacks_is_left_out(
    config: TrainConfig, images: Path, tiny: Source, other: Source, tmp_path: Path
) -> None:
    """Each source was run while another file was unreadable, of the same name and size."""
    import shutil

    folder = shutil.copytree(images, tmp_path / "images")
    files = sorted((folder / "train").glob("*/*"))
    for source, lacking in ((tiny, [5, 6]), (other, [6, 41])):
        whole = {i: files[i].read_bytes() for i in lacking}
        for i, data in whole.items():
            files[i].write_bytes(bytes(len(data)))
        label(Views(open_target(str(folder)), parse_policy("none")), source, tmp_path / "cache")
        for i, data in whole.items():
            files[i].write_bytes(data)
    fields: dict[str, Any] = {"target": str(folder), "cache": tmp_path / "cache", "policy": "none"}
    for sources in (["tiny", "other"], ["other", "tiny"]):
        both = dataclasses.replace(config, source=sources, **fields)
        (order,) = orders(both, 1)
        assert sorted(order) == [i for i in range(60) if i not in (5, 6, 41)]


def test_empty_labels_of_a_view_that_was_seen_are_refused(
    config: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    """A row without a label whose view check is there: labels were lost, no image was skipped."""
    views = Views(open_target(str(images)), parse_policy("none"))
    label(views, tiny, tmp_path)
    config = dataclasses.replace(config, cache=tmp_path, policy="none")
    (found,) = make_plan(config).label_sets.values()
    opened = create_label_set(tmp_path, found.spec, found.classes, 1)
    shard = opened.shard(0, 1)
    encoded = opened.read(0, shard.start, shard.stop)
    encoded["labels"][3] = np.nan
    opened.write(shard, encoded, opened.read_checks(0, shard.start, shard.stop))
    opened.close()
    with pytest.raises(CorruptStore, match="empty though their views were seen; run sskt verify"):
        Trainer(make_plan(config)).train_epoch()


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "a sum of 12,000": ("f32", lambda rows: rows["labels"].__iadd__(np.float32(9.4))),
    "a NaN": ("f16", lambda rows: rows["labels"].__setitem__((3, 5), np.nan)),
    "a positive logarithm": ("f16", lambda rows: rows["labels"].__setitem__((3, 5), 0.5)),
    "u8 without 255": ("u8", lambda rows: np.minimum(rows["labels"], 254, out=rows["labels"])),
    "an index beyond the classes": (
        "topk-3",
        lambda rows: rows["index"].__setitem__((3, 1), 12),
    ),
    "top-k of more than 1": ("topk-3", lambda rows: rows["value"].__setitem__((3, 1), 1.0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_labels_that_are_no_distribution_are_refused(
    config: TrainConfig, images: Path, tiny: Source, tmp_path: Path, fault: str
) -> None:
    name, change = FAULTS[fault]
    views = Views(open_target(str(images)), parse_policy("none"))
    how = StageOptions(workers=0, shard_rows=16)
    cache_teachers(views, [tiny], parse_encoding(name), 1, tmp_path, how)
    config = dataclasses.replace(config, cache=tmp_path, policy="none")
    (found,) = make_plan(config).label_sets.values()
    assert Trainer(make_plan(config)).train_epoch()["views_checked"] == 60
    opened = create_label_set(tmp_path, found.spec, found.classes, 1)
    shard = opened.shard(0, 1)
    encoded = opened.read(0, shard.start, shard.stop)
    change(encoded)
    opened.write(shard, encoded, opened.read_checks(0, shard.start, shard.stop))
    opened.close()
    with pytest.raises(CorruptStore, match=r"of sample (16|19) .* is no probability distribution"):
        Trainer(make_plan(config)).train_epoch()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "vgg16"}, "vgg16 cannot take views of 24x24 pixels .* larger, or another --m"),
        (
            {"model": "resnet18", "stem": "imagenet", "batch_size": 1},
            "BatchNorm of resnet18 needs at least two sampl",
        ),
    ],
)
def test_inputs_that_are_too_small_are_named(
    config: TrainConfig, fields: dict[str, Any], message: str
) -> None:
    small = dataclasses.replace(config, source=[], tm=False, **fields)
    with pytest.raises(InputError, match=message):
        Trainer(make_plan(small)).train_epoch(1)
