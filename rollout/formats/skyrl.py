"""SkyRL's GeneratorOutput: unpadded lists.

One row a trajectory where it has one segment. A trajectory with forks needs `step_wise=True`: one row a segment, rows
of a trajectory together, the reward on the last token of the last. A failed trajectory is what SkyRL makes of one
itself: prompt and response [0], mask [0], reward 0, stop reason "error", for the whole of its group.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from rollout.formats.rows import FormatError, Row, Unscored, by_group, rows_of
from rollout.record import check

# What SkyRL calls the ways to end; everything that was cut is "length" there.
STOP_REASONS = {"length": "length", "max_tokens": "length", "max_turns": "length", "deadline": "length"}
FAILED = frozenset({"error", "cancelled"})


def to_skyrl(table: pa.Table, *, step_wise: bool = False, unscored: Unscored = "error") -> dict[str, Any]:
    """Rows of the record as a GeneratorOutput. Raises FormatError for forks without `step_wise`."""
    check(table)
    failed_groups = {
        group
        for group, reason in zip(table["group_id"].to_pylist(), table["stop_reason"].to_pylist(), strict=True)
        if reason in FAILED
    }
    good = table.filter(pa.array([g not in failed_groups for g in table["group_id"].to_pylist()], pa.bool_()))
    rows = {group[0][0].group_id: group for group in by_group(rows_of(good, unscored))}
    output: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    members: dict[str, dict[str, None]] = {}
    for group, trajectory in zip(table["group_id"].to_pylist(), table["trajectory_id"].to_pylist(), strict=True):
        members.setdefault(group, {})[trajectory] = None
    for group_id, ids in members.items():
        if group_id in failed_groups:
            for trajectory_id in ids:
                _add(output, trajectory_id, [0], [0], [0], [0.0], [0.0] if step_wise else 0.0, "error", True)
        for segments in rows.get(group_id, []):
            _add_trajectory(output, segments, step_wise)
    result: dict[str, Any] = {name: values for name, values in output.items() if name != "is_last_step" or step_wise}
    result["rollout_metrics"] = {"failed_groups": len(failed_groups)}
    return result


_COLUMNS = (
    "prompt_token_ids",
    "response_ids",
    "loss_masks",
    "rollout_logprobs",
    "rewards",
    "stop_reasons",
    "trajectory_ids",
    "is_last_step",
)


def _add_trajectory(output: dict[str, list[Any]], segments: list[Row], step_wise: bool) -> None:
    if len(segments) > 1 and not step_wise:
        raise FormatError(
            f"trajectory {segments[0].trajectory_id!r} has {len(segments)} segments; pass step_wise=True"
        )
    for row in segments:
        reward: Any = row.score
        if step_wise:
            reward = [0.0] * len(row.response_ids)
            if row.is_last and reward:
                reward[-1] = row.score
        _add(
            output,
            row.trajectory_id,
            row.prompt_ids,
            row.response_ids,
            row.response_mask,
            row.logprobs,
            reward,
            STOP_REASONS.get(row.stop_reason, "stop"),
            row.is_last,
        )


def _add(output: dict[str, list[Any]], trajectory: str, *values: Any) -> None:
    prompt, response, mask, logprobs, reward, stop, last = values
    row = (prompt, response, mask, logprobs, reward, stop, trajectory, last)
    for name, value in zip(_COLUMNS, row, strict=True):
        output[name].append(value)
