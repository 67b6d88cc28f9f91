"""What a session leaves behind: a trajectory of one or more segments, every ending named.

A leaf between the session that makes trajectories and the record that stores them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rollout.ledger import Segment
from rollout.tasks import Message
from rollout.tool_calls import ToolCallRecord

StopReason = Literal[
    "stop",  # the model ended its turn and the environment had nothing to add
    "length",  # a turn was cut: by sampling.max_tokens, by the model's context, or by a captured session's client
    "max_turns",
    "max_tokens",  # limits.max_response_tokens
    "deadline",  # limits.session_seconds or limits.engine_seconds; a captured session that was never closed
    "tool_error",  # limits.max_tool_errors
    "cancelled",
    "error",
]
STOP_REASONS: tuple[str, ...] = get_args(StopReason)


@dataclass(slots=True, frozen=True)
class SessionKey:
    """Who a session is: run, group, and position in it."""

    run: str
    task_id: str
    group_id: str
    sample_index: int

    @property
    def trajectory_id(self) -> str:
        """Unique for ever: run and group ids are, and the sample's index is within the group."""
        return f"{self.group_id}/{self.sample_index}"


@dataclass(slots=True)
class Timing:
    """Seconds of one session. What is left of `total_s` went to rendering, parsing and waiting for a turn."""

    queue_s: float = 0.0
    """From submission to the start in a worker."""
    engine_s: float = 0.0
    tool_s: float = 0.0
    env_s: float = 0.0
    total_s: float = 0.0


@dataclass(slots=True)
class Trajectory:
    """One finished session. `reward` None means not scored; it is never a silent 0."""

    key: SessionKey
    segments: list[Segment]
    stop_reason: StopReason
    messages: list[Message]
    reward: float | None = None
    turn_rewards: list[float | None] | None = None
    tool_calls: list[ToolCallRecord] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)
    error: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    attempts: int = 1
    retryable: bool = False
    """Whether infrastructure died under the session, so that a fresh attempt may do better."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled, over all segments."""
        return sum(segment.num_sampled for segment in self.segments)
