"""A TEST DOUBLE: an engine that answers from a script in microseconds. Never a default.

It speaks the interface of rollout.engine.Engine, so the very session loop of production runs on it.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from rollout.engine import FinishReason, Generation, VersionSpan
from rollout.errors import EngineRefused, EngineTimeout

Answer = tuple[Sequence[int], FinishReason] | Exception
"""Sampled ids with the finish reason, or what the call raises."""
Script = Callable[[Sequence[int], str, int], Answer]
"""(prompt_ids, session_id, turn) → Answer."""


class ScriptedEngine:
    """Answers call number `turn` of each session by `script`, after `delay` seconds.

    Log-probabilities are -(k+1)/1000 for the k-th token of a turn, so that a test can tell which is which.
    """

    def __init__(self, script: Script, *, max_model_len: int = 4096, delay: float = 0.0, version: int = 0) -> None:
        self._script = script
        self._max_model_len = max_model_len
        self.delay = delay
        self.version = version
        self.turns: dict[str, int] = {}
        self.prompts: list[tuple[str, array[int]]] = []
        """Every call's session and prompt, when `keep_prompts` is set."""
        self.samplings: list[dict[str, Any]] = []
        self.keep_prompts = True

    @property
    def max_model_len(self) -> int:
        """As given."""
        return self._max_model_len

    async def generate(
        self, prompt_ids: Sequence[int], sampling: dict[str, Any], *, session_id: str, timeout: float
    ) -> Generation:
        """The script's answer, cut to `max_tokens` with finish reason "length" as an engine would."""
        if len(prompt_ids) >= self._max_model_len:
            raise EngineRefused(f"prompt of {len(prompt_ids)} tokens, context of {self._max_model_len}")
        turn = self.turns.get(session_id, 0)
        self.turns[session_id] = turn + 1
        if self.keep_prompts:
            self.prompts.append((session_id, array("i", prompt_ids)))
            self.samplings.append(sampling)
        if self.delay:
            try:
                async with asyncio.timeout(timeout):
                    await asyncio.sleep(self.delay)
            except TimeoutError:
                raise EngineTimeout(f"no answer within {timeout:g} s") from None
        answer = self._script(prompt_ids, session_id, turn)
        if isinstance(answer, Exception):
            raise answer
        ids, finish_reason = answer
        if len(ids) > sampling["max_tokens"]:
            ids, finish_reason = ids[: sampling["max_tokens"]], "length"
        count = len(ids)
        return Generation(
            token_ids=array("i", ids),
            logprobs=array("f", [-(k + 1) / 1000 for k in range(count)]),
            versions=[VersionSpan(self.version, 0, count)] if count else [],
            finish_reason=finish_reason,
        )
