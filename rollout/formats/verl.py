"""verl's DataProto: padded arrays, prompts to the right, responses to the left of their padding.

One row a segment, in the table's order. Fields as in verl's agent loop output: `rm_scores` has the reward on the last
valid response token; segments of one trajectory share its reward.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rollout.formats.rows import FormatError, Row, Unscored, rows_of


@dataclass(frozen=True)
class VerlBatch:
    """What a DataProto is made of. B rows, P prompt and R response columns."""

    batch: dict[str, np.ndarray]
    """int64[B, P], int64[B, R] and int64[B, P + R]; rollout_log_probs and rm_scores float32[B, R]."""
    non_tensor_batch: dict[str, np.ndarray]
    meta_info: dict[str, Any]

    def to_dataproto(self) -> Any:
        """A verl.DataProto. Raises ImportError where verl or torch is not installed."""
        torch = importlib.import_module("torch")
        proto = importlib.import_module("verl").DataProto
        tensors = {name: torch.from_numpy(values) for name, values in self.batch.items()}
        return proto.from_dict(tensors=tensors, non_tensors=self.non_tensor_batch, meta_info=self.meta_info)


def to_verl(
    table: pa.Table,
    *,
    pad_token_id: int,
    prompt_length: int | None = None,
    response_length: int | None = None,
    truncate: bool = False,
    unscored: Unscored = "error",
) -> VerlBatch:
    """Rows of the record as verl's arrays. Lengths: those of the longest row where they are None.

    Raises FormatError for rows longer than the lengths, unless `truncate`: then prompts lose their beginning and
    responses their end.
    """
    rows = rows_of(table, unscored)
    prompt = _length("prompt", prompt_length, [len(row.prompt_ids) for row in rows], rows, truncate)
    response = _length("response", response_length, [len(row.response_ids) for row in rows], rows, truncate)
    count = len(rows)
    prompts = np.full((count, prompt), pad_token_id, np.int64)
    responses = np.full((count, response), pad_token_id, np.int64)
    mask = np.zeros((count, response), np.int64)
    logprobs = np.zeros((count, response), np.float32)
    scores = np.zeros((count, response), np.float32)
    attention = np.zeros((count, prompt + response), np.int64)
    for index, row in enumerate(rows):
        before, after = row.prompt_ids[-prompt:] if prompt else [], row.response_ids[:response]
        p, r = len(before), len(after)
        prompts[index, prompt - p :] = before
        responses[index, :r] = after
        mask[index, :r] = row.response_mask[:r]
        logprobs[index, :r] = row.logprobs[:r]
        attention[index, prompt - p : prompt + r] = 1
        if r:
            scores[index, r - 1] = row.score
    positions = np.maximum(attention.cumsum(axis=1) - 1, 0)
    return VerlBatch(
        batch={
            "prompts": prompts,
            "responses": responses,
            "response_mask": mask,
            "input_ids": np.concatenate([prompts, responses], axis=1),
            "attention_mask": attention,
            "position_ids": positions,
            "rollout_log_probs": logprobs,
            "rm_scores": scores,
        },
        non_tensor_batch=_others(rows),
        meta_info={"reward_extra_keys": [], "timing": {}},
    )


def _others(rows: list[Row]) -> dict[str, np.ndarray]:
    def objects(values: list[Any]) -> np.ndarray:
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array

    versions = [row.versions for row in rows]
    return {
        "__num_turns__": np.array([row.num_turns for row in rows], np.int32),
        # verl groups samples of a prompt by this for GRPO.
        "uid": objects([row.group_id for row in rows]),
        "trajectory_id": objects([row.trajectory_id for row in rows]),
        "segment_index": np.array([row.segment_index for row in rows], np.int32),
        "stop_reason": objects([row.stop_reason for row in rows]),
        "min_global_steps": np.array([min(v, default=-1) for v in versions], np.int64),
        "max_global_steps": np.array([max(v, default=-1) for v in versions], np.int64),
    }


def _length(what: str, wanted: int | None, lengths: list[int], rows: list[Row], truncate: bool) -> int:
    longest = max(lengths, default=0)
    if wanted is None:
        return longest
    if longest > wanted and not truncate:
        row = rows[lengths.index(longest)]
        raise FormatError(
            f"trajectory {row.trajectory_id!r} has {longest} {what} tokens, more than {what}_length = {wanted}; "
            f"raise it, or pass truncate=True"
        )
    return wanted
