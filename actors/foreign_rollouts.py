"""The rollouts of a session worker that remote rollout servers play: by id, with the connections of each run.

Invariant: a rollout that ended here is known for a while as ended, so that late and repeated calls are told so. A
server that stalls holds the sessions and connections of its own run, of which there are only so many; it holds none
of the places in which other runs play.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

from actors.messages import ForeignNews, ForeignSettings, RunSpec, WorkerSettings
from actors.scheduler import Assignment
from rollout.api import EnvironmentRef
from rollout.engine import Engine
from rollout.environment import EnvironmentFactory
from rollout.errors import (
    ConflictError,
    NotFoundError,
    RefusedError,
    RemoteDied,
    RemoteError,
    UnavailableError,
)
from rollout.remote.foreign_client import ForeignClient
from rollout.remote.foreign_session import ForeignSession, Trainer
from rollout.remote.hosts import AllowedHosts, HostRefused
from rollout.remote.wire import CompletionRequest, CompletionResponse, RolloutResponse
from rollout.rendering import ChatRenderer
from rollout.trajectory import Trajectory

# Sessions of one run that a worker has played at once; a rollout of generation A holds a connection to its end.
MAX_SESSIONS = 256
# Ended rollouts that are remembered.
MAX_ENDED = 20_000
# What is told of calls that are not answered; the metrics have a series for the category of each.
_REFUSALS = (ConflictError, NotFoundError, RefusedError, UnavailableError)
# Endings of trajectories that are outcomes under their own name, as the metrics have them.
_OUTCOMES = frozenset({"deadline", "cancelled"})

T = TypeVar("T")


class ForeignRollouts:
    """Sessions by rollout id. Lives on the worker's event loop."""

    def __init__(
        self, worker_id: str, settings: WorkerSettings, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """`transport`: httpx's, for tests."""
        self._worker_id = worker_id
        self._settings = settings
        self._transport = transport
        self._sessions: dict[str, ForeignSession] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._clients: dict[str, ForeignClient] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._calls = 0
        self._news = ForeignNews()
        foreign = settings.foreign
        self._hosts = None if foreign is None else AllowedHosts(foreign.allowed_hosts)

    @property
    def playing(self) -> int:
        """Sessions that remote rollout servers play now."""
        return len(self._sessions)

    def ended(self, trajectory: Trajectory) -> None:
        """An attempt has ended, whether or not a server ever heard of it."""
        self._news.ended.append((outcome_of(trajectory), trajectory.timing.total_s))

    def news(self) -> ForeignNews:
        """What happened since this was last asked."""
        news, self._news = self._news, ForeignNews()
        return news

    def slots(self, run: str) -> asyncio.Semaphore:
        """The places in which a run's sessions play."""
        known = self._slots.get(run)
        if known is None:
            known = self._slots[run] = asyncio.Semaphore(min(MAX_SESSIONS, self._settings.max_sessions))
        return known

    def session(
        self,
        spec: RunSpec,
        assignment: Assignment,
        engine: Engine,
        chat: ChatRenderer,
        environment: EnvironmentFactory | None,
    ) -> ForeignSession:
        """A session of a run whose spec is `remote`, reachable from now on. Raises RemoteError, RefusedError."""
        foreign = self._settings.foreign
        if foreign is None:
            raise RefusedError(NO_GATEWAY, "environment.remote")
        made = ForeignSession(
            assignment.key,
            assignment.task,
            trainer=Trainer(
                engine=engine,
                chat=chat,
                address=f"{foreign.address}/remote/{self._worker_id}",
                secret=foreign.secret,
                tokenizer=self._settings.model,
                revision=self._settings.revision,
            ),
            client=self._client(spec, foreign),
            sampling=spec.sampling,
            limits=spec.limits,
            environment=environment,
            attempt=assignment.attempt,
            queue_s=max(0.0, time.time() - assignment.queued_at) if assignment.queued_at else 0.0,
            on_end=self._end,
        )
        self._sessions[made.rollout_id] = made
        return made

    async def complete(self, rollout_id: str, request: CompletionRequest) -> CompletionResponse:
        """A model call of a rollout. Raises NotFoundError, and what ForeignSession.complete raises."""
        try:
            session = self._get(rollout_id)
            return await self._counted(lambda: session.complete(request))
        except _REFUSALS as refusal:
            refused = self._news.refused
            refused[refusal.category] = refused.get(refusal.category, 0) + 1
            raise

    async def completed(self, rollout_id: str, report: RolloutResponse) -> None:
        """The end of a rollout. The first report counts; repeats are taken and change nothing."""
        if rollout_id not in self._ended:
            await self._get(rollout_id).completed(report)

    async def forget_run(self, run: str) -> None:
        """A run is gone: its connections are closed."""
        self._slots.pop(run, None)
        client = self._clients.pop(run, None)
        if client is not None:
            await client.close()

    async def close(self) -> None:
        """Close all connections."""
        for run in list(self._clients):
            await self.forget_run(run)

    async def _counted(self, work: Callable[[], Awaitable[T]]) -> T:
        # Callers that wait hold places in the actor, and those of the controller's calls must stay free.
        if self._calls >= self._settings.foreign_calls:
            raise UnavailableError(f"{self._calls} calls of remote rollouts are waiting in this worker")
        self._calls += 1
        try:
            return await work()
        finally:
            self._calls -= 1

    def _client(self, spec: RunSpec, foreign: ForeignSettings) -> ForeignClient:
        assert spec.remote is not None
        known = self._clients.get(spec.run)
        if known is None:
            hosts = None if spec.remote.url in foreign.trusted else self._hosts
            connections = min(MAX_SESSIONS, self._settings.max_sessions)
            known = ForeignClient(spec.remote, connections, hosts=hosts, transport=self._transport)
            self._clients[spec.run] = known
        return known

    def _get(self, rollout_id: str) -> ForeignSession:
        try:
            return self._sessions[rollout_id]
        except KeyError:
            pass
        if rollout_id in self._ended:
            raise ConflictError("the rollout has ended")
        raise NotFoundError("there is no such rollout; the worker that held it may have been lost", "rollout_id")

    def _end(self, session: ForeignSession) -> None:
        self._sessions.pop(session.rollout_id, None)
        self._ended[session.rollout_id] = None
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)


