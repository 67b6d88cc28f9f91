"""Trajectories as the bytes that travel and are kept: an Arrow IPC stream of the record, and a summary for each.

Invariant: one trajectory that cannot be written becomes an `error` row; the others are untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pyarrow as pa

from actors.messages import Summary
from rollout.errors import describe
from rollout.record import to_table
from rollout.trajectory import Trajectory

logger = logging.getLogger(__name__)


def to_rows(trajectories: Sequence[Trajectory]) -> tuple[bytes, list[Summary]]:
    """The rows of trajectories, and for each its summary. Never raises for what a trajectory holds."""
    kept = list(trajectories)
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
    # Versions only rise within a segment, so its first sampled token is its oldest.
    versions = [s.policy_versions[s.response_mask.index(1)] for s in trajectory.segments if 1 in s.response_mask]
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
        oldest_version=min(versions, default=None),
        first_row=first_row,
        num_rows=num_rows,
    )
