"""One rollout, played for a foreign trainer: the session loop of every other rollout, with the trainer as its model.

Invariant: `play` returns exactly one answer, whatever happens, and never raises; it can be written as JSON, every
tool call in its final messages has an answer, and the last assistant message is there however the rollout ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from rollout.environment import Environment, EnvironmentFactory
from rollout.errors import RolloutError, describe
from rollout.limits import Limits
from rollout.mcp_tools import McpServers
from rollout.remote.failures import RemoteFailure, foreign_words
from rollout.remote.order import RolloutOrder
from rollout.remote.tokenizers import Tokenizers
from rollout.remote.trainer_client import TrainerClient
from rollout.remote.trainer_model import TrainerModel, given_calls
from rollout.remote.wire import ErrorCategory, FinishReason, Metrics, RolloutResponse
from rollout.session import Session
from rollout.tasks import Message, Task
from rollout.tool_calls import ToolSet, run_anywhere
from rollout.trajectory import SessionKey, StopReason, Trajectory

logger = logging.getLogger(__name__)

# Key of the run under which these sessions go. There is no such run: they leave nothing in the record.
RUN = "remote"
NOT_RUN = "Error: the rollout ended before this call was run"
# How an ending that is no failure is called on the wire.
_FINISHED: dict[StopReason, FinishReason] = {
    "stop": "stop",
    "length": "max_tokens",
    "max_tokens": "max_tokens",
    "max_turns": "max_turns",
}
_FAILED: dict[StopReason, tuple[ErrorCategory, str]] = {
    "tool_error": ("tool_error", "too many tool calls of this rollout failed"),
    "cancelled": ("internal_error", "the rollout was cancelled by the rollout server"),
}


async def play(
    order: RolloutOrder,
    *,
    environment: EnvironmentFactory,
    limits: Limits,
    tokenizers: Tokenizers,
    client: Callable[[], TrainerClient],
    mcp: McpServers | None = None,
    queue_s: float = 0.0,
) -> RolloutResponse:
    """Play an order to its end. `limits`: the server's own; the order's turns and tokens count beside them."""
    started = time.perf_counter()
    try:
        return await _play(order, environment, limits, tokenizers, client, mcp, queue_s, started)
    except asyncio.CancelledError:
        return failed(order, RemoteFailure(*_FAILED["cancelled"]), seconds=time.perf_counter() - started)
    except RemoteFailure as failure:
        return failed(order, failure, seconds=time.perf_counter() - started)
    except Exception as failure:
        logger.exception("rollout %r failed", order.rollout_id)
        words = foreign_words(describe(failure) if isinstance(failure, RolloutError) else None)
        return failed(order, words, seconds=time.perf_counter() - started)


def failed(order: RolloutOrder, failure: RemoteFailure, *, seconds: float = 0.0) -> RolloutResponse:
    """The answer to a rollout of which nothing was played, or nothing is left."""
    return RolloutResponse(
        rollout_id=order.rollout_id,
        status="ERROR",
        final_messages=order.messages,
        finish_reason="error",
        error_message=failure.message,
        metrics=Metrics(total_latency_ms=1000 * seconds),
        extra_fields={"error_category": failure.error_category},
    )


async def tool_specs(environment: EnvironmentFactory, mcp: McpServers | None) -> list[dict[str, Any]]:
    """The tools that rollouts are played with, in OpenAI's form. Raises RolloutError."""
    made = await asyncio.to_thread(environment)
    try:
        tools = made.all_tools()
        for name in made.mcp_servers:
            if mcp is not None:
                tools.extend(await mcp.tools(name))
        return ToolSet(tools).specs
    finally:
        await run_anywhere(made.close, {})


async def _play(
    order: RolloutOrder,
    environment: EnvironmentFactory,
    limits: Limits,
    tokenizers: Tokenizers,
    make_client: Callable[[], TrainerClient],
    mcp: McpServers | None,
    queue_s: float,
    started: float,
) -> RolloutResponse:
    chat = await tokenizers.get(order.tokenizer_name, order.tokenizer_revision)
    client = make_client()
    try:
        model = TrainerModel(order, client, chat)
        session = Session(
            SessionKey(RUN, order.rollout_id, f"{RUN}/{order.rollout_id}", 0),
            _task(order),
            environment=lambda: _fitted(environment(), order, limits),
            model=model,
            limits=_limits(limits, order),
            mcp=mcp,
            queue_s=queue_s,
        )
        trajectory = await session.run()
    finally:
        await client.close()
    return _answer(order, trajectory, model, 1000 * (time.perf_counter() - started))


