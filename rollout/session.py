"""The session loop: model → tools → model …, until one named ending.

Invariant: `run` always returns a trajectory and never raises; whatever happened is in its `stop_reason` and
`error`. Every wait has a deadline. Tokens are written by the ledger alone, and a prompt that the engine has not
seen is never recorded. The loop knows neither Ray nor vLLM: an Engine and a ChatRenderer are handed in.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable
from typing import Any

from rollout.engine import Engine, Generation
from rollout.environment import Environment, EnvironmentFactory, Episode, Turn
from rollout.errors import (
    EngineDied,
    EngineRefused,
    EngineTimeout,
    EnvironmentError_,
    RolloutError,
    SessionTimeout,
    describe,
)
from rollout.ledger import Ledger
from rollout.limits import Limits
from rollout.mcp_tools import McpServers
from rollout.rendering import ChatRenderer, ParsedTurn
from rollout.sampling import Sampling, turn_seed
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
        engine: Engine,
        chat: ChatRenderer,
        sampling: Sampling,
        limits: Limits,
        mcp: McpServers | None = None,
        attempt: int = 1,
        queue_s: float = 0.0,
    ) -> None:
        self.key = key
        self.task = task
        self._make_environment = environment
        self._engine = engine
        self._chat = chat
        self._sampling = sampling
        self._limits = limits
        self._mcp = mcp
        self._attempt = attempt
        self._ledger = Ledger()
        self._messages: list[Message] = []
        self._turns: list[Turn] = []
        self._turn_rewards: list[float | None] = []
        self._tool_calls: list[ToolCallRecord] = []
        self._tools = ToolSet()
        self._specs: list[dict[str, Any]] = []
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
        self._timing.total_s = time.perf_counter() - started
        rewards = self._turn_rewards if any(value is not None for value in self._turn_rewards) else None
        return Trajectory(
            key=self.key,
            segments=self._ledger.segments,
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
            generation, budget_reason = await self._generate()
            parsed = await self._parse(generation)
            self._messages.append(parsed.to_message())
            turn = Turn(len(self._turns), parsed.content, parsed.reasoning, num_tokens=len(generation.token_ids))
            self._turns.append(turn)
            if generation.finish_reason == "length":
                # A truncated turn is not acted on: half a tool call is none.
                await self._reward_turn(turn)
                return budget_reason
            new_messages, tool_seconds = await self._answer(turn, parsed)
            await self._reward_turn(turn)
            if not new_messages:
                return "stop"
            self._messages.extend(new_messages)
            limit = self._limits.max_tool_errors
            if limit is not None and sum(not call.ok for call in self._tool_calls) >= limit:
                return "tool_error"
            if len(self._turns) >= self._limits.max_turns:
                return "max_turns"
            ending = await self._advance(new_messages, tool_seconds)
            if ending is not None:
                return ending

    def _checked_environment(self) -> Environment:
        try:
            return self._make_environment()
        except RolloutError:
            raise
        except Exception as failure:
            raise EnvironmentError_(f"could not be made: {type(failure).__name__}: {failure}") from failure

    async def _open(self) -> None:
        """Tools and the first prompt."""
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
        self._specs = self._tools.specs
        await self._ask("setup", self.task)
        prompt = self._environment.system_prompt
        if prompt is not None:
            self._messages.append({"role": "system", "content": prompt})
        self._messages.extend(self.task.messages)
        size = sum(len(str(message.get("content"))) for message in self._messages)
        self._ledger.open(await self._chat.run(size, lambda chat: chat.open(self._messages, self._specs)))

    async def _generate(self) -> tuple[Generation, StopReason]:
        """One generation, and the ending that it means if its length is what stopped it."""
        context = self._ledger.context()
        room = self._engine.max_model_len - len(context)
        if room < 1:
            # Only the very first prompt can come here; later ones are measured before they are recorded.
            raise EngineRefused(
                f"the prompt has {len(context)} tokens and fills the model's context of "
                f"{self._engine.max_model_len}; shorten the task or raise engine.vllm.max_model_len"
            )
        left = self._limits.max_response_tokens - self._ledger.num_response_tokens
        budget = min(self._sampling.max_tokens, room, left)
        reason: StopReason = "max_tokens" if left < min(self._sampling.max_tokens, room) else "length"
        sampling = self._turn_sampling(budget)
        timeout = min(self._limits.engine_seconds, self._deadline - asyncio.get_running_loop().time())
        started = time.perf_counter()
        try:
            generation = await self._engine.generate(
                context, sampling, session_id=self.key.trajectory_id, timeout=timeout
            )
        finally:
            seconds = time.perf_counter() - started
            self._timing.engine_s += seconds
        if generation.finish_reason == "abort":
            raise EngineDied("the engine aborted the request")
        self._ledger.sample(generation, seconds)
        return generation, reason

    def _turn_sampling(self, budget: int) -> dict[str, Any]:
        sampling = self._sampling.to_vllm()
        sampling["max_tokens"] = budget
        if sampling.get("min_tokens", 0) > budget:
            sampling["min_tokens"] = budget
        if not self._sampling.ignore_eos:
            sampling["stop_token_ids"] = [*self._chat.stop_token_ids, *self._sampling.stop_token_ids]
        if self._sampling.seed is not None:
            key = f"{self.key.task_id}/{self.key.sample_index}"
            sampling["seed"] = turn_seed(self._sampling.seed, key, len(self._turns))
        return sampling

    async def _parse(self, generation: Generation) -> ParsedTurn:
        completion = generation.token_ids.tolist()
        context = self._ledger.context()
        prompt = context[: len(context) - len(completion)].tolist()
        turn = len(self._turns)
        return await self._chat.run(len(completion), lambda chat: chat.parse(completion, prompt, self._specs, turn))

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

    async def _advance(self, new_messages: list[Message], seconds: float) -> StopReason | None:
        """Record the next prompt: as an extension of the context, else as a fork. An ending if it does not fit."""
        segment = self._ledger.segments[-1]
        span = segment.turns[-1]
        completion = segment.response_ids[span.start :].tolist()
        prompt_ids = (segment.prompt_ids + segment.response_ids[: span.start]).tolist()
        fork_reason: str | None = None
        size = len(completion) + sum(len(str(message.get("content"))) for message in new_messages)
        prompt = await self._chat.run(
            size, lambda chat: chat.extend(prompt_ids, completion, new_messages, self._specs)
        )
        if prompt is None:
            fork_reason = f"{self._chat.name} does not extend this history"
        elif not self._ledger.extends(prompt):
            prompt, fork_reason = None, f"{self._chat.name} would change sampled tokens"
        if prompt is None:
            prompt = await self._render()
            if self._ledger.extends(prompt):
                # The template itself left the past alone, token by token: that is as good as an extension.
                fork_reason = None
        if len(prompt) >= self._engine.max_model_len:
            return "length"
        added = 0 if fork_reason else len(prompt) - len(prompt_ids) - len(completion)
        if self._ledger.num_response_tokens + added >= self._limits.max_response_tokens:
            return "max_tokens"
        if fork_reason:
            self._ledger.open(prompt, fork_reason)
        else:
            self._ledger.observe(prompt, role=new_messages[0]["role"], seconds=seconds)
        return None

    async def _render(self) -> list[int]:
        size = sum(len(str(message.get("content"))) for message in self._messages)
        return await self._chat.run(size, lambda chat: chat.render(self._messages, self._specs))

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
            async with asyncio.timeout(seconds) as deadline:
                return await run_anywhere(_with(method, arguments), {})
        except TimeoutError as failure:
            took = f"took longer than {seconds:g} s" if deadline.expired() else f"raised {failure!r}"
            raise EnvironmentError_(f"{name} {took}") from failure
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
