"""Hooks: in order of priority, with what the one before left, and finalize always."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from rollout.agents import Ending, Hook, HookError, RequestContext
from rollout.environment import Environment
from rollout.errors import ApiError, ToolError
from rollout.tools import tool
from tests.rollout.agents.scripted_chat import ScriptedChatEngine, Talk, agent, ask, client_tool, message_of, say

FIVE = ("add", '{"a": 2, "b": 3}')


def recording(seen: list[str], *events: Any) -> list[Hook]:
    def make(event: str) -> Hook:
        async def note(context: RequestContext, value: Any) -> None:
            seen.append(event)

        return Hook(event, note)  # type: ignore[arg-type]

    return [make(event) for event in events]


async def test_the_events_of_a_request_in_their_order():
    seen: list[str] = []
    events = ["finalize", "message", "after_tool_call", "before_tool_call", "after_llm_call", "chunk"]
    hooks = recording(seen, *events, "before_llm_call", "request", "connection")
    await Talk(ScriptedChatEngine(ask(FIVE), say("5")), agent(hooks=hooks))()
    short = [event for index, event in enumerate(seen) if index == 0 or seen[index - 1] != event]
    assert short == [
        *("connection", "request", "before_llm_call", "chunk", "after_llm_call"),
        *("before_tool_call", "after_tool_call"),
        *("before_llm_call", "chunk", "after_llm_call", "message", "finalize"),
    ]


async def test_ascending_priority_and_each_gets_what_the_one_before_left():
    def append(letter: str) -> Any:
        def change(context: RequestContext, body: dict[str, Any]) -> dict[str, Any]:
            return {**body, "stop": [*body.get("stop", []), letter]}

        return change

    hooks = [Hook("request", append("c"), 90), Hook("request", append("a"), 10), Hook("request", append("b"), 10)]
    talk = Talk(ScriptedChatEngine(say("ok")), agent(hooks=hooks))
    await talk()
    assert talk.engine.bodies[0]["stop"] == ["a", "b", "c"]


async def test_hooks_may_change_calls_results_and_chunks():
    def double(context: RequestContext, call: Any) -> Any:
        return dataclasses.replace(call, arguments={"a": 4, "b": 6}, id="other")

    async def praise(context: RequestContext, result: Any) -> Any:
        return dataclasses.replace(result, content=result.content + "!")

    def shout(context: RequestContext, chunk: dict[str, Any]) -> dict[str, Any]:
        delta = chunk["choices"][0]["delta"]
        loud = {**delta, **({"content": delta["content"].upper()} if delta.get("content") else {})}
        return {**chunk, "choices": [{**chunk["choices"][0], "delta": loud}]}

    hooks = [Hook("before_tool_call", double), Hook("after_tool_call", praise), Hook("chunk", shout)]
    talk = Talk(ScriptedChatEngine(ask(FIVE), say("ten")), agent(hooks=hooks))
    assert message_of(await talk())["content"] == "TEN"
    call, answer = talk.engine.bodies[1]["messages"][-2:]
    assert answer["content"] == "10!"
    assert answer["tool_call_id"] == call["tool_calls"][0]["id"], "the history stays the model's own"


async def test_a_tool_error_before_a_call_refuses_that_call_alone():
    def guard(context: RequestContext, call: Any) -> None:
        if "9" in call.arguments:
            raise ToolError("no nines")

    talk = Talk(
        ScriptedChatEngine(ask(FIVE, ("add", '{"a": 9, "b": 1}')), say("ok")),
        agent(hooks=[Hook("before_tool_call", guard)]),
    )
    await talk()
    assert [m["content"] for m in talk.engine.bodies[1]["messages"][-2:]] == ["5", "Error: no nines"]


async def test_a_hook_refuses_a_request_before_the_model_is_asked():
    def refuse(context: RequestContext, value: Any) -> None:
        raise ApiError("not today")

    seen: list[Ending] = []
    hooks = [Hook("connection", refuse), Hook("finalize", lambda context, ending: seen.append(ending))]
    talk = Talk(ScriptedChatEngine(), agent(hooks=hooks))
    with pytest.raises(ApiError, match="not today"):
        await talk()
    assert talk.engine.bodies == [] and isinstance(seen[0].error, ApiError)


@pytest.mark.parametrize("event", ["request", "before_llm_call", "after_llm_call", "before_tool_call", "message"])
async def test_a_hook_that_fails_is_named(event: Any):
    async def broken(context: RequestContext, value: Any) -> None:
        raise KeyError("x")

    with pytest.raises(HookError, match=f"hook broken on {event} raised KeyError"):
        await Talk(ScriptedChatEngine(ask(FIVE), say("5")), agent(hooks=[Hook(event, broken)]))()


async def test_a_hook_that_hangs_has_a_deadline():
    async def hang(context: RequestContext, value: Any) -> None:
        await asyncio.Event().wait()

    with pytest.raises(HookError, match=r"hook hang on request took longer than 0\.05 s"):
        await Talk(ScriptedChatEngine(), agent(limits={"hook_seconds": 0.05}, hooks=[Hook("request", hang)]))()


async def test_a_hook_that_fails_ends_the_other_calls_of_the_turn():
    ended: list[BaseException] = []

    @tool
    async def hang() -> str:
        """Hang."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as cancelled:
            ended.append(cancelled)
            raise
        return ""

    class Hanging(Environment):
        tools = (hang,)

    async def refuse_second(context: RequestContext, call: Any) -> None:
        if call.id == "e1":
            await asyncio.sleep(0.05)
            raise ApiError("too much")

    talk = Talk(
        ScriptedChatEngine(ask(("hang", "{}"), ("hang", "{}"))),
        agent(Hanging, hooks=[Hook("before_tool_call", refuse_second)]),
    )
    with pytest.raises(ApiError, match="too much"):
        await asyncio.wait_for(talk(), 5)
    assert len(ended) == 1


