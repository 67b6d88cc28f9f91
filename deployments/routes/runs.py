"""Runs and tasks: create, submit, look, pause, resume, cancel, forget, and events while they go on."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from deployments.routes import body
from rollout.api import MAX_WAIT_S, RunInfo, RunRequest, Submitted
from rollout.backend import Backend
from rollout.errors import RolloutError
from rollout.tasks import Task

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/runs", tags=["runs"])

# An event stream without news says so, so that proxies keep it open.
KEEP_ALIVE_S = 10.0
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "`run` at every change, then `[DONE]`"}
}


def _backend(request: Request) -> Backend:
    return request.app.state.backend


def _takes(model: Any, *, also_lines: bool = False) -> dict[str, Any]:
    """OpenAPI's word on a body that the route reads itself."""
    content: dict[str, Any] = {"application/json": {"schema": model.model_json_schema()}}
    if also_lines:
        content["application/x-ndjson"] = {"schema": Task.model_json_schema()}
    return {"requestBody": {"required": True, "content": content}}


@router.post("", openapi_extra=_takes(RunRequest))
async def create_run(request: Request) -> RunInfo:
    """Create a run; the same request again is the same run."""
    return await _backend(request).create_run(await body.parse(request, RunRequest))


@router.get("")
async def list_runs(request: Request) -> list[RunInfo]:
    """All runs."""
    return await _backend(request).runs()


@router.get("/{run}")
async def get_run(
    request: Request, run: str, wait: Annotated[float | None, Query(ge=0.0, le=MAX_WAIT_S)] = None
) -> RunInfo:
    """A run now, or (with `wait`) after its next change, at most so many seconds later."""
    backend = _backend(request)
    return await (backend.run_info(run) if wait is None else backend.watch(run, wait))


@router.post("/{run}/tasks", openapi_extra=_takes(body.TaskList, also_lines=True))
async def submit(request: Request, run: str) -> Submitted:
    """Queue tasks. Those that the run has already, word for word, are counted as duplicates."""
    tasks = await body.parse_tasks(request)
    submitted = await _backend(request).submit(run, tasks)
    # The line that leads from a trajectory's task back to the request which brought it: tasks do not carry its id, as
    # a repeated call with another id would not be the same task any more.
    first, last = (tasks[0].task_id, tasks[-1].task_id) if tasks else ("", "")
    logger.info("run %s got %d new tasks, from %r to %r", run, submitted.accepted, first, last, extra={"run": run})
    return submitted


@router.post("/{run}/pause")
async def pause(request: Request, run: str) -> RunInfo:
    """Start no more sessions; those that run, run on."""
    return await _backend(request).pause(run, True)


@router.post("/{run}/resume")
async def resume(request: Request, run: str) -> RunInfo:
    """Go on."""
    return await _backend(request).pause(run, False)


@router.post("/{run}/cancel")
async def cancel(request: Request, run: str) -> RunInfo:
    """End a run; what has finished can still be leased."""
    return await _backend(request).cancel(run)


@router.delete("/{run}", status_code=204)
async def forget(request: Request, run: str) -> None:
    """Drop a run with everything that it has."""
    await _backend(request).forget(run)


@router.get("/{run}/events", response_class=StreamingResponse, responses=_EVENTS)
async def events(request: Request, run: str) -> StreamingResponse:
    """Server-sent events: the run at every change, then `[DONE]` when it is finished."""
    backend = _backend(request)
    first = await backend.run_info(run)
    return StreamingResponse(_events(request, backend, first), media_type="text/event-stream")


async def _events(request: Request, backend: Backend, info: RunInfo) -> AsyncIterator[str]:
    shown = None
    while not await request.is_disconnected():
        yield f"event: run\ndata: {json.dumps(asdict(info))}\n\n" if info != shown else ": keep-alive\n\n"
        shown = info
        if info.finished:
            break
        try:
            info = await backend.watch(info.run, KEEP_ALIVE_S)
        except RolloutError as failure:
            yield f"event: error\ndata: {json.dumps({'type': failure.category, 'message': str(failure)})}\n\n"
            break
    yield "data: [DONE]\n\n"
