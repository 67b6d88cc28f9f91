"""Weights: bring new ones, and see which are served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from deployments.routes import body
from rollout.backend import Backend
from rollout.weights import WeightReport, WeightSource

router = APIRouter(prefix="/v1/weights", tags=["weights"])


class WeightUpdate(BaseModel):
    """New weights."""

    model_config = ConfigDict(extra="forbid")

    source: WeightSource
    version: int | None = Field(default=None, ge=1)
    """None: the next number. Given, the call may be repeated."""


def _backend(request: Request) -> Backend:
    return request.app.state.backend


@router.post(
    "",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": WeightUpdate.model_json_schema()}},
        }
    },
)
async def update_weights(request: Request) -> WeightReport:
    """Freeze, load, verify on every rank of every replica, go on. 422: refused, the old weights are still served."""
    wanted = await body.parse(request, WeightUpdate)
    return await _backend(request).update_weights(wanted.source, wanted.version)


@router.get("")
async def weights(request: Request) -> dict[str, Any]:
    """Version, source and replicas."""
    return await _backend(request).weights()
