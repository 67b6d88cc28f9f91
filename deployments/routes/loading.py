"""The progress of loading as server-sent events: what every rank has now, then what follows, then `[DONE]`.

Invariant: a stream ends with `[DONE]` after a final event (`ready` or `error`), never before, however slow its reader
is: what comes next is asked for by id when the reader has taken what came before.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from rollout.errors import UnavailableError
from rollout.loading import ERROR, LoadingEvent, Snapshot

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/loading", tags=["loading"])

# An event stream without news says so, so that proxies keep it open.
KEEP_ALIVE_S = 10.0
# A board that does not answer is being started again; after so many tries in a row the stream ends with an error.
MAX_FAILURES = 30
FAILURE_PAUSE_S = 1.0
DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "Events until everything is ready, or one replica has failed",
    },
    503: {"description": "Nothing is loading and nothing is ready"},
}


class Loading(Protocol):
    """What `app.state.loading` must be."""

    async def snapshot(self) -> Snapshot:
        """Everything that is known now."""
        ...

    async def wait(self, after: int, timeout: float) -> Sequence[LoadingEvent]:
        """What is newer than an id, in the order of ids; empty after `timeout` seconds without news."""
        ...


@router.get("/progress", response_class=StreamingResponse, responses=_ANSWERS)
async def progress(request: Request) -> StreamingResponse:
    """Server-sent events: how far every rank of every replica is, then `ready` (or `error`), then `[DONE]`.

    With `Last-Event-ID`, only what is newer. 503 where nothing is loading and nothing is ready.
    """
    loading: Loading | None = getattr(request.app.state, "loading", None)
    if loading is None:
        raise UnavailableError("this gateway has no loading board, so nothing is known of loading")
    snapshot = await loading.snapshot()
    if snapshot.phase == "nothing":
        raise UnavailableError(
            "nothing is loading and nothing is ready: none of the engine replicas has started yet "
            f"({snapshot.expected} expected)"
        )
    stream = _events(request, loading, snapshot, _last_event_id(request))
    return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def _events(request: Request, loading: Loading, first: Snapshot, after: int) -> AsyncIterator[str]:
    newest = first.events[-1].id if first.events else 0
    # An id that this board never gave is of another cluster: everything is new then.
    after = after if after <= newest else 0
    events: Sequence[LoadingEvent] = [event for event in first.events if event.id > after]
    if not events and first.phase in ("ready", "failed"):
        # It has heard the end already, and came back for the mark.
        yield DONE
        return
    failures = 0
    while not await request.is_disconnected():
        for event in events:
            yield f"id: {event.id}\ndata: {json.dumps(dict(event.data))}\n\n"
            after = event.id
            if event.final:
                yield DONE
                return
        if not events:
            yield KEEP_ALIVE
        try:
            events, failures = await loading.wait(after, KEEP_ALIVE_S), 0
        except Exception as failure:
            events, failures = [], failures + 1
            if failures >= MAX_FAILURES:
                logger.warning("a progress stream ends, the board does not answer: %s", failure)
                message = f"the progress cannot be followed any more: {failure}; ask again"
                yield f"data: {json.dumps({'stage': ERROR, 'replica': None, 'message': message})}\n\n{DONE}"
                return
            await asyncio.sleep(FAILURE_PAUSE_S)


def _last_event_id(request: Request) -> int:
    """The id that a returning client saw last; 0 for a new one, and for what is no id of ours."""
    text = request.headers.get("last-event-id", "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
