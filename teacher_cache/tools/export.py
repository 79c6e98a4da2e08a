"""Storing a label set once more in a smaller encoding, without the source network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import CorruptStore, InputError
from sskt.teacher_cache.format.encodings import (
    ERROR_ROWS,
    STEPS,
    Encoded,
    Encoding,
    Float32,
    decoded,
    measured_error,
)
from sskt.teacher_cache.format.features import F16, U8, values
from sskt.teacher_cache.label_sets.create import create_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.storage.open import open_cache
from sskt.teacher_cache.tools.card import LICENSE

EXACT = ("topk", "u8", "root4", "f16", "f32")
"""From the coarsest to the reference; ``root4-coarse`` is no finer than ``u8``."""

FEATURE_ENCODINGS = (U8, F16)
"""The same of features and logits."""

POLL_SECONDS = 0.1

Progress = Callable[[int, int], None]
"""Called with (shards done, shards to do)."""


@dataclass(frozen=True)
class Exported:
    """What an export did: shards written, shards found there, the new set's bytes and error."""

    name: str
    digest: str
    written: int
    reused: int
    bytes: int
    coverage: list[float]
    error: dict[str, object] | None


def _exactness(encoding: Encoding) -> int:
    if encoding.of_features:
        return FEATURE_ENCODINGS.index(encoding.name)
    coarse = encoding.name == "root4" and encoding.step > STEPS["root4"]
    return EXACT.index("u8" if coarse else encoding.name)


def require_exportable(found: Encoding, wanted: Encoding, name: str) -> None:
    """Raises ``InputError`` unless ``wanted`` holds less than ``found`` does."""
    if found.of_features != wanted.of_features:
        raise InputError(
            f"label set {name} is stored as {found}, and {wanted} holds something else; export "
            "features and logits with --encoding u8"
        )
    if _exactness(wanted) < _exactness(found) or (
        found.name == wanted.name == "topk" and wanted.k < found.k
    ):
        return
    if found == wanted:
        raise InputError(f"label set {name} is stored as {found} already; sskt copy copies it")
    raise InputError(
        f"label set {name} is stored as {found}: {wanted} labels made of it would pass for exact "
        f"ones; cache them with sskt cache-teachers --encoding {wanted.option} "
        "(it needs the source)"
    )


