"""Every metric of the project, as data: the code that counts, docs/metrics.md and the dashboards all read this file.

Invariant: a metric that is not here does not exist, and each label here has a bound, so that neither a trainer's run
names nor a model's invented tool names can fill a Prometheus. Metrics of vLLM and Ray are theirs, and not repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from rollout import errors
from rollout.loading import Phase
from rollout.tool_calls import Outcome
from rollout.trajectory import STOP_REASONS

Kind = Literal["counter", "gauge", "histogram"]

# Different values of an open label; further ones share OTHER.
MAX_RUNS = 64
MAX_TOOLS = 64
MAX_REASONS = 32
MAX_WORKERS = 64
MAX_REPLICAS = 1024
OTHER = "other"
# A tool that the model made up, or a call that could not be read: the text in its place is the model's.
UNKNOWN_TOOL = "unknown"

# From a tool that adds two numbers to an agent that works for an hour.
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
# Rewards have no scale of their own; most are within 0 to 1.
REWARDS = (-10.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 10.0)
# A pause of the engines, from an adapter to a checkpoint over a network.
PAUSES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
# Categories of errors that sessions end with, so that the first of each is seen as an increase. An environment may
# bring others.
SESSION_ERRORS = tuple(
    error.category
    for error in (
        errors.RolloutError,
        errors.LedgerError,
        errors.PrefixError,
        errors.RecordError,
        errors.RenderError,
        errors.ToolError,
        errors.EnvironmentError_,
        errors.EngineError,
        errors.EngineRefused,
        errors.EngineTimeout,
        errors.EngineDied,
        errors.SessionTimeout,
        errors.WorkerDied,
        errors.RemoteError,
        errors.RemoteDied,
    )
)
# `rollout_reward_mean` is over so many scored sessions of a run, the newest.
REWARD_WINDOW = 256


@dataclass(frozen=True, slots=True)
class Label:
    """What a label tells, and which values it can have."""

    help: str
    values: tuple[str, ...] = ()
    """All of them; empty: open, at most `limit` different ones and OTHER."""
    limit: int = 0
    known: tuple[str, ...] = ()
    """Of an open label: those that the program itself gives. They count towards `limit`, and counters begin at 0."""
    summed: bool = True
    """Of an open label: whether further values are counted as OTHER; else they have no series at all."""

    @property
    def at_birth(self) -> tuple[str, ...]:
        """Values whose counters are there before the first event; empty: only the future knows them."""
        return self.values or self.known


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family."""

    name: str
    """As Prometheus shows it; of histograms, without `_bucket`, `_sum` and `_count`."""
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    """Names in LABELS, each after `name=` where the metric calls it otherwise."""
    buckets: tuple[float, ...] = ()
    """Of histograms: upper bounds, without infinity."""

    @property
    def unit(self) -> str:
        """The last word of the name where that is a unit."""
        word = self.name.removesuffix("_total").rpartition("_")[2]
        return word if word in ("seconds", "bytes", "tokens", "versions") else ""


def staleness_class(versions: int) -> str:
    """The value of the label `staleness` for tokens that are so many versions behind."""
    if versions <= 4:
        return str(max(0, versions))
    return next((name for name, most in _STALE if versions <= most), _STALEST)


_STALE = (("5-8", 8), ("9-16", 16))
_STALEST = "17+"

