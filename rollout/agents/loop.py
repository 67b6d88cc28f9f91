"""The agent loop: model → own tools → model ..., until an answer, or calls that the client must run.

Invariant: what comes out is a stream of valid `chat.completion.chunk` objects with exactly one finish_reason, or an
error; never both. The model is called at most `max_turns` times, and `length` for that is said only where another
call was needed. Every wait has a deadline, and when the stream is closed or cancelled the engine's call and the
tools in flight are cancelled, the environment is closed and the `finalize` hooks run. All state is this object's.

A turn with calls of both kinds: the agent's own are run, the client gets only its own, and the whole turn is held
for the client's return (held_turns.py). An agent with tools holds every turn that it hands to the client, since
ids are shown before it is known what else the turn will bring.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Iterable
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any, TypeVar

from rollout.agents.agent import Agent, opened
from rollout.agents.chat_engine import ChatEngine, ChatEngineError, Chunk
from rollout.agents.held_turns import HeldCall, HeldTurn, TurnStore, new_key, restore, shown_id
from rollout.agents.hooks import Ending, HookChain, RequestContext
from rollout.agents.request import ChatRequest, parse_request, with_system_prompt
from rollout.agents.scopes import rank
from rollout.agents.stream import Folded, StreamedCall, TurnStream, UsageSum
from rollout.agents.tools_merge import MergedTools, choice_of_turn, first_choice, merge
from rollout.errors import ApiError, ToolError
from rollout.mcp_tools import McpServers
from rollout.strict_json import as_unicode
from rollout.tasks import Message
from rollout.tool_calls import ToolCall, ToolCallRecord, ToolResult, ToolSet

T = TypeVar("T")

# Between the texts of two turns of one answer, which would otherwise run into each other.
TURN_SEPARATOR = "\n\n"
# Of arguments that are no JSON, so much is quoted to the model.
MAX_QUOTED = 500


class AgentTimeout(ApiError):
    """The request took longer than its agent allows."""

    category = "timeout"
    status = 504


class AgentRun:
    """One request to an agent. `chunks` is to be iterated once, and closed where it is left early."""

    def __init__(
        self,
        agent: Agent,
        body: Any,
        *,
        engine: ChatEngine,
        held: TurnStore,
        scopes: Iterable[str] = ("all",),
        mcp: McpServers | None = None,
    ) -> None:
        self._agent = agent
        self._body = body
        self._engine = engine
        self._held = held
        self._mcp = mcp
        self._scopes = frozenset(scopes)
        self.request_id = f"chatcmpl-{uuid.uuid4().hex}"
        self.ending = Ending()
        self._created = int(time.time())
        self._context = RequestContext(self.request_id, agent.name, self._scopes)
        self._hooks = HookChain(agent.hooks, self._context, agent.limits.hook_seconds)
        self._usage = UsageSum()
        self._shown = Folded()
        self._separate: set[str] = set()
        self._generated: list[Message] = []
        self._history: list[Message] = []
        self._key = new_key()
        self._deadline = 0.0

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The answer: chunks with its parts, one with the finish_reason, one with the usage (`choices: []`).

        Raises ApiError, ChatEngineError and other RolloutErrors, with a message for the caller.
        """
        self._deadline = asyncio.get_running_loop().time() + self._agent.limits.total_seconds
        try:
            # A generator that is left early closes those inside it only where it is told to.
            async with aclosing(self._answer()) as answer:
                async for chunk in answer:
                    yield chunk
        except BaseException as failure:
            self.ending.error = failure
            raise
        finally:
            self.ending.usage = self._usage.total
            finalizing = asyncio.ensure_future(self._hooks.finalize(self.ending))
            # Shielded: a client that hangs up twice still gets its request finalized.
            await asyncio.shield(finalizing)

    async def _answer(self) -> AsyncGenerator[Chunk, None]:
        caller = rank(self._scopes)
        await self._within(self._hooks.fire("connection", None))
        self._body = await self._within(self._hooks.fire("request", self._body))
        request = parse_request(self._body, self._agent.name)
        async with AsyncExitStack() as stack:
            environment = opened(self._agent, request.task, self._mcp)
            ready = await self._within(stack.enter_async_context(environment))
            merged = merge(ready.tools, self._agent.scopes, caller, request.tools)
            choice = first_choice(request.tool_choice, merged)
            restoring = restore(request.messages, self._held, agent=self._agent.name, rank=caller)
            self._history = with_system_prompt(ready.environment.system_prompt, await self._within(restoring))
            async with aclosing(self._play(request, merged, choice, caller)) as played:
                async for chunk in played:
                    if self._hooks.has("chunk"):
                        chunk = await self._within(self._hooks.fire("chunk", chunk))
                    self._shown.add(chunk)
                    yield chunk
        await self._within(self._hooks.fire("message", self._shown.message))
        assert self.ending.finish_reason is not None
        yield self._chunk({"delta": {}, "finish_reason": self.ending.finish_reason})
        yield {**self._chunk(None), "usage": self._usage.total}

    async def _play(
        self, request: ChatRequest, merged: MergedTools, choice: Any, caller: int
    ) -> AsyncGenerator[Chunk, None]:
        """The turns. Sets the ending's finish_reason."""
        opening = True
        while self.ending.finish_reason is None:
            if request.max_tokens is not None and self._usage.sampled >= request.max_tokens:
                self.ending.finish_reason = "length"
                return
            self._context.turn += 1
            body = await self._within(self._hooks.fire("before_llm_call", self._engine_body(request, merged, choice)))
            turn = TurnStream(merged.kind, self._id_of(merged), request.show_reasoning)
            async with aclosing(self._generate(body, turn)) as generated:
                async for shown in generated:
                    if opening:
                        # Said at once, even where the first turn shows nothing: the caller sees that it goes on.
                        yield self._chunk({"delta": {"role": "assistant", "content": ""}})
                        opening = False
                    if shown:
                        yield self._chunk(self._separated(shown))
            self._usage.add(turn.usage)
            self._separate = {name for name in ("content", turn.reasoning_name) if self._shown.message.get(name)}
            self._generated.append(turn.message())
            await self._within(self._hooks.fire("after_llm_call", self._generated[-1]))
            self.ending.finish_reason = self._ends(turn)
            if self.ending.finish_reason is not None:
                return
            results = await self._within(self._run(turn.hidden, merged))
            if self._agent.show_tool_calls:
                for result in results:
                    yield self._event(result)
            if turn.external:
                await self._hold(turn, merged, results, caller)
                self.ending.finish_reason = "tool_calls"
                return
            self._generated.extend(map(_tool_message, turn.hidden, results))

    def _ends(self, turn: TurnStream) -> str | None:
        """The finish_reason of the whole answer, where this turn is its last and asks for nothing."""
        if turn.finish_reason in ("length", "content_filter"):
            # A truncated turn is not acted on: half a tool call is none.
            return turn.finish_reason
        if turn.finish_reason not in ("stop", "tool_calls"):
            raise ChatEngineError(502, f"the model ended its turn with {turn.finish_reason!r}")
        if not turn.calls:
            return "stop"
        if not turn.external and self._context.turn >= self._agent.limits.max_turns:
            return "length"
        return None

    def _engine_body(self, request: ChatRequest, merged: MergedTools, choice: Any) -> dict[str, Any]:
        body: dict[str, Any] = {**request.parameters, "messages": [*self._history, *self._generated]}
        if self._agent.model is not None:
            body["model"] = self._agent.model
        if request.max_tokens is not None:
            body["max_completion_tokens"] = request.max_tokens - self._usage.sampled
        if merged.specs:
            body["tools"] = merged.specs
            of_turn = choice_of_turn(choice, self._context.turn)
            if of_turn is not None:
                body["tool_choice"] = of_turn
        else:
            body.pop("parallel_tool_calls", None)
        return body

    def _id_of(self, merged: MergedTools) -> Any:
        # An agent without tools of its own holds nothing, and any server can go on with its conversations.
        return (lambda _, index: shown_id(self._key, index)) if merged.has_internal else (lambda told, _: told)

    async def _generate(self, body: dict[str, Any], turn: TurnStream) -> AsyncGenerator[dict[str, Any], None]:
        """One model call: for every chunk of the engine the choice to show, perhaps empty."""
        stream = self._engine.stream(body)
        try:
            while True:
                try:
                    chunk = await self._within(anext(stream))
                except StopAsyncIteration:
                    break
                yield turn.feed(chunk)
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
        if turn.finish_reason is None:
            raise ChatEngineError(502, "the model's stream ended in the middle, without a finish_reason")
        if rest := turn.end():
            yield rest

    async def _run(self, calls: list[StreamedCall], merged: MergedTools) -> list[ToolResult]:
        """Answer the calls that are not the client's, all at once; results in the order of the calls."""
        tasks = [asyncio.ensure_future(self._run_one(index, call, merged)) for index, call in enumerate(calls)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            # A hook that failed, a deadline or a client that hung up ends the other calls too.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_one(self, index: int, call: StreamedCall, merged: MergedTools) -> ToolResult:
        limits = self._agent.limits
        asked = call.to_tool_call()
        if call.kind == "unknown":
            return _refused(asked, "unknown_tool", merged.unknown(call.name))
        if index >= limits.max_tool_calls_per_turn:
            return _refused(asked, "refused", f"Error: more than {limits.max_tool_calls_per_turn} calls in one turn")
        try:
            asked = await self._hooks.fire("before_tool_call", asked)
        except ToolError as failure:
            result = _refused(asked, "refused", f"Error: {failure}")
        else:
            tools: ToolSet = merged.internal
            result = await tools.call(
                asked, timeout=limits.tool_seconds, max_output_chars=limits.max_tool_output_chars
            )
        if not result.record.ok and not call.is_object:
            quoted = f"{result.content}; you wrote: {call.arguments[:MAX_QUOTED]}"
            result = ToolResult(result.call, quoted, result.record, result.outcome)
        result = await self._hooks.fire("after_tool_call", result)
        # The engine and the client could not be told the halves of characters that a cut text ends with.
        return replace(result, content=as_unicode(result.content))

    async def _hold(self, turn: TurnStream, merged: MergedTools, results: list[ToolResult], caller: int) -> None:
        """Keep everything since the request, for the client's return with the rest of the answers."""
        if not merged.has_internal:
            return
        answers = iter(results)
        calls = [
            HeldCall(call.id, call.name, call.shown_id, None)
            if call.kind == "external"
            else HeldCall(call.id, call.name, None, next(answers).content)
            for call in turn.calls
        ]
        held = HeldTurn(self._key, self._agent.name, caller, tuple(self._generated), tuple(calls))
        await self._within(self._held.put(held))

    def _separated(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The first text of a later turn, set off from what has been shown."""
        delta = choice["delta"]
        for name in self._separate & delta.keys():
            delta = {**delta, name: TURN_SEPARATOR + delta[name]}
            self._separate.discard(name)
        return {**choice, "delta": delta}

    def _chunk(self, choice: dict[str, Any] | None) -> Chunk:
        choices = [] if choice is None else [{"index": 0, "finish_reason": None, **choice}]
        return {
            "id": self.request_id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._agent.name,
            "choices": choices,
        }

    def _event(self, result: ToolResult) -> Chunk:
        event = {
            "type": "tool_call",
            "name": result.record.name,
            "arguments": result.call.arguments,
            "ok": result.record.ok,
            "seconds": result.record.seconds,
            "content": result.content,
        }
        return {**self._chunk({"delta": {}}), "agent_event": event}

    async def _within(self, work: Awaitable[T]) -> T:
        """Wait, but not beyond the request's deadline. Raises AgentTimeout."""
        try:
            async with asyncio.timeout_at(self._deadline) as deadline:
                return await work
        except TimeoutError:
            if not deadline.expired():
                raise
            seconds = self._agent.limits.total_seconds
            raise AgentTimeout(f"agent {self._agent.name!r} took longer than {seconds:g} s") from None


def _tool_message(call: StreamedCall, result: ToolResult) -> Message:
    # The id is the model's: a hook may have put another call in the place of this one.
    return {"role": "tool", "content": result.content, "tool_call_id": call.id, "name": call.name or "unknown"}


def _refused(call: ToolCall, outcome: Any, content: str) -> ToolResult:
    record = ToolCallRecord(call.name or "", False, 0.0, f"{outcome}: {content.removeprefix('Error: ')}"[:500])
    return ToolResult(call, content, record, outcome)
