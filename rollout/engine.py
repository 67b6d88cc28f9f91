"""What a session asks of an engine: token ids in, sampled token ids with their log-probabilities out.

A leaf: no Ray, no vLLM. Real engines live in deployments/, reached through the lanes in actors/; the scripted
test double is rollout/testing/scripted_engine.py. All of them speak these types.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

FinishReason = Literal["stop", "length", "abort"]
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)


@dataclass(slots=True, frozen=True)
class VersionSpan:
    """Tokens `[start, end)` of a generation were sampled by the weights `version`."""

    version: int
    start: int
    end: int


@dataclass(slots=True)
class Generation:
    """One answer of the engine: what it sampled, never re-tokenized, and how it came about.

    `token_ids` and `logprobs` have the same length T ≥ 0; `versions` covers [0, T) without gaps.
    """

    token_ids: array[int]
    """int32[T], the sampled tokens, the end-of-turn token included when it was sampled."""
    logprobs: array[float]
    """float32[T], log-probability of each token under the distribution that it was sampled from (nats)."""
    versions: list[VersionSpan]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    """The stop token id or string that ended it, where the engine names one."""
    cached_tokens: int = 0
    """Prompt tokens whose keys came from the prefix cache."""
    queue_s: float = 0.0
    """Seconds between arrival at the engine and the first scheduling."""
    decode_s: float = 0.0
    """Seconds between first scheduling and last token."""
    replica: str = ""


@dataclass(slots=True)
class GenerateRequest:
    """What crosses the process to an engine replica."""

    request_id: str
    prompt_ids: array[int]
    """int32[P], the exact context."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of vLLM's SamplingParams."""


class Engine(Protocol):
    """The interface that the session loop drives."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus generation, in tokens."""

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: dict[str, Any],
        *,
        session_id: str,
        timeout: float,
    ) -> Generation:
        """Sample a continuation of `prompt_ids`.

        `session_id` keeps a session at the replica that holds its prefix. Cancelling the call stops the engine.
        Raises EngineTimeout after `timeout` seconds, EngineDied if no replica could finish it, EngineRefused if
        the request can never succeed.
        """
