"""The configuration of a training: defaults < recipe (TOML) < options.

Every field is an option of ``sskt train`` (``weight_decay`` is ``--weight-decay``) and a key of
a recipe. No torch here: ``sskt --help`` reads this module.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.trainer.recipes import load_recipe

AUTO = "auto"
"""Left to the target, or to the label sets that are trained from."""


def _option(default: Any, about: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"about": about, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


UNSTATED = {"input_scale": "imagenet"}
"""Fields that a stored configuration may lack, if their value is then not the default."""


@dataclass(frozen=True)
class TrainConfig:
    """What a run is; its fields are the options of ``sskt train``. Raises ``InputError``."""

    target: str = _option("", "known target (sskt datasets), folder of class folders or manifest")
    root: Path | None = _option(
        None, "folder of the target's data; default: $SSKT_DATA, else ./data"
    )
    split: str = _option("train", "split to train on")
    test_split: str = _option("auto", "split to measure accuracy on; 'none' for no evaluation")
    limit: int | None = _option(
        None,
        "use only this many training samples, all classes alike; default: as many as are labelled",
    )
    partial: bool = _option(False, "take what is there of an official list of files")
    decoder: str = _option(
        AUTO,
        "decoder of clips; auto: that of the label sets, else pyav",
        (AUTO, "pyav", "decord"),
    )
    strict_fingerprint: bool = _option(False, "compare files by contents, not names and sizes")
    eval_every: int = _option(1, "epochs between two evaluations; the last epoch has one always")
    policy: str = _option(
        AUTO,
        "view policy, NAME[:key=value,...]; auto: that of the label sets, else the target's own",
    )
    frame_sampling: str = _option("", "with --live: f_s, the stills that sources see of a clip")
    model: str = _option(
        AUTO,
        "target network; auto: resnet20 for images up to 96 pixels, resnet18 above, resnet3d18 "
        "for clips; resnet20-110, resnet18-152, mobilenet_v2, densenet121, vgg16, "
        "resnet3d10-50, another of torchvision's, FILE.py:factory",
    )
    stem: str = _option("auto", "cifar: for 32-pixel pictures", ("auto", "cifar", "imagenet"))
    shortcut: str = _option("b", "of 3-D ResNets: a pads with zeros, b is 1x1x1", ("a", "b"))
    taps: list[str] = _option([], "module whose output is a stage, for TM; repeat, in order")
    init: str = _option("", "start from FILE, or imagenet (torchvision's weights of --model)")
    input_scale: str = _option(
        "auto",
        "normalisation of the target network's input: imagenet (mean and std), or kinetics (0-255 "
        "minus the mean); auto: what the --init weights expect, imagenet where that is not known",
        (AUTO, "imagenet", "kinetics"),
    )
    finetune_from: int | None = _option(
        None, "train the stages from this one on (1 = first) and the heads; freeze what is before"
    )
    method: str = _option("sskt", "maxl: the rival of table 9", ("sskt", "maxl"))
    psi: int = _option(5, "MAXL: auxiliary classes for each class of the target")
    source: list[str] = _option(
        [],
        "source whose labels to train from; repeat; auto: all in the cache that fit, as is "
        "assumed with --tm or another option of the auxiliary task; none: training from scratch",
    )
    tm: bool = _option(False, "transfer modules on every stage as auxiliary heads")
    loss: str = _option(
        "auto",
        "PRIMARY+AUXILIARY; primary: ce, bce, focal; auxiliary: ce, kd, kd-released, focal; auto: "
        "ce+ce, with several classes a sample bce+ce",
    )
    focal_gamma: float = _option(2.0, "gamma of the focal losses")
    source_weight: list[str] = _option([], "NAME=W, factor of one source's loss; repeat")
    alpha: float = _option(1.0, "weight of the auxiliary losses (alpha of equation 1)")
    temperature: float = _option(1.0, "temperature T of the auxiliary losses")
    force_topk: bool = _option(False, "train from top-k labels at a temperature other than 1")
    live: bool = _option(False, "run the sources in every step, as the paper does; no cache")
    weights: list[str] = _option([], "with --live: [NAME=]FILE, weights of a known architecture")
    preprocessing: list[str] = _option([], "with --live: [NAME:]size=..,mean=a/b/c,...")
    epochs: int = _option(200, "passes over the training split")
    seeds: int | None = _option(
        None, "view seeds to cycle through: epoch e sees seed e mod S; default: all stored"
    )
    seed: int = _option(0, "seed of initialisation and order")
    batch_size: int = _option(128, "images a step")
    accumulate: int = _option(1, "forward a batch in this many parts, then step once")
    optimizer: str = _option("sgd", "rule of the steps", ("sgd", "adamw"))
    lr: float = _option(0.1, "learning rate")
    momentum: float = _option(0.9, "momentum of SGD")
    dampening: float = _option(
        0.0, "dampening of SGD: the momentum takes in 1 - dampening of each gradient"
    )
    weight_decay: float = _option(5e-4, "L2 penalty; of AdamW, decoupled")
    schedule: str = _option(
        "multistep", "of the learning rate", ("multistep", "cosine", "plateau", "constant")
    )
    warmup: float = _option(0.0, "epochs over which lr rises from 0")
    milestones: list[int] = _option(
        [], "epochs where lr is multiplied by gamma; default 30, 60, 80 % of the epochs"
    )
    gamma: float = _option(0.2, "factor of lr at a milestone, or on a plateau")
    patience: int = _option(10, "epochs without a better test loss that make a plateau")
    plateau_on: str = _option(
        "primary",
        "test loss that a plateau follows: the primary one, or the total of equation 1; that needs "
        "labels of the test split too (cache-teachers --split), or --live",
        ("primary", "total"),
    )
    clip_grad: float | None = _option(None, "largest norm of the gradient")
    ema: float = _option(0.0, "decay of averaged weights, which are then evaluated; 0: none")
    early_stop: int | None = _option(None, "stop after this many epochs without a better result")
    cache: str | Path | None = _option(
        None,
        "folder or URL (s3://...) of the label sets; default: $SSKT_CACHE or $SSKT_LABELS, else "
        "./labels",
    )
    labels: str | None = _option(None, "instead of --cache: a label server, http://HOST:PORT")
    label_cache: Path | None = _option(
        None, "keep what a label server sent in this folder; default: a temporary one"
    )
    label_cache_size: float | None = _option(
        None, "GiB that it may take; default 50, of a temporary one 20"
    )
    label_wait: float = _option(60.0, "minutes to wait for a label server that went away")
    out: Path | None = _option(None, "folder of this run; default runs/NAME")
    device: str = _option("auto", "cpu, cuda, cuda:1; auto: cuda where there is one")
    precision: str = _option("float32", "arithmetic of the target network", ("float32", "bfloat16"))
    channels_last: bool = _option(True, "memory layout of pictures and convolutions")
    compile: bool = _option(False, "torch.compile the step; minutes at the start")
    save_minutes: float = _option(10.0, "also save within an epoch, this often; 0: never")
    workers: int | None = _option(None, "loader processes for image files; default: by cores")
    memory: float = _option(8.0, "GiB of RAM for labels, and for images kept decoded")
    on_error: str = _option("fail", "what an unreadable image does", ("fail", "skip"))
    download: bool = _option(False, "let torchvision download the target")

    def __post_init__(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("seeds", self.seeds is None or self.seeds >= 1, "at least 1"),
            ("limit", self.limit is None or self.limit >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32, "in 0 .. 2**32 - 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("alpha", self.alpha >= 0, "at least 0"),
            ("lr", self.lr > 0, "above 0"),
            ("memory", self.memory > 0, "above 0"),
            ("label_cache_size", (self.label_cache_size or 1) > 0, "above 0"),
            ("label_wait", self.label_wait >= 0, "at least 0"),
            ("workers", self.workers is None or self.workers >= 0, "at least 0"),
            ("momentum", 0 <= self.momentum < 1, "in 0 .. 1, below 1"),
            ("dampening", 0 <= self.dampening <= 1, "in 0 .. 1"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("gamma", self.gamma > 0, "above 0"),
            ("eval_every", self.eval_every >= 1, "at least 1"),
            ("psi", self.psi >= 1, "at least 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("finetune_from", (self.finetune_from or 1) >= 1, "at least 1"),
            ("focal_gamma", self.focal_gamma >= 0, "at least 0"),
            ("warmup", self.warmup >= 0, "at least 0"),
            ("patience", self.patience >= 0, "at least 0"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0"),
            ("ema", 0 <= self.ema < 1, "in 0 .. 1, below 1"),
            ("early_stop", self.early_stop is None or self.early_stop >= 1, "at least 1"),
            ("save_minutes", self.save_minutes >= 0, "at least 0"),
            ("milestones", all(m >= 1 for m in self.milestones), "at least 1 each"),
        ]
        for name, holds, want in rules:
            if not holds:
                raise InputError(f"{name} must be {want}, found {getattr(self, name)}")
        for name, spec in FIELDS.items():
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} must be finite, found {value}")
            choices = spec.metadata["choices"]
            if choices and getattr(self, name) not in choices:
                raise UnknownName(name, str(getattr(self, name)), choices)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to ``config.json``."""
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}
        return {k: list(v) if isinstance(v, list) else v for k, v in plain.items()}

    @property
    def used_decoder(self) -> str:
        """The decoder of clips: pyav, if it was not chosen."""
        return "pyav" if self.decoder == AUTO else self.decoder

    @property
    def needs_test_labels(self) -> bool:
        """Whether the auxiliary losses are also computed on the test split."""
        return self.plateau_on == "total" and bool(self.source)

    def resolved_milestones(self) -> list[int]:
        """Epochs of the learning-rate steps: as given, or 60, 120, 160 of 200 scaled."""
        return self.milestones or sorted({max(1, round(self.epochs * x)) for x in (0.3, 0.6, 0.8)})


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
TYPES = typing.get_type_hints(TrainConfig)
AUXILIARY = frozenset(
    ("tm", "alpha", "temperature", "source_weight", "force_topk", "cache", "labels", "label_cache")
)
"""Fields of the auxiliary task: with one of them given, labels are trained from."""
FOLLOWED: dict[str, Any] = {
    "policy": AUTO,
    "limit": None,
    "partial": False,
    "decoder": AUTO,
    "strict_fingerprint": False,
    "model": AUTO,
    "source": [AUTO],
    "input_scale": AUTO,
    "seeds": None,
}
"""Fields that are found out when a training begins, and the value that leaves them open."""
INDIFFERENT = frozenset(
    ("root", "cache", "out", "device", "workers", "memory", "download", "save_minutes", "labels")
) | frozenset(("label_cache", "label_cache_size", "label_wait"))
"""Fields that may change between a run and its resumption."""


