"""``SoftLabelLoader``: batches of views with their true classes and their soft labels.

The labels of a batch travel with it: they are decoded when they are asked for, and stay right
when the loader has gone on to other batches.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sskt.teacher_cache.errors import InputError, UnknownName, ViewMismatch
from sskt.teacher_cache.label_sets.find import require_seeds
from sskt.teacher_cache.rng import permutation
from sskt.teacher_cache.sources.source import Source, usable_device
from sskt.teacher_cache.storage.base import CacheName
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.mixing import Mixed, mixes
from sskt.teacher_cache.views.view_cache import DEFAULT_GIB, ViewCache, open_view_cache
from sskt.teacher_cache.views.views import Views, checks_of
from sskt.trainer.config import AUTO
from sskt.trainer.data.epoch_order import EpochOrder, require_repeats, seeds_needed
from sskt.trainer.data.following import Follow
from sskt.trainer.data.gpu_loader import ResidentFeed, resident_feed
from sskt.trainer.data.label_choice import find_labels
from sskt.trainer.data.loader import Batch, Feed, in_memory
from sskt.trainer.data.soft_label_batch import Normalise, SoftLabelBatch
from sskt.trainer.data.soft_labels import (
    NoLabels,
    Window,
    WindowLabels,
    labels_over,
)
from sskt.trainer.distributed import Ranks, batches_of
from sskt.trainer.loss_inputs import Holding, Live
from sskt.trainer.models.normalization import NORMALISATIONS

if TYPE_CHECKING:
    from sskt.trainer.loop.setup import Plan

Int64 = NDArray[np.int64]

_log = logging.getLogger("sskt")

LATE = 4
"""Batches after which views that were made on the device must have been compared."""
ENDLESS = 2**31
"""View seeds without stored labels: every epoch has one of its own."""


class SoftLabelLoader:
    """An iterable over the batches of a target with the stored soft labels of frozen sources.

    Epoch e sees the views of seed e mod S, the very ones that the sources saw: every view is
    compared with the checksum that was stored with its label, in the loader processes. Views that
    are made on a GPU are compared a few batches later. The labels of the next view seed are read
    while an epoch runs. ``sskt train`` uses this loader.

    Iterating goes through one epoch and then advances to the next; ``set_epoch`` chooses one. As
    torchdata's StatefulDataLoader, the loader has ``state_dict`` and ``load_state_dict``: in the
    middle of an epoch, the batches that follow are the same after a restart.

    Args:
        target: What ``sskt.open_target`` returned.
        cache: Folder or URL of the label sets; default: ``$SSKT_CACHE`` or ``$SSKT_LABELS``, else
            ``labels``.
        sources: Names of sources, or ``NAME#DIGEST`` if several label sets of one fit; default: all
            sources of the cache with labels of this target. An empty list: no soft labels.
        batch_size: Samples of a batch, of all processes together. A last batch that would be too
            small for BatchNorm joins the one before.
        device: Where batches are delivered: ``cpu``, ``cuda``, ``cuda:1``; ``auto``: cuda if there
            is one.
        seed: Seed of the order.
        policy: View policy ``NAME[:key=value,...]``; ``auto``: that of the label sets.
        seeds: View seeds S to cycle through; default: all that are stored.
        views_per_image: Views K of each image in a batch, under K view seeds, from one decoding; a
            batch of B samples then has B / K images. K epochs together visit the pairs of image
            and view seed of K ordinary ones: each visits a K-th of the images.
        epochs: Epochs of the training. After the last one nothing is read ahead.
        normalise: Makes ``images`` of uint8 views: ``imagenet`` (mean and standard deviation),
            ``kinetics`` (0 to 255 minus the mean), or a function of uint8 ``[n, H, W, 3]``.
        workers: Loader processes for files; default: by cores; none for images in RAM.
        memory: GiB of RAM in this process for labels, and for images kept decoded. If the labels
            of a view seed need more than half of it, the epoch is divided into windows.
        view_cache: Folder that keeps the views of files, so that no file is decoded again in a
            later epoch; default: none. Views never differ. Images in RAM need none.
        view_cache_size: GiB that this folder may take, of other targets and policies too.
        on_error: What an unreadable sample does: ``fail`` raises ``BadImage``, ``skip`` leaves it
            out.
        force_topk: Whether to decode top-k labels at a temperature other than 1.
        follow: Waits for labels that are still being written: minutes that they may stay missing
            while no process is known to write them. The logger ``sskt`` is told of each wait.
            Default: labels that are missing are an error.
        rank: Number of this process among those that share each batch; default: as in
            ``torch.distributed`` if it is initialised, else 0.
        world_size: Number of these processes; default: as in ``torch.distributed``, else 1.

    Attributes:
        sources: Names of the sources.
        views: The target under the policy.
        epoch: The epoch of the next iteration, or of the one that is running.
        label_wait_seconds: Seconds in which the loader waited for labels so far.
    Raises:
        MissingData: If there are no labels of this target from a source.
        SpecMismatch: If the label sets were made from other data or under another policy.
        IncompleteLabels: If a view seed that is needed is not stored.
        InputError: If several label sets fit, or an argument cannot be used.
    """

    def __init__(
        self,
        target: Target,
        *,
        cache: CacheName | None = None,
        sources: Sequence[str] | None = None,
        batch_size: int = 128,
        device: str | torch.device = "auto",
        seed: int = 0,
        policy: str = AUTO,
        seeds: int | None = None,
        views_per_image: int = 1,
        epochs: int | None = None,
        normalise: str | Normalise = "imagenet",
        workers: int | None = None,
        memory: float = 8.0,
        view_cache: str | Path | None = None,
        view_cache_size: float = DEFAULT_GIB,
        on_error: str = "fail",
        force_topk: bool = False,
        follow: float | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        ranks = _ranks(rank, world_size)
        _require(batch_size >= ranks.world, "batch_size", f"at least {ranks.world}")
        _require(seeds is None or seeds >= 1, "seeds", "at least 1")
        _require(epochs is None or epochs >= 1, "epochs", "at least 1")
        _require(0 <= seed < 2**32, "seed", "in 0 .. 2**32 - 1")
        _require(memory > 0, "memory", "above 0")
        _require(view_cache_size > 0, "view_cache_size", "above 0")
        _require(workers is None or workers >= 0, "workers", "at least 0")
        _require(on_error in ("fail", "skip"), "on_error", "'fail' or 'skip'")
        if isinstance(normalise, str):
            if normalise not in NORMALISATIONS:
                raise UnknownName("normalisation", normalise, NORMALISATIONS)
            normalise = NORMALISATIONS[normalise]
        views, sets = find_labels(target, cache, sources, policy)
        if seeds is None:
            seeds = min((s.seeds for s in sets.values()), default=ENDLESS)
        require_repeats(views_per_image, seeds, batch_size, ranks.world)
        for label_set in sets.values():
            needed = seeds_needed(seeds, epochs or seeds, views_per_image)
            if follow is None or label_set.seeds < needed:
                require_seeds(label_set, needed)
        if dist.is_available() and dist.is_initialized() and ranks.world == dist.get_world_size():
            seeds = min(ranks.gathered(seeds))  # a set may grow while the processes open it
        order = EpochOrder(
            len(views.target),
            sets,
            seeds,
            batch_size,
            seed,
            memory * 2**30,
            ranks,
            views_per_image,
        )
        place = usable_device(str(device))
        waiting = None if follow is None else Follow(follow, _log.warning)
        self._set_up(
            views,
            [],
            order,
            place,
            normalise,
            workers,
            on_error,
            epochs,
            force_topk,
            None if view_cache is None else Path(view_cache),
            view_cache_size,
            waiting,
        )

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        progress: Callable[[int, int], None] = lambda done, total: None,
        note: Callable[[str], None] = lambda sentence: None,
    ) -> SoftLabelLoader:
        """Makes the loader of a planned training, whose sources may be live.

        Args:
            plan: The plan.
            progress: Called with the number of images that were decoded into RAM, and of all.
            note: Called with a sentence when the training begins to wait for labels.

        Returns:
            The loader, before the first epoch.
        """
        self, config = cls.__new__(cls), plan.config
        self._set_up(
            plan.views,
            plan.live,
            plan.order,
            plan.device,
            plan.normalise,
            config.workers,
            config.on_error,
            config.epochs,
            config.force_topk,
            config.view_cache,
            config.view_cache_size,
            None if config.follow is None else Follow(config.follow, note),
            progress,
        )
        return self

    def _set_up(
        self,
        views: Views,
        live: Sequence[Source],
        order: EpochOrder,
        device: torch.device,
        normalise: Normalise,
        workers: int | None,
        on_error: str,
        epochs: int | None,
        force_topk: bool,
        view_cache: Path | None,
        view_cache_size: float,
        follow: Follow | None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.views = held_in_memory(views, order.memory, progress)
        self.order, self.device, self.batch_size = order, device, order.batch_size
        self._normalise, self._epochs = normalise, epochs
        self._held: dict[str, Holding] = {**{s.name: Live.of(s) for s in live}, **order.sets}
        self._labels = labels_over(
            self.views, order.sets, live, device, force_topk=force_topk, follow=follow
        )
        seeds = seeds_needed(order.seeds, epochs or order.seeds, order.repeats)
        cache = open_view_cache(view_cache, view_cache_size, self.views, seeds)
        checked = bool(order.sets)
        self.feed = feed_of(self.views, device, workers, on_error, checked=checked, cache=cache)
        self._late = _LateChecks()
        self.truth = torch.from_numpy(self.views.target.labels).to(device)
        self.epoch, self.label_wait_seconds = 0, 0.0
        self.recent: deque[SoftLabelBatch] = deque(maxlen=0)  # TimmTeacher wants more
        self._begin = self._position = (0, 0)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(self._held)

    @property
    def source_classes(self) -> dict[str, int]:
        """Number of classes C_m by source, as ``SSKTNetwork`` takes it.

        For features without a head, which have no classes, it is their number D_m.
        """
        return {name: len(held.classes) or held.width for name, held in self._held.items()}

    @property
    def source_widths(self) -> dict[str, int]:
        """Stored values of a sample by source: D_m of features, C_m of soft labels and logits.

        ``SSKTNetwork`` takes it for losses of features.
        """
        return {name: held.width for name, held in self._held.items()}

    def classes(self, source: str) -> tuple[str, ...]:
        """The class names of a source.

        Args:
            source: One of ``sources``.

        Returns:
            The names, in the order of the columns of its soft labels; empty for features without
            a head.

        Raises:
            UnknownName: If the loader has no such source.
        """
        if source not in self._held:
            raise UnknownName("source of the loader", source, self._held)
        return self._held[source].classes

    def __len__(self) -> int:
        """Batches of an epoch, if no sample is left out."""
        return self.order.batch_count(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration: its order, and view seed ``epoch`` mod S.

        A position that ``load_state_dict`` restored is kept if it is in this epoch.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            InputError: If the number is negative.
        """
        _require(epoch >= 0, "epoch", "at least 0")
        if epoch != self.epoch:
            self.seek(epoch)

    def seek(self, epoch: int, window: int = 0, number: int = 0) -> None:
        """Makes the next iteration begin within an epoch.

        Args:
            epoch: Number of the epoch.
            window: Number of the window in the epoch.
            number: Batches of that window that are passed over.
        """
        self.epoch, self._begin, self._position = epoch, (window, number), (window, number)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was delivered, and what it depends on.

        Returns:
            Plain values, to be saved with a checkpoint.
        """
        window, number = self._position
        return {"epoch": self.epoch, "window": window, "batch": number, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state_dict`` was called: the batches that follow are the same.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            InputError: If the loader has other labels, data, seeds or batches than that one.
        """
        for name, now in self._identity().items():
            if state.get(name) != now:
                raise InputError(
                    f"the state belongs to another loader: {name} was {state.get(name)!r}, is "
                    f"{now!r}; make the loader with the arguments that it was saved with"
                )
        self.seek(state["epoch"], state["window"], state["batch"])

    def _identity(self) -> dict[str, Any]:
        order = self.order
        return {
            "digests": {name: s.digest for name, s in order.sets.items()},
            "target": self.views.target.identity(),
            "views": self.views.identity(),
            "seeds": order.seeds,
            "seed": order.seed,
            "batch_size": order.batch_size,
            "views_per_image": order.repeats,
            "world_size": order.ranks.world,
            "rows of labels at a time": len(order.windows(0)[0].samples),
        }

    def __iter__(self) -> Iterator[SoftLabelBatch]:
        """Goes through the epoch, from its beginning or from a restored position.

        Raises:
            ViewMismatch: If a view is not the one that the sources saw.
            BadImage: If a sample cannot be read (with ``on_error="fail"``).
            IncompleteLabels: If labels are missing.
            CorruptStore: If a checksum of the labels fails.
        """
        epoch, begin, order = self.epoch, self._begin, self.order
        self._begin, self._position = (0, 0), begin
        windows = order.windows(epoch)
        last = self._epochs is not None and epoch + 1 >= self._epochs
        following = [*windows[1:], *([] if last else order.windows(epoch + 1)[:1])]
        unreadable = 0
        for i, window in enumerate(windows):
            if i < begin[0]:
                continue
            entered = time.perf_counter()
            labels = self._labels.enter(window, following[i] if i < len(following) else None)
            self.label_wait_seconds += time.perf_counter() - entered
            batches = order.batches(window, labels.skipped, epoch)
            first = begin[1] if i == begin[0] else 0
            parts = [order.ranks.part(batch) for batch in batches[first:]]
            for j, made in enumerate(self.feed(parts, window.seed, window.others), first):
                found = self._proved(made, parts[j - first], window, labels)
                self._position = (i, j + 1)
                unreadable += len(found.bad)
                # With several processes, one without a readable sample takes part all the same.
                if len(found.samples) or order.ranks.world > 1:
                    whole = len(batches[j]) * order.repeats
                    batch = self._batch(found, labels, (i, j), whole, unreadable)
                    self.recent.append(batch)
                    yield batch
                    unreadable = 0
        self.finish_checks()
        self.seek(epoch + 1)

    def _proved(self, made: Batch, part: Int64, window: Window, labels: WindowLabels) -> Batch:
        """A batch from regions of images; from the whole images if a view is not the stored one.

        So damage of a file since it was labelled is reported as such.
        """
        if made.checks is None or not self.feed.views.regions:
            return made
        try:
            labels.check(made.samples, made.checks, made.seeds)
        except ViewMismatch:
            return next(iter(_of_whole_images(self.feed)([part], window.seed, window.others)))
        return made

    def without_labels(self, number: int) -> Iterator[SoftLabelBatch]:
        """Goes once through all samples in one process, without soft labels.

        Args:
            number: View seed, and number of the order among those of the seed.
        """
        order, samples = self.order, np.arange(len(self.views.target))
        batches = batches_of(permutation(samples, order.seed, number), order.batch_size)
        labels = NoLabels().enter(Window(number, ((0, len(samples)),)), None)
        for i, found in enumerate(_of_whole_images(self.feed)(batches, number)):
            if len(found.samples):
                yield self._batch(found, labels, (0, i), len(batches[i]), len(found.bad))

    def _batch(
        self,
        found: Batch,
        labels: WindowLabels,
        position: tuple[int, int],
        whole: int,
        unreadable: int,
    ) -> SoftLabelBatch:
        rows = torch.from_numpy(found.samples).to(self.device, non_blocking=True)
        checked = self._check(found, labels) if len(rows) else 0
        return SoftLabelBatch(
            found.samples,
            found.views.to(self.device, non_blocking=True),
            self._truth(rows, found.mixed),
            labels,
            self._normalise,
            position=position,
            whole=whole,
            unreadable=unreadable,
            checked=checked,
            mixed=found.mixed,
            seeds=found.seeds,
        )

    def _truth(self, rows: Tensor, mixed: Mixed | None) -> Tensor:
        """True classes of samples; if they were mixed, those of both by their weights."""
        if mixed is None:
            return self.truth[rows]
        weights = torch.from_numpy(mixed.weights).to(self.device)[:, None]
        partners = torch.from_numpy(mixed.partners).to(self.device)

        def present(truth: Tensor) -> Tensor:
            if self.views.target.multi_label:
                return (truth > 0).float()
            known = (truth >= 0).float()[:, None]  # a class that is not known is none
            return known * F.one_hot(truth.clamp_min(0), len(self.views.target.classes))

        return weights * present(self.truth[rows]) + (1 - weights) * present(self.truth[partners])

    def _check(self, found: Batch, labels: WindowLabels) -> int:
        """Compares all views of a batch with the stored checks, now or soon; how many."""
        if not labels.checked:
            return 0
        if found.checks is None:
            self._late.add(found, labels)
            return len(found.samples)
        return labels.check(found.samples, found.checks, found.seeds)

    def finish_checks(self) -> None:
        """Waits until all views that were delivered have been compared.

        Raises:
            ViewMismatch: If a view is not the one that the sources saw.
        """
        self._late.finish()

    def close(self) -> None:
        """Stops reading ahead. The loader cannot be iterated afterwards."""
        self._late.close()
        self._labels.close()


