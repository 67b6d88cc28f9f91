"""The session loop: model → tools → model …, until one named ending.

Invariant: `run` always returns a trajectory and never raises; whatever happened is in its `stop_reason` and
`error`. Every wait has a deadline. The loop knows neither tokens nor engines: a SessionModel speaks the assistant's
turns, whoever it asks.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable
from typing import Any

from rollout import tracing
from rollout.environment import Environment, EnvironmentFactory, Episode, Turn
from rollout.errors import (
    EngineTimeout,
    EnvironmentError_,
    RolloutError,
    SessionTimeout,
    describe,
)
from rollout.limits import Limits
from rollout.mcp_tools import McpServers
from rollout.rendering import ParsedTurn
from rollout.session_model import SessionModel
from rollout.tasks import Message, Task
from rollout.tool_calls import ToolCall, ToolCallRecord, ToolSet, run_anywhere
from rollout.trajectory import SessionKey, StopReason, Timing, Trajectory

# Endings that are not scored: the system failed, not the policy.
_NOT_SCORED = ("error", "cancelled")


class Session:
    """One attempt at one task."""

    def __init__(
        self,
        key: SessionKey,
        task: Task,
        *,
        environment: EnvironmentFactory,
        model: SessionModel,
        limits: Limits,
        mcp: McpServers | None = None,
        attempt: int = 1,
        queue_s: float = 0.0,
    ) -> None:
        self.key = key
        self.task = task
        self._make_environment = environment
        self._model = model
        self._limits = limits
        self._mcp = mcp
        self._attempt = attempt
        self._messages: list[Message] = []
        self._turns: list[Turn] = []
        self._turn_rewards: list[float | None] = []
        self._tool_calls: list[ToolCallRecord] = []
        self._tools = ToolSet()
        self._timing = Timing(queue_s=queue_s)
        self._environment: Environment | None = None
        self._deadline = math.inf

    async def run(self) -> Trajectory:
        """Play the session to its end and score it."""
        started = time.perf_counter()
        stop_reason, error = await self._play_guarded()
        reward = None
        if stop_reason not in _NOT_SCORED:
            try:
                reward = await self._score(stop_reason)
            except asyncio.CancelledError:
                stop_reason, error = "cancelled", None
            except RolloutError as failure:
                stop_reason, error = "error", failure
        try:
            await self._close()
        except asyncio.CancelledError:
            stop_reason, error = "cancelled", None
        except RolloutError as failure:
            # The trajectory is whole and scored; that its environment did not close is worth a word, no more.
            error = error or failure
        self._timing.engine_s = self._model.engine_seconds
        self._timing.total_s = time.perf_counter() - started
        rewards = self._turn_rewards if any(value is not None for value in self._turn_rewards) else None
        return Trajectory(
            key=self.key,
            segments=self._model.segments,
            stop_reason=stop_reason,
            messages=self._messages,
            reward=reward if stop_reason not in _NOT_SCORED else None,
            turn_rewards=rewards,
            tool_calls=self._tool_calls,
            timing=self._timing,
            error=None if error is None else describe(error),
            metadata=self.task.metadata,
            attempts=self._attempt,
            retryable=isinstance(error, RolloutError) and error.retryable,
        )

    async def _play_guarded(self) -> tuple[StopReason, BaseException | None]:
        try:
            self._environment = self._checked_environment()
            if self._environment.limits is not None:
                self._limits = self._environment.limits
            async with asyncio.timeout(self._limits.session_seconds) as deadline:
                self._deadline = deadline.when() or math.inf
                return await self._play(), None
        except TimeoutError as failure:
            if not deadline.expired():
                return "error", failure
            return "deadline", SessionTimeout(f"the session took longer than {self._limits.session_seconds:g} s")
        except EngineTimeout as failure:
            return "deadline", failure
        except asyncio.CancelledError:
            return "cancelled", None
        except Exception as failure:
            return "error", failure

    async def _play(self) -> StopReason:
        await self._open()
        while True:
            with tracing.span("turn", turn=len(self._turns)) as span:
                ending = await self._turn(span)
            if ending is not None:
                return ending

    async def _turn(self, span: tracing.Span) -> StopReason | None:
        """One turn of the model, and what the world says to it. The ending, if there is no other turn."""
        said = await self._model.turn(len(self._turns), self._messages, deadline=self._deadline)
        self._messages.append(said.message)
        turn = Turn(len(self._turns), said.parsed.content, said.parsed.reasoning, num_tokens=said.num_tokens)
        self._turns.append(turn)
        span.set(output_tokens=said.num_tokens, tool_calls=len(said.parsed.calls))
        if said.ending is not None:
            await self._reward_turn(turn)
            return said.ending
        new_messages, tool_seconds = await self._answer(turn, said.parsed)
        await self._reward_turn(turn)
        if not new_messages:
            return "stop"
        self._messages.extend(new_messages)
        limit = self._limits.max_tool_errors
        if limit is not None and sum(not call.ok for call in self._tool_calls) >= limit:
            return "tool_error"
        if len(self._turns) >= self._limits.max_turns:
            return "max_turns"
        return await self._model.advance(self._messages, new_messages, seconds=tool_seconds)

    def _checked_environment(self) -> Environment:
        try:
            return self._make_environment()
        except RolloutError:
            raise
        except Exception as failure:
            raise EnvironmentError_(f"could not be made: {type(failure).__name__}: {failure}") from failure

    async def _open(self) -> None:
        """Tools and the opening messages."""
        assert self._environment is not None
        tools = self._environment.all_tools()
        for name in self._environment.mcp_servers:
            if self._mcp is None:
                raise EnvironmentError_(f"wants the tools of MCP server {name!r}, but none are configured")
            tools.extend(await self._mcp.tools(name))
        try:
            self._tools = ToolSet(tools)
        except ValueError as failure:
            raise EnvironmentError_(str(failure)) from None
        await self._ask("setup", self.task)
        prompt = self._environment.system_prompt
        if prompt is not None:
            self._messages.append({"role": "system", "content": prompt})
        self._messages.extend(self.task.messages)
        await self._model.open(self._messages, self._tools.specs, self._limits)

    async def _answer(self, turn: Turn, parsed: ParsedTurn) -> tuple[list[Message], float]:
        """What the world says to a turn: tool results, or the environment's reply. Empty: it is over."""
        if not parsed.calls:
            reply = await self._ask("reply", self._episode(None))
            return _checked_reply(reply), 0.0
        started = time.perf_counter()
        results = await self._tools.call_all(
            parsed.calls,
            timeout=self._limits.tool_seconds,
            max_output_chars=self._limits.max_tool_output_chars,
            max_calls=self._limits.max_tool_calls_per_turn,
        )
        seconds = time.perf_counter() - started
        self._timing.tool_s += seconds
        turn.tool_calls = [result.record for result in results]
        self._tool_calls.extend(turn.tool_calls)
        return [_tool_message(result.call, result.content) for result in results], seconds

    async def _reward_turn(self, turn: Turn) -> None:
        value = await self._ask("turn_reward", turn, self._episode(None))
        self._turn_rewards.append(_checked_reward("turn_reward", value))

    async def _score(self, stop_reason: StopReason) -> float | None:
        return _checked_reward("reward", await self._ask("reward", self._episode(stop_reason)))

    async def _close(self) -> None:
        if self._environment is not None:
            await self._ask("close")

    def _episode(self, stop_reason: StopReason | None) -> Episode:
        return Episode(self.task, self._messages, self._turns, stop_reason)

    async def _ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the environment under its deadline. Raises EnvironmentError_ for whatever it raises."""
        environment = self._environment
        if environment is None or getattr(type(environment), name) is getattr(Environment, name):
            # Not overridden: a thread for a method that does nothing would cost more than the turn's bookkeeping.
            return None
        method: Callable[..., Any] = getattr(environment, name)
        seconds = self._limits.environment_seconds
        started = time.perf_counter()
        try:
            with tracing.span("environment", method=name):
                async with asyncio.timeout(seconds) as deadline:
                    return await run_anywhere(_with(method, arguments), {})
        except TimeoutError as failure:
            took = f"took longer than {seconds:g} s" if deadline.expired() else f"raised {failure!r}"
            raise EnvironmentError_(f"{name} {took}") from failure
        except asyncio.CancelledError as failure:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise EnvironmentError_(
                f"{name} raised CancelledError, and nobody had cancelled the session"
            ) from failure
        except RolloutError:
            raise
        except Exception as failure:
            raise EnvironmentError_(f"{name} raised {type(failure).__name__}: {failure}") from failure
        finally:
            self._timing.env_s += time.perf_counter() - started


def _with(method: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        async def call_async() -> Any:
            return await method(*arguments)

        return call_async
    return lambda: method(*arguments)


def _tool_message(call: ToolCall, content: str) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": call.id, "name": call.name or "unknown"}


def _checked_reply(reply: Any) -> list[Message]:
    if reply is None:
        return []
    if not isinstance(reply, list) or not all(isinstance(item, dict) and "role" in item for item in reply):
        raise EnvironmentError_(f"reply returned {type(reply).__name__}, not a list of messages or None")
    if any(item["role"] == "assistant" for item in reply):
        raise EnvironmentError_("reply returned an assistant message: only the policy speaks as the assistant")
    return reply


def _checked_reward(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise EnvironmentError_(f"{name} returned {type(value).__name__}, not a number or None") from None
    if not math.isfinite(number):
        raise EnvironmentError_(f"{name} returned {number}, which is no reward")
    return number