async def test_a_hook_that_returns_something_else_is_named():
    def wrong(context: RequestContext, value: Any) -> str:
        return "body"

    with pytest.raises(HookError, match="hook wrong on request returned str, not dict or None"):
        await Talk(ScriptedChatEngine(), agent(hooks=[Hook("request", wrong)]))()


async def test_finalize_runs_for_every_ending_and_for_every_hook():
    endings: list[Ending] = []

    def broken(context: RequestContext, ending: Ending) -> None:
        raise RuntimeError("mine")

    async def note(context: RequestContext, ending: Ending) -> None:
        endings.append(ending)

    who = agent(hooks=[Hook("finalize", broken, 1), Hook("finalize", note, 2)])
    await Talk(ScriptedChatEngine(ask(FIVE), say("5")), who)()
    with pytest.raises(ZeroDivisionError):
        await Talk(ScriptedChatEngine([ZeroDivisionError()]), who)()
    left = Talk(ScriptedChatEngine([30.0]), who)
    task = asyncio.ensure_future(left())
    await asyncio.wait_for(left.engine.waiting.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [type(ending.error) for ending in endings] == [type(None), ZeroDivisionError, asyncio.CancelledError]
    assert (endings[0].finish_reason, endings[0].usage) == (
        "stop",
        {"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28},
    )


async def test_the_message_is_what_the_client_got():
    seen: list[Any] = []
    hooks = [Hook("message", lambda context, message: seen.append(message))]
    talk = Talk(ScriptedChatEngine(ask(FIVE, ("weather", "{}"), content="Look:")), agent(hooks=hooks))
    whole = await talk(tools=[client_tool("weather")])
    assert seen == [message_of(whole)]


async def test_state_is_shared_by_the_hooks_of_one_request_alone():
    seen: list[Any] = []

    def first(context: RequestContext, body: Any) -> None:
        seen.append(dict(context.state))
        context.state["mine"] = context.request_id

    def last(context: RequestContext, ending: Any) -> None:
        seen.append(context.state["mine"] == context.request_id and context.scopes)

    who = agent(hooks=[Hook("request", first), Hook("finalize", last)])
    for _ in range(2):
        await Talk(ScriptedChatEngine(say("ok")), who)()
    assert seen == [{}, frozenset({"all"})] * 2


def test_an_unknown_event_is_refused():
    with pytest.raises(ValueError, match="no hook event 'begin'; use one of connection"):
        Hook("begin", print)  # type: ignore[arg-type]
