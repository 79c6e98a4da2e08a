"""Training from stored labels: the same numbers as live, the right seeds, exact resuming."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY

from sskt.teacher_cache.encodings import parse_encoding
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
from sskt.teacher_cache.policies import parse_policy
from sskt.teacher_cache.sources import Source
from sskt.teacher_cache.stage import StageOptions, cache_teachers
from sskt.teacher_cache.store import list_label_sets
from sskt.teacher_cache.targets import open_target
from sskt.teacher_cache.views import Views
from sskt.teacher_cache.zoo import open_source, parse_source
from sskt.trainer.config import TrainConfig
from sskt.trainer.feed import in_memory, normalise
from sskt.trainer.labels import StoredLabels, Window, epoch_windows
from sskt.trainer.loop import Trainer
from sskt.trainer.plan import make_plan
from sskt.trainer.progress import Hooks

Call = Callable[..., tuple[int, str, str]]
SEEDS = 3
TIMES = ("seconds", "label_wait_seconds")


def gradients(trainer: Trainer, samples: Any, views: Any) -> tuple[float, dict[str, Any]]:
    trainer.network.train()
    loss, _ = trainer.losses(samples, views)
    trainer.network.zero_grad()
    torch.autograd.backward(loss)
    named = trainer.network.named_parameters()
    return float(loss.detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}


def compare_with_live(config: TrainConfig, sources: list[Source], samples: Any) -> None:
    stored = Trainer(make_plan(config))
    live = Trainer(make_plan(dataclasses.replace(config, live=True), sources))
    window = Window(1, ((0, len(stored.views.target)),))
    stored.labels.enter(window, None)
    views = torch.from_numpy(stored.views.batch(samples, 1))
    assert stored.labels.check(samples, views.numpy()) > 0
    loss, grads = gradients(stored, samples, views)
    live_loss, live_grads = gradients(live, samples, views)
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
    with pytest.raises(ViewMismatch, match=r"sample \d+ under view seed 0 is not the picture"):
        trainer.train_epoch()


def test_refusals_name_the_field_or_the_seeds(config: TrainConfig, label_cache: Path) -> None:
    with pytest.raises(SpecMismatch, match=r"views\.policy is 'pad-crop-flip', expected 'none'"):
        make_plan(dataclasses.replace(config, policy="none"))
    with pytest.raises(SpecMismatch, match=r"views\.parameters\.padding is 4, expected 2"):
        make_plan(dataclasses.replace(config, policy="pad-crop-flip:padding=2"))
    with pytest.raises(SpecMismatch, match=r"target\.size is 60, expected 30"):
        make_plan(dataclasses.replace(config, limit=30))
    with pytest.raises(IncompleteLabels, match=r"lacks seeds 3-4 of 5; run sskt cache-teachers"):
        make_plan(dataclasses.replace(config, seeds=5, epochs=5))
    with pytest.raises(MissingData, match=r"no labels of source imagenet in .*cache-teachers"):
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
    assert f"(topk-3, 1 seeds, gradient error {lost / 100:.2g} at T=1, " in shown
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


def test_labels_read_by_windows_are_those_of_the_slab(config: TrainConfig) -> None:
    sets = make_plan(config).label_sets
    whole, parts = (StoredLabels(sets, torch.device("cpu")) for _ in range(2))
    whole.enter(Window(2, ((0, 60),)), None)
    windows = epoch_windows(60, 2, 32, 16, 0, 0)
    assert len(windows) == 2
    for i, window in enumerate(windows):
        parts.enter(window, windows[i + 1] if i + 1 < len(windows) else None)
        samples = window.samples[::-3].copy()
        empty = torch.empty(0)
        expected = whole.soft(samples, empty, 3.0)["tiny"]
        assert torch.equal(parts.soft(samples, empty, 3.0)["tiny"], expected)
    whole.close()
    parts.close()


def test_a_small_memory_budget_trains_by_windows(config: TrainConfig) -> None:
    plan = make_plan(dataclasses.replace(config, memory=2 * 20 * 12 * 4 / 2**30))
    assert len(plan.windows(0)) == 4 and plan.steps_per_epoch == 4
    assert Trainer(plan).train_epoch()["images"] == 60


def test_pictures_in_ram_are_those_of_the_files(images: Path) -> None:
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
    torch.testing.assert_close(normalise(views), chain(views.permute(0, 3, 1, 2)))


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
        ("precision = 'int8'", "unknown precision 'int8'; known: float32, bfloat16"),
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
        assert "temperature" in err


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

    folder = Path(__file__).parents[1] / "recipes"
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
    label_set.commit_path(label_set.shard(0, 1)).write_bytes(b"")
    with pytest.raises(CorruptStore, match=r"labels/c/0/1/0 is gone or empty"):
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
        (["--live"], "--live needs --source"),
        (["--tm"], "--tm needs --source"),
        (["--weights", "x"], "--weights goes with --live"),
        (["--momentum", "-1"], "momentum must be in 0 .. 1"),
        (["--memory", "inf"], "memory must be finite"),
        (["--device", "cuda:77"], "device cuda:77 cannot be used"),
        (["--model", "resnet21"], "unknown model 'resnet21'; known: resnet20"),
    ],
)
def test_options_that_cannot_be_meant(sskt: Call, options: list[str], message: str) -> None:
    status, out, err = sskt("train", "--target", "shapes", "--dry-run", *options)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_out_that_is_a_file(sskt: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = sskt("train", "--target", "shapes", "--limit", 8, "--out", tmp_path / "file")
    assert status == 2 and "cannot use" in err and err.count("\n") == 1
