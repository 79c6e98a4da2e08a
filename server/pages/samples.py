"""The sample browser: one sample under one seed as the source saw it, and the stored labels.

The images are replayed from the target's files where the server has them.
"""

from __future__ import annotations

import io
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from sskt.server.http.problems import Problem
from sskt.server.pages.pages import page, part, root_of
from sskt.server.pages.summaries import as_text, summaries_of
from sskt.server.settings import Settings
from sskt.server.state import State, state_of
from sskt.teacher_cache.errors import IncompleteLabels, MissingData, SsktError
from sskt.teacher_cache.format.features import LOGITS
from sskt.teacher_cache.label_sets.label_set import LabelSet

if TYPE_CHECKING:
    from sskt.teacher_cache.views.views import Views

TOP = 5
STRIP = 12
"""Samples shown beside each other on a set's page."""
OPEN = 4
"""How many targets are kept open."""
KEPT = 32
"""How many images are kept."""
AGAIN_SECONDS = 30.0
"""Seconds after which a target that could not be opened is tried again."""
PATIENCE_SECONDS = 3.0
"""Seconds that a page waits for a target to be opened."""
WIDE = 320
"""Small images are enlarged to about so many pixels, each pixel to a square."""

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class ViewImage:
    """A sample's view as PNG; of a clip, its stills side by side.

    width, height: of the PNG. shape: of the view in words. matches: whether its checksum is the
    stored one, None if none is stored. stills: numbers of the frames that the source saw.
    """

    png: bytes
    width: int
    height: int
    shape: str
    matches: bool | None
    stills: tuple[int, ...]


@dataclass
class Opened:
    """The targets that this worker has open, and the last images.

    patience: seconds that a caller waits for a target to be opened.
    """

    patience: float = PATIENCE_SECONDS
    _targets: OrderedDict[str, tuple[Future[Views], float]] = field(default_factory=OrderedDict)
    _images: OrderedDict[tuple[str, int, int], ViewImage] = field(default_factory=OrderedDict)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "sskt-open"))

    def __len__(self) -> int:
        return len(self._targets)

    def views(self, label_set: LabelSet, settings: Settings) -> Views:
        """The views of a set. Raises ``SsktError``: why there are none; ``TimeoutError``."""
        key = label_set.digest
        with self._guard:
            opening, since = self._targets.get(key, (None, 0.0))
            failed = opening is not None and opening.done() and opening.exception() is not None
            if opening is None or (failed and time.monotonic() - since > AGAIN_SECONDS):
                opening = self._pool.submit(_opened, label_set, settings)
                self._targets[key] = (opening, time.monotonic())
            self._targets.move_to_end(key)
            while len(self._targets) > OPEN:
                self._targets.popitem(last=False)
        return opening.result(self.patience)

    def image(self, label_set: LabelSet, views: Views, row: int, seed: int) -> ViewImage:
        """A sample's image. Raises ``BadImage``, ``MissingData``."""
        key = (label_set.digest, row, seed)
        with self._guard:
            if key in self._images:
                self._images.move_to_end(key)
                return self._images[key]
        made = _image(label_set, views, row, seed)
        with self._guard:
            if made.matches is not None:
                self._images[key] = made
            while len(self._images) > KEPT:
                self._images.popitem(last=False)
        return made


def _opened(label_set: LabelSet, settings: Settings) -> Views:
    from sskt.teacher_cache.tools.reopen import Reopen, reopen_views

    sampling = str(label_set.attributes["made"].get("frame_sampling", ""))
    if ".py:" in sampling:
        raise MissingData(
            f"its frames were chosen by Python code ({sampling}), which a server does not run"
        )
    if label_set.spec["views"].get("code"):
        raise MissingData("its views were made by Python code, which this page does not run")
    how = Reopen(
        root=Path(settings.root) if settings.root else None,
        allow_outside_root=settings.allow_outside_root,
    )
    return reopen_views(label_set, how)


