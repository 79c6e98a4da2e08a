"""Small things that several test files use."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from sskt.trainer.data.soft_label_batch import SoftLabelBatch
    from sskt.trainer.loop.trainer import Trainer

TINY = Path(__file__).parents[1] / "networks" / "tiny.py"


def write_images(folder: Path, images: Any) -> None:
    """PNGs 0000.png, 0001.png, ... from uint8 ``[n, H, W, 3]``."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")


def write_frames(folder: Path, frames: Any) -> None:
    """A folder of extracted frames. They are PNGs, so that the pixels are exactly these."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames, 1):
        data = io.BytesIO()
        Image.fromarray(frame).save(data, "PNG")
        (folder / f"image_{i:05d}.jpg").write_bytes(data.getvalue())


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under ``folder``, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def one_line(err: str) -> str:
    """The only line of standard error, which must be sskt's own; without its name."""
    assert err.count("\n") == 1 and err.startswith("sskt: "), err
    assert "unexpected" not in err and "Traceback" not in err, err
    return err[len("sskt: ") : -1]


def batch_of(trainer: Trainer, samples: Any, seed: int = 0) -> SoftLabelBatch:
    """Some samples of a trainer's target under a view seed, with their labels."""
    import torch

    from sskt.trainer.data.soft_label_batch import SoftLabelBatch
    from sskt.trainer.data.soft_labels import Window, labels_over

    plan, views = trainer.plan, trainer.views
    whole = Window(seed, ((0, len(views.target)),))
    labels = labels_over(views, plan.label_sets, plan.live, plan.device).enter(whole, None)
    seen = torch.from_numpy(views.batch(samples, seed))
    truth = torch.from_numpy(views.target.labels)[torch.from_numpy(samples)]
    return SoftLabelBatch(samples, seen, truth, labels, plan.normalise)
