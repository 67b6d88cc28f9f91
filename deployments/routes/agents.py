"""Agents: listed, added, removed, and spoken to over OpenAI's protocol, streaming and not.

Invariant: every answer here has OpenAI's form, errors too; a stream always ends with `[DONE]`, and an error inside
it is an event before that. A client that hangs up ends its request: the model's call and the tools are cancelled.

The caller's scope names are in `request.state.scopes` and its name in `request.state.caller`, put there by whoever
authenticates; without them, `all` and nobody. `app.state.agents` is a ServedAgents.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from deployments.agents import ServedAgents
from deployments.routes import body, openai_schemas
from deployments.routes.errors import RETRY_AFTER_S, named_problems
from deployments.routes.event_stream import DONE, EventStream
from rollout.agents import Agent, AgentRun, AgentTimeout, ChatEngineError, Folded, NamedAgent
from rollout.agents.chat_engine import Chunk
from rollout.agents.scopes import granted
from rollout.errors import ApiError, BusyError, RefusedError, RolloutError, ToolError

router = APIRouter(prefix="/agents", tags=["agents"])

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How soon it is noticed that a client has hung up.
GONE_POLL_S = 0.5
# The status, in the log alone, of a request whose client has hung up.
CLIENT_GONE = 499
# Statuses whose clients are told when.
_COME_AGAIN = (429, 503)


class _Gone(Exception):
    """The client has hung up: nobody reads the answer."""


class _NoEngine:
    """Of a gateway that was told of no model."""

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[Chunk]:
        """See ChatEngine."""
        raise ChatEngineError(503, "this gateway has no engine behind it that agents could ask")
        yield {}


@router.get("", responses=openai_schemas.LIST_AGENTS)
async def list_agents(request: Request) -> Response:
    """Name, description, tools and limits of every agent, as the caller may use them."""
    try:
        return JSONResponse({"agents": await _agents(request).describe(_scopes(request), _caller(request))})
    except RolloutError as failure:
        return _error(failure)


@router.post("", status_code=201, openapi_extra=openai_schemas.NEW_AGENT, responses=openai_schemas.ADD_AGENT)
async def add_agent(request: Request) -> Response:
    """Serve an environment of the gateways' import path, at every gateway. The same again changes nothing."""
    try:
        wanted = await _new_agent(request)
        return JSONResponse(await _agents(request).add(wanted), 201)
    except RolloutError as failure:
        return _error(failure)


@router.delete("/{name}", status_code=204, responses=openai_schemas.REMOVE_AGENT)
async def remove_agent(request: Request, name: str) -> Response:
    """Serve an added agent no more. Its requests in flight go on."""
    try:
        await _agents(request).remove(name)
        return Response(status_code=204)
    except RolloutError as failure:
        return _error(failure)


@router.get("/{name}/v1/models", responses=openai_schemas.MODELS)
async def list_models(request: Request, name: str) -> Response:
    """The one model of this address: the agent."""
    agents = _agents(request)
    try:
        agent = await agents.get(name)
    except RolloutError as failure:
        return _error(failure)
    created = agents.registry.created(name)
    model = {"id": agent.name, "object": "model", "created": created, "owned_by": "rollout-cluster"}
    return JSONResponse({"object": "list", "data": [model]})


@router.post("/{name}/v1/chat/completions", openapi_extra=openai_schemas.ASK, responses=openai_schemas.CHAT)
async def chat(request: Request, name: str) -> Response:
    """OpenAI's chat completion, played by the agent."""
    try:
        agent = await _agents(request).get(name)
        wanted = _json(await body.read(request))
    except RolloutError as failure:
        return _error(failure)
    run = _run(request, agent, wanted)
    try:
        if isinstance(wanted, dict) and wanted.get("stream") is True:
            events = _events(run.chunks(), _with_usage(wanted))
            # To its first chunk. What fails before that still gets its own HTTP status; and it is begun then, so that
            # closing it runs its end.
            await _while_there(request, anext(events))
            return EventStream(events)
        return JSONResponse(await _while_there(request, _whole(run.chunks())))
    except _Gone:
        return Response(status_code=CLIENT_GONE)
    except Exception as failure:
        return _error(failure)


async def _new_agent(request: Request) -> NamedAgent:
    try:
        return await body.parse(request, NamedAgent)
    except ValidationError as failure:
        text, field = named_problems(failure.errors(include_url=False, include_context=False, include_input=False))
        raise RefusedError(text, field) from None


def _run(request: Request, agent: Agent, wanted: Any) -> AgentRun:
    registry = _agents(request).registry
    engine = request.app.state.chat_engine or _NoEngine()
    scopes = granted(_scopes(request), _caller(request), agent.owners)
    return AgentRun(agent, wanted, engine=engine, held=registry.held, scopes=scopes, mcp=registry.mcp)


def _agents(request: Request) -> ServedAgents:
    return request.app.state.agents


def _scopes(request: Request) -> frozenset[str]:
    return frozenset(getattr(request.state, "scopes", ("all",)))


def _caller(request: Request) -> str:
    return getattr(request.state, "caller", "")


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as failure:
        raise ApiError(f"the body is not JSON: {failure}") from None


def _with_usage(wanted: dict[str, Any]) -> bool:
    options = wanted.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


async def _whole(chunks: AsyncGenerator[Chunk, None]) -> dict[str, Any]:
    """The chat.completion of a stream."""
    folded = Folded()
    async with aclosing(chunks):
        async for chunk in chunks:
            folded.add(chunk)
    return folded.completion


async def _events(chunks: AsyncGenerator[Chunk, None], with_usage: bool) -> AsyncGenerator[str, None]:
    """A stream's events. First an empty one, when the first chunk is there; what fails before it is raised."""
    async with aclosing(chunks):
        chunk = await anext(chunks, None)
        yield ""
        try:
            while chunk is not None:
                if chunk["choices"] or with_usage:
                    yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
                chunk = await anext(chunks, None)
        except Exception as failure:
            yield f"data: {json.dumps(_told(failure)[1], ensure_ascii=False)}\n\n"
        yield DONE


async def _while_there(request: Request, work: Awaitable[T]) -> T:
    """The result of work that is for this client alone. Raises _Gone, and ends the work, where it hangs up."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    both: list[asyncio.Future[Any]] = [working, watching]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return working.result()
    finally:
        for task in both:
            task.cancel()
        # Shielded: a server that shuts down waits until the agent's request has cleaned up.
        await asyncio.shield(asyncio.gather(*both, return_exceptions=True))


async def _gone(request: Request) -> None:
    # Starlette has no event for it: a disconnect is a message that somebody must receive.
    while not await request.is_disconnected():
        await asyncio.sleep(GONE_POLL_S)


def _error(failure: Exception) -> JSONResponse:
    status, told = _told(failure)
    headers = {}
    if status in _COME_AGAIN:
        known = failure.retry_after if isinstance(failure, BusyError | ChatEngineError) else None
        headers["retry-after"] = f"{RETRY_AFTER_S if known is None else known:g}"
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
