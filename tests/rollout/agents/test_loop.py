"""The agent loop: own tools run here, the client's go to the client, and nothing of either is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from typing import Any

import pytest

from rollout.agents import AgentTimeout, ChatEngineError, ForbiddenError, TurnLost
from rollout.agents.hooks import Hook
from rollout.environment import Environment
from rollout.errors import ApiError, EnvironmentError_, NotFoundError
from rollout.tasks import Task
from rollout.tool_calls import ToolResult
from rollout.tools import tool
from tests.rollout.agents.scripted_chat import (
    USAGE,
    USER,
    Bare,
    ScriptedChatEngine,
    Talk,
    agent,
    ask,
    client_tool,
    delta,
    finish_of,
    fragment,
    message_of,
    say,
    usage,
)

FIVE = ("add", '{"a": 2, "b": 3}')
WEATHER = ("weather", '{"city": "Ulm"}')


def tool_message(call: dict[str, Any], content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call["id"], "content": content}


async def test_a_plain_answer_is_one_completion():
    talk = Talk(ScriptedChatEngine(say("He", "llo")))
    whole = await talk()
    assert message_of(whole) == {"role": "assistant", "content": "Hello"}
    assert (whole["object"], whole["model"], finish_of(whole), whole["usage"]) == (
        "chat.completion",
        "adder",
        "stop",
        USAGE,
    )
    assert talk.engine.bodies[0]["messages"] == [{"role": "system", "content": "PROMPT"}, USER]
    assert [spec["function"]["name"] for spec in talk.engine.bodies[0]["tools"]] == ["add", "secret"]


async def test_own_tools_run_here_and_stay_hidden():
    talk = Talk(ScriptedChatEngine(ask(FIVE), say("5")))
    whole = await talk()
    assert message_of(whole) == {"role": "assistant", "content": "5"}
    assert finish_of(whole) == "stop"
    assert "tool_calls" not in json.dumps(talk.chunks)
    call, answer = talk.engine.bodies[1]["messages"][2:]
    assert call["tool_calls"] == [
        {"id": "e0", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    ]
    assert answer == {"role": "tool", "content": "5", "tool_call_id": "e0", "name": "add"}


async def test_every_chunk_is_valid_and_only_one_finishes():
    talk = Talk(ScriptedChatEngine(ask(FIVE, content="Let me see."), say("5")))
    await talk()
    assert {chunk["object"] for chunk in talk.chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in talk.chunks}) == 1
    choices = [choice for chunk in talk.chunks for choice in chunk["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert talk.chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert talk.chunks[-1]["choices"] == [] and talk.chunks[-1]["usage"]["total_tokens"] == 28
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Let me see.\n\n5"


async def test_texts_of_two_turns_are_set_off_once():
    whole = await Talk(ScriptedChatEngine(ask(FIVE, content="Adding."), ask(FIVE), say("It ", "is ", "5")))()
    assert message_of(whole)["content"] == "Adding.\n\nIt is 5"


async def test_usage_is_the_sum_of_all_turns_with_its_details():
    first = [*ask(FIVE)[:-1]]
    first.append(
        usage(
            prompt_tokens=10,
            completion_tokens=4,
            total_tokens=14,
            completion_tokens_details={"reasoning_tokens": 3},
        )
    )
    second = say("5")[:-1]
    second.append(
        usage(
            prompt_tokens=20,
            completion_tokens=6,
            total_tokens=26,
            completion_tokens_details={"reasoning_tokens": 2},
            prompt_tokens_details={"cached_tokens": 16},
        )
    )
    assert (await Talk(ScriptedChatEngine(first, second))())["usage"] == {
        "prompt_tokens": 30,
        "completion_tokens": 10,
        "total_tokens": 40,
        "completion_tokens_details": {"reasoning_tokens": 5},
        "prompt_tokens_details": {"cached_tokens": 16},
    }


async def test_usage_that_one_turn_kept_to_itself_is_unknown_and_not_smaller():
    assert (await Talk(ScriptedChatEngine(ask(FIVE)[:-1], say("5")))())["usage"] is None


async def test_calls_of_one_turn_run_at_once():
    running = 0
    most = 0

    @tool
    async def slow(n: int) -> int:
        """Wait."""
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return n

    class Slow(Environment):
        tools = (slow,)

    talk = Talk(ScriptedChatEngine(ask(*(("slow", f'{{"n": {n}}}') for n in range(4))), say("done")), agent(Slow))
    await talk()
    assert most == 4
    assert [m["content"] for m in talk.engine.bodies[1]["messages"][2:]] == ["0", "1", "2", "3"]


async def test_a_tool_that_hangs_is_told_to_the_model():
    @tool
    async def hang() -> str:
        """Hang."""
        await asyncio.Event().wait()
        return ""

    class Hanging(Environment):
        tools = (hang,)

    talk = Talk(ScriptedChatEngine(ask(("hang", "{}")), say("sorry")), agent(Hanging, {"tool_seconds": 0.05}))
    assert finish_of(await talk()) == "stop"
    assert "did not answer within 0.05 s" in talk.engine.bodies[1]["messages"][-1]["content"]


async def test_a_made_up_name_is_answered_to_the_model_and_not_to_the_client():
    talk = Talk(ScriptedChatEngine(ask(("frobnicate", "{}")), say("I see")))
    whole = await talk(tools=[client_tool("weather")])
    assert message_of(whole) == {"role": "assistant", "content": "I see"}
    told = talk.engine.bodies[1]["messages"][-1]["content"]
    assert told == "Error: unknown tool 'frobnicate'; the tools are: add, secret, weather"


async def test_arguments_that_are_no_json_do_not_spoil_the_history():
    talk = Talk(ScriptedChatEngine(ask(("add", '{"a": 2, ')), say("5")))
    await talk()
    call, answer = talk.engine.bodies[1]["messages"][-2:]
    assert call["tool_calls"][0]["function"]["arguments"] == "{}"
    assert "not JSON" in answer["content"] and answer["content"].endswith('you wrote: {"a": 2, ')


async def test_more_calls_than_allowed_are_refused_to_the_model():
    talk = Talk(ScriptedChatEngine(ask(FIVE, FIVE), say("5")), agent(limits={"max_tool_calls_per_turn": 1}))
    await talk()
    assert [m["content"] for m in talk.engine.bodies[1]["messages"][-2:]] == [
        "5",
        "Error: more than 1 calls in one turn",
    ]


# The client's tools


async def test_the_clients_calls_go_to_the_client():
    talk = Talk(ScriptedChatEngine(ask(WEATHER)), agent(Bare))
    whole = await talk(tools=[client_tool("weather")])
    assert finish_of(whole) == "tool_calls"
    assert message_of(whole)["tool_calls"] == [
        {"id": "e0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    ]
    assert len(talk.held) == 0, "an agent without tools has nothing to hold"


async def test_streamed_arguments_of_the_client_come_piece_by_piece_and_once():
    talk = Talk(ScriptedChatEngine(ask(FIVE, WEATHER, WEATHER)))
    await talk(tools=[client_tool("weather")])
    parts = [p for c in talk.chunks for ch in c["choices"] for p in ch["delta"].get("tool_calls", [])]
    assert [part["index"] for part in parts] == [0, 0, 1, 1]
    assert [part["function"]["arguments"] for part in parts] == ['{"city"', ': "Ulm"}'] * 2
    assert [("id" in part, part["function"].get("name")) for part in parts[:2]] == [(True, "weather"), (False, None)]


async def test_a_mixed_turn_is_put_back_whole_when_the_client_returns():
    engine = ScriptedChatEngine(
        ask(FIVE, content="First."), ask(WEATHER, FIVE, ("nonsense", "{}"), content="Then."), say("sunny, 5")
    )
    talk = Talk(engine)
    tools = [client_tool("weather")]
    asked = message_of(await talk(tools=tools))
    assert asked["content"] == "First.\n\nThen."
    assert [call["function"]["name"] for call in asked["tool_calls"]] == ["weather"]
    whole = await talk(USER, asked, tool_message(asked["tool_calls"][0], "sunny"), tools=tools)
    assert message_of(whole)["content"] == "sunny, 5"
    history = engine.bodies[2]["messages"]
    assert [message["role"] for message in history] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "tool",
        "tool",
    ]
    assert (history[2]["content"], history[4]["content"]) == ("First.", "Then.")
    assert [call["function"]["name"] for call in history[4]["tool_calls"]] == ["weather", "add", "nonsense"]
    assert [call["id"] for call in history[4]["tool_calls"]] == [m["tool_call_id"] for m in history[5:]]
    assert [m["content"] for m in history[5:7]] == ["sunny", "5"]
    assert history[7]["content"].startswith("Error: unknown tool 'nonsense'")


async def test_several_returns_in_a_row_are_all_put_back():
    engine = ScriptedChatEngine(ask(FIVE, WEATHER), ask(WEATHER, FIVE), say("done"))
    talk = Talk(engine)
    tools = [client_tool("weather")]
    messages = [USER]
    for content in ("one", "two"):
        asked = message_of(await talk(*messages, tools=tools))
        messages += [asked, tool_message(asked["tool_calls"][0], content)]
    await talk(*messages, tools=tools)
    assert [m["content"] for m in engine.bodies[2]["messages"] if m["role"] == "tool"] == ["5", "one", "two", "5"]


async def test_a_lost_turn_is_told_and_not_forgotten():
    talk = Talk(ScriptedChatEngine(ask(FIVE, WEATHER), say("never")))
    tools = [client_tool("weather")]
    asked = message_of(await talk(tools=tools))
    elsewhere = Talk(talk.engine)
    with pytest.raises(TurnLost, match="send the conversation again") as caught:
        await elsewhere(USER, asked, tool_message(asked["tool_calls"][0], "sunny"), tools=tools)
    assert (caught.value.status, caught.value.field) == (410, "messages.1")
    assert len(talk.engine.bodies) == 1


async def test_a_lost_turn_that_was_answered_long_ago_stays_as_the_client_has_it():
    talk = Talk(ScriptedChatEngine(ask(FIVE, WEATHER), say("fine")))
    asked = message_of(await talk(tools=[client_tool("weather")]))
    old = [USER, asked, tool_message(asked["tool_calls"][0], "sunny"), {"role": "assistant", "content": "It is."}]
    elsewhere = Talk(talk.engine)
    assert message_of(await elsewhere(*old, {"role": "user", "content": "And now?"}))["content"] == "fine"
    assert talk.engine.bodies[1]["messages"][1:5] == old


async def test_a_turn_of_an_owner_is_not_for_others():
    talk = Talk(ScriptedChatEngine(ask(("secret", "{}"), WEATHER)), agent(scopes={"secret": "owner"}))
    tools = [client_tool("weather")]
    asked = message_of(await talk(tools=tools, scopes=["owner"]))
    with pytest.raises(TurnLost):
        await talk(USER, asked, tool_message(asked["tool_calls"][0], "sunny"), tools=tools)


async def test_an_unanswered_call_is_named():
    talk = Talk(ScriptedChatEngine(ask(FIVE, WEATHER, WEATHER)))
    asked = message_of(await talk(tools=[client_tool("weather")]))
    first, second = asked["tool_calls"]
    with pytest.raises(ApiError, match=f"{second['id']}.*has no tool message"):
        await talk(USER, asked, tool_message(first, "sunny"))
    with pytest.raises(ApiError, match="answered twice"):
        await talk(USER, asked, tool_message(first, "sunny"), tool_message(first, "rainy"))
    with pytest.raises(ApiError, match="not right before it"):
        await talk(USER, tool_message(first, "sunny"))


async def test_a_tool_of_the_request_never_takes_an_own_tools_name():
    engine = ScriptedChatEngine()
    with pytest.raises(ApiError, match="'add' is a tool of this agent") as caught:
        await Talk(engine)(tools=[client_tool("weather"), client_tool("add")])
    assert (caught.value.status, caught.value.field) == (400, "tools.1.function.name")
    with pytest.raises(ApiError, match="'secret' is a tool"):
        await Talk(engine, agent(scopes={"secret": "admin"}))(tools=[client_tool("secret")])
    assert engine.bodies == []


# Scopes


@pytest.mark.parametrize(
    ("scopes", "can"), [(["all"], False), (["owner"], True), (["admin"], True), (["chat"], False)]
)
async def test_scopes_decide_what_is_offered_and_what_is_run(scopes: list[str], can: bool):
    talk = Talk(ScriptedChatEngine(ask(("secret", "{}")), say("ok")), agent(scopes={"secret": "owner"}))
    await talk(scopes=scopes)
    offered = [spec["function"]["name"] for spec in talk.engine.bodies[0]["tools"]]
    assert ("secret" in offered) is can
    told = talk.engine.bodies[1]["messages"][-1]["content"]
    assert told == ("s3cret" if can else "Error: unknown tool 'secret'; the tools are: add")


async def test_a_caller_without_any_scope_does_not_go_on_as_everybody():
    with pytest.raises(ForbiddenError):
        await Talk(ScriptedChatEngine())(scopes=[])


async def test_a_scope_of_a_tool_that_is_not_there_is_no_silent_gap():
    with pytest.raises(EnvironmentError_, match=r"scopes\.secrt names no tool"):
        await Talk(ScriptedChatEngine(), agent(scopes={"secrt": "admin"}))()


# What is forwarded, and for how long


async def test_sampling_parameters_reach_every_turn():
    talk = Talk(ScriptedChatEngine(ask(FIVE), say("5")))
    sent: dict[str, Any] = {"temperature": 0.0, "top_p": 0.5, "stop": ["x"], "parallel_tool_calls": False, "top_k": 3}
    await talk(**sent, user="me")
    for body in talk.engine.bodies:
        assert {key: body[key] for key in sent} == sent
        assert "user" not in body and "model" not in body and "stream" not in body


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
async def test_a_demanded_call_is_demanded_once(choice: Any):
    talk = Talk(ScriptedChatEngine(ask(FIVE), say("5")))
    await talk(tool_choice=choice)
    assert [body["tool_choice"] for body in talk.engine.bodies] == [choice, "auto"]


async def test_tool_choice_none_holds_for_all_turns():
    talk = Talk(ScriptedChatEngine(ask(FIVE), say("5")))
    await talk(tool_choice="none")
    assert [body["tool_choice"] for body in talk.engine.bodies] == ["none", "none"]


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ("sometimes", "use none, auto, required"),
        ({"type": "function", "function": {"name": "nope"}}, "names 'nope'.*add, secret"),
        ({"type": "allowed_tools"}, "tool_choice must be"),
    ],
)
async def test_a_tool_choice_that_cannot_be_met_is_refused(choice: Any, problem: str):
    with pytest.raises(ApiError, match=problem):
        await Talk(ScriptedChatEngine())(tool_choice=choice)


async def test_a_demand_without_tools_is_refused_and_auto_is_not_forwarded():
    with pytest.raises(ApiError, match="there are no tools"):
        await Talk(ScriptedChatEngine(), agent(Bare))(tool_choice="required")
    talk = Talk(ScriptedChatEngine(say("hi")), agent(Bare))
    await talk(tool_choice="auto", parallel_tool_calls=True)
    assert not {"tool_choice", "parallel_tool_calls", "tools"} & talk.engine.bodies[0].keys()


async def test_the_last_allowed_turn_ends_as_length_only_if_another_was_needed():
    ends = Talk(ScriptedChatEngine(ask(FIVE), ask(FIVE)), agent(limits={"max_turns": 2}))
    assert finish_of(await ends()) == "length"
    succeeds = Talk(ScriptedChatEngine(ask(FIVE), say("5")), agent(limits={"max_turns": 2}))
    assert finish_of(await succeeds()) == "stop"
    hands_over = Talk(ScriptedChatEngine(ask(FIVE, WEATHER)), agent(limits={"max_turns": 1}))
    assert finish_of(await hands_over(tools=[client_tool("weather")])) == "tool_calls"


async def test_max_tokens_bounds_all_turns_together():
    talk = Talk(ScriptedChatEngine(ask(FIVE), ask(FIVE)))
    assert finish_of(await talk(max_tokens=8)) == "length"
    assert [body["max_completion_tokens"] for body in talk.engine.bodies] == [8, 4]


async def test_a_truncated_turn_is_not_acted_on():
    talk = Talk(ScriptedChatEngine(ask(FIVE, finish="length")))
    assert finish_of(await talk()) == "length"
    assert len(talk.engine.bodies) == 1


# Reasoning, odd streams, errors


async def test_reasoning_is_shown_once_and_given_back_to_the_model():
    first = [delta(reasoning_content="Add"), delta(reasoning_content=" them."), *ask(FIVE)]
    talk = Talk(ScriptedChatEngine(first, say("5")))
    message = message_of(await talk())
    assert message == {"role": "assistant", "content": "5", "reasoning_content": "Add them."}
    assert talk.engine.bodies[1]["messages"][2]["reasoning_content"] == "Add them."


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_reasoning_that_the_client_does_not_want_is_still_the_models(name: str):
    thought = delta(**{name: "Add them."})
    thought["choices"][0]["logprobs"] = {"content": [{"token": "Add", "logprob": -0.1}]}
    answer = delta(content="5")
    answer["choices"][0]["logprobs"] = {"content": [{"token": "5", "logprob": -0.2}]}
    seen: list[Any] = []
    counted = usage(completion_tokens=9, completion_tokens_details={"reasoning_tokens": 3})
    talk = Talk(
        ScriptedChatEngine([thought, *ask(FIVE)[:-1], counted], [thought, answer, delta("stop"), counted]),
        agent(hooks=[Hook(event, lambda _, value: seen.append(value)) for event in ("chunk", "message")]),
    )
    whole = await talk(include_reasoning=False)
    assert message_of(whole) == {"role": "assistant", "content": "5"}
    assert [token["token"] for token in whole["choices"][0]["logprobs"]["content"]] == ["5"]
    assert "Add" not in json.dumps(talk.chunks) + json.dumps(seen) and len(seen) > 1
    assert whole["usage"] == {"completion_tokens": 18, "completion_tokens_details": {"reasoning_tokens": 6}}
    assert talk.engine.bodies[1]["messages"][2][name] == "Add them."
    assert all("include_reasoning" not in body for body in talk.engine.bodies)


async def test_reasoning_that_is_hidden_comes_back_with_a_held_turn():
    first = [delta(reasoning="Ask Ulm."), *ask(FIVE, WEATHER)]
    talk = Talk(ScriptedChatEngine(first, say("sunny")))
    options = {"tools": [client_tool("weather")], "include_reasoning": False}
    asked = message_of(await talk(**options))
    assert "reasoning" not in asked
    await talk(USER, asked, tool_message(asked["tool_calls"][0], "sun"), **options)
    assert talk.engine.bodies[1]["messages"][2]["reasoning"] == "Ask Ulm."


async def test_a_tools_result_that_ends_in_half_a_character_is_told():
    @tool
    def cut() -> str:
        """Cut a text."""
        return "a\ud83d"

    @tool
    def fail() -> str:
        """Fail over a text."""
        raise ValueError("b\ud83d")

    class Cutting(Environment):
        tools = (cut, fail)

    talk = Talk(
        ScriptedChatEngine(ask(("cut", "{}"), ("fail", "{}")), say("ok")), agent(Cutting, show_tool_calls=True)
    )
    await talk()
    told = [m["content"] for m in talk.engine.bodies[1]["messages"] if m["role"] == "tool"]
    assert told == ["a?", "Error: ValueError: b?"]
    assert [chunk["agent_event"]["content"] for chunk in talk.chunks if "agent_event" in chunk] == told


async def test_what_a_hook_puts_into_a_result_can_be_sent_too():
    def worse(_: Any, result: ToolResult) -> ToolResult:
        return dataclasses.replace(result, content="c\ud83d")

    talk = Talk(ScriptedChatEngine(ask(FIVE), say("ok")), agent(hooks=[Hook("after_tool_call", worse)]))
    await talk()
    assert [m["content"] for m in talk.engine.bodies[1]["messages"] if m["role"] == "tool"] == ["c?"]


async def test_log_probabilities_come_with_their_text():
    chunk = delta(content="5")
    chunk["choices"][0]["logprobs"] = {"content": [{"token": "5", "logprob": -0.1}]}
    whole = await Talk(ScriptedChatEngine([chunk, delta("stop"), usage()]))(logprobs=True)
    assert whole["choices"][0]["logprobs"] == {"content": [{"token": "5", "logprob": -0.1}]}


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ([delta(content="half")], "without a finish_reason"),
        ([delta(content="x"), delta("abort")], "'abort'"),
        ([ChatEngineError(400, "too long")], "too long"),
    ],
)
async def test_what_goes_wrong_in_the_engine_is_an_error_and_no_answer(turn: list[Any], problem: str):
    talk = Talk(ScriptedChatEngine(turn))
    with pytest.raises(ChatEngineError, match=problem):
        await talk()
    assert not any(choice["finish_reason"] for chunk in talk.chunks for choice in chunk["choices"])


async def test_a_request_has_a_deadline_and_ends_the_engines_call():
    talk = Talk(ScriptedChatEngine([delta(content="x"), 30.0]), agent(limits={"total_seconds": 0.1}))
    started = time.monotonic()
    with pytest.raises(AgentTimeout, match=r"longer than 0\.1 s"):
        await talk()
    assert time.monotonic() - started < 5
    assert talk.engine.cancelled == 1


async def test_a_closed_stream_ends_the_engines_call_and_the_environment():
    closed: list[str] = []

    class Closing(Environment):
        async def setup(self, task: Task) -> None:
            closed.append(task.messages[0]["content"])

        async def close(self) -> None:
            closed.append(f"closed after {talk.engine.cancelled} cancelled calls")

    talk = Talk(ScriptedChatEngine([delta(content="x"), delta(content="y")]), agent(Closing))
    chunks = talk.run().chunks()
    await anext(chunks)
    await chunks.aclose()
    assert talk.engine.cancelled == 1
    assert closed == ["2+3?", "closed after 1 cancelled calls"]


async def test_cancelling_ends_the_tools_that_run():
    cancelled = asyncio.Event()
    begun = asyncio.Event()

    @tool
    async def hang() -> str:
        """Hang."""
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return ""

    class Hanging(Environment):
        tools = (hang,)

    task = asyncio.ensure_future(Talk(ScriptedChatEngine(ask(("hang", "{}"))), agent(Hanging))())
    await asyncio.wait_for(begun.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled.is_set()


async def test_concurrent_requests_never_meet():
    class Counting(Environment):
        def __init__(self) -> None:
            self.seen = 0

        @tool
        async def count(self) -> int:
            """Count."""
            self.seen += 1
            await asyncio.sleep(0.01)
            return self.seen

    who = agent(Counting)
    talks = [Talk(ScriptedChatEngine(ask(("count", "{}")), say(f"{n}")), who) for n in range(8)]
    answers = await asyncio.gather(*(talk() for talk in talks))
    assert [message_of(answer)["content"] for answer in answers] == [str(n) for n in range(8)]
    assert [talk.engine.bodies[1]["messages"][-1]["content"] for talk in talks] == ["1"] * 8


async def test_own_calls_may_be_shown_as_valid_extra_chunks():
    talk = Talk(ScriptedChatEngine(ask(FIVE), say("5")), agent(show_tool_calls=True))
    whole = await talk()
    (shown,) = [chunk for chunk in talk.chunks if "agent_event" in chunk]
    assert shown["choices"] == [{"index": 0, "delta": {}, "finish_reason": None}]
    assert (shown["agent_event"]["name"], shown["agent_event"]["content"], shown["agent_event"]["ok"]) == (
        "add",
        "5",
        True,
    )
    assert whole["agent_events"] == [shown["agent_event"]]


async def test_a_system_message_of_the_client_stands_under_the_agents():
    talk = Talk(ScriptedChatEngine(say("ok")))
    await talk({"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, USER)
    assert talk.engine.bodies[0]["messages"] == [{"role": "system", "content": "PROMPT\n\nBe brief."}, USER]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"n": 2}, "n: an agent gives one answer"),
        ({"echo": True}, "echo: agents do not take"),
        ({"functions": []}, "functions: use tools"),
        ({"max_tokens": 0}, "max_tokens must be a whole number"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"stream_options": []}, "stream_options must be an object"),
        ({"tools": {}}, "tools must be a list"),
        ({"tools": [{"type": "web_search"}]}, r"tools\.0\.type"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\.0\.function\.name is missing"),
        ({"tools": [client_tool("a"), client_tool("a")]}, "'a' is there twice"),
        ({"tools": [client_tool(f"t{n}") for n in range(129)]}, "129 tools, at most 128"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id is missing"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "each call needs id"),
    ],
)
async def test_a_request_that_cannot_be_met_is_refused_by_field(fields: dict[str, Any], problem: str):
    with pytest.raises(ApiError, match=problem):
        await Talk(ScriptedChatEngine())(**fields)


async def test_another_model_is_not_here():
    with pytest.raises(NotFoundError, match="serves 'adder'"):
        await Talk(ScriptedChatEngine())(model="gpt")


async def test_parts_of_a_call_in_any_cut_are_the_same_call():
    cut = [
        delta(tool_calls=[fragment(0, "e0", "we")]),
        delta(tool_calls=[fragment(0, None, "ather", "")]),
        delta(tool_calls=[fragment(0, None, None, "{"), fragment(0, None, None, "}")]),
        delta("tool_calls"),
        usage(),
    ]
    whole = await Talk(ScriptedChatEngine(cut), agent(Bare))(tools=[client_tool("weather")])
    assert message_of(whole)["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}