def read_recipe(path: Path) -> dict[str, Any]:
    """Fields from a recipe that ships, by its name, or from a TOML file.

    Raises ``MissingData``, ``InputError`` (no TOML, wrong type), ``UnknownName`` with the keys.
    """
    return read_fields(load_recipe(path, "training"), f"recipe {path}")


def read_fields(
    given: Mapping[str, Any], where: str, without: Collection[str] = ()
) -> dict[str, Any]:
    """Fields (but those of ``without``) from TOML; ``a-b`` and ``a_b`` are the same key.

    Raises ``UnknownName``, ``InputError`` naming ``where``.
    """
    known = [name for name in FIELDS if name not in without]
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UnknownName(f"key in {where}", key, known)
        values[name] = typed(name, value, where)
    return values


def typed(name: str, value: Any, where: str) -> Any:
    """A field's value from a file, as the field's type. Raises ``InputError`` naming ``where``."""
    kind = TYPES[name]
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        item = typing.get_args(option)
        if item and isinstance(value, str | int) and not isinstance(value, bool):
            value = [value]
        if item and isinstance(value, list) and all(type(v) is item[0] for v in value):
            return value
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and type(value) in (int, float):
            return float(value)
        if not item and type(value) is option:
            return value
    wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise InputError(f"{where}: {name} must be {wanted}, found {value!r}")


