"""Captured sessions: an address for one black-box agent, whose calls become a trajectory."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from deployments.routes import body
from rollout.api import CapturedSession, OpenedSession
from rollout.backend import Backend
from rollout.capture.session_book import CaptureLimits
from rollout.tasks import Task

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])


class SessionRequest(BaseModel):
    """A session of a run whose environment is `captured`."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(min_length=1)
    task: Task | None = None
    """None: a task of its own."""
    limits: CaptureLimits | None = None


class RewardRequest(BaseModel):
    """What a session was worth."""

    model_config = ConfigDict(extra="forbid")

    reward: float | None = None
    turn_rewards: dict[str, float] | None = Field(default=None, max_length=100_000)
    """By call id, as the session lists them."""


class CloseRequest(BaseModel):
    """How a session ends."""

    model_config = ConfigDict(extra="forbid")

    cancel: bool = False
    """It is not scored: the agent failed for reasons that are not the model's."""
    reward: float | None = None
    """As a call of `reward` before."""


def _schema(model: type[BaseModel], required: bool = True) -> dict[str, object]:
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": required, "content": content}}


def _backend(request: Request) -> Backend:
    return request.app.state.backend


@router.post("", openapi_extra=_schema(SessionRequest))
async def open_session(request: Request) -> OpenedSession:
    """Take the next sample of a task. `base_url` is for OpenAI's clients; Anthropic's take it without /v1."""
    wanted = await body.parse(request, SessionRequest)
    opened = await _backend(request).open_session(wanted.run, wanted.task, wanted.limits)
    return opened.at(_address(request))


@router.get("/{session}")
async def session_info(request: Request, session: str) -> CapturedSession:
    """A session at this moment."""
    return await _backend(request).session_info(session)


@router.post("/{session}/reward", openapi_extra=_schema(RewardRequest))
async def reward(request: Request, session: str) -> CapturedSession:
    """Score it. The same again changes nothing; another reward is a 409."""
    wanted = await body.parse(request, RewardRequest)
    return await _backend(request).reward_session(session, wanted.reward, wanted.turn_rewards)


@router.post("/{session}/close", openapi_extra=_schema(CloseRequest, required=False))
async def close(request: Request, session: str) -> CapturedSession:
    """Turn its calls into a trajectory. May be repeated."""
    wanted = await body.parse(request, CloseRequest)
    if wanted.reward is not None:
        await _backend(request).reward_session(session, wanted.reward, None)
    return await _backend(request).close_session(session, wanted.cancel)


def _address(request: Request) -> str:
    """The address by which the client reached us."""
    return f"{request.url.scheme}://{request.headers.get('host', request.url.netloc)}"
