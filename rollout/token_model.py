"""The token path of a session: prompts as ids to an engine, sampled ids into the ledger.

Invariant: tokens are written by the ledger alone, a sampled token is never encoded again, and a prompt that the
engine has not seen is never recorded. Where the chat format cannot extend the history, or would change what was
sampled, a new segment begins and says why.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from rollout import tracing
from rollout.engine import FINISH_REASONS, Engine, Generation
from rollout.errors import EngineDied, EngineError, EngineRefused
from rollout.ledger import Ledger, Segment
from rollout.limits import Limits
from rollout.next_prompt import characters, next_prompt
from rollout.rendering import ChatRenderer, ParsedTurn
from rollout.sampling import Sampling, turn_parameters
from rollout.session_model import ModelTurn
from rollout.tasks import Message
from rollout.trajectory import SessionKey, StopReason


class TokenModel:
    """One session's assistant, on an engine that speaks tokens. A `SessionModel`."""

    def __init__(self, key: SessionKey, engine: Engine, chat: ChatRenderer, sampling: Sampling) -> None:
        self._key = key
        self._engine = engine
        self._chat = chat
        self._sampling = sampling
        self._limits = Limits()
        self._specs: list[dict[str, Any]] = []
        self._ledger = Ledger()
        self._engine_seconds = 0.0

    @property
    def segments(self) -> list[Segment]:
        """The ledger's."""
        return self._ledger.segments

    @property
    def engine_seconds(self) -> float:
        """Seconds in the engine, its queue included."""
        return self._engine_seconds

    async def open(self, messages: Sequence[Message], specs: list[dict[str, Any]], limits: Limits) -> None:
        """Render the first prompt."""
        self._specs, self._limits = specs, limits
        self._ledger.open(await self._chat.run(characters(messages), lambda chat: chat.open(messages, specs)))

    async def turn(self, index: int, messages: Sequence[Message], *, deadline: float) -> ModelTurn:
        """Sample, record, parse."""
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
        generation = await self._generate(index, budget, deadline)
        ending: StopReason | None = None
        if generation.finish_reason == "length":
            ending = "max_tokens" if left < min(self._sampling.max_tokens, room) else "length"
        completion = generation.token_ids.tolist()
        parsed = await self._parse(index, context.tolist(), completion)
        return ModelTurn(parsed, parsed.to_message(), len(completion), ending)

    async def advance(
        self, messages: Sequence[Message], new_messages: Sequence[Message], *, seconds: float
    ) -> StopReason | None:
        """Record the next prompt: as an extension of the context, else as a fork. An ending if it does not fit."""
        prompt = await next_prompt(self._chat, self._ledger, messages, new_messages, self._specs)
        if len(prompt.ids) >= self._engine.max_model_len:
            return "length"
        if self._ledger.num_response_tokens + prompt.added >= self._limits.max_response_tokens:
            return "max_tokens"
        if prompt.fork_reason is not None:
            self._ledger.open(prompt.ids, prompt.fork_reason)
        else:
            self._ledger.observe(prompt.ids, role=new_messages[0]["role"], seconds=seconds)
        return None

    async def _generate(self, index: int, budget: int, deadline: float) -> Generation:
        timeout = min(self._limits.engine_seconds, deadline - asyncio.get_running_loop().time())
        started = time.perf_counter()
        context = self._ledger.context()
        try:
            with tracing.span("engine", input_tokens=len(context)) as span:
                generation = await self._engine.generate(
                    context,
                    self._turn_sampling(index, budget),
                    session_id=self._key.trajectory_id,
                    timeout=timeout,
                )
                versions = generation.versions
                span.set(
                    output_tokens=len(generation.token_ids),
                    finish_reason=generation.finish_reason,
                    policy_version=versions[-1].version if versions else None,
                )
        finally:
            seconds = time.perf_counter() - started
            self._engine_seconds += seconds
        if generation.finish_reason == "abort":
            raise EngineDied("the engine aborted the request")
        if generation.finish_reason not in FINISH_REASONS:
            # It would pass for a turn that the policy ended, and be scored.
            raise EngineError(f"the engine ended the request with {generation.finish_reason!r}")
        self._ledger.sample(generation, seconds)
        return generation

    def _turn_sampling(self, index: int, budget: int) -> dict[str, Any]:
        return turn_parameters(
            self._sampling,
            budget,
            stop_token_ids=self._chat.stop_token_ids,
            sample=f"{self._key.task_id}/{self._key.sample_index}",
            turn=index,
        )

    async def _parse(self, index: int, prompt: list[int], completion: list[int]) -> ParsedTurn:
        return await self._chat.run(len(completion), lambda chat: chat.parse(completion, prompt, self._specs, index))
