"""Labels in any order: some rows of a label set by their numbers."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import anyio.to_thread
import numpy as np
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from sskt.server.http.middleware import require_scope
from sskt.server.http.openapi import problems
from sskt.server.http.problems import Problem
from sskt.server.routes.batch_formats import (
    ARRAYS,
    OFFERED,
    RAW,
    SAFETENSORS,
    Budget,
    HeldResponse,
    chosen,
    described,
    packed,
    read_answer,
)
from sskt.server.routes.compute import wait_for, why_not
from sskt.server.rows.layout import Int64
from sskt.server.state import State, state_of
from sskt.teacher_cache.errors import IncompleteLabels
from sskt.teacher_cache.format.encodings import Encoded
from sskt.teacher_cache.label_sets.label_set import LabelSet, Shard

__all__ = ["read_answer", "router"]

JSON = "application/json"
DIGEST = "SSKT-Digest"
INLINE = 2 * 2**20
"""Bytes of an answer that is put together on the spot; a larger one goes to a thread."""
THREADS = 4
"""Threads of a worker that decode shards: each holds one in memory."""
ANSWERS = 512 * 2**20
"""Bytes of answers that a worker holds at once; while one is put together it is there twice."""
NAMED = 1000
"""Missing seeds and rows that a problem names."""

router = APIRouter(tags=["labels"])
_answers = Budget(ANSWERS)
_limiter: RunVar[CapacityLimiter] = RunVar("decoding")

_Result = TypeVar("_Result")
Number = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Wanted(BaseModel):
    """Rows of a label set under one view seed, or under one for each row."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"set": "cifar10-train.imagenet-resnet50.1f0c9a52e1d8", "seed": 0, "ids": [7, 3]}
            ]
        },
    )

    set: str = Field(description="Name, or the beginning of the digest (6 digits or more).")
    seed: Seed | list[Seed] = Field(description="One, or one for each id.")
    ids: list[Number] = Field(description="Row numbers, in any order, repeated or not.")


