"""Label sets as JSON: list, coverage, spec, files; and the state of the server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, Response

from sskt.server.http.openapi import problems
from sskt.server.http.problems import DAMAGED, Problem
from sskt.server.pages.coverage import coverage_of
from sskt.server.routes.compute import why_not
from sskt.server.routes.zarr import metadata_keys, shard_of
from sskt.server.state import State, inside, state_of
from sskt.teacher_cache.label_sets.create import summary
from sskt.teacher_cache.label_sets.label_set import LabelSet

router = APIRouter(tags=["label sets"])
health = APIRouter(tags=["health"])

SetName = Annotated[
    str,
    InPath(
        description="Name of a label set, or the beginning of its digest (6 digits or more).",
        examples=["cifar10-train.imagenet-resnet50.1f0c9a52e1d8"],
    ),
]
EXAMPLE = {
    "name": "cifar10-train.imagenet-resnet50.1f0c9a52e1d8",
    "digest": "1f0c9a52e1d8…",
    "target": {"name": "cifar10", "split": "train", "size": 50000},
    "source": {"name": "imagenet", "arch": "resnet50", "precision": "float32"},
    "views": {"policy": "pad-crop-flip", "version": 1, "parameters": {"padding": 4}},
    "encoding": "f16",
    "classes": 1000,
    "seeds": 10,
    "coverage": [1.0, 0.66],
    "bytes": 812345678,
    "on_demand": False,
}


def _json(example: Any, description: str = "Found.") -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"example": example}}}


@router.get(
    "/v1/label-sets",
    operation_id="list_label_sets",
    summary="All label sets",
    responses={200: _json({"label_sets": [EXAMPLE], "damaged": {}}), **problems()},
)
async def list_label_sets(request: Request) -> Response:
    """Every label set with its coverage; `damaged` names those that cannot be read, and why."""
    state = state_of(request)

    def found() -> dict[str, Any]:
        sets, damaged = [], {}
        for label_set in state.sets.all():
            try:
                sets.append(_shown(state, label_set))
            except OSError as error:
                damaged[label_set.name] = f"{label_set.name} cannot be read: {error.strerror}"
        return {"label_sets": sets, "damaged": state.sets.damaged | damaged}

    return await _answer(found)


@router.get(
    "/v1/label-sets/{name}",
    operation_id="show_label_set",
    summary="One label set",
    responses={200: _json(EXAMPLE | {"spec": {}, "made": {}, "arrays": {}}), **problems(404)},
)
async def show_label_set(name: SetName, request: Request) -> Response:
    """As in the list, with its spec, its provenance (`made`) and its arrays."""
    state = state_of(request)

    def found() -> dict[str, Any]:
        label_set = state.sets.get(name)
        return _shown(state, label_set) | {
            "spec": label_set.spec,
            "made": label_set.attributes.get("made", {}),
            "arrays": arrays_of(label_set, request.scope.get("root_path", "")),
        }

    return await _answer(found)


@router.get(
    "/v1/label-sets/{name}/coverage",
    operation_id="show_coverage",
    summary="Which shards are stored",
    responses={
        200: _json({"seeds": 2, "blocks": 3, "rows": 8192, "stored": [[0, 1, 2], [0]]}),
        **problems(404),
    },
)
async def show_coverage(name: SetName, request: Request) -> Response:
    """A shard has one seed of one block of `rows` samples. `stored`: each seed's blocks."""
    state = state_of(request)

    def found() -> dict[str, Any]:
        label_set = state.sets.get(name)
        stored = [np.flatnonzero(blocks).tolist() for blocks in coverage_of(label_set).stored]
        return {
            "seeds": label_set.seeds,
            "samples": label_set.samples,
            "blocks": label_set.blocks,
            "rows": label_set.shard_rows,
            "stored": stored,
        }

    return await _answer(found)


@router.get(
    "/v1/label-sets/{name}/spec",
    operation_id="show_spec",
    summary="The identity of a label set",
    responses={200: _json({"digest": "1f0c9a52e1d8…", "spec": {}}), **problems(404)},
)
async def show_spec(name: SetName, request: Request) -> Response:
    """The spec of a label set, and its digest: SHA-256 of its canonical JSON."""
    state = state_of(request)

    def found() -> dict[str, Any]:
        label_set = state.sets.get(name)
        return {"digest": label_set.digest, "spec": label_set.spec}

    return await _answer(found)


