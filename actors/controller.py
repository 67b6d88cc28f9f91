"""The controller: the actor that trainers, workers and engines meet in. It wires the parts and talks; they decide.

Invariant: what it answers is in the journal. When it dies, Ray starts it again: it reads the journal, starts new
session workers, and goes on; trainers see a pause.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import ray

from actors import journal_records as records
from actors import journal_remote
from actors.agent_book import AddedAgents, AgentBook
from actors.capture_service import CaptureService
from actors.delivery import Delivery
from actors.engine_client import EngineInfo
from actors.gallery import Gallery
from actors.gate import Gate
from actors.journal import Journal
from actors.loading_board import BoardReader
from actors.loop_lag import LoopLag
from actors.messages import ControllerSettings
from actors.metrics import Metrics
from actors.metrics_gauges import Sources, scrape
from actors.remote_service import RemoteService
from actors.run_service import RunService
from actors.run_store import RunStore
from actors.scheduler import Assignment, Scheduler
from actors.unattended import ask_oneself, repeatedly, to_the_end, until_done
from actors.viewer import Viewer
from actors.weight_keeper import WeightKeeper
from actors.worker_pool import WorkerPool
from rollout import logs
from rollout.agents.held_turns import HeldTurn
from rollout.agents.spec import NamedAgent
from rollout.api import (
    Acknowledged,
    Batch,
    CapturedSession,
    LeaseRequest,
    NoBatch,
    OpenedSession,
    RunInfo,
    RunRequest,
    Submitted,
)
from rollout.capture.calls import CapturedCall
from rollout.capture.session_book import CaptureLimits
from rollout.errors import BusyError, RolloutError, UnavailableError, WorkerDied
from rollout.tasks import Task
from rollout.viewing import History, TrajectoryPage, TrajectoryQuery, TrajectoryRows
from rollout.weights import WeightReport, WeightSource

logger = logging.getLogger(__name__)

# How often leases are looked through for expired ones, whatever failed before: those of dead trainers must come back.
EXPIRE_S = 0.5
# Without a figure that moves: what shows it again and again shows it once.
STARTING = "the cluster is starting and not ready yet; GET /v1/loading/progress says how far its engines are"


class Controller:
    """One per cluster, detached, named "controller" in the cluster's namespace."""

    def __init__(self, settings: ControllerSettings) -> None:
        logs.install(settings.worker.logging, "controller")
        self._settings = settings
        self._started_at = time.time()
        self._metrics = Metrics()
        self._journal = Journal(settings.journal_path, sync=settings.journal_sync)
        self._scheduler = Scheduler(settings.max_attempts, settings.max_concurrent_sessions)
        self._pool = WorkerPool(
            settings,
            self._scheduler,
            on_collected=lambda worker, collected: self._service.accept(worker, collected),
            on_given_up=self._given_up,
            dispatch=self._dispatch,
            metrics=self._metrics,
        )
        self._store = RunStore(
            self._journal,
            self._scheduler,
            cancel_sessions=self._pool.cancel,
            dispatch=self._dispatch,
            metrics=self._metrics,
            gallery=Gallery(settings.gallery_trajectories, settings.gallery_bytes),
        )
        self._service = RunService(self._store, settings.run_defaults, settings.worker.foreign)
        self._viewer = Viewer(self._store)
        self._delivery = Delivery(self._store, self._service)
        self._capture = CaptureService(self._store, settings.session_secret)
        self._weights: WeightKeeper | None = None
        self._remote = RemoteService(
            settings.worker.remote, write=self._store.write, workers=lambda: self._pool.heard
        )
        self._recovered = records.recover(self._journal)
        self._recovered_remote = journal_remote.recover(self._journal)
        self._agents = AgentBook(self._store, self._recovered.agents)
        self._engine: EngineInfo | None = None
        self._loops: list[asyncio.Task[None]] = []
        gate = functools.partial(Gate, settings.start_timeout, lambda: self._pool.failure)
        self._open = gate("did not read its journal")
        """Before trainers: they are answered once the journal is read, whether there are engines or not."""
        self._ready = gate("did not become ready; are the engines running?")
        self._lag = LoopLag()
        self._board = BoardReader(settings.cluster)
        self._coming_back = threading.Event()
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._metrics.died("controller")
            # Nobody calls spawn_workers and connect a second time.
            ask_oneself(ray.get_runtime_context().current_actor.come_back.remote, self._coming_back)

    # Start and end

    async def spawn_workers(self) -> str:
        """Start the workers; see WorkerPool.spawn. Returns the renderer's name."""
        renderer = await self._pool.spawn()
        self._capture.markers = await self._pool.reasoning_markers()
        return renderer

    async def connect(self) -> EngineInfo:
        """Take up what the journal has, connect to the engines, and begin. Raises EngineTimeout."""
        self._take_up()
        if self._engine is None:
            self._engine = await self._pool.connect()
        self._weights = await self._keep_weights()
        await self._remote.begin(self._recovered_remote)
        self._loops.append(asyncio.create_task(self._weights.keep()))
        self._ready.open()
        self._dispatch()
        return self._engine

    async def come_back(self) -> None:
        """After a death: everything that `rollout up` would ask for. With a node gone, it may take some attempts."""
        if not self._coming_back.is_set():
            self._coming_back.set()
            logger.warning("the controller was started again; %d runs are in the journal", len(self._recovered.runs))
            await until_done("taking up the work again", self._come_back)

    def _take_up(self) -> None:
        if self._open.is_open:
            return
        self._store.recover(self._recovered)
        expiring = repeatedly(EXPIRE_S, "ending what is overdue", self._expire)
        self._loops = [asyncio.create_task(work) for work in (expiring, self._lag.watch())]
        self._open.open()

    async def _come_back(self) -> None:
        self._take_up()
        if self._engine is None:
            await self.spawn_workers()
        await self.connect()

    async def current_weights(self) -> tuple[int, WeightSource | None]:
        """What a starting engine must carry before it serves. Answers before anything else is ready."""
        if self._weights is not None:
            return self._weights.version, self._weights.source
        return self._recovered.version, self._recovered.source

    async def stop(self) -> None:
        """Close the workers and the journal, within a few seconds."""
        for task in self._loops:
            task.cancel()
        if self._weights is not None:
            self._weights.close()
        await self._remote.close()
        await self._pool.close()
        await self._store.close()

    # Runs (see RunService)

    async def create_run(self, request: RunRequest) -> RunInfo:
        """A new run."""
        await self._open.passed()
        return await to_the_end(self._service.create(request))

    async def submit(self, run: str, tasks: Sequence[Task]) -> Submitted:
        """Tasks for a run."""
        await self._open.passed()
        return await to_the_end(self._service.submit(run, tasks))

    async def pause(self, run: str, paused: bool = True) -> RunInfo:
        """Hold a run back, or let it go on."""
        await self._open.passed()
        return await to_the_end(self._service.pause(run, paused))

    async def cancel(self, run: str) -> RunInfo:
        """End a run."""
        await self._open.passed()
        return await to_the_end(self._service.cancel(run))

    async def forget(self, run: str) -> None:
        """Drop a run with all it has."""
        await self._open.passed()
        await to_the_end(self._forget(run))

    async def _forget(self, run: str) -> None:
        await self._service.forget(run)
        self._pool.forget_run(run)
        self._metrics.run_forgotten(run)
        self._store.gallery.forget(run)
        self._store.histories.forget(run)

    async def run_info(self, run: str) -> RunInfo:
        """A run at this moment."""
        await self._open.passed()
        return self._told(self._service.info(run))

    async def runs(self) -> list[RunInfo]:
        """All runs."""
        await self._open.passed()
        return [self._told(info) for info in self._service.runs()]

    async def watch(self, run: str, timeout: float) -> RunInfo:
        """A run after its next change."""
        await self._open.passed()
        return self._told(await self._service.watch(run, timeout))

    # Batches (see Delivery)

    async def lease(self, run: str, request: LeaseRequest) -> Batch | NoBatch:
        """The next batch."""
        await self._open.passed()
        return await self._delivery.lease(run, request)

    async def fetch(self, lease_id: str) -> Batch:
        """A leased batch once more."""
        await self._open.passed()
        return await self._delivery.fetch(lease_id)

    async def acknowledge(self, lease_id: str) -> Acknowledged:
        """A batch is trained on."""
        await self._open.passed()
        return await to_the_end(self._delivery.acknowledge(lease_id))

    async def extend(self, lease_id: str, ttl: float) -> float:
        """More time for a batch."""
        await self._open.passed()
        return await to_the_end(self._delivery.extend(lease_id, ttl))

    async def release(self, lease_id: str) -> None:
        """Give a batch back."""
        await self._open.passed()
        await to_the_end(self._delivery.release(lease_id))

    # Captured sessions (see CaptureService)

    async def open_session(self, run: str, task: Task | None, limits: CaptureLimits | None) -> OpenedSession:
        """An address for one black-box agent."""
        await self._open.passed()
        return await to_the_end(self._capture.open(run, task, limits))

    async def session_info(self, session: str) -> CapturedSession:
        """A session at this moment."""
        await self._open.passed()
        return self._capture.info(session)

    async def reward_session(
        self, session: str, reward: float | None, turn_rewards: dict[str, float] | None
    ) -> CapturedSession:
        """Score a session."""
        await self._open.passed()
        await self._capture.reward(session, reward, turn_rewards)
        return self._capture.info(session)

    async def close_session(self, session: str, cancel: bool) -> CapturedSession:
        """Turn its calls into a trajectory."""
        await self._open.passed()
        return await to_the_end(self._capture.close(session, cancel=cancel))

    async def begin_call(self, session: str, request_id: str) -> None:
        """An engine is about to serve a session's request."""
        await self._open.passed()
        self._capture.begin(session, request_id)

    async def end_call(self, session: str, request_id: str, calls: list[CapturedCall], lost: bool) -> None:
        """An engine has served it."""
        await self._open.passed()
        self._capture.end(session, request_id, calls, lost)
        self._metrics.captured(len(calls), lost)

    # Agents (see AgentBook)

    async def added_agents(self, known: int | None) -> AddedAgents | None:
        """Those that were added; None where the asker knows them. Answers before anything else is ready."""
        return self._agents.added(known)

    async def add_agent(self, agent: NamedAgent) -> AddedAgents:
        """Serve one more."""
        return await to_the_end(self._agents.add(agent))

    async def remove_agent(self, name: str) -> AddedAgents:
        """Serve it no more."""
        return await to_the_end(self._agents.remove(name))

    async def hold_turn(self, turn: HeldTurn) -> None:
        """A turn goes back to its client, who runs the rest of its tools."""
        await self._agents.hold(turn)

    async def held_turn(self, key: str) -> HeldTurn | None:
        """The client is back."""
        return await self._agents.held(key)

    # Rollouts for foreign trainers (see RemoteService)

    async def remote_rollout(self, ask: Literal["accept", "result", "tools", "counts"], *arguments: Any) -> Any:
        """One of RemoteService's operations."""
        await self._ready.passed()
        try:
            work = getattr(self._remote, ask)(*arguments)
            return await (to_the_end(work) if ask == "accept" else work)
        except RolloutError as failure:
            if ask == "accept":
                self._metrics.remote_refused(busy=isinstance(failure, BusyError))
            raise

    # Weights (see WeightKeeper)

    async def update_weights(self, source: WeightSource, version: int | None = None) -> WeightReport:
        """Bring new weights to all engines."""
        await self._ready.passed()
        assert self._weights is not None
        return await to_the_end(self._weights.update(source, version))

    async def weights(self) -> dict[str, Any]:
        """Version, source and replicas, as plain data."""
        await self._ready.passed()
        assert self._weights is not None
        keeper = self._weights
        return {
            "version": keeper.version,
            "source": keeper.source.model_dump() if keeper.source is not None else None,
            "replicas": keeper.replicas.status(),
            "last_update": keeper.last_report,
        }

    async def serving(self) -> list[str]:
        """host:port of the engines' own servers, of those engines that carry the current weights. For the front."""
        return self._weights.replicas.serving() if self._weights is not None else []

    # Looking (see Viewer)

    async def look(self, what: str, *arguments: Any) -> Any:
        """`weights`, `runs` or one of Viewer's at once. Raises UnavailableError until engines are there."""
        if not self._ready.is_open:
            raise UnavailableError(STARTING)
        return await getattr(self, what)(*arguments)

    async def trajectories(self, run: str | None, query: TrajectoryQuery) -> TrajectoryPage:
        """A page of the recent trajectories."""
        await self._open.passed()
        return await self._viewer.trajectories(run, query)

    async def trajectory(self, trajectory_id: str) -> TrajectoryRows:
        """One of them, whole."""
        await self._open.passed()
        return await self._viewer.trajectory(trajectory_id)

    async def history(self, run: str) -> History:
        """The course of a run."""
        await self._open.passed()
        return await self._viewer.history(run)

    async def status(self) -> dict[str, Any]:
        """Runs, workers, weights and engine at this moment, as plain data."""
        weights = self._weights
        return {
            "uptime_s": time.time() - self._started_at,
            "ready": self._ready.is_open,
            "engine": self._engine,
            "policy_version": self._store.version,
            "replicas": weights.replicas.status() if weights is not None else {},
            "workers_lost": self._pool.lost,
            "workers": self._pool.stats,
            "runs": {info.run: self._told(info) for info in self._service.runs()},
            "journal": {
                "path": str(self._journal.path),
                "bytes": self._journal.num_bytes(),
                "commits": self._journal.commits,
                "writes": self._journal.writes,
            },
            "finished_rows_bytes": self._store.shelf.num_bytes,
        }

    async def metrics_text(self) -> bytes:
        """All metrics in Prometheus's text format. Answers while nothing else is ready yet."""
        sources = Sources(
            store=self._store,
            service=self._service,
            workers=self._pool.stats,
            lag=self._lag,
            started_at=self._started_at,
            ready=self._ready.is_open,
            replicas=self._weights.replicas if self._weights is not None else None,
            capture=self._capture.states,
            remote=self._remote.counts,
            board=self._board,
        )
        return await scrape(self._metrics, sources)

    async def worker_handles(self) -> dict[str, Any]:
        """The workers by id."""
        return self._pool.handles

    # Inside

    async def _keep_weights(self) -> WeightKeeper:
        from ray import serve

        handle = serve.get_deployment_handle(self._settings.worker.deployment, self._settings.worker.app)
        # The first call makes the handle's router, which is what tells the board of the replicas.
        async with asyncio.timeout(self._settings.start_timeout):
            await handle.describe.remote()
        keeper = WeightKeeper(
            handle,
            lambda version, source, state: self._store.write(records.put_weights(version, source, state)),
            self._service.set_version,
            self._metrics,
            on_unfit=self._pool.avoid,
        )
        keeper.restore(self._recovered.version, self._recovered.source, self._recovered.last_version)
        return keeper

    def _told(self, info: RunInfo) -> RunInfo:
        info.workers_lost = self._pool.lost
        return info

    def _dispatch(self) -> None:
        for worker, assignments in self._scheduler.assign(self._service.admit).items():
            by_run: dict[str, list[Assignment]] = {}
            for assignment in assignments:
                by_run.setdefault(assignment.key.run, []).append(assignment)
            for run, mine in by_run.items():
                self._pool.start(worker, self._service.spec(run), mine)

    async def _given_up(self, assignments: list[Assignment]) -> None:
        failure = WorkerDied(f"session workers died over this session {assignments[0].attempt} times")
        await self._store.give_up(assignments, "error", failure)

    async def _expire(self) -> None:
        self._delivery.expire(time.time())
        await self._capture.expire()
