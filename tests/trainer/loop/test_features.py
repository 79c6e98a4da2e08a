"""Training from features and from logits: losses, heads, label sets that fit, live sources."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import TINY, batch_of
from support.servers import serving
from torch import Tensor

from sskt.teacher_cache.api import cache_teachers, open_target
from sskt.teacher_cache.errors import InputError, MissingData, SpecMismatch
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.sources.source import Source
from sskt.trainer.config import TrainConfig, read_stored
from sskt.trainer.data import following
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_label_loader import SoftLabelLoader
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.runs import open_live_sources, run_training
from sskt.trainer.loop.setup import Plan, make_plan
from sskt.trainer.loop.trained import open_run
from sskt.trainer.loop.trainer import Trainer

Call = Callable[..., tuple[int, str, str]]

HEAD, MODULE, LOGITS, SOFT = "features", "features:3", "logits", "soft-labels"
OUTPUTS = (HEAD, MODULE, LOGITS, SOFT)
D, C, SEEDS = 16, 12, 2
ROWS = np.arange(3, 40, 2)
TIMES = ("seconds", "label_wait_seconds")


@pytest.fixture(scope="module")
def caches(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for each output of the tiny source, over the made images."""
    folder = tmp_path_factory.mktemp("outputs")
    for output in OUTPUTS:
        cache_teachers(
            open_target(images), f"tiny={TINY}:build", cache=folder / output, seeds=SEEDS,
            policy="pad-crop-flip", output=output, workers=0, shard_rows=16,
        )  # fmt: skip
    return folder


def of(config: TrainConfig, caches: Path, output: str, **given: Any) -> TrainConfig:
    settings: dict[str, Any] = {"cache": caches / output, "source": ["tiny"]} | given
    return dataclasses.replace(config, **settings)


def only_set(cache: Path) -> LabelSet:
    (label_set,) = list_label_sets(cache)
    return label_set