def make_config(*layers: Mapping[str, Any]) -> TrainConfig:
    """Later layers win: recipe, then options. Raises ``InputError``."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if layer.get("cache") is not None or layer.get("labels") is not None:
            merged |= {"cache": None, "labels": None}  # two names of the same thing
        merged |= layer
    scratch = merged.get("method") == "maxl" or not any(merged.get(name) for name in AUXILIARY)
    if "source" not in merged and not scratch:
        merged["source"] = [AUTO]
    config = TrainConfig(**merged)
    require_consistent(config)
    return config


def require_consistent(config: TrainConfig) -> None:
    """Checks fields that go together, or contradict each other.

    Raises:
        InputError: Names the fields as options, and the next step.
    """
    if not config.target:
        raise InputError("no target: give --target NAME or a folder (sskt datasets lists them)")
    if config.eval_every > 1 and (config.schedule == "plateau" or config.early_stop):
        raise InputError("a plateau and an early stop follow every epoch; leave --eval-every at 1")
    if config.early_stop and config.test_split == "none":
        raise InputError("--early-stop follows the test result; give a --test-split")
    if config.schedule == "plateau" and config.test_split == "none":
        raise InputError("--schedule plateau follows the test loss; give a --test-split")
    if config.plateau_on == "total" and config.schedule != "plateau":
        raise InputError(
            f"--plateau-on total goes with --schedule plateau, found {config.schedule}; give "
            "--plateau-on primary with other schedules"
        )
    if config.plateau_on == "total" and config.method == "maxl":
        raise InputError(
            "--method maxl has no auxiliary labels of the test split; give --plateau-on primary"
        )
    if config.dampening and config.optimizer != "sgd":
        raise InputError(
            f"--dampening is a setting of SGD; leave it out with --optimizer {config.optimizer}"
        )
    if config.method == "maxl" and config.source:
        raise InputError("--method maxl makes its own auxiliary labels; leave --source out")
    if AUTO in config.source and len(config.source) > 1:
        raise InputError("--source auto takes all sources of the cache; leave the others out")
    if config.live and config.source in ([], [AUTO]):
        raise InputError("--live runs the sources in every step; name them with --source")
    for name in ("weights", "preprocessing", "frame_sampling"):
        if getattr(config, name) and not config.live:
            option = name.replace("_", "-")
            raise InputError(f"--{option} goes with --live; stored labels were made with their own")
    if config.labels is not None:
        if config.cache is not None:
            raise InputError("--cache and --labels both say where the labels are; give one")
        if not config.labels.startswith(("http://", "https://")):
            raise InputError(
                f"--labels takes a label server, http://HOST:PORT, found {config.labels}; a folder "
                "or s3://... goes with --cache"
            )


def config_json(config: TrainConfig) -> bytes:
    """``config.json``, readable by ``read_config``."""
    return (json.dumps(config.as_dict(), indent=2) + "\n").encode()


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a stored configuration. Raises ``MissingData`` or ``InputError``."""
    try:
        stored = UNSTATED | json.loads(path.read_text())
        return {k: typed(k, v, str(path)) if v is not None else None for k, v in stored.items()}
    except OSError as error:
        raise MissingData(f"no run to resume: cannot read {path}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is not a run's configuration") from error


def _same_policy(one: str, other: str) -> bool:
    """Whether two policies are the same with their defaults filled in."""
    from sskt.teacher_cache.views.policies import parse_policy

    return AUTO not in (one, other) and parse_policy(one) == parse_policy(other)


def adopted(stored: Mapping[str, Any], config: TrainConfig) -> TrainConfig:
    """The configuration with what an earlier part of its run found out: see ``FOLLOWED``."""
    found = {
        name: stored[name]
        for name, open_value in FOLLOWED.items()
        if getattr(config, name) == open_value and stored.get(name) not in (None, open_value)
    }
    return dataclasses.replace(config, **found)


def require_same(stored: Mapping[str, Any], config: TrainConfig, where: Path) -> None:
    """Raises ``InputError`` naming the first field in which a resumed run would differ."""
    config = adopted(stored, config)
    for name in FIELDS:
        if name in INDIFFERENT or name not in stored:
            continue
        if name in FOLLOWED and stored[name] == FOLLOWED[name]:
            continue
        now = getattr(config, name)
        if stored[name] != now and not (name == "policy" and _same_policy(stored[name], now)):
            raise InputError(
                f"{where} holds a run with {name} = {stored[name]!r}, not {now!r}; "
                "resume it as it was, or choose another --out"
            )
