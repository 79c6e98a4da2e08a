"""What a run leaves behind: metrics, TensorBoard events, checkpoints, a plot."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sskt.teacher_cache.errors import BadCheckpoint, InputError, MissingData, first_line
from sskt.teacher_cache.storage.atomic import durable_write
from sskt.teacher_cache.storage.locks import Locks
from sskt.trainer.config import read_config, read_text, run_digest

METRICS, CONFIG, PLOT = "metrics.jsonl", "config.json", "curves.png"
LOCK = ".lock"
CHECKPOINT, BEST = "last.pt", "best.pt"
CHECK = "check"
"""The key of a line of ``metrics.jsonl`` that holds its checksum."""
SEAL, SEALED = b"sskt sha256 ", "sealed"
"""What begins the comment of a checkpoint's archive, and what in it says that there is one."""

_PARTIAL = re.compile(
    "|".join(map(re.escape, (METRICS, CONFIG, PLOT, CHECKPOINT, BEST))).join(("(?:", ")"))
    + r"\.[0-9a-f]{32}\.partial"
)

Record = dict[str, Any]


@contextmanager
def held_folder(folder: Path, *, resume: bool) -> Iterator[None]:
    """The run's folder, made and kept from other processes.

    Unfinished files that a killed process has left in it are removed.

    Raises ``InputError`` if another process trains into it, or if a run is there and not to be
    resumed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {folder} for the run: {error.strerror}") from error
    with closing(Locks(folder / LOCK, "start no second training into this folder")) as lock:
        if not lock.acquire(0):
            raise InputError(
                f"another process is training into {folder}; let it end or stop it, or choose "
                "another --out"
            )
        for leftover in folder.glob("*.partial"):
            if _PARTIAL.fullmatch(leftover.name) and lock.abandoned(leftover):
                leftover.unlink(missing_ok=True)
        for name in (CONFIG, METRICS, CHECKPOINT, BEST, PLOT):
            path = folder / name
            if path.is_symlink() if not path.exists() else not path.is_file():
                raise InputError(
                    f"{path} is no file, and a run writes one there; remove it, or choose another "
                    "--out"
                )
        if not resume and any((folder / name).exists() for name in (METRICS, CHECKPOINT)):
            raise InputError(
                f"{folder} already holds a run; continue it with --resume, or choose another --out"
            )
        yield


def read_metrics(folder: Path) -> list[Record]:
    """Reads the records of a run.

    A line that sskt wrote since 0.2.0 ends in a checksum of itself and of the configuration, so
    that a damaged line, or the file of another run, is found.

    Args:
        folder: The run's folder.

    Returns:
        A record for each epoch.

    Raises:
        MissingData: If there is no such file.
        InputError: If the file is damaged, or belongs to another configuration.
    """
    path = folder / METRICS
    try:
        found = [json.loads(line) for line in read_text(path).splitlines()]
    except OSError as error:
        raise MissingData(f"no run in {folder}: cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    checks = [r.pop(CHECK, None) if isinstance(r, dict) else None for r in found]
    if any(check is not None for check in checks):
        digest = run_digest(read_config(folder / CONFIG))
        for i, (record, check) in enumerate(zip(found, checks, strict=True)):
            if not isinstance(record, dict) or check != _check_of(record, digest):
                raise _damaged(path, f"the checksum of line {i + 1} fails")
    return found


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} is damaged ({what}), or belongs to another run; delete it, and sskt train "
        f"--resume --out {path.parent} writes it again"
    )


def _check_of(record: Record, digest: str) -> str:
    return f"{zlib.crc32((json.dumps(record) + digest).encode()):08x}"


def write_metrics(folder: Path, records: Sequence[Record], digest: str) -> None:
    """Writes all records, whole or not at all.

    Args:
        folder: The run's folder.
        records: A record for each epoch.
        digest: ``run_digest`` of its configuration.
    """
    lines = [
        json.dumps(record | {CHECK: _check_of(record, digest)}, allow_nan=False) + "\n"
        for record in records
    ]
    durable_write(folder / METRICS, "".join(lines).encode())


def is_finished(records: Sequence[Record], epochs: int) -> bool:
    """Whether a run with these records has nothing left to do."""
    return bool(records) and (
        records[-1]["epoch"] + 1 >= epochs or bool(records[-1].get("stopped_early"))
    )


def save_checkpoint(folder: Path, state: Record, name: str = CHECKPOINT) -> None:
    """Writes ``last.pt`` or ``best.pt``, whole or not at all.

    The file is one of ``torch.save``. Its zip archive has a comment with the SHA-256 of all that
    is before it: torch does not compare the checksums of the archive.

    Args:
        folder: The run's folder.
        state: Tensors and plain values.
        name: Name of the file.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(state | {SEALED: True}, buffer)
    buffer.seek(-2, io.SEEK_END)  # the length of the comment ends the archive
    with buffer.getbuffer() as whole:
        digest = hashlib.sha256(whole[:-2]).hexdigest()
    comment = SEAL + digest.encode()
    buffer.write(len(comment).to_bytes(2, "little") + comment)
    durable_write(folder / name, buffer.getbuffer())


def load_checkpoint(folder: Path, name: str = CHECKPOINT) -> Record | None:
    """Reads ``last.pt`` or ``best.pt`` without running code from it.

    Args:
        folder: The run's folder.
        name: Name of the file.

    Returns:
        What was saved; None if there is no such file.

    Raises:
        BadCheckpoint: If the file is damaged or is no checkpoint. Files of sskt before 0.2.0 have
            the checksums of their archive only.
    """
    from sskt.teacher_cache.sources.checkpoints import read_checkpoint

    path = folder / name
    if not path.exists() and not path.is_symlink():
        return None
    try:
        sealed = _require_seal(path)
        state = read_checkpoint(path)
    except (BadCheckpoint, MissingData, OSError) as error:
        raise unusable(path, first_line(error)) from error
    if not isinstance(state, dict):
        raise unusable(path, f"it holds {type(state).__name__}")
    if state.pop(SEALED, False) and not sealed:
        raise unusable(path, "its SHA-256 is missing")
    return state


def unusable(path: Path, why: str) -> BadCheckpoint:
    """An error about a checkpoint of a run, with the next step."""
    then = "to start the run anew" if path.name == CHECKPOINT else "to go on without it"
    return BadCheckpoint(
        f"cannot use checkpoint {path}: {why}; restore it from a copy, or delete it {then}"
    )


def _require_seal(path: Path) -> bool:
    """Returns whether the file has a seal. Raises ``BadCheckpoint`` if it is not the file's."""
    length = len(SEAL) + 64
    if not path.is_file():
        raise BadCheckpoint("it is no file")
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - length - 2))
        end = file.read()
        if not end[2:].startswith(SEAL):
            return False
        file.seek(0)
        digest = hashlib.sha256()
        left = size - length - 2
        while part := file.read(min(left, 2**20)):
            digest.update(part)
            left -= len(part)
    wanted = length.to_bytes(2, "little") + SEAL + digest.hexdigest().encode()
    if end != wanted:
        raise BadCheckpoint("it is damaged: its SHA-256 is not the one that was written")
    return True


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