def export_label_set(
    source: LabelSet,
    encoding: Encoding,
    to: CacheName,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Makes the label set of the same source, target and views in another encoding.

    What is stored of ``source`` is re-encoded shard by shard; skipped rows stay skipped, view
    checks are copied. From f32 the bytes are those that the teacher stage would have written.
    The recorded ``error`` is that of the new encoding relative to the stored labels: what those
    had lost already comes on top. Safe to stop anywhere and to run again.

    Raises ``InputError`` for an encoding that is no smaller one, or if the set is there and was
    made in another way; ``CorruptStore`` naming the shard of ``source`` that is damaged;
    ``DiskFull``.
    """
    require_exportable(source.encoding, encoding, source.name)
    origin = {"exported_from": source.digest, "from_encoding": str(source.encoding)}
    target = create_label_set(
        open_cache(to, make=True),
        source.spec | {"encoding": encoding.identity()},
        source.classes,
        source.seeds,
        shard_rows=source.shard_rows,
        provenance=source.attributes.get("made", {}) | origin,
        samples=source.sample_names(),
        head=source.head,
    )
    with closing(target):
        if target.attributes["made"].get("exported_from") != source.digest:
            raise InputError(
                f"label set {target.name} is in {to} already and was not exported from "
                f"{source.name}; export into another cache"
            )
        if LICENSE in source.attributes:
            target.add_attribute(LICENSE, source.attributes[LICENSE])
        seeds = range(source.seeds)
        missing = set(source.missing(seeds))
        wanted = [s for s in target.shards(seeds) if not lacks(source, missing, s)]
        return write_missing(
            target, wanted, lambda shard: _export_shard(source, target, shard), progress
        )


def write_missing(
    target: WritableLabelSet,
    wanted: Sequence[Shard],
    write: Callable[[Shard], None],
    progress: Progress,
) -> Exported:
    """Writes those of some shards that are not stored, and waits for those of other processes.

    Args:
        target: The label set, open for writing.
        wanted: The shards, in the order in which they are written.
        write: Writes a shard, which is locked.
        progress: Called with shards done and to do.

    Returns:
        What was written.
    """
    lacking = set(target.missing(range(target.seeds)))
    left = [s for s in wanted if s in lacking]
    there, written = len(wanted) - len(left), 0
    while left:
        progress(len(wanted) - len(left), len(wanted))
        for shard in left:
            if target.acquire(shard):
                write(shard)
                target.release(shard)
                written += 1
                progress(there + written, len(wanted))
        lacking = set(target.missing(range(target.seeds)))
        busy = [s for s in left if s in lacking]
        if len(busy) == len(left):
            time.sleep(POLL_SECONDS)
        left = busy
    return Exported(
        target.name,
        target.digest,
        written,
        len(wanted) - written,
        target.stored_bytes(),
        target.coverage(),
        target.attributes.get("error"),
    )


def lacks(source: LabelSet, missing: set[Shard], shard: Shard) -> bool:
    """Whether a part of the samples of the new set's ``shard`` is not stored."""
    blocks = range(shard.start // source.shard_rows, -(-shard.stop // source.shard_rows))
    return any(source.shard(shard.seed, block) in missing for block in blocks)


def _export_shard(source: LabelSet, target: WritableLabelSet, shard: Shard) -> None:
    stored = source.read(shard.seed, shard.start, shard.stop)
    checks = source.read_checks(shard.seed, shard.start, shard.stop)
    skipped = source.encoding.skipped(stored)
    require_sound(source, shard.seed, shard.start, stored, skipped & (checks != 0))
    kept = {key: rows[~skipped] for key, rows in stored.items()}
    if shard.seed == shard.block == 0 and not skipped.all():
        first = {key: rows[:ERROR_ROWS] for key, rows in kept.items()}
        log_p = _log_p(source.encoding, first, len(source.classes))
        target.add_attribute("error", measured_error(target.encoding, log_p, source.head))
    encoded = target.encoding.empty(len(skipped), target.width)
    for key, rows in _encode(source, target, kept).items():
        encoded[key][~skipped] = rows
    target.write(shard, encoded, checks)


def _encode(source: LabelSet, target: LabelSet, kept: Encoded) -> Encoded:
    if source.encoding.name == "topk":
        return {key: rows[:, : target.encoding.k] for key, rows in kept.items()}
    return target.encoding.encode(_log_p(source.encoding, kept, len(source.classes)))


def _log_p(encoding: Encoding, encoded: Encoded, classes: int) -> Float32:
    """Log-probabilities as they are stored: float32 ``[n, C]``; f16's are not renormalised.

    So the values of a top-k set are those that the source's own would have given. Features and
    logits are as they are stored too.
    """
    if encoding.of_features:
        return values(encoded)
    if encoding.name in ("f32", "f16"):
        return encoded["labels"].astype(np.float32)
    with np.errstate(divide="ignore"):
        return np.log(decoded(encoding, encoded, classes)).astype(np.float32)


def require_sound(
    source: LabelSet, seed: int, start: int, stored: Encoded, empty: NDArray[np.bool_]
) -> None:
    """Checks stored rows before they are used for another label set.

    Args:
        source: Their label set.
        seed: Their view seed.
        start: The first sample.
        stored: The rows.
        empty: Which of them are empty and should not be: bool ``[n]``.

    Raises:
        CorruptStore: If a row is no label.
    """
    wrong = source.encoding.faulty(stored, source.width) | empty
    if wrong.any():
        raise CorruptStore(
            f"label set {source.name}: seed {seed}, samples {start} to "
            f"{start + len(wrong) - 1}: {int(wrong.sum())} rows are no labels, first sample "
            f"{start + int(np.flatnonzero(wrong)[0])}; run sskt verify, delete the shard "
            "it names and cache it again"
        )