_BODY = {
    "required": True,
    "content": {
        JSON: {
            "schema": Wanted.model_json_schema(),
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
_HEADERS = {
    ARRAYS: {
        "description": "Of raw bytes: name, dtype and shape of each array, in order.",
        "schema": {"type": "string"},
        "example": "view_check uint32 4; labels float16 4x1000",
    },
    DIGEST: {"description": "The label set's digest.", "schema": {"type": "string"}},
}
_ROWS = {
    "description": "The rows in the order of the ids: view checks, then the encoding's arrays.",
    "headers": _HEADERS,
    "content": {
        RAW: {"schema": {"type": "string", "format": "binary"}},
        SAFETENSORS: {"schema": {"type": "string", "format": "binary"}},
    },
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
        str | None, Query(alias="set", description="With raw ids: the set, as in JSON.")
    ] = None,
    seed: Annotated[int | None, Query(ge=0, lt=2**31, description="With raw ids.")] = None,
) -> Response:
    """Raw little-endian arrays, or safetensors where `Accept` asks for it.

    Ids are row numbers of the label set, as JSON or as raw int64 (faster). For reading in order,
    `/zarr` costs everybody less.
    """
    state = state_of(request)
    kind = chosen(request.headers.get("accept"))
    if kind is None:
        raise Problem(
            406, "not acceptable", f"this answers {' or '.join(OFFERED)}", offered=OFFERED
        )
    name, seeds, ids = await _asked(request, name, seed)
    _check_count(len(ids), state.settings.max_ids)
    label_set = await _label_set(state, name)
    _check_rows(label_set, ids)
    count = len(ids) * state.slabs.layout(label_set).row_bytes
    if not _answers.take(count):
        detail = "answers that clients have not taken yet fill the memory"
        raise Problem(503, "too many answers at once", detail, {"Retry-After": "1"})
    answer = None
    try:
        rows = await _rows(request, state, label_set, seeds, ids)
        headers = {DIGEST: label_set.digest, "Cache-Control": "no-store"}
        if kind == RAW:
            headers[ARRAYS] = described(rows)
        pack = functools.partial(packed, rows)
        if kind == SAFETENSORS:
            pack = functools.partial(_safetensors, label_set, seeds, rows)
        body = pack() if count <= INLINE else await _in_thread(pack)
        done = functools.partial(_answers.give_back, count)
        answer = HeldResponse(body, headers, kind, done)
    finally:
        if answer is None:
            _answers.give_back(count)
    state.metrics.labels(label_set.name, len(ids))
    return answer


async def _asked(
    request: Request, name: str | None, seed: int | None
) -> tuple[str, int | Int64, Int64]:
    """Set, seed or seeds, and ids. Raises ``Problem`` 413, 415, 422."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    coded = request.headers.get("content-encoding", "identity").lower()
    if kind not in (JSON, RAW) or coded != "identity":
        found = repr(kind or "no type") + (f", {coded}" if coded != "identity" else "")
        detail = f"expected a body of type {JSON} or {RAW}, not encoded; found {found}"
        raise Problem(415, "unsupported body", detail, {"Accept-Post": f"{JSON}, {RAW}"})
    body = await request.body()
    if kind == JSON:
        if name is not None or seed is not None:
            raise Problem(422, "invalid request", "with a JSON body, set and seed belong into it")
        return _parsed(body)
    if name is None or seed is None:
        raise Problem(422, "invalid request", "raw ids need ?set=NAME&seed=NUMBER")
    if len(body) % 8:
        detail = f"{len(body)} bytes are no whole number of int64"
        raise Problem(422, "invalid request", detail)
    return name, seed, np.frombuffer(body, "<i8")


def _parsed(body: bytes) -> tuple[str, int | Int64, Int64]:
    try:
        wanted = Wanted.model_validate_json(body)
    except ValidationError as error:
        found = [
            {"where": ".".join(map(str, e["loc"])), "message": e["msg"]}
            for e in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        first = f"{found[0]['where'] or 'body'}: {found[0]['message']}"
        raise Problem(422, "invalid request", first, errors=found[:20]) from error
    ids = np.array(wanted.ids, np.int64)
    if isinstance(wanted.seed, int):
        return wanted.set, wanted.seed, ids
    if len(wanted.seed) != len(ids):
        detail = f"{len(wanted.seed)} seeds for {len(ids)} ids; expected one, or one for each"
        raise Problem(422, "invalid request", detail)
    return wanted.set, np.array(wanted.seed, np.int64), ids


def _check_count(count: int, most: int) -> None:
    if count > most:
        detail = f"{count} ids in one request; at most {most}"
        raise Problem(413, "too many ids", detail, max_ids=most)


def _check_rows(label_set: LabelSet, ids: Int64) -> None:
    outside = ids[(ids < 0) | (ids >= label_set.samples)]
    if len(outside):
        detail = (
            f"label set {label_set.name} has rows 0 to {label_set.samples - 1}; {len(outside)} ids "
            f"are outside, the first is {outside[0]}"
        )
        raise Problem(422, "no such rows", detail, rows=label_set.samples)


async def _label_set(state: State, name: str) -> LabelSet:
    """Raises ``Problem`` 404."""
    known = state.sets.recent(name)
    return known if known is not None else await asyncio.to_thread(state.sets.get, name)


async def _in_thread(call: Callable[[], _Result]) -> _Result:
    limiter = _limiter.get(None)
    if limiter is None:
        _limiter.set(limiter := CapacityLimiter(THREADS))
    return await anyio.to_thread.run_sync(call, limiter=limiter)


async def _rows(
    request: Request, state: State, label_set: LabelSet, seeds: int | Int64, ids: Int64
) -> Encoded:
    """The rows, computed if need be. Raises ``Problem`` 409 and as ``wait_for``, ``SsktError``."""
    try:
        return await _stored(state, label_set, seeds, ids)
    except IncompleteLabels:
        missing = await _in_thread(functools.partial(_missing, state, label_set, seeds, ids))
        if missing.rows and not (missing.shards and _computes(request, state, label_set)):
            raise missing.problem from None
    await _computed(state, label_set, missing.shards)
    try:
        return await _stored(state, label_set, seeds, ids)
    except IncompleteLabels:
        raise missing.problem from None


async def _stored(state: State, label_set: LabelSet, seeds: int | Int64, ids: Int64) -> Encoded:
    slabs = state.slabs
    if len(ids) * slabs.layout(label_set).row_bytes <= INLINE:
        rows = slabs.hot_rows(label_set, seeds, ids)
        if rows is not None:
            return rows
    return await _in_thread(functools.partial(slabs.rows, label_set, seeds, ids))


@dataclass(frozen=True)
class _Missing:
    """What is not stored. ``shards``: to be computed, none if a seed is beyond the set's."""

    rows: int
    shards: list[Shard]
    problem: Problem


def _missing(state: State, label_set: LabelSet, seeds: int | Int64, ids: Int64) -> _Missing:
    each = np.broadcast_to(np.asarray(seeds, np.int64), ids.shape)
    beyond = each >= label_set.seeds
    known, blocks = ~beyond, ids // label_set.shard_rows
    shards = state.slabs.lacking(label_set, each[known], ids[known])
    numbers = [shard.seed * label_set.blocks + shard.block for shard in shards]
    missing = beyond.copy()
    missing[known] = np.isin(each[known] * label_set.blocks + blocks[known], numbers)
    detail = f"label set {label_set.name} lacks {missing.sum()} of the {len(ids)} rows asked for"
    if beyond.any():
        detail += f"; it has seeds 0 to {label_set.seeds - 1}"
    if state.on_demand is not None:
        detail += f"; /v1/label-sets/{label_set.name}:compute takes orders for them"
    about: dict[str, Any] = {
        "seeds": np.unique(each[missing])[:NAMED].tolist(),
        "ids": np.unique(ids[missing])[:NAMED].tolist(),
        "rows": int(missing.sum()),
    }
    problem = Problem(409, "labels missing", detail, missing=about)
    return _Missing(about["rows"], [] if beyond.any() else shards, problem)


def _computes(request: Request, state: State, label_set: LabelSet) -> bool:
    """Whether this server computes labels of the set for who asks."""
    if state.on_demand is None or why_not(label_set):
        return False
    try:
        require_scope(request, "compute")
    except Problem:
        return False
    return True


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


def _safetensors(label_set: LabelSet, seeds: int | Int64, rows: Encoded) -> bytes:
    from safetensors.numpy import save

    seed = json.dumps(seeds if isinstance(seeds, int) else seeds.tolist())
    about = {"set": label_set.name, "digest": label_set.digest, "seed": seed}
    return save({name: np.ascontiguousarray(array) for name, array in rows.items()}, about)
