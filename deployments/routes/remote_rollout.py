"""The remote rollout protocol, as the rollout server: a foreign trainer orders rollouts, which are played here.

Invariant: this room holds nothing. An order is in the controller's journal before it is answered, so a gateway that
dies costs its caller a repeated request, which joins the same rollout at any gateway.

`app.state.backend` has the operations of rollout.remote.order.RemoteRollouts.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from deployments.routes import body
from rollout.errors import RolloutError, UnavailableError
from rollout.remote.order import RemoteRollouts, RolloutOrder
from rollout.remote.wire import InitRequest, InitResponse, RolloutRequest, RolloutResponse, ToolsResponse

router = APIRouter(tags=["remote rollouts"])

SERVICE = "rollout-server"
# One question to the controller waits so long; a controller that is started again is asked again.
POLL_S = 20.0
# A controller that is being started again is waited for; its callers see a longer rollout.
PATIENCE_S, PAUSE_S = 120.0, 1.0
# Below the front's own patience with a connection on which nothing comes.
MAX_HOLD_S = 3_500.0
# /health answers without the counts rather than late.
HEALTH_SECONDS = 2.0


def _schema(model: type[BaseModel]) -> dict[str, object]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def _backend(request: Request) -> RemoteRollouts:
    return request.app.state.backend


@router.post("/rollout", response_model=RolloutResponse, openapi_extra=_schema(RolloutRequest))
async def rollout(request: Request) -> JSONResponse:
    """Generation A: plays the rollout and answers when it has ended. The same body again joins it."""
    order = RolloutOrder.of(await body.parse(request, RolloutRequest))
    backend = _backend(request)
    ticket = await backend.remote_accept(order)
    response = await _ended(backend, ticket.rollout_id)
    return JSONResponse(await asyncio.to_thread(response.body, "A"))


@router.get("/tools")
async def tools(request: Request) -> ToolsResponse:
    """The tools that rollouts are played with, in OpenAI's form."""
    return ToolsResponse(tools=await _backend(request).remote_tools())


@router.post("/v1/rollout/init", status_code=202, openapi_extra=_schema(InitRequest))
async def init(request: Request) -> InitResponse:
    """Generation B: takes the rollout. Its trainer is called when it has ended. The same body again is the same."""
    order = RolloutOrder.of(await body.parse(request, InitRequest))
    backend = _backend(request)
    # First, because they may fail: an order that is taken is played.
    known = await backend.remote_tools()
    ticket = await backend.remote_accept(order)
    return InitResponse(rollout_id=ticket.rollout_id, tools=known)


@router.get("/platform/health")
async def platform_health(request: Request) -> dict[str, Any]:
    """As /health, for those who have a key."""
    return await health(_backend(request), getattr(request.app.state, "agent_loop", None))


async def health(backend: RemoteRollouts, agent_loop: str | None) -> dict[str, Any]:
    """What the protocol wants to hear of a living rollout server; null counts where the controller says nothing."""
    active: int | None = None
    completed: int | None = None
    try:
        async with asyncio.timeout(HEALTH_SECONDS):
            counts = await backend.remote_counts()
        active, completed = counts.queued + counts.running, counts.completed
    except (TimeoutError, RolloutError):
        pass
    return {
        "status": "healthy",
        "service": SERVICE,
        "agent_loop": agent_loop,
        "active_rollouts": active,
        "completed_rollouts": completed,
    }


async def _ended(backend: RemoteRollouts, rollout_id: str) -> RolloutResponse:
    """The rollout's answer. Waits over a restart of the controller. Raises UnavailableError, NotFoundError."""
    loop = asyncio.get_running_loop()
    until = loop.time() + MAX_HOLD_S
    patience = loop.time() + PATIENCE_S
    while loop.time() < until:
        try:
            response = await backend.remote_result(rollout_id, POLL_S)
        except UnavailableError:
            if loop.time() >= patience:
                raise
            await asyncio.sleep(PAUSE_S)
            continue
        if response is not None:
            return response
        patience = loop.time() + PATIENCE_S
    raise UnavailableError(
        f"rollout {rollout_id!r} is still going on after {MAX_HOLD_S:g} s; send the same request again to wait for it"
    )