LABELS: Mapping[str, Label] = MappingProxyType(
    {
        "run": Label("the run's name; a forgotten run makes room for a new one", limit=MAX_RUNS),
        "tool": Label(
            f"the tool's name; `{UNKNOWN_TOOL}` where the model called one that there is not, or wrote nonsense",
            limit=MAX_TOOLS,
        ),
        "outcome": Label("what became of a tool call", get_args(Outcome)),
        "stop_reason": Label("why a session ended; see docs/record.md", STOP_REASONS),
        "session_state": Label("queued: waits for a worker; running: held by one", ("queued", "running")),
        "group_state": Label("where a group is", ("waiting", "running", "ready", "leased")),
        "part": Label(
            "of a session: waiting to be started, the engine, its tools, the environment, from start to end",
            ("queue", "engine", "tool", "environment", "total"),
        ),
        "direction": Label("in: context that was not sampled (prompts, tool results); out: sampled", ("in", "out")),
        "category": Label("the first word of the trajectory's error", limit=MAX_REASONS, known=SESSION_ERRORS),
        "drop_reason": Label(
            "of the run's settings, or in the words of its own filter",
            limit=MAX_REASONS,
            known=("cancelled", "failed", "filter", "stale", "surplus", "truncated", "zero_variance"),
        ),
        "replace_reason": Label(
            "stale: too old for the bound; failed: a member died", limit=MAX_REASONS, known=("failed", "stale")
        ),
        "fork_reason": Label("why the history could not be extended", limit=MAX_REASONS),
        "hold": Label("what keeps waiting groups from starting", ("paused", "memory", "staleness")),
        "staleness": Label(
            "versions between the token and the lease", ("0", "1", "2", "3", "4", "5-8", "9-16", "17+")
        ),
        "lease_event": Label("what happened", ("granted", "acknowledged", "expired", "released")),
        "retry": Label(
            "session: an attempt was lost and begun again; turn: sent again, as its replica died", ("session", "turn")
        ),
        "death": Label(
            "worker: a session worker; replica: gone from Serve's list, scale-downs included; controller: this "
            "process is not its first",
            ("worker", "replica", "controller"),
        ),
        "update": Label(
            "done: on every replica; partial: not on all; refused: before anything changed; failed: on none",
            ("done", "partial", "refused", "failed"),
        ),
        "step": Label(
            "of one replica: generation stood still; of that, loading; reading back", ("pause", "load", "verify")
        ),
        "health": Label("of a replica's weights", ("healthy", "stale", "suspect")),
        "replica": Label("Serve's id of an engine replica, while it is listed", limit=MAX_REPLICAS, summed=False),
        "process": Label("`controller`, or a session worker's name", limit=MAX_WORKERS),
        "worker": Label("a session worker's name; `other` is the sum of the rest", limit=MAX_WORKERS),
        "quantile": Label("of the last minute", ("0.5", "0.99")),
        "capture_state": Label("open, or rewarded and not closed yet", ("open", "rewarded")),
        "capture_outcome": Label(
            "recorded; empty: the engine was asked for nothing; lost: its replica died",
            ("recorded", "empty", "lost"),
        ),
        "remote_state": Label(
            "queued: accepted; running: being played; unreported: its trainer does not know the end yet",
            ("queued", "running", "unreported"),
        ),
        "remote_outcome": Label("how it ended", ("completed", "error")),
        "remote_refusal": Label("busy: the queue is full; invalid: the request is wrong", ("busy", "invalid")),
        "foreign_outcome": Label(
            "completed: it came to its end; deadline; cancelled; remote: the server refused it, or reported an "
            "error; remote_died: it could not be reached, went away or failed (5xx); error: this side failed",
            ("completed", "deadline", "cancelled", "remote", "remote_died", "error"),
        ),
        "foreign_refusal": Label(
            "conflict: the rollout has ended, or another call is being answered; not_found: there is no such "
            "rollout; refused: the call breaks the protocol, or finds no room; unavailable: too many calls wait",
            ("conflict", "not_found", "refused", "unavailable"),
        ),
        "phase": Label("of all replicas together", get_args(Phase)),
    }
)

