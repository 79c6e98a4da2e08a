"""Label sets of made-up labels, written by the stage's own writer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sskt.teacher_cache.format.encodings import parse_encoding
from sskt.teacher_cache.format.spec import classes_identity
from sskt.teacher_cache.label_sets.create import create_label_set, open_label_set
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard
from sskt.teacher_cache.label_sets.writable import WritableLabelSet
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.storage.object_store import NoLocks

SAMPLES, ROWS, CLASSES, SEEDS = 1300, 512, 12, 3
"""Three shards a seed, the last one not full."""


def make_labels(
    cache: CacheName,
    encoding: str = "f16",
    *,
    without: Iterable[tuple[int, int]] = (),
    salt: int = 0,
    samples: int = SAMPLES,
    rows: int = ROWS,
) -> LabelSet:
    """A label set opened for reading, without some (seed, block).

    ``salt``: other labels. ``samples``, ``rows``: of the set and of a shard.
    """
    names = tuple(f"class {i}" for i in range(CLASSES))
    kind = parse_encoding(encoding)
    spec = {
        "format": 1,
        "target": {"name": "made", "split": "train", "size": samples, "fingerprint": "made"},
        "source": {"name": "made", "arch": "none", "classes": classes_identity(names)},
        "views": {"policy": "none", "version": 1, "parameters": {}, "f_s": "identity"},
        "encoding": kind.identity(),
    }
    made = {"source": "none"}
    ids = [f"{i % 7}/{i}.jpg" for i in range(samples)]
    label_set = create_label_set(
        cache, spec, names, SEEDS, shard_rows=rows, provenance=made, samples=ids
    )
    for shard in label_set.missing(range(SEEDS)):
        if (shard.seed, shard.block) not in without:
            write_shard(label_set, shard, salt)
    label_set.close()
    return open_label_set(label_set.storage)


def write_shard(label_set: WritableLabelSet, shard: Shard, salt: int = 0) -> None:
    """Stores one shard of a set that is open for writing."""
    rng = np.random.default_rng([salt, shard.seed, shard.block])
    count = shard.stop - shard.start
    logits = rng.normal(size=(count, CLASSES))
    log_p = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    checks = rng.integers(0, 2**32, count, np.uint32)
    label_set.write(shard, label_set.encoding.encode(log_p), checks)


def replace_shard(label_set: LabelSet, seed: int, block: int, salt: int) -> None:
    """Removes a stored shard and stores it again with other labels."""
    place, shard = label_set.storage, label_set.shard(seed, block)
    place.delete(label_set.shard_keys(shard))
    write_shard(writer_of(label_set), shard, salt)
    place.refresh()


def writer_of(label_set: LabelSet) -> WritableLabelSet:
    """The label set, open for writing without locks."""
    return WritableLabelSet.of(open_label_set(label_set.storage), NoLocks())
