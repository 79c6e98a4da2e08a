"""One training step of ours against a plain one written by hand, in turn, with equal numbers.

ResNet-20 at 96 pixels, batch 16: from scratch; with two sources, transfer modules and stored
labels; and with two ResNet-50 in the step at 224 pixels, as the paper does (their weights are
random: only their time counts). Both begin from the same weights and see the same batches; the
losses of their first steps are compared.

ResNet-18 at 224 pixels and 3D-ResNet-18 on 16 frames of 112 pixels run from scratch beside a plain
loop over a copy of the same network: there the trainer's own share is what differs. The profiler
says where a step's time goes.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50

from sskt.benchmarks.common import Row, interleaved, paired_ratio, report, write_image
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.labeling.run import StageOptions, cache_teachers
from sskt.teacher_cache.sources.source import Preprocessing, Source, freeze
from sskt.teacher_cache.views.policies import parse_policy
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig
from sskt.trainer.data.soft_label_batch import SoftLabelBatch
from sskt.trainer.data.soft_labels import labels_over
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trainer import Trainer

BATCH, SAMPLES, ROUNDS, STEPS = 16, 64, 7, 3
FEW = 4
"""Samples of a step of a larger network."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
T, ALPHA = 1.0, 1.0


class Plain(nn.Module):
    """ResNet-20 and transfer modules as one writes them down; keys as ours."""

    def __init__(self, classes: int, heads: list[int]) -> None:
        super().__init__()
        self.target = nn.Module()
        self.target.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.target.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        self.target.stages = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleDict(
                    {
                        "conv1": nn.Conv2d(
                            widths[i] if j == 0 else widths[i + 1], widths[i + 1], 3,
                            2 if i and j == 0 else 1, 1, bias=False,
                        ),
                        "bn1": nn.BatchNorm2d(widths[i + 1]),
                        "conv2": nn.Conv2d(widths[i + 1], widths[i + 1], 3, 1, 1, bias=False),
                        "bn2": nn.BatchNorm2d(widths[i + 1]),
                    }
                )
                for j in range(3)
            )
            for i in range(3)
        )  # fmt: skip
        self.target.fc = nn.Linear(64, classes)
        self.heads = nn.ModuleList()
        for outputs in heads:
            head = nn.Module()
            head.branches = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(w, 32, 1), nn.BatchNorm2d(32), nn.ReLU(),
                    nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
                    nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU(),
                )
                for w in widths[1:]
            )  # fmt: skip
            head.fc = nn.Linear(64, outputs)
            self.heads.append(head)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        target: Any = self.target
        x = torch.relu(target.bn1(target.conv1(x)))
        stages = []
        for i, stage in enumerate(target.stages):
            for j, block in enumerate(stage):
                y = torch.relu(block["bn1"](block["conv1"](x)))
                y = block["bn2"](block["conv2"](y))
                if i and j == 0:
                    more = y.shape[1] - x.shape[1]
                    x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more // 2, more - more // 2))
                x = torch.relu(x + y)
            stages.append(x)
        logits = target.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        auxiliary = []
        for head in self.heads:
            head_: Any = head
            pooled = [
                F.adaptive_avg_pool2d(branch(stage), 1).flatten(1)
                for branch, stage in zip(head_.branches, stages, strict=True)
            ]
            auxiliary.append(head_.fc(torch.stack(pooled).mean(0)))
        return logits, auxiliary