def _task(order: RolloutOrder) -> Task:
    """The order as a task. Its metadata is what the environment scores with."""
    data = dict(order.metadata)
    if order.tool_server_url is not None:
        data.setdefault("tool_server_url", order.tool_server_url)
    # The wire has checked the messages by its own rules, which know a role more.
    return Task.model_construct(
        task_id=order.rollout_id,
        messages=list(order.messages),
        data=data,
        metadata=dict(order.metadata),
        environment=None,
    )


def _limits(limits: Limits, order: RolloutOrder) -> Limits:
    """The server's limits, with the trainer's bounds of its own rollout in their place."""
    return limits.model_copy(update={"max_turns": order.max_turns, "max_response_tokens": order.max_tokens_total})


def _fitted(environment: Environment, order: RolloutOrder, limits: Limits) -> Environment:
    """An environment for one order: the order's limits win over its own, and the trainer's system prompt too."""
    if environment.limits is not None:
        own = environment.limits
        seconds = min(own.session_seconds, limits.session_seconds)
        environment.limits = _limits(own.model_copy(update={"session_seconds": seconds}), order)
    if environment.system_prompt is not None and any(message["role"] == "system" for message in order.messages):
        environment.system_prompt = None
    return environment


def _answer(order: RolloutOrder, trajectory: Trajectory, model: TrainerModel, total_ms: float) -> RolloutResponse:
    failure = _failure(order, trajectory, model)
    extra: dict[str, Any] = {"stop_reason": trajectory.stop_reason}
    if failure is not None:
        extra["error_category"] = failure.error_category
    return RolloutResponse(
        rollout_id=order.rollout_id,
        status="COMPLETED" if failure is None else "ERROR",
        final_messages=answered(_sendable(trajectory.messages or order.messages)),
        finish_reason="error" if failure is not None else _FINISHED[trajectory.stop_reason],
        error_message=None if failure is None else failure.message,
        reward=None if failure is not None else trajectory.reward,
        metrics=Metrics(
            total_latency_ms=total_ms,
            llm_latency_ms=1000 * model.engine_seconds,
            tool_latency_ms=1000 * trajectory.timing.tool_s,
            num_llm_calls=model.calls,
            num_tool_calls=len(trajectory.tool_calls),
            prompt_tokens=model.prompt_tokens,
            response_tokens=model.response_tokens,
            max_context_tokens=model.max_context_tokens,
        ),
        extra_fields=extra,
    )


def _failure(order: RolloutOrder, trajectory: Trajectory, model: TrainerModel) -> RemoteFailure | None:
    reason = trajectory.stop_reason
    if trajectory.error is not None:
        # Whole for whoever runs this server; the trainer hears only what is ours to say.
        logger.warning("rollout %r: %s: %s", order.rollout_id, reason, trajectory.error)
    if reason in _FINISHED:
        return None
    if model.failure is not None and reason == "error":
        return model.failure
    if reason in _FAILED:
        return RemoteFailure(*_FAILED[reason])
    if reason == "deadline":
        return RemoteFailure("internal_error", "the rollout took longer than this rollout server allows")
    return foreign_words(trajectory.error)


def _sendable(messages: Sequence[Message]) -> Sequence[Message]:
    """As far as it is JSON: what an environment replied may be anything, and has then ended the rollout."""
    for index, message in enumerate(messages):
        try:
            json.dumps(message, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, TypeError, RecursionError):
            return messages[:index]
    return messages


def answered(messages: Sequence[Message]) -> list[Message]:
    """A history in which every tool call has an answer: those that an ending left open get one that says so."""
    done = list(messages)
    for index in range(len(done) - 1, -1, -1):
        message = done[index]
        if message.get("role") != "assistant":
            continue
        # A turn's calls are answered all together or not at all.
        if message.get("tool_calls") and not any(later.get("role") == "tool" for later in done[index + 1 :]):
            done += [
                {"role": "tool", "content": NOT_RUN, "tool_call_id": call.id, "name": call.name or "unknown"}
                for call in given_calls(0, message["tool_calls"])
            ]
        break
    return done
