"""slime's samples: a list of groups, each a list of samples; segments of one rollout share their rollout_id.

Status: `stop`, `max_turns` and `tool_error` are completed; `length`, `max_tokens` and `deadline` truncated;
`cancelled` aborted; `error` failed. A failed or aborted sample has no reward (None), which slime leaves out itself.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import pyarrow as pa

from rollout.formats.rows import FormatError, by_trajectory, to_row
from rollout.record import check

STATUS = {
    "stop": "completed",
    "max_turns": "completed",
    "tool_error": "completed",
    "length": "truncated",
    "max_tokens": "truncated",
    "deadline": "truncated",
    "cancelled": "aborted",
    "error": "failed",
}
_WITHOUT_REWARD = frozenset({"cancelled", "error"})


def to_slime(table: pa.Table) -> list[list[dict[str, Any]]]:
    """Groups of samples, as keyword arguments of slime's Sample. Raises FormatError for an unscored good sample."""
    check(table)
    rows = [to_row(record) for record in table.to_pylist()]
    groups: dict[str, list[dict[str, Any]]] = {}
    for segments in by_trajectory(rows):
        first = segments[0]
        if first.reward is None and first.stop_reason not in _WITHOUT_REWARD:
            raise FormatError(f"trajectory {first.trajectory_id!r} has no reward; filter such rows before")
        group = groups.setdefault(first.group_id, [])
        for row in segments:
            group.append(
                {
                    "group_index": len(groups) - 1,
                    "index": len(group),
                    "rollout_id": row.trajectory_id,
                    "session_id": row.trajectory_id,
                    "tokens": row.prompt_ids + row.response_ids,
                    "response_length": len(row.response_ids),
                    "loss_mask": row.response_mask,
                    "rollout_log_probs": row.logprobs,
                    "reward": row.reward,
                    "status": STATUS[row.stop_reason],
                    "weight_versions": [str(version) for version in sorted(set(row.versions))],
                    "metadata": json.loads(row.metadata) | {"segment_index": row.segment_index},
                }
            )
    return list(groups.values())


def to_slime_samples(table: pa.Table) -> list[list[Any]]:
    """The same as slime's own Sample objects. Raises ImportError where slime is not installed."""
    kind = importlib.import_module("slime.utils.types").Sample
    known = set(kind.__dataclass_fields__)
    groups = []
    for group in to_slime(table):
        samples = []
        for fields in group:
            fields["status"] = kind.Status(fields["status"])
            samples.append(kind(**{name: value for name, value in fields.items() if name in known}))
        groups.append(samples)
    return groups
