"""What a run leaves behind: metrics, TensorBoard events, checkpoints, a plot."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.storage.locks import Locks

METRICS, CONFIG, PLOT = "metrics.jsonl", "config.json", "curves.png"
LOCK = ".lock"
CHECKPOINT, BEST = "last.pt", "best.pt"

Record = dict[str, Any]


@contextmanager
def held_folder(folder: Path, *, resume: bool) -> Iterator[None]:
    """The run's folder, made and kept from other processes.

    Raises ``InputError`` if another process trains into it, or if a run is there and not to be
    resumed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {folder} for the run: {error.strerror}") from error
    with closing(Locks(folder / LOCK, "start no second training into this folder")) as lock:
        if not lock.claim(0):
            raise InputError(
                f"another process is training into {folder}; let it end or stop it, or choose "
                "another --out"
            )
        if not resume and any((folder / name).exists() for name in (METRICS, CHECKPOINT)):
            raise InputError(
                f"{folder} already holds a run; continue it with --resume, or choose another --out"
            )
        yield


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run, one an epoch. Raises ``MissingData`` or ``InputError``."""
    path = folder / METRICS
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise MissingData(f"no run in {folder}: cannot read {path}") from error
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def write_metrics(folder: Path, records: Sequence[Record]) -> None:
    """All records, whole or not at all."""
    durable_write(
        folder / METRICS, "".join(json.dumps(r, allow_nan=False) + "\n" for r in records).encode()
    )


def is_finished(records: Sequence[Record], epochs: int) -> bool:
    """Whether a run with these records has nothing left to do."""
    return bool(records) and (
        records[-1]["epoch"] + 1 >= epochs or bool(records[-1].get("stopped_early"))
    )


def save_checkpoint(folder: Path, state: Record, name: str = CHECKPOINT) -> None:
    """``last.pt`` or ``best.pt``, whole or not at all."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    durable_write(folder / name, buffer.getbuffer())


def load_checkpoint(folder: Path) -> Record | None:
    """The last checkpoint, None if the run never finished an epoch. Raises ``BadCheckpoint``."""
    import torch

    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: Record = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise BadCheckpoint(
            f"cannot read checkpoint {path}; delete it to start the run anew"
        ) from error
    return state


class Events:
    """TensorBoard scalars of a run."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)

    def add(self, record: Record) -> None:
        """Every number of an epoch's record."""
        for key, value in record.items():
            if isinstance(value, int | float) and key != "epoch":
                self._writer.add_scalar(key, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()
