"""A plateau on the total loss: labels of the test split, the loss on it, the rate that follows."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError, MissingData, ViewMismatch
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.label_sets.create import create_label_set, list_label_sets
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.source import Source
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig, make_config
from sskt.trainer.data.label_passes import label_passes
from sskt.trainer.loop.runs import run_training
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer
from sskt.trainer.paper.tables import Choices, read_table

Call = Callable[..., tuple[int, str, str]]


def label(images: Path, tiny: Source, cache: Path, split: str, encoding: str = "f32") -> None:
    """Labels of a split of the made images, under one view seed."""
    policy = "pad-crop-flip" if split == "train" else "none"
    views = Views(open_target(str(images), split), parse_policy(policy))
    cache_teachers(views, [tiny], parse_encoding(encoding), 1, cache, StageOptions(workers=0))


@pytest.fixture
def following(config: TrainConfig, images: Path, tiny: Source, tmp_path: Path) -> TrainConfig:
    """A training whose plateau follows the total loss; the training split has labels."""
    label(images, tiny, tmp_path / "cache", "train")
    return dataclasses.replace(
        config,
        cache=tmp_path / "cache",
        schedule="plateau",
        plateau_on="total",
        patience=0,
        gamma=0.5,
        alpha=0.7,
        temperature=2.0,
    )


def total_by_rule(trainer: Trainer, tiny: Source, samples: list[int]) -> float:
    """Equation 1 over samples of the test split in eval mode, from the source itself."""
    assert trainer.test is not None
    config = trainer.plan.config
    views = torch.from_numpy(trainer.test.batch(np.arange(24), 0))
    pixels = views.permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in MEAN_STD)
    network = trainer.network.eval().double()
    with torch.no_grad():
        logits, auxiliary = network((pixels - mean) / std)
        soft = torch.softmax(tiny.log_probabilities(views).double() / config.temperature, 1)
        truth = torch.from_numpy(trainer.test.target.labels)
        primary = torch.nn.functional.cross_entropy(logits, truth)
        log_q = torch.log_softmax(auxiliary["tiny"] / config.temperature, 1)
        rows = -(soft * log_q).sum(1)[samples]
    network.float()
    return float(primary + config.alpha * config.temperature**2 * rows.mean())


MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_total_is_equation_1_on_the_test_split(
    following: TrainConfig,
    images: Path,
    tiny: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sskt.trainer.loop.evaluate.BATCH", 10)  # batches of 10, 10 and 4
    label(images, tiny, tmp_path / "cache", "test")
    trainer = Trainer(make_plan(following))
    trainer.train_epoch()
    found = trainer.evaluate()
    expected = total_by_rule(trainer, tiny, list(range(24)))
    assert found["test_loss_total"] == pytest.approx(expected, rel=1e-5)
    assert found["test_loss_total"] > found["test_loss"] + 0.1
    live = Trainer(make_plan(dataclasses.replace(following, live=True, cache=None), [tiny]))
    live.network.load_state_dict(trainer.network.state_dict())
    again = live.evaluate()
    assert again["test_loss_total"] == pytest.approx(expected, rel=1e-5)
    primary = Trainer(make_plan(dataclasses.replace(following, plateau_on="primary")))
    assert "test_loss_total" not in primary.evaluate()


@pytest.mark.slow
def test_the_rate_follows_it_and_not_the_primary_loss(
    following: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    label(images, tiny, tmp_path / "cache", "test")
    config = dataclasses.replace(following, epochs=6, lr=0.003, alpha=1.0)

    def rates(found: list[dict[str, Any]], key: str) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.003)
        scheduler, lrs = ReduceLROnPlateau(optimizer, factor=0.5, patience=0), []
        for record in found:
            lrs.append(optimizer.param_groups[0]["lr"])
            scheduler.step(record[key])
        return lrs

    total = run_training(dataclasses.replace(config, out=tmp_path / "total"))
    assert [r["lr"] for r in total] == rates(total, "test_loss_total") != rates(total, "test_loss")
    config = dataclasses.replace(config, plateau_on="primary", out=tmp_path / "primary")
    primary = run_training(config)
    assert [r["lr"] for r in primary] == rates(primary, "test_loss")
    assert primary[-1]["lr"] < total[-1]["lr"] == 0.003


def test_missing_labels_are_named_with_the_command_that_makes_them(
    following: TrainConfig, images: Path, tmp_path: Path, sskt: Call
) -> None:
    with pytest.raises(MissingData) as refused:
        make_plan(following)
    message = str(refused.value)
    assert message.startswith("--plateau-on total needs labels of images test too, and ")
    assert message.endswith(", or give --plateau-on primary")
    found = re.search("make them with sskt (cache-teachers .*), or give", message)
    assert found
    command = shlex.split(found[1])
    assert command[command.index("--split") + 1] == "test"
    assert command[command.index("--encoding") + 1] == "f32"
    status, _, err = sskt(*command, "--workers", 0)
    assert status == 0, err
    plan = make_plan(following)
    assert plan.test_sets["tiny"].spec["target"]["split"] == "test"
    assert np.isfinite(Trainer(plan).evaluate()["test_loss_total"])


def test_labels_made_otherwise_do_not_pass_for_them(
    following: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    label(images, tiny, tmp_path / "cache", "test", "u8")
    with pytest.raises(MissingData, match="there are none of tiny; make them with"):
        make_plan(following)


def test_labels_of_other_test_images_are_refused(
    following: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    label(images, tiny, tmp_path / "cache", "test")
    plan = make_plan(following)
    assert plan.test is not None
    pixels = np.stack([plan.test.target.read(i) for i in range(24)])
    pixels[0, 5, 5] ^= 1
    test = dataclasses.replace(plan.test.target, images=pixels)
    changed = dataclasses.replace(plan, test=dataclasses.replace(plan.test, target=test))
    with pytest.raises(ViewMismatch, match="sample 0 under view seed 0 is not the image"):
        Trainer(changed).evaluate()


def test_samples_without_a_label_are_left_out_of_the_auxiliary_mean(
    following: TrainConfig, images: Path, tiny: Source, tmp_path: Path
) -> None:
    label(images, tiny, tmp_path / "cache", "test")
    (stored,) = (
        s for s in list_label_sets(tmp_path / "cache") if s.spec["target"]["split"] == "test"
    )
    opened = create_label_set(tmp_path / "cache", stored.spec, stored.classes, 1)
    shard = opened.shard(0, 0)
    encoded, checks = opened.read(0, 0, 24), opened.read_checks(0, 0, 24)
    encoded["labels"][3:5], checks[3:5] = np.nan, 0
    opened.write(shard, encoded, checks)
    opened.close()
    trainer = Trainer(make_plan(following))
    expected = total_by_rule(trainer, tiny, [i for i in range(24) if i not in (3, 4)])
    assert trainer.evaluate()["test_loss_total"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosine"}, "--plateau-on total goes with --schedule plateau, found cosine"),
        ({"method": "maxl", "source": []}, "--method maxl has no auxiliary labels of the test"),
        ({"test_split": "none"}, "--schedule plateau follows the test loss; give a --test-split"),
        ({"plateau_on": "both"}, "unknown plateau_on 'both'; known: primary, total"),
    ],
)
def test_what_has_no_total_on_a_test_split(fields: dict[str, Any], message: str) -> None:
    given = {"target": "stl10", "source": ["imagenet"], "cache": "labels", "schedule": "plateau"}
    make_config(given | {"plateau_on": "total"})
    with pytest.raises(InputError, match=message):
        make_config(given | {"plateau_on": "total"} | fields)


def test_a_run_from_scratch_has_nothing_to_add(following: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(following, source=[], tm=False, epochs=1, out=tmp_path / "run")
    (record,) = run_training(config)
    assert "test_loss_total" not in record and "test_loss" in record


def test_the_video_tables_label_the_test_split_too(sskt: Call) -> None:
    for name, targets in (("table6", ["ucf101", "hmdb51"]), ("table8", ["ucf101", "hmdb51"])):
        table = read_table(name)
        choices = Choices(None, None, "released", {}, {}, dict.fromkeys(table.needs, "k.pth"))
        configs = [choices.config(table, row, cache="labels") for row in table.rows]
        passes = [p for p in label_passes(configs) if p.config.split == "test"]
        assert [p.config.target for p in passes] == targets
        for p in passes:
            assert p.config.policy == "clip-center-crop:version=2,frames=16,size=112"
            assert p.seeds == 1
            assert p.sources == ("places365:resnet50@112", "imagenet:resnet50@112")
    status, out, err = sskt("reproduce", "table6", "--row", 2, "--dry-run", "--json")
    assert status == 0, err
    splits = [(s["target"], s["split"], s["seeds"]) for s in json.loads(out)["label_sets"]]
    assert splits == [("ucf101", "train", 10), ("ucf101", "test", 1)]
    _, out, _ = sskt("reproduce", "table6", "--row", 2, "--dry-run")
    assert re.search(r"places365:resnet50@112 +ucf101 test +\? +1 +\?", out)
