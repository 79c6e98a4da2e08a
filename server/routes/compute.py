"""Computing missing shards on demand: waiting for one, requesting many, showing the queue.

A web worker puts shards into the queue (``compute/queue.py``), and the compute worker
(``compute/worker.py``) stores them before a client is answered. The only thing that a web worker
writes into the cache is the number of seeds of a label set that a request makes grow.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from sskt.server.compute.queue import COMPUTING, FAILED, QUEUED, Entry, Queue, QueueFull
from sskt.server.http.middleware import require_scope
from sskt.server.http.openapi import problems
from sskt.server.http.problems import Problem, problem_of
from sskt.server.state import State, state_of
from sskt.teacher_cache.errors import DiskFull, MissingData, SsktError
from sskt.teacher_cache.label_sets.create import open_for_writing

if TYPE_CHECKING:
    from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard

__all__ = ["Entry", "Queue", "QueueFull", "router", "wait_for", "why_not"]

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.5
"""Seconds between two checks whether a shard is stored: at first, and after a while."""

MOST_SEEDS = 4096
"""Seeds of one request."""

router = APIRouter(tags=["on demand"])
_growing = threading.Lock()


class ComputeRequest(BaseModel):
    """The view seeds of which every missing shard is to be computed."""

    seeds: list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]] = Field(
        min_length=1, max_length=MOST_SEEDS, examples=[[0, 1, 2]]
    )


QUEUE_EXAMPLE = {
    "on_demand": True,
    "limit": 64,
    "waiting": 1,
    "entries": [
        {
            "set": "cifar10-train.imagenet-resnet50.1f0c9a52e1d8",
            "seed": 4,
            "block": 0,
            "state": "computing",
            "since": 1767225600.5,
            "message": "",
        }
    ],
}
COMPUTE_EXAMPLE = {
    "set": "cifar10-train.imagenet-resnet50.1f0c9a52e1d8",
    "missing": 7,
    "queued": 6,
    "computing": 1,
    "failed": 0,
    "message": "",
}


@router.get(
    "/v1/compute",
    operation_id="show_compute",
    summary="Shards waiting to be computed",
    responses={
        200: {
            "description": "In the order in which they will be computed.",
            "content": {"application/json": {"example": QUEUE_EXAMPLE}},
        },
        **problems(),
    },
)
async def show_compute(request: Request) -> Response:
    """Being computed, waiting (`queued`), and failed lately; `since`: seconds of the epoch."""
    queue = state_of(request).on_demand
    entries = await asyncio.to_thread(queue.state) if queue else []
    told = {
        "on_demand": queue is not None,
        "limit": queue.limit if queue else 0,
        "waiting": sum(entry.state == QUEUED for entry in entries),
        "entries": [_told(entry) for entry in entries],
    }
    return JSONResponse(told, headers={"Cache-Control": "no-store"})


@router.post(
    "/v1/label-sets/{name}:compute",
    operation_id="compute",
    summary="Compute the missing shards of some seeds",
    status_code=202,
    responses={
        202: {
            "description": "Every missing shard is queued, is being computed, or failed recently.",
            "content": {"application/json": {"example": COMPUTE_EXAMPLE}},
        },
        **problems(404, 409, 501, 507),
    },
)
async def compute(
    name: Annotated[str, Path(description="Name of a label set, or the beginning of its digest.")],
    wanted: ComputeRequest,
    request: Request,
) -> Response:
    """Needs the scope `compute`. A label set without some of the seeds grows, within a limit.

    If the queue cannot take everything, the answer is 503 and says how much it took; the same
    request continues from there.
    """
    require_scope(request, "compute")
    state = state_of(request)

    def asked() -> dict[str, Any]:
        label_set = state.sets.get(name)
        queue = _queue_for(state, label_set)
        seeds = sorted(set(wanted.seeds))
        if seeds[-1] >= label_set.seeds:
            label_set = _grown(state, label_set, seeds[-1] + 1)
        return _ask_all(queue, label_set, seeds)

    try:
        told = await asyncio.to_thread(asked)
    except SsktError as error:
        raise problem_of(error) from error
    return JSONResponse(told, 202, headers={"Cache-Control": "no-store"})


def _grown(state: State, label_set: LabelSet, seeds: int) -> LabelSet:
    """The label set with room for more seeds.

    It grows at once, so that from now on reading the new seeds waits for their labels.

    Raises:
        Problem: 422 if the server does not let a label set have so many seeds.
    """
    most = state.settings.max_seeds
    if seeds > most:
        detail = (
            f"seed {seeds - 1} is beyond the limit: on this server a request may let a label set "
            f"grow to {most} seeds (sskt serve --max-seeds); label set {label_set.name} has "
            f"{label_set.seeds}. For more, run sskt cache-teachers with --seeds"
        )
        raise Problem(422, "invalid request", detail, max_seeds=most)

    def removed(rows: int | None, found: int | None) -> NoReturn:
        raise MissingData(f"label set {label_set.name} was removed")

    with _growing:  # the locks of the cache exclude other processes only
        open_for_writing(state.home, label_set.name, removed, seeds).close()
    return state.sets.get(label_set.name, fresh=True)


def no_such_seed(state: State, label_set: LabelSet, seed: int) -> Problem:
    """The answer for a seed that a label set does not have: reading never makes it grow."""
    last, name = label_set.seeds - 1, label_set.name
    more = f"sskt cache-teachers --seeds {seed + 1} adds seeds"
    if state.on_demand is not None and seed < state.settings.max_seeds:
        more = f'POST /v1/label-sets/{name}:compute with {{"seeds": [{seed}]}} adds it'
    detail = f"label set {name} has seeds 0 to {last}, not {seed}; {more}"
    return Problem(404, "no such seed", detail, seeds=label_set.seeds)


def _ask_all(queue: Queue, label_set: LabelSet, seeds: list[int]) -> dict[str, Any]:
    """Requests shards block by block: the samples of a block are read once for all its seeds."""
    missing = label_set.missing(seeds)
    states = dict.fromkeys((QUEUED, COMPUTING, FAILED), 0)
    message, full = "", False
    for shard in sorted(missing, key=lambda shard: (shard.block, shard.seed)):
        try:
            entry = queue.ask(label_set.name, shard.seed, shard.block)
        except QueueFull:
            full = True
            break
        states[entry.state] += 1
        message = message or entry.message
    told = {"set": label_set.name, "missing": len(missing), **states, "message": message}
    if full:
        taken = sum(states.values())
        detail = f"the queue has taken {taken} of {len(missing)} missing shards; ask again"
        raise _later(queue, detail, queue.limit, **told)
    return told


async def wait_for(state: State, label_set: LabelSet, seed: int, block: int) -> None:
    """Requests a shard, and returns when it is stored.

    The shard is computed even if the client stops waiting.

    Raises:
        Problem: 503 with Retry-After if the queue is full, or after ``wait_seconds`` (its members
            ``state`` and ``position`` tell the progress); 507 if the disk is full; 500 with the
            reason if the computation failed; 409 if the label set cannot be computed; 404 if it has
            no such shard.
    """
    queue = _queue_for(state, label_set)
    if not 0 <= seed < label_set.seeds:
        raise no_such_seed(state, label_set, seed)
    if not 0 <= block < label_set.blocks:
        raise Problem(
            404, "no such shard", f"label set {label_set.name} has no block {block} of seed {seed}"
        )
    shard = label_set.shard(seed, block)
    deadline, pause = time.monotonic() + state.settings.wait_seconds, FIRST_PAUSE
    try:
        while entry := await asyncio.to_thread(_entry, queue, label_set, shard):
            if entry.state == FAILED:
                raise _failed(queue, entry)
            if time.monotonic() >= deadline:
                raise await asyncio.to_thread(_not_yet, queue, entry)
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, 1.5 * pause)
    except QueueFull as full:
        raise _later(queue, str(full), full.waiting, state="full", position=full.waiting) from full
    except SsktError as error:
        raise problem_of(error) from error


def why_not(label_set: LabelSet) -> str:
    """The reason why no server can compute shards of a label set; "" if none is known."""
    if label_set.attributes.get("made", {}).get("source"):
        return ""
    return (
        f"label set {label_set.name} does not record the source it was made with; compute what is "
        "missing with sskt cache-teachers"
    )


def may_compute(request: Request) -> bool:
    """True if the request has the scope ``compute``."""
    try:
        require_scope(request, "compute")
    except Problem:
        return False
    return True


def _entry(queue: Queue, label_set: LabelSet, shard: Shard) -> Entry | None:
    """The entry of a shard in the queue, made if there is none; None if the shard is stored.

    An object store is asked only when the compute worker is done with the shard.
    """
    entry = queue.get(label_set.name, shard.seed, shard.block)
    over = entry is None or entry.state == FAILED
    if (over or label_set.storage.is_local) and label_set.has(shard, fresh=True):
        return None
    return queue.ask(label_set.name, shard.seed, shard.block) if over else entry


def _failed(queue: Queue, entry: Entry) -> Problem:
    again = {"Retry-After": str(queue.retry_seconds(entry))}
    about = {"state": FAILED, "set": entry.set, "seed": entry.seed, "block": entry.block}
    if entry.kind == DiskFull.__name__:
        told = problem_of(DiskFull(entry.message))
        return Problem(told.status, told.title, told.detail, again, **about)
    return Problem(500, "shard not computed", entry.message, again, **about)


def _not_yet(queue: Queue, entry: Entry) -> Problem:
    ahead = queue.ahead(entry)
    what = "is being computed" if entry.state == COMPUTING else f"waits behind {ahead} others"
    more = f" ({entry.message})" if entry.message else ""
    detail = f"block {entry.block} of seed {entry.seed} of {entry.set} {what}{more}; ask again"
    return _later(queue, detail, ahead + 1, state=entry.state, position=ahead)


def _later(queue: Queue, detail: str, shards: int, **more: Any) -> Problem:
    """503. ``shards``: after how many computed shards the client should ask again."""
    again = {"Retry-After": str(queue.seconds(shards))}
    return Problem(503, "being computed", detail, again, **more)


def _queue_for(state: State, label_set: LabelSet) -> Queue:
    if state.on_demand is None:
        raise Problem(
            501,
            "not on demand",
            "this server does not compute labels; start sskt serve with --on-demand",
        )
    reason = why_not(label_set)
    if reason:
        raise Problem(409, "cannot be computed", reason)
    return state.on_demand


def _told(entry: Entry) -> dict[str, Any]:
    names = ("set", "seed", "block", "state", "since", "message")
    return {name: getattr(entry, name) for name in names}