class Ways:
    """The two ways over the same batches: ours, and the plain one."""

    def __init__(self, config: TrainConfig, live: list[Source], stored: list[Tensor]) -> None:
        self.trainer = Trainer(make_plan(config, live))
        device = self.trainer.plan.device
        names = self.trainer.network.sources
        counts = [self.trainer.plan.source_classes[name] for name in names]
        self.plain = Plain(len(self.trainer.plan.views.target.classes), counts).to(device)
        self.plain.load_state_dict(self.trainer.network.state_dict())
        self.optimizer = torch.optim.SGD(
            self.plain.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        self.live, self.stored = live, stored
        views = self.trainer.views
        self.truth = torch.from_numpy(views.target.labels).to(device)
        order = [np.arange(i, i + BATCH) for i in range(0, SAMPLES, BATCH)]
        self.batches = [(s, torch.from_numpy(views.batch(s, 0)).to(device)) for s in order]
        plan = self.trainer.plan
        labels = labels_over(views, plan.label_sets, plan.live, device)
        self.labels = labels.enter(plan.windows(0)[0], None)
        self.losses: dict[str, list[Tensor]] = {"ours": [], "plain": []}

    def run(self, name: str) -> Callable[[], None]:
        step = self.ours if name == "ours" else self.by_hand

        def steps() -> None:
            for i in range(STEPS):
                self.losses[name].append(step(*self.batches[i % len(self.batches)]))
            if self.truth.device.type == "cuda":
                torch.cuda.synchronize()

        return steps

    def ours(self, samples: np.ndarray[Any, Any], views: Tensor) -> Tensor:
        truth = self.truth[torch.from_numpy(samples).to(views.device)]
        normalise = self.trainer.plan.normalise
        batch = SoftLabelBatch(samples, views, truth, self.labels, normalise)
        loss: Tensor = self.trainer.step(batch)["loss"]
        return loss

    def by_hand(self, samples: np.ndarray[Any, Any], views: Tensor) -> Tensor:
        device = views.device
        mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        std = torch.tensor(STD, device=device).view(1, 3, 1, 1)
        images = views.permute(0, 3, 1, 2).float() / 255
        x = ((images - mean) / std).contiguous()
        rows = torch.from_numpy(samples)
        soft = [torch.softmax(log_p[rows].to(device) / T, 1) for log_p in self.stored]
        if self.live:
            seen = F.interpolate(images, size=224, mode="bilinear", antialias=True)
            with torch.no_grad():
                soft = [torch.softmax(s.network((seen - mean) / std) / T, 1) for s in self.live]
        self.plain.train()
        logits, auxiliary = self.plain(x)
        loss = F.cross_entropy(logits, self.truth[rows.to(device)])
        for z, p in zip(auxiliary, soft, strict=True):
            loss = loss + ALPHA * T * T * -(p * F.log_softmax(z / T, 1)).sum(1).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = Path(tempfile.mkdtemp(prefix="sskt-bench-"))
    rng = np.random.default_rng(0)
    target = work / "images"
    from PIL import Image

    for name in ("a", "b"):
        folder = target / "train" / name
        folder.mkdir(parents=True)
        for i in range(SAMPLES // 2):
            pixels = rng.integers(0, 256, (96, 96, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    sources = [teacher("imagenet", 1000, device), teacher("places365", 365, device)]
    views = Views(open_target(str(target)), parse_policy("pad-crop-flip"))
    cache_teachers(
        views, sources, parse_encoding("f16"), 1, work / "cache", StageOptions(BATCH, workers=0)
    )
    base = TrainConfig(
        target=str(target), policy="pad-crop-flip", test_split="none", batch_size=BATCH, lr=0.01,
        epochs=1, device=device, workers=0, stem="auto", temperature=T, alpha=ALPHA,
    )  # fmt: skip
    taught = replace(base, source=["imagenet", "places365"], tm=True)
    rows: list[tuple[str, float, str]] = []
    with torch.inference_mode():
        every = torch.from_numpy(views.batch(np.arange(SAMPLES), 0))
        stored = [s.log_probabilities(every).cpu().clone() for s in sources]
    cases: dict[str, Callable[[], Ways]] = {
        "scratch": lambda: Ways(base, [], []),
        "two TMs, stored labels": lambda: Ways(replace(taught, cache=work / "cache"), [], stored),
        "two TMs, ResNet-50 in the step": lambda: Ways(replace(taught, live=True), sources, []),
    }
    for name, build in cases.items():
        ways = build()
        rounds = ROUNDS if not ways.live else 3
        begin = time.perf_counter()
        seconds = interleaved({n: ways.run(n) for n in ("ours", "plain")}, rounds)
        for way in ("ours", "plain"):
            median = 1000 * float(np.median(seconds[way])) / STEPS
            rows.append((f"{name}: {way}", median, "ms"))
        rows.append((f"{name}: plain / ours", paired_ratio(seconds["plain"], seconds["ours"]), "x"))
        # Later ones drift apart: rounding grows from step to step on such small batches.
        a, b = (torch.stack(ways.losses[n][:STEPS]) for n in ("ours", "plain"))
        rows.append((f"{name}: first losses differ by", float(((a - b) / b).abs().max()), ""))
        print(f"{name}: {time.perf_counter() - begin:.0f} s")
        rows += profiled(name, ways.run("ours"))
    for model, policy, target in (
        ("resnet18", "random-resized-crop-flip", photos(work / "photos")),
        ("resnet3d18", "clip-corner-crop-flip:frames=16,size=112", clips(work / "clips")),
    ):
        config = replace(base, target=str(target), policy=policy, model=model, batch_size=FEW)
        rows += plain_loop(model, config)
    title = f"one step: ResNet-20 at 96 px, batch {BATCH}; larger networks, batch {FEW}"
    report(title, rows, {"steps": STEPS, "rounds": ROUNDS})
    shutil.rmtree(work)


def photos(folder: Path) -> Path:
    """Generated photos of two classes."""
    for i in range(2 * FEW):
        write_image(folder / "train" / f"class{i % 2}" / f"{i:03d}.jpg", i, 240, 320)
    return folder


def clips(folder: Path) -> Path:
    """Extracted frames of generated clips of two classes."""
    for i in range(2 * FEW):
        for frame in range(1, 17):
            clip = folder / "train" / f"class{i % 2}" / f"clip {i}"
            write_image(clip / f"image_{frame:05d}.jpg", 16 * i + frame, 128, 171)
    return folder


def plain_loop(model: str, config: TrainConfig) -> list[Row]:
    """A step of the trainer, beside what one writes down with the same network."""
    trainer = Trainer(make_plan(config))
    plan, views = trainer.plan, trainer.views
    samples = np.arange(FEW)
    seen = torch.from_numpy(views.batch(samples, 0)).to(plan.device)
    truth = torch.from_numpy(views.target.labels[samples]).to(plan.device)
    labels = labels_over(views, {}, [], plan.device).enter(plan.windows(0)[0], None)
    network = copy.deepcopy(trainer.network)
    optimizer = torch.optim.SGD(
        network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    first: dict[str, Tensor] = {}

    def ours() -> None:
        batch = SoftLabelBatch(samples, seen, truth, labels, plan.normalise)
        first.setdefault("ours", trainer.step(batch)["loss"])

    def plain() -> None:
        x = seen.movedim(-1, 1).float() / 255
        mean, std = (
            torch.tensor(v, device=x.device).view(1, 3, *(1,) * (x.ndim - 2)) for v in (MEAN, STD)
        )
        network.train()
        logits, _ = network((x - mean) / std)
        loss = F.cross_entropy(logits, truth)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        first.setdefault("plain", loss.detach())

    seconds = interleaved({"ours": ours, "plain": plain}, 5)
    rows = [(f"{model}: {w}", 1000 * float(np.median(s)), "ms") for w, s in seconds.items()]
    rows.append((f"{model}: plain / ours", paired_ratio(seconds["plain"], seconds["ours"]), "x"))
    differ = (first["ours"] - first["plain"]) / first["plain"]
    rows.append((f"{model}: first losses differ by", float(differ.abs()), ""))
    return rows + profiled(model, ours)


KINDS = {
    "convolutions": ("convolution", "mkldnn_convolution", "cudnn"),
    "BatchNorm": ("batch_norm",),
    "optimizer": ("Optimizer.step",),
    "matrix products": ("addmm", "aten::mm"),
}
"""Parts of a step, and what the names of their operators contain."""


def profiled(name: str, run: Callable[[], None]) -> list[Row]:
    """The share of each kind of operator in the CPU time of steps, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = profile.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    rows: list[Row] = []
    rest = 100.0
    for kind, words in KINDS.items():
        optimizer = kind == "optimizer"
        share = sum(
            100 * (event.cpu_time_total if optimizer else event.self_cpu_time_total) / whole
            for event in events
            if any(word in event.key for word in words)
        )
        rows.append((f"{name}: share of {kind}", share, "%"))
        rest -= share
    return [*rows, (f"{name}: share of the rest", rest, "%")]


def teacher(name: str, classes: int, device: str) -> Source:
    torch.manual_seed(0)
    network = resnet50(num_classes=classes)
    names = tuple(f"{name} {i}" for i in range(classes))
    return freeze(name, "resnet50", network, Preprocessing(224), names, device=device)


if __name__ == "__main__":
    main()
