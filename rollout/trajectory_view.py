"""One trajectory as people look at it: facts, conversation and tokens, as plain data for JSON.

Invariant: nothing is guessed. A message is tied to the turn that sampled it, and a tool's answer to its call, only
where their numbers agree; else they stand side by side. Every answer is bounded, whatever the trajectory holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

# Characters of one text in a conversation; what is longer is cut, and says so.
MAX_TEXT_CHARS = 200_000
# Tokens of one answer.
MAX_TOKENS = 100_000
# Messages of one answer.
MAX_MESSAGES = 5_000

_PER_TOKEN = ("prompt_ids", "response_ids", "response_mask", "logprobs", "policy_versions")


def facts(table: pa.Table) -> dict[str, Any]:
    """What is known of a trajectory but for its tokens. `table`: its rows of the record, by segment_index."""
    rows = table.drop_columns(list(_PER_TOKEN)).to_pylist()
    first = rows[0]
    messages = _loaded(first["messages"])
    messages = messages if isinstance(messages, list) else []
    calls = first["tool_calls"]
    segments = [_segment(table, index, row) for index, row in enumerate(rows)]
    rewards = first["turn_rewards"]
    spoken = [turn for segment in segments for turn in segment["turns"] if turn["role"] == "assistant"]
    for number, turn in enumerate(spoken):
        turn["number"] = number
        turn["reward"] = rewards[number] if rewards is not None and number < len(rewards) else None
    return {
        **{key: first[key] for key in ("trajectory_id", "run", "task_id", "group_id", "sample_index", "attempts")},
        **{key: first[key] for key in ("reward", "turn_rewards", "stop_reason", "error", "timing", "tool_calls")},
        "metadata": _bounded(_loaded(first["metadata"])),
        "messages": [_bounded(message) for message in messages[:MAX_MESSAGES]],
        "messages_left_out": max(0, len(messages) - MAX_MESSAGES),
        "message_turns": last_of(messages, "assistant", len(spoken))[:MAX_MESSAGES],
        "message_calls": last_of(messages, "tool", len(calls))[:MAX_MESSAGES],
        "segments": segments,
    }


def tokens(table: pa.Table, segment: int, start: int = 0, limit: int = MAX_TOKENS) -> dict[str, Any]:
    """Tokens `[start, start + limit)` of one segment, counted from the beginning of its prompt.

    `mask` and `versions` are run lengths [[value, count], …]; `logprobs` are of the sampled tokens alone, in order.
    """
    limit = min(limit, MAX_TOKENS)
    prompt, response = _array(table, "prompt_ids", segment), _array(table, "response_ids", segment)
    begin, end = max(0, start - len(prompt)), max(0, start + limit - len(prompt))
    ids = np.concatenate([prompt[start : start + limit], response[begin:end]])
    context = len(prompt[start : start + limit])
    mask = _array(table, "response_mask", segment)[begin:end]
    versions = _array(table, "policy_versions", segment)[begin:end]
    logprobs = _array(table, "logprobs", segment)[begin:end][mask == 1]
    return {
        "segment": segment,
        "start": start,
        "total": len(prompt) + len(response),
        "prompt": len(prompt),
        "ids": ids.tolist(),
        "mask": _runs([0] * context + mask.tolist()),
        "versions": _runs([-1] * context + versions.tolist()),
        "logprobs": [round(value, 4) for value in logprobs.tolist()],
    }


def last_of(messages: Sequence[Any], role: str, count: int) -> list[int | None]:
    """For each message of a role its number among the last `count` of them; None for others.

    Those before came with the task, such as examples. All None where there are fewer than `count`: then the
    conversation does not hold everything that was said (a captured session's agent may have rewritten it).
    """
    places = [
        index for index, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == role
    ]
    numbers: list[int | None] = [None] * len(messages)
    if count and len(places) >= count:
        for number, index in enumerate(places[-count:]):
            numbers[index] = number
    return numbers


def _segment(table: pa.Table, index: int, row: dict[str, Any]) -> dict[str, Any]:
    mask = _array(table, "response_mask", index) == 1
    versions, logprobs = _array(table, "policy_versions", index), _array(table, "logprobs", index)
    turns = []
    for turn in row["turns"]:
        span = slice(turn["start"], turn["end"])
        mine = mask[span]
        turns.append({**turn, "segment": index, **_spoken(logprobs[span][mine], versions[span][mine])})
    counts = np.unique(versions[mask], return_counts=True)
    return {
        "index": index,
        "fork_reason": row["fork_reason"],
        "prompt": len(_array(table, "prompt_ids", index)),
        "response": len(mask),
        "sampled": int(mask.sum()),
        "versions": [[int(version), int(count)] for version, count in zip(*counts, strict=True)],
        "turns": turns,
    }


def _spoken(logprobs: np.ndarray, versions: np.ndarray) -> dict[str, Any]:
    if not len(logprobs):
        return {"sampled": 0, "mean_logprob": None, "min_logprob": None, "versions": None}
    return {
        "sampled": len(logprobs),
        "mean_logprob": round(float(logprobs.mean()), 4),
        "min_logprob": round(float(logprobs.min()), 4),
        "versions": [int(versions.min()), int(versions.max())],
    }


def _array(table: pa.Table, name: str, row: int) -> np.ndarray:
    return table[name][row].values.to_numpy(zero_copy_only=False)


def _runs(values: Sequence[int]) -> list[list[int]]:
    return [[value, sum(1 for _ in same)] for value, same in groupby(values)]


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _bounded(value: Any) -> Any:
    """The same with long texts cut, and fit for JSON."""
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
        return f"{value[:MAX_TEXT_CHARS]}… (cut here for viewing; {len(value)} characters in all)"
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no word for it.
        return str(value)
    if isinstance(value, list):
        return [_bounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _bounded(item) for key, item in value.items()}
    return value