def outcome_of(trajectory: Trajectory) -> str:
    """How an attempt ended, in the words of the metrics (`foreign_outcome` in rollout.metrics_catalogue)."""
    if trajectory.stop_reason != "error":
        return trajectory.stop_reason if trajectory.stop_reason in _OUTCOMES else "completed"
    category = (trajectory.error or "").partition(":")[0]
    return category if category in (RemoteError.category, RemoteDied.category) else "error"


NO_GATEWAY = "remote rollout servers ask for every turn at the gateway, and this cluster has none (gateway.enabled)"


def check_remote(environment: EnvironmentRef, foreign: ForeignSettings | None) -> None:
    """Whether this cluster may and can have a run played there. Raises RefusedError, which says what to change."""
    url = environment.remote
    if url is None:
        return
    if foreign is None:
        raise RefusedError(NO_GATEWAY, "environment.remote")
    here = AllowedHosts()
    if url not in foreign.trusted:
        try:
            AllowedHosts(foreign.allowed_hosts).check_listed(url)
        except HostRefused:
            raise RefusedError(
                f"{url} is no address that this cluster calls; whoever runs it can add its host to "
                "remote_rollout.allowed_hosts",
                "environment.remote",
            ) from None
    if foreign.address_given:
        return
    try:
        here.check_listed(foreign.address)
    except HostRefused:
        return
    try:
        here.check_listed(url)
    except HostRefused:
        raise RefusedError(
            f"the rollout server at {url} would be told to ask for its turns at {foreign.address}, which is that "
            "machine itself; set gateway.public_url to where it reaches this cluster",
            "environment.remote",
        ) from None