def gradients(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    trainer.network.train()
    loss, _ = trainer.losses(batch_of(trainer, ROWS, 1))
    trainer.network.zero_grad()
    torch.autograd.backward(loss)
    named = trainer.network.named_parameters()
    return float(loss.detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize(
    ("output", "loss", "taken", "width"),
    [(HEAD, "ce", SOFT, C), (MODULE, "cosine", "features", D), (LOGITS, "bce", LOGITS, C),
     (SOFT, "ce", SOFT, C)],
)  # fmt: skip
def test_auto_takes_what_the_label_set_holds(
    config: TrainConfig, caches: Path, output: str, loss: str, taken: str, width: int
) -> None:
    plan = make_plan(of(config, caches, output))
    assert plan.auxiliary == {"tiny": loss} and plan.taken == {"tiny": taken}
    assert plan.describe()["config"]["loss"] == f"ce+{loss}"
    assert plan.source_classes == {"tiny": width}
    head: Any = plan.build().heads[0]
    assert head.fc.out_features == width


@pytest.mark.parametrize(
    ("output", "loss", "width"),
    [(HEAD, "cosine", D), (HEAD, "mse", D), (HEAD, "bce", C), (HEAD, "kd", C), (MODULE, "mse", D)],
)
def test_a_loss_that_is_named_decides_the_width_of_the_head(
    config: TrainConfig, caches: Path, output: str, loss: str, width: int
) -> None:
    for tm in (True, False):
        plan = make_plan(of(config, caches, output, loss=f"ce+{loss}", tm=tm))
        assert plan.source_classes == {"tiny": width} and plan.auxiliary == {"tiny": loss}
        record = Trainer(plan).train_epoch(max_steps=1)
        assert 0 < record["loss_tiny"] < 1000


def by_hand(trainer: Trainer, loss: str, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and its gradient by the last layer of the auxiliary head, written out."""
    batch = batch_of(trainer, ROWS, 1)
    trainer.network.train()
    logits, auxiliary = trainer.network(batch.images)
    z = auxiliary["tiny"]
    if loss == "cosine":
        unit, other = z / z.norm(dim=1, keepdim=True), rows / rows.norm(dim=1, keepdim=True)
        found = (1 - (unit * other).sum(1)).sum() / len(ROWS)
    elif loss == "mse":
        found = ((z - rows) ** 2).sum() / (len(ROWS) * D)
    else:
        q, p = 1 / (1 + (-z / temperature).exp()), 1 / (1 + (-rows / temperature).exp())
        found = -(p * q.log() + (1 - p) * (1 - q).log()).sum() / (len(ROWS) * C)
        found = temperature**2 * found
    total = torch.nn.functional.cross_entropy(logits, batch.labels) + 0.7 * found
    head: Any = trainer.network.heads[0]
    (gradient,) = torch.autograd.grad(total, head.fc.weight)
    return total.detach(), gradient


@pytest.mark.parametrize(
    ("output", "loss"), [(HEAD, "cosine"), (MODULE, "cosine"), (HEAD, "mse"), (LOGITS, "bce")]
)
def test_loss_and_gradient_are_those_of_a_loop_written_by_hand(
    config: TrainConfig, caches: Path, output: str, loss: str
) -> None:
    config = of(config, caches, output, loss=f"ce+{loss}", alpha=0.7, temperature=2.0)
    trainer = Trainer(make_plan(config))
    rows = only_set(caches / output).features(1, ROWS)
    total, gradient = by_hand(trainer, loss, rows, 2.0)
    found, grads = gradients(trainer)
    assert found == pytest.approx(float(total), rel=1e-5)
    torch.testing.assert_close(grads["heads.0.fc.weight"], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("output", "loss"),
    [(HEAD, "ce+cosine"), (HEAD, "ce+mse"), (HEAD, "auto"), (MODULE, "auto"), (LOGITS, "auto")],
)
def test_live_sources_give_the_loss_of_the_stored_labels(
    config: TrainConfig, caches: Path, output: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of(config, caches, output, loss=loss, temperature=2.0)
    named = [f"tiny={TINY}:build"]
    live = dataclasses.replace(config, live=True, cache=None, source=named, output=output)
    sources = open_live_sources(live)
    stored_loss, stored = gradients(Trainer(make_plan(config)))
    plain, _ = gradients(Trainer(make_plan(live, sources)))
    assert plain == pytest.approx(stored_loss, rel=1e-3), "float16 loses little"
    rows = Source.log_probabilities
    monkeypatch.setattr(
        Source, "log_probabilities", lambda self, views: rows(self, views).half().float()
    )
    found, grads = gradients(Trainer(make_plan(live, sources)))
    assert found == pytest.approx(stored_loss, rel=1e-5)
    for name, gradient in stored.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert (gradient - grads[name]).abs().max() <= 1e-5 * scale, name


def test_live_sources_give_what_the_loss_takes(config: TrainConfig, caches: Path) -> None:
    named = {"live": True, "cache": None, "source": [f"tiny={TINY}:build"]}
    for loss, kind in (("ce+cosine", "features"), ("ce+bce", "logits"), ("ce+kd", SOFT)):
        live = of(config, caches, HEAD, loss=loss, **named)
        plan = make_plan(live, open_live_sources(live))
        assert plan.held["tiny"].output == kind
    live = dataclasses.replace(live, loss="ce+cosine", output=SOFT)
    with pytest.raises(InputError, match=r"takes other labels than the soft-labels of tiny; give "):
        make_plan(live, open_live_sources(live))


def batches(images: Path, cache: Path, **given: Any) -> list[SoftLabelBatch]:
    settings: dict[str, Any] = {"batch_size": 20, "device": "cpu", "workers": 0} | given
    loader = SoftLabelLoader(open_target(images), cache=cache, **settings)
    found = list(loader)
    loader.close()
    return found


@pytest.mark.parametrize("memory", [8.0, 2 * 20 * D * 2 / 2**30])
def test_a_batch_has_the_features_of_its_samples(
    images: Path, caches: Path, tiny: Source, memory: float
) -> None:
    """Also in windows, as a row of float16 takes 2 D bytes."""
    label_set = only_set(caches / HEAD)
    head = label_set.head
    assert head is not None
    weight, bias = torch.tensor(head.weight).double(), torch.tensor(head.bias).double()
    for batch in batches(images, caches / HEAD, memory=memory):
        features = batch.features("tiny")
        assert features.dtype == torch.float32 and features.shape == (len(batch), D)
        assert torch.equal(features, label_set.features(0, batch.samples))
        z = features.double() @ weight.T + bias
        torch.testing.assert_close(batch.logits("tiny").double(), z, rtol=1e-5, atol=1e-5)
        source = tiny.log_probabilities(batch.views).double()
        for temperature in (1.0, 3.0):
            p = torch.softmax(z / temperature, 1)
            soft = batch.soft("tiny", temperature)
            torch.testing.assert_close(soft.double(), p, rtol=1e-4, atol=1e-6)
            exact = torch.softmax(source / temperature, 1)
            torch.testing.assert_close(p, exact, rtol=0.05, atol=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(batch.soft("tiny", 1.0), torch.softmax(batch.logits("tiny"), 1))
    windows = {batch.position[0] for batch in batches(images, caches / HEAD, memory=memory)}
    assert len(windows) == (1 if memory == 8.0 else 4)


@pytest.mark.parametrize(
    ("output", "method", "what", "instead"),
    [
        (MODULE, "soft", "features without a head, and give no soft labels", "features"),
        (MODULE, "logits", "features without a head, and give no logits", "features"),
        (LOGITS, "soft", "logits, and give no soft labels", "logits"),
        (LOGITS, "features", "logits, and give no features", "logits"),
        (SOFT, "features", "soft labels, and give no features", "soft"),
    ],
)
def test_a_batch_names_the_method_that_its_labels_have(
    images: Path, caches: Path, output: str, method: str, what: str, instead: str
) -> None:
    batch = batches(images, caches / output)[0]
    with pytest.raises(InputError, match=rf"{what}; read them with batch.{instead}\('tiny'\)"):
        getattr(batch, method)("tiny")
    assert getattr(batch, instead)("tiny").shape[1] in (C, D)


def test_a_loader_says_how_wide_its_labels_are(images: Path, caches: Path) -> None:
    widths = {HEAD: (C, D), MODULE: (D, D), LOGITS: (C, C), SOFT: (C, C)}
    for output, (classes, width) in widths.items():
        loader = SoftLabelLoader(open_target(images), cache=caches / output, device="cpu")
        assert loader.source_classes == {"tiny": classes}
        assert loader.source_widths == {"tiny": width}
        assert len(loader.classes("tiny")) == (0 if output == MODULE else C)
        loader.close()


@pytest.mark.parametrize(
    ("output", "loss", "recorded", "needed"),
    [
        (SOFT, "ce+cosine", "--output soft-labels", "features"),
        (SOFT, "ce+bce", "--output soft-labels", "logits"),
        (LOGITS, "ce+mse", "--output logits", "features"),
        (MODULE, "ce+kd", r"--output features \(without a head\)", ""),
        (LOGITS, "ce+ce", "--output logits", ""),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_with_the_command_that_helps(
    config: TrainConfig, caches: Path, output: str, loss: str, recorded: str, needed: str
) -> None:
    with pytest.raises(SpecMismatch) as error:
        make_plan(of(config, caches, output, loss=loss))
    text = str(error.value)
    assert "\n" not in text
    command = shlex.split(text.partition("sskt cache-teachers ")[2])
    assert f"but --loss {loss} was given; leave that out" in text
    assert re.search(recorded, text)
    assert ("--output" in command) == bool(needed)
    if needed:
        assert command[command.index("--output") + 1] == needed


def test_the_command_for_a_cache_without_labels_names_the_output(
    sskt: Call, images: Path, tmp_path: Path
) -> None:
    train = ("train", "--target", images, "--source", "imagenet", "--cache", tmp_path / "none")
    status, _, err = sskt(*train, "--loss", "ce+cosine")
    assert status == 2 and "--output features" in err and len(err.splitlines()) == 1
    status, _, err = sskt(*train)
    assert status == 2 and "--output" not in err


@pytest.fixture
def both(images: Path, tmp_path: Path) -> Path:
    """Soft labels and features of the same source over the same views."""
    for output in (SOFT, HEAD):
        cache_teachers(
            open_target(images), f"tiny={TINY}:build", cache=tmp_path / "both", seeds=SEEDS,
            policy="pad-crop-flip", output=output, workers=0,
        )  # fmt: skip
    return tmp_path / "both"


def test_of_two_sets_of_a_source_the_loss_or_the_user_chooses(
    config: TrainConfig, both: Path
) -> None:
    sets = {s.output: s for s in list_label_sets(both)}
    config = dataclasses.replace(config, cache=both, source=["tiny"])

    def chosen(**given: Any) -> Plan:
        return make_plan(dataclasses.replace(config, **given))

    assert chosen(loss="ce+cosine").label_sets["tiny"].digest == sets["features"].digest
    with pytest.raises(InputError, match=r"several label sets of source tiny fit: .*features-f16"):
        chosen()
    for kind, loss in ((SOFT, "ce"), ("features", "ce")):
        plan = chosen(source=[f"tiny#{sets[kind].digest[:12]}"])
        assert plan.label_sets["tiny"].output == kind and plan.auxiliary == {"tiny": loss}


def test_an_own_loss_gets_what_the_label_set_holds(
    config: TrainConfig, caches: Path, tmp_path: Path
) -> None:
    code = tmp_path / "own.py"
    code.write_text(
        "seen = []\n\ndef own(z_t, held, temperature, gamma):\n"
        "    seen.append((z_t.shape, held))\n    return (z_t - held).abs().mean()\n"
    )
    for output, width in ((HEAD, D), (MODULE, D), (LOGITS, C), (SOFT, C)):
        plan = make_plan(of(config, caches, output, loss=f"ce+{code}:own"))
        trainer = Trainer(plan)
        assert plan.source_classes == {"tiny": width}
        batch = batch_of(trainer, ROWS, 0)
        _, parts = trainer.losses(batch)
        held = (
            batch.soft("tiny", 1.0)
            if output == SOFT
            else only_set(caches / output).features(0, ROWS)
        )
        z = trainer.network(batch.images)[1]["tiny"]
        expected = float((z - held).abs().mean().detach())
        assert float(parts["loss_tiny"].detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("output", [HEAD, MODULE])
@pytest.mark.parametrize("remote", [False, True])
def test_training_follows_features_that_are_still_being_written(
    config: TrainConfig,
    caches: Path,
    tmp_path: Path,
    output: str,
    remote: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second seed is written when the training waits for it: the same numbers."""
    monkeypatch.setattr(following, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(following, "REMOTE_POLL_SECONDS", 0.05)
    config = of(config, caches, output, loss="ce+cosine")
    expected = Trainer(make_plan(config)).run(tmp_path / "before")
    whole = only_set(caches / output)
    cache = tmp_path / "labels"
    shutil.copytree(caches / output, cache)
    late = [(cache / whole.name, key) for s in whole.shards([1]) for key in whole.shard_keys(s)]
    for folder, key in late:
        (folder / key).unlink()
    waits = threading.Event()

    def write() -> None:
        assert waits.wait(60)
        for folder, key in late:
            shutil.copy(whole.path / key, tmp_path / "part")
            (tmp_path / "part").replace(folder / key)

    writer = threading.Thread(target=write)
    writer.start()
    hooks = Hooks(note=lambda sentence: waits.set())
    with serving(cache) if remote else nullcontext("") as url:
        where: dict[str, Any] = {"cache": None, "labels": url} if remote else {"cache": cache}
        follower = Trainer(make_plan(dataclasses.replace(config, follow=5, **where)), hooks)
        assert not waits.is_set()
        found = follower.run(tmp_path / "during")
    writer.join()
    assert waits.is_set() and len(found) == 4
    for before, during in zip(expected, found, strict=True):
        same = {k: v for k, v in before.items() if k not in TIMES}
        assert {k: v for k, v in during.items() if k not in TIMES} == same


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    config: TrainConfig, caches: Path, tmp_path: Path
) -> None:
    config = of(config, caches, MODULE)

    class Stop(Exception):
        pass

    def after_two(record: dict[str, Any]) -> None:
        if record["epoch"] == 1:
            raise Stop

    whole = run_training(dataclasses.replace(config, out=tmp_path / "whole"))
    parts = dataclasses.replace(config, out=tmp_path / "parts")
    with pytest.raises(Stop):
        run_training(parts, Hooks(epoch=after_two))
    resumed = run_training(parts)

    def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k not in TIMES} for r in records]

    assert numbers(resumed) == numbers(whole) and len(whole) == 4
    fields, label_sets = read_stored(tmp_path / "parts" / "config.json")
    label_set = only_set(caches / MODULE)
    stored = {"encoding": str(label_set.encoding), "digest": label_set.digest}
    assert fields["loss"] == "ce+cosine" and label_sets == {"tiny": stored}
    assert whole[-1]["loss_tiny"] < whole[0]["loss_tiny"] <= 2
    network = open_run(tmp_path / "whole", device="cpu")
    found = network.evaluate()["test_top1"]
    best = max(record["test_top1"] for record in whole)
    assert found == pytest.approx(best)
    network.export(tmp_path / "network.safetensors")


def test_a_plateau_on_the_total_loss_takes_features_of_the_test_split(
    config: TrainConfig, caches: Path, images: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"schedule": "plateau", "plateau_on": "total", "alpha": 0.7}
    config = of(config, caches, HEAD, loss="ce+cosine", **given)
    with pytest.raises(MissingData) as error:
        make_plan(config)
    command = str(error.value)
    assert "--encoding f16 --output features" in command
    cache = tmp_path / "cache"
    for split, policy in (("train", "pad-crop-flip"), ("test", "none")):
        cache_teachers(
            open_target(images, split=split), f"tiny={TINY}:build", cache=cache, seeds=SEEDS,
            policy=policy, output=HEAD, workers=0,
        )  # fmt: skip
    trainer = Trainer(make_plan(dataclasses.replace(config, cache=cache)))
    found = trainer.evaluate()
    assert trainer.test is not None
    (tested,) = [s for s in list_label_sets(cache) if s.spec["target"]["split"] == "test"]
    views = torch.from_numpy(trainer.test.batch(np.arange(24), 0))
    trainer.network.eval()
    with torch.no_grad():
        _, auxiliary = trainer.network(trainer.plan.normalise(views))
    rows = tested.features(0, np.arange(24))
    cosine = (auxiliary["tiny"] * rows).sum(1) / auxiliary["tiny"].norm(dim=1) / rows.norm(dim=1)
    expected = found["test_loss"] + 0.7 * float((1 - cosine).mean())
    assert found["test_loss_total"] == pytest.approx(expected, rel=1e-5)


def test_the_first_lines_say_which_loss_is_taken(
    sskt: Call, images: Path, caches: Path, tmp_path: Path
) -> None:
    lines = {
        HEAD: ("ce for tiny (features; soft labels by its head)", "loss of the soft labels at T ="),
        MODULE: ("cosine for tiny (features)", "tiny: loss of the features"),
        LOGITS: ("bce for tiny (logits)", "tiny: loss of the logits at T = 1"),
        SOFT: ("", "tiny: loss of the soft labels at T = 1"),
    }
    for output, (loss, legend) in lines.items():
        status, _, err = sskt(
            "train", "--target", images, "--source", "tiny", "--cache", caches / output,
            "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--out", tmp_path / output,
        )  # fmt: skip
        assert status == 0, err
        assert (f"auxiliary loss: {loss}" in err) == bool(loss) and legend in err
    status, _, err = sskt(
        "train", "--target", images, "--source", "tiny", "--cache", caches / SOFT,
        "--output", "features",
    )  # fmt: skip
    assert status == 2 and "--output goes with --live" in err


def test_mixed_views_have_features_of_the_mixed_view(
    config: TrainConfig, images: Path, tmp_path: Path
) -> None:
    policy = "pad-crop-flip:mixup=0.4,cutmix=1.0"
    cache_teachers(
        open_target(images), f"tiny={TINY}:build", cache=tmp_path, seeds=SEEDS, policy=policy,
        output=MODULE, workers=0,
    )  # fmt: skip
    trainer = Trainer(
        make_plan(dataclasses.replace(config, cache=tmp_path, policy=policy, source=["tiny"]))
    )
    record = trainer.train_epoch()
    assert record["views_checked"] == 60 and 0 < record["loss_tiny"] < 2