def _image(label_set: LabelSet, views: Views, row: int, seed: int) -> ViewImage:
    from PIL import Image

    from sskt.teacher_cache.views.views import check_of

    view = views[row, seed]
    stills = views.stills(view[None], np.array([row]), seed)[0]
    frames: tuple[int, ...] = ()
    if views.target.clips:
        frames = tuple(int(n) for n in views.f_s.frames(len(view), row, seed))
        stills = np.concatenate(list(stills), axis=1)
    times = max(1, WIDE // max(view.shape[-3:-1]))
    large = stills.repeat(times, 0).repeat(times, 1)
    data = io.BytesIO()
    Image.fromarray(large).save(data, "PNG")
    *depth, height, width, _ = view.shape
    shape = f"{width} x {height} pixels" + (f", {depth[0]} frames" if depth else "")
    stored = label_set.has(label_set.shard(seed, row // label_set.shard_rows))
    matches = None
    if stored:
        matches = int(label_set.read_checks(seed, row, row + 1)[0]) == check_of(view)
    return ViewImage(data.getvalue(), large.shape[1], large.shape[0], shape, matches, frames)


@dataclass(frozen=True)
class Sample:
    """What is known of a sample beside its labels; ``why``: why there is no image."""

    image: ViewImage | None = None
    id: str = ""
    label: str | None = None
    why: str = ""


def _views(request: Request, label_set: LabelSet) -> Views:
    """The views of a set. Raises ``MissingData``: why there are no images, for people."""
    opened: Opened = request.app.state.opened
    try:
        return opened.views(label_set, state_of(request).settings)
    except TimeoutError as error:
        raise MissingData("The target is being opened; reload this page in a moment.") from error
    except (SsktError, OSError) as error:
        raise MissingData(f"The files of the target cannot be read here: {error}") from error


def _sample(request: Request, label_set: LabelSet, row: int, seed: int) -> Sample:
    opened: Opened = request.app.state.opened
    try:
        views = _views(request, label_set)
    except MissingData as error:
        return Sample(why=str(error))
    known = views.target.ids[row], views.target.label_text(row)
    try:
        known = views.target.ids[row], views.label_text(row, seed)
        return Sample(opened.image(label_set, views, row, seed), *known)
    except SsktError as error:
        return Sample(None, *known, f"This sample has no image: {error}")


@dataclass(frozen=True)
class Labels:
    """The label of one source.

    top: (class, probability). entropy: None of logits. why: why the label is missing.
    """

    label_set: LabelSet
    top: tuple[tuple[str, float], ...] = ()
    entropy: float | None = None
    why: str = ""


def labels_of(label_set: LabelSet, row: int, seed: int) -> Labels:
    """The stored label of a sample."""
    from sskt.teacher_cache.tools.verify import stored_probabilities

    if seed >= label_set.seeds:
        return Labels(label_set, why=f"has no seed {seed}")
    try:
        p = stored_probabilities(label_set, row, seed)
    except IncompleteLabels:
        return Labels(label_set, why="not labelled yet")
    except SsktError as error:
        return Labels(label_set, why=str(error))
    if p is None:
        return Labels(label_set, why="no label: the sample could not be read")
    best = np.argsort(-p, kind="stable")[:TOP]
    some = p[p > 0].astype(np.float64)
    entropy = None if label_set.output == LOGITS else float(-(some * np.log(some)).sum())
    return Labels(label_set, tuple((label_set.classes[i], float(p[i])) for i in best), entropy)


def over_same_views(label_set: LabelSet, sets: list[LabelSet]) -> list[LabelSet]:
    """The set, and all others over the same samples and views."""
    from sskt.teacher_cache.label_sets.find import replayed

    def views(of: LabelSet) -> tuple[Any, Any]:
        return of.spec["target"], replayed(of.spec["views"])

    others = [s for s in sets if s.digest != label_set.digest and views(s) == views(label_set)]
    return [label_set, *others]


def _within(label_set: LabelSet, row: int, seed: int) -> None:
    """Raises ``Problem`` 404 unless the set has such a sample and seed."""
    if not (0 <= row < label_set.samples and 0 <= seed < label_set.seeds):
        raise Problem(
            404,
            "no such sample",
            f"{label_set.name} has samples 0 to {label_set.samples - 1} and seeds 0 to "
            f"{label_set.seeds - 1}, found sample {row}, seed {seed}",
        )


def sample_url(label_set: LabelSet, row: int, seed: int) -> str:
    """The URL of a sample's page below the server's root."""
    return f"sets/{part(label_set.name)}/samples/{row}?seed={seed}"


@dataclass(frozen=True)
class Strip:
    """Neighbouring samples of a set. before, after: where the neighbours of these begin, if any."""

    rows: range
    before: int | None
    after: int | None


def _strip(label_set: LabelSet, row: int) -> Strip:
    rows = range(row, min(row + STRIP, label_set.samples))
    before = max(0, row - STRIP) if row else None
    return Strip(rows, before, rows.stop if rows.stop < label_set.samples else None)


Number = Annotated[int, Query(description="A number from 0.")]


@router.get("/sets/{name}")
def set_page(request: Request, name: str, row: Number = 0, seed: Number = 0) -> Response:
    """One label set, and some of its samples from ``row`` on."""
    label_set = state_of(request).sets.get(name)
    _within(label_set, row, seed)
    strip = _strip(label_set, row)
    why = ""
    try:
        _views(request, label_set)
    except SsktError as error:
        why = str(error)
    return page(
        request.scope,
        "set.html",
        summary=summaries_of(request, [label_set])[0],
        set=label_set,
        made_text=as_text(label_set.attributes.get("made", {})),
        seed=seed,
        strip=strip,
        labels=[labels_of(label_set, each, seed) for each in strip.rows],
        why=why,
        url=sample_url,
    )


@router.get("/sets/{name}/samples")
def jump(request: Request, name: str, row: Number = 0, seed: Number = 0) -> Response:
    """Where the form leads."""
    label_set = state_of(request).sets.get(name)
    _within(label_set, row, seed)
    return RedirectResponse(root_of(request.scope) + sample_url(label_set, row, seed), 303)


@router.get("/sets/{name}/samples/random")
def random_sample(request: Request, name: str, seed: Number = 0) -> Response:
    """Leads to a sample that is labelled under that seed, if any is."""
    label_set = state_of(request).sets.get(name)
    _within(label_set, 0, seed)
    rng = np.random.default_rng()
    row = int(rng.integers(label_set.samples))
    for block in rng.permutation(label_set.blocks)[:1000].tolist():
        shard = label_set.shard(seed, block)
        if label_set.has(shard):
            row = int(rng.integers(shard.start, shard.stop))
            break
    headers = {"Cache-Control": "no-store"}
    return RedirectResponse(root_of(request.scope) + sample_url(label_set, row, seed), 303, headers)


@router.get("/sets/{name}/samples/{row}")
def sample_page(request: Request, name: str, row: int, seed: Number = 0) -> Response:
    """One sample under one seed."""
    state: State = state_of(request)
    label_set = state.sets.get(name)
    _within(label_set, row, seed)
    label_set.storage.refresh()
    sets = over_same_views(label_set, state.sets.all())
    return page(
        request.scope,
        "sample.html",
        set=label_set,
        row=row,
        seed=seed,
        sample=_sample(request, label_set, row, seed),
        labels=[labels_of(s, row, seed) for s in sets],
        url=sample_url,
    )


@router.get("/sets/{name}/samples/{row}/view.png")
def view_png(request: Request, name: str, row: int, seed: Number = 0) -> Response:
    """The image of a sample's page."""
    label_set = state_of(request).sets.get(name)
    _within(label_set, row, seed)
    sample = _sample(request, label_set, row, seed)
    if sample.image is None:
        raise Problem(404, "no image", sample.why)
    headers = {"Cache-Control": "private, max-age=3600"}
    return Response(sample.image.png, headers=headers, media_type="image/png")
