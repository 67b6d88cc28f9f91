"""A TEST DOUBLE: a chat engine that streams scripted turns, and the agent that most tests talk to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rollout.agents import Agent, AgentLimits, AgentRun, Folded, HeldTurns
from rollout.environment import Environment
from rollout.tools import tool

Chunk = dict[str, Any]
USAGE = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}


class ScriptedChatEngine:
    """Turn number n of the script answers call number n, whoever calls.

    A turn is a list of chunks; an exception in it is raised there, a number of seconds is waited there.
    """

    def __init__(self, *turns: Sequence[Chunk | Exception | float]) -> None:
        self.turns = list(turns)
        self.bodies: list[dict[str, Any]] = []
        self.cancelled = 0
        self.waiting = asyncio.Event()

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[Chunk]:
        self.bodies.append(body)
        try:
            for item in self.turns[len(self.bodies) - 1]:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, float):
                    self.waiting.set()
                    await asyncio.sleep(item)
                else:
                    yield item
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


def delta(finish: str | None = None, **fields: Any) -> Chunk:
    """One chunk of an engine."""
    return {"id": "e", "object": "chat.completion.chunk", "choices": [choice(finish, **fields)]}


def choice(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"index": 0, "delta": fields, "finish_reason": finish}


def usage(**numbers: Any) -> Chunk:
    """vLLM's usage chunk."""
    return {"id": "e", "object": "chat.completion.chunk", "choices": [], "usage": numbers or USAGE}


def fragment(index: int, id: str | None = None, name: str | None = None, arguments: str | None = None) -> Any:
    """A part of a tool call as it is streamed."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {"index": index, "function": function} | ({"id": id, "type": "function"} if id else {})


def say(*texts: str, finish: str = "stop") -> list[Any]:
    """A turn of text alone."""
    return [delta(role="assistant", content=""), *(delta(content=text) for text in texts), delta(finish), usage()]


def ask(*calls: tuple[str, str], content: str = "", finish: str = "tool_calls") -> list[Any]:
    """A turn that calls tools, (name, arguments) each; arguments come in two pieces."""
    chunks = [delta(role="assistant", content=content)]
    for index, (name, arguments) in enumerate(calls):
        half = len(arguments) // 2
        chunks.append(delta(tool_calls=[fragment(index, f"e{index}", name, "")]))
        chunks += [
            delta(tool_calls=[fragment(index, None, None, part)]) for part in (arguments[:half], arguments[half:])
        ]
    return [*chunks, delta(finish), usage()]


def client_tool(name: str) -> dict[str, Any]:
    """A tool that a request brings."""
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


@tool
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def secret() -> str:
    """Read a secret."""
    return "s3cret"


class Adder(Environment):
    """Two tools under a prompt."""

    system_prompt = "PROMPT"
    tools = (add, secret)


class Bare(Environment):
    """Nothing at all."""


USER = {"role": "user", "content": "2+3?"}


def agent(environment: Any = Adder, limits: dict[str, Any] | None = None, **fields: Any) -> Agent:
    """An agent called adder."""
    return Agent("adder", environment, limits=AgentLimits(**limits or {}), **fields)


class Talk:
    """Requests to one agent, with one store of held turns."""

    def __init__(self, engine: Any, who: Agent | None = None, *, held: HeldTurns | None = None) -> None:
        self.engine = engine
        self.agent = who or agent()
        self.held = held or HeldTurns()
        self.chunks: list[Chunk] = []
        self.last: AgentRun | None = None

    def run(self, *messages: dict[str, Any], scopes: Sequence[str] = ("all",), **fields: Any) -> AgentRun:
        body = {"model": "adder", "messages": list(messages or (USER,)), **fields}
        self.last = AgentRun(self.agent, body, engine=self.engine, held=self.held, scopes=scopes)
        return self.last

    async def __call__(self, *messages: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The chat.completion; its chunks stay in `chunks`."""
        folded = Folded()
        self.chunks = []
        async for chunk in self.run(*messages, **options).chunks():
            self.chunks.append(chunk)
            folded.add(chunk)
        return folded.completion


def message_of(completion: dict[str, Any]) -> dict[str, Any]:
    """The message of a completion."""
    return completion["choices"][0]["message"]


def finish_of(completion: dict[str, Any]) -> str:
    """The finish_reason of a completion."""
    return completion["choices"][0]["finish_reason"]
