"""A trajectory as people see it: messages tied to turns, tokens cut out, everything bounded."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest

from rollout import trajectory_view
from rollout.ledger import Segment, TurnSpan
from rollout.record import to_table
from rollout.tool_calls import ToolCallRecord
from rollout.trajectory import SessionKey, Trajectory
from rollout.trajectory_view import facts, last_of, tokens


def table(**fields: Any) -> Any:
    first = Segment(
        array("i", [1, 2, 3]),
        array("i", [10, 11, 12, 13]),
        array("b", [1, 1, 0, 1]),
        array("f", [-0.5, -1.5, 0.0, -0.1]),
        array("i", [4, 5, -1, 5]),
        [TurnSpan("assistant", 0, 2, 0.5), TurnSpan("tool", 2, 3, 0.1), TurnSpan("assistant", 3, 4, 0.2)],
    )
    second = Segment(
        array("i", [1, 2]),
        array("i", [20]),
        array("b", [1]),
        array("f", [-2.0]),
        array("i", [6]),
        [TurnSpan("assistant", 0, 1, 0.3)],
        "the template drops reasoning",
    )
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "an example that came with the task"},
        {"role": "user", "content": "now you"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "it is 7"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    given: dict[str, Any] = {
        "messages": messages, "tool_calls": [ToolCallRecord("add", True, 0.1)], "turn_rewards": [0.0, None, 1.0],
        "metadata": {"level": 3}, "reward": 0.5,
    }  # fmt: skip
    return to_table([Trajectory(SessionKey("r", "t", "r/t", 0), [first, second], "stop", **{**given, **fields})])


def test_messages_are_tied_to_the_turns_that_sampled_them():
    told = facts(table())
    assert told["message_turns"] == [None, None, None, 0, None, 1, None, 2]
    assert told["message_calls"] == [None, None, None, None, 0, None, None, None]
    turns = [turn for segment in told["segments"] for turn in segment["turns"]]
    assert [(t["role"], t["sampled"], t["versions"], t.get("number"), t.get("reward")) for t in turns] == [
        ("assistant", 2, [4, 5], 0, 0.0),
        ("tool", 0, None, None, None),
        ("assistant", 1, [5, 5], 1, None),
        ("assistant", 1, [6, 6], 2, 1.0),
    ]
    assert turns[0]["mean_logprob"] == -1.0 and turns[0]["min_logprob"] == -1.5
    assert [s["fork_reason"] for s in told["segments"]] == [None, "the template drops reasoning"]
    assert told["segments"][0]["versions"] == [[4, 1], [5, 2]]
    assert told["metadata"] == {"level": 3} and told["reward"] == 0.5


def test_where_the_numbers_disagree_nothing_is_tied():
    told = facts(table(messages=[{"role": "assistant", "content": "only one of three"}]))
    assert told["message_turns"] == [None] and told["message_calls"] == [None]


@pytest.mark.parametrize("odd", [[], ["text"], [None, 3], [{"role": ["assistant"]}]])
def test_odd_conversations_are_shown_as_they_are(odd: list[Any]):
    assert facts(table(messages=odd))["messages"] == odd
    assert last_of(odd, "assistant", 1) == [None] * len(odd)


def test_a_trajectory_without_tokens():
    bare = to_table([Trajectory(SessionKey("r", "t", "r/t", 0), [], "error", [], error="engine: no")])
    told = facts(bare)
    assert told["error"] == "engine: no" and told["segments"][0]["sampled"] == 0
    assert tokens(bare, 0)["ids"] == [] and tokens(bare, 0)["total"] == 0


def test_tokens_of_a_segment():
    told = tokens(table(), 0)
    assert told["ids"] == [1, 2, 3, 10, 11, 12, 13]
    assert told["mask"] == [[0, 3], [1, 2], [0, 1], [1, 1]]
    assert told["versions"] == [[-1, 3], [4, 1], [5, 1], [-1, 1], [5, 1]]
    assert told["logprobs"] == [-0.5, -1.5, -0.1], "of the sampled tokens alone"
    assert (told["total"], told["prompt"]) == (7, 3)


def test_parts_put_together_are_the_whole():
    whole = tokens(table(), 0)
    for size in (1, 2, 3, 5):
        parts = [tokens(table(), 0, start, size) for start in range(0, 7, size)]
        for name in ("ids", "logprobs"):
            assert [value for part in parts for value in part[name]] == whole[name]
        for name in ("mask", "versions"):
            spread = [value for part in parts for value, count in part[name] for _ in range(count)]
            assert spread == [value for value, count in whole[name] for _ in range(count)]
    assert tokens(table(), 0, 99, 5)["ids"] == []


def test_long_texts_and_many_messages_are_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trajectory_view, "MAX_TEXT_CHARS", 10)
    monkeypatch.setattr(trajectory_view, "MAX_MESSAGES", 2)
    monkeypatch.setattr(trajectory_view, "MAX_TOKENS", 4)
    long = [{"role": "user", "content": "x" * 11, "more": [{"deep": "y" * 10}]}] * 5
    told = facts(table(messages=long, metadata={"not a number": float("nan")}))
    assert told["messages"][0]["content"] == "xxxxxxxxxx… (cut here for viewing; 11 characters in all)"
    assert told["messages"][0]["more"] == [{"deep": "y" * 10}]
    assert len(told["messages"]) == len(told["message_turns"]) == 2 and told["messages_left_out"] == 3
    assert told["metadata"] == {"not a number": "nan"}
    json.loads(json.dumps(told, allow_nan=False))
    assert len(tokens(table(), 0)["ids"]) == 4
