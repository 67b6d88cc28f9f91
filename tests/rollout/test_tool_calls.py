"""Running tool calls: every call is answered in time, whatever the model wrote and the tool does."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from rollout import tool_calls
from rollout.errors import ToolError
from rollout.tool_calls import ToolCall, ToolResult, ToolSet, abandoned_threads, run_anywhere, to_text
from rollout.tools import Tool, tool

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@tool
def add(a: int, b: int = 1) -> int:
    """Add."""
    return a + b


@tool
async def fail(kind: str) -> str:
    """Fail."""
    if kind == "tool":
        raise ToolError("the disk is full")
    raise KeyError(kind)


@tool
async def hang() -> str:
    """Hang."""
    await asyncio.Event().wait()
    return "never"


@tool
def long(size: int) -> str:
    """Give a long text."""
    return "x" * size


TOOLS = ToolSet([add, fail, hang, long])


async def run(name: str | None, arguments: Any = None, *, tools: ToolSet = TOOLS, **limits: Any) -> ToolResult:
    limits = {"timeout": 5.0, "max_output_chars": 100} | limits
    return await tools.call(ToolCall("1", name, arguments), **limits)


def only(function: Any) -> ToolSet:
    return ToolSet([tool(function)])


async def test_a_call_that_works():
    result = await run("add", {"a": 2, "b": 3})
    assert (result.content, result.outcome) == ("5", "ok")
    assert (result.record.name, result.record.ok, result.record.error) == ("add", True, None)
    assert 0 <= result.record.seconds < 5
    assert result.call == ToolCall("1", "add", {"a": 2, "b": 3})


@pytest.mark.parametrize("arguments", ['{"a": 2, "b": 3}', {"a": "2", "b": 3}, {"a": 2.0, "b": 3}])
async def test_arguments_may_be_json_text_and_are_converted(arguments: Any):
    assert (await run("add", arguments)).content == "5"


async def test_defaults_fill_in():
    assert (await run("add", {"a": 2})).content == "3"
    assert (await run("hang", "  ", timeout=0.01)).outcome == "timeout", "no text means no arguments"


@pytest.mark.parametrize(
    ("name", "arguments", "outcome", "message"),
    [
        ("nope", {}, "unknown_tool", "there is no tool called 'nope'; the tools are: add, fail, hang, long"),
        (None, {}, "unknown_tool", "there is no tool called None; the tools are: add, fail, hang, long"),
        ("add", {}, "invalid_arguments", "invalid arguments for add: a: Field required"),
        ("add", None, "invalid_arguments", "invalid arguments for add: a: Field required"),
        (
            "add",
            {"a": 1, "c": 2},
            "invalid_arguments",
            "invalid arguments for add: c: Extra inputs are not permitted",
        ),
        (
            "add",
            {"a": "two", "b": []},
            "invalid_arguments",
            "invalid arguments for add: a: Input should be a valid integer, unable to parse string as an integer; "
            "b: Input should be a valid integer",
        ),
        ("add", "[1, 2]", "invalid_arguments", "the arguments of add must be an object, not list"),
        ("add", "7", "invalid_arguments", "the arguments of add must be an object, not int"),
        ("fail", {"kind": "tool"}, "exception", "the disk is full"),
        ("fail", {"kind": "other"}, "exception", "KeyError: 'other'"),
        (
            "long",
            {"size": 101},
            "oversize",
            "the result of long has 101 characters, more than 100; ask for less",
        ),
    ],
)
async def test_what_goes_wrong_is_told_to_the_model_and_recorded(
    name: str | None, arguments: Any, outcome: str, message: str
):
    result = await run(name, arguments)
    assert (result.outcome, result.content) == (outcome, f"Error: {message}")
    assert (result.record.ok, result.record.name) == (False, name or "")
    assert result.record.error == f"{outcome}: {message}"[:500]


async def test_a_result_of_the_greatest_length_is_whole():
    assert (await run("long", {"size": 100})).content == "x" * 100


async def test_half_a_character_of_a_result_is_replaced():
    @tool
    def cut(fail: bool) -> dict[str, str]:
        """Cut a text inside a character."""
        if fail:
            raise ValueError("b\ud83d")
        return {"text": "a\ud83d"}

    told = [
        await ToolSet([cut]).call(ToolCall("1", "cut", {"fail": fail}), timeout=5, max_output_chars=99)
        for fail in (0, 1)
    ]
    assert [result.content for result in told] == ['{"text": "a?"}', "Error: ValueError: b?"]


async def test_json_that_does_not_parse():
    result = await run("add", '{"a": ')
    assert result.outcome == "invalid_arguments"
    assert result.content.startswith("Error: the arguments of add are not JSON: ")


async def test_a_call_that_was_malformed_is_not_run():
    call = ToolCall("1", "add", None, malformed="no closing brace", raw="{")
    result = await TOOLS.call(call, timeout=1, max_output_chars=10)
    assert (result.outcome, result.content, result.record.error) == (
        "malformed",
        "Error: no closing brace",
        "malformed: no closing brace",
    )


async def test_without_tools_none_is_named():
    result = await run("add", tools=ToolSet())
    assert result.content == "Error: there is no tool called 'add'; the tools are: none"


async def test_messages_are_bounded():
    result = await run("n" * 10_000)
    assert (len(result.content), len(result.record.error or "")) == (2000, 500)


async def test_a_time_out_is_told_and_recorded():
    result = await run("hang", timeout=0.05)
    assert (result.outcome, result.content) == ("timeout", "Error: hang did not answer within 0.05 s")
    assert 0.05 <= result.record.seconds < 5


async def test_a_tools_own_timeout_is_its_exception():
    def connect() -> str:
        """Connect."""
        raise TimeoutError("port 80")

    result = await run("connect", tools=only(connect), timeout=60)
    assert (result.outcome, result.content) == ("exception", "Error: TimeoutError: port 80")


async def test_json_that_is_nested_too_deep():
    assert (await run("add", "[" * 100_000)).outcome == "invalid_arguments"


@pytest.mark.parametrize("kind", ["deep", "angry"])
async def test_a_result_that_cannot_be_written(kind: str):
    class Angry:
        def __str__(self) -> str:
            raise RuntimeError("no")

    def give(kind: str) -> Any:
        """Give."""
        if kind == "angry":
            return Angry()
        value: list[Any] = []
        for _ in range(100_000):
            value = [value]
        return value

    assert (await run("give", {"kind": kind}, tools=only(give))).outcome == "exception"


async def test_a_tool_that_calls_exit_ends_nothing_else():
    def leave() -> str:
        """Leave."""
        sys.exit(3)

    try:
        result = await run("leave", tools=only(leave))
    except SystemExit as left:
        raise AssertionError("SystemExit reached the session") from left
    assert result.outcome == "exception"


async def test_a_tool_that_raises_cancelled_by_itself_has_failed():
    async def lost() -> str:
        """Lose the connection."""
        raise asyncio.CancelledError

    try:
        result = await run("lost", tools=only(lost))
    except asyncio.CancelledError:
        raise AssertionError("it reached the session as a cancellation") from None
    assert result.outcome == "exception"


async def test_a_tool_that_raises_stop_iteration_has_failed():
    def first() -> str:
        """Take the first."""
        return next(iter(()))

    assert (await run("first", tools=only(first))).content == "Error: RuntimeError: StopIteration: "


async def test_a_circular_result_is_an_error():
    def circle() -> Any:
        """Go round."""
        value: list[Any] = []
        value.append(value)
        return value

    result = await run("circle", tools=only(circle))
    assert result.content == "Error: the result of circle cannot be written as text: Circular reference detected"


async def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tools are called 'add'"):
        ToolSet([add, fail, add])


def test_specs_are_in_the_order_given():
    assert [spec["function"]["name"] for spec in TOOLS.specs] == ["add", "fail", "hang", "long"]
    assert (len(TOOLS), len(ToolSet())) == (4, 0)


# Turns of several calls


async def test_the_calls_of_a_turn_run_together_and_are_answered_in_order():
    arrived: list[str] = []
    all_there = asyncio.Event()

    async def meet(name: str) -> str:
        """Wait for the others."""
        arrived.append(name)
        if len(arrived) == 3:
            all_there.set()
        await all_there.wait()
        return name

    calls = [ToolCall(str(i), "meet", {"name": name}) for i, name in enumerate("abc")]
    results = await only(meet).call_all(calls, timeout=5, max_output_chars=10, max_calls=3)
    assert [result.content for result in results] == ["a", "b", "c"]
    assert [result.call.id for result in results] == ["0", "1", "2"]


async def test_a_failing_call_leaves_the_others_alone():
    calls = [
        ToolCall("0", "fail", {"kind": "x"}),
        ToolCall("1", "add", {"a": 1}),
        ToolCall("2", "hang", {}),
        ToolCall("3", "nope", {}),
    ]
    results = await TOOLS.call_all(calls, timeout=0.1, max_output_chars=100, max_calls=10)
    assert [result.outcome for result in results] == ["exception", "ok", "timeout", "unknown_tool"]


async def test_calls_beyond_the_limit_are_refused_and_not_run():
    ran: list[int] = []

    def mark(i: int) -> str:
        """Mark."""
        ran.append(i)
        return "ok"

    calls = [ToolCall(str(i), "mark", {"i": i}) for i in range(4)]
    results = await only(mark).call_all(calls, timeout=5, max_output_chars=10, max_calls=2)
    assert [result.outcome for result in results] == ["ok", "ok", "refused", "refused"]
    assert results[2].content == "Error: more than 2 calls in one turn"
    assert sorted(ran) == [0, 1]


async def test_no_calls_have_no_results():
    assert await TOOLS.call_all([], timeout=1, max_output_chars=10, max_calls=1) == []


async def test_cancelling_the_turn_stops_its_calls():
    stopped = asyncio.Event()
    started = asyncio.Event()

    async def watch() -> str:
        """Watch."""
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return ""

    calls = [ToolCall("0", "watch", {}), ToolCall("1", "watch", {})]
    turn = asyncio.create_task(only(watch).call_all(calls, timeout=5, max_output_chars=10, max_calls=2))
    await started.wait()
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    assert stopped.is_set()


# Threads


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_synchronous_call_runs_off_the_event_loop(gate: threading.Event):
    def block() -> str:
        """Block."""
        gate.wait(5)
        return threading.current_thread().name

    call = asyncio.create_task(run("block", tools=only(block)))
    await asyncio.sleep(0.02)
    assert not call.done(), "the loop goes on while the tool blocks"
    gate.set()
    assert (await call).content == "block", "a thread of its own, named for the tool"


async def test_a_thread_that_outlives_its_deadline_is_counted_until_it_ends(gate: threading.Event):
    def block() -> str:
        """Block."""
        gate.wait(5)
        return "late"

    before = abandoned_threads()
    assert (await run("block", tools=only(block), timeout=0.02)).outcome == "timeout"
    assert abandoned_threads() == before + 1
    gate.set()
    await until(lambda: abandoned_threads() == before)


async def test_too_many_abandoned_threads_refuse_synchronous_calls_only(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch
):
    def block() -> str:
        """Block."""
        gate.wait(5)
        return "late"

    before = abandoned_threads()
    monkeypatch.setattr(tool_calls, "MAX_ABANDONED_THREADS", before + 1)
    await run("block", tools=only(block), timeout=0.02)
    result = await run("add", {"a": 1})
    assert (result.outcome, result.record.ok) == ("refused", False)
    assert "earlier synchronous calls in this worker never returned" in result.content
    assert (await run("fail", {"kind": "tool"})).outcome == "exception", "an async tool still runs"
    gate.set()
    await until(lambda: abandoned_threads() == before)
    assert (await run("add", {"a": 1})).content == "2"


async def test_threads_see_the_callers_context():
    variable.set("here")
    assert await run_anywhere(lambda: variable.get(), {}) == "here"


class Callable_:
    """An object whose call is async, which inspect does not call a coroutine function."""

    async def __call__(self, x: int) -> int:
        return x + 1


async def plus_one(x: int) -> int:
    return x + 1


@pytest.mark.parametrize("function", [plus_one, functools.partial(plus_one), Callable_(), lambda x: x + 1])
async def test_all_kinds_of_functions_run(function: Any):
    assert await run_anywhere(function, {"x": 1}) == 2


# Tools that have a JSON schema alone


def schema_tool(parameters: dict[str, Any]) -> ToolSet:
    return ToolSet([Tool("remote", "Remote.", parameters, lambda **arguments: json.dumps(arguments))])


async def test_a_schema_alone_is_checked_too():
    parameters = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "inner": {"type": "object", "required": ["x"]}},
        "required": ["n"],
    }
    tools = schema_tool(parameters)
    assert (await run("remote", {"n": 1, "inner": {"x": 2}}, tools=tools)).content == '{"n": 1, "inner": {"x": 2}}'
    assert (await run("remote", {}, tools=tools)).content == (
        "Error: invalid arguments for remote: arguments: 'n' is a required property"
    )
    assert (await run("remote", {"n": "1", "inner": {}}, tools=tools)).content == (
        "Error: invalid arguments for remote: n: '1' is not of type 'integer'; inner: 'x' is a required property"
    )


async def test_a_schema_never_makes_this_process_fetch_something(monkeypatch: pytest.MonkeyPatch):
    reached: list[object] = []

    def no_network(*address: object, **_: object) -> None:
        reached.append(address)
        raise OSError("no network here")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    result = await run("remote", {}, tools=schema_tool({"$ref": "http://127.0.0.1:9/schema.json"}))
    assert result.outcome == "invalid_arguments"
    assert result.content.startswith("Error: the schema of remote cannot be used: ")
    assert reached == []


async def test_a_schema_that_is_none_is_an_error_of_the_call():
    result = await run("remote", {"a": 1}, tools=schema_tool({"type": "nonsense"}))
    assert result.content.startswith("Error: the schema of remote cannot be used: UnknownType")


class Answer(BaseModel):
    """A result."""

    value: int


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ("", ""),
        (None, "null"),
        (5, "5"),
        ([1, "é"], '[1, "é"]'),
        ({"a": True}, '{"a": true}'),
        (Answer(value=3), '{"value":3}'),
    ],
)
def test_results_as_text(value: Any, text: str):
    assert to_text(value) == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.none() | st.text(max_size=10) | st.just("add"), json_values)
def test_whatever_the_model_writes_is_answered(name: str | None, arguments: Any):
    result = asyncio.run(run(name, arguments))
    assert result.record.ok == (result.outcome == "ok")
    assert result.record.ok or result.content.startswith("Error: ")
