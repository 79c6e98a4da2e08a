"""Labels in any order: some rows of a label set by their numbers."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import anyio.to_thread
import numpy as np
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from sskt.server.http.openapi import problems
from sskt.server.http.problems import Problem
from sskt.server.routes import batch_formats as formats
from sskt.server.routes.batch_formats import RAW, SAFETENSORS
from sskt.server.routes.compute import may_compute, wait_for, why_not
from sskt.server.rows import Int64, chunk_numbers, chunk_rows
from sskt.server.settings import Settings
from sskt.server.state import State, label_set_of, state_of
from sskt.teacher_cache.errors import CorruptStore, IncompleteLabels
from sskt.teacher_cache.format.encodings import Encoded
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard

JSON = "application/json"
DIGEST = "SSKT-Digest"
INLINE = 2 * 2**20
"""Bytes of an answer that is put together in the event loop; a larger one goes to a thread."""
THREADS = 4
"""Threads of a worker that decode labels."""
ANSWERS = 512 * 2**20
"""Bytes of answers that a worker holds at once; while one is put together it is held twice."""
NAMED = 1000
"""Missing seeds and rows that a problem names."""

router = APIRouter(tags=["labels"])
_answers = formats.Budget(ANSWERS)
_limiter: RunVar[CapacityLimiter] = RunVar("decoding")

_Result = TypeVar("_Result")
Number = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class BatchRequest(BaseModel):
    """Rows of a label set under one view seed, or under one for each row."""

    model_config = ConfigDict(strict=True, extra="forbid")

    set: str = Field(description="Name, or the beginning of the digest (6 digits or more).")
    seed: Seed | list[Seed] = Field(description="View seed: one, or one for each id.")
    ids: list[Number] = Field(description="Row numbers in any order; repetitions are allowed.")


_BODY = {
    "required": True,
    "content": {
        JSON: {
            "schema": BatchRequest.model_json_schema(),
            "examples": {
                "one seed": {"value": {"set": "1f0c9a52e1d8", "seed": 0, "ids": [31, 7, 40211, 7]}},
                "a seed for each id": {
                    "value": {"set": "1f0c9a52e1d8", "seed": [0, 1, 2], "ids": [31, 31, 31]}
                },
            },
        },
        RAW: {
            "schema": {
                "type": "string",
                "format": "binary",
                "description": "Row numbers as little-endian int64; set and seed in the query.",
            }
        },
    },
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ROWS = {
    "description": "The rows in the order of the ids: view checks, then the encoding's arrays.",
    "headers": {
        formats.ARRAYS: {
            "description": "With raw bytes: name, dtype and shape of each array, in order.",
            "schema": {"type": "string"},
            "example": "view_check uint32 4; labels float16 4x1000",
        },
        DIGEST: {"description": "Digest of the label set.", "schema": {"type": "string"}},
    },
    "content": {RAW: _BINARY, SAFETENSORS: _BINARY},
}
_MISSING = {
    "type": "about:blank",
    "title": "labels missing",
    "status": 409,
    "detail": "label set 1f0c9a52e1d8 lacks 2 of 4 rows",
    "missing": {"seeds": [0], "ids": [31, 40211], "rows": 2},
}


@router.post(
    "/v1/labels:batch",
    operation_id="batch",
    summary="Labels of rows in any order",
    response_class=Response,
    responses={200: _ROWS, **problems(404, 406, 409, 415, 507, e409=_MISSING)},
    openapi_extra={"requestBody": _BODY},
)
async def batch(
    request: Request,
    name: Annotated[
        str | None, Query(alias="set", description="With raw ids: the label set, as in JSON.")
    ] = None,
    seed: Annotated[int | None, Query(ge=0, lt=2**31, description="With raw ids.")] = None,
) -> Response:
    """Raw little-endian arrays, or a safetensors file if `Accept` prefers it.

    Ids are row numbers of the label set, as JSON or as raw int64 (faster). A batch that is too
    large is refused with 413 and the number of ids that would fit. Reading in order through
    `/zarr` costs client and server less.
    """
    state = state_of(request)
    kind = formats.chosen(request.headers.get("accept"))
    if kind is None:
        detail = f"this route answers {' or '.join(formats.OFFERED)}"
        raise Problem(406, "not acceptable", detail, offered=formats.OFFERED)
    name, seeds, ids = await _parsed(request, name, seed)
    if len(ids) > (most := state.settings.max_ids):
        raise _too_many(f"{len(ids)} ids, at most {most}", most)
    label_set = await label_set_of(state, name)
    _require_rows(label_set, ids)
    row_bytes = state.rows.row_bytes(label_set)
    _require_fitting(label_set, seeds, ids, row_bytes, state.settings)
    count = len(ids) * row_bytes
    if not _answers.take(count):
        detail = "answers that clients have not taken yet fill the memory; ask again"
        raise Problem(503, "too many answers at once", detail, {"Retry-After": "1"})
    answer = None
    try:
        try:
            rows = await _rows(request, state, label_set, seeds, ids, inline=count <= INLINE)
        except CorruptStore:
            if await asyncio.to_thread(state.sets.get, name) is not label_set:
                raise _changed(label_set) from None
            raise
        headers = {DIGEST: label_set.digest, "Cache-Control": "no-store"}
        if kind == RAW:
            headers[formats.ARRAYS] = formats.described(rows)
        told = seeds if isinstance(seeds, int) else seeds.tolist()
        about = {"set": label_set.name, "digest": label_set.digest, "seed": told}
        pack = functools.partial(formats.packed, rows, kind, about)
        body = pack() if count <= INLINE else await _in_thread(pack)
        done = functools.partial(_answers.give_back, count)
        answer = formats.HeldResponse(body, headers, kind, done)
    finally:
        if answer is None:
            _answers.give_back(count)
    state.metrics.labels(label_set.name, len(ids))
    return answer


async def _parsed(
    request: Request, name: str | None, seed: int | None
) -> tuple[str, int | Int64, Int64]:
    """Set, seed or seeds, and ids. Raises ``Problem`` 413, 415, 422."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    coded = request.headers.get("content-encoding", "identity").lower()
    if kind not in (JSON, RAW) or coded != "identity":
        found = repr(kind or "no type") + (f", {coded}" if coded != "identity" else "")
        detail = f"expected a body of type {JSON} or {RAW} without encoding, found {found}"
        raise Problem(415, "unsupported body", detail, {"Accept-Post": f"{JSON}, {RAW}"})
    body = await request.body()
    if kind == RAW:
        if name is None or seed is None:
            raise Problem(422, "invalid request", "raw ids need ?set=NAME&seed=NUMBER")
        if len(body) % 8:
            detail = f"{len(body)} bytes are not a whole number of int64"
            raise Problem(422, "invalid request", detail)
        return name, seed, np.frombuffer(body, "<i8")
    if name is not None or seed is not None:
        raise Problem(422, "invalid request", "with a JSON body, set and seed belong into it")
    try:
        wanted = BatchRequest.model_validate_json(body)
    except ValidationError as error:
        wrong = [
            {"where": ".".join(map(str, e["loc"])), "message": e["msg"]}
            for e in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        first = f"{wrong[0]['where'] or 'body'}: {wrong[0]['message']}"
        raise Problem(422, "invalid request", first, errors=wrong[:20]) from error
    ids = np.array(wanted.ids, np.int64)
    if isinstance(wanted.seed, int):
        return wanted.set, wanted.seed, ids
    if len(wanted.seed) != len(ids):
        detail = f"{len(wanted.seed)} seeds for {len(ids)} ids; expected one, or one for each"
        raise Problem(422, "invalid request", detail)
    return wanted.set, np.array(wanted.seed, np.int64), ids


def _require_rows(label_set: LabelSet, ids: Int64) -> None:
    outside = ids[(ids < 0) | (ids >= label_set.samples)]
    if len(outside):
        detail = (
            f"label set {label_set.name} has rows 0 to {label_set.samples - 1}; {len(outside)} ids "
            f"are outside, the first is {outside[0]}"
        )
        raise Problem(422, "no such rows", detail, rows=label_set.samples)


def _require_fitting(
    label_set: LabelSet, seeds: int | Int64, ids: Int64, row_bytes: int, settings: Settings
) -> None:
    """Bounds the bytes of the answer, and of the chunks that have to be decoded for it.

    Raises:
        Problem: 413 with the limit, and the number of ids that fit.
    """
    count, rows = len(ids), max(1, settings.max_answer // row_bytes)
    if count > rows:
        size = f"the answer to {count} ids has {count * row_bytes} bytes"
        raise _too_many(f"{size}, at most {settings.max_answer}", rows)
    chunk = chunk_rows(label_set) * row_bytes
    chunks = max(1, settings.max_decoded // chunk)
    if count > chunks:
        _, first = np.unique(chunk_numbers(label_set, seeds, ids), return_index=True)
        if len(first) > chunks:
            size = f"{count} ids lie in {len(first)} chunks, decoded {len(first) * chunk} bytes"
            raise _too_many(f"{size}, at most {settings.max_decoded}", int(np.sort(first)[chunks]))


def _too_many(detail: str, fitting: int) -> Problem:
    detail += f" in one request; the first {fitting} ids fit: send the others in further requests"
    return Problem(413, "too many ids", detail, max_ids=fitting)


async def _in_thread(call: Callable[[], _Result]) -> _Result:
    limiter = _limiter.get(None)
    if limiter is None:
        _limiter.set(limiter := CapacityLimiter(THREADS))
    return await anyio.to_thread.run_sync(call, limiter=limiter)


async def _rows(
    request: Request,
    state: State,
    label_set: LabelSet,
    seeds: int | Int64,
    ids: Int64,
    *,
    inline: bool,
) -> Encoded:
    """The rows, computed if need be. Raises ``Problem`` 409 and as ``wait_for``, ``SsktError``."""
    read = functools.partial(state.rows.rows, label_set, seeds, ids)
    try:
        hot = state.rows.hot_rows(label_set, seeds, ids) if inline else None
        return hot if hot is not None else await _in_thread(read)
    except IncompleteLabels:
        lacking = functools.partial(_missing, state, label_set, seeds, ids)
        shards, problem = await _in_thread(lacking)
        on_demand = state.on_demand is not None and not why_not(label_set)
        if problem and not (shards and on_demand and may_compute(request)):
            raise problem from None
    await _computed(state, label_set, shards)
    try:
        return await _in_thread(read)
    except IncompleteLabels:
        raise problem or _changed(label_set) from None


def _changed(label_set: LabelSet) -> Problem:
    detail = f"label set {label_set.name} changed while it was read; ask again"
    return Problem(503, "changed", detail, {"Retry-After": "1"})


def _missing(
    state: State, label_set: LabelSet, seeds: int | Int64, ids: Int64
) -> tuple[list[Shard], Problem | None]:
    """The shards to compute (none if a seed is beyond the set's), and the problem to tell."""
    each = np.broadcast_to(np.asarray(seeds, np.int64), ids.shape)
    known = each < label_set.seeds
    shards = state.rows.missing(label_set, each[known], ids[known])
    numbers = [shard.seed * label_set.blocks + shard.block for shard in shards]
    missing = ~known | np.isin(each * label_set.blocks + ids // label_set.shard_rows, numbers)
    if not missing.any():
        return [], None
    detail = f"label set {label_set.name} lacks {missing.sum()} of the {len(ids)} requested rows"
    if not known.all():
        detail += f"; it has seeds 0 to {label_set.seeds - 1}"
    if state.on_demand is not None:
        detail += f"; POST /v1/label-sets/{label_set.name}:compute has them computed"
    about: dict[str, Any] = {
        "seeds": np.unique(each[missing])[:NAMED].tolist(),
        "ids": np.unique(ids[missing])[:NAMED].tolist(),
        "rows": int(missing.sum()),
    }
    problem = Problem(409, "labels missing", detail, missing=about)
    return shards if known.all() else [], problem


async def _computed(state: State, label_set: LabelSet, shards: list[Shard]) -> None:
    """Waits for all, as many at once as the queue takes. Raises ``Problem`` as ``wait_for``."""
    most = max(1, state.settings.queue)
    for first in range(0, len(shards), most):
        try:
            async with asyncio.TaskGroup() as waiting:
                for shard in shards[first : first + most]:
                    waiting.create_task(wait_for(state, label_set, shard.seed, shard.block))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
