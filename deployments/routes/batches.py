"""Batches: leased as an Arrow stream, acknowledged, extended, given back.

A batch's body is an Arrow IPC stream of the record; its lease is JSON in the header `x-rollout-lease`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.routes import body
from rollout.api import Acknowledged, Batch, Extension, LeaseRequest, NoBatch
from rollout.backend import Backend
from rollout.http_backend import ARROW, LEASE_HEADER

router = APIRouter(prefix="/v1", tags=["batches"])

# Bytes of one piece of the stream: large enough that a gigabyte is a thousand messages, small enough to interleave.
CHUNK_BYTES = 2**20
# How soon it is noticed that a waiting trainer has hung up.
GONE_POLL_S = 0.5
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {ARROW: {"schema": {"type": "string", "format": "binary"}}},
        "description": "A batch, or why not",
    }
}


def _backend(request: Request) -> Backend:
    return request.app.state.backend


@router.post(
    "/runs/{run}/leases",
    responses=_ANSWERS,
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": LeaseRequest.model_json_schema()}}},
    },
)
async def lease(request: Request, run: str) -> Response:
    """Wait for the next complete groups: an Arrow stream, or JSON that says why there is none."""
    wanted = await body.parse(request, LeaseRequest)
    answer = await _until_gone(request, _backend(request).lease(run, wanted))
    if isinstance(answer, NoBatch):
        return JSONResponse(asdict(answer))
    return await _arrow(answer)


@router.get("/leases/{lease_id}", responses=_ANSWERS)
async def fetch(request: Request, lease_id: str) -> Response:
    """The batch of an active lease once more, for a stream that broke."""
    return await _arrow(await _backend(request).fetch(lease_id))


@router.post("/leases/{lease_id}/acknowledge")
async def acknowledge(request: Request, lease_id: str) -> Acknowledged:
    """The batch is trained on. Repeated, it stays so; 409 if its groups were given to somebody else meanwhile."""
    return await _backend(request).acknowledge(lease_id)


@router.post("/leases/{lease_id}/extend")
async def extend(request: Request, lease_id: str) -> dict[str, float]:
    """More time; the answer says when it ends (seconds since the epoch)."""
    wanted = await body.parse(request, Extension)
    return {"expires_at": await _backend(request).extend(lease_id, wanted.ttl)}


@router.post("/leases/{lease_id}/release", status_code=204)
async def release(request: Request, lease_id: str) -> None:
    """Give the batch back at once."""
    await _backend(request).release(lease_id)


async def _arrow(batch: Batch) -> StreamingResponse:
    about = asdict_but_table(batch)
    content = await asyncio.to_thread(_to_ipc, batch.table)
    headers = {LEASE_HEADER: json.dumps(about), "content-length": str(content.size)}
    return StreamingResponse(_pieces(content), media_type=ARROW, headers=headers)


def asdict_but_table(batch: Batch) -> dict[str, Any]:
    """A batch's fields but its rows."""
    return {
        "lease_id": batch.lease_id,
        "run": batch.run,
        "groups": batch.groups,
        "expires_in": batch.expires_in,
        "policy_version": batch.policy_version,
    }


def _to_ipc(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


async def _pieces(content: pa.Buffer) -> AsyncIterator[bytes]:
    view = memoryview(content)
    for start in range(0, len(view), CHUNK_BYTES):
        yield bytes(view[start : start + CHUNK_BYTES])


async def _until_gone(request: Request, work: Any) -> Any:
    """Wait, but not for a trainer that has hung up: nobody would acknowledge what it was given."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    finally:
        watcher.cancel()


async def _gone(request: Request) -> None:
    # Starlette has no event for it: a disconnect is a message that somebody must receive.
    while not await request.is_disconnected():
        await asyncio.sleep(GONE_POLL_S)
