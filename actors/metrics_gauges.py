"""What a scrape finds by looking: the state of the controller's parts as gauges.

Invariant: looking changes nothing and waits for nothing. A series whose subject is gone (a replica, a worker, a run)
is gone with the next scrape.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.loading_board import BoardReader
from actors.loop_lag import LoopLag
from actors.messages import WorkerStats
from actors.metrics import Metrics
from actors.replica_health import Health, ReplicaTable
from actors.run_service import RunService
from actors.run_store import RunStore
from rollout.errors import RolloutError
from rollout.loading import Snapshot, merge
from rollout.metrics_catalogue import LABELS, MAX_REPLICAS, MAX_WORKERS, OTHER
from rollout.remote.order import RolloutCounts

MIB = 2**20
# A scrape does not wait longer for the loading board.
BOARD_SECONDS = 1.0
_DYNAMIC = (
    "rollout_sessions",
    "rollout_groups",
    "rollout_replica_weight_version",
    "rollout_worker_sessions",
    "rollout_worker_memory_bytes",
    "rollout_worker_abandoned_threads",
    "rollout_event_loop_lag_seconds",
    "rollout_loading_ratio",
)


@dataclass
class Sources:
    """Where to look."""

    store: RunStore
    service: RunService
    workers: Sequence[WorkerStats]
    lag: LoopLag
    """Of the controller's own loop."""
    started_at: float
    """Seconds since the epoch."""
    ready: bool
    replicas: ReplicaTable | None
    """None before the engines are reached."""
    capture: Mapping[str, int]
    """Open captured sessions by state."""
    remote: Callable[[], Awaitable[RolloutCounts]]
    """Rollouts for foreign trainers; raises RolloutError where this cluster plays none."""
    board: BoardReader


async def scrape(metrics: Metrics, sources: Sources) -> bytes:
    """All metrics as text, the gauges brought up to date."""
    loading, remote = None, None
    with contextlib.suppress(TimeoutError, RolloutError):
        async with asyncio.timeout(BOARD_SECONDS):
            loading = await sources.board.snapshot()
    with contextlib.suppress(RolloutError):
        remote = await sources.remote()
    return await metrics.text(lambda: collect(metrics, sources, loading, remote))


def collect(metrics: Metrics, sources: Sources, loading: Snapshot | None, remote: RolloutCounts | None) -> None:
    """Bring all gauges up to date. `loading`, `remote`: None where nobody tells."""
    for name in _DYNAMIC:
        metrics.clear(name)
    _runs(metrics, sources.store, sources.service)
    _journal(metrics, sources.store)
    _workers(metrics, sources.workers)
    _lag(metrics, "controller", sources.lag.quantile(0.5), sources.lag.quantile(0.99))
    metrics.set("rollout_controller_ready", float(sources.ready))
    metrics.set("rollout_controller_start_time_seconds", sources.started_at)
    metrics.set("rollout_weight_version", sources.store.version)
    _replicas(metrics, sources.replicas)
    for state in LABELS["capture_state"].values:
        metrics.set("rollout_capture_sessions", sources.capture.get(state, 0), state=state)
    _remote(metrics, remote)
    _loading(metrics, loading)


def _runs(metrics: Metrics, store: RunStore, service: RunService) -> None:
    groups: Counter[tuple[str, str]] = Counter()
    sessions: Counter[tuple[str, str]] = Counter()
    held: Counter[str] = Counter()
    for name in store.runs:
        run, info, counts = metrics.run_label(name), service.info(name), store.scheduler.counts(name)
        for state in LABELS["group_state"].values:
            groups[run, state] += getattr(info, state)
        sessions[run, "queued"] += counts.queued
        sessions[run, "running"] += counts.running
        if info.held_by is not None:
            held[info.held_by] += 1
    for (run, state), number in groups.items():
        metrics.set("rollout_groups", number, run=run, state=state)
    for (run, state), number in sessions.items():
        metrics.set("rollout_sessions", number, run=run, state=state)
    for reason in LABELS["hold"].values:
        metrics.set("rollout_runs_held", held[reason], reason=reason)
    metrics.set("rollout_leases_open", store.leases.num_active)
    metrics.set("rollout_finished_rows_bytes", store.shelf.num_bytes)