def held_in_memory(
    views: Views, memory: float, progress: Callable[[int, int], None] = lambda done, total: None
) -> Views:
    """The views with the target's images decoded, if these fit a quarter of ``memory`` bytes."""
    return dataclasses.replace(views, target=in_memory(views.target, memory / 4, progress))


class _LateChecks:
    """Compares views that are on a GPU while later batches train, as waiting for them is slow."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sskt-checks")
        self._pending: deque[Future[int]] = deque()

    def add(self, found: Batch, labels: WindowLabels) -> None:
        """Takes a batch. Raises ``ViewMismatch`` for one of those before it."""
        views, event = found.views, None
        if views.device.type == "cuda":
            views = torch.empty(views.shape, dtype=views.dtype, pin_memory=True)
            views.copy_(found.views, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        compared = self._pool.submit(self._compare, found, views, event, labels)
        self._pending.append(compared)
        self.finish(LATE)

    @staticmethod
    def _compare(found: Batch, views: Tensor, event: Any, labels: WindowLabels) -> int:
        if event is not None:
            event.synchronize()
        return labels.check(found.samples, checks_of(views.numpy()), found.seeds)

    def finish(self, left: int = 0) -> None:
        while len(self._pending) > left:
            self._pending.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def feed_of(
    views: Views,
    device: torch.device,
    workers: int | None,
    on_error: str,
    *,
    checked: bool,
    cache: ViewCache | None = None,
) -> Feed | ResidentFeed:
    """What makes batches of views: on the device if the images fit there, else through workers."""
    resident = resident_feed(views, device) if device.type == "cuda" else None
    # Only stored checks prove what is not decoded whole. A partner that a view is mixed with may
    # be a sample without a label, whose view has no check.
    regions = checked and cache is None and not mixes(views.policy)
    views = dataclasses.replace(views, regions=regions)
    return resident or Feed(views, workers, on_error, device.type == "cuda", checked, cache)


def _of_whole_images(feed: Feed | ResidentFeed) -> Feed | ResidentFeed:
    return dataclasses.replace(feed, views=dataclasses.replace(feed.views, regions=False))


def _ranks(rank: int | None, world: int | None) -> Ranks:
    joined = dist.is_available() and dist.is_initialized()
    if world is None:
        world = dist.get_world_size() if joined else 1
    if rank is None:
        rank = dist.get_rank() if joined else 0
    _require(0 <= rank < world, "rank", f"in 0 .. {world - 1}")
    return Ranks(rank, world)


def _require(holds: bool, name: str, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} of the loader must be {expected}; give another value")
