"""Trajectories as the bytes that travel and are kept: an Arrow IPC stream of the record, and a summary for each.

Invariant: one trajectory that cannot be written becomes an `error` row; the others are untouched.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from actors.messages import Figures, Summary
from rollout.errors import describe
from rollout.ledger import Segment
from rollout.reasoning import ReasoningMarkers, mark_reasoning
from rollout.record import to_table
from rollout.tool_calls import ToolCallRecord
from rollout.trajectory import Trajectory

logger = logging.getLogger(__name__)


def to_rows(
    trajectories: Sequence[Trajectory], markers: ReasoningMarkers | None = None
) -> tuple[bytes, list[Summary]]:
    """The rows of trajectories, and for each its summary. Never raises for what a trajectory holds.

    `markers`: of the model's reasoning; None: not known, and so are the spans.
    """
    kept = list(trajectories)
    for trajectory in kept:
        mark_reasoning(trajectory.segments, markers)
    try:
        table = to_table(kept)
    except Exception:
        kept = [_writable(trajectory) for trajectory in kept]
        table = to_table(kept)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    summaries = []
    row = 0
    for trajectory in kept:
        num_rows = max(1, len(trajectory.segments))
        summaries.append(_summarize(trajectory, row, num_rows))
        row += num_rows
    return sink.getvalue().to_pybytes(), summaries


def _writable(trajectory: Trajectory) -> Trajectory:
    try:
        to_table([trajectory])
    except Exception as failure:
        logger.exception("trajectory %s cannot be written", trajectory.key.trajectory_id)
        return Trajectory(trajectory.key, [], "error", [], error=describe(failure), attempts=trajectory.attempts)
    return trajectory


def _summarize(trajectory: Trajectory, first_row: int, num_rows: int) -> Summary:
    version_tokens = _version_tokens(trajectory.segments)
    return Summary(
        run=trajectory.key.run,
        group_id=trajectory.key.group_id,
        sample_index=trajectory.key.sample_index,
        attempt=trajectory.attempts,
        retryable=trajectory.retryable,
        stop_reason=trajectory.stop_reason,
        reward=trajectory.reward,
        num_sampled=trajectory.num_sampled,
        num_turns=sum(turn.role == "assistant" for segment in trajectory.segments for turn in segment.turns),
        num_segments=len(trajectory.segments),
        tool_calls=len(trajectory.tool_calls),
        tool_errors=sum(not call.ok for call in trajectory.tool_calls),
        # Of all sampled tokens: in a captured session an old call may continue a newer one.
        oldest_version=version_tokens[0][0] if version_tokens else None,
        first_row=first_row,
        num_rows=num_rows,
        version_tokens=version_tokens,
        figures=_figures(trajectory),
    )


def _version_tokens(segments: Sequence[Segment]) -> list[list[int]]:
    counts: Counter[int] = Counter()
    for segment in segments:
        counts.update(segment.policy_versions)
    # -1 is what was not sampled.
    return sorted([version, count] for version, count in counts.items() if version >= 0)


def _figures(trajectory: Trajectory) -> Figures:
    timing = trajectory.timing
    return Figures(
        queue_s=timing.queue_s,
        engine_s=timing.engine_s,
        tool_s=timing.tool_s,
        env_s=timing.env_s,
        total_s=timing.total_s,
        num_context=sum(len(s.prompt_ids) + len(s.response_mask) - s.num_sampled for s in trajectory.segments),
        tools=[(call.name, _outcome(call), call.seconds) for call in trajectory.tool_calls],
        forks=[segment.fork_reason for segment in trajectory.segments if segment.fork_reason is not None],
        error=None if trajectory.error is None else trajectory.error.partition(":")[0],
    )


def _outcome(call: ToolCallRecord) -> str:
    # A failed call's error is "outcome: message"; see rollout.tool_calls.
    return "ok" if call.ok else (call.error or "exception").partition(":")[0]