SECTIONS: Mapping[str, tuple[Metric, ...]] = MappingProxyType(
    {
        "Sessions": (
            Metric("rollout_sessions", "gauge", "Sessions that are not finished.", ("run", "state=session_state")),
            Metric("rollout_sessions_finished_total", "counter", "Trajectories taken in.", ("run", "stop_reason")),
            Metric("rollout_session_errors_total", "counter", "Trajectories that end with an error.", ("category",)),
            Metric("rollout_turns_total", "counter", "Turns of the model in finished trajectories.", ("run",)),
            Metric("rollout_tokens_total", "counter", "Tokens of finished trajectories.", ("run", "direction")),
            Metric(
                "rollout_session_seconds",
                "histogram",
                "Where the time of finished sessions went.",
                ("part",),
                SECONDS,
            ),
            Metric(
                "rollout_forks_total",
                "counter",
                "Segments begun because the history could not be extended token by token.",
                ("run", "reason=fork_reason"),
            ),
        ),
        "Tools": (
            Metric(
                "rollout_tool_calls_total", "counter", "Tool calls of finished trajectories.", ("tool", "outcome")
            ),
            Metric("rollout_tool_call_seconds", "histogram", "Seconds of one tool call.", ("tool",), SECONDS),
        ),
        "Rewards": (
            Metric("rollout_reward", "histogram", "Rewards of scored trajectories.", ("run",), REWARDS),
            Metric(
                "rollout_reward_mean",
                "gauge",
                f"Mean reward of the newest {REWARD_WINDOW} scored trajectories of a run.",
                ("run",),
            ),
        ),
        "Groups and batches": (
            Metric("rollout_groups", "gauge", "Groups that are not done.", ("run", "state=group_state")),
            Metric("rollout_groups_delivered_total", "counter", "Groups that a trainer acknowledged.", ("run",)),
            Metric(
                "rollout_groups_dropped_total",
                "counter",
                "Groups that will never be delivered.",
                ("run", "reason=drop_reason"),
            ),
            Metric(
                "rollout_groups_replaced_total",
                "counter",
                "Groups that were played again.",
                ("run", "reason=replace_reason"),
            ),
            Metric("rollout_runs_held", "gauge", "Runs whose waiting groups may not start.", ("reason=hold",)),
            Metric(
                "rollout_delivered_tokens_total",
                "counter",
                "Sampled tokens of acknowledged groups, by how old they were when they were leased.",
                ("run", "staleness"),
            ),
            Metric(
                "rollout_delivered_staleness_versions_total",
                "counter",
                "Versions behind, summed over these tokens: divided by their number, the mean staleness.",
                ("run",),
            ),
            Metric("rollout_leases_open", "gauge", "Batches that trainers hold."),
            Metric("rollout_lease_events_total", "counter", "What happened to batches.", ("event=lease_event",)),
            Metric(
                "rollout_finished_rows_bytes", "gauge", "Finished trajectories in memory that are not acknowledged."
            ),
        ),
        "Journal": (
            Metric("rollout_journal_bytes", "gauge", "Size on disk, the write-ahead log included."),
            Metric("rollout_journal_writes_total", "counter", "Writes that are on disk."),
            Metric(
                "rollout_journal_commits_total", "counter", "Transactions; each holds the writes that had queued up."
            ),
            Metric("rollout_journal_failed", "gauge", "1: it failed, and nothing is accepted until a restart."),
        ),
        "Failures": (
            Metric("rollout_retries_total", "counter", "Work that was done again.", ("kind=retry",)),
            Metric("rollout_deaths_total", "counter", "Parts of the cluster that died.", ("kind=death",)),
            Metric("rollout_controller_ready", "gauge", "1: the controller takes work."),
            Metric("rollout_controller_start_time_seconds", "gauge", "When this controller began, since the epoch."),
        ),
        "Weights": (
            Metric("rollout_weight_version", "gauge", "Version of the current weights."),
            Metric(
                "rollout_replica_weight_version", "gauge", "Version that a replica said it carries.", ("replica",)
            ),
            Metric("rollout_replicas", "gauge", "Engine replicas by the health of their weights.", ("health",)),
            Metric("rollout_weight_updates_total", "counter", "Updates that were asked for.", ("outcome=update",)),
            Metric(
                "rollout_weight_update_seconds", "histogram", "From the request to the last replica.", (), SECONDS
            ),
            Metric(
                "rollout_weight_replica_seconds", "histogram", "What an update costs one replica.", ("step",), PAUSES
            ),
            Metric("rollout_weight_replica_failures_total", "counter", "Replicas that did not take an update."),
        ),
        "Workers": (
            Metric("rollout_workers", "gauge", "Session workers that answer."),
            Metric("rollout_worker_sessions", "gauge", "Sessions that a worker holds.", ("worker",)),
            Metric("rollout_worker_memory_bytes", "gauge", "Resident memory of a worker.", ("worker",)),
            Metric(
                "rollout_worker_abandoned_threads",
                "gauge",
                "Synchronous tools that run on although their deadline has passed.",
                ("worker",),
            ),
            Metric(
                "rollout_event_loop_lag_seconds",
                "gauge",
                "How late an event loop is; of `other`, the worst.",
                ("process", "quantile"),
            ),
        ),
        "Captured sessions": (
            Metric(
                "rollout_capture_sessions",
                "gauge",
                "Captured sessions that are not closed.",
                ("state=capture_state",),
            ),
            Metric(
                "rollout_capture_requests_total",
                "counter",
                "Requests of black-box agents that an engine has reported.",
                ("outcome=capture_outcome",),
            ),
        ),
        "Remote rollouts": (
            Metric(
                "rollout_remote_rollouts", "gauge", "Rollouts played for foreign trainers.", ("state=remote_state",)
            ),
            Metric(
                "rollout_remote_finished_total",
                "counter",
                "Rollouts that were reported.",
                ("outcome=remote_outcome",),
            ),
            Metric(
                "rollout_remote_refused_total",
                "counter",
                "Rollouts that were not accepted.",
                ("reason=remote_refusal",),
            ),
        ),
        "Sessions at remote rollout servers": (
            Metric("rollout_foreign_rollouts", "gauge", "Sessions of this cluster that such a server plays."),
            Metric(
                "rollout_foreign_finished_total",
                "counter",
                "Attempts at such sessions that ended, those that are made again included.",
                ("outcome=foreign_outcome",),
            ),
            Metric(
                "rollout_foreign_seconds", "histogram", "Seconds of such an attempt, from start to end.", (), SECONDS
            ),
            Metric(
                "rollout_foreign_refused_total",
                "counter",
                "Calls of such servers that were not answered.",
                ("reason=foreign_refusal",),
            ),
        ),
        "Loading": (
            Metric("rollout_loading_phase", "gauge", "1 for the phase that the engines are in.", ("phase",)),
            Metric("rollout_loading_replicas_expected", "gauge", "Replicas that must be ready."),
            Metric("rollout_loading_replicas_ready", "gauge", "Replicas that are."),
            Metric(
                "rollout_loading_ratio",
                "gauge",
                "Bytes that a replica's ranks have read, of those that they must; only while it loads.",
                ("replica",),
            ),
        ),
    }
)

CATALOGUE: Mapping[str, Metric] = MappingProxyType(
    {metric.name: metric for metrics in SECTIONS.values() for metric in metrics}
)


def label_names(metric: Metric) -> tuple[str, ...]:
    """The names under which Prometheus shows a metric's labels."""
    return tuple(label.partition("=")[0] for label in metric.labels)


def label(metric: Metric, name: str) -> Label:
    """What a metric's label may say. Raises KeyError."""
    for written in metric.labels:
        shown, _, defined = written.partition("=")
        if shown == name:
            return LABELS[defined or shown]
    raise KeyError(name)


def series_names(metric: Metric) -> tuple[str, ...]:
    """The names that queries use."""
    if metric.kind != "histogram":
        return (metric.name,)
    # The client leaves the sum out where observations may be negative, as it could then fall.
    ends = ("_bucket", "_count", *(() if metric.buckets[0] < 0 else ("_sum",)))
    return tuple(metric.name + end for end in ends)