@router.get(
    "/v1/label-sets/{name}/files",
    operation_id="list_files",
    summary="Names and sizes of stored files",
    responses={
        200: _json({"files": {"view_check/zarr.json": 1433, "view_check/c/0/0": 33012}}),
        **problems(404),
    },
)
async def list_files(
    name: SetName,
    request: Request,
    under: Annotated[
        str,
        Query(
            description="Only the files of this array.",
            max_length=64,
            pattern=r"^[a-z_]*$",
            examples=["view_check"],
        ),
    ] = "",
) -> Response:
    """The files that `/zarr/NAME/` serves, with their sizes in bytes."""
    state = state_of(request)

    def found() -> dict[str, Any]:
        label_set = state.sets.get(name)
        sizes = label_set.storage.sizes(under) if _inside(state, label_set, under) else {}
        return {"files": {k: sizes[k] for k in sizes if _served(state, label_set, k)}}

    return await _answer(found)


@router.get(
    "/v1/server",
    operation_id="show_server",
    summary="This server",
    responses={
        200: _json({"version": "0.2.0", "on_demand": False, "label_sets": 3}),
        **problems(),
    },
)
async def show_server(request: Request) -> Response:
    """Its version, and whether it computes missing labels."""
    state = state_of(request)

    def found() -> dict[str, Any]:
        return {
            "version": version("sskt"),
            "on_demand": state.on_demand is not None,
            "label_sets": len(state.sets.all()),
        }

    return await _answer(found)


@router.get(
    "/v1/auth",
    operation_id="check_token",
    summary="Whether a token may read",
    status_code=204,
    responses={204: {"description": "The token may read."}, **problems()},
    response_class=Response,
)
async def check_token() -> Response:
    """For a proxy that serves `/zarr` itself (nginx: `auth_request`)."""
    return Response(None, 204)


@health.get("/healthz", operation_id="healthz", summary="The process answers", responses=problems())
async def healthz() -> Response:
    """Needs no token."""
    return JSONResponse({"status": "ok"})


@health.get(
    "/readyz",
    operation_id="readyz",
    summary="The cache can be read",
    responses={200: _json({"status": "ready", "label_sets": 3}), **problems(503)},
)
async def readyz(request: Request) -> Response:
    """Needs no token. 503 while the cache cannot be listed."""
    sets = await asyncio.to_thread(state_of(request).sets.all)
    return JSONResponse({"status": "ready", "label_sets": len(sets)})


def arrays_of(label_set: LabelSet, root: str = "") -> dict[str, Any]:
    """Shapes, types and paths of the arrays of a label set."""
    shape = [label_set.seeds, label_set.samples]
    arrays = label_set.encoding.arrays(label_set.width).items()
    found = {
        key: {"shape": [*shape, width], "dtype": dtype.name} for key, (dtype, width, _) in arrays
    }
    found["view_check"] = {"shape": shape, "dtype": "uint32"}
    return {k: v | {"path": f"{root}/zarr/{label_set.name}/{k}"} for k, v in found.items()}


def _served(state: State, label_set: LabelSet, inner: str) -> bool:
    """True if ``/zarr`` serves a key of a label set."""
    shard = shard_of(label_set, inner)
    known = shard.seed < label_set.seeds if shard else inner in metadata_keys(label_set)
    return known and _inside(state, label_set, inner)


def _inside(state: State, label_set: LabelSet, inner: str) -> bool:
    """False for a link that leaves the cache. A set may have 100,000 files: few are links."""
    key = f"{label_set.name}/{inner}"
    linked = label_set.storage.is_local and os.path.islink(state.home.where(key))  # noqa: PTH114
    return not linked or inside(state.home, key)


def _shown(state: State, label_set: LabelSet) -> dict[str, Any]:
    found = coverage_of(label_set)
    computed = state.on_demand is not None and not why_not(label_set)
    return summary(label_set, (found.shares.tolist(), found.bytes)) | {"on_demand": computed}


async def _answer(found: Callable[[], dict[str, Any]]) -> Response:
    """JSON from a function that may wait for a disk or a bucket."""
    try:
        document = await asyncio.to_thread(found)
    except OSError as error:
        detail = f"a file of the label set cannot be read: {error.strerror}"
        raise Problem(500, DAMAGED, detail) from error
    return JSONResponse(document, headers={"Cache-Control": "no-cache"})
