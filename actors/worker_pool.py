"""The pool of session workers: started, listened to, replaced when they die.

Invariant: a worker that dies or stops answering is found by the call that waits for it, within WEDGED_S; its sessions
run again elsewhere and a new worker takes its place. So does one in which too many synchronous calls hang: it would
play nothing more, and being the least loaded, draw all that waits. No loop of this pool ends in silence.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import ray

from actors.engine_client import EngineInfo
from actors.messages import Collected, ControllerSettings, WorkerStats
from actors.metrics import Metrics
from actors.scheduler import Assignment, Scheduler
from actors.worker import SessionWorker
from rollout.errors import RolloutError
from rollout.reasoning import ReasoningMarkers
from rollout.tool_calls import MAX_ABANDONED_THREADS

logger = logging.getLogger(__name__)

# Longest wait of one `collect`; a worker without news answers empty after it.
COLLECT_TIMEOUT_S = 2.0
# A worker that has not answered by then is wedged (its event loop is blocked): it is killed and replaced.
WEDGED_S = 60.0
# Sessions handed to a worker in one call.
START_BATCH = 256
# Pause before a replacement of a lost worker, so that one that dies at once does not spin.
RESPAWN_S = 0.5
# Ray's default of 1,000 concurrent calls is a hidden limit (and starves health checks when a fan-in meets it).
WORKER_CONCURRENCY = 64
CLOSE_SECONDS = 5.0
# A worker that has started and waits for the engines answers at once.
ANSWER_SECONDS = 30.0

OnCollected = Callable[[str, Collected], Awaitable[None]]
OnGivenUp = Callable[[list[Assignment]], Awaitable[None]]


class WorkerPool:
    """All session workers of a cluster."""

    def __init__(
        self,
        settings: ControllerSettings,
        scheduler: Scheduler,
        *,
        on_collected: OnCollected,
        on_given_up: OnGivenUp,
        dispatch: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        """`on_given_up`: sessions over which workers died too often."""
        self._settings = settings
        self._scheduler = scheduler
        self._on_collected = on_collected
        self._on_given_up = on_given_up
        self._dispatch = dispatch
        self._metrics = metrics
        self._handles: dict[str, Any] = {}
        self._stats: dict[str, WorkerStats] = {}
        self._serial = itertools.count()
        self._loops: set[asyncio.Task[None]] = set()
        self._avoided: frozenset[str] = frozenset()
        self._stopping = False
        self.lost = 0
        """Workers that died so far."""
        self.failure: BaseException | None = None
        """A bug that ended one of the loops."""

    async def spawn(self) -> str:
        """Start all workers, which load the renderer meanwhile. Returns the renderer's name.

        Raises RolloutError if they cannot be scheduled or cannot load the model's tokenizer; it may be called again.
        """
        # Of an attempt that came to nothing.
        for handle in self._handles.values():
            ray.kill(handle, no_restart=True)
        self._handles.clear()
        names = [self._spawn() for _ in range(self._settings.num_workers)]
        try:
            async with asyncio.timeout(self._settings.start_timeout):
                return (await asyncio.gather(*(self._handles[n].renderer_name.remote() for n in names)))[0]
        except TimeoutError:
            raise RolloutError(
                f"the session workers did not start within {self._settings.start_timeout:g} s; does the cluster have "
                f"{self._settings.num_workers} free CPUs for them? (workers.count, ray.num_cpus)"
            ) from None

    async def reasoning_markers(self) -> ReasoningMarkers | None:
        """The model's, as the first worker has found them. Raises RolloutError where none answers in time."""
        worker = next(iter(self._handles.values()))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await worker.reasoning_markers.remote()
        except TimeoutError:
            raise RolloutError(f"a session worker did not answer within {ANSWER_SECONDS:g} s") from None

    async def connect(self) -> EngineInfo:
        """Connect all workers to the engines and begin to listen. Raises EngineTimeout."""
        timeout = self._settings.start_timeout
        infos = await asyncio.gather(*(handle.connect.remote(timeout) for handle in self._handles.values()))
        for name in self._handles:
            self._admit(name)
        return infos[0]

    def start(self, worker: str, spec: Any, assignments: list[Assignment]) -> None:
        """Hand sessions of one run to a worker. Whether they arrive, its collect loop will tell."""
        for start in range(0, len(assignments), START_BATCH):
            self._handles[worker].start.remote(spec, assignments[start : start + START_BATCH])

    def cancel(self, sessions: dict[str, list[str]]) -> None:
        """End sessions, by worker. Not awaited: if a worker is dead or wedged, its collect loop says so."""
        for name, ids in sessions.items():
            if name in self._handles and ids:
                self._handles[name].cancel.remote(ids)

    def avoid(self, replicas: frozenset[str]) -> None:
        """From now on these replicas get no turns, and all others may."""
        self._avoided = replicas
        for handle in self._handles.values():
            handle.avoid.remote(replicas)

    def forget_run(self, run: str) -> None:
        """Tell all workers that a run is gone."""
        for handle in self._handles.values():
            handle.forget_run.remote(run)

    @property
    def stats(self) -> list[WorkerStats]:
        """The last that each worker said of itself."""
        return list(self._stats.values())

    @property
    def heard(self) -> dict[str, tuple[Any, int]]:
        """Handles of the workers that have answered since they were started, by name, with the sessions of each."""
        return {name: (self._handles[name], stats.sessions) for name, stats in self._stats.items()}

    @property
    def handles(self) -> dict[str, Any]:
        """The workers' actor handles by name."""
        return dict(self._handles)

    async def close(self) -> None:
        """Close the workers, within a few seconds."""
        self._stopping = True
        for task in self._loops:
            task.cancel()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(*(h.close.remote() for h in self._handles.values()), return_exceptions=True)
        except TimeoutError:
            logger.warning("some session workers did not close in time")

    def _spawn(self) -> str:
        name = f"worker-{next(self._serial)}"
        worker = self._settings.worker
        actor = ray.remote(SessionWorker)
        self._handles[name] = actor.options(
            num_cpus=1,
            # Remote rollout servers' calls wait in the actor while the engine samples, and so do whole rollouts.
            max_concurrency=WORKER_CONCURRENCY + worker.foreign_calls + worker.remote_calls,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": self._settings.worker_env},
        ).remote(name, worker)
        return name

    def _admit(self, name: str) -> None:
        if self._avoided:
            self._handles[name].avoid.remote(self._avoided)
        self._scheduler.add_worker(name, self._settings.worker.capacity)
        self._keep(self._collect_from(name))
        self._dispatch()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._loops.add(task)
        task.add_done_callback(self._loop_ended)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        self._loops.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            # A bug of ours, and the worst kind: sessions would wait for ever on a loop that is gone.
            logger.error("a loop of the worker pool failed", exc_info=failure)
            self.failure = failure

    async def _collect_from(self, name: str) -> None:
        """Long-poll one worker until it dies."""
        worker = self._handles[name]
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
            self._metrics.heard(collected.stats)
            self._metrics.foreign(collected.foreign)
            if (hung := collected.stats.abandoned_threads) >= MAX_ABANDONED_THREADS:
                if collected.summaries:
                    # First, or what has finished would be played again.
                    await self._on_collected(name, collected)
                await self._replace(name, RolloutError(f"{hung} synchronous calls hang in it and cannot be stopped"))
                return
            if collected.summaries:
                # Not awaited: the next sessions need not wait for the disk.
                self._keep(self._take(name, collected))

    async def _take(self, name: str, collected: Collected) -> None:
        await self._on_collected(name, collected)
        self._dispatch()

    async def _replace(self, name: str, failure: Exception) -> None:
        """A worker is gone: its sessions run again elsewhere, and a new one takes its place."""
        # A TimeoutError has no text of its own.
        reason = (str(failure) or type(failure).__name__).splitlines()[0]
        logger.warning("session worker %s was lost: %s", name, reason)
        self.lost += 1
        self._metrics.worker_lost(name)
        ray.kill(self._handles.pop(name), no_restart=True)
        self._stats.pop(name, None)
        given_up = self._scheduler.worker_lost(name)
        self._dispatch()
        if given_up:
            await self._on_given_up(given_up)
        while not self._stopping:
            await asyncio.sleep(RESPAWN_S)
            replacement = self._spawn()
            try:
                async with asyncio.timeout(self._settings.start_timeout):
                    await self._handles[replacement].connect.remote(self._settings.start_timeout)
            except asyncio.CancelledError:
                raise
            except Exception as again:
                logger.warning("a replacement for %s did not start: %s", name, again)
                ray.kill(self._handles.pop(replacement), no_restart=True)
                continue
            self._admit(replacement)
            return
