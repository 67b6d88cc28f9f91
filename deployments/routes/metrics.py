"""The cluster's metrics, for Prometheus to scrape.

Invariant: whichever gateway is asked, the answer is the controller's registry. So one address is scraped once: two
gateways of one cluster as two targets would count everything twice. Engines and Ray have targets of their own.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from actors.metrics import CONTENT_TYPE

router = APIRouter(tags=["metrics"])

_ANSWERS: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus's text format"}
}


@router.get("/metrics", response_class=Response, responses=_ANSWERS)
async def metrics(request: Request) -> Response:
    """All `rollout_*` metrics, listed in docs/metrics.md. Any key may read them; 503 while the controller is away."""
    text: bytes = await request.app.state.backend.metrics_text()
    return Response(text, media_type=CONTENT_TYPE, headers={"cache-control": "no-store"})
