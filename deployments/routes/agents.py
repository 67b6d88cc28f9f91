"""Agents: listed, and spoken to over OpenAI's protocol, streaming and not.

Invariant: every answer here has OpenAI's form, errors too; a stream always ends with `[DONE]`, and an error inside
it is an event before that. A client that hangs up ends its request: the model's call and the tools are cancelled.

The caller's scope names are in `request.state.scopes`, put there by whoever authenticates; without it, `all`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.routes import body
from rollout.agents import Agent, AgentRegistry, AgentRun, AgentTimeout, ChatEngineError, Folded
from rollout.agents.chat_engine import Chunk
from rollout.errors import ApiError, BusyError, RolloutError, ToolError

router = APIRouter(prefix="/agents", tags=["agents"])

logger = logging.getLogger(__name__)

# A stream without news says so, so that proxies keep it open while tools run.
KEEP_ALIVE_S = 10.0
# How soon it is noticed that a client has hung up.
GONE_POLL_S = 0.5
# The status, in the log alone, of a request whose client has hung up.
CLIENT_GONE = 499
# Stands for a chunk where there is none yet.
SILENCE: Chunk = {}
_CHAT: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}


class _Gone(Exception):
    """The client has hung up: nobody reads the answer."""


@router.get("")
async def list_agents(request: Request) -> Response:
    """Name, description, tools and limits of every agent, as the caller may use them."""
    try:
        return JSONResponse({"agents": await _registry(request).describe(_scopes(request))})
    except RolloutError as failure:
        return _error(failure)


@router.get("/{name}/v1/models")
async def list_models(request: Request, name: str) -> Response:
    """The one model of this address: the agent."""
    registry = _registry(request)
    try:
        agent = await registry.get(name)
    except RolloutError as failure:
        return _error(failure)
    model = {"id": agent.name, "object": "model", "created": registry.created(name), "owned_by": "rollout-cluster"}
    return JSONResponse({"object": "list", "data": [model]})


@router.post("/{name}/v1/chat/completions", openapi_extra=_CHAT)
async def chat(request: Request, name: str) -> Response:
    """OpenAI's chat completion, played by the agent."""
    try:
        agent = await _registry(request).get(name)
        wanted = _json(await body.read(request))
    except RolloutError as failure:
        return _error(failure)
    chunks = _Watched(request, _run(request, agent, wanted).chunks())
    try:
        if isinstance(wanted, dict) and wanted.get("stream") is True:
            # What fails before the first chunk still gets its own HTTP status.
            first = await chunks.next()
            options = wanted.get("stream_options") or {}
            return _EventStream(chunks, first, with_usage=bool(options.get("include_usage")))
        folded = Folded()
        while (chunk := await chunks.next()) is not None:
            folded.add(chunk)
        return JSONResponse(folded.completion)
    except _Gone:
        return Response(status_code=CLIENT_GONE)
    except Exception as failure:
        return _error(failure)


def _run(request: Request, agent: Agent, wanted: Any) -> AgentRun:
    registry = _registry(request)
    engine = request.app.state.chat_engine
    return AgentRun(agent, wanted, engine=engine, held=registry.held, scopes=_scopes(request), mcp=registry.mcp)


def _registry(request: Request) -> AgentRegistry:
    return request.app.state.agents


def _scopes(request: Request) -> frozenset[str]:
    return frozenset(getattr(request.state, "scopes", ("all",)))


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as failure:
        raise ApiError(f"the body is not JSON: {failure}") from None


class _Watched:
    """An agent's chunks, for as long as the client listens."""

    def __init__(self, request: Request, chunks: AsyncGenerator[Chunk, None]) -> None:
        self._request = request
        self._chunks = chunks
        self._next: asyncio.Task[Chunk | None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def next(self) -> Chunk | None:
        """The next chunk; None at the end. Raises _Gone, and what the agent raises; all is closed then."""
        while (chunk := await self.next_or_silence(None)) is SILENCE:
            pass
        return chunk

    async def next_or_silence(self, seconds: float | None) -> Chunk | None:
        """As `next`, but SILENCE where there is no chunk within so many seconds."""
        if self._watcher is None:
            self._watcher = asyncio.ensure_future(_gone(self._request))
        if self._next is None:
            self._next = asyncio.ensure_future(_next(self._chunks))
        both = {self._next, self._watcher}
        try:
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if self._next.done():
                task, self._next = self._next, None
                chunk = task.result()
                if chunk is None:
                    await self.close()
                return chunk
            if self._watcher.done():
                raise _Gone
            return SILENCE
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the agent's request, whatever it is doing, and wait until it has cleaned up."""
        tasks = [task for task in (self._watcher, self._next) if task is not None]
        self._next = None
        for task in tasks:
            task.cancel()
        # Their ends are of no interest any more; gathered, none is reported as never looked at.
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._chunks.aclose()


async def _next(chunks: AsyncGenerator[Chunk, None]) -> Chunk | None:
    return await anext(chunks, None)


async def _gone(request: Request) -> None:
    # Starlette has no event for it: a disconnect is a message that somebody must receive.
    while not await request.is_disconnected():
        await asyncio.sleep(GONE_POLL_S)


class _EventStream(StreamingResponse):
    """Server-sent events of one request; however sending ends, the request is ended too."""

    def __init__(self, chunks: _Watched, first: Chunk | None, *, with_usage: bool) -> None:
        super().__init__(_events(chunks, first, with_usage), media_type="text/event-stream")
        self._agent_chunks = chunks

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Cancelled while it sends, the server leaves the generator suspended: only the collector would find it.
            await asyncio.shield(asyncio.ensure_future(self._agent_chunks.close()))


async def _events(chunks: _Watched, chunk: Chunk | None, with_usage: bool) -> AsyncIterator[str]:
    try:
        while chunk is not None:
            if chunk is SILENCE:
                yield ": keep-alive\n\n"
            elif chunk["choices"] or with_usage:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            chunk = await chunks.next_or_silence(KEEP_ALIVE_S)
    except _Gone:
        return
    except Exception as failure:
        yield f"data: {json.dumps(_told(failure)[1], ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"


def _error(failure: Exception) -> JSONResponse:
    status, told = _told(failure)
    headers = {}
    if isinstance(failure, BusyError):
        headers["retry-after"] = f"{failure.retry_after:g}"
    if isinstance(failure, AgentTimeout):
        # OpenAI's client repeats a 504 by itself; the agent's tools would run again, as long as before.
        headers["x-should-retry"] = "false"
    return JSONResponse(told, status, headers)


def _told(failure: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and OpenAI's error object."""
    kind, message, field = getattr(failure, "category", "internal"), str(failure), None
    if isinstance(failure, ApiError):
        status, field = failure.status, failure.field
    elif isinstance(failure, ChatEngineError):
        status = failure.told_status
    elif isinstance(failure, ToolError):
        # A tool that fails is told to the model; this is an MCP server that could not be asked for its tools.
        status = 503
    elif isinstance(failure, RolloutError):
        status = 500
    else:
        status = 500
        message = f"{type(failure).__name__}: {message[:300]}; this is a bug, the gateway's log has the stack"
    if status >= 500:
        logger.error("a request to an agent failed: %s", message, exc_info=failure)
    type_ = "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": type_, "param": field, "code": kind}}
