"""A network after its training: evaluation, predictions and export."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData
from sskt.teacher_cache.sources.source import usable_device
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.policies import Policy, evaluation_policy, is_own_policy, parse_policy
from sskt.teacher_cache.views.views import open_views
from sskt.trainer.config import TrainConfig, code_of, make_config, read_config, require_named_code
from sskt.trainer.data.splits import open_split, split_to_test
from sskt.trainer.loop.checkpoint import TrainedOn
from sskt.trainer.loop.evaluate import CLIP_BATCH, VIEW_SEED, Evaluation
from sskt.trainer.loop.progress import Hooks
from sskt.trainer.loop.setup import TRAINED_ON, Plan, build_target, trained_on
from sskt.trainer.loop.step import Step
from sskt.trainer.losses import parse_loss, resolve_loss
from sskt.trainer.methods.base import Transfer
from sskt.trainer.models.heads import SSKTNetwork
from sskt.trainer.models.normalization import NORMALISATIONS
from sskt.trainer.results import records

if TYPE_CHECKING:
    from sskt.teacher_cache.views.views import Views

Record = dict[str, Any]
CHECKPOINTS = {"best": records.BEST, "last": records.CHECKPOINT}
VIDEO_ENDINGS = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Prediction:
    """What a network says about one file.

    Attributes:
        path: The file.
        classes: Names of the most probable classes, in descending order.
        probabilities: Their probabilities: of the softmax, or, if a sample may have several
            classes, of the sigmoid. For videos the mean over its windows.
    """

    path: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class TrainedNetwork:
    """The target network of a run, without its auxiliary heads. ``sskt.open_run`` makes it.

    Attributes:
        network: The network, in evaluation mode.
        config: The configuration of the run.
        classes: Names of the classes, in the order of the logits.
        multi_label: Whether a sample may have several classes.
        view_size: Pixels of the shorter side of a view; None if images have different sizes.
        epoch: The epoch after which the weights were saved, from 0.
        device: Where the network is.
    """

    network: SSKTNetwork
    config: TrainConfig
    classes: tuple[str, ...]
    multi_label: bool
    view_size: int | None
    epoch: int
    device: torch.device

    @property
    def policy(self) -> Policy:
        """The view policy of evaluations and predictions."""
        return evaluation_policy(parse_policy(self.config.policy))

    @property
    def clips(self) -> bool:
        """Whether the network takes clips."""
        return self.network.target.dimensions == 3

    @torch.inference_mode()
    def logits(self, views: Tensor) -> Tensor:
        """Runs the network.

        Args:
            views: uint8 ``[n, H, W, 3]`` RGB, or ``[n, D, H, W, 3]`` for clips of D frames.

        Returns:
            float32 ``[n, C]``, on the device of the network.
        """
        x = NORMALISATIONS[self.config.input_scale](views.to(self.device))
        found: Tensor = self.network.target(x)
        return found.float()

    def evaluate(
        self,
        target: str | None = None,
        split: str | None = None,
        *,
        root: str | Path | None = None,
        limit: int | None = None,
        hooks: Hooks | None = None,
    ) -> Record:
        """Measures loss and metrics on a split.

        Args:
            target: The dataset. Default: the one that the run was trained on.
            split: Its split. Default: the test split of the run, or of the dataset.
            root: Folder of its data. Default: that of the run, if the dataset is the same.
            limit: Number of samples, evenly over the classes. Default: all.
            hooks: How the caller follows it.

        Returns:
            The same entries as a record of the training: ``test_loss``, ``test_top1`` and so on,
            in percent; and ``samples``.

        Raises:
            InputError: If the classes are not those of the network.
            MissingData: If the data is missing.
        """
        config = self.config
        if target is None:
            require_named_code({"target": config.target}, (), "this run")
        else:
            config = replace(config, target=target, root=None, test_split="auto", split="train")
        if root is not None:
            config = replace(config, root=Path(root))
        opened = open_split(config, split or split_to_test(config), limit=limit)
        if opened.classes != self.classes:
            odd = sorted(set(opened.classes) ^ set(self.classes)) or ["their order"]
            raise InputError(
                f"{config.target} {opened.split} and the network of the run differ in their "
                f"classes ({odd[0]}); the network knows {len(self.classes)}: "
                f"{', '.join(self.classes[:5])}, ..."
            )
        if not opened.multi_label and (opened.labels < 0).any():
            raise InputError(
                f"{config.target} {opened.split} has samples without a known class; use sskt "
                "predict for them"
            )
        views = open_views(opened, self.policy)
        loss = parse_loss(resolve_loss(config.loss, multi_label=opened.multi_label))
        plan = Plan(config, views, views, {}, [], 1, self.device, loss)
        method = Transfer({}, config.temperature)
        step = Step(plan, self.network, method)
        return Evaluation(plan, step, method, hooks or Hooks())() | {"samples": len(opened)}

    def predict(self, files: Sequence[str | Path], *, top: int = 5) -> Iterator[Prediction]:
        """Classifies image files, or clips if the network takes clips.

        Args:
            files: Images; videos or folders of frames for a network of clips.
            top: Number of classes of a prediction.

        Yields:
            A prediction for each file, in order.

        Raises:
            InputError: If ``top`` is not positive.
            MissingData: If a file cannot be opened.
            BadImage: If a file cannot be decoded.
        """
        if top < 1:
            raise InputError(f"--top must be at least 1, found {top}")
        paths = [Path(file) for file in files]
        for path in paths:
            yield self._of_file(path, min(top, len(self.classes)))

    def _of_file(self, path: Path, top: int) -> Prediction:
        views = self._views(path)
        found = [
            self.logits(torch.from_numpy(views.batch(rows, VIEW_SEED)))
            for rows in np.array_split(
                np.arange(len(views.target)), -(-len(views.target) // CLIP_BATCH)
            )
        ]
        scores = torch.cat(found)
        p = (scores.sigmoid() if self.multi_label else scores.softmax(1)).mean(0)
        values, places = p.sort(descending=True, stable=True)
        return Prediction(
            path,
            tuple(self.classes[i] for i in places[:top].tolist()),
            tuple(values[:top].tolist()),
        )

    def _views(self, path: Path) -> Views:
        target = Target(
            "files", "predict", self.classes, np.array([-1]), [path.name], paths=[path],
            sizes=np.array([path.stat().st_size if path.exists() else 0]),
        )  # fmt: skip
        if not path.exists():
            raise MissingData(f"no file {path}")
        if self.clips:
            from sskt.teacher_cache.media.video import count_frames

            counted = count_frames(path)
            clip = replace(target, decoder="pyav", frames=np.array([counted.frames]))
            return open_views(clip, self.policy)
        if path.suffix.lower() in VIDEO_ENDINGS:
            raise InputError(f"{path} is a video, but the network of the run takes images")
        policy = self.policy
        if "size" not in policy.parameters and self.view_size is not None:
            height, width, _ = target.read(0).shape
            if min(height, width) != self.view_size or height != width:
                size = self.view_size
                policy = parse_policy(f"resize-center-crop:resize={size},size={size}")
        return open_views(target, policy)

    def export(self, out: str | Path) -> Path:
        """Writes the target network for use without sskt.

        ``.pt`` and ``.safetensors`` hold its state_dict, with the keys of torchvision or timm for
        their networks. ``.pt2`` is a program of ``torch.export`` from normalised images, float32
        ``[n, 3, H, W]`` with any n, to logits ``[n, C]``. A JSON file beside it has the class
        names, the preprocessing and the configuration of the run.

        Args:
            out: The file to write; its ending chooses the form.

        Returns:
            The path of the JSON file.

        Raises:
            InputError: If the ending is not known, or the file cannot be written.
        """
        out = Path(out)
        target = self.network.target
        state = {
            target.published_key(k): v.cpu().contiguous() for k, v in target.state_dict().items()
        }
        if out.suffix == ".safetensors":
            from safetensors.torch import save

            data = save(state)
        elif out.suffix in (".pt", ".pth"):
            data = _saved(state)
        elif out.suffix == ".pt2":
            data = self._program()
        else:
            raise InputError(
                f"cannot export to {out}: expected a file that ends in .safetensors, .pt or .pt2"
            )
        described = out.with_name(out.name + ".json")
        text = json.dumps(self.describe(), indent=2) + "\n"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            durable_write(out, data)
            durable_write(described, text.encode())
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror}") from error
        return described

    def describe(self) -> Record:
        """Returns what a user of the network needs, as the JSON file of an export has it."""
        scale = NORMALISATIONS[self.config.input_scale]
        return {
            "model": self.config.model,
            "classes": list(self.classes),
            "multi_label": self.multi_label,
            "epoch": self.epoch,
            "input": {
                "channels": "rgb",
                "policy": str(self.policy),
                "size": self.policy.parameters.get("size", self.view_size),
                "maximum": scale.maximum,
                "mean": list(scale.mean),
                "std": list(scale.std),
            },
            "sskt": version("sskt"),
            "config": self.config.as_dict(),
        }

    def _program(self) -> bytes:
        size = int(self.policy.parameters.get("size", self.view_size or 224))
        shape = (2, 3, size, size)
        if self.clips:
            shape = (2, 3, int(self.policy.parameters["frames"]), size, size)  # type: ignore[assignment]
        batch = torch.export.Dim("batch", min=1)
        target = self.network.target.to(memory_format=torch.contiguous_format)
        program = torch.export.export(
            target, (torch.zeros(shape, device=self.device),), dynamic_shapes=({0: batch},)
        )
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getvalue()


def open_run(
    folder: str | Path, checkpoint: str = "best", *, model: str = "", device: str = "auto"
) -> TrainedNetwork:
    """Opens the network that a run has trained.

    Args:
        folder: The folder of the run.
        checkpoint: ``best``, the weights with the best test metric, or ``last``.
        model: ``FILE.py:factory`` of a network of your own. A run never chooses code by itself.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is ``cuda`` if there is one.

    Returns:
        The network, its classes and its preprocessing.

    Raises:
        MissingData: If the folder holds no run, or no such checkpoint.
        BadCheckpoint: If the checkpoint is damaged or belongs to another network.
        InputError: If an argument is not known.
    """
    folder = Path(folder)
    if checkpoint not in CHECKPOINTS:
        raise InputError(f"checkpoint {checkpoint}: expected best or last")
    config = make_config(read_config(folder / records.CONFIG))
    name = CHECKPOINTS[checkpoint]
    state = records.load_checkpoint(folder, name)
    if state is None:
        other = next((k for k in CHECKPOINTS if (folder / CHECKPOINTS[k]).exists()), None)
        then = f"; --checkpoint {other} is there" if other else "; train the run first"
        raise MissingData(f"no {name} in {folder}{then}")
    if isinstance(state.get("config"), dict):
        config = make_config(state["config"])
    require_named_code({"model": config.model}, ["model"] if model else [], folder)
    known = code_of(config.as_dict())
    config = replace(
        config,
        model=model or config.model,
        # What only the training needs is not run, and the test loss is then that of the target.
        loss="auto" if "loss" in known else config.loss,
        optimizer="sgd",
        schedule="constant",
        callback=[],
    )
    weights = state.get("average") or state.get("model")
    own = {
        key.removeprefix("target."): value
        for key, value in (weights or {}).items()
        if key.startswith("target.")
    }
    found = _trained_on(state, config)
    if is_own_policy(config.policy):
        config = replace(config, policy=str(found.get("evaluation")))
        if is_own_policy(config.policy):
            raise records.unusable(folder / name, "its evaluation policy is code")
    config = replace(
        config, source=[], live=False, tm=False, method="sskt", finetune_from=None, compile=False,
        init="", plateau_on="primary", source_weight=[],
    )  # fmt: skip
    target = build_target(config, len(found["classes"]), found["view_size"])
    try:
        target.load_state_dict(own)
    except RuntimeError as error:
        raise BadCheckpoint(
            f"{folder / name} does not fit {config.model}: {' '.join(str(error).split())[:200]}"
        ) from error
    chosen = usable_device(device)
    network = SSKTNetwork(target, {}).to(chosen).eval()
    return TrainedNetwork(
        network,
        config,
        tuple(found["classes"]),
        found["multi_label"],
        found["view_size"],
        int(state.get("epoch", 0)) - (name == records.CHECKPOINT),
        chosen,
    )


def _trained_on(state: Record, config: TrainConfig) -> Record:
    found = state.get(TRAINED_ON)
    if found is None:  # a run of 0.1
        return trained_on(open_views(open_split(config, config.split), parse_policy(config.policy)))
    try:
        return TrainedOn.model_validate(found).model_dump()
    except ValidationError as error:
        raise BadCheckpoint(f"the checkpoint's {TRAINED_ON} is not that of a run") from error


def _saved(state: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
