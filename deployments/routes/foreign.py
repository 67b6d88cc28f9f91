"""What remote rollout servers call while they play a run's sessions: model calls, and the report of the end.

Invariant: a call gets in with the key of its own rollout and no other, whatever else this cluster's keys are; the key
is looked at before the body is.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from actors.foreign_calls import ForeignCalls
from deployments.routes import body
from rollout.errors import AccessError, UnavailableError
from rollout.remote.wire import CompletionRequest, RolloutResponse
from rollout.session_keys import session_of

router = APIRouter(prefix="/remote/{worker}", tags=["remote rollouts"])


class WrongKey(AccessError):
    """Not the key of this rollout."""

    status = 401


def _schema(model: type[BaseModel]) -> dict[str, object]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


@router.post("/v1/chat/completions", openapi_extra=_schema(CompletionRequest))
async def chat_completions(request: Request, worker: str) -> JSONResponse:
    """The next assistant turn of a rollout (generations A1 and B)."""
    return await _complete(request, worker)


@router.post("/v1/completions", openapi_extra=_schema(CompletionRequest))
async def completions(request: Request, worker: str) -> JSONResponse:
    """The same at the path of generation A."""
    return await _complete(request, worker)


@router.post("/v1/rollout/completed", openapi_extra=_schema(RolloutResponse))
async def completed(request: Request, worker: str) -> dict[str, str]:
    """A rollout has ended (generation B). The first report counts; repeats change nothing."""
    rollout_id = _rollout_of(request)
    report = await body.parse(request, RolloutResponse)
    _check_same(rollout_id, report.rollout_id)
    await _calls(request).completed(worker, rollout_id, report)
    return {"rollout_id": rollout_id, "status": "ok"}


async def _complete(request: Request, worker: str) -> JSONResponse:
    rollout_id = _rollout_of(request)
    asked = await body.parse(request, CompletionRequest)
    _check_same(rollout_id, asked.rollout_id)
    answer = await _calls(request).complete(worker, rollout_id, asked)
    data: dict[str, Any] = answer.body()
    return JSONResponse(data)


def _calls(request: Request) -> ForeignCalls:
    calls: ForeignCalls | None = request.app.state.foreign
    if calls is None:
        raise UnavailableError("this gateway serves no remote rollouts")
    return calls


def _rollout_of(request: Request) -> str:
    """Whose key this is. Raises WrongKey."""
    given = request.headers.get("authorization", "").strip()
    scheme, _, key = given.partition(" ")
    rollout_id = session_of(request.app.state.foreign_secret, key.strip() if scheme.lower() == "bearer" else given)
    if rollout_id is None:
        raise WrongKey("send the key that the rollout was begun with, as `Authorization: Bearer KEY`")
    return rollout_id


def _check_same(of_key: str, of_body: str) -> None:
    if of_key != of_body:
        raise WrongKey("the key is of another rollout", "rollout_id")
