"""What controller, session workers and drivers say to each other. Plain data, pickled by Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rollout.api import RunRequest
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
    journal_path: str
    journal_sync: bool
    run_defaults: RunRequest
    """What runs take from the config where they say nothing."""
    worker_env: dict[str, str] = field(default_factory=dict)
    session_secret: bytes = field(default=b"", repr=False)
    """Makes the keys of captured sessions; engines have the same."""


@dataclass(slots=True)
class Summary:
    """What the controller must know of a finished attempt without opening its arrays. Plain JSON in the journal."""

    run: str
    group_id: str
    sample_index: int
    attempt: int
    retryable: bool
    stop_reason: str
    reward: float | None
    num_sampled: int
    num_turns: int
    num_segments: int
    tool_calls: int
    tool_errors: int
    oldest_version: int | None
    """Lowest policy version of its sampled tokens; None where there are none."""
    first_row: int
    num_rows: int

    @property
    def trajectory_id(self) -> str:
        """See rollout.trajectory.SessionKey."""
        return f"{self.group_id}/{self.sample_index}"


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
    """Finished attempts of one worker."""

    rows: bytes | None
    """Rows of the record as an Arrow IPC stream: what the journal keeps as it is. None where nothing finished."""
    summaries: list[Summary]
    """One for each attempt, with its place in `rows`."""
    stats: WorkerStats
