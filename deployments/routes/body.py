"""Request bodies: bounded while they are read, parsed off the event loop.

Invariant: no request makes the gateway hold more than `max_body_bytes` of it, whatever its headers say.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rollout.api import MAX_TASKS_PER_CALL
from rollout.errors import ApiError, TaskFileError
from rollout.tasks import MAX_REPORTED, Task, parse_task

M = TypeVar("M", bound=BaseModel)


class TooLarge(ApiError):
    """The body has more bytes than are read."""

    category = "too_large"
    status = 413


class TaskList(BaseModel):
    """Tasks of one submission."""

    model_config = ConfigDict(extra="forbid")

    tasks: list[Task] = Field(min_length=1, max_length=MAX_TASKS_PER_CALL)


async def read(request: Request) -> bytes:
    """The whole body. Raises TooLarge."""
    limit: int = request.app.state.max_body_bytes
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > limit:
        raise _too_large(limit)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


async def parse(request: Request, model: type[M]) -> M:
    """The body as JSON of a model; an empty one is an empty object. Raises ValidationError, TooLarge."""
    content = await read(request) or b"{}"
    return await asyncio.to_thread(model.model_validate_json, content)


async def parse_tasks(request: Request) -> list[Task]:
    """Tasks: JSON {"tasks": [...]}, or one object a line (application/x-ndjson), whose bad lines are named."""
    content = await read(request)
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind in ("application/x-ndjson", "application/jsonl"):
        return await asyncio.to_thread(_lines, content)
    return (await asyncio.to_thread(TaskList.model_validate_json, content)).tasks


def _lines(content: bytes) -> list[Task]:
    tasks: list[Task] = []
    problems: list[str] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            tasks.append(parse_task(line))
        except (TaskFileError, ValidationError) as failure:
            problems.append(f"line {number}: {failure}")
    if problems:
        more = f"; and {len(problems) - MAX_REPORTED} more" if len(problems) > MAX_REPORTED else ""
        raise TaskFileError("; ".join(problems[:MAX_REPORTED]) + more)
    if not tasks:
        raise TaskFileError("the body holds no tasks; send one JSON object a line")
    if len(tasks) > MAX_TASKS_PER_CALL:
        raise TaskFileError(f"{len(tasks)} tasks in one call, at most {MAX_TASKS_PER_CALL} are taken; send several")
    return tasks


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body has more than {limit} bytes; send less at once, or raise gateway.max_body_mb")
