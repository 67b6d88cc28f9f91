"""What a turn of an agent costs the gateway's CPU: the loop alone, and with the answer written out as events.

The model is a TEST DOUBLE that streams a scripted answer at once, one chunk a token as vLLM does, so that the figure
is ours alone: folding, hooks, tools, chunks.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from typing import Any

REQUESTS = 400
CONCURRENT = 16
# Chunks of a turn: a call of a tool, then an answer of so many tokens.
TOKENS = 64
TURNS = 2
USAGE = {"prompt_tokens": 400, "completion_tokens": TOKENS, "total_tokens": 400 + TOKENS}


class _ScriptedChat:
    """A test double: the first turn of a conversation calls `add`, the second answers."""

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        answering = body["messages"][-1]["role"] == "tool"
        yield _chunk({"role": "assistant", "content": ""})
        if answering:
            for _ in range(TOKENS):
                yield _chunk({"content": "word "})
        else:
            yield _chunk({"tool_calls": [_part(id="call-1", type="function", name="add", arguments="")]})
            for piece in _pieces('{"a": 47, "b": 182}', TOKENS):
                yield _chunk({"tool_calls": [_part(arguments=piece)]})
        yield _chunk({}, "stop" if answering else "tool_calls")
        yield {"id": "e", "object": "chat.completion.chunk", "choices": [], "usage": USAGE}


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "e", "object": "chat.completion.chunk", "choices": [choice]}


def _part(**fields: Any) -> dict[str, Any]:
    function = {name: fields.pop(name) for name in ("name", "arguments") if name in fields}
    return {"index": 0, "function": function, **fields}


def _pieces(text: str, count: int) -> list[str]:
    """A text in `count` parts, empty ones left out."""
    cuts = [round(index * len(text) / count) for index in range(count + 1)]
    return [text[a:b] for a, b in itertools.pairwise(cuts) if b > a]


def measure() -> dict[str, float]:
    """CPU milliseconds per turn of two turns with one tool call."""
    return asyncio.run(_measure())


async def _measure() -> dict[str, float]:
    from examples.calculator.environment import Calculator
    from rollout.agents import Agent, AgentRun, HeldTurns

    agent = Agent("calculator", Calculator)
    engine, held = _ScriptedChat(), HeldTurns()
    body = {"model": "calculator", "messages": [{"role": "user", "content": "What is 47 + 182?"}], "stream": True}
    written = 0

    async def request() -> None:
        nonlocal written
        async for chunk in AgentRun(agent, body, engine=engine, held=held).chunks():
            written += len(json.dumps(chunk))

    async def client(count: int) -> None:
        for _ in range(count):
            await request()

    await client(8)
    written, started = 0, time.process_time()
    await asyncio.gather(*(client(REQUESTS // CONCURRENT) for _ in range(CONCURRENT)))
    seconds = time.process_time() - started
    if not written:
        raise RuntimeError("the agent said nothing")
    return {"agent_turn_cpu_ms": 1000 * seconds / (REQUESTS * TURNS)}
