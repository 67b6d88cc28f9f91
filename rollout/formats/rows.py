"""What all formats share: the rows of a table, those that can be trained on, and errors that say which cannot.

Invariant: a missing reward is never a 0 here. It is an error that names the trajectory, unless the caller says
`drop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from rollout.errors import RolloutError
from rollout.record import check

Unscored = Literal["error", "drop"]
"""What becomes of rows without reward: `error` raises FormatError, `drop` leaves them out."""


class FormatError(RolloutError):
    """Rows that a trainer's format cannot hold. The message names the trajectory and the way out."""

    category = "format"


@dataclass(slots=True)
class Row:
    """One segment. Lists over the response have one length."""

    group_id: str
    trajectory_id: str
    task_id: str
    sample_index: int
    segment_index: int
    num_segments: int
    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    logprobs: list[float]
    policy_versions: list[int]
    reward: float | None
    stop_reason: str
    num_turns: int
    """Turns of the policy in this segment."""
    metadata: str

    @property
    def score(self) -> float:
        """The reward of a row that has one."""
        assert self.reward is not None, "rows_of lets no other row through"
        return self.reward

    @property
    def versions(self) -> list[int]:
        """Of the sampled tokens."""
        return [version for version in self.policy_versions if version >= 0]

    @property
    def is_last(self) -> bool:
        """Whether this is its trajectory's last segment."""
        return self.segment_index == self.num_segments - 1


def rows_of(table: pa.Table, unscored: Unscored = "error") -> list[Row]:
    """The rows of a table of the record, in its order. Raises RecordError, FormatError."""
    check(table)
    rows = []
    for record in table.to_pylist():
        if record["reward"] is None:
            if unscored == "drop":
                continue
            raise FormatError(
                f"trajectory {record['trajectory_id']!r} has no reward ({record['stop_reason']}"
                f"{': ' + record['error'] if record['error'] else ''}); filter such rows, or pass unscored='drop'"
            )
        rows.append(to_row(record))
    return rows


def to_row(record: dict[str, Any]) -> Row:
    """One row of the record as Python lists."""
    turns = sum(turn["role"] == "assistant" for turn in record["turns"])
    values = {name: record[name] for name in Row.__dataclass_fields__ if name != "num_turns"}
    return Row(num_turns=turns, **values)


def by_trajectory(rows: Sequence[Row]) -> list[list[Row]]:
    """Segments of each trajectory together, in order; trajectories as they first appear."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.trajectory_id, []).append(row)
    return [sorted(segments, key=lambda row: row.segment_index) for segments in found.values()]


def by_group(rows: Sequence[Row]) -> list[list[list[Row]]]:
    """Trajectories of each group together, in order of sample_index; groups as they first appear."""
    found: dict[str, list[list[Row]]] = {}
    for segments in by_trajectory(rows):
        found.setdefault(segments[0].group_id, []).append(segments)
    return [sorted(members, key=lambda segments: segments[0].sample_index) for members in found.values()]
