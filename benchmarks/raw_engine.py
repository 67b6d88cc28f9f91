"""The yardstick: AsyncLLM driven in its own process, without lanes, sessions, tools or records.

It is the very engine of the measured cluster, so that both paths run on the same machine state, round by round.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

from benchmarks.work import TOKENS_PER_TURN, TURNS
from deployments.engine import RolloutEngine, to_sampling_params
from rollout.engine import GenerateRequest, Generation


class MeasuredEngine(RolloutEngine):
    """The engine deployment, plus a loop that plays episodes on AsyncLLM directly."""

    _serial = itertools.count()

    async def _generate(self, request: GenerateRequest) -> Generation:
        """A turn of the fixed length counts as ended; sessions would take it for one that was cut, and stop."""
        generation = await super()._generate(request)
        generation.finish_reason = "stop"
        return generation

    async def raw_episodes(
        self, opening: list[int], between: list[int], sampling: dict[str, Any], episodes: int, concurrent: int
    ) -> float:
        """Seconds for `episodes` episodes, `concurrent` at a time. `between` is what follows each turn."""
        from vllm.inputs.engine import tokens_input

        params = to_sampling_params(sampling)
        gate = asyncio.Semaphore(concurrent)

        async def episode() -> None:
            async with gate:
                context = list(opening)
                for turn in range(TURNS):
                    prompt = tokens_input(list(context), cache_salt="0")
                    final = None
                    async for output in self._client.generate(prompt, params, f"raw-{next(self._serial)}"):
                        final = output
                    assert final is not None
                    completion = final.outputs[0]
                    assert len(completion.token_ids) == TOKENS_PER_TURN == len(completion.logprobs)
                    context += completion.token_ids
                    if turn < TURNS - 1:
                        context += between

        started = time.perf_counter()
        await asyncio.gather(*(episode() for _ in range(episodes)))
        return time.perf_counter() - started
