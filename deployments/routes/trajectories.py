"""Recent trajectories to look at: a list to filter and search, one of them whole, and a run's course over time.

What a trainer trains on comes in batches; this is for people, and for as long as the cluster keeps it.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from deployments.token_text import CONTEXT, TokenText
from rollout import trajectory_view
from rollout.errors import NotFoundError, RolloutError
from rollout.viewing import History, TrajectoryPage, TrajectoryQuery, TrajectoryRows, Viewing

router = APIRouter(prefix="/v1", tags=["trajectories"])

MAX_ID_CHARS = 2_000
_Segment = Annotated[int, Query(ge=0, le=1_000_000)]
_Start = Annotated[int, Query(ge=0, le=2**31)]
_Limit = Annotated[int, Query(ge=0, le=trajectory_view.MAX_TOKENS)]


def _viewing(request: Request) -> Viewing:
    return cast(Viewing, request.app.state.backend)


@router.get("/runs/{run}/trajectories")
async def of_run(request: Request, run: str, query: Annotated[TrajectoryQuery, Query()]) -> TrajectoryPage:
    """Recent trajectories of a run, newest first unless told otherwise."""
    return await _viewing(request).trajectories(run, query)


@router.get("/runs/{run}/history")
async def history(request: Request, run: str) -> History:
    """Reward, staleness, sessions and tokens of a run over time."""
    return await _viewing(request).history(run)


@router.get("/trajectories")
async def of_all(request: Request, query: Annotated[TrajectoryQuery, Query()]) -> TrajectoryPage:
    """Recent trajectories of all runs."""
    return await _viewing(request).trajectories(None, query)


# Before the next one, whose path takes everything. No id is without a slash, so none is called so.
@router.get("/trajectories/by-id")
async def by_id(
    request: Request,
    id: Annotated[str, Query(min_length=1, max_length=MAX_ID_CHARS)],
    segment: _Segment = 0,
    start: _Start = 0,
    limit: _Limit = trajectory_view.MAX_TOKENS,
) -> Response:
    """As below. Ids may hold anything that a task's id may, such as `..`, which proxies and browsers take out of
    a path."""
    return await _one(request, id, segment, start, limit)


@router.get("/trajectories/{trajectory_id:path}")
async def one(
    request: Request,
    trajectory_id: str,
    segment: _Segment = 0,
    start: _Start = 0,
    limit: _Limit = trajectory_view.MAX_TOKENS,
) -> Response:
    """One trajectory: facts, conversation, and `limit` tokens of a segment from `start` on with their text.

    `tokens.mask` and `tokens.versions` are run lengths, `tokens.logprobs` are of the sampled tokens alone.
    `tokens.text` is null where the gateway cannot load the tokenizer; `tokens.problem` says why.
    """
    return await _one(request, trajectory_id, segment, start, limit)


async def _one(request: Request, trajectory_id: str, segment: int, start: int, limit: int) -> Response:
    rows = await _viewing(request).trajectory(trajectory_id)
    if segment >= rows.table.num_rows:
        raise NotFoundError(f"the trajectory has {rows.table.num_rows} segments, counted from 0", "segment")
    told = await asyncio.to_thread(_told, rows)
    told["tokens"] = await _tokens(request.app.state.token_text, rows, segment, start, limit)
    # A megabyte for a long one: written off the event loop, and kept by no cache on the way.
    content = await asyncio.to_thread(lambda: json.dumps(told, ensure_ascii=False).encode("utf-8", "replace"))
    return Response(content, media_type="application/json", headers={"cache-control": "no-store"})


def _told(rows: TrajectoryRows) -> dict[str, Any]:
    return {
        **trajectory_view.facts(rows.table),
        "summary": asdict(rows.summary),
        "siblings": [asdict(sibling) for sibling in rows.siblings],
    }


async def _tokens(
    token_text: TokenText | None, rows: TrajectoryRows, segment: int, start: int, limit: int
) -> dict[str, Any]:
    # A piece may depend on the tokens before it.
    before = min(start, CONTEXT)
    found, context = await asyncio.to_thread(
        lambda: (
            trajectory_view.tokens(rows.table, segment, start, limit),
            trajectory_view.tokens(rows.table, segment, start - before, before)["ids"],
        )
    )
    found["text"], found["problem"] = None, None
    if token_text is None:
        found["problem"] = "this gateway was not told of a tokenizer"
        return found
    try:
        found["text"] = await token_text.pieces(context, found["ids"])
    except RolloutError as failure:
        found["problem"] = str(failure)
    return found
