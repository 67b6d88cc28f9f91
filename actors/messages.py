"""What controller, session workers and drivers say to each other. Plain data, pickled by Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from actors.scheduler import Counts
from rollout.limits import Limits
from rollout.mcp_config import McpServerConfig
from rollout.sampling import Sampling

# Sessions that wait at a worker for a slot, as a share of those that play.
PREFETCH = 0.5


@dataclass(frozen=True)
class RunSpec:
    """How the sessions of a run are played."""

    run: str
    environment: str
    environment_args: dict[str, Any]
    sampling: Sampling
    limits: Limits
    group_size: int = 8
    submitted_at: float = 0.0
    """Unix time, for the queue figure."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a session worker needs to know of the cluster."""

    model: str
    revision: str | None
    renderer: str
    renderer_options: dict[str, Any]
    app: str
    deployment: str
    sticky_margin: int
    mcp_servers: dict[str, McpServerConfig]
    max_sessions: int
    """Sessions that play at once."""

    @property
    def capacity(self) -> int:
        """Sessions that a worker holds: those that play, and a few that follow at once when one ends.

        Without them each ending costs a round over the controller (30 ms); with too many, one worker would sit on
        work while another is idle.
        """
        return self.max_sessions + max(1, int(self.max_sessions * PREFETCH))


@dataclass(frozen=True)
class ControllerSettings:
    """What the controller needs to know of the cluster."""

    worker: WorkerSettings
    num_workers: int
    max_attempts: int
    max_concurrent_sessions: int | None
    start_timeout: float
    """Seconds for workers to start, and for engines to become ready."""
    worker_env: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Summary:
    """What the controller must know of a finished attempt without opening its arrays."""

    trajectory_id: str
    attempt: int
    retryable: bool
    stop_reason: str
    reward: float | None
    num_sampled: int
    num_turns: int
    num_segments: int
    tool_calls: int
    tool_errors: int
    error: str | None
    first_row: int
    num_rows: int


@dataclass(slots=True)
class WorkerStats:
    """A worker's state at a moment."""

    worker_id: str = ""
    sessions: int = 0
    loop_lag_p50_s: float = 0.0
    loop_lag_p99_s: float = 0.0
    resends: int = 0
    """Turns that were sent again because their replica died."""
    abandoned_threads: int = 0
    replicas: dict[str, int] = field(default_factory=dict)
    """Requests in flight by replica, as this worker sees them."""
    rss_mb: float = 0.0


@dataclass(slots=True)
class Collected:
    """Finished attempts of one worker: rows of the record, and a summary for each attempt."""

    table: pa.Table | None
    summaries: list[Summary]
    stats: WorkerStats


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    counts: Counts
    tokens: int = 0
    """Tokens sampled in finished trajectories."""
    turns: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    forks: int = 0
    scored: int = 0
    reward_sum: float = 0.0
    stop_reasons: dict[str, int] = field(default_factory=dict)
    workers_lost: int = 0
    workers: list[WorkerStats] = field(default_factory=list)

    @property
    def mean_reward(self) -> float | None:
        """Mean over scored trajectories; None before the first."""
        return self.reward_sum / self.scored if self.scored else None

    @property
    def failures(self) -> int:
        """Trajectories that ended as `error`."""
        return self.stop_reasons.get("error", 0)


@dataclass(slots=True)
class Delivery:
    """Finished trajectories of a run, handed over once, and how far it is."""

    table: pa.Table | None
    progress: Progress
    finished: bool
    """Nothing is queued, running or undelivered."""
