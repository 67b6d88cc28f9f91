"""Plain inference: a prompt in, the events of its completion out, token by token as the engine samples them.

Invariant: a request that can be understood is answered with a stream that ends with `[DONE]`, after one `end` or one
`error`; one that cannot be, with all that is wrong with it. A client that hangs up ends its completion in the engine.

The name of an event is the field `event` of its data. `app.state.completions` is the engine, a CompletionEngine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from deployments.routes import body
from deployments.routes.event_stream import DONE, EventStream
from rollout.errors import UnavailableError
from rollout.inference import DEADLINE_SECONDS, CompletionEngine, InferenceRequest, infer, problems

router = APIRouter(prefix="/v1/inference", tags=["inference"])

_TAKES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": InferenceRequest.model_json_schema()}},
    }
}
_PROBLEMS: dict[str, Any] = {
    "type": "object",
    "required": ["errors"],
    "properties": {
        "errors": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["field", "constraint", "message"],
                "properties": {
                    "field": {"type": "string"},
                    "constraint": {"type": "string"},
                    "message": {"type": "string"},
                    "value": {},
                },
            },
        }
    },
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "`started`, `token` for every token, `end` or `error`, then `[DONE]`",
    },
    400: {
        "description": "All that is wrong with the body",
        "content": {"application/json": {"schema": _PROBLEMS}},
    },
    503: {"description": "This gateway has no engine behind it"},
}


@router.post("", response_class=StreamingResponse, openapi_extra=_TAKES, responses=_ANSWERS)
async def inference(request: Request) -> Response:
    """One completion as server-sent events."""
    content = await body.read(request)
    try:
        wanted = await asyncio.to_thread(InferenceRequest.model_validate_json, content)
    except ValidationError as failure:
        return JSONResponse({"errors": problems(failure)}, 400)
    engine: CompletionEngine | None = getattr(request.app.state, "completions", None)
    if engine is None:
        raise UnavailableError("this gateway has no engine behind it that answers prompts")
    return EventStream(_events(engine, wanted, getattr(request.state, "correlation_id", None)))


async def _events(
    engine: CompletionEngine, wanted: InferenceRequest, correlation_id: str | None
) -> AsyncGenerator[str, None]:
    answer = infer(engine, wanted, correlation_id=correlation_id, seconds=DEADLINE_SECONDS)
    async with aclosing(answer) as events:
        async for event in events:
            yield f"data: {json.dumps(event)}\n\n"
    yield DONE
