"""The controller: takes tasks, keeps the session workers busy, gathers trajectories.

Invariant: every sample of a run is delivered exactly once, as the trajectory of one attempt or, where infrastructure
died under it too often, as an `error` trajectory. What to do is decided by the scheduler; this actor only talks.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from actors.engine_client import EngineInfo
from actors.messages import Collected, ControllerSettings, Delivery, Progress, RunSpec, Summary, WorkerStats
from actors.scheduler import Assignment, Scheduler
from actors.worker import SessionWorker
from rollout.errors import RolloutError, WorkerDied, describe
from rollout.record import to_table
from rollout.tasks import Task
from rollout.trajectory import Trajectory

logger = logging.getLogger(__name__)

# Longest wait of one `collect`; a worker without news answers empty after it.
COLLECT_TIMEOUT_S = 2.0
# A worker that has not answered by then is wedged (its event loop is blocked): it is killed and replaced.
WEDGED_S = 60.0
# Finished trajectories that nobody has taken yet; past this many no new session starts.
MAX_UNTAKEN = 20_000
# Sessions handed to a worker in one call.
START_BATCH = 256
# Pause before a replacement of a lost worker, so that one that dies at once does not spin.
RESPAWN_S = 0.5
# Ray's default of 1,000 concurrent calls is a hidden limit (and starves health checks when a fan-in meets it).
WORKER_CONCURRENCY = 64


@dataclass
class _Run:
    spec: RunSpec
    progress: Progress
    untaken: list[pa.Table] = field(default_factory=list)
    untaken_rows: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Controller:
    """One per cluster, detached, named "controller" in the cluster's namespace."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self._scheduler = Scheduler(settings.max_attempts, settings.max_concurrent_sessions)
        self._runs: dict[str, _Run] = {}
        self._workers: dict[str, Any] = {}
        self._stats: dict[str, WorkerStats] = {}
        self._serial = itertools.count()
        self._loops: set[asyncio.Task[None]] = set()
        self._workers_lost = 0
        self._engine: EngineInfo | None = None
        self._stopping = False
        self._failure: BaseException | None = None
        self._started_at = time.time()

    async def spawn_workers(self) -> str:
        """Start the workers, which load the renderer meanwhile. Returns the renderer's name.

        Raises RolloutError if they cannot be scheduled or cannot load the model's tokenizer.
        """
        names = [self._spawn() for _ in range(self._settings.num_workers)]
        try:
            async with asyncio.timeout(self._settings.start_timeout):
                return (await asyncio.gather(*(self._workers[n].renderer_name.remote() for n in names)))[0]
        except TimeoutError:
            raise RolloutError(
                f"the session workers did not start within {self._settings.start_timeout:g} s; does the cluster have "
                f"{self._settings.num_workers} free CPUs for them? (workers.count, ray.num_cpus)"
            ) from None

    async def connect(self) -> EngineInfo:
        """Connect the workers to the engines and begin to collect. Raises EngineTimeout."""
        timeout = self._settings.start_timeout
        infos = await asyncio.gather(*(worker.connect.remote(timeout) for worker in self._workers.values()))
        self._engine = infos[0]
        for name in self._workers:
            self._admit(name)
        return infos[0]

    async def submit(self, spec: RunSpec, tasks: list[Task]) -> int:
        """Queue a run's tasks in groups. Returns the number of samples. Raises ValueError for a task seen before."""
        run = self._runs.setdefault(spec.run, _Run(spec, Progress(self._scheduler.counts(spec.run))))
        count = len(self._scheduler.submit(spec.run, tasks, spec.group_size))
        self._dispatch()
        run.news.set()
        return count

    async def take(self, run_name: str, timeout: float) -> Delivery:
        """Hand over what has finished since the last call, waiting up to `timeout` seconds for something."""
        run = self._run(run_name)
        try:
            async with asyncio.timeout(timeout):
                await run.news.wait()
        except TimeoutError:
            pass
        if self._failure is not None:
            raise RolloutError(f"the controller failed: {self._failure!r}")
        run.news.clear()
        tables, run.untaken, run.untaken_rows = run.untaken, [], 0
        self._dispatch()
        progress = self._progress(run)
        finished = progress.counts.done == progress.counts.total and not run.untaken
        return Delivery(pa.concat_tables(tables) if tables else None, progress, finished)

    async def cancel(self, run_name: str) -> None:
        """End a run: queued samples become `cancelled` trajectories, running ones too, with what they have."""
        run = self._run(run_name)
        queued = self._scheduler.cancel_queued(run_name)
        self._deliver(run, [_unplayed(a, "cancelled", None) for a in queued])
        for name, trajectory_ids in self._scheduler.running_of(run_name).items():
            # Not awaited: if the worker is dead or wedged, its collect loop says so, and nothing of the run restarts.
            self._workers[name].cancel.remote(trajectory_ids)

    async def forget(self, run_name: str) -> None:
        """Drop a finished run."""
        self._scheduler.forget(run_name)
        self._runs.pop(run_name, None)

    async def status(self) -> dict[str, Any]:
        """Runs, workers and engine at this moment, as plain data."""
        return {
            "uptime_s": time.time() - self._started_at,
            "engine": self._engine,
            "workers_lost": self._workers_lost,
            "workers": list(self._stats.values()),
            "runs": {name: self._progress(run) for name, run in self._runs.items()},
        }

    async def worker_handles(self) -> dict[str, Any]:
        """The workers by id."""
        return dict(self._workers)

    async def stop(self) -> None:
        """Close the workers, within a few seconds."""
        self._stopping = True
        for task in self._loops:
            task.cancel()
        try:
            async with asyncio.timeout(5):
                await asyncio.gather(
                    *(worker.close.remote() for worker in self._workers.values()), return_exceptions=True
                )
        except TimeoutError:
            logger.warning("some session workers did not close in time")

    # Workers

    def _spawn(self) -> str:
        name = f"worker-{next(self._serial)}"
        actor = ray.remote(SessionWorker)
        self._workers[name] = actor.options(
            num_cpus=1,
            max_concurrency=WORKER_CONCURRENCY,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": self._settings.worker_env},
        ).remote(name, self._settings.worker)
        return name

    def _admit(self, name: str) -> None:
        self._scheduler.add_worker(name, self._settings.worker.capacity)
        self._keep(self._collect_from(name))
        self._dispatch()

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._loops.add(task)
        task.add_done_callback(self._loop_ended)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        self._loops.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            # A bug of ours, and the worst kind: sessions would wait for ever on a loop that is gone.
            logger.error("a background loop of the controller failed", exc_info=failure)
            self._failure = failure
            for run in self._runs.values():
                run.news.set()

    async def _collect_from(self, name: str) -> None:
        """Long-poll one worker until it dies."""
        worker = self._workers[name]
        while not self._stopping:
            try:
                async with asyncio.timeout(WEDGED_S):
                    collected: Collected = await worker.collect.remote(COLLECT_TIMEOUT_S)
            except asyncio.CancelledError:
                raise
            except Exception as failure:
                await self._replace(name, failure)
                return
            self._stats[name] = collected.stats
            self._accept(collected)
            self._dispatch()

    async def _replace(self, name: str, failure: Exception) -> None:
        """A worker is gone: its sessions run again elsewhere, and a new one takes its place."""
        logger.warning("session worker %s was lost: %s", name, str(failure).splitlines()[0])
        self._workers_lost += 1
        ray.kill(self._workers.pop(name), no_restart=True)
        self._stats.pop(name, None)
        for assignment in self._scheduler.worker_lost(name):
            lost = WorkerDied(f"session workers died over this session {assignment.attempt} times")
            self._deliver(self._runs[assignment.key.run], [_unplayed(assignment, "error", lost)])
        self._dispatch()
        while not self._stopping:
            await asyncio.sleep(RESPAWN_S)
            replacement = self._spawn()
            try:
                async with asyncio.timeout(self._settings.start_timeout):
                    await self._workers[replacement].connect.remote(self._settings.start_timeout)
            except asyncio.CancelledError:
                raise
            except Exception as again:
                logger.warning("a replacement for %s did not start: %s", name, again)
                ray.kill(self._workers.pop(replacement), no_restart=True)
                continue
            self._admit(replacement)
            return

    # Sessions

    def _dispatch(self) -> None:
        if sum(run.untaken_rows for run in self._runs.values()) >= MAX_UNTAKEN:
            return
        for name, assignments in self._scheduler.assign().items():
            by_run: dict[str, list[Assignment]] = {}
            for assignment in assignments:
                by_run.setdefault(assignment.key.run, []).append(assignment)
            for run_name, mine in by_run.items():
                spec = self._runs[run_name].spec
                for start in range(0, len(mine), START_BATCH):
                    # Not awaited: if the worker is dead, its collect loop says so.
                    self._workers[name].start.remote(spec, mine[start : start + START_BATCH])

    def _accept(self, collected: Collected) -> None:
        kept: dict[str, list[Summary]] = {}
        for summary in collected.summaries:
            if self._scheduler.finished(summary.trajectory_id, summary.attempt, retryable=summary.retryable):
                kept.setdefault(self._scheduler.run_of(summary.trajectory_id), []).append(summary)
            else:
                logger.info("attempt %d of %s runs again: %s", summary.attempt, summary.trajectory_id, summary.error)
        for run_name, summaries in kept.items():
            run = self._runs[run_name]
            assert collected.table is not None
            if len(summaries) == len(collected.summaries):
                self._put(run, collected.table)
            else:
                pieces = [collected.table.slice(s.first_row, s.num_rows) for s in summaries]
                self._put(run, pa.concat_tables(pieces))
            for summary in summaries:
                _count(run.progress, summary)

    def _deliver(self, run: _Run, trajectories: list[Trajectory]) -> None:
        if trajectories:
            self._put(run, to_table(trajectories))
            for trajectory in trajectories:
                reasons = run.progress.stop_reasons
                reasons[trajectory.stop_reason] = reasons.get(trajectory.stop_reason, 0) + 1

    def _put(self, run: _Run, table: pa.Table) -> None:
        run.untaken.append(table)
        run.untaken_rows += table.num_rows
        run.news.set()

    def _run(self, name: str) -> _Run:
        try:
            return self._runs[name]
        except KeyError:
            raise ValueError(f"there is no run {name!r}; the runs are: {', '.join(self._runs) or 'none'}") from None

    def _progress(self, run: _Run) -> Progress:
        run.progress.counts = self._scheduler.counts(run.spec.run)
        run.progress.workers_lost = self._workers_lost
        run.progress.workers = list(self._stats.values())
        return run.progress


def _unplayed(assignment: Assignment, stop_reason: Any, failure: RolloutError | None) -> Trajectory:
    """The trajectory of a sample that left no tokens."""
    return Trajectory(
        assignment.key,
        [],
        stop_reason,
        list(assignment.task.messages),
        error=None if failure is None else describe(failure),
        metadata=assignment.task.metadata,
        attempts=assignment.attempt,
    )


def _count(progress: Progress, summary: Summary) -> None:
    progress.tokens += summary.num_sampled
    progress.turns += summary.num_turns
    progress.tool_calls += summary.tool_calls
    progress.tool_errors += summary.tool_errors
    progress.forks += max(0, summary.num_segments - 1)
    reasons = progress.stop_reasons
    reasons[summary.stop_reason] = reasons.get(summary.stop_reason, 0) + 1
    if summary.reward is not None:
        progress.scored += 1
        progress.reward_sum += summary.reward
