"""The configuration of a training: defaults < recipe (TOML) < options.

Every field is an option of ``sskt train`` (``weight_decay`` is ``--weight-decay``) and a key of
a recipe. No torch here: ``sskt --help`` reads this module.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import inspect
import json
import os
import re
import shlex
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic_core import core_schema

from sskt.teacher_cache.errors import InputError, MissingData, UnknownName
from sskt.teacher_cache.locations import is_zip
from sskt.trainer.recipes import load_recipe

AUTO = "auto"
"""Left to the target, or to the label sets that are trained from."""
UNSTATED = {"input_scale": "imagenet"}
"""Fields that a stored configuration may lack, if their value is then not the default."""

OWN = r"^(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*$"
"""A function of the user: ``FILE.py:function`` or ``module:attribute``."""
_OWN_POLICY = re.compile(r".+\.py:[^\W\d]\w*(?::.*)?")
DIGEST, LABEL_SETS = "digest", "label_sets"
"""The keys of ``config.json`` that are no fields."""


@dataclass(frozen=True)
class OneOf:
    """The values that a field may have; with ``own`` also a function of the user."""

    names: tuple[str, ...]
    own: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        names = core_schema.literal_schema(list(self.names))
        if not self.own:
            return names
        return core_schema.union_schema([names, core_schema.str_schema(pattern=OWN)])


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


Count = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Texts = Annotated[list[str], BeforeValidator(_listed)]
Folder = Annotated[Path, BeforeValidator(_path)]


@dataclass(frozen=True)
class TrainConfig:
    """What a run is. The fields are the options of ``sskt train``, with their defaults.

    Args:
        target: Target: a known one (sskt datasets lists them), a folder of class folders, a
            manifest, images packed in files (hf:NAME_OR_PATH, wds:PATH, parquet:PATH), or
            FILE.py:function, which returns what sskt.open_target returns.
        root: Folder of the target's data. Default: $SSKT_DATA, else ./data.
        split: Split to train on.
        test_split: Split to measure accuracy on; 'none' for no evaluation.
        limit: Use only this many training samples, evenly over the classes. Default: as many as
            are labelled.
        partial: Accept a target of which a part is stored, where an official list names more.
        decoder: Decoder of clips. auto: that of the label sets, else pyav.
        strict_fingerprint: Compare files by contents, not by name and size only.
        columns: Names of the columns of a manifest that are not called path, label or labels,
            split, class_name, as path=COLUMN,label=COLUMN.
        label_separator: Separator of several labels of a sample in a manifest; none: a label is
            always one name. Default: | in a column labels.
        allow_outside_root: Accept files of a manifest outside of the folder of the data.
        eval_every: Epochs between two evaluations. The last epoch is always followed by one.
        policy: View policy, NAME[:key=value,...] or FILE.py:function[:key=value,...]. auto: that of
            the label sets, else the target's default.
        frame_sampling: With --live: f_s, which picks the stills of a clip that sources see.
        model: Target network. auto: resnet20 for images up to 96 pixels, resnet18 above,
            resnet3d18 for clips. Also resnet20-110, resnet18-152, mobilenet_v2, densenet121,
            vgg16, resnet3d10-50, others of torchvision, timm/ARCH, FILE.py:factory.
        stem: First layers of the network; cifar is for 32-pixel images.
        shortcut: Shortcuts of 3-D ResNets: a pads with zeros, b is a 1x1x1 convolution.
        taps: Module whose output ends a stage, for transfer modules. Repeat, in order.
        init: Initial weights: FILE, or imagenet (torchvision's weights of --model).
        input_scale: Normalisation of the target network's input: imagenet (mean and standard
            deviation), or kinetics (0-255 minus the mean). auto: what the --init weights expect,
            imagenet where that is not known.
        finetune_from: Train the stages from this one on (1 is the first) and the heads; earlier
            stages are frozen.
        method: Training method: sskt, or maxl, with which table 9 compares.
        psi: MAXL: auxiliary classes for each class of the target.
        source: Source whose labels to train from. Repeat. auto: all in the cache that fit, which
            is assumed with --tm or another option of the auxiliary task. Default: training from
            scratch.
        tm: Use transfer modules on every stage as auxiliary heads.
        loss: PRIMARY+AUXILIARY; primary: ce, bce, focal; auxiliary: ce, kd, kd-released, focal for
            soft labels, cosine, mse for features, bce for logits of independent classes; either
            may be FILE.py:function. auto: ce, or bce if a sample may have several classes; and
            of each source what its label set holds: ce, cosine for features without a head, bce
            for logits. The same without AUXILIARY.
        focal_gamma: gamma of the focal losses.
        source_weight: NAME=W, factor of one source's loss. Repeat.
        alpha: Weight of the auxiliary losses (alpha of equation 1).
        temperature: Temperature T of the auxiliary losses.
        force_topk: Train from top-k labels at a temperature other than 1.
        live: Run the sources in every step, as the paper does, without a cache.
        weights: With --live: [NAME=]FILE, weights of a known architecture. Repeat.
        preprocessing: With --live: [NAME:]size=..,mean=a/b/c,... Repeat.
        output: With --live: what the sources give, soft-labels, features[:MODULE] or logits.
            Default: what --loss takes.
        epochs: Passes over the training split.
        seeds: View seeds S to cycle through: epoch e sees seed e mod S. Default: all stored.
        views_per_image: Views K of each image in a batch, under K view seeds, from one decoding. K
            epochs visit the pairs of image and view seed of K epochs with one view.
        seed: Seed of initialisation and order.
        batch_size: Images of a step, of all processes together.
        accumulate: Forward a batch in this many parts, then step once.
        optimizer: Optimizer: sgd, adamw, FILE.py:function or torch.optim:NAME.
        lr: Learning rate.
        momentum: Momentum of SGD.
        dampening: Dampening of SGD: the momentum takes in 1 - dampening of each gradient.
        weight_decay: L2 penalty of SGD; decoupled weight decay of AdamW.
        schedule: Schedule of the learning rate: multistep, cosine, plateau, constant, or
            FILE.py:function, which returns the factor of --lr at an epoch.
        warmup: Epochs over which the learning rate rises from 0.
        milestones: Epoch where the learning rate is multiplied by --gamma. Repeat. Default: 30,
            60 and 80 % of the epochs.
        gamma: Factor of the learning rate at a milestone, or on a plateau.
        patience: Epochs without a better test loss that make a plateau.
        plateau_on: Test loss that a plateau follows: the primary one, or the total of equation 1,
            which needs labels of the test split too (cache-teachers --split), or --live.
        clip_grad: Largest norm of the gradient. Default: no limit.
        ema: Decay of averaged weights, which are then evaluated. 0: no averaging.
        early_stop: Stop after this many epochs without a better result. Default: never.
        callback: FILE.py:function, which gets the training and returns what is called after each
            step and epoch, and at the end. Repeat.
        cache: Folder or URL (s3://...) of the label sets. Default: $SSKT_CACHE or $SSKT_LABELS,
            else ./labels.
        labels: What to read labels from instead of a --cache: a label server, http://HOST:PORT, a
            published label set, https://HOST/PATH/SET, or a FILE.zip.
        label_cache: Folder that keeps what a label server sent. Default: a temporary one.
        label_cache_size: GiB that this folder may take. Default: 50, of a temporary one 20.
        label_wait: Minutes to wait for a label server that cannot be reached.
        follow: Train while labels are still being written: an epoch waits for the labels of its
            own view seed. Minutes that labels may stay missing while no process writes them.
            Default: missing labels are an error.
        out: Folder of this run. Default: runs/NAME.
        device: Device: cpu, cuda, cuda:1. auto: cuda if there is one.
        precision: Arithmetic of the target network.
        channels_last: Keep images and convolutions channels-last in memory.
        compile: Use torch.compile, which takes minutes at the start.
        save_minutes: Minutes between two saves within an epoch. 0: save after each epoch only.
        view_cache: Folder that keeps the views of image files and clips, so that no file is decoded
            again in a later epoch. The results are the same. Default: none.
        view_cache_size: GiB that this folder may take. Views beyond it are made in each epoch.
        workers: Loader processes for image files. Default: by cores.
        memory: GiB of RAM for labels, and for images kept decoded.
        on_error: What to do about an image that cannot be read: fail, or skip it.
        download: Let torchvision download the target.

    Raises:
        InputError: If a value has the wrong type or is out of range; names all of them.
        UnknownName: If only the name of a choice is not known.
    """

    target: str = ""
    root: Folder | None = None
    split: str = "train"
    test_split: str = "auto"
    limit: Count | None = None
    partial: bool = False
    decoder: Annotated[str, OneOf((AUTO, "pyav", "decord"))] = AUTO
    strict_fingerprint: bool = False
    columns: str = ""
    label_separator: str = ""
    allow_outside_root: bool = False
    eval_every: Count = 1
    policy: str = AUTO
    frame_sampling: str = ""
    model: str = AUTO
    stem: Annotated[str, OneOf(("auto", "cifar", "imagenet"))] = "auto"
    shortcut: Annotated[str, OneOf(("a", "b"))] = "b"
    taps: Texts = field(default_factory=list)
    init: str = ""
    input_scale: Annotated[str, OneOf((AUTO, "imagenet", "kinetics"))] = AUTO
    finetune_from: Count | None = None
    method: Annotated[str, OneOf(("sskt", "maxl"))] = "sskt"
    psi: Count = 5
    source: Texts = field(default_factory=list)
    tm: bool = False
    loss: str = "auto"
    focal_gamma: AtLeast0 = 2.0
    source_weight: Texts = field(default_factory=list)
    alpha: AtLeast0 = 1.0
    temperature: Above0 = 1.0
    force_topk: bool = False
    live: bool = False
    weights: Texts = field(default_factory=list)
    preprocessing: Texts = field(default_factory=list)
    output: str = ""
    epochs: Count = 200
    seeds: Count | None = None
    views_per_image: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    batch_size: Count = 128
    accumulate: Count = 1
    optimizer: Annotated[str, OneOf(("sgd", "adamw"), own=True)] = "sgd"
    lr: Above0 = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: AtLeast0 = 5e-4
    schedule: Annotated[str, OneOf(("multistep", "cosine", "plateau", "constant"), own=True)] = (
        "multistep"
    )
    warmup: AtLeast0 = 0.0
    milestones: Annotated[list[Count], BeforeValidator(_listed)] = field(default_factory=list)
    gamma: Above0 = 0.2
    patience: Annotated[int, Field(ge=0)] = 10
    plateau_on: Annotated[str, OneOf(("primary", "total"))] = "primary"
    clip_grad: Above0 | None = None
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    early_stop: Count | None = None
    callback: Texts = field(default_factory=list)
    cache: str | Path | None = None
    labels: str | None = None
    label_cache: Folder | None = None
    label_cache_size: Above0 | None = None
    label_wait: AtLeast0 = 60.0
    follow: Above0 | None = None
    out: Folder | None = None
    device: str = "auto"
    precision: Annotated[str, OneOf(("float32", "bfloat16"))] = "float32"
    channels_last: bool = True
    compile: bool = False
    save_minutes: AtLeast0 = 10.0
    view_cache: Folder | None = None
    view_cache_size: Above0 = 50.0
    workers: Annotated[int, Field(ge=0)] | None = None
    memory: Above0 = 8.0
    on_error: Annotated[str, OneOf(("fail", "skip"))] = "fail"
    download: bool = False

    def __post_init__(self) -> None:
        for name, value in checked(vars(self)).items():
            object.__setattr__(self, name, value)

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
TYPES: dict[str, tuple[Any, ...]] = {
    name: tuple(t for t in typing.get_args(kind) if t is not type(None))
    if typing.get_origin(kind) in (typing.Union, types.UnionType)
    else (kind,)
    for name, kind in typing.get_type_hints(TrainConfig).items()
}
"""The types of each field, without None."""
_HINTS = typing.get_type_hints(TrainConfig, include_extras=True)
CHOICES: dict[str, tuple[str, ...]] = {
    name: choice.names
    for name, hint in _HINTS.items()
    for choice in getattr(hint, "__metadata__", ())
    if isinstance(choice, OneOf)
}
"""The values of fields that take one of a few."""
WITH_OWN = frozenset(
    name
    for name, hint in _HINTS.items()
    for choice in getattr(hint, "__metadata__", ())
    if isinstance(choice, OneOf) and choice.own
)
"""The fields of these that also take a function of the user."""
AUXILIARY = frozenset(
    ("tm", "alpha", "temperature", "source_weight", "force_topk", "cache", "labels", "label_cache")
) | frozenset(("follow",))
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
    "loss": AUTO,
}
"""Fields that are found out when a training begins, and the value that leaves them open."""
INDIFFERENT = frozenset(
    ("root", "cache", "out", "device", "workers", "memory", "download", "save_minutes", "labels")
) | frozenset(
    (
        "label_cache",
        "label_cache_size",
        "label_wait",
        "follow",
        "on_error",
        "view_cache",
        "view_cache_size",
    )
)
"""Fields that may change between a run and its resumption."""


def code_of(fields: Mapping[str, Any]) -> dict[str, list[str]]:
    """Finds what a configuration runs as code.

    Args:
        fields: Values by field.

    Returns:
        The values by field: those that are a file or a module of the user. Sources and frame
        sampling only with ``live``; a torch.export file is a program, too.
    """
    found = {}
    if _OWN_POLICY.fullmatch(str(fields.get("policy", ""))):
        found["policy"] = [str(fields["policy"])]
    for name in ("model", "optimizer", "schedule"):
        if ":" in str(fields.get(name, "")):
            found[name] = [str(fields[name])]
    if own := [part for part in str(fields.get("loss", "")).split("+") if ":" in part]:
        found["loss"] = own
    if re.fullmatch(OWN, str(fields.get("target", ""))):
        found["target"] = [str(fields["target"])]
    if fields.get("callback"):
        found["callback"] = [str(text) for text in fields["callback"]]
    if not fields.get("live"):
        return found
    sources = [str(text) for text in fields.get("source") or []]
    if any("=" in text for text in sources):
        found["source"] = sources
    if ":" in str(fields.get("frame_sampling") or ""):
        found["frame_sampling"] = [str(fields["frame_sampling"])]
    return found


def require_named_code(
    stored: Mapping[str, Any], named: Collection[str], where: str | Path
) -> None:
    """Checks that what a run has recorded chooses no code.

    A run's folder may come from another person, so its configuration only says what it was. What
    is run as code is what the person at the keyboard has named.

    Args:
        stored: The configuration of the run.
        named: The fields that the person has given.
        where: The run, for the message.

    Raises:
        InputError: If the configuration names code in another field.
    """
    kinds = {"model": "network", "frame_sampling": "frame sampling"}
    for name, values in code_of(stored).items():
        if name not in named:
            option = f"--{name.replace('_', '-')}"
            given = [str(stored["loss"])] if name == "loss" else values
            raise InputError(
                f"the {kinds.get(name, name)} of {where} is code, {', '.join(values)}; if you "
                f"trust it, name it yourself with {' '.join(f'{option} {one}' for one in given)}"
            )


def read_recipe(path: Path) -> dict[str, Any]:
    """Fields from a recipe that ships, by its name, from a TOML file, or of a run.

    Of a run, its folder or its ``config.json``, all fields but the folder are taken.

    Raises ``MissingData``, ``InputError`` (no TOML, wrong type), ``UnknownName`` with the keys.
    """
    path = Path(path)
    if is_run(path):
        path = path if path.suffix == ".json" else path / "config.json"
        return {name: value for name, value in read_config(path).items() if name != "out"}
    return read_fields(load_recipe(path, "training"), f"recipe {path}")


def is_run(path: Path) -> bool:
    """Whether a recipe is a run: its folder, or its ``config.json``."""
    return path.suffix == ".json" or (path / "config.json").is_file()


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
        values[name] = value
    return checked(values, where)


def checked(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Checks the types and ranges of some fields.

    Args:
        values: Values by field. A text stands for a path or a list where the field is one.
        where: What the values come from, for the message.

    Returns:
        The values as the types of their fields.

    Raises:
        InputError: Names all fields that cannot be used, each with what was expected and found.
        UnknownName: If a single field has an unknown name.
    """
    try:
        model = _model().model_validate(dict(values))
    except ValidationError as error:
        # A field of several types has an error for each of them; the first one is enough.
        first = {str(e["loc"][0]): e for e in reversed(error.errors(include_url=False))}
        ((name, problem),) = list(first.items())[:1]
        if len(first) == 1 and problem["type"] == "literal_error":
            kind = f"{name} in {where}" if where else name
            known = [*CHOICES[name], *(["FILE.py:function"] if name in WITH_OWN else [])]
            raise UnknownName(kind, str(values[name]), known) from None
        ordered = [name for name in FIELDS if name in first]
        said = [f"{n} must be {_wanted(n, first[n])}, found {values[n]!r}" for n in ordered]
        text = said[0]
        if len(said) > 1:
            numbered = "; ".join(f"({i}) {one}" for i, one in enumerate(said, 1))
            text = f"{len(said)} settings cannot be used: {numbered}"
        raise InputError(f"{where}: {text}" if where else text) from None
    return {name: getattr(model, name) for name in values}


@functools.cache
def _model() -> type[BaseModel]:
    fields: dict[str, Any] = {name: (hint, None) for name, hint in _HINTS.items()}
    how = ConfigDict(strict=True, allow_inf_nan=False)
    return create_model("Fields", __config__=how, **fields)


_RULES = {
    "greater_than": "above {}",
    "greater_than_equal": "at least {}",
    "less_than": "below {}",
    "less_than_equal": "at most {}",
    "finite_number": "finite",
}


def _wanted(name: str, problem: Mapping[str, Any]) -> str:
    if problem["type"] in _RULES:
        limit = next(iter(problem.get("ctx", {}).values()), 0)
        return _RULES[problem["type"]].format(int(limit))
    kinds = [str(kind) if typing.get_args(kind) else kind.__name__ for kind in TYPES[name]]
    own = ["FILE.py:function"] if name in WITH_OWN else []
    return " or ".join([*CHOICES.get(name, kinds), *own])


def help_texts() -> dict[str, str]:
    """What each field is: the ``Args`` of ``TrainConfig``."""
    arguments = (inspect.getdoc(TrainConfig) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): ((?:.|\n {8})+)", arguments, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


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
    for name in ("weights", "preprocessing", "frame_sampling", "output"):
        if getattr(config, name) and not config.live:
            option = name.replace("_", "-")
            raise InputError(f"--{option} goes with --live; stored labels were made with their own")
    if config.labels is not None:
        if config.cache is not None:
            raise InputError("--cache and --labels both say where the labels are; give one")
        if not config.labels.startswith(("http://", "https://")) and not is_zip(config.labels):
            raise InputError(
                "--labels takes a label server, http://HOST:PORT, a published label set, "
                f"https://HOST/PATH/SET, or a FILE.zip, found {config.labels}; a folder or "
                "s3://... goes with --cache"
            )


def config_json(
    config: TrainConfig, label_sets: Mapping[str, Mapping[str, str]] | None = None
) -> bytes:
    """``config.json``, readable by ``read_config``; with the digest of what it holds.

    Args:
        config: The configuration.
        label_sets: By source, encoding and digest of the label set that is trained from.

    Returns:
        JSON in UTF-8.
    """
    plain = config.as_dict() | ({LABEL_SETS: label_sets} if label_sets else {})
    return (json.dumps(plain | {DIGEST: _digest(plain)}, indent=2) + "\n").encode()


def read_config(path: Path) -> dict[str, Any]:
    """Reads the fields of a stored configuration.

    Args:
        path: A run's ``config.json``. Those of older versions have no digest.

    Returns:
        The values by field.

    Raises:
        MissingData: If the file cannot be read.
        InputError: If it is damaged; names what.
    """
    return read_stored(path)[0]


def read_stored(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Reads the fields of a stored configuration and the label sets of its run.

    Args:
        path: A run's ``config.json``.

    Returns:
        The values by field. By source, encoding and digest of the label set that was trained from;
        empty for a run of an older version.

    Raises:
        MissingData: If the file cannot be read.
        InputError: If it is damaged; names what.
    """
    try:
        stored = json.loads(read_text(path))
    except OSError as error:
        raise MissingData(f"no run to resume: cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a run's configuration ({type(error).__name__})") from error
    if not isinstance(stored, dict):
        raise InputError(f"{path} is not a run's configuration: it is no JSON object")
    digest = stored.pop(DIGEST, None)
    if digest is not None and digest != _digest(stored):
        raise InputError(
            f"{path} was changed since it was written: its fields do not have the digest {digest}; "
            "restore it, or train anew with another --out"
        )
    label_sets = stored.pop(LABEL_SETS, {})
    if not _are_label_sets(label_sets):
        raise InputError(f"{path} is not a run's configuration: {LABEL_SETS} is {label_sets!r:.60}")
    stored = UNSTATED | stored
    if odd := [name for name in stored if name not in FIELDS]:
        raise InputError(f"{path} is not a run's configuration: {odd[0]!r} is no field of one")
    return checked(_with_policy_version(stored), str(path)), label_sets


def _are_label_sets(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(one, dict) and all(isinstance(one.get(k), str) for k in ("encoding", "digest"))
        for one in found.values()
    )


def _with_policy_version(stored: dict[str, Any]) -> dict[str, Any]:
    from sskt.teacher_cache.views.policies import recorded_policy

    policy = stored.get("policy")
    return stored | ({"policy": recorded_policy(policy)} if isinstance(policy, str) else {})


def read_text(path: Path) -> str:
    """Reads a text file. Raises ``OSError``, and for a folder, pipe or device too."""
    if not path.is_file():
        code = errno.EINVAL if path.exists() else errno.ENOENT
        raise OSError(code, "it is no file" if path.exists() else os.strerror(code), str(path))
    return path.read_text("utf-8")


def run_digest(fields: Mapping[str, Any]) -> str:
    """The digest of what decides the numbers of a run: all fields that may not change in it.

    Defaults do not count, so that it stays the same when a later version has more fields. Neither
    does the number of epochs of a run that may be extended.

    Args:
        fields: Values by field.

    Returns:
        SHA-256 of their canonical JSON, in hex.
    """
    plain = TrainConfig(**fields).as_dict()
    if is_extendable(plain):
        plain = _with_epochs(plain, TrainConfig.epochs)
    defaults = TrainConfig().as_dict()
    # Where there is one version only, as in sskt 0.1, the text of a policy does not name it.
    plain["policy"] = plain["policy"].replace("version=1,", "")
    return _digest({k: v for k, v in plain.items() if k not in INDIFFERENT and v != defaults[k]})


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _same_policy(stored: str, now: str) -> bool:
    """Whether two policies are the same with their defaults filled in."""
    from sskt.teacher_cache.views.policies import is_own_policy, parse_policy, recorded_policy

    if AUTO in (stored, now) or any(map(is_own_policy, (stored, now))):
        return False  # code is compared as text, and not run for it
    return parse_policy(recorded_policy(stored)) == parse_policy(now)


def adopted(stored: Mapping[str, Any], config: TrainConfig, where: Path) -> TrainConfig:
    """The configuration with what an earlier part of its run found out: see ``FOLLOWED``.

    Raises ``InputError`` if that would be code.
    """
    stored = extended(stored, config.epochs)
    found = {
        name: stored[name]
        for name, open_value in FOLLOWED.items()
        if getattr(config, name) == open_value and stored.get(name) not in (None, open_value)
    }
    require_named_code(found, (), where)
    return dataclasses.replace(config, **found)


def is_extendable(fields: Mapping[str, Any]) -> bool:
    """Whether a training with more epochs would have begun exactly like this one.

    Args:
        fields: Values by field, those of a run.

    Returns:
        True if no learning rate follows the number of epochs.
    """
    by_epoch = fields["schedule"] == "multistep" and bool(fields.get("milestones"))
    return fields["method"] == "sskt" and (
        fields["schedule"] in ("constant", "plateau") or by_epoch
    )


def _with_epochs(fields: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """The fields with another number of epochs.

    Without stored labels every epoch has a view seed of its own, so that their number goes along.
    """
    stored = fields["source"] and not fields["live"]
    every = not stored and fields["seeds"] == fields["epochs"]
    return {**fields, "epochs": epochs} | ({"seeds": epochs} if every else {})


def extended(stored: Mapping[str, Any], epochs: int) -> Mapping[str, Any]:
    """The configuration of a run that goes on to more epochs; unchanged where it may not.

    Args:
        stored: Values by field, those of the run.
        epochs: The number of epochs that is wanted now.

    Returns:
        Values by field.
    """
    known = {"epochs", "schedule", "method", "source", "live", "seeds"} <= stored.keys()
    if known and epochs > stored["epochs"] and is_extendable(stored):
        return _with_epochs(stored, epochs)
    return stored


def _longer(run: Path, epochs: int, wanted: int) -> InputError:
    longer = run.with_name(f"{run.name}-longer")
    command = ["sskt", "train", "--recipe", str(run), "--init", str(run / "last.pt")]
    command += ["--epochs", str(wanted - epochs), "--out", str(longer)]
    return InputError(
        f"{run} holds a finished run (--epochs {epochs}), whose learning rate followed that "
        f"number, so it cannot be resumed to {wanted}; a new training goes on from its weights "
        f"with: {shlex.join(command)}"
    )


def require_same(stored: Mapping[str, Any], config: TrainConfig, where: Path) -> None:
    """Raises ``InputError`` naming the first field in which a resumed run would differ."""
    stored = extended(stored, config.epochs)
    config = adopted(stored, config, where)
    for name in FIELDS:
        if name in INDIFFERENT or name not in stored:
            continue
        if name in FOLLOWED and stored[name] == FOLLOWED[name]:
            continue
        now = getattr(config, name)
        if stored[name] != now and not (name == "policy" and _same_policy(stored[name], now)):
            if name == "epochs" and now > stored[name]:
                raise _longer(where if where.suffix != ".pt" else where.parent, stored[name], now)
            raise InputError(
                f"{where} holds a run with {name} = {stored[name]!r}, not {now!r}; "
                "resume it as it was, or choose another --out"
            )
