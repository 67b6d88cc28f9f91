"""One turn from its chunks: shown once, kept whole, however an engine cuts it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.agents.stream import Folded, TurnStream, UsageSum
from tests.rollout.agents.scripted_chat import delta, fragment, usage


def turn() -> TurnStream:
    kinds: Any = {"mine": "internal", "yours": "external"}
    return TurnStream(lambda name: kinds.get(name, "unknown"), lambda told, index: f"{told}/{index}")


def fed(*chunks: dict[str, Any]) -> tuple[TurnStream, list[dict[str, Any]]]:
    """A turn after these chunks, and all tool call parts that it showed."""
    stream = turn()
    shown = [stream.feed(chunk) for chunk in chunks] + [stream.end()]
    return stream, [part for one in shown if one for part in one["delta"].get("tool_calls", [])]


def text_of(parts: list[dict[str, Any]]) -> dict[int, str]:
    """The shown calls' arguments."""
    found: dict[int, str] = {}
    for part in parts:
        found[part["index"]] = found.get(part["index"], "") + part["function"]["arguments"]
    return found


def test_a_usage_without_choices_is_taken_and_shows_nothing():
    stream = turn()
    assert stream.feed(usage(total_tokens=3)) == {}
    assert stream.feed({"choices": None}) == {}
    assert stream.usage == {"total_tokens": 3}


def test_the_last_of_several_usages_counts():
    stream, _ = fed(delta(content="a") | {"usage": {"total_tokens": 1}}, usage(total_tokens=2))
    assert stream.usage == {"total_tokens": 2}


def test_a_call_without_arguments_is_shown_at_the_end():
    stream, parts = fed(delta(tool_calls=[fragment(0, "a", "yours")]), delta("tool_calls"))
    assert parts == [
        {"index": 0, "id": "a/0", "type": "function", "function": {"name": "yours", "arguments": ""}},
    ]
    assert stream.message()["tool_calls"][0]["function"]["arguments"] == "{}"


def test_the_clients_calls_are_numbered_without_gaps():
    stream, parts = fed(
        delta(tool_calls=[fragment(0, "a", "mine", "{}")]),
        delta(tool_calls=[fragment(1, "b", "yours", '{"x"')]),
        delta(tool_calls=[fragment(2, "c", "nobody", "{}")]),
        delta(tool_calls=[fragment(3, "d", "yours", "{}")]),
        delta(tool_calls=[fragment(1, arguments=": 1}")]),
    )
    assert text_of(parts) == {0: '{"x": 1}', 1: "{}"}
    assert [call.kind for call in stream.calls] == ["internal", "external", "unknown", "external"]
    assert [call.id for call in stream.hidden] == ["a", "c"]


def test_two_calls_under_one_number_are_two():
    stream, parts = fed(
        delta(tool_calls=[fragment(0, "a", "yours", '{"x": 1}')]),
        delta(tool_calls=[fragment(0, "b", "yours", '{"x": 2}')]),
    )
    assert text_of(parts) == {0: '{"x": 1}', 1: '{"x": 2}'}
    assert [call.arguments for call in stream.calls] == ['{"x": 1}', '{"x": 2}']


def test_a_name_and_id_that_are_repeated_with_every_part_count_once():
    stream, parts = fed(*(delta(tool_calls=[fragment(0, "a", "yours", part)]) for part in ("{", "}")))
    assert (stream.calls[0].name, text_of(parts)) == ("yours", {0: "{}"})


def test_parts_without_numbers_belong_to_their_id():
    def part(id: str | None, arguments: str) -> dict[str, Any]:
        function = {"arguments": arguments} | ({"name": "yours"} if id else {})
        return delta(tool_calls=[{"function": function} | ({"id": id} if id else {})])

    stream, parts = fed(part("a", "{"), part(None, "}"), part("b", "{}"))
    assert text_of(parts) == {0: "{}", 1: "{}"}
    assert [call.id for call in stream.calls] == ["a", "b"]


def test_ids_that_are_missing_or_double_are_made_up():
    stream, _ = fed(
        delta(tool_calls=[fragment(0, None, "mine", "{}"), fragment(1, "a", "mine", "{}"), fragment(2, "a", "mine")])
    )
    assert len({call.id for call in stream.calls}) == 3 and all(call.id for call in stream.calls)


def test_reasoning_under_two_names_is_one_text():
    stream = turn()
    shown = stream.feed(delta(reasoning="hm", reasoning_content="hm"))
    assert (shown["delta"], stream.reasoning) == ({"reasoning": "hm"}, "hm")


@pytest.mark.parametrize(("arguments", "fits"), [("", True), ("{}", True), ("[]", False), ("{", False), ("1", False)])
def test_only_objects_stay_in_the_history(arguments: str, fits: bool):
    stream, _ = fed(delta(tool_calls=[fragment(0, "a", "mine", arguments)]))
    assert stream.calls[0].is_object is fits
    assert stream.calls[0].to_message_part()["function"]["arguments"] == "{}"


CALLS = st.lists(st.tuples(st.sampled_from(["mine", "yours", "nobody"]), st.text(max_size=12)), max_size=4)


@given(CALLS, st.text(max_size=10), st.data())
def test_however_it_is_cut_everything_is_shown_exactly_once(calls: Any, content: str, data: Any):
    chunks = [delta(content=letter) for letter in content]
    for index, (name, arguments) in enumerate(calls):
        first = data.draw(st.integers(0, len(arguments)))
        chunks.append(delta(tool_calls=[fragment(index, f"id{index}", name, arguments[:first])]))
        chunks += [delta(tool_calls=[fragment(index, arguments=letter)]) for letter in arguments[first:]]
    stream, folded = turn(), Folded()
    for chunk in chunks:
        if shown := stream.feed(chunk):
            folded.add(wrapped(shown))
    if rest := stream.end():
        folded.add(wrapped(rest))
    mine = [
        (call["function"]["name"], call["function"]["arguments"]) for call in folded.message.get("tool_calls", [])
    ]
    assert mine == [call for call in calls if call[0] == "yours"]
    assert (folded.message["content"] or "") == content == stream.content
    assert [(call.name, call.arguments) for call in stream.calls] == list(calls)


def wrapped(shown: dict[str, Any]) -> dict[str, Any]:
    return {"id": "x", "created": 1, "model": "m", "choices": [{"index": 0, "finish_reason": None, **shown}]}


def test_usage_sums_and_knows_when_it_does_not_know():
    total = UsageSum()
    assert total.total is None
    total.add({"completion_tokens": 2, "details": {"a": 1}, "note": None})
    total.add({"completion_tokens": 3, "details": {"b": 2}})
    assert total.total == {"completion_tokens": 5, "details": {"a": 1, "b": 2}}
    total.add(None)
    assert (total.total, total.sampled) == (None, 5)