def _journal(metrics: Metrics, store: RunStore) -> None:
    journal = store.journal
    metrics.set("rollout_journal_bytes", journal.num_bytes())
    metrics.set("rollout_journal_writes_total", journal.writes)
    metrics.set("rollout_journal_commits_total", journal.commits)
    metrics.set("rollout_journal_failed", float(store.failure is not None))


def _workers(metrics: Metrics, workers: Sequence[WorkerStats]) -> None:
    metrics.set("rollout_workers", len(workers))
    metrics.set("rollout_foreign_rollouts", sum(stats.foreign for stats in workers))
    ordered = sorted(workers, key=lambda stats: stats.worker_id)
    for stats in ordered[:MAX_WORKERS]:
        _worker(metrics, stats.worker_id, [stats])
    if rest := ordered[MAX_WORKERS:]:
        _worker(metrics, OTHER, rest)


def _worker(metrics: Metrics, name: str, workers: list[WorkerStats]) -> None:
    metrics.set("rollout_worker_sessions", sum(w.sessions for w in workers), worker=name)
    metrics.set("rollout_worker_memory_bytes", sum(w.rss_mb for w in workers) * MIB, worker=name)
    metrics.set("rollout_worker_abandoned_threads", sum(w.abandoned_threads for w in workers), worker=name)
    _lag(metrics, name, max(w.loop_lag_p50_s for w in workers), max(w.loop_lag_p99_s for w in workers))


def _lag(metrics: Metrics, process: str, median: float, worst: float) -> None:
    metrics.set("rollout_event_loop_lag_seconds", median, process=process, quantile="0.5")
    metrics.set("rollout_event_loop_lag_seconds", worst, process=process, quantile="0.99")


def _replicas(metrics: Metrics, table: ReplicaTable | None) -> None:
    names = [] if table is None else table.names()
    healths = Counter(table.health(name) for name in names) if table is not None else Counter[Health]()
    for health in Health:
        metrics.set("rollout_replicas", healths[health], health=health.value)
    if table is None:
        return
    versions = table.versions()
    for name in names[:MAX_REPLICAS]:
        if (version := versions[name]) is not None:
            metrics.set("rollout_replica_weight_version", version, replica=name)


def _remote(metrics: Metrics, counts: RolloutCounts | None) -> None:
    for state in LABELS["remote_state"].values:
        metrics.set("rollout_remote_rollouts", 0 if counts is None else getattr(counts, state), state=state)
    if counts is not None:
        metrics.set("rollout_remote_finished_total", counts.completed - counts.failed, outcome="completed")
        metrics.set("rollout_remote_finished_total", counts.failed, outcome="error")


def _loading(metrics: Metrics, loading: Snapshot | None) -> None:
    # A board that does not answer is not the same as nothing that loads, but there is no third value for a phase.
    phase = "nothing" if loading is None else loading.phase
    for value in LABELS["phase"].values:
        metrics.set("rollout_loading_phase", float(value == phase), phase=value)
    metrics.set("rollout_loading_replicas_expected", 0 if loading is None else loading.expected)
    metrics.set("rollout_loading_replicas_ready", 0 if loading is None else loading.ready)
    if loading is None or loading.phase != "loading":
        return
    names = sorted({str(event.data["replica"]) for event in loading.events if event.data.get("replica")})
    for name in names[:MAX_REPLICAS]:
        merged = merge(loading.events, name)
        if merged is not None and merged.fraction is not None:
            metrics.set("rollout_loading_ratio", merged.fraction, replica=name)
