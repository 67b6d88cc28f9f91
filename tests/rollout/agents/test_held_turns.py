"""Turns that wait for their client are bounded in number, size and time."""

from __future__ import annotations

import pytest

from rollout.agents.held_turns import HeldCall, HeldTurn, HeldTurns, new_key, restore, shown_id
from rollout.errors import ApiError


def held(key: str, text: str = "") -> HeldTurn:
    return HeldTurn(
        key, "a", 0, [{"role": "assistant", "content": text}], [HeldCall("e", "t", shown_id(key, 0), None)]
    )


class Clock:
    """Time that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_time_runs_out_and_starts_again_with_every_look():
    clock = Clock()
    store = HeldTurns(seconds=10, now=clock)
    await store.put(held("x"))
    clock.now = 9
    assert await store.get("x") is not None
    clock.now = 18
    assert await store.get("x") is not None
    clock.now = 28
    assert await store.get("x") is None and len(store) == 0


async def test_the_oldest_make_room():
    store = HeldTurns(max_turns=2)
    for key in "abc":
        await store.put(held(key))
    assert [await store.get(key) is not None for key in "abc"] == [False, True, True]
    small = HeldTurns(max_chars=1000)
    for key in "abc":
        await small.put(held(key, "x" * 400))
    assert [await small.get(key) is not None for key in "abc"] == [False, True, True]


async def test_room_is_given_back():
    store = HeldTurns(max_chars=1000)
    for _ in range(50):
        await store.put(held("same", "x" * 400))
    await store.put(held("other", "x" * 400))
    assert len(store) == 2


async def test_one_turn_that_is_too_large_is_refused_and_not_dropped_later():
    with pytest.raises(ApiError, match="more than the 100"):
        await HeldTurns(max_turn_chars=100).put(held("x", "y" * 200))


async def test_calls_of_two_turns_in_one_message_are_refused():
    calls = [
        {"id": shown_id(new_key(), 0), "type": "function", "function": {"name": "t", "arguments": ""}} for _ in "ab"
    ]
    with pytest.raises(ApiError, match="several turns"):
        await restore([{"role": "assistant", "tool_calls": calls}], HeldTurns(), agent="a", rank=0)


async def test_an_answer_to_no_call_is_refused():
    key = new_key()
    store = HeldTurns()
    await store.put(held(key))
    ids = [shown_id(key, 0), "other"]
    calls = [{"id": ids[0], "type": "function", "function": {"name": "t", "arguments": ""}}]
    messages = [
        {"role": "assistant", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": id, "content": "x"} for id in ids),
    ]
    with pytest.raises(ApiError, match="answers other"):
        await restore(messages, store, agent="a", rank=0)
    whole = await restore(messages[:2], store, agent="a", rank=0)
    assert whole == [
        {"role": "assistant", "content": ""},
        {"role": "tool", "tool_call_id": "e", "name": "t", "content": "x"},
    ]


async def test_ids_of_others_are_left_alone():
    calls = [{"id": "call_abc", "type": "function", "function": {"name": "t", "arguments": "{}"}}]
    messages = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_abc", "content": "x"},
    ]
    assert await restore(messages, HeldTurns(), agent="a", rank=0) == messages
