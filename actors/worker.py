"""The session worker: an async actor that plays hundreds of sessions on one event loop.

Invariant: every session it accepts ends in exactly one summary with its rows, or dies with the worker; a session
that fails in any way, even in being written down, harms no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import time
from typing import Any

import psutil

from actors.engine_client import EngineClient, EngineInfo
from actors.foreign_rollouts import ForeignRollouts
from actors.loop_lag import LoopLag
from actors.messages import Collected, RunSpec, WorkerSettings, WorkerStats
from actors.remote_player import RemotePlayer
from actors.rows import to_rows
from actors.scheduler import Assignment
from rollout import logs, tracing
from rollout.correlation import enter_session
from rollout.environment import EnvironmentFactory, load_environment
from rollout.errors import describe
from rollout.mcp_tools import McpServers
from rollout.reasoning import ReasoningMarkers, find_markers
from rollout.remote.foreign_session import ForeignSession
from rollout.remote.order import RolloutOrder
from rollout.remote.wire import CompletionRequest, CompletionResponse, RolloutResponse
from rollout.rendering import load_renderer
from rollout.session import Session
from rollout.token_model import TokenModel
from rollout.tool_calls import abandoned_threads
from rollout.trajectory import SessionKey, StopReason, Trajectory

logger = logging.getLogger(__name__)

# Finished sessions wait this long for others to travel with.
COLLECT_S = 0.02
# Cancelled sessions get so long to close their environments when the worker ends; the pool waits a second longer.
CLOSE_SECONDS = 4.0
# Sessions are long-lived objects in large numbers; the default thresholds make the collector walk all of them
# again and again (a third of the CPU at 10,000 sessions). They hold few cycles, so it may come more rarely.
GC_THRESHOLD = (100_000, 20, 50)


class SessionWorker:
    """One worker. Its methods are called by the controller, and those of remote rollouts by gateways."""

    def __init__(self, worker_id: str, settings: WorkerSettings) -> None:
        logs.install(settings.logging, "worker", worker_id)
        tracing.install(settings.tracing, "worker", worker_id)
        self._id = worker_id
        self._settings = settings
        self._chat = load_renderer(settings.model, settings.renderer, settings.renderer_options, settings.revision)
        self._chat.warm_up()
        self._markers = find_markers(self._chat.tokenizer, self._chat.stop_token_ids)
        # The first table loads pandas (a second): not on the event loop, with sessions waiting.
        to_rows([Trajectory(SessionKey("", "", "", 0), [], "stop", [])])
        self._mcp = McpServers(settings.mcp_servers)
        self._engine: EngineClient | None = None
        self._environments: dict[tuple[str, str], EnvironmentFactory] = {}
        self._sessions: dict[str, asyncio.Task[None]] = {}
        # More sessions are held than play: one that ends is followed by the next without asking the controller.
        self._slots = asyncio.Semaphore(settings.max_sessions)
        self._foreign = ForeignRollouts(worker_id, settings)
        self._remote = RemotePlayer(settings.remote, self._chat, self._mcp)
        self._finished: list[Trajectory] = []
        self._some_finished = asyncio.Event()
        self._lag = LoopLag()
        self._lag_task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = psutil.Process()

    async def connect(self, timeout: float) -> EngineInfo:
        """Reach the engines. Raises EngineTimeout."""
        from ray import serve

        handle = serve.get_deployment_handle(self._settings.deployment, self._settings.app)
        self._engine = EngineClient(handle, worker_id=self._id, sticky_margin=self._settings.sticky_margin)
        info = await self._engine.connect(timeout)
        self._lag_task = asyncio.create_task(self._lag.watch())
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        return info

    async def renderer_name(self) -> str:
        """Which renderer was chosen."""
        return self._chat.name

    async def reasoning_markers(self) -> ReasoningMarkers | None:
        """The model's, for those who have no tokenizer."""
        return self._markers

    async def forget_run(self, run: str) -> None:
        """A run is gone, and with it its environments."""
        for key in [key for key in self._environments if key[0] == run]:
            del self._environments[key]
        await self._foreign.forget_run(run)

    async def start(self, spec: RunSpec, assignments: list[Assignment]) -> None:
        """Begin sessions; returns at once."""
        self._loop = asyncio.get_running_loop()
        for assignment in assignments:
            trajectory_id = assignment.key.trajectory_id
            task = asyncio.create_task(self._play(spec, assignment))
            task.add_done_callback(functools.partial(self._unbegun, spec, assignment))
            self._sessions[trajectory_id] = task

    async def cancel(self, trajectory_ids: list[str]) -> None:
        """End sessions as `cancelled`; their trajectories are collected like all others."""
        for trajectory_id in trajectory_ids:
            task = self._sessions.get(trajectory_id)
            if task is not None:
                task.cancel()

    async def avoid(self, replicas: frozenset[str]) -> None:
        """Replicas that carry what they should not: they get no turns. Said again once this worker is connected."""
        if self._engine is not None:
            self._engine.avoid(replicas)

    async def foreign_complete(self, rollout_id: str, request: CompletionRequest) -> CompletionResponse:
        """A model call of a remote rollout server. Raises ApiError, EngineError."""
        return await self._foreign.complete(rollout_id, request)

    async def foreign_completed(self, rollout_id: str, report: RolloutResponse) -> None:
        """A remote rollout server's report. Raises ApiError."""
        await self._foreign.completed(rollout_id, report)

    async def play_remote(self, order: RolloutOrder, queue_s: float) -> RolloutResponse:
        """A rollout for a foreign trainer, to its end. `queue_s`: seconds that it has waited."""
        return await self._remote.play(order, queue_s)

    async def remote_tools(self) -> list[dict[str, Any]]:
        """The tools of such rollouts. Raises RolloutError."""
        return await self._remote.tools()

    async def collect(self, timeout: float) -> Collected:
        """Finished sessions, as soon as there are some; empty after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._some_finished.wait()
            if self._sessions:
                await asyncio.sleep(COLLECT_S)
        except TimeoutError:
            pass
        self._some_finished.clear()
        finished, self._finished = self._finished, []
        if not finished:
            return Collected(None, [], self.stats(), self._foreign.news())
        rows, summaries = to_rows(finished, self._markers)
        return Collected(rows, summaries, self.stats(), self._foreign.news())

    def stats(self) -> WorkerStats:
        """This worker's figures now."""
        engine = self._engine
        return WorkerStats(
            worker_id=self._id,
            sessions=len(self._sessions),
            loop_lag_p50_s=self._lag.quantile(0.5),
            loop_lag_p99_s=self._lag.quantile(0.99),
            resends=engine.resends if engine else 0,
            abandoned_threads=abandoned_threads(),
            replicas={name: load.in_flight for name, load in engine.replicas.items()} if engine else {},
            rss_mb=self._process.memory_info().rss / 2**20,
            foreign=self._foreign.playing,
        )

    async def close(self) -> None:
        """Release what outlives a process badly: environments hold sandboxes, MCP servers are child processes."""
        sessions = list(self._sessions.values())
        for task in sessions:
            task.cancel()
        if sessions:
            await asyncio.wait(sessions, timeout=CLOSE_SECONDS)
        if self._engine is not None:
            self._engine.close()
        await self._foreign.close()
        await self._mcp.close()
        await asyncio.to_thread(tracing.uninstall)

    def __ray_shutdown__(self) -> None:
        """Ray calls it when the process is told to end (SIGTERM), and has stopped the event loop by then."""
        loop = self._loop
        if loop is not None and not loop.is_running() and not loop.is_closed():
            with contextlib.suppress(Exception):
                loop.run_until_complete(asyncio.wait_for(self.close(), 1.0 + CLOSE_SECONDS))

    async def _play(self, spec: RunSpec, assignment: Assignment) -> None:
        key = assignment.key
        enter_session(key.run, key.trajectory_id)
        try:
            # Sessions that wait for a remote rollout server take no places of others.
            async with self._foreign.slots(spec.run) if _is_foreign(spec, assignment) else self._slots:
                trajectory = await self._traced(spec, assignment)
        except Exception as failure:
            # Before there was a session: its environment could not be loaded.
            trajectory = _unplayed(assignment, "error", failure)
        except asyncio.CancelledError:
            trajectory = _unplayed(assignment, "cancelled")
        self._deliver(spec, assignment, trajectory)

    def _unbegun(self, spec: RunSpec, assignment: Assignment, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step runs nothing of `_play`, not even what catches that."""
        if task.cancelled():
            enter_session(assignment.key.run, assignment.key.trajectory_id)
            self._deliver(spec, assignment, _unplayed(assignment, "cancelled"))

    def _deliver(self, spec: RunSpec, assignment: Assignment, trajectory: Trajectory) -> None:
        trajectory_id = assignment.key.trajectory_id
        self._sessions.pop(trajectory_id, None)
        if self._engine is not None:
            self._engine.forget(trajectory_id)
        if _is_foreign(spec, assignment):
            self._foreign.ended(trajectory)
        _log_end(trajectory)
        self._finished.append(trajectory)
        self._some_finished.set()

    async def _traced(self, spec: RunSpec, assignment: Assignment) -> Trajectory:
        session = self._session(spec, assignment)
        if not tracing.enabled():
            # What the span would tell has to be counted, token by token.
            return await session.run()
        key = assignment.key
        with tracing.span("session", task_id=key.task_id, group_id=key.group_id, attempt=assignment.attempt) as span:
            trajectory = await session.run()
            span.set(
                stop_reason=trajectory.stop_reason,
                reward=trajectory.reward,
                output_tokens=trajectory.num_sampled,
                segments=len(trajectory.segments),
                tool_calls=len(trajectory.tool_calls),
                queue_s=trajectory.timing.queue_s,
                error=trajectory.error,
            )
        return trajectory

    def _session(self, spec: RunSpec, assignment: Assignment) -> Session | ForeignSession:
        assert self._engine is not None, "connect() comes first"
        if _is_foreign(spec, assignment):
            scores = self._environment(spec, spec.environment) if spec.environment else None
            return self._foreign.session(spec, assignment, self._engine, self._chat, scores)
        environment = self._environment(spec, assignment.task.environment or spec.environment)
        return Session(
            assignment.key,
            assignment.task,
            environment=environment,
            model=TokenModel(assignment.key, self._engine, self._chat, spec.sampling),
            limits=spec.limits,
            mcp=self._mcp,
            attempt=assignment.attempt,
            queue_s=max(0.0, time.time() - assignment.queued_at) if assignment.queued_at else 0.0,
        )

    def _environment(self, spec: RunSpec, path: str) -> EnvironmentFactory:
        known = self._environments.get((spec.run, path))
        if known is None:
            # A task that names its own environment gets it without the run's arguments, which are not for it.
            arguments = spec.environment_args if path == spec.environment else {}
            known = self._environments[spec.run, path] = load_environment(path, arguments)
        return known


def _is_foreign(spec: RunSpec, assignment: Assignment) -> bool:
    """Whether a remote rollout server plays it: a task that names an environment of its own is played here."""
    return spec.remote is not None and assignment.task.environment is None


def _log_end(trajectory: Trajectory) -> None:
    """What `rollout logs --trajectory` ends with. An ordinary end is worth a line only to `logging.level: debug`."""
    level = logging.WARNING if trajectory.stop_reason == "error" else logging.DEBUG
    if logger.isEnabledFor(level):
        logger.log(
            level,
            "session ended with %s after %.2f s: reward %s, %d tokens sampled, attempt %d%s",
            trajectory.stop_reason,
            trajectory.timing.total_s,
            trajectory.reward,
            trajectory.num_sampled,
            trajectory.attempts,
            f": {trajectory.error}" if trajectory.error else "",
        )


def _unplayed(assignment: Assignment, stop_reason: StopReason, failure: Exception | None = None) -> Trajectory:
    return Trajectory(
        assignment.key,
        [],
        stop_reason,
        list(assignment.task.messages),
        error=None if failure is None else describe(failure),
        metadata=assignment.task.metadata,
        attempts=assignment.attempt,
    )
