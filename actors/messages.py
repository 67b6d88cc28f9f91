"""What controller, session workers and drivers say to each other. Plain data, pickled by Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from actors.remote_settings import RemoteSettings
from rollout.api import RunRequest
from rollout.limits import Limits
from rollout.logs import LogSettings
from rollout.mcp_config import McpServerConfig
from rollout.remote.foreign_client import RemoteSpec
from rollout.sampling import Sampling
from rollout.tracing import TraceSettings

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
    remote: RemoteSpec | None = None
    """The rollout server that plays them; the environment, if there is one, then only scores."""

    @property
    def played_in(self) -> str:
        """The environment in a word, for people."""
        return self.environment if self.remote is None else self.remote.url


@dataclass(frozen=True)
class ForeignSettings:
    """How remote rollout servers play sessions of this cluster."""

    address: str
    """URL at which they reach the gateway, without a slash at its end."""
    secret: bytes = field(repr=False)
    """Makes the keys of rollouts (session_keys.derived_secret); gateways have the same."""
    address_given: bool = False
    """Whether the config names the address; else it is where the gateway listens."""
    allowed_hosts: tuple[str, ...] = ()
    """Where runs may be played (rollout.remote.hosts)."""
    trusted: tuple[str, ...] = ()
    """URLs that the config itself names: these need no leave."""


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
    foreign: ForeignSettings | None = None
    """None: there is no gateway that remote rollout servers could call."""
    remote: RemoteSettings | None = None
    """None: this cluster is no rollout server for foreign trainers."""
    logging: LogSettings | None = None
    """Of the controller, too. None: as Python does it."""
    tracing: TraceSettings | None = None
    """None: sessions are not traced."""

    @property
    def remote_calls(self) -> int:
        """Rollouts for foreign trainers that one worker may play at once: all of them, if it comes to that."""
        return 0 if self.remote is None else self.remote.max_concurrent

    @property
    def foreign_calls(self) -> int:
        """Calls of remote rollout servers that a worker answers at once."""
        return 2 * self.capacity

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
    gallery_trajectories: int = 2_000
    gallery_bytes: int = 64 * 2**20
    """What is kept for looking at; both bounds hold."""
    cluster: str | None = None
    """The Ray namespace of what the cluster is made of. None: the job's, which is Serve's own where Serve deploys."""


@dataclass(slots=True)
class Figures:
    """What only the metrics want of a finished attempt. Not in the journal: a restart counts nothing again."""

    queue_s: float
    engine_s: float
    tool_s: float
    env_s: float
    total_s: float
    num_context: int
    """Tokens that were not sampled, of all segments."""
    tools: list[tuple[str, str, float]]
    """Name as the model wrote it, outcome, seconds."""
    forks: list[str]
    """Why each segment after the first was begun."""
    error: str | None
    """Category of its error."""


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
    version_tokens: list[list[int]] = field(default_factory=list)
    """Pairs: a policy version, and how many tokens it sampled. Empty in journals of older software."""
    figures: Figures | None = None
    """None once they are counted, and in the journal."""

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
    foreign: int = 0
    """Sessions that remote rollout servers play."""


@dataclass(slots=True)
class ForeignNews:
    """What sessions at remote rollout servers came to, for the metrics."""

    ended: list[tuple[str, float]] = field(default_factory=list)
    """Of each attempt that ended: its outcome (rollout.metrics_catalogue) and seconds."""
    refused: dict[str, int] = field(default_factory=dict)
    """Calls of rollout servers that were not answered, by reason."""


@dataclass(slots=True)
class Collected:
    """Finished attempts of one worker."""

    rows: bytes | None
    """Rows of the record as an Arrow IPC stream: what the journal keeps as it is. None where nothing finished."""
    summaries: list[Summary]
    """One for each attempt, with its place in `rows`."""
    stats: WorkerStats
    foreign: ForeignNews = field(default_factory=ForeignNews)
    """Since the last time."""
