"""One captured session: open, rewarded, closed; and the trajectory that it leaves.

Invariant: `closed` is for ever, and whatever closed the session made its one trajectory; closing again gives the
same. A reward is finite or refused, and one that was given is not changed. Nothing here reads a clock: the time is
handed in, so that deadlines are decided by values alone. What could not be kept is counted in the metadata.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rollout.capture.calls import CapturedCall
from rollout.capture.segments import Chain, chains, to_segments
from rollout.engine import FinishReason
from rollout.errors import (
    ApiError,
    ConflictError,
    EnvironmentError_,
    RefusedError,
    RolloutError,
    SessionTimeout,
    describe,
)
from rollout.tasks import Message
from rollout.trajectory import SessionKey, StopReason, Timing, Trajectory

CaptureState = Literal["open", "rewarded", "closed"]
METADATA_KEY = "capture"
"""What this room writes into a trajectory's metadata is under this key."""

# Different correlation ids that are kept: those of the first calls.
MAX_CORRELATION_IDS = 32
MAX_CORRELATION_CHARS = 128
# The record keeps rewards as float32; a larger number would be stored as infinite.
MAX_REWARD = 3.4028234e38
# A turn that its client cut off is a truncated one. It is not `cancelled`: that ending is never scored, and here the
# client itself closed the session and said what it was worth.
_ENDINGS: dict[FinishReason, StopReason] = {"stop": "stop", "length": "length", "abort": "length"}


