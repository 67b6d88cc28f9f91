"""Histories that only grow, and what counts as the same message."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rollout.remote.history import added_messages, first_difference, same_messages

USER = {"role": "user", "content": "2+3?"}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
ASSISTANT = {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm"}
TOOL = {"role": "tool", "content": "5", "tool_call_id": "c"}


def test_what_is_new_is_found():
    assert added_messages([], [USER]) == [USER]
    assert added_messages([USER, ASSISTANT], [USER, ASSISTANT, TOOL]) == [TOOL]
    assert added_messages([], [USER, {"role": "assistant", "content": "4"}, USER]) == [
        USER,
        {"role": "assistant", "content": "4"},
        USER,
    ], "examples"


@pytest.mark.parametrize(
    "told",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": [{"type": "text", "text": ""}], "tool_calls": [CALL], "refusal": None},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": '{"b": 3, "a": 2}'}, "index": 0}],
        },
    ],
)
def test_what_clients_change_without_meaning_anything_is_no_difference(told: dict[str, Any]):
    assert first_difference(ASSISTANT, told) is None
    assert added_messages([USER, ASSISTANT], [USER, told, TOOL]) == [TOOL]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            [{"role": "user", "content": "2+4?"}, ASSISTANT, TOOL],
            r"messages\.0\.content was '2\+3\?' and is '2\+4\?'",
        ),
        ([{"role": "system", "content": "2+3?"}, ASSISTANT, TOOL], r"messages\.0\.role"),
        ([USER, {**ASSISTANT, "content": "I said more"}, TOOL], r"messages\.1\.content"),
        ([USER, {**ASSISTANT, "tool_calls": []}, TOOL], r"messages\.1\.tool_calls"),
        ([USER, {**ASSISTANT, "tool_calls": [{**CALL, "id": "d"}]}, TOOL], r"messages\.1\.tool_calls"),
        ([USER, {**ASSISTANT, "tool_calls": "what"}, TOOL], r"messages\.1\.tool_calls"),
        ([USER], "send the whole history"),
        ([USER, ASSISTANT], "adds nothing"),
        ([USER, ASSISTANT, TOOL, {"role": "assistant", "content": "5"}], r"messages\.3\.role: is assistant"),
    ],
)
def test_every_other_change_is_named(given: list[dict[str, Any]], problem: str):
    found = added_messages([USER, ASSISTANT], given)
    assert isinstance(found, str)
    assert re.search(problem, found)


def test_an_error_does_not_repeat_a_whole_conversation():
    found = added_messages([{"role": "user", "content": "x" * 10_000}], [{"role": "user", "content": "y" * 10_000}])
    assert isinstance(found, str) and len(found) < 500


def test_conversations_are_the_same_only_at_the_same_length():
    assert same_messages([USER, ASSISTANT], [USER, ASSISTANT])
    assert not same_messages([USER, ASSISTANT], [USER])


def test_arguments_that_are_no_json_are_compared_as_text():
    odd = {**ASSISTANT, "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": "{oops"}}]}
    assert first_difference(odd, odd | {}) is None
    assert first_difference(odd, ASSISTANT) is not None
