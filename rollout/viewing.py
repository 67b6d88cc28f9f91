"""Looking at finished trajectories and at a run's course: what is asked, and what is told.

Invariant: every answer is bounded, and none of it is needed for training: what is looked at here may be gone the next
moment, and nobody who trains notices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollout.trajectory import StopReason

# Trajectories of one page.
MAX_PAGE = 200
# Characters to search for.
MAX_TEXT = 200

GroupFate = Literal["running", "ready", "leased", "delivered", "dropped", "replaced"]
"""Where a trajectory's group is: not complete, deliverable, with a trainer, acknowledged, filtered out, or played
again."""
SortKey = Literal["finished", "reward", "tokens", "turns", "seconds", "staleness"]


class TrajectoryQuery(BaseModel):
    """Which trajectories, in which order. What is None does not matter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stop_reason: list[StopReason] = Field(default_factory=list, max_length=16)
    """Any of these; empty: any."""
    group: list[GroupFate] = Field(default_factory=list, max_length=8)
    """Any of these; empty: any."""
    min_reward: Annotated[float | None, Field(allow_inf_nan=False)] = None
    max_reward: Annotated[float | None, Field(allow_inf_nan=False)] = None
    scored: bool | None = None
    forks: bool | None = None
    """With more than one segment, or with one."""
    tool_errors: bool | None = None
    """With a failed tool call, or without."""
    version: int | None = Field(default=None, ge=0)
    """With tokens that this policy version sampled."""
    text: str | None = Field(default=None, max_length=MAX_TEXT)
    """Found in the messages, the id or the error, whatever the case."""
    sort: SortKey = "finished"
    descending: bool = True
    offset: int = Field(default=0, ge=0, le=1_000_000)
    limit: int = Field(default=50, ge=1, le=MAX_PAGE)
    upto: int | None = Field(default=None, ge=0)
    """Nothing newer than this `number`: what came after the first page does not move the others."""

    @model_validator(mode="after")
    def _range(self) -> TrajectoryQuery:
        if self.min_reward is not None and self.max_reward is not None and self.min_reward > self.max_reward:
            raise ValueError("min_reward is above max_reward: nothing can match")
        return self


@dataclass(slots=True)
class TrajectorySummary:
    """One line of a list."""

    number: int
    """Counts up with every trajectory that finishes."""
    trajectory_id: str
    run: str
    task_id: str
    group_id: str
    sample_index: int
    group: GroupFate
    group_reason: str | None
    """Why it was dropped or replaced."""
    finished_at: float | None
    """Seconds since the epoch; None: before the controller was last started."""
    stop_reason: str
    reward: float | None
    sampled: int
    """Tokens."""
    turns: int
    segments: int
    tool_calls: int
    tool_errors: int
    attempts: int
    staleness: int | None
    """Versions between its oldest token and the weights when it finished; None where it has no tokens."""
    versions: list[tuple[int, int]]
    """Policy version, and how many tokens it sampled."""
    seconds: float | None = None
    opening: str | None = None
    """The beginning of the first thing that a user said."""
    error: str | None = None


@dataclass(slots=True)
class TrajectoryPage:
    """A part of what is kept."""

    items: list[TrajectorySummary]
    matched: int
    """How many fit the query, on all pages."""
    kept: int
    """How many are kept of this run (or of all)."""
    newest: int
    """The highest number of them; for `upto`."""
    versions: list[int] = field(default_factory=list)
    """All policy versions that sampled tokens of those kept."""


@dataclass(slots=True)
class Sibling:
    """Another sample of the same task."""

    trajectory_id: str
    sample_index: int
    stop_reason: str
    reward: float | None


@dataclass(slots=True)
class TrajectoryRows:
    """One trajectory as it is in the record."""

    summary: TrajectorySummary
    table: pa.Table
    """Its rows, one per segment."""
    siblings: list[Sibling]
    """All that are kept of its group, itself included, by sample_index."""


@dataclass(slots=True)
class HistoryPoint:
    """What finished in one stretch of time. Sums, so that stretches can be joined."""

    at: float
    """Its begin, seconds since the epoch."""
    sessions: int = 0
    tokens: int = 0
    """Sampled."""
    scored: int = 0
    reward_sum: float = 0.0
    reward_min: float | None = None
    reward_max: float | None = None
    aged: int = 0
    """Sessions that have tokens, and so an age."""
    staleness_sum: int = 0
    """Versions between a session's oldest token and the weights when it finished."""
    staleness_max: int = 0
    version: int = 0
    """Of the weights, at its end."""


@dataclass(slots=True)
class History:
    """The course of a run since the controller was started, in at most so many points that a chart can show."""

    run: str
    seconds: float
    """Length of one point's stretch."""
    points: list[HistoryPoint]
    """In time; stretches in which nothing finished are left out."""
    now: float
    """The controller's clock."""


class Viewing(Protocol):
    """Who can be asked. All raise NotFoundError, and UnavailableError where nobody answers."""

    async def trajectories(self, run: str | None, query: TrajectoryQuery) -> TrajectoryPage:
        """A page; of all runs where `run` is None."""

    async def trajectory(self, trajectory_id: str) -> TrajectoryRows:
        """One, whole."""

    async def history(self, run: str) -> History:
        """The course of a run."""