class CaptureLimits(BaseModel):
    """Limits of one captured session."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_calls: int = Field(default=2_000, ge=1, le=100_000)
    """Most generations; further ones are refused."""
    max_tokens: int = Field(default=32_000_000, ge=1)
    """Most tokens, prompt and sampled, of all calls together. They are held until the session closes, 4 bytes each
    and a growing prompt again with every call."""
    idle_seconds: float = Field(default=600.0, gt=0)
    """Deadline from the last sign of life with no call under way; ends as `deadline`."""
    session_seconds: float = Field(default=3_600.0, gt=0)
    """Deadline of the whole session from its opening; ends as `deadline`."""


def overdue(
    limits: CaptureLimits, *, opened: float, last_active: float, in_flight: int, now: float
) -> SessionTimeout | None:
    """Which deadline a session has passed; None if neither. All times are seconds on one clock."""
    if now - opened >= limits.session_seconds:
        return SessionTimeout(f"the client did not close its session within {limits.session_seconds:g} s")
    if not in_flight and now - last_active >= limits.idle_seconds:
        return SessionTimeout(f"the client made no call for {limits.idle_seconds:g} s and did not close its session")
    return None


class CaptureSession:
    """The book of one session. Not safe for concurrent writers."""

    def __init__(
        self,
        key: SessionKey,
        *,
        limits: CaptureLimits,
        opened: float,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ApiError for metadata with the key that is used here."""
        if metadata and METADATA_KEY in metadata:
            raise ApiError(f"metadata may not have a key {METADATA_KEY!r}; choose another name", "metadata")
        self.key = key
        self._limits = limits
        self._opened = opened
        self._last_active = opened
        self._metadata = dict(metadata or {})
        self._calls: dict[str, CapturedCall] = {}
        self._in_flight: set[str] = set()
        self._newest: CapturedCall | None = None
        self._num_tokens = 0
        self._lost = 0
        self._refused = 0
        self._reward: float | None = None
        self._turn_rewards: dict[str, float] = {}
        self._trajectory: Trajectory | None = None

    @property
    def state(self) -> CaptureState:
        """Where the session is."""
        if self._trajectory is not None:
            return "closed"
        return "open" if self._reward is None and not self._turn_rewards else "rewarded"

    @property
    def trajectory(self) -> Trajectory | None:
        """What it left, once it is closed."""
        return self._trajectory

    @property
    def calls(self) -> Collection[CapturedCall]:
        """Calls that were recorded, as they were reported, without their texts."""
        return self._calls.values()

    @property
    def num_tokens(self) -> int:
        """Tokens that its calls hold, prompt and sampled."""
        return self._num_tokens

    @property
    def in_flight(self) -> frozenset[str]:
        """Calls that began and were not reported yet. Wait for them (with a deadline) before closing."""
        return frozenset(self._in_flight)

    def begin(self, call_id: str, now: float) -> None:
        """Admit a call before it is generated. Optional: it keeps the idle deadline off calls that take long.

        Raises ConflictError where the session is closed or has had that call, RefusedError where it is full.
        """
        self._require_open()
        if call_id in self._in_flight:
            return
        if call_id in self._calls:
            raise ConflictError(f"the session has had a call {call_id!r}", "call_id")
        if len(self._calls) + len(self._in_flight) >= self._limits.max_calls:
            raise RefusedError(f"the session has had its {self._limits.max_calls} calls (max_calls); close it")
        if self._num_tokens >= self._limits.max_tokens:
            raise RefusedError(f"the session has had its {self._limits.max_tokens} tokens (max_tokens); close it")
        self._in_flight.add(call_id)
        self._touch(now)

    def lose(self, call_id: str, now: float) -> None:
        """A call that began and will not be reported, as when its replica died. It is counted in the metadata."""
        if call_id in self._in_flight:
            self._in_flight.discard(call_id)
            self._lost += 1
            self._touch(now)

    def abandon(self, call_id: str, now: float) -> None:
        """A call that began and asked the engine for nothing, as when it was refused. It leaves no trace."""
        if call_id in self._in_flight:
            self._in_flight.discard(call_id)
            self._touch(now)

    def add(self, call: CapturedCall, now: float) -> bool:
        """Record a call; False if it was recorded before, as when its report is repeated.

        Raises ConflictError where the session is closed or another call has that id, RefusedError where it is full:
        such a call is counted in the metadata, and its tokens are trained on nowhere.
        """
        known = self._calls.get(call.call_id)
        if known is not None:
            if not _same(known, call):
                raise ConflictError(f"another call was recorded as {call.call_id!r}", "call_id")
            return False
        self._require_open()
        self._in_flight.discard(call.call_id)
        self._touch(now)
        if len(self._calls) >= self._limits.max_calls:
            self._refused += 1
            raise RefusedError(f"the session holds {self._limits.max_calls} calls (max_calls); close it")
        if self._num_tokens + call.num_tokens > self._limits.max_tokens:
            self._refused += 1
            raise RefusedError(
                f"a call of {call.num_tokens} tokens would bring the session from {self._num_tokens} over its "
                f"{self._limits.max_tokens} (max_tokens); close it"
            )
        self._calls[call.call_id] = call.without_messages()
        self._num_tokens += call.num_tokens
        if call.messages is not None and (self._newest is None or _ended(call) > _ended(self._newest)):
            self._newest = call
        return True

    def reward(
        self, value: float | None = None, *, turn_rewards: Mapping[str, float] | None = None, now: float
    ) -> None:
        """Score the session as a whole, single calls by their ids, or both. Saying the same again changes nothing.

        Raises ApiError for what is no finite number, RefusedError for a call that the session does not know,
        ConflictError where another reward was given or the session is closed. Then nothing is kept of it.
        """
        if value is None and not turn_rewards:
            raise ApiError("give a reward, turn_rewards, or both", "reward")
        whole = None if value is None else _finite(value, "reward")
        single = {name: _finite(number, f"turn_rewards.{name}") for name, number in (turn_rewards or {}).items()}
        for name, number in single.items():
            if name not in self._calls and name not in self._in_flight:
                raise RefusedError(f"the session has no call {name!r}", f"turn_rewards.{name}")
            if self._turn_rewards.get(name, number) != number:
                raise ConflictError(
                    f"call {name!r} was rewarded with {self._turn_rewards[name]:g} before", f"turn_rewards.{name}"
                )
        if whole is not None and self._reward is not None and whole != self._reward:
            raise ConflictError(f"the session was rewarded with {self._reward:g} before", "reward")
        if (whole is None or self._reward is not None) and single.keys() <= self._turn_rewards.keys():
            return
        self._require_open()
        self._reward = self._reward if whole is None else whole
        self._turn_rewards |= single
        self._touch(now)

    def close(self, now: float) -> Trajectory:
        """The client is done. Ends as its last call did; a session without a sampled token is an `error`."""
        if self._trajectory is None:
            found = chains(self._calls.values())
            if found:
                last = max(self._calls.values(), key=_ended)
                self._end(found, _ENDINGS[last.finish_reason], None, now)
            else:
                failure = describe(EnvironmentError_(self._nothing_sampled()))
                self._end(found, "error", failure, now)
        assert self._trajectory is not None
        return self._trajectory

    def overdue(self, now: float) -> SessionTimeout | None:
        """Which deadline has passed; None if neither, or if the session is closed. Changes nothing."""
        if self._trajectory is not None:
            return None
        return overdue(
            self._limits,
            opened=self._opened,
            last_active=self._last_active,
            in_flight=len(self._in_flight),
            now=now,
        )

    def expire(self, now: float) -> Trajectory | None:
        """Close a session that has passed a deadline, as `deadline`, with the reward that it has; else None."""
        failure = self.overdue(now)
        if failure is None:
            return None
        self._end(chains(self._calls.values()), "deadline", describe(failure), now)
        return self._trajectory

    def cancel(self, now: float, why: str) -> Trajectory:
        """End it from this side, as `cancelled` and not scored. A closed session stays what it is."""
        if self._trajectory is None:
            self._end(chains(self._calls.values()), "cancelled", describe(_Cancelled(why)), now)
        assert self._trajectory is not None
        return self._trajectory

    def _end(self, found: Sequence[Chain], stop_reason: StopReason, error: str | None, now: float) -> None:
        turns = [call.call_id for chain in found for call in chain.calls]
        rewards = [self._turn_rewards.get(call_id) for call_id in turns]
        scored = stop_reason not in ("error", "cancelled")
        self._trajectory = Trajectory(
            key=self.key,
            segments=to_segments(found),
            stop_reason=stop_reason,
            messages=self._messages(),
            reward=self._reward if scored else None,
            turn_rewards=rewards if any(value is not None for value in rewards) else None,
            timing=self._timing(now),
            error=error,
            metadata=self._metadata | {METADATA_KEY: self._account(found)},
        )

    def _messages(self) -> list[Message]:
        """The conversation of the call that ended last, of those that have one, with its answer where it is known."""
        if self._newest is None or self._newest.messages is None:
            return []
        answer = self._newest.answer
        return [*self._newest.messages, *([] if answer is None else [answer])]

    def _timing(self, now: float) -> Timing:
        """All time outside the engine is the agent's own, which is the environment here."""
        total = max(0.0, now - self._opened)
        engine = min(total, busy_seconds(self._calls.values()))
        return Timing(engine_s=engine, env_s=total - engine, total_s=total)

    def _account(self, found: Sequence[Chain]) -> dict[str, Any]:
        """How the session was captured: what of it applies."""
        placed = {call.call_id for chain in found for call in chain.calls}
        account: dict[str, Any] = {
            "calls": len(self._calls),
            "apis": dict(sorted(Counter(call.api for call in self._calls.values()).items())),
            "cut_turns": [
                [segment, turn]
                for segment, chain in enumerate(found)
                for turn, call in enumerate(chain.calls)
                if call.cut
            ],
            "calls_that_sampled_nothing": len(self._calls) - len(placed),
            "calls_not_reported": len(self._in_flight) + self._lost,
            "calls_over_limits": self._refused,
            "correlation_ids": self._correlation_ids(),
            "rewards_without_turn": {n: r for n, r in sorted(self._turn_rewards.items()) if n not in placed},
        }
        return {name: value for name, value in account.items() if value or name == "calls"}

    def _correlation_ids(self) -> list[str]:
        """Those of its calls in the order of time: they lead from a trajectory to the log lines of its requests."""
        calls = sorted(self._calls.values(), key=lambda call: call.order)
        ids = dict.fromkeys(call.correlation_id[:MAX_CORRELATION_CHARS] for call in calls if call.correlation_id)
        return list(ids)[:MAX_CORRELATION_IDS]

    def _nothing_sampled(self) -> str:
        if not self._calls:
            return "the agent closed its session without a call; check that its base URL is the session's"
        return f"the agent closed its session, and none of its {len(self._calls)} calls sampled a token"

    def _require_open(self) -> None:
        if self._trajectory is not None:
            raise ConflictError(f"session {self.key.trajectory_id!r} is closed ({self._trajectory.stop_reason})")

    def _touch(self, now: float) -> None:
        # A clock that is set back does not shorten a deadline.
        self._last_active = max(self._last_active, now)


class _Cancelled(RolloutError):
    category = "cancelled"


def busy_seconds(calls: Iterable[CapturedCall]) -> float:
    """Seconds in which at least one call was in the engine: parallel ones count once."""
    busy, end = 0.0, -math.inf
    for started, finished in sorted((call.started, call.finished) for call in calls):
        busy += max(0.0, finished - max(started, end))
        end = max(end, finished)
    return busy


def _ended(call: CapturedCall) -> tuple[float, float, int, str]:
    return call.finished, call.started, len(call.prompt_ids), call.call_id


def _same(known: CapturedCall, call: CapturedCall) -> bool:
    return known.prompt_ids == call.prompt_ids and known.token_ids == call.token_ids


def _finite(value: Any, name: str) -> float:
    if not isinstance(value, int | float):
        raise ApiError(f"{name} is {type(value).__name__}, not a number", name)
    # NaN fails this, too; so does an integer that no float can hold.
    if not -MAX_REWARD <= value <= MAX_REWARD:
        shown = value if isinstance(value, float) else "too large"
        raise ApiError(f"{name} is {shown}; a reward is finite and fits a float32", name)
    return float(value)
