"""TRL's GRPO with a rollout function: lists of prompts, completions, log-probabilities and masks.

One row a segment. TRL computes rewards in reward functions; `reward` comes along for one that only hands it on.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from rollout.formats.rows import Unscored, rows_of


def to_trl(table: pa.Table, *, unscored: Unscored = "error") -> dict[str, list[Any]]:
    """What a `rollout_func` returns: `prompt_ids`, `completion_ids`, `logprobs`, `env_mask`, and extra columns.

    `env_mask` is 1 where the policy sampled the token, so that TRL trains on nothing else.
    """
    rows = rows_of(table, unscored)
    return {
        "prompt_ids": [row.prompt_ids for row in rows],
        "completion_ids": [row.response_ids for row in rows],
        "logprobs": [row.logprobs for row in rows],
        "env_mask": [row.response_mask for row in rows],
        "reward": [row.score for row in rows],
        "trajectory_id": [row.trajectory_id for row in rows],
        "group_id": [row.group_id for row in rows],
    }
